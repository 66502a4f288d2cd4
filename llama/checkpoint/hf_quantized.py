"""Quantized matrices of Hugging Face folders: the methods that are supported, and reading slices of the matrices."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.quantized import Quantized, Scheme
from ..textfile import read_json
from . import hf
from .files import Entry, File, PackedFile
from .hf_matrices import SCALES, Parts, reader
from .paths import listed

COMPRESSED: dict[str, tuple[Any, ...]] = {
    "format": (
        *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
        *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
    ),
    "transform_config": ({},),
    "sparsity_config": ({}, "dense"),
}
# The quant_method of config.json -> keys that change the values, and what is supported of each, besides null.
METHODS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {
        "bits": (4, 8),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
    },
    "awq": {"bits": (4,), "w_bit": (4,), "version": ("gemm",), "checkpoint_format": ("gemm",), "format": ("gemm",)},
    "compressed-tensors": COMPRESSED,
    "sparseml": COMPRESSED,  # its older name
    "bitsandbytes": {},
    "fp8": {},
    "fbgemm_fp8": {},
    "modelopt": {"quant_algo": ("fp8", "nvfp4", "mxfp8")},
}
# How AutoRound, which has packing_format, stores a matrix -> the method that stores it so.
PACKING = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
# Files in place of quantization_config, and the method of each.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
MODULE = re.compile(r"(.+_proj|lm_head)\.(.+)")
# Tensors for the rounding of activations and of the KV cache, which is not done here.
UNUSED = re.compile(r".+\.((input|output|[qkv]|kv|act|prob)_(global_)?(scale|zero_point)|input_scale_ub)")
AT_ONCE = 2**20  # values that are unpacked at a time


def settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """How the weights are quantized by config.json, or else by one of `FILES`; None if they are not. ValueError names
    what is not supported."""
    found, method = config.get("quantization_config") or config.get("compression_config"), None
    if not found:
        if not (path := next((folder / name for name in FILES if (folder / name).is_file()), None)):
            return None
        found, method = read_json(path), FILES[path.name]
    found = found if isinstance(found, Mapping) else {"quant_method": found}
    for nested in ("quantization", "quantization_config"):
        if isinstance(found.get(nested), Mapping):
            found = {**found, **found[nested]}
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        method = "bitsandbytes"
    method = found.get("quant_method") or method
    if method in ("auto-round", "intel/auto-round"):
        method = PACKING.get(str(found.get("packing_format")), f"{method} with {found.get('packing_format')!r}")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"weights quantized by {method} are not read, only by {listed(METHODS)}; take the original ones, and give "
            "--quantize"
        )
    for key, allowed in METHODS[method].items():
        value = found.get(key)
        value = value.lower() if isinstance(value, str) else value
        value = value.get("format", value) if isinstance(value, Mapping) else value
        if value not in (None, *allowed) or (key in ("bits", "w_bit") and type(value) not in (int, type(None))):
            raise ValueError(f"weights quantized by {method} with {key} {found.get(key)!r} are not read")
    return {**found, "quant_method": method}


class QuantizedFile(PackedFile):
    """The quantized matrices of a Hugging Face folder, which are taken from its files."""

    def __init__(self, files: Sequence[File], found: Mapping[str, Any], head_dim: int) -> None:
        """`found` is what `settings` returned. ValueError names a matrix that cannot be read."""
        self.files, self.path, self.head_dim = [*files], files[0].path.parent, head_dim
        self.tensors, self.method = {}, found["quant_method"]
        modules = defaultdict[str, dict[str, tuple[File, Entry]]](dict)
        for file in files:
            file.tensors = {key: entry for key, entry in file.tensors.items() if not UNUSED.fullmatch(key)}
            for key, entry in file.tensors.items():
                if match := MODULE.fullmatch(key):
                    modules[match[1]][match[2]] = file, entry
        for name, tensors in modules.items():
            parts = Parts(name, tensors)
            if not (read := reader(parts, self.method)):
                continue
            matrix = read(parts, found)
            if "bias" in parts:
                parts.check("bias", SCALES, matrix.shape[:1])
                if parts("bias").any():
                    raise ValueError(f"{name}.bias is not zero; only matrices without a bias are supported")
            for file, entry in (tensors[part] for part in parts.used):
                del file.tensors[entry.key]
            self.tensors[f"{name}.weight"] = Entry(f"{name}.weight", matrix.shape, torch.uint8, 0, matrix)

    def kind(self, name: str) -> str:
        return f"{self.scheme(name)} by {self.method}"

    def scheme(self, name: str) -> Scheme | None:
        return self.tensors[name].packed.scheme

    def rows(self, name: str, begin: int, end: int) -> Iterator[Quantized | Tensor]:
        _, (out, columns), _, _, matrix = self.tensors[name]
        heads = self.head_dim if hf.is_permuted(name) else 1  # rows are permuted within a head
        unit = math.lcm(8, heads)
        step = unit * max(1, AT_ONCE // (columns * unit))

        def chosen(part: Tensor, wanted: slice) -> Tensor:
            return (hf.to_pairs(part, heads) if heads > 1 else part)[wanted]

        for start in range(begin - begin % unit, end, step):
            rows = matrix.rows(start, min(start + step, out))
            choose = partial(chosen, wanted=slice(max(begin - start, 0), end - start))
            if not isinstance(rows, Quantized):
                yield choose(rows)
                continue
            if not all(part.isfinite().all() for part in rows[1:] if part is not None):
                limit = torch.finfo(torch.float16).max
                raise ValueError(f"{self.path}: {name} has scales beyond the range of float16, {limit:.0f}")
            yield rows.map(choose)

    def release(self) -> None:
        for file in self.files:
            file.release()
