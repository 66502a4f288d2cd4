"""Logits -> next token ids. Pure functions; randomness comes from the generator that is passed in."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One token id for each row of logits (B, V) -> (B,): the likeliest at temperature 0, else drawn from the
    softmax of logits / temperature, cut to its nucleus of probability `top_p`."""
    if temperature == 0:
        return logits.argmax(-1)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
    if top_p < 1:
        probs = nucleus(probs, top_p)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities (B, V) with all but the smallest set of likeliest tokens that reaches `top_p` set to zero, and the
    rest scaled to sum to 1 (Holtzman et al. 2019, arXiv 1904.09751). The likeliest token always stays."""
    ordered, indices = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # probability of the tokens likelier than this one
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probs).scatter(-1, indices, ordered / ordered.sum(-1, keepdim=True))


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log probabilities (...) of tokens (...) under the full softmax of logits (..., V)."""
    return torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
