"""The page at /, in Chromium, on a server of the bundled chat model."""

import base64
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from small import ROOT

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from serving import build, serving, wait_for  # noqa: E402

PAGE = (ROOT / "llama" / "server" / "page.html").read_bytes()
QUESTION, ANSWER = "What is the opposite of big?", "The opposite of big is small."
STORY = "Tell me a story about a fox."
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
AXES = ("button", "textbox", "spinbutton", "listbox", "option", "link", "region", "dialog")


class Gate:
    """Before each step of the engine; `close` holds it after some more steps, `open` lets it go on."""

    def __init__(self, llama):
        self.left, self.changed, self.step = None, threading.Condition(), llama.engine.step
        llama.engine.step = self

    def __call__(self):
        with self.changed:
            assert self.changed.wait_for(lambda: self.left is None or self.left > 0, 30)
            self.left = self.left and self.left - 1
        return self.step()

    def close(self, steps):
        self._set(steps)

    def open(self):
        self._set(None)

    def _set(self, left):
        with self.changed:
            self.left = left
            self.changed.notify()


@pytest.fixture(scope="module")
def gate(llama):
    return Gate(llama)


@pytest.fixture(scope="module")
def llama():
    return build(max_seq_len=512)


@pytest.fixture(scope="module")
def client(llama):
    with serving(llama) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("needs Chromium; the environment variable CHROMIUM may name it")
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    sync_api.expect.set_options(timeout=10_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextmanager
def tab(browser, url, **options):
    """A page in a context of its own. At the end: it asked this server alone, and the console has no error, and none of
    the Content-Security-Policy, but for failed requests whose status or error is in `page.failures`."""
    context = browser.new_context(**{"viewport": {"width": 1000, "height": 700}, **options})
    context.set_default_timeout(10_000)
    page, requests, errors = context.new_page(), [], []
    page.failures = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(url)
    try:
        yield page
    finally:
        context.close()
    expected = re.compile(rf"Failed to load resource: .*({'|'.join(page.failures) or 'nothing'})")
    assert [error for error in errors if not expected.match(error)] == []
    assert {urlsplit(request)[1] for request in requests if not request.startswith("data:")} == {urlsplit(url)[1]}
    assert not any("favicon" in request for request in requests)


@pytest.fixture
def page(browser, client, gate):
    gate.open()
    try:
        with tab(browser, client.url) as page:
            yield page
    finally:
        gate.open()


def expect(of):
    from playwright.sync_api import expect

    return expect(of)


def message(page):
    return page.get_by_role("textbox", name="Message", exact=True)


def send(page, text=QUESTION):
    message(page).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def answers(page):
    return page.locator("article.assistant")


def press(page, name, **options):
    page.get_by_role("button", name=name, exact=True, **options).click()


def idle(page):
    expect(page.locator("#send")).to_have_text("Send")


def configure(page, **settings):
    press(page, "Settings")
    for name, value in settings.items():
        page.get_by_label(name.replace("_", " ").capitalize()).fill(value)
    press(page, "Close")


def ask(page, text=QUESTION):
    """A question and its whole answer, which is always the same."""
    configure(page, temperature="0")
    send(page, text)
    idle(page)


def events(*chunks, done=True):
    """The body of a stream."""
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


def said(text, reason=None):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


def reply_with(page, body, status=200, headers=None, path="chat/completions", kind="text/event-stream"):
    """Answer requests in the server's place; the bodies that were sent."""
    bodies = []

    def handle(route):
        bodies.append(route.request.post_data_json)
        route.fulfill(status=status, headers={"Content-Type": kind, **(headers or {})}, body=body)

    page.route(f"**/v1/{path}", handle)
    return bodies


def reply_with_error(page, status, message, headers=None, path="chat/completions", **fields):
    body = json.dumps({"error": {"message": message, "type": "", "param": None, "code": None, **fields}})
    return reply_with(page, body, status, headers, path, "application/json")


# ---------------------------------------------------------------------------------------------------------------------
# Without a browser


def test_the_policy_lets_only_this_script_run():
    from llama.server import page

    policy = dict(rule.split(" ", 1) for rule in page.HEADERS["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        [block] = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), PAGE, re.DOTALL)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'"
    nothing = {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert {name for name, value in policy.items() if value == "'none'"} >= nothing
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "data:"
    assert "unsafe" not in page.HEADERS["Content-Security-Policy"]
    assert b"style=" not in PAGE and not re.search(rb"\son[a-z]+=\"", PAGE)
    assert not re.search(rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", PAGE)
    assert len(PAGE) <= 100_000


def test_the_policy_is_in_force(browser, client):
    """Markup from a string, a script that was not there, another host: all are refused."""
    page = browser.new_page()
    page.goto(client.url)
    attempt = "async (attempt) => { try { await attempt(); return 'done'; } catch (error) { return error.name; } }"
    add = "{ const made = document.createElement('script'); made.text = 'window.bad = 1'; document.body.append(made); }"
    for code in ("document.body.innerHTML = '<b>x</b>'", "fetch('https://example.org')", add):
        assert page.evaluate(f"({attempt})(() => {code})") == "TypeError"
    assert page.evaluate("window.bad") is None
    page.close()


def test_the_page_needs_no_key(llama, caplog):
    with caplog.at_level(logging.INFO), serving(llama, keys=("secret",)) as client:
        plain = httpx.get(client.url, headers={"Accept-Encoding": "identity"})
        assert (plain.status_code, plain.content) == (200, PAGE)
        assert plain.headers["content-type"] == "text/html; charset=utf-8"
        assert plain.headers["x-content-type-options"] == "nosniff"
        assert plain.headers["referrer-policy"] == "no-referrer"
        assert "script-src 'sha256-" in plain.headers["content-security-policy"]
        with httpx.stream("GET", client.url, headers={"Accept-Encoding": "gzip"}) as zipped:
            assert gzip.decompress(b"".join(zipped.iter_raw())) == PAGE
            assert zipped.headers["content-encoding"] == "gzip"
        head = httpx.head(client.url, headers={"Accept-Encoding": "identity"})
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(PAGE)))
        assert httpx.post(client.url).status_code == 405
        assert httpx.get(f"{client.url}/v1/models").status_code == 401
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


# ---------------------------------------------------------------------------------------------------------------------
# Chat


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


def test_what_was_stopped_before_its_first_token_is_left_out(page, gate):
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


def test_full_storage_is_said(page):
    page.evaluate("void (Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); })")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("storage is full")
    expect(answers(page).locator(".body")).to_have_text(ANSWER)
    page.locator("#notice").get_by_role("button", name="Dismiss").click()
    expect(page.locator("#notice")).to_be_hidden()


def test_what_else_is_in_the_storage_does_no_harm(page):
    """Other programs serve pages from the same address."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def lose(page):
    page.failures.append("net::ERR_CONNECTION_ABORTED")
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionaborted"))


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
    page.unroute("**/v1/chat/completions")
    configure(page, temperature="0")
    press(page, "Regenerate")
    expect(answers(page).locator(".body")).to_have_text(ANSWER)


def test_a_lost_network_is_explained(page):
    lose(page)
    send(page)
    expect(answers(page)).to_contain_text("The server cannot be reached")
    expect(page.locator("article.user .body")).to_have_text(QUESTION)
    page.reload()
    expect(answers(page)).to_contain_text("The server cannot be reached")
    page.unroute("**/v1/chat/completions")
    configure(page, temperature="0")
    press(page, "Regenerate")
    expect(answers(page).locator(".body")).to_have_text(ANSWER)


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


def test_streams_in_pieces_of_any_size(page):
    """Chunks that end within a line and within a character, line ends of either kind, comments, other fields."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Markdown

MARKDOWN = """# Title

One *em* and **strong *both* words**, `code <b>` and ~~gone~~, a\\*b, snake_case_name, 2 * 3 * 4.
Second line with https://example.org/a_b(c). And [a link](https://example.org/x "t").

- one
- two
  1. inner
  2. more

      deep
- three

> quoted
> **text**

```python
def f(x):

    return "<b>"  # not *em*
```

| a | b |
|---|--:|
| `1` | 2 |

---
1) first
2) second
"""


def test_markdown(page):
    clipboard = "{ value: { writeText: (text) => window.copied = text } }"
    page.evaluate(f"void Object.defineProperty(navigator, 'clipboard', {clipboard})")
    reply_with(page, events(said(MARKDOWN, "stop")))
    send(page)
    body = answers(page).locator(".body")
    expect(body.locator("h1")).to_have_text("Title")
    kinds = body.evaluate("body => [...body.children].map(child => child.tagName + child.className)")
    assert kinds == ["H1", "P", "UL", "BLOCKQUOTE", "DIVcode", "DIVtable", "HR", "OL"]
    assert body.locator("em").all_text_contents() == ["em", "both"]
    assert body.locator("strong").all_text_contents() == ["strong both words", "text"]
    assert body.locator("p code").all_text_contents() == ["code <b>"]
    paragraph = body.locator("p").first.text_content()
    assert "gone, a*b, snake_case_name, 2 * 3 * 4.\nSecond line with https://example.org/a_b" in paragraph
    links = body.locator("a")
    assert links.evaluate_all("all => all.map(a => a.href)") == ["https://example.org/a_b", "https://example.org/x"]
    assert {*links.evaluate_all("all => all.map(a => a.rel + a.target)")} == {"noopener noreferrer_blank"}
    assert body.locator("ul > li").count() == 3
    assert [text.split() for text in body.locator("ul ol > li").all_text_contents()] == [["inner"], ["more", "deep"]]
    assert body.locator("pre").text_content() == 'def f(x):\n\n    return "<b>"  # not *em*'
    assert body.locator("th, td").all_text_contents() == ["a", "b", "1", "2"]
    assert body.locator("td").last.evaluate("cell => cell.style.textAlign") == "right"
    page.get_by_role("button", name="Copy the code").click()
    expect(page.get_by_role("button", name="Copy the code")).to_have_text("Copied")
    assert page.evaluate("copied") == 'def f(x):\n\n    return "<b>"  # not *em*'


def test_copying_without_the_clipboards_interface(page):
    """Browsers have it in secure contexts alone: not over plain HTTP from another machine."""
    page.evaluate("void Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    ask(page)
    copy = answers(page).get_by_role("button").first
    expect(copy).to_have_text("Copy")
    copy.click()
    expect(copy).to_have_text("Copied")
    expect(copy).to_be_focused()
    message(page).focus()
    page.keyboard.press("Control+V")
    expect(message(page)).to_have_value(ANSWER)


HOSTILE = """<script>window.bad = 1</script> <img src=x onerror="window.bad = 1"> <b>bold</b>

[one](javascript:window.bad=1) [two](data:text/html,x) [three](JaVaScRiPt:alert(1)) [four](//example.org) ![five](http://a.b/c.png)

```<img src=x onerror=window.bad=1>
<img src=x onerror=window.bad=1>
```

| <img src=x onerror=window.bad=1> | b |
|---|---|
| [x](vbscript:x) | <iframe src="javascript:window.bad=1"></iframe> |

# <svg onload=window.bad=1>
- <a href="javascript:window.bad=1">x</a>
"""


def test_an_answer_is_never_markup(page):
    reply_with(page, events(*(said(part) for part in re.findall(r".{1,5}", HOSTILE, re.DOTALL)), said("", "stop")))
    send(page, HOSTILE)
    idle(page)
    body = answers(page).locator(".body")
    assert page.locator("article :is(script, img, iframe, svg, b)").count() == 0
    assert body.locator("a").evaluate_all("all => all.map(a => a.href)") == ["http://a.b/c.png"]
    for text in ("<script>window.bad = 1</script>", "<b>bold</b>", "[one](javascript:window.bad=1)", "[four](//"):
        assert text in body.text_content()
    assert page.locator("article.user .body").text_content() == HOSTILE
    assert page.evaluate("window.bad") is None
    page.reload()
    assert page.locator("article :is(script, img, iframe, svg, b)").count() == 0
    assert page.evaluate("window.bad") is None


SIGNS = [
    "*",
    "**",
    "_",
    "`",
    "``` ",
    "[",
    "[](",
    "> ",
    "- ",
    "  - ",
    "1. ",
    "|",
    "#",
    "~~",
    "\\",
    "a|",
    "**a ",
    "`` ` ",
    "[a]((",
]


def test_no_markdown_is_too_much(page):
    """Nor what is nested deeper than anything meaningful, or never ends: neither the stack nor patience does."""
    draw = "text => { const to = document.createElement('div'); update(to, text); return to.textContent.length; }"
    for sign in SIGNS:
        for text in (sign * 20_000, (sign + "\n") * 3000, (sign + "a" + sign + "\n") * 3000):
            assert page.evaluate(draw, text + "\nend") >= 3
        assert page.evaluate(draw, "x " + " " * 20_000 + sign) >= 1


def test_a_growing_answer_ends_as_if_it_had_come_whole(page):
    """Whatever was shown of its beginnings."""
    grow = """text => {
        const [growing, whole] = [document.createElement("div"), document.createElement("div")];
        for (let i = 0; i <= text.length; i++) update(growing, text.slice(0, i));
        update(whole, text);
        return [growing.outerHTML, whole.outerHTML];
    }"""
    for text in (MARKDOWN, HOSTILE):
        growing, whole = page.evaluate(grow, text)
        assert growing == whole


# ---------------------------------------------------------------------------------------------------------------------
# Completion


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


# ---------------------------------------------------------------------------------------------------------------------
# For everyone


RING = """() => {
    const now = document.activeElement, outline = getComputedStyle(now).outlineStyle;
    return now === document.body || outline !== "none" || getComputedStyle(now.parentElement).boxShadow !== "none";
}"""


def test_by_keyboard_alone(page, gate):
    """Send, a new line, stop, edit, settings, a conversation's name: without a mouse."""
    keys, type_ = page.keyboard.press, page.keyboard.type
    expect(message(page)).to_be_focused()
    type_("one")
    keys("Shift+Enter")
    type_("two")
    expect(message(page)).to_have_value("one\ntwo")
    gate.close(2)
    keys("Enter")
    expect(page.locator("#send")).to_have_text("Stop")
    keys("Escape")
    idle(page)
    gate.open()
    expect(message(page)).to_be_focused()
    reached = set()
    for _ in range(40):
        keys("Tab")
        reached.add(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()"))
        assert page.evaluate(RING)
    assert {"Send", "Chat", "Completion", "New chat", "one two", "Rename one two", "Delete one two"} <= reached
    assert {"Dark mode", "Settings", "System prompt", "Edit", "Copy", "Regenerate", "Messages", "Message"} <= reached
    page.get_by_role("button", name="Settings").focus()
    keys("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    expect(page.get_by_label("Temperature")).to_be_focused()
    keys("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_enter_that_ends_a_composition_of_characters_sends_nothing(page):
    message(page).fill("か")
    message(page).dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(page.locator("article")).to_have_count(0)


def named(page):
    """(role, name) of what the accessibility tree has."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]


def test_every_control_has_a_name(page):
    ask(page)
    page.get_by_text("System prompt").click()
    found = named(page)
    page.get_by_role("button", name="Edit", exact=True).click()
    found += named(page)
    page.get_by_role("button", name="Settings").click()
    found += named(page)
    press(page, "Close")
    press(page, "Completion")
    page.get_by_label("Text", exact=True).fill("Once")
    press(page, "Generate")
    expect(page.get_by_role("option").first).to_be_visible()
    found += named(page)
    assert [(role, name) for role, name in found if role in AXES and not name.strip()] == []
    assert {"button", "textbox", "spinbutton", "option", "dialog", "region"} <= {role for role, _ in found}
    assert page.locator("html").get_attribute("lang") == "en"
    live = page.locator("[role=status], [role=alert], [aria-live], [role=log]")
    assert not live.locator(".body, .message, #tokens").count()  # nothing that changes with every token


CONTRAST = """selector => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => channels(color).slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (view) => {
        const { backgroundColor } = getComputedStyle(view);
        return channels(backgroundColor)[3] === 0 ? ground(view.parentElement) : backgroundColor;
    };
    return [...document.querySelectorAll(selector)].filter((view) => view.checkVisibility()).map((view) => {
        const [a, b] = [luminance(getComputedStyle(view).color), luminance(ground(view))];
        return [view.tagName + "." + view.className + "#" + view.id, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser, client, gate, scheme):
    gate.open()
    with tab(browser, client.url, color_scheme=scheme) as page:
        error = {"error": {"message": "an error", "code": None}}
        reply_with(page, events(said(MARKDOWN), error))
        send(page)
        idle(page)
        selector = ":is(button, p, a, span, h1, h2, strong, code, textarea, summary, blockquote, th, td, i)"
        found = page.evaluate(CONTRAST, selector)
        page.get_by_role("button", name="Completion").click()
        found += page.evaluate(CONTRAST, selector)
        assert len(found) > 40
        assert [(name, ratio) for name, ratio in found if ratio < 4.5] == []


def test_dark_mode(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, toggle = page.evaluate(ground), page.get_by_role("button", name="Dark mode")
    page.emulate_media(color_scheme="dark")
    expect(toggle).to_have_attribute("aria-pressed", "true")
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "false")
    assert page.evaluate(ground) == light
    page.reload()
    assert page.evaluate(ground) == light
    toggle.click()
    page.emulate_media(color_scheme="light")
    page.reload()
    assert page.evaluate(ground) == dark


def test_on_a_phone(browser, client, gate):
    gate.open()
    screen = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    with tab(browser, client.url, **screen) as page:
        views = "[document.documentElement, ...document.querySelectorAll('.scroll')]"
        wide = f"Math.max(...{views}.map((view) => view.scrollWidth - view.clientWidth))"
        long = "x" * 300 + "\n```\n" + "y" * 300 + "\n```\n|" + "z|" * 60 + "\n|" + "-|" * 60
        reply_with(page, events(said(long, "stop")))
        message(page).tap()
        send(page, "w" * 300)
        idle(page)
        assert page.evaluate(wide) == 0
        expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        press(page, "Menu")
        expect(page.get_by_role("button", name="New chat")).to_be_focused()
        assert page.evaluate(wide) == 0
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        expect(page.get_by_role("button", name="Menu")).to_be_focused()
        press(page, "Menu")
        press(page, "Completion")
        page.get_by_label("Text", exact=True).fill("Once upon a time")
        press(page, "Generate")
        expect(page.locator("#generate")).to_have_text("Generate")
        page.get_by_role("option").last.tap()
        expect(page.get_by_role("tooltip")).to_be_visible()
        assert page.evaluate(wide) == 0
        box = page.get_by_role("tooltip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        press(page, "Menu")
        press(page, "Settings")
        assert page.evaluate(wide) == 0
