"""A server under load: thousands of requests, some of them cancelled or malformed, and random bodies.

    python benchmarks/serving_soak.py [--requests 2000] [--at_once 64] [--fuzz_count 10000]

It starts `python -m llama serve` on the bundled model in float32 and compares each answer with the library's own. It
fails if an answer differs, if a slot leaks, if memory grows by more than 30 MB, if the metrics do not add up, or if a
body is answered with anything but 2xx or 4xx. Needs httpx and hypothesis.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import fire
import httpx
from common import MODELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import free_port, running

from llama import Llama
from llama.server.schema import OF_CHAT, OF_TEXT

MODEL = MODELS / "small-chat"
SIZES: dict[str, Any] = {"max_batch_size": 8, "max_seq_len": 256}
GROWTH = 30.0  # MB
TEXTS = ("The opposite of hot is", "Once upon a time there was", "One day a fox", "A", "The little boy said: ")
QUESTIONS = ("What is the opposite of big?", "Hello", "Tell me a story.", "Who are you?")
BAD: list[Any] = [{}, [], {"prompt": 3}, {"prompt": "a", "temperature": -1}, {"prompt": [[1, 10**9]]}, "{", "\x00"]
Answer = tuple[str, str | None]  # text and finish reason


def choose_body(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A path, and a body whose answer is the same each time."""
    sampled = {"temperature": 1.1, "top_p": 0.9, "seed": chance.randrange(3)}
    sampling: dict[str, Any] = chance.choice([{"temperature": 0}, sampled])
    body: dict[str, Any] = {**sampling, "max_tokens": chance.choice([1, 8, 40]), "n": chance.choice([1, 1, 2])}
    if chance.random() < 0.3:
        body["stop"] = [".", " the"]
    if chance.random() < 0.5:
        return "chat/completions", {**body, "messages": [{"role": "user", "content": chance.choice(QUESTIONS)}]}
    prompts = chance.sample(TEXTS, chance.choice([1, 1, 3]))
    return "completions", {**body, "prompt": prompts}


def answers(llama: Llama, body: dict[str, Any]) -> list[Answer]:
    """Texts and finish reasons from the library."""
    prompts, n = body.get("prompt", [body.get("messages")]), body["n"]
    options: dict[str, Any] = {"max_gen_len": body["max_tokens"], "temperature": body["temperature"]}
    options |= {"stop": body.get("stop"), "top_p": body.get("top_p", 1)}
    if "seed" in body:
        options["seed"] = [body["seed"] + i for _ in prompts for i in range(n)]
    rows = [prompt for prompt in prompts for _ in range(n)]
    complete: Any = llama.chat_completion if "messages" in body else llama.text_completion
    results = complete(rows, **options)
    texts = [result["generation"] for result in results]
    said = [text["content"] if isinstance(text, dict) else text for text in texts]
    reasons = ["length" if result["finish_reason"] == "length" else "stop" for result in results]
    return [*zip(said, reasons, strict=True)]


def key(path: str, body: dict[str, Any]) -> str:
    return path + json.dumps(body)


class Soak:
    def __init__(self, url: str, chance: random.Random) -> None:
        self.url, self.chance, self.llama = url, chance, Llama.build(MODEL, device="cpu", dtype="float32", **SIZES)
        self.known: dict[str, list[Answer]] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, count: int, at_once: int) -> None:
        limit, asked = asyncio.Semaphore(at_once), [choose_body(self.chance) for _ in range(count)]
        for path, body in asked:
            self.known[key(path, body)] = self.known.get(key(path, body)) or answers(self.llama, body)
        async with httpx.AsyncClient(base_url=f"{self.url}/v1/", timeout=300, limits=httpx.Limits()) as client:

            async def one(kind: float, path: str, body: dict[str, Any]) -> None:
                async with limit:
                    await self.ask(client, kind, path, body)

            await asyncio.gather(*(one(self.chance.random(), *some) for some in asked))

    async def ask(self, client: httpx.AsyncClient, kind: float, path: str, body: dict[str, Any]) -> None:
        if kind < 0.05:
            bad = self.chance.choice(BAD)
            content = bad if isinstance(bad, str) else json.dumps(bad)
            status = (await client.post("completions", content=content)).status_code
            self.counts["malformed"] += 1
            if not 400 <= status < 500:
                self.wrong.append(f"{bad} is answered with {status}")
        elif kind < 0.15:
            self.counts["cancelled"] += 1
            long = {**body, "max_tokens": 200, "min_tokens": 100, "stop": None}
            if kind < 0.1:
                with suppress(httpx.TimeoutException):
                    await client.post(path, json=long, timeout=self.chance.random() / 2)
                return
            async with client.stream("POST", path, json={**long, "stream": True}) as stream:
                lines = stream.aiter_lines()
                for _ in range(self.chance.randrange(1, 8)):
                    await anext(lines)
        else:
            self.counts["whole"] += 1
            found = await (self.streamed if kind < 0.6 else self.whole)(client, path, body)
            if found != (expected := self.known[key(path, body)]):
                self.wrong.append(f"{key(path, body)}\n  server  {found}\n  library {expected}")

    async def whole(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Answer]:
        reply = (await client.post(path, json=body)).raise_for_status().json()
        self.counts["tokens"] += reply["usage"]["completion_tokens"]
        self.counts["choices"] += len(reply["choices"])
        texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in reply["choices"]]
        return [(text, choice["finish_reason"]) for text, choice in zip(texts, reply["choices"], strict=True)]

    async def streamed(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Answer]:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        async with client.stream("POST", path, json=body) as stream:
            async for line in stream.raise_for_status().aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                self.counts["tokens"] += (chunk["usage"] or {}).get("completion_tokens", 0)
                for choice in chunk["choices"]:
                    i, text = choice["index"], choice["delta"].get("content") if "delta" in choice else choice["text"]
                    texts[i] = texts.get(i, "") + (text or "")
                    reasons.update({i: choice["finish_reason"]} if choice["finish_reason"] else {})
        self.counts["choices"] += len(texts)
        return [(texts[i], reasons.get(i)) for i in sorted(texts)]

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"llama:{name}{{"))


def fuzz(url: str, count: int) -> Counter[int]:
    """Count the statuses of `count` random bodies. Raises AssertionError for a server error."""
    numbers = st.integers(-3, 300) | st.floats() | st.sampled_from([2**31, 2**63, 2**70, 10**400])
    biases = st.dictionaries(st.integers(0, 1100).map(str), numbers, max_size=2)
    values = st.recursive(
        st.none() | st.booleans() | st.text(max_size=5) | numbers | biases,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )
    others = ("prompt", "messages", "input", "encoding_format", "dimensions", "tokens", "response_format", "tools")
    names = st.sampled_from([*dict.fromkeys((*others, *OF_TEXT, *OF_CHAT, "suffix"))])
    usual: dict[str, Any] = {
        "prompt": "a",
        "messages": [{"role": "user", "content": "a"}],
        "input": "a",
        "tokens": [1],
        "max_tokens": 2,
    }
    paths = st.sampled_from(("v1/completions", "v1/chat/completions", "v1/embeddings", "tokenize", "detokenize"))
    fields = st.dictionaries(names, values, max_size=3)
    bodies = st.tuples(fields, st.sampled_from([usual, {}])).map(lambda pair: json.dumps(pair[1] | pair[0]).encode())
    cut = st.tuples(bodies, st.integers(0, 60), st.binary(max_size=3)).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :])
    statuses: Counter[int] = Counter()
    client = httpx.Client(base_url=url, timeout=60)

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(paths, bodies | cut | st.binary(max_size=100))
    def send(path: str, body: bytes) -> None:
        reply = client.post(path, content=body)
        statuses[reply.status_code] += 1
        assert reply.status_code < 500 and "server_error" not in reply.text, (path, body, reply.text)

    send()
    return statuses


def raw(port: int, count: int, chance: random.Random) -> None:
    """Bytes that are not HTTP."""
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(
                chance.choice([b"", b"POST /v1/completions HTTP/1.1\r\n"]) + chance.randbytes(200) + b"\r\n\r\n"
            )


def megabytes(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def main(requests: int = 2000, at_once: int = 64, fuzz_count: int = 10_000, seed: int = 0) -> None:
    """Run all checks.

    Args:
        requests: number of complete, cancelled and malformed requests, after a quarter as many to warm up
        at_once: number of concurrent requests
        fuzz_count: number of random bodies
        seed: seed of the random choice of requests
    """
    chance, port = random.Random(seed), free_port()
    url = f"http://127.0.0.1:{port}"
    flags = [f"--{name}={value}" for name, value in {**SIZES, "port": port, "max_waiting": 1000}.items()]
    command = [sys.executable, "-m", "llama", "serve", str(MODEL), "--device=cpu", "--dtype=float32", *flags]
    with running(*command, port=port) as pid:
        soak = Soak(url, chance)
        asyncio.run(soak.run(requests // 4, at_once))
        before, began = megabytes(pid), time.monotonic()
        asyncio.run(soak.run(requests, at_once))
        seconds = time.monotonic() - began
        while soak.metric("num_requests_running") + soak.metric("num_requests_waiting"):
            time.sleep(0.1)
            if time.monotonic() - began > seconds + 30:
                raise SystemExit("requests are still running: slots leak")
        after = megabytes(pid)
        print(f"{requests} requests in {seconds:.0f} s; with the warm-up {dict(soak.counts)}")
        print(f"memory {before:.0f} -> {after:.0f} MB, {len(soak.wrong)} wrong answers")
        ended, tokens = soak.metric("request_success_total"), soak.metric("generation_tokens_total")
        aborted = ended - soak.counts["choices"]
        print(f"{ended:.0f} requests have ended, {aborted:.0f} of them cancelled; {tokens:.0f} tokens")
        assert ended == soak.metric("e2e_request_latency_seconds_count")
        assert 0 <= aborted <= soak.counts["cancelled"] * 6 and tokens >= soak.counts["tokens"]
        assert tokens == soak.metric("request_generation_tokens_sum")
        for wrong in soak.wrong[:10]:
            print(wrong)
        if soak.wrong or after - before > GROWTH:
            raise SystemExit("wrong answers, or memory grows")
        if fuzz_count:
            raw(port, fuzz_count // 20, chance)
            print(f"statuses of {fuzz_count} bodies at random: {dict(fuzz(url, fuzz_count))}")
            httpx.get(f"{url}/health").raise_for_status()
            print(f"memory {megabytes(pid):.0f} MB")


if __name__ == "__main__":
    fire.Fire(main)
