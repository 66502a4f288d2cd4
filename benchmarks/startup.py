"""Whole processes: what `import llama` adds to `import torch`, the text example on the bundled model, and `inspect` on
the headers of 70B in 8 shards (sparse files).

python benchmarks/startup.py [--repeats 7]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import torch

from llama import ModelArgs
from llama.checkpoint import shapes, shard_dim
from llama.cli.measure import SHAPES

ROOT = Path(__file__).parent.parent


def write_headers(folder: Path, params: dict[str, Any], vocab_size: int, mp: int) -> None:
    """A checkpoint whose files have every header and no data: sparse, so that 138 GB take no space."""
    (folder / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-5, "vocab_size": -1}))
    whole = shapes(ModelArgs(**params, vocab_size=vocab_size))
    with torch.serialization.skip_data():
        for i in range(mp):
            parts = {name: list(shape) for name, shape in whole.items()}
            for name, shape in parts.items():
                if (dim := shard_dim(name)) is not None:
                    shape[dim] //= mp
            tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in parts.items()}
            torch.save(tensors, folder / f"consolidated.{i:02d}.pth")


def main(repeats: int = 7) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_headers(Path(folder), SHAPES["70B"], 1024, 8)
        measure(repeats, folder)


def measure(repeats: int, seventy: str) -> None:
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, llama": [sys.executable, "-c", "import torch, llama"],
        "example_text_completion.py": [sys.executable, "example_text_completion.py"],
        "llama inspect, 70B": [sys.executable, "-m", "llama", "inspect", seventy],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(repeats + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            if i > 0:  # the first round warms the disk's cache
                times[name].append(time.perf_counter() - began)
    print(f"{repeats} repeats in turn; seconds: median (min - max)")
    for name, seconds in times.items():
        print(f"{name:>27}: {statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})")
    pairs = zip(times["import torch, llama"], times["import torch"], strict=True)
    print(f"import llama adds {statistics.median(a - b for a, b in pairs):.2f} s")


if __name__ == "__main__":
    fire.Fire(main)
