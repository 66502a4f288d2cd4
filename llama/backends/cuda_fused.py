"""What lies between two matmuls, written so that torch.compile makes one kernel of each; and how to have it compile."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


class compiled(Generic[P, R]):
    """A function that is compiled when it is first called, or, where that is impossible, called as it is."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function, self.failed = function, False
        self.call: Callable[P, R] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.failed:
            # Without checking again what every operation returns, which takes time in each step.
            self.call = self.call or torch.compile(self.function, options={"size_asserts": False})
            try:
                return self.call(*args, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # no compiler, no place for its files
                self.failed = True
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                log.warning("%s is not compiled, which is slower: %s", self.function.__qualname__, reason)
        return self.function(*args, **kwargs)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and its RMSNorm: divided by sqrt(|x + y|² + floor²), times the root of its size, times weight."""
    x = x + y
    scale = (x.float().square().sum(-1, keepdim=True) + floor.square()).rsqrt() * math.sqrt(x.shape[-1])
    return x, (x.float() * scale * weight).type_as(x)


def rope(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """RoPE of heads (B, heads, D) by complex numbers (B, 1, D/2, 2)."""
    a, b = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_sin.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(heads)


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


@compiled
def int8_rows(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (rows, in) times the transpose of q (out, in), int8, times scale (out, 1): each q is read once for all rows."""
    return ((x[:, None].float() * q.float()).sum(-1) * scale.float().t()).type_as(x)
