"""Compare the speed of this library and others on the same weights, measured in alternation.

    python benchmarks/compare.py transformers transformers-compiled llama.cpp --shape 110M --dtype float32

Takes the flags of `python -m llama bench`. Needs the extra `bench`.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from peers import PEERS

from llama import parallel
from llama.checkpoint import Checkpoint
from llama.cli import measure, script
from llama.cli.bench import prepare


def main(*peers: str, **flags: Any) -> None:
    """Measure this library and PEERS; takes the flags of `python -m llama bench`."""
    if unknown := [peer for peer in peers if peer not in PEERS]:
        raise ValueError(f"there is no {', '.join(map(str, unknown))}; known are {', '.join(PEERS)}")
    known = signature(prepare).parameters
    if other := [flag for flag in flags if flag not in known]:
        raise ValueError(f"there is no flag {', '.join(other)}; known are {', '.join(known)}")
    job = prepare(**flags)
    source = job[0]
    if peers and parallel.world_size() > 1:
        raise ValueError("other libraries are measured on one rank only")
    if peers and isinstance(weights := source.weights, Checkpoint) and weights.scheme:
        readers = {"llama.cpp"} if weights.layout == "gguf" else set()
        if {*peers} - readers:
            raise ValueError(f"{flags['ckpt_dir']} is quantized already, which {', '.join(peers)} cannot read")
    measure.bench(*job, {peer: PEERS[peer](source) for peer in peers})


if __name__ == "__main__":
    script.run(main)
