"""Meta's layout: params.json, one consolidated.NN.pth for each model-parallel rank, and checklist.chk with md5 sums."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from ..backends.quantized import GROUPS, Scheme
from ..model import ModelArgs
from .paths import NO_CONFIG, advice, listed, read_json

REQUIRED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
KNOWN = [field.name for field in dataclasses.fields(ModelArgs) if not field.name.startswith("max_")]
KNOWN.append("quantization")  # {"bits": 4, "group_size": 32, "symmetric": false}, as `convert` writes it

UNSCALED = (("use_scaled_rope", False), ("rope_scaling_factor", 1))  # keys of later models, where they change nothing


def read_params(path: Path) -> dict[str, Any]:
    """The checked content of params.json. ValueError names an unknown or missing key."""
    params = {
        key: value for key, value in read_json(path).items() if value is not None and (key, value) not in UNSCALED
    }
    if unknown := [key for key in params if key not in KNOWN]:
        raise ValueError(f"{path} has unknown keys {listed(unknown)}; known are {listed(KNOWN)}")
    if missing := [key for key in REQUIRED if key not in params]:
        raise ValueError(f"{path} lacks the keys {listed(missing)}")
    return params


def read_scheme(quantization: Any, path: Path) -> Scheme | None:
    """The scheme of weights that were quantized before they were saved, from the key `quantization` of params.json."""
    if quantization is None:
        return None
    found = quantization if isinstance(quantization, dict) else {}
    bits, group, symmetric = (found.get(key) for key in ("bits", "group_size", "symmetric"))
    if bits in (4, 8) and group in (0, *GROUPS) and symmetric in (False, True):
        return Scheme(bits, group, symmetric)
    raise ValueError(
        f"{path}: quantization is {quantization!r}, which this release does not write; quantize the original weights "
        "again: python -m llama convert SOURCE TARGET --quantize int8 or int4"
    )


def shard_paths(ckpt_dir: Path) -> list[Path]:
    """The shards in the order of ranks. FileNotFoundError names a missing one."""
    found = {path.name: path for path in ckpt_dir.glob("consolidated.*.pth") if path.is_file()}
    if not found:
        do = advice(ckpt_dir, NO_CONFIG, "is it the folder of a checkpoint?")
        raise FileNotFoundError(f"no consolidated.*.pth in {ckpt_dir}; {do}")
    numbers = [int(match[1]) for name in found if (match := re.fullmatch(r"consolidated\.(\d\d)\.pth", name))]
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(numbers, default=0) + 1)]
    if missing := [name for name in wanted if name not in found]:
        raise FileNotFoundError(f"{ckpt_dir} lacks {listed(missing)}; download it again")
    if odd := sorted(set(found) - set(wanted)):
        raise ValueError(f"{ckpt_dir} holds {listed(odd)}, no name of a shard such as consolidated.00.pth")
    return [found[name] for name in wanted]
