"""The CPU backend: native.cpp for every instruction set that this machine has, its compilation, and when it is used."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import needs_cpp, relative_error

from llama.backends import cpu

pytestmark = pytest.mark.usefixtures("two_threads")
SELF_TEST = Path(__file__).with_name("native_self_test.cpp")
COMPILER = """#!/bin/sh
[ "$1" = --version ] && exit
echo "$@" >> "$0.log"
sleep 0.2
for last; do :; done
touch "$last"
"""
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
X86 = platform.machine() in ("x86_64", "AMD64")
ARM = ["aarch64-linux-gnu-g++", "-static", "-march=armv8.2-a+dotprod+bf16"]
BUILDS = {  # the compiler of the self-test, and the emulator that runs it
    "this CPU": (["g++", "-march=native"], []),
    "clang": (["clang++", "-march=native"], []),
    "AVX2": (["g++", "-mavx2", "-mfma", "-mf16c"], []),
    "SSE2": (["g++", "-msse2"], []),
    "addresses": (["g++", "-O1", "-mavx2", "-mfma", "-mf16c", "-fsanitize=address,undefined"], []),
    "threads": (["g++", "-O1", "-mavx2", "-mfma", "-mf16c", "-fsanitize=thread"], []),
    "ARM dotprod": (ARM, ["qemu-aarch64-static"]),
    "ARM": ([*ARM[:2], "-march=armv8-a"], ["qemu-aarch64-static"]),
}


def missing(build):
    """Why this machine cannot compile or run a build; None if it can."""
    compiler, runner = BUILDS[build]
    if not all(map(shutil.which, [compiler[0], *runner])) or (not X86 and any("-m" in flag for flag in compiler)):
        return f"needs {compiler[0]} and {runner}"
    return "needs AVX2" if "-mavx2" in compiler and "avx2" not in cpu.cpu_name() else None


@pytest.fixture(scope="module")
def self_tests(tmp_path_factory):
    """The self-test's builds, compiled in the background, two at a time."""
    folder = tmp_path_factory.mktemp("native")

    def compiled(build):
        compiler, made = BUILDS[build][0], folder / build.replace(" ", "_")
        flags = ["-std=c++17", "-O2", "-pthread", *compiler[1:]]
        subprocess.run([compiler[0], *flags, str(SELF_TEST), "-o", str(made)], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        yield {build: pool.submit(compiled, build) for build in BUILDS if not missing(build)}


@pytest.mark.parametrize("build", BUILDS)
def test_kernels_equal_loops_in_double_precision(build, self_tests):
    if why := missing(build):
        pytest.skip(why)
    done = subprocess.run([*BUILDS[build][1], self_tests[build].result()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_cpp
@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize(("out", "columns"), [(1, 80), (11, 80), (95, 2064)])
@pytest.mark.parametrize("rows", [1, 4, 9, 16, 21, 145])
def test_float_matmul(rows, out, columns, dtype, bound):
    x, w = torch.randn(rows, columns).to(dtype), torch.randn(out, columns).to(dtype)
    y = cpu.matmul(cpu.c_matrix(w), x)
    assert y.dtype == dtype
    assert relative_error(y.double(), F.linear(x.double(), w.double())) < bound


@needs_cpp
@pytest.mark.parametrize("rows", [4, 8, 9, 60])
def test_non_finite_values_stay_in_their_row_and_output(rows):
    x, w = torch.randn(rows, 48), torch.randn(24, 48)
    x[1, 3], w[2, 5] = torch.inf, torch.nan
    y = cpu.matmul(cpu.c_matrix(w), x)
    expected = torch.zeros(rows, 24, dtype=torch.bool)
    expected[1], expected[:, 2] = True, True
    assert torch.equal(~y.isfinite(), expected)


@needs_cpp
def test_float_matmul_of_strided_rows():
    w, x = torch.randn(24, 32), torch.randn(2, 1, 64)[..., 32:]
    assert relative_error(cpu.matmul(cpu.c_matrix(w), x), F.linear(x, w)) < 1e-6


def test_unsupported_matrices_are_left_to_pytorch():
    whole = torch.randn(8, 32)
    assert cpu.c_matrix(whole) and not cpu.c_matrix(whole[:, :24]) and not cpu.c_matrix(torch.randn(8, 24))
    assert not cpu.c_matrix(whole.double()) and not cpu.c_matrix(whole.t()[:16].t())


@needs_cpp
def test_concurrent_callers_and_a_changing_number_of_threads():
    w, x = torch.randn(640, 320), torch.randn(40, 320)
    expected, before = F.linear(x, w), torch.get_num_threads()

    def call(n):
        torch.set_num_threads(1 + n % 3)
        return relative_error(cpu.matmul(cpu.c_matrix(w), x), expected)

    try:
        with ThreadPoolExecutor(4) as pool:
            assert max(pool.map(call, range(200))) < 1e-5
    finally:
        torch.set_num_threads(before)


@needs_cpp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_its_own_thread_pool():
    code = """import os, torch; from llama.backends import cpu
w, x = torch.randn(640, 320), torch.randn(40, 320)
expected = cpu.matmul(cpu.c_matrix(w), x)
if os.fork():
    sys_exit = os.wait()[1]; cpu.matmul(cpu.c_matrix(w), x); os._exit(sys_exit >> 8)
os._exit(not torch.equal(cpu.matmul(cpu.c_matrix(w), x), expected))"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_containers_cpu_quota_limits_threads(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    for text, expected in (("max 100000", 64), ("150000 100000", 2), ("10000 100000", 1), ("", 64)):
        quota.write_text(text)
        found = cpu.cpu_quota.__wrapped__(quota)
        monkeypatch.setattr(cpu, "cpu_quota", lambda found=found: found)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        assert cpu.threads() == expected
        monkeypatch.undo()
    assert cpu.cpu_quota.__wrapped__(tmp_path / "none") == float("inf")


# Compiling


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A script in place of the compiler that logs its arguments."""
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_processes_that_start_together_compile_once(compiler, monkeypatch):
    with ThreadPoolExecutor(4) as pool:
        [made] = {*pool.map(lambda _: cpu.cached(), range(4))}
    log = compiler.with_suffix(".log")
    assert made.exists() and len(log.read_text().splitlines()) == 1
    monkeypatch.setattr(cpu, "cpu_name", lambda: "another")  # a home directory that two machines share
    assert cpu.cached() != made and made.exists() and len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'In file x:' >&2; echo 'x.cpp:3: fatal error: no math' >&2; exit 1", "x.cpp:3: fatal error: no math"),
        ("echo 'ld: final link failed: no space' >&2; echo 'error: ld' >&2; exit 1", "ld: final link failed: no space"),
        ("printf '\\377' >&2; exit 3", "compiler ended with 3"),
    ],
)
def test_a_failing_compiler_leaves_no_files_and_its_error_is_logged(script, why, compiler, caplog):
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    assert cpu.library.__wrapped__() is None
    assert caplog.messages[-1].startswith("the model itself computes, which is slower than compiled code: ")
    assert caplog.messages[-1].endswith(why)
    assert not [*compiler.parent.glob("cache/*/native*")]


@needs_cpp
def test_a_home_directory_without_write_permission(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(cpu, "FLAGS", [*cpu.FLAGS, "-O0"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu.tempfile, "tempdir", str(tmp_path))
    assert cpu.library.__wrapped__().llama_tile() > 0


@needs_cpp
def test_a_damaged_file_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", [*cpu.FLAGS, "-O0"])
    made = cpu.cached()
    made.write_bytes(made.read_bytes()[:1000])
    assert cpu.library.__wrapped__().llama_tile() > 0


def test_no_library_without_a_compiler(compiler, caplog):
    compiler.unlink()
    assert cpu.library.__wrapped__() is None
    assert caplog.messages == [
        f"the model itself computes, which is slower than compiled code: there is no {compiler}; install one, or name "
        "another in CXX"
    ]


def test_the_compiler_may_have_arguments(compiler, monkeypatch):
    monkeypatch.setenv("CXX", f"'{compiler}' -O1")
    cpu.cached()
    assert compiler.with_suffix(".log").read_text().startswith("-O1 -std=c++17")
