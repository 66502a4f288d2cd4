"""The slices of files that each rank loads. Pure functions.

A weight is split over ranks along one dimension, in equal slices. The slices on disk need not be those in memory: say
wq has 12 rows, saved in 4 shards of 3 rows, and 3 ranks load it. Rank 1 needs rows 4 to 8: rows 1 and 2 of shard 1,
and rows 0 and 1 of shard 2. `slices` computes that, and only these rows are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..args import ModelArgs

# The dimension along which a weight is split over ranks. The key is the last name before ".weight".
SHARD_DIM: dict[str, int | None] = {
    "tok_embeddings": 1,
    "wq": 0, "wk": 0, "wv": 0, "wo": 1,
    "w1": 0, "w2": 1, "w3": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,
    "output": 0, "score": None,
}  # fmt: skip
# Matrices that multiply the same vector. They are loaded side by side, so that one matmul computes all of a group.
FUSED = (("wq", "wk", "wv"), ("w1", "w3"))


def shard_dim(name: str) -> int | None:
    """The dimension along which the parameter `name` is split over ranks; None for one that every rank holds whole."""
    dim = SHARD_DIM[name.split(".")[-2]]
    return None if dim == 1 and name.endswith((".scale", ".min")) else dim  # of a whole row


def shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of a whole model, by name."""
    heads, kv_heads, hidden = args.n_heads * args.head_dim, args.kv_heads * args.head_dim, args.ffn_hidden
    layer = {
        "attention.wq": (heads, args.dim),
        "attention.wk": (kv_heads, args.dim),
        "attention.wv": (kv_heads, args.dim),
        "attention.wo": (args.dim, heads),
        "feed_forward.w1": (hidden, args.dim),
        "feed_forward.w2": (args.dim, hidden),
        "feed_forward.w3": (hidden, args.dim),
        "attention_norm": (args.dim,),
        "ffn_norm": (args.dim,),
    }
    whole = {"tok_embeddings": (args.vocab_size, args.dim), "norm": (args.dim,)}
    whole |= {"score": (args.n_labels, args.dim)} if args.n_labels else {"output": (args.vocab_size, args.dim)}
    whole |= {f"layers.{i}.{name}": shape for i in range(args.n_layers) for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in whole.items()}


def rank_range(name: str, size: int, args: ModelArgs, rank: int, world_size: int) -> tuple[int, int]:
    """(begin, end) of a rank's slice of the `size` rows or columns of a weight; all of them if it is not split. With
    more ranks than key-value heads, neighbouring ranks hold the same head: 4 ranks hold heads 0, 0, 1 and 1 of 2."""
    if shard_dim(name) is None:
        return 0, size
    if name.split(".")[-2] in ("wk", "wv") and world_size > args.kv_heads:
        rank, world_size = rank * args.kv_heads // world_size, args.kv_heads
    return rank * size // world_size, (rank + 1) * size // world_size


def slice_shape(name: str, shape: Sequence[int], begin: int, end: int) -> list[int]:
    """The shape of rows or columns `begin` to `end`, along its `shard_dim`, of a weight of this shape."""
    return [end - begin if dim == shard_dim(name) else size for dim, size in enumerate(shape)]


def divides(args: ModelArgs, world_size: int) -> bool:
    """Whether a model can be split over this number of ranks."""
    sizes = (args.n_heads, args.ffn_hidden, args.vocab_size, args.dim)
    heads = args.kv_heads % world_size == 0 or world_size % args.kv_heads == 0
    return heads and not any(size % world_size for size in sizes)


def check_divides(name: str, shape: tuple[int, ...], mp: int) -> None:
    """ValueError for a tensor that cannot be divided into `mp` shards."""
    dim = shard_dim(name)
    if type(mp) is not int or mp < 1 or (dim is not None and shape[dim] % mp):
        raise ValueError(f"{name} {shape} cannot be divided into mp {mp!r} shards along dimension {dim}")


class Slice(NamedTuple):
    shard: int  # which file
    begin: int  # first row or column in the shard
    offset: int  # first row or column in the tensor that is assembled
    length: int


def slices(size: int, shards: int, begin: int, end: int) -> Iterator[Slice]:
    """The slices of `shards` equal shards of `size` rows or columns that make up rows or columns `begin` to `end`."""
    each = size // shards
    for shard in range(begin // each, -(-end // each)):
        first, last = max(begin, shard * each), min(end, (shard + 1) * each)
        yield Slice(shard, first - shard * each, first - begin, last - first)


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The names of parameters in groups: those of `FUSED` in one layer together, any other alone."""
    groups: dict[object, list[str]] = {}
    for name in names:
        *layer, last, _ = name.split(".")
        group = next((group for group in FUSED if last in group), last)
        groups.setdefault((*layer, group), []).append(name)
    return list(groups.values())
