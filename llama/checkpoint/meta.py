"""Meta's layout: params.json, one consolidated.NN.pth for each model-parallel rank, and checklist.chk with md5 sums."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from ..args import ModelArgs, RopeScaling
from ..backends.quantized import GROUPS, Scheme
from ..textfile import read_json
from .paths import NO_CONFIG, advice, listed

REQUIRED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
APART = ("max_batch_size", "max_seq_len", "tie_word_embeddings")  # not in params.json: from the caller or the weights
KNOWN = [field.name for field in dataclasses.fields(ModelArgs) if field.name not in APART]
KNOWN.append("quantization")  # {"bits": 4, "group_size": 32, "symmetric": false}, as `convert` writes it

REFUSED = {  # prefix of a key: the kind of unsupported model that has it
    "quantization_args": "weights that SpinQuant or QLoRA quantized",
    "lora_args": "weights with LoRA adapters",
    "moe_args": "a mixture of experts",
    "rope_high_freq_factor": "a Llama 4",
    "hidden_dim": "a pruned model",
    "rope_freq_base": "a pruned model",
    "vision": "a model of images and text",
}


def read_params(path: Path) -> dict[str, Any]:
    """The checked content of params.json. ValueError names an unknown or missing key."""
    content = read_json(path)
    nested = content.get("model")
    params = {k: v for k, v in (nested if isinstance(nested, dict) else content).items() if v is not None}
    for key, kind in REFUSED.items():
        if found := [name for name in params if name.startswith(key)]:
            raise ValueError(f"{path} has the key {found[0]}: it is of {kind}, which is not supported")
    if scaled := rope_scaling(params, path):
        params["rope_scaling"] = scaled
    if unknown := [key for key in params if key not in KNOWN]:
        raise ValueError(f"{path} has unknown keys {listed(unknown)}; known are {listed(KNOWN)}")
    if missing := [key for key in REQUIRED if key not in params]:
        raise ValueError(f"{path} lacks the keys {listed(missing)}")
    return params


def rope_scaling(params: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The scaling of RoPE, whose keys are removed from `params`. Meta's files only have a flag: the factor is 32 for
    Llama 3.2 1B and 3B, and otherwise 8. `convert` writes all fields."""
    scaled, factor = params.pop("use_scaled_rope", False), params.pop("rope_scaling_factor", None)
    explicit = params.pop("rope_scaling", None)
    if explicit is not None:
        if not isinstance(explicit, dict) or not {*explicit} <= {*RopeScaling._fields} or "factor" not in explicit:
            raise ValueError(f"{path}: rope_scaling is {explicit!r}; known are {listed(RopeScaling._fields)}")
        return explicit
    if scaled not in (True, False) or (not scaled and factor not in (None, 1)):
        raise ValueError(f"{path}: use_scaled_rope is {scaled!r} and rope_scaling_factor {factor!r}")
    usual = 32.0 if params.get("dim") in (2048, 3072) else 8.0
    return RopeScaling(usual if factor is None else factor)._asdict() if scaled else None


def read_scheme(quantization: Any, path: Path) -> Scheme | None:
    """The scheme of weights that were saved quantized, from `quantization` in params.json; None for floats."""
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
        raise FileNotFoundError(f"no consolidated.*.pth in {ckpt_dir}; {advice(ckpt_dir, NO_CONFIG)}")
    numbers = [int(match[1]) for name in found if (match := re.fullmatch(r"consolidated\.(\d\d)\.pth", name))]
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(numbers, default=0) + 1)]
    if missing := [name for name in wanted if name not in found]:
        raise FileNotFoundError(f"{ckpt_dir} lacks {listed(missing)}; download it again")
    if odd := sorted(set(found) - set(wanted)):
        raise ValueError(f"{ckpt_dir} contains {listed(odd)}, which is not named like a shard, consolidated.00.pth")
    return [found[name] for name in wanted]
