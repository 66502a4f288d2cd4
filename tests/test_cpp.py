"""cpu.cpp: its operators are what they are written for in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from small import needs_cpp, relative_error

from llama import cpp
from llama.layers import product

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
pytestmark = needs_cpp


@pytest.fixture(autouse=True)
def compiled():
    assert cpp.cpp()


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("out", [1, 11, 12, 64, 95])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 21])
def test_float_products(rows, out, dtype, bound):
    x, w = torch.randn(rows, 80).to(dtype), torch.randn(out, 80).to(dtype)
    y = cpp.float_product(x, w)
    assert y.dtype == dtype
    assert relative_error(y.double(), F.linear(x.double(), w.double())) < bound


def test_a_row_of_a_float_product_is_computed_as_it_would_be_alone():
    x, w = torch.randn(15, 96), torch.randn(40, 96)
    assert torch.equal(cpp.float_product(x, w), torch.cat([cpp.float_product(row[None], w) for row in x]))


@pytest.mark.parametrize("columns", [32, 40])
def test_a_float_product_of_strided_rows(columns):
    """Those of 40 columns are no whole vectors, and multiplied by a library."""
    w, both = torch.randn(24, columns), torch.randn(2, 1, 2 * columns)
    x = both[..., columns:]
    assert relative_error(product(w, 2, compiled=True)(x), F.linear(x, w)) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize(("K", "group", "D"), [(3, 1, 64), (2, 4, 128), (1, 7, 48), (4, 2, 16)])
@pytest.mark.parametrize("at", [[0], [99], [5, 0, 63]], ids=str)
def test_attention(at, K, group, D, dtype, bound):
    """Each row up to its own position, whatever lies behind it in the cache."""
    q, cache = torch.randn(len(at), K, group, D).to(dtype), torch.randn(len(at), 2 * K, 100, D).to(dtype)
    for row, position in zip(cache, at, strict=True):
        row[:, position + 1 :] = torch.nan
    found = cpp.attend(q, cache, torch.tensor(at))
    assert found.dtype == dtype
    plain = cpp.attend_plainly(q.double(), cache.nan_to_num().double(), torch.tensor(at))
    assert relative_error(found.double(), plain) < bound


def test_attention_to_what_differs_widely():
    """The largest is taken off before the exponential function: else 300 were infinity, and -300 nothing at all."""
    for scale in (300.0, -300.0):
        cache = torch.randn(1, 2, 20, 16)
        cache[:, 0] = scale / 4 * torch.linspace(0.9, 1, 20)[:, None]
        q = torch.ones(1, 1, 1, 16)
        at = torch.tensor([19])
        assert relative_error(cpp.attend(q, cache, at), cpp.attend_plainly(q, cache, at)) < 1e-5


def test_attention_to_what_is_not_finite_is_not_finite_in_its_row():
    q, cache = torch.randn(2, 2, 1, 16), torch.randn(2, 4, 8, 16)
    cache[1, :, 3] = torch.nan
    found = cpp.attend(q, cache, torch.tensor([7, 7]))
    assert found[0].isfinite().all() and found[1].isnan().all()
