"""How probable given texts are, their embeddings, and the logits of a score head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .engine import Engine
from .model import Transformer
from .request import Request
from .sampling import top_logprobs

AT_ONCE = 256  # positions whose logits are computed at a time: 32 MiB of float32 with a vocabulary of 32,000


class Scores:
    """The log probability of each of a text's tokens from index `begin` on, given the tokens before it, and the ids and
    log probabilities of the `top` most probable tokens there. It is the `observe` of a request for the text."""

    def __init__(self, ids: Sequence[int], begin: int = 1, top: int = 0) -> None:
        self.ids, self.begin, self.top = ids, begin, top
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []

    @property
    def first(self) -> int:
        """The first position whose hidden state is needed."""
        return self.begin - 1

    def __call__(self, hidden: Tensor, start: int, logits: Callable[[Tensor], Tensor]) -> bool:
        """Score the tokens that follow hidden states (n, dim), whose first position is `start`. Returns whether all
        scores so far are finite."""
        hidden = hidden[max(0, self.first - start) :]
        start = max(start, self.first)
        targets = torch.tensor(self.ids[start + 1 :][: len(hidden)], device=hidden.device)  # position t predicts t + 1
        for part, ids in zip(hidden[: len(targets)].split(AT_ONCE), targets.split(AT_ONCE), strict=True):
            if len(ids):
                found = top_logprobs(logits(part), ids, self.top)
                self.logprobs += found[:, 0].tolist()
                best, best_ids = found[:, 1:].tensor_split(2, dim=1)
                rows = zip(best_ids.int().tolist(), best.tolist(), strict=True)
                self.top_logprobs += [[*zip(*row, strict=True)] for row in rows]
        return all(map(math.isfinite, self.logprobs))


def score(engine: Engine, rows: Sequence[Sequence[int]], begins: Sequence[int], top: int = 0) -> list[Scores]:
    """Scores of each row's tokens from index `begins[i]` on. FloatingPointError names the first layer whose output is
    not finite."""
    engine.model.params.check_output()
    scores = [Scores(row, begin, top) for row, begin in zip(rows, begins, strict=True)]
    for _ in engine.run([Request(s.ids, len(s.ids), observe=s, compute_from=s.first) for s in scores]):
        pass
    return scores


def embed(engine: Engine, rows: Sequence[Sequence[int]], pooling: str, head: bool = False) -> Tensor:
    """What `to_pool` pools of each row: float32 (rows, dim or n_labels). FloatingPointError names the first layer whose
    output is not finite."""
    requests, pooled = to_pool(engine, rows, pooling, head)
    for _ in engine.run(requests):
        pass
    return pooled


def classify(engine: Engine, rows: Sequence[Sequence[int]], pad_id: int | None = None) -> Tensor:
    """The score head's logits at the last token of each row that is not padding, or at the first if all are: float32
    (rows, n_labels). FloatingPointError names the first layer whose output is not finite."""
    ends = [1 + max((t for t, id in enumerate(row) if id != pad_id), default=0) for row in rows]
    seen = [row[:end] for row, end in zip(rows, ends, strict=True)]  # later tokens change nothing
    return embed(engine, seen, "last", head=True)


def to_pool(
    engine: Engine, rows: Sequence[Sequence[int]], pooling: str, head: bool = False
) -> tuple[list[Request], Tensor]:
    """Requests that pool each row's hidden states after the final norm, or with `head` the score head's logits; and the
    tensor that holds their means, or the last ones, once all have ended: float32 (rows, dim or n_labels)."""
    norm, params = engine.model.norm, engine.model.params
    pooled = torch.zeros(len(rows), params.n_labels if head else params.dim, device=engine.device, dtype=torch.float32)

    def add(i: int, hidden: Tensor, start: int, logits: Callable[[Tensor], Tensor]) -> bool:
        if pooling == "last" and start + len(hidden) < len(rows[i]):
            return True
        hidden = hidden if pooling == "mean" else hidden[-1:]
        if head:
            found = logits(hidden)
        else:
            found = norm(hidden[:, : params.dim].type_as(next(norm.parameters(), hidden))).float()
        pooled[i] += found.sum(0) / (len(rows[i]) if pooling == "mean" else 1)
        return bool(found.isfinite().all())

    first = 0 if pooling == "mean" else None
    return [Request(row, len(row), observe=partial(add, i), compute_from=first) for i, row in enumerate(rows)], pooled


def perplexity(
    model: Transformer, ids: Sequence[int], window: int, stride: int, done: Callable[[int], object] = lambda n: None
) -> tuple[float, int]:
    """exp of the mean negative log probability of all ids but the first, and their number. Each id is scored once, in
    windows that begin every `stride` ids, so with at least window - stride ids of context, or all that there are.
    `done` is called with the number of ids scored since the last call. 0 < stride < window, and at least two ids."""
    engine, at_once, total = Engine.of(model), model.params.max_batch_size, 0.0
    starts = range(0, max(1, len(ids) - window + stride), stride)
    for group in (starts[i : i + at_once] for i in range(0, len(starts), at_once)):
        begins = [1 if start == 0 else window - stride for start in group]
        for scores in score(engine, [ids[start : start + window] for start in group], begins):
            total += math.fsum(scores.logprobs)
            done(len(scores.logprobs))
    return exp(-total / (len(ids) - 1)), len(ids) - 1


def exp(x: float) -> float:
    """e to the power of x, infinity where that is more than a float holds."""
    return math.exp(x) if x < 709 else math.inf
