"""Checkpoints in any layout: planned, opened, loaded, written and converted."""

import warnings
from typing import Any

from ..textfile import read_json, read_text
from . import plan
from .folder import Checkpoint
from .hf import weight_files
from .hub import find_folder
from .load import Weights, check_same, load, read_parts, read_quantized
from .lora import Adapter, with_lora
from .memory import Footprint, available, check_fits, footprint, shortage
from .meta import KNOWN, REQUIRED, read_params, read_scheme, shard_paths
from .paths import check_path, find_tokenizer
from .plan import SHARD_DIM, Slice, divides, rank_range, shapes, shard_dim, slice_shape, slices
from .write import digest, save, split, write_checklist, write_file

__all__ = [
    "KNOWN", "REQUIRED", "SHARD_DIM", "Adapter", "Checkpoint", "Footprint", "Slice", "Weights", "available",
    "check_fits", "check_path", "check_same", "digest", "divides", "find_folder", "find_tokenizer", "footprint",
    "load", "rank_range", "read_json", "read_params", "read_parts", "read_quantized", "read_scheme", "read_text",
    "save", "shapes", "shard_dim", "shard_paths", "shortage", "slice_shape", "slices", "split", "weight_files",
    "with_lora", "write_checklist", "write_file",
]  # fmt: skip
# Names of the previous release, which go with the next one.
RENAMED = {"Piece": "Slice", "pieces": "slices", "share": "rank_range", "products": "fused_groups", "JOINED": "FUSED"}


def __getattr__(name: str) -> Any:
    if name not in RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"llama.checkpoint.{name} is now {RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return getattr(plan, RENAMED[name])
