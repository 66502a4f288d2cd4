"""An estimate of the memory that a model needs, and the memory that is free. Nothing is allocated for either."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..args import ModelArgs
from ..backends.quantized import Quantization
from ..textfile import read_text
from .plan import rank_range, shapes, shard_dim, slice_shape

# A cgroup's files: its limit, what it uses, and statistics; then the fields of the statistics that are page cache.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file", "total_active_file")
V2 = ("memory.max", "memory.current", "memory.stat", "inactive_file", "active_file")


class Footprint(NamedTuple):
    """Bytes on one rank."""

    weights: int
    cache: int
    activations: int  # estimated, for a prefill of max_batch_size prompts of max_seq_len tokens

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self._asdict().items())
        return f"{sum(self) / 1e9:.2f} GB ({parts})"


def footprint(args: ModelArgs, world_size: int, dtype: torch.dtype, scheme: Quantization = None) -> Footprint:
    """The memory of one of `world_size` ranks for a model in `dtype`, with its matrices in a scheme. 7B in bfloat16 on
    one rank: 13.48 GB of weights, and for each position of the KV cache 2 * 32 layers * 4096 * 2 bytes = 0.52 MB."""
    weights, shared = 0, args.tie_word_embeddings and world_size == 1
    for name, shape in shapes(args).items():
        part = slice_shape(name, shape, *rank_range(name, shape[shard_dim(name) or 0], args, 0, world_size))
        if scheme and (own := scheme.of(name)):
            weights += own.nbytes(shape) * math.prod(part) // math.prod(shape)
        else:
            weights += math.prod(part) * dtype.itemsize * (not (shared and name == "output.weight"))
    positions = args.max_batch_size * args.max_seq_len
    kv_heads = max(args.kv_heads // world_size, 1)
    cache = 2 * args.n_layers * kv_heads * args.head_dim * positions
    # A layer is widest in its feed-forward: the residual stream, its float32 norm, and the outputs of w1, w3 and SwiGLU
    widest = (2 * args.dim + 3 * args.ffn_hidden // world_size) * dtype.itemsize + 4 * args.dim
    logits = 4 * args.max_batch_size * (args.n_labels or args.vocab_size) * 3
    return Footprint(weights, cache * dtype.itemsize, widest * positions + logits)


def available(device: torch.device, root: Path = Path("/")) -> int:
    """Free bytes of a device for this rank: of a GPU's memory, or of main memory divided by the ranks on this node.
    Page cache counts as free. 2**63 where the system does not report it."""
    if device.type == "cuda":  # memory that torch's allocator has cached is free to this process
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    host = mac_memory() if sys.platform == "darwin" else linux_memory(root)
    return min([host, *cgroup_memory(root)]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def linux_memory(root: Path) -> int:
    """Bytes of main memory that are free or page cache."""
    if not (meminfo := root / "proc/meminfo").exists():
        return 2**63
    fields = {name: int(value.split()[0]) for name, value in re.findall(r"(\S+):(.+)", read_text(meminfo))}
    names = ("MemAvailable",) if "MemAvailable" in fields else ("MemFree", "Buffers", "Cached")  # before Linux 3.14
    return 1024 * sum(fields.get(name, 0) for name in names)


def mac_memory() -> int:
    """The same on macOS: free and inactive pages, as psutil counts them. vm_stat lists speculative pages, which are
    free, separately."""
    try:
        text = subprocess.run(["vm_stat"], capture_output=True, encoding="utf-8", check=True).stdout
        pages = {name: int(count) for name, count in re.findall(r"Pages (\w+): +(\d+)", text)}
        return int(text.split("page size of ")[1].split()[0]) * sum(
            pages[name] for name in ("free", "speculative", "inactive")
        )
    except (OSError, subprocess.SubprocessError, LookupError, ValueError):
        return 2**63


def cgroup_memory(root: Path) -> Iterator[int]:
    """Bytes left below each memory limit of this process: of its cgroup and the enclosing ones, in version 1 or 2. Page
    cache does not count as used: the kernel drops it before it kills a process."""
    groups = root / "proc/self/cgroup"
    for line in read_text(groups).splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = root / "sys/fs/cgroup" / ("memory" if controllers else ""), V1 if controllers else V2
        group = top / path.strip("/")  # in some containers this is the host's path, and only `top` exists
        for folder in (group, *group.parents):
            limit, used, stat = (folder / name for name in names[:3])
            if folder.is_relative_to(top) and limit.exists() and (text := read_text(limit).strip()).isdecimal():
                fields = dict(line.split() for line in read_text(stat).splitlines()) if stat.exists() else {}
                yield int(text) - int(read_text(used)) + sum(int(fields.get(name, 0)) for name in names[3:])


def check_fits(
    args: ModelArgs, world_size: int, device: torch.device, dtype: torch.dtype, scheme: Quantization = None
) -> None:
    """MemoryError if a model does not fit in the free memory."""
    needed = footprint(args, world_size, dtype, scheme)
    if problem := shortage(needed, available(device), device, world_size):
        raise MemoryError(problem)


def shortage(needed: Footprint, free: int, device: torch.device, world_size: int) -> str | None:
    """Why a model does not fit, and which arguments change that; None if it fits."""
    if sum(needed) <= free:
        return None
    return (
        f"each of {world_size} rank(s) needs {needed} and {device} has {free / 1e9:.2f} GB free; use more ranks, "
        "a narrower dtype, or a smaller max_seq_len or max_batch_size (check_memory=False tries all the same)"
    )
