"""cpu.cpp: its operators are what they are written for in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from small import needs_cpp, random_model, relative_error

from llama import cpp
from llama.cpp import Matrix
from llama.layers import product
from llama.model import attend, causal_mask, rotations

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
pytestmark = needs_cpp


@pytest.fixture(autouse=True)
def compiled():
    assert cpp.cpp()


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize(("out", "columns"), [(1, 80), (11, 80), (12, 16), (64, 1040), (95, 2064)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 21, 33, 48, 100, 145, 530])
def test_float_products(rows, out, columns, dtype, bound):
    x, w = torch.randn(rows, columns).to(dtype), torch.randn(out, columns).to(dtype)
    y = Matrix(w)(x)
    assert y.dtype == dtype
    assert relative_error(y.double(), F.linear(x.double(), w.double())) < bound


@pytest.mark.parametrize(("dtype", "some"), [(torch.float32, 3), (torch.float32, 9), (torch.bfloat16, 1)])
def test_a_row_of_a_float_product_is_computed_as_it_would_be_among_others(dtype, some):
    """As many as are multiplied in the same way: up to 4, up to 8, and more in float32."""
    x, multiply = torch.randn(some * 5, 96).to(dtype), Matrix(torch.randn(40, 96).to(dtype))
    rows = x[:4] if some == 3 else x
    assert torch.equal(multiply(rows)[:some], multiply(rows[:some]))


@pytest.mark.parametrize("rows", [4, 8, 9, 60])
def test_what_is_not_finite_stays_in_its_row_and_output(rows):
    x, w = torch.randn(rows, 48), torch.randn(24, 48)
    x[1, 3], w[2, 5] = torch.inf, torch.nan
    y = Matrix(w)(x)
    expected = torch.zeros(rows, 24, dtype=torch.bool)
    expected[1], expected[:, 2] = True, True
    assert torch.equal(~y.isfinite(), expected)


@pytest.mark.parametrize(("B", "T", "S"), [(1, 1, 1), (2, 16, 16), (3, 48, 50), (1, 49, 300), (2, 130, 130)])
@pytest.mark.parametrize(("H", "K", "D"), [(2, 2, 16), (6, 2, 24), (4, 1, 64)])
def test_attention_of_prompts(B, T, S, H, K, D):
    q, cache = torch.randn(B, T, H, D), torch.randn(B, 2 * K, S + 3, D)
    k, v = cache[:, :, :S].chunk(2, 1)
    y = cpp.attend_causally(q, k, v)
    assert relative_error(y, attend(q, k, v, causal_mask(torch.arange(S - T, S)[None], S))) < 1e-5
    assert torch.equal(cpp.attend_causally(q, k.transpose(1, 2).contiguous().transpose(1, 2), v), y)


@pytest.mark.parametrize("columns", [32, 40])
def test_a_float_product_of_strided_rows(columns):
    """Those of 40 columns are no whole vectors, and multiplied by a library."""
    w, both = torch.randn(24, columns), torch.randn(2, 1, 2 * columns)
    x = both[..., columns:]
    assert relative_error(product(w, 2, compiled=True)(x), F.linear(x, w)) < 1e-6


def inputs(B, K, group, D, dtype=torch.float32):
    """Heads, turns and a cache."""
    turns = torch.view_as_real(rotations(torch.arange(100), D, 1e4))
    return torch.randn(B, (K * group + 2 * K) * D), turns, torch.randn(B, 2 * K, 100, D).to(dtype)


def attend_plainly(heads, turns, cache, at):
    """What `attend` is to do, row by row."""
    seen = []
    for row, kept, position in zip(heads, cache, at, strict=True):
        K, D = len(kept) // 2, kept.shape[-1]
        q, k, v = row.view(-1, D).split((len(row) // D - 2 * K, K, K))
        turned = torch.view_as_complex(torch.cat((q, k)).view(-1, D // 2, 2)) * torch.view_as_complex(turns[position])
        q, k = torch.view_as_real(turned).flatten(1).split((len(q), K))
        kept[:, position] = torch.cat((k, v))
        k, v = kept[:, : position + 1].to(q).chunk(2)
        seen.append(F.scaled_dot_product_attention(q.view(K, -1, D), k, v).flatten())
    return torch.stack(seen)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize(("K", "group", "D"), [(3, 1, 64), (2, 4, 128), (1, 7, 48), (4, 2, 16)])
@pytest.mark.parametrize("at", [[0], [99], [5, 0, 63]], ids=str)
def test_attention(at, K, group, D, dtype, bound):
    """Each row up to its own position, whatever lies behind it in the cache."""
    heads, turns, cache = inputs(len(at), K, group, D, dtype)
    expected = cache.clone()
    for row, position in zip(cache, at, strict=True):
        row[:, position + 1 :] = torch.nan
    found = cpp.attend(heads, turns, cache, torch.tensor(at))
    assert relative_error(found, attend_plainly(heads, turns, expected, at)) < bound
    for row, like, position in zip(cache, expected, at, strict=True):
        torch.testing.assert_close(row[:, : position + 1], like[:, : position + 1])
        assert row[:, position + 1 :].isnan().all()
    assert cpp.attend(heads.to(dtype), turns, cache, torch.tensor(at)).dtype == dtype


def test_attention_to_what_differs_widely():
    """The largest is taken off before the exponential function: else 300 were infinity, and -300 nothing at all. A
    score of 300 is rounded by up to 1.5e-5, and so is what it makes of a share."""
    for scale in (300.0, -300.0):
        heads, turns, cache = inputs(1, 1, 1, 16)
        turns[..., 0], turns[..., 1] = 1, 0
        cache[:, 0] = scale / 4 * torch.linspace(0.9, 1, 100)[:, None]
        heads[:, :32] = torch.cat((torch.ones(16), torch.full((16,), scale / 4)))
        expected = attend_plainly(heads, turns, cache.clone(), [19])
        assert relative_error(cpp.attend(heads, turns, cache, torch.tensor([19])), expected) < 3e-5


def test_attention_to_what_is_not_finite_is_not_finite_in_its_row():
    heads, turns, cache = inputs(2, 2, 1, 16)
    cache[1, :, 3] = torch.nan
    found = cpp.attend(heads, turns, cache, torch.tensor([7, 7]))
    assert found[0].isfinite().all() and found[1].isnan().all()


@torch.inference_mode()
def test_prompts_in_cpp_are_plain_ones():
    """In one go, in two, from places of their own, and packed."""
    model = random_model(max_batch_size=3, max_seq_len=128)
    ids = torch.randint(3, 128, (3, 100))
    rows = [ids[0, :70].tolist(), ids[1, :70].tolist(), ids[2, :33].tolist()]

    def found():
        return [
            model(ids),
            model(ids[:, :40]),
            model(ids[:, 40:], 40),
            model(ids[:, 40:60], [40, 7, 12]),
            model.logits(model.packed(rows, [0, 0, 20])),
        ]

    plain = found()
    model.use_cpp()
    for one, other in zip(found(), plain, strict=True):
        assert relative_error(one, other) < 1e-5


def test_gradients_are_computed_plainly():
    model = random_model(max_batch_size=0).requires_grad_(True)
    ids = torch.randint(3, 128, (2, 20))
    model.use_cpp()
    model(ids).square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())
