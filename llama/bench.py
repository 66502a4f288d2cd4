"""python -m llama bench: how fast a model prefills and decodes here, as a fraction of what this machine can do, and
beside other libraries on the same weights.

The limits are measured in turn with what they limit, as others who use the machine change them. The share of the limit
that was measured once, at the start, is told beside it.
Decoding reads every weight once a step, and the cache: bytes over seconds over the bandwidth of reading memory is its
MBU, model bandwidth utilization. Prefill multiplies every weight by every token: operations over seconds over the rate
of a large matrix product is its MFU, model FLOPs utilization.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import parallel
from .backends.quantized import Scheme
from .checkpoint import Weights, load, shard_dim
from .engine import Engine
from .layers import ColumnParallelLinear, RowParallelLinear
from .model import ModelArgs, Transformer
from .request import Request

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
# A library at work: prompts (B, T) and a number of tokens -> an iterator that ends a step when it has B more tokens.
Run = Callable[[Tensor, int], Iterator[object]]


class Case(NamedTuple):
    """`batch` prompts of `prompt` tokens; with `tokens` above 1 the steps after the first are what is measured."""

    batch: int
    prompt: int
    tokens: int

    def __str__(self) -> str:
        return f"prefill {self.prompt}" if self.tokens == 1 else f"decode, batch {self.batch}"


class RandomWeights:
    """What `load` reads of a checkpoint that there is not: random numbers, made on the device; each time the same."""

    def __init__(self, device: torch.device, scheme: Scheme | None = None) -> None:
        self.device, self.scheme = device, scheme

    def dtype(self) -> torch.dtype:
        return torch.float32

    def release(self) -> None:
        pass

    def read(
        self,
        name: str,
        shape: Sequence[int],
        begin: int,
        end: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            part = [end - begin if i == shard_dim(name) else n for i, n in enumerate(shape)]
            out = torch.empty(part, dtype=dtype, device=self.device)
        generator = torch.Generator(out.device).manual_seed(zlib.crc32(f"{name} {begin}".encode()))
        if not name.endswith(".weight") or "norm" in name:
            kinds = {"scale": 0.02 / 74, "scales": 0.02 / 4.6, "zeros": 8, "weight": 1}  # of deviation 0.02 all in all
            return out.fill_(kinds[name.split(".")[-1]])
        if not dtype.is_floating_point:
            low, beyond = (-127, 128) if dtype == torch.int8 else (0, 256)
            return out.random_(low, beyond, generator=generator)
        return nn.init.normal_(out, std=0.02, generator=generator)


def loaded(
    weights: Weights,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    compile: bool = False,
) -> Transformer:
    with torch.device("meta"):
        model = Transformer(replace(args, max_batch_size=0))
    load(model, weights, args, device, dtype, scheme, compile)
    model.params = args
    model.allocate_cache()
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least time of several runs after a first: a limit is what the machine can do at its best."""
    taken = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


# A limit: measures, with so many repeats, what the machine can do in a second.
Limit = Callable[[int], float]
USE = {"bandwidth": "MBU", "matrix_rate": "MFU"}  # the limits, and what a share of each is called


def bandwidth(device: torch.device) -> Limit:
    """Bytes that this rank reads from memory: of a float32 tensor far larger than any cache, summed."""
    values = torch.ones(2**28 if device.type == "cpu" else 2**30, device=device)
    return lambda repeats: values.nbytes / seconds(values.sum, device, repeats)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> Limit:
    """Operations of a product of two square matrices, by PyTorch or by what is faster here: two for each multiplication
    with its addition."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda repeats: 2 * size**3 / seconds(lambda: a @ b, device, repeats)


def clock(run: Run, case: Case, vocab_size: int, device: torch.device) -> float:
    """Seconds of prefill and first token, or the median of the steps after it."""
    ids = torch.randint(3, vocab_size, (case.batch, case.prompt), generator=torch.Generator().manual_seed(0))
    taken, began = [], time.perf_counter()
    for _ in run(ids, case.tokens):
        synchronize(device)
        taken.append(time.perf_counter() - began)
        began = time.perf_counter()
    return taken[0] if case.tokens == 1 else statistics.median(taken[1:])


def work(model: Transformer, case: Case) -> tuple[float, float]:
    """(bytes, operations) that this rank's part of the model cannot do without in a case: one step, or the prefill."""
    linear = (ColumnParallelLinear, RowParallelLinear)
    matrices = [module.weight for module in model.modules() if isinstance(module, linear)]
    size = sum(math.prod(weight.shape) for weight in matrices)
    head = math.prod(model.output.weight.shape)
    p, ranks = model.params, parallel.world_size()
    width = max(p.kv_heads // ranks, 1) * p.head_dim
    queries, rows = (case.prompt, 1) if case.tokens == 1 else (1, case.batch)
    seen = case.prompt + case.tokens / 2  # positions attended to, in the middle of decoding
    if case.tokens == 1:
        seen = case.prompt / 2  # causal: on average
    attention = 4 * p.n_layers * rows * queries * seen * p.dim / ranks
    cache = 2 * p.n_layers * rows * seen * width * model.norm.weight.itemsize
    nbytes = sum(weight.nbytes for weight in matrices) + cache
    return nbytes, 2 * rows * (queries * (size - head) + head) + attention


# ---------------------------------------------------------------------------------------------------------------------
# Who is measured


def ours(model: Transformer, compile: bool = False) -> Run:
    engine = Engine.of(model, compile)

    def run(ids: Tensor, tokens: int) -> Iterator[list[int]]:
        engine.forget()  # or what the last run has left would be a prefix
        for step in engine.run([Request(prompt, len(prompt) + tokens) for prompt in ids.tolist()]):
            yield [id for out in step for id in out.tokens]

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The table


def bench(model: Transformer, cases: list[Case], repeats: int, peers: Mapping[str, Run], facts: dict[str, Any]) -> None:
    """Measure every case `repeats` times, ours and each peer in turn, and print a table, with JSON as the last line."""
    weight = model.norm.weight
    device, vocab_size = weight.device, model.vocab_size
    runs = {"llama": ours(model, bool(facts.get("compile"))), **peers}
    limits = {"bandwidth": bandwidth(device), "matrix_rate": matrix_rate(device, weight.dtype)}
    facts = {**facts, **machine(device), **{name: limit(5) for name, limit in limits.items()}, "cases": {}}
    print(f"{facts['model']} in {facts['quantize'] or facts['dtype']} on {facts['device']}, "
          f"{facts['ranks']} rank(s) of {facts['threads']} thread(s), torch {facts['torch']}")  # fmt: skip
    print(f"It reads {facts['bandwidth'] / 1e9:,.1f} GB/s and multiplies {facts['matrix_rate'] / 1e9:,.0f} GFLOP/s; "
          f"tokens/s: median (min - max) of {repeats}")  # fmt: skip
    for case in cases:
        for run in runs.values():
            clock(run, case, vocab_size, device)  # the first is slower
        taken: dict[str, list[float]] = {name: [] for name in runs}
        possible: dict[str, list[float]] = {name: [] for name in limits}
        for _ in range(repeats):
            for name, limit in limits.items():
                possible[name].append(limit(3))
            for name, run in runs.items():
                taken[name].append(clock(run, case, vocab_size, device))
        count = case.batch * (case.prompt if case.tokens == 1 else 1)
        rates = {name: sorted(count / t for t in times) for name, times in taken.items()}
        needed = dict(zip(limits, work(model, case), strict=True))
        shares = {
            name: statistics.median(
                needed[name] / t / most for t, most in zip(taken["llama"], possible[name], strict=True)
            )
            for name in limits
        }
        used: dict[str, Any] = {USE[name]: share for name, share in shares.items()}
        which = "matrix_rate" if case.tokens == 1 else "bandwidth"
        kind, of_first = USE[which], needed[which] / statistics.median(taken["llama"]) / facts[which]
        ratios = {
            peer: statistics.median(b / a for a, b in zip(taken["llama"], taken[peer], strict=True)) for peer in peers
        }
        told = [
            f"{name} {statistics.median(rate):,.1f} ({rate[0]:,.1f} - {rate[-1]:,.1f})" for name, rate in rates.items()
        ]
        told += [f"{ratio:.2f} x {peer}" for peer, ratio in ratios.items()]
        print(
            f"{case!s:>17}: {kind} {used[kind]:.2f} ({of_first:.2f} of the first limit); {'; '.join(told)}", flush=True
        )
        used[f"{kind}_of_first_limit"] = of_first
        facts["cases"][str(case)] = {"tokens_per_second": rates, **used, "ratios": ratios}
    facts["peak_bytes"] = peak(device)
    first = facts["cases"].get(str(cases[0]), {}).get("tokens_per_second", {}).get("llama")
    if first and cases[0].tokens == 1:
        facts["first_token_s"] = cases[0].prompt / statistics.median(first)
        print(f"{'first token':>17}: {facts['first_token_s']:.3f} s after {cases[0].prompt} tokens")
    print(f"{'load':>17}: {facts['load_s']:.2f} s; peak memory {facts['peak_bytes'] / 1e9:.2f} GB")
    print(json.dumps(facts))


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = {"ranks": parallel.world_size(), "threads": torch.get_num_threads()}
    return {"device": f"{device.type} ({name})", **threads, "torch": torch.__version__}


def peak(device: torch.device) -> int:
    """The most bytes in use so far: on a GPU, or of the whole process, peers included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
