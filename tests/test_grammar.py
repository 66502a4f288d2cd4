"""Structured output: answers match, for every kind of tokenizer, and beside other requests."""

import json
import random
import re
import sys

import pytest
import torch
from small import MODELS, TOKENIZER
from test_vocabulary import JSON, write_json, write_ranks

from llama import Llama
from llama.grammar import Grammars, to_grammar
from llama.tokenizer import Tokenizer

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", "été 🐈"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
PATTERNS = [
    "yes|no",
    "[0-9]{4}-[0-9]{2}",
    "[a-c]{1,4}/(é|🐈|the ){1,9}x",
    r"( ?[a-zé]){2,5}\.",
    "a\nb",
    r"\\/{2,3}|'\"`",
]
PROMPTS = ["Once upon a time", "The opposite of hot is", "A"]


def is_person(text):
    found = json.loads(text)
    assert {*found} == {"name", "age", "pets"} and type(found["age"]) is int and 0 <= found["age"] <= 150
    assert isinstance(found["name"], str) and len(found["name"]) <= 12
    assert len(found["pets"]) <= 3 and {*found["pets"]} <= {*PERSON["properties"]["pets"]["items"]["enum"]}
    return True


def tokenizers(folder):
    yield "Llama 2", Tokenizer(TOKENIZER)
    yield "Llama 3", Tokenizer(write_ranks(folder))
    for name, content in JSON.items():
        inner = folder / name
        inner.mkdir()
        write_json(inner, content())
        yield f"{name}, tokenizer.json", Tokenizer(inner / "tokenizer.json")


def walk(grammars, tokenizer, grammar, continues, chance):
    """The text of random tokens, each of them allowed by the grammar."""
    ids, matcher = [], grammars.matcher(grammar, continues)
    while len(ids) < 500:
        id = chance.choice(matcher.mask().nonzero()[:, 0].tolist())
        complete = matcher.take(id)
        if id in tokenizer.eos_ids:
            break
        ids.append(id)
        if complete:
            break
    before = tokenizer.encode("In the beginning", bos=True, eos=False) if continues else []
    return "".join(tokenizer.decode_pieces(ids, before))


def test_any_sequence_of_allowed_tokens_matches(tmp_path):
    chance = random.Random(0)
    for name, tokenizer in tokenizers(tmp_path):
        grammars = Grammars(tokenizer, tokenizer.n_words + 3)  # as checkpoints pad it
        for continues in (False, True):
            for pattern in PATTERNS:
                for _ in range(5):
                    text = walk(grammars, tokenizer, to_grammar(None, pattern), continues, chance)
                    assert re.fullmatch(pattern, text), (name, continues, pattern, text)
            assert is_person(walk(grammars, tokenizer, to_grammar(PERSON, None), continues, chance)), name


@pytest.fixture(scope="module")
def llama():
    return Llama.build(MODELS / "small-chat", max_seq_len=256, max_batch_size=4, device="cpu", dtype="float32")


DIALOG = [{"role": "user", "content": "What is the opposite of big?"}]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_match(llama, temperature):
    options = {"temperature": temperature, "top_p": 1, "seed": 3}
    for found in llama.text_completion(PROMPTS * 2, json_schema=PERSON, **options):
        assert found["finish_reason"] in ("stop", "eos") and is_person(found["generation"])
    for found in llama.chat_completion([DIALOG] * 3, json_schema=json.dumps(PERSON), **options):
        assert found["finish_reason"] in ("stop", "eos") and is_person(found["generation"]["content"])
    for pattern in PATTERNS:
        [text] = llama.text_completion(PROMPTS[:1], regex=pattern, **options)
        [answer] = llama.chat_completion([DIALOG], regex=pattern, **options)
        assert re.fullmatch(pattern, text["generation"]) and re.fullmatch(pattern, answer["generation"]["content"])


def test_rows_with_different_grammars_or_none(llama):
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_gen_len": 30}
    [alone] = llama.text_completion(PROMPTS[:1], **options)
    mixed = llama.text_completion(PROMPTS, json_schema=[None, PERSON, None], regex=[None, None, "yes|no"], **options)
    assert mixed[0] == alone
    assert mixed[1]["generation"][0] == "{" and mixed[1]["finish_reason"] == "length"
    assert mixed[2]["generation"] in ("yes", "no")
    drafted = llama.text_completion(PROMPTS[1:2], json_schema=PERSON, prompt_lookup=4, **options)
    assert drafted[0] == mixed[1]


def test_with_other_options(llama):
    ids, _ = llama.generate([[1, 5, 9]], 20, 0.0, regex="(ab)+", min_gen_len=6)
    text = llama.tokenizer.decode([5, *ids[0]])
    assert re.search("(ab)+$", text) and len(ids[0]) >= 6
    # A complete answer ends, even before the minimum length.
    assert llama.text_completion(["A"], temperature=0, regex="yes", min_gen_len=9)[0]["generation"] == "yes"
    [stopped] = llama.text_completion(["A"], temperature=0, regex="[a-z]{8}-[0-9]{4}", stop="-")
    assert re.fullmatch("[a-z]{8}", stopped["generation"]) and stopped["finish_reason"] == "stop"
    [scored] = llama.text_completion(["A"], temperature=0, regex="yes|no", logprobs=True, echo=True)
    assert scored["generation"] in ("Ayes", "Ano") and "".join(scored["tokens"]) == scored["generation"]


def test_options_that_leave_no_token(llama):
    forbidden = {id: -float("inf") for id in range(llama.model.vocab_size) if id != 7}
    with pytest.raises(ValueError, match="the answer cannot follow its grammar"):
        llama.text_completion(["A"], regex="yes|no", logit_bias=forbidden)
    assert llama.text_completion(["A"], regex="yes")[0]["generation"] == "yes"


BAD = [
    ({"regex": "("}, "regex is not supported: .*unclosed group"),
    ({"regex": "a(?=b)"}, "look-around"),
    ({"regex": 5}, "regex is 5; it must be a str"),
    ({"json_schema": '{"a"'}, "it must be a JSON object"),
    ({"json_schema": 5}, "json_schema is 5; it must be a JSON object"),
    ({"json_schema": {"type": "obj"}}, "json_schema is not supported: .*Invalid type: obj"),
    ({"json_schema": {"not": {}}}, "Unimplemented keys"),
    ({"json_schema": {"type": "object"}, "regex": "a"}, "an answer can follow one of them"),
    ({"json_schema": [{}, {}]}, "json_schema has 2 values for 1 rows"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_grammars_are_named(llama, options, message):
    with pytest.raises(ValueError, match=message):
        llama.text_completion(["A"], **options)


def test_without_the_package_the_error_names_it(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ValueError, match="regex needs the package llguidance: pip install 'llama-reference\\[grammar\\]'"
    ):
        Grammars(tokenizer, 1024).matcher(to_grammar(None, "a"), False)


def structured():
    torch.manual_seed(0)
    llama = Llama.build(MODELS / "small-chat", max_seq_len=128, max_batch_size=2, device="cpu", dtype="float32")
    found = llama.text_completion(PROMPTS, json_schema=PERSON, temperature=0.8, seed=4)
    return [row["generation"] for row in found]


def test_ranks_agree(ranks):
    one, two = ranks(2).run(structured)
    assert one == two == structured()
    assert all(map(is_person, one))


@pytest.fixture(scope="module")
def client(llama):
    from serving import serving

    with serving(llama) as client:
        yield client


ASKED = {
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}},
    "guided_json": {"guided_json": PERSON},
    "as a text": {"guided_json": json.dumps(PERSON)},
    "structured_outputs": {"structured_outputs": {"json": PERSON, "regex": None}},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_clients_request_json(client, llama, asked):
    body = {"model": "small-chat", "temperature": 0.8, "seed": 2, "extra_body": asked}
    own = llama.chat_completion([DIALOG], 0.8, 1, json_schema=PERSON, seed=2)[0]["generation"]["content"]
    assert client.chat.completions.create(messages=DIALOG, **body).choices[0].message.content == own
    chunks = [*client.chat.completions.create(messages=DIALOG, stream=True, **body)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == own
    assert chunks[-1].choices[0].finish_reason == "stop"
    found = client.completions.create(prompt=PROMPTS[0], max_tokens=200, n=2, **body)
    assert all(is_person(choice.text) for choice in found.choices)


CHOICES = ["a+b (c)", "d|e\n", "été 🐈", "-#&~ "]


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"guided_choice": CHOICES}, "|".join(map(re.escape, CHOICES))),
        ({"response_format": {"type": "json_object"}, "max_tokens": 3}, r"\{.*"),
    ],
)
def test_clients_ask_for_texts(client, asked, pattern):
    for seed in range(4):
        body = {"model": "small-chat", "temperature": 1.5, "seed": seed, "extra_body": asked}
        text = client.chat.completions.create(messages=DIALOG, **body).choices[0].message.content
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_json": {"type": "obj"}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}}, "response_format"),
        ({"guided_regex": "a|b", "logit_bias": {str(id): -1e30 for id in range(1024)}}, None),
    ],
)
def test_clients_get_errors_of_grammars(client, asked, param):
    import openai

    if param:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="small-chat", messages=DIALOG, extra_body=asked)
        assert caught.value.param == param
    else:  # all are equally unlikely: the grammar decides
        found = client.chat.completions.create(model="small-chat", messages=DIALOG, extra_body=asked)
        assert found.choices[0].message.content in "ab"


def test_clients_get_an_error_if_the_package_is_missing(client, llama, monkeypatch):
    import openai

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match="needs the package llguidance") as caught:
        asked = {"guided_regex": "not compiled yet"}
        client.chat.completions.create(model="small-chat", messages=DIALOG, extra_body=asked)
    assert caught.value.param == "guided_regex"
