"""python -m llama chat in a real terminal, and with a pipe; perplexity."""

import io
import json
import math
import os
import subprocess
import sys

import pexpect
import pytest
from small import GQA, MODELS, in_process, save_random

from llama import Llama
from llama.cli.chat import chat
from llama.cli.perplexity import perplexity as command
from llama.scoring import perplexity

CHAT = [sys.executable, "-m", "llama", "chat"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "llama", "chat"]
MODEL = ["--ckpt_dir", str(MODELS / "small-chat"), "--temperature", "0", "--max_seq_len", "256", "--device", "cpu"]
HELLO = "Hello! How can I help you?"


def leave(child):
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


@pytest.fixture(scope="module")
def endless(tmp_path_factory, tokenizer):
    """A model whose answers never end with EOS and take minutes."""
    folder = tmp_path_factory.mktemp("endless")
    save_random(folder, {**GQA, "n_layers": 12}, mp=2)
    return ["--ckpt_dir", str(folder), "--tokenizer_path", str(MODELS / "tokenizer.model"), "--max_seq_len", "50000"]


@pytest.fixture(params=["plain", "prompt_toolkit", "two ranks"])
def spawn(request, tmp_path):
    """Start a chat in a pseudo-terminal: with and without prompt_toolkit, and on two ranks."""
    if request.param == "prompt_toolkit":
        pytest.importorskip("prompt_toolkit")
    children = []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    if request.param != "prompt_toolkit":
        (tmp_path / "prompt_toolkit.py").write_text("raise ImportError")
        environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

    def start(*flags):
        command = [*(TORCHRUN if request.param == "two ranks" else CHAT), *flags]
        child = pexpect.spawn(
            command[0], command[1:], env=environment, timeout=60, encoding="utf-8", dimensions=(40, 120)
        )
        children.append(child)
        child.expect("Ask something")
        return child

    yield start
    for child in children:
        child.close(force=True)


def test_typing_and_commands(spawn, tmp_path):
    child = spawn(*MODEL)
    child.expect("> ")
    child.sendline("Hello")
    child.expect_exact(HELLO)
    child.expect("> ")
    child.sendline("Who are \\")
    child.sendline("you?")
    child.expect("Llama")
    child.expect("> ")
    child.sendline("/set temperature 0.2")
    child.expect("temperature 0.2")
    child.expect("> ")
    child.sendline("/set temperature cold")
    child.expect("error: temperature is 'cold'")
    child.expect("> ")
    child.sendline(f"/save {tmp_path / 'talk.json'}")
    child.expect("saved to")
    child.expect("> ")
    child.sendline("/system You are a pirate.")
    child.sendline("/reset")
    child.sendline(f"/load {tmp_path / 'talk.json'}")
    child.expect("4 messages")
    child.expect("> ")
    child.sendline("/nothing")
    child.expect("/reset")
    child.expect("Ctrl-D ends")
    child.expect("> ")
    leave(child)
    dialog = json.loads((tmp_path / "talk.json").read_text())
    assert [message["content"] for message in dialog[:3]] == ["Hello", HELLO, "Who are \nyou?"]


def test_ctrl_c_stops_the_answer_and_not_the_program(spawn, endless):
    child = spawn(*endless, "--device", "cpu")
    child.expect("> ")
    child.sendline("/set min_gen_len 40000")
    child.expect("min_gen_len 40000")
    for text in ("Hello", "again"):
        child.expect("> ")
        child.sendline(text)
        child.expect(text)
        child.expect(r"\w+ ?\w*", timeout=30)
        child.send("\x03")
        child.expect_exact(" ...")
    child.expect("> ")
    child.sendline("/save /nowhere/at/all")
    child.expect("error: .*No such file")
    child.expect("> ")
    leave(child)


@pytest.mark.parametrize("command", [CHAT, TORCHRUN], ids=["one", "two ranks"])
def test_each_line_of_a_pipe_is_a_prompt(command):
    lines = "Hello\n\n/system Be kind.\n/reset\nHello"
    found = subprocess.run([*command, *MODEL], input=lines, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[0] == HELLO
    assert len(found.stdout.splitlines()) == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_standard_streams_are_not_an_error(closed):
    """stdin is empty, and output to stdout is lost. Regression: both ended with a traceback."""
    command = ["bash", "-c", f'echo Hello | {{ "$@" {closed}; }}', "bash", *CHAT, *MODEL]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_perplexity(tmp_path, tokenizer):
    save_random(tmp_path)
    text = tmp_path / "text"
    text.write_text("The sun was warm and the fox was red. 🙂 " * 5)
    flags = ("--file", text, "--ckpt_dir", tmp_path, "--tokenizer_path", MODELS / "tokenizer.model", "--window", 32)
    found = in_process(command, *flags, "--device", "cpu")
    ids = tokenizer.encode(text.read_text(), bos=True, eos=False)
    llama = Llama.build(tmp_path, MODELS / "tokenizer.model", 32, 4, device="cpu")
    expected, count = perplexity(llama.model, ids, 32, 16)
    bits = count * math.log2(expected) / len(text.read_bytes())
    said = f"perplexity {expected:.4f} of {count:,} tokens, in windows of 32 every 16; {bits:.4f} bits per byte\n"
    assert found.stdout == said
    assert "stride 32; they must be whole" in in_process(command, *flags, "--stride", 32).stderr
    text.write_text("")
    assert "is empty" in in_process(command, *flags).stderr


def test_perplexity_of_lines_of_json(tmp_path):
    """Each text by itself: the total is the sum."""
    texts, file = ["The sun was warm.", "Été\u2028🐈", ""], tmp_path / "texts.jsonl"
    flags = ("--file", file, "--ckpt_dir", MODELS / "small", "--device", "cpu", "--dtype", "float32")
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    llama = Llama.build(MODELS / "small", device="cpu", dtype="float32")
    nats = -sum(row["sum"] for row in llama.score(texts))
    size = sum(len(text.encode()) for text in texts)
    assert in_process(command, *flags).stdout.endswith(f"; {nats / math.log(2) / size:.4f} bits per byte\n")
    for line, message in {
        "[1]": "line 2 is [1], which is not",
        '{"text": 5}': "line 2 is {'text': 5}, which is not",
        "{": "line 2 is not JSON",
    }.items():
        file.write_text(f'{{"text": "a"}}\n{line}\n')
        assert message in in_process(command, *flags).stderr


def test_perplexity_of_text_files_of_other_programs(tmp_path):
    """Regression: a byte order mark counted as text, which raised the perplexity of a sentence from 112 to 18,587."""
    text = "The sun was warm.\nThe fox was red.\n"
    flags = ("--file", tmp_path / "text", "--ckpt_dir", MODELS / "small", "--device", "cpu", "--dtype", "float32")
    (tmp_path / "text").write_bytes(text.encode())
    expected = in_process(command, *flags).stdout
    for saved in (b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), text.encode("utf-16")):
        (tmp_path / "text").write_bytes(saved)
        assert in_process(command, *flags).stdout == expected
    (tmp_path / "text").write_bytes(b"na\xefve")
    assert "text is not text in UTF-8" in in_process(command, *flags).stderr


def test_a_pipe_of_a_text_from_windows(monkeypatch):
    r"""A byte order mark and \r\n. Regression: /reset was an unknown command, and \r part of each prompt."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff/set\r\nHello\r\n/reset\r\n\r\nHello \u2028\f\r\n"))
    out = in_process(chat, *MODEL[:-2], "--dtype", "float32").stdout
    assert out.splitlines() == ["temperature 0", "top_p 0.9", "prompt_lookup 0", HELLO, HELLO]


def test_commands_by_pipe(monkeypatch, tmp_path):
    """In this process, with every kind of line."""
    (tmp_path / "five").write_text("5")
    (tmp_path / "deep").write_text("[" * 100_000)
    lines = [
        "Hello",
        "/set min_p 0.1",
        "/set top_q 3",
        "/set input_filter 3",
        "/set",
        f"/save {tmp_path / 'talk'}",
        f"/load {tmp_path / 'talk'}",
        f"/load {tmp_path / 'five'}",
        f"/load {tmp_path / 'deep'}",
        f"/load {tmp_path / 'nothing'}",
        "/system Be kind.",
        "/reset",
        "hm [INST]",
        "/help",
        *["Tell me a story about Tom."] * 3,
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    out = in_process(chat, *MODEL[:-2], "--max_seq_len", 96, "--dtype", "float32").stdout
    for text in (
        HELLO,
        "min_p 0.1",
        "error: there is no option 'top_q'",
        "error: input_filter is 3; it must be a function",
        "2 messages",
        f"error: {tmp_path / 'five'}: dialog is 5; it must be a list of messages",
        f"error: {tmp_path / 'deep'}: maximum recursion depth exceeded",
        "No such file",
        "may not contain the tags",
        "Ctrl-D ends",
        "oldest messages are forgotten",
    ):
        assert text in out
