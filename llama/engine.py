"""Tokens in, tokens out, one step at a time. Every way to generate drains `steps`; there is no second loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .decode import Decode, decoder
from .model import Transformer
from .parallel import broadcast
from .sampling import token_logprobs

AHEAD = {"cuda"}  # devices that begin a step before the host has read what the last one chose
LOGITS_AT_ONCE = 2**25  # float32 values held while a prompt is scored: 128 MiB
WORTH_SHARING = 32  # tokens; fewer are computed for each prompt, as a pass of their own would read all weights again


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
    again: Callable[[], Iterable[Tensor]] = partial(prefill, model, prompts)
    rows = again()
    if echo:
        scores = [[math.nan] * length for length in lengths]
        if logprobs:
            scores = [prompt_logprobs(model, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
            if not all(math.isfinite(score) for row in scores for score in row):
                raise not_finite(model, again)
        yield [list(map(Token, *row)) for row in zip(prompts, scores, strict=True)]
    hidden = torch.stack([row[-1] for row in rows])  # (B, dim): of each row's last token
    del rows
    decode: Decode | None = None
    while any(live):
        logits = model.logits(hidden)  # (B, V)
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
            raise not_finite(model, again)
        gained: Step = [[] for _ in ids]
        for i, (id, chance) in enumerate(zip(ids, chances.tolist(), strict=True)):
            if live[i] and id not in stop_ids:
                gained[i] = [Token(id, chance)]
                lengths[i] += 1
            live[i] = bool(gained[i]) and lengths[i] < limits[i]
        yield gained
        if any(live) and decode:
            hidden = (decode(*following) if early is None else early)[:, 0]
            again = partial(model.hidden, *following)


def prefill(model: Transformer, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The last layer's output (T, dim) for the tokens of each prompt, all in one pass. A long beginning that they share
    is computed once."""
    lengths = [len(prompt) for prompt in prompts]
    differ = (i for i, ids in enumerate(zip(*prompts, strict=False)) if len({*ids}) > 1)
    shared = min(next(differ, max(lengths)), min(lengths) - 1)  # each needs a last token of its own
    if len(prompts) == 1 or shared < WORTH_SHARING:
        return list(model.packed(prompts, [0] * len(prompts)).split(lengths))
    start = model.packed([prompts[0][:shared]], [0])
    model.copy_cache(shared, len(prompts))
    own = model.packed([prompt[shared:] for prompt in prompts], [shared] * len(prompts))
    return [torch.cat((start, rest)) for rest in own.split([length - shared for length in lengths])]


def prompt_logprobs(model: Transformer, prompt: Sequence[int], hidden: Tensor) -> list[float]:
    """Log probabilities of a prompt's tokens given those before them, from `hidden` (T, dim); 0 for the first, which
    nothing predicts. The logits of a few positions at a time, so that a long prompt fits."""
    targets = torch.tensor(prompt[1:], device=hidden.device)  # position t predicts token t + 1
    chunk = max(1, LOGITS_AT_ONCE // model.vocab_size)
    parts = zip(hidden[:-1].split(chunk), targets.split(chunk), strict=True)
    return [0.0, *torch.cat([token_logprobs(model.logits(part), ids) for part, ids in parts]).tolist()]


def not_finite(model: Transformer, again: Callable[[], Iterable[Tensor]]) -> FloatingPointError:
    """The error that names the first layer that gives NaN or infinity when the rows (T, dim) of a step are computed
    again. The cache is emptied."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: None if output.isfinite().all() else found.append(name)

    named: dict[str, nn.Module] = {"tok_embeddings": model.tok_embeddings, "norm": model.norm, "output": model.output}
    named |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in named.items()]
    try:
        model.logits(torch.stack([row[-1] for row in again()]))
    finally:
        for hook in hooks:
            hook.remove()
    for cache in model.buffers():  # a masked NaN is still NaN times 0: it would break the next batch too
        cache.zero_()
    where = f"the first layer to give such values is {found[0]}" if found else "computed again, they were not"
    return FloatingPointError(f"the logits are NaN or infinite; {where}")
