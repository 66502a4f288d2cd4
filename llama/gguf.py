"""Headers of GGUF files, llama.cpp's format: the keys, and where each tensor is. Every length in a header is checked
before anything is read or allocated by it.

Numbers are little-endian. A file is: "GGUF", a version, the numbers of tensors and keys; the keys, each a name, a type
and a value; a description of each tensor; and, from the next multiple of general.alignment on, the tensors' data.
Source: the specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .textfile import mistaken


class BlockType(NamedTuple):
    """A type of tensors, whose rows consist of blocks."""

    name: str
    values: int  # in a block
    nbytes: int  # of a block

    def size(self, shape: Sequence[int]) -> int:
        """The bytes of a tensor."""
        return math.prod(shape) // self.values * self.nbytes


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
OTHER = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
OTHER |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
OTHER |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SPLIT = re.compile(r"(.+)-(\d{5})-of-(?!0{5})(\d{5})\.gguf")  # the name of one of several files


class TensorEntry(NamedTuple):
    type: BlockType
    shape: tuple[int, ...]  # outermost first
    offset: int  # in the file


class Gguf(NamedTuple):
    """A header."""

    keys: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file. ValueError names the file and what is wrong with it."""
    size = path.stat().st_size
    try:
        if not size:
            raise ValueError("it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Header(data).read()
    except (ValueError, struct.error) as error:  # struct: the file ends inside of a number
        reason = str(error) if isinstance(error, ValueError) else "its header is cut"
        if (found := mistaken(path)) and found[0] != "it is a GGUF file":
            reason = "; ".join(found)
        raise ValueError(f"{path} ({size:,} bytes) is not a GGUF file that can be read: {reason}") from error


class Header:
    """A reader of a file's header, from the position of the mapped file on."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data

    def read(self) -> Gguf:
        if (start := self.data.read(4)) != b"GGUF":
            raise ValueError(f"it begins with {start!r}")
        version = self.number("I")
        if version not in (2, 3):
            order = " in big-endian order" if version in (2 << 24, 3 << 24) else ""
            raise ValueError(f"it has version {version}{order}; versions 2 and 3 are read")
        tensors, keys = self.count("tensors", 24), self.count("keys", 13)
        found: dict[str, Any] = {}
        for _ in range(keys):
            name = self.string()
            if name in found:
                raise ValueError(f"it has the key {name} twice")
            found[name] = self.value(self.number("I"), name)
        return Gguf(found, self.tensors(tensors, found.get("general.alignment", 32)))

    def number(self, form: str) -> Any:
        return self.numbers(form, 1)[0]

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{form}", self.data.read(struct.calcsize(form) * count))

    def count(self, of: str, least: int) -> int:
        """A count of items of at least `least` bytes each. ValueError if the rest of the file is shorter."""
        count: int = self.number("Q")
        if count * least > len(self.data) - self.data.tell():
            raise ValueError(f"it is too short for {count:,} {of}")
        return count

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        data, at, end, size_at = self.data, self.data.tell(), len(self.data), struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):  # a tokenizer has 400,000 of them: slices are twice as fast as reads
            [size] = size_at(data, at)
            at += 8 + size
            if at > end:
                raise ValueError(f"it is too short for {size:,} bytes of a string")
            found.append(data[at - size : at].decode())
        data.seek(at)
        return found

    def value(self, kind: int, name: str) -> Any:
        if kind == STRING:
            return self.string()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise ValueError(f"the key {name} has the unknown type {kind}")
        kind = self.number("I")
        if kind == STRING:
            return self.strings(self.count(f"strings of {name}", 8))
        if kind not in NUMBERS:
            raise ValueError(f"the key {name} is an array of type {kind}")
        form = NUMBERS[kind]
        return list(self.numbers(form, self.count(f"numbers of {name}", struct.calcsize(form))))

    def tensors(self, count: int, alignment: Any) -> dict[str, TensorEntry]:
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise ValueError(f"general.alignment is {alignment!r}, which is not a multiple of 8")
        entries = [self.entry() for _ in range(count)]
        begin = aligned(self.data.tell(), alignment)
        found, end, last = dict[str, TensorEntry](), begin, "the header"
        for name, kind, shape, offset in sorted(entries, key=lambda entry: entry[3]):
            if name in found:
                raise ValueError(f"it has the tensor {name} twice")
            if offset % alignment:
                raise ValueError(f"the tensor {name} has the offset {offset}, no multiple of {alignment}")
            if begin + offset < end:
                raise ValueError(f"the tensor {name} overlaps {last}")
            last, end = name, begin + offset + kind.size(shape)
            if end > len(self.data):
                raise ValueError(f"it ends inside of {name}; download it again")
            found[name] = TensorEntry(kind, shape, begin + offset)
        return {name: found[name] for name, *_ in entries}

    def entry(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name, dimensions = self.string(), self.number("I")
        if dimensions > 4:
            raise ValueError(f"the tensor {name} has {dimensions} dimensions; 4 are the most")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        number, offset = self.number("I"), self.number("Q")
        if number not in TYPES:
            raise ValueError(
                f"the tensor {name} is of type {OTHER.get(number, number)}; "
                f"the types {', '.join(kind.name for kind in TYPES.values())} are read"
            )
        if not shape or 0 in shape or shape[-1] % TYPES[number].values:
            raise ValueError(f"the tensor {name} of type {TYPES[number].name} has the shape {shape}")
        return name, TYPES[number], shape, offset


def split_files(path: Path) -> list[Path]:
    """All files of a model, given one of them. FileNotFoundError names those that are missing."""
    if not (match := SPLIT.fullmatch(path.name)):
        return [path]
    count = int(match[3])
    files = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{path.parent} lacks {', '.join(missing[:5])} of {count} files; download it again")
    return files


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name or its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"


def header_bytes(keys: Mapping[str, Any], tensors: Mapping[str, tuple[BlockType, Sequence[int]]]) -> bytes:
    """A header of version 3, up to where the data begins. Tensors follow in order, aligned to 32 bytes."""
    numbers = {kind: number for number, kind in TYPES.items()}
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for name, value in keys.items():
        parts += [string_bytes(name), value_bytes(value)]
    offset = 0
    for name, (kind, shape) in tensors.items():
        parts += [string_bytes(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        parts.append(struct.pack("<IQ", numbers[kind], offset))
        offset += aligned(kind.size(shape))
    header = b"".join(parts)
    return header.ljust(aligned(len(header)), b"\0")


def aligned(size: int, to: int = 32) -> int:
    return -(-size // to) * to


def string_bytes(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def value_bytes(value: Any) -> bytes:
    """The type and the value of a key: a bool, unsigned int, float or str, or a list of signed ints, floats or str."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + string_bytes(value)
    if isinstance(value, list):
        kind = {str: STRING, int: 5, float: 6}[type(value[0]) if value else str]
        items = map(string_bytes, value) if kind == STRING else [struct.pack(f"<{len(value)}{NUMBERS[kind]}", *value)]
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)
    kind = {bool: 7, int: 4, float: 6}[type(value)]
    return struct.pack(f"<I{NUMBERS[kind]}", kind, value)
