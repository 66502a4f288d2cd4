"""The process around a model: what a caller has set in PyTorch, forks and copies, and other systems."""

import contextlib

import pytest
import torch
from small import MODELS, random_model

from llama import Llama

IDS = [[1, 306, 590], [1, 99]]


def build(**options):
    options = {"device": "cpu", "dtype": "float32", "max_seq_len": 64, "max_batch_size": 2, **options}
    return Llama.build(MODELS / "small", **options)


@contextlib.contextmanager
def setting(put, value, back):
    put(value)
    try:
        yield
    finally:
        put(back)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of float16": lambda: torch.autocast("cpu", torch.float16),
    "device": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "threads": lambda: setting(torch.set_num_threads, 1, torch.get_num_threads()),
}


def everything(llama):
    """Tokens, and numbers, of every way to compute with a model."""
    llama.engine.forget()
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.0137, "presence_penalty": 0.1}
    [event] = llama.text_stream(["Once upon"], max_gen_len=1, logprobs=True)
    tokens = (
        llama.generate(IDS[:1], 4, temperature=0)[0],
        llama.generate(IDS, 4, temperature=[0.9, 2.0], top_p=[0.9, 0.8], min_p=0.01, seed=1, logit_bias={5: 1.007})[0],
        llama.generate(IDS, 4, temperature=0.5, top_k=[50, 0], seed=2, **penalties)[0],
        llama.generate([[1, 306, 306, 306]], 4, temperature=0, prompt_lookup=2)[0],
        llama.engine.sampler.counts.dtype,
    )
    score = llama.score(["The opposite of hot is"], [" cold."])[0]["sum"]
    return tokens, [*event.logprobs, score, *llama.embed(["Hello"])[0].tolist()]


@pytest.fixture(scope="module")
def usual():
    llama = build()
    return llama, *everything(llama)


@pytest.mark.parametrize("ambient", AMBIENT)
def test_what_the_caller_has_set_changes_nothing(ambient, usual):
    """Within autocast: an error of index_put; within a default device: tensors without data; within another default
    dtype: embeddings, top_p and penalties of that dtype."""
    outside, tokens, numbers = usual
    with AMBIENT[ambient]():
        for llama in (outside, build()):
            found, values = everything(llama)
            assert found == tokens
            assert values == pytest.approx(numbers, abs=1e-4)


@pytest.mark.parametrize("ambient", ["autocast", "device", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{"quantize": "int8"}, {"quantize": "int4"}, {"dtype": "bfloat16"}, {"compile": True}],
    ids=["int8", "int4", "bfloat16", "compile"],
)
def test_nor_with_other_weights_and_backends(ambient, options):
    expected = build(**options).generate(IDS, 3, temperature=0)
    with AMBIENT[ambient]():
        assert build(**options).generate(IDS, 3, temperature=0) == expected


@pytest.mark.parametrize("ambient", [name for name in AMBIENT if "autocast" not in name])
def test_nor_for_a_model_that_is_called(ambient):
    model, ids = random_model(), torch.tensor(IDS[:1]) % 128
    expected = model(ids)
    with AMBIENT[ambient]():
        found = model(ids)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)


def test_a_model_that_is_called_follows_autocast():
    """As any module does; it failed where its cache is of another dtype."""
    model, ids = random_model(), torch.tensor(IDS[:1]) % 128
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_built_in_inference_mode_and_called_with_gradients():
    """The cache was a tensor of inference mode, which nothing outside may write to."""
    with torch.inference_mode():
        llama = build()
    llama.model.requires_grad_(True)(torch.tensor(IDS[:1])).sum().backward()
    assert llama.model.norm.weight.grad.abs().sum() > 0


def test_embeddings_train_what_comes_after_them():
    torch.nn.Linear(128, 2)(build().embed(["Hello"])).sum().backward()
