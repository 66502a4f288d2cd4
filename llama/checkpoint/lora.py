"""LoRA adapters in PEFT's format, merged into a model's weights while these are read.

An adapter of rank r adds s B A to a matrix W (out, in), with A (r, in), B (out, r) and s = alpha / r, or alpha / √r.
A slice of W needs the same rows of B and columns of A. DoRA then scales each row of the sum to a norm of its own, for
which whole rows are computed. All of it in float64, so that a weight has the same numbers on any number of ranks, and
rounded once to the dtype that is loaded. What the files hold decides, not the targets in the config.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..args import ModelArgs
from ..backends.quantized import Quantized
from .adapter import TIED, Adapter
from .folder import Checkpoint
from .hub import find_folder
from .load import Weights
from .plan import shard_dim, slice_shape

ROWS = 256  # of a weight that are in float64 at a time, a few MB


def with_lora(checkpoint: Checkpoint, args: ModelArgs, lora: Any) -> tuple[Weights, ModelArgs, list[Adapter]]:
    """A checkpoint with the adapters of the argument `lora`, and the model's shape with them: a folder, or a list of
    folders or of pairs (folder, weight), whose weighted sum is added. ValueError or FileNotFoundError names what cannot
    be read, does not fit the model, or cannot be merged."""
    items = [] if lora is None else list(lora) if isinstance(lora, (list, tuple)) else [lora]
    pairs = [[*item] if isinstance(item, (list, tuple)) else [item, 1.0] for item in items]
    if not all(len(pair) == 2 and type(pair[1]) in (int, float) and math.isfinite(pair[1]) for pair in pairs):
        raise ValueError(f"lora is {lora!r}; it must be a folder, or a list of folders or of pairs (folder, weight)")
    saved_words = checkpoint.params.get("vocab_size", -1)
    adapters = [Adapter(find_folder(folder, "lora"), float(factor), args, saved_words) for folder, factor in pairs]
    if not adapters:
        return checkpoint, args, []
    names = {name for adapter in adapters for name in adapter.keys}
    for name in sorted(names):
        if checkpoint.scheme and checkpoint.scheme.of(name):
            to = f"{checkpoint.folder} is quantized already, to {checkpoint.scheme}"
            raise ValueError(f"{to}; an adapter of {name} needs the original weights")
        check_together(name, [adapter for adapter in adapters if name in adapter.keys])
    args = replace(args, tie_word_embeddings=args.tie_word_embeddings and not names & TIED)
    return Merged(checkpoint, adapters), args, adapters


def check_together(name: str, adapters: Sequence[Adapter]) -> None:
    """ValueError for adapters of one weight whose weighted sum is not defined."""
    held = [adapter for adapter in adapters if "weight" in adapter.keys[name]]
    for adapter in held[1:]:
        if not torch.equal(adapter.part(name, "weight"), held[0].part(name, "weight")):
            raise ValueError(f"{held[0].folder} and {adapter.folder} have different weights in place of {name}")
    for adapter in adapters:
        alone = "lora_magnitude_vector" if "lora_A" in adapter.keys[name] else "weight"
        if alone in adapter.keys[name] and (adapter.factor != 1 or (len(adapters) > 1 and alone != "weight")):
            what = "DoRA" if alone != "weight" else "a whole weight"
            raise ValueError(f"{adapter.folder} has {what} for {name}, which cannot be weighted or added to another")


class Merged:
    """A checkpoint with adapters: `Weights` to load from."""

    def __init__(self, base: Weights, adapters: Sequence[Adapter]) -> None:
        self.base, self.adapters = base, adapters

    def dtype(self) -> torch.dtype:
        return self.base.dtype()

    def release(self) -> None:
        self.base.release()
        for adapter in self.adapters:
            adapter.file.release()

    def quantized(self, name: str, shape: tuple[int, ...], begin: int, end: int) -> Quantized | None:
        return self.base.quantized(name, shape, begin, end)  # none that has an adapter

    def read(
        self, name: str, shape: Sequence[int], begin: int, end: int, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """A slice, as of `Checkpoint.read`; of a weight with adapters a copy."""
        adapters = [adapter for adapter in self.adapters if name in adapter.keys]
        if not adapters:
            return self.base.read(name, shape, begin, end, dtype, out)
        dim, parts = shard_dim(name) or 0, {part for adapter in adapters for part in adapter.keys[name]}
        whole_rows = dim == 1 and "lora_magnitude_vector" in parts
        first, last = (0, shape[1]) if whole_rows else (begin, end)
        if "weight" in parts:
            source = next(a.part(name, "weight") for a in adapters if "weight" in a.keys[name])
            source = source.narrow(dim, first, last - first)
        else:
            source = self.base.read(name, shape, first, last, self.dtype())
        if out is None:
            out = torch.empty(slice_shape(name, shape, begin, end), dtype=dtype)
        rows, columns = (slice(first, last), slice(None)) if dim == 0 else (slice(None), slice(first, last))
        changes = [adapter.change(name, rows, columns) for adapter in adapters if "lora_A" in adapter.keys[name]]
        for i in range(0, len(source), ROWS):
            w = source[i : i + ROWS].to(torch.float64, copy=True)  # the source may be a view of a file
            for a, b, norms in changes:
                w.addmm_(b[i : i + ROWS], a)
                if norms is not None:
                    w *= (norms[i : i + ROWS] / w.norm(dim=1)).unsqueeze(1)
            out[i : i + ROWS].copy_(w[:, begin:end] if whole_rows else w)
        self.release()
        return out
