"""Paths that a caller gives, text files and JSON files: checked, and named when something is wrong."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal


def check_path(value: Any, name: str, kind: Literal["file", "folder"]) -> Path:
    """`value` as the path of an existing file or folder. FileNotFoundError or ValueError otherwise, which name the
    argument `name`."""
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


def find_tokenizer(ckpt_dir: Path, tokenizer_path: str | os.PathLike[str] | None) -> Path:
    """The tokenizer's file: `tokenizer_path` if given, else tokenizer.model in the checkpoint's folder or one folder
    up. FileNotFoundError if there is none."""
    if tokenizer_path is not None:
        return check_path(tokenizer_path, "tokenizer_path", "file")
    folders = dict.fromkeys([ckpt_dir, ckpt_dir.absolute().parent, ckpt_dir.resolve().parent])
    for folder in folders:
        if (path := folder / "tokenizer.model").is_file():
            return path
    raise FileNotFoundError(f"no tokenizer.model in {' or '.join(map(str, folders))}; give tokenizer_path")


def read_text(path: Path) -> str:
    """The text of a file, as any program may have saved it: in UTF-8, or in UTF-16 with its byte order mark, and with
    lines that end in \\r\\n. ValueError names a file of another encoding."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object in a file, or with `kind` list a list. ValueError names a file that holds none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, kind):
        wanted = "an object of keys and values" if kind is dict else "a list"
        raise ValueError(f"{path} holds {type(content).__name__} and not {wanted}")
    return content


def listed(names: Iterable[object]) -> str:
    """Names for an error message."""
    return ", ".join(map(str, names))
