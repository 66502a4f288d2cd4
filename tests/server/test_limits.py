"""The server's limits: how long requests may run and wait, and slow clients."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from serving import GREEDY, build, gauge, httpx, openai, serving, streamed, wait_for

from llama import parallel
from llama.request import Request
from llama.server import app, loop, protocol
from llama.server.app import Config
from llama.server.loop import Loop, Ticket
from llama.server.metrics import Metrics
from llama.server.process import Server
from llama.server.schema import ApiError, Work


@pytest.fixture(scope="module")
def whole(llama):
    """The complete text, of which a time limit leaves a prefix."""
    [own] = llama.text_completion(["Once"], max_gen_len=200, min_gen_len=200, temperature=0)
    return own["generation"]


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
    """Also those without a slot, whose answers are empty."""
    with serving(llama, max_time=0.3) as client:
        found = client.completions.create(**{**GREEDY, "prompt": ["Once"] * 6})
        assert [choice.finish_reason for choice in found.choices] == ["length"] * 6
        assert [bool(choice.text) for choice in found.choices] == [True] * 4 + [False] * 2
        with pytest.raises(openai.InternalServerError, match="has run for 0.3 seconds") as refused:
            client.embeddings.create(model="small-chat", input=["Once"] * 100)
        assert refused.value.status_code == 503


def test_waiting_too_long_for_a_slot_is_an_error(llama, slow):
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


def test_waiting_too_long_is_an_error_although_a_slot_became_free(llama):
    """Regression: on several ranks, which cancel with the next pass, the answer was empty, without an error."""
    server_loop, found = Loop(llama, Metrics("")), []
    server_loop.event_loop = SimpleNamespace(call_soon_threadsafe=lambda deliver, tickets: found.extend(tickets))
    ticket = Ticket(0, Work([[1]]), server_loop.inbox)
    ticket.late, ticket.requests = "no slot was free", [request := Request([1], 9)]
    request.slot, request.finish_reason = 0, "cancelled"
    request.emit()
    server_loop._send([ticket], time.monotonic())
    [(_, [event])] = found
    with pytest.raises(ApiError, match="no slot was free") as error:
        ticket.check(event)
    assert error.value.status == 503 and not ticket.began


def test_streams_get_comments_in_between(llama, whole, slow, monkeypatch):
    """Answers that are not streamed get none."""
    monkeypatch.setattr(loop, "KEEPALIVE", 0.1)
    body = {"prompt": "Once", "max_tokens": 20, "min_tokens": 20, "temperature": 0}
    with serving(llama) as client:
        lines = httpx.post(f"{client.url}/v1/completions", json={**body, "stream": True}).text.split("\n\n")
        assert lines.count(": keepalive") >= 2
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert whole.startswith("".join(chunk["choices"][0]["text"] for chunk in chunks))
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        found = httpx.post(f"{client.url}/v1/completions", json=body).json()
        assert whole.startswith(found["choices"][0]["text"])


def cut_on_ranks():
    """On every rank. The first also sends a request, in a thread, which is cut, and then one that is not."""
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


# Slow clients


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


def sent(client, *parts, pause=0.02):
    """The server's response, until it closes the connection, to parts that are sent one after another."""
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
        assert sent(client) == b""  # a client that sends nothing
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


def test_malformed_http(llama):
    with serving(llama) as client:
        huge = HEAD + b"X: " + b"x" * 2**20 + b"\r\n\r\n"
        assert sent(client, huge).startswith(b"HTTP/1.1 4") or sent(client, huge) == b""
        line = HEAD + b"X: " + b"x" * 40_000
        assert sent(client, line).startswith(b"HTTP/1.1 400")
        assert sent(client, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert client.models.list().data


def test_a_client_that_sends_more_and_disconnects(llama, slow):
    """Regression: the server stopped reading at the client's next request, so that it missed the end."""
    body = json.dumps({"prompt": "Once", "max_tokens": 200, "min_tokens": 200}).encode()
    with serving(llama) as client:
        with socket.create_connection(("127.0.0.1", client.server.port)) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: gauge(client, "num_requests_running") == 1)
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            time.sleep(0.1)
        wait_for(lambda: gauge(client, "num_requests_running") == 0, 1)


def test_a_malformed_body_after_its_answer(llama, caplog):
    """Regression: an exception and its traceback in the log."""
    with serving(llama) as client:
        chunked = b"POST /nothing HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert sent(client, chunked, b"zz\r\n", pause=0.2).startswith(b"HTTP/1.1 404")
    assert "Traceback" not in caplog.text and "Fatal" not in caplog.text


def test_a_client_that_reads_slowly(llama, monkeypatch):
    """Regression: it had 60 seconds for the whole answer, although it read all the time."""
    monkeypatch.setattr(protocol, "READING", 0.5)
    body = json.dumps({"prompt": ["Once"] * 40, "max_tokens": 1, "echo": True, "logprobs": 20}).encode()
    with serving(llama, max_waiting=100) as client, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        connection.connect(("127.0.0.1", client.server.port))
        connection.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer, began = b"", time.monotonic()
        while part := connection.recv(2048):
            answer += part
            time.sleep(0.05)
        assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]) == 40
        assert time.monotonic() - began > 1


def test_a_client_that_does_not_read(llama, monkeypatch):
    """Its requests end even if the answer fills all socket buffers."""
    monkeypatch.setattr(protocol, "READING", 0.5)
    body = json.dumps({"prompt": ["Once"] * 100, "max_tokens": 1, "echo": True, "logprobs": 20}).encode()
    with serving(llama, max_waiting=100) as client, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)  # connections inherit it
        connection.connect(("127.0.0.1", client.server.port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connections = client.server.http.server_state.connections
        wait_for(lambda: gauge(client, "prompt_tokens_total") > 0)  # the requests have begun
        wait_for(lambda: gauge(client, "num_requests_running") == 0, 60)
        wait_for(lambda: all(each.client[1] != connection.getsockname()[1] for each in [*connections]))
