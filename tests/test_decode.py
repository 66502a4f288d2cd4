"""The fast step is the plain step."""

import pytest
import torch
from small import GQA, SHAPES, random_model, relative_error

from llama import ModelArgs, bench, parallel
from llama.decode import Flat, decoder

POSITIONS = [[9], [9, 9], [3, 11, 7], [12, 1, 1, 12, 5]]


def both(model, positions, V=128):
    """Hidden states of the plain and the flat step after the same prompts, and what each left in the cache."""
    B = len(positions)
    torch.manual_seed(1)
    prompt, token = torch.randint(0, V, (B, max(positions))), torch.randint(0, V, (B, 1))
    found = []
    with torch.inference_mode():
        for choose in (lambda model, B: model.hidden, decoder):
            model.allocate_cache()
            model.hidden(prompt, 0)
            hidden = choose(model, B)(token, positions)
            found.append((hidden, torch.cat([cache.flatten() for cache in model.buffers()])))
    return found


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_flat_is_plain(shape, positions):
    (plain, plain_cache), (flat, flat_cache) = both(random_model(SHAPES[shape], max_batch_size=5), positions)
    assert relative_error(flat, plain) < 1e-5
    assert relative_error(flat_cache, plain_cache) < 1e-5


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_flat_is_plain_within_the_rounding_of_bfloat16(positions):
    (plain, _), (flat, _) = both(random_model(max_batch_size=5).bfloat16(), positions)
    exact, _ = both(random_model(max_batch_size=5), positions)[0]
    assert flat.dtype == torch.bfloat16
    assert relative_error(flat.float(), exact) < 1.2 * relative_error(plain.float(), exact) + 1e-3


def test_flat_is_plain_with_joined_weights():
    args = ModelArgs(**GQA, vocab_size=128, max_batch_size=4, max_seq_len=64)
    parallel.init_model_parallel()
    model = bench.loaded(bench.RandomWeights(), args, torch.device("cpu"), torch.float32)
    (plain, _), (flat, _) = both(model, [3, 7])
    assert relative_error(flat, plain) < 1e-5


def test_a_cpu_decodes_flat():
    model = random_model()
    assert isinstance(decoder(model, 2), Flat)
    assert decoder(random_model().to("meta"), 2) != decoder(model, 2)


def on_several_ranks():
    (plain, _), (flat, _) = both(random_model(), [3, 7])
    return relative_error(flat, plain)


@pytest.mark.parametrize("world_size", [2, 4])
def test_flat_is_plain_on_several_ranks(ranks, world_size):
    assert max(ranks(world_size).run(on_several_ranks)) < 1e-5
