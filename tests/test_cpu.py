"""cpu.cpp: its operators are what they are written for in PyTorch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from small import needs_cpp, relative_error

from llama.backends import cpu
from llama.backends.cpu import Matrix
from llama.model import rope_frequencies

COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
sleep 0.2
for last; do :; done
touch "$last"
"""
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
pytestmark = needs_cpp


@pytest.fixture(autouse=True)
def compiled():
    assert cpu.cpp()


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


def test_a_float_product_of_strided_rows():
    w, x = torch.randn(24, 32), torch.randn(2, 1, 64)[..., 32:]
    assert relative_error(Matrix(w)(x), F.linear(x, w)) < 1e-6


def attend(heads, turns, cache, places):
    """Attention of N tokens, (N, H D), by heads (N, (H + 2K) D). `places` are slot, first position and number of tokens
    of each sequence."""
    return cpu.ops.attend(heads.float().contiguous(), turns, cache, places).type_as(heads)


def inputs(N, K, group, D, dtype=torch.float32, rows=1):
    """Heads of N tokens, turns and a cache."""
    turns = torch.view_as_real(rope_frequencies(torch.arange(100), D, 1e4))
    return torch.randn(N, (K * group + 2 * K) * D), turns, torch.randn(rows, 2 * K, 100, D).to(dtype)


def attend_plainly(heads, turns, cache, places):
    """What `attend` is to do, token by token."""
    seen, places = [], zip(*[iter(places)] * 3, strict=True)
    rows = [(row, position) for row, start, T in places for position in range(start, start + T)]
    for token, (row, position) in zip(heads, rows, strict=True):
        kept = cache[row]
        K, D = len(kept) // 2, kept.shape[-1]
        q, k, v = token.view(-1, D).split((len(token) // D - 2 * K, K, K))
        turned = torch.view_as_complex(torch.cat((q, k)).view(-1, D // 2, 2)) * torch.view_as_complex(turns[position])
        q, k = torch.view_as_real(turned).flatten(1).split((len(q), K))
        kept[:, position] = torch.cat((k, v))
        k, v = kept[:, : position + 1].to(q).chunk(2)
        seen.append(F.scaled_dot_product_attention(q.view(K, -1, D), k, v).flatten())
    return torch.stack(seen)


PLACES = [  # row, position, tokens
    [0, 0, 1],
    [0, 99, 1],
    [0, 5, 1, 1, 0, 1, 2, 63, 1],
    [0, 0, 16],
    [0, 3, 4, 1, 50, 50, 2, 0, 49],
    [2, 84, 16, 0, 9, 15],
]


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize(("K", "group", "D"), [(3, 1, 64), (2, 4, 128), (1, 7, 48), (4, 2, 16)])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_attention(places, K, group, D, dtype, bound):
    """Each row up to its own position, whatever lies behind it in the cache."""
    spans = [places[i : i + 3] for i in range(0, len(places), 3)]
    heads, turns, cache = inputs(sum(T for _, _, T in spans), K, group, D, dtype, rows=3)
    expected = cache.clone()
    for row, start, T in spans:
        cache[row, :, start + T :] = torch.nan
    found = attend(heads.clone(), turns, cache, places)
    assert relative_error(found, attend_plainly(heads, turns, expected, places)) < bound
    for row, start, T in spans:
        torch.testing.assert_close(cache[row, :, : start + T], expected[row, :, : start + T])
        assert cache[row, :, start + T :].isnan().all()
    assert attend(heads.to(dtype), turns, cache, places).dtype == dtype


@pytest.mark.parametrize("T", [1, 16])
def test_attention_to_what_differs_widely(T):
    """The largest is taken off before the exponential function: else 300 were infinity, and -300 nothing at all. A
    score of 300 is rounded by up to 1.5e-5, and so is what it makes of a share."""
    for scale in (300.0, -300.0):
        heads, turns, cache = inputs(T, 1, 1, 16)
        turns[..., 0], turns[..., 1] = 1, 0
        cache[:, 0] = scale / 4 * torch.linspace(0.9, 1, 100)[:, None]
        heads[:, :32] = torch.cat((torch.ones(16), torch.full((16,), scale / 4)))
        expected = attend_plainly(heads, turns, cache.clone(), [0, 19, T])
        assert relative_error(attend(heads, turns, cache, [0, 19, T]), expected) < 3e-5


@pytest.mark.parametrize("T", [1, 20])
def test_attention_to_what_is_not_finite_is_not_finite_in_its_row(T):
    heads, turns, cache = inputs(2 * T, 2, 1, 16, rows=2)
    cache[1, :, 3] = torch.nan
    first, second = attend(heads, turns, cache, [0, 7, T, 1, 7, T]).split(T)
    assert first.isfinite().all() and second.isnan().all()


@pytest.mark.parametrize(
    ("places", "what"),
    [
        ([3, 0, 2], "row 3 of 3"),
        ([-1, 0, 2], "row -1 of 3"),
        ([0, 99, 2], "position 100 of 100"),
        ([0, -1, 2], "position -1 of 100"),
        ([0, 0, 3], "2 tokens for 3 places"),
    ],
)
def test_attention_touches_no_memory_that_is_not_its_own(places, what):
    heads, turns, cache = inputs(2, 1, 1, 16, rows=3)
    with pytest.raises((IndexError, ValueError), match=what):
        attend(heads, turns, cache, places)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """What notes how it is called, in place of a compiler."""
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_several_that_start_together_compile_once(compiler, monkeypatch):
    with ThreadPoolExecutor(4) as pool:
        [made] = {*pool.map(lambda _: cpu.library(), range(4))}
    log = compiler.with_suffix(".log")
    assert made.exists() and len(log.read_text().splitlines()) == 1
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})  # a home that two machines share
    assert cpu.library() != made and made.exists() and len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'In file x:' >&2; echo 'x.cpp:3: fatal error: no torch' >&2; exit 1", "x.cpp:3: fatal error: no torch"),
        ("echo 'ld: final link failed: no space' >&2; echo 'error: ld' >&2; exit 1", "ld: final link failed: no space"),
        ("printf '\\377' >&2; exit 3", "compiler ended with 3"),
    ],
)
def test_a_compiler_that_fails_leaves_nothing_and_its_error_is_told(script, why, compiler, caplog):
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    assert cpu.cpp.__wrapped__() is False
    assert caplog.messages[-1].startswith("cpu.cpp is not compiled, which is slower: RuntimeError: ")
    assert caplog.messages[-1].endswith(why)
    assert not [*compiler.parent.glob("cache/*/*.so")]


def test_without_a_place_for_what_is_compiled_there_is_none(compiler, caplog):
    (compiler.parent / "cache").write_text("a file")
    assert cpu.cpp.__wrapped__() is False
    assert "cpu.cpp is not compiled, which is slower: NotADirectoryError" in caplog.text


def test_without_a_compiler_there_is_none(compiler, caplog):
    compiler.unlink()
    assert cpu.cpp.__wrapped__() is False
    assert caplog.messages == [
        f"cpu.cpp is not compiled, which is slower: RuntimeError: there is no {compiler}; install it, or name another "
        "compiler in CXX"
    ]


def test_what_is_compiled_already_needs_neither_compiler_nor_lock(compiler):
    made = cpu.library()
    compiler.unlink()
    made.with_name("lock").unlink()
    made.parent.chmod(0o555)
    assert cpu.library() == made
    assert not made.with_name("lock").exists()


def test_the_compiler_may_have_arguments(compiler, monkeypatch):
    monkeypatch.setenv("CXX", f"'{compiler}' -O1")
    cpu.library()
    assert compiler.with_suffix(".log").read_text().startswith("-O1 -std=c++20")
