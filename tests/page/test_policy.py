"""The page as it is sent: its headers, and its Content-Security-Policy."""

import base64
import gzip
import hashlib
import logging
import re

from serving import httpx, serving
from small import ROOT

PAGE = (ROOT / "llama" / "server" / "page.html").read_bytes()


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
    """HTML from a string, an added script, and another host are refused."""
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
        assert plain.headers["vary"] == "Accept-Encoding"
        assert plain.headers["x-content-type-options"] == "nosniff"
        assert plain.headers["referrer-policy"] == "no-referrer"
        assert "script-src 'sha256-" in plain.headers["content-security-policy"]
        with httpx.stream("GET", client.url, headers={"Accept-Encoding": "gzip"}) as zipped:
            assert gzip.decompress(b"".join(zipped.iter_raw())) == PAGE
            assert zipped.headers["content-encoding"] == "gzip"
            assert zipped.headers["vary"] == "Accept-Encoding"
        head = httpx.head(client.url, headers={"Accept-Encoding": "identity"})
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(PAGE)))
        assert httpx.post(client.url).status_code == 405
        assert httpx.get(f"{client.url}/v1/models").status_code == 401
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
