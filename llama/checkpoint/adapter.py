"""One LoRA adapter: a folder of PEFT's, opened and compared with the model."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..args import ModelArgs
from ..textfile import read_json
from . import hf
from .files import READABLE, open_file
from .paths import listed
from .plan import shapes
from .write import digest

PREFIX = "base_model.model."
# How an adapter's keys end, and the part of a change that each holds. The A and B of embeddings are of their transpose.
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
# Keys of adapter_config.json that are read, or say how the adapter was trained, or what the files show anyway.
KNOWN = {
    *DEFAULTS,
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of values of init_lora_weights
}
# Values that others may have, besides null, false and empty ones. Other initial weights change the base's too.
SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
TIED = {"tok_embeddings.weight", "output.weight"}


class Change(NamedTuple):
    """What an adapter does to a slice of a matrix, in float64: W + B A, and with DoRA rows of these norms."""

    a: Tensor  # (r, columns)
    b: Tensor  # (rows, r), times s
    norms: Tensor | None  # (rows,)


class Adapter:
    """A folder of PEFT's, opened: the keys of its file by the weight (Meta's name) and the part of its change."""

    def __init__(self, folder: Path, factor: float, args: ModelArgs, saved_words: int = -1) -> None:
        self.folder, self.factor, self.head_dim, self.shapes = folder, factor, args.head_dim, shapes(args)
        self.config = read_config(folder / "adapter_config.json")
        self.file = open_file(weights_file(folder))
        named = hf.names(args.n_layers, args.n_labels)
        self.modules = {name: theirs.removesuffix(".weight") for name, theirs in named.items()}
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
                self.scale(name)  # ValueError for numbers that are none
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
        """The parts that a weight may have, and the shapes that each may have; (r, out) is given as (out, r)."""
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
        """A number of the config for one weight: of the first pattern that its module's name ends in, else of all."""
        path, module = self.folder / "adapter_config.json", self.modules[name]
        try:
            found = (v for k, v in self.config[pattern].items() if re.match(rf"(.*\.)?({k})$", module))
            value = next(found, self.config[key])
        except re.error as error:
            raise ValueError(f"{path}: {pattern} holds {error.pattern!r}, no regular expression: {error}") from error
        if type(value) not in (int, float) or not math.isfinite(value) or (key == "r" and value not in range(1, 2**31)):
            raise ValueError(f"{path}: {key} of {module} is {value!r}, not a {'positive whole ' * (key == 'r')}number")
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        shape = self.file.tensors[key].shape
        return shape[::-1] if "lora_embedding" in key else shape

    def part(self, name: str, part: str) -> Tensor:
        """A part of the change of a weight, its rows in Meta's order: a view of the file, or a copy."""
        key = self.keys[name][part]
        found = self.file.read(key, 0, 0, self.file.tensors[key].shape[0])
        found = found.T if "lora_embedding" in key else found
        if part == "lora_A":
            return found
        return hf.to_pairs(found, self.head_dim) if hf.is_permuted(name) else found[: self.shapes[name][0]]

    def change(self, name: str, rows: slice, columns: slice) -> Change:
        """The change of some rows and columns of a matrix."""
        a, b = self.part(name, "lora_A")[:, columns].double(), self.part(name, "lora_B")[rows].double()
        norms = "lora_magnitude_vector"
        found = self.part(name, norms)[rows].double() if norms in self.keys[name] else None
        return Change(a, b * self.scale(name), found)

    def scale(self, name: str) -> float:
        """s, times the weight in the sum."""
        r, alpha = self.setting(name, "r", "rank_pattern"), self.setting(name, "lora_alpha", "alpha_pattern")
        return self.factor * alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def fingerprint(self) -> tuple[float, str, str]:
        """What two ranks' copies have in common: the weight in the sum, and digests of the files."""
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
