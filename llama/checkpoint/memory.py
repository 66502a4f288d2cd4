"""An estimate of the memory that a model needs, and the memory that is free. Nothing is allocated for either."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends.quantized import Scheme
from ..model import ModelArgs
from .plan import is_matrix, rank_range, shapes, shard_dim


class Footprint(NamedTuple):
    """Bytes on one rank."""

    weights: int
    cache: int
    activations: int  # about; of prefilling max_batch_size prompts that fill max_seq_len

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self._asdict().items())
        return f"{sum(self) / 1e9:.2f} GB ({parts})"


def footprint(args: ModelArgs, world_size: int, dtype: torch.dtype, scheme: Scheme | None = None) -> Footprint:
    """What one of `world_size` ranks holds of a model in `dtype`, its matrices in a scheme. 7B in bfloat16 on one rank:
    13.48 GB of weights, and for each position of the KV cache 2 tensors * 32 layers * 4096 * 2 bytes = 0.52 MB."""
    weights = 0
    for name, shape in shapes(args).items():
        part = list(shape)
        if (dim := shard_dim(name)) is not None:
            begin, end = rank_range(name, shape[dim], args, 0, world_size)
            part[dim] = end - begin
        if scheme and is_matrix(name):
            weights += scheme.nbytes(name, (shape[0], shape[1])) * math.prod(part) // math.prod(shape)
        else:
            weights += math.prod(part) * dtype.itemsize
    positions = args.max_batch_size * args.max_seq_len
    kv_heads = max(args.kv_heads // world_size, 1)
    cache = 2 * args.n_layers * kv_heads * args.head_dim * positions
    # A layer is widest in its feed-forward: the residual stream, its float32 norm, and the outputs of w1, w3 and SwiGLU
    widest = (2 * args.dim + 3 * args.ffn_hidden // world_size) * dtype.itemsize + 4 * args.dim
    logits = 4 * args.max_batch_size * args.vocab_size * 3
    return Footprint(weights, cache * dtype.itemsize, widest * positions + logits)


def available(device: torch.device) -> int:
    """Free bytes of a device for this rank: of a GPU's memory, or of main memory divided by the ranks on this node.
    2**63 where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free = 2**63
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdecimal():
        free = min(free, int(text) - int(used.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shortage(needed: Footprint, free: int, device: torch.device, world_size: int) -> str | None:
    """Why a model does not fit and which arguments change that; None when it fits."""
    if sum(needed) <= free:
        return None
    return (
        f"each of {world_size} rank(s) needs {needed} and {device} has {free / 1e9:.2f} GB free; use more ranks, "
        "a narrower dtype, or a smaller max_seq_len or max_batch_size (check_memory=False tries all the same)"
    )
