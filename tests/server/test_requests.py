"""Requests that the server refuses: the error says what is wrong, and no body causes a server error."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import DIALOG, httpx, openai, serving

from llama.server.schema import OF_CHAT, OF_TEXT

TEXT = {"model": "small-chat", "prompt": "Hello"}
CHAT = {"model": "small-chat", "messages": DIALOG}
ANSWER = {"role": "assistant", "content": "Small."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
BAD = {
    "not JSON": ("completions", b"{", 400, None),
    "no object": ("completions", [1], 400, None),
    "deep": ("completions", b"[" * 100_000, 400, None),
    "no prompt": ("completions", {}, 400, "prompt"),
    "empty prompts": ("completions", {"prompt": []}, 400, "prompt"),
    "no id": ("completions", {"prompt": [10**9]}, 400, "prompt"),
    "negative id": ("completions", {"prompt": [[1, -1]]}, 400, "prompt"),
    "mixed": ("completions", {"prompt": ["a", 1]}, 400, "prompt"),
    "surrogate": ("completions", b'{"prompt": "\\ud800"}', 400, None),
    "temperature": ("completions", {**TEXT, "temperature": -1}, 400, "temperature"),
    "temperature list": ("completions", {**TEXT, "temperature": [1]}, 400, "temperature"),
    "temperature NaN": ("completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    "top_p": ("completions", {**TEXT, "top_p": 2}, 400, "top_p"),
    "n": ("completions", {**TEXT, "n": 0}, 400, "n"),
    "best_of": ("completions", {**TEXT, "best_of": 2}, 400, "best_of"),
    "suffix": ("completions", {**TEXT, "suffix": "x"}, 400, "suffix"),
    "seed": ("completions", {**TEXT, "seed": 2**63}, 400, "seed"),
    "stop": ("completions", {**TEXT, "stop": [["a"]]}, 400, "stop"),
    "empty stop": ("completions", {**TEXT, "stop": ""}, 400, "stop"),
    "bias": ("completions", {**TEXT, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    "bias id": ("completions", {**TEXT, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    "logprobs": ("completions", {**TEXT, "logprobs": True}, 400, "logprobs"),
    "max_tokens": ("completions", {**TEXT, "max_tokens": "3"}, 400, "max_tokens"),
    "too long": ("completions", {**TEXT, "prompt": [1] * 257}, 400, "prompt"),
    "no space": ("completions", {**TEXT, "prompt": [1] * 256}, 400, "prompt"),
    "too many": ("completions", {**TEXT, "prompt": ["a"] * 1000, "n": 128}, 400, "n"),
    "another model": ("completions", {**TEXT, "model": "gpt-4"}, 404, "model"),
    "tools": ("chat/completions", {**CHAT, "tools": [{}]}, 400, "tools"),
    "format": ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, "response_format"),
    "top": ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    "image": ("chat/completions", {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages[0].content[0]"),
    "no messages": ("chat/completions", {"messages": []}, 400, "messages"),
    "answered": ("chat/completions", {"messages": [*DIALOG, ANSWER]}, 400, "messages"),
    "not answered": ("chat/completions", {**CHAT, "continue_final_message": True}, 400, "messages"),
    "no header": (
        "chat/completions",
        {**CHAT, "add_generation_prompt": False},
        400,
        "add_generation_prompt",
    ),
    "role": ("chat/completions", {"messages": [{"role": "king", "content": "a"}]}, 400, "messages"),
    "two users": ("chat/completions", {"messages": [*DIALOG, *DIALOG]}, 400, "messages"),
    "tags": ("chat/completions", {"messages": [{"role": "user", "content": "[INST]"}]}, 400, "messages"),
    "empty input": ("embeddings", {"input": ""}, 400, "input"),
    "dimensions": ("embeddings", {"input": "a", "dimensions": 3}, 400, "dimensions"),
    "another path": ("nothing", {}, 404, None),
    "method": ("models", {}, 405, None),
    "too large": ("completions", {**TEXT, "user": "x" * 2**22}, 413, None),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_of_bad_requests(client, name):
    path, body, status, param = BAD[name]
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(f"{client.url}/v1/{path}", content=sent)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert (error["code"] == "context_length_exceeded") == (name in ("too long", "no space"))


def test_openais_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=DIALOG)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.completions.create(model="small-chat", prompt="a", top_p=3)


@pytest.mark.parametrize(
    "more", [{"max_tokens": 10**400}, {"min_tokens": 10**400}, {"logit_bias": {"5": -(10**20)}}, {"temperature": 2**70}]
)
def test_huge_numbers(client, more):
    """Regression: a max_tokens beyond float64 stopped the events of all requests of a step, and an integer bias beyond
    int64 ended all running requests."""
    body = {**TEXT, "prompt": [1] * 250, "stream": True, "max_tokens": 6, **more}
    with httpx.stream("POST", f"{client.url}/v1/completions", content=json.dumps(body), timeout=10) as reply:
        text = reply.read().decode()
    assert reply.status_code == 200 and "error" not in text and text.endswith("data: [DONE]\n\n")


def test_keys_and_origins(llama):
    page = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST"}
    with serving(llama, keys=("key", "other"), allow_origins=("https://a.org",), any_model=True) as client:
        assert client.completions.create(model="gpt-4", prompt="a", max_tokens=1).model == "gpt-4"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="kex").models.list()
        reply = httpx.get(f"{client.url}/v1/models")
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        found = httpx.options(f"{client.url}/v1/completions", headers=page)
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, "https://a.org")
        found = httpx.get(f"{client.url}/health", headers={"Origin": "https://b.org"})
        assert "access-control-allow-origin" not in found.headers


NUMBERS = st.integers(-3, 300) | st.floats() | st.sampled_from([2**31, 2**63, 2**70, 10**400])
BIASES = st.dictionaries(st.integers(0, 1100).map(str), NUMBERS, max_size=2)
VALUES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5) | NUMBERS | BIASES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
OTHERS = ("prompt", "messages", "input", "encoding_format", "dimensions", "tokens", "add_special_tokens")
NAMES = [*dict.fromkeys((*OTHERS, *OF_TEXT, *OF_CHAT, "response_format", "tools", "suffix"))]
PATHS = ("v1/completions", "v1/chat/completions", "v1/embeddings", "tokenize", "detokenize")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3), st.booleans())
def test_no_body_causes_a_server_error(client, path, body, sound):
    usual = {"prompt": "a", "messages": DIALOG, "input": "a", "tokens": [1], "max_tokens": 2} if sound else {}
    reply = httpx.post(f"{client.url}/{path}", content=json.dumps({**usual, **body}), timeout=30)
    assert 200 <= reply.status_code < 500, reply.text
    assert "server_error" not in reply.text
