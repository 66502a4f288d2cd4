"""Ranks: the processes that share a model (tensor parallelism), and how they exchange tensors and errors.

One process needs no launcher, no environment variables and no network. Several are started by torchrun; the global rank
chooses the shard of the weights, the local rank chooses the GPU.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, ParamSpec, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist

T = TypeVar("T")
P = ParamSpec("P")
Exchange = Callable[[torch.Tensor], torch.Tensor]

open_streams: WeakSet[Any] = WeakSet()  # closed at exit, before the ranks leave their group
_store: dist.Store | None = None  # see `store`
_joined: Any = None  # the default group, if this module made it and not the caller


class Ranks(NamedTuple):
    """The processes that share a model."""

    size: int = 1
    rank: int = 0  # of this process, among them
    first: int = 0  # the global rank of rank 0
    group: Any = None  # their process group; None for one process
    world: Any = None  # the default group that `group` is a part of


UNKNOWN = Ranks()
_ranks = UNKNOWN


def init_model_parallel(model_parallel_size: int | None = None) -> None:
    """Find the ranks that share a model: all that torchrun has started, or `model_parallel_size` consecutive ones.
    Several get a process group of their own; the default group is created unless the caller has one. A single rank does
    not use torch.distributed. ValueError if `model_parallel_size` does not divide the ranks. Calling it again is free.
    """
    global _ranks, _joined
    if _ranks.group and _ranks.world is not dist.group.WORLD:
        _ranks = UNKNOWN  # whoever made the default group has destroyed it
    if model_parallel_size is None and _ranks is not UNKNOWN:
        return
    world = processes()
    size = world if model_parallel_size is None else model_parallel_size
    if type(size) is not int or size < 1 or world % size:
        raise ValueError(
            f"model_parallel_size {size!r} does not fit {world} running rank(s); start with "
            f"torchrun --nproc_per_node {size}"
        )
    if _ranks is not UNKNOWN and size != _ranks.size:
        raise ValueError(f"model_parallel_size {size} differs from {_ranks.size}, which this process already uses")
    if size == 1:
        _ranks = Ranks()
    if size == _ranks.size:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=store(), rank=int(os.environ["RANK"]), world_size=world)
        _joined = dist.group.WORLD
    for first in range(0, world, size):
        group = dist.new_group([*range(first, first + size)], backend=backend)
        if 0 <= dist.get_rank() - first < size:
            _ranks = Ranks(size, dist.get_rank() - first, first, group, dist.group.WORLD)


@atexit.register
def _leave() -> None:
    global _ranks, _joined
    for stream in [*open_streams]:
        with suppress(ValueError, RuntimeError):  # another thread is reading it, or its ranks have left
            stream.close()
    # A gloo thread that still holds a tensor after Python's end aborts the process: measured, one exit in five with a
    # broadcast just before it. After an error the other ranks may not answer, and destroying NCCL's groups would wait.
    if _ranks.group and not hasattr(sys, "last_value"):
        if _ranks.world is dist.group.WORLD:
            dist.destroy_process_group(None if _joined is _ranks.world else _ranks.group)
        _ranks, _joined = UNKNOWN, None  # a group ends only when nothing refers to it


def _forked() -> None:
    """In a child of os.fork, which must not use its parent's group."""
    global _ranks
    open_streams.clear()
    if _ranks.group:
        _ranks = _ranks._replace(world=None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def processes() -> int:
    """The number of processes of the job, whether or not they share a model."""
    return dist.get_world_size() if dist.is_initialized() else launched()


def launched() -> int:
    """The number of processes that torchrun has started, by its environment variables; 1 without them."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 1
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit; start with torchrun")
    return int(world)


def world_size() -> int:
    """The number of ranks that share one model."""
    return _ranks.size


def rank() -> int:
    """This process's rank among those that share the model: the index of its shard."""
    return _ranks.rank


def replica() -> tuple[int, int]:
    """The index of this process's replica of the model, and the number of replicas."""
    this = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"]) if launched() > 1 else 0
    return this // world_size(), processes() // world_size()


def store() -> dist.Store:
    """A key-value store of all processes, whether or not they share a model; a new one for a single process."""
    global _store
    if launched() == 1:
        return dist.HashStore()
    _store = _store or next(dist.rendezvous("env://"))[0]
    return _store


def divide(value: int, name: str) -> int:
    """`value` / world_size(). ValueError, with `name`, if that is not an integer."""
    if value % world_size():
        raise ValueError(f"{name} {value} cannot be divided among {world_size()} ranks")
    return value // world_size()


# ---------------------------------------------------------------------------------------------------------------------
# Communication of ranks


def _group() -> Any:
    """The process group of the model's ranks. RuntimeError if it was destroyed."""
    if _ranks.world is not dist.group.WORLD:
        raise RuntimeError("the ranks' process group was destroyed, or is that of the process this one was forked from")
    return _ranks.group


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Broadcast a tensor from the model's first rank, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, _ranks.first, group=_group())
    return tensor


def broadcast_object(value: T) -> T:
    """Broadcast a value from the model's first rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, _ranks.first, group=_group())
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The values of all ranks of the model, in the order of ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=_group())
    return values


class _Exchange(torch.autograd.Function):
    """forward(tensor), whose gradient is backward(gradient)."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, forward: Exchange, backward: Exchange) -> torch.Tensor:
        ctx.exchange = backward
        return forward(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.exchange(gradient.clone()), None, None


def _exchange(tensor: torch.Tensor, forward: Exchange, backward: Exchange) -> torch.Tensor:
    if world_size() == 1:
        return tensor
    differentiable = torch.is_grad_enabled() and tensor.requires_grad
    return _Exchange.apply(tensor, forward, backward) if differentiable else forward(tensor)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=_group())
    return tensor


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor, group=_group())
    return torch.cat(parts, -1)


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' tensors."""
    return _exchange(tensor, _sum, _same)


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The ranks' tensors joined along the last dimension, in the order of ranks."""
    return _exchange(tensor, _gather, lambda gradient: gradient.chunk(world_size(), -1)[rank()])


def replicated(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, whose gradients on the ranks are summed: each rank computes something else from it."""
    return _exchange(tensor, _same, _sum)


def as_first_rank(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a method to be called on every rank with the arguments of the model's first rank, so that all do the
    same. Functions, which must be keyword arguments, are not sent: see `ask_first_rank`."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        myself, *request = args
        functions = {name: value for name, value in kwargs.items() if callable(value)}
        plain = {name: None if name in functions else value for name, value in kwargs.items()}
        request, plain, asked = ask_first_rank(lambda: (request, plain, [*functions]))
        plain |= {name: functions.get(name, str) for name in asked}
        return method(myself, *request, **plain)  # type: ignore[arg-type]

    return call


def ask_first_rank(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the model's first rank, and return its result on all ranks. If it raises, or its result cannot
    be pickled, the other ranks raise RankError."""
    if world_size() == 1:
        return function(*args, **kwargs)
    answer, error = b"", None
    if rank() == 0:
        try:
            answer = pickle.dumps(function(*args, **kwargs))
        except BaseException as raised:  # of any kind, as the others wait for a message
            error = raised
    answer, message = broadcast_object((answer, error and f"rank 0: {type(error).__name__}: {error}"))
    if error:
        raise error
    if message:
        raise RankError(message)
    value: T = pickle.loads(answer)
    return value


class RankError(RuntimeError):
    """Another rank failed; the message begins with its number."""


@contextmanager
def all_or_none() -> Iterator[None]:
    """Run a block that may fail on one rank alone, such as reading its own file: if it fails on any rank, all raise, so
    that none waits for a message that never comes."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise RankError(f"rank {number}: {message}")


def first_to_fail() -> bool:
    """Whether no rank has called this before. In a job of several ranks, the others fail because of the first, so only
    the first should print its error."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # PyTorch writes a page to stderr, in C++, if the process with the store has ended
    try:
        return store().add("llama/failed", 1) == 1
    except (RuntimeError, ValueError):
        return True
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
