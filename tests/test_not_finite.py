"""NaN and infinity in weights and activations: the error names the layer, and other requests are not affected."""

from unittest import mock

import pytest
from small import PROMPTS, greedy, random_model

from llama import Llama, Transformer


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize(
    ("name", "value", "layer"),
    [
        ("layers.1.feed_forward.w2", float("nan"), "layers.1"),
        ("layers.2.attention.wv", float("inf"), "layers.2"),
        ("layers.1.attention.wq", float("nan"), "layers.1"),  # PyTorch's attention on CPUs hides it
        ("layers.1.attention.wk", float("nan"), "layers.1"),
        ("layers.0.attention.wk", float("inf"), "layers.0"),
        ("norm", float("nan"), "norm"),
        ("output", float("inf"), "output"),
        ("tok_embeddings", float("nan"), "tok_embeddings"),
    ],
)
def test_non_finite_logits_name_the_first_layer(tokenizer, name, value, layer, temperature):
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    llama.model.get_submodule(name).weight.view(-1)[:64] = value
    with pytest.raises(FloatingPointError, match=rf"first layer to give such values is {layer}$"):
        llama.generate([[0, 5, 6]], 3, temperature=temperature)


def test_non_finite_scores_name_the_first_layer(tokenizer):
    """Nothing is sampled here: the log probabilities of the prompt itself must be checked."""
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    llama.model.layers[1].attention.wo.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"first layer to give such values is layers\.1$"):
        llama.generate([[1, 5, 6], [1]], 0, logprobs=True, echo=True)


def test_a_failed_call_leaves_nothing_behind(tokenizer):
    """Regression: NaN stayed in slots of the cache. A later, shorter row masks it, but 0 * NaN is NaN, so that a valid
    call failed."""
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    expected = greedy(llama, PROMPTS)
    llama.model.tok_embeddings.weight[77] = float("nan")
    with pytest.raises(FloatingPointError):
        greedy(llama, [[77] * 30] * 4)
    assert greedy(llama, PROMPTS) == expected


def test_a_non_finite_embedding_of_an_unused_token_is_harmless(tokenizer):
    """Padding must not use it."""
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    expected = greedy(llama, PROMPTS)
    llama.model.tok_embeddings.weight[0] = float("nan")
    assert greedy(llama, PROMPTS) == expected


def test_non_finite_values_while_decoding_are_found(llama):
    real, calls = Transformer.hidden, []

    def break_later(self, batch):
        calls.append(batch)
        hidden = real(self, batch)
        return hidden * float("nan") if len(calls) == 2 else hidden

    with (
        mock.patch.object(Transformer, "hidden", break_later),
        pytest.raises(FloatingPointError, match="computed again, they were not"),
    ):
        greedy(llama, [[1, 2]])
    assert len(greedy(llama, [[1, 2]])[0][0]) == 10


def test_a_non_finite_request_does_not_affect_others(tokenizer):
    llama = Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)
    expected = greedy(llama, PROMPTS[:1], 20)[0]
    llama.engine.forget()
    llama.model.tok_embeddings.weight[77] = float("nan")
    with llama.generate_stream(PROMPTS[:1], 20, temperature=0) as stream:
        with pytest.raises(FloatingPointError):
            greedy(llama, [[1, 2, 77]])
        assert [stream.drain()[0].tokens] == expected
