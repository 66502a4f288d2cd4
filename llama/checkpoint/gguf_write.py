"""A checkpoint -> one GGUF file: matrices in floats, or in blocks of 8 or 4 bits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..args import ModelArgs
from ..backends.quantized import MATRICES, Scheme, quantize
from ..gguf import TYPES, BlockType, aligned, header_bytes
from ..model import scale_rope_frequencies, unscaled_rope_frequencies
from .blocks import CODECS, to_blocks
from .files import AT_ONCE
from .gguf import DIVISORS, DTYPES, NAMES
from .hf import names
from .load import Weights, read_whole
from .plan import shapes
from .write import writing

BY_NAME = {kind.name: kind for kind in TYPES.values()}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type
# A dtype or scheme of matrices -> the type that they are written in.
WRITTEN: dict[torch.dtype | Scheme, BlockType] = {dtype: BY_NAME[name] for name, dtype in DTYPES.items()}
WRITTEN |= {CODECS[name].scheme: BY_NAME[name] for name in ("Q8_0", "Q4_0")}


def keys_of(args: ModelArgs, kind: BlockType, positions: int | None, name: str) -> dict[str, Any]:
    """The keys that describe a model, besides those of its tokenizer."""
    scaling = args.rope_scaling
    found = {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind.name],
        "general.quantization_version": 2,
        "llama.vocab_size": args.vocab_size,
        "llama.context_length": positions or (131072 if scaling else 4096),
        "llama.embedding_length": args.dim,
        "llama.block_count": args.n_layers,
        "llama.feed_forward_length": args.ffn_hidden,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.kv_heads,
        "llama.attention.key_length": args.head_dim,
        "llama.attention.value_length": args.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(args.norm_eps),
        "llama.rope.dimension_count": args.head_dim,
        "llama.rope.freq_base": float(args.rope_theta),
    }
    if scaling and scaling.rope_type == "linear":
        found |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(scaling.factor)}
    return found


def kinds_of(args: ModelArgs, dtype: torch.dtype, scheme: Scheme | None) -> dict[str, BlockType]:
    """The type of each weight, by Meta's name: norms are in float32. If the others are quantized, the embeddings and
    the output matrix have 8 bits. ValueError for a matrix that does not divide into blocks."""
    found = {}
    for name, shape in shapes(args).items():
        kind = WRITTEN[scheme or dtype]
        if len(shape) == 1:
            kind = BY_NAME["F32"]
        elif scheme and name in ("tok_embeddings.weight", "output.weight"):
            kind = BY_NAME["Q8_0"]
        found[name] = kind
        if shape[-1] % kind.values:
            raise ValueError(f"{name} {shape} cannot be written in blocks of {kind.values} columns")
    if args.tie_word_embeddings:
        del found["output.weight"]
    return found


def divisors(args: ModelArgs) -> Tensor | None:
    """The divisors (D / 2,) of RoPE's frequencies for Llama 3's scaling; None without it."""
    if args.rope_scaling is None or args.rope_scaling.rope_type != "llama3":
        return None
    frequencies = unscaled_rope_frequencies(args.head_dim, args.rope_theta)
    return frequencies / scale_rope_frequencies(frequencies, args.rope_scaling)


def write_gguf(
    path: Path,
    weights: Weights,
    args: ModelArgs,
    keys: Mapping[str, Any],
    kinds: Mapping[str, BlockType],
    search: bool,
    progress: Callable[[int], object],
) -> None:
    """Write the file. `search` is as in `read_quantized`; `progress` is called with the size of each part."""
    whole, theirs, scaling = shapes(args), names(args.n_layers, NAMES), divisors(args)
    tensors, contents = dict[str, tuple[BlockType, Sequence[int]]](), list[Iterable[Tensor]]()
    if scaling is not None:
        tensors[DIVISORS] = BY_NAME["F32"], scaling.shape
        contents.append([scaling])
    for name, kind in kinds.items():
        tensors[theirs[name]] = kind, whole[name]
        contents.append(parts(weights, name, whole[name], kind, search))
    header = header_bytes(keys, tensors)
    size = len(header) + sum(aligned(kind.size(shape)) for kind, shape in tensors.values())
    with writing(path, size) as new, new.open("wb") as file:
        file.write(header)
        for content in contents:
            file.seek(aligned(file.tell()))
            for part in content:
                part = part.contiguous()
                file.write(ctypes.string_at(part.data_ptr(), part.nbytes))
                progress(part.nbytes)
            weights.release()
        file.truncate(aligned(file.tell()))


def parts(weights: Weights, name: str, shape: tuple[int, ...], kind: BlockType, search: bool) -> Iterator[Tensor]:
    """A weight's data in the file, some rows at a time."""
    dtype, codec = DTYPES.get(kind.name, weights.dtype()), CODECS.get(kind.name)
    importance = torch.ones(shape[-1]) if search and name.split(".")[-2] in MATRICES else None
    for rows in read_whole(weights, name, shape, dtype).split(max(1, AT_ONCE // shape[-1])):
        yield to_blocks(quantize(rows, codec.scheme, importance)) if codec else rows
