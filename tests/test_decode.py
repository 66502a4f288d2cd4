"""The fast step is the plain step."""

import shutil
from functools import partial
from unittest import mock

import pytest
import torch
from small import GQA, MODELS, SHAPES, random_model, relative_error

from llama import Llama, ModelArgs, bench, decode, engine, fused, parallel, quantization
from llama.decode import Captured, Compiled, Flat, captured, decoder

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

PIECES = {**decode.WHOLE._asdict(), "int8_rows": fused.int8_rows.function}


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
    monkeypatch.setattr(decode, "compiled_step", fused.compiled(Compiled.whole_step, decode.compiled_step.unchecked))
    model = random_model()
    model.compile_steps = True
    assert type(decoder(model, 2)) is Compiled
    (plain, _), (slow, _) = both(model, [3, 7])
    assert relative_error(slow, plain) < 1e-5
    assert type(decoder(model, 2)) is Flat
    assert [record.message for record in caplog.records] == [
        "Compiled.whole_step is not compiled, which is slower: TorchDynamoException: no compiler found"
    ]


def test_errors_of_what_was_compiled_are_errors(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    with pytest.raises(ZeroDivisionError):
        fused.compiled(lambda x: 1 / x)(0)


# Compiled steps, with a stand-in for the compiler


@pytest.fixture
def traced(monkeypatch):
    """The graphs that were made so far."""
    graphs = []

    def stand_in(graph, inputs, options):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=stand_in))
    monkeypatch.setattr(decode, "compiled_step", fused.compiled(Compiled.whole_step, decode.compiled_step.unchecked))
    return graphs


@pytest.mark.parametrize("quantize", ["int8", "int4", None])
def test_compiled_products_of_every_kind(traced, quantize):
    args = ModelArgs(**GQA, vocab_size=128, max_batch_size=4, max_seq_len=64)
    parallel.init_model_parallel()
    rounding = quantization.scheme(quantize)
    dtype = torch.float32 if quantize else torch.bfloat16
    model = bench.loaded(bench.RandomWeights(CPU, rounding), args, CPU, dtype, rounding, compile=True)
    (plain, _), (compiled, _) = both(model, [3, 7], fast=Compiled)
    assert relative_error(compiled.float(), plain.float()) < 0.03
    assert len(traced) == 1


def test_a_step_is_compiled_once_for_all_lengths(traced, tokenizer):
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    expected = llama.generate([[1, 2], [1, 2, 3]], 30, temperature=0)
    llama.model.compile_steps = True
    assert llama.generate([[1, 2], [1, 2, 3]], 30, temperature=0) == expected
    assert llama.generate([[1, 2, 3], [1, 2, 4]], [5, 30], temperature=0)[0]  # alike until the first one ends
    assert len(llama.generate([[1, 2, 3], [1] * 63], 99, temperature=0)[0][0]) == 61  # to the end of the cache
    assert len(traced) == 1
    llama.generate([[1, 2]], 30, temperature=0)
    assert len(traced) == 2
    assert not decode.compiled_step.failed


@pytest.mark.parametrize("quantize", ["int8", "int4", None])
def test_a_step_is_compiled_for_few_numbers_of_rows(traced, quantize):
    args = ModelArgs(**GQA, vocab_size=128, max_batch_size=12, max_seq_len=64)
    parallel.init_model_parallel()
    rounding = quantization.scheme(quantize)
    model = bench.loaded(bench.RandomWeights(CPU, rounding), args, CPU, torch.float32, rounding, compile=True)
    for B in range(1, 13):
        (plain, _), (compiled, _) = both(model, [3, 7, 5, *range(9)][:B], fast=Compiled)
        assert relative_error(compiled, plain) < 0.03
    assert len(traced) <= 6
    assert not decode.compiled_step.failed


def test_models_that_differ_in_a_late_layer_alone(traced):
    """What layers are made of is not checked anew in every step, but as a whole: see Compiled.form."""

    def turned(layer):
        layer.attention.wo.weight = torch.nn.Parameter(layer.attention.wo.weight.t())

    def rounded(layer):
        w2, eight = layer.feed_forward.w2, quantization.scheme("int8")
        weight = quantization.kernel(quantization.quantize(w2.weight, eight), CPU)
        del w2.weight
        w2.weight = weight

    for change in (lambda layer: None, turned, rounded, lambda layer: layer.attention.wo.weight.mul_(2)):
        model = random_model().requires_grad_(False)
        change(model.layers[2])
        (plain, _), (compiled, _) = both(model, [3, 7], fast=Compiled)
        assert relative_error(compiled, plain) < 1e-3
    assert len(traced) == 3  # for the last what was made for the first
    assert not decode.compiled_step.failed


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler")
def test_what_the_real_compiler_makes(monkeypatch):
    monkeypatch.setattr(decode, "compiled_step", fused.compiled(Compiled.whole_step, decode.compiled_step.unchecked))
    llama = Llama.build(MODELS / "small-chat", max_seq_len=64, max_batch_size=2, device="cpu", dtype="float32")
    quick = Llama.build(
        MODELS / "small-chat", max_seq_len=64, max_batch_size=2, device="cpu", dtype="float32", compile=True
    )
    prompts = ["Once upon a time", "The dog"]
    expected = llama.text_completion(prompts, temperature=0)
    assert quick.text_completion(prompts, temperature=0) == expected
    assert decode.compiled_step.call and not decode.compiled_step.failed


@pytest.mark.parametrize("fast", [Compiled, captured])
def test_weights_that_change_in_place(traced, recorded, fast):
    model = random_model()
    both(model, [3, 7], fast=fast)
    for weight in model.parameters():
        weight.mul_(1.5)
    (plain, _), (found, _) = both(model, [3, 7], fast=fast)
    assert relative_error(found, plain) < 1e-5


def compiled_on_several_ranks():
    (plain, _), (compiled, _) = both(random_model(), [3, 7], fast=Compiled)
    assert not decode.compiled_step.failed
    return relative_error(compiled, plain)


def test_compiled_is_plain_on_two_ranks(ranks):
    assert max(ranks(2).run(compiled_on_several_ranks)) < 1e-5


# Graphs, with a stand-in for what records them: as a graph does, it reads what lies in the tensors that it was made
# with, gives one tensor, and knows nothing of the arguments of a later call.


@pytest.fixture
def uncompiled(monkeypatch):
    """To compile the pieces takes a compiler, and a minute."""
    monkeypatch.setattr(decode, "ALONE", decode.WHOLE)


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
@pytest.mark.parametrize("fast", [Flat, Compiled, Captured])
def test_fast_is_plain(traced, recorded, fast, shape, positions):
    model = random_model(SHAPES[shape], max_batch_size=5)
    (plain, plain_cache), (found, found_cache) = both(model, positions, fast=fast)
    assert relative_error(found, plain) < 1e-5
    assert relative_error(found_cache, plain_cache) < 1e-5
    assert (len(traced), len(recorded)) == (fast is Compiled, fast is Captured)


def test_a_graph_serves_a_bucket_of_lengths(recorded):
    model = random_model(max_seq_len=20)
    captured = Captured(model, 1)
    with torch.inference_mode():
        for position in range(20):
            captured(torch.tensor([[5]]), [position])
    assert sorted(captured.steps) == [8, 16, 20]
    assert len(recorded) == 3


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
