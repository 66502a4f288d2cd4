"""LoRA adapters in PEFT's format, merged into the base model's weights as they are read.

An adapter of rank r adds s B A to a matrix W (out, in), with A (r, in), B (out, r) and s = alpha / r, or alpha / √r.
A slice of W needs the same rows of B and columns of A. DoRA then scales each row of the sum to a norm of its own, for
which whole rows are computed. All of it is in float64, so that a weight is the same on any number of ranks, and rounded
once to the dtype that is loaded. The tensors in the file count, not target_modules in the config.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..args import ModelArgs
from ..backends.quantized import Quantized
from ..textfile import read_json
from . import hf
from .files import READABLE, open_file
from .folder import Checkpoint
from .hub import find_folder
from .load import Weights
from .paths import listed
from .plan import shapes, shard_dim, slice_shape
from .write import digest

PREFIX = "base_model.model."
# Suffixes of an adapter's keys -> the part of a change. PEFT's A and B of embeddings belong to the transposed matrix.
PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_B",
    ".lora_embedding_B": "lora_A",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".base_layer.weight": "weight",
    ".weight": "weight",
}
DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}
# Keys of adapter_config.json that are read, or may be ignored: they describe training, or what the files show anyway.
KNOWN = {
    *DEFAULTS,
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of values of init_lora_weights
}
# Values that other keys may have, besides null, false and empty ones. Other ways to initialize change the base weights.
SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
TIED = {"tok_embeddings.weight", "output.weight"}
ROWS = 256  # of a weight that are merged at a time: a few MB in float64


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
    """ValueError if several adapters of a weight have no weighted sum."""
    held = [adapter for adapter in adapters if "weight" in adapter.keys[name]]
    for adapter in held[1:]:
        if not torch.equal(adapter.part(name, "weight"), held[0].part(name, "weight")):
            raise ValueError(f"{held[0].folder} and {adapter.folder} have different weights in place of {name}")
    for adapter in adapters:
        dora, whole = "lora_magnitude_vector" in adapter.keys[name], {*adapter.keys[name]} == {"weight"}
        if (dora and len(adapters) > 1) or ((dora or whole) and adapter.factor != 1):
            what = "DoRA" if dora else "a whole weight"
            raise ValueError(f"{adapter.folder} has {what} for {name}, which cannot be weighted or added to another")


class Merged(NamedTuple):
    """A checkpoint with adapters, as `Weights` to load from."""

    base: Weights
    adapters: Sequence[Adapter]

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


class Adapter:
    """One PEFT adapter: a folder with its config and its file. `keys` maps a weight (Meta's name) and a part of its
    change (a value of `PARTS`) to the key in the file."""

    def __init__(self, folder: Path, factor: float, args: ModelArgs, saved_words: int) -> None:
        self.folder, self.factor, self.head_dim, self.shapes = folder, factor, args.head_dim, shapes(args)
        self.config = read_config(folder / "adapter_config.json")
        self.file = open_file(weights_file(folder))
        self.modules = {name: theirs.removesuffix(".weight") for name, theirs in hf.names(args.n_layers).items()}
        ours = {module: name for name, module in self.modules.items() if name in self.shapes}
        self.keys: dict[str, dict[str, str]] = {}
        problems: dict[str, list[str]] = defaultdict(list)
        for key in self.file.tensors:
            end = next((end for end in PARTS if key.endswith(end)), "")
            name, part = ours.get(key.removeprefix(PREFIX).removesuffix(end)), PARTS.get(end)
            if not key.startswith(PREFIX) or name is None or part is None or part in self.keys.get(name, {}):
                problems["unexpected"].append(key)
            else:
                self.keys.setdefault(name, {})[part] = key
        if self.config.get("use_dora") and "lora_A" in self.keys.get("tok_embeddings.weight", {}):
            raise ValueError(
                f"{folder} has DoRA for the embeddings, which is not supported; only for linear layers it is"
            )
        for name, parts in self.keys.items():
            wanted = self.wanted(name, saved_words)
            if "lora_A" in parts:
                self.scale(name)  # raises ValueError for an invalid r or alpha
            lacking = wanted.keys() - {*parts, "weight"} if {*parts} != {"weight"} else ()
            problems["missing"] += [f"{self.modules[name]}.{part}" for part in sorted(lacking)]
            for part, key in parts.items():
                shape, dtype, fit = self.shape(key), self.file.tensors[key].dtype, wanted.get(part, [])
                if not fit:
                    problems["unexpected"].append(key)
                elif shape not in fit:
                    problems["misshapen"].append(f"{key} {shape} instead of {fit[0]}")
                elif dtype not in READABLE:
                    problems["of a dtype that cannot be read"].append(f"{key} {dtype}")
        if found := [f"{problem}: {listed(names)}" for problem, names in problems.items() if names]:
            raise ValueError(f"{self.file.path} does not fit the model and adapter_config.json: {'; '.join(found)}")
        if not self.keys:
            raise ValueError(f"{self.file.path} is empty; download it again")

    def wanted(self, name: str, saved_words: int) -> dict[str, list[tuple[int, ...]]]:
        """The parts that a weight may have, and the shapes allowed for each, those of embeddings transposed."""
        [rows, *columns] = self.shapes[name]
        outs = [rows, saved_words] if name in TIED and saved_words > rows else [rows]  # the vocabulary may be cut
        found: dict[str, list[tuple[int, ...]]] = {"weight": [(out, *columns) for out in outs]}
        if columns:
            r = self.setting(name, "r", "rank_pattern")
            found |= {"lora_A": [(int(r), *columns)], "lora_B": [(out, int(r)) for out in outs]}
            if self.config.get("use_dora"):
                found["lora_magnitude_vector"] = [(out,) for out in outs]
        return found

    def setting(self, name: str, key: str, pattern: str) -> float:
        """`key` of the config for one weight: the value of the first pattern that matches the end of its module's name,
        else the default."""
        path, module = self.folder / "adapter_config.json", self.modules[name]
        try:
            found = (v for k, v in self.config[pattern].items() if re.match(rf"(.*\.)?({k})$", module))
            value = next(found, self.config[key])
        except re.error as error:
            raise ValueError(
                f"{path}: {pattern} contains {error.pattern!r}, which is not a regular expression: {error}"
            ) from error
        if type(value) not in (int, float) or not math.isfinite(value) or (key == "r" and value not in range(1, 2**31)):
            raise ValueError(f"{path}: {key} of {module} is {value!r}, not a {'positive whole ' * (key == 'r')}number")
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        shape = self.file.tensors[key].shape
        return shape[::-1] if "lora_embedding" in key else shape

    def part(self, name: str, part: str) -> Tensor:
        """One part of a weight's change, with rows in Meta's order: a view of the file, or a copy."""
        key = self.keys[name][part]
        found = self.file.view(self.file.tensors[key])
        found = found.T if "lora_embedding" in key else found
        if part == "lora_A":
            return found
        return hf.to_pairs(found, self.head_dim) if hf.is_permuted(name) else found[: self.shapes[name][0]]

    def change(self, name: str, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (r, columns) and s B (rows, r) for a slice of a matrix, and with DoRA the norms (rows,); in float64."""
        a, b = self.part(name, "lora_A")[:, columns].double(), self.part(name, "lora_B")[rows].double()
        dora = "lora_magnitude_vector" in self.keys[name]
        return a, b * self.scale(name), self.part(name, "lora_magnitude_vector")[rows].double() if dora else None

    def scale(self, name: str) -> float:
        """s = alpha / r, or alpha / √r, times this adapter's weight in the sum."""
        r, alpha = self.setting(name, "r", "rank_pattern"), self.setting(name, "lora_alpha", "alpha_pattern")
        return self.factor * alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def fingerprint(self) -> tuple[float, str, str]:
        """What must be equal on all ranks: the weight in the sum, and digests of the files."""
        return self.factor, digest(self.folder / "adapter_config.json", "md5"), digest(self.file.path, "md5")

    def __str__(self) -> str:
        def of(names: Sequence[str]) -> str:
            return f"{len(names)} ({listed(sorted({self.modules[name].rpartition('.')[2] for name in names}))})"

        merged = [name for name, parts in self.keys.items() if "lora_A" in parts]
        ranks = sorted({self.shape(self.keys[name]["lora_A"])[0] for name in merged})
        rest = [name for name in self.keys if name not in merged]
        shown = [f"rank {listed(ranks)} for {of(merged)}"] * bool(merged) + [f"whole {of(rest)}"] * bool(rest)
        return f"{self.folder}{f' times {self.factor:g}' * (self.factor != 1)}: {', '.join(shown)}"


def read_config(path: Path) -> dict[str, Any]:
    """The checked content of adapter_config.json. ValueError names what is not supported."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter_config.json in {path.parent}; is it the folder of a LoRA adapter?")
    config = {key: value for key, value in read_json(path).items() if value is not None}
    for key, value in {"peft_type": None, **config}.items():
        if key not in KNOWN and (value or key == "peft_type") and value not in SUPPORTED.get(key, ()):
            only = f"; only {SUPPORTED[key][0]!r} is" if key in SUPPORTED else ""
            raise ValueError(f"{path}: {key} {value!r} is not supported{only}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key, {}), Mapping):
            raise ValueError(f"{path}: {key} is {config[key]!r}, not an object of names and numbers")
    return DEFAULTS | config


def weights_file(folder: Path) -> Path:
    """The file of an adapter's weights, in either format. Nothing in it is executed."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} lacks adapter_model.safetensors; download it again")
