"""The plan of docs/design.md, held against the code."""

import ast
import subprocess
import sys

import pytest
from small import ROOT

# Which rooms of llama/ a room may know.
MAY_IMPORT = {
    "tokenizer": set(),
    "sampling": set(),
    "parallel": set(),
    "layers": {"cpp", "parallel"},
    "model": {"layers", "parallel"},
    "decode": {"cpp", "fused", "layers", "model", "parallel"},
    "files": {"hf"},
    "fused": set(),
    "cpp": {"parallel"},
    "lookup": set(),
    "text": {"tokenizer"},
    "options": {"sampling"},
    "quantization": {"cpp", "fused", "parallel"},
    "checkpoint": {"files", "hf", "model", "parallel", "quantization"},
    "chat": {"tokenizer"},
    "hf": set(),
    "script": {"parallel"},
    "memory": {"checkpoint", "model", "quantization"},
    "convert": {"checkpoint", "hf", "model", "quantization", "tokenizer"},
    "bench": {"checkpoint", "engine", "layers", "model", "parallel", "quantization"},
    "peers": {"bench", "checkpoint", "hf", "model", "quantization"},
    "__main__": {
        "bench",
        "checkpoint",
        "convert",
        "generation",
        "memory",
        "model",
        "parallel",
        "peers",
        "quantization",
        "score",
        "script",
        "terminal",
        "tokenizer",
    },
    "engine": {"cpp", "decode", "lookup", "model", "parallel", "sampling"},
    "generation": {
        "chat",
        "checkpoint",
        "engine",
        "memory",
        "model",
        "options",
        "parallel",
        "score",
        "stream",
        "text",
        "tokenizer",
    },
    "score": {"decode", "engine", "model"},
    "session": {"chat", "generation", "options", "parallel", "stream"},
    "terminal": {"generation", "parallel", "session"},
    "stream": {"chat", "parallel"},
    "__init__": {"chat", "generation", "model", "session", "stream", "tokenizer"},
}


def imported_rooms(path):
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("llama")):
            module = (node.module or "").removeprefix("llama").strip(".")
            rooms |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {name.name.split(".")[1] for name in node.names if name.name.startswith("llama.")}
    return rooms


@pytest.mark.parametrize("path", sorted((ROOT / "llama").glob("*.py")), ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    assert path.stem in MAY_IMPORT, f"a new room: {path.name}; add it here and to docs/design.md"
    assert imported_rooms(path) <= MAY_IMPORT[path.stem]


def test_the_public_names():
    import llama

    assert {"Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer", "Chat", "Stream"} <= {*llama.__all__}
    assert all(hasattr(llama, name) for name in llama.__all__)


def test_importing_starts_nothing():
    """No process group, no other default dtype, and none of the packages that only tests need."""
    code = (
        "import sys, torch; before = torch.get_default_dtype(); import llama; import torch.distributed as dist; "
        "assert not dist.is_initialized() and torch.get_default_dtype() == before; "
        "print([name for name in ('transformers', 'numpy.testing', 'fire', 'pytest') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "[]\n", done.stderr
