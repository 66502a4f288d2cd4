"""One file of weights, torch's or safetensors': its header, and any slice of any tensor in it, memory-mapped."""

from __future__ import annotations

import collections
import functools
import io
import itertools
import json
import math
import mmap
import operator
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..textfile import mistaken
from . import hf

# Rotary frequencies, which older files carry and which follow from params.json.
IGNORED = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs|.*rotary_emb\.inv_freq")
MAP_NORESERVE = {"linux": 0x4000, "darwin": 0x40}.get(sys.platform, 0)  # the module mmap has no name for it
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
READABLE = set(SAFETENSORS_DTYPES.values())


STORAGES = {"BFloat16": torch.bfloat16, "Half": torch.float16, "Float": torch.float32, "Double": torch.float64}
STORAGES |= {"Char": torch.int8, "Byte": torch.uint8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64}


class TensorInfo(NamedTuple):
    """A tensor of a .pth file: its storage's dtype, record and number of elements, and where it is in there."""

    storage: tuple[torch.dtype, str, int]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def is_contiguous(self) -> bool:
        sizes = reversed([*itertools.accumulate((*self.shape[:0:-1],), operator.mul, initial=1)])
        return all(n < 2 or have == want for n, have, want in zip(self.shape, self.stride, sizes, strict=True))


class HeaderUnpickler(pickle.Unpickler):
    """Reads names and descriptions from the pickle in a .pth file. Only the names below are resolved; any other raises,
    so that nothing in the file is executed. torch's own reader, in Python, takes twenty times as long."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *rest: TensorInfo(storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and (kind := STORAGES.get(name.removesuffix("Storage"))) is not None:
            return kind
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        _, dtype, key, _, count = pid
        return dtype, key, count


def read_pth_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]] | None:
    """Shape, dtype and offset in the file of each tensor of a .pth file that can be mapped: an uncompressed archive in
    this machine's byte order, of contiguous tensors. None for any other file, which torch must read itself."""
    try:
        found, content = dict[str, tuple[int, int]](), b""
        with zipfile.ZipFile(path) as archive, path.open("rb", buffering=0) as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    return None
                name = info.filename.partition("/")[2]
                if name == "byteorder" and archive.read(info) != sys.byteorder.encode():
                    return None
                if name == "data.pkl":
                    content = archive.read(info)
                file.seek(info.header_offset + 26)  # lengths of the name and of an extra field before the content
                lengths = file.read(4)
                begin = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                found[name] = begin, info.file_size
        tensors = {}
        for name, tensor in HeaderUnpickler(io.BytesIO(content)).load().items():
            dtype, key, count = tensor.storage
            begin, size = found[f"data/{key}"]
            inside = 0 <= tensor.offset <= count - math.prod(tensor.shape)
            if size != count * dtype.itemsize or not inside or not tensor.is_contiguous() or type(name) is not str:
                return None
            tensors[name] = tuple(tensor.shape), dtype, begin + tensor.offset * dtype.itemsize
        return tensors
    except Exception:  # damage shows in any of a dozen types; torch, which then reads the file, says what is wrong
        return None


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one shard, mapped and not read where torch can. Nothing in the file is executed. ValueError if it
    is no shard."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=read_pth_header(path) is not None)
    except Exception as error:  # damage shows in any of a dozen types
        raise unreadable(path, error) from error
    plain = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not plain or not all(
        isinstance(tensor, Tensor) and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        for tensor in state.values()
    ):
        raise ValueError(f"{path} holds something else than named tensors")
    return state


def unreadable(path: Path, error: Exception) -> Exception:
    """A ValueError that names an unreadable file; an error such as PermissionError, which names it, as it is."""
    if isinstance(error, OSError) and type(error) is not OSError:
        return error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "weights_only" in str(error):  # torch goes on to recommend that the file be trusted
        reason = "it holds other things than tensors"
    with path.open("rb") as file:
        line = file.readline(100).strip()
    if line and line.isascii() and line.decode().isprintable():  # what a server says in place of a file
        reason = f"it is the text {line.decode()!r}"
    reason, do = mistaken(path) or (reason, "download it again")
    return ValueError(f"{path} ({path.stat().st_size:,} bytes) is not a readable shard; {do} ({reason})")


def identity(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class File:
    """A file of weights. Any slice can be read. Subclasses read the header."""

    def __init__(self, path: Path) -> None:
        self.path, self.state_of_file = path, identity(path.stat())
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.offsets: dict[str, int] = {}

    @functools.cached_property
    def pages(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            if identity(os.fstat(file.fileno())) != self.state_of_file:
                raise ValueError(f"{self.path} was replaced while it was read; load it again")
            if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            # NORESERVE: the file may be larger than memory
            return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)

    def read(self, name: str, dim: int, begin: int, length: int) -> Tensor:
        """`length` rows or columns of a tensor, from `begin` on: a view of the file's pages, which all processes share.
        Writing to it changes no file, and lasts until `release`. The file must not be cut while the view lives."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        first, rows = (begin, length) if dim == 0 else (0, shape[0])
        row = math.prod(shape[1:])
        start = self.offsets[name] + first * row * dtype.itemsize
        if start + rows * row * dtype.itemsize > len(self.pages):
            raise ValueError(f"{self.path} ends inside of {name}; download it again")
        part = torch.frombuffer(self.pages, dtype=dtype, offset=start, count=rows * row).view(rows, *shape[1:])
        return part if dim == 0 else part.narrow(dim, begin, length)

    def release(self) -> None:
        """Let what was read no longer count as memory of this process. Pages still in use are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)


class TorchFile(File):
    """One consolidated.NN.pth."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.state: dict[str, Tensor] = {}
        if tensors := read_pth_header(path):
            for name, found in tensors.items():
                if not IGNORED.fullmatch(name):
                    self.shapes[name], self.dtypes[name], self.offsets[name] = found
            return
        self.state = {name: tensor for name, tensor in read_shard(path).items() if not IGNORED.fullmatch(name)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.state.items()}

    def read(self, name: str, dim: int, begin: int, length: int) -> Tensor:
        return self.state[name].narrow(dim, begin, length) if self.state else super().read(name, dim, begin, length)

    def release(self) -> None:
        if not self.state:
            super().release()


class SafetensorsFile(File):
    """model.safetensors, or a part of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for key, entry, offset in read_header(path):
            self.shapes[key], self.offsets[key] = tuple(entry["shape"]), offset
            self.dtypes[key] = SAFETENSORS_DTYPES.get(entry["dtype"], torch.uint8)


class HuggingFaceFile(File):
    """A file of Hugging Face's, in either format. Its tensors have Meta's names here, and their rows are in Meta's
    order."""

    def __init__(self, path: Path, names: Mapping[str, str], head_dim: int) -> None:
        super().__init__(path)
        self.file: File = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
        self.head_dim, ours = head_dim, {theirs: meta for meta, theirs in names.items()}
        self.keys = {ours.get(key, key): key for key in self.file.shapes if not IGNORED.fullmatch(key)}
        self._describe()

    def _describe(self) -> None:
        self.shapes = {name: self.file.shapes[key] for name, key in self.keys.items()}
        self.dtypes = {name: self.file.dtypes[key] for name, key in self.keys.items()}
        self.offsets = {name: self.file.offsets.get(key, -1) for name, key in self.keys.items()}

    def tie(self) -> None:
        """Let the output matrix be the embeddings, if this file holds them."""
        if "tok_embeddings.weight" in self.keys:
            self.keys["output.weight"] = self.keys["tok_embeddings.weight"]
            self._describe()

    def read(self, name: str, dim: int, begin: int, length: int) -> Tensor:
        key = self.keys[name]
        if hf.is_permuted(name):
            first = begin - begin % self.head_dim  # rows are permuted within a head
            last = -(-(begin + length) // self.head_dim) * self.head_dim
            pairs = hf.to_pairs(self.file.read(key, dim, first, last - first), self.head_dim)  # a copy
            self.release()
            return pairs.narrow(0, begin - first, length)
        part = self.file.read(key, dim, begin, length)
        return part if dim == 0 else part[: self.shapes[name][0]]  # the vocabulary may have been cut

    def release(self) -> None:
        self.file.release()


def read_header(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Name, entry and offset in the file of every tensor of a safetensors file, after the library has checked it."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except Exception as error:
        raise unreadable(path, error) from error
    for key, entry in header.items():
        if key != "__metadata__":
            yield key, entry, 8 + size + entry["data_offsets"][0]
