"""Markdown in answers. It never becomes arbitrary HTML."""

import re

from page.actions import ANSWER, MARKDOWN, answers, ask, events, expect, idle, message, reply_with, said, send


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


def test_copying_without_the_clipboard_api(page):
    """Browsers have navigator.clipboard in secure contexts only, not over plain HTTP from another machine."""
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


def test_answers_never_become_html(page):
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


def test_extreme_markdown(page):
    """Deep nesting and unclosed markup neither overflow the stack nor take long."""
    draw = "text => { const to = document.createElement('div'); update(to, text); return to.textContent.length; }"
    for sign in SIGNS:
        for text in (sign * 20_000, (sign + "\n") * 3000, (sign + "a" + sign + "\n") * 3000):
            assert page.evaluate(draw, text + "\nend") >= 3
        assert page.evaluate(draw, "x " + " " * 20_000 + sign) >= 1


def test_streamed_and_whole_answers_look_the_same(page):
    """Whatever was shown for its prefixes."""
    grow = """text => {
        const [growing, whole] = [document.createElement("div"), document.createElement("div")];
        for (let i = 0; i <= text.length; i++) update(growing, text.slice(0, i));
        update(whole, text);
        return [growing.outerHTML, whole.outerHTML];
    }"""
    for text in (MARKDOWN, HOSTILE):
        growing, whole = page.evaluate(grow, text)
        assert growing == whole
