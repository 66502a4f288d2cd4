"""A checkpoint -> a rank's tensors, each allocated once in its final place and dtype."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..args import ModelArgs
from ..backends.quantized import GROUPS, Quantization, Quantized, Scheme, quantize, stack
from ..backends.quantized_matmul import Rows, kernel
from ..devices import in_threads, trim, zeros
from ..parallel import gather_objects, rank, replica, world_size
from .plan import fused_groups, rank_range, shapes, shard_dim

Stored = dict[str, tuple[tuple[int, ...], torch.dtype]]  # names of tensors, their whole shapes and dtypes


class Weights(Protocol):
    """What `load` reads from: a Checkpoint, one with LoRA adapters, or random weights."""

    def dtype(self) -> torch.dtype: ...

    def release(self) -> None: ...

    def read(
        self, name: str, shape: Sequence[int], begin: int, end: int, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """A slice of a weight in a dtype: written to `out` and returned, or a view of the file on the CPU."""

    def quantized(self, name: str, shape: tuple[int, ...], begin: int, end: int) -> Quantized | None:
        """A slice of a matrix that was saved quantized; None for any other weight."""


def stored_tensors(args: ModelArgs, scheme: Scheme | None, dtype: torch.dtype) -> Stored:
    """The tensors of a model in Meta's layout: its matrices in a scheme, if any, and all other weights in `dtype`."""
    found: Stored = {}
    for name, shape in shapes(args).items():
        own = scheme and scheme.of(name)
        found |= own.stored(name, shape) if own else {name: (shape, dtype)}
    return found


def read_whole(weights: Weights, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A whole weight, on the CPU: a view of its file if possible."""
    return weights.read(name, shape, 0, shape[shard_dim(name) or 0], dtype)


def load(
    model: nn.Module,
    weights: Weights,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    scheme: Quantization = None,
    native: bool = False,
) -> None:
    """Give `model`, whose parameters may be on the meta device, this rank's slices of the weights, each in its final
    place and dtype: allocated once, or a view of the file where that is the same. With a scheme the matrices are
    quantized one by one, or read as they were saved in that scheme."""
    whole = shapes(args)
    final: dict[str, Tensor] = {}
    local = {name: weight.shape for name, weight in model.named_parameters()}
    ranges = {name: rank_range(name, whole[name][shard_dim(name) or 0], args, rank(), world_size()) for name in local}
    total = sum(shape.numel() for shape in local.values())
    hidden = None if rank() == replica()[0] == 0 else True  # None: no bar if stderr is not a terminal
    schemes = {name: own for name in local if scheme and (own := scheme.of(name))}
    groups = fused_groups(local)
    if scheme:
        if device.type != "cuda":  # only its kernels multiply by several quantized matrices at once
            groups = [[name] for name in local]
        # The largest first, as several copies of a matrix are in memory while it is quantized.
        groups.sort(key=lambda names: -local[names[0]].numel())
    with tqdm(desc="loading", total=total, unit="weights", unit_scale=True, disable=hidden, leave=False) as bar:
        for count, names in enumerate(groups):
            rows = [local[name][0] for name in names]
            if all(name in schemes for name in names):
                parts = [read_quantized(weights, name, whole[name], *ranges[name], schemes[name]) for name in names]
                matrix = kernel(stack(parts) if len(parts) > 1 else parts[0], device, native)
                for name, size, end in zip(names, rows, itertools.accumulate(rows), strict=True):
                    layer = model.get_submodule(name.removesuffix(".weight"))
                    del layer.weight
                    layer.weight = matrix if len(names) == 1 else Rows(matrix, end - size, end)  # type: ignore[assignment]
                del parts
                weights.release()
                if count % 16 == 0:  # freed memory adds up to a fifth of the weights; returning it takes 3 ms
                    trim()
            elif names == ["output.weight"] and args.tie_word_embeddings and world_size() == 1:
                final["output.weight"] = final["tok_embeddings.weight"]
            else:
                together = zeros((sum(rows), *local[names[0]][1:]), dtype, device)
                for name, out in zip(names, together.split(rows), strict=True):
                    final[name] = weights.read(name, whole[name], *ranges[name], dtype, out)
            bar.update(sum(local[name].numel() for name in names))
    model.load_state_dict(final, strict=True, assign=True)


def check_same(values: Mapping[str, object]) -> None:
    """ValueError names the values that differ between ranks, whose slices would be of different models."""
    ranks = gather_objects(values)
    differ = [key for key in values if any(other[key] != values[key] for other in ranks)]
    if differ:
        named = "; ".join(f"{key}: {[other[key] for other in ranks]}" for key in differ)
        raise ValueError(f"the ranks differ in {named}; give all of them the same arguments and the same checkpoint")


def read_quantized(
    weights: Weights,
    name: str,
    shape: tuple[int, ...],
    begin: int,
    end: int,
    scheme: Scheme,
    search: bool = False,
) -> Quantized:
    """Rows or columns `begin` to `end`, counted along its `shard_dim`, of a matrix whose whole shape is `shape`: as it
    was saved, or else quantized to its `scheme` by `quantize`, with a `search` for scales or without."""
    if (saved := weights.quantized(name, shape, begin, end)) is not None:
        return saved
    dim = shard_dim(name) or 0
    # A row's scale must not depend on the number of ranks that the row is split over.
    first, last = (0, shape[1]) if dim == 1 and not scheme.group else (begin, end)
    matrix = weights.read(name, shape, first, last, weights.dtype())
    importance = torch.ones(matrix.shape[1]) if search else None
    rounded = stack(in_threads(lambda rows: quantize(rows, scheme, importance), matrix.split(256)))
    return rounded if (first, last) == (begin, end) else rounded.columns(begin, end)


def read_parts(weights: Weights, name: str, shape: tuple[int, ...], begin: int, end: int, scheme: Scheme) -> Quantized:
    """The slice, as in `read_quantized`, of a matrix that was saved in `scheme` in Meta's layout."""
    dim, found = shard_dim(name) or 0, []
    unit = scheme.group_size(shape[1]) if dim == 1 and scheme.group else 1  # whole groups are read
    if unit > 1 and math.gcd(unit, begin, end) < GROUPS[0]:
        raise ValueError(f"{name} {shape} of {scheme} cannot be divided at columns {begin} and {end}")
    first, last = begin // unit * unit, -(-end // unit) * unit
    for key, (stored, dtype) in scheme.stored(name, shape).items():
        whole = shard_dim(key) is None
        part = (0, stored[0]) if whole else (first * stored[dim] // shape[dim], last * stored[dim] // shape[dim])
        found.append(weights.read(key, stored, *part, dtype))
    matrix = Quantized(*found)
    return matrix if (first, last) == (begin, end) else matrix.columns(begin - first, end - first)
