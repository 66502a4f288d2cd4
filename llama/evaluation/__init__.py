"""Evaluation: this library as a model of lm-evaluation-harness, and models side by side."""

from typing import TYPE_CHECKING, Any

from .comparison import compare

if TYPE_CHECKING:
    from .harness import HarnessModel

__all__ = ["HarnessModel", "compare"]


def __getattr__(name: str) -> Any:
    if name == "HarnessModel":  # imported when first used, as it needs the extra `eval`
        from .harness import HarnessModel

        return HarnessModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
