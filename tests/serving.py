"""Servers in this process or in processes of their own, and their clients."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from ranks import free_port
from small import MODELS, ROOT

from llama import Llama

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from llama.server.app import Config  # noqa: E402
from llama.server.process import Server  # noqa: E402


def build(**options):
    options = {"max_seq_len": 256, "max_batch_size": 4, "device": "cpu", "dtype": "float32", **options}
    return Llama.build(MODELS / "small-chat", **options)


@contextmanager
def serving(llama, **config):
    """A client of a server in this process. Its attribute `server` is the server."""
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


@contextmanager
def command(*flags, ranks=1, stderr=subprocess.PIPE, cwd=ROOT, **environment):
    """`python -m llama serve` on a free port, with one process for each rank. The first has the `url`."""
    port, meeting = free_port(), free_port()
    line = [sys.executable, "-m", "llama", "serve", str(MODELS / "small-chat"), "--port", str(port), "--device", "cpu"]
    processes = []
    for rank in range(ranks):
        of_ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        of_ranks = {**of_ranks, "MASTER_PORT": meeting} if ranks > 1 else {}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **of_ranks, **environment}
        processes.append(
            subprocess.Popen(
                [*line, *flags], cwd=cwd, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env={name: str(value) for name, value in env.items()},
            )
        )  # fmt: skip
    processes[0].url = f"http://127.0.0.1:{port}"
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.communicate()


def health(url):
    """The status code of /health; None while no process listens."""
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code
    except httpx.TransportError:
        return None


def wait_until_ready(process):
    def ready():
        assert process.poll() is None, process.stderr.read()
        return health(process.url) == 200

    wait_for(ready, 60)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def streamed(chunks):
    """The text, finish reason and logprobs of each choice of a stream, and its usage."""
    texts, reasons, logprobs, usage = {}, {}, {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            assert choice.index not in reasons or not choice.finish_reason
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                logprobs.setdefault(choice.index, []).append(choice.logprobs)
    return texts, reasons, logprobs, usage


def gauge(client, name):
    """The sum of a metric over all labels."""
    lines = httpx.get(f"{client.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"llama:{name}{{"))


def slow_down(llama, monkeypatch, seconds=0.02):
    """Make the engine's steps slow enough to be interrupted."""
    step = llama.engine.step

    def slower():
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(llama.engine, "step", slower)


LONG = {"model": "small-chat", "prompt": "Once", "max_tokens": 200, "extra_body": {"min_tokens": 200}}
GREEDY = {**LONG, "temperature": 0}
DIALOG = [{"role": "user", "content": "What is the opposite of big?"}]
CHAT = {"model": "small-chat", "messages": DIALOG, "max_tokens": 20, "temperature": 0}
