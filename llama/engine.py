"""Tokens in, tokens out, one step at a time. Every way to generate drains `steps`; there is no second loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .model import Transformer
from .parallel import broadcast
from .sampling import token_logprobs

LOGITS_AT_ONCE = 2**25  # float32 values held while a prompt is scored: 128 MiB


class Token(NamedTuple):
    id: int
    logprob: float | None = None


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
    # Right padding: what a row computes behind its own last token, no token of its own ever looks at, and its cache
    # slots are overwritten before they are reached. Any id serves.
    padded = [[*prompt] + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    tokens, positions = torch.tensor(padded, device=device), [0]  # (B, T)
    hidden = model.hidden(tokens, positions)  # (B, T, dim)
    if echo:
        none: list[list[float | None]] = [[None] * max(lengths)] * len(prompts)
        scored = prompt_logprobs(model, tokens, hidden) if logprobs else none
        yield [list(map(Token, prompt, row)) for prompt, row in zip(prompts, scored, strict=True)]
    hidden = hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1]  # (B, dim)
    while any(live):
        logits = model.logits(hidden)  # (B, V)
        finite = logits.isfinite().all()
        chosen = sample(logits.where(finite, 0.0))  # (B,); drawing from NaN would abort the process on a GPU
        # One message and one synchronization a step: the ids, and whether they can be trusted.
        *ids, ok = broadcast(torch.cat((chosen, finite.long()[None]))).tolist()
        if not ok:
            where = blame(model, tokens, positions)
            raise FloatingPointError(f"the logits are NaN or infinite; the first layer to give such values is {where}")
        chosen = torch.tensor(ids, device=device)
        scores: list[float | None] = token_logprobs(logits, chosen).tolist() if logprobs else [None] * len(ids)
        gained: Step = [[] for _ in ids]
        for i, id in enumerate(ids):
            if live[i] and id not in stop_ids:
                gained[i] = [Token(id, scores[i])]
                lengths[i] += 1
            live[i] = bool(gained[i]) and lengths[i] < limits[i]
        yield gained
        if any(live):
            # A row that has ended goes through the motions at its last position.
            tokens, positions = chosen[:, None], [length - 1 for length in lengths]
            hidden = model.hidden(tokens, positions)[:, 0]


def prompt_logprobs(model: Transformer, tokens: Tensor, hidden: Tensor) -> list[list[float | None]]:
    """Log probabilities (B, T) of tokens (B, T) given those before them, from `hidden` (B, T, dim); 0 for the first,
    which nothing predicts. The logits of a few positions at a time, so that a long prompt fits."""
    B, T = tokens.shape
    chunk = max(1, LOGITS_AT_ONCE // (B * model.vocab_size))
    parts = [torch.zeros(B, 1, device=tokens.device)]
    for begin in range(0, T - 1, chunk):
        targets = tokens[:, begin + 1 : begin + 1 + chunk]  # position t predicts token t + 1
        parts.append(token_logprobs(model.logits(hidden[:, begin : begin + targets.shape[1]]), targets))
    return torch.cat(parts, 1).tolist()


def blame(model: Transformer, tokens: Tensor, positions: Sequence[int]) -> str:
    """The name of the first layer whose output for this step, computed again, is NaN or infinite."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: None if output.isfinite().all() else found.append(name)

    named: dict[str, nn.Module] = {"tok_embeddings": model.tok_embeddings, "norm": model.norm, "output": model.output}
    named |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in named.items()]
    try:
        model(tokens, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "not reproducible"
