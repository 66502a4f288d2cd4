"""A folder of weights, in Meta's layout or Hugging Face's, saved for any number of ranks -> this rank's tensors.

Meta's: params.json, one consolidated.NN.pth for each model-parallel rank, and checklist.chk with their md5 sums.
Hugging Face's: config.json, and model.safetensors or several files with model.safetensors.index.json.
tokenizer.model lies beside them or one folder up.

A weight is split over ranks along one dimension, in equal parts. The parts on disk need not be those in memory: say wq
has 12 rows, saved in 4 shards of 3, and 3 ranks load it. Rank 1 wants rows 4 to 8, which are row 1 and 2 of shard 1 and
rows 0 and 1 of shard 2. `pieces` works that out, and only these rows are read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import hf
from .backends.quantized import Quantized, Rows, Scheme, kernel, quantize, scheme, stack
from .files import READABLE, SafetensorsFile, TorchFile
from .model import ModelArgs
from .parallel import empty, rank, world_size

# Along which dimension the ranks' parts of a weight lie. The key is the last name before ".weight".
SHARD_DIM: dict[str, int | None] = {
    "tok_embeddings": 1,
    "wq": 0, "wk": 0, "wv": 0, "wo": 1,
    "w1": 0, "w2": 1, "w3": 0,
    "attention_norm": None, "ffn_norm": None, "norm": None,
    "output": 0,
}  # fmt: skip
# Weights that multiply the same vector, and are laid side by side for one product.
JOINED = (("wq", "wk", "wv"), ("w1", "w3"))
REQUIRED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
KNOWN = [field.name for field in dataclasses.fields(ModelArgs) if not field.name.startswith("max_")]
KNOWN.append("quantization")  # {"bits": 8} or {"bits": 4, "group_size": 64}, in what `convert` wrote


# ---------------------------------------------------------------------------------------------------------------------
# The plan: which part of a weight goes where. Pure functions


def shard_dim(name: str) -> int | None:
    """The dimension along which the parameter `name` is split over ranks; None for one that every rank holds whole."""
    dim = SHARD_DIM[name.split(".")[-2]]
    return None if dim == 1 and name.endswith(".scale") else dim  # of a whole row


def shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of a whole model."""
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
    whole = {"tok_embeddings": (args.vocab_size, args.dim), "norm": (args.dim,), "output": (args.vocab_size, args.dim)}
    whole |= {f"layers.{i}.{name}": shape for i in range(args.n_layers) for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in whole.items()}


def is_matrix(name: str) -> bool:
    """Whether a weight multiplies, and is quantized where any is."""
    return shard_dim(name) is not None and "tok_embeddings" not in name


def share(name: str, size: int, args: ModelArgs, rank: int, world_size: int) -> tuple[int, int]:
    """Where the part of a rank begins and ends in the `size` rows or columns of a weight. Each rank has an equal part,
    of a norm the whole. With more ranks than key-value heads, neighbouring ranks have the same head: 2 heads on 4 ranks
    lie as 0 0 1 1."""
    if shard_dim(name) is None:
        return 0, size
    if name.split(".")[-2] in ("wk", "wv") and world_size > args.kv_heads:
        rank, world_size = rank * args.kv_heads // world_size, args.kv_heads
    return rank * size // world_size, (rank + 1) * size // world_size


class Piece(NamedTuple):
    shard: int
    begin: int  # in the shard
    offset: int  # in what is put together
    length: int


def pieces(size: int, shards: int, begin: int, end: int) -> Iterator[Piece]:
    """The parts of `shards` equal shards of `size` rows or columns that make up those from `begin` to `end`."""
    each = size // shards
    for shard in range(begin // each, -(-end // each)):
        first, last = max(begin, shard * each), min(end, (shard + 1) * each)
        yield Piece(shard, first - shard * each, first - begin, last - first)


# ---------------------------------------------------------------------------------------------------------------------
# The files


def find_tokenizer(ckpt_dir: Path, tokenizer_path: str | os.PathLike[str] | None) -> Path:
    """The tokenizer's file: the one given, or else tokenizer.model in the checkpoint's folder or one folder up."""
    if tokenizer_path is not None:
        return check_path(tokenizer_path, "tokenizer_path", "file")
    folders = dict.fromkeys([ckpt_dir, ckpt_dir.absolute().parent, ckpt_dir.resolve().parent])
    places = [folder / "tokenizer.model" for folder in folders]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no tokenizer.model in {' or '.join(map(str, folders))}; give tokenizer_path")


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file that holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} and not an object of keys and values")
    return content


def read_params(path: Path) -> dict[str, Any]:
    """The checked content of params.json; ValueError names an unknown or missing key."""
    params = read_json(path)
    if unknown := [key for key in params if key not in KNOWN]:
        raise ValueError(f"{path} has unknown keys {_names(unknown)}; known are {_names(KNOWN)}")
    if missing := [key for key in REQUIRED if key not in params]:
        raise ValueError(f"{path} lacks the keys {_names(missing)}")
    return params


def shard_paths(ckpt_dir: Path) -> list[Path]:
    """The shards in the order of ranks; FileNotFoundError names a missing one."""
    found = {path.name: path for path in ckpt_dir.glob("consolidated.*.pth") if path.is_file()}
    if not found:
        raise FileNotFoundError(f"no consolidated.*.pth in {ckpt_dir}; is it the folder of a checkpoint?")
    numbers = [int(match[1]) for name in found if (match := re.fullmatch(r"consolidated\.(\d\d)\.pth", name))]
    wanted = [f"consolidated.{i:02d}.pth" for i in range(max(numbers, default=0) + 1)]
    if missing := [name for name in wanted if name not in found]:
        raise FileNotFoundError(f"{ckpt_dir} lacks {_names(missing)}; download it again")
    if odd := sorted(set(found) - set(wanted)):
        raise ValueError(f"{ckpt_dir} holds {_names(odd)}, no name of a shard such as consolidated.00.pth")
    return [found[name] for name in wanted]


def safetensors_paths(folder: Path) -> list[Path]:
    """The files that model.safetensors.index.json names, or model.safetensors."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError(f"{index} has no weight_map from the names of weights to files; download it again")
        names = sorted(set(listed.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {_names(missing)}; download it again")
    return [folder / name for name in names]


def read_scheme(quantization: Any, path: Path) -> Scheme | None:
    """What params.json says of quantized weights."""
    if quantization is None:
        return None
    try:
        return scheme(f"int{quantization['bits']}", quantization.get("group_size", 64))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: quantization is {quantization!r}; it must be of 8 bits, or of 4 in groups"
        ) from error


class Checkpoint:
    """A folder of weights, opened: `params`, by Meta's keys, and any part of any weight. What is in the files is looked
    up in their headers; FileNotFoundError or ValueError names the file and what is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scheme: Scheme | None = None  # of weights that were quantized before they were saved
        self.files: Sequence[TorchFile | SafetensorsFile]
        # The files that hold a weight's parts, in the order of ranks.
        self.holders: dict[str, Sequence[TorchFile | SafetensorsFile]]
        if (folder / "params.json").is_file():
            self.layout, self.source = "meta", folder / "params.json"
            self.params = read_params(self.source)
            self.scheme = read_scheme(self.params.pop("quantization", None), self.source)
            self.files = [TorchFile(path) for path in shard_paths(folder)]
            self.holders = {name: self.files for file in self.files for name in file.shapes}
        elif (folder / "config.json").is_file():
            self.layout, self.source = "hf", folder / "config.json"
            config = read_json(self.source)
            try:
                self.params = hf.params(config)
            except ValueError as error:
                raise ValueError(f"{self.source}: {error}") from error
            names, head_dim = hf.names(self.params["n_layers"]), self.params["dim"] // self.params["n_heads"]
            files = [SafetensorsFile(path, names, head_dim) for path in safetensors_paths(folder)]
            if config.get("tie_word_embeddings") and not any("output.weight" in file.shapes for file in files):
                for file in files:
                    file.tie("output.weight", "tok_embeddings.weight")
            self.files = files
            self.holders = {name: [file] for file in files for name in file.shapes}
        else:
            raise FileNotFoundError(f"no params.json or config.json in {folder}; is it the folder of a checkpoint?")

    def vocab_size(self) -> int:
        """The number of rows of the weight that makes logits; 0 if the files lack it."""
        held = self.holders.get("output.weight", [])
        return sum(file.shapes["output.weight"][0] for file in held if "output.weight" in file.shapes)

    def args(self, n_words: int) -> ModelArgs:
        """The model's shape, with the vocabulary of a tokenizer of `n_words` pieces; checked against the files."""
        try:
            args = ModelArgs(**self.params)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error
        if args.vocab_size not in (-1, n_words):
            given = f"{self.source}: vocab_size {args.vocab_size}"
            raise ValueError(f"{given} differs from the tokenizer's {n_words} pieces")
        [rows, *_] = self.files[0].shapes.get("layers.0.attention.wq.weight") or [args.dim]
        here, saved = len(self.files), args.dim // max(rows, 1)
        if self.layout == "meta" and here < saved:
            lacking = _names(f"consolidated.{i:02d}.pth" for i in range(here, saved))
            raise FileNotFoundError(f"{self.folder} has {here} of {saved} shards; download {lacking}")
        if (size := self.vocab_size()) not in (0, n_words):
            raise ValueError(f"the tokenizer has {n_words} pieces and the weights in {self.folder} {size}: not a pair")
        args = dataclasses.replace(args, vocab_size=n_words)
        self.check(args)
        return args

    def check(self, args: ModelArgs) -> None:
        """ValueError that names every tensor of a file that is missing, unexpected, misshapen, of a dtype that cannot
        be read or not of one dtype in all shards."""
        stored, first = self.stored(args), self.files[0].dtypes
        wanted = {name: shape for name, (shape, _) in stored.items()}
        for file in self.files:
            here = wanted if self.layout == "meta" else [name for name in wanted if self.holders.get(name) == [file]]
            found = [
                (name, file.shapes[name], self.part_shapes(name, wanted[name])) for name in here if name in file.shapes
            ]
            problems = {
                "missing": [name for name in here if name not in file.shapes],
                "unexpected": [name for name in file.shapes if name not in wanted],
                "misshapen": [f"{name} {shape} instead of {fit[0]}" for name, shape, fit in found if shape not in fit],
                "of a dtype that cannot be read": [
                    f"{name} {t}" for name, t in file.dtypes.items() if t not in stored.get(name, ((), READABLE))[1]
                ],
                f"of another dtype than in {self.files[0].path.name}": [
                    f"{name} {dtype}" for name, dtype in file.dtypes.items() if first.get(name, dtype) != dtype
                ],
            }
            if listed := [f"{problem}: {_names(names)}" for problem, names in problems.items() if names]:
                raise ValueError(f"{file.path} does not fit {self.source.name}: {'; '.join(listed)}")
        if missing := [name for name in wanted if name not in self.holders]:
            raise ValueError(f"{self.folder} does not fit {self.source.name}: missing: {_names(missing)}")
        norms = [file.read("norm.weight", 0, 0, args.dim) for file in self.holders["norm.weight"]]
        for file, norm in zip(self.files, norms, strict=False):
            if not torch.equal(norm, norms[0]):  # every shard of a model has the same
                raise ValueError(f"{file.path} and {self.files[0].path.name} are shards of different models")
        if self.layout == "meta":
            rows = [file.read("layers.0.attention.wq.weight", 0, 0, 1) for file in self.files]
            for file, row in zip(self.files[1:], rows[1:], strict=True):
                if torch.equal(row, rows[0]) and row.any():
                    raise ValueError(f"{file.path} and {self.files[0].path.name} are the same shard")

    def stored(self, args: ModelArgs) -> dict[str, tuple[tuple[int, ...], set[torch.dtype]]]:
        """Names and whole shapes of the tensors in the files, and the dtypes that they may have."""
        found: dict[str, tuple[tuple[int, ...], set[torch.dtype]]] = {}
        for name, shape in shapes(args).items():
            if self.scheme and is_matrix(name):
                found |= {key: (s, {dtype}) for key, (s, dtype) in self.scheme.stored(name, shape).items()}
            else:
                found[name] = (shape, READABLE)
        return found

    def part_shapes(self, name: str, whole: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that a file's part of a weight may have. Embeddings are split by columns in Llama 2's files and by
        rows in Llama 3's."""
        shards, dim = len(self.holders[name]), shard_dim(name)
        if dim is None:
            return [whole]
        dims = [d for d in ((1, 0) if "tok_embeddings" in name else (dim,)) if whole[d] % shards == 0] or [dim]
        fit = [tuple(size // shards if i == dim else size for i, size in enumerate(whole)) for dim in dims]
        first = self.holders[name][0].shapes.get(name)
        return [first] if first in fit else fit  # all in the same way

    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every weight that is not quantized."""
        found = {
            dtype
            for file in self.files
            for name, dtype in file.dtypes.items()
            if dtype in READABLE and name.endswith(".weight")
        }
        return functools.reduce(torch.promote_types, found)

    def scheme_for(self, quantize: str | None, group_size: int) -> Scheme | None:
        """The scheme to load in: the one asked for, or the one it was saved in. ValueError if these differ."""
        asked = scheme(quantize, group_size)
        if asked and self.scheme and asked != self.scheme:
            raise ValueError(f"{self.folder} is quantized already, to {self.scheme}; it cannot become {asked}")
        return self.scheme or asked

    def release(self) -> None:
        """Let what was read no longer count as memory of this process; see `File.release`."""
        for file in self.files:
            file.release()

    def read(
        self,
        name: str,
        shape: Sequence[int],
        begin: int,
        end: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """Rows or columns `begin` to `end`, counted along its `shard_dim`, of a weight that is of `shape` as a whole.
        What one file has in this dtype as it is wanted is not copied on the CPU, and stays a view of the file; anything
        else is put into `out`, or a new tensor."""
        files, dim = self.holders[name], shard_dim(name)
        if dim is None:
            parts, dim = [files[0].read(name, 0, begin, end - begin)], 0
        elif len(files) > 1 and files[0].shapes[name][dim] == shape[dim]:  # split the other way: each has some of it
            parts, dim = [file.read(name, dim, begin, end - begin) for file in files], 1 - dim
        else:
            plan = pieces(shape[dim], len(files), begin, end)
            parts = [files[piece.shard].read(name, dim, piece.begin, piece.length) for piece in plan]
        ready = parts[0].dtype == dtype and torch.device(device).type == "cpu"
        if len(parts) == 1 and ready and parts[0].is_contiguous():
            return parts[0]
        if out is None:
            joined = list(parts[0].shape)
            joined[dim] = sum(part.shape[dim] for part in parts)
            out = torch.empty(joined, dtype=dtype, device=device)
        for place, part in zip(out.split([part.shape[dim] for part in parts], dim), parts, strict=True):
            place.copy_(part)
        for file in files:
            file.release()
        return out


class Weights(Protocol):
    """Where `load` takes weights from: a Checkpoint, or what can stand for one."""

    scheme: Scheme | None

    def dtype(self) -> torch.dtype: ...

    def release(self) -> None: ...

    def read(
        self,
        name: str,
        shape: Sequence[int],
        begin: int,
        end: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor: ...


def products(names: Iterable[str]) -> list[list[str]]:
    """The names of parameters, those together that one product serves."""
    groups: dict[str, list[str]] = {}
    for name in names:
        *path, last, _ = name.split(".")
        [kind] = [group[0] for group in JOINED if last in group] or [last]
        groups.setdefault(".".join([*path, kind]), []).append(name)
    return list(groups.values())


def load(
    model: nn.Module,
    weights: Weights,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    compiled: bool = False,
) -> None:
    """Give `model`, whose parameters may be on the meta device, this rank's part of the weights, each in its final
    place and dtype: allocated once, or a view of the file where that is the same. With a scheme the matrices are
    quantized one by one, or read as they were saved in that scheme."""
    whole, final = shapes(args), {}
    mine = {name: weight.shape for name, weight in model.named_parameters()}
    total = sum(shape.numel() for shape in mine.values())
    quiet = None if rank() == 0 else True  # None: only on a terminal
    with tqdm(desc="loading", total=total, unit="weights", unit_scale=True, disable=quiet, leave=False) as bar:
        # cpu.cpp multiplies by several matrices at once; other kernels of quantized matrices have one each.
        apart = scheme is not None and not (compiled and world_size() == 1)
        for names in [[name] for name in mine] if apart else products(mine):
            rows = [mine[name][0] for name in names]
            ranges = {
                name: share(name, whole[name][shard_dim(name) or 0], args, rank(), world_size()) for name in names
            }
            if scheme and is_matrix(names[0]):
                parts = [read_quantized(weights, name, whole[name], *ranges[name], scheme) for name in names]
                matrix = kernel(stack(parts) if len(parts) > 1 else parts[0], device, compiled)
                ends = itertools.accumulate(rows)
                for name, size, end in zip(names, rows, ends, strict=True):
                    layer = model.get_submodule(name.removesuffix(".weight"))
                    del layer.weight
                    layer.weight = matrix if len(names) == 1 else Rows(matrix, end - size, end)  # type: ignore[assignment]
                del parts
                weights.release()
            else:
                place = empty((sum(rows), *mine[names[0]][1:]), dtype, device)
                for name, out in zip(names, place.split(rows), strict=True):
                    final[name] = weights.read(name, whole[name], *ranges[name], dtype, device, out)
            bar.update(sum(mine[name].numel() for name in names))
    model.load_state_dict(final, strict=True, assign=True)


def read_quantized(
    weights: Weights,
    name: str,
    shape: tuple[int, ...],
    begin: int,
    end: int,
    scheme: Scheme,
    search: bool = False,
) -> Quantized:
    """Rows or columns `begin` to `end`, counted along its `shard_dim`, of a matrix that is of `shape` as a whole: as it
    was saved in the scheme, or rounded to it here, a few rows at a time."""
    dim = shard_dim(name) or 0
    if weights.scheme:
        found = []
        for key, (stored, dtype) in weights.scheme.stored(name, shape).items():
            first, last = (
                (0, stored[0]) if shard_dim(key) is None else (n * stored[dim] / shape[dim] for n in (begin, end))
            )
            if first % 1 or last % 1:
                raise ValueError(f"{key} {stored} cannot be divided so: its groups are too large for so many ranks")
            found.append(weights.read(key, stored, int(first), int(last), dtype))
        return Quantized(*found)
    # A scale of int8 is one of a whole row, on however many ranks the row lies.
    first, last = (0, shape[1]) if dim == 1 and scheme.bits == 8 else (begin, end)
    part = [last - first if i == dim else n for i, n in enumerate(shape)]
    matrix = weights.read(name, shape, first, last, weights.dtype(), "cpu", torch.empty(part, dtype=weights.dtype()))
    rounded = stack([quantize(rows, scheme, search) for rows in matrix.split(256)])
    return rounded if (first, last) == (begin, end) else rounded._replace(q=rounded.q[:, begin:end])


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
    folder, parts = Path(ckpt_dir), split(state, mp)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
    names = ["params.json"]
    for i, part in enumerate(parts):
        names.append(f"consolidated.{i:02d}.pth")
        # clone: a view would take its whole storage with it into the file. Renamed when complete: a model that is in
        # use may be a view of the file of that name.
        new = folder / f".{names[-1]}.partial"
        torch.save({name: tensor.clone().contiguous() for name, tensor in part.items()}, new)
        new.replace(folder / names[-1])
    write_checklist(folder / "checklist.chk", [folder / name for name in names])


def write_checklist(path: Path, files: Iterable[Path], progress: Callable[[int], object] = lambda size: None) -> None:
    """The md5 sums of files in the same folder, in the format of md5sum; `progress` is told of bytes as in `digest`."""
    lines = [f"{digest(file, 'md5', progress)}  {file.name}\n" for file in files]
    path.write_text("".join(lines), encoding="utf-8")


def digest(path: Path, kind: str, progress: Callable[[int], object] = lambda size: None) -> str:
    """The md5 or sha256 sum of a file, read in blocks; `progress` is told the size of each."""
    sum = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            sum.update(block)
            progress(len(block))
    return sum.hexdigest()


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(str, names))
