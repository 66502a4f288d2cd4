"""Sampling against distributions worked out by hand."""

import pytest
import torch

from llama.sampling import nucleus, sample, token_logprobs

PROBS = torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.1, 0.2, 0.3, 0.4]])


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.4, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (0.6, [[0.625, 0, 0.375, 0], [0, 0, 3 / 7, 4 / 7]]),
        (0.9, [[10 / 19, 0, 6 / 19, 3 / 19], [0, 2 / 9, 3 / 9, 4 / 9]]),
        (1e-9, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (5e-324, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (1.0, PROBS.tolist()),
    ],
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, expected):
    assert torch.allclose(nucleus(PROBS, top_p), torch.tensor(expected, dtype=torch.float32))


def test_temperature_zero_takes_the_likeliest():
    assert sample(PROBS.log(), 0, 1.0).tolist() == [0, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    """Dividing by it must not overflow."""
    logits = torch.tensor([[1e4, -1e4, 9.9e3], [0.0, 3.0, 1.0]])
    assert sample(logits, temperature, 0.9).tolist() == [0, 1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.5)])
def test_draws_follow_the_distribution(temperature, top_p):
    """Chi-square on 20,000 draws, at a significance of 0.001 with 3 degrees of freedom."""
    exact = PROBS[0] ** (1 / temperature)
    exact /= exact.sum()
    order = exact.argsort(descending=True)
    keep = order[: int((exact[order].cumsum(0) < top_p - 1e-6).sum()) + 1]
    expected = torch.zeros(4)
    expected[keep] = exact[keep] / exact[keep].sum()
    generator = torch.Generator().manual_seed(0)
    draws = sample(PROBS[:1].log().expand(20_000, 4), temperature, top_p, generator)
    counts = draws.bincount(minlength=4)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts[kept] - 20_000 * expected[kept]) ** 2 / (20_000 * expected[kept])).sum()
    assert chi_square < 16.27


def test_log_probabilities_are_those_of_the_full_softmax():
    logits = PROBS.log() + 7
    assert token_logprobs(logits, torch.tensor([2, 0])).exp().tolist() == pytest.approx([0.3, 0.1])
