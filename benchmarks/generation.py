"""What generation costs in addition to the model, and what prefix sharing and prompt lookup save.

    python benchmarks/generation.py [--threads 2] [--repeats 5] [--only sampler,prefix,lookup,chat,memory]
        [--dtype float32]

sampler  time of sampling as a fraction of a decode step, 1.1B shape, in bfloat16 or float32, whichever suits this CPU
prefix   prefill of 8 prompts that share 400 tokens, 110M shape, with and without sharing
lookup   prompt lookup compared with plain decoding, 110M shape, greedy, on a text that repeats and on one that does not
chat     time to first token in 20 turns of a chat, with the bundled model
memory   memory of the process after 50 and after 1,000 requests of random shapes, computed in `dtype`
"""

from __future__ import annotations

import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import fire
import torch

from llama import Chat, Llama, ModelArgs, engine, parallel
from llama.cli import measure as bench
from llama.engine import Engine
from llama.request import Request
from llama.sampling import Sampler, SamplingParams

CPU = torch.device("cpu")
MODELS = Path(__file__).parent.parent / "models"


def shaped(name: str, B: int, S: int, seed: int = 0, words: int = 32000) -> bench.Transformer:
    torch.manual_seed(seed)
    parallel.init_model_parallel()
    args = ModelArgs(**bench.SHAPES[name], vocab_size=words, max_batch_size=B, max_seq_len=S)
    return bench.loaded(bench.Source(bench.RandomWeights(CPU), args, CPU, torch.float32))


def summary(name: str, taken: list[float]) -> str:
    return f"{name} {statistics.median(taken) * 1e3:.2f} ms ({min(taken) * 1e3:.2f} - {max(taken) * 1e3:.2f})"


def sampler(repeats: int) -> None:
    kinds = {
        "top_p 0.9": SamplingParams(0.6, 0.9),
        "top_k 50": SamplingParams(0.8, top_k=50),
        "no cut": SamplingParams(1.0),
        "all": SamplingParams(0.8, 0.95, 100, 0.01, 1.1, 0.1, 0.1, {5: 1.0}),
    }
    for shape, words, B in (("1.1B", 32000, 1), ("1.1B", 32000, 8), ("110M", 128256, 1), ("110M", 128256, 8)):
        model = shaped(shape, B, 64, words=words)
        prompts = torch.randint(3, words, (B, 16)).tolist()
        steps = []
        for _ in (run := Engine.of(model).run([Request(prompt, 16 + 3 * repeats) for prompt in prompts])):
            began = time.perf_counter()
            next(run, None)
            steps.append(time.perf_counter() - began)
        step = statistics.median(steps[1:-1])
        print(f"sampler, {shape}, {words} words, batch {B}: {summary('a decode step takes', steps[1:-1])}")
        for peak in (0.0, 8.0):  # as flat as random weights make it, and as peaked as trained ones do
            logits = torch.randn(B, words) + peak * (torch.rand(B, words) < 0.001)
            for name, settings in kinds.items():
                choose, slots = Sampler(B, words, CPU), range(B)
                for slot, prompt in enumerate(prompts):
                    choose.admit(slot, settings, prompt)
                taken = bench.times(lambda: choose.count(choose(logits, slots, [0] * B), slots), CPU, 5 * repeats)  # noqa: B023
                share = statistics.median(taken) / step
                print(f"  {'peaked' if peak else 'flat'}, {summary(name, taken)}: {share:.1%} of the step")


def prefix(repeats: int) -> None:
    model = shaped("110M", 8, 512)
    shared = torch.randint(3, 32000, (400,)).tolist()
    prompts = [[*shared, *torch.randint(3, 32000, (16,)).tolist()] for _ in range(8)]
    taken: dict[str, list[float]] = {"shared": [], "apart": []}
    computing = Engine.of(model)

    def prefill() -> None:
        computing.forget()
        for _ in computing.run([Request(prompt, len(prompt) + 1) for prompt in prompts]):
            pass

    for _ in range(repeats + 1):
        for name, least in (("shared", 32), ("apart", 10**9)):
            with mock.patch.object(engine, "WORTH_SHARING", least):
                taken[name] += bench.times(prefill, CPU, 1)
    ratio = statistics.median(b / a for a, b in zip(taken["shared"][1:], taken["apart"][1:], strict=True))
    print(f"prefix: {'; '.join(summary(name, runs[1:]) for name, runs in taken.items())}; ratio {ratio:.2f}")


def lookup(repeats: int) -> None:
    """Make the next token depend only on the last one, in short cycles, so that the text repeats, or in long ones."""
    model = shaped("110M", 1, 640)
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
        ratios, rates, same = [], [], True
        for _ in range(repeats):
            (plain, text), (fast, fast_text) = run(0, prompt), run(7, prompt)
            ratios.append(fast / plain)
            rates.append((plain, fast))
            same = same and text == fast_text
        plain, fast = (statistics.median(rate) for rate in zip(*rates, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"lookup, a text {name}: {plain:.1f} tokens/s, with {fast:.1f}; ratio {ratio}; same tokens: {same}")


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
    ratio = statistics.median(b / a for a, b in zip(first[1], first[19], strict=True))
    print(f"chat, first token: {summary('turn 2', first[1])}; {summary('turn 20', first[19])}; ratio {ratio:.2f}")


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
    for part in (sampler, prefix, lookup, chat):
        if not chosen or part.__name__ in chosen:
            part(repeats)
    if not chosen or "memory" in chosen:
        memory(dtype=dtype)


if __name__ == "__main__":
    fire.Fire(main)
