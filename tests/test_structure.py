"""The map in docs/design.md, compared with the code: it exists once, and this reads it."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys

import pytest
from small import MODELS, ROOT

PACKAGE = ROOT / "llama"
TOO_LONG = {"engine", "generation"}  # with more than 400 lines, or a function of more than 60
FILES = sorted(PACKAGE.rglob("*.py"))
# The core runs without these: packages above the engine, and backends other than the plain one.
OPTIONAL = ("cli", "server", "evaluation", "backends/cpu*", "backends/cuda*", "__main__.py", "script.py")


def module(path):
    """llama/checkpoint/plan.py -> checkpoint/plan; a package's __init__.py -> the package's name."""
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    return name.removesuffix("/__init__")


def design():
    """Module -> the modules that it may import, from rows of the form | `module` | what it is | `module`,
    `.sibling` |"""
    rows = re.findall(r"^\| `(\S+?)` \| .* \|(.*)\|$", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    return {
        name: {name.split("/")[0] + "/" + found[1:] if found[0] == "." else found
               for found in re.findall(r"`(\S+?)`", imports)}
        for name, imports in rows
    }  # fmt: skip


def imported(path, types=True):
    """The package's modules that a file imports, anywhere in the file, without those for type checkers alone."""
    found, tree = set(), ast.parse(path.read_text())
    if not types:
        tree.body = [node for node in tree.body if "TYPE_CHECKING" not in ast.unparse(node).split("\n")[0]]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "llama"):
            base = path.parents[node.level - 1] if node.level else ROOT
            base = base.joinpath(*(node.module or "").split("."))
            for alias in node.names:
                target = base / alias.name
                target = target if target.is_dir() or target.with_suffix(".py").exists() else base
                found.add(module(target if target != PACKAGE else PACKAGE / "__init__"))
        elif isinstance(node, ast.Import):
            found |= {"/".join(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("llama.")}
    return found - {module(path)}


def allowed(name, rows):
    """Whether a module, or its package, is in the row."""
    return name in rows or name.split("/")[0] in rows


def test_the_table_has_every_module_and_no_other():
    assert set(design()) == {module(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_are_those_of_the_table(path):
    may, found = design()[module(path)], imported(path)
    assert {name for name in found if not allowed(name, may)} == set()
    assert {row for row in may if not any(allowed(name, {row}) for name in found)} == set()


def test_imports_go_one_way():
    """Among modules, and among packages as a whole. A package's __init__.py, which only re-exports names, is
    separate."""
    files = {module(path): path for path in FILES if path.name != "__init__.py"}
    graph = {name: imported(path, types=False) & files.keys() for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()
    packages = {}
    for path in FILES:
        top = module(path).split("/")[0]
        packages.setdefault(top, set()).update(name.split("/")[0] for name in imported(path, types=False))
    graphlib.TopologicalSorter({name: found - {name} for name, found in packages.items()}).prepare()


@pytest.mark.parametrize("path", [path for path in FILES if module(path) not in TOO_LONG], ids=module)
def test_files_and_functions_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_files_of_tests_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_the_core_stands_alone(tmp_path):
    """A copy without commands, server and backends other than the plain one generates text."""
    shutil.copytree(PACKAGE, tmp_path / "llama", ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in OPTIONAL:
        for path in (tmp_path / "llama").glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    code = f"""if True:
        from llama import Llama
        llama = Llama.build({str(MODELS / "small")!r}, device="cpu", dtype="float32")
        print(llama.text_completion(["The opposite of hot is"], temperature=0, stop=".")[0]["generation"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.strip() == "cold", done.stderr


def test_the_public_names():
    import llama

    assert {"Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer", "Chat", "Stream"} <= {*llama.__all__}
    assert all(hasattr(llama, name) for name in llama.__all__)


def test_importing_starts_nothing():
    """No process group, the same default dtype, and no packages that only tests need."""
    code = (
        "import sys, torch; before = torch.get_default_dtype(); import llama; import torch.distributed as dist; "
        "assert not dist.is_initialized() and torch.get_default_dtype() == before; "
        "print([name for name in ('transformers', 'numpy.testing', 'fire', 'pytest') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "[]\n", done.stderr
