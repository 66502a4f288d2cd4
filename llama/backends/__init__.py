"""How a forward pass is computed: by the model itself (plain), or by something faster that must equal it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch.nn.modules.module as hooks
from torch import Tensor, nn

from .. import layers
from ..batch import Batch
from ..model import Attention, FeedForward, KVCache, RMSNorm, Transformer, TransformerBlock


class Backend(Protocol):
    """The model itself is one: the plain backend, on any device, with all hooks and modules that a user gave it."""

    def hidden(self, batch: Batch) -> Tensor:
        """The last layer's output (N, dim), before the final norm, for a packed batch, whose keys and values are stored
        in its slots of the model's cache. The next call may overwrite it."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V) of rows (N, dim) of what `hidden` returned. The next call may overwrite them."""


def copy_slot(model: Transformer, source: int, target: int, length: int) -> None:
    """Give slot `target` of the cache the keys and values of the first `length` positions of slot `source`."""
    for cache in model.buffers():
        cache[target, :, :length] = cache[source, :, :length]


log = logging.getLogger(__name__)
OURS = {Transformer, TransformerBlock, Attention, FeedForward, KVCache, RMSNorm, nn.ModuleList}
OURS |= {layers.ColumnParallelLinear, layers.RowParallelLinear, layers.ParallelEmbedding}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def modules(model: nn.Module) -> list[nn.Module]:
    """All modules, in a fifth of the time that model.modules() takes, as an engine asks before each call."""
    found = [model]
    for module in found:
        found.extend(filter(None, vars(module)["_modules"].values()))
    return found


def customized(model: Transformer) -> bool:
    """Whether the model computes more than its weights say: modules have hooks, or a user replaced some. A backend
    that reads weights alone would skip that."""
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return True
    return any(
        type(module) not in OURS or "forward" in (has := vars(module)) or has[HOOKS[0]] or has[HOOKS[1]]
        for module in modules(model)
    )


def choose(model: Transformer, compile: bool = False) -> Backend:
    """The fastest backend for a model as it is: by its device, and by what this machine has. `compile` allows one that
    takes a C++ compiler."""
    device = model.norm.weight.device.type
    if customized(model) or not model.params.max_batch_size:
        return model
    try:  # a copy of this package may do without them, and Triton may be missing
        if device == "cuda":
            from . import cuda

            return cuda.backend(model)
        if device == "cpu" and compile:
            from . import cpu

            return cpu.backend(model)
    except ImportError as error:
        log.warning("the model itself computes, which is slower: %s", error)
    return model


def fingerprint(model: Transformer) -> object:
    """What changes when a backend must be chosen anew, or the cache no longer holds what this model would compute:
    modules, hooks, tensors that were replaced or written to, and `forward` calls, which write to the cache."""
    found: list[object] = [model.direct_calls, *hooks._global_forward_hooks, *hooks._global_forward_pre_hooks]
    for module in modules(model):
        has = vars(module)
        found += (id(module), type(module), "forward" in has, id(has.get("weight")), *has[HOOKS[0]], *has[HOOKS[1]])
        for weight in has["_parameters"].values():
            if weight is not None:
                found += (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        found += [buffer.data_ptr() for buffer in has["_buffers"].values()]
    return found


def not_finite(model: Transformer, batch: Batch) -> FloatingPointError:
    """The error that names the first layer that gives NaN or infinity when a batch is computed again."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: None if output.isfinite().all() else found.append(name)

    named: dict[str, nn.Module] = {"tok_embeddings": model.tok_embeddings, "norm": model.norm, "output": model.output}
    named |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    handles = [module.register_forward_hook(watch(name)) for name, module in named.items()]
    try:
        model.logits(model.hidden(batch)[-1:])
    finally:
        for handle in handles:
            handle.remove()
    where = f"the first layer to give such values is {found[0]}" if found else "computed again, they were not"
    return FloatingPointError(f"the logits are NaN or infinite; {where}")
