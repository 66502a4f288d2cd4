"""The C++ CPU backend against the plain backend."""

import pytest
import torch
from small import GQA, MODELS, SHAPES, needs_cpp, random_model, relative_error

from llama import Llama, ModelArgs, Transformer, backends, parallel
from llama.backends import choose, cpu, quantized
from llama.batch import Batch, Span
from llama.cli import measure as bench
from llama.devices import cpu_has

pytestmark = pytest.mark.usefixtures("two_threads")
CPU = torch.device("cpu")
STEPS = [  # (slot, start, length) of each sequence of a pass
    [(0, 9, 1)],
    [(0, 9, 1), (1, 9, 1)],
    [(0, 3, 1), (1, 11, 1), (3, 7, 1)],
    [(0, 12, 1), (1, 1, 1), (2, 1, 1), (3, 12, 1), (4, 5, 1)],
]
PASSES = [[(1, 0, 20)], [(0, 20, 24), (1, 3, 5), (2, 0, 17)], [(2, 5, 1), (4, 0, 30), (0, 9, 4)]]


def both(model, sequences, make=choose, V=128):
    """(logits, KV cache) of the plain backend and of another one, after the same prompts."""
    torch.manual_seed(1)
    slots = model.params.max_batch_size
    prompts = torch.randint(0, V, (slots, 30)).tolist()
    batch = Batch.of((slot, start, torch.randint(0, V, (length,)).tolist()) for slot, start, length in sequences)
    found = []
    with torch.inference_mode():
        for maker in (lambda model: model, make):
            model.allocate_cache()
            model.hidden(Batch.of((slot, 0, prompt) for slot, prompt in enumerate(prompts)))
            backend = maker(model)
            hidden = backend.hidden(batch)
            logits = backend.logits(hidden)
            kept = [kv[slot, :, : start + T] for kv in model.buffers() for slot, start, T in sequences]
            found.append((logits.clone(), torch.cat([part.flatten() for part in kept]).float()))
    return found


def compiled(model):
    backend = choose(model, compile=True)
    assert type(backend) is cpu.Native
    return backend


def loaded(shape=GQA, quantize=None, dtype=torch.float32, compile=True, **options):
    """A model whose wq, wk, wv and w1, w3 are adjacent in memory, as in one that was loaded."""
    args = ModelArgs(**{"vocab_size": 128, "max_batch_size": 12, "max_seq_len": 64, **shape, **options})
    parallel.init_model_parallel()
    rounding = quantized.scheme(quantize)
    return bench.loaded(bench.Source(bench.RandomWeights(CPU, rounding), args, CPU, dtype, rounding), compile)


WIDE = SHAPES["wide heads"]
KINDS = [
    (None, torch.float32, 1e-5),
    (None, torch.bfloat16, 0.02),  # the plain backend's rounding; see below
    (None, torch.float16, 0.002),
    ("int8", torch.float32, 0.01),
    ("int4", torch.float32, 0.02),
    ("int4", torch.bfloat16, 0.03),
]


@needs_cpp
@pytest.mark.parametrize("tokens", [512, 30, 7])
@pytest.mark.parametrize("sequences", [*STEPS, *PASSES], ids=str)
@pytest.mark.parametrize(("quantize", "dtype", "bound"), KINDS, ids=str)
def test_native_equals_plain(quantize, dtype, bound, sequences, tokens, monkeypatch):
    monkeypatch.setattr(cpu, "PASS", tokens)
    model = loaded(WIDE, quantize, dtype)
    for name, weight in model.named_parameters():
        weight.mul_(torch.rand_like(weight) + 0.5 if "norm" in name else 5)
    (plain, plain_cache), (native, native_cache) = both(model, sequences, compiled)
    assert native.dtype == torch.float32
    assert relative_error(native, plain) < 1.5 * bound  # the plain backend rounds more for several tokens
    assert relative_error(native_cache, plain_cache) < bound


@needs_cpp
@pytest.mark.parametrize("tokens", [512, 30, 7])
@pytest.mark.parametrize("outputs", [[1, 1, 2], [0, 0, 0], [20, 0, 1], [24, 5, 17], [0, 3, 17]], ids=str)
@pytest.mark.parametrize(
    ("quantize", "dtype"), [(None, torch.float32), (None, torch.bfloat16), ("int4", torch.float32)]
)
def test_the_last_layer_is_computed_only_where_it_is_needed(quantize, dtype, outputs, tokens, monkeypatch):
    """The rows that are needed, and the cache, are as without `outputs`; other rows are the last layer's input."""
    monkeypatch.setattr(cpu, "PASS", tokens)
    model = loaded(WIDE, quantize, dtype)
    sequences = [Span(0, 0, 24), Span(1, 3, 5), Span(2, 0, 17)]
    batch = Batch.arrange(torch.randint(0, 128, (46,)), sequences)
    fewer = loaded(WIDE | {"n_layers": 2}, quantize, dtype)
    ends = [24, 29, 46]
    needed = [row for end, count in zip(ends, outputs, strict=True) for row in range(end - count, end)]
    rest = [row for row in range(46) if row not in needed]
    with torch.inference_mode():
        exact, before = compiled(model).hidden(batch).clone(), compiled(fewer).hidden(batch).clone()
        cache = torch.stack([*model.buffers()])
        model.allocate_cache()
        found = compiled(model).hidden(batch._replace(outputs=outputs))
    assert torch.equal(torch.stack([*model.buffers()]), cache)
    # With AMX, 32 rows are multiplied in bfloat16, and fewer in 8 bits.
    near = 0.02 * float(exact.abs().max()) if quantize and cpu_has("amx_bf16") else 1e-5
    assert torch.allclose(found[needed], exact[needed], rtol=1e-4, atol=near)
    assert torch.equal(found[rest], before[rest])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_is_more_accurate_than_plain_in_16_bits(dtype):
    """It rounds only keys and values to 16 bits."""
    model = loaded(WIDE, dtype=dtype)
    for name, weight in model.named_parameters():
        weight.mul_(1 if "norm" in name else 5)
    (plain, _), (native, _) = both(model, STEPS[1], compiled)
    (exact, _), _ = both(model.float(), STEPS[1])
    assert relative_error(native, exact) < relative_error(plain, exact)


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_any_number_of_rows(quantize):
    """Also where the last rows are fewer than a block."""
    model = loaded(WIDE, quantize, torch.float32 if quantize else torch.bfloat16, max_batch_size=20)
    for B in range(1, 21):
        (plain, _), (found, _) = both(model, [(slot, 3 + slot % 5, 1) for slot in range(B)], compiled)
        assert relative_error(found, plain) < 0.02


@needs_cpp
def test_unsupported_shapes_use_the_plain_backend():
    narrow, odd = GQA, {**WIDE, "multiple_of": 4}  # head size 8, hidden size 340
    for model in (loaded(narrow), loaded(odd)):
        assert type(choose(model, compile=True)) is Transformer


@needs_cpp
def test_weights_that_are_not_adjacent_in_memory():
    (plain, _), (native, _) = both(random_model(WIDE), STEPS[2], compiled)
    assert relative_error(native, plain) < 1e-5


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_non_finite_values_stay_in_their_row(quantize):
    model = loaded(WIDE, quantize)
    model.tok_embeddings.weight[5, 3] = torch.nan
    model.tok_embeddings.weight[6, 3] = torch.inf
    with torch.inference_mode():
        backend = compiled(model)
        logits = backend.logits(backend.hidden(Batch.of([(0, 0, [5]), (1, 0, [6]), (2, 0, [7])])))
    assert logits.isfinite().any(-1).tolist() == [False, False, True]
    assert logits[2].isfinite().all()


@needs_cpp
@pytest.mark.parametrize(("token", "position", "what"), [(128, 0, "out of range"), (5, 64, "position 65 exceeds")])
def test_tokens_and_positions_out_of_range_are_errors(token, position, what):
    with pytest.raises((IndexError, ValueError), match=what):
        compiled(loaded(WIDE)).hidden(Batch.of([(0, 0, [7]), (1, position, [token])]))


@needs_cpp
def test_saturated_silu_gates():
    """exp of such gates overflows or underflows."""
    model = loaded({**WIDE, "n_layers": 1})
    model.layers[0].feed_forward.w1.weight.mul_(5000)
    (plain, _), (native, _) = both(model, STEPS[1], compiled)
    assert relative_error(native, plain) < 1e-5


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_native_generates_the_same_text(quantize, monkeypatch):
    options = {"max_seq_len": 64, "max_batch_size": 2, "device": "cpu", "dtype": "float32", "quantize": quantize}
    llama = Llama.build(MODELS / "small-chat", compile=True, **options)
    prompts = ["Once upon a time", "The dog"]  # until the cache is full
    native = llama.text_completion(prompts, temperature=0)
    assert type(llama.engine.backend) is cpu.Native
    monkeypatch.setattr(cpu, "backend", lambda model: model)
    llama.model.allocate_cache()
    assert llama.text_completion(prompts, temperature=0) == native
    assert type(llama.engine.backend) is Transformer


def test_batches_are_split_into_passes():
    sequences = [Span(0, 0, 7), Span(1, 5, 1), Span(2, 2, 2)]
    whole = [(0, 0, 7, 7), (1, 5, 1, 1), (2, 2, 2, 2)]
    assert cpu.passes(sequences, None, 10) == [whole]
    assert cpu.passes(sequences, None, 9) == [[(0, 0, 5, 5)], [(0, 5, 2, 2), (1, 5, 1, 1), (2, 2, 2, 2)]]
    longer = cpu.passes([Span(0, 4, 7), *sequences[1:]], [1, 0, 2], 4)
    assert longer == [[(0, 4, 4, 0)], [(0, 8, 3, 1), (1, 5, 1, 0)], [(2, 2, 2, 2)]]
    assert cpu.passes([Span(0, 0, 7)], [5], 4) == [[(0, 0, 4, 2)], [(0, 4, 3, 3)]]


@needs_cpp
def test_weights_that_are_changed_in_place():
    model = loaded(WIDE)
    both(model, STEPS[1], compiled)
    for weight in model.parameters():
        weight.mul_(1.5)
    (plain, _), (found, _) = both(model, STEPS[1], compiled)
    assert relative_error(found, plain) < 1e-5


def native_logits_on_a_rank(quantize):
    model = loaded(WIDE, quantize)
    (plain, _), (native, _) = both(model, PASSES[1], compiled)
    return relative_error(native, plain)


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_ranks_use_the_native_backend(ranks, quantize):
    assert max(ranks(2).run(native_logits_on_a_rank, quantize)) < 0.02


@needs_cpp
def test_large_models_are_compiled_by_default_in_their_own_dtype(monkeypatch):
    options = {"max_seq_len": 64, "max_batch_size": 2, "device": "cpu"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # no matrix instructions for bfloat16
    for large, compile, expected in ((0, None, cpu.Native), (0, False, Transformer), (1e9, None, Transformer)):
        monkeypatch.setattr(backends, "LARGE", large)
        llama = Llama.build(MODELS / "small-chat", compile=compile, **options)
        llama.text_completion(["Once"], max_gen_len=1)
        assert type(llama.engine.backend) is expected
        assert llama.model.norm.weight.dtype == (torch.bfloat16 if expected is cpu.Native else torch.float32)


@needs_cpp
def test_native_matmuls_and_pytorchs_alternate():
    """With AMX both configure the tiles of the same thread."""
    weight, x = torch.randn(768, 768, dtype=torch.bfloat16), torch.randn(64, 768)
    exact = x.bfloat16().double() @ weight.double().t()
    for _ in range(3):
        assert relative_error(cpu.matmul(cpu.c_matrix(weight), x), exact) < 0.005
        assert relative_error(torch.nn.functional.linear(x.bfloat16(), weight), exact) < 0.005
