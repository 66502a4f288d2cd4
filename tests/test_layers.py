"""Products: every way to multiply gives what a plain product gives, whatever the number of rows and their strides."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from small import random_model, relative_error

from llama import layers

ROWS = [0, 1, 2, 3, 4, 7, 8, 33, 127, 128, 255, 256, 300]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("rows", ROWS)
def test_products_of_any_number_of_rows(rows, dtype, bound):
    weight, x = torch.randn(48, 40).to(dtype), torch.randn(rows, 40).to(dtype)
    y = layers.linear(x, weight)
    assert y.dtype == dtype
    assert not rows or relative_error(y.double(), F.linear(x.double(), weight.double())) < bound


@pytest.mark.parametrize("out", [8, 40, 48, 49])
def test_products_of_weights_of_any_number_of_rows(out):
    weight, x = torch.randn(out, 40), torch.randn(2, 3, 40)
    assert torch.allclose(layers.linear(x, weight), F.linear(x, weight), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 130])
def test_products_of_strided_input(rows):
    """Half of a wider matrix, as gate and up are, and columns one behind the other, as a product on the left leaves."""
    weight = torch.randn(48, 40)
    for x in (torch.randn(rows, 2, 80)[..., 40:], torch.randn(40, rows, 2).permute(1, 2, 0)):
        assert torch.allclose(layers.linear(x, weight), F.linear(x.contiguous(), weight), atol=1e-5)


def test_weights_side_by_side_are_one():
    whole = torch.randn(10, 4)
    parts = [torch.nn.Parameter(part) for part in whole.split([5, 2, 3])]
    assert torch.equal(layers.joined(parts), whole)
    assert layers.joined(parts[1:]).data_ptr() == parts[1].data_ptr()
    assert layers.joined([parts[0], parts[2]]) is None
    assert layers.joined([parts[0], torch.nn.Parameter(parts[1].clone()), parts[2]]) is None
    assert layers.joined([part.view(3, 4).t() for part in torch.randn(24).split(12)]) is None


@pytest.mark.parametrize("shape", [(130,), (2, 64), (1, 129)])
def test_many_rows_of_tall_weights_side_by_side(shape):
    whole = torch.randn(96, 16)
    up, gate = (mock.Mock(weight=part, compiled=False) for part in whole.split(48))
    x = torch.randn(*shape, 32)[..., 16:]
    with torch.inference_mode():
        both = layers.columns(x, up, gate)
    assert both.shape == (*shape, 96)
    assert both.stride(-1) == math.prod(shape) or not layers.MKL or layers.AMD
    assert torch.allclose(both, F.linear(x, whole), atol=1e-5)


def test_layers_give_one_result_joined_or_not():
    attention = random_model().layers[0].attention
    parts = (attention.wq, attention.wk, attention.wv)
    x = torch.randn(2, 3, 64)
    with torch.inference_mode():
        apart = layers.columns(x, *parts)
        whole = torch.cat([layer.weight for layer in parts])
        for layer, rows in zip(parts, whole.split([len(layer.weight) for layer in parts]), strict=True):
            layer.weight = torch.nn.Parameter(rows, requires_grad=False)
        assert layers.joined([layer.weight for layer in parts]) is not None
        assert torch.allclose(layers.columns(x, *parts), apart, atol=1e-5)
    parts[1].weight = torch.nn.Parameter(torch.zeros_like(parts[1].weight))  # a user's own: no longer joined
    with torch.inference_mode():
        assert not layers.columns(x, *parts)[..., 64:96].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_whose_onednn_does_not_know_a_dtype_multiplies_plainly(monkeypatch, dtype):
    weight, x = torch.randn(48, 40).to(dtype), torch.randn(12, 40).to(dtype)
    monkeypatch.setattr(layers, "onednn_knows", lambda asked: asked != dtype)
    monkeypatch.setattr(layers, "from_left", None)
    assert torch.equal(layers.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(("dtype", "tiles", "numbers"), [(torch.bfloat16, True, 24), (torch.bfloat16, False, 36)])
def test_few_numbers_of_rows_reach_onednn(monkeypatch, dtype, tiles, numbers):
    """It keeps kernels for each: 41 MB after 1,000 small requests. MKL keeps none."""
    monkeypatch.setattr(layers, "TILES", tiles)
    monkeypatch.setattr(layers, "AMD", False)
    padded = {rows: rows + layers.missing(rows, dtype) for rows in range(1, 1025)}
    assert len({*padded.values()}) == numbers
    assert all(0 <= to - rows < (32 if rows <= 256 else 64) for rows, to in padded.items())
    assert all(layers.missing(rows, torch.float32) == 0 for rows in (1, 2, 3, 128, 1000))
    monkeypatch.setattr(layers, "AMD", True)
    assert [layers.missing(rows, torch.float32) for rows in (1, 8, 9, 128, 1000)] == [0, 0, 7, 0, 24]


@pytest.mark.parametrize("rows", ROWS[1:])
def test_products_on_a_cpu_by_amd(monkeypatch, rows):
    """MKL is used for up to four rows, oneDNN for the others."""
    monkeypatch.setattr(layers, "AMD", True)
    weight, x = torch.randn(128, 40), torch.randn(rows, 2, 80)[..., 40:]
    few, more = layers.product(weight, rows).func, layers.product(weight[:48], rows).func
    assert (few is layers.in_parts) == (rows <= 4)
    assert more is (layers.from_left if 4 <= rows < 128 else layers.from_right)
    assert (layers.product(torch.empty(64, 1600), rows).func is layers.in_parts) == (rows <= 3)
    for part in (weight, weight[:48], weight[:, 8:].contiguous()):
        rest = x[..., -part.shape[1] :]
        assert relative_error(layers.linear(rest, part), F.linear(rest, part)) < 1e-6
