"""Conversion: the result has the same weights in another layout, and is written completely or not at all."""

import gc
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import context
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from small import GQA, MODELS, ROOT, SHAPES, TOKENIZER, cases, in_process, relative_error, save_random

from llama import Llama, checkpoint
from llama.checkpoint import Checkpoint, convert, write
from llama.checkpoint.convert import convert as run
from llama.cli.convert import convert as command

TOKENS = torch.tensor([[5, 17, 99, 3, 64, 64, 127, 0, 1, 2, 30, 31]])


def weights(folder, dtype="float32"):
    return Llama.build(folder, TOKENIZER, 32, device="cpu", dtype=dtype).model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shape", ["GQA", "odd FFN", "MQA"])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4), (4, 2), (1, 8)])
def test_meta_to_meta_with_another_number_of_shards(tmp_path, shape, before, after):
    """The files equal those saved with that number of shards, tensor by tensor."""
    state = save_random(tmp_path / "from", SHAPES[shape], mp=before, dtype=torch.bfloat16)
    save_random(tmp_path / "expected", SHAPES[shape], mp=after, dtype=torch.bfloat16)
    run(tmp_path / "from", tmp_path / "to", "meta", after, None, TOKENIZER)
    for i in range(after):
        name = f"consolidated.{i:02d}.pth"
        for mapped in (True, False):
            ours = torch.load(tmp_path / "to" / name, weights_only=True, mmap=mapped)
            assert same(ours, torch.load(tmp_path / "expected" / name, weights_only=True))
    assert same(weights(tmp_path / "to", "bfloat16"), state)
    assert (tmp_path / "to" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    assert Checkpoint(tmp_path / "to").params == Checkpoint(tmp_path / "from").params
    check = subprocess.run(["md5sum", "-c", "checklist.chk"], cwd=tmp_path / "to", capture_output=True, text=True)
    assert check.stdout.count(": OK") == after + 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("file_size", [2 * 10**9, 100_000])
def test_meta_to_hugging_face_and_back(tmp_path, monkeypatch, shape, file_size):
    """transformers loads it and computes the same logits; converted back, every tensor is bit-identical."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(convert, "HF_FILE", file_size)
    state = save_random(tmp_path / "meta", SHAPES[shape], mp=1 if shape == "MQA" else 2)
    run(tmp_path / "meta", tmp_path / "hf", "hf", 1, None, TOKENIZER)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) == 1) == (file_size > 10**6)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    llama = Llama.build(tmp_path / "meta", TOKENIZER, 32, device="cpu", dtype="float32")
    with torch.inference_mode():
        assert relative_error(llama.model(TOKENS, 0), theirs(TOKENS).logits) <= 1e-5
    assert theirs.generation_config.eos_token_id == 2
    assert len((tmp_path / "hf" / "checklist.chk").read_text().splitlines()) == len(os.listdir(tmp_path / "hf")) - 1
    run(tmp_path / "hf", tmp_path / "back", "meta", 1, None, TOKENIZER)
    assert same(torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True), state)
    if shape != "odd FFN":
        run(tmp_path / "hf", tmp_path / "eight", "meta", 8, None, TOKENIZER)  # more shards than key-value heads
        assert same(weights(tmp_path / "eight"), state)


def test_tied_embeddings_are_written_twice(tmp_path):
    """The source has one tensor with two names, which the target's format does not support."""
    state = save_random(tmp_path / "from")
    state["output.weight"] = state["tok_embeddings.weight"]
    torch.save(state, tmp_path / "from" / "consolidated.00.pth")
    run(tmp_path / "from", tmp_path / "to", "hf", 1, None, TOKENIZER)
    assert same(weights(tmp_path / "to"), state)


def test_dtype(tmp_path):
    state = save_random(tmp_path / "meta")
    run(tmp_path / "meta", tmp_path / "half", "meta", 1, torch.float16, TOKENIZER)
    half = torch.load(tmp_path / "half" / "consolidated.00.pth", weights_only=True)
    assert same(half, {name: weight.half() for name, weight in state.items()})
    run(tmp_path / "meta", tmp_path / "hf", "hf", 1, torch.bfloat16, TOKENIZER)
    theirs = load_file(tmp_path / "hf" / "model.safetensors")
    assert {weight.dtype for weight in theirs.values()} == {torch.bfloat16}


def test_auto_tokenizer_gives_the_same_ids(tmp_path):
    """For lines with leading spaces, tabs, newlines, emoji, Chinese, Arabic and combining marks."""
    from transformers import AutoTokenizer

    run(MODELS / "small-chat", tmp_path / "hf", "hf", 1, None, TOKENIZER)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = SentencePieceProcessor(model_file=str(TOKENIZER))
    rng = random.Random(0)
    words = ["the", "fox", "was", "happy", "There", "opposite", "[INST]", "[/INST]", "<<SYS>>", "small,", "12", "3 + 4"]
    words += ["thanks!", "🙂", "你好", "مرحبا", "e\u0301", "naïve", "<0x41>"]
    spaces = [" ", "", "  ", "\t", "\n", " \n", "▁"]
    lines = ["", " ", "   ", "\n", *words]
    for _ in range(cases(2000)):
        lines.append("".join(rng.choice(spaces) + rng.choice(words) for _ in range(rng.randrange(1, 9))))
    for line in lines:
        ids = theirs(line)["input_ids"]
        assert ids == [1, *ours.encode(line)], repr(line)
        assert theirs.decode(ids[1:]) == ours.decode(ids[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "to is 'onnx'; it must be meta, hf or gguf"),
        ({"mp": 3}, r"tok_embeddings\.weight \(1024, 64\) cannot be divided into mp 3 shards along dimension 1"),
        ({"mp": 0}, "into mp 0 shards"),
        ({"mp": "2"}, "into mp '2' shards"),
    ],
)
def test_failed_conversions_leave_no_files(tmp_path, options, message):
    save_random(tmp_path / "from")
    options = {"to": "meta", "mp": 1, "dtype": None, "tokenizer_path": TOKENIZER, **options}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "from", tmp_path / "to", **options)
    assert os.listdir(tmp_path) == ["from"]


def test_a_folder_with_the_name_of_a_partial_conversion_is_kept(tmp_path):
    """Regression: it was removed, even if it was the source itself."""
    save_random(tmp_path / ".to.partial")
    before = sorted(os.listdir(tmp_path / ".to.partial"))
    with pytest.raises(FileExistsError, match=r"\.to\.partial is in the way"):
        run(tmp_path / ".to.partial", tmp_path / "to", "meta", 1, None, TOKENIZER)
    assert sorted(os.listdir(tmp_path / ".to.partial")) == before
    assert os.listdir(tmp_path) == [".to.partial"]


def test_two_conversions_to_one_folder(tmp_path):
    with write.new_folder(tmp_path / "to", 1) as folder:
        (folder / "file").touch()
        second = write.new_folder(tmp_path / "to", 1)
        with pytest.raises(FileExistsError, match="to is being written by another process"):
            second.__enter__()
    assert os.listdir(tmp_path) == ["to"]
    assert os.listdir(tmp_path / "to") == ["file"]


@pytest.mark.parametrize("target", ["new/..", "link", "from/../from"])
def test_existing_targets_are_refused_before_the_work(tmp_path, target):
    save_random(tmp_path / "from")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="exists; nothing is overwritten"):
        run(tmp_path / "from", tmp_path / target, "meta", 1, None, TOKENIZER)
    assert sorted(os.listdir(tmp_path)) == ["from", "link"]


def test_nothing_is_overwritten(tmp_path):
    save_random(tmp_path / "from")
    (tmp_path / "to").mkdir()
    with pytest.raises(FileExistsError, match="to exists; nothing is overwritten"):
        run(tmp_path / "from", tmp_path / "to", "meta", 1, None, TOKENIZER)


BIG = {"norm.weight": torch.ones(10**6)}
WRITERS = {  # a function that writes to a folder, and the file that is too large for it
    "shards": (lambda source, folder: run(source, folder / "to", "meta", 1, torch.float32, TOKENIZER), "00.pth"),
    "safetensors": (
        lambda source, folder: run(source, folder / "to", "hf", 1, torch.float32, TOKENIZER),
        "safetensors",
    ),
    "save": (lambda source, folder: checkpoint.save(BIG, folder, {}), "consolidated.00.pth"),
    "json": (lambda source, folder: write.write_file(folder / "a.json", {"a": "b" * 10**6}), "a.json"),
    "a file": (lambda source, folder: checkpoint.write_file(folder / "talk", b"b" * 10**6), "talk"),
    "a list of sums": (lambda source, folder: write.write_checklist(folder / "a.chk", [TOKENIZER] * 15_000), "a.chk"),
}


@pytest.fixture(params=WRITERS)
def full_disk(request, tmp_path, monkeypatch):
    """(write, message): a function that writes to a disk that is too small, and the expected message."""
    save_random(tmp_path / "from", {**GQA, "n_layers": 2})
    monkeypatch.setattr(write, "digest", lambda *args: "0" * 32)
    function, name = WRITERS[request.param]
    (tmp_path / "disk").mkdir()
    yield (
        lambda: function(tmp_path / "from", tmp_path / "disk"),
        f"{tmp_path}/disk/.*{name} needs [0-9,]+ bytes and its ",
    )


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, full_disk, monkeypatch):
    """Regression: safetensors' error came with its traceback, torch's was about a position, and neither named the file.
    No partial file is left."""
    function, message = full_disk
    small = tmp_path / "disk"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", small], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        with monkeypatch.context() as patch:  # as if another program filled the disk during a conversion
            patch.setattr(convert, "new_folder", lambda target, size: write.new_folder(target, 0))
            with pytest.raises(OSError, match=f"{message}disk has [0-9,]+ free .*No space left on device"):
                function()
        assert {file.name for file in small.iterdir()} <= {"params.json"}
    finally:
        gc.collect()  # the file that torch.save left open
        subprocess.run(["umount", small], check=True)


def test_a_file_too_large_for_its_file_system_is_named(tmp_path, full_disk):
    """As on FAT32, whose files have at most 4 GB."""
    function, message = full_disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{message}disk has [0-9,]+ free"):
            function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name for file in (tmp_path / "disk").iterdir()} <= {"params.json"}


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_a_disk_that_is_too_small_is_an_error_before_the_work(tmp_path, monkeypatch, to):
    save_random(tmp_path / "from", {**GQA, "n_layers": 2})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(OSError, match=f"{tmp_path}/to needs [0-9,]+ bytes and its disk has 5,000 free"):
        run(tmp_path / "from", tmp_path / "to", to, 1, torch.float32, TOKENIZER)
    assert os.listdir(tmp_path) == ["from"]


def test_files_are_written_atomically(tmp_path):
    """An existing file is unchanged when writing fails; a link keeps pointing to its file; a device is not replaced."""
    (tmp_path / "file").write_bytes(b"before")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(KeyboardInterrupt), write.writing(tmp_path / "file", 10) as new:
        new.write_bytes(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"before"
    checkpoint.write_file(tmp_path / "link", b"after")
    assert (tmp_path / "file").read_bytes() == b"after"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
    checkpoint.write_file(Path("/dev/null"), b"nothing")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/nowhere/talk'"):
        checkpoint.write_file(tmp_path / "nowhere" / "talk", b"")


def _slow_convert(source, target):
    real = Checkpoint.read

    def read(*args, **kwargs):
        time.sleep(0.005)
        return real(*args, **kwargs)

    Checkpoint.read = read
    run(source, target, "meta", 2, None, TOKENIZER)


def test_killed_twenty_times_and_run_again(tmp_path):
    """The result is complete or absent."""
    state = save_random(tmp_path / "from", mp=4)
    rng, finished, halfway = random.Random(0), 0, 0
    for _ in range(20):
        process = context.Process(target=_slow_convert, args=(tmp_path / "from", tmp_path / "to"))
        process.start()
        process.join(rng.uniform(0.0, 0.8))
        process.kill()
        process.join()
        halfway += (tmp_path / ".to.partial" / "consolidated.00.pth").exists()
        if (tmp_path / "to").exists():
            finished += 1
            assert same(weights(tmp_path / "to"), state)
            shutil.rmtree(tmp_path / "to")
    assert finished < 20
    assert halfway > 0
    run(tmp_path / "from", tmp_path / "to", "meta", 2, None, TOKENIZER)
    assert same(weights(tmp_path / "to"), state)
    assert sorted(os.listdir(tmp_path)) == ["from", "to"]


def test_the_command(tmp_path):
    """The target's name is a number to parsers of flags."""
    line = [sys.executable, "-m", "llama", "convert", str(MODELS / "small-chat"), "2024_01", "--to", "hf"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "2024_01" / "model.safetensors").is_file()
    size = sum(file.stat().st_size for file in (tmp_path / "2024_01").iterdir())
    assert done.stdout == f"written to 2024_01: hf in bfloat16, {size / 1e6:,.1f} MB\n"


@pytest.mark.parametrize(
    ("flags", "written"),
    [
        (["--quantize", "int4"], "meta in int4 in groups of 32, "),
        (["--to", "gguf", "--quantize", "int8"], "gguf in Q8_0, "),
    ],
)
def test_the_command_says_what_it_has_written(tmp_path, flags, written):
    """Regression: it printed nothing."""
    done = in_process(command, MODELS / "small", tmp_path / "to", *flags)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(re.escape(f"written to {tmp_path / 'to'}: {written}") + r"\d+\.\d MB\n", done.stdout)
