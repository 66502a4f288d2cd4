"""Arguments that generate, text_completion and chat_completion refuse, and that they accept all others."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import cases, random_model

from llama import Llama


@pytest.fixture(scope="module")
def roomy(tokenizer):
    """The same model with a longer context, for dialogs of rare characters, each of which is four tokens."""
    return Llama(random_model(vocab_size=tokenizer.n_words, max_seq_len=512), tokenizer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([[1] * 65], 3), "prompt 0 has 65 tokens, more than max_seq_len 64"),
        (lambda m: m.generate([[1], []], 3), "prompt 1 is empty"),
        (lambda m: m.generate([[1, 1024]], 3), "prompt 0 contains 1024; ids are ints from 0 to 1023"),
        (lambda m: m.generate([[-1]], 3), "contains -1"),
        (lambda m: m.generate([[1.0]], 3), "contains 1.0"),
        (lambda m: m.generate([1, 2], 3), "must be a list of lists"),
        (lambda m: m.generate([[1]], -1), "max_gen_len is -1"),
        (lambda m: m.generate([[1]], 3, temperature=10**400), "temperature is 1000"),
        (lambda m: m.text_completion(["\ud800"]), "surrogates not allowed"),
        (lambda m: m.generate([[1]], 3, temperature=-0.1), "temperature is -0.1"),
        (lambda m: m.generate([[1]], 3, temperature=float("nan")), "temperature is nan"),
        (lambda m: m.generate([[1]], 3, top_p=-0.1), "top_p is -0.1"),
        (lambda m: m.generate([[1]], 3, top_p=1.5), "top_p is 1.5"),
        (lambda m: m.text_completion("Hello"), "prompts is 'Hello'"),
        (lambda m: m.text_completion(["a", b"Hello"]), "prompt 1 is b'Hello', which is not a str"),
        (
            lambda m: m.chat_completion([[{"role": "user", "content": text}] for text in ("[INST]", "a" * 200)]),
            "dialog 1 has .* tokens, more than max_seq_len 64",
        ),
        (lambda m: m.chat_completion([[]]), r"dialog 0 is \[\]; it must be a list of messages"),
        (lambda m: m.chat_completion([[{"role": "system", "content": "x"}]]), r"dialog 0 has the roles \['system'\]"),
        (lambda m: Llama(m.model, m.tokenizer, seed=1.5), "seed is 1.5"),
        (
            lambda m: Llama(m.model, m.tokenizer, seed=2**63),
            "seed is 9223372036854775808; it must be an int of 64 bits",
        ),
    ],
)
def test_bad_arguments_are_named_with_their_limit(llama, call, message):
    """Regression: bare asserts, an IndexError for an empty dialog, and an error of torch for an empty prompt."""
    with pytest.raises(ValueError, match=message):
        call(llama)


def test_empty_lists_of_prompts(llama):
    assert llama.generate([], 5) == ([], None)
    assert llama.generate([], 5, logprobs=True) == ([], [])
    assert llama.text_completion([]) == llama.chat_completion([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": [1, 2, 3]}, "top_k has 3 values for 2 rows"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": [["a"], 3]}, "stop has 3; it must be a list of str"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": ""}, "empty string"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"min_gen_len": -1}, "min_gen_len is -1"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias or stop_token_ids has the id 1000000; ids go from 0 to 1023"),
        ({"logit_bias": dict.fromkeys(range(1024), float("-inf"))}, "leave none of 1024 ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids has the id -1"),
        ({"seed": [1, "a"]}, "seed is 'a'"),
        ({"prompt_lookup": 1.5}, "prompt_lookup is 1.5"),
    ],
)
def test_meaningless_options(llama, options, message):
    with pytest.raises(ValueError) as error:
        llama.generate([[1], [2]], 3, **options)
    assert message in str(error.value)
    with pytest.raises(
        TypeError, match="there is no option 'top_q'; there are frequency_penalty, json_schema, logit_bias"
    ):
        llama.generate([[1]], 3, top_q=3)


numbers = st.one_of(st.integers(-3, 2000), st.floats(), st.sampled_from([5e-324, 1e-46, 1e-40, 10**400, True]))
anything = st.one_of(st.none(), numbers, st.text(st.characters(), max_size=3), st.lists(st.integers(), max_size=2))
ids = st.integers(0, 1023)
valid_generate = {
    "prompt_tokens": st.lists(st.lists(ids, min_size=1, max_size=64), min_size=1, max_size=4),
    "max_gen_len": st.integers(0, 6),
    "temperature": st.one_of(st.just(0), st.floats(0, 3), st.sampled_from([5e-324, 1e-46, 1e30])),
    "top_p": st.floats(0, 1),
    "logprobs": st.booleans(),
    "echo": st.booleans(),
}
broken_prompts = st.lists(st.one_of(anything, st.lists(st.one_of(ids, anything), max_size=70)), max_size=6)
turns = st.lists(st.text(max_size=8), min_size=1, max_size=4)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", None]), "content": anything}
)


def dialog_of(texts):
    """An odd number of turns, after a system message where the number of texts is even."""
    roles = ["system"] * (len(texts) % 2 == 0) + ["user", "assistant"] * 2
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


valid_chat = {"dialogs": st.lists(turns.map(dialog_of), min_size=1, max_size=3), "temperature": st.floats(0, 3)}
broken_dialogs = st.lists(st.one_of(anything, st.lists(st.one_of(anything, messages), max_size=4)), max_size=6)
few = settings(max_examples=cases(500), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(call=st.fixed_dictionaries(valid_generate))
def test_generate_accepts_every_valid_call(llama, call):
    ids, scores = llama.generate(**call)
    assert len(ids) == len(call["prompt_tokens"])
    for row, prompt in zip(ids, call["prompt_tokens"], strict=True):
        assert len(row) <= call["echo"] * len(prompt) + call["max_gen_len"]
        assert all(0 <= id < 1024 for id in row)
    assert (scores is not None) == call["logprobs"]
    assert scores is None or [len(row) for row in scores] == [len(row) for row in ids]
    assert scores is None or all(-1e5 < score <= 1e-6 for row in scores for score in row)


@few
@given(data=st.data(), call=st.fixed_dictionaries(valid_generate))
def test_generate_returns_or_raises_value_error(llama, data, call):
    name = data.draw(st.sampled_from(["prompt_tokens", "max_gen_len", "temperature", "top_p"]))
    call[name] = data.draw(st.one_of(anything, broken_prompts) if name == "prompt_tokens" else anything)
    try:
        ids, _ = llama.generate(**call)
    except ValueError:
        return
    assert len(ids) == len(call["prompt_tokens"])


@few
@given(call=st.fixed_dictionaries(valid_chat))
def test_chat_accepts_every_valid_call(roomy, call):
    results = roomy.chat_completion(**call, max_gen_len=2, top_p=1.0)
    assert [set(result) for result in results] == [{"generation", "finish_reason"}] * len(call["dialogs"])


@few
@given(data=st.data(), call=st.fixed_dictionaries(valid_chat))
def test_chat_returns_or_raises_value_error(roomy, data, call):
    name = data.draw(st.sampled_from(["dialogs", "message", "temperature"]))
    if name == "message":
        call["dialogs"][0][0] = data.draw(st.one_of(anything, messages))
    else:
        call[name] = data.draw(st.one_of(anything, broken_dialogs) if name == "dialogs" else anything)
    try:
        results = roomy.chat_completion(**call, max_gen_len=2)
    except ValueError:
        return
    assert len(results) == len(call["dialogs"])
