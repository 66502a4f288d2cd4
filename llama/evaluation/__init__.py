"""Evaluation: this library as a model of lm-evaluation-harness, and models side by side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import compare as compare
    from .harness import HarnessModel as HarnessModel

__all__ = ["HarnessModel", "compare"]
MODULES = {"HarnessModel": "harness", "compare": "comparison"}  # imported when first used: one needs the extra `eval`


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
