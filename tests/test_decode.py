"""The fast step is the plain step."""

from unittest import mock

import pytest
import torch
from small import GQA, MODELS, SHAPES, needs_cpp, random_model, relative_error

from llama import Llama, ModelArgs, decode, engine, fused, layers, parallel, quantization
from llama.cli import measure as bench
from llama.decode import Captured, Flat, Native, captured, decoder, fastest, pieces

CPU = torch.device("cpu")
POSITIONS = [[9], [9, 9], [3, 11, 7], [12, 1, 1, 12, 5]]


def both(model, positions, V=128, fast=decoder):
    """Logits of the plain and the fast step after the same prompts, and what each left in the cache."""
    B = len(positions)
    torch.manual_seed(1)
    prompt, token = torch.randint(0, V, (B, max(positions))), torch.randint(0, V, (B, 1))
    found = []
    with torch.inference_mode():
        for choose in (lambda model, B: model, fast):
            model.allocate_cache()
            model.hidden(prompt, 0)
            logits = choose(model, B)(token, positions)
            found.append((logits, torch.cat([cache.flatten() for cache in model.buffers()])))
    return found


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_flat_is_plain_within_the_rounding_of_bfloat16(positions):
    (plain, _), (flat, _) = both(random_model(max_batch_size=5).bfloat16(), positions)
    exact, _ = both(random_model(max_batch_size=5), positions)[0]
    assert flat.dtype == torch.float32
    assert relative_error(flat, exact) < 1.2 * relative_error(plain, exact) + 1e-3


def test_rows_of_very_different_lengths_attend_one_by_one(monkeypatch):
    monkeypatch.setattr(decode, "WORTH_SPLITTING", 4)
    with mock.patch.object(decode, "together", side_effect=decode.together) as together:
        (plain, _), (flat, _) = both(random_model(max_batch_size=5), [12, 1, 3, 1])
    assert [call.args[2] for call in together.call_args_list[:4]] == [13, 2, 4, 2]
    assert relative_error(flat, plain) < 1e-5


def test_flat_is_plain_with_joined_weights():
    args = ModelArgs(**GQA, vocab_size=128, max_batch_size=4, max_seq_len=64)
    parallel.init_model_parallel()
    model = bench.loaded(bench.RandomWeights(CPU), args, CPU, torch.float32)
    (plain, _), (flat, _) = both(model, [3, 7])
    assert relative_error(flat, plain) < 1e-5


def test_a_cpu_decodes_flat():
    model = random_model()
    assert type(decoder(model, 2)) is Flat
    model.to("meta")
    assert decoder(model, 2) is model


def on_several_ranks():
    (plain, _), (flat, _) = both(random_model(), [3, 7])
    return relative_error(flat, plain)


@pytest.mark.parametrize("world_size", [2, 4])
def test_flat_is_plain_on_several_ranks(ranks, world_size):
    assert max(ranks(world_size).run(on_several_ranks)) < 1e-5


# Pieces that are one kernel on a GPU

PIECES = {name: getattr(fused, name) for name in decode.Pieces._fields} | {"int8_rows": fused.int8_rows.function}


def arguments(name):
    torch.manual_seed(0)
    return {
        "add_norm": (torch.randn(2, 1, 8), torch.randn(2, 1, 8), torch.randn(8), torch.tensor(0.1)),
        "turn": (torch.randn(2, 6, 8), torch.randn(2, 6, 4, 2)),
        "swiglu": (torch.randn(2, 1, 8),),
        "int8_rows": (torch.randn(3, 8), torch.randint(-127, 128, (5, 8), dtype=torch.int8), torch.rand(5, 1)),
    }[name]


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_is_traced_whole(name):
    """With a stand-in for what makes the kernels, as a test needs no compiler."""
    traced = torch.compile(PIECES[name], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(*arguments(name)), PIECES[name](*arguments(name)))


@pytest.mark.parametrize("name", decode.PLAIN._fields)
def test_a_piece_is_its_plain_twin(name):
    torch.testing.assert_close(getattr(decode.PLAIN, name)(*arguments(name)), PIECES[name](*arguments(name)))


def test_rows_of_eight_bits_are_plain_products():
    weight = quantization.quantize(torch.randn(24, 16), quantization.scheme("int8"))
    x = torch.randn(3, 16)
    found = fused.int8_rows.function(x, weight.q, weight.scale)
    assert torch.allclose(found, x @ quantization.dequantize(weight).t(), atol=1e-5)


def test_what_cannot_be_compiled_is_called_as_it_is(monkeypatch, caplog):
    def refuse(function, options):
        def call(*args, **kwargs):
            raise torch._dynamo.exc.TorchDynamoException("no compiler found\nand more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    piece = fused.compiled(fused.swiglu)
    x = torch.randn(2, 8)
    assert torch.equal(piece(x), fused.swiglu(x))
    assert torch.equal(piece(x), fused.swiglu(x))
    assert [record.message for record in caplog.records] == [
        "swiglu is not compiled, which is slower: TorchDynamoException: no compiler found"
    ]


def test_errors_of_what_was_compiled_are_errors(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    with pytest.raises(ZeroDivisionError):
        fused.compiled(lambda x: 1 / x)(0)


# A step in C++


def loaded(shape=GQA, quantize=None, dtype=torch.float32, compile=True, **options):
    """A model with joined weights, as one that was loaded has."""
    args = ModelArgs(**{"vocab_size": 128, "max_batch_size": 12, "max_seq_len": 64, **shape, **options})
    parallel.init_model_parallel()
    rounding = quantization.scheme(quantize)
    return bench.loaded(bench.RandomWeights(CPU, rounding), args, CPU, dtype, rounding, compile)


WIDE = SHAPES["wide heads"]
KINDS = [
    (None, torch.float32, 1e-5),
    (None, torch.bfloat16, 0.02),  # what the plain one rounds; see below
    (None, torch.float16, 0.002),
    ("int8", torch.float32, 0.01),
    ("int4", torch.float32, 0.02),
    ("int4", torch.bfloat16, 0.02),
]


@needs_cpp
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize(("quantize", "dtype", "bound"), KINDS, ids=str)
def test_native_is_plain(quantize, dtype, bound, positions):
    model = loaded(WIDE, quantize, dtype)
    for name, weight in model.named_parameters():
        weight.mul_(torch.rand_like(weight) + 0.5 if "norm" in name else 5)
    fits = quantize or len(positions) in layers.IN_CPP[dtype]
    assert type(decoder(model, len(positions))) is (Native if fits else Flat)
    (plain, plain_cache), (native, native_cache) = both(model, positions)
    assert native.dtype == torch.float32
    assert relative_error(native, plain.float()) < bound
    assert relative_error(native_cache.float(), plain_cache.float()) < bound


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_is_nearer_to_what_is_exact_than_plain(dtype):
    """In 16 bits, as it rounds keys and values alone."""
    model = loaded(WIDE, dtype=dtype)
    for name, weight in model.named_parameters():
        weight.mul_(1 if "norm" in name else 5)
    (plain, _), (native, _) = both(model, [3, 7])
    (exact, _), _ = both(model.float(), [3, 7])
    assert relative_error(native, exact) < relative_error(plain.float(), exact)


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_native_for_any_number_of_rows(quantize):
    """More than it is fast for are flat, with its attention."""
    model = loaded(WIDE, quantize, max_batch_size=20)
    for B in range(1, 21):
        (plain, _), (found, _) = both(model, [3, 7, 5, *range(17)][:B])
        assert relative_error(found, plain) < (0.02 if quantize else 1e-5)


@needs_cpp
def test_what_native_cannot_compute_is_flat():
    narrow, odd = GQA, {**WIDE, "multiple_of": 4}
    for model in (loaded(narrow), loaded(odd), loaded(WIDE, compile=False)):
        (expected, _), (found, _) = both(model, [3, 7], fast=flat)
        assert relative_error(found, expected) < 1e-5


@needs_cpp
def test_native_with_weights_that_lie_apart():
    model = random_model(WIDE)
    model.compiled = True
    assert type(decoder(model, 2)) is Native
    (plain, _), (native, _) = both(model, [3, 7])
    assert relative_error(native, plain) < 1e-5


def flat(model, B):
    found = decoder(model, B)
    assert type(found) is Flat
    return found


def native_on_several_ranks():
    (plain, _), (found, _) = both(loaded({**WIDE, "n_kv_heads": 2}), [3, 7], fast=flat)
    return relative_error(found, plain)


@needs_cpp
def test_several_ranks_have_native_products_and_attention(ranks):
    assert max(ranks(2).run(native_on_several_ranks)) < 1e-5


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_what_is_not_finite_stays_so_in_its_row(quantize):
    model = loaded(WIDE, quantize)
    model.tok_embeddings.weight[5, 3] = torch.nan
    model.tok_embeddings.weight[6, 3] = torch.inf
    with torch.inference_mode():
        logits = decoder(model, 3)(torch.tensor([[5], [6], [7]]), [0, 0, 0])
    assert logits.isfinite().flatten(1).any(-1).tolist() == [False, False, True]
    assert logits[2].isfinite().all()


@needs_cpp
@pytest.mark.parametrize(("token", "position", "what"), [(128, 0, "token 128 of 128"), (5, 64, "position 64 of 64")])
def test_native_touches_no_memory_that_is_not_its_own(token, position, what):
    with pytest.raises(IndexError, match=what):
        decoder(loaded(WIDE), 2)(torch.tensor([[7], [token]]), [0, position])


@needs_cpp
def test_gates_that_are_shut_or_wide_open():
    """e to the power of what is added for them would be infinite, or nothing."""
    model = loaded({**WIDE, "n_layers": 1})
    model.layers[0].feed_forward.w1.weight.mul_(5000)
    (plain, _), (native, _) = both(model, [3, 7])
    assert relative_error(native, plain) < 1e-5


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_native_generates_the_same_text(quantize, monkeypatch):
    options = {"max_seq_len": 64, "max_batch_size": 2, "device": "cpu", "dtype": "float32", "quantize": quantize}
    llama = Llama.build(MODELS / "small-chat", compile=True, **options)
    prompts = ["Once upon a time", "The dog"]  # to the end of the cache
    native = llama.text_completion(prompts, temperature=0)
    assert type(decoder(llama.model, 2)) is Native
    monkeypatch.setattr(Native, "serves", lambda flat: False)
    assert llama.text_completion(prompts, temperature=0) == native


@needs_cpp
@pytest.mark.parametrize("at_once", [528, 30, 7])
@pytest.mark.parametrize(("quantize", "dtype", "bound"), KINDS, ids=str)
@torch.inference_mode()
def test_native_prompts_are_plain(quantize, dtype, bound, at_once, monkeypatch):
    """Of rows that go on from places of their own: what comes out, what the cache is left with, and logits."""
    monkeypatch.setattr(decode, "AT_ONCE", at_once)
    monkeypatch.setitem(layers.IN_CPP, dtype, layers.ANY)
    model = loaded(WIDE, quantize, dtype, max_batch_size=3)
    for name, weight in model.named_parameters():
        weight.mul_(torch.rand_like(weight) + 0.5 if "norm" in name else 5)
    before = torch.randint(0, 128, (3, 20))
    rows, starts = [torch.randint(0, 128, (T,)).tolist() for T in (44, 5, 17)], [20, 3, 0]
    found = []
    for choose in (lambda model, tokens: model, lambda model, tokens: fastest(model)(tokens)):
        model.allocate_cache()
        model.hidden(before)
        compute = choose(model, 66)
        hidden = compute.packed(rows, starts)
        assert hidden.dtype == model.norm.weight.dtype
        kept = [kv[i, :, :end] for kv in model.buffers() for i, end in enumerate((64, 8, 17))]
        found.append((hidden, compute.logits(hidden[-2:]), torch.cat([part.flatten() for part in kept])))
    assert type(compute) is Native
    for one, other in zip(*found, strict=True):
        assert relative_error(other.float(), one.float()) < 1.5 * bound  # by which the plain one rounds more tokens


@needs_cpp
@torch.inference_mode()
def test_native_steps_of_several_tokens_are_plain():
    """As those are that try guesses."""
    model = loaded(WIDE)
    ids, prompt = torch.randint(0, 128, (2, 4)), torch.randint(0, 128, (2, 30))
    found = []
    for compute in (model, fastest(model)(8)):
        model.hidden(prompt)
        found.append(compute(ids, [30, 7]))
    assert type(compute) is Native
    assert relative_error(found[1], found[0]) < 1e-5


@needs_cpp
@pytest.mark.parametrize(
    ("rows", "start", "what"),
    [([[1] * 5], 60, "position 65 exceeds"), ([[1], []], 0, "0 tokens"), ([[1]] * 4, 0, "a batch of 4")],
)
def test_native_prompts_that_do_not_fit(rows, start, what):
    with pytest.raises(ValueError, match=what):
        fastest(loaded(WIDE, max_batch_size=3))(9).packed(rows, [start] * len(rows))


def test_pieces_of_rows():
    rows = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10]]
    assert [*pieces(rows, [0, 5, 2], 10)] == [([*range(1, 11)], [0, 0, 7, 1, 5, 1, 2, 2, 2])]
    assert [*pieces(rows, [0, 5, 2], 9)] == [
        ([1, 2, 3, 4, 5], [0, 0, 5]),
        ([6, 7, 8, 9, 10], [0, 5, 2, 1, 5, 1, 2, 2, 2]),
    ]
    assert [*pieces(rows, [4, 5, 2], 4)] == [
        ([1, 2, 3, 4], [0, 4, 4]),
        ([5, 6, 7, 8], [0, 8, 3, 1, 5, 1]),
        ([9, 10], [2, 2, 2]),
    ]


@needs_cpp
def test_what_has_gradients_or_no_cache_is_computed_plainly():
    model = random_model(max_batch_size=0).requires_grad_(True)
    model.compiled = True
    assert fastest(model)(20) is model
    model(torch.randint(3, 128, (2, 20))).square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@needs_cpp
def test_weights_of_native_that_change_in_place():
    model = loaded(WIDE)
    both(model, [3, 7])
    for weight in model.parameters():
        weight.mul_(1.5)
    (plain, _), (found, _) = both(model, [3, 7])
    assert relative_error(found, plain) < 1e-5


# Graphs, with a stand-in for what records them: as a graph does, it reads what lies in the tensors that it was made
# with, gives one tensor, and knows nothing of the arguments of a later call.


@pytest.fixture
def uncompiled(monkeypatch):
    """To compile the pieces takes a compiler, and a minute."""
    monkeypatch.setattr(decode, "FUSED", decode.Pieces(fused.add_norm, fused.turn, fused.swiglu))


@pytest.fixture
def recorded(monkeypatch, uncompiled):
    """What was recorded so far: the results of the work, each overwritten by the next replay."""
    results = []

    def stand_in(work, device):
        result = work().clone()
        results.append(result)
        return lambda: result.copy_(work())

    monkeypatch.setattr(decode, "capture", stand_in)
    monkeypatch.setattr(decode, "BUCKET", 8)
    return results


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fast", [Flat, Captured])
def test_fast_is_plain(recorded, fast, shape, positions):
    model = random_model(SHAPES[shape], max_batch_size=5)
    (plain, plain_cache), (found, found_cache) = both(model, positions, fast=fast)
    assert relative_error(found, plain) < 1e-5
    assert relative_error(found_cache, plain_cache) < 1e-5
    assert len(recorded) == (fast is Captured)


def test_a_graph_serves_a_bucket_of_lengths(recorded):
    model = random_model(max_seq_len=20)
    captured = Captured(model, 1)
    with torch.inference_mode():
        for position in range(20):
            captured(torch.tensor([[5]]), [position])
    assert sorted(captured.steps) == [8, 16, 20]
    assert len(recorded) == 3


def test_weights_of_a_graph_that_change_in_place(recorded):
    model = random_model()
    both(model, [3, 7], fast=captured)
    for weight in model.parameters():
        weight.mul_(1.5)
    (plain, _), (found, _) = both(model, [3, 7], fast=captured)
    assert relative_error(found, plain) < 1e-5


def test_graphs_are_kept_while_their_tensors_are(recorded):
    model = random_model()
    first = captured(model, 2)
    assert captured(model, 2) is first
    assert captured(model, 3) is not first
    again = captured(model, 2)
    model.norm.weight = torch.nn.Parameter(model.norm.weight + 1)
    assert captured(model, 2) is not again


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_device_that_runs_ahead_gives_the_same_tokens(recorded, monkeypatch, tokenizer, temperature):
    """Graphs, and steps that begin before the last one was read; rows stop, and one fills its context."""
    prompts = [[1, 400, 401], [1], [1, *range(300, 358)], [1, 7, 9]]
    ids = [Llama(random_model(vocab_size=tokenizer.n_words), tokenizer, seed=3)]
    expected = ids[0].generate(prompts, 30, temperature, logprobs=True)
    monkeypatch.setattr(tokenizer, "eos_id", expected[0][0][5])
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer, seed=3)
    slow = llama.generate(prompts, 30, temperature, logprobs=True)
    monkeypatch.setattr(engine, "AHEAD", {"cpu"})
    monkeypatch.setattr(engine, "decoder", captured)
    fast = Llama(llama.model, tokenizer, seed=3).generate(prompts, 30, temperature, logprobs=True)
    assert fast[0] == slow[0]
    assert len(slow[0][0]) == 5 and len(slow[0][2]) == 64 - 59
    for mine, theirs in zip(fast[1], slow[1], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert recorded


def test_running_ahead_computes_no_step_too_many(monkeypatch, tokenizer):
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    calls = []
    real = Flat.__call__
    monkeypatch.setattr(engine, "AHEAD", {"cpu"})
    monkeypatch.setattr(Flat, "__call__", lambda self, *args: calls.append(args) or real(self, *args))
    llama.generate([[1, 2], [1, 2, 3]], 5, temperature=0)
    assert len(calls) == 4


def test_what_cannot_be_recorded_is_computed_step_by_step(monkeypatch, caplog, uncompiled):
    class Stream:
        def wait_stream(self, other): ...

        def __enter__(self): ...

        def __exit__(self, *error): ...

    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "device", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: refuse(graph))
    (plain, _), (slow, _) = both(random_model(), [3, 7], fast=Captured)
    assert relative_error(slow, plain) < 1e-5
    assert [record.message for record in caplog.records] == [
        "decoding without CUDA graphs, as recording one failed: operation not permitted when stream is capturing"
    ]
