"""How a forward pass is computed: by the model itself, the plain backend, or by a faster one that must equal it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.modules.module as hooks
from torch import Tensor, nn

from .. import devices, layers
from ..args import ModelArgs
from ..batch import Batch, groups
from ..model import Attention, FeedForward, KVCache, RMSNorm, Transformer, TransformerBlock

log = logging.getLogger(__name__)
OURS: set[type[nn.Module]] = {Transformer, TransformerBlock, Attention, FeedForward, KVCache, RMSNorm, nn.ModuleList}
OURS |= {layers.ColumnParallelLinear, layers.RowParallelLinear, layers.ReplicatedLinear, layers.ParallelEmbedding}
FORWARD = {module: module.forward for module in OURS}  # as imported: a user may assign another to the class
LARGE = 50e6  # bytes of weights above which native.cpp computes by default
HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # attributes of a module


class Backend(Protocol):
    """What the engine calls. The model itself is one: the plain backend, on any device, with the user's hooks."""

    def hidden(self, batch: Batch) -> Tensor:
        """The last layer's output (N, dim), before the final norm, for a packed batch. Stores its keys and values in
        its slots of the model's cache. Rows that are not needed, by `batch.outputs`, may be the last layer's input. The
        next call may overwrite the result."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V), or with a score head (N, n_labels), of rows (N, dim) that `hidden` returned. The next
        call may overwrite the result."""


def copy_slot(model: Transformer, source: int, target: int, length: int) -> None:
    """Copy the keys and values of the first `length` positions from slot `source` of the cache to slot `target`."""
    for cache in caches(model):
        cache.kv[target, :, :length] = cache.kv[source, :, :length]


class ForwardBackend:
    """For a Transformer with hooks of its own, or a user's `forward`: calls it with tokens (B, T), as a user would, and
    with a cache of B slots. `hidden` returns hidden states and logits side by side (N, dim + V)."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def hidden(self, batch: Batch) -> Tensor:
        whole, parts = [(cache, cache.kv) for cache in caches(self.model)], list[Tensor]()
        watch = self.model.norm.register_forward_pre_hook(lambda norm, args: parts.append(args[0].float()))
        try:
            for tokens, slots, T, S, _ in groups(batch):
                for cache, kv in whole:
                    cache.kv = kv[slots]
                logits = self.model(batch.tokens[tokens].view(-1, T), S - T).flatten(0, 1)
                parts.append(torch.cat((parts.pop(), logits), -1))
        finally:
            watch.remove()
            for cache, kv in whole:
                cache.kv = kv
        return torch.cat(parts)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.model.params.dim :]


def modules(model: nn.Module) -> list[nn.Module]:
    """model.modules() as a list, five times as fast: an engine asks for it before each call."""
    found = [model]
    for module in found:
        found.extend(filter(None, vars(module)["_modules"].values()))
    return found


def caches(model: nn.Module) -> list[KVCache]:
    """All KV caches of a model."""
    return [module for module in modules(model) if isinstance(module, KVCache)]


def changed(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether calling a module may do more than the library's class `kind` (by default the module's class) does: it has
    hooks, or another `forward`."""
    has, forward = vars(module), FORWARD.get(kind or type(module))
    return type(module).forward is not forward or "forward" in has or bool(has[HOOKS[0]] or has[HOOKS[1]])


def customized(model: Transformer) -> bool:
    """Whether a user's hooks or modules change what the model computes. A backend that only reads weights would skip
    them."""
    everywhere = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
    return bool(everywhere) or any(map(changed, modules(model)))


def native(
    args: ModelArgs, device: torch.device, weights: int, compile: bool | None = None, build: bool = True
) -> bool:
    """Whether native.cpp computes a model with `weights` bytes of weights: as `compile` says, by default if they are
    more than LARGE. Compiles it if necessary, unless `build` is false."""
    if device.type != "cpu" or not (weights > LARGE if compile is None else compile):
        return False
    try:
        from . import cpu
    except ImportError:
        return False
    return cpu.fits(args) and (cpu.library() is not None if build else cpu.has_compiler())


def choose(model: Transformer, compile: bool = False) -> Backend:
    """The fastest backend for a model on its device. `compile` allows the one for CPUs, which needs a C++ compiler."""
    if customized(model) or not model.params.max_batch_size:
        return ForwardBackend(model) if changed(model, Transformer) else model
    device = model.norm.weight.device.type
    try:  # these modules may have been removed, and Triton may be missing
        if device == "cuda":
            from . import cuda

            return cuda.Cuda(model)
        if device == "cpu" and compile:
            from . import cpu

            return cpu.backend(model)
    except ImportError as error:
        log.warning("the model itself computes, which is slower: %s", error)
    return model


def single_threaded(backend: Backend) -> AbstractContextManager[None]:
    """Run PyTorch's operations in one thread if the backend has threads of its own: OpenMP's threads spin for
    milliseconds before they sleep, on the cores that the next pass needs."""
    return devices.single_threaded() if getattr(backend, "own_threads", False) else nullcontext()


def fingerprint(model: Transformer) -> object:
    """A value that changes when the backend must be chosen anew, or the cache no longer holds what the model would
    compute: it covers modules, hooks, replaced or modified tensors, and `forward` calls, which write to the cache."""
    found: list[object] = [model.direct_calls, *hooks._global_forward_hooks, *hooks._global_forward_pre_hooks]
    for module in modules(model):
        has, kind = vars(module), type(module)
        found += (id(module), kind, kind.forward, "forward" in has, id(has.get("weight")))
        found += (*has[HOOKS[0]], *has[HOOKS[1]])
        for weight in has["_parameters"].values():
            if weight is not None:
                found += (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        found += [buffer.data_ptr() for buffer in has["_buffers"].values()]
    return found


def not_finite(model: Transformer, batch: Batch) -> FloatingPointError:
    """Compute a batch again; the error names the first layer whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: None if output.isfinite().all() else found.append(name)

    outside = ("tok_embeddings", "norm", "score" if model.params.n_labels else "output")
    named = {name: model.get_submodule(name) for name in outside}
    named |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    handles = [module.register_forward_hook(watch(name)) for name, module in named.items()]
    try:
        model.logits(model.hidden(batch)[-1:])
    finally:
        for handle in handles:
            handle.remove()
    where = f"the first layer to give such values is {found[0]}" if found else "computed again, they were not"
    return FloatingPointError(f"the logits are NaN or infinite; {where}")
