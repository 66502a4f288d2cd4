"""Text and JSON files, what was saved in place of an expected file, and locks of files."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import IO, Any

# Patterns of the first bytes of files that are often saved instead of the expected one: what they are, what to do.
MISTAKEN = {
    b"version https://git-lfs": ("it is a git-lfs pointer", "run git lfs pull where it was cloned"),
    rb"<[!?a-zA-Z]": ("it is a web page", "download it again"),
    b"GGUF": ("it is a GGUF file", "give its path, which ends with .gguf, as ckpt_dir"),
    rb"\x1f\x8b": ("it is compressed", "decompress it with gunzip"),
    rb"\{\s*\"": ("it is JSON", "take the file itself"),
}


def mistaken(path: Path) -> tuple[str, str] | None:
    """If a file's first bytes are those of another kind of file: what it is, and what to do. Else None."""
    with path.open("rb") as file:
        start = file.read(200).removeprefix(codecs.BOM_UTF8).lstrip()
    return next((found for pattern, found in MISTAKEN.items() if re.match(pattern, start)), None)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; \\r\\n becomes \\n. ValueError names a file of
    another encoding."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """For each line of JSON that is not blank: where it is, such as "FILE, line 3" for error messages, and its value.
    ValueError names a line that is not JSON."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append((f"{path}, line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return found


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object in a file, or with kind=list the list. ValueError names a file that does not hold one."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        found = mistaken(path)
        reason = "; ".join(found) if found and found[0] != "it is JSON" else str(error)
        raise ValueError(f"{path} is not JSON: {reason}") from error
    if not isinstance(content, kind):
        wanted = "an object of keys and values" if kind is dict else "a list"
        raise ValueError(f"{path} contains a {type(content).__name__}, not {wanted}")
    return content


def read_optional_json(path: Path) -> Any:
    """The JSON object in a file; {} if there is no such file."""
    return read_json(path) if path.is_file() else {}


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends. If another process has locked it, return False, or
    with `wait` wait for it. Always true on Windows, which has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
