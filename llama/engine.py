"""Tokens in, tokens out, one step at a time. Every way to generate drains `steps`; there is no second loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .decode import Decode, decoder
from .model import Transformer
from .parallel import broadcast
from .sampling import token_logprobs

AHEAD = {"cuda"}  # devices that begin a step before the host has read what the last one chose
LOGITS_AT_ONCE = 2**25  # float32 values held while a prompt is scored: 128 MiB


class Token(NamedTuple):
    id: int
    logprob: float = math.nan  # where nobody asked


Step = list[list[Token]]  # the tokens that each row has gained


@torch.inference_mode()
def steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_ids: Sequence[int],
    sample: Callable[[Tensor], Tensor],
    logprobs: bool = False,
    echo: bool = False,
) -> Iterator[Step]:
    """Prefill all prompts in one pass, then yield a step per pass over the model until every row has ended.

    A row ends before a token of `stop_ids`, or when prompt and answer together are `limits[row]` tokens long, at most
    max_seq_len. `sample` maps logits (B, V) to ids (B,); what it draws on the first rank holds for all. With `echo` the
    first step holds the prompts themselves. Raises FloatingPointError naming the first layer that was not finite.
    """
    device = model.norm.weight.device
    lengths = [len(prompt) for prompt in prompts]
    live = [length < limit for length, limit in zip(lengths, limits, strict=True)]
    if not any(live) and not echo:
        return
    # Right padding: what a row computes behind its own last token, no token of its own ever looks at, and its cache
    # slots are overwritten before they are reached. The last token again, as another's weights may be broken.
    padded = [[*prompt] + [prompt[-1]] * (max(lengths) - len(prompt)) for prompt in prompts]
    tokens, positions = torch.tensor(padded, device=device), [0]  # (B, T)
    last = torch.tensor(lengths, device=device) - 1  # (B,): the last real token of each row
    hidden = model.hidden(tokens, positions)  # (B, T, dim)
    if echo:
        scores = [[math.nan] * length for length in lengths]
        if logprobs:
            scores = prompt_logprobs(model, tokens, hidden).tolist()
            scores = [row[:length] for row, length in zip(scores, lengths, strict=True)]
            if not all(math.isfinite(score) for row in scores for score in row):
                raise not_finite(model, tokens, positions, last)
        yield [list(map(Token, *row)) for row in zip(prompts, scores, strict=True)]
    decode: Decode | None = None
    while any(live):
        logits = model.logits(pick(hidden, last))  # (B, V)
        # One message and one synchronization a step: the ids, and whether they can be trusted.
        finite = logits.sum().isfinite().long()  # what is not makes the sum so, and a sum is quicker to look at
        message = broadcast(torch.cat((sample(logits), finite[None])))
        chosen = message[:-1]
        chances = token_logprobs(logits, chosen) if logprobs else torch.full_like(logits[:, 0], math.nan)
        # A row that has ended goes through the motions at its last position.
        following = chosen[:, None], [length - (not on) for length, on in zip(lengths, live, strict=True)]
        early: Tensor | None = None
        if any(on and length + 1 < limit for on, length, limit in zip(live, lengths, limits, strict=True)):
            decode = decode or decoder(model, len(prompts))
            if device.type in AHEAD:
                early = decode(*following)
        *ids, ok = message.tolist()
        if not ok:
            raise not_finite(model, tokens, positions, last)
        gained: Step = [[] for _ in ids]
        for i, (id, chance) in enumerate(zip(ids, chances.tolist(), strict=True)):
            if live[i] and id not in stop_ids:
                gained[i] = [Token(id, chance)]
                lengths[i] += 1
            live[i] = bool(gained[i]) and lengths[i] < limits[i]
        yield gained
        if any(live) and decode:
            hidden = decode(*following) if early is None else early
            (tokens, positions), last = following, torch.zeros_like(last)


def pick(hidden: Tensor, last: Tensor) -> Tensor:
    """Position last[b] of each row of hidden (B, T, dim) -> (B, dim)."""
    if hidden.shape[1] == 1:
        return hidden[:, 0]
    return hidden[torch.arange(len(last), device=last.device), last]


def prompt_logprobs(model: Transformer, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Log probabilities (B, T) of tokens (B, T) given those before them, from `hidden` (B, T, dim); 0 for the first,
    which nothing predicts. The logits of a few positions at a time, so that a long prompt fits."""
    B, T = tokens.shape
    chunk = max(1, LOGITS_AT_ONCE // (B * model.vocab_size))
    parts = [torch.zeros(B, 1, device=tokens.device)]
    for begin in range(0, T - 1, chunk):
        targets = tokens[:, begin + 1 : begin + 1 + chunk]  # position t predicts token t + 1
        parts.append(token_logprobs(model.logits(hidden[:, begin : begin + targets.shape[1]]), targets))
    return torch.cat(parts, 1)


def not_finite(model: Transformer, tokens: Tensor, positions: Sequence[int], last: Tensor) -> FloatingPointError:
    """The error that names the first layer whose output for this step, computed again, is NaN or infinite. The cache is
    emptied."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: None if output.isfinite().all() else found.append(name)

    named: dict[str, nn.Module] = {"tok_embeddings": model.tok_embeddings, "norm": model.norm, "output": model.output}
    named |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in named.items()]
    try:
        model.logits(pick(model.hidden(tokens, positions), last))
    finally:
        for hook in hooks:
            hook.remove()
    for cache in model.buffers():  # a masked NaN is still NaN times 0: it would break the next batch too
        cache.zero_()
    where = f"the first layer to give such values is {found[0]}" if found else "computed again, they were not"
    return FloatingPointError(f"the logits are NaN or infinite; {where}")
