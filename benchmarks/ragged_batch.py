"""Greedy generation for four prompts of 16, 64, 128 and 256 tokens, 32 new tokens each, compared with Hugging Face's
Llama and llama.cpp.

    python benchmarks/ragged_batch.py [--threads 2] [--repeats 5] [--nocompile]

110M shape (dim 768, 12 layers, 12 heads, FFN 2048, vocabulary 32000), the same random float32 weights, in alternation.
Needs the extras `test` and `bench`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
from peers import llama_cpp_decoder

from llama import ModelArgs, parallel
from llama.cli import measure
from llama.engine import Engine
from llama.request import Request

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from small import hugging_face  # type: ignore[import-not-found]

CPU = torch.device("cpu")
LENGTHS, NEW = (16, 64, 128, 256), 32


def main(threads: int = 2, repeats: int = 5, compile: bool = True) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parallel.init_model_parallel()
    args = ModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=32000, max_batch_size=4, max_seq_len=512)
    source = measure.Source(measure.RandomWeights(CPU), args, CPU, torch.float32)
    model = measure.loaded(source)
    engine = Engine.of(model, compile)
    theirs = hugging_face(args, model.state_dict())
    decode = llama_cpp_decoder(source)
    prompts = [torch.randint(3, 32000, (length,)).tolist() for length in LENGTHS]

    def ours() -> list[list[int]]:
        engine.forget()
        requests = [Request(prompt, len(prompt) + NEW) for prompt in prompts]
        for _ in engine.run(requests):
            pass
        return [request.ids[len(request.prompt) :] for request in requests]

    def hf() -> list[list[int]]:
        longest = max(LENGTHS)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in LENGTHS])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            return theirs.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()

    def llama_cpp() -> list[list[int]]:
        rows = [decode({row: (0, prompt)}) for row, prompt in enumerate(prompts)]
        for step in range(NEW - 1):
            last = {row: (len(prompts[row]) + step, new[-1:]) for row, new in enumerate(rows)}
            for new, id in zip(rows, decode(last), strict=True):
                new.append(id)
        return rows

    same = sum(a == b for a, b in zip(ours(), hf(), strict=True))
    times: dict[Callable[[], object], list[float]] = {ours: [], hf: [], llama_cpp: []}
    for _ in range(repeats):
        for run, seconds in times.items():
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    print(f"torch {torch.__version__}, {threads} threads, float32, {repeats} repeats; seconds: median (min - max)")
    for run, seconds in times.items():
        print(f"{run.__name__:>9}: {statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})")
    for run in (hf, llama_cpp):
        ratio = statistics.median(a / b for a, b in zip(times[ours], times[run], strict=True))
        print(f"ours / {run.__name__}, median of pairs: {ratio:.2f}")
    print(f"rows with tokens equal to hf's: {same} of {len(prompts)}")


if __name__ == "__main__":
    fire.Fire(main)
