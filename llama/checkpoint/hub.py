"""Folders of Hugging Face's as they are: ids and caches of the hub, and which files hold the weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .paths import NO_WEIGHTS, advice, check_path, listed, read_json

ID = re.compile(r"[\w.-]+/[\w.-]+")  # such as meta-llama/Llama-2-7b-hf
NEEDED = ["*.json", "*.jinja", "tokenizer.model", "*.safetensors", "pytorch_model*.bin"]
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")


def find_folder(value: Any, name: str) -> Path:
    """The folder of a checkpoint: a path, the top folder of a model in the hub's cache, or a model's id there, which
    huggingface_hub finds in its cache or downloads. FileNotFoundError or ValueError otherwise, which name the argument
    `name`."""
    if isinstance(value, str) and ID.fullmatch(value) and not os.path.lexists(value):
        return from_hub(value, name)
    folder = check_path(value, name, "folder")
    snapshots = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    if not snapshots or any((folder / file).is_file() for file in ("config.json", "params.json")):
        return folder
    main = folder / "refs" / "main"
    revision = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    chosen = [path for path in snapshots if path.name == revision] or snapshots
    if len(chosen) > 1:
        raise ValueError(f"{folder} has several snapshots and no refs/main: give {' or '.join(map(str, chosen))}")
    return chosen[0]


def from_hub(id: str, name: str) -> Path:
    """A model of the hub by its id, from the cache if it is there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        wanted = f"{name} {id} is not an existing folder"
        raise FileNotFoundError(f"{wanted}; an id of the hub needs the package huggingface_hub") from error
    try:
        try:
            found = Path(snapshot_download(id, local_files_only=True))
            if any(found.glob("*.safetensors")) or any(found.glob("*.bin")):
                return found
        except FileNotFoundError:  # not in the cache, or only a part of it
            pass
        return Path(snapshot_download(id, allow_patterns=NEEDED))
    except Exception as error:  # the package has dozens of types, of networks and of the hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{name} {id} is neither a folder nor a model that the hub gives: {reason}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before torch's format; of each an index that names only what is
    there, one file, or numbered parts that are all there; last variants, if there is one. FileNotFoundError names what
    is missing."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        for files in sets(folder, stem, kind):
            if files and all((folder / file).is_file() for file in files):
                return [folder / file for file in files]
    indexed = named(folder / "model.safetensors.index.json") or ["model.safetensors"]
    missing = [file for file in indexed if not (folder / file).is_file()]
    again = "download it again"
    do = again if len(missing) < len(indexed) else advice(folder, NO_WEIGHTS, again)
    raise FileNotFoundError(f"{folder} lacks {listed(missing)}; {do}")


def sets(folder: Path, stem: str, kind: str) -> Iterator[list[str]]:
    """The sets of files that may hold all weights, by their names."""
    yield named(folder / f"{stem}.{kind}.index.json")
    yield [f"{stem}.{kind}"]
    present = sorted(path.name for path in folder.glob(f"{stem}[.-]*.{kind}"))
    parts: dict[tuple[str, str], list[str]] = {}
    for name in present:
        if match := PART.fullmatch(name):
            parts.setdefault((match[1], match[3]), []).append(name)
    whole = {first: names for (first, count), names in parts.items() if len(names) == int(count)}
    if stem in whole:
        yield whole.pop(stem)
    alone = {name: [name] for name in present if not PART.fullmatch(name) and name != f"{stem}.{kind}"}
    variants = [*whole.values(), *alone.values()]
    if len(variants) > 1:
        raise ValueError(f"{folder} has several variants of the weights: {listed(v[0] for v in variants)}; keep one")
    yield from variants


def named(index: Path) -> list[str]:
    """The files that an index names; none if there is no index."""
    if not index.is_file():
        return []
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{index} has no weight_map from the names of weights to files; download it again")
    return sorted(set(found.values()))
