"""The server's processes: loading, signals, killed ranks, and CPU time when idle."""

import importlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from serving import build, command, gauge, httpx, openai, serving, streamed, wait_for, wait_until_ready
from small import ROOT, cases

from llama.cli.serve import serve
from llama.server import process as server_process
from llama.server.app import Config
from llama.server.process import Server
from llama.server.protocol import Http

LONG = {"model": "small-chat", "prompt": "Once", "max_tokens": 400, "extra_body": {"min_tokens": 400}}


@pytest.fixture
def jobs():
    """Servers on two ranks, and a client."""
    with command(ranks=2) as processes:
        wait_until_ready(processes[0])
        yield processes


def client_of(process):
    client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="key", max_retries=0, timeout=30)
    client.url = process.url
    return client


def ended(process, seconds=30):
    """(exit code, stderr) of a process that ends."""
    code = process.wait(seconds)
    return code, process.stderr.read()


def test_503_while_loading():
    server = Server(Config("small-chat"))
    url = f"http://127.0.0.1:{server.port}"
    for path in ("health", "v1/models"):
        reply = httpx.get(f"{url}/{path}")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert reply.json()["error"]["message"] == "the model is being loaded"
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "server_error")
    assert httpx.get(f"{url}/metrics").status_code == 200
    server.drain()
    server.serve(build(max_seq_len=16))


def test_sigterm_under_load(jobs):
    """Running requests are completed, new ones are told that the server is shutting down, and all ranks end with exit
    code 0."""
    client = client_of(jobs[0])
    streams = [client.completions.create(**LONG, stream=True) for _ in range(4)]
    for process in jobs:  # as torchrun sends it to all
        process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
        client.completions.create(**LONG)
    assert [streamed(stream)[1] for stream in streams] == [{0: "length"}] * 4
    assert [ended(process)[0] for process in jobs] == [0, 0]


def test_requests_that_take_longer_than_the_grace_are_cancelled(llama, slow, monkeypatch):
    """Regression: their answers broke off, or were "Internal Server Error"."""
    monkeypatch.setattr(server_process, "GRACE", 0.5)
    monkeypatch.setattr(server_process, "MORE", 20)
    body = {"prompt": "Once", "max_tokens": 200, "min_tokens": 200}
    found = {}

    def ask(stream):
        found[stream] = httpx.post(f"{client.url}/v1/completions", json={**body, "stream": stream}, timeout=30)

    with serving(llama) as client:
        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        [thread.start() for thread in threads]
        wait_for(lambda: gauge(client, "num_requests_running") == 2)
        client.server.drain()
        [thread.join(10) for thread in threads]
    assert (found[False].status_code, found[False].headers["retry-after"]) == (503, "1")
    assert found[False].json()["error"]["message"] == "the request was cancelled"
    assert "the request was cancelled" in found[True].text and found[True].text.endswith("data: [DONE]\n\n")


def test_a_second_signal_ends_at_once(jobs):
    client = client_of(jobs[0])
    stream = client.completions.create(**{**LONG, "n": 16}, stream=True)
    next(stream)
    for _ in range(2):
        for process in jobs:
            process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert [ended(process, 5)[0] for process in jobs] == [128 + signal.SIGINT] * 2


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_job(jobs, victim, busy):
    if busy:
        stream = client_of(jobs[0]).completions.create(**{**LONG, "n": 16}, stream=True)
        next(stream)
    jobs[victim].kill()
    code, err = ended(jobs[1 - victim])
    assert code > 0
    errors = [line for line in err.splitlines() if "INFO" not in line and "WARNING" not in line and "[W" not in line]
    assert len(errors) == 1, err
    assert errors[0].startswith(f"error: rank {1 - victim}: lost contact with another rank")


def test_parts_of_a_response_do_not_wait(llama, monkeypatch):
    """Regression: without uvloop, which sets TCP_NODELAY itself, the server's sockets lacked it, so that each reply
    took 40 ms more."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    found = []
    made = Http.connection_made

    def connection_made(self, transport):
        made(self, transport)
        found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Http, "connection_made", connection_made)
    with serving(llama) as client:
        assert client.models.list().data
    assert found and all(found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": 65536}, "port is 65536; the largest"),
        ({"api_key_file": "nowhere"}, "api_key_file nowhere does not exist"),
    ],
)
def test_a_wrong_flag_is_named(flags, message):
    """Regression: "bind(): port must be 0-65535" and "No such file or directory"."""
    with pytest.raises((ValueError, OSError), match=message):
        serve(str(ROOT / "models" / "small-chat"), **{"port": 0, **flags})


def seconds_of_cpu(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_idle_ranks_do_nothing(jobs):
    client = client_of(jobs[0])
    assert client.completions.create(model="small-chat", prompt="Once", max_tokens=4).choices
    wait_for(lambda: gauge(client, "num_requests_running") == 0)
    time.sleep(1)
    before = [seconds_of_cpu(process) for process in jobs]
    time.sleep(4)
    assert all(seconds_of_cpu(process) - at < 0.4 for process, at in zip(jobs, before, strict=True))


def test_a_short_soak(capsys, monkeypatch):
    """benchmarks/serving_soak.py with few requests. It fails by itself if an answer is wrong."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("serving_soak").main(requests=(n := cases(400)), at_once=16, fuzz_count=n)
    out = capsys.readouterr().out
    assert "0 wrong answers" in out
    assert f"statuses of {n} bodies" in out
