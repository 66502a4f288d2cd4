"""The device and the dtype of a process."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from llama import backends, devices


@pytest.mark.parametrize("device", ["abc", "cuda:99", "meta", 3.5])
def test_missing_devices_are_named(device):
    with pytest.raises(ValueError, match="device"):
        devices.choose_device(device)


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1024, 1500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("refused", [False, True])
def test_memory_for_weights(shape, dtype, refused, monkeypatch):
    """Small, and large enough for huge pages, which the kernel may not provide."""

    class Refusing(mmap.mmap):
        def madvise(self, *advice):
            raise OSError("Invalid argument")

    if refused:
        monkeypatch.setattr(mmap, "mmap", Refusing)
    made = devices.zeros(shape, dtype)
    assert (made.shape, made.dtype, made.is_contiguous()) == (shape, dtype, True)
    assert torch.equal(made.fill_(3), torch.full(shape, 3.0, dtype=dtype))
    assert devices.zeros(shape, dtype, "meta").is_meta


def test_the_default_device_is_the_fastest_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices.choose_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.choose_device() == devices.choose_device("cuda") == torch.device("cuda", 3)
    assert devices.choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="'cuda:1' on local rank 3: with several ranks give 'cuda'"):
        devices.choose_device("cuda:1")
    assert devices.choose_device("cuda:3") == devices.choose_device("cuda")
    monkeypatch.delenv("WORLD_SIZE")
    assert devices.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="cuda:4 is wanted but this machine has 4 GPUs"):
        devices.choose_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device() == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert devices.choose_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="'mps' serves one process"):
        devices.choose_device("mps")


@pytest.mark.parametrize(
    ("saved", "units", "expected"),
    [
        (torch.bfloat16, {"avx512_vnni": True, "amx_bf16": False}, torch.float32),
        (torch.bfloat16, {"amx_bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"avx512_bf16": True}, torch.bfloat16),
        (torch.float16, {"amx_bf16": True, "avx512_fp16": True}, torch.float32),
        (torch.float16, {"amx_fp16": True}, torch.float16),
        (torch.float32, {"amx_bf16": True}, torch.float32),
    ],
)
def test_the_default_dtype_is_what_the_cpu_is_fast_in(monkeypatch, saved, units, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert devices.choose_dtype(None, torch.device("cpu"), saved) == expected
    assert devices.choose_dtype(None, torch.device("cuda"), saved) == saved
    assert devices.choose_dtype(None, torch.device("cpu"), saved, native=True) == saved
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert devices.choose_dtype(None, torch.device("cpu"), saved) == torch.float32


def test_hyperthreads_are_not_counted_as_cores(monkeypatch, tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    for allowed, count in [({0, 1, 2, 3}, 2), ({0, 2}, 1), ({3}, 1), ({0, 1, 9}, 3)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: allowed, raising=False)
        assert devices.cores(tmp_path) == count


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, 4),  # set by torchrun
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "3"}, None),  # set by the user
        ({"OMP_NUM_THREADS": "1"}, None),  # not started by torchrun
    ],
)
def test_ranks_share_the_cores(monkeypatch, environment, threads):
    for name in ("TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(devices, "processes", lambda: 2)
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    devices.use(torch.device("cpu"))
    assert chosen == ([] if threads is None else [threads])


def test_dtypes_by_name():
    for dtype in ("float16", torch.float16):
        assert devices.choose_dtype(dtype, torch.device("cpu"), torch.bfloat16) == torch.float16
    for dtype in ("int8", torch.int8, "half", 16):
        with pytest.raises(ValueError, match="is not supported; use one of float32, bfloat16, float16"):
            devices.choose_dtype(dtype, torch.device("cpu"), torch.bfloat16)


def test_work_in_threads_keeps_the_order_and_the_number_of_threads(two_threads):
    found = devices.in_threads(lambda n: (n, torch.get_num_threads()), range(20))
    assert found == [(n, 1) for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        devices.in_threads(lambda n: 1 / n, [1, 0])
    assert torch.get_num_threads() == 2


def test_the_number_of_threads_of_a_thread_that_starts_meanwhile(two_threads):
    """Regression: while another thread computed in one thread, a new one took 1 as the number, for all later threads
    too. So did models that two threads loaded at once."""
    found = []

    def number(_):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    with backends.single_threaded(SimpleNamespace(own_threads=True)):
        found += [torch.get_num_threads(), number(0)]
    found += [*devices.in_threads(number, range(2)), torch.get_num_threads(), number(0)]
    assert found == [1, 2, 2, 2, 2, 2]
