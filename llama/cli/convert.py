"""python -m llama convert: a checkpoint in another layout, number of shards or dtype."""

from __future__ import annotations

from pathlib import Path

from .. import parallel
from ..checkpoint import check_path
from ..checkpoint import convert as checkpoint_convert


def convert(
    src: str,
    dst: str,
    to: str = "meta",
    mp: int = 1,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
) -> None:
    """Write the checkpoint in SRC, in either layout, to the new folder DST.

    Args:
        src: folder of params.json and consolidated.*.pth, or of config.json and *.safetensors
        dst: the new folder; it gets its name when it is complete
        to: meta or hf, the layout to write
        mp: number of shards, for meta
        dtype: bfloat16, float16 or float32; by default as in src
        tokenizer_path: tokenizer.model; by default the one in src or one folder up
        quantize: int8 or int4, for meta: the matrices are stored quantized, and loaded as they are stored
        group_size: columns that have a scale together: 16, 32, 64 or 128; by default a row for int8, 32 for int4
    """
    folder = check_path(src, "src", "folder")
    asked = None if dtype is None else parallel.as_dtype(dtype)
    checkpoint_convert.convert(folder, Path(dst), to, mp, asked, tokenizer_path, quantize, group_size)
