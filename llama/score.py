"""How likely given texts are, and what the model makes of them, in as few passes as its cache has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .decode import fastest
from .engine import not_finite, prefill, prompt_scores
from .model import Transformer


class Scores(NamedTuple):
    """Of each of a row's T tokens but its first, given those before it."""

    logprobs: list[float]  # T - 1
    top_logprobs: list[list[float]]  # T - 1 times top
    top_ids: list[list[int]]


def hidden(model: Transformer, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The last layer's output (T, dim) for the tokens of each row, max_batch_size rows in a pass."""
    at_once, compute = model.params.max_batch_size, fastest(model)
    for begin in range(0, len(rows), at_once):
        some = rows[begin : begin + at_once]
        yield from zip(some, prefill(compute(sum(map(len, some))), some), strict=True)


@torch.inference_mode()
def score(model: Transformer, rows: Sequence[Sequence[int]], top: int = 0) -> list[Scores]:
    """Scores of each row, with the `top` likeliest tokens at each place. FloatingPointError names the first layer that
    was not finite."""
    found = []
    for row, states in hidden(model, rows):
        columns = zip(*prompt_scores(model, row, states, top), strict=True)
        scores = Scores(*(torch.cat(parts).tolist() for parts in columns))
        if not all(map(math.isfinite, scores.logprobs)):
            raise not_finite(model, partial(prefill, model, [row]))
        found.append(scores)
    return found


@torch.inference_mode()
def embed(model: Transformer, rows: Sequence[Sequence[int]], pooling: str) -> Tensor:
    """The normalized last hidden states of each row, their mean or the last one: (rows, dim) in float32."""
    normed = (model.norm(states).float() for _, states in hidden(model, rows))
    return torch.stack([states.mean(0) if pooling == "mean" else states[-1] for states in normed])


def perplexity(
    model: Transformer, ids: Sequence[int], window: int, stride: int, done: Callable[[int], object] = lambda n: None
) -> tuple[float, int]:
    """exp of the mean negative log probability of all ids but the first, and how many they are. Each is scored once, in
    windows that begin every `stride` ids, with at least window - stride ids before it where there are so many. `done`
    is told how many ids more are done. 0 < stride < window, and at least two ids."""
    begins = range(0, max(1, len(ids) - window + stride), stride)
    total = 0.0
    for group in (
        begins[i : i + model.params.max_batch_size] for i in range(0, len(begins), model.params.max_batch_size)
    ):
        for begin, scores in zip(group, score(model, [ids[begin : begin + window] for begin in group]), strict=True):
            new = scores.logprobs if begin == 0 else scores.logprobs[window - stride - 1 :]
            total += math.fsum(new)
            done(len(new))
    return math.exp(-total / (len(ids) - 1)), len(ids) - 1
