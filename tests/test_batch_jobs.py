"""Batch jobs of python -m llama batch: resumed, killed, and on several replicas, ranks and nodes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from batches import FLAGS, HELLO, read, run, write
from ranks import context, free_port
from small import MODELS, ROOT, in_process
from torch.distributed import HashStore, TCPStore

from llama import Llama, parallel
from llama.cli import batch_files
from llama.cli.batch import Share, batch
from llama.cli.batch_files import Files


@pytest.fixture(scope="module")
def llama():
    return Llama.build(MODELS / "small-chat", max_seq_len=256, max_batch_size=4, device="cpu", dtype="float32")


# Resuming


@pytest.mark.parametrize("tail", [b"", b"{", b'{"id": ', b'{"id": 3, "text": "Hel', b'{"id": 2, "error": "x"}'])
def test_resumes_after_the_last_complete_line(llama, tmp_path, tail):
    """Answered lines are recognized by id, so that lines may be added and removed in between."""
    (tmp_path / "out").write_bytes(b'{"id": "b", "error": "kept"}\n' + tail)
    items = [{"prompt": "a", "max_gen_len": 1}, {"prompt": "b", "max_gen_len": 1}, {"id": "b", "prompt": "c"}]
    answers = run(llama, tmp_path, items)
    assert answers.keys() == {1, 2, "b"} and answers["b"] == {"id": "b", "error": "kept"}
    assert answers[1]["finish_reason"] == answers[2]["finish_reason"] == "length"
    same = run(llama, tmp_path, [items[0], {"id": "c", "prompt": "c", "max_gen_len": 1}, items[2]])
    assert same == answers | {"c": same["c"]}


def test_one_job_writes_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_files, "PATIENCE", 1)
    source = write(tmp_path / "in", [{"prompt": "a"}])
    first = Files(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match="out is being written by another job"):
        Files(source, tmp_path / "out")
    first.answers.close()
    Files(source, tmp_path / "out")


def test_replicas_answer_each_line_once(tmp_path, monkeypatch):
    """Replicas claim lines in any order, and none ends before all lines are claimed."""
    store, chance = HashStore(), random.Random(0)
    monkeypatch.setattr(parallel, "store", lambda: store)
    monkeypatch.setattr(parallel, "replica", lambda: (0, 3))
    source = write(tmp_path / "in", [{"id": f"é{i}", "prompt": "a"} for i in range(50)])
    (tmp_path / "out").write_text('{"id": "\\u00e97"}\n')
    shares = [Share(2, Files(source, tmp_path / "out")), Share(2, None), Share(2, None)]
    taken = []
    while not all(share.ended for share in shares):
        share = chance.choice([share for share in shares if not share.ended])
        share.exchange()
        for number, content in share.take(chance.randint(1, 5)):
            taken.append(number)
            share.put(json.dumps({"id": json.loads(content)["id"]}).encode() + b"\n", 1, False)
    assert sorted(taken) == [number for number in range(1, 51) if number != 8]
    assert read(tmp_path / "out").keys() == {f"é{i}" for i in range(50)}
    assert store.num_keys() <= 4  # no partial line remains


def test_long_lines_and_answers(tmp_path, monkeypatch):
    """Longer than the largest message of torchrun's store."""
    port = free_port()
    stores = [TCPStore("127.0.0.1", port, None, first, timeout=timedelta(seconds=20)) for first in (True, False)]
    monkeypatch.setattr(parallel, "replica", lambda: (0, 2))
    source = write(tmp_path / "in", [{"prompt": "a" * 2**24}])
    shares = []
    for store, files in zip(stores, (Files(source, tmp_path / "out"), None), strict=True):
        monkeypatch.setattr(parallel, "store", lambda store=store: store)
        shares.append(Share(1, files))
    first, second = shares

    def settle() -> None:
        """Wait until the store has processed what was set: it does not acknowledge, but it answers each process in
        order."""
        for share in shares:
            share.store.check(["any"])

    assert second.take(1) == []
    first.exchange()
    settle()
    [(number, content)] = second.take(1)
    assert number == 1 and content == source.read_bytes()
    second.put(content, 0, False)
    settle()
    first.exchange()
    assert (tmp_path / "out").read_bytes() == content
    settle()
    second.take(1)
    first.take(1)
    first.exchange()
    assert first.ended and second.ended


def test_a_store_without_queues(monkeypatch):
    monkeypatch.setattr(parallel, "store", lambda: TCPStore("127.0.0.1", 0, 1, True, use_libuv=False))
    with pytest.raises(RuntimeError, match="no queues where USE_LIBUV is 0; unset it"):
        Share(1, None)


# Processes


def many(count, tokens=60):
    return [{"id": f"n{i}", "prompt": f"{i}, {i + 1},", "max_gen_len": tokens} for i in range(count)]


def batch_of(folder):
    return ["batch", str(folder / "in"), str(folder / "out"), str(MODELS / "small-chat"), *FLAGS]


def torchrun(*flags, before=(), **options):
    run = [*before, sys.executable, "-m", "torch.distributed.run", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "veth0" if before else "lo"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(run, env=environment, **pipes, **options)


def two_ranks(folder, *flags):
    where = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    return torchrun(*where, "-m", "llama", *batch_of(folder), *flags)


def ended(process):
    """The stderr of a process that has ended with exit code 0."""
    err = process.communicate(timeout=80)[1]
    assert process.returncode == 0, err
    return err


def grows(path, alive, lines):
    """Wait until a file has more lines, or the process that writes it has ended."""
    deadline = time.monotonic() + 60
    while alive() and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory):
    """The texts of an uninterrupted run."""
    answers = run(llama, tmp_path_factory.mktemp("whole"), many(60))
    return {id: answer["text"] for id, answer in answers.items()}


def check(folder, expected):
    assert {id: answer["text"] for id, answer in read(folder / "out").items()} == expected


def on_one_thread(*flags):
    torch.set_num_threads(1)
    in_process(batch, *flags)


def test_killed_and_resumed(tmp_path, expected):
    write(tmp_path / "in", many(60))
    out = tmp_path / "out"
    flags = [tmp_path / "in", out, MODELS / "small-chat", *FLAGS]
    for lines in (1, 12, 30):
        process = context.Process(target=on_one_thread, args=flags)
        process.start()
        grows(out, process.is_alive, lines)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        assert 0 < out.read_bytes().count(b"\n") < 60
    assert in_process(batch, *flags).returncode == 0
    check(tmp_path, expected)


def test_replicas_killed_and_resumed(tmp_path, expected):
    """torchrun is killed with two replicas: its workers notice, and the next job waits until they have ended."""
    write(tmp_path / "in", many(60))
    process = two_ranks(tmp_path, "--model_parallel_size", "1")
    grows(tmp_path / "out", lambda: process.poll() is None, 5)
    process.send_signal(signal.SIGKILL)
    process.stderr.close()
    process.wait()
    assert 0 < (tmp_path / "out").read_bytes().count(b"\n") < 60
    ended(two_ranks(tmp_path, "--model_parallel_size", "1"))
    check(tmp_path, expected)


def test_ranks_that_share_a_model(tmp_path, expected):
    items = [*many(8), "{"]
    write(tmp_path / "in", items)
    assert "9 lines answered, 1 of them with an error" in ended(two_ranks(tmp_path))
    answers = read(tmp_path / "out")
    assert "line 9 is not JSON" in answers.pop(("line", 9))["error"]
    assert {id: answer["text"] for id, answer in answers.items()} == {f"n{i}": expected[f"n{i}"] for i in range(8)}


def test_an_error_ends_all_replicas(tmp_path):
    write(tmp_path / "in", many(1))
    (tmp_path / "out").write_text("Dear diary\n")
    process = two_ranks(tmp_path, "--model_parallel_size", "1")
    err = process.communicate(timeout=80)[1]
    assert process.returncode == 1
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "which is not a batch's answer" in line


# Nodes


@pytest.fixture
def nodes():
    """nodes(*command): the command, started by torchrun on two nodes, which are network namespaces with an address
    each. The first is 10.77.0.1. Each has its own CPU where there are two."""
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("needs ip and root")
    names = [f"llama-test-{os.getpid()}-{i}" for i in range(2)]
    links = "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1]
    cpus = sorted(os.sched_getaffinity(0))
    started = []

    def start(*commands):
        for i, (name, command) in enumerate(zip(names, commands, strict=True)):
            where = ["--nnodes", "2", "--node_rank", str(i), "--master_addr", "10.77.0.1", "--master_port", "29500"]
            pin = {"preexec_fn": lambda i=i: os.sched_setaffinity(0, {cpus[i % len(cpus)]})}
            inside = "ip", "netns", "exec", name
            started.append(torchrun(*where, "-m", "llama", *command, before=inside, **pin))
        return started, ["ip", "netns", "exec", names[1]]

    try:
        try:
            for name in names:
                subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
            subprocess.run(["ip", "link", "add", *links], check=True, capture_output=True)
            for i, name in enumerate(names, 1):
                for command in (f"addr add 10.77.0.{i}/24 dev veth0", "link set veth0 up", "link set lo up"):
                    subprocess.run(["ip", "-n", name, *command.split()], check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        yield start
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            process.kill()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("size", [1, 2])
def test_batch_on_two_nodes(tmp_path, nodes, expected, size):
    """As two replicas, and as one. Only the first node has the files."""
    write(tmp_path / "in", many(8))
    flags = "--model_parallel_size", str(size)
    processes, _ = nodes([*batch_of(tmp_path), *flags], [*batch_of(tmp_path / "none"), *flags])
    for process in processes:
        ended(process)
    check(tmp_path, {f"n{i}": expected[f"n{i}"] for i in range(8)})


def test_serve_on_two_nodes(llama, nodes):
    """A model on two ranks, one on each node, answers at the address of the first."""
    pytest.importorskip("uvicorn")
    serve = ["serve", str(MODELS / "small-chat"), "--host", "10.77.0.1", "--port", "8000", *FLAGS]
    [first, _], on_second = nodes(serve, serve)
    body = json.dumps({"messages": HELLO, "temperature": 0, "max_tokens": 12})
    code = f"""if True:
        from urllib.request import urlopen
        print(urlopen("http://10.77.0.1:8000/v1/chat/completions", {body.encode()!r}, timeout=60).read().decode())"""
    deadline, done = time.monotonic() + 60, None
    while not done or done.returncode:  # the port is not open yet, or the model is being loaded
        assert first.poll() is None and time.monotonic() < deadline, done and done.stderr
        time.sleep(0.5)
        done = subprocess.run([*on_second, sys.executable, "-c", code], capture_output=True, text=True)
    [own] = llama.chat_completion([HELLO], temperature=0, max_gen_len=12)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == own["generation"]["content"]
