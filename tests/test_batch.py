"""python -m llama batch: each line is answered exactly once, as the library or the server would answer it."""

import os
import struct
import subprocess
import sys
import threading
import time
from base64 import b64decode
from unittest import mock

import pytest
from batches import CHAT, EMBED, HELLO, STORY, TEXT, openai, run, write
from small import MODELS, ROOT

from llama import Llama
from llama.cli.batch_files import Files
from llama.cli.batch_lines import READ
from llama.engine import Engine


@pytest.fixture(scope="module")
def llama():
    return Llama.build(MODELS / "small-chat", max_seq_len=256, max_batch_size=4, device="cpu", dtype="float32")


def test_prompts_are_answered_as_by_text_completion(llama, tmp_path, capsys):
    """Twelve lines on four slots."""
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
    """Equal, except for times, cached tokens and rounding."""
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


def test_lines_of_openais_format_get_the_servers_responses(llama, tmp_path):
    """Answers and errors are compared with those of a running server."""
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


def test_lines_without_a_seed_are_reproducible(llama, tmp_path):
    """A line's seed is made from --seed and its number: neither other lines nor earlier answers change it."""
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
    """The other lines are answered. A line without an id never gets the id of another line."""
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


def test_non_finite_logits_are_an_error(llama, tmp_path):
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


def test_files_that_are_not_batch_files(tmp_path):
    """They are left unchanged."""
    source = write(tmp_path / "in", [{"prompt": "a"}])
    with pytest.raises(ValueError, match="is infile too"):
        Files(source, source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="is infile too"):
        Files(source, tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")  # the answered lines would be read from it, without end
    with pytest.raises(ValueError, match="pipe is not a file"):
        Files(source, tmp_path / "pipe")
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
        with pytest.raises(ValueError, match="is not a batch's answer; choose another outfile"):
            Files(source, tmp_path / "diary")
        assert (tmp_path / "diary").read_bytes() == content


def test_an_unexpected_error_of_one_line(llama, tmp_path):
    """The other lines are answered."""
    items = [{"prompt": "a", "max_gen_len": 1}, openai("x", {"input": "a"}, EMBED)]
    with mock.patch.dict(READ, {EMBED: lambda llama, body: 1 / 0}):
        answers = run(llama, tmp_path, items)
    assert answers["x"]["response"]["status_code"] == 500 and answers[1]["finish_reason"] == "length"


def test_needs_none_of_the_servers_packages():
    code = "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None; import llama.cli.batch"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
