"""Requests in, tokens out: slots of the KV cache, scheduling, and the one loop of tokens.

The cache is `max_batch_size` slots of `max_seq_len` positions. A request waits for a slot, takes it, runs and leaves it
to the next (continuous batching). A step is one forward pass: one token of each request that decodes, with its draft
tokens, and chunks of the prompts of those that don't yet. A slot remembers the tokens whose keys and values it holds,
also when its request has left, and a new request goes on from the longest prefix that any slot shares with it.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import backends
from .backends import Backend
from .batch import Batch, Span
from .devices import own_context, to_device, to_host
from .model import Transformer
from .parallel import broadcast, broadcast_object, world_size
from .request import Event, Part, Request, choose
from .sampling import Sampler, top_logprobs

AHEAD = {"cuda"}  # devices on which a pass is launched before the host has read the tokens of the last one
CHUNK = 512  # tokens of a pass that also decodes: enough to be compute-bound, and one pass of native.cpp (cpu.PASS)
WORTH_SHARING = 32  # tokens of a prefix; fewer are computed again rather than copied or waited for


class Slot:
    """The cache of one sequence."""

    def __init__(self, index: int) -> None:
        self.index = index  # in the KV cache
        self.tokens: list[int] = []  # whose keys and values it holds
        self.request: Request | None = None
        self.used = 0  # the engine's clock when a request last left


class Pass(NamedTuple):
    """A forward pass that has been launched, with its samples."""

    parts: list[Part]
    ids: Tensor  # (M,) on the device, M the number of samples of all parts
    # Waits for the pass and gives: the M ids; the sum of the logits of each; the sum of the hidden states of each part
    # of a prompt, NaN if its observer failed (a sum is finite only if all its terms are); on several ranks, whether
    # rank 0 sends a second message. All in float32, which holds ids below 2^24 exactly.
    read: Callable[[], list[float]]
    logprobs: Callable[[], list[list[float]]] | None  # for each id a row of `top_logprobs`


class Engine:
    """Runs requests on one model. On one rank threads may call it concurrently: their requests share the passes.
    Several ranks submit the same requests in the same order, and what the first samples and cancels holds for all."""

    @staticmethod
    def of(model: Transformer, compile: bool = False) -> Engine:
        """The engine of a model: always the same one, as the model has one cache."""
        engine = _engines.get(id(model)) or Engine(model)
        engine.compile |= compile
        _engines[id(model)] = engine  # which keeps the model, and so its id
        return engine

    def __init__(self, model: Transformer) -> None:
        if not model.params.max_batch_size:
            raise ValueError("a model without a cache (max_batch_size 0) cannot generate")
        self.model, self.compile, self.lock = model, False, threading.Lock()
        self.slots = [Slot(i) for i in range(model.params.max_batch_size)]
        self.waiting: deque[Request] = deque()
        self.cancelled: deque[Request] = deque()  # on several ranks, those of rank 0 decide
        self.outbox: SimpleQueue[Any] = SimpleQueue()  # items that rank 0 sends to all ranks with the next step
        self.received: list[Any] = []  # items of the last steps, on every rank
        self.ahead: Pass | None = None  # launched, but not read yet
        self.broken = False  # this rank is out of step with the others
        self.ids = itertools.count()  # of requests
        self.clock = itertools.count(1)  # for `Slot.used`
        # Set by `_renew`:
        self.state: object = None  # the fingerprint of the model that the backend was chosen for
        self.device = next(model.parameters()).device
        self.backend: Backend = model
        self.sampler = Sampler(0, 0, "cpu")
        self.shares = True  # requests reuse prefixes

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("a running model is not pickled or copied alone; call Llama.build in the process that needs it")

    def submit(self, *requests: Request) -> None:
        """Queue requests."""
        for request in requests:
            request.id = next(self.ids)
            if len(request.prompt) >= request.max_len and not request.observe:
                self._end(request, "length")
            else:
                self.waiting.append(request)

    def cancel(self, *requests: Request) -> None:
        """End requests, with the next step. On several ranks this steps until they have ended: rank 0 decides when."""
        self.cancelled.extend(request for request in requests if not request.finish_reason)
        if world_size() > 1 and not self.broken and self.lock.acquire(blocking=False):
            try:
                while not all(request.finish_reason for request in requests):
                    self.step()
            finally:
                self.lock.release()

    def run(self, requests: Sequence[Request]) -> Generator[list[Event], None, None]:
        """Submit requests, then yield their events step by step until all have ended. Closing this generator cancels
        them. Raises FloatingPointError, naming the first layer that was not finite, for a request whose logits are not.
        """
        outputs: deque[Event] = deque()
        for row, request in enumerate(requests):
            request.row, request.outputs = row, outputs
        left = len(requests)
        try:
            self.submit(*requests)
            while left:
                # The step of another thread may add events too.
                if not outputs and self.lock.acquire(timeout=0.005):
                    try:
                        if not outputs:
                            self.step()
                    finally:
                        self.lock.release()
                found = [outputs.popleft() for _ in range(len(outputs))]
                for event in found:
                    left -= event.finish_reason is not None
                    if error := requests[event.row].error:
                        raise error
                if found := [event for event in found if event.finish_reason != "cancelled"]:
                    yield sorted(found, key=lambda event: event.row)
        finally:
            self.cancel(*requests)

    @own_context()
    def step(self) -> None:
        """One pass: a token, and draft tokens, of each running request, and chunks of prompts. It adds events to the
        requests' `outputs`. Hold `lock` where several threads use the engine."""
        if self.broken:
            raise RuntimeError("an earlier call failed on this rank and left the others behind; start the job again")
        try:
            current = self.ahead or self._launch(*self._schedule())
            if current is not None:
                self.ahead = self._launch(*self._following(current))
                self._read(current)
        except BaseException as error:  # nobody knows what the cache holds
            # If no request runs, those that wait would fail again in every step.
            failed = self._running() or [*self.waiting]
            self._reset(failed, f"a pass shared with another call failed: {type(error).__name__}: {error}")
            raise

    def forget(self) -> None:
        """Never reuse what the cache holds now as a prefix."""
        for slot in self.slots:
            if slot.request is None:
                slot.tokens = []

    # -----------------------------------------------------------------------------------------------------------------
    # What a pass computes

    def _schedule(self) -> tuple[list[Part], Tensor]:
        """The parts of the next pass, and their tokens (N,)."""
        if world_size() == 1:
            self._drop([self.cancelled.popleft() for _ in range(len(self.cancelled))])
        if not self._running():
            self._renew()
        self._admit()
        running, parts = self._running(), list[Part]()
        stored = {request: len(self.slots[request.slot].tokens) for request in running}
        decoding = {request for request in running if stored[request] >= len(request.prompt)}
        beside = max(CHUNK - len(decoding), CHUNK // 4 + 1)  # prompts advance, however many requests decode
        budget = beside if decoding else sum(len(request.ids) for request in running)
        for request in running:  # in the order in which they came
            start, known = stored[request], len(request.ids)
            draft: list[int] = []
            if request in decoding:
                draft = request.drafts.draft(request.ids)[: request.max_len - known - 1]
                length = 1 + len(draft)
            else:
                length = min(known - start, budget)
                budget -= length
            samples = 1 + len(draft) if start + length >= known and known < request.max_len else 0
            if length:
                parts.append(Part(request, start, length, draft, samples))
        parts.sort(key=lambda part: part.request.slot)  # neighbours may attend in one operation
        tokens = [id for part in parts for id in [*part.request.ids[part.start : part.end], *part.draft]]
        return parts, to_device(tokens, self.device)

    def _following(self, current: Pass) -> tuple[list[Part], Tensor]:
        """The parts and tokens of the pass after `current`, whose sampled tokens the host has not read yet. No parts
        unless all requests decode without drafts, and none is admitted or cancelled."""
        running = self._running()
        cancels = world_size() == 1 and self.cancelled
        admits = self.waiting and len(running) < len(self.slots)
        if self.device.type not in AHEAD or cancels or admits:
            return [], current.ids
        alive = [(i, part) for i, part in enumerate(current.parts) if not part.request.finish_reason]
        simple = all(part.samples == 1 and not part.request.needs_tokens for part in current.parts)
        if not simple or len(running) != len(alive):
            return [], current.ids
        going = [(i, part) for i, part in alive if part.end + 1 < part.request.max_len]
        parts = [Part(part.request, part.end, 1, samples=1) for _, part in going]
        if len(going) == len(current.parts):
            return parts, current.ids
        return parts, current.ids[to_device([i for i, _ in going], self.device, torch.long)]

    def _running(self) -> list[Request]:
        """In the order in which they came."""
        return sorted((slot.request for slot in self.slots if slot.request), key=lambda request: request.id)

    def _renew(self) -> None:
        """If the model has changed since the last call: choose a backend anew and forget what the cache holds."""
        state = backends.fingerprint(self.model), self.compile
        if state != self.state:
            self.device = next(self.model.parameters()).device
            self.backend = backends.choose(self.model, self.compile)
            self.state = backends.fingerprint(self.model), self.compile  # a backend may move weights
            self.sampler = Sampler(len(self.slots), self.model.vocab_size, self.device)
            # Hooks see every token, so that no prefix is reused.
            self.shares = not backends.customized(self.model)
            self.forget()

    def _admit(self) -> None:
        """Give waiting requests the slots that are free."""
        if all(slot.request for slot in self.slots):
            return
        for request in [*self.waiting]:
            free = [slot for slot in self.slots if slot.request is None]
            if not free:
                return
            prefix = list(request.prompt[: request.compute_from]) if self.shares else []
            shared = {slot: common(slot.tokens, prefix) for slot in self.slots}
            source = max(self.slots, key=lambda slot: (shared[slot], slot.request is None))
            prompts = [slot.request.prompt for slot in self.slots if slot.request]
            if max((common(prompt, prefix) for prompt in prompts), default=0) - shared[source] >= WORTH_SHARING:
                continue  # a running request computes more of this prefix: wait for it
            # Take the slot that shares most, unless that would forget much that another request may share.
            target = source
            if source.request or shared[source] < len(source.tokens) // 2:
                target = min(free, key=lambda slot: (slot is source, bool(slot.tokens), slot.used))
            length = shared[target]
            if target is not source and shared[source] >= length + WORTH_SHARING:
                length = shared[source]
                backends.copy_slot(self.model, source.index, target.index, length)
            target.tokens = prefix[:length]
            target.request, request.slot, request.cached = request, target.index, length
            self.waiting.remove(request)
            self.sampler.admit(request.slot, request.sampling, request.prompt)

    # -----------------------------------------------------------------------------------------------------------------
    # A pass

    def _launch(self, parts: list[Part], tokens: Tensor) -> Pass | None:
        """Start a pass over parts with their tokens (N,); None without parts."""
        if not parts:
            return None
        spans = [Span(part.request.slot, part.start, part.length) for part in parts]
        outputs = [part.length if part.of_prompt and part.request.observe else part.samples for part in parts]
        return self._sample(parts, self.backend.hidden(Batch.arrange(tokens, spans, outputs)))

    def _sample(self, parts: list[Part], hidden: Tensor) -> Pass:
        """Sample from hidden states (N, dim). This does not wait for a GPU, unless a request has an observer."""
        at, index, prompts = 0, list[int](), list[Tensor]()
        for part in parts:
            if part.of_prompt:
                states, observe = hidden[at : at + part.length], part.request.observe
                finite = observe is None or observe(states, part.start, self.backend.logits)
                prompts.append(states if finite else states * math.nan)
            at += part.length
            index += range(at - part.samples, at)
        logprobs = None
        ids = sums = torch.empty(0, dtype=torch.long, device=hidden.device)
        with backends.single_threaded(self.backend):
            prompt_sums = [states.sum(dtype=torch.float32).view(1) for states in prompts]
            if index:
                last = hidden if len(index) == len(hidden) else hidden[to_device(index, hidden.device)]
                logits = self.backend.logits(last)
                ids = choose(logits, [part for part in parts if part.samples], self.sampler)
                sums = logits.sum(-1)
            message = [ids.float(), sums, *prompt_sums]
            if world_size() > 1:
                more = to_device([len(self.cancelled) > 0 or not self.outbox.empty()], hidden.device)
                message = [broadcast(torch.cat((*message, more)))]
                ids = message[0][: len(index)].long()
            if index and any(part.request.logprobs for part in parts):
                logprobs = to_host(top_logprobs(logits, ids, max(part.request.top_logprobs for part in parts)))
        return Pass(parts, ids, to_host(*message), logprobs)

    def _read(self, current: Pass) -> None:
        """Wait for the tokens of a pass, and add them to the requests."""
        values, M, at = current.read(), len(current.ids), 0
        if world_size() > 1 and values.pop():
            cancelled = [self.cancelled.popleft().id for _ in range(len(self.cancelled))]
            cancelled, items = broadcast_object((cancelled, [self.outbox.get() for _ in range(self.outbox.qsize())]))
            self.received += items
            self._drop([request for request in [*self._running(), *self.waiting] if request.id in cancelled])
        ids, sums, prompt_sums = values[:M], values[M : 2 * M], iter(values[2 * M :])
        logprobs = current.logprobs() if current.logprobs else [[]] * M
        for part in current.parts:
            request, begin, at = part.request, at, at + part.samples
            finite = not part.of_prompt or math.isfinite(next(prompt_sums))
            if request.finish_reason:  # it ended in the pass before, after this one was launched
                continue
            if not finite or not self._take(part, ids[begin:at], sums[begin:at]):
                self._fail(request)
                continue
            taken = request.ids[part.known :] if part.samples else []
            if not part.samples and len(request.ids) == len(self.slots[request.slot].tokens) >= request.max_len:
                request.finish_reason = "length"
            if request.finish_reason:
                self._leave(request)
            if taken or request.finish_reason:
                request.emit(taken, logprobs[begin : begin + len(taken)] if request.logprobs else [])

    def _take(self, part: Part, ids: Sequence[float], sums: Sequence[float]) -> bool:
        """Add sampled ids to a request, up to the first that differs from its draft. Returns whether the logits of all
        that were added are finite."""
        request, slot, accepted = part.request, self.slots[part.request.slot], 0
        for id, logit_sum, drafted in zip(map(int, ids), sums, [*part.draft, -1], strict=False):
            if not math.isfinite(logit_sum):
                return False
            request.take(id)
            if request.finish_reason or id != drafted:
                break
            accepted += 1
        if part.draft:
            request.drafts.accepted(accepted)
        slot.tokens += request.ids[len(slot.tokens) : part.known + accepted]
        return True

    def _leave(self, request: Request) -> None:
        self.slots[request.slot].request, self.slots[request.slot].used = None, next(self.clock)

    def _end(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """End a request that is new, waits or runs, with an event of its own."""
        request.finish_reason, request.error = reason, error
        if request in self.waiting:
            self.waiting.remove(request)
        elif request.slot >= 0:
            self._leave(request)
        request.emit()

    def _drop(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.finish_reason:
                self._end(request, "cancelled")

    def _fail(self, request: Request) -> None:
        """End a request whose logits or hidden states are not finite. Others go on."""
        again = Batch.of([(request.slot, 0, request.ids)], self.device)
        self._end(request, "error", backends.not_finite(self.model, again))
        self.slots[request.slot].tokens = []
        for cache in backends.caches(self.model):  # a masked NaN is still NaN times 0: it would break the next request
            cache.kv[request.slot] = 0

    def _reset(self, requests: Sequence[Request], why: str) -> None:
        """End requests with an error, and forget what the cache holds."""
        self.ahead, self.state = None, None
        self.broken = world_size() > 1
        for slot in self.slots:
            slot.tokens, slot.request = [], None
        for request in requests:
            self._end(request, "error", RuntimeError(why))


_engines: WeakValueDictionary[int, Engine] = WeakValueDictionary()


def _forked() -> None:
    """In a child of os.fork, which has none of its parent's other threads: not those that hold locks or read streams,
    and not OpenMP's, for which PyTorch would wait. So the child computes on one thread."""
    for engine in [*_engines.values()]:
        torch.set_num_threads(1)
        engine.lock, requests = threading.Lock(), [*engine._running(), *engine.waiting]
        engine._reset(requests, "the process was forked, and this stream is its parent's")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix, by bisection: comparing slices is faster than a loop."""
    low, high = 0, min(len(a), len(b)) + 1  # the first `low` are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
