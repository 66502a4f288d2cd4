"""python -m llama perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from tqdm import tqdm

from .. import parallel, scoring
from ..checkpoint import check_path
from ..generation import Llama
from ..textfile import read_json_lines, read_text
from .flags import documented
from .script import say


@documented
def perplexity(
    file: str,
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    window: int = 512,
    stride: int | None = None,
    batch: int = 4,
    **options: Any,
) -> None:
    """Print the perplexity of the text in FILE, computed in a sliding window, and the bits per byte, which can be
    compared between models with different tokenizers.

    Args:
        file: a text file in UTF-8; or a .jsonl file with a separate text in the field "text" of each line
        window: number of tokens of a window
        stride: number of tokens from one window to the next; by default half of a window
        batch: number of windows in a batch
    """
    step = window // 2 if stride is None else stride
    if type(window) is not int or type(step) is not int or not 0 < step < window:
        raise ValueError(f"window is {window!r} and stride {step!r}; they must be whole, 0 < stride < window")
    texts = read_texts(check_path(file, "file", "file"))
    llama = Llama.build(ckpt_dir, tokenizer_path, window, batch, **options)
    rows = [ids for ids in llama.inputs.encode(texts) if len(ids) > 1]
    if not rows:
        raise ValueError(f"{file} is empty")
    total, count, size = 0.0, sum(len(ids) - 1 for ids in rows), sum(len(text.encode()) for text in texts)
    with tqdm(total=count, unit="token", disable=True if parallel.rank() else None, leave=False) as bar:
        for ids in rows:
            value, tokens = scoring.perplexity(llama.model, ids, window, step, bar.update)
            total += math.log(value) * tokens
    perplexity, bits = scoring.exp(total / count), total / math.log(2) / size
    found = f"perplexity {perplexity:.4f} of {count:,} tokens, in windows of {window} every {step}"
    say(f"{found}; {bits:.4f} bits per byte")


def read_texts(path: Path) -> list[str]:
    """The text of a file, or the texts of its JSON lines. Raises ValueError for a line that has none."""
    if path.suffix != ".jsonl":
        return [read_text(path)]
    lines = read_json_lines(path)
    for place, line in lines:
        if not isinstance(line, dict) or not isinstance(line.get("text"), str):
            raise ValueError(f'{place} is {shorten(line)}, which is not a JSON object whose "text" is a str')
    return [line["text"] for _, line in lines]
