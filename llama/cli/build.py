"""python -m llama build: compile the CPU backend in advance."""

from __future__ import annotations

from ..backends import cpu


def build() -> None:
    """Compile native.cpp for this CPU in advance, and print the instruction set that it uses and the file. Otherwise it
    is compiled when a model of more than 50 MB is first loaded."""
    made = cpu.cached()
    print(f"{cpu.load(made).llama_instructions().decode()}: {made}")
