"""Filters of dialogs and answers: each may replace the answer by a text. They run in threads."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from operator import attrgetter
from typing import Any

from ..chat import Dialog
from ..request import Event
from ..stream import InputFilter, OutputFilter, check_verdict, ended
from .schema import ApiError

log = logging.getLogger("llama.server")
THREADS = 32  # filters that run at the same time, each in its thread, so that a slow one delays only its own request
TIMEOUT = 60.0  # seconds that a filter may take


class Filters:
    """The filters of a server. The first one that returns a text decides."""

    def __init__(self, input_filters: Sequence[InputFilter] = (), output_filters: Sequence[OutputFilter] = ()) -> None:
        self.input_filters, self.output_filters = input_filters, output_filters
        self.threads = asyncio.Semaphore(THREADS)

    async def filter_inputs(self, dialogs: Sequence[Dialog]) -> str | None:
        """The text to return instead of answers, or None to answer the dialogs."""
        for dialog in dialogs:
            if (text := await self._verdict(self.input_filters, dialog)) is not None:
                return text
        return None

    def filter_outputs(self, events: AsyncIterator[Event | None], whole: bool) -> AsyncIterator[Event | None]:
        """Pass on events. If `whole`, or if there are output filters, each answer is one event, once it is complete."""
        return self._whole(events) if whole or self.output_filters else events

    async def _whole(self, events: AsyncIterator[Event | None]) -> AsyncIterator[Event | None]:
        held: dict[int, list[Event]] = {}
        async for event in events:
            if event is None:
                yield None
                continue
            for answer in ended(held, [event]):
                refused = answer.finish_reason == "refused"
                text = None if refused else await self._verdict(self.output_filters, answer.text)
                yield answer if text is None else answer._replace(text=text, finish_reason="refused")

    async def _verdict(self, filters: Sequence[Callable[[Any], str | None]], value: object) -> str | None:
        """The first text that a filter returns, else None."""
        for function in filters:
            try:
                async with self.threads:
                    found = await asyncio.wait_for(in_thread(function, value), TIMEOUT)
                if found is not None:
                    return check_verdict(found)
            except Exception as error:
                log.exception("the filter %s failed", getattr(function, "__qualname__", function))
                raise ApiError(500, "a filter has failed; see the server's log") from error
        return None


async def in_thread(function: Callable[[Any], Any], value: object) -> Any:
    """Call a function in a daemon thread, which does not keep the process from ending."""
    found: Future[Any] = Future()

    def call() -> None:
        if not found.set_running_or_notify_cancel():
            return
        try:
            found.set_result(function(value))
        except BaseException as error:  # SystemExit would end the server
            found.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    threading.Thread(target=call, name="filter", daemon=True).start()
    return await asyncio.wrap_future(found)


def load_filters(names: Sequence[str]) -> Filters:
    """Load the functions `input_filter` and `output_filter` of modules, or of objects `module:name`. A class is
    instantiated. ValueError for a module or object with neither function."""
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    filters: dict[str, list[Any]] = {"input_filter": [], "output_filter": []}
    for name in names:
        try:
            module, _, path = name.partition(":")
            found: Any = importlib.import_module(module)
            found = attrgetter(path)(found) if path else found
            owner: Any = found() if inspect.isclass(found) else found
        except Exception as error:  # the module may raise anything
            raise ValueError(f"cannot load the filter {name}: {type(error).__name__}: {error}") from error
        own = {kind: getattr(owner, kind) for kind in filters if callable(getattr(owner, kind, None))}
        if not own:
            raise ValueError(f"the filter {name} has neither a function input_filter nor one output_filter")
        for kind, function in own.items():
            filters[kind].append(function)
    return Filters(*filters.values())
