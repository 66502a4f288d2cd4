"""A folder of weights as Meta publishes it -> this rank's tensors; and a state dict -> such a folder.

A folder holds params.json, one consolidated.NN.pth for each model-parallel rank, and checklist.chk with their md5 sums.
tokenizer.model lies beside them or one folder up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .model import ModelArgs
from .parallel import rank

# Along which dimension the ranks' parts of a weight lie. The key is the last name before ".weight".
SHARD_DIM: dict[str, int | None] = {
    "tok_embeddings": 1,
    "wq": 0, "wk": 0, "wv": 0, "wo": 1,
    "w1": 0, "w2": 1, "w3": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,
    "output": 0,
}  # fmt: skip
# Rotary frequencies, which older files carry and which follow from params.json.
IGNORED = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")
REQUIRED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
KNOWN = [field.name for field in dataclasses.fields(ModelArgs) if not field.name.startswith("max_")]


def shard_dim(name: str) -> int | None:
    """The dimension along which the parameter `name` is split over ranks; None for one that every rank holds whole."""
    return SHARD_DIM[name.split(".")[-2]]


def find_tokenizer(ckpt_dir: Path, tokenizer_path: str | os.PathLike[str] | None) -> Path:
    """The tokenizer's file: the one given, or else tokenizer.model in the checkpoint's folder or one folder up."""
    if tokenizer_path is not None:
        return check_path(tokenizer_path, "tokenizer_path", "file")
    places = [ckpt_dir / "tokenizer.model", ckpt_dir.resolve().parent / "tokenizer.model"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no tokenizer.model in {places[0].parent} or {places[1].parent}; give tokenizer_path")


def check_path(value: Any, name: str, kind: Literal["file", "folder"]) -> Path:
    """`value` as the path of an existing file or folder; FileNotFoundError or ValueError says what it is instead."""
    if not isinstance(value, (str, os.PathLike)):  # a flag without a value arrives as True
        raise ValueError(f"{name} is {value!r}; it must be the path of a {kind}")
    path = Path(value)
    if str(value) and (path.is_dir() if kind == "folder" else path.is_file()):
        return path
    # A command of several lines pasted on one turns its backslash, line end and "--flag" into the word " --flag".
    if str(value) != str(value).strip() or str(value).startswith("--") or not str(value):
        raise ValueError(
            f"{name} is {str(value)!r}, which looks like a flag and not like the path of a {kind}; "
            "remove the backslashes of a command that was pasted on one line"
        )
    raise FileNotFoundError(f"{name} {path} is not an existing {kind}")


def read_params(ckpt_dir: Path) -> dict[str, Any]:
    """The checked content of params.json; ValueError names an unknown or missing key."""
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"no params.json in {ckpt_dir}; is it the folder of a checkpoint?")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds {type(params).__name__} and not an object of keys and values")
    if unknown := [key for key in params if key not in KNOWN]:
        raise ValueError(f"{path} has unknown keys {_names(unknown)}; known are {_names(KNOWN)}")
    if missing := [key for key in REQUIRED if key not in params]:
        raise ValueError(f"{path} lacks the keys {_names(missing)}")
    return params


def model_args(ckpt_dir: Path, n_words: int) -> ModelArgs:
    """The model's shape by params.json, with the vocabulary of a tokenizer of `n_words` pieces."""
    params = read_params(ckpt_dir)
    try:
        args = ModelArgs(**params)
    except ValueError as error:
        raise ValueError(f"{ckpt_dir / 'params.json'}: {error}") from error
    if args.vocab_size not in (-1, n_words):
        given = f"{ckpt_dir / 'params.json'}: vocab_size {args.vocab_size}"
        raise ValueError(f"{given} differs from the tokenizer's {n_words} pieces")
    return dataclasses.replace(args, vocab_size=n_words)


def shard_paths(ckpt_dir: Path) -> list[Path]:
    """The shards in the order of ranks; FileNotFoundError names a missing one."""
    found = {path.name: path for path in ckpt_dir.glob("consolidated.*.pth")}
    if not found:
        raise FileNotFoundError(f"no consolidated.*.pth in {ckpt_dir}; is it the folder of a checkpoint?")
    numbers = [int(match[1]) for name in found if (match := re.fullmatch(r"consolidated\.(\d\d)\.pth", name))]
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(numbers, default=0) + 1)]
    if missing := [name for name in wanted if name not in found]:
        raise FileNotFoundError(f"{ckpt_dir} lacks {_names(missing)}; download it again")
    if odd := sorted(set(found) - set(wanted)):
        raise ValueError(f"{ckpt_dir} holds {_names(odd)}, no name of a shard such as consolidated.00.pth")
    return [found[name] for name in wanted]


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one shard, mapped and not read; nothing in the file is executed. ValueError if it is no shard."""
    try:
        # Files in torch's older format, which are no zip archives, cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damage shows in any of a dozen types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        size = path.stat().st_size
        raise ValueError(f"{path} ({size:,} bytes) is not a readable shard; download it again ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds something else than named tensors")
    return {name: tensor for name, tensor in state.items() if not IGNORED.fullmatch(name)}


def check_shard(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError that names every tensor of a shard that is missing, unexpected, misshapen or not floating-point."""
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "misshapen": [f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
                      for name in wanted if name in state and state[name].shape != wanted[name].shape],
        "not floating-point": [f"{name} {t.dtype}" for name, t in state.items() if not t.is_floating_point()],
    }  # fmt: skip
    if found := [f"{problem}: {_names(names)}" for problem, names in problems.items() if names]:
        raise ValueError(f"{path} does not fit params.json: {'; '.join(found)}")


def load_shard(model: nn.Module, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give `model`, whose parameters may be on the meta device, copies of the shard's tensors in their final place."""
    final = {}
    total = sum(tensor.nbytes for tensor in state.values())
    quiet = None if rank() == 0 else True  # None: only on a terminal
    with tqdm(desc="loading", total=total, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        for name, tensor in state.items():
            final[name] = tensor.to(device, dtype, copy=True)
            bar.update(tensor.nbytes)
    model.load_state_dict(final, strict=True, assign=True)


def split(state: Mapping[str, Tensor], mp: int) -> list[dict[str, Tensor]]:
    """The shards of a whole model for `mp` ranks."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(mp)]
    for name, tensor in state.items():
        dim = shard_dim(name)
        if dim is not None and tensor.shape[dim] % mp:
            raise ValueError(f"{name} {tuple(tensor.shape)} cannot be divided into {mp} shards along dimension {dim}")
        for part, piece in zip(parts, [tensor] * mp if dim is None else tensor.chunk(mp, dim), strict=True):
            part[name] = piece
    return parts


def save(state: Mapping[str, Tensor], ckpt_dir: str | os.PathLike[str], params: Mapping[str, Any], mp: int = 1) -> None:
    """Write a whole model as a checkpoint of `mp` shards, with params.json and checklist.chk."""
    folder = Path(ckpt_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
    names = ["params.json"]
    for i, part in enumerate(split(state, mp)):
        names.append(f"consolidated.{i:02d}.pth")
        # clone: a view would take its whole storage with it into the file
        torch.save({name: tensor.clone().contiguous() for name, tensor in part.items()}, folder / names[-1])
    write_checklist(folder / "checklist.chk", [folder / name for name in names])


def write_checklist(path: Path, files: Iterable[Path]) -> None:
    """The md5 sums of files in the same folder, in the format of md5sum."""
    path.write_text("".join(f"{md5(file)}  {file.name}\n" for file in files), encoding="utf-8")


def md5(path: Path) -> str:
    """The md5 sum of a file, read in blocks."""
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(str, names))
