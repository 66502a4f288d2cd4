"""The completion mode of the page."""

import re

import pytest

from page.actions import QUESTION, answers, configure, events, expect, press, reply_with, reply_with_error, send


def test_completion_shows_probabilities(page, client):
    configure(page, temperature="0")
    press(page, "Completion")
    prompt = page.get_by_label("Text", exact=True)
    prompt.fill("The opposite of hot is")
    press(page, "Generate")
    expect(page.locator("#generate")).to_have_text("Generate")
    tokens = page.get_by_role("option")
    own = client.completions.create(
        model="small-chat", prompt="The opposite of hot is", max_tokens=128, temperature=0, logprobs=5
    ).choices[0]  # fmt: skip
    assert tokens.all_text_contents() == [token for token in own.logprobs.tokens if token]
    expect(page.locator("#used")).to_have_text(re.compile(r"\d+ of 512 tokens"))
    tip = page.get_by_role("tooltip")
    expect(tip).to_be_hidden()
    tokens.first.hover()
    expect(tip).to_be_visible()
    rows = tip.locator("div")
    top = sorted(own.logprobs.top_logprobs[0].values(), reverse=True)
    assert rows.count() == len(top) == 5
    assert tip.locator(".chosen").count() == 1
    shown = float(rows.first.locator("span").last.text_content().split()[0]) / 100
    assert shown == pytest.approx(2.718281828 ** top[0], abs=1e-3)
    page.mouse.move(1, 1)
    expect(tip).to_be_hidden()
    page.locator("#extend").focus()
    page.keyboard.press("Tab")
    expect(tokens.first).to_be_focused()
    expect(tip).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(tip).to_contain_text("Chosen: " + tokens.nth(1).text_content().replace(" ", "␣"))
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.reload()
    expect(prompt).to_have_value("The opposite of hot is")


def test_completion_stops_and_continues(page, gate):
    configure(page, temperature="0")
    press(page, "Completion")
    prompt = page.get_by_label("Text", exact=True)
    prompt.fill("Once upon a time")
    gate.close(5)
    page.keyboard.press("Control+Enter")
    tokens = page.locator("#tokens")
    expect(tokens).not_to_be_empty()
    press(page, "Stop")
    gate.open()
    expect(page.locator("#completion .status")).to_contain_text("stopped")
    begun = tokens.text_content()
    bodies = reply_with(page, events({"choices": [{"text": " there", "finish_reason": "length"}]}), path="completions")
    press(page, "Keep and continue")
    expect(tokens).to_have_text(" there")
    expect(prompt).to_have_value("Once upon a time" + begun)
    assert bodies[0]["prompt"] == "Once upon a time" + begun
    assert (bodies[0]["logprobs"], bodies[0]["max_tokens"]) == (5, 128)


def test_errors_of_completions(page):
    page.failures.append("400")
    press(page, "Completion")
    page.get_by_label("Text", exact=True).fill("big " * 600)
    press(page, "Generate")
    expect(page.locator("#failure")).to_contain_text("the context is of 512")


def test_a_model_without_chats_offers_completion(page):
    page.failures.append("400")
    reply_with_error(page, 400, "the model has no chat format", param="messages")
    send(page)
    expect(answers(page)).to_contain_text("the model has no chat format")
    press(page, "Use the completion mode")
    expect(page.get_by_label("Text", exact=True)).to_have_value(QUESTION)
    expect(page.get_by_label("Text", exact=True)).to_be_focused()
