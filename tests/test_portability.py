"""Other systems: Windows lacks fcntl, and has other line ends and another default encoding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from small import MODELS, ROOT, TOKENIZER, save_random

from llama.checkpoint.convert import convert

HIDE = """
import ctypes, mmap, os, runpy, signal, sys
import fairscale.nn.model_parallel, fire, safetensors.torch, sentencepiece, torch, torch.testing, tqdm

for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
unix = {mmap: ("MADV_", "MAP_", "PROT_"), signal: ("SIGALRM", "SIGHUP", "SIGKILL", "alarm", "setitimer")}
unix[os] = ("fork", "getpgid", "getuid", "killpg", "posix_", "register_at_fork", "sched_", "sysconf", "uname")
for module, starts in unix.items():
    for name in [name for name in vars(module) if name.startswith(starts)]:
        delattr(module, name)
mmap.mmap = type("mmap", (mmap.mmap,), {"madvise": property()})
load = ctypes.CDLL

def CDLL(name, *args):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return load(name, *args)

ctypes.CDLL = CDLL
for sys.argv in COMMANDS:
    try:
        print("==", *sys.argv)
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__")
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print("left with", end.code)
"""


def test_unix_only_modules_are_optional(tmp_path):
    """Regression: fcntl and resource were imported and flags of mmap used, so that no command ran on Windows. Text
    files are opened with an encoding."""
    small, llama = str(MODELS / "small"), ["-m", "llama"]
    commands = [
        [str(ROOT / "example_text_completion.py"), "--max_gen_len", "2"],
        [str(ROOT / "example_chat_completion.py"), "--max_gen_len", "2"],
        [*llama, "inspect", small, "--verify"],
        [*llama, "convert", small, str(tmp_path / "meta"), "--mp", "2"],
        [*llama, "convert", small, str(tmp_path / "hf"), "--to", "hf"],
        [*llama, "inspect", str(tmp_path / "meta"), "--verify"],
        [*llama, "inspect", str(tmp_path / "hf"), "--verify"],
        [*llama, "bench", "--ckpt_dir", small, "--prompts", "8", "--batches", "1", "--repeats", "1", "--tokens", "2"],
        [*llama, "chat", str(MODELS / "small-chat"), "--max_gen_len", "2"],
        [*llama, "perplexity", str(MODELS / "small" / "params.json"), small, "--window", "64"],
    ]
    run = [sys.executable, "-X", "warn_default_encoding", "-c", HIDE.replace("COMMANDS", repr(commands))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, capture_output=True, input="Hello\n", env=environment, timeout=100, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "left" not in done.stdout and done.stdout.count("verified: ") == 3 and done.stdout.count("> ") == 8
    mine = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and str(ROOT / "llama") in line]
    assert not mine


def test_written_files_have_the_same_line_ends_everywhere(tmp_path):
    """On Windows text files get line ends of two characters, and md5sum then finds none of the files in a list."""

    def write_text(path, text, encoding=None, errors=None, newline=None):
        return path.write_bytes(text.replace("\n", newline or "\r\n").encode(encoding))

    with mock.patch.object(Path, "write_text", write_text):
        save_random(tmp_path / "model")
        shutil.copy(TOKENIZER, tmp_path / "model")
        convert(tmp_path / "model", tmp_path / "hf", "hf", 1, None, tmp_path / "model" / "tokenizer.model")
    for path in tmp_path.rglob("*"):
        if path.suffix in (".chk", ".json"):
            assert b"\r" not in path.read_bytes(), path


def test_checked_out_files_keep_the_line_ends_of_their_checksums():
    """git on Windows would otherwise change files whose checksums are in models/."""
    files = subprocess.run(
        ["git", "ls-files", "models"], cwd=ROOT, capture_output=True, encoding="utf-8"
    ).stdout.split()
    if not files:
        pytest.skip("no git checkout")
    told = subprocess.run(["git", "check-attr", "text", "eol", "--", *files], cwd=ROOT, capture_output=True, text=True)
    for file in files:
        assert f"{file}: text: unset" in told.stdout or f"{file}: eol: lf" in told.stdout
