"""Writing checkpoints: files and folders that get their names only when they are complete, and md5 sums."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..textfile import lock
from .files import open_file
from .plan import check_divides, shard_dim

LOCK = ".lock"  # a file in a folder that is being written, locked by the process that writes it
# Errors of a full disk, a file above the file system's limit, and a used-up quota.
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def split(state: Mapping[str, Tensor], mp: int) -> list[dict[str, Tensor]]:
    """The shards of a whole model for `mp` ranks."""
    for name, tensor in state.items():
        check_divides(name, tuple(tensor.shape), mp)
    shards = {name: shards_of(name, tensor, mp) for name, tensor in state.items()}
    return [{name: parts[rank] for name, parts in shards.items()} for rank in range(mp)]


def shards_of(name: str, tensor: Tensor, mp: int) -> Sequence[Tensor]:
    """A tensor's part in each of `mp` shards."""
    dim = shard_dim(name)
    return [tensor] * mp if dim is None else tensor.chunk(mp, dim)


def save(state: Mapping[str, Tensor], ckpt_dir: str | os.PathLike[str], params: Mapping[str, Any], mp: int = 1) -> None:
    """Write a whole model as a checkpoint of `mp` shards in Meta's layout, with params.json and checklist.chk."""
    folder, parts = Path(os.path.expanduser(ckpt_dir)), split(state, mp)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "params.json", params)
    names = ["params.json"]
    for i, part in enumerate(parts):
        names.append(f"consolidated.{i:02d}.pth")
        # clone: torch.save writes the whole storage of a view
        copies = {name: tensor.clone().contiguous() for name, tensor in part.items()}
        with writing(folder / names[-1], nbytes(copies)) as new:
            torch.save(copies, new)
    write_checklist(folder / "checklist.chk", [folder / name for name in names])


def write_checklist(path: Path, files: Iterable[Path], progress: Callable[[int], object] = lambda size: None) -> None:
    """Write the md5 sums of files in the same folder, in md5sum's format; `progress` is as in `digest`."""
    lines = [f"{digest(file, 'md5', progress)}  {file.name}\n" for file in files]
    write_file(path, "".join(lines).encode())


def digest(path: Path, kind: str, progress: Callable[[int], object] = lambda size: None) -> str:
    """The md5 or sha256 sum of a file, read in blocks. `progress` is called with the size of each block."""
    sum = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            sum.update(block)
            progress(len(block))
    return sum.hexdigest()


def write_file(path: Path, content: bytes | Mapping[str, Any]) -> None:
    """Write bytes, or a mapping as JSON, to a file. OSError names it."""
    if isinstance(content, Mapping):
        content = f"{json.dumps(content, ensure_ascii=False)}\n".encode()
    with writing(path, len(content)) as new:
        new.write_bytes(content)


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@contextmanager
def writing(path: Path, size: int) -> Iterator[Path]:
    """A new file of about `size` bytes, to be written in the block, which is renamed to `path` at its end. If the block
    fails, an old file at `path` stays; a running model may be a view of it. A full disk, which every library reports in
    its own way, raises an OSError that names the path and its size."""
    path = path.resolve()
    device = path.exists() and not path.is_file()  # such as /dev/null
    new = path if device else path.with_name(f".{path.name}.partial")
    try:
        yield new
        if not device:
            new.replace(path)
    except BaseException as error:
        if not device:
            new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno not in FULL:
            error.filename = str(path)
        elif isinstance(error, (OSError, RuntimeError, SafetensorError)):
            free = shutil.disk_usage(path.parent).free
            reason = str(error).split("\n")[0]  # torch's, of a full disk, is about a position
            reason = os.strerror(errno.ENOSPC) if isinstance(error, RuntimeError) and free < size else reason
            raise OSError(f"{path} needs {size:,} bytes and its disk has {free:,} free ({reason})") from error
        raise


def blank_file(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Create a .pth file of tensors with these shapes and dtypes, without values. Returns its tensors, memory-mapped:
    writing to them writes to the file."""
    with writing(path, nbytes(tensors)) as new:
        with torch.serialization.skip_data():
            torch.save(dict(tensors), new)
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process during a copy
            with new.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, new.stat().st_size)
    written = open_file(path)
    with path.open("r+b") as file:
        written.pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE)
    return {name: written.view(entry) for name, entry in written.tensors.items()}


def check_new(target: Path) -> None:
    """FileExistsError for a path that exists."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; nothing is overwritten, so give the name of a new folder")


@contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder for `size` bytes, `.NAME.partial` beside `target`, that is renamed to `target` at the end of the block,
    and removed if the block fails. What a killed run left there is removed first. A folder that no conversion created,
    or that another process writes, is an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise OSError(f"{target} needs {size:,} bytes and its disk has {free:,} free")
    folder = target.parent / f".{target.name}.partial"
    marker = folder / LOCK
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is in the way; it is not of a conversion, so move or remove it")
    folder.mkdir(exist_ok=True)
    with marker.open("wb") as file:
        if not lock(file):
            raise FileExistsError(f"{target} is being written by another process")
        if os.name == "nt":  # Windows neither removes an open file nor renames its folder
            file.close()
        try:
            check_new(target)  # another process may have created it meanwhile
            for old in folder.iterdir():
                if old != marker:
                    old.unlink()
            yield folder
            folder.rename(target)
            (target / LOCK).unlink()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
