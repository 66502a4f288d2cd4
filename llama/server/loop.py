"""The engine's loop beside HTTP: what has arrived goes to all ranks, and what a step brings goes back.

HTTP runs in a thread of the first rank; the engine has the main thread of every rank. A turn takes what has arrived,
tells the other ranks, and makes one step.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..generation import Llama
from ..parallel import broadcast, broadcast_object, rank, world_size
from ..request import Event, Request
from ..scoring import to_embed
from .metrics import Metrics
from .schema import Work

log = logging.getLogger("llama.server")
IDLE = 60.0  # seconds after which waiting ranks hear that nothing has come; gloo gives up after 30 minutes


class Ticket:
    """An HTTP request's place at the engine. The event loop's thread has it, but for what the first events tell."""

    def __init__(self, number: int, work: Work) -> None:
        self.number, self.work, self.arrived = number, work, time.monotonic()
        self.requests: list[Request] = []  # there before the first event
        self.embeddings: Tensor | None = None  # complete with the last
        self.updates: asyncio.Queue[list[Event]] = asyncio.Queue()
        self.first = 0.0  # when the first token came, of any
        self.latest = [0.0] * len(work.prompts)  # when each got its last token
        self.open = len(work.prompts)  # requests that go on

    async def events(self, patience: float) -> AsyncIterator[list[Event]]:
        """What steps bring, until all requests have ended; an empty list where that takes longer than `patience`
        seconds."""
        left = self.open
        while left:
            events: list[Event] = []
            with suppress(asyncio.TimeoutError):
                events = await asyncio.wait_for(self.updates.get(), patience)
            left -= sum(event.finish_reason is not None for event in events)
            yield events


class Loop:
    def __init__(self, llama: Llama, metrics: Metrics) -> None:
        self.llama, self.metrics = llama, metrics
        self.inbox: queue.SimpleQueue[tuple[int, Work | None] | None] = queue.SimpleQueue()
        self.numbers = itertools.count()
        self.tickets: dict[int, Ticket] = {}  # on the first rank
        self.open = 0  # requests that have been submitted and have not ended

    # -----------------------------------------------------------------------------------------------------------------
    # In the event loop's thread

    def submit(self, work: Work) -> Ticket:
        self.events = asyncio.get_running_loop()
        ticket = Ticket(next(self.numbers), work)
        self.tickets[ticket.number] = ticket
        self.open += ticket.open
        self.inbox.put((ticket.number, work))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End what is left of a ticket. To cancel one that has ended is nothing."""
        if ticket.open:
            self.inbox.put((ticket.number, None))

    def gauges(self) -> dict[str, float]:
        running = sum(slot.request is not None for slot in self.llama.engine.slots)
        return {"num_requests_running": running, "num_requests_waiting": max(0, self.open - running)}

    def stop(self) -> None:
        """End `run`, on all ranks. From any thread."""
        self.inbox.put(None)

    def _deliver(self, found: list[tuple[Ticket, list[Event]]]) -> None:
        now = time.monotonic()
        for ticket, events in found:
            for event in events:
                self._count(ticket, event, now)
                if event.finish_reason:
                    ticket.open -= 1
                    self.open -= 1
            if not ticket.open:
                self.tickets.pop(ticket.number, None)
            ticket.updates.put_nowait(events)

    def _count(self, ticket: Ticket, event: Event, now: float) -> None:
        metrics, last = self.metrics, ticket.latest[event.row]
        prompt = ticket.work.prompts[event.row]
        new = len(event.tokens) - (len(prompt) if ticket.work.echo and not last else 0)
        if not last and ticket.requests:
            metrics.add("prompt_tokens_total", len(prompt))
            metrics.add("prefix_cache_queries_total", len(prompt))
            metrics.add("prefix_cache_hits_total", ticket.requests[event.row].cached)
        if event.tokens or not last:
            ticket.latest[event.row] = now
        if new > 0:
            metrics.add("generation_tokens_total", new)
            ticket.first = ticket.first or now
            if not last:
                metrics.observe("time_to_first_token_seconds", now - ticket.arrived)
            more = new if last else new - 1
            if more:
                metrics.observe("inter_token_latency_seconds", (now - last) / new if last else 0.0, more)
        if reason := event.finish_reason:
            names = {"eos": "stop", "cancelled": "abort"}
            metrics.add("request_success_total", labels=f',finished_reason="{names.get(reason, reason)}"')
            metrics.observe("e2e_request_latency_seconds", now - ticket.arrived)

    # -----------------------------------------------------------------------------------------------------------------
    # In the engine's thread, on every rank

    def run(self) -> None:
        """Serve until `stop`. Errors of a step end its requests; where there are several ranks, they end all."""
        running: dict[int, list[Request]] = {}
        ending = False
        while not ending or running:
            for item in self._receive(ending or bool(running)):
                number, work = item or (None, None)
                if number is None:
                    ending = True
                    self.llama.engine.cancel(*itertools.chain.from_iterable(running.values()))
                elif work is not None:
                    running[number] = self._begin(number, work)
                elif number in running:
                    self.llama.engine.cancel(*running[number])
            if running:
                self._step()
            running = self._send(running)

    def _receive(self, busy: bool) -> list[tuple[int, Work | None] | None]:
        """What has arrived at the first rank since the last turn; if nothing is to be done, what arrives next."""
        items: list[Any] = []
        if rank() == 0:
            with suppress(queue.Empty):
                if not busy:
                    items.append(self.inbox.get(timeout=IDLE))
                while True:
                    items.append(self.inbox.get_nowait())
        # The numbers of a step are sent as one tensor; a turn in which nothing arrived costs one more, of one number.
        if world_size() > 1 and broadcast(torch.tensor([len(items)], device="cpu")).item():
            items = broadcast_object(items)
        return items

    def _begin(self, number: int, work: Work) -> list[Request]:
        engine, ticket = self.llama.engine, self.tickets.get(number)
        embeddings = None
        if work.settings:
            options = work.logprobs, work.echo, work.chat, work.top_logprobs
            requests = self.llama.inputs.requests(work.prompts, work.settings, *options)
        else:
            requests, embeddings = to_embed(engine, work.prompts, "mean")
        for row, request in enumerate(requests):
            request.row, request.outputs = row, deque(maxlen=None if ticket else 1)  # nobody reads others
        if ticket:
            ticket.requests, ticket.embeddings = requests, embeddings
        engine.submit(*requests)
        return requests

    def _step(self) -> None:
        try:
            with self.llama.engine.lock:
                self.llama.engine.step()
        except Exception:
            if world_size() > 1:  # the ranks are no longer in step
                raise
            log.exception("a step failed; its requests have ended")

    def _send(self, running: dict[int, list[Request]]) -> dict[int, list[Request]]:
        """Give the tickets what they have got; the requests that go on."""
        found: list[tuple[Ticket, list[Event]]] = []
        for number, requests in running.items():
            if ticket := self.tickets.get(number):
                outputs = [request.outputs for request in requests]
                events = [output.popleft() for output in outputs for _ in range(len(output))]
                if events:
                    found.append((ticket, events))
        if found:
            with suppress(RuntimeError):  # the event loop has ended, and with it all who wait
                self.events.call_soon_threadsafe(self._deliver, found)
        return {
            number: requests for number, requests in running.items() if not all(request.finish for request in requests)
        }
