"""What lies between two products, each as one kernel: for GPUs, where every kernel costs microseconds of its own.

`torch.compile` makes the kernels, of these few functions alone, so that it takes seconds. Each has a plain twin
elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


class compiled(Generic[P, R]):
    """A function that is compiled when it is first called, or, where that is impossible, called as it is."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.call: Any = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return self.function(*args, **kwargs)
        self.call = self.call or torch.compile(self.function)
        if self.call is not self.function:
            try:
                found: R = self.call(*args, **kwargs)
                return found
            except Exception as error:  # a missing compiler, an unknown device: there is no end to what it may be
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                log.warning("%s is not compiled, which is slower: %s", self.function.__name__, reason)
                self.call = self.function
        return self.function(*args, **kwargs)


def opaque(schema: str, result: Callable[P, Tensor]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """A decorator: torch.compile calls the function as it is, knowing no more of it than its `schema` and an empty
    `result`. For torch's operators of a kind whose weights it would have as constants."""

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        name = f"llama::{function.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "default", function)
        torch.library.register_fake(name, result)
        operator = getattr(torch.ops.llama, function.__name__)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            found: Tensor = (operator if torch.compiler.is_compiling() else function)(*args, **kwargs)
            return found

        return call

    return decorate


@compiled
def add_norm(x: Tensor, y: Tensor, weight: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and that divided by its length, at least `floor`, times weight. RMSNorm of the residual stream."""
    x = x + y
    scale = (x.float().square().sum(-1, keepdim=True) + floor.square()).rsqrt()
    return x, (x.float() * scale * weight).type_as(x)


@compiled
def turn(heads: Tensor, turns: Tensor) -> Tensor:
    """Pairs of neighbours in heads (B, heads, D) times complex numbers (B, heads, D/2, 2). Rotary embedding."""
    a, b = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(heads)


@compiled
def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


@compiled
def int8_rows(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (rows, in) times the transpose of q (out, in), int8, times scale (out, 1): each q is read once for all rows."""
    return ((x[:, None].float() * q.float()).sum(-1) * scale.float().t()).type_as(x)
