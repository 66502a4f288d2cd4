"""Products, attention and whole models in C++: cpu.cpp, compiled for this machine where someone asks for it."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .parallel import cpu_has

log = logging.getLogger(__name__)
ops: Any = torch.ops.llama
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-DCPU_CAPABILITY_AVX512"]


@cache
def cpp() -> bool:
    """Compile and load cpu.cpp when this is first called; whether that worked."""
    try:
        if not cpu_has("avx512_vnni"):
            raise RuntimeError("it is for CPUs with AVX-512 VNNI")
        torch.ops.load_library(library())
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, no place for its files
        log.warning("cpu.cpp is not compiled, which is slower: %s", f"{type(error).__name__}: {error}".split("\n")[0])
        return False
    return True


def library() -> Path:
    """cpu.cpp as a shared library, compiled unless there is one of the same source, command, torch and CPU. torch's own
    way to do this imports for seconds in every process."""
    import fcntl  # which Windows lacks

    source, pytorch = Path(__file__).with_name("cpu.cpp"), Path(torch.__file__).parent
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    paths = [f"-I{pytorch / 'include'}", str(source), f"-L{pytorch / 'lib'}"]
    command = [*compiler, *FLAGS, *paths, "-ltorch_cpu", "-lc10"]
    units = [(unit, has) for unit, has in torch.cpu.get_capabilities().items() if has is True or unit == "cpu_name"]
    state = source.read_text(encoding="utf-8"), command, torch.__version__, units
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-reference"
    made = folder / f"cpu-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.so"
    if made.exists():
        return made
    if not shutil.which(compiler[0]):
        raise RuntimeError(f"there is no {compiler[0]}; install it, or name another compiler in CXX")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles
        if not made.exists():
            log.warning("compiling cpu.cpp for this CPU, once, which takes about twenty seconds")
            new = made.with_suffix(f".{os.getpid()}")  # a compiler whose process was killed may still be at work
            done = subprocess.run([*command, "-o", str(new)], capture_output=True, text=True, errors="replace")
            if done.returncode:
                told = [line for line in done.stderr.splitlines() if "error" in line or "failed" in line]
                raise RuntimeError(told[0] if told else f"{compiler[0]} ended with {done.returncode}")
            new.replace(made)
    return made


class Matrix:
    """A matrix (out, in) as cpu.cpp reads it, by whose transpose it multiplies rows. Its parts are contiguous
    tensors (some of out, in) of floats of any kind, where `in` is a multiple of 16; or int8 (out / 64, in / 4, 64, 4),
    scales (out,) and int32 sums of the int8 of each output (out,); or uint8 (out / 16, groups, columns / 8, 64),
    bfloat16 scales and uint8 zeros (out / 16, groups, 16)."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = [*parts]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = ops.product(x.reshape(-1, x.shape[-1]).float().contiguous(), self.parts)
        return y.view(*x.shape[:-1], -1).type_as(x)


def likeliest(logits: Tensor) -> Tensor:
    """The index of the largest of each row of logits (N, V), float32, the first of equals; and behind these N one more
    number, 1 if all logits are finite, or 0."""
    found: Tensor = ops.likeliest(logits)
    return found


def attend(heads: Tensor, turns: Tensor, cache: Tensor, places: Sequence[int]) -> Tensor:
    """What the queries of N tokens see, (N, H D), which are the first of heads (N, (H + 2K) D) and may be overwritten.
    The keys and values behind them are stored in a cache (rows, 2K, S, D), and each token looks at those up to its own.
    `places` are the row, the first position and the number of the tokens that follow one another in a row, for one row
    behind the other. Queries and keys are turned by turns (S, 1, D/2, 2), float32. D is a multiple of 16."""
    seen: Tensor = ops.attend(heads.float().contiguous(), turns, cache, places)
    return seen.type_as(heads)
