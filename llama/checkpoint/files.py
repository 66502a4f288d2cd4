"""One file of weights, torch's or safetensors': its header, and any slice of any tensor in it, memory-mapped."""

from __future__ import annotations

import collections
import io
import json
import math
import mmap
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..backends.quantized import GROUPS, MATRICES, Quantized, Scheme, Schemes
from ..textfile import mistaken
from . import hf
from .paths import listed

# RoPE frequencies in older files, which follow from params.json.
IGNORED = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs|.*rotary_emb\.inv_freq")
MAP_NORESERVE = {"linux": 0x4000, "darwin": 0x40}.get(sys.platform, 0)  # the module mmap has no name for it
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
READABLE = set(SAFETENSORS_DTYPES.values())
# Of quantized matrices.
SAFETENSORS_DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
SAFETENSORS_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
STORAGES = {"BFloat16": torch.bfloat16, "Half": torch.float16, "Float": torch.float32, "Double": torch.float64}
STORAGES |= {"Char": torch.int8, "Byte": torch.uint8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64}
AT_ONCE = 2**20  # values of a packed matrix that are read at a time
# The globals that the pickle in a .pth file may import, and what stands in for each.
RESOLVED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda *parts: parts[:4],  # storage, offset, shape, stride
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    **{("torch", f"{name}Storage"): dtype for name, dtype in STORAGES.items()},
}


class Packed(NamedTuple):
    """How a matrix is stored that is not in floats."""

    kind: str  # in words
    scheme: Scheme | None  # of the quantized matrix with the same values; None: it is read as floats
    rows: Callable[[int, int], Quantized | Tensor]  # reads rows `begin` to `end`; `begin` is a multiple of 8


class Entry(NamedTuple):
    """A tensor of a file."""

    key: str  # its name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype  # bool or uint8 for one that cannot be read
    offset: int  # in the file; the address of a tensor that torch has read
    packed: Packed | None = None


class HeaderUnpickler(pickle.Unpickler):
    """Reads names and descriptions from the pickle in a .pth file. Any name that is not in `RESOLVED` raises, so that
    nothing in the file is executed. torch's own reader, in Python, takes twenty times as long."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in RESOLVED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return RESOLVED[module, name]

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        _, dtype, key, _, count = pid
        return dtype, key, count


def read_pth_header(path: Path) -> dict[str, Entry] | None:
    """The tensors of a .pth file that can be mapped: an uncompressed archive in this machine's byte order, of
    contiguous tensors. None for any other file, which torch must read itself."""
    try:
        tensors = {}
        with zipfile.ZipFile(path) as archive, path.open("rb", buffering=0) as file:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                return None
            if "byteorder" in records and archive.read(records["byteorder"]) != sys.byteorder.encode():
                return None
            content = HeaderUnpickler(io.BytesIO(archive.read(records["data.pkl"]))).load()
            for name, ((dtype, key, count), first, shape, stride) in content.items():
                record = records[f"data/{key}"]
                contiguous = torch.empty_strided(shape, stride, device="meta").is_contiguous()
                inside = 0 <= first <= count - math.prod(shape) and record.file_size == count * dtype.itemsize
                if not inside or not contiguous or type(name) is not str:
                    return None
                file.seek(record.header_offset + 26)  # lengths of the name and of an extra field before the data
                begin = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                tensors[name] = Entry(name, tuple(shape), dtype, begin + first * dtype.itemsize)
        return tensors
    except Exception:  # damage shows in any of a dozen types; torch, which then reads the file, says what is wrong
        return None


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, read by torch, which executes nothing in it. ValueError for any other content."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in any of a dozen types
        raise unreadable(path, error) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_cpu
        for name, tensor in state.items()
    ):
        raise ValueError(f"{path} contains something other than named tensors")
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
    """A key that changes when a file is replaced or written to."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class File:
    """A memory-mapped file of weights. Any slice of its tensors can be read."""

    head_dim = 0  # set for a Hugging Face file, whose rows of wq and wk are in another order: see `hf.to_pairs`

    def __init__(self, path: Path, tensors: Mapping[str, Entry]) -> None:
        self.path, self.state_of_file = path, identity(path.stat())
        self.tensors = {name: entry for name, entry in tensors.items() if not IGNORED.fullmatch(name)}

    @cached_property
    def pages(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            if identity(os.fstat(file.fileno())) != self.state_of_file:
                raise ValueError(f"{self.path} was replaced while it was read; load it again")
            if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            # NORESERVE: the file may be larger than memory
            return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)

    def read(self, name: str, dim: int, begin: int, end: int) -> Tensor:
        """Rows or columns `begin` to `end`, along `dim`, of a tensor: a view of the file's pages, which processes
        share, or a copy where rows are in another order. Writing to it does not change the file, and is lost at
        `release`. The file must not be truncated while the view is in use."""
        entry, head = self.tensors[name], self.head_dim
        if dim == 1:
            return self.view(entry)[:, begin:end]
        if not (head and hf.is_permuted(name)):
            return self.view(entry, begin, end)
        first, last = begin - begin % head, -(-end // head) * head  # rows are permuted within a head
        pairs = hf.to_pairs(self.view(entry, first, last), head)  # a copy
        self.release()
        return pairs[begin - first : end - first]

    def view(self, entry: Entry, begin: int = 0, end: int | None = None) -> Tensor:
        """A tensor, or its rows `begin` to `end`, in the order of the file: a view of the pages of these rows alone."""
        key, shape, dtype, offset, _ = entry
        row, end = math.prod(shape[1:]), shape[0] if end is None else end
        if offset + shape[0] * row * dtype.itemsize > len(self.pages):
            raise ValueError(f"{self.path} ends inside of {key}; download it again")
        at, count = offset + begin * row * dtype.itemsize, (end - begin) * row
        return torch.frombuffer(self.pages, dtype=dtype, offset=at, count=count).view(-1, *shape[1:])

    def unpacked(self, name: str, dim: int, begin: int, end: int) -> Iterator[Quantized | Tensor]:
        """Rows or columns `begin` to `end`, along `dim`, of a packed matrix, some rows at a time: floats if it has no
        scheme. ValueError for columns that divide groups into parts of fewer than 16."""
        (out, columns), packed = self.tensors[name].shape, self.tensors[name].packed
        assert packed is not None
        group = packed.scheme.group if packed.scheme else 0
        if dim == 1 and group and math.gcd(group, begin, end) < GROUPS[0]:
            of = f"{name} {(out, columns)} of {packed.kind}"
            raise ValueError(f"{of} cannot be divided at columns {begin} and {end}")
        first, last = (begin, end) if dim == 0 else (0, out)
        head = self.head_dim if hf.is_permuted(name) else 0

        def chosen(part: Tensor, start: int) -> Tensor:
            return (hf.to_pairs(part, head) if head else part)[max(first - start, 0) : last - start]

        unit = math.lcm(8, head or 1)  # rows are permuted within a head
        step = unit * max(1, AT_ONCE // (columns * unit))
        for start in range(first - first % unit, last, step):
            rows, choose = packed.rows(start, min(start + step, out)), partial(chosen, start=start)
            if isinstance(rows, Quantized):
                yield rows.map(choose) if dim == 0 else rows.map(choose).columns(begin, end)
            else:
                yield choose(rows) if dim == 0 else choose(rows)[:, begin:end]

    def release(self) -> None:
        """Drop the pages that were read from this process's resident memory. Those in use are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)


class LoadedFile(File):
    """A .pth file that cannot be mapped, such as torch's format before 1.6. torch reads all of it."""

    def __init__(self, path: Path) -> None:
        self.state = read_shard(path)
        super().__init__(path, {k: Entry(k, tuple(t.shape), t.dtype, t.data_ptr()) for k, t in self.state.items()})

    def view(self, entry: Entry, begin: int = 0, end: int | None = None) -> Tensor:
        return self.state[entry.key].flatten()[: math.prod(entry.shape)].view(entry.shape)[begin:end]

    def release(self) -> None:
        pass


def schemes(files: Sequence[File]) -> Schemes | None:
    """The schemes of a model's matrices; None if none is quantized."""
    found, kinds = dict[str, Scheme](), set[str]()
    for file in files:
        for name, (*_, packed) in file.tensors.items():
            if packed and packed.scheme and name.removesuffix(".weight").split(".")[-1] in MATRICES:
                found[name] = packed.scheme
                kinds.add(packed.kind)
    return Schemes(found, listed(sorted(kinds))) if found else None


def open_file(path: Path) -> File:
    """Open a .safetensors file, or else a .pth file. ValueError if it cannot be read."""
    if path.suffix == ".safetensors":
        return File(path, read_safetensors_header(path))
    tensors = read_pth_header(path)
    return LoadedFile(path) if tensors is None else File(path, tensors)


def read_safetensors_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, after the library has checked it."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except Exception as error:
        raise unreadable(path, error) from error
    header.pop("__metadata__", None)
    return {
        key: Entry(
            key,
            tuple(entry["shape"]),
            SAFETENSORS_DTYPES.get(entry["dtype"], torch.bool),
            8 + size + entry["data_offsets"][0],
        )
        for key, entry in header.items()
    }
