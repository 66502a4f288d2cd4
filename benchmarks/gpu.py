"""All that is to be known of one GPU, in one run of less than 8 minutes; nothing is downloaded, the table comes last.

    python benchmarks/gpu.py [--budget 460]

Random weights of 7B and 70B: decoding, prefill and their share of what the GPU can do, in bfloat16, int8 and int4;
graphs beside plain steps. What does not fit into the GPU or the time is said to be left out.
"""

from __future__ import annotations

import gc
import io
import json
import time
from contextlib import redirect_stdout
from typing import Any
from unittest import mock

import fire
import torch

from llama import ModelArgs, backends, parallel
from llama.backends.quantized import Scheme, scheme
from llama.checkpoint import available, footprint
from llama.cli import measure as bench
from llama.cli.measure import SHAPES, Case, RandomWeights

CASES = {
    "7B": [Case(1, 2048, 1), Case(1, 128, 100), Case(8, 128, 50)],
    "7B, contexts of 512": [Case(64, 512, 50)],
    "70B": [Case(1, 128, 40)],
}
RUNS: list[tuple[str, str | None]] = [
    ("7B", None),
    ("7B, contexts of 512", None),
    ("7B", "int4"),
    ("7B", "int8"),
    ("70B", None),
    ("70B", "int4"),
    ("70B", "int8"),
]


def measure(name: str, rounding: Scheme | None, device: torch.device) -> dict[str, Any] | str:
    """What `bench` finds, or why it was not asked."""
    cases = CASES[name]
    room = {
        "max_seq_len": max(case.prompt + case.tokens for case in cases),
        "max_batch_size": max(case.batch for case in cases),
    }
    args = ModelArgs(**SHAPES[name.split(",")[0]], vocab_size=32000, **room)
    needed = footprint(args, 1, torch.bfloat16, rounding)
    if sum(needed) > available(device):
        return f"needs {needed}"
    began = time.perf_counter()
    model = bench.loaded(RandomWeights(device, rounding), args, device, torch.bfloat16, rounding)
    bench.synchronize(device)
    facts: dict[str, Any] = {"model": name, "dtype": "bfloat16", "quantize": rounding and str(rounding)}
    facts["load_s"] = time.perf_counter() - began
    out = io.StringIO()
    with redirect_stdout(out):
        bench.bench(model, cases, 3, {}, facts)
    found: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    if name == "7B" and rounding is None:
        with mock.patch.object(backends, "choose", lambda model, compile: backends.Plain(model)):
            model.direct_calls += 1  # so that a backend is chosen anew
            seconds = bench.clock(bench.ours(model), cases[1], 32000, device)
        found["plain_tokens_per_second"] = 1 / seconds
    return found


def main(budget: float = 460) -> None:
    began = time.perf_counter()
    parallel.init_model_parallel()
    device = parallel.choose_device("cuda")
    found: dict[str, dict[str, Any] | str] = {}
    for name, quantize in RUNS:
        title = f"{name} {quantize or 'bfloat16'}"
        left = budget - (time.perf_counter() - began)
        try:
            found[title] = measure(name, scheme(quantize), device) if left > 60 else "no time left"
        except Exception as error:  # one that fails must not take the rest with it
            found[title] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{time.perf_counter() - began:6.0f} s  {title}", flush=True)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; tokens/s, median (min - max) of 3")
    for title, facts in found.items():
        if isinstance(facts, str):
            print(f"{title}: left out: {facts}")
            continue
        print(f"{title}: {facts['bandwidth'] / 1e12:.2f} TB/s, {facts['matrix_rate'] / 1e12:.0f} TFLOP/s, "
              f"load {facts['load_s']:.1f} s, peak {facts['peak_bytes'] / 1e9:.1f} GB")  # fmt: skip
        for case, what in facts["cases"].items():
            rate = what["tokens_per_second"]["llama"]
            kind = "MFU" if "prefill" in case else "MBU"
            print(
                f"  {case:>18}: {rate[len(rate) // 2]:,.1f} ({rate[0]:,.1f} - {rate[-1]:,.1f}), {kind} {what[kind]:.2f}"
            )
        if "plain_tokens_per_second" in facts:
            print(f"  {'without graphs':>18}: {facts['plain_tokens_per_second']:,.1f}, batch 1")


if __name__ == "__main__":
    fire.Fire(main)
