"""A checkpoint -> a new folder, in Meta's layout for any number of ranks or in Hugging Face's.

One tensor of the source is in memory at a time, and of the target what one file of Hugging Face's holds (Meta's are
filled through a mapping), so that the largest model converts on a small machine. The folder gets its name when it is
complete: until then it is `.NAME.partial` beside it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from . import hf
from .backends.quantized import Scheme
from .checkpoint import Checkpoint, is_matrix, read_quantized, shapes, shard_dim, write_checklist
from .model import ModelArgs
from .tokenizer import Tokenizer

Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # names of tensors, their shapes and dtypes
LOCK = ".lock"  # a file in a folder that is being written, locked by who writes it
HF_FILE = 2 * 10**9  # bytes of one model-0000n-of-0000m.safetensors, which are in memory together


def convert(
    source: Path,
    target: Path,
    to: str,
    mp: int,
    dtype: torch.dtype | None,
    tokenizer_path: Path,
    quantize: str | None = None,
    group_size: int = 64,
    search: bool = True,
) -> None:
    """Write the checkpoint in `source` to a new folder: `to` is meta, for `mp` ranks, its matrices quantized or not, or
    hf. With `search` the ranges of int4 groups are looked for, which takes ten times as long as rounding.

    Raises FileExistsError for a `target` that exists, OSError when the disk is too small and ValueError for a model
    that cannot be divided into `mp` shards or quantized so.
    """
    if to not in ("meta", "hf"):
        raise ValueError(f"to is {to!r}; it must be meta or hf")
    target = Path(os.path.abspath(target))
    check_new(target)
    tokenizer = Tokenizer(tokenizer_path)
    checkpoint = Checkpoint(source)
    args = checkpoint.args(tokenizer.n_words)
    dtype = dtype or checkpoint.dtype()
    scheme = checkpoint.scheme_for(quantize, group_size)
    if scheme and to == "hf":
        raise ValueError(
            f"Hugging Face's layout has no place for {scheme}; write Meta's, or give an unquantized source"
        )
    stored = {name: layout(name, shape, dtype, scheme) for name, shape in shapes(args).items()}
    if to == "meta":
        check_divides(stored, mp)
    size = sum(torch.Size(shape).numel() * kind.itemsize for parts in stored.values() for shape, kind in parts.values())
    with new_folder(target, size) as folder, tqdm(total=2 * size, unit="B", unit_scale=True, disable=None) as bar:
        shutil.copy(tokenizer_path, folder / "tokenizer.model")
        if to == "meta":
            write_meta(checkpoint, args, folder, mp, stored, scheme, search, bar)
        else:
            write_hf(checkpoint, args, folder, dtype, bar)
            pieces = [tokenizer.sp_model.id_to_piece(i) for i in range(tokenizer.n_words)]
            write_json(folder, hf.tokenizer_files(pieces))
        written = sorted(file for file in folder.iterdir() if file.name != LOCK)
        write_checklist(folder / "checklist.chk", written, bar.update)


def check_new(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; nothing is overwritten, so give the name of a new folder")


def layout(name: str, shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme | None) -> Stored:
    """The tensors that a weight is stored as."""
    return scheme.stored(name, shape) if scheme and is_matrix(name) else {name: (shape, dtype)}


def check_divides(stored: Mapping[str, Stored], mp: int) -> None:
    for name, (shape, _) in ((name, what) for parts in stored.values() for name, what in parts.items()):
        dim = shard_dim(name)
        if type(mp) is not int or mp < 1 or (dim is not None and shape[dim] % mp):
            raise ValueError(f"{name} {shape} cannot be divided into mp {mp!r} shards along dimension {dim}")


@contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder for `size` bytes that gets its name at the end of the block, and is removed when the block fails. What a
    killed run left behind is removed too; what is not such a thing, or what another run fills, is not touched."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise OSError(f"{target} needs {size:,} bytes and its disk has {free:,} free")
    folder = target.parent / f".{target.name}.partial"
    lock = folder / LOCK
    if folder.exists() and not lock.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is in the way; it is not of a conversion, so move or remove it")
    folder.mkdir(exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError as error:
            raise FileExistsError(f"{target} is being written by another process") from error
        try:
            check_new(target)  # it may have been finished just now
            for old in folder.iterdir():
                if old != lock:
                    old.unlink()
            yield folder
            folder.rename(target)
            (target / LOCK).unlink()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_meta(
    checkpoint: Checkpoint,
    args: ModelArgs,
    folder: Path,
    mp: int,
    stored: Mapping[str, Stored],
    scheme: Scheme | None,
    search: bool,
    bar: Any,
) -> None:
    whole = shapes(args)
    said = {"quantization": scheme.params()} if scheme else {}
    write_json(folder, {"params.json": checkpoint.params | said})
    for rank in range(mp):
        parts = {}
        for name, (shape, dtype) in ((name, what) for tensors in stored.values() for name, what in tensors.items()):
            dim = shard_dim(name)
            parts[name] = torch.empty([n // mp if i == dim else n for i, n in enumerate(shape)], dtype=dtype)
        file = blank_file(parts, folder / f"consolidated.{rank:02d}.pth")
        for name, shape in whole.items():
            size = shape[shard_dim(name) or 0]  # of a key-value head too, where there are more shards than heads
            begin, end = (0, size) if shard_dim(name) is None else (rank * size // mp, (rank + 1) * size // mp)
            places = [file[key] for key in stored[name]]
            if scheme and is_matrix(name):
                found = [
                    part
                    for part in read_quantized(checkpoint, name, shape, begin, end, scheme, search)
                    if part is not None
                ]
            else:
                found = [checkpoint.read(name, shape, begin, end, places[0].dtype)]
            for place, part in zip(places, found, strict=True):
                place.copy_(part)
                bar.update(place.nbytes)


def blank_file(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A file of tensors like these, which are never looked at, and its own as they lie in it: to write to them is to
    write to the disk."""
    with torch.serialization.skip_data():
        torch.save(dict(tensors), path)
    if hasattr(os, "posix_fallocate"):  # otherwise a full disk would end the process in the middle of a copy
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, mmap=True, weights_only=True)


def write_hf(checkpoint: Checkpoint, args: ModelArgs, folder: Path, dtype: torch.dtype, bar: Any) -> None:
    whole, names = shapes(args), hf.names(args.n_layers)
    groups: list[list[str]] = [[]]
    room = HF_FILE
    for name, shape in whole.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes > room and groups[-1]:
            groups.append([])
            room = HF_FILE
        groups[-1].append(name)
        room -= nbytes
    index: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in group:
            tensor = checkpoint.read(name, whole[name], 0, whole[name][shard_dim(name) or 0], dtype)
            if hf.is_rotated(name):
                tensor = hf.to_halves(tensor, args.head_dim).contiguous()
            if any(tensor.data_ptr() == other.data_ptr() for other in tensors.values()):
                tensor = tensor.clone()  # tied: the format does not know two names of one tensor
            tensors[names[name]] = tensor
            bar.update(tensor.nbytes)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    config = hf.config(checkpoint.params, args.ffn_hidden, args.vocab_size, str(dtype).removeprefix("torch."))
    write_json(folder, {"config.json": config, "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2}})
    if len(groups) > 1:
        total = sum(torch.Size(shape).numel() for shape in whole.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder, {"model.safetensors.index.json": content})


def write_json(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
