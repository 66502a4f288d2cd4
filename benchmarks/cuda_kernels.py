"""How fast the matmuls of backends/cuda_kernels.py read weights, by their block sizes: where its constants come from.

    python benchmarks/cuda_kernels.py [--rows 1,8,64] [--bits 16,8,4]

Shapes are 7B's. Weights are taken in turn, more of them than the L2 cache holds. GB/s are bytes of the weights over the
time of one kernel in a CUDA graph of many; cuBLAS stands beside them for bfloat16.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import fire
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.backends.cuda_kernels import PLAIN, RESIDUAL, SWIGLU, Matrix, linear

SHAPES = {"qkv": (12288, 4096), "wo": (4096, 4096), "w13": (22016, 4096), "w2": (4096, 11008)}
ONE = [
    (4, 512, 4, 2), (4, 1024, 4, 2), (4, 1024, 8, 2), (4, 512, 2, 2), (8, 512, 4, 2), (8, 512, 2, 2), (2, 2048, 4, 2),
    (8, 1024, 8, 2), (8, 1024, 4, 2), (16, 512, 4, 2), (2, 1024, 4, 2), (4, 2048, 4, 2),
]  # fmt: skip
SEVERAL = [
    (16, 256, 4, 4), (32, 128, 4, 5), (32, 256, 4, 3), (32, 256, 4, 4), (64, 128, 4, 4), (64, 64, 4, 6), (64, 128, 8, 4),
    (64, 256, 8, 3), (128, 64, 8, 4), (128, 64, 4, 5), (32, 512, 8, 2), (64, 128, 4, 3), (128, 128, 8, 3),
]  # fmt: skip


def matrix(shape: tuple[int, int], bits: int, copies: int) -> list[Matrix]:
    N, K = shape
    if bits == 16:
        return [Matrix(torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02) for _ in range(copies)]
    q = [torch.randint(0, 255, (N, K * bits // 8), device="cuda", dtype=torch.uint8) for _ in range(copies)]
    if bits == 8:
        return [Matrix(part.view(torch.int8), torch.full((N, 1), 1e-4, device="cuda"), None, 8) for part in q]
    scale = torch.full((N, K // 64), 1e-3, device="cuda", dtype=torch.float16)
    return [Matrix(part, scale, -7 * scale, 4, 64) for part in q]


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call, where the calls follow each other in a CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def main(rows: str = "1,8,64", bits: str = "16,8,4", only: str = "") -> None:
    as_list = lambda text: [int(n) for n in str(text).strip("()").split(",") if n.strip()]  # noqa: E731
    totals: dict[tuple[int, int], dict[str, float]] = {}  # seconds of one layer's matmuls
    for M, width, (name, shape) in itertools.product(as_list(rows), as_list(bits), SHAPES.items()):
        if only and name not in only.split("+"):
            continue
        N, K = shape
        size = N * K * width // 8
        copies = max(3, -(-(300 << 20) // size))
        weights = matrix(shape, width, copies)
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        norm = torch.ones(K, device="cuda", dtype=torch.bfloat16)
        residual = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
        then = {"qkv": PLAIN, "w13": SWIGLU}.get(name, RESIDUAL)
        about = {} if then is PLAIN and M > 1 else {"norm": norm} if name in ("qkv", "w13") else {"residual": residual}

        def call(weight: Matrix, config: tuple[int, int, int, int]) -> Tensor:
            return linear(x, weight, then, config=config, **about)  # noqa: B023

        found = {}
        configs = ONE if M == 1 else SEVERAL
        if width == 4:
            configs = [(n, k if M > 1 else min(2 * k, 2048), *rest) for n, k, *rest in configs]
        with ThreadPoolExecutor(16) as pool:  # which compile
            tries = {config: pool.submit(call, weights[0], config) for config in configs}
        for config, tried in tries.items():
            if tried.exception():
                found[str(config)] = f"{type(tried.exception()).__name__}"
                continue
            t = seconds([lambda w=w, c=config: call(w, c) for w in weights * 3])
            found[str(config)] = round(size / t / 1e9)
            total = totals.setdefault((M, width), {})
            total[str(config)] = total.get(str(config), 0) + t
        best = sorted((v, k) for k, v in found.items() if isinstance(v, int))[::-1]
        if width == 16:
            t = seconds([lambda w=w: F.linear(x, w.q) for w in weights * 3])
            found["cublas"] = round(size / t / 1e9)
        bad = {k: v for k, v in found.items() if isinstance(v, str)}
        print(f"M {M} bits {width} {name}: " + ", ".join(f"{k} {v}" for v, k in best[:6]) + f"; worst {best[-1:]}"
              f"; cuBLAS {found.get('cublas')} {bad}", flush=True)  # fmt: skip
        del weights
    for (M, width), total in totals.items():
        print(f"best M {M} bits {width}: {min(total, key=lambda config: total[config])}")


if __name__ == "__main__":
    fire.Fire(main)
