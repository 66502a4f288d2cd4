"""Linear layers: a product of any number of rows and of any strides."""

import pytest
import torch
import torch.nn.functional as F
from small import ROOT, relative_error

from llama import layers


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 8, 33, 127, 128, 255, 256, 300])
def test_products_of_any_number_of_rows(rows, dtype, bound):
    weight, x = torch.randn(48, 40).to(dtype), torch.randn(rows, 40).to(dtype)
    y = layers.linear(x, weight)
    assert (y.dtype, y.shape) == (dtype, (rows, 48))
    assert not rows or relative_error(y.double(), F.linear(x.double(), weight.double())) < bound


@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_strided_input(rows, dtype):
    weight = torch.randn(48, 40).to(dtype)
    for x in (torch.randn(rows, 2, 80)[..., 40:], torch.randn(40, rows, 2).permute(1, 2, 0)):
        x = x.to(dtype)
        assert torch.allclose(layers.linear(x, weight), F.linear(x.contiguous(), weight), atol=1e-5)


def test_few_numbers_of_rows_reach_onednn():
    """It keeps kernels for each: 41 MB after 1,000 small requests."""
    seen = []
    for rows in range(1, 1025):
        y = layers.in_few_shapes(lambda x: seen.append(len(x)) or x, torch.full((rows, 4), 2.0))
        assert y.shape == (rows, 4) and bool((y == 2).all())
    assert len({*seen}) == 36
    assert all(0 <= to - rows < (16 if rows <= 256 else 64) for rows, to in enumerate(seen, 1))


def test_the_layers_are_short():
    assert len((ROOT / "llama" / "layers.py").read_text().splitlines()) <= 100
