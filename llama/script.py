"""The name that llama.cli.script had in the previous release. It goes with the next one."""

import warnings

from .cli.script import FORESEEN, keep_memory, one_line, readable_errors, run

__all__ = ["FORESEEN", "keep_memory", "one_line", "readable_errors", "run"]
warnings.warn("llama.script is now llama.cli.script", DeprecationWarning, stacklevel=2)
