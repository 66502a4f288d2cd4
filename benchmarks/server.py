"""The server under load, compared with llama.cpp's, and its overhead over the engine.

    python benchmarks/server.py load [--llama_server PATH] [--quantize int8] [--dtype float32] [--slots 32]
    python benchmarks/server.py overhead

`load`: 32 concurrent clients stream answers of 32 to 128 tokens to prompts of 64 to 512 tokens, and one client sends as
many requests of the same lengths one after another, in alternation. 110M shape (dim 768, 12 layers, FFN 2048,
vocabulary 32000), random weights in one GGUF file of F16 or Q8_0 that both servers read; two threads and 32 slots each.
`overhead`: CPU time per token of 8 streams of the bundled model, with the server and with the engine alone. Needs the
extra `server`; llama.cpp's server must be built from source.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fire
import torch
from common import MODELS, random_folder, ratio, spread
from processes import free_port, running

from llama import Llama
from llama.checkpoint.convert import convert

CLIENTS, CONTEXT, THREADS = 32, 1024, 2
Body = dict[str, Any]
Clients = Callable[[int, Sequence[Body]], Coroutine[Any, Any, list["Timing"]]]


class Timing(NamedTuple):
    """Times that one client measured, in seconds."""

    first: float  # from sending to the first token
    gaps: list[float]  # between one event and the next


def write_gguf(folder: Path, scheme: str | None) -> Path:
    convert(random_folder(folder / "meta", "110M", torch.float16), folder / "gguf", "gguf", 1, None, quantize=scheme)
    return next((folder / "gguf").glob("*.gguf"))


def bodies(count: int, seed: int = 0) -> list[Body]:
    """Requests of the same lengths, with different tokens for each seed, so that no prefix is cached."""
    lengths, chance = random.Random(0), random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [chance.randrange(256, 31000) for _ in range(lengths.randint(64, 512))]
        more = {"max_tokens": lengths.randint(32, 128), "temperature": 0, "stream": True, "ignore_eos": True}
        rows.append({"model": "model", "prompt": prompt, **more})
    return rows


async def ask(port: int, body: Body) -> Timing:
    """One streamed completion. The HTTP is written by hand, because a client library would use up part of the two
    cores."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + content)
    began, events = time.perf_counter(), list[float]()
    async for line in reader:
        if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
            raise RuntimeError((line + await reader.read()).decode())
        if line.startswith(b"data: {"):
            events.append(time.perf_counter())
    writer.close()
    return Timing(events[0] - began, [b - a for a, b in itertools.pairwise(events)])


async def all_at_once(port: int, rows: Sequence[Body]) -> list[Timing]:
    return await asyncio.gather(*(ask(port, row) for row in rows))


async def in_turn(port: int, rows: Sequence[Body]) -> list[Timing]:
    return [await ask(port, row) for row in rows]


def rate(clients: Clients, port: int, seed: int) -> tuple[float, list[Timing]]:
    """Tokens per second of all clients together, and the times of each."""
    asked = bodies(CLIENTS, seed)
    began = time.perf_counter()
    rows = asyncio.run(clients(port, asked))
    return sum(row["max_tokens"] for row in asked) / (time.perf_counter() - began), rows


def longest_gap(port: int) -> str:
    """The longest time between two tokens of an answer, in seconds: a bucket bound of the server's metrics, because
    clients get no event for a token without text."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        text = reply.read().decode()
    found = re.findall(r'inter_token_latency_seconds_bucket\{.*le="([^"]+)".*\} (\S+)', text)
    return next(bound for bound, count in found if count == found[-1][1])


def report(name: str, speed: float, rows: list[Timing]) -> None:
    firsts = sorted(row.first for row in rows)
    gaps = sorted(gap for row in rows for gap in row.gaps)
    at = lambda values, share: values[min(len(values) - 1, int(share * len(values)))]  # noqa: E731
    print(
        f"{name:28} {speed:7.1f} tokens/s   first token p50 {at(firsts, 0.5):5.2f} p99 {at(firsts, 0.99):5.2f} s   "
        f"between tokens p50 {at(gaps, 0.5):5.3f} p99 {at(gaps, 0.99):5.3f} longest {gaps[-1]:5.3f} s",
        flush=True,
    )


def load(
    llama_server: str | None = None,
    quantize: str | None = None,
    dtype: str | None = None,
    slots: int = CLIENTS,
    repeats: int = 3,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_gguf(Path(folder), quantize))
        port = free_port()
        flags = ["--port", str(port), "--max_batch_size", str(slots), "--max_seq_len", str(CONTEXT), "--any_model"]
        flags += ["--dtype", dtype] if dtype else []
        commands = {"this server": [sys.executable, "-m", "llama", "serve", path, *flags]}
        if llama_server:
            options = ["-m", path, "-np", str(slots), "-c", str(slots * CONTEXT), "--port", str(port)]
            commands["llama-server"] = [llama_server, *options, "-t", str(THREADS), "-tb", str(THREADS)]
        speeds: dict[str, list[float]] = {}
        for name, command in commands.items():
            ways: dict[str, Clients] = {f"{name}, {CLIENTS} at once": all_at_once}
            ways |= {f"{name}, in turn": in_turn} if name == "this server" else {}
            timings: dict[str, list[Timing]] = {way: [] for way in ways}
            seeds = itertools.count()
            with running(*command, port=port):
                rate(all_at_once, port, next(seeds))  # to warm up
                for way, clients in [*ways.items()] * repeats:  # alternately, as the machine's speed varies
                    speed, rows = rate(clients, port, next(seeds))
                    speeds.setdefault(way, []).append(speed)
                    timings[way] += rows
                if name == "this server":
                    print(f"no two tokens of an answer are further apart than {longest_gap(port)} s")
            for way, rows in timings.items():
                report(way, statistics.median(speeds[way]), rows)
        ours, alone, *theirs = speeds.values()
        print(f"at once / in turn: {ratio(ours, alone)}")
        for values in theirs:
            print(f"this server / llama-server: {ratio(ours, values)}")


def overhead(tokens: int = 200, streams: int = 8, repeats: int = 9) -> None:
    """CPU time of all threads of this process; clients run in another process."""
    from llama.server.app import Config
    from llama.server.process import Server

    llama = Llama.build(MODELS / "small-chat", max_seq_len=256, max_batch_size=streams, device="cpu")
    server = Server(Config("model"))
    threading.Thread(target=server.serve, args=(llama,)).start()
    options = {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0}
    # Of different lengths: the model computes sequences of equal length in fewer operations, but HTTP requests differ.
    texts = ["Once upon a time" + " there" * (2 * i) for i in range(streams)]
    rows = [{"model": "model", "prompt": text, "stream": True, **options} for text in texts]
    client = f"import asyncio,sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from server import *; "
    client += f"asyncio.run(all_at_once({server.port}, {rows!r}))"
    by_server, by_engine = [], []  # ms per token

    def cpu(run: Callable[[], object]) -> float:
        llama.engine.forget()
        began = time.process_time()
        run()
        return 1000 * (time.process_time() - began) / (tokens * streams)

    for _ in range(repeats + 1):
        by_server.append(cpu(lambda: subprocess.run([sys.executable, "-c", client], check=True, capture_output=True)))
        by_engine.append(cpu(lambda: llama.text_completion(texts, 0, max_gen_len=tokens, min_gen_len=tokens)))
    server.drain()
    more = [a - b for a, b in zip(by_server, by_engine, strict=True)]
    print(f"CPU per token: engine {spread(by_engine[1:], ' ms')}, more with the server {spread(more[1:], ' ms')}")


if __name__ == "__main__":
    fire.Fire({"load": load, "overhead": overhead})
