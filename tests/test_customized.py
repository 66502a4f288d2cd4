"""Models with a user's hooks, modules or methods: every change affects every pass."""

import copy
from unittest import mock

import pytest
import torch
from small import SHAPES, random_model
from torch import nn
from torch.nn.utils import prune

from llama import Llama, backends
from llama.layers import ColumnParallelLinear
from llama.model import Attention, KVCache


class Wrapped(nn.Module):
    """A user's module that wraps a layer of the model, as LoRA does."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += len(x)
        return self.inner(x) * 1.5


PROMPT = [1, *range(300, 340)]


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def llama(request, tokenizer):
    llama = Llama(random_model(SHAPES["wide heads"], vocab_size=tokenizer.n_words), tokenizer)
    llama.engine.compile = request.param
    return llama


def test_hooks_of_every_module_see_every_token(llama):
    """In prefill and decode, and also for tokens that the cache already holds."""
    model = llama.model
    expected = llama.generate([PROMPT], 4, temperature=0)[0]
    seen = {}

    def note(name):
        return lambda module, args, output: seen.setdefault(name, []).append(len(args[0]))

    handles = [
        m.register_forward_hook(note(name))
        for name, m in model.named_modules()
        if name  # not the model: see below
    ]
    assert llama.generate([PROMPT], 4, temperature=0)[0] == expected
    for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2"):
        for layer in range(3):
            assert seen[f"layers.{layer}.{name}"] == [41, 1, 1, 1]
    assert seen["layers.2.feed_forward.w3"] == seen["layers.0.ffn_norm"] == seen["tok_embeddings"] == [41, 1, 1, 1]
    assert seen["norm"] == seen["output"] == [1, 1, 1, 1]
    for handle in handles:
        handle.remove()
    count = len(seen["layers.0"])
    assert llama.generate([PROMPT], 4, temperature=0)[0] == expected
    assert len(seen["layers.0"]) == count


def test_modules_that_a_user_replaced_are_computed(llama):
    model = llama.model
    before = llama.generate([PROMPT], 8, temperature=0)[0]
    for layer in model.layers:
        layer.attention.wv = Wrapped(layer.attention.wv)
    after = llama.generate([PROMPT], 8, temperature=0)[0]
    assert model.layers[0].attention.wv.calls == 41 + 7
    plain = random_model(SHAPES["wide heads"], vocab_size=llama.tokenizer.n_words)
    for layer in plain.layers:
        layer.attention.wv.weight.mul_(1.5)
    assert after == Llama(plain, llama.tokenizer).generate([PROMPT], 8, temperature=0)[0] != before


class Lora(nn.Module):
    """A user's module that wraps a layer, with a buffer of its own and no `weight`."""

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
def test_changes_by_users_affect_every_pass(tokenizer, name):
    """In prefill and decode: generated tokens are those that the changed model gives for the whole text at once."""
    models = [random_model(SHAPES["wide heads"], vocab_size=tokenizer.n_words) for _ in range(2)]
    llama, prompts = Llama(models[0], tokenizer), [[1, *range(300, 320)], [1, 5, 6]]
    llama.engine.compile = True  # where native.cpp computes the unchanged model
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
    """Regression: hooks of the KV cache and of the Transformer itself were not called."""
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


def test_hooks_for_gradients_are_harmless(tokenizer):
    model = random_model(vocab_size=tokenizer.n_words)
    expected = Llama(model, tokenizer).generate([[1, 5, 6]], 3, temperature=0)
    for module in (module for module in model.modules() if not isinstance(module, KVCache)):
        module.register_full_backward_hook(lambda *args: None)
        module.register_full_backward_pre_hook(lambda *args: None)
    assert Llama(model, tokenizer).generate([[1, 5, 6]], 3, temperature=0) == expected


def test_buffers_of_users_modules_are_left_alone(tokenizer):
    """Regression: a failed request set a row of every buffer to 0, including masks and scales."""
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


def test_changes_that_make_a_model_customized():
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
