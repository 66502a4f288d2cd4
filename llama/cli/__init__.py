"""python -m llama COMMAND: one file per command, and what the commands share."""

from importlib import import_module

from . import script

# Functions in modules of the same names.
COMMANDS = ("batch", "bench", "build", "chat", "compare", "convert", "eval", "inspect", "perplexity", "serve")


def main() -> None:
    """Run the command given on the command line; --help lists all commands."""
    script.run({name: getattr(import_module(f"{__name__}.{name}"), name) for name in COMMANDS})
