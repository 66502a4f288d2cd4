"""python -m llama build: compile the CPU backend ahead of the first model."""

from __future__ import annotations

from ..backends import cpu


def build() -> None:
    """Compile native.cpp for this CPU, which else happens when a model of more than 50 MB is first loaded, and print
    the instruction set that it uses and its file."""
    made = cpu.cached()
    print(f"{cpu.load(made).llama_instructions().decode()}: {made}")
