"""Time of whole processes: what `import llama` adds to `import torch`, the text example with the bundled model, and
`inspect` on checkpoints of published sizes (sparse files), with its peak memory.

python benchmarks/startup.py [--repeats 7]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from common import ROOT, alternate, spread

from llama import ModelArgs
from llama.checkpoint import shapes, shard_dim
from llama.cli.measure import SHAPES

THREE = {"n_kv_heads": 8, "rope_theta": 500000.0}
BIG = {**SHAPES["70B"], **THREE}
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {  # params.json, vocabulary, shards
    "7B": (SHAPES["7B"], 32000, 1),
    "70B": (SHAPES["70B"], 32000, 8),
    "Llama 3.2 1B": ({"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, **THREE}, 128256, 1),
    "Llama 3.1 8B": ({"ffn_dim_multiplier": 1.3, "multiple_of": 1024, **THREE}, 128256, 1),
    "Llama 3.1 70B": (BIG, 128256, 8),
    "Llama 3.1 405B": (
        {**BIG, "dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 16, "ffn_dim_multiplier": 1.2},
        *(128256, 16),
    ),
}


def write_headers(folder: Path, params: dict[str, Any], vocab_size: int, mp: int) -> None:
    """A checkpoint whose files have all headers and no data. They are sparse, so that 138 GB take no disk space."""
    folder.mkdir()
    defaults = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(defaults | params))
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
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, llama": [sys.executable, "-c", "import torch, llama"],
        "example_text_completion.py": [sys.executable, "example_text_completion.py"],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            write_headers(Path(folder, name), *size)
            commands[f"inspect, {name}"] = [sys.executable, "-m", "llama", "inspect", str(Path(folder, name))]
        measure(commands, repeats)


def measure(commands: dict[str, list[str]], repeats: int) -> None:
    peaks: dict[str, float] = {}

    def run(name: str) -> None:
        process = subprocess.Popen(commands[name], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{name} ended with {status}")
        peaks[name] = usage.ru_maxrss / 1e3

    times = alternate({name: partial(run, name) for name in commands}, repeats)
    print(f"{repeats} repeats in turn; seconds: median (min - max), peak memory")
    for name, seconds in times.items():
        print(f"{name:>27}: {spread(seconds)}, {peaks[name]:.0f} MB")
    pairs = zip(times["import torch, llama"], times["import torch"], strict=True)
    print(f"import llama adds {statistics.median(a - b for a, b in pairs):.2f} s")


if __name__ == "__main__":
    fire.Fire(main)
