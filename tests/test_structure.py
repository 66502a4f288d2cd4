"""The plan of docs/design.md, held against the code."""

import ast
import shutil
import subprocess
import sys

import pytest
from small import MODELS, ROOT

# Which modules of llama/ a module may import.
MAY_IMPORT = {
    "tokenizer": set(),
    "sampling": set(),
    "parallel": set(),
    "layers": {"parallel"},
    "batch": {"model"},  # the type of its arguments
    "model": {"batch", "layers", "parallel"},
    "backends": {"backends", "batch", "layers", "model", "parallel"},
    "files": {"hf"},
    "lookup": set(),
    "text": {"tokenizer"},
    "options": {"sampling"},
    "request": {"lookup", "sampling"},
    "checkpoint": {"backends", "files", "hf", "model", "parallel"},
    "chat": {"tokenizer"},
    "hf": set(),
    "script": {"parallel"},
    "memory": {"backends", "checkpoint", "model"},
    "convert": {"backends", "checkpoint", "hf", "model", "tokenizer"},
    "bench": {"backends", "checkpoint", "engine", "layers", "model", "parallel", "request"},
    "peers": {"backends", "bench", "checkpoint", "hf", "model"},
    "__main__": {
        "backends",
        "bench",
        "checkpoint",
        "convert",
        "generation",
        "memory",
        "model",
        "parallel",
        "peers",
        "scoring",
        "script",
        "terminal",
        "tokenizer",
    },
    "engine": {"backends", "batch", "model", "parallel", "request", "sampling"},
    "generation": {
        "chat",
        "checkpoint",
        "engine",
        "memory",
        "model",
        "options",
        "parallel",
        "request",
        "scoring",
        "stream",
        "text",
        "tokenizer",
    },
    "scoring": {"engine", "model", "request", "sampling"},
    "conversation": {"chat", "generation", "parallel", "stream"},
    "terminal": {"conversation", "generation", "parallel"},
    "stream": {"chat", "parallel"},
    "__init__": {"chat", "conversation", "generation", "model", "stream", "tokenizer"},
}


def imported_modules(path):
    depth, modules = len(path.relative_to(ROOT / "llama").parts), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("llama")):
            module = (node.module or "").removeprefix("llama").strip(".")
            if 0 < node.level < depth:
                modules.add(path.parent.name)
            else:
                modules |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {name.name.split(".")[1] for name in node.names if name.name.startswith("llama.")}
    return modules


FILES = [*(ROOT / "llama").glob("*.py"), *(ROOT / "llama" / "backends").glob("*.py")]


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    module = "backends" if path.parent.name == "backends" else path.stem
    assert module in MAY_IMPORT, f"a new module: {path.name}; add it here and to docs/design.md"
    assert imported_modules(path) <= MAY_IMPORT[module]


def test_the_core_stands_without_fast_backends(tmp_path):
    """A copy of the package without them generates text."""
    shutil.copytree(ROOT / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("cpu*", "cuda*", "__pycache__"))
    code = (
        "import llama; assert llama.__file__.startswith({0!r}), llama.__file__; "
        "model = llama.Llama.build({1!r}, max_seq_len=64, device='cpu', compile=True); "
        "print(model.text_completion(['The opposite of hot is'], temperature=0, max_gen_len=4)[0]['generation'])"
    ).format(str(tmp_path), str(MODELS / "small"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert "cold" in done.stdout, done.stderr


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
