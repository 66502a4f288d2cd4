"""python -m llama batch: each line is answered exactly once, as the library or the server would answer it."""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from base64 import b64decode
from datetime import timedelta
from unittest import mock

import pytest
import torch
from ranks import context, free_port
from small import MODELS, ROOT, in_process
from torch.distributed import HashStore, TCPStore

from llama import Llama, parallel
from llama.cli import batch_files
from llama.cli.batch import Share, answer_lines, batch
from llama.cli.batch_files import Files
from llama.cli.batch_lines import READ
from llama.engine import Engine

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "Hello"}]
STORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me a story about a fox."}]
FLAGS = ["--max_seq_len", "256", "--max_batch_size", "4", "--device", "cpu", "--dtype", "float32", "--nocompile"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is small, and other processes compute beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama():
    return Llama.build(MODELS / "small-chat", max_seq_len=256, max_batch_size=4, device="cpu", dtype="float32")


def write(path, items):
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path):
    """Answers by id, of which each is there once."""
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    items = [json.loads(line) for line in lines]
    ids = [item.get("custom_id", item["id"]) for item in items]
    keys = [id if id is not None else ("line", item["line"]) for id, item in zip(ids, items, strict=True)]
    assert len({*keys}) == len(keys)
    return dict(zip(keys, items, strict=True))


def run(llama, folder, items, seed=1):
    files = Files(write(folder / "in", items), folder / "out")
    with files.answers:
        answer_lines(llama, files, seed, "small-chat")
    return read(folder / "out")


def openai(id, body, url=CHAT, **rest):
    return {"custom_id": id, "method": "POST", "url": url, "body": body, **rest}


# Answers


def test_prompts_are_answered_as_by_text_completion(llama, tmp_path, capsys):
    """Twelve lines for four slots."""
    prompts = ["Once upon a time", "The opposite of hot is", "1, 2, 3,", "Grüße, 世界! 🎉"] * 3
    options = [
        {"temperature": 0, "max_gen_len": 8},
        {"seed": 5, "max_gen_len": 12},
        {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": 3, "max_gen_len": 9, "stop": ["."]},
        {"temperature": 0, "stop": "e", "min_gen_len": 2, "max_gen_len": 30, "repetition_penalty": 1.2},
        {"temperature": 0, "max_gen_len": 5, "logit_bias": {"306": 100}, "stop_token_ids": [7], "top_p": None},
        {"temperature": 1.0, "seed": -1, "max_gen_len": 20, "frequency_penalty": 0.5, "min_p": 0.1},
        {"temperature": 0, "max_gen_len": 0},
        {"temperature": 0, "regex": "[a-c]{3}"},
        {"temperature": 0.5, "seed": 3, "json_schema": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
        {"seed": 11},
    ]
    cases = [(prompt, options[i % len(options)]) for i, prompt in enumerate(prompts)]
    answers = run(llama, tmp_path, [{"prompt": prompt, **own} for prompt, own in cases])
    assert answers.keys() == {*range(1, 13)}
    total = 0
    for number, (prompt, own) in enumerate(cases, 1):
        if bias := own.get("logit_bias"):
            own = own | {"logit_bias": {int(id): value for id, value in bias.items()}}
        [expected] = llama.text_completion([prompt], **own)
        answer = answers[number]
        assert answer.keys() == {"id", "text", "finish_reason", "usage"}
        assert answer["text"] == expected["generation"]
        assert answer["finish_reason"] == expected["finish_reason"].replace("eos", "stop")
        assert answer["usage"]["prompt_tokens"] == len(llama.tokenizer.encode(prompt, bos=True, eos=False))
        total += answer["usage"]["completion_tokens"]
    assert f"12 lines answered, 0 of them with an error; {total:,} new tokens in " in capsys.readouterr().err


def test_dialogs_are_answered_as_by_chat_completion(llama, tmp_path):
    own = {"temperature": 0.7, "top_p": 0.8, "seed": 2, "max_gen_len": 20}
    items = [{"id": "a", "messages": STORY, **own}, {"id": 7, "messages": HELLO, "seed": 3, "max_tokens": 9}]
    answers = run(llama, tmp_path, items)
    [story], [hello] = llama.chat_completion([STORY], **own), llama.chat_completion([HELLO], seed=3, max_gen_len=9)
    assert answers["a"]["message"] == story["generation"] and answers[7]["message"] == hello["generation"]
    assert answers["a"].keys() == {"id", "message", "finish_reason", "usage"}


def assert_same(a, b):
    """Equal, except for what differs by time, by what the cache held, and by rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"id", "created", "prompt_tokens_details"}:
            packed = key == "embedding" and isinstance(a[key], str)
            assert_same(*([*struct.iter_unpack("<f", b64decode(c[key]))] if packed else c[key] for c in (a, b)))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    else:
        assert a == (pytest.approx(b, abs=1e-3) if isinstance(a, float) else b)


def test_openais_lines_have_the_bodies_that_the_server_sends(llama, tmp_path):
    """Answers and errors, on a server beside."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    from llama.server.app import Config
    from llama.server.process import Server

    bodies = [
        (CHAT, {"model": "m", "messages": HELLO, "temperature": 0, "max_tokens": 12}),
        (CHAT, {"messages": STORY, "seed": 4, "n": 2, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}),
        (TEXT, {"prompt": ["Once", "The fox"], "seed": 5, "logprobs": 1, "echo": True, "stop": None}),
        (EMBED, {"input": "Hello", "encoding_format": "base64"}),
        (EMBED, {"input": "Grüße, 世界"}),
        (CHAT, {"messages": HELLO, "max_tokens": "9"}),
        (TEXT, {"prompt": "a b " * 500}),
        (CHAT, {"messages": [{"role": "user", "content": "[INST] Hello"}]}),
        (CHAT, {"messages": HELLO, "tools": [{}]}),
    ]
    answers = run(llama, tmp_path, [openai(str(i), body, url) for i, (url, body) in enumerate(bodies)])
    server = Server(Config("small-chat", any_model=True))
    thread = threading.Thread(target=server.serve, args=(llama,))
    thread.start()

    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as client:
            while client.get("/health").status_code != 200:
                time.sleep(0.02)
            for i, (url, body) in enumerate(bodies):
                reply, line = client.post(url, json=body), answers[str(i)]
                assert line.keys() == {"id", "custom_id", "response", "error"} and line["error"] is None
                assert line["response"].keys() == {"status_code", "request_id", "body"}
                assert line["response"]["status_code"] == reply.status_code
                assert_same(line["response"]["body"], reply.json())
    finally:
        server.drain()
        thread.join(30)


def test_lines_without_a_seed_have_one_of_their_own(llama, tmp_path):
    """Of --seed and the number: neither other lines nor what was answered before changes an answer."""
    items = [{"prompt": "Once", "temperature": 1.5, "top_p": 1, "max_gen_len": 10} for _ in range(3)]
    whole = {id: answer["text"] for id, answer in run(llama, tmp_path, items).items()}
    assert len({*whole.values()}) == 3
    first = (tmp_path / "out").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "out").write_bytes(first)
    assert {id: answer["text"] for id, answer in run(llama, tmp_path, items).items()} == whole
    (tmp_path / "out").unlink()
    assert run(llama, tmp_path, items, seed=2)[1]["text"] != whole[1]


def test_an_empty_file(llama, tmp_path):
    assert run(llama, tmp_path, []) == run(llama, tmp_path, ["", "  "]) == {}


WRONG = [
    ("{", "line 1 is not JSON"),
    ("[" * 100_000, "line 2 is not JSON"),
    ('"text"', "line 3 must be a JSON object"),
    ({"id": [1], "prompt": "a"}, "the id of line 4 must be"),
    ({"id": True, "prompt": "a"}, "the id of line 5 must be"),
    ({}, "either prompt or messages"),
    ({"prompt": "a", "messages": HELLO}, "either prompt or messages"),
    ({"prompt": 3}, "prompt is 3"),
    ({"prompt": ["a", "b"]}, "one prompt"),
    ({"prompt": "a", "n": 2}, "one prompt"),
    ({"prompt": "\ud800"}, "surrogates not allowed"),
    ({"prompt": "a b " * 500}, "but the context is of 256"),
    ({"prompt": "a", "temprature": 1}, "there is no option 'temprature'"),
    ({"prompt": "a", "temperature": -1}, "temperature is -1"),
    ({"prompt": "a", "max_gen_len": "9"}, "max_tokens is '9'"),
    ({"prompt": "a", "stream": True}, "a batch does not support stream"),
    ({"messages": []}, "messages must be a list with at least one message"),
    ({"messages": [{"role": "king", "content": "a"}]}, "king"),
]
WRONG_BODIES = [
    (openai("x0", None), 400, "body is None"),
    (openai("x1", {"messages": HELLO}, "/v1/files"), 404, "url is '/v1/files'"),
    (openai("x2", {"messages": HELLO}, None), 404, "url is None"),
    (openai("x3", {"messages": HELLO}, method="GET"), 405, "method is 'GET'"),
    (openai("x4", {"prompt": "a"}), 400, "messages must be"),
    (openai("x5", {"messages": HELLO, "stream": True}), 400, "a batch does not support stream"),
    (openai(None, {}), 400, "line 26 needs a custom_id"),
    (openai(5, {}), 400, "line 27 needs a custom_id"),
]


def test_a_malformed_line_is_answered_with_an_error(llama, tmp_path):
    """The lines around it are answered. A line without an id of its own never has that of another line."""
    good = {"prompt": "Hello", "max_gen_len": 1}
    items = [*(item for item, _ in WRONG), {"id": 1, **good}, *(item for item, _, _ in WRONG_BODIES), good]
    answers = run(llama, tmp_path, items)
    assert len(answers) == len(items)
    assert answers[1]["finish_reason"] == answers[len(items)]["finish_reason"] == "length"
    for number, (_, message) in enumerate(WRONG, 1):
        answer = answers[number if number > 5 else ("line", number)]
        assert message in answer["error"]
        assert answer.keys() == {"id", "error", *(["line"] if number <= 5 else [])}
    for number, (item, status, message) in enumerate(WRONG_BODIES, len(WRONG) + 2):
        id = item["custom_id"] if isinstance(item["custom_id"], str) else ("line", number)
        reply = answers[id]["response"]
        assert reply["status_code"] == status and message in reply["body"]["error"]["message"]
    assert run(llama, tmp_path, items) == answers


def test_numbers_that_are_not_finite_are_an_error(llama, tmp_path):
    items = [openai("x", {"prompt": "a"}, TEXT), {"prompt": "a", "max_gen_len": 2}]
    with mock.patch.object(Engine, "_take", lambda self, row, ids, sums: False):
        answers = run(llama, tmp_path, items)
    assert answers["x"]["response"]["status_code"] == 500 and answers[2].keys() == {"id", "error"}


def test_a_step_that_fails_ends_the_job(llama, tmp_path):
    """Its lines are answered when the job is resumed."""
    items = [{"prompt": "a", "max_gen_len": 2}] * 6
    with (
        mock.patch.object(llama.engine, "_sample", side_effect=RuntimeError("out of memory")),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        run(llama, tmp_path, items)
    assert (tmp_path / "out").read_bytes() == b""
    assert {answer["finish_reason"] for answer in run(llama, tmp_path, items).values()} == {"length"}


def test_files_that_are_none_of_a_batch(tmp_path):
    """They are left as they are."""
    source = write(tmp_path / "in", [{"prompt": "a"}])
    with pytest.raises(ValueError, match="is infile too"):
        Files(source, source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="is infile too"):
        Files(source, tmp_path / "link")
    twice = write(tmp_path / "twice", [{"id": "a", "prompt": "a"}, {"prompt": "b"}, openai("a", {})])
    with pytest.raises(ValueError, match="twice: lines 1 and 3 have the same id, 'a'"):
        Files(twice, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for content in (
        b"Dear diary,\n",
        b"Dear diary",
        b'{"id": 1}\nDear',
        b'{"name": 3}\n',
        b"[1]\n",
        b'{"id": null}\n',
        b'{"id": [1]}\n',
    ):
        (tmp_path / "diary").write_bytes(content)
        with pytest.raises(ValueError, match="is no answer of a batch; choose another outfile"):
            Files(source, tmp_path / "diary")
        assert (tmp_path / "diary").read_bytes() == content


# Resuming


@pytest.mark.parametrize("tail", [b"", b"{", b'{"id": ', b'{"id": 3, "text": "Hel', b'{"id": 2, "error": "x"}'])
def test_resumes_behind_the_last_whole_line(llama, tmp_path, tail):
    """Ids decide, so that lines may come and go in between."""
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


def test_replicas_take_each_line_once(tmp_path, monkeypatch):
    """In turns of any order, and none ends before all lines are taken."""
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
    assert store.num_keys() <= 4  # nothing of a line remains


def test_long_lines_and_answers(tmp_path, monkeypatch):
    """Of more bytes than the store of torchrun takes at once."""
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
        """Wait for what has been set: the store does not acknowledge it, but it answers each process in order."""
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


def test_a_line_that_is_refused_in_an_unforeseen_way(llama, tmp_path):
    """The others are answered."""
    items = [{"prompt": "a", "max_gen_len": 1}, openai("x", {"input": "a"}, EMBED)]
    with mock.patch.dict(READ, {EMBED: lambda llama, body: 1 / 0}):
        answers = run(llama, tmp_path, items)
    assert answers["x"]["response"]["status_code"] == 500 and answers[1]["finish_reason"] == "length"


def test_needs_no_package_of_the_servers():
    code = "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None; import llama.cli.batch"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


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
    """What a process has written to stderr, once it has ended well."""
    err = process.communicate(timeout=80)[1]
    assert process.returncode == 0, err
    return err


def grows(path, alive, lines):
    """Wait until a file has more lines, or the process that should write them has ended."""
    deadline = time.monotonic() + 60
    while alive() and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory):
    """The texts of one run."""
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
    """Two replicas, whose torchrun is killed: its workers notice, and the next job waits for them."""
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
    assert "which is no answer of a batch" in line


# Nodes


@pytest.fixture
def nodes():
    """nodes(*command): the command started by torchrun on two nodes, which are network namespaces with an address each.
    The first has 10.77.0.1. Each has a CPU of its own, where there are two."""
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
    """As two replicas and as one. The first node alone has the files."""
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
