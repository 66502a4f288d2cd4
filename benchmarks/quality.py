"""What quantization costs: perplexity of the bundled models, and divergence from the unquantized model at a real shape.

    python benchmarks/quality.py [--rows 256] [--shape 1.1B]

Perplexity is of fresh documents of the generator that wrote the training text (seed 1000), in float32: the documents
for `small`, the answers in conversations for `small-chat`. The divergence is Kullback and Leibler's, of the next
token's distribution, with random weights.
"""

from __future__ import annotations

import math
import sys
from itertools import islice
from pathlib import Path

import fire
import torch
import torch.nn.functional as F
from torch import Tensor

from llama import Llama, ModelArgs, Tokenizer, Transformer, parallel
from llama.backends.quantized import Scheme, dequantize, quantize
from llama.cli import measure

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
sys.path.insert(0, str(ROOT / "tools"))
from train_small import batches  # noqa: E402

SCHEMES = [Scheme(8, 0), *(Scheme(4, group) for group in (32, 64, 128))]


@torch.inference_mode()
def perplexity(model: Transformer, data: list[tuple[Tensor, Tensor]]) -> float:
    total = count = 0.0
    for tokens, targets in data:
        for row, wanted in zip(tokens.split(8), targets.split(8), strict=True):
            total += float(F.cross_entropy(model(row).flatten(0, 1), wanted.flatten(), reduction="sum"))
            count += int((wanted >= 0).sum())
    return math.exp(total / count)


def round_weights(model: Transformer, scheme: Scheme, search: bool) -> None:
    """Replace each matrix by its rounded values, in float32: rounding of weights alone."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "tok_embeddings" not in name:
            weight.copy_(dequantize(quantize(weight, scheme, search)))


def main(rows: int = 256, shape: str = "1.1B") -> None:
    parallel.init_model_parallel()
    torch.manual_seed(0)
    for name, chat, context in (("small", 0.0, 256), ("small-chat", 1.0, 512)):
        folder = ROOT / "models" / name

        def build(quantize: str | None = None, group_size: int = 64, compile: bool = False) -> Transformer:
            options = {"dtype": "float32", "quantize": quantize, "group_size": group_size, "compile": compile}
            return Llama.build(folder, None, context, 8, device="cpu", **options).model  # type: ignore[arg-type]  # noqa: B023

        tokenizer = Tokenizer(str(ROOT / "models" / "tokenizer.model"))
        count = max(1, rows * context // 8192)
        data = list(islice(batches(tokenizer, 1000, chat, context), count))
        exact = perplexity(build(), data)
        print(f"{name}: perplexity {exact:.4f} of {sum(int((t >= 0).sum()) for _, t in data):,} tokens")
        for scheme in SCHEMES:
            cells = []
            for search in (False, True) if scheme.bits == 4 else (False,):
                model = build()
                round_weights(model, scheme, search)
                cells.append(f"{'searched' if search else 'nearest'} {perplexity(model, data) / exact - 1:+.3%}")
            for compiled in (False, True) if scheme.bits == 4 else (False,):
                fast = build(f"int{scheme.bits}", scheme.group or 64, compiled)
                how = "compiled" if compiled else "as computed (nearest)"
                cells.append(f"{how} {perplexity(fast, data) / exact - 1:+.3%}")
            print(f"  {scheme!s:>24}: {'; '.join(cells)}", flush=True)
    if shape:
        divergence(shape)


@torch.inference_mode()
def divergence(shape: str) -> None:
    """Of 128 random tokens, with random weights."""
    args = ModelArgs(**measure.SHAPES[shape], vocab_size=32000, max_batch_size=1, max_seq_len=128)
    tokens = torch.randint(3, 32000, (1, 128))
    exact: Tensor | None = None
    print(f"{shape}, random weights, nearest, as computed")
    for scheme, compiled in ((None, False), *((scheme, False) for scheme in SCHEMES), (Scheme(4, 64), True)):
        torch.manual_seed(0)
        model = measure.loaded(measure.RandomWeights(CPU), args, CPU, torch.float32, scheme, compiled)
        logits = model(tokens)[0].double()
        if exact is None:
            exact = logits
            continue
        kl = F.kl_div(logits.log_softmax(-1), exact.log_softmax(-1), reduction="batchmean", log_target=True)
        error = (logits - exact).norm() / exact.norm()
        how = f"{scheme}, compiled" if compiled else str(scheme)
        print(
            f"  {how:>34}: divergence {float(kl):.5f} nats a token; error of the logits {float(error):.3f}", flush=True
        )


if __name__ == "__main__":
    fire.Fire(main)
