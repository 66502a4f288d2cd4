"""python -m llama COMMAND: one file a command, and what the commands share."""

from importlib import import_module

from . import script

COMMANDS = (
    "bench",
    "build",
    "chat",
    "convert",
    "inspect",
    "perplexity",
    "serve",
)  # functions in modules of the same names


def main() -> None:
    """Run the command that the command line names; --help lists them."""
    script.run({name: getattr(import_module(f"{__name__}.{name}"), name) for name in COMMANDS})
