"""Tokens per second of this library and others, as a fraction of the machine's limits.

MBU, model bandwidth utilization, is for decoding: a step reads every weight and the KV cache; bytes / seconds /
bandwidth. MFU, model FLOPs utilization, is for prefill: each token is multiplied by every weight that it needs;
operations / seconds / the rate of a large matmul. Both limits are measured again for each case, because other processes
use the machine too. The fraction of the limit that was measured at the start is printed next to it.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parallel
from ..args import ModelArgs
from ..backends.quantized import Quantization, Quantized, Scheme
from ..checkpoint import Weights, load, read_parts, shard_dim, slice_shape
from ..devices import dtype_name
from ..engine import Engine
from ..layers import ColumnParallelLinear, RowParallelLinear
from ..model import Transformer
from ..request import Request
from .script import say

SHAPES: dict[str, dict[str, Any]] = {
    "110M": {"dim": 768, "n_layers": 12, "n_heads": 12},
    "1.1B": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4},
    "7B": {},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "70B": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    },
}
# A library: prompts (B, T) and a number of new tokens -> an iterator that yields when each row has one more token.
Run = Callable[[Tensor, int], Iterator[object]]


class Case(NamedTuple):
    """`batch` prompts of `prompt` tokens. With one new token, prefill is measured; with more, the steps after it."""

    batch: int
    prompt: int
    tokens: int

    @property
    def is_prefill(self) -> bool:
        return self.tokens == 1

    def __str__(self) -> str:
        return f"prefill {self.prompt}" if self.is_prefill else f"decode, batch {self.batch}"


class RandomWeights:
    """Random weights in place of a checkpoint, generated on the device and the same each time."""

    def __init__(self, device: torch.device, scheme: Scheme | None = None) -> None:
        self.device, self.scheme = device, scheme

    def quantized(self, name: str, shape: tuple[int, ...], begin: int, end: int) -> Quantized | None:
        own = self.scheme.of(name) if self.scheme else None
        part = tuple(slice_shape(name, shape, begin, end))  # whose groups need not be those of the whole matrix
        return read_parts(self, name, part, 0, part[shard_dim(name) or 0], own) if own else None

    def dtype(self) -> torch.dtype:
        return torch.float32

    def release(self) -> None:
        pass

    def read(
        self, name: str, shape: Sequence[int], begin: int, end: int, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(slice_shape(name, shape, begin, end), dtype=dtype, device=self.device)
        generator = torch.Generator(out.device).manual_seed(zlib.crc32(f"{name} {begin}".encode()))
        if not name.endswith(".weight") or "norm" in name:
            step = 0.02 / (4.6 if self.scheme and self.scheme.bits == 4 else 74)  # of matrices of deviation 0.02
            values = {"scale": 0.02 / 74, "scales": step, "mins": -7.5 * step, "weight": 1}
            return out.fill_(values[name.split(".")[-1]])
        if not dtype.is_floating_point:
            low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
            return out.random_(low, high, generator=generator)
        return nn.init.normal_(out, std=0.02, generator=generator)


class Source(NamedTuple):
    """What a model is loaded from, with which dtype and quantization."""

    weights: Weights
    args: ModelArgs
    device: torch.device
    dtype: torch.dtype
    scheme: Quantization = None


def loaded(source: Source, compile: bool = False) -> Transformer:
    with torch.device("meta"):
        model = Transformer(source.args)
    load(model, *source, compile)
    model.allocate_cache()
    return model.eval().requires_grad_(False)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def times(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of several runs after a warm-up."""
    taken = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return taken[1:]


# A limit: number of repeats -> what the machine can do in a second, by the fastest run.
Limit = Callable[[int], float]
USE = {"bandwidth": "MBU", "matrix_rate": "MFU"}  # the limits, and the name of the fraction of each


def bandwidth(device: torch.device) -> Limit:
    """Memory bandwidth of this rank: the bytes read by a sum over a float32 tensor far larger than any cache."""
    values = torch.ones(2**28 if device.type == "cpu" else 2**30, device=device)
    return lambda repeats: values.nbytes / min(times(values.sum, device, repeats))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> Limit:
    """Rate of a matmul of two square matrices, two operations per multiply-add, with the faster of PyTorch's two ways.
    The size doubles until a matmul takes 20 ms, so it stays small on a CPU without instructions for the dtype."""
    size, largest = 256, 2048 if device.type == "cpu" else 8192
    multiply = square_matmul(size, device, dtype)
    while size < largest and min(times(multiply, device, 1)) < 0.02:
        size *= 2
        multiply = square_matmul(size, device, dtype)
    return lambda repeats: 2 * size**3 / min(times(multiply, device, repeats))


def square_matmul(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    ways: list[Callable[[], Tensor]] = [lambda: a @ b, lambda: F.linear(a, b)]
    return min(ways, key=lambda way: times(way, device, 1))


def clock(run: Run, case: Case, vocab_size: int, device: torch.device) -> float:
    """Seconds of the prefill including the first token, or the median of the steps after it."""
    ids = torch.randint(3, vocab_size, (case.batch, case.prompt), generator=torch.Generator().manual_seed(0))
    steps, began = [], time.perf_counter()
    for _ in run(ids, case.tokens):
        synchronize(device)
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
    return steps[0] if case.is_prefill else median(steps[1:])


def work(model: Transformer, case: Case) -> tuple[float, float]:
    """The minimum (bytes, operations) of this rank in a case, for one step or for the prefill. Of a prompt's tokens but
    the last, the last layer needs only keys and values."""
    linear = (ColumnParallelLinear, RowParallelLinear)
    matrices = [module.weight for module in model.modules() if isinstance(module, linear)]
    size = sum(math.prod(weight.shape) for weight in matrices)
    layer: Any = model.layers[-1]
    attention, ffn = layer.attention, layer.feed_forward
    last = [model.output, attention.wq, attention.wo, ffn.w1, ffn.w2, ffn.w3]
    once = sum(math.prod(module.weight.shape) for module in last)  # only for the last token
    p, ranks = model.params, parallel.world_size()
    width = max(p.kv_heads // ranks, 1) * p.head_dim
    if case.is_prefill:
        rows, queries, seen = 1, case.prompt, case.prompt / 2  # causal: half of the positions, on average
    else:
        rows, queries, seen = case.batch, 1, case.prompt + case.tokens / 2  # in the middle of decoding
    pairs = (p.n_layers - 1) * queries * seen + (case.prompt if case.is_prefill else seen)
    cache = 2 * p.n_layers * rows * seen * width * model.norm.weight.itemsize
    nbytes = sum(weight.nbytes for weight in matrices) + cache
    return nbytes, rows * (2 * (queries * (size - once) + once) + 4 * pairs * p.dim / ranks)


def ours(model: Transformer, compile: bool = False) -> Run:
    engine = Engine.of(model, compile)

    def run(ids: Tensor, tokens: int) -> Iterator[list[int]]:
        engine.forget()  # otherwise what the last run left would be a prefix
        for step in engine.run([Request(prompt, len(prompt) + tokens) for prompt in ids.tolist()]):
            yield [id for out in step for id in out.tokens]

    return run


def bench(
    source: Source, compile: bool, cases: list[Case], repeats: int, name: str, peers: Mapping[str, Run] | None = None
) -> None:
    """Load a model and measure every case `repeats` times, alternating between this library and each peer. Print a
    table, and as the last line JSON with the measurements."""
    device = source.device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    began = time.perf_counter()
    model = loaded(source, compile)
    synchronize(device)
    facts: dict[str, Any] = {
        "model": name,
        "dtype": dtype_name(source.dtype),
        "quantize": source.scheme and str(source.scheme),
        "compile": compile,
        "load_s": time.perf_counter() - began,
        "device": f"{device.type} ({chip})",
        "ranks": parallel.world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    runs = {"llama": ours(model, compile), **(peers or {})}
    limits = {"bandwidth": bandwidth(device), "matrix_rate": matrix_rate(device, source.dtype)}
    facts |= {**{name: limit(5) for name, limit in limits.items()}, "cases": {}}
    say(f"{name} in {facts['quantize'] or facts['dtype']} on {facts['device']}, "
        f"{facts['ranks']} rank(s) of {facts['threads']} thread(s), torch {facts['torch']}")  # fmt: skip
    say(f"It reads {facts['bandwidth'] / 1e9:,.1f} GB/s and multiplies {facts['matrix_rate'] / 1e9:,.0f} GFLOP/s; "
        f"tokens/s: median (min - max) of {repeats}")  # fmt: skip
    for case in cases:
        facts["cases"][str(case)] = measure_case(model, case, repeats, runs, limits, facts)
    facts["peak_bytes"] = peak(device)
    if cases[0].is_prefill:
        rates = facts["cases"][str(cases[0])]["tokens_per_second"]["llama"]
        facts["first_token_s"] = cases[0].prompt / median(rates)
        say(f"{'first token':>17}: {facts['first_token_s']:.3f} s after {cases[0].prompt} tokens")
    say(f"{'load':>17}: {facts['load_s']:.2f} s; peak memory {facts['peak_bytes'] / 1e9:.2f} GB")
    say(json.dumps(facts))


def measure_case(
    model: Transformer, case: Case, repeats: int, runs: dict[str, Run], limits: dict[str, Limit], facts: dict[str, Any]
) -> dict[str, Any]:
    """Measure one case and print its line: rates of each library, this library's MBU and MFU, and ratios to the
    peers."""
    device = model.norm.weight.device
    for run in runs.values():
        clock(run, case, model.vocab_size, device)  # warm-up
    rounds: list[dict[str, float]] = []  # the limits, and the seconds of each library
    for _ in range(repeats):
        found = {name: limit(3) for name, limit in limits.items()}
        found |= {name: clock(run, case, model.vocab_size, device) for name, run in runs.items()}
        rounds.append(found)
    count = case.batch * (case.prompt if case.is_prefill else 1)
    rates = {name: sorted(count / found[name] for found in rounds) for name in runs}
    needed = dict(zip(limits, work(model, case), strict=True))
    used: dict[str, Any] = {
        USE[name]: median(needed[name] / found["llama"] / found[name] for found in rounds) for name in limits
    }
    limiting = "matrix_rate" if case.is_prefill else "bandwidth"
    use = USE[limiting]
    of_first = needed[limiting] / median(found["llama"] for found in rounds) / facts[limiting]
    ratios = {name: median(found[name] / found["llama"] for found in rounds) for name in runs if name != "llama"}
    cells = [f"{name} {median(rate):,.1f} ({rate[0]:,.1f} - {rate[-1]:,.1f})" for name, rate in rates.items()]
    cells += [f"{ratio:.2f} x {name}" for name, ratio in ratios.items()]
    say(f"{case!s:>17}: {use} {used[use]:.2f} ({of_first:.2f} of the first limit); {'; '.join(cells)}")
    return {"tokens_per_second": rates, **used, f"{use}_of_first_limit": of_first, "ratios": ratios}


def peak(device: torch.device) -> int:
    """Peak memory so far in bytes, of a GPU or of the whole process; 0 where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
