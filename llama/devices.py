"""The device and dtype that a process computes in, its threads, and PyTorch's settings meanwhile."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from .parallel import launched, processes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Instructions with which PyTorch multiplies matrices in a dtype, by the names of torch.cpu.get_capabilities.
MATRIX_UNITS = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16",)}
LARGE_PAGE = 2**21  # bytes
# A function of the OpenMP library that PyTorch has loaded; None without OpenMP.
OPENMP_SET_THREADS = None if sys.platform == "win32" else getattr(ctypes.PyDLL(None), "omp_set_num_threads", None)
T = TypeVar("T")
R = TypeVar("R")


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this rank: CUDA, then MPS, then CPU unless `device` says which; under torchrun `cuda` means the GPU
    of the local rank. Raises ValueError for a device that this machine does not have."""
    several = launched() > 1
    if device is None:
        # gloo cannot reduce tensors that live on MPS, so several ranks on a Mac compute on its CPU.
        mps = torch.backends.mps.is_available() and not several
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not one that torch knows; use cuda, mps or cpu") from error
    if chosen.type == "mps" and several:
        raise ValueError("device 'mps' serves one process only; use device='cpu' for several ranks on a Mac")
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        index = local if chosen.index is None else chosen.index
        if several and index != local:
            raise ValueError(f"device {str(device)!r} on local rank {local}: with several ranks give 'cuda'")
        if index >= count:
            raise ValueError(
                f"device cuda:{index} is wanted but this machine has {count} GPUs; "
                f"lower --nproc_per_node or use device='cpu'"
            )
        return torch.device("cuda", index)
    if (chosen.type == "mps" and not torch.backends.mps.is_available()) or chosen.type not in ("cpu", "mps"):
        raise ValueError(f"device {str(device)!r} is not available here; use cuda, mps or cpu")
    return chosen


def use(device: torch.device) -> None:
    """Make a GPU the current one where each rank has its own: NCCL and kernels of other libraries go by that. On a CPU,
    compute on this rank's share of the cores, where torchrun sets a single thread by default."""
    if processes() == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, cores() // int(os.environ["LOCAL_WORLD_SIZE"])))


def cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """The physical cores that this process may use: two threads of one core multiply no faster than one."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = (root / f"cpu{i}" / "topology" / "thread_siblings_list" for i in allowed)
    return len({path.read_text(encoding="utf-8") if path.exists() else str(path) for path in siblings})


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of that name, or the dtype itself; ValueError for one that weights may not have."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    return found


def choose_dtype(
    dtype: str | torch.dtype | None, device: torch.device, saved: torch.dtype, native: bool = False
) -> torch.dtype:
    """The dtype to compute in: `dtype` if given, else the checkpoint's own `saved`, except where PyTorch computes
    on a CPU without matrix instructions for it: there float32 is several times faster. `native`: native.cpp computes,
    which is fastest with the fewest bytes."""
    if dtype is not None:
        return as_dtype(dtype)
    if saved not in DTYPES.values():
        return torch.float32
    # Measured on two cores: 1,000 GFLOP/s in bfloat16 with AMX, 50 with AVX-512 alone, 150-220 in float32.
    return saved if device.type != "cpu" or native or cpu_has(*MATRIX_UNITS.get(saved, ())) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def cpu_has(*units: str) -> bool:
    """Whether this CPU has one of these instruction sets, by the names of torch.cpu.get_capabilities."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(unit) for unit in units)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Zeros, for weights or a cache. On a CPU under Linux they are in huge pages where the kernel allows it, which are
    a few percent faster to read. Memory is committed when it is first written."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call `work` for each item in a pool of as many threads as PyTorch uses, with each PyTorch operation in one
    thread: threads that share a small operation wait for each other at its end, which takes long on a busy machine."""
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=set_own_threads, initargs=(1,)) as pool:
        return list(pool.map(work, items))


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run the calling thread's PyTorch operations in one thread."""
    before = torch.get_num_threads()
    set_own_threads(1)
    try:
        yield
    finally:
        set_own_threads(before)


def set_own_threads(n: int) -> None:
    """Set how many threads the calling thread's PyTorch operations use. torch.set_num_threads would also set the number
    of all threads that start later, so it is used only without OpenMP."""
    torch.get_num_threads()  # a new thread takes the process's number at its first use: now, not after it is set
    if OPENMP_SET_THREADS:
        OPENMP_SET_THREADS(n)
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def trim() -> None:
    """Return freed memory to the system. glibc keeps it otherwise."""
    if sys.platform == "linux" and hasattr(allocator := ctypes.CDLL(None), "malloc_trim"):
        allocator.malloc_trim(0)


@contextmanager
def own_context(inference: bool = True) -> Iterator[None]:
    """Shield a block from the caller's settings: no autocast, the CPU as the default device, inference mode as given.
    The default dtype belongs to all threads and is not changed: name the dtype of float tensors in the block."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        if torch.empty(0).device.type != "cpu":  # ten times as fast as torch.get_default_device()
            stack.enter_context(torch.device("cpu"))
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def to_device(values: Any, device: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of numbers on a device. This does not wait for a GPU, unlike torch.tensor(values, device=device)."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def to_host(*tensors: torch.Tensor) -> Callable[[], list[Any]]:
    """Start copying tensors to the host, on a GPU without waiting. The function that is returned waits and gives their
    values as one list. On a GPU the tensors must have one dtype."""
    if tensors[0].device.type != "cuda":
        return lambda: [number for tensor in tensors for number in tensor.tolist()]
    tensor = torch.cat(tensors)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[Any]:
        event.synchronize()
        return copy.tolist()

    return read
