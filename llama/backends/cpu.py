"""All layers in C++: cpu.cpp, compiled for this machine where `compile` asks for it.

Between two matmuls of a small model the caches of a CPU are empty, and each operation of PyTorch's takes ten times what
it does in a loop: so a step of decoding is one call. Activations are float32, whatever the weights' dtype.
"""

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

from ..batch import Batch
from ..model import Transformer, rope_frequencies
from ..parallel import cpu_has, world_size
from . import Backend

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
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles
        if not made.exists():
            log.warning("compiling cpu.cpp for this CPU, once, which takes about twenty seconds")
            new = made.with_suffix(f".{os.getpid()}")  # a compiler whose process was killed may still be at work
            try:
                command += ["-o", str(new)]
                done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
                if done.returncode:
                    errors = [line for line in done.stderr.splitlines() if "error" in line or "failed" in line]
                    raise RuntimeError(errors[0] if errors else f"{compiler[0]} ended with {done.returncode}")
                new.replace(made)
            finally:
                new.unlink(missing_ok=True)
    return made


class Matrix:
    """A matrix (out, in) as cpu.cpp reads it, by whose transpose it multiplies rows. Its parts are contiguous
    tensors (some of out, in) of floats of any kind, where `in` is a multiple of 16; or int8 (out / 64, in / 4, 64, 4),
    scales (out,) and int32 sums of the int8 of each output (out,); or uint8 (out / 16, groups, columns / 8, 64),
    bfloat16 scales and uint8 zeros (out / 16, groups, 16)."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = [*parts]

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        y: Tensor = ops.product(x.reshape(-1, x.shape[-1]).float().contiguous(), self.parts)
        return y.view(*x.shape[:-1], -1).type_as(x)


def joined(weights: Sequence[Any]) -> Any:
    """The one matrix that these matrices are the rows of, where they lie one behind the other in memory, as
    `checkpoint.load` places them; else None."""
    first = weights[0]
    if not isinstance(first, Tensor):
        return getattr(first, "whole", None)
    end, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage or not weight.is_contiguous():
            return None
        end += weight.nbytes
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def matrix(*weights: Any) -> Matrix | None:
    """Weights of as many columns, one below the other, as cpu.cpp reads them; None where it can't."""
    whole = joined(weights) if len(weights) > 1 else weights[0]
    parts = weights if whole is None else [whole]
    if all(isinstance(part, Tensor) and part.is_contiguous() and part.shape[1] % 16 == 0 for part in parts):
        return Matrix(*(part.detach() for part in parts))
    return getattr(whole, "native", None)


# Tokens of a pass that cpu.cpp computes faster than PyTorch: in 16 bits, and in 8 with AMX, oneDNN has instructions for
# whole matrices, which many tokens fill.
ANY = 2**63
AMX = cpu_has("amx_bf16")
FASTER_UP_TO = {torch.float32: ANY, torch.bfloat16: 4 if AMX else 16, torch.float16: 16}
SCRATCH = 528  # tokens of a pass, of which all that a layer makes stays in the last-level cache


def backend(model: Transformer) -> Backend:
    """cpu.cpp for the whole model; the plain backend where it can't compute a part, or for several ranks."""
    D = model.params.head_dim
    if world_size() == 1 and D % 16 == 0 and cpp():
        blocks: Any = model.layers
        layers = [
            (
                block.attention_norm.weight,
                matrix(block.attention.wq.weight, block.attention.wk.weight, block.attention.wv.weight),
                matrix(block.attention.wo.weight),
                block.ffn_norm.weight,
                matrix(block.feed_forward.w1.weight, block.feed_forward.w3.weight),
                matrix(block.feed_forward.w2.weight),
                block.attention.cache.kv,
            )
            for block in blocks
        ]
        output = matrix(model.output.weight)
        if output is not None and all(part is not None for layer in layers for part in layer):
            return Native(model, output, layers)
    return model


class Native:
    """The model in C++."""

    def __init__(self, model: Transformer, output: Matrix, layers: Sequence[tuple[Any, ...]]) -> None:
        def plain(part: Any) -> Any:
            return part.parts if isinstance(part, Matrix) else part.float() if part.dim() == 1 else part

        self.model = model
        p, weight = model.params, model.output.weight
        cos_sin = torch.view_as_real(rope_frequencies(torch.arange(p.max_seq_len), p.head_dim, p.rope_theta))
        parts = model.tok_embeddings.weight, cos_sin, plain(model.norm.weight), output.parts
        self.cpp = torch.classes.llama.Model(*parts, p.dim * p.norm_eps)
        for layer in layers:
            self.cpp.add(*map(plain, layer))
        self.most = FASTER_UP_TO[weight.dtype] if isinstance(weight, Tensor) else weight.native_rows

    def hidden(self, batch: Batch) -> Tensor:
        if len(batch.tokens) > self.most:
            return self.model.hidden(batch)
        passes = split(batch.sequences, SCRATCH)
        ids = batch.tokens.split([sum(spans[2::3]) for spans in passes])
        hidden = [self.cpp.hidden(some, spans) for some, spans in zip(ids, passes, strict=True)]
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        if len(hidden) > self.most:
            return self.model.logits(hidden.type_as(self.model.norm.weight))
        logits: Tensor = self.cpp.logits(hidden.float().contiguous())
        return logits


def split(sequences: Sequence[tuple[int, int, int]], most: int) -> list[list[int]]:
    """The sequences of a batch in passes about equally long, of up to `most` tokens: (slot, start, length) of each one
    in a pass, (0, 7, 2, 1, 4, 1) for two tokens of slot 0 and one of slot 1."""
    total = sum(length for _, _, length in sequences)
    size = -(-total // -(-total // most))
    passes: list[list[int]] = [[]]
    left = size
    for slot, start, length in sequences:
        while length:
            if not left:
                passes.append([])
                left = size
            some = min(length, left)
            passes[-1] += (slot, start, some)
            start, length, left = start + some, length - some, left - some
    return passes
