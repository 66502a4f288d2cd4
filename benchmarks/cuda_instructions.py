"""Counts the instructions per weight of the kernels in backends/cuda_matmul.py. They are compiled for a GPU, which does
not have to be present.

    python benchmarks/cuda_instructions.py [--rows 1,8,64] [--bits 16,8,4] [--group 128] [--arch 90] [--show]

A GPU's cores issue a limited number of instructions in the time in which memory gives them a weight: an H100, 29.6e12
of threads a second, 9.9 for each byte at 3.0 TB/s. So a kernel that reads 4-bit weights at that rate may take 4.9
instructions for each at most, and less than two thirds of that if others are to hide what each waits for. The loop over
the columns is counted, in thread instructions for each weight; `--show` prints its instructions by name. A count
tells which of two kernels computes less, not how fast they are: benchmarks/cuda_kernels.py measures that on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import fire
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama.backends import cuda_kernels
from llama.backends.cuda_matmul import PLAIN, ROPE, SWIGLU, gemm_kernel, gemv_kernel
from llama.cli.bench import numbers

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOATS = {16: "bf16", 32: "fp32"}


def compiled(bits: int, rows: int, then: Any, group: int, arch: int) -> tuple[Any, float]:
    """The kernel that `cuda_kernels.linear` launches for the shapes of 7B, and the number of weights that a thread
    multiplies in one iteration of the loop."""
    block_m, words, config = cuda_kernels.launch(rows, 4096, bits, group)
    block_n, block_k, warps, stages, slices = config
    kernel: Any = gemv_kernel if words else gemm_kernel
    rope, x = then.value == ROPE.value, FLOATS.get(bits, "bf16")
    stored = {4: "u8", 8: "i8"}.get(bits, x) if not words or bits >= 16 else "i32"
    types = dict.fromkeys(kernel.arg_names, "i32") | {"q": f"*{stored}", "eps": "fp32", "cos_sin": "*fp32"}
    types |= dict.fromkeys(("x", "norm", "residual", "out", "cache"), f"*{x}")
    types |= dict.fromkeys(("scale", "minimum"), "*fp16") | dict.fromkeys(("positions", "slots"), "*i64")
    norm = words > 0 and then.value != PLAIN.value
    constants: dict[str, Any] = {"D": 128, "BITS": bits, "GROUP": group, "NORM": norm, "THEN": then.value}
    constants |= {"BLOCK_N": block_n, "BLOCK_K": block_k, "PDL": arch >= 90, "residual": None}
    constants |= {"WORDS": words} if words else {"BLOCK_M": block_m, "SLICES": slices}
    constants |= dict.fromkeys(("scale", "minimum") if bits >= 16 else ("minimum",) if bits == 8 else ())
    constants |= {} if norm else {"norm": None}
    constants |= {} if rope else dict.fromkeys(("cos_sin", "positions", "slots", "cache"))
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(types) if types[name].startswith("*") or name in ("N", "K", "S")]
    source = ASTSource(
        kernel,
        types,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": arch >= 90}
    weights = block_n * block_k * (2 if then.value == SWIGLU.value else 1) / (32 * warps)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), weights


def disassembled(binary: bytes) -> tuple[list[str], int]:
    """The instructions of the longest loop, and the registers of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        listing, usage = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    found: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = [[]]
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(.*?);", line):
            found.append(instruction[1])
            if (to := re.search(r"BRA.*`\((\.L_\w+)\)", line)) and to[1] in labels:
                loops.append(found[labels[to[1]] :])
    registers = re.search(r"REG:(\d+)", usage)
    return max(loops, key=len), int(registers[1]) if registers else 0


def main(
    rows: int | tuple[int, ...] = (1, 8, 64),
    bits: int | tuple[int, ...] = (16, 8, 4),
    group: int | None = None,
    arch: int = 90,
    show: bool = False,
) -> None:
    sizes = numbers(rows=rows, bits=bits)
    print("bits  rows  matmul  instructions/weight  registers  spills  bytes shared")
    for width in sizes["bits"]:
        columns = 0 if width >= 16 else (32 if width == 4 else 0) if group is None else group
        for count in sizes["rows"]:
            for name, then in (("wo, w2", PLAIN), ("wqkv", ROPE), ("w13", SWIGLU)):
                kernel, weights = compiled(width, count, then, columns, arch)
                loop, registers = disassembled(kernel.asm["cubin"])
                spills = sum(instruction.startswith(("LDL", "STL")) for instruction in loop)
                print(
                    f"{width:4}  {count:4}  {name:6}  {len(loop) / weights:19.2f}  {registers:9}  {spills:6}  "
                    f"{kernel.metadata.shared:12}",
                    flush=True,
                )
                if show:
                    names = Counter(instruction.split()[0].split(".")[0] for instruction in loop)
                    print("      " + ", ".join(f"{n} {name}" for name, n in names.most_common()))


if __name__ == "__main__":
    fire.Fire(main)
