"""The kernels of the CUDA backend, run by Triton's interpreter on a CPU: they give what the model gives."""

import os

import pytest
import torch
from small import SHAPES, random_model, relative_error

if torch.cuda.is_available():
    pytest.skip("there the kernels run as they are: test_gpu.py", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, Triton's own among them
pytest.importorskip("triton")

from llama.backends.cuda import Cuda
from llama.batch import Batch, Sequence

PROMPTS = [[5, 17, 99, 3], [64], [127, 0, 7, 7, 7, 8, 9, 100, 101, 102]]


def decoded(backend, batch):
    """A decode step without a graph."""
    return backend.hidden(*batch[:3])


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_and_steps_give_the_models_logits(shape):
    """Prompts of several lengths in one pass, then steps of one sequence, of three, and of all with a longer one."""
    plain = random_model(SHAPES[shape])
    backend = Cuda(random_model(SHAPES[shape]))
    batch = Batch.of([(slot, 0, ids) for slot, ids in enumerate(PROMPTS)])
    hidden = backend.hidden(*batch[:3], batch)
    ends = torch.tensor([len(ids) for ids in PROMPTS]).cumsum(0) - 1
    expected = [plain(torch.tensor([ids]), 0)[0, -1] for ids in PROMPTS]
    assert relative_error(backend.logits(hidden[ends]), torch.stack(expected)) < 1e-5
    expected = []
    for slot, ids in enumerate(PROMPTS):
        step = Batch.of([(slot, len(ids), [11])])
        expected.append(plain(torch.tensor([[*ids, 11]]), 0)[:, -1])
        assert relative_error(backend.logits(decoded(backend, step)), expected[-1]) < 1e-5
    steps = Batch.of([(slot, len(ids), [11]) for slot, ids in enumerate(PROMPTS)])
    assert relative_error(backend.logits(decoded(backend, steps)), torch.cat(expected)) < 1e-5
    mixed = Batch.of([(0, 5, [12]), (2, 8, [101, 102, 11]), (1, 1, [11])])
    hidden = backend.hidden(*mixed[:3], mixed)
    assert mixed.sequences[1] == Sequence(2, 8, 3)
    longer = plain(torch.tensor([[*PROMPTS[0], 11, 12]]), 0)[:, -1]
    expected = torch.cat([longer, expected[2], expected[1]])
    assert relative_error(backend.logits(hidden[torch.tensor([0, 3, 4])]), expected) < 1e-5


def test_many_tokens_go_through_cublas():
    plain, backend = random_model(), Cuda(random_model())
    ids = torch.randint(128, (1, 40), generator=torch.Generator().manual_seed(0))
    batch = Batch.of([(1, 0, ids[0].tolist())])
    hidden = backend.hidden(*batch[:3], batch)
    assert relative_error(backend.logits(hidden), plain(ids, 0)[0]) < 1e-5


def test_padding_stores_nothing():
    backend = Cuda(random_model())
    step = Batch.of([(0, 0, [5])])
    backend.hidden(*step[:3])
    before = [layer.cache.clone() for layer in backend.layers]
    one = backend.logits(backend.hidden(*step[:3]))
    tokens, positions, slots = torch.tensor([5, 0]), torch.tensor([0, -1]), torch.tensor([0, 0])
    two = backend.logits(backend.hidden(tokens, positions, slots)[:1])
    assert relative_error(two, one) < 1e-5
    for layer, cache in zip(backend.layers, before, strict=True):
        assert relative_error(layer.cache, cache) < 1e-5
