"""Checks of paths that a caller gives, and error messages that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ..gguf import is_gguf
from ..textfile import mistaken, read_optional_json

ROLES = ["<unk>", "<s>", "</s>"]  # tokens that every tokenizer.model of Llama 2's kind has
ROLES += ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]  # and Code Llama's
# For a folder that lacks its config or its weights: a pattern of files that it may have instead, and what to do.
FOREIGN = {
    "adapter_config.json": "it is the folder of a LoRA adapter: give the folder of its model, and this one as lora",
    "*.gguf": "give the path of one of the GGUF files: {}",
}
NO_CONFIG = {
    **FOREIGN,
    "consolidated.*.pth": "download params.json, which belongs to {}",
    "*.safetensors": "download config.json, which belongs to {}",
    "*/params.json": "give {}",
    "*/config.json": "give {}",
    "*/snapshots/*/config.json": "it is a folder of downloads from Hugging Face: give {}",
}
NO_WEIGHTS = {
    "model*-of-*": "download the other parts of {} too",
    "pytorch_model*-of-*": "download the other parts of {} too",
    "consolidated.*.pth": "download params.json, which belongs to {}",
    **FOREIGN,
}


def advice(folder: Path, cases: Mapping[str, str], otherwise: str = "is it the folder of a checkpoint?") -> str:
    """What to do about an incomplete folder: by the first pattern of `cases` that matches a file in it."""
    for pattern, words in cases.items():
        if found := sorted(folder.glob(pattern)):
            names = [str(path.parent) if "/" in pattern else path.name for path in found]
            return words.format(" or ".join(names[:3]))
    return otherwise


def check_path(value: Any, name: str, kind: Literal["file", "folder"]) -> Path:
    """`value`, with `~` expanded, as the path of an existing file or folder. FileNotFoundError or ValueError otherwise,
    which name the argument `name`."""
    if not isinstance(value, (str, os.PathLike)):  # a flag without a value arrives as True
        raise ValueError(f"{name} is {value!r}; it must be the path of a {kind}")
    path = Path(os.path.expanduser(value))
    if str(value) and (path.is_dir() if kind == "folder" else path.is_file()):
        return path
    # A command of several lines pasted on one turns its backslash, line end and "--flag" into the word " --flag".
    if str(value) != str(value).strip() or str(value).startswith("--") or not str(value):
        raise ValueError(
            f"{name} is {str(value)!r}, which looks like a flag and not like the path of a {kind}; "
            "remove the backslashes of a command that was pasted on one line"
        )
    found = "folder" if path.is_dir() else "file" if path.is_file() else "pipe or device"
    other = f" but a {found}" if path.exists() else ""
    raise FileNotFoundError(f"{name} {path} is not an existing {kind}{other}")


def find_tokenizer(ckpt_dir: Path, tokenizer_path: str | os.PathLike[str] | None) -> Path:
    """The tokenizer's file: `tokenizer_path` if given, else tokenizer.model in the checkpoint's folder, tokenizer.json
    where that is alone or has more tokens, or tokenizer.model one folder up. FileNotFoundError if there is none."""
    folders = dict.fromkeys([ckpt_dir, ckpt_dir.absolute().parent, ckpt_dir.resolve().parent])
    paths = [folder / "tokenizer.model" for folder in folders]
    paths.insert(0 if added_tokens(ckpt_dir) else 1, ckpt_dir / "tokenizer.json")
    if is_gguf(ckpt_dir):
        paths = [ckpt_dir]
    if tokenizer_path is not None:
        paths = [check_path(tokenizer_path, "tokenizer_path", "file")]
    if not (found := [path for path in paths if path.is_file()]):
        raise FileNotFoundError(f"no tokenizer.model in {' or '.join(map(str, folders))}; give tokenizer_path")
    wrong = None if is_gguf(found[0]) else mistaken(found[0])
    if wrong and not (wrong[0] == "it is JSON" and found[0].suffix == ".json"):
        raise ValueError(f"{found[0]} is not a tokenizer.model; {wrong[1]} ({wrong[0]})")
    return found[0]


def added_tokens(folder: Path) -> list[str]:
    """Tokens, other than padding, that a Hugging Face folder adds to those of its tokenizer.model."""
    found = list(read_optional_json(folder / "added_tokens.json"))
    tokens = read_optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(tokens, dict):
        found += [token.get("content") for token in tokens.values() if isinstance(token, dict)]
    return [token for token in found if isinstance(token, str) and token not in ROLES and "pad" not in token.lower()]


def listed(names: Iterable[object]) -> str:
    """Names, separated by commas, for an error message."""
    return ", ".join(map(str, names))
