"""What generation costs in addition to the model, and what prefix sharing and prompt lookup save.

    python benchmarks/generation.py [--threads 2] [--repeats 5] [--only sampler,prefix,lookup,chat,memory,ragged]
        [--dtype float32]

sampler  time of sampling as a fraction of a decode step, 1.1B shape, in bfloat16 or float32, whichever suits this CPU
prefix   prefill of 8 prompts that share 400 tokens, 110M shape, with and without sharing
lookup   prompt lookup compared with plain decoding, 110M shape, greedy, on a text that repeats and on one that does not
chat     time to first token in 20 turns of a chat, with the bundled model
memory   memory of the process after 50 and after 1,000 requests of random shapes, computed in `dtype`
ragged   greedy generation of 32 tokens for prompts of 16, 64, 128 and 256 tokens, compared with transformers and
         llama.cpp on the same weights, 110M shape in float32; needs the extra `bench`
"""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import fire
import torch
from common import CPU, MODELS, alternate, milliseconds, random_model, ratio, spread

from llama import Chat, Llama, engine
from llama.cli import measure
from llama.engine import Engine
from llama.request import Request
from llama.sampling import Sampler, SamplingParams


def sampler(repeats: int) -> None:
    kinds = {
        "top_p 0.9": SamplingParams(0.6, 0.9),
        "top_k 50": SamplingParams(0.8, top_k=50),
        "no cut": SamplingParams(1.0),
        "all": SamplingParams(0.8, 0.95, 100, 0.01, 1.1, 0.1, 0.1, {5: 1.0}),
    }
    for shape, words, B in (("1.1B", 32000, 1), ("1.1B", 32000, 8), ("110M", 128256, 1), ("110M", 128256, 8)):
        model = random_model(shape, B, 64, words)
        prompts = torch.randint(3, words, (B, 16)).tolist()
        steps = []
        for _ in (run := Engine.of(model).run([Request(prompt, 16 + 3 * repeats) for prompt in prompts])):
            began = time.perf_counter()
            next(run, None)
            steps.append(time.perf_counter() - began)
        step = statistics.median(steps[1:-1])
        print(f"sampler, {shape}, {words} words, batch {B}: a decode step takes {milliseconds(steps[1:-1])}")
        for peak in (0.0, 8.0):  # as flat as random weights make it, and as peaked as trained ones do
            logits = torch.randn(B, words) + peak * (torch.rand(B, words) < 0.001)
            for name, settings in kinds.items():
                choose, slots = Sampler(B, words, CPU), range(B)
                for slot, prompt in enumerate(prompts):
                    choose.admit(slot, settings, prompt)
                taken = measure.times(lambda: choose.count(choose(logits, slots, [0] * B), slots), CPU, 5 * repeats)  # noqa: B023
                share = statistics.median(taken) / step
                print(f"  {'peaked' if peak else 'flat'}, {name} {milliseconds(taken)}: {share:.1%} of the step")


def prefix(repeats: int) -> None:
    model = random_model("110M", 8, 512)
    shared = torch.randint(3, 32000, (400,)).tolist()
    prompts = [[*shared, *torch.randint(3, 32000, (16,)).tolist()] for _ in range(8)]
    computing = Engine.of(model)

    def prefill(least: int) -> None:
        computing.forget()
        with mock.patch.object(engine, "WORTH_SHARING", least):
            for _ in computing.run([Request(prompt, len(prompt) + 1) for prompt in prompts]):
                pass

    taken = alternate({"shared": partial(prefill, 32), "apart": partial(prefill, 10**9)}, repeats)
    runs = "; ".join(f"{name} {milliseconds(times)}" for name, times in taken.items())
    print(f"prefix: {runs}; ratio {ratio(taken['apart'], taken['shared'])}")


def lookup(repeats: int) -> None:
    """Make the next token depend only on the last one, in short cycles, so that the text repeats, or in long ones."""
    model = random_model("110M", 1, 640)
    layers: Any = model.layers
    for layer in layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()

    def run(most: int, start: list[int]) -> tuple[float, list[int]]:
        request = Request(start, len(start) + 200, lookup=most)
        taken, count = [], 0
        began = time.perf_counter()
        for [out] in Engine.of(model).run([request]):
            taken.append(time.perf_counter() - began)
            count += len(out.tokens)
            began = time.perf_counter()
        return (count - len(taken[:1])) / sum(taken[1:]), request.ids

    for name, circle in (("that does not repeat", 2000), ("that repeats", 50)):
        model.output.weight.zero_()
        model.output.weight[[*range(4, 3 + circle), 3]] = model.tok_embeddings.weight[3 : 3 + circle]
        prompt = [3 + i % circle for i in range(200)]
        pairs = [(run(0, prompt), run(7, prompt)) for _ in range(repeats)]
        plain, fast = ([rate for rate, _ in runs] for runs in zip(*pairs, strict=True))
        same = all(text == fast_text for (_, text), (_, fast_text) in pairs)
        print(f"lookup, a text {name}: {spread(plain)} tokens/s, with {spread(fast)}; ratio {ratio(fast, plain)}; "
              f"same tokens: {same}")  # fmt: skip


def chat(repeats: int) -> None:
    llama = Llama.build(MODELS / "small-chat", max_seq_len=2048, max_batch_size=1, device="cpu")
    first: list[list[float]] = [[] for _ in range(20)]
    for _ in range(repeats):
        talk = Chat(llama, temperature=0, max_gen_len=30)
        for taken in first:
            began = time.perf_counter()
            stream = talk.stream("Tell me a story about Tom.")
            taken.append(time.perf_counter() - began)
            for _event in stream:
                pass
    turns = f"turn 2 {milliseconds(first[1])}; turn 20 {milliseconds(first[19])}"
    print(f"chat, first token: {turns}; ratio {ratio(first[19], first[1])}")


def ragged(repeats: int, new: int = 32) -> None:
    from peers import llama_cpp_decoder, transformers_model

    model = random_model("110M", 4, 512)
    source = measure.Source(measure.RandomWeights(CPU), model.params, CPU, torch.float32)
    computing, theirs, decode = Engine.of(model, True), transformers_model(source), llama_cpp_decoder(source)
    prompts = [torch.randint(3, 32000, (length,)).tolist() for length in (16, 64, 128, 256)]

    def ours() -> list[list[int]]:
        computing.forget()
        requests = [Request(prompt, len(prompt) + new) for prompt in prompts]
        for _ in computing.run(requests):
            pass
        return [request.ids[len(request.prompt) :] for request in requests]

    def transformers() -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            return theirs.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()

    def llama_cpp() -> list[list[int]]:
        rows = [decode({row: (0, prompt)}) for row, prompt in enumerate(prompts)]
        for step in range(new - 1):
            last = {row: (len(prompts[row]) + step, ids[-1:]) for row, ids in enumerate(rows)}
            for ids, id in zip(rows, decode(last), strict=True):
                ids.append(id)
        return rows

    taken = alternate({run.__name__: run for run in (ours, transformers, llama_cpp)}, repeats)
    same = sum(a == b for a, b in zip(ours(), transformers(), strict=True))
    print(f"ragged: {same} of {len(prompts)} rows equal those of transformers")
    own = taken.pop("ours")
    print(f"  ours {spread(own)} s")
    for name, times in taken.items():
        print(f"  {name} {spread(times)} s; ours takes {ratio(own, times)} of it")


def memory(requests: int = 1000, dtype: str | None = None) -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    llama = Llama.build(MODELS / "small-chat", max_seq_len=256, max_batch_size=4, device="cpu", dtype=dtype)
    chance, words = random.Random(0), llama.tokenizer.encode("the cat sat on a red mat", False, False)
    after = {}
    for i in range(1, requests + 1):
        prompts = [[1, *chance.choices(words, k=chance.randint(1, 150))] for _ in range(chance.randint(1, 4))]
        options: dict[str, Any] = {"prompt_lookup": chance.choice((0, 0, 7)), "stop": "Tom"}
        options |= {"logprobs": chance.random() < 0.3, "echo": chance.random() < 0.3, "temperature": chance.random()}
        stream = llama.generate_stream(prompts, chance.randint(1, 30), **options)
        for count, _event in enumerate(stream):
            if count > 40:
                stream.close()
        if i in (50, requests):
            after[i] = resident()
    print(f"memory: after 50 requests {after[50]:.1f} MB, after {requests} {after[requests]:.1f} MB")


def main(threads: int = 2, repeats: int = 5, only: str | tuple[str, ...] = (), dtype: str | None = None) -> None:
    torch.set_num_threads(threads)
    chosen = only.split(",") if isinstance(only, str) else only
    print(f"torch {torch.__version__}, {threads} threads; medians of {repeats} (min - max)")
    torch.manual_seed(0)
    parts: dict[str, Callable[[], None]] = {p.__name__: partial(p, repeats) for p in (sampler, prefix, lookup, chat)}
    parts |= {"memory": partial(memory, dtype=dtype), "ragged": partial(ragged, repeats)}
    for name in chosen or parts:
        parts[name]()


if __name__ == "__main__":
    fire.Fire(main)
