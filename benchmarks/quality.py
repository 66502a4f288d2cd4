"""Quality loss by quantization: perplexity, and the divergence of the next token's distribution from the original's.

    python benchmarks/quality.py                      # the bundled models
    python benchmarks/quality.py --model FOLDER       # any other model whose tokenizer transformers loads
    python benchmarks/quality.py --model FOLDER --tokens 6000 --nearest  # rounded to nearest only, which is quick

The bundled models are evaluated on new documents from the generator of their training text (seed 1000): `small` on
documents, `small-chat` on the answers in conversations. Another model is evaluated on the given text, by default
Python's `pydoc topics`, in windows of 400 tokens. Matmuls are in float32 with the quantized weights; "as computed" uses
the fastest matmul on this machine, which may quantize activations too. Calibration uses text that the model generates
(`small-chat`: dialogs), or `--calibrate FILE`. The divergence is the mean Kullback-Leibler divergence over all tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import islice
from pathlib import Path
from pydoc_data import topics

import fire
import torch
import torch.nn.functional as F
from common import CPU, MODELS, ROOT
from torch import Tensor

from llama import Llama, ModelArgs, Tokenizer, Transformer, parallel
from llama.backends.quantized import Quantized, Scheme, dequantize
from llama.backends.quantized_matmul import kernel
from llama.checkpoint import Checkpoint, find_tokenizer, read_quantized, shapes, shard_dim
from llama.checkpoint.calibrate import calibrated, windows
from llama.cli import measure
from llama.cli.convert import AT_ONCE, OWN, WINDOW, own_text

sys.path.insert(0, str(ROOT / "tools"))
from train_small import batches

SCHEMES = [
    Scheme(8),
    Scheme(8, 128),
    Scheme(8, 32),
    *(Scheme(4, group, False) for group in (32, 64, 128)),
    Scheme(4, 32),
]
Data = list[tuple[Tensor, Tensor]]  # tokens and targets (B, T); targets below 0 do not count
Matrices = Mapping[str, Quantized]


@torch.inference_mode()
def logprobs(model: Transformer, data: Data) -> Iterator[Tensor]:
    """Log probabilities at all tokens that are evaluated, in parts (n, V)."""
    for tokens, targets in data:
        for row, wanted in zip(tokens, targets, strict=True):
            yield model(row[None])[0, wanted >= 0].log_softmax(-1)


def perplexity(found: Iterator[Tensor], exact: list[Tensor], data: Data) -> tuple[float, float]:
    """The perplexity, and the divergence from `exact`."""
    rows = (wanted[wanted >= 0] for _, targets in data for wanted in targets)
    total = divergence = count = 0.0
    for ours, theirs, wanted in zip(found, exact, rows, strict=True):
        total -= float(ours.gather(1, wanted[:, None]).sum())
        divergence += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
        count += len(wanted)
    return math.exp(total / count), divergence / count


def model(source: Checkpoint, args: ModelArgs, matrices: Matrices = {}, computed: bool = False) -> Transformer:  # noqa: B006
    """The model in float32, with the given matrices in place of its own."""
    found = measure.loaded(measure.Source(source, args, CPU, torch.float32))
    for name, matrix in matrices.items():
        layer = found.get_submodule(name.removesuffix(".weight"))
        del layer.weight
        layer.weight = kernel(matrix, CPU, True) if computed else torch.nn.Parameter(dequantize(matrix), False)  # type: ignore[assignment]
    return found


def rounded(source: Checkpoint, args: ModelArgs, scheme: Scheme, search: bool) -> Matrices:
    return {
        name: read_quantized(source, name, shape, 0, shape[shard_dim(name) or 0], own, search)
        for name, shape in shapes(args).items()
        if (own := scheme.of(name))
    }


def report(
    name: str, source: Checkpoint, args: ModelArgs, data: Data, text: Callable[[], list[int]], nearest: bool
) -> None:
    exact = [*logprobs(model(source, args), data)]
    base, _ = perplexity(iter(exact), exact, data)
    print(f"\n{name}: perplexity {base:.4f} of {sum(map(len, exact)):,} tokens. Change of it, and divergence:")
    columns = ["nearest", "as computed", *(() if nearest else ("search", "calibrated", "as computed"))]
    print(f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}", flush=True)
    for scheme in SCHEMES:
        ways: list[Callable[[], Matrices]] = [
            partial(rounded, source, args, scheme, False),
            partial(rounded, source, args, scheme, True),
            lambda: dict(calibrated(source, args, scheme, windows(text(), args.vocab_size))),  # noqa: B023
        ]
        cells = []
        for way in ways[: 1 if nearest else None]:
            matrices = way()
            for computed in (False,) if way is ways[1] else (False, True):
                changed = model(source, args, matrices, computed)
                value, divergence = perplexity(logprobs(changed, data), exact, data)
                cells.append(f"{value / base - 1:+.2%}, {divergence:.5f}")
        print(f"| {scheme} | {' | '.join(cells)} |", flush=True)


def main(
    model: str | None = None,
    text: str | None = None,
    calibrate: str | None = None,
    tokens: int = 1200,
    nearest: bool = False,
) -> None:
    parallel.init_model_parallel()
    [cpu] = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")}
    print(f"{cpu.split(': ')[1]}, {torch.get_num_threads()} thread(s)")
    if model is not None:
        report_other(Path(str(model)), text, calibrate, tokens, nearest)
        return
    tokenizer = Tokenizer(MODELS / "tokenizer.model")
    for name, chat, context in (("small", 0.0, 256), ("small-chat", 1.0, 512)):
        source = Checkpoint(MODELS / name)
        data = list(islice(batches(tokenizer, 1000, chat, context), 32))
        args = source.args(tokenizer.n_words)
        report(name, source, args, data, own(MODELS / name, MODELS / "tokenizer.model", chat > 0), nearest)


def own(folder: Path, tokenizer: Path, chat: bool = False) -> Callable[[], list[int]]:
    """Text that the model generates, as `convert --calibrate auto` or `chat` does; each call returns the same."""
    built = partial(Llama.build, folder, tokenizer, WINDOW, AT_ONCE, compile=True, device="cpu")
    return cache(lambda: own_text(built(), OWN, chat))


def report_other(folder: Path, text: str | None, calibrate: str | None, tokens: int, nearest: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("exceptions", "naming", "objects", "types", "with", "yield", "while", "strings")
    held = Path(text).read_text("utf-8") if text else "\n".join(topics.topics[name] for name in names)
    rows = torch.tensor(tokenizer(held)["input_ids"][: tokens // 400 * 400 + 1])
    data = [(rows[:-1].view(-1, 400), rows[1:].view(-1, 400))]
    source = Checkpoint(folder)
    args = source.args(source.vocab_size())
    to_calibrate = own(folder, find_tokenizer(folder, None))
    if calibrate:
        ids = tokenizer(Path(calibrate).read_text("utf-8"))["input_ids"][:OWN]
        to_calibrate = lambda: ids  # noqa: E731
    report(folder.name, source, args, data, to_calibrate, nearest)


if __name__ == "__main__":
    fire.Fire(main)
