"""A server of the bundled chat model in this process."""

import threading
import time
from contextlib import contextmanager

import pytest
from small import MODELS

from llama import Llama

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from llama.server.app import Config  # noqa: E402
from llama.server.process import Server  # noqa: E402


def build(**options):
    options = {"max_seq_len": 256, "max_batch_size": 4, "device": "cpu", "dtype": "float32", **options}
    return Llama.build(MODELS / "small-chat", **options)


@contextmanager
def serving(llama, **config):
    """A client of a server in this process; its `server` is the server."""
    server = Server(Config("small-chat", **config))
    thread = threading.Thread(target=server.serve, args=(llama,))
    thread.start()
    url = f"http://127.0.0.1:{server.port}"
    try:
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=30) as client:
            client.server, client.url = server, url
            yield client
    finally:
        server.drain()
        thread.join(30)
    assert not thread.is_alive()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
