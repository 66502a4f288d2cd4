"""Linear layers: matmuls of any number of rows and any strides."""

import pytest
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale
from small import GQA, ROOT, random_model, relative_error

from llama import checkpoint, layers, parallel


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 8, 33, 127, 128, 255, 256, 300])
def test_matmul_of_any_number_of_rows(rows, dtype, bound):
    weight, x = torch.randn(48, 40).to(dtype), torch.randn(rows, 40).to(dtype)
    y = layers.linear(x, weight)
    assert (y.dtype, y.shape) == (dtype, (rows, 48))
    assert not rows or relative_error(y.double(), F.linear(x.double(), weight.double())) < bound


@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_of_strided_input(rows, dtype):
    weight = torch.randn(48, 40).to(dtype)
    for x in (torch.randn(rows, 2, 80)[..., 40:], torch.randn(40, rows, 2).permute(1, 2, 0)):
        x = x.to(dtype)
        assert torch.allclose(layers.linear(x, weight), F.linear(x.contiguous(), weight), atol=1e-5)


def test_onednn_gets_few_different_numbers_of_rows(monkeypatch):
    """It caches kernels for each: 41 MB after 1,000 small requests."""
    seen = []
    monkeypatch.setattr(F, "linear", lambda x, weight: seen.append(len(x)) or x)
    for rows in range(1, 1025):
        y = layers.padded_linear(torch.full((rows, 4), 2.0), torch.eye(4))
        assert y.shape == (rows, 4) and bool((y == 2).all())
    assert len({*seen}) == 36
    assert all(0 <= to - rows < (16 if rows <= 256 else 64) for rows, to in enumerate(seen, 1))


def test_a_score_head_gets_few_different_numbers_of_rows(monkeypatch):
    """Regression: direct calls of a classifier in 16 bits left a kernel in oneDNN's cache for each length."""
    seen, real = set(), F.linear
    model = random_model({**GQA, "n_labels": 2}, max_seq_len=32).bfloat16()
    monkeypatch.setattr(F, "linear", lambda x, *rest, **more: seen.add(len(x)) or real(x, *rest, **more))
    for length in range(9, 33):
        assert model(torch.zeros(1, length, dtype=torch.long)).shape == (1, length, 2)
    assert seen == {16, 32}


def _gradients():
    """The gradients of this rank's part of a model. Those of weights that all ranks have are complete on each."""
    model = random_model(max_batch_size=0).requires_grad_(True)
    whole = random_state()
    for name, weight in model.named_parameters():
        dim = checkpoint.shard_dim(name)
        part = whole[name] if dim is None else whole[name].chunk(parallel.world_size(), dim)[parallel.rank()]
        weight.data.copy_(part)
    model(torch.arange(12).view(2, 6)).square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def random_state():
    generator = torch.Generator().manual_seed(1)
    args = random_model().params
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in checkpoint.shapes(args).items()}


def test_gradients_on_several_ranks_equal_those_on_one(ranks):
    """The layers have their own collectives, while fairscale's used global groups that others may have set."""
    one, parts = _gradients(), ranks(2).run(_gradients)
    for name, expected in one.items():
        dim = checkpoint.shard_dim(name)
        for found in [part[name] for part in parts] if dim is None else [torch.cat([p[name] for p in parts], dim)]:
            assert relative_error(found, expected) < 1e-5, name


def test_layers_are_fairscales():
    model = random_model()
    assert isinstance(model.output, fairscale.ColumnParallelLinear)
    assert isinstance(model.layers[0].attention.wo, fairscale.RowParallelLinear)
    assert isinstance(model.tok_embeddings, fairscale.ParallelEmbedding)


def test_the_layers_are_short():
    assert len((ROOT / "llama" / "layers.py").read_text().splitlines()) <= 100
