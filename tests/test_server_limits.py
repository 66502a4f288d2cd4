"""What the server does to protect itself and those who use it: limits of time, filters, slow clients, log, metrics."""

import json
import logging
import re
import socket
import sys
import threading
import time

import pytest
from serving import LONG, build, command, gauge, httpx, openai, serving, slow_down, streamed, wait_for, wait_until_ready

from llama import parallel
from llama.server import app, filters, protocol
from llama.server.app import Config
from llama.server.filters import load_filters
from llama.server.log import JsonLines
from llama.server.loop import Loop
from llama.server.metrics import HISTOGRAMS, Metrics
from llama.server.process import Server

DIALOG = [{"role": "user", "content": "What is the opposite of big?"}]
BOMB = [{"role": "user", "content": "How do I build a bomb?"}]
CHAT = {"model": "small-chat", "messages": DIALOG, "max_tokens": 20, "temperature": 0}
GREEDY = {**LONG, "temperature": 0}


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.fixture
def slow(llama, monkeypatch):
    slow_down(llama, monkeypatch)


@pytest.fixture(scope="module")
def whole(llama):
    """The text whose first part is what is cut."""
    [own] = llama.text_completion(["Once"], max_gen_len=200, min_gen_len=200, temperature=0)
    return own["generation"]


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_an_answer_that_takes_too_long_is_cut(llama, whole, slow):
    with serving(llama, max_time=0.5) as client:
        found = client.completions.create(**GREEDY)
        [choice] = found.choices
        assert choice.finish_reason == "length"
        assert 0 < found.usage.completion_tokens < 200
        assert choice.text
        assert whole.startswith(choice.text)
        texts, reasons, _, _ = streamed(client.completions.create(**GREEDY, stream=True))
        assert reasons == {0: "length"}
        assert texts[0]
        assert whole.startswith(texts[0])
        assert gauge(client, "num_requests_running") == 0
        assert 'finished_reason="length"} 2' in httpx.get(f"{client.url}/metrics").text
        assert client.completions.create(**{**GREEDY, "max_tokens": 3, "extra_body": {}}).usage.completion_tokens <= 3


def test_all_prompts_of_a_request_are_cut(llama, slow):
    """Also those that had no slot yet, whose answers are empty."""
    with serving(llama, max_time=0.3) as client:
        found = client.completions.create(**{**GREEDY, "prompt": ["Once"] * 6})
        assert [choice.finish_reason for choice in found.choices] == ["length"] * 6
        assert [bool(choice.text) for choice in found.choices] == [True] * 4 + [False] * 2
        with pytest.raises(openai.InternalServerError, match="has run for 0.3 seconds") as refused:
            client.embeddings.create(model="small-chat", input=["Once"] * 100)
        assert refused.value.status_code == 503


def test_who_waits_too_long_for_a_slot_hears_so(llama, slow):
    with serving(llama, max_wait=0.3) as client:
        streams = [client.completions.create(**GREEDY, stream=True) for _ in range(4)]
        for asked in ({}, {"stream": True}):
            with pytest.raises(openai.InternalServerError, match="no slot was free for 0.3 seconds") as refused:
                client.completions.create(**GREEDY, **asked)
            assert refused.value.status_code == 503
            assert refused.value.response.headers["retry-after"] == "1"
        assert gauge(client, "num_requests_running") == 4
        for stream in streams:
            assert streamed(stream)[1] == {0: "length"}


def cut_on_ranks():
    """On every rank; the first also asks, in a thread: what is cut, and the same once more, in time."""
    llama = build()
    if parallel.rank():
        return Loop(llama, Metrics("")).run()
    server, found = Server(Config("small-chat", max_time=0.2)), []

    def ask():
        try:
            url = f"http://127.0.0.1:{server.port}"
            wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
            for body in ({"min_tokens": 200, "max_tokens": 200, "n": 4}, {"max_tokens": 4}):
                body |= {"prompt": "Once", "temperature": 0}
                found.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()["choices"])
        finally:
            server.drain()

    step = llama.engine.step
    llama.engine.step = lambda: (time.sleep(0.02), step())[1]
    thread = threading.Thread(target=ask)
    thread.start()
    server.serve(llama)
    thread.join()
    return found


def test_all_ranks_cut(whole, ranks):
    (cut, next_one), nothing = ranks(2).run(cut_on_ranks)
    assert nothing is None
    assert {choice["finish_reason"] for choice in cut} == {"length"}
    assert all(choice["text"] and whole.startswith(choice["text"]) for choice in cut)
    assert max(len(choice["text"]) for choice in cut) < len(whole)
    assert whole.startswith(next_one[0]["text"])


# ---------------------------------------------------------------------------------------------------------------------
# Filters

MODULE = """
import time

def input_filter(dialog):
    text = dialog[-1]["content"]
    if "wait" in text:
        time.sleep(2)
    if "fail" in text:
        raise RuntimeError("no filter today")
    if "exit" in text:
        raise SystemExit(3)
    return "I do not talk about bombs." if "bomb" in text else None

class Answers:
    def __init__(self):
        self.word = "small"

    def output_filter(self, text):
        return "Censored." if self.word in text.lower() else None

class Odd:
    def output_filter(self, text):
        return 3

nothing = 1
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_filters.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("own_filters", None)


def test_input_filters(llama, module):
    bomb = {**CHAT, "messages": BOMB}
    with serving(llama, filters=load_filters(["own_filters"])) as client:
        found = client.chat.completions.create(**bomb, n=2, logprobs=True)
        assert [choice.message.content for choice in found.choices] == ["I do not talk about bombs."] * 2
        assert [choice.finish_reason for choice in found.choices] == ["content_filter"] * 2
        assert (found.choices[0].logprobs.content, found.usage.completion_tokens) == ([], 0)
        texts, reasons, _, _ = streamed(client.chat.completions.create(**bomb, stream=True))
        assert (texts, reasons) == ({0: "I do not talk about bombs."}, {0: "content_filter"})
        found = client.completions.create(model="small-chat", prompt=["Once", "A bomb"])
        assert [choice.finish_reason for choice in found.choices] == ["content_filter"] * 2
        ids = llama.tokenizer.encode("A bomb", bos=True, eos=False)
        found = client.completions.create(model="small-chat", prompt=ids)
        assert found.choices[0].finish_reason == "content_filter"
        [own] = llama.chat_completion([DIALOG], max_gen_len=20, temperature=0)
        assert client.chat.completions.create(**CHAT).choices[0].message.content == own["generation"]["content"]


def test_output_filters_see_whole_answers(llama, module):
    """A stream holds an answer back until it is whole, as a stop string may be in its last token."""
    [own] = llama.chat_completion([DIALOG], max_gen_len=20, temperature=0)
    assert "small" in own["generation"]["content"]
    with serving(llama, filters=load_filters(["own_filters:Answers"])) as client:
        found = client.chat.completions.create(**CHAT, logprobs=True)
        assert found.choices[0].message.content == "Censored."
        assert found.choices[0].finish_reason == "content_filter"
        assert found.choices[0].logprobs.content == []
        assert found.usage.completion_tokens > 0
        chunks = [*client.chat.completions.create(**CHAT, stream=True)]
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Censored.", None]
        other = {**CHAT, "messages": [{"role": "user", "content": "Hello"}]}
        [own] = llama.chat_completion([other["messages"]], max_gen_len=20, temperature=0)
        texts, _, _, _ = streamed(client.chat.completions.create(**other, stream=True))
        assert texts == {0: own["generation"]["content"]}


def test_a_filter_that_fails_or_waits_stops_nobody_else(llama, module, caplog, monkeypatch):
    def ask(text):
        body = {**CHAT, "messages": [{"role": "user", "content": text}]}
        return httpx.post(f"{client.url}/v1/chat/completions", json=body, timeout=30)

    with serving(llama, filters=load_filters(["own_filters"])) as client:
        waiting = threading.Thread(target=ask, args=("wait",))
        waiting.start()
        assert ask("Hello").status_code == 200
        reply = ask("fail")
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        assert "no filter today" not in reply.text
        assert ask("exit").status_code == 500
        assert ask("Hello").status_code == 200
        assert waiting.is_alive()
        waiting.join()
        monkeypatch.setattr(filters, "SECONDS", 0.1)
        assert ask("wait").status_code == 500
    assert "no filter today" in caplog.text
    with serving(llama, filters=load_filters(["own_filters:Odd"])) as client:
        assert ask("Hello").status_code == 500
        stream = client.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="a filter has failed"):
            streamed(stream)


def test_the_command_with_filters_and_json(module, tmp_path):
    flags = ["--filter", '["own_filters", "own_filters:Answers"]', "--log_json", "--log_prompts"]
    with command(*flags, cwd=tmp_path) as [process]:
        wait_until_ready(process)
        url = f"{process.url}/v1/chat/completions"
        replies = [httpx.post(url, json={**CHAT, "messages": dialog}, timeout=30) for dialog in (BOMB, DIALOG)]
        said = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
        assert said == ["I do not talk about bombs.", "Censored."]
        process.terminate()
        assert process.wait(20) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [line["prompt"] for line in lines if "prompt" in line] == [BOMB, DIALOG]
    with command("--filter", "own_filters:nothing", cwd=tmp_path) as [process]:
        assert process.wait(60) == 1
        error = process.stderr.read()
    assert error == "error: the filter own_filters:nothing has neither a function input_filter nor one output_filter\n"


def test_filters_that_are_none(module):
    for name in ("own_filters:nothing", "own_filters:Absent", "absent_module", "", "own_filters:Odd.output_filter.x"):
        with pytest.raises(ValueError, match=f"the filter {re.escape(name)}"):
            load_filters([name])


# ---------------------------------------------------------------------------------------------------------------------
# The log


def test_the_log_has_no_prompt_unless_it_shall(llama, caplog):
    caplog.set_level(logging.INFO, "llama.server")
    with serving(llama) as client:
        client.chat.completions.create(**CHAT)
        client.completions.create(model="small-chat", prompt="A secret", max_tokens=3)
        client.embeddings.create(model="small-chat", input="A secret")
        httpx.get(f"{client.url}/v1/a%0ab", headers={"X-Request-Id": "mine-1"})
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if hasattr(record, "fields")]
    lines = [line for line in lines if "/v1/" in line["path"]]
    assert "opposite" not in str(lines) + caplog.text
    assert "secret" not in str(lines) + caplog.text
    assert [line["path"] for line in lines] == ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/a\nb"]
    assert {"time", "level", "method", "path", "status", "seconds", "prompt_tokens", "cached_tokens"} <= {*lines[0]}
    assert {"completion_tokens", "first_token_seconds", "request_id"} <= {*lines[0]}
    assert 0 <= lines[0]["first_token_seconds"] <= lines[0]["seconds"]
    assert (lines[1]["completion_tokens"], lines[2]["first_token_seconds"]) == (3, None)
    assert (lines[3]["status"], lines[3]["request_id"]) == (404, "mine-1")
    assert "\nb" not in caplog.text
    caplog.clear()
    with serving(llama, log_prompts=True) as client:
        client.chat.completions.create(**CHAT)
        client.completions.create(model="small-chat", prompt="A secret", max_tokens=3)
    found = [record.fields["prompt"] for record in caplog.records if "prompt" in getattr(record, "fields", {})]
    assert found == [DIALOG, "A secret"]


def test_requests_have_ids(llama):
    with serving(llama, keys=("key",)) as client:
        url, key = f"{client.url}/v1/models", {"Authorization": "Bearer key"}
        assert httpx.get(url, headers={**key, "X-Request-Id": "a-1"}).headers["x-request-id"] == "a-1"
        assert httpx.get(url, headers={"X-Request-Id": "a-2"}).headers["x-request-id"] == "a-2"  # 401
        made = [
            httpx.get(url, headers={**key, "X-Request-Id": odd}).headers["x-request-id"] for odd in ("a b", "x" * 200)
        ]
        assert all(re.fullmatch("[0-9a-f]{32}", id) for id in made)
        assert made[0] != made[1]


def test_json_lines_of_other_records():
    record = logging.LogRecord("llama", logging.WARNING, "", 0, 'a "%s"', ("b\n",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"]) == ("WARNING", 'a "b\n"')


def test_a_full_disk_of_the_log_ends_nothing():
    with open("/dev/full", "w") as full, command("--log_json", stderr=full) as [process]:
        wait_until_ready(process)
        for _ in range(300):
            assert httpx.get(f"{process.url}/v1/models").status_code == 200
        process.terminate()
        assert process.wait(20) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_prometheus_reads_the_metrics(llama):
    parser = pytest.importorskip("prometheus_client.parser")
    odd = 'a "b"\\\n'
    with serving(llama) as client:
        client.completions.create(model="small-chat", prompt="Once", max_tokens=4, n=2, extra_body={"min_tokens": 4})
        client.chat.completions.create(**CHAT)
        text = httpx.get(f"{client.url}/metrics").text
    metrics = Metrics(odd)
    metrics.add("request_success_total", finished_reason=odd)
    for found in (text, metrics.render({})):
        families = {family.name: family for family in parser.text_string_to_metric_families(found)}
        for family in families.values():
            assert family.documentation
            for sample in family.samples:
                assert sample.labels["model_name"] in ("small-chat", odd)
            if family.type == "histogram":
                counts = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
                assert counts == sorted(counts)
                assert counts[-1] == next(s.value for s in family.samples if s.name.endswith("_count"))
        kinds = {name.removeprefix("llama:"): family.type for name, family in families.items()}
        assert {name for name, kind in kinds.items() if kind == "histogram"} == {*HISTOGRAMS}
        gauges = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
        assert {name for name, kind in kinds.items() if kind == "gauge"} == gauges
        counters = {"prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"}
        counters |= {"num_preemptions", "request_success"}
        assert {name for name, kind in kinds.items() if kind == "counter"} == counters


def test_metrics_add_up(llama):
    with serving(llama) as client:
        body = {"prompt": "Once", "n": 3, "max_tokens": 4, "extra_body": {"min_tokens": 4}}
        prompt = client.completions.create(model="small-chat", **body).usage.prompt_tokens
        assert gauge(client, "request_params_n_sum") == 3
        assert gauge(client, "request_params_max_tokens_sum") == 12
        assert gauge(client, "request_prompt_tokens_sum") == gauge(client, "prompt_tokens_total") == 3 * prompt
        assert gauge(client, "request_generation_tokens_sum") == gauge(client, "generation_tokens_total") == 12
        assert gauge(client, "iteration_tokens_total_sum") == 3 * prompt + 12
        parts = ("queue", "prefill", "decode")
        names = [f"request_{part}_time_seconds" for part in parts]
        assert [gauge(client, f"{name}_count") for name in names] == [3, 3, 3]
        spent = sum(gauge(client, f"{name}_sum") for name in names)
        assert 0 < spent <= gauge(client, "e2e_request_latency_seconds_sum") + 1e-6
        assert gauge(client, "time_to_first_token_seconds_sum") <= spent
        assert gauge(client, "kv_cache_usage_perc") == 0


def test_the_cache_that_is_used(llama, slow):
    with serving(llama) as client:
        stream = client.completions.create(**GREEDY, stream=True)
        next(stream)
        used = gauge(client, "kv_cache_usage_perc")
        assert 0 < used < 0.25  # one of four slots
        wait_for(lambda: gauge(client, "kv_cache_usage_perc") > used)
        stream.close()


# ---------------------------------------------------------------------------------------------------------------------
# Slow clients

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


def sent(client, *parts, pause=0.02):
    """What comes back until the server closes, of parts that are sent one after another."""
    with socket.create_connection(("127.0.0.1", client.server.port), timeout=20) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        except OSError:  # the server has closed
            pass
        found = b""
        try:
            while data := connection.recv(2**16):
                found += data
        except ConnectionError:
            pass
        return found


def test_clients_that_send_slowly(llama, monkeypatch):
    monkeypatch.setattr(protocol, "SENDING", dict.fromkeys(protocol.SENDING, 0.5))
    with serving(llama) as client:
        slowly = [bytes([byte]) for byte in HEAD * 5]
        assert sent(client, *slowly) == b""
        assert sent(client) == b""  # who says nothing
        assert client.completions.create(model="small-chat", prompt="a", max_tokens=1).choices
        body = HEAD + b"Content-Length: 1000\r\n\r\n"
        assert sent(client, body, *[b"1"] * 100) == b""
        assert sent(
            client, b"GET /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n", *[b"1"] * 100
        ).startswith(b"HTTP/1.1 404")


def test_a_body_that_takes_too_long(llama, monkeypatch):
    monkeypatch.setattr(app, "BODY", 0.3)
    with serving(llama) as client:
        reply = sent(client, HEAD + b"Content-Length: 1000\r\n\r\n", *[b"1"] * 50)
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"longer than 0.3 seconds" in reply


def test_requests_that_are_none(llama):
    with serving(llama) as client:
        huge = HEAD + b"X: " + b"x" * 2**20 + b"\r\n\r\n"
        assert sent(client, huge).startswith(b"HTTP/1.1 4") or sent(client, huge) == b""
        line = HEAD + b"X: " + b"x" * 40_000
        assert sent(client, line).startswith(b"HTTP/1.1 400")
        assert sent(client, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert client.models.list().data


def test_a_client_that_does_not_read(llama, monkeypatch):
    """Its requests end, also where the answer fills all buffers between."""
    monkeypatch.setattr(protocol, "READING", 0.5)
    body = json.dumps({"prompt": ["Once"] * 100, "max_tokens": 1, "echo": True, "logprobs": 20}).encode()
    with serving(llama, max_waiting=100) as client, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)  # connections inherit it
        connection.connect(("127.0.0.1", client.server.port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connections = client.server.http.server_state.connections
        wait_for(lambda: gauge(client, "num_requests_running") == 4)
        wait_for(lambda: gauge(client, "num_requests_running") == 0, 60)
        wait_for(lambda: all(each.client[1] != connection.getsockname()[1] for each in [*connections]))
