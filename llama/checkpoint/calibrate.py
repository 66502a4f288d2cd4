"""GPTQ: quantize a model's matrices so that their outputs on a text change least, layer by layer.

Frantar et al. 2022, arXiv 2210.17323. For inputs X (tokens, in) of a matrix W (out, in), rounding that changes W by E
changes its outputs by X Eᵀ, whose squares sum to the trace of E H Eᵀ with H = Xᵀ X, the Hessian. Columns are rounded
one by one, the most important first, and the remaining ones compensate for the error so far. With H = U Uᵀ, U upper
triangular, the sum is that of (E U)², and column j of it is 0 where

    E[:, j] = -sum over i < j of E[:, i] U[i, j] / U[j, j]

which is added to column j of W before it is rounded. Scale and min of each group are fixed before that, by
`quantized.search` with H's diagonal as the importance of columns.

A layer's inputs X come from layers that are already rounded, and differ from the original model's inputs Y. The matrix
to round is therefore not W, but the one that with X comes closest to the original outputs (as in Li et al. 2025, arXiv
2504.02692): W + W (Y - X)ᵀ X (H + λ I)⁻¹, by ridge regression.

One layer's weights, in float32, before and after rounding, and the activations of both are in memory at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..args import ModelArgs
from ..backends.quantized import Quantized, Scheme, assemble, dequantize, nearest_q, quantize, search, stack, values
from ..batch import Batch
from ..model import Layout, TransformerBlock
from ..parallel import init_model_parallel
from .load import Weights, read_whole
from .plan import shapes

WINDOW = 256  # tokens of a text that attend to each other
LEAST, MOST = 1024, 16384  # tokens of a text: fewer are too small a sample of a matrix's inputs; more are ignored
TOGETHER = 4  # windows that pass through a layer at a time
ROWS = 4096  # of a matrix that are rounded at a time
BLOCK = 128  # columns between which errors propagate one by one; to later columns they propagate in one matmul

# The matrices of a layer, in the order of their matmuls; those in one row have the same inputs.
MATMULS = (
    ["attention.wq", "attention.wk", "attention.wv"],
    ["attention.wo"],
    ["feed_forward.w1", "feed_forward.w3"],
    ["feed_forward.w2"],
)


def windows(ids: Sequence[int], vocab_size: int) -> Tensor:
    """A text, cut into rows (B, WINDOW). ValueError if it is too short."""
    if len(ids) < LEAST:
        raise ValueError(f"the text to calibrate with has {len(ids):,} tokens; at least {LEAST:,} are needed")
    tokens = torch.tensor(ids[: min(len(ids), MOST) // WINDOW * WINDOW]).view(-1, WINDOW)
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(f"the calibration text contains ids outside 0 to {vocab_size - 1}")
    return tokens


@torch.inference_mode()
def calibrated(
    weights: Weights, args: ModelArgs, scheme: Scheme, text: Tensor, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Quantized]]:
    """Names and rounded matrices, layer by layer, calibrated on a text from `windows`. FloatingPointError names a
    matrix whose inputs are not finite."""
    init_model_parallel(1)
    layouts = [Layout.of(Batch.rows(part, 0, args), args) for part in text.to(device).split(TOGETHER)]
    table = read(weights, "tok_embeddings.weight", args)
    x = [F.embedding(one.batch.tokens.cpu(), table).to(device) for one in layouts]
    y = x.copy()  # the original model's
    for i in range(args.n_layers):
        with torch.device("meta"):
            layer = TransformerBlock(args)
        prefix = f"layers.{i}."
        found = {name: read(weights, prefix + name, args).to(device) for name, _ in layer.named_parameters()}
        layer.load_state_dict(found, assign=True)
        yield from calibrate_layer(layer, prefix, x, y, layouts, scheme)
        weights.release()
    if args.n_labels:  # a score head stays in floats
        return
    norm = read(weights, "norm.weight", args).to(device)
    normed = ([F.rms_norm(part, norm.shape, norm, args.norm_eps) for part in parts] for parts in (x, y))
    hessian, change = statistics("output.weight", *normed)
    weight = read(weights, "output.weight", args)
    yield "output.weight", gptq(weight, hessian, scheme.of("output.weight") or scheme, change)


def read(weights: Weights, name: str, args: ModelArgs) -> Tensor:
    return read_whole(weights, name, shapes(args)[name], torch.float32)


def calibrate_layer(
    layer: TransformerBlock, prefix: str, x: list[Tensor], y: list[Tensor], layouts: Sequence[Layout], scheme: Scheme
) -> Iterator[tuple[str, Quantized]]:
    """Round a layer's matrices in the order of their matmuls, each for the inputs that the rounded ones before it give.
    Replaces the layer's inputs, `x` of the rounded model and `y` of the original, by its outputs."""
    rounded = copy.deepcopy(layer)
    originals, replaced = dict(layer.named_modules()), dict(rounded.named_modules())
    steps = inputs_of(rounded, x, layouts), inputs_of(layer, y, layouts), MATMULS
    for ours, theirs, names in zip(*steps, strict=True):
        hessian, change = statistics(f"{prefix}{names[0]}.weight", ours, theirs)
        for name in names:
            matrix = gptq(originals[name].weight, hessian, scheme, change)
            replaced[name].weight = nn.Parameter(dequantize(matrix).to(x[0].device), requires_grad=False)
            yield f"{prefix}{name}.weight", matrix


def inputs_of(layer: TransformerBlock, x: list[Tensor], layouts: Sequence[Layout]) -> Iterator[list[Tensor]]:
    """The inputs of MATMULS, each computed when it is asked for, with the weights that the layer then has. Replaces the
    layer's inputs `x` by its outputs."""
    wo, w2 = layer.attention.wo, layer.feed_forward.w2
    # So that attention returns the inputs of wo, and the feed-forward those of w2.
    layer.attention.wo = layer.feed_forward.w2 = nn.Identity()  # type: ignore[assignment]
    normed = [layer.attention_norm(part) for part in x]
    yield normed
    mixed = [layer.attention(part, layout) for part, layout in zip(normed, layouts, strict=True)]
    yield mixed
    x[:] = [part + wo(inner) for part, inner in zip(x, mixed, strict=True)]
    normed = [layer.ffn_norm(part) for part in x]
    yield normed
    gated = [layer.feed_forward(part) for part in normed]
    yield gated
    x[:] = [part + w2(inner) for part, inner in zip(x, gated, strict=True)]


def statistics(name: str, rounded: Iterable[Tensor], original: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """For inputs X of the matrix `name` W in the rounded model, and Y in the original, both (tokens, in): H = Xᵀ X, and
    (Y - X)ᵀ X (H + λ I)⁻¹, which times W is the change of W that brings its outputs closest to the original ones; both
    (in, in)."""
    hessian = covariance = torch.zeros(())
    for x, y in zip(rounded, original, strict=True):
        hessian, covariance = hessian + x.t() @ x, covariance + (y - x).t() @ x
    if not (hessian.isfinite().all() and covariance.isfinite().all()):
        raise FloatingPointError(f"the text to calibrate with gives {name} inputs that are NaN or infinite")
    # Damped by the mean sum of squares, as a text is a small sample: less damping fits noise where columns are many.
    damping = hessian.diagonal().mean().clamp(min=1e-20)
    damped = hessian + torch.diag(damping.expand(len(hessian)))
    return hessian, torch.linalg.solve(damped, covariance, left=False)


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme, change: Tensor | None = None) -> Quantized:
    """A matrix (out, in), on any device, rounded for inputs with this Hessian (in, in); the result is on the CPU. No
    output's error, for these inputs, is larger than with `quantize`. With `change` (in, in), rounds W + W change."""
    hessian, upper, order = factor(hessian)
    ratios, found = upper / upper.diagonal(), []
    for rows in weight.to(hessian).split(ROWS):
        wanted = rows if change is None else rows + rows @ change
        found.append(round_rows(wanted, hessian, ratios, order, scheme))
    return stack(found).map(Tensor.cpu)


def factor(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Hessian, damped until it is positive definite; the upper triangular U with U Uᵀ = H[order][:, order]; and the
    order of columns, the most important first. A column whose inputs are all 0 does not affect the others."""
    mean, damping = hessian.diagonal().mean().clamp(min=1e-20), 0.01
    while True:
        damped = hessian + torch.diag((mean * damping).expand(len(hessian)))
        order = damped.diagonal().argsort(descending=True, stable=True)
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order].flip(0, 1))
        if not failed:
            return damped, lower.flip(0, 1), order
        damping *= 10


def round_rows(weight: Tensor, hessian: Tensor, ratios: Tensor, order: Tensor, scheme: Scheme) -> Quantized:
    """`gptq` for some rows (out, in) of a matrix; `ratios` are U[i, j] / U[j, j]."""
    columns = weight.shape[1]
    shaped = weight.unflatten(1, (-1, scheme.group_size(columns)))  # (out, groups, columns)
    scale, minimum = search(shaped, scheme, hessian.diagonal())

    def by_column(part: Tensor) -> Tensor:  # (out, groups, 1 or columns) -> (in, out), in order
        return part.expand_as(shaped).flatten(1).t()[order]

    exact, step = by_column(shaped), by_column(scale)
    low = [None] * columns if minimum is None else by_column(minimum)
    error, q = torch.zeros_like(exact), torch.empty_like(exact)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        wanted = exact[begin:end] + ratios[:begin, begin:end].t() @ error[:begin]
        for j in range(begin, end):
            column = wanted[j - begin] + ratios[begin:j, j] @ error[begin:j]
            q[j] = nearest_q(column, step[j], low[j], scheme)
            error[j] = exact[j] - values(q[j], step[j], low[j])
    found = assemble(q[order.argsort()].t().unflatten(1, shaped.shape[1:]), scale, minimum, scheme)
    nearest = quantize(weight, scheme)
    worse = loss(found, weight, hessian) > loss(nearest, weight, hessian)
    parts = ((a, b) for a, b in zip(found, nearest, strict=True) if a is not None and b is not None)
    return Quantized(*(torch.where(worse, b, a) for a, b in parts))


def loss(rounded: Quantized, weight: Tensor, hessian: Tensor) -> Tensor:
    """The squared error (out, 1) of each output."""
    error = dequantize(rounded) - weight
    return ((error @ hessian) * error).sum(-1, keepdim=True)
