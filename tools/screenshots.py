"""Screenshots of the server's page on the bundled chat model, and of a report of `python -m llama compare --html`:
python tools/screenshots.py docs [REPORT]

Needs playwright, and Chromium, which CHROMIUM names if it is not /usr/bin/chromium. The settings are greedy, so that
only the tokens per second differ from run to run."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this repository's llama, installed or not

from llama import Llama
from llama.server.app import Config
from llama.server.process import Server

MODEL = Path(__file__).parent.parent / "models" / "small-chat"
CONVERSATIONS = [
    ["What is the opposite of hot?"],
    ["Who are you?"],
    ["What is 2+3?", "Tell me a story about a fox.", "What is the opposite of big?"],
]
TEXT = "Once upon a time"
TOKEN = 29  # whose alternatives are shown


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.locator("#send", has_text="Send").wait_for()


def chat(page: Any, path: Path) -> None:
    for messages in CONVERSATIONS:
        page.click("#new")
        for text in messages:
            ask(page, text)
    page.mouse.move(640, 300)
    page.screenshot(path=path)


def completion(page: Any, path: Path) -> None:
    page.click("#mode-completion")
    page.fill("#prompt", TEXT)
    page.click("#generate")
    page.locator("#generate", has_text="Generate").wait_for()
    page.locator("#tokens span").nth(TOKEN).hover()
    page.screenshot(path=path)


def main(folder: str, report: str | None = None) -> None:
    server = Server(Config("small-chat"))
    llama = Llama.build(MODEL, max_seq_len=512, max_batch_size=1, device="cpu", dtype="float32")
    threading.Thread(target=server.serve, args=(llama,)).start()
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    executable = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=arguments)
            page = browser.new_page(viewport={"width": 1000, "height": 640})
            page.goto(f"http://127.0.0.1:{server.port}")
            page.evaluate("change('temperature', '0')")
            chat(page, Path(folder) / "page-chat.png")
            completion(page, Path(folder) / "page-completion.png")
            if report:
                page.set_viewport_size({"width": 1000, "height": 900})
                page.goto(Path(report).resolve().as_uri())
                page.screenshot(path=Path(folder) / "compare.png")
            browser.close()
    finally:
        server.drain()


if __name__ == "__main__":
    main(*sys.argv[1:])
