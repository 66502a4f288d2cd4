"""Errors of the server and the network, and how the page explains them."""

import pytest
from serving import serving

from page.actions import (
    ANSWER,
    QUESTION,
    answers,
    configure,
    events,
    expect,
    idle,
    lose,
    press,
    reply_with,
    reply_with_error,
    said,
    send,
    tab,
)


def recover(page):
    """The server works again: the same question is answered."""
    page.unroute("**/v1/chat/completions")
    configure(page, temperature="0")
    press(page, "Regenerate")
    expect(answers(page).locator(".body")).to_have_text(ANSWER)


def test_a_bad_request_is_explained(page):
    page.failures.append("400")
    configure(page, top_p="2")
    send(page)
    expect(answers(page)).to_contain_text("top_p is 2")
    expect(page.locator("article.user .body")).to_have_text(QUESTION)
    expect(answers(page).get_by_role("button", name="Use the completion mode")).to_have_count(0)
    configure(page, top_p="1")
    press(page, "Regenerate")
    idle(page)
    expect(answers(page).locator(".error")).to_have_count(0)
    expect(answers(page).locator(".body")).not_to_be_empty()


def test_a_full_context_is_explained(page):
    page.failures.append("400")
    send(page, "big " * 600)
    expect(answers(page)).to_contain_text("the context is of 512")
    expect(answers(page)).to_contain_text("shorten the text, or start a new conversation")


def test_a_busy_server_is_explained(page):
    page.failures += ["429", "503"]
    reply_with_error(page, 429, "8 requests run already", {"Retry-After": "3"})
    send(page)
    expect(answers(page)).to_contain_text("8 requests run already (429)")
    expect(answers(page)).to_contain_text("Try again in 3 seconds")
    page.unroute("**/v1/chat/completions")
    reply_with(page, "<h1>Proxy</h1>", 503, kind="text/html")
    press(page, "Regenerate")
    expect(answers(page)).to_contain_text("503")
    expect(answers(page)).to_contain_text("Try again in a few seconds")
    recover(page)


def test_a_lost_network_is_explained(page):
    lose(page)
    send(page)
    expect(answers(page)).to_contain_text("The server cannot be reached")
    expect(page.locator("article.user .body")).to_have_text(QUESTION)
    page.reload()
    expect(answers(page)).to_contain_text("The server cannot be reached")
    recover(page)


def test_a_model_that_is_being_loaded_is_waited_for(page):
    page.failures.append("503")
    reply_with_error(page, 503, "the model is being loaded", {"Retry-After": "5"}, path="models")
    page.clock.install()
    page.reload()
    expect(page.locator("#context")).to_have_text("the model is being loaded")
    page.unroute("**/v1/models")
    page.clock.run_for(5000)
    expect(page.locator("#context")).to_have_text("Context of 512 tokens")


@pytest.mark.parametrize("end", ["error", "nothing"])
def test_an_error_within_a_stream_keeps_what_came_before(page, end):
    error = {"error": {"message": "logits are NaN or infinite", "type": "server_error", "param": None, "code": None}}
    chunks = [said("So "), said("far")] + [error] * (end == "error")
    reply_with(page, events(*chunks, done=end == "error"))
    send(page)
    idle(page)
    expect(answers(page).locator(".body")).to_have_text("So far")
    text = "logits are NaN or infinite" if end == "error" else "The connection ended before the answer did."
    expect(answers(page).locator(".error")).to_contain_text(text)
    expect(page.locator("#composer .status")).to_contain_text(text)


def test_a_missing_key_is_asked_for(browser, llama, gate):
    gate.open()
    with serving(llama, keys=("secret",)) as client, tab(browser, client.url) as page:
        page.failures.append("401")
        dialog = page.get_by_role("dialog", name="This server needs an API key")
        expect(dialog).to_contain_text("session storage until the tab is closed")
        expect(dialog.get_by_label("API key")).to_be_focused()
        dialog.get_by_label("API key").press("Escape")
        expect(page.locator("#context")).to_have_text("An API key is needed.")
        configure(page, temperature="0")
        send(page)
        dialog.get_by_label("API key").fill("wrong")
        press(dialog, "Use this key")
        expect(dialog).to_contain_text("the key is missing or wrong")
        dialog.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(answers(page).locator(".body")).to_have_text(ANSWER)
        expect(page.locator("#model")).to_have_text("small-chat")
        page.reload()
        press(page, "Regenerate")
        idle(page)
        expect(answers(page).locator(".error")).to_have_count(0)
        page.get_by_role("button", name="Settings").click()
        press(page, "Forget the API key")
        press(page, "Close")
        press(page, "Regenerate")
        press(dialog, "Cancel")
        expect(answers(page)).to_contain_text("the key is missing")
        expect(answers(page).locator(".body")).to_have_text(ANSWER)
