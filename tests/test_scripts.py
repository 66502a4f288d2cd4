"""The examples as users start them, and jobs in which a rank fails."""

import ctypes
import fcntl
import json
import os
import pty
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import free_port
from small import GQA, MODELS, ROOT, TOKENIZER, edit_params, in_process, save_random

from llama import Chat, Llama, Tokenizer
from llama.cli import COMMANDS, script
from llama.cli.chat import command
from llama.cli.convert import convert
from llama.cli.inspect import inspect

TEXT, CHAT = ROOT / "example_text_completion.py", ROOT / "example_chat_completion.py"
MANY = {"dim": 256, "n_layers": 16, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32}  # slow enough to be interrupted


def started(nproc, script, *flags):
    if nproc == 0:  # no torchrun
        return [sys.executable, str(script), *flags]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc)]
    return [*run, "--master_port", str(free_port()), str(script), *flags]


def start(nproc, script, *flags):
    """(exit code, stdout, stderr, seconds) of a script under torchrun."""
    began = time.monotonic()
    done = subprocess.run(started(nproc, script, *flags), capture_output=True, text=True, timeout=100, cwd="/")
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_text_example_needs_no_flags_and_no_torchrun():
    code, out, err, _ = start(0, TEXT)
    assert code == 0, err
    assert out.count("==================================") == 4
    assert "Once upon a time, there was a little fox named\n> " in out


def test_only_rank_0_prints_and_ranks_change_nothing(tmp_path):
    """Regression: stdout of the other ranks was replaced. The flags are those that users type."""
    dialogs = [[{"role": "user", "content": "What is the opposite of big?"}]] * 3
    (tmp_path / "dialogs.json").write_text(json.dumps(dialogs))
    flags = ["--ckpt_dir", str(MODELS / "small-chat"), "--tokenizer_path", str(TOKENIZER), "--temperature", "0"]
    flags += ["--top_p", "0.9", "--max_seq_len", "128", "--max_gen_len", "32", "--max_batch_size", "2"]
    flags += ["--device", "cpu", "--dtype", "float32", "--seed", "7", "--prompts", str(tmp_path / "dialogs.json")]
    code, out, err, _ = start(2, CHAT, *flags)
    assert code == 0, err
    assert out.startswith("User: What is the opposite of big?\n\n> Assistant: ")
    assert out.count("> Assistant: ") == 3  # two batches
    assert len({part for part in out.split("==================================") if part.strip()}) <= 2


def test_prompts_from_a_list_and_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("Once upon a time\n\nThe opposite of hot is\n")
    flags = ["--max_gen_len", "5", "--temperature", "0"]
    code, from_file, err, _ = start(0, TEXT, *flags, "--prompts", str(tmp_path / "prompts.txt"))
    assert code == 0, err
    assert start(0, TEXT, *flags, "--prompts", '["Once upon a time", "The opposite of hot is"]')[1] == from_file
    assert from_file.count("\n> ") == 2


def example(path):
    """The functions of an example script."""
    return SimpleNamespace(**runpy.run_path(str(path)))


def test_prompt_files_of_other_programs(tmp_path):
    """Regression: a byte order mark became part of the first prompt, or made JSON "not JSON"; U+2028 and form feed
    split a prompt."""
    path = tmp_path / "prompts"
    for line_end in ("\n", "\r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + line_end.join(["Once \u2028upon\f a time", "", " ", "Hello\x85"]).encode())
        assert example(TEXT).read_prompts(str(path), []) == ["Once \u2028upon\f a time", "Hello\x85"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([[{"role": "user", "content": "Hello"}]]).encode())
    assert example(CHAT).read_dialogs(str(path), []) == [[{"role": "user", "content": "Hello"}]]
    path.write_text("{}")
    with pytest.raises(ValueError, match="prompts contains a dict, not a list"):
        example(CHAT).read_dialogs(str(path), [])


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        # backslashes that remain when a command of several lines is pasted as one
        (TEXT, [" --ckpt_dir", "llama-2-7b/", " --tokenizer_path", "tokenizer.model"], "remove the backslashes"),
        (TEXT, ["--ckpt_dir", "llama-2-7b/"], "ckpt_dir llama-2-7b is not an existing folder"),
        (TEXT, ["--prompts", "nowhere.txt"], "neither a list"),
    ],
)
def test_errors_are_one_line(script, flags, message):
    code, out, err, seconds = start(0, script, *flags)
    assert code == 1
    assert seconds < 30
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert out == ""


def test_a_bar_shows_loading_on_a_terminal_only(tmp_path):
    save_random(tmp_path)
    flags = ["--ckpt_dir", str(tmp_path), "--tokenizer_path", str(TOKENIZER), "--max_gen_len", "1"]
    mine, theirs = pty.openpty()
    os.set_blocking(mine, False)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # no bar on a terminal of width 0
    subprocess.run(started(0, TEXT, *flags), stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60)
    shown = os.read(mine, 10_000).decode()
    assert "loading: " in shown
    assert "weights/s" in shown
    assert start(0, TEXT, *flags)[2] == ""


def test_two_nodes(tmp_path):
    """The global rank chooses the shard. Only the first node prints."""
    save_random(tmp_path, mp=2)
    port, nodes = str(free_port()), []
    flags = ["--ckpt_dir", str(tmp_path), "--tokenizer_path", str(TOKENIZER), "--max_gen_len", "2", "--device", "cpu"]
    for node in range(2):
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node)]
        run += ["--master_addr", "127.0.0.1", "--master_port", port, str(TEXT), *flags]
        nodes.append(subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    (first, first_err), (second, second_err) = (node.communicate(timeout=100) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], first_err + second_err
    assert first.count("\n> ") == 4
    assert second == ""


def test_an_unknown_flag_stops_before_anything_runs():
    """Regression: Fire calls main first and complains afterwards: with a misspelt flag, texts were generated with the
    default."""
    code, out, err, _ = start(0, TEXT, "--temprature", "0")
    assert code == 2
    assert out == ""
    assert "--temprature" in err and "example_text_completion.py --help" in err


def typed(monkeypatch, capsys, command, *words):
    """The arguments that a command is called with, or the line that is printed instead."""
    calls = []

    def leave(code):
        raise SystemExit(code)

    def fake(
        ckpt_dir: str,
        tokenizer_path: Path | None = None,
        system: str | None = None,
        temperature: float = 0.6,
        compile: bool = False,
        prompts: list[str] | str | None = None,
    ) -> None:
        calls.append(locals())

    monkeypatch.setattr(script, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    with suppress(SystemExit):
        script.run({"fake": fake} if command else fake)
    return calls[0] if calls else capsys.readouterr().err


@pytest.mark.parametrize("command", [False, True], ids=["example", "command"])
@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["small#2"], "ckpt_dir", "small#2"),  # was "small"
        (["2024"], "ckpt_dir", "2024"),  # was an int
        (["--ckpt_dir", "1e3"], "ckpt_dir", "1e3"),
        (["--ckpt-dir=0x10"], "ckpt_dir", "0x10"),
        (["m", "--tokenizer_path", "2024_01"], "tokenizer_path", "2024_01"),
        (["m", "--system", "Short, please"], "system", "Short, please"),  # was a tuple
        (["m", "--system", "Yes # no"], "system", "Yes # no"),
        (["m", "--system", "True"], "system", "True"),
        (["m", "--system", "'quoted'"], "system", "'quoted'"),
        (["m", "--system", "{a: b}"], "system", "{a: b}"),
        (["m", "--system", "-", "--temperature", "0"], "system", "-"),  # fire's separator
        (["m", "--system", "- be brief\n- be kind"], "system", "- be brief\n- be kind"),
        (["m", "--system=--no"], "system", "--no"),
        (["m", "--system", ""], "system", ""),
        (["m", "--prompts", "a,b#c"], "prompts", "a,b#c"),
        (["m", "--prompts", "[1].txt"], "prompts", "[1].txt"),
        (["m", "--prompts", '["a # b", "1, 2"]'], "prompts", ["a # b", "1, 2"]),
        (["m", "--temperature", "1e-1"], "temperature", 0.1),
        (["m", "--compile"], "compile", True),
        (["m", "--nocompile"], "compile", False),
    ],
)
def test_texts_and_paths_are_taken_as_typed(monkeypatch, capsys, command, words, name, value):
    """Regression: Fire parsed every flag as Python: small#2 opened small, "Short, please" was a tuple, "Yes # no" was
    cut at #."""
    found = typed(monkeypatch, capsys, command, *["fake"] * command, *words)
    assert found[name] == value and type(found[name]) is type(value)


@pytest.mark.parametrize(
    "words", [["--system"], ["--system", "--temperature", "0"], ["--system", "--temperature=0"], ["--nosystem"]]
)
def test_a_text_without_a_value_is_named(monkeypatch, capsys, words):
    """Regression: it was the text "True" or "False"."""
    found = typed(monkeypatch, capsys, False, "m", *words)
    assert found.startswith(f"error: {words[0]} needs a value; one that looks like a flag is given as --system=VALUE")


def test_tildes_in_paths_are_expanded(monkeypatch, tmp_path, capsys):
    """Regression: `convert SRC '~/x'` made a folder named ~, and `Llama.build("~/model")` found nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_random(Path("~/model"))
    assert (tmp_path / "model" / "params.json").exists()
    shutil.copy(TOKENIZER, tmp_path)
    llama = Llama.build("~/model", "~/tokenizer.model", 64, 1, device="cpu")
    assert Tokenizer("~/tokenizer.model").n_words == llama.tokenizer.n_words
    assert not in_process(convert, "~/model", "~/2024#1").returncode
    assert "fits: yes" in in_process(inspect, "~/2024#1", "--device", "cpu").stdout
    (tmp_path / "texts").write_text("The opposite of hot is\n")
    assert example(TEXT).read_prompts("~/texts", []) == ["The opposite of hot is"]
    (tmp_path / "dialogs").write_text("[[]]")
    assert example(CHAT).read_dialogs("~/dialogs", []) == [[]]
    chat = Chat(llama, "Be kind.")
    command(chat, "/save ~/talk")
    assert command(chat, "/load ~/talk").dialog == chat.dialog
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "tokenizer.model", "2024#1", "texts", "dialogs", "talk"
    }  # fmt: skip


@pytest.mark.parametrize("nproc", [0, 2])
def test_a_script_may_end_with_an_open_stream(tmp_path, nproc):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from llama import Llama
llama = Llama.build({str(MODELS / "small-chat")!r}, max_seq_len=256, max_batch_size=1, device="cpu")
stream = llama.text_stream(["Once upon a time"], max_gen_len=50)
next(stream)
""")
    done = subprocess.run(started(nproc, script), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "eval"])
def test_help_has_the_whole_docstring(monkeypatch, capsys, name):
    """Regression: it was on stderr, had a group FIRE_METADATA for each command, and cut a text before a colon."""
    command = getattr(import_module(f"llama.cli.{name}"), name)
    monkeypatch.setattr(sys, "argv", ["/llama/__main__.py"])
    with pytest.raises(SystemExit) as end:
        script.parse({name: command}, [name, "--help"])
    out, err = capsys.readouterr()
    words = " ".join(out.split())
    assert (end.value.code, err) == (0, "")
    assert f"NAME python -m llama {name} - " in words and "FIRE" not in words
    for text in re.split(r"\n {8}\w+: ", command.__doc__)[1:]:
        assert " ".join(text.split()) in words


def test_a_closed_pipe_is_not_an_error():
    line = f"{sys.executable} {TEXT} --max_gen_len 5 | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, cwd="/")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


# A rank that fails


def test_a_bad_shard_ends_the_job_with_one_line(tmp_path, rank_that_fails=1):
    save_random(tmp_path, mp=2)
    (tmp_path / f"consolidated.0{rank_that_fails}.pth").write_bytes(b"")
    code, out, err, seconds = start(2, TEXT, "--ckpt_dir", str(tmp_path), "--tokenizer_path", str(TOKENIZER))
    assert code != 0
    assert seconds < 30
    [line] = errors(err)
    assert f"{tmp_path}/consolidated.0{rank_that_fails}.pth (0 bytes) is not a readable shard" in line
    assert out == ""


def test_an_exception_in_the_loop_of_one_rank_ends_the_job_with_one_line(tmp_path):
    save_random(tmp_path / "model", GQA, mp=2)
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from llama import Llama, engine, parallel
from llama.cli import script
with script.readable_errors():
    llama = Llama.build({str(tmp_path / "model")!r}, {str(TOKENIZER)!r}, 64, device="cpu")
    if parallel.rank() == 1:
        choose, calls = engine.choose, []
        def fail_later(*args):
            calls.append(args)
            if len(calls) == 4:
                raise MemoryError("out of memory in step 4")
            return choose(*args)
        engine.choose = fail_later
    llama.generate([[1, 2, 3]], 50)
""")
    code, _, err, seconds = start(2, script)
    assert code != 0
    assert seconds < 30
    assert errors(err) == ["error: rank 1: out of memory in step 4"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job(tmp_path, victim):
    """Killed from outside, as by the kernel when memory runs out, while generating."""
    save_random(tmp_path / "model", MANY, mp=2, max_seq_len=2048)
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from llama import Llama, parallel
from llama.cli import script
with script.readable_errors():
    llama = Llama.build({str(tmp_path / "model")!r}, {str(TOKENIZER)!r}, 2048, 1, device="cpu")
    llama.tokenizer.eos_ids = set()
    llama.generate([[1, 2, 3]], 3)
    pathlib.Path({str(tmp_path)!r}, f"pid{{parallel.rank()}}").write_text(str(os.getpid()))
    llama.generate([[1, 2, 3]], 2000)
    print("finished")
""")
    process = subprocess.Popen(
        started(2, script), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        files = [tmp_path / f"pid{rank}" for rank in range(2)]
        deadline = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = [int(file.read_text()) for file in files]
        time.sleep(0.5)
        began = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "finished" not in out
    assert len(errors(err)) <= 1
    assert all("lost contact with another rank" in line for line in errors(err))
    assert f"exitcode: -9 (pid: {pids[victim]})" in " ".join(err.split()) or "Signal 9 (SIGKILL)" in err
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_a_failure_before_the_process_group_is_one_line():
    code, _, err, seconds = start(2, TEXT, "--prompts", "nowhere.txt")
    assert code != 0
    assert seconds < 30
    [line] = errors(err)
    assert "neither a list" in line


def test_bad_arguments_on_several_ranks_are_one_line(tmp_path):
    save_random(tmp_path, mp=2, dtype=torch.bfloat16)
    edit_params(tmp_path, n_layers=0)
    code, _, err, _ = start(2, TEXT, "--ckpt_dir", str(tmp_path), "--tokenizer_path", str(TOKENIZER))
    assert code != 0
    [line] = errors(err)
    assert "params.json: n_layers is 0; it must be positive" in line


def test_an_allocator_without_thresholds_is_left_alone(monkeypatch):
    """Not every system has glibc's malloc."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    script.keep_memory()


def test_the_previous_releases_import_of_script():
    code = "from llama.script import run, readable_errors; from llama import script; print(script.run is run)"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n"
    assert "llama.script is now llama.cli.script" in done.stderr
