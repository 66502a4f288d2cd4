"""How fast the matmuls of backends/cuda_kernels.py read weights for each block size: the source of its constants.

    python benchmarks/cuda_kernels.py [--rows 1,9] [--bits 16,8,4]

Shapes are 7B's. The kernels cycle through more weights than the L2 cache holds. GB/s are the bytes of the weights
divided by the time of one kernel in a CUDA graph of many; for bfloat16, cuBLAS is shown for comparison.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import fire
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.backends.cuda_kernels import Matrix, linear
from llama.backends.cuda_matmul import PLAIN, RESIDUAL, SWIGLU
from llama.cli.bench import numbers

Config = tuple[int, int, int, int]  # BLOCK_N, BLOCK_K, warps, stages
SHAPES = {"qkv": (12288, 4096), "wo": (4096, 4096), "w13": (22016, 4096), "w2": (4096, 11008)}
ONE = [
    (4, 512, 4, 2), (4, 1024, 4, 2), (4, 1024, 8, 2), (4, 512, 2, 2), (8, 512, 4, 2), (8, 512, 2, 2), (2, 2048, 4, 2),
    (8, 1024, 8, 2), (8, 1024, 4, 2), (16, 512, 4, 2), (2, 1024, 4, 2), (4, 2048, 4, 2), (8, 1024, 2, 2),
    (4, 1024, 2, 2), (8, 2048, 2, 2), (4, 2048, 2, 2), (8, 2048, 4, 2), (8, 1024, 1, 2), (16, 1024, 1, 2),
]  # fmt: skip
SEVERAL = [
    (16, 256, 4, 4), (32, 128, 4, 5), (32, 256, 4, 3), (32, 256, 4, 4), (64, 128, 4, 4), (64, 64, 4, 6),
    (64, 128, 8, 4), (64, 256, 8, 3), (128, 64, 8, 4), (128, 64, 4, 5), (32, 512, 8, 2), (64, 128, 4, 3),
    (128, 128, 8, 3), (16, 512, 4, 3), (16, 512, 4, 4), (32, 512, 4, 3), (32, 256, 2, 4), (32, 128, 2, 5),
    (16, 256, 1, 4),
]  # fmt: skip


def matrices(shape: tuple[int, int], bits: int, copies: int) -> list[Matrix]:
    N, K = shape
    if bits == 16:
        return [Matrix(torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02) for _ in range(copies)]
    q = [torch.randint(0, 255, (N, K * bits // 8), device="cuda", dtype=torch.uint8) for _ in range(copies)]
    if bits == 8:
        return [Matrix(part.view(torch.int8), torch.full((N, 1), 1e-4, device="cuda"), None, 8) for part in q]
    scale = torch.full((N, K // 32), 1e-3, device="cuda", dtype=torch.float16)
    return [Matrix(part, scale, -7 * scale, 4, 32) for part in q]


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds per call, with all calls in one CUDA graph."""
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


def measure(M: int, bits: int, name: str) -> dict[tuple[int, ...], float]:
    """Seconds of a matmul of M tokens for each configuration, with cuBLAS's under the key ()."""
    (N, K), dtype = SHAPES[name], torch.bfloat16
    weights = matrices((N, K), bits, max(3, -(-(300 << 20) // (N * K * bits // 8))))
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    norm = torch.ones(K, device="cuda", dtype=dtype)
    then = {"qkv": PLAIN, "w13": SWIGLU}.get(name, RESIDUAL)
    residual = torch.randn(M, N, device="cuda", dtype=dtype) if then is RESIDUAL else None

    def call(weight: Matrix, config: Config | None) -> Tensor:
        if config is None:
            return F.linear(x, weight.q)
        return linear(x, weight, then, None if residual is not None else norm, 1e-5, residual, config=config)

    configs = ONE if M == 1 else SEVERAL
    with ThreadPoolExecutor(16) as pool:  # which compile
        tries = {config: pool.submit(call, weights[0], config) for config in configs}
    able = [config for config, tried in tries.items() if not tried.exception()]
    found = {tuple(config): seconds([partial(call, w, config) for w in weights * 3]) for config in able}
    if bits == 16:
        found[()] = seconds([partial(call, w, None) for w in weights * 3])
    return found


def main(rows: int | tuple[int, ...] = (1, 9), bits: int | tuple[int, ...] = (16, 8, 4)) -> None:
    sizes = numbers(rows=rows, bits=bits)
    for M, width in itertools.product(sizes["rows"], sizes["bits"]):
        layer: dict[tuple[int, ...], float] = {}
        for name, (N, K) in SHAPES.items():
            found = measure(M, width, name)
            rates = sorted(((round(N * K * width / 8e9 / t), config) for config, t in found.items() if config))[::-1]
            cublas = f"; cuBLAS {N * K * width / 8e9 / found[()]:.0f}" if () in found else ""
            print(
                f"{M} tokens, {width} bits, {name}: {', '.join(f'{c} {r}' for r, c in rates[:6])}{cublas}", flush=True
            )
            for config, t in found.items():
                layer[config] = layer.get(config, 0) + t
        print(f"{M} tokens, {width} bits: the best of a layer is {min((t, c) for c, t in layer.items() if c)[1]}")


if __name__ == "__main__":
    fire.Fire(main)
