"""python -m llama COMMAND: thin commands over the rooms of this package; --help tells more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import parallel, script
from .checkpoint import Checkpoint, check_path, find_tokenizer, md5, shapes
from .convert import convert as write
from .memory import available, footprint, shortage
from .tokenizer import Tokenizer


def convert(
    src: str, dst: str, to: str = "meta", mp: int = 1, dtype: str | None = None, tokenizer_path: str | None = None
) -> None:
    """Write the checkpoint in SRC, in either layout, to the new folder DST.

    Args:
        src: folder of params.json and consolidated.*.pth, or of config.json and *.safetensors
        dst: the folder to make; it gets its name when it is complete
        to: meta or hf, the layout to write
        mp: number of shards, for meta
        dtype: bfloat16, float16 or float32; by default as in src
        tokenizer_path: tokenizer.model; by default the one in src or one folder up
    """
    folder = check_path(src, "src", "folder")
    kind = None if dtype is None else parallel.as_dtype(dtype)
    write(folder, Path(str(dst)), to, mp, kind, find_tokenizer(folder, tokenizer_path))


def inspect(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    world_size: int | None = None,
    dtype: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    device: str | None = None,
    verify: bool = False,
) -> None:
    """Tell what a checkpoint is, what it needs and how to run it, from headers alone.

    Args:
        ckpt_dir: folder of params.json and consolidated.*.pth, or of config.json and *.safetensors
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir or one folder up
        world_size: number of ranks; by default the fewest on which it fits
        dtype: bfloat16, float16 or float32; by default what Llama.build would choose
        max_seq_len: tokens of prompt and answer together, at most
        max_batch_size: prompts at a time, at most
        device: cuda, mps or cpu; the first of them that there is by default
        verify: read everything and compare md5 sums with checklist.chk
    """
    folder = check_path(ckpt_dir, "ckpt_dir", "folder")
    checkpoint = Checkpoint(folder)
    path = find_tokenizer(folder, tokenizer_path)
    args = checkpoint.args(Tokenizer(path).n_words)
    args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    where = parallel.choose_device(device)
    kind = parallel.choose_dtype(dtype, where, checkpoint.dtype())
    free = available(where)
    ranks = [n for n in (1, 2, 4, 8) if args.n_heads % n == 0 == args.ffn_hidden % n]
    if world_size is not None:
        ranks = [world_size]
    each = {n: free // n if where.type == "cpu" else free for n in ranks}  # ranks on a CPU share its memory
    fitting = [n for n in ranks if shortage(footprint(args, n, kind), each[n], where, n) is None]
    chosen = (fitting or ranks[-1:])[0]
    needed = footprint(args, chosen, kind)
    rows = {
        "layout": {"meta": "Meta's", "hf": "Hugging Face's"}[checkpoint.layout],
        "parameters": f"{sum(math.prod(shape) for shape in shapes(args).values()):,}",
        "model": f"{args.n_layers} layers, dim {args.dim}, {args.n_heads} heads ({args.kv_heads} key-value), "
        f"FFN {args.ffn_hidden}, vocabulary {args.vocab_size}",
        "files": f"{len(checkpoint.files)}, in {name(checkpoint.dtype())}",
        "tokenizer": path,
        "each rank": f"{needed} in {name(kind)}, {max_batch_size} x {max_seq_len} positions, {chosen} rank(s)",
        "here": f"{where} with {each[chosen] / 1e9:.2f} GB free for each rank",
        "fits": shortage(needed, each[chosen], where, chosen) or "yes",
        "run": f"torchrun --nproc_per_node {chosen} example_text_completion.py --ckpt_dir {folder} "
        f"--tokenizer_path {path} --max_seq_len {max_seq_len} --max_batch_size {max_batch_size}",
    }
    for title, value in rows.items():
        print(f"{title:>10}: {value}")
    if verify:
        verify_sums(folder / "checklist.chk")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def verify_sums(checklist: Path) -> None:
    """Compare the files that a checklist names with their md5 sums; ValueError names those that differ."""
    lines = [line.split(maxsplit=1) for line in checklist.read_text(encoding="utf-8").splitlines() if line.strip()]
    files = {checklist.parent / file.strip().lstrip("*"): sum for sum, file in lines}
    total = sum(file.stat().st_size for file in files)
    with tqdm(desc="verifying", total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        if wrong := [file.name for file, sum in files.items() if md5(file, bar.update) != sum]:
            raise ValueError(f"{checklist}: the md5 sums of {', '.join(wrong)} differ; download again")
    print(f"{'verified':>10}: {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    script.run({"convert": convert, "inspect": inspect})
