"""Every backend is the plain one, but faster; and the plain one skips nothing that a user added."""

import copy
from unittest import mock

import pytest
import torch
from small import GQA, MODELS, SHAPES, needs_cpp, random_model, relative_error
from torch import nn
from torch.nn.utils import prune

from llama import Llama, ModelArgs, Transformer, backends, engine, parallel
from llama.backends import choose, cpu, quantized
from llama.batch import Batch
from llama.batch import Sequence as Span
from llama.cli import measure as bench
from llama.layers import ColumnParallelLinear
from llama.model import Attention, KVCache

CPU = torch.device("cpu")
STEPS = [  # (slot, start, length) of each sequence of a pass
    [(0, 9, 1)],
    [(0, 9, 1), (1, 9, 1)],
    [(0, 3, 1), (1, 11, 1), (3, 7, 1)],
    [(0, 12, 1), (1, 1, 1), (2, 1, 1), (3, 12, 1), (4, 5, 1)],
]
PASSES = [[(1, 0, 20)], [(0, 20, 24), (1, 3, 5), (2, 0, 17)], [(2, 5, 1), (4, 0, 30), (0, 9, 4)]]


def both(model, sequences, make=choose, V=128):
    """Hidden states and logits of the plain backend and of another after the same prompts, and what each left in the
    cache."""
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


# Choosing


def test_a_cpu_computes_plainly_unless_it_may_compile():
    assert type(choose(random_model())) is Transformer
    assert type(choose(random_model(max_batch_size=0), compile=True)) is Transformer


class Wrapped(nn.Module):
    """A layer of a user's own around one of ours, as LoRA has it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += len(x)
        return self.inner(x) * 1.5


@pytest.mark.parametrize("compile", [False, True])
def test_hooks_of_every_module_see_every_token(tokenizer, compile):
    """In prefill and decoding alike, and also of tokens that the cache holds already."""
    model = random_model(SHAPES["wide heads"], vocab_size=tokenizer.n_words)
    llama = Llama(model, tokenizer)
    llama.engine.compile = compile
    prompt = [1, *range(300, 340)]
    expected = llama.generate([prompt], 4, temperature=0)[0]
    seen = {}

    def note(name):
        return lambda module, args, output: seen.setdefault(name, []).append(len(args[0]))

    handles = [
        m.register_forward_hook(note(name))
        for name, m in model.named_modules()
        if name  # not the model: see below
    ]
    assert llama.generate([prompt], 4, temperature=0)[0] == expected
    for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2"):
        for layer in range(3):
            assert seen[f"layers.{layer}.{name}"] == [41, 1, 1, 1]
    assert seen["layers.2.feed_forward.w3"] == seen["layers.0.ffn_norm"] == seen["tok_embeddings"] == [41, 1, 1, 1]
    assert seen["norm"] == seen["output"] == [1, 1, 1, 1]
    for handle in handles:
        handle.remove()
    count = len(seen["layers.0"])
    assert llama.generate([prompt], 4, temperature=0)[0] == expected
    assert len(seen["layers.0"]) == count


@pytest.mark.parametrize("compile", [False, True])
def test_modules_that_a_user_replaced_are_computed(tokenizer, compile):
    model = random_model(SHAPES["wide heads"], vocab_size=tokenizer.n_words)
    llama = Llama(model, tokenizer)
    llama.engine.compile = compile
    prompt = [1, *range(300, 340)]
    before = llama.generate([prompt], 8, temperature=0)[0]
    for layer in model.layers:
        layer.attention.wv = Wrapped(layer.attention.wv)
    after = llama.generate([prompt], 8, temperature=0)[0]
    assert model.layers[0].attention.wv.calls == 41 + 7
    plain = random_model(SHAPES["wide heads"], vocab_size=tokenizer.n_words)
    for layer in plain.layers:
        layer.attention.wv.weight.mul_(1.5)
    assert after == Llama(plain, tokenizer).generate([prompt], 8, temperature=0)[0] != before


class Lora(nn.Module):
    """A module of a user's own around one of ours, with a buffer of its own, and no `weight`."""

    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self.seen = inner, seen
        self.register_buffer("scale", torch.full((4,), 1.5))

    def forward(self, *args):
        self.seen.append(len(args[0]))
        return self.inner(*args) * self.scale[0]


class Scaled(nn.Module):
    """A parametrization."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, weight):
        self.seen.append(None)
        return weight * 1.5


def hook(module, seen, args):
    seen.append(len(args[0]))


def wrap(name):
    def change(model, seen):
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, Lora(getattr(parent, child), seen))

    return change


def subclassed(model, seen):
    class Louder(Attention):
        def forward(self, x, layout):
            seen.append(len(x))
            return super().forward(x, layout) * 1.5

    model.layers[0].attention.__class__ = Louder


def of_the_instance(model, seen):
    module = model.layers[1].feed_forward
    real = module.forward
    module.forward = lambda x: seen.append(len(x)) or real(x) * 1.5


def of_the_class(model, seen):
    real = ColumnParallelLinear.forward
    patch = mock.patch.object(
        ColumnParallelLinear, "forward", lambda self, x: seen.append(len(x)) or real(self, x) * 1.5
    )
    patch.start()
    return patch.stop


def everywhere(model, seen):
    def louder(module, args, output):
        seen.append(len(args[0]))
        return None if output is None else output * 1.01

    return nn.modules.module.register_module_forward_hook(louder).remove


def weight_norm(model, seen):
    nn.utils.parametrizations.weight_norm(model.layers[0].feed_forward.w1)
    model.layers[0].feed_forward.w1.parametrizations.weight.original0.mul_(1.5)


def old_weight_norm(model, seen):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.layers[0].feed_forward.w1)
    model.layers[0].feed_forward.w1.weight_g.data.mul_(1.5)


LINEAR = [f"attention.w{name}" for name in "qkvo"] + [f"feed_forward.w{name}" for name in "123"]
NAMES = [f"layers.1.{name}" for name in LINEAR] + ["layers.0.attention", "layers.2.feed_forward", "layers.1.ffn_norm"]
NAMES += ["layers.1", "tok_embeddings", "norm", "output", ""]
CHANGES = {
    **{
        f"hook of {name or 'the model'}": lambda model, seen, name=name: model.get_submodule(
            name
        ).register_forward_hook(lambda module, args, output: hook(module, seen, args) or output * -1.5)
        for name in NAMES
    },
    **{f"{name}, wrapped": wrap(name) for name in NAMES if name},
    **{
        f"{name}, parametrized": lambda model, seen, name=name: nn.utils.parametrize.register_parametrization(
            model.get_submodule(name), "weight", Scaled(seen)
        )
        for name in [*(f"layers.1.{name}" for name in LINEAR), "tok_embeddings", "layers.0.attention_norm"]
    },
    "pre-hook": lambda model, seen: model.layers[2].attention.wq.register_forward_pre_hook(
        lambda module, args: hook(module, seen, args) or (args[0] * 1.5,)
    ),
    "pre-hook of the model": lambda model, seen: model.register_forward_pre_hook(
        lambda module, args: hook(module, seen, args) or (args[0] + 1, *args[1:])
    ),
    "hook with keywords": lambda model, seen: model.layers[2].register_forward_hook(
        lambda module, args, kwargs, output: hook(module, seen, args) or output.roll(1, -1),
        with_kwargs=True,
        prepend=True,
    ),
    "pre-hook with keywords": lambda model, seen: model.layers[2].attention_norm.register_forward_pre_hook(
        lambda module, args, kwargs: hook(module, seen, args) or ((args[0].roll(1, -1),), kwargs), with_kwargs=True
    ),
    "hook of every module": everywhere,
    "a subclass": subclassed,
    "forward of an instance": of_the_instance,
    "forward of the class": of_the_class,
    "forward of the model": lambda model, seen: setattr(
        model, "forward", lambda *args, real=model.forward: seen.append(len(args[0])) or -real(*args)
    ),
    "weight_norm": weight_norm,
    "the old weight_norm": old_weight_norm,
    "pruned": lambda model, seen: prune.l1_unstructured(model.layers[0].feed_forward.w1, "weight", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_user_changes_acts_on_every_pass(tokenizer, name):
    """Prefill and decoding alike: what is generated is what the changed model gives for the whole text at once."""
    models = [random_model(SHAPES["wide heads"], vocab_size=tokenizer.n_words) for _ in range(2)]
    llama, prompts = Llama(models[0], tokenizer), [[1, *range(300, 320)], [1, 5, 6]]
    llama.engine.compile = True  # where cpu.cpp serves the model as it was
    before = llama.generate(prompts, 5, temperature=0)[0]
    seen = []
    undo = CHANGES[name](models[0], seen)
    undo = undo if name in ("hook of every module", "forward of the class") else None
    try:
        with torch.inference_mode():
            found = llama.generate(prompts, 5, temperature=0)[0]
            count, passes = len(seen), list(seen)
            same = [llama.generate([prompt], 5, temperature=0)[0][0] for prompt in prompts]
            undo or CHANGES[name](models[1], [])
            for prompt, ids in zip(prompts, found, strict=True):
                logits = models[1](torch.tensor([[*prompt, *ids]]))[0]
                assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == ids
    finally:
        if undo:
            undo()
    assert found == same
    assert found != before or name in ("norm, wrapped", "output, wrapped")
    if name.endswith(("wrapped", "an instance", "a subclass")) or name.startswith(("hook of layers", "pre-hook with")):
        of_rows = any(part in name for part in ("norm, wrapped", "output")) and "ffn" not in name
        assert passes == [2] * 5 if of_rows else [24, 2, 2, 2, 2]
    assert count >= 5 or name in ("weight_norm", "the old weight_norm", "pruned")


def test_hooks_of_the_cache_and_of_the_model(tokenizer):
    """Both were passed by: one of the KV cache, which was not called, and one of the Transformer itself."""
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    expected = llama.generate([[1, 5, 6], [1, 7]], 3, temperature=0, logprobs=True)
    embedded = llama.embed(["abc", "d"])
    stored, shapes = [], []
    llama.model.layers[1].attention.cache.register_forward_hook(lambda module, args, _: stored.append(len(args[0])))
    llama.model.register_forward_hook(lambda module, args, y: shapes.append((args[0].tolist(), args[1], [*y.shape])))
    ids, logprobs = llama.generate([[1, 5, 6], [1, 7]], 3, temperature=0, logprobs=True)
    assert ids == expected[0]
    for row, same in zip(logprobs, expected[1], strict=True):
        assert row == pytest.approx(same, abs=1e-4)
    assert sum(stored) == 3 + 2 + 2 * 2
    assert shapes[:2] == [([[1, 5, 6]], 0, [1, 3, 1024]), ([[1, 7]], 0, [1, 2, 1024])]
    assert shapes[2:4] == [([[ids[0][0]]], 3, [1, 1, 1024]), ([[ids[1][0]]], 2, [1, 1, 1024])]
    assert torch.allclose(llama.embed(["abc", "d"]), embedded, atol=1e-4)
    assert llama.generate([[1, 5]] * 3, 2, temperature=0)[0] == llama.generate([[1, 5]], 2, temperature=0)[0] * 3
    assert shapes[-1][2] == [1, 1, 1024] and [3, 2, 1024] in [shape for _, _, shape in shapes]


def test_hooks_for_gradients_do_no_harm(tokenizer):
    model = random_model(vocab_size=tokenizer.n_words)
    expected = Llama(model, tokenizer).generate([[1, 5, 6]], 3, temperature=0)
    for module in (module for module in model.modules() if not isinstance(module, KVCache)):
        module.register_full_backward_hook(lambda *args: None)
        module.register_full_backward_pre_hook(lambda *args: None)
    assert Llama(model, tokenizer).generate([[1, 5, 6]], 3, temperature=0) == expected


def test_buffers_of_a_users_modules_are_no_caches(tokenizer):
    """A request that failed set a row of every buffer to 0, and of a mask or a scale too."""
    model = random_model(vocab_size=tokenizer.n_words)
    for name in ("feed_forward", "attention"):
        setattr(model.layers[0], name, Lora(getattr(model.layers[0], name), []))
    model.tok_embeddings.weight[77] = float("nan")
    llama = Llama(model, tokenizer)
    expected = llama.generate([[1, 5]], 3, temperature=0)
    with pytest.raises(FloatingPointError):
        llama.generate([[1, 77]] * 4, 3)
    assert model.layers[0].feed_forward.scale.tolist() == model.layers[0].attention.scale.tolist() == [1.5] * 4
    assert llama.generate([[1, 5]], 3, temperature=0) == expected
    for layer in model.layers:
        layer.register_buffer("other", torch.zeros(2))
    backends.copy_slot(model, 0, 3, 2)


def test_what_makes_a_model_customized():
    model = random_model()
    assert not backends.customized(model)
    for change in (
        lambda m: m.norm.register_forward_pre_hook(lambda *args: None),
        lambda m: setattr(m.layers[1], "feed_forward", Wrapped(m.layers[1].feed_forward)),
        lambda m: setattr(m.layers[0].attention.wq, "forward", lambda x: x),
        lambda m: nn.utils.parametrize.register_parametrization(m.output, "weight", nn.Identity()),
        lambda m: m.layers[0].attention.cache.register_forward_hook(lambda *args: None),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        assert backends.customized(changed)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert backends.customized(model)
    handle.remove()
    with mock.patch.object(Attention, "forward", lambda self, x, layout: x):
        assert backends.customized(model)
    assert not backends.customized(model)


def test_a_slot_is_copied():
    model = random_model()
    model.hidden(Batch.of([(1, 0, [*range(20)])]))
    backends.copy_slot(model, 1, 3, 12)
    for cache in model.buffers():
        assert torch.equal(cache[3, :, :12], cache[1, :, :12]) and not cache[3, :, 12:].any()


# In C++


def loaded(shape=GQA, quantize=None, dtype=torch.float32, compile=True, **options):
    """A model with joined weights, as one that was loaded has."""
    args = ModelArgs(**{"vocab_size": 128, "max_batch_size": 12, "max_seq_len": 64, **shape, **options})
    parallel.init_model_parallel()
    rounding = quantized.scheme(quantize)
    return bench.loaded(bench.RandomWeights(CPU, rounding), args, CPU, dtype, rounding, compile)


WIDE = SHAPES["wide heads"]
KINDS = [
    (None, torch.float32, 1e-5),
    (None, torch.bfloat16, 0.02),  # what the plain one rounds; see below
    (None, torch.float16, 0.002),
    ("int8", torch.float32, 0.01),
    ("int4", torch.float32, 0.02),
    ("int4", torch.bfloat16, 0.03),
]


@needs_cpp
@pytest.mark.parametrize("tokens", [512, 30, 7])
@pytest.mark.parametrize("sequences", [*STEPS, *PASSES], ids=str)
@pytest.mark.parametrize(("quantize", "dtype", "bound"), KINDS, ids=str)
def test_native_is_plain(quantize, dtype, bound, sequences, tokens, monkeypatch):
    monkeypatch.setattr(cpu, "PASS", tokens)
    monkeypatch.setattr(cpu, "MATRIX_UNITS", {})
    model = loaded(WIDE, quantize, dtype)
    for name, weight in model.named_parameters():
        weight.mul_(torch.rand_like(weight) + 0.5 if "norm" in name else 5)
    (plain, plain_cache), (native, native_cache) = both(model, sequences, compiled)
    assert native.dtype == torch.float32
    assert relative_error(native, plain) < 1.5 * bound  # by which the plain one rounds more tokens
    assert relative_error(native_cache, plain_cache) < bound


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_is_nearer_to_what_is_exact_than_plain(dtype):
    """In 16 bits, as it rounds keys and values alone."""
    model = loaded(WIDE, dtype=dtype)
    for name, weight in model.named_parameters():
        weight.mul_(1 if "norm" in name else 5)
    (plain, _), (native, _) = both(model, STEPS[1], compiled)
    (exact, _), _ = both(model.float(), STEPS[1])
    assert relative_error(native, exact) < relative_error(plain, exact)


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_native_for_any_number_of_rows(quantize):
    """More than it is fast for are plain."""
    model = loaded(WIDE, quantize, torch.float32 if quantize else torch.bfloat16, max_batch_size=20)
    for B in range(1, 21):
        (plain, _), (found, _) = both(model, [(slot, 3 + slot % 5, 1) for slot in range(B)], compiled)
        assert relative_error(found, plain) < 0.02


@needs_cpp
def test_what_native_cannot_compute_is_plain():
    narrow, odd = GQA, {**WIDE, "multiple_of": 4}  # heads of 8 numbers, 340 hidden units
    for model in (loaded(narrow), loaded(odd)):
        assert type(choose(model, compile=True)) is Transformer


@needs_cpp
def test_native_with_weights_that_lie_apart():
    (plain, _), (native, _) = both(random_model(WIDE), STEPS[2], compiled)
    assert relative_error(native, plain) < 1e-5


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_what_is_not_finite_stays_so_in_its_row(quantize):
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
def test_native_touches_no_memory_that_is_not_its_own(token, position, what):
    with pytest.raises((IndexError, ValueError), match=what):
        compiled(loaded(WIDE)).hidden(Batch.of([(0, 0, [7]), (1, position, [token])]))


@needs_cpp
def test_gates_that_are_shut_or_wide_open():
    """e to the power of what is added for them would be infinite, or nothing."""
    model = loaded({**WIDE, "n_layers": 1})
    model.layers[0].feed_forward.w1.weight.mul_(5000)
    (plain, _), (native, _) = both(model, STEPS[1], compiled)
    assert relative_error(native, plain) < 1e-5


@needs_cpp
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_native_generates_the_same_text(quantize, monkeypatch):
    options = {"max_seq_len": 64, "max_batch_size": 2, "device": "cpu", "dtype": "float32", "quantize": quantize}
    llama = Llama.build(MODELS / "small-chat", compile=True, **options)
    prompts = ["Once upon a time", "The dog"]  # to the end of the cache
    native = llama.text_completion(prompts, temperature=0)
    assert type(llama.engine.backend) is cpu.Native
    monkeypatch.setattr(cpu, "backend", lambda model: model)
    llama.model.allocate_cache()
    assert llama.text_completion(prompts, temperature=0) == native
    assert type(llama.engine.backend) is Transformer


def test_passes_of_a_batch():
    sequences = [Span(0, 0, 7), Span(1, 5, 1), Span(2, 2, 2)]
    assert cpu.passes(sequences, 10) == [sequences]
    assert cpu.passes(sequences, 9) == [[(0, 0, 5)], [(0, 5, 2), (1, 5, 1), (2, 2, 2)]]
    assert cpu.passes([Span(0, 4, 7), *sequences[1:]], 4) == [[(0, 4, 4)], [(0, 8, 3), (1, 5, 1)], [(2, 2, 2)]]


@needs_cpp
def test_weights_of_native_that_change_in_place():
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
def test_ranks_compute_in_native_code(ranks, quantize):
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


# Launching ahead


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_device_that_runs_ahead_gives_the_same_tokens(monkeypatch, tokenizer, temperature):
    """Passes that are launched before the last one was read; rows stop, one fills its context, and more
    wait for a slot."""
    prompts = [[1, 400, 401], [1], [1, *range(300, 358)], [1, 7, 9], [1, 8], [1, 5, 5, 5]]

    def run():
        llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer, seed=3)
        options = {"repetition_penalty": [1, 1.3, 1, 1, 1, 1], "min_gen_len": [0, 0, 0, 0, 9, 0]}
        return llama.generate(prompts, 30, temperature, logprobs=True, **options)

    expected = run()
    monkeypatch.setattr(tokenizer, "eos_ids", {expected[0][0][5]})
    slow = run()
    monkeypatch.setattr(engine, "AHEAD", {"cpu"})
    fast = run()
    assert fast[0] == slow[0]
    assert len(slow[0][0]) == 5 and len(slow[0][2]) == 64 - 59
    for mine, theirs in zip(fast[1], slow[1], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_running_ahead_computes_no_pass_too_many(monkeypatch, tokenizer):
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    monkeypatch.setattr(engine, "AHEAD", {"cpu"})
    with mock.patch.object(Transformer, "hidden", autospec=True, side_effect=Transformer.hidden) as forward:
        llama.generate([[1, 2], [1, 2, 3]], 5, temperature=0)
    assert forward.call_count == 5
