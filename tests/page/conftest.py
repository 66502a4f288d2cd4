"""A server of the bundled chat model, and Chromium."""

import os
import shutil
import threading

import pytest

from page.actions import tab

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


class Gate:
    """Called before each step of the engine. `close` blocks it after a number of further steps, and `open` lets it go
    on."""

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


@pytest.fixture(scope="package")
def gate(llama):
    return Gate(llama)


@pytest.fixture(scope="package")
def llama():
    from serving import build  # skips without the server's packages, which a conftest.py may not

    return build(max_seq_len=512)


@pytest.fixture(scope="package")
def client(llama):
    from serving import serving

    with serving(llama) as client:
        yield client


@pytest.fixture(scope="package")
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


@pytest.fixture
def page(browser, client, gate):
    gate.open()
    try:
        with tab(browser, client.url) as page:
            yield page
    finally:
        gate.open()
