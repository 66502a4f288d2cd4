"""The HTTP server, called with OpenAI's client, against the library's results."""

import base64
import signal
import struct
import threading

import pytest
import torch
from serving import (
    DIALOG,
    LONG,
    build,
    command,
    gauge,
    httpx,
    openai,
    serving,
    streamed,
    wait_for,
    wait_until_ready,
)

from llama import parallel
from llama.server.app import Config
from llama.server.loop import Loop
from llama.server.metrics import Metrics
from llama.server.process import Server

PROMPT = "The opposite of hot is"

SAMPLED = {"temperature": 1.2, "top_p": 0.95, "seed": 5}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_completions_equal_the_librarys(client, llama, sampling):
    [own] = llama.text_completion([PROMPT], max_gen_len=12, **{"top_p": 1, **sampling})
    asked = {"model": "small-chat", "prompt": PROMPT, "max_tokens": 12, **sampling}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == own["generation"]
    assert whole.choices[0].finish_reason == {"eos": "stop"}.get(own["finish_reason"], own["finish_reason"])
    assert whole.choices[0].logprobs is None
    texts, reasons, _, usage = streamed(client.completions.create(**asked, stream=True))
    assert (texts, reasons, usage) == ({0: own["generation"]}, {0: whole.choices[0].finish_reason}, None)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_chat_completions_equal_the_librarys(client, llama, sampling):
    [own] = llama.chat_completion([DIALOG], max_gen_len=20, **{"top_p": 1, **sampling})
    asked = {"model": "small-chat", "messages": DIALOG, "max_completion_tokens": 20, **sampling}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == own["generation"]["content"]
    assert whole.choices[0].message.role == "assistant"
    chunks = [*client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].object == "chat.completion.chunk"
    assert len({chunk.id for chunk in chunks}) == 1
    texts, reasons, _, usage = streamed(chunks)
    assert (texts, reasons) == ({0: own["generation"]["content"]}, {0: whole.choices[0].finish_reason})
    assert usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].choices == []


def test_choices_have_different_seeds(client, llama):
    own = llama.text_completion([PROMPT] * 3, max_gen_len=8, temperature=1.2, top_p=0.95, seed=[5, 6, 7])
    asked = {"model": "small-chat", "prompt": [PROMPT, "Once"], "max_tokens": 8, "n": 3, **SAMPLED}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [*range(6)]
    assert [choice.text for choice in whole.choices[:3]] == [row["generation"] for row in own]
    texts, reasons, _, _ = streamed(client.completions.create(**asked, stream=True))
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert len(reasons) == 6
    prompts = [llama.tokenizer.encode(text, bos=True, eos=False) for text in (PROMPT, "Once")]
    assert whole.usage.prompt_tokens == sum(map(len, prompts))
    by_ids = client.completions.create(**{**asked, "prompt": prompts})
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("most", [0, 6])
def test_logprobs_of_completions(client, llama, most):
    """With echo: the prompt's, as from `score`, the first of which is null, and then the answer's."""
    asked = {"model": "small-chat", "prompt": PROMPT, "temperature": 0, "logprobs": 2, "echo": True}
    [choice] = client.completions.create(**asked, max_tokens=most).choices
    found, ids = choice.logprobs, llama.tokenizer.encode(PROMPT, bos=True, eos=False)
    [score] = llama.score([choice.text], top_logprobs=2)
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert "".join(found.tokens) == choice.text
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    n = len(ids) + most if choice.finish_reason == "length" else len(found.tokens)
    assert len(found.tokens) == n
    assert found.token_logprobs[1:] == pytest.approx(score["logprobs"], abs=1e-4)
    for top, own, token, logprob in zip(
        found.top_logprobs[1:], score["top_logprobs"], found.tokens[1:], found.token_logprobs[1:], strict=True
    ):
        assert top[token] == pytest.approx(logprob, abs=1e-4)
        assert {text for text, _ in own} <= {*top}
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(n)]
    _, _, parts, _ = streamed(client.completions.create(**asked, max_tokens=most, stream=True))
    assert [token for part in parts[0] for token in part.tokens] == found.tokens
    assert [offset for part in parts[0] for offset in part.text_offset] == found.text_offset
    logprobs = [logprob for part in parts[0] for logprob in part.token_logprobs]
    assert logprobs[1:] == pytest.approx(found.token_logprobs[1:], abs=1e-4)


def test_logprobs_of_chats(client, llama):
    [own] = llama.chat_completion([DIALOG], max_gen_len=8, temperature=0, logprobs=True)
    asked = {"model": "small-chat", "messages": DIALOG, "max_tokens": 8, "temperature": 0, "logprobs": True}
    found = client.chat.completions.create(**asked, top_logprobs=3).choices[0].logprobs.content
    assert [token.token for token in found] == own["tokens"]
    assert [token.logprob for token in found] == pytest.approx(own["logprobs"], abs=1e-4)
    for token in found:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
        assert bytes(token.bytes).decode() == token.token
    assert client.chat.completions.create(**asked).choices[0].logprobs.content[0].top_logprobs == []
    _, _, parts, _ = streamed(client.chat.completions.create(**asked, stream=True))
    assert [token.token for part in parts[0] for token in part.content] == own["tokens"]


def test_stop_strings_across_token_borders(client, llama):
    [own] = llama.text_completion([PROMPT], max_gen_len=12, temperature=0, logprobs=True)
    pieces = own["tokens"]
    stop = (pieces[0] + pieces[1])[-2 - len(pieces[1]) // 2 :][: len(pieces[1]) // 2 + 1] or pieces[1]
    [cut] = llama.text_completion([PROMPT], max_gen_len=12, temperature=0, stop=[stop, "never"], logprobs=True)
    assert len(cut["generation"]) < len(own["generation"])
    asked = {"model": "small-chat", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 0}
    [choice] = client.completions.create(**asked, stop=[stop, "never"]).choices
    assert (choice.text, choice.finish_reason) == (cut["generation"], "stop")
    assert choice.logprobs.tokens == cut["tokens"]
    texts, reasons, parts, _ = streamed(client.completions.create(**asked, stop=[stop, "never"], stream=True))
    assert (texts, reasons) == ({0: cut["generation"]}, {0: "stop"})
    assert [token for part in parts[0] for token in part.tokens] == cut["tokens"]


def test_options_reach_the_library(client, llama):
    options = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "stop_token_ids": [13]}
    penalties = {"frequency_penalty": 0.5, "presence_penalty": 0.25}
    [own] = llama.text_completion(
        [PROMPT], max_gen_len=10, temperature=1.5, top_p=1, seed=-3, min_gen_len=4, logit_bias={5: 2}, **options,
        **penalties,
    )  # fmt: skip
    found = client.completions.create(
        model="small-chat", prompt=PROMPT, max_tokens=10, temperature=1.5, seed=-3, logit_bias={"5": 2}, **penalties,
        extra_body={**options, "min_tokens": 4, "unknown": {"a": 1}, "n": None, "user": "u", "tools": []},
    )  # fmt: skip
    assert found.choices[0].text == own["generation"]


def test_usage_and_cached_tokens(client):
    text = "One day a little fox went into the wood to find a friend. " * 3
    asked = {"model": "small-chat", "prompt": text, "max_tokens": 3, "temperature": 0, "extra_body": {"min_tokens": 3}}
    first, second = client.completions.create(**asked).usage, client.completions.create(**asked).usage
    assert first.completion_tokens == second.completion_tokens == 3
    assert first.total_tokens == first.prompt_tokens + 3
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1


def test_a_resent_dialog_computes_only_its_new_turn():
    with serving(build(max_seq_len=640)) as client:
        dialog, before = [], 0
        for number in range(20):
            dialog.append({"role": "user", "content": f"What is {number} + 1?"})
            found = client.chat.completions.create(model="small-chat", messages=dialog, temperature=0, max_tokens=12)
            # All earlier tokens, except perhaps the end of an answer, whose text may be encoded as other tokens.
            assert before - 2 <= found.usage.prompt_tokens_details.cached_tokens <= before
            dialog.append({"role": "assistant", "content": found.choices[0].message.content})
            before = found.usage.total_tokens


def test_messages(client):
    def content(*messages):
        asked = {"model": "small-chat", "messages": [*messages], "temperature": 0, "max_tokens": 12}
        return client.chat.completions.create(**asked).choices[0].message.content

    plain = content({"role": "system", "content": "Be brief."}, *DIALOG)
    assert content({"role": "developer", "content": "Be brief."}, *DIALOG) == plain
    parts = [{"type": "text", "text": "What is the "}, {"type": "text", "text": "opposite of big?"}]
    assert content({"role": "user", "content": parts, "name": "Ann"}) == content(*DIALOG)


@pytest.mark.parametrize(
    "refused", [{"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]}]
)
def test_a_refusal_is_what_the_assistant_has_said(client, refused):
    """OpenAI's models refuse so, and clients resend it. Regression: the text was lost, or the message an error."""

    def tokens(message):
        body = {"messages": [*DIALOG, {"role": "assistant", **message}, *DIALOG]}
        return httpx.post(f"{client.url}/tokenize", json=body).json()["tokens"]

    assert tokens(refused) == tokens({"content": "No.", "refusal": None})


def test_ignore_eos(client, llama):
    [own] = llama.chat_completion([DIALOG], max_gen_len=40, temperature=0)
    assert own["finish_reason"] == "eos"
    asked = {"model": "small-chat", "messages": DIALOG, "temperature": 0, "max_tokens": 40}
    found = client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 40)
    assert found.choices[0].message.content.startswith(own["generation"]["content"])
    ends = {"ignore_eos": True, "stop_token_ids": [llama.tokenizer.eos_id]}
    found = client.chat.completions.create(**asked, extra_body=ends)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (own["generation"]["content"], "stop")


@pytest.mark.parametrize("logprobs", [False, True])
def test_continue_final_message(client, llama, logprobs):
    begun = [*DIALOG, {"role": "assistant", "content": "The opposite"}]
    ids = llama.tokenizer.encode(f"[INST] {DIALOG[0]['content']} [/INST] The opposite", bos=True, eos=False)
    [[*new]], _ = llama.generate([ids], max_gen_len=12, temperature=0)
    own = llama.tokenizer.decode([*ids, *new])[len(llama.tokenizer.decode(ids)) :]
    asked = {"model": "small-chat", "messages": begun, "temperature": 0, "max_tokens": 12, "logprobs": logprobs}
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    [choice] = client.chat.completions.create(**asked, extra_body=flags).choices
    assert choice.message.content == own
    assert own.startswith(" ")
    if logprobs:
        assert "".join(token.token for token in choice.logprobs.content) == own
    found = httpx.post(f"{client.url}/tokenize", json={"messages": begun, "continue_final_message": True}).json()
    assert found["tokens"] == ids


@pytest.mark.parametrize("pieces", [["Hello"], ["Hello", "A little fox"]])
def test_embeddings(client, llama, pieces):
    own = llama.embed(pieces)
    found = client.embeddings.create(model="small-chat", input=pieces)  # which requests base64
    assert torch.allclose(torch.tensor([row.embedding for row in found.data]), own, atol=1e-5)
    body = {"model": "small-chat", "input": [llama.tokenizer.encode(text, bos=True, eos=False) for text in pieces]}
    rows = httpx.post(f"{client.url}/v1/embeddings", json=body).json()["data"]
    assert torch.allclose(torch.tensor([row["embedding"] for row in rows]), own, atol=1e-5)
    coded = httpx.post(f"{client.url}/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"]
    raw = base64.b64decode(coded[-1]["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(rows[-1]["embedding"], abs=1e-6)


def test_models_tokens_and_health(client, llama):
    assert [model.id for model in client.models.list()] == ["small-chat"]
    assert client.models.retrieve("small-chat").owned_by == "llama"
    ids = httpx.post(f"{client.url}/tokenize", json={"prompt": PROMPT}).json()
    assert ids["tokens"] == llama.tokenizer.encode(PROMPT, bos=True, eos=False)
    assert httpx.post(f"{client.url}/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": PROMPT}
    chat = httpx.post(f"{client.url}/tokenize", json={"messages": DIALOG}).json()
    assert chat["tokens"] == llama.chat_format.encode(llama.tokenizer, DIALOG)
    assert httpx.get(f"{client.url}/health").json() == {"status": "ok"}


def test_a_disconnected_client_frees_its_slot(client, slow):
    stream = client.completions.create(**LONG, stream=True)
    next(stream)
    assert gauge(client, "num_requests_running") == 1
    stream.close()
    wait_for(lambda: gauge(client, "num_requests_running") == 0, 2)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**LONG)
    wait_for(lambda: gauge(client, "num_requests_running") == 0, 2)
    assert gauge(client, "request_success_total") > 0
    assert 'finished_reason="abort"} 2' in httpx.get(f"{client.url}/metrics").text


def test_streams_run_concurrently_and_too_many_are_refused(llama, slow):
    with serving(llama, max_waiting=1) as client:
        streams = [client.completions.create(**LONG, stream=True) for _ in range(4)]  # of 4 slots
        waiting = threading.Thread(target=lambda: streams.append(client.completions.create(**LONG, stream=True)))
        waiting.start()  # as a stream begins with its slot
        wait_for(lambda: gauge(client, "num_requests_waiting") == 1)
        for stream in streams[:4]:
            next(stream)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**LONG)
        assert refused.value.response.headers["retry-after"] == "1"
        assert gauge(client, "num_requests_running") == 4
        for stream in streams[:4]:
            next(stream)
            stream.close()
        waiting.join()
        next(streams[4])
        streams[4].close()
        wait_for(lambda: gauge(client, "num_requests_running") == 0, 2)


def test_non_finite_logits_end_only_their_request():
    llama = build()
    weight = llama.model.tok_embeddings.weight.clone()
    weight[99] = float("nan")
    llama.model.tok_embeddings.weight = torch.nn.Parameter(weight, requires_grad=False)
    with serving(llama) as client:
        other = client.completions.create(model="small-chat", prompt="Once", max_tokens=100, stream=True)
        next(other)
        with pytest.raises(openai.InternalServerError, match="NaN or infinite"):
            client.completions.create(model="small-chat", prompt=[1, 99])
        with pytest.raises(openai.APIError, match="NaN or infinite"):
            [*client.completions.create(model="small-chat", prompt=[1, 99], stream=True)]
        with pytest.raises(openai.InternalServerError):
            client.embeddings.create(model="small-chat", input=[[1, 99]])
        assert streamed(other)[1]
        assert client.completions.create(model="small-chat", prompt="a", max_tokens=1).choices


BODIES = [
    ("completions", {"prompt": [PROMPT, "Once upon"], "max_tokens": 8, "temperature": 0, "logprobs": 1}),
    ("completions", {"prompt": PROMPT, "max_tokens": 8, "n": 2, **SAMPLED}),
    ("chat/completions", {"messages": DIALOG, "max_tokens": 12, "temperature": 0}),
    ("embeddings", {"input": ["Hello", "Once"]}),
]


def answers(port):
    """A server's answers to all bodies, requested concurrently, after a client that disconnects early."""
    url, found = f"http://127.0.0.1:{port}", {}
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True, "min_tokens": 200}) as stream:
        next(stream.iter_lines())

    def ask(i, path, body):
        found[i] = httpx.post(f"{url}/v1/{path}", json=body, timeout=30).json()

    threads = [threading.Thread(target=ask, args=(i, *body)) for i, body in enumerate(BODIES)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    texts = [choice.get("text") or choice["message"]["content"] for i in range(3) for choice in found[i]["choices"]]
    return texts, [row["embedding"] for row in found[3]["data"]]


def served_by_ranks():
    """On every rank. The first one also sends requests, in a thread."""
    llama = build()
    if parallel.rank():
        return Loop(llama, Metrics("")).run()
    server, found = Server(Config("small-chat")), []

    def ask():
        try:
            found.append(answers(server.port))
        finally:
            server.drain()

    thread = threading.Thread(target=ask)
    thread.start()
    server.serve(llama)
    thread.join()
    return found[0]


def test_ranks_change_nothing(client, ranks):
    texts, rows = answers(client.server.port)
    found, nothing = ranks(2).run(served_by_ranks)
    assert nothing is None
    assert found[0] == texts
    assert torch.allclose(torch.tensor(found[1]), torch.tensor(rows), atol=1e-4)


def test_the_command_ends_after_its_requests(tmp_path):
    (tmp_path / "keys").write_text("one\ntwo\n")
    flags = ["--api_key_file", str(tmp_path / "keys"), "--max_batch_size", "2"]
    with command(*flags, LLAMA_API_KEYS="three") as [process]:
        wait_until_ready(process)
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="three", max_retries=0)
        stream = client.completions.create(
            model="small-chat", prompt="A secret", max_tokens=60, stream=True, extra_body={"min_tokens": 60}
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert streamed(stream)[1] == {0: "length"}
        assert process.wait(20) == 0
        out, err = process.communicate()
    assert out == ""
    assert "POST '/v1/completions' 200, 6 tokens of prompts (0 cached), 60 new" in err
    assert "secret" not in err
