"""Sampling against distributions worked out by hand."""

import itertools
import math
import random

import pytest
import torch

from llama import sampling
from llama.sampling import Sampler, SamplingParams, filter_top_k_top_p, penalize, sample, top_logprobs

PROBS = torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.1, 0.2, 0.3, 0.4]])
LOGITS = [2.0, -1.0, 0.5, 1.5, 0.0, -3.0]
PROMPT, ANSWER = [0, 1], [2, 2, 4]  # tokens that penalties count


def exact(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition=1.0, frequency=0.0, presence=0.0, bias=()):
    """The distribution over LOGITS that the options leave, computed token by token in plain Python."""
    logits = [logit + dict(bias).get(i, 0) for i, logit in enumerate(LOGITS)]
    for i in {*PROMPT, *ANSWER}:
        logits[i] = logits[i] / repetition if logits[i] > 0 else logits[i] * repetition
    for i in {*ANSWER}:
        logits[i] -= frequency * ANSWER.count(i) + presence
    weights = [math.exp(logit / temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    total, reached, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if kept and (reached >= top_p * total or weights[i] < min_p * weights[order[0]]):
            break
        kept.append(i)
        reached += weights[i]
    return [weights[i] / reached if i in kept else 0.0 for i in range(len(weights))]


def sampler_of(rows, prompts, vocab_size):
    """A sampler whose slots have these requests."""
    sampler = Sampler(len(rows), vocab_size, "cpu")
    for slot, (params, prompt) in enumerate(zip(rows, prompts, strict=True)):
        sampler.admit(slot, params, prompt)
    return sampler


def drawn(settings, rows, draws):
    """How often each id is sampled in `draws` draws of each row, after PROMPT and ANSWER. Rows have different seeds."""
    params = [SamplingParams(**settings, seed=i) for i in range(rows)]
    sampler, slots = sampler_of(params, [PROMPT] * rows, 6), range(rows)
    logits = torch.tensor([LOGITS]).expand(rows, 6)
    sampler(logits, slots, [0] * rows)
    for id in ANSWER:
        sampler.count(torch.full((rows,), id), slots)
    ids = torch.cat([sampler(logits, slots, [n] * rows) for n in range(3, 3 + draws)])
    return ids.bincount(minlength=6)


def chi_square(counts, expected):
    count, expected = counts.sum(), torch.tensor(expected)
    assert not counts[expected == 0].any()
    kept = expected > 0
    return ((counts - count * expected)[kept] ** 2 / (count * expected)[kept]).sum().item()


CRITICAL = {
    1: 0.0,
    2: 10.83,
    3: 13.82,
    4: 16.27,
    5: 18.47,
    6: 20.52,
}  # the critical value at 0.001, by the number of possible tokens
ONE_BY_ONE = [
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_p": 0.7},
    {"top_k": 3},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 0.4},
    {"presence_penalty": 0.6},
    {"logit_bias": {3: -math.inf, 5: 2.9}},
]
PAIRS = [{**a, **b} for a, b in itertools.combinations(ONE_BY_ONE, 2)]
ALL = {name: value for options in ONE_BY_ONE for name, value in options.items()} | {
    "top_p": 0.95,
    "top_k": 5,
    "min_p": 0.02,
}


@pytest.mark.parametrize(
    ("options", "few"),
    [*itertools.product([{}, *ONE_BY_ONE, ALL], [2, 512]), *zip(PAIRS, itertools.cycle([2, 512]), strict=False)],
    ids=str,
)
def test_draws_follow_the_distribution(options, few, monkeypatch):
    """Chi-square test of 20,000 draws at 0.001: every option, every pair, and all together."""
    monkeypatch.setattr(sampling, "FEW", few)
    by_hand = {name.removesuffix("_penalty"): value for name, value in options.items() if name != "logit_bias"}
    expected = exact(**by_hand, bias=options.get("logit_bias", {}))
    counts = drawn({"temperature": 1.0, **options}, 500, 40)
    assert chi_square(counts, expected) <= CRITICAL[sum(p > 0 for p in expected)]


def test_the_chi_square_test_rejects_a_slightly_wrong_distribution():
    """The test above can fail."""
    assert chi_square(drawn({"temperature": 1.1}, 500, 40), exact()) > CRITICAL[6]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.4, [[0.5, 0, 0, 0], [0.4, 0, 0, 0]]),
        (0.6, [[0.5, 0.3, 0, 0], [0.4, 0.3, 0, 0]]),
        (0.9, [[0.5, 0.3, 0.15, 0], [0.4, 0.3, 0.2, 0]]),
        (1e-9, [[0.5, 0, 0, 0], [0.4, 0, 0, 0]]),
        (5e-324, [[0.5, 0, 0, 0], [0.4, 0, 0, 0]]),
        (1.0, [[0.5, 0.3, 0.15, 0.05], [0.4, 0.3, 0.2, 0.1]]),
    ],
)
def test_a_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, expected):
    falling = PROBS.sort(-1, descending=True).values
    zero = torch.zeros(2, 1)
    assert torch.equal(filter_top_k_top_p(falling, zero, torch.full((2, 1), top_p), zero), torch.tensor(expected))


def test_top_p_applies_after_top_k():
    falling = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    kept = filter_top_k_top_p(falling, torch.tensor([[2]]), torch.tensor([[0.6]]), torch.zeros(1, 1))
    assert kept.gt(0).tolist() == [[True, True, False, False]]  # 0.4 of 0.7 is not yet 0.6


def test_penalties():
    logits = torch.tensor([[2.0, -2.0, 1.0, 1.0]])
    prompt, counts = torch.tensor([[True, True, False, False]]), torch.tensor([[0.0, 0.0, 3.0, 0.0]])
    found = penalize(logits, prompt, counts, torch.tensor([2.0, 0.5, 0.25]).view(3, 1, 1))
    assert found.tolist() == [[1.0, -4.0, 0.5 - 1.5 - 0.25, 1.0]]


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 0.999999, 1 - 2**-24])
def test_tokens_of_probability_zero_are_not_sampled(u):
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.0]])
    assert sample(weights, torch.tensor([[u]])).item() == (1 if u < 0.5 else 3)


def chosen(logits, **settings):
    rows = len(logits)
    sampler = sampler_of([SamplingParams(**settings)] * rows, [[0]] * rows, logits.shape[1])
    return sampler(logits, range(rows), [0] * rows).tolist()


@pytest.mark.parametrize("vocab_size", [7, 100, 128, 32000, 32016])
def test_the_argmax_is_the_first_of_the_largest(vocab_size):
    logits = torch.randint(-2, 2, (6, vocab_size)).float()  # many logits are equal
    logits[1], logits[2], logits[3, -1], logits[4, 3:5] = -math.inf, 0, 5, math.nan
    assert sampling.argmax(logits).tolist() == [
        row.index(max(row)) if i != 4 else 3 for i, row in enumerate(logits.tolist())
    ]


def test_temperature_zero_takes_the_argmax():
    assert chosen(PROBS.log()) == [0, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-3])
def test_a_tiny_temperature_takes_the_argmax(temperature):
    """Dividing by it must not overflow."""
    logits = torch.tensor([[1e4, -1e4, 9.9e3], [0.0, 3.0, 1.0]])
    assert chosen(logits, temperature=temperature, top_p=0.9) == [0, 1]


def test_rows_have_their_own_settings_and_random_numbers():
    """A row gets the same tokens alone and in a batch, whatever the other rows' settings."""
    torch.manual_seed(0)
    logits = torch.randn(5, 1000)
    rows = [
        SamplingParams(0.0, seed=1),
        SamplingParams(1.0, seed=2),
        SamplingParams(0.7, 0.9, seed=3),
        SamplingParams(1.3, top_k=40, seed=4),
        SamplingParams(1.0, 0.8, 7, 0.1, 1.3, 0.2, 0.3, {5: 4.0}, 5),
    ]
    prompts = [[i, i + 1] for i in range(5)]
    together = sampler_of(rows, prompts, 1000)
    alone = [sampler_of([row], [prompt], 1000) for row, prompt in zip(rows, prompts, strict=True)]
    for n in range(100):
        ids = together(logits, range(5), [n] * 5)
        together.count(ids, range(5))
        for i, sampler in enumerate(alone):
            id = sampler(logits[i : i + 1], [0], [n])
            sampler.count(id, [0])
            assert id.item() == ids[i].item()


def test_slots_are_reset_for_each_request():
    """Whatever the previous request has sampled and counted, and whichever slots are in the batch."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(1.0, repetition_penalty=1.5, frequency_penalty=0.5, seed=3)

    def three(sampler, slot, slots, row):
        ids = []
        for n in range(3):
            found = sampler(logits[: len(slots)], slots, [n] * len(slots))
            sampler.count(found, slots)
            ids.append(found[row].item())
        return ids

    expected = three(sampler_of([params], [[7]], 50), 0, [0], 0)
    sampler = sampler_of([SamplingParams(), params, SamplingParams(2.0, seed=1)], [[1], [9, 9], [2]], 50)
    three(sampler, 1, [0, 1], 1)
    sampler.admit(1, params, [7])
    assert three(sampler, 1, [1, 0], 0) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1; it must be a number from 0"),
        ({"top_p": -0.1}, "top_p is -0.1; it must be a number from 0 (greedy) to 1"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be an int"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number from 1e-30"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias is {'a': 1.0}"),
        ({"logit_bias": {3: math.inf}}, "logit_bias is {3: inf}"),
        ({"frequency_penalty": 1e39}, "frequency_penalty is 1e+39"),  # infinite in single precision
        ({"logit_bias": {3: 10**400}}, "logit_bias is {3: 1000"),
        ({"top_k": 2**63}, "top_k is 9223372036854775808"),
        ({"seed": True}, "seed is True"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError) as error:
        SamplingParams(**settings)
    assert message in str(error.value)


def distribution(logits, rows):
    """The distribution (B, V) that is left of each row, in one batch."""
    sampler, slots = sampler_of(rows, [[0]] * len(rows), logits.shape[1]), tuple(range(len(rows)))
    table = sampler.sampling_tensors(slots)
    probs = sampling.softmax(logits, table.temperature)
    ids, wide = sampler.candidates(logits, probs, table)
    if wide:  # `nucleus` sorts none of these
        ids = logits.sort(dim=-1, descending=True, stable=True).indices
    kept = filter_top_k_top_p(probs.gather(-1, ids), *table.filters)
    return torch.zeros_like(logits).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))


def transformers_distribution(logits, row):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(float(row.temperature))]
    warpers += [TopKLogitsWarper(row.top_k)] if row.top_k else []
    warpers += [TopPLogitsWarper(row.top_p)] if row.top_p < 1 else []
    warpers += [MinPLogitsWarper(row.min_p)] if row.min_p else []
    return LogitsProcessorList(warpers)(None, logits[None])[0].softmax(-1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("vocab_size", [1024, 4096, 32_000, 128_256])
def test_each_row_of_a_batch_is_filtered_as_transformers_filters_it_alone(vocab_size, seed):
    """Regression: beside a row without top_k, only 512 candidates were kept for another row's 1,000: up to 35 tokens
    were missing."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocab_size, generator=generator) * chance.choice([0.1, 1, 3, 6])
    rows = [
        SamplingParams(
            temperature=chance.choice([0.3, 1.0, 3.0, 10.0]),
            top_p=chance.choice([0.13, 0.57, 0.9] if top_k == 0 else [0.57, 0.9, 0.99, 1]),
            top_k=top_k,
            min_p=chance.choice([0, 0, 0.05, 0.5]),
        )
        for top_k in (0, chance.choice([5, 70]), 600, 1000, chance.choice([900, vocab_size]))
    ]
    for row, alone, found in zip(rows, logits, distribution(logits, rows), strict=True):
        if not sampling.excludes(row):
            continue
        expected = transformers_distribution(alone, row)
        # Rounding of sums may change the last token; on some CPUs a single row is rounded differently.
        assert (found - expected).abs().sum() < 2e-3
        assert (found - distribution(alone[None], [row])[0]).abs().sum() < 1e-4


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1 - 2**-53])
@pytest.mark.parametrize("kind", ["flat", "steep", "equal", "coarse", "far apart", "one of two"])
def test_a_wide_nucleus_is_sampled_as_a_sorted_one(kind, top_p):
    generator, V = torch.Generator().manual_seed(7), 5000
    logits = torch.randn(V, generator=generator)
    logits = {
        "flat": logits * 0.1, "steep": logits * 4, "equal": logits * 0, "coarse": logits.bfloat16().float(),
        "far apart": logits * 1e4, "one of two": torch.where(logits > 0, logits, -math.inf),
    }[kind]  # fmt: skip
    for temperature in (0.7, 30.0):
        probs = sampling.softmax(logits[None], torch.tensor([[temperature]]))[0]
        order = logits.sort(descending=True, stable=True).indices
        edge = probs[order].double().cumsum(0)
        kept = int((edge - probs[order].double() < top_p).sum())
        for u in [0.0, 1 - 2**-24, *torch.rand(50, generator=generator).tolist()]:
            found = sampling.nucleus(logits, probs, top_p, torch.tensor([u]))
            place = int((order == found).nonzero())
            expected = int((edge <= u * edge[kept - 1]).sum())
            assert abs(place - min(expected, kept - 1)) <= 1 and place < kept + 1  # sums are rounded differently


def test_a_wide_nucleus_does_not_depend_on_other_rows():
    logits = torch.randn(1, 6000, generator=torch.Generator().manual_seed(1)).expand(2, 6000)
    row = SamplingParams(1.0, top_p=0.95, seed=5)
    others = [SamplingParams(1.0, top_k=k, min_p=m) for k, m in ((5000, 0), (0, 0.0001), (9, 0), (0, 0))]
    alone = sampler_of([row], [[0]], 6000)
    for other in [*others, SamplingParams(1.0, top_p=0.9)]:
        together = sampler_of([row, other], [[0], [0]], 6000)
        for n in range(20):
            assert together(logits, [0, 1], [n, n])[0] == alone(logits[:1], [0], [n])[0]


def test_top_k_beside_a_row_without():
    logits = 6 * torch.randn(1, 1024, generator=torch.Generator().manual_seed(0)).expand(2, 1024)
    for seed in range(10):
        row = SamplingParams(3.0, 0.9, 1000, seed=seed)
        together, alone = sampler_of([row, SamplingParams(3.0, 0.9)], [[0]] * 2, 1024), sampler_of([row], [[0]], 1024)
        for n in range(30):
            assert together(logits, [0, 1], [n, n])[0] == alone(logits[:1], [0], [n])[0]


@pytest.mark.parametrize("temperature", [1.0, 1e5, 1e10, 1e30])
@pytest.mark.parametrize("vocab_size", [50, 1024, 32_000])
def test_filters_at_high_temperatures_compare_logits(temperature, vocab_size):
    """From about 1e5 on probabilities are equal. Regression: the first ids were kept."""
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0))
    likeliest = logits.argsort(-1, descending=True)
    for n, cut in ((1, {"top_k": 1}), (7, {"top_k": 7}), (1, {"top_p": 0}), (3, {"top_k": 10, "top_p": 0.25})):
        rows = [SamplingParams(temperature, **cut), SamplingParams(temperature, top_p=0.5), SamplingParams(0.7)]
        kept = distribution(logits, rows)[0].nonzero()[:, 0].tolist()
        assert (temperature == 1 and len(cut) == 2) or sorted(kept) == sorted(likeliest[0, :n].tolist())
        drawn = sampler_of(rows, [[0]] * 3, vocab_size)(logits, [0, 1, 2], [0, 0, 0])[0]
        assert drawn in likeliest[0, :n]


@pytest.mark.parametrize(
    "options", [{"top_k": 30}, {"top_k": 300}, {"top_p": 0.03}, {"min_p": 0.9}, {"top_p": 0.3}], ids=str
)
def test_equal_logits_beside_any_row(options):
    """bfloat16 has few values, so that hundreds of logits are equal. Regression: which of them were kept depended on
    the other rows."""
    logits = torch.randn(2, 32_000, generator=torch.Generator().manual_seed(0)).mul(0.2).bfloat16().float()
    row = SamplingParams(1.0, **options)
    alone = distribution(logits[:1], [row])[0]
    order = logits[0].sort(descending=True, stable=True).indices
    count = int((alone > 0).sum())
    assert (alone > 0).nonzero()[:, 0].tolist() == order[:count].sort().values.tolist()
    for other in ({"top_k": 2000}, {"top_p": 0.99}, {"min_p": 0.01}, {}):
        assert torch.equal(distribution(logits, [row, SamplingParams(1.0, **other)])[0], alone)


@pytest.mark.parametrize("top_k", [1, 3, 60, 600])
def test_equal_probabilities_are_ordered_by_id(top_k):
    """The number of candidates depends on the batch; which of several equals are kept must not."""
    logits = (torch.arange(2000) % 7).float().expand(2, 2000)
    rows = [SamplingParams(1.0, top_k=top_k, seed=3), SamplingParams(1.0, top_k=1500, seed=4)]
    together, alone = sampler_of(rows, [[0], [0]], 2000), sampler_of(rows[:1], [[0]], 2000)
    for n in range(50):
        assert together(logits, [0, 1], [n, n])[0] == alone(logits[:1], [0], [n])[0]


def test_log_probabilities_are_those_of_the_full_softmax():
    logits = PROBS.log() + 7
    assert top_logprobs(logits, torch.tensor([2, 0]), 0)[:, 0].exp().tolist() == pytest.approx([0.3, 0.1])
