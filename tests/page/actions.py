"""Actions of a user on the page, and fake answers of the server."""

import json
import re
from contextlib import contextmanager
from urllib.parse import urlsplit

QUESTION, ANSWER = "What is the opposite of big?", "The opposite of big is small."
STORY = "Tell me a story about a fox."


@contextmanager
def tab(browser, url, **options):
    """A page in its own browser context. Afterwards it must have contacted only this server, and its console must have
    no errors, including those of the Content-Security-Policy, except for failed requests whose status or error is in
    `page.failures`."""
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
    """Send a question and wait for its whole answer, which is always the same."""
    configure(page, temperature="0")
    send(page, text)
    idle(page)


def events(*chunks, done=True):
    """The body of an event stream."""
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


def said(text, reason=None):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


def reply_with(page, body, status=200, headers=None, path="chat/completions", kind="text/event-stream"):
    """Answer requests in the server's place. Returns the list of request bodies."""
    bodies = []

    def handle(route):
        bodies.append(route.request.post_data_json)
        route.fulfill(status=status, headers={"Content-Type": kind, **(headers or {})}, body=body)

    page.route(f"**/v1/{path}", handle)
    return bodies


def reply_with_error(page, status, message, headers=None, path="chat/completions", **fields):
    body = json.dumps({"error": {"message": message, "type": "", "param": None, "code": None, **fields}})
    return reply_with(page, body, status, headers, path, "application/json")


def lose(page):
    page.failures.append("net::ERR_CONNECTION_ABORTED")
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionaborted"))


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
