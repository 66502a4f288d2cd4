"""Performance on one GPU: decoding, prefill, sampling and memory, with random weights; nothing is downloaded.

    python benchmarks/gpu.py [--groups "a b+c ..."] [--out FILE] [--budget 420] --tokenizer_path TOKENIZER

Each group of stages runs in its own process with a time limit; each stage writes one line of JSON. TOKENIZER sets the
vocabulary size: Llama 2's has 32,000 pieces; models/tokenizer.model has fewer, and so gives a smaller output matrix.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import fire
import torch
import torch.nn.functional as F
from peers import transformers_model

from llama import Llama, ModelArgs, Tokenizer, parallel
from llama.backends.quantized import scheme
from llama.checkpoint import footprint
from llama.cli import measure
from llama.cli.measure import SHAPES, RandomWeights, Source, loaded, synchronize, times

Facts = dict[str, Any]
DEVICE = torch.device("cuda")


def build(
    shape: str = "7B", quantize: str | None = None, batch: int = 1, length: int = 1024, tokenizer: str = "", **more: Any
) -> Llama:
    parallel.init_model_parallel()
    words = Tokenizer(tokenizer)
    args = ModelArgs(**{**SHAPES[shape], **more}, vocab_size=words.n_words, max_seq_len=length, max_batch_size=batch)
    rounding = scheme(quantize, device=DEVICE)
    words.eos_ids = set()  # random weights may choose them
    model = loaded(Source(RandomWeights(DEVICE, rounding), args, DEVICE, torch.bfloat16, rounding))
    synchronize(DEVICE)
    return Llama(model, words)


def seconds(work: Callable[[], object], repeats: int = 2) -> float:
    return statistics.median(times(work, DEVICE, repeats))


def profiled(work: Callable[[], object]) -> list[Any]:
    """The profiler's rows for what runs on the device, the longest first."""
    activity = getattr(torch.profiler.ProfilerActivity, DEVICE.type.upper())
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
    return sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


_seeds = itertools.count(10_000)


def fresh(length: int) -> list[int]:
    """A prompt that shares no prefix with any slot."""
    return prompt(length, next(_seeds))


def step_seconds(
    llama: Llama, batch: int, context: int, tokens: int = 64, temperature: float = 0, **options: Any
) -> float:
    """Seconds per step of `generate`, from the time difference between two answer lengths."""
    prompts = [prompt(context - tokens // 2, seed) for seed in range(batch)]
    long, short = (seconds(partial(llama.generate, prompts, n, temperature, **options)) for n in (tokens + 8, 8))
    return (long - short) / tokens


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def limits(tokenizer: str) -> Facts:
    a = torch.empty(2**32, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return {
        "copy TB/s": 2 * len(a) / min(times(lambda: b.copy_(a), DEVICE, 5)) / 1e12,
        "read TB/s": measure.bandwidth(DEVICE)(5) / 1e12,
        "TFLOP/s": measure.matrix_rate(DEVICE, torch.bfloat16)(5) / 1e12,
    }


def decode(tokenizer: str) -> Facts:
    """Batch 1 through text_completion, short context."""
    began = time.perf_counter()
    llama = build(tokenizer=tokenizer)
    load = time.perf_counter() - began
    text = llama.tokenizer.decode(prompt(100))

    def answers(n: int) -> float:
        return seconds(lambda: llama.text_completion([text], temperature=0, max_gen_len=n))

    short, long = answers(8), answers(264)
    facts: Facts = {"tokens/s": 256 / (long - short), "with prefill": 264 / long, "load s": load}
    rows = profiled(lambda: llama.text_completion([text], temperature=0, max_gen_len=5))[:12]
    facts["kernels"] = [
        (row.key[:60], row.count, round(row.self_device_time_total / max(1, row.count), 1)) for row in rows
    ]
    return facts


def contexts(tokenizer: str) -> Facts:
    """Batch 1 at 4,096 positions, batch 8 at 512, prefill of 2,048, sampling."""
    llama = build(length=4224, batch=8, tokenizer=tokenizer)
    facts: Facts = {"4096": 1 / step_seconds(llama, 1, 4096)}
    facts["batch 8"] = 8 / step_seconds(llama, 8, 512)
    facts["top_p costs"] = step_seconds(llama, 1, 256, temperature=0.8, top_p=0.9) / step_seconds(llama, 1, 256) - 1
    facts["prefill 2048 ms"] = 1e3 * seconds(lambda: llama.generate([fresh(2048)], 1, 0), 7)
    return facts


def batches(tokenizer: str) -> Facts:
    llama = build(length=640, batch=64, tokenizer=tokenizer)
    return {"batch 64": 64 / step_seconds(llama, 64, 512, 64), "batch 16": 16 / step_seconds(llama, 16, 512, 64)}


def serving(tokenizer: str) -> Facts:
    """Continuous batching: 256 requests of 128 to 1,024 tokens, answers of 64 to 256, in 64 slots."""
    llama = build(length=1280, batch=64, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompts = [prompt(int(n), i) for i, n in enumerate(torch.randint(128, 1025, (256,), generator=generator))]
    answers = torch.randint(64, 257, (256,), generator=generator).tolist()
    llama.generate([fresh(len(p)) for p in prompts[:64]], [9 - i % 2 for i in range(64)], 0)
    for size in range(8, 65, 8):  # graphs of every size
        llama.generate([[5, i] for i in range(size)], 4, 0)
    synchronize(DEVICE)
    began = time.perf_counter()
    llama.generate(prompts, answers, 0)
    taken = time.perf_counter() - began
    # The least: prompts at the rate of matrices, then a step for every 64 tokens that reads the weights once, and the
    # cache of each of its tokens.
    weights, cache = 13.2e9, 2 * 32 * 4096 * 2
    read = sum(n * (len(p) + n / 2) for p, n in zip(prompts, answers, strict=True)) * cache
    least = sum(map(len, prompts)) * weights / 787e12 + (sum(answers) / 64 * weights + read) / 3.0e12
    return {"tokens/s": sum(answers) / taken, "seconds": taken, "roofline s": least, "of the roofline": least / taken}


def quantized(tokenizer: str, quantize: str) -> Facts:
    llama = build(length=2176, batch=16, tokenizer=tokenizer, quantize=quantize)
    facts: Facts = {f"batch {n}": n / step_seconds(llama, n, 256) for n in (1, 8, 16)}
    facts["prefill 2048 ms"] = 1e3 * seconds(lambda: llama.generate([fresh(2048)], 1, 0), 5)
    return facts


def large(tokenizer: str, quantize: str) -> Facts:
    began = time.perf_counter()
    llama = build("70B", quantize, length=512, tokenizer=tokenizer)
    load = time.perf_counter() - began
    return {"batch 1": 1 / step_seconds(llama, 1, 256, 32), "load s": load}


def memory(tokenizer: str) -> Facts:
    """Peak memory of the device, and what `inspect` predicts."""
    llama = build(length=2048, batch=4, tokenizer=tokenizer)
    params = llama.model.params
    llama.generate([prompt(2040, seed) for seed in range(4)], 8, 0)
    needed = footprint(params, 1, torch.bfloat16)
    peak = torch.cuda.max_memory_allocated()
    return {"peak GB": peak / 1e9, "inspect GB": sum(needed) / 1e9, "ratio": peak / sum(needed), "parts": str(needed),
            "reserved GB": torch.cuda.max_memory_reserved() / 1e9}  # fmt: skip


def gpt_fast(llama: Llama) -> Callable[[int], object]:
    """A step compiled as in gpt-fast: one function for all layers, a static cache, and a mask over the whole cache."""
    model, p = llama.model, llama.model.params
    D, K, H, S = p.head_dim, p.kv_heads, p.n_heads, p.max_seq_len
    layers: Any = model.layers
    caches = [torch.zeros(2, 1, K, S, D, device=DEVICE, dtype=torch.bfloat16) for _ in layers]
    qkv = [torch.cat([a.wq.weight, a.wk.weight, a.wv.weight]) for a in (layer.attention for layer in layers)]
    angles = torch.arange(S, device=DEVICE)[:, None] / p.rope_theta ** (torch.arange(0, D, 2, device=DEVICE) / D)
    cos_sin, causal = torch.stack((angles.cos(), angles.sin()), -1), torch.ones(S, S, device=DEVICE).tril().bool()

    def rope(x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), cos_sin[pos].unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)

    def step(token: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        x = F.embedding(token, model.tok_embeddings.weight)  # (1, dim)
        for layer, cache, weight in zip(layers, caches, qkv, strict=True):
            h = F.rms_norm(x, (p.dim,), layer.attention_norm.weight, p.norm_eps)
            q, k, v = F.linear(h, weight).view(H + 2 * K, D).split((H, K, K))
            cache[0, 0, :, pos] = rope(k, pos)[:, None]
            cache[1, 0, :, pos] = v[:, None]
            y = F.scaled_dot_product_attention(rope(q, pos)[None, :, None], cache[0], cache[1], causal[pos][None, None])
            x = x + F.linear(y.view(1, -1), layer.attention.wo.weight)
            h, w = F.rms_norm(x, (p.dim,), layer.ffn_norm.weight, p.norm_eps), layer.feed_forward
            x = x + F.linear(F.silu(F.linear(h, w.w1.weight)) * F.linear(h, w.w3.weight), w.w2.weight)
        h = F.rms_norm(x, (p.dim,), model.norm.weight, p.norm_eps)
        return F.linear(h, model.output.weight).argmax(-1)

    torch._inductor.config.coordinate_descent_tuning = True
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def run(tokens: int) -> object:
        token, pos = torch.tensor([5], device=DEVICE), torch.tensor([200], device=DEVICE)
        for _ in range(tokens):
            token = compiled(token, pos).clone()
            pos += 1
        return token.item()

    return run


def peers(tokenizer: str) -> Facts:
    """Steps of other libraries and of ours on the same weights, with 2 layers, because 32 take minutes to compile."""
    llama = build(length=1024, tokenizer=tokenizer, n_layers=2)
    facts: Facts = {"ours": 1 / step_seconds(llama, 1, 256, 192)}
    run, began = gpt_fast(llama), time.perf_counter()
    run(4)
    facts["gpt-fast's way compiles s"] = time.perf_counter() - began
    short, long = (seconds(partial(run, n), 5) for n in (8, 200))
    facts["gpt-fast's way"] = 192 / (long - short)
    print(json.dumps(facts), file=sys.stderr, flush=True)
    theirs = transformers_model(Source(RandomWeights(DEVICE), llama.model.params, DEVICE, torch.bfloat16))
    ids = torch.tensor([prompt(160)], device=DEVICE)

    def generate(n: int) -> object:
        return theirs.generate(ids, do_sample=False, min_new_tokens=n, max_new_tokens=n, cache_implementation="static",
                               pad_token_id=0)  # fmt: skip

    began = time.perf_counter()
    generate(8)
    facts["transformers compiles s"] = time.perf_counter() - began
    short, long = (seconds(partial(generate, n), 3) for n in (8, 200))
    facts["transformers, static cache"] = 192 / (long - short)
    facts["ours again"] = 1 / step_seconds(llama, 1, 256, 192)
    facts["ratios"] = [facts["ours"] / facts[name] for name in ("gpt-fast's way", "transformers, static cache")]
    return facts


def prefill(tokenizer: str) -> Facts:
    """A profile of the prefill of 2,048 tokens, and prompts of new lengths."""
    llama = build(length=2176, tokenizer=tokenizer)
    work = lambda: llama.generate([fresh(2048)], 1, 0)  # noqa: E731
    facts: Facts = {"ms": 1e3 * seconds(work, 9)}
    rows = profiled(work)
    facts["kernels ms"] = [(row.key[:50], row.count, round(row.self_device_time_total / 1e3, 2)) for row in rows[:12]]
    facts["device ms"] = sum(row.self_device_time_total for row in rows) / 1e3
    ratios = []
    for length in (2047, 1900, 1777, 1601, 1234, 999, 801):
        taken = []
        for _ in range(4):
            synchronize(DEVICE)
            began = time.perf_counter()
            llama.generate([fresh(length)], 1, 0)
            taken.append(time.perf_counter() - began)
        ratios.append(round(taken[0] / statistics.median(taken[1:]), 2))
    facts["new length / repeated"] = ratios
    return facts


STAGES: dict[str, Callable[[str], Facts]] = {
    "limits": limits,
    "decode": decode,
    "contexts": contexts,
    "prefill": prefill,
    "batches": batches,
    "serving": serving,
    "int8": partial(quantized, quantize="int8"),
    "int4": partial(quantized, quantize="int4"),
    "70B-int4": partial(large, quantize="int4"),
    "70B-int8": partial(large, quantize="int8"),
    "memory": memory,
    "peers": peers,
}


def run(names: list[str], tokenizer: str) -> None:
    """Run some stages in this process."""
    for name in names:
        began = time.perf_counter()
        try:
            facts = STAGES[name](tokenizer)
        except Exception as error:
            facts = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps({"stage": name, **facts, "took s": round(time.perf_counter() - began, 1)}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()  # which does nothing where there is none


def main(
    groups: str = " ".join(STAGES),
    out: str = "gpu.jsonl",
    budget: float = 420,
    tokenizer_path: str = "",
    inside: bool = False,
) -> None:
    if inside:
        run(groups.split("+"), tokenizer_path)
        return
    began = time.perf_counter()
    for group in groups.split():
        left = budget - (time.perf_counter() - began)
        command = [sys.executable, __file__, "--groups", group, "--tokenizer_path", tokenizer_path, "--inside"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(5, min(left, 150)))
            lines, error = done.stdout, done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired as late:
            lines, error = (late.stdout or b"").decode(), f"{late} {(late.stderr or b'').decode()[-2000:]}"
        if error:
            lines += json.dumps({"stage": group, "error": error.strip().splitlines()[-15:]}) + "\n"
        with open(out, "a", encoding="utf-8") as file:
            file.write(lines)
        print(f"{time.perf_counter() - began:6.1f} s  {lines}", end="", flush=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    fire.Fire(main)
