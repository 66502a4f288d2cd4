"""python -m llama inspect: what a checkpoint contains, whether it fits here, and whether its files are intact."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch
from tqdm import tqdm

from .. import backends, devices
from ..args import ModelArgs
from ..backends import cpu
from ..backends.quantized import Quantization
from ..checkpoint import (
    Checkpoint,
    available,
    digest,
    divides,
    find_folder,
    find_tokenizer,
    footprint,
    shapes,
    shortage,
    with_lora,
)
from ..textfile import read_text
from ..tokenizer import Tokenizer
from .flags import documented

SUMS = ("*.chk", "*.md5", "*.sha256", "*SUMS")  # names of files that list check sums
DIGESTS = {32: "md5", 64: "sha256"}  # by the number of hex digits
LAYOUTS = {"meta": "Meta's", "hf": "Hugging Face's", "gguf": "GGUF"}


@documented
def inspect(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    world_size: int | None = None,
    dtype: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    device: str | None = None,
    verify: bool = False,
    quantize: str | None = None,
    group_size: int | None = None,
    lora: str | list | None = None,
) -> None:
    """Print what a checkpoint contains, what it needs and how to run it, from the headers of its files.

    Args:
        world_size: number of ranks; by default the fewest on which the model fits
        max_seq_len: maximum number of tokens of prompt and answer together
        max_batch_size: maximum number of prompts in a batch
        verify: read all files and check them against the md5 or sha256 sums in the folder and next to the tokenizer
        quantize: int8 or int4, to print what the model needs when it is quantized while loading
    """
    folder = find_folder(ckpt_dir, "ckpt_dir")
    checkpoint = Checkpoint(folder)
    tokenizer, missing = None, ""
    try:
        tokenizer = find_tokenizer(folder, tokenizer_path)
    except FileNotFoundError as error:
        missing = f"missing: {error}"
    args = checkpoint.args(checkpoint.vocab_size() if tokenizer is None else Tokenizer(tokenizer).n_words)
    _, args, adapters = with_lora(checkpoint, args, lora)
    args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    target = devices.choose_device(device)
    scheme, saved = checkpoint.scheme_for(quantize, group_size, device=target), checkpoint.dtype()
    native = backends.native(args, target, footprint(args, 1, saved, scheme).weights, build=False)
    chosen = devices.choose_dtype(dtype, target, saved, native)
    rows = describe(checkpoint, args) | {"tokenizer": tokenizer or missing}
    rows |= {"lora": "; ".join(map(str, adapters))} if adapters else {}
    rows |= fit(args, world_size, chosen, scheme, target) | {"computes": computes(target, native)}
    rows["run"] = command(rows.pop("ranks"), folder, tokenizer, args, lora)
    for title, value in rows.items():
        print(f"{title:>10}: {value}")
    if verify:
        paths = [file.path for file in checkpoint.files]
        verify_sums(folder if folder.is_dir() else folder.parent, tokenizer, paths)


def command(ranks: object, folder: Path, tokenizer: Path | None, args: ModelArgs, lora: object) -> str:
    if args.n_labels:
        return f"Llama.build({str(folder)!r}).classify(texts), on {ranks} rank(s)"
    inside = tokenizer == folder  # a GGUF file
    return (
        f"torchrun --nproc_per_node {ranks} example_text_completion.py --ckpt_dir {quote(str(folder))} "
        + ("" if inside else f"--tokenizer_path {quote(str(tokenizer or 'TOKENIZER.MODEL'))} ")
        + f"--max_seq_len {args.max_seq_len} --max_batch_size {args.max_batch_size}"
        + (f" --lora {quote(str(lora))}" if lora else "")
    )


def describe(checkpoint: Checkpoint, args: ModelArgs) -> dict[str, object]:
    packed = [entry.packed for file in checkpoint.files for entry in file.tensors.values() if entry.packed]
    methods = sorted({matrix.kind for matrix in packed if not matrix.scheme})
    return {
        "layout": LAYOUTS[checkpoint.layout],
        "parameters": f"{sum(math.prod(shape) for shape in shapes(args).values()):,}",
        "model": f"{args.n_layers} layers, dim {args.dim}, {args.n_heads} heads ({args.kv_heads} key-value), "
        f"FFN {args.ffn_hidden}, vocabulary {args.vocab_size}",
        **({"labels": ", ".join(checkpoint.labels())} if args.n_labels else {}),
        "files": f"{len(checkpoint.files)}, in {checkpoint.scheme or devices.dtype_name(checkpoint.dtype())}"
        + "".join(f", with matrices by {method} that are loaded as floats" for method in methods),
    }


def fit(
    args: ModelArgs, world_size: int | None, dtype: torch.dtype, scheme: Quantization, device: torch.device
) -> dict[str, object]:
    """The number of ranks for this machine, by default the fewest on which the model fits, and what each needs. Raises
    ValueError for a `world_size` that does not divide the model."""
    possible = [n for n in (1, 2, 4, 8) if divides(args, n)]
    if world_size is not None:
        if type(world_size) is not int or world_size < 1 or not divides(args, world_size):
            allowed = ", ".join(map(str, possible))
            raise ValueError(f"world_size {world_size!r} does not divide the model; {allowed} do")
        possible = [world_size]
    free = available(device)
    for ranks in possible:
        needed = footprint(args, ranks, dtype, scheme)
        each = free // ranks if device.type == "cpu" else free  # ranks on a CPU share its memory
        problem = shortage(needed, each, device, ranks)
        if not problem:
            break
    return {
        "each rank": f"{needed} in {scheme or devices.dtype_name(dtype)}, "
        f"{args.max_batch_size} x {args.max_seq_len} positions, {ranks} rank(s)",
        "here": f"{device} with {each / 1e9:.2f} GB free for each rank",
        "fits": problem or "yes",
        "ranks": ranks,
    }


def computes(device: torch.device, native: bool) -> str:
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        return "Triton kernels and CUDA graphs"
    if native:
        return f"C++, compiled for this CPU by {cpu.command()[0]}"
    try:
        return "PyTorch" if device.type != "cpu" or cpu.command() else ""
    except RuntimeError as error:
        return f"PyTorch, as {error}"


def verify_sums(folder: Path, tokenizer: Path | None, needed: Sequence[Path]) -> None:
    """Check files against the lists of md5 or sha256 sums in the folder and next to the tokenizer. Raises ValueError
    that names files that are missing, that differ, or that are `needed` but in no list, or a line that is of neither
    format; FileNotFoundError if there is no list."""
    lists = {file for pattern in SUMS for file in folder.glob(pattern)}
    lists |= {*(tokenizer or folder / "tokenizer.model").parent.glob("tokenizer_checklist.chk")}
    if not lists:
        raise FileNotFoundError(f"no list of sums to verify in {folder}: none of {', '.join(SUMS)}")
    expected = []
    for path in sorted(lists):
        for line in filter(str.strip, read_text(path).split("\n")):
            if not (match := re.fullmatch(r"([0-9a-fA-F]{32}|[0-9a-fA-F]{64}) [ *]?(.+)", line.strip())):
                raise ValueError(f"{path}: {line!r} is not a line of md5sum's or sha256sum's output")
            expected.append((path.parent / match[2].strip(), match[1].lower()))
    missing = [file for file, _ in expected if not file.is_file()]
    present = [(file, sum) for file, sum in expected if file not in missing]
    total = sum(file.stat().st_size for file, _ in present)
    with tqdm(desc="verifying", total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        wrong = [file for file, sum in present if digest(file, DIGESTS[len(sum)], bar.update) != sum]
    unlisted = [file for file in needed if file not in [listed for listed, _ in expected]]
    problems = {"missing": missing, "other than their sums say": wrong, "in no list of sums": unlisted}
    if found := [f"{problem}: {', '.join(map(str, files))}" for problem, files in problems.items() if files]:
        raise ValueError(f"{'; '.join(found)}; download again")
    print(f"{'verified':>10}: {', '.join(file.name for file, _ in present)}")
