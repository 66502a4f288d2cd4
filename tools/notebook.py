"""Execute a notebook and store what its cells print: python tools/notebook.py docs/compare.ipynb

The cells are plain Python that prints text, so that neither Jupyter nor a kernel is needed; in Jupyter they run too."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this repository's llama, installed or not


def execute(path: Path, replaced: dict[str, str] | None = None) -> dict[str, Any]:
    """The notebook with new outputs: its code cells, run in order in one namespace, in the notebook's folder. Texts in
    the cells may be replaced by others first."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    before = os.getcwd()
    os.chdir(path.resolve().parent)
    try:
        for count, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
            source = "".join(cell["source"])
            for old, new in (replaced or {}).items():
                source = source.replace(old, new)
            with redirect_stdout(io.StringIO()) as out:
                exec(compile(source, f"{path.name}, cell {count}", "exec"), names)
            lines = out.getvalue().splitlines(keepends=True)
            cell["execution_count"] = count
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    finally:
        os.chdir(before)
    return notebook


def main(file: str) -> None:
    notebook = execute(Path(file))
    Path(file).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
