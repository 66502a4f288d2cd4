"""`python -m llama batch`: a job that is killed at random times, and the throughput.

    python benchmarks/batch.py [--lines 5000] [--kills 10] [--prompts 192] [--repeats 3]

1. The bundled chat model answers a file of prompts, dialogs and OpenAI requests of mixed lengths, some of them
   malformed, with one replica and with two. torchrun or one of its workers is killed with SIGKILL `kills` times; in
   the end each line must have exactly one answer.
2. Tokens per second of a batch, compared with `text_completion` on fixed batches of max_batch_size prompts, which must
   all end before the next batch begins. 110M shape with random float32 weights and the bundled tokenizer. The two are
   measured in alternation. Answer lengths follow an exponential distribution, 4 to 128 tokens with a mean of about 32.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fire
import torch
from common import MODELS, ROOT, alternate, random_model, ratio, spread

from llama import Llama, Tokenizer
from llama.cli.batch import answer_lines
from llama.cli.batch_files import Files

CHAT = MODELS / "small-chat"
WORDS = ["the", "a", "fox", "story", "once", "time", "hot", "cold", "big", "tell", "me", "about", "opposite", "was"]


def make_line(i: int, chance: random.Random) -> str:
    """One line of the file; every fiftieth cannot be answered."""
    text = " ".join(chance.choices(WORDS, k=chance.randint(1, 60)))
    most = min(80, 1 + int(chance.expovariate(1 / 15)))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": most}
    wrong: list[Any] = [{"id": f"n{i}"}, {"id": f"n{i}", "prompt": 3}, {"id": f"n{i}", "prompt": "a " * 2000}]
    good: list[Any] = [
        {"id": f"n{i}", "prompt": text, "max_gen_len": most},
        {"id": f"n{i}", **body},
        {"custom_id": f"n{i}", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": f"n{i}", "method": "POST", "url": "/v1/embeddings", "body": {"input": text}},
    ]
    if i % 50:
        return json.dumps(chance.choice(good))
    return chance.choice([*map(json.dumps, wrong), "{", "no JSON"])


def run_killed(source: Path, target: Path, replicas: int, stops: list[int], chance: random.Random) -> int:
    """Run the job until it ends, and kill it each time the file of answers reaches one of the numbers of lines in
    `stops`. Returns how often it was killed."""
    command = [sys.executable]
    if replicas > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(replicas)]
    flags = ["--model_parallel_size", "1", "--max_seq_len", "512", "--device", "cpu", "--dtype", "float32"]
    command += ["-m", "llama", "batch", str(source), str(target), str(CHAT), *flags]
    killed, environment = 0, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    while True:
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            while process.poll() is None and (not stops or count(target) < stops[0]):
                time.sleep(0.02)
            if process.poll() is not None:
                log.seek(0)
                assert process.returncode == 0, log.read().decode()
                return killed
            stops.pop(0)
            time.sleep(chance.uniform(0, 0.2))
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            victim = int(chance.choice([str(process.pid), *(children if replicas > 1 else [])]))
            os.kill(victim, signal.SIGKILL)
            process.wait()
            killed += 1


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read(path: Path) -> dict[Any, Any]:
    """The answer to each line; each must have exactly one."""
    answers = [json.loads(line) for line in path.read_bytes().splitlines()]
    ids = [answer.get("custom_id", answer["id"]) or ("line", answer["line"]) for answer in answers]
    assert not (twice := [id for id, times in Counter(ids).items() if times > 1]), twice
    return dict(zip(ids, answers, strict=True))


def soak(folder: Path, lines: int, kills: int) -> None:
    source = folder / "in.jsonl"
    chance = random.Random(0)
    source.write_text("".join(make_line(i, chance) + "\n" for i in range(lines)))
    found = []
    for replicas in (1, 2):
        target, began = folder / f"out{replicas}.jsonl", time.perf_counter()
        stops = sorted(chance.sample(range(1, lines * 9 // 10), kills))
        killed = run_killed(source, target, replicas, stops, chance)
        answers = read(target)
        assert len(answers) == lines, f"{len(answers)} answers to {lines} lines"
        failed = [a for a in answers.values() if a.get("error") or a.get("response", {}).get("status_code", 200) != 200]
        assert len(failed) == -(-lines // 50), f"{len(failed)} errors"
        seconds = time.perf_counter() - began
        print(f"{replicas} replica(s): {lines} lines once each, {len(failed)} errors, {killed} kills, {seconds:.0f} s")
        found.append({id: a.get("text") or a.get("message") for id, a in answers.items()})
    print(f"plain answers that differ by rounding: {sum(found[0][id] != found[1][id] for id in found[0])}")


def throughput(folder: Path, prompts: int, repeats: int, slots: int) -> None:
    chance = random.Random(1)
    tokenizer = Tokenizer(MODELS / "tokenizer.model")
    llama = Llama(random_model("110M", slots, 512, tokenizer.n_words), tokenizer)
    llama.engine.compile = True
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(4, 60))) for _ in range(prompts)]
    most = [min(128, 4 + int(chance.expovariate(1 / 28))) for _ in range(prompts)]
    rows = [{"prompt": t, "max_gen_len": n, "seed": i} for i, (t, n) in enumerate(zip(texts, most, strict=True))]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def continuous() -> None:
        llama.engine.forget()
        (target := folder / "texts.out").unlink(missing_ok=True)
        files = Files(source, target)
        with files.answers:
            answer_lines(llama, files, 1, "110M")

    def fixed() -> None:
        llama.engine.forget()
        for start in range(0, prompts, slots):
            part = slice(start, start + slots)
            llama.text_completion(texts[part], max_gen_len=most[part], seed=[*range(prompts)][part])

    seconds = alternate({"batch": continuous, "fixed batches": fixed}, repeats)
    for name, taken in seconds.items():
        print(f"{name}: {spread([sum(most) / t for t in taken])} tokens/s")
    print(f"batch is {ratio(seconds['fixed batches'], seconds['batch'])} times as fast as fixed batches")


def main(lines: int = 5000, kills: int = 10, prompts: int = 192, repeats: int = 3, slots: int = 8) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        if lines:
            soak(Path(folder), lines, kills)
        if prompts:
            throughput(Path(folder), prompts, repeats, slots)


if __name__ == "__main__":
    fire.Fire(main)
