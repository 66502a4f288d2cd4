"""python -m llama compare: the same prompts over several models."""

from __future__ import annotations

import shutil
import sys
from json import dumps
from typing import Any

from .. import parallel
from ..evaluation import comparison, report
from .flags import documented


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
    device: str | None = None,
    dtype: str | None = None,
    compile: bool | None = None,
    chat_format: str | None = None,
) -> None:
    """Give the same tasks to MODELS, one in memory at a time, and print their answers side by side.

    Args:
        models: folders, GGUF files, hub ids or smollm2; :int8, :int4, :float32, ... behind one says its precision
        tasks: a file of JSON lines, or a JSON list, of tasks; by default four of this package
        html: where to write a report
        json: where to write all numbers and answers as JSON
        judge: a model that grades the answers
        reference: the model that all others are compared with; by default each with its own that is not quantized
        max_tokens: of an answer, at most, where the task does not say
        temperature: 0 for greedy decoding
        seed: of the random numbers
    """
    if not models:
        raise ValueError("give at least one model: python -m llama compare MODEL MODEL")
    first = parallel.launched() == 1 or parallel.rank() == 0

    def progress(name: str) -> None:
        if first:
            print(f"{name} ...", file=sys.stderr, flush=True)

    options: dict[str, Any] = {"max_seq_len": max_seq_len, "seed": seed, "device": device, "dtype": dtype}
    options |= {"compile": compile, "chat_format": chat_format}
    given = tasks, judge, reference, max_tokens, temperature, progress
    found = comparison.compare([*map(str, models)], *given, **options)
    if parallel.rank():
        return
    print(report.to_text(found, shutil.get_terminal_size().columns))
    outputs = {html: lambda: report.to_html(found), json: lambda: dumps(found, indent=1, ensure_ascii=False)}
    for path, content in outputs.items():
        if path:
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                file.write(content() + "\n" * (path == json))
    if all("error" in about for about in found["models"]):
        raise ValueError("none of the models could be loaded")
