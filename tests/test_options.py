"""Arguments and options as NumPy, PyTorch and pandas objects, and None for a default."""

import inspect
from types import MappingProxyType

import numpy as np
import pytest
import torch
from small import MODELS, random_model, save_random

from llama import Chat, Llama, ModelArgs, Transformer
from llama.options import plain, plain_arguments

IDS = [[1, 5, 6, 300], [1, 7, 8, 301]]


class Column:
    """A column of a table as in pandas: not a sequence, but converts to a list."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, key):
        raise KeyError(key)  # by label

    def tolist(self):
        return list(self.values)


class Series:
    """A column as in Polars."""

    def __init__(self, values):
        self.to_list = lambda: list(values)


class Whole:
    """An integer type of another library."""

    def __index__(self):
        return 4


@pytest.fixture(scope="module")
def llama(tokenizer):
    return Llama(random_model(vocab_size=tokenizer.n_words), tokenizer)


PROMPTS = {
    "array": np.array(IDS),
    "array of int32": np.array(IDS, dtype=np.int32),
    "tensor": torch.tensor(IDS),
    "list of tensors": [*torch.tensor(IDS)],
    "tuple of arrays": (*np.array(IDS),),
    "tuples": tuple(map(tuple, IDS)),
    "numbers of NumPy": [[np.int64(id) for id in row] for row in IDS],
    "numbers of PyTorch": [[torch.tensor(id) for id in row] for row in IDS],
    "array of lists": np.array([*map(np.array, IDS), None], dtype=object)[:2],
    "column": Column(IDS),
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_prompts_as_arrays_of_ids(llama, prompts):
    assert llama.generate(prompts, 5, temperature=0) == llama.generate(IDS, 5, temperature=0)


TEXTS = ["Once", "The sun"]
COLLECTIONS = [tuple, np.array, lambda texts: np.array(texts, dtype=object), Column, dict.fromkeys, Series]


@pytest.mark.parametrize("collect", COLLECTIONS)
def test_prompts_as_a_column_of_a_table(llama, collect):
    """Columns of pandas and NumPy are not sequences."""
    keys = collect(TEXTS).keys() if collect == dict.fromkeys else collect(TEXTS)
    options = {"temperature": 0, "max_gen_len": 4}
    assert llama.text_completion(keys, **options) == llama.text_completion(TEXTS, **options)
    scored, same = llama.score(keys, keys), llama.score(TEXTS, TEXTS)
    assert [row["token_ids"] for row in scored] == [row["token_ids"] for row in same]
    assert torch.allclose(llama.embed(keys), llama.embed(TEXTS), atol=1e-5)
    dialogs = [[{"role": "user", "content": text}] for text in TEXTS]
    if collect in (tuple, Column, Series):
        assert llama.chat_completion(collect(dialogs), **options) == llama.chat_completion(dialogs, **options)
        before = [*dialogs[0], {"role": "assistant", "content": "Hi"}]
        chat, same = Chat(llama, dialog=collect(before), **options), Chat(llama, dialog=before, **options)
        assert chat.say(np.str_("a")) == same.say("a")


SCHEMA = {"type": "string", "maxLength": 3}
OPTIONS = {
    "temperature": [np.float32(0.5), torch.tensor(0.5), (0.5, 0.5), np.array([0.5, 0.5]), Column([0.5, 0.5])],
    "top_p": [np.float64(0.5), torch.tensor([0.5, 0.5])],
    "top_k": [np.int64(4), np.array([4, 4]), torch.tensor(4), Whole()],
    "min_p": [np.float16(0.5), (0.5, np.float32(0.5))],
    "repetition_penalty": [np.float32(1.5)],
    "frequency_penalty": [torch.tensor(0.5)],
    "presence_penalty": [np.array([0.5, 0.5])],
    "logit_bias": [{np.int64(9): np.float32(2)}, ({9: 2.0}, {np.int32(9): torch.tensor(2.0)})],
    "seed": [np.int64(3), torch.tensor([3, 3]), np.uint8(3)],
    "stop": [np.array(["a", "e"]), ("a", "e"), {"a", "e"}, [np.array(["a", "e"]), ("e", "a")]],
    "stop_token_ids": [np.array([9, 11]), torch.tensor([9, 11]), (9, np.int64(11)), np.array([[9, 11], [11, 9]])],
    "min_gen_len": [np.int64(3), (3, 3)],
    "json_schema": [MappingProxyType(SCHEMA), np.array([SCHEMA, SCHEMA]), {**SCHEMA, "maxLength": np.int64(3)}],
    "regex": [np.array(["[a-z]{2,4}"] * 2), ("[a-z]{2,4}", "[a-z]{2,4}")],
    "prompt_lookup": [np.int8(3)],
    "max_gen_len": [np.int64(7), torch.tensor([7, 7])],
}
SAME = {"temperature": 0.5, "top_p": 0.5, "top_k": 4, "min_p": 0.5, "repetition_penalty": 1.5, "seed": 3}
SAME |= {"frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {9: 2.0}, "stop": ["a", "e"]}
SAME |= {
    "stop_token_ids": [9, 11],
    "min_gen_len": 3,
    "prompt_lookup": 3,
    "max_gen_len": 7,
    "json_schema": SCHEMA,
    "regex": "[a-z]{2,4}",
}


def test_every_option_is_tested():
    from llama.options import DEFAULTS, Options

    assert {*OPTIONS} == {*SAME} == {*Options.__annotations__, *DEFAULTS}


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, values in OPTIONS.items() for v in values],
    ids=lambda v: type(v).__name__ if isinstance(v, (set, Column, Whole)) else repr(v)[:40],  # equal in all processes
)
def test_options_as_numbers_and_arrays_of_other_libraries(llama, name, value):
    usual = {"max_gen_len": 6, "seed": 1}
    expected = llama.generate(IDS, **usual | {name: SAME[name]})
    assert llama.generate(IDS, **usual | {name: value}) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_none_stands_for_the_default(llama, name):
    """Regression: `stop=None` and `top_k=None` were refused."""

    def run(**options):
        usual = {} if name == "max_gen_len" else {"max_gen_len": 6}
        usual |= {} if name == "seed" else {"seed": 3}
        return Llama(llama.model, llama.tokenizer).text_completion(TEXTS, **usual | options)

    assert run(**{name: None}) == run(**{name: [None, None]}) == run()
    chat = Chat(Llama(llama.model, llama.tokenizer), **{"max_gen_len": 6, "seed": 3} | {name: None})
    assert chat.say("Hi") == Chat(llama, **{"max_gen_len": 6, "seed": 3, name: None}).say("Hi") or name == "seed"


def test_none_for_one_of_several_rows(llama):
    options = {"temperature": [0, None], "top_k": [None, 5], "stop": [None, ["a"]], "logit_bias": [{5: 1.0}, None]}
    same = {"temperature": [0, 0.6], "top_k": [0, 5], "stop": [[], ["a"]], "logit_bias": [{5: 1.0}, {}]}
    assert llama.generate(IDS, 6, seed=1, **options) == llama.generate(IDS, 6, seed=1, **same)


def test_other_arguments(llama):
    assert llama.score(["a"], None, None) == llama.score(["a"])
    assert llama.score(["a"], top_logprobs=np.int64(2)) == llama.score(["a"], top_logprobs=2)
    assert torch.allclose(llama.embed(["a"], None), llama.embed(["a"]))
    found = llama.generate(IDS, 2, None, None, None, np.True_, seed=3)
    assert found == llama.generate(IDS, 2, echo=True, seed=3)


def test_top_p_0_is_greedy(llama):
    """As in Meta's reference implementation."""
    for options in ({}, {"temperature": 1e6}, {"top_k": 50}, {"top_p": [0, 0.0]}):
        options = {"top_p": 0, "temperature": 1.5, "seed": 3} | options
        assert llama.generate(IDS, 9, **options) == llama.generate(IDS, 9, temperature=0)


def test_sizes_as_numbers_of_other_libraries():
    usual = {"device": "cpu", "dtype": "float32"}
    sizes = {"max_seq_len": np.int64(64), "max_batch_size": np.int32(2), "model_parallel_size": np.int64(1)}
    built = Llama.build(MODELS / "small", None, **sizes, seed=torch.tensor(5), **usual)
    assert (built.model.params.max_seq_len, built.model.params.max_batch_size) == (64, 2)
    assert type(built.model.params.max_batch_size) is int
    nothing = {name: None for name, p in inspect.signature(Llama.build).parameters.items() if p.default is not p.empty}
    built = Llama.build(MODELS / "small", **nothing | usual)
    assert (built.model.params.max_seq_len, built.model.params.max_batch_size) == (512, 4)
    with pytest.raises(ValueError, match=r"max_batch_size is 2\.5"):
        Llama.build(MODELS / "small", max_batch_size=np.float64(2.5), **usual)


def test_model_args_of_numpy_numbers(llama):
    shape = {name: value for name, value in vars(llama.model.params).items() if value}
    args = {name: np.float64(v) if isinstance(v, float) else np.int64(v) for name, v in shape.items()}
    same = Transformer(ModelArgs(**args)).requires_grad_(False)
    same.load_state_dict(llama.model.state_dict())
    assert Llama(same, llama.tokenizer).generate(IDS, 3, temperature=0) == llama.generate(IDS, 3, temperature=0)
    with pytest.raises(ValueError, match="dim is .*64.5.*, which is not int"):
        ModelArgs(dim=np.float64(64.5))


def test_other_objects_are_not_converted():
    class Words:  # such as a tokenizer, which has some of a collection's methods
        __len__ = __iter__ = __contains__ = None

    function, llama = np.sum, Words()
    for value in (function, llama, "text", b"bytes", 1.5, True, torch.float32, torch.device("cpu")):
        assert plain(value) is value
    assert plain({"a": (np.int8(1), {2.5}), 3: np.array("b")}) == {"a": [1, [2.5]], 3: "b"}


def test_errors_are_unchanged(llama):
    with pytest.raises(TypeError, match="positional argument"):
        llama.generate(IDS, 3, 0.6, 0.9, False, False, 7)
    with pytest.raises(TypeError, match="no option 'top_q'"):
        llama.generate(IDS, 3, top_q=None)
    with pytest.raises(ValueError, match="prompts is None; it must be a list of str"):
        llama.text_completion(None)
    with pytest.raises(ValueError, match=r"temperature is 0\.5; it must be|temperature has 3 values for 2 rows"):
        llama.generate(IDS, 3, temperature=np.array([0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match="prompt 1 contains 1.5"):
        llama.generate([[1], np.array([1.5])], 3)
    with pytest.raises(ValueError, match="prompt 1 is nan, which is not a str"):
        llama.text_completion(Column(["a", float("nan")]))


def test_the_signature_remains():
    @plain_arguments
    def function(a, b=3, *, c: int = 4, **rest):
        return a, b, c, rest

    assert function(None, None, c=None, d=None) == (None, 3, 4, {"d": None})
    assert function(np.int8(1), c=np.int8(2)) == (1, 3, 2, {})
    assert str(inspect.signature(function)) == "(a, b=3, *, c: int = 4, **rest)"


def _on_ranks(folder):
    llama = Llama.build(folder, MODELS / "tokenizer.model", np.int64(64), np.int64(4), device="cpu")
    options = {"top_k": np.int64(5), "seed": torch.tensor([1, 2]), "stop": None}
    texts = np.array(TEXTS, dtype=object)
    return llama.generate(torch.tensor(IDS), np.int64(3), **options), llama.score(texts, texts)[1]["token_ids"]


def test_arguments_reach_every_rank(ranks, tmp_path):
    save_random(tmp_path, mp=2)
    alone = _on_ranks(tmp_path)
    assert ranks(2).run(_on_ranks, tmp_path) == [alone, alone]
