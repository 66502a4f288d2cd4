"""Quantized matrices of Hugging Face folders: the methods that are supported, and which tensors are of one matrix."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..textfile import read_json
from .files import Entry, File
from .hf_matrices import SCALES, Parts, quantized_matrix
from .paths import listed

# The quant_method of config.json -> keys that change the values, and what is supported of each, besides null.
METHODS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {
        "bits": (4, 8),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
    },
    "awq": {"bits": (4,), "w_bit": (4,), "version": ("gemm",), "checkpoint_format": ("gemm",), "format": ("gemm",)},
    "compressed-tensors": {
        "format": (
            *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
            *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
        ),
        "transform_config": ({},),
        "sparsity_config": ({}, "dense"),
    },
    "bitsandbytes": {},
    "fp8": {},
    "fbgemm_fp8": {},
    "modelopt": {"quant_algo": ("fp8", "nvfp4", "mxfp8")},
}
METHODS["sparseml"] = METHODS["compressed-tensors"]  # its older name
# How AutoRound, which has packing_format, stores a matrix -> the method that stores it so.
PACKING = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
# Files in place of quantization_config, and the method of each.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
MODULE = re.compile(r"(.+_proj|lm_head)\.(.+)")
# Tensors for the rounding of activations and of the KV cache, which is not done here.
UNUSED = re.compile(r".+\.((input|output|[qkv]|kv|act|prob)_(global_)?(scale|zero_point)|input_scale_ub)")


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


def join_parts(files: Sequence[File], config: Mapping[str, Any]) -> None:
    """Put one packed tensor in place of those that store a quantized matrix. `config` is what `settings` returned.
    ValueError names a matrix that cannot be read."""
    modules = defaultdict[str, dict[str, tuple[File, Entry]]](dict)
    for file in files:
        file.tensors = {key: entry for key, entry in file.tensors.items() if not UNUSED.fullmatch(key)}
        for key, entry in file.tensors.items():
            if match := MODULE.fullmatch(key):
                modules[match[1]][match[2]] = file, entry
    for name, tensors in modules.items():
        parts = Parts(name, tensors, config)
        if not (matrix := quantized_matrix(parts)):
            continue
        if "bias" in parts:
            parts.check("bias", SCALES, matrix.shape[:1])
            if parts("bias").any():
                raise ValueError(f"{name}.bias is not zero; only matrices without a bias are supported")
        for file, entry in (tensors[part] for part in sorted(parts.used)):
            del file.tensors[entry.key]
        file.tensors[matrix.key] = matrix
