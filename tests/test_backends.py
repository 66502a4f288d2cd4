"""What all backends share: how one is chosen, copies of slots, and passes that are launched ahead."""

from unittest import mock

import pytest
import torch
from small import random_model

from llama import Llama, Transformer, backends, engine
from llama.backends import choose
from llama.batch import Batch


def test_cpus_use_the_plain_backend_without_compilation():
    assert type(choose(random_model())) is Transformer
    assert type(choose(random_model(max_batch_size=0), compile=True)) is Transformer


def test_copy_slot():
    model = random_model()
    model.hidden(Batch.of([(1, 0, [*range(20)])]))
    backends.copy_slot(model, 1, 3, 12)
    for cache in model.buffers():
        assert torch.equal(cache[3, :, :12], cache[1, :, :12]) and not cache[3, :, 12:].any()


@pytest.mark.parametrize("temperature", [0, 1])
def test_launching_passes_ahead_gives_the_same_tokens(monkeypatch, tokenizer, temperature):
    """A pass is launched before the tokens of the last one are read, while requests end, one fills its context, and
    more wait for a slot."""
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


def test_launching_ahead_computes_no_extra_pass(monkeypatch, tokenizer):
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    monkeypatch.setattr(engine, "AHEAD", {"cpu"})
    with mock.patch.object(Transformer, "hidden", autospec=True, side_effect=Transformer.hidden) as forward:
        llama.generate([[1, 2], [1, 2, 3]], 5, temperature=0)
    assert forward.call_count == 5
