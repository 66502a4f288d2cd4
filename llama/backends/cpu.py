"""The CPU backend: native.cpp, compiled for this machine when a large enough model is first loaded.

A pass is one call: between two matmuls the CPU's caches hold nothing but weights, so that each small PyTorch operation
takes ten times as long as in a loop. Activations are float32, whatever the weights' dtype. Matmuls round them to
bfloat16 where the weights are and the CPU has instructions for it, and to 8 bits where the weights are quantized, or
to bfloat16 where AMX multiplies such weights in bfloat16.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..args import ModelArgs
from ..batch import Batch, Span, check
from ..model import Transformer, rope_frequencies
from ..parallel import all_gather, all_reduce, world_size
from ..textfile import lock
from . import Backend

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("native.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
FLAGS = ["-std=c++17", "-O3", "-pthread", "-fPIC", "-shared"]
PASS = 512  # tokens that are computed at a time, so that their activations stay in the last-level cache


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


@cache
def library() -> Any:
    """native.cpp, compiled if necessary and loaded; None if that fails, which is logged."""
    try:
        return load(cached())
    except (RuntimeError, OSError) as error:
        log.warning("the model itself computes, which is slower than compiled code: %s", error)
        return None


def load(made: Path) -> Any:
    """Load a compiled library and declare the types of its functions."""
    lib, pointer, i64 = ctypes.CDLL(str(made)), ctypes.c_void_p, ctypes.c_int64
    lib.llama_instructions.restype = ctypes.c_char_p
    lib.llama_embed.argtypes, lib.llama_embed.restype = (pointer, pointer, pointer, i64), i64
    lib.llama_tile.restype = i64
    lib.llama_matmul.argtypes = pointer, pointer, pointer, i64
    lib.llama_attention.argtypes = pointer, i64, pointer, pointer, pointer, pointer, i64, i64
    lib.llama_feed_forward.argtypes = pointer, i64, pointer, pointer, pointer, i64
    lib.llama_layers.argtypes = pointer, pointer, pointer, pointer, i64, i64
    lib.llama_logits.argtypes = pointer, pointer, pointer, i64
    lib.llama_pack.argtypes = i64, pointer, pointer, i64, i64, i64
    return lib


def command() -> list[str]:
    """The compiler and its flags for this CPU. RuntimeError if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for compiler in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(compiler[0]):
            arm = platform.machine() in ("arm64", "aarch64")
            return [*compiler, *FLAGS, "-mcpu=native" if arm else "-march=native"]
    raise RuntimeError(f"there is no {named[0] if named else 'g++ or clang++'}; install one, or name another in CXX")


def has_compiler() -> bool:
    """Whether a compiler is installed. It may still fail."""
    with suppress(RuntimeError):
        return bool(command())
    return False


def cpu_name() -> str:
    """The CPU's model and instruction sets, as machines of several kinds may share a home directory."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        keys = ("model name", "flags", "Features", "CPU part")
        return repr(sorted({line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith(keys)}))
    return platform.processor() + platform.machine()


def cached() -> Path:
    """The library's file in the user's cache directory: one for each source, command, compiler and CPU."""
    parts = command()
    version = subprocess.run([parts[0], "--version"], capture_output=True, encoding="utf-8", errors="replace").stdout
    state = [source.read_text(encoding="utf-8") for source in (SOURCE, *HEADERS)], parts, version, cpu_name()
    name = f"native-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.so"
    made = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-reference" / name
    if intact(made):
        return made
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with (made.parent / "lock").open("wb") as file:
            lock(file, wait=True)  # of several processes one compiles
            return made if intact(made) else compiled(parts, made)
    except OSError:  # a home that cannot be written to
        return compiled(parts, Path(tempfile.mkdtemp(prefix="llama-")) / name)


def compiled(parts: Sequence[str], made: Path) -> Path:
    """Compile native.cpp to a file."""
    log.warning("compiling native.cpp for this CPU, once, which takes about ten seconds")
    new = made.with_suffix(f".{os.getpid()}")
    try:
        command = [*parts, str(SOURCE), "-o", str(new)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line or "failed" in line]
            raise RuntimeError(errors[0] if errors else f"{parts[0]} ended with {done.returncode}")
        new.replace(made)
    finally:
        new.unlink(missing_ok=True)
    made.with_suffix(".sha256").write_text(digest(made), encoding="utf-8")
    return made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def intact(made: Path) -> bool:
    """Whether a library exists and is undamaged: loading a damaged one can crash the process."""
    sums = made.with_suffix(".sha256")
    return made.exists() and sums.exists() and sums.read_text(encoding="utf-8") == digest(made)


@cache
def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """The number of CPUs that the container's quota amounts to; infinite without one."""
    with suppress(OSError, ValueError):
        limit, period = path.read_text(encoding="utf-8").split()
        return int(limit) / int(period)
    return math.inf


def threads() -> int:
    """The number of threads: PyTorch's, but no more than the container's CPU quota."""
    return max(1, math.ceil(min(torch.get_num_threads(), cpu_quota())))


# ---------------------------------------------------------------------------------------------------------------------
# Matrices

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MATRICES = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]  # of a layer
MATRICES += [f"feed_forward.{name}" for name in ("w1", "w3", "w2")]


class CMatrix(ctypes.Structure):
    """`Matrix` in native.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "out", "columns", "group", "zero")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("weight", "scale", "min")]


def c_matrix(weight: Any) -> CMatrix | None:
    """A weight (out, in) as native.cpp reads it where it lies; None if it cannot."""
    if not isinstance(weight, Tensor):
        return getattr(weight, "native", None)
    if weight.dtype not in KINDS or not weight.is_contiguous() or weight.shape[1] % 16:
        return None
    return CMatrix(KINDS[weight.dtype], *weight.shape, 0, 0, weight.data_ptr())


def matmul(matrix: CMatrix, x: Tensor) -> Tensor:
    """x (..., in) times the transpose of a matrix -> (..., out), in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.empty(len(rows), matrix.out, dtype=torch.float32)
    lib = library()
    lib.llama_threads(threads())
    lib.llama_matmul(ctypes.byref(matrix), rows.data_ptr(), y.data_ptr(), len(rows))
    return y.view(*x.shape[:-1], matrix.out).type_as(x)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class CLayer(ctypes.Structure):
    """`Layer` in native.cpp."""

    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("qkv", CMatrix * 3),
        ("wo", CMatrix),
        ("ffn_norm", ctypes.c_void_p),
        ("w13", CMatrix * 2),
        ("w2", CMatrix),
        ("cache", ctypes.c_void_p),
    ]


class CModel(ctypes.Structure):
    """`Model` in native.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("dim", "hidden", "layers", "vocabulary", "kind", "cache_kind")]
    _fields_ += [(name, ctypes.c_int64) for name in ("n_heads", "n_kv_heads", "head_dim", "max_seq_len")]
    _fields_ += [("eps", ctypes.c_double), *((name, ctypes.c_void_p) for name in ("embeddings", "cos_sin", "norm"))]
    _fields_ += [("output", CMatrix), ("layer", ctypes.POINTER(CLayer))]


def fits(args: ModelArgs) -> bool:
    """Whether all sizes are multiples of a vector's 16 elements."""
    sizes = args.head_dim, args.dim, args.dim // world_size(), args.ffn_hidden // world_size()
    return not any(size % 16 for size in sizes)


def backend(model: Transformer) -> Backend:
    """native.cpp, if it can compute the whole model; otherwise the model itself."""
    if not fits(model.params) or model.norm.weight.dtype not in KINDS or library() is None:
        return model
    blocks: Any = model.layers
    matrices = [[c_matrix(block.get_submodule(name).weight) for name in MATRICES] for block in blocks]
    output = c_matrix((model.score if model.params.n_labels else model.output).weight)
    return Native(model, matrices, output) if output and all(map(all, matrices)) else model


class Native:
    """The model in C++."""

    own_threads = True

    def __init__(self, model: Transformer, matrices: Sequence[Sequence[Any]], output: CMatrix) -> None:
        self.model, self.lib, p = model, library(), model.params
        self.kept: list[Tensor] = []  # tensors that only pointers in the structures refer to
        layers = (CLayer * model.n_layers)()
        blocks: Any = model.layers
        for layer, block, (wq, wk, wv, wo, w1, w3, w2) in zip(layers, blocks, matrices, strict=True):
            layer.qkv[:], layer.wo, layer.w13[:], layer.w2 = (wq, wk, wv), wo, (w1, w3), w2
            layer.attention_norm = self.floats(block.attention_norm.weight)
            layer.ffn_norm = self.floats(block.ffn_norm.weight)
            layer.cache = block.attention.cache.kv.data_ptr()
        attention, weight, self.embeddings = blocks[0].attention, model.norm.weight, model.tok_embeddings.weight
        cos_sin = torch.view_as_real(rope_frequencies(torch.arange(p.max_seq_len), p))
        self.c = CModel(
            *(p.dim, p.ffn_hidden // world_size(), model.n_layers),
            *(model.vocab_size, KINDS[self.embeddings.dtype], KINDS[weight.dtype]),
            *(attention.n_heads, attention.n_kv_heads, p.head_dim, p.max_seq_len),
            *(p.norm_eps, self.embeddings.data_ptr(), self.floats(cos_sin), self.floats(weight), output, layers),
        )

    def floats(self, tensor: Tensor) -> int:
        """The address of the tensor in float32, which is kept alive."""
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()

    def hidden(self, batch: Batch) -> Tensor:
        check(batch.sequences, self.model.params)  # C++ does not check bounds
        self.lib.llama_threads(threads())
        x = self.embed(batch.tokens)
        y, begin = torch.empty(min(len(x), PASS), x.shape[1], dtype=torch.float32), 0
        for spans in passes(batch.sequences, batch.outputs if world_size() == 1 else None, PASS):
            rows = sum(length for _, _, length, _ in spans)
            c_spans = (ctypes.c_int64 * (4 * len(spans)))(*(number for span in spans for number in span))
            self.layers(x[begin : begin + rows], y[:rows], c_spans, len(spans))
            begin += rows
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (N, dim) in float32."""
        if world_size() > 1:  # each has some columns
            return all_gather(F.embedding(tokens, self.embeddings)).float()
        x, tokens = torch.empty(len(tokens), self.c.dim, dtype=torch.float32), tokens.contiguous()
        odd = self.lib.llama_embed(ctypes.byref(self.c), tokens.data_ptr(), x.data_ptr(), len(x))
        if odd >= 0:
            raise IndexError(f"a token is out of range of a vocabulary of {self.c.vocabulary}")
        return x

    def layers(self, x: Tensor, y: Tensor, spans: Any, count: int) -> None:
        """All layers, on x (N, dim) in place; `y` is scratch of the same shape."""
        at, to, rows = x.data_ptr(), y.data_ptr(), len(x)
        if world_size() == 1:
            self.lib.llama_layers(ctypes.byref(self.c), at, to, spans, count, rows)
            return
        for i in range(self.model.n_layers):
            self.lib.llama_attention(ctypes.byref(self.c), i, at, to if i else None, to, spans, count, rows)
            all_reduce(y)
            self.lib.llama_feed_forward(ctypes.byref(self.c), i, at, to, to, rows)
            all_reduce(y)
        x += y

    def logits(self, hidden: Tensor) -> Tensor:
        x, y = hidden.float().contiguous(), torch.empty(len(hidden), self.c.output.out, dtype=torch.float32)
        self.lib.llama_logits(ctypes.byref(self.c), x.data_ptr(), y.data_ptr(), len(x))
        return y if self.model.params.n_labels else all_gather(y)  # every rank has the whole score head


def passes(
    sequences: Sequence[Span], outputs: Sequence[int] | None, most: int
) -> list[list[tuple[int, int, int, int]]]:
    """The sequences of a batch, cut into passes of up to `most` tokens and about equal length, as `Sequence` in
    attention.h: slot, start, length, and the number of last tokens that are among the `outputs` of the sequence."""
    total = sum(length for _, _, length in sequences)
    size = -(-total // -(-total // most))
    found: list[list[tuple[int, int, int, int]]] = [[]]
    left = size
    for i, (slot, start, length) in enumerate(sequences):
        wanted = length if outputs is None else outputs[i]
        while length:
            if not left:
                found.append([])
                left = size
            some = min(length, left)
            found[-1].append((slot, start, some, min(some, max(0, wanted - (length - some)))))
            start, length, left = start + some, length - some, left - some
    return found
