"""Chats on the page: sending, stopping, editing, saved conversations, settings."""

import re

from serving import wait_for

from page.actions import (
    ANSWER,
    QUESTION,
    STORY,
    answers,
    ask,
    configure,
    events,
    expect,
    idle,
    lose,
    message,
    press,
    reply_with,
    said,
    send,
)


def test_send(page, llama):
    [own] = llama.chat_completion([[{"role": "user", "content": QUESTION}]], temperature=0)
    expect(page.locator("#model")).to_have_text("small-chat")
    expect(page.locator("#context")).to_have_text("Context of 512 tokens")
    ask(page)
    assert page.locator("article.user .body").all_text_contents() == [QUESTION]
    expect(answers(page).locator(".body")).to_have_text(own["generation"]["content"])
    numbers = re.compile(r"\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s")
    expect(answers(page).locator(".foot")).to_contain_text(numbers)
    expect(page.locator("#used")).to_have_text(re.compile(r"\d+ of 512 tokens"))
    expect(message(page)).to_be_focused()
    expect(message(page)).to_have_value("")


def test_an_answer_grows(page, gate):
    configure(page, temperature="0")
    gate.close(6)
    send(page, STORY)
    body = answers(page).locator(".body")
    expect(body).not_to_be_empty()
    wait_for(lambda: gate.left == 0)
    begun = body.text_content()
    expect(answers(page)).to_have_attribute("aria-busy", "true")
    gate.open()
    idle(page)
    assert body.text_content().startswith(begun) and len(body.text_content()) > len(begun) + 100
    expect(answers(page)).to_have_attribute("aria-busy", "false")


def test_stop(page, gate, client):
    configure(page, temperature="0")
    gate.close(6)
    send(page, STORY)
    expect(answers(page).locator(".body")).not_to_be_empty()
    message(page).fill("typed meanwhile")
    press(page, "Stop")
    idle(page)
    gate.open()
    wait_for(lambda: client.server.service.loop.open == 0)
    begun = answers(page).locator(".body").text_content()
    assert 0 < len(begun) < 60
    expect(answers(page).locator(".foot")).to_contain_text("stopped")
    expect(message(page)).to_have_value("typed meanwhile")
    bodies = reply_with(page, events(said("Yes.", "stop")))
    send(page, "And then?")
    expect(answers(page).last.locator(".body")).to_have_text("Yes.")
    assert [m["content"] for m in bodies[0]["messages"]] == [STORY, begun, "And then?"]


def test_answers_stopped_before_the_first_token_are_left_out(page, gate):
    gate.close(0)
    send(page, "unanswered")
    expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    idle(page)
    gate.open()
    expect(answers(page)).to_contain_text("stopped before the first token")
    bodies = reply_with(page, events(said("Yes.", "stop")))
    send(page)
    idle(page)
    assert [m["content"] for m in bodies[0]["messages"]] == [QUESTION]


def test_edit_and_resend_cuts_the_conversation(page):
    ask(page)
    ask(page, "Who are you?")
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="Edit", exact=True).first.click()
    area = page.get_by_label("Edit the message")
    expect(area).to_be_focused()
    area.press("Escape")
    expect(page.get_by_role("button", name="Edit", exact=True).first).to_be_focused()
    page.get_by_role("button", name="Edit", exact=True).first.click()
    area.fill("What is 2+3?")
    press(page, "Send again")
    idle(page)
    assert page.locator("article.user .body").all_text_contents() == ["What is 2+3?"]
    expect(answers(page).locator(".body")).to_have_text("2 + 3 = 5.")
    expect(message(page)).to_be_focused()


def test_regenerate_replaces_the_last_answer(page):
    ask(page)
    bodies = reply_with(page, events(said("Tiny.", "stop")))
    press(page, "Regenerate")
    expect(answers(page).locator(".body")).to_have_text("Tiny.")
    assert [m["content"] for m in bodies[0]["messages"]] == [QUESTION]
    page.unroute("**/v1/chat/completions")
    lose(page)
    press(page, "Regenerate")
    expect(answers(page)).to_contain_text("cannot be reached")
    expect(answers(page).locator(".body")).to_have_text("Tiny.")  # rather than nothing


def test_conversations_are_kept(page, browser, client):
    configure(page, temperature="0")
    page.get_by_text("System prompt").click()
    page.get_by_label("System prompt").fill("Be brief.")
    send(page)
    idle(page)
    press(page, "New chat")
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    send(page, "Who are you?")
    idle(page)
    message(page).fill("a draft")
    page.reload()
    titles = page.locator("#list .title")
    expect(titles).to_have_text(["Who are you?", QUESTION])
    expect(answers(page).locator(".body")).to_have_text("My name is Llama.")
    expect(answers(page).locator(".foot")).to_contain_text("tokens/s")
    expect(message(page)).to_have_value("a draft")
    titles.last.click()
    expect(answers(page).locator(".body")).to_have_text(ANSWER)
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    page.get_by_role("button", name=f"Rename {QUESTION}").click()
    page.get_by_label("New name").fill("Sizes")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["Who are you?", "Sizes"])
    expect(titles.last).to_be_focused()
    page.get_by_role("button", name="Delete Sizes").click()
    expect(titles).to_have_text(["Who are you?"])
    expect(answers(page)).to_have_count(0)
    press(page, "Undo")
    expect(titles).to_have_text(["Who are you?", "Sizes"])
    titles.first.hover()
    page.get_by_role("button", name="Delete Who are you?").click()
    page.reload()
    expect(titles).to_have_text(["Sizes"])


def test_two_tabs_do_not_lose_conversations(page, client):
    other = page.context.new_page()
    other.goto(client.url)
    ask(page)
    ask(other, "Who are you?")
    expect(page.locator("#list .title")).to_have_text(["Who are you?", QUESTION])
    page.reload()
    expect(page.locator("#list .title")).to_have_text(["Who are you?", QUESTION])
    expect(answers(page).locator(".body")).to_have_text(ANSWER)


def test_full_storage_is_reported(page):
    page.evaluate("void (Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); })")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("storage is full")
    expect(answers(page).locator(".body")).to_have_text(ANSWER)
    page.locator("#notice").get_by_role("button", name="Dismiss").click()
    expect(page.locator("#notice")).to_be_hidden()


def test_foreign_data_in_the_storage_is_ignored(page):
    """Other programs may serve pages from the same origin."""
    for value in ("[1", '"text"', '{"id": "x", "messages": [1]}'):
        for name in ("settings", "theme", "prompt", "chat.x", "mode", "current", "draft"):
            page.evaluate(
                "([name, value]) => localStorage[name] = sessionStorage[name] = value", [f"llama.{name}", value]
            )
        page.reload()
        ask(page)
        expect(answers(page).locator(".body")).to_have_text(ANSWER)
        page.evaluate("localStorage.clear(); sessionStorage.clear()")


def test_settings_are_sent(page):
    bodies = reply_with(page, events(said("Yes.", "stop")))
    values = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "max_tokens": 9, "seed": -3}
    values |= {"repetition_penalty": 1.25, "frequency_penalty": 0.5, "presence_penalty": -0.5}
    configure(page, **{name: str(value) for name, value in values.items()}, stop_strings="END\n\\n\\n")
    page.reload()
    send(page)
    idle(page)
    values |= {"stop": ["END", "\n\n"], "messages": [{"role": "user", "content": QUESTION}], "model": "small-chat"}
    assert bodies == [{**values, "stream": True, "stream_options": {"include_usage": True}}]
    page.get_by_role("button", name="Settings").click()
    press(page, "Reset")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    press(page, "Regenerate")
    idle(page)
    assert {*bodies[1]} == {"temperature", "top_p", "messages", "model", "stream", "stream_options"}


def test_streams_in_chunks_of_any_size(page):
    """Chunks that end within a line or a character, both kinds of line ends, comments, other fields."""
    body = ': keepalive\r\n\r\nevent: x\r\ndata: {"a": "é🦙"}\r\n\r\ndata:{"a": 2}\n\ndata: [DONE]\n\ndata: {}\n\n'
    read = """async ([bytes, size]) => {
        const stream = new ReadableStream({ start(to) {
            for (let i = 0; i < bytes.length; i += size) to.enqueue(new Uint8Array(bytes.slice(i, i + size)));
            to.close();
        } });
        const found = [];
        for await (const event of events(new Response(stream))) found.push(event);
        return found;
    }"""
    for size in (1, 2, 3, 7, 1000):
        assert page.evaluate(read, [[*body.encode()], size]) == [{"a": "é🦙"}, {"a": 2}]
