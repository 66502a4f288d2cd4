"""Load the 1.1B shape (dim 2048, 22 layers, 32 heads, 4 kv heads, FFN 5632) in bfloat16 from the page cache, compared
with Hugging Face's from_pretrained on the same weights: seconds, and the peak memory of the whole process.

    python benchmarks/loading.py [--repeats 3] [--folder SOMEWHERE_WITH_5_GB]

Then the same weights, quantized to int8 while loading, from a checkpoint quantized to int4 with the rest in float32,
and from GGUF files with blocks of one type, all in the format that native.cpp uses.

Runs alternate, each in its own process. Each first touches as much memory as the weights take, in small and in huge
pages, and frees it: a virtual machine may wait seconds for memory from its host, and the second run would not. Needs
the extra `test` (transformers).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import torch
from common import CPU, random_folder

from llama import ModelArgs, devices, parallel
from llama.backends.quantized import scheme
from llama.checkpoint import Checkpoint, gguf, gguf_write, hf, shapes
from llama.checkpoint.convert import convert
from llama.cli.measure import SHAPES, Source, loaded
from llama.gguf import aligned, header_bytes

VOCAB = 32000
PARAMETERS = 1_100_048_384
BLOCKS = ("Q4_0", "Q4_K", "Q6_K", "Q8_0")
ROUNDED = ("int8", "int4", *BLOCKS)


def prepare(folder: Path) -> None:
    """The same random weights in both layouts, and in int4."""
    meta = random_folder(folder / "meta", "1.1B", torch.bfloat16)
    convert(meta, folder / "hf", "hf", 1, None)
    convert(meta, folder / "int4", "meta", 1, None, quantize="int4")


def write_blocks(folder: Path, kind: str) -> None:
    """A GGUF file with all matrices in blocks of one type; all blocks are equal."""
    args = ModelArgs(**SHAPES["1.1B"], vocab_size=VOCAB)
    keys = gguf_write.keys_of(args, gguf_write.BY_NAME["Q4_0"], None, kind)
    named = hf.names(args.n_layers, gguf.NAMES)
    kinds = {name: gguf_write.BY_NAME[kind if len(shape) > 1 else "F32"] for name, shape in shapes(args).items()}
    sizes = {name: (kinds[name], shape) for name, shape in shapes(args).items()}
    with (folder / f"{kind}.gguf").open("wb") as file:
        file.write(header_bytes(keys, {named[name]: entry for name, entry in sizes.items()}))
        for block, shape in sizes.values():
            file.write(b"\x11" * aligned(block.size(shape)))


def one(who: str, folder: str, dtype: str) -> None:
    """Load once; print time and memory."""
    quantized, blocks = dtype in ROUNDED, dtype in BLOCKS
    if not quantized:
        from transformers import LlamaForCausalLM

    final = getattr(torch, "bfloat16" if quantized else dtype)  # the default where C++ computes
    for new in (torch.empty, devices.zeros):  # a virtual machine gets memory when it first touches it
        new((PARAMETERS * final.itemsize,), dtype=torch.uint8).fill_(1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if who == "ours":
        parallel.init_model_parallel()
        began = time.perf_counter()
        saved = f"{dtype}.gguf" if blocks else "int4" if dtype == "int4" else "meta"
        checkpoint = Checkpoint(Path(folder) / saved)
        args = replace(checkpoint.args(VOCAB), max_batch_size=1, max_seq_len=1)
        rounding = checkpoint.scheme if blocks else scheme(dtype) if quantized else None
        final = checkpoint.dtype() if blocks else final
        model = loaded(Source(checkpoint, args, CPU, final, rounding), quantized)
    else:
        began = time.perf_counter()
        model = LlamaForCausalLM.from_pretrained(Path(folder) / "hf", dtype=final)
    # Every page is read: a mapped one would be read only then.
    total = sum(float(weight.detach().view(-1)[::1024].float().sum()) for weight in model.parameters())
    seconds = time.perf_counter() - began
    weights: list[Any] = [getattr(module, "weight", None) for module in model.modules()]
    own = sum(weight.nbytes for weight in weights if weight is not None)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": int(peak.split()[1]) * 1024, "own": own, "sum": round(total)}))


def main(repeats: int = 3, folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as root:
        prepare(Path(root))
        for kind in BLOCKS:
            write_blocks(Path(root), kind)
        print(f"torch {torch.__version__}; {repeats} repeats in turn; medians")
        for dtype in ("bfloat16", "float32", *ROUNDED):
            peers = [] if dtype in ROUNDED else ["hf"]
            runs: dict[str, list[dict[str, float]]] = {who: [] for who in ["ours", *peers]}
            for i in range(repeats + 1):
                for who, results in runs.items():
                    command = [sys.executable, __file__, "one", who, root, dtype]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    if i > 0:  # the first round fills the page cache
                        results.append(json.loads(done.stdout.splitlines()[-1]))
            for who, results in runs.items():
                seconds, peak = (statistics.median(r[key] for r in results) for key in ("seconds", "peak"))
                own = results[0]["own"]
                file = Path(root) / f"{dtype}.gguf"
                bound = file.stat().st_size * 1.30 + 300e6 if dtype in BLOCKS else own * 1.20 + 300e6
                print(f"{dtype:>9} {who:>5}: {seconds:.2f} s, peak {peak / 1e9:.2f} GB ({own / 1e9:.2f} GB of weights; "
                      f"bound {bound / 1e9:.2f} GB)")  # fmt: skip
            if not peers:
                continue
            pairs = zip(runs["ours"], runs["hf"], strict=True)
            print(f"{dtype:>9} ours / hf: {statistics.median(a['seconds'] / b['seconds'] for a, b in pairs):.2f}")


if __name__ == "__main__":
    fire.Fire({"one": one, "main": main}) if sys.argv[1:2] == ["one"] else fire.Fire(main)
