"""Scores against Hugging Face's log-softmax, perplexity against a direct computation."""

import math

import pytest
import torch
from small import SHAPES, TOKENIZER, hugging_face, passes, random_model, save_random, trained

from llama import Llama, Tokenizer
from llama.engine import common
from llama.scoring import perplexity

OURS = Tokenizer(TOKENIZER)
TEXTS = ["The sun was warm.", "", "a🙂b", "Once upon a time there was a fox", "x", "The sun was cold and far away"]


def built(shape="GQA", **options):
    return Llama(random_model(SHAPES[shape], vocab_size=OURS.n_words, **options), OURS)


def theirs(llama, ids):
    """Log probabilities (T, V) at each position for all ids but the first."""
    model = hugging_face(llama.model.params, llama.model.state_dict())
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_hugging_faces(shape):
    llama = built(shape)
    results = llama.score(TEXTS, top_logprobs=3)  # more than max_batch_size
    for text, result in zip(TEXTS, results, strict=True):
        ids = OURS.encode(text, bos=True, eos=False)
        expected = theirs(llama, ids)
        assert result["token_ids"] == ids[1:]
        assert "".join(result["tokens"]) == text
        assert result["logprobs"] == pytest.approx(
            [expected[t, id].item() for t, id in enumerate(ids[1:])], rel=1e-4, abs=1e-6
        )
        highest = expected.topk(3)
        for t, top in enumerate(result["top_logprobs"]):
            assert [p for _, p in top] == pytest.approx(highest.values[t].tolist(), rel=1e-4)
            assert [piece for piece, _ in top] == [OURS.piece(id) for id in highest.indices[t].tolist()]
        assert result["sum"] == pytest.approx(sum(result["logprobs"]))
        if text:
            assert result["perplexity"] == pytest.approx(math.exp(-sum(result["logprobs"]) / len(ids[1:])))
        else:
            assert math.isnan(result["perplexity"])


def test_continuations_are_scored_given_their_prompts():
    llama = built()
    [result] = llama.score(["The sun was"], [" warm."])
    [whole] = llama.score(["The sun was warm."])
    n = len(result["logprobs"])
    assert result["token_ids"] == whole["token_ids"][-n:]
    assert "".join(result["tokens"]) == " warm."
    assert result["logprobs"] == pytest.approx(whole["logprobs"][-n:])
    assert result["sum"] == pytest.approx(sum(whole["logprobs"][-n:]))


BORDERS = [
    ("Question: What is larger, a sheep or a mouse?\nAnswer: ", "A"),
    ("Onc", "e upon a time"),
    ("The sun was w", "arm."),
    ("Hello", "!"),
    ("a", "🙂b"),
    ("a🙂", "🙃"),
    ("one\n", "two"),
    ("def f():\n    ", "return 3"),
    ("", "Once"),
    (" \t", "x"),
    ("The sun", " was"),
    ("The sun ", " was"),
]


@pytest.mark.parametrize(("prompt", "continuation"), BORDERS)
def test_every_character_of_a_continuation_is_scored(prompt, continuation):
    """Regression: as many tokens as the prompt alone has were skipped, although a token may reach over the border, or
    the prompt's last space be part of the continuation's first token. Nothing was scored then, and the sum of 0.0 was
    the best answer."""
    llama = built()
    [result] = llama.score([prompt], [continuation])
    ids = OURS.encode(prompt + continuation, bos=True, eos=False)
    n = len(result["token_ids"])
    assert result["token_ids"] == ids[-n:]
    before, first = OURS.decode(ids[:-n]).rstrip("\ufffd"), "".join(result["tokens"])
    assert prompt.rstrip().startswith(before) and first.endswith(continuation)
    assert n == len(ids) - 1 or not prompt.rstrip().startswith(OURS.decode(ids[: len(ids) - n + 1]))
    expected = theirs(llama, ids)
    total = sum(expected[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids)))
    assert result["sum"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(("prompt", "continuation"), BORDERS)
def test_continuations_equal_those_of_lm_evaluation_harness(prompt, continuation):
    """Where the prompt's tokens are a prefix of the whole text's, which the harness assumes."""
    spaces = len(prompt) - len(prompt.rstrip())
    context, more = prompt[: len(prompt) - spaces], prompt[len(prompt) - spaces :] + continuation
    whole, alone = (OURS.encode(text, bos=True, eos=False) for text in (context + more, context))
    [result] = built().score([prompt], [continuation])
    if whole[: len(alone)] == alone:
        assert result["token_ids"] == whole[len(alone) :]
    else:
        assert len(result["token_ids"]) > len(whole) - len(alone)


def test_a_continuation_that_begins_within_an_unknown_token(tmp_path):
    """A tokenizer without byte fallback makes one <unk> of unknown characters on both sides of the border."""
    path = trained(tmp_path, byte_fallback=False)
    llama = Llama(random_model(vocab_size=Tokenizer(path).n_words), Tokenizer(path))
    with pytest.raises(ValueError, match="continuation 1, '本', adds nothing to prompt 1, 'the 日'"):
        llama.score(["the", "the 日"], [" fox", "本"])
    [result] = llama.score(["the 日"], ["本 fox"])
    assert "".join(result["tokens"]).endswith("fox")


def test_many_continuations_of_one_long_prompt():
    """The shared prefix is computed once, and the scores are the same."""
    llama = built(max_batch_size=8, max_seq_len=128)
    prompt = "The sun was warm. " * 10
    with passes(llama) as seen:
        together = llama.score([prompt] * 4, ["one", "two", "three", "four"])
    rows = [OURS.encode(prompt + text, bos=True, eos=False) for text in ("one", "two", "three", "four")]
    shared = [common(row, rows[0][: len(OURS.encode(prompt.rstrip(), bos=True, eos=False)) - 1]) for row in rows[1:]]
    assert min(shared) >= 40
    assert seen == [len(rows[0]), sum(map(len, rows[1:])) - sum(shared)]
    for text, result in zip(["one", "two", "three", "four"], together, strict=True):
        [alone] = llama.score([prompt], [text])
        assert result["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (16, 1), (16, 15), (64, 32)])
def test_perplexity_equals_a_direct_computation(window, stride):
    llama = built()
    torch.manual_seed(0)
    for length in (2, 7, 8, 9, 40):
        ids = torch.randint(3, 500, (length,)).tolist()
        found, count = perplexity(llama.model, ids, window, stride)
        total = 0.0
        for t in range(1, length):  # one token at a time, in the first window that contains it
            begin = 0 if t < window else stride * -(-(t - window + 1) // stride)
            total += theirs(llama, ids[begin : t + 1])[-1, ids[t]].item()
        assert count == length - 1
        assert found == pytest.approx(math.exp(-total / count), rel=1e-4)


def test_embeddings_are_hugging_faces_last_hidden_states():
    llama = built()
    model = hugging_face(llama.model.params, llama.model.state_dict()).model
    for pooling in ("mean", "last"):
        found = llama.embed(TEXTS, pooling)
        assert found.shape == (len(TEXTS), 64) and found.dtype == torch.float32
        for text, embedding in zip(TEXTS, found, strict=True):
            with torch.no_grad():
                states = model(torch.tensor([OURS.encode(text, bos=True, eos=False)])).last_hidden_state[0]
            expected = states.mean(0) if pooling == "mean" else states[-1]
            assert torch.allclose(embedding, expected, rtol=1e-4, atol=1e-5)
    assert llama.embed([]).shape == (0, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.score("text"), "prompts is 'text'"),
        (lambda m: m.score(["a"], ["b", "c"]), "2 continuations for 1 prompts"),
        (lambda m: m.score(["a"], [3]), "continuation 0 is 3"),
        (lambda m: m.score(["a", "b "], ["x", ""]), "continuation 1, '', adds nothing to prompt 1, 'b '"),
        (lambda m: m.score(["a"], top_logprobs=-1), "top_logprobs is -1"),
        (lambda m: m.score(["a " * 99]), "more than max_seq_len 64"),
        (lambda m: m.embed(["a"], "max"), "pooling is 'max'"),
        (lambda m: m.embed(["a", "a " * 99]), "text 1 has"),
    ],
)
def test_inputs_that_cannot_be_scored(call, message):
    with pytest.raises(ValueError) as error:
        call(built())
    assert message in str(error.value)


@pytest.mark.parametrize(("method", "name"), [("score", "prompt 1"), ("embed", "text 1")])
def test_a_text_without_tokens(method, name):
    """Regression: without BOS an empty text ended its pass, with those of other calls, in an error of PyTorch."""
    llama = Llama(random_model(SHAPES["GQA"], vocab_size=OURS.n_words), Tokenizer(TOKENIZER))
    llama.tokenizer.vocabulary.adds_bos = False
    with pytest.raises(ValueError, match=f"{name} is empty; it needs at least one token"):
        getattr(llama, method)(["a", ""])


def test_a_perplexity_that_overflows_is_infinite():
    """Regression: OverflowError."""
    llama = built()
    llama.model.output.weight.mul_(1e4)
    [scored] = llama.score(["The sun was warm."])
    assert math.isfinite(scored["sum"])
    assert scored["perplexity"] == math.inf == perplexity(llama.model, [1, *scored["token_ids"]], 8, 4)[0]


def test_non_finite_scores_name_the_layer():
    llama = built()
    llama.model.layers[1].feed_forward.w2.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"layers\.1$"):
        llama.score(["Hello"])


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(
    ("name", "value", "layer"),
    [
        ("layers.1.feed_forward.w2", math.nan, "layers.1"),
        ("layers.2.attention.wo", math.inf, "layers.2"),
        ("norm", math.nan, "norm"),
        ("tok_embeddings", math.nan, "tok_embeddings"),
    ],
)
def test_non_finite_embeddings_name_the_layer(pooling, name, value, layer):
    """Regression: they were returned as NaN."""
    llama = built()
    llama.model.get_submodule(name).weight.data.fill_(value)
    with pytest.raises(FloatingPointError, match=rf"first layer to give such values is {layer}$"):
        llama.embed(["Hello", "x"], pooling)


CALLS = {
    "embed": lambda llama, text: llama.embed(["x", text]),
    "embed last": lambda llama, text: llama.embed([text, "x"], "last"),
    "score": lambda llama, text: llama.score([text]),
    "continuation": lambda llama, text: llama.score([text], [" x"]),
    "echo": lambda llama, text: llama.text_completion([text], max_gen_len=0, echo=True, logprobs=True),
    "generate": lambda llama, text: llama.text_completion([text], max_gen_len=1),
    "perplexity": lambda llama, text: perplexity(llama.model, OURS.encode(text, bos=True, eos=False), 16, 8),
}


@pytest.mark.parametrize("call", CALLS)
def test_non_finite_values_are_found_by_every_call_and_not_cached(call, monkeypatch):
    """Regression: values that were wrong once, as from a faulty device, stayed in the slots of embeddings, and the next
    call that shared the prefix failed."""
    llama, text = built(max_seq_len=128), "The sun was warm and the fox was cold. " * 2
    expected = llama.text_completion([text], temperature=0, max_gen_len=5)
    block, broken = llama.model.layers[1], [math.nan]
    block.register_forward_hook(lambda module, args, output: output * broken[0])
    monkeypatch.setattr("llama.backends.customized", lambda model: False)  # so that prefixes are shared
    with pytest.raises(FloatingPointError):
        CALLS[call](llama, text)
    broken[0] = 1.0
    assert llama.text_completion([text], temperature=0, max_gen_len=5) == expected
    assert all(kv.isfinite().all() for kv in llama.model.buffers())


def _score(folder):
    llama = Llama.build(folder, TOKENIZER, 64, 4, device="cpu")
    return [result["sum"] for result in llama.score(TEXTS)], llama.embed(TEXTS).sum().item()


def test_ranks_return_the_same_scores(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    alone = _score(tmp_path)
    for sums, total in ranks(2).run(_score, tmp_path):
        assert sums == pytest.approx(alone[0], rel=1e-4)
        assert total == pytest.approx(alone[1], rel=1e-3)
