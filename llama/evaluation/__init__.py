"""Evaluation: this library as a model of lm-evaluation-harness."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .harness import HarnessModel as HarnessModel

__all__ = ["HarnessModel"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when first used, as it needs the extra `eval`
        from .harness import HarnessModel

        return HarnessModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
