"""Logits -> next token ids. Pure functions; randomness comes from the generator that is passed in."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One token id for each row of logits (B, V) -> (B,): the likeliest at temperature 0, else drawn from the
    softmax of logits / temperature, cut to its nucleus of probability `top_p`."""
    if temperature == 0:
        return logits.argmax(-1)
    # The maximum becomes 0, and 1e-30 is as cold as it gets, so that a tiny temperature cannot overflow.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30), -1)
    if top_p < 1:
        probs = nucleus(probs, top_p)
    # The first of exponential clocks with these rates to ring is a draw from them (as `multinomial`, which on a GPU
    # waits for the result); a clock that rounds to 0 must not turn probability 0 into NaN.
    clocks = torch.empty_like(probs).exponential_(generator=generator).clamp_min_(1e-30)
    return (probs / clocks).argmax(-1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities (B, V) with all but the smallest set of likeliest tokens that reaches `top_p` set to zero, and the
    rest scaled to sum to 1 (Holtzman et al. 2019, arXiv 1904.09751). The likeliest token always stays."""
    ordered, indices = probs.sort(-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p  # the likelier tokens reach it already
    beyond[:, 0] = False
    ordered = ordered.masked_fill(beyond, 0.0)
    return torch.zeros_like(probs).scatter(-1, indices, ordered / ordered.sum(-1, keepdim=True))


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log probabilities (...) of tokens (...) under the full softmax of logits (..., V)."""
    return torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
