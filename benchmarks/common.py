"""What several benchmarks share: runs in alternation, and folders and files of random weights."""

from __future__ import annotations

import base64
import itertools
import statistics
import string
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from llama import ModelArgs, Transformer, checkpoint, parallel
from llama.cli import measure

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: taken[1:] for name, taken in seconds.items()}


def spread(values: Sequence[float], unit: str = "") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} - {max(values):.2f})"


def milliseconds(seconds: Sequence[float]) -> str:
    return spread([1e3 * value for value in seconds], " ms")


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """The ratio of two lists of values that were measured in pairs."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def random_model(shape: str, slots: int, length: int, vocab_size: int = 32000) -> Transformer:
    """A model of random float32 weights on the CPU."""
    parallel.init_model_parallel()
    args = ModelArgs(**measure.SHAPES[shape], vocab_size=vocab_size, max_batch_size=slots, max_seq_len=length)
    return measure.loaded(measure.Source(measure.RandomWeights(CPU), args, CPU, torch.float32))


def random_folder(folder: Path, shape: str, dtype: torch.dtype) -> Path:
    """A folder of random weights in Meta's layout. The tokens of its tokenizer are two or three characters."""
    letters = string.ascii_letters + string.digits + " "
    words = itertools.chain(itertools.product(letters, repeat=2), itertools.product(letters, repeat=3))
    ranks = [bytes([i]) for i in range(256)] + ["".join(w).encode() for w in itertools.islice(words, 32000 - 512)]
    folder.mkdir()
    lines = [b"%s %d\n" % (base64.b64encode(word), i) for i, word in enumerate(ranks)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    torch.manual_seed(0)
    params = {**measure.SHAPES[shape], "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": 32000}
    shapes = checkpoint.shapes(ModelArgs(**params))
    state = {name: torch.randn(shape).mul_(0.02).to(dtype) for name, shape in shapes.items() if len(shape) > 1}
    norms = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items() if len(shape) == 1}
    checkpoint.save(state | norms, folder, params)
    return folder
