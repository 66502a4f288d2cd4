"""GGUF <-> Meta's layout: names of weights, the model's parameters, and reading slices of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import torch
from torch import Tensor

from ..args import RopeScaling
from ..backends.quantized import Quantized
from ..gguf import BlockType, Gguf
from ..model import scale_rope_frequencies, unscaled_rope_frequencies
from .blocks import CODECS, from_blocks
from .files import Entry, File, Packed
from .hf import IN_LAYOUTS, params_of

NAMES = {meta: theirs for meta, _, theirs in IN_LAYOUTS if theirs}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Keys that change what is computed, and the values that are supported.
SUPPORTED = {"expert_count": 0, "attention.causal": True, "rope.scaling.attn_factor": 1.0, "attention.clamp_kqv": 0.0}
DIVISORS = "rope_freqs.weight"  # of RoPE's frequencies: Llama 3's scaling, as numbers


def params(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The content of params.json, without the scaling of RoPE. ValueError names what is not supported."""
    kind = keys.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"general.architecture is {kind!r}; only llama is supported")
    for key, allowed in SUPPORTED.items():
        if (value := keys.get(f"llama.{key}", allowed)) != allowed:
            raise ValueError(f"llama.{key} is {shorten(value)}; only {allowed} is supported")

    def number(key: str, default: int | None = None) -> int:
        value = keys.get(f"llama.{key}", default)
        if isinstance(value, list) and value and len(set(value)) == 1:  # one for each layer
            value = value[0]
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"llama.{key} is {shorten(value)}, not a positive whole number")
        return value

    dim, layers, heads = number("embedding_length"), number("block_count"), number("attention.head_count")
    head_dim = number("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise ValueError(f"llama.{key} is {number(key)}; only the size of a head, {head_dim}, is supported")
    kv_heads, hidden = number("attention.head_count_kv", heads), number("feed_forward_length")
    words = keys.get("tokenizer.ggml.tokens")
    vocab_size = number("vocab_size", len(words) if isinstance(words, list) else None)
    eps, theta = decimal(keys, "attention.layer_norm_rms_epsilon", 1e-5), decimal(keys, "rope.freq_base", 10000.0)
    return params_of(dim, layers, heads, kv_heads, head_dim, hidden, eps, theta) | {"vocab_size": vocab_size}


def decimal(keys: Mapping[str, Any], key: str, default: float) -> float:
    """A float32 key as the short decimal that it was rounded from, such as 1e-05."""
    value = keys.get(f"llama.{key}", default)
    if type(value) is not float or not 0 < value < math.inf:
        raise ValueError(f"llama.{key} is {shorten(value)}, not a positive number")
    return float(f"{value:.7g}")


def rope_scaling(keys: Mapping[str, Any], found: Mapping[str, Any], divisors: Tensor | None) -> dict[str, Any] | None:
    """The scaling of RoPE of a model with the parameters `found`, from its keys or from the divisors (D / 2,) of the
    frequencies. ValueError for one that is not supported."""
    kind = keys.get("llama.rope.scaling.type", "linear")
    factor = keys.get("llama.rope.scaling.factor", keys.get("llama.rope.scale_linear")) or 1.0
    if kind not in ("none", "linear") and factor != 1:
        raise ValueError(f"llama.rope.scaling.type is {kind!r}; only linear scaling is supported, and Llama 3's")
    if divisors is not None and kind == "linear" and factor != 1:
        raise ValueError(f"llama.rope.scaling.factor is {factor} beside {DIVISORS}; only one scaling is supported")
    if divisors is None:
        return RopeScaling(factor, rope_type="linear")._asdict() if kind == "linear" and factor != 1 else None
    head_dim = found.get("head_dim") or found["dim"] // found["n_heads"]
    if divisors.shape == (head_dim // 2,):
        frequencies = unscaled_rope_frequencies(head_dim, found.get("rope_theta", 10000.0))
        for scaling in (RopeScaling(rounded(divisors.max())), fitted(frequencies, divisors)):
            scaled = scale_rope_frequencies(frequencies, scaling)
            if torch.allclose(frequencies / divisors, scaled, rtol=1e-4, atol=0):
                return scaling._asdict()
    raise ValueError(f"{DIVISORS} {tuple(divisors.shape)} is not a RoPE scaling like Llama 3's")


def fitted(frequencies: Tensor, divisors: Tensor) -> RopeScaling:
    """Llama 3's scaling with other than the usual bands, fitted to the divisors. Between the bands the weight of the
    unscaled frequency f is (original f / 2 pi - low) / (high - low), linear in f. Only ratios count, so low is 1."""
    f, factor = frequencies.double(), divisors.double().max()
    weight = (1 / divisors.double() - 1 / factor) / (1 - 1 / factor)
    slow, fast, between = weight < 1e-3, weight > 1 - 1e-3, (weight >= 1e-3) & (weight <= 1 - 1e-3)
    original, high = 8192.0, 4.0
    if between.any():
        f, weight = f[between], weight[between]
        if len(f) > 1:
            slope = ((f - f.mean()) * (weight - weight.mean())).sum() / (f - f.mean()).square().sum()
            high = float(1 - 1 / (weight.mean() - slope * f.mean()))
        original = float(2 * math.pi * ((weight * (high - 1) + 1) / f).mean())
    elif slow.any() and fast.any():
        original, high = 2 * math.pi / float(f[slow].max()) - 0.5, min(high, float(f[fast].min() / f[slow].max()))
    return RopeScaling(rounded(factor), 1.0, rounded(high), max(1, round(original)))


def rounded(value: Tensor | float) -> float:
    return float(f"{float(value):.6g}")


def divisors(files: Sequence[File]) -> Tensor | None:
    """The divisors of RoPE's frequencies, removed from the tensors of the file that has them; None without them."""
    for file in files:
        if entry := file.tensors.pop(DIVISORS, None):
            if entry.dtype != torch.float32 or len(entry.shape) != 1:
                kind = entry.packed.kind if entry.packed else entry.dtype
                raise ValueError(f"{DIVISORS} is of type {kind} and shape {entry.shape}")
            return file.view(entry)
    return None


def open_gguf(path: Path, header: Gguf) -> File:
    """One file of a GGUF model."""
    file = File(path, {})
    for key, (kind, shape, offset) in header.tensors.items():
        entry = Entry(key, shape, DTYPES.get(kind.name, torch.uint8), offset)
        file.tensors[key] = entry._replace(packed=blocks(file, kind, entry)) if kind.name in CODECS else entry
    return file


def blocks(file: File, kind: BlockType, entry: Entry) -> Packed:
    """A tensor that is stored in blocks."""
    stored = entry._replace(shape=(*entry.shape[:-1], entry.shape[-1] // kind.values, kind.nbytes))

    def rows(begin: int, end: int) -> Quantized:
        return from_blocks(kind.name, file.view(stored)[begin:end])

    return Packed(kind.name, CODECS[kind.name].scheme, rows)
