"""python -m llama compare: gives the same prompts to several models."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

from .. import parallel
from ..checkpoint import check_path
from ..evaluation import comparison, report
from .flags import documented
from .script import say


@documented
def compare(
    *models: str,
    tasks: str | None = None,
    html: str | None = None,
    json: str | None = None,
    judge: str | None = None,
    reference: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    max_seq_len: int = 2048,
    seed: int = 1,
    **options: Any,
) -> None:
    """Give the same tasks to MODELS, loading one model at a time, and print their answers side by side.

    Args:
        models: folders, GGUF files, hub ids or smollm2; a suffix :int8, :int4, :float32, ... sets the precision
        tasks: a file of tasks, as JSON lines or a JSON list; by default four tasks of this package
        html: file to write a report to
        json: file to write all numbers and answers to, as JSON
        judge: a model that grades the answers
        reference: the model that all others are compared with; by default each is compared with its unquantized one
        max_tokens: maximum number of tokens of an answer, for tasks that do not set it
        temperature: 0 for greedy decoding
        seed: random seed
    """
    if not models:
        raise ValueError("give at least one model: python -m llama compare MODEL MODEL")
    parallel.init_model_parallel()
    with parallel.all_or_none():
        for name, file in {"html": html, "json": json}.items():
            if file and parallel.rank() == 0:
                check_path(Path(file).parent, f"the folder of {name}", "folder")

    options |= {"max_seq_len": max_seq_len, "seed": seed}
    progress = partial(say, end=" ...\n", file=sys.stderr)
    names = [*map(str, models)]
    found = comparison.compare(names, tasks, judge, reference, max_tokens, temperature, progress, **options)
    if parallel.rank():
        return
    print(report.to_text(found, shutil.get_terminal_size().columns))
    if html:
        Path(html).expanduser().write_text(report.to_html(found), "utf-8", "replace")
    if json:
        Path(json).expanduser().write_text(dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8", "replace")
    if all("error" in about for about in found["models"]):
        raise ValueError("none of the models could be loaded")
