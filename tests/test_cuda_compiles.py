"""The CUDA backend's matmuls, compiled for a GPU without one: not all that Triton's interpreter accepts compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cuda_instructions.py"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_matmuls_compile_and_fit_a_threads_registers(bits):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--rows", "1,8,64", "--bits", str(bits)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(lines) == 9
    for *_, instructions, _, spills, shared in lines:
        assert 0 < float(instructions) < 9
        assert int(spills) < 10
        assert int(shared) < 227 * 1024
