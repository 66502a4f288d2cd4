"""Whole processes: what `import llama` adds to `import torch`, and the text example on the bundled model.

python benchmarks/startup.py [--repeats 7]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import fire

ROOT = Path(__file__).parent.parent


def main(repeats: int = 7) -> None:
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, llama": [sys.executable, "-c", "import torch, llama"],
        "example_text_completion.py": [sys.executable, "example_text_completion.py"],
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
