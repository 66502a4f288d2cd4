"""Every way in which a download goes wrong: a named error from every command, at once, and nothing left behind."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import ROOT, TOKENIZER, save_random

from llama import Llama
from llama.checkpoint.convert import convert

FIRST, LAST = "consolidated.00.pth", "consolidated.01.pth"
LINE = r"\([\d,]+ bytes\) is not a readable shard; download it again"


class Malicious:
    def __reduce__(self):
        return (open, (os.environ["EXECUTED"], "w"))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replace(change):
    """A shard as it was saved, but for one thing."""

    def damage(file):
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)

    return damage


def of_another_model(file):
    save_random(file.parent.parent / "other", mp=2, seed=1)
    shutil.copy(file.parent.parent / "other" / file.name, file)
    shutil.rmtree(file.parent.parent / "other")


def lie(file):
    """The first 8 bytes of a safetensors file are the size of its header."""
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])


DAMAGE = {
    "truncated": (LAST, cut, f"{LAST} {LINE}"),
    "missing": (LAST, Path.unlink, f"has 1 of 2 shards; download {LAST}"),
    "first missing": (FIRST, Path.unlink, f"lacks {FIRST}"),
    "of another model": (LAST, of_another_model, f"{LAST} and {FIRST} are shards of different models"),
    "of another dtype": (
        LAST,
        replace(lambda state: state.update({name: weight.half() for name, weight in state.items()})),
        f"{LAST} does not fit params.json: of another dtype than in {FIRST}: tok_embeddings.weight torch.float16",
    ),
    "an extra key": (LAST, replace(lambda state: state.update(extra=torch.ones(1))), f"{LAST} .* unexpected: extra"),
    "a missing key": (LAST, replace(lambda state: state.pop("norm.weight")), f"{LAST} .* missing: norm.weight"),
    "a wrong shape": (
        LAST,
        replace(lambda state: state.update({"norm.weight": torch.ones(7)})),
        rf"{LAST} .* misshapen: norm.weight \(7,\) instead of \(64,\)",
    ),
    "zero bytes": (LAST, lambda file: file.write_bytes(b""), f"{LAST} {LINE}"),
    "a web page": (LAST, lambda file: file.write_bytes(b"<!DOCTYPE html><html>403</html>"), f"{LAST} {LINE}"),
    "a malicious pickle": (LAST, lambda file: torch.save({"norm.weight": Malicious()}, file), f"{LAST} {LINE}"),
    "a safetensors header that lies": ("model.safetensors", lie, f"model.safetensors {LINE}"),
    "a truncated safetensors file": ("model.safetensors", cut, f"model.safetensors {LINE}"),
}


@pytest.fixture(params=DAMAGE)
def damaged(request, tmp_path, monkeypatch):
    """(folder, message): a checkpoint with this damage, and what should be said of it."""
    monkeypatch.setenv("EXECUTED", str(tmp_path / "executed"))
    name, damage, message = DAMAGE[request.param]
    save_random(tmp_path / "from", mp=2)
    if name == "model.safetensors":
        convert(tmp_path / "from", tmp_path / "hf", "hf", 1, None, TOKENIZER)
        shutil.rmtree(tmp_path / "from")
        (tmp_path / "hf").rename(tmp_path / "from")
    damage(tmp_path / "from" / name)
    yield tmp_path / "from", message
    assert os.listdir(tmp_path) == ["from"]  # nothing executed, nothing half written


def test_build_and_convert_name_it(damaged):
    folder, message = damaged
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Llama.build(folder, TOKENIZER, 32, device="cpu")
    for to in ("meta", "hf"):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert(folder, folder.parent / "to", to, 1, None, TOKENIZER)


def test_the_commands_end_with_one_line(damaged):
    folder, message = damaged
    run = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 30}
    command = [sys.executable, "-m", "llama", "convert", str(folder), str(folder.parent / "to")]
    done = subprocess.run([*command, "--tokenizer_path", str(TOKENIZER)], **run)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
