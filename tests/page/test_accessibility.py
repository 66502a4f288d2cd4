"""Accessibility of the page: keyboard, names of controls, contrast, dark mode, phones."""

import pytest

from page.actions import MARKDOWN, ask, events, expect, idle, message, press, reply_with, said, send, tab

AXES = ("button", "textbox", "spinbutton", "listbox", "option", "link", "region", "dialog")
RING = """() => {
    const now = document.activeElement, outline = getComputedStyle(now).outlineStyle;
    return now === document.body || outline !== "none" || getComputedStyle(now.parentElement).boxShadow !== "none";
}"""


def test_by_keyboard_alone(page, gate):
    """Send, insert a new line, stop, edit, change settings, rename a conversation: without a mouse."""
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


def test_enter_in_an_ime_composition_sends_nothing(page):
    message(page).fill("か")
    message(page).dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(page.locator("article")).to_have_count(0)


def named(page):
    """(role, name) of each node of the accessibility tree."""
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
