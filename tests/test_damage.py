"""Every way in which a download is damaged: each command raises a specific error at once and leaves no files."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ROOT, TOKENIZER, save_random

from llama import Llama
from llama.checkpoint import find_folder
from llama.checkpoint.convert import convert

FIRST, LAST = "consolidated.00.pth", "consolidated.01.pth"
LINE = r"\([\d,]+ bytes\) is not a readable shard; download it again"


class Malicious:
    def __reduce__(self):
        return (open, (os.environ["EXECUTED"], "w"))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replace(change):
    """Damage: a shard saved again after `change`."""

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
    """Damage: a wrong header size in the first 8 bytes of a safetensors file."""
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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 135\n"
LFS = r"run git lfs pull where it was cloned \(it is a git-lfs pointer\)"


def move(name):
    """Change of a folder: all files except params.json and config.json are in a subfolder of this name."""

    def change(folder):
        (folder / name).mkdir(parents=True)
        for file in [path for path in folder.iterdir() if path.is_file()]:
            file.rename(folder / name / file.name)

    return change


def rename(before, after):
    return lambda folder: (folder / before).rename(folder / after)


def lora(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").unlink()


def index(*names):
    return lambda folder: (folder / INDEX).write_text(
        json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}})
    )


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


INDEX = "model.safetensors.index.json"


def second(folder):
    (folder / "snapshots" / "2e1f").mkdir()


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


OF_TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MISTAKES = {
    "a pointer for a shard": ("meta", write(FIRST, POINTER), f"{FIRST} .* is not a readable shard; {LFS}"),
    "a pointer for safetensors": ("hf", write("model.safetensors", POINTER), f"model.safetensors .*; {LFS}"),
    "a pointer for JSON": ("meta", write("params.json", POINTER), "params.json is not JSON: it is a git-lfs pointer"),
    "a web page for JSON": ("hf", write("config.json", b"\n<html>"), "config.json is not JSON: it is a web page"),
    "a pointer for a tokenizer": ("meta", write("tokenizer.model", POINTER), f"is not a tokenizer.model; {LFS}"),
    "a text for a shard": ("meta", write(FIRST, b"Not found"), r"download it again \(it is the text 'Not found'\)"),
    "GGUF for a shard": ("meta", write(FIRST, b"GGUF\3\0"), r"give its path, .* as ckpt_dir \(it is a GGUF file\)"),
    "a compressed shard": ("meta", write(FIRST, b"\x1f\x8b\x08"), r"decompress it with gunzip \(it is compressed\)"),
    "a LoRA adapter": ("hf", lora, "it is the folder of a LoRA adapter: give the folder of its model, and"),
    "a cache": ("hf", move("models--a/snapshots/1f"), "folder of downloads .*: give .*/from/models--a/snapshots/1f"),
    "one folder up": ("meta", move("llama-2-7b"), "no params.json or config.json in .*/from; give .*/from/llama-2-7b"),
    "no GGUF": ("hf", both(rename("model.safetensors", "a.gguf"), rename("config.json", "c")), "a.gguf .* is not a"),
    "several variants": (
        "hf",
        both(rename("model.safetensors", "model.bf16.safetensors"), write("model.fp16.safetensors", b"x")),
        "has several variants of the weights: model.bf16.safetensors, model.fp16.safetensors; keep one",
    ),
    "a part of two": ("hf", rename("model.safetensors", OF_TWO[0]), f"download the other parts of {OF_TWO[0]} too"),
    "a part of an index": (
        "hf", both(index(*OF_TWO), rename("model.safetensors", OF_TWO[0])), f"lacks {OF_TWO[1]}; download it again"
    ),
    "several snapshots": ("hf", both(move("snapshots/1f2e"), second), "has several snapshots and no refs/main"),
    "no config.json": ("hf", lambda folder: (folder / "config.json").unlink(), "download config.json, which"),
    "no params.json": ("meta", lambda folder: (folder / "params.json").unlink(), "download params.json, which"),
    "AQLM": ("hf", config(quantization_config={"quant_method": "aqlm"}), "weights quantized by aqlm are not read"),
    "a model of images": ("hf", config(model_type="mllama"), "model_type 'mllama' is not supported"),
    "experts": ("hf", config(model_type="mixtral", num_local_experts=8), "model_type 'mixtral' is not supported"),
    "no model of the hub": ("hf", move("x"), "no params.json or config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_other_contents_of_a_folder_are_named(tmp_path, name):
    """Regression: a pointer "holds other things than tensors", a stale index "lacks model.safetensors", and the top
    folder of a cache no params.json: true, but no help."""
    layout, change, message = MISTAKES[name]
    save_random(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "from", layout, 1, None, TOKENIZER)
    change(tmp_path / "from")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Llama.build(tmp_path / "from", None, 32, device="cpu")
    assert str(tmp_path) in str(caught.value)


def as_bin(folder, zipped=True):
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()


def in_parts(pattern, index=None, load=load_file, save=save_file):
    """Change of a folder: the weights are in two files of these names."""

    def change(folder):
        state = load(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        table = {}
        for i in range(2):
            name = pattern.format(i + 1)
            part = {key: state[key] for key in [*state][i::2]}
            save(part, folder / name)
            table |= dict.fromkeys(part, name)
        if index:
            (folder / index).write_text(json.dumps({"weight_map": table}))

    return change


def snapshot(folder):
    move("snapshots/1f2e")(folder)
    second(folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1f2e")


def cyclic(folder):
    (folder / "again").symlink_to(folder)


BIN_PART, PART = "pytorch_model-0000{}-of-00002.bin", "model-0000{}-of-00002.safetensors"
AS_THEY_ARE = {
    "torch's format": as_bin,
    "torch's older format": partial(as_bin, zipped=False),  # the output matrix was taken for the embeddings
    "torch's format in parts": in_parts(BIN_PART, "pytorch_model.bin.index.json", save=torch.save),
    "torch's format without an index": in_parts(BIN_PART, save=torch.save),
    "both formats": both(write("pytorch_model.bin", b"x"), write("training_args.bin", b"x")),
    "parts": in_parts(PART, INDEX),
    "parts without an index": in_parts(PART),
    "parts and a stale index": both(in_parts(PART), index("model-00001-of-00009.safetensors")),
    "a stale index": index(*OF_TWO),
    "a variant": rename("model.safetensors", "model.bf16.safetensors"),
    "a variant in parts": in_parts("model.fp16-0000{}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
    "a variant beside the model": write("model.fp16.safetensors", b"x"),
    "the top folder of a cache": snapshot,
    "only tokenizer.json": lambda folder: (folder / "tokenizer.model").unlink(),
    "a cyclic link": cyclic,
    "biases that are null": config(mlp_bias=None, attention_bias=None, rope_scaling=None, quantization_config=None),
    "a consolidated file beside": write("consolidated.safetensors", b"x"),
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_typical_hugging_face_folders(tmp_path, name):
    save_random(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "from", "hf", 1, None, TOKENIZER)
    expected = Llama.build(tmp_path / "from", None, 32, device="cpu").model.state_dict()
    expected = {name: weight.clone() for name, weight in expected.items()}
    AS_THEY_ARE[name](tmp_path / "from")
    found = Llama.build(tmp_path / "from", None, 32, device="cpu").model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_model_of_the_hub_by_its_id(tmp_path, monkeypatch):
    """From the cache, without a network. The error for a model that is in neither says so."""
    import huggingface_hub.constants

    cache = tmp_path / "cache"
    save_random(tmp_path / "meta")
    top = cache / "models--someone--tiny-llama"
    convert(tmp_path / "meta", tmp_path / "hf", "hf", 1, None, TOKENIZER)
    (top / "snapshots").mkdir(parents=True)
    (tmp_path / "hf").rename(top / "snapshots" / ("a" * 40))
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Llama.build("someone/tiny-llama", None, 32, device="cpu")
    with pytest.raises(
        FileNotFoundError,
        match="no/such-model is not a folder, and could not be loaded from the Hug",
    ):
        Llama.build("no/such-model", None, 32, device="cpu")
    asked = []

    def download(id, local_files_only=False, allow_patterns=(), ignore_patterns=()):
        asked.append((local_files_only, "pytorch_model*.bin" in allow_patterns, ignore_patterns))
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("someone/else", "ckpt_dir") == tmp_path
    once = ["original/*"]  # the same weights again
    assert asked == [(True, False, once), (False, False, once), (False, True, once)]  # .bin only without safetensors
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="an id of the hub needs the package huggingface_hub"):
        Llama.build("someone/tiny-llama", None, 32, device="cpu")


def test_a_path_of_the_other_kind_is_named(tmp_path):
    save_random(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ckpt_dir .*/params\.json is not an existing folder but a file"):
        Llama.build(tmp_path / "params.json", TOKENIZER)
    with pytest.raises(FileNotFoundError, match="tokenizer_path .* is not an existing file but a folder"):
        Llama.build(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer_path .* is not an existing file but a pipe or device"):
        Llama.build(tmp_path, os.devnull)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json: KeyError\('model'\)"):
        Llama.build(tmp_path, tmp_path / "tokenizer.json")


def test_params_json_beside_hugging_faces_layout(tmp_path):
    """Regression: folders with config.json and another program's params.json were said to lack consolidated.*.pth."""
    save_random(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf", "hf", 1, None, TOKENIZER)
    (tmp_path / "hf" / "params.json").write_text('{"head_dim": 8}')
    Llama.build(tmp_path / "hf", None, 32, device="cpu")


@pytest.fixture(params=DAMAGE)
def damaged(request, tmp_path, monkeypatch):
    """(folder, message): a checkpoint with this damage, and the expected message."""
    monkeypatch.setenv("EXECUTED", str(tmp_path / "executed"))
    name, damage, message = DAMAGE[request.param]
    save_random(tmp_path / "from", mp=2)
    if name == "model.safetensors":
        convert(tmp_path / "from", tmp_path / "hf", "hf", 1, None, TOKENIZER)
        shutil.rmtree(tmp_path / "from")
        (tmp_path / "hf").rename(tmp_path / "from")
    damage(tmp_path / "from" / name)
    yield tmp_path / "from", message
    assert os.listdir(tmp_path) == ["from"]  # nothing was executed, and no partial file is left


def test_build_and_convert_name_the_damage(damaged):
    folder, message = damaged
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Llama.build(folder, TOKENIZER, 32, device="cpu")
    for to in ("meta", "hf"):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert(folder, folder.parent / "to", to, 1, None, TOKENIZER)


def test_commands_print_one_line(damaged):
    folder, message = damaged
    run = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 30}
    command = [sys.executable, "-m", "llama", "convert", str(folder), str(folder.parent / "to")]
    done = subprocess.run([*command, "--tokenizer_path", str(TOKENIZER)], **run)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
