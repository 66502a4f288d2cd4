"""The engine's loop: each iteration submits new requests, which all ranks have received, runs a step and returns its
results.

It runs in the main thread of every rank; HTTP runs in another thread of the first rank.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import queue
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..generation import Llama
from ..parallel import broadcast_object, rank, world_size
from ..request import Event, Request
from ..scoring import to_pool
from ..stream import refused
from .metrics import Metrics
from .schema import ApiError, Work

log = logging.getLogger("llama.server")
Item = tuple[int, "Work | None"] | None  # a ticket's number with its Work, or with None to cancel it; None: the end
Inbox = queue.SimpleQueue[Item]
IDLE = 5.0  # seconds between messages to idle ranks; they show that all ranks are alive (gloo's timeout is 30 minutes)
KEEPALIVE = 15.0  # seconds between comments in a stream, so that proxies do not close it
# Finish reasons of events -> of the API and of metrics; the last two occur in metrics only.
REASONS = {None: None, "eos": "stop", "stop": "stop", "length": "length", "refused": "content_filter"}
REASONS |= {"cancelled": "abort", "error": "error"}


@dataclass
class Times:
    """When a request got its slot, its first token and its latest token; 0 if it has not happened yet."""

    admitted: float = 0.0
    first: float = 0.0
    latest: float = 0.0
    counted: bool = False  # whether the metrics include the prompt


class Job:
    """The engine's requests for a Work, one for each prompt."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.requests: list[Request] = []  # set before the first event
        self.embeddings: Tensor | None = None  # complete with the last event

    def submit(self, llama: Llama) -> None:
        """Submit the requests. Only the first rank keeps all events in their `outputs`."""
        work = self.work
        if work.settings:
            options = work.logprobs, work.echo, work.continues, work.top_logprobs
            self.requests = llama.inputs.requests(work.prompts, work.settings, *options)
        else:
            self.requests, self.embeddings = to_pool(llama.engine, work.prompts, "mean")
        for row, request in enumerate(self.requests):
            request.row, request.outputs = row, deque(maxlen=1 if rank() else None)
        llama.engine.submit(*self.requests)

    @property
    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if not request.finish_reason]

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens, in OpenAI's format. A prompt counts once, whatever n is."""
        prompt = sum(map(len, self.work.prompts[:: self.work.n]))
        new = sum(len(request.ids) - len(request.prompt) for request in self.requests)
        cached = sum(request.cached for request in self.requests[:: self.work.n])
        counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}

    def check(self, event: Event) -> None:
        """Raise ApiError if the event's request has failed."""
        if event.finish_reason == "error":
            error = self.requests[event.row].error
            # ValueError: options that contradict each other, such as a logit_bias that excludes all of a grammar.
            raise ApiError(400 if isinstance(error, ValueError) else 500, str(error))


class Ticket(Job):
    """The job of an HTTP request. The engine's thread sets the attributes of `Job`, `began`, `late` and
    `Times.admitted`; the event loop's thread sets the others."""

    def __init__(self, number: int, work: Work, inbox: Inbox) -> None:
        super().__init__(work)
        self.number, self.inbox, self.arrived = number, inbox, time.monotonic()
        self.updates: asyncio.Queue[list[Event]] = asyncio.Queue()
        self.times = [Times() for _ in work.prompts]
        self.began = 0.0  # when it got its first slot; 0 before
        self.late = ""  # the error message, once a time limit has ended it
        self.started = asyncio.Event()  # a request has taken a slot or has ended
        self.open = len(work.prompts)  # requests that have not ended

    async def events(self) -> AsyncIterator[Event | None]:
        """The events of all requests, and None every KEEPALIVE seconds. ApiError if a request has failed."""
        beats = asyncio.create_task(self._beat())  # a timeout for each event would cost more than the event
        try:
            while self.open or not self.updates.empty():
                events = await self.updates.get()
                for event in events:
                    self.check(event)
                    yield event
                if not events:
                    yield None
        finally:
            beats.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE)
            self.updates.put_nowait([])

    def check(self, event: Event) -> None:
        super().check(event)
        if event.finish_reason == "cancelled":
            raise self.cancelled()

    def cancel(self) -> None:
        """Cancel the requests that have not ended."""
        if self.open:
            self.inbox.put((self.number, None))

    def log_fields(self) -> dict[str, Any]:
        usage, first = self.usage(), min((times.first for times in self.times if times.first), default=None)
        return {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "first_token_seconds": round(first - self.arrived, 4) if first else None,
        }

    def cancelled(self) -> ApiError:
        return ApiError(503, self.late or "the request was cancelled", retry_after=1)


class Loop:
    """`max_wait` limits the seconds that an HTTP request waits for its first slot, `max_time` the seconds that it then
    runs."""

    def __init__(self, llama: Llama, metrics: Metrics, max_wait: float = math.inf, max_time: float = math.inf) -> None:
        self.llama, self.metrics, self.max_wait, self.max_time = llama, metrics, max_wait, max_time
        self.inbox = llama.engine.outbox = Inbox()
        self.numbers = itertools.count()
        self.tickets: dict[int, Ticket] = {}  # on the first rank

    # -----------------------------------------------------------------------------------------------------------------
    # In the event loop's thread

    @property
    def open(self) -> int:
        """The number of requests that have been submitted and have not ended."""
        return sum(ticket.open for ticket in self.tickets.values())

    def submit(self, work: Work) -> Ticket:
        self.event_loop = asyncio.get_running_loop()
        ticket = Ticket(next(self.numbers), work, self.inbox)
        self.tickets[ticket.number] = ticket
        self.inbox.put((ticket.number, work))
        return ticket

    def refuse(self, work: Work, text: str) -> Ticket:
        """A ticket whose answers are all `text`, without the engine."""
        ticket = Ticket(next(self.numbers), work, self.inbox)
        ticket.requests, ticket.open = [Request(prompt, len(prompt)) for prompt in work.prompts], 0
        ticket.updates.put_nowait([refused(row, text) for row in range(len(work.prompts))])
        ticket.started.set()
        self.metrics.add("request_success_total", len(work.prompts), finished_reason="content_filter")
        return ticket

    def gauges(self) -> dict[str, float]:
        slots = self.llama.engine.slots
        running = [slot for slot in slots if slot.request is not None]
        used = sum(len(slot.tokens) for slot in running)
        return {
            "num_requests_running": len(running),
            "num_requests_waiting": max(0, self.open - len(running)),
            "kv_cache_usage_perc": used / (len(slots) * self.llama.model.params.max_seq_len),
        }

    def stop(self) -> None:
        """End `run`, on all ranks. From any thread."""
        self.inbox.put(None)

    def _deliver(self, found: list[tuple[Ticket, list[Event]]]) -> None:
        now, tokens = time.monotonic(), 0
        for ticket, events in found:
            for event in events:
                tokens += self._count(ticket, event, now)
                ticket.open -= event.finish_reason is not None
            if not ticket.open:
                self.tickets.pop(ticket.number, None)
            if events:
                ticket.updates.put_nowait(events)
            ticket.started.set()
        if tokens:
            self.metrics.observe("iteration_tokens_total", tokens)

    def _count(self, ticket: Ticket, event: Event, now: float) -> int:
        """Add an event to the metrics. Returns the number of its tokens, with the prompt's if it is the first event."""
        metrics, times, prompt = self.metrics, ticket.times[event.row], ticket.work.prompts[event.row]
        count = new = len(event.tokens) - (len(prompt) if ticket.work.echo and not times.counted else 0)
        if not times.counted and times.admitted:
            times.counted = True
            metrics.add("prompt_tokens_total", len(prompt))
            metrics.add("prefix_cache_queries_total", len(prompt))
            metrics.add("prefix_cache_hits_total", ticket.requests[event.row].cached)
            count += len(prompt)
        if new:
            metrics.add("generation_tokens_total", new)
            if not times.first:
                times.first = now
                metrics.observe("time_to_first_token_seconds", now - ticket.arrived)
            if more := new if times.latest else new - 1:
                metrics.observe("inter_token_latency_seconds", (now - (times.latest or now)) / new, more)
            times.latest = now
        if reason := REASONS[event.finish_reason]:
            metrics.add("request_success_total", finished_reason=reason)
            self._count_end(ticket, event.row, now)
        return count

    def _count_end(self, ticket: Ticket, row: int, now: float) -> None:
        times, request, observe = ticket.times[row], ticket.requests[row], self.metrics.observe
        observe("request_prompt_tokens", len(request.prompt))
        observe("request_generation_tokens", len(request.ids) - len(request.prompt))
        observe("e2e_request_latency_seconds", now - ticket.arrived)
        if ticket.work.settings:
            observe("request_params_max_tokens", ticket.work.settings[row].max_new)
        if times.admitted:
            observe("request_queue_time_seconds", times.admitted - ticket.arrived)
        if times.first:
            observe("request_prefill_time_seconds", times.first - times.admitted)
            observe("request_decode_time_seconds", times.latest - times.first)

    # -----------------------------------------------------------------------------------------------------------------
    # In the engine's thread, on every rank

    def run(self) -> None:
        """Serve until `stop`. An error in a step ends its requests; with several ranks, it ends the job."""
        running: dict[int, Job] = {}  # Tickets on the first rank
        ending = False
        while not ending or running:
            self._end_late(running.values())
            for item in self._receive(ending or bool(running)):
                number, work = item or (None, None)
                if number is None:
                    ending = True
                    self.llama.engine.cancel(*(request for job in running.values() for request in job.requests))
                elif work is not None:
                    running[number] = self.tickets.get(number) or Job(work)
                    running[number].submit(self.llama)
                elif number in running:
                    self.llama.engine.cancel(*running[number].requests)
            began = time.monotonic()
            if running:
                self._step()
            self._send(running.values(), began)
            running = {number: job for number, job in running.items() if job.unfinished}

    def _end_late(self, running: Iterable[Job]) -> None:
        """On the first rank: cancel tickets that exceed a time limit."""
        now = time.monotonic()
        for ticket in running:
            if not isinstance(ticket, Ticket) or ticket.late:
                continue
            if not ticket.began and now - ticket.arrived > self.max_wait:
                ticket.late = f"no slot was free for {self.max_wait:g} seconds; try again"
            elif ticket.began and now - ticket.began > self.max_time:
                ticket.late = f"the request has run for {self.max_time:g} seconds, as long as this server allows"
            if ticket.late:
                ticket.cancel()

    def _receive(self, busy: bool) -> list[Item]:
        """The items that reached the first rank since the last iteration. Waits for one unless `busy`."""
        items: list[Item]
        items, self.llama.engine.received = self.llama.engine.received, []
        if world_size() > 1 and (busy or items):  # the last step's message had them
            return items
        if rank() == 0:
            with suppress(queue.Empty):
                if not busy:
                    items.append(self.inbox.get(timeout=IDLE))
                while True:
                    items.append(self.inbox.get_nowait())
        return broadcast_object(items)

    def _step(self) -> None:
        try:
            with self.llama.engine.lock:
                self.llama.engine.step()
        except Exception:
            if world_size() > 1:  # the ranks may differ now
                raise
            log.exception("a step failed; its requests have ended")

    def _send(self, running: Iterable[Job], began: float) -> None:
        """On the first rank: pass the events of a step that began at `began` to the tickets."""
        found: list[tuple[Ticket, list[Event]]] = []
        for ticket in running:
            if not isinstance(ticket, Ticket):
                return
            events, waited = list[Event](), not ticket.began
            for request, times in zip(ticket.requests, ticket.times, strict=True):
                if request.slot >= 0 and not times.admitted:
                    times.admitted = began
                    # A ticket that waited too long may still get a slot before the ranks have cancelled it.
                    ticket.began = ticket.began or (0.0 if ticket.late else began)
                while request.outputs:
                    events.append(in_time(ticket, request, request.outputs.popleft()))
            if events or (waited and ticket.began):
                found.append((ticket, events))
        if found:
            with suppress(RuntimeError):  # the event loop has ended
                self.event_loop.call_soon_threadsafe(self._deliver, found)


def in_time(ticket: Ticket, request: Request, event: Event) -> Event:
    """An answer that exceeded `max_time` ends with "length", unless it needs the whole prompt, as embeddings and an
    echo's log probabilities do, and the prompt is not complete."""
    complete = not request.observe or len(request.ids) > len(request.prompt)
    cut = event.finish_reason == "cancelled" and ticket.late and ticket.began and complete
    return event._replace(finish_reason="length") if cut else event
