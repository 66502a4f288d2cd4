"""Streams of what is generated, and filters that may replace a dialog's answer."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from reprlib import repr as shorten
from typing import Any, Concatenate, ParamSpec, TypeVar

from .chat import Dialog
from .parallel import ask_first_rank, open_streams, rank
from .request import Event

InputFilter = Callable[[Dialog], "str | None"]  # None where the dialog may be answered, or what to say instead
OutputFilter = Callable[[str], "str | None"]  # None where the answer may be given, or what to say instead
P = ParamSpec("P")
T = TypeVar("T")


class Stream(AbstractContextManager["Stream"], Iterator[Event]):
    """An iterator of events. Under torchrun every rank has one; when the first rank closes its own, or drops it, the
    others end."""

    def __init__(
        self,
        steps: Generator[list[Event], None, None],
        rows: int = 1,
        logprobs: bool = False,
        before: Sequence[Sequence[int]] = (),
    ) -> None:
        self.rows, self.logprobs, self._steps = rows, logprobs, steps
        self.before = before or [()] * rows  # the tokens that the text of each row continues
        open_streams.add(self)
        # The first is fetched at once, so that a stream that nobody reads has begun on all ranks, and can end on all.
        self._events = itertools.chain(next(steps, []), itertools.chain.from_iterable(steps))

    def __next__(self) -> Event:
        return next(self._events)

    def drain(self) -> list[Event]:
        """All that is still to come of each row, as one event."""
        rows: list[list[Event]] = [[Event(i)] for i in range(self.rows)]
        with self:
            for event in self:
                rows[event.row].append(event)
        return [whole(events) for events in rows]

    def close(self) -> None:
        """End all rows here and now. Ranks but the first go on, unread, until the first ends, as filters are asked."""
        if inspect.getgeneratorstate(self._steps) != inspect.GEN_CLOSED:
            for _ in self._steps if rank() else ():
                pass
            self._steps.close()
        self._events = itertools.chain()

    def __del__(self) -> None:
        self.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def filtered(
    steps: Generator[list[Event], None, None],
    rows: Sequence[int],
    refusals: Mapping[int, str],
    output_filter: OutputFilter | None,
) -> Generator[list[Event], None, None]:
    """Events of those `rows` of a batch that were not refused; texts as a whole, if there is a filter for them."""
    # Refusals come with the first step, so that whoever reads them has begun what the other ranks have begun.
    first = [refused(row, text) for row, text in refusals.items()]
    held: dict[int, list[Event]] = {}
    with closing(steps):
        for step in steps:
            events = [event._replace(row=rows[event.row]) for event in step]
            if output_filter is not None:
                answers = ended(held, events)
                verdicts = [ask_first_rank(output_filter, answer.text) for answer in answers]
                events = [
                    answer if verdict is None else refused(answer.row, check_verdict(verdict))
                    for answer, verdict in zip(answers, verdicts, strict=True)
                ]
            if first or events:
                yield first + events
            first = []
    if first:
        yield first


OLD_NAMES = {"judge_input": "input_filter", "judge_output": "output_filter"}


def pop_filters(options: dict[str, Any]) -> tuple[InputFilter | None, OutputFilter | None]:
    """Take the filters out of options, where they may have their names of earlier releases; ValueError for what is no
    function."""
    for old, new in OLD_NAMES.items():
        if old in options:
            warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=2)
            options[new] = options.pop(old)
    found = options.pop("input_filter", None), options.pop("output_filter", None)
    for name, value in zip(("input_filter", "output_filter"), found, strict=True):
        if value is not None and not callable(value):
            raise ValueError(f"{name} is {shorten(value)}; it must be a function")
    return found


def refused(row: int, text: str) -> Event:
    return Event(row, text, finish_reason="refused")


def check_verdict(verdict: object) -> str:
    if not isinstance(verdict, str):
        raise ValueError(f"a filter has returned {verdict!r}; it must be None, or a str to say instead")
    return verdict


def ended(held: dict[int, list[Event]], events: Sequence[Event]) -> list[Event]:
    """The answers that end with these events, each as one; `held` keeps the events of the others, by their rows."""
    for event in events:
        held.setdefault(event.row, []).append(event)
    return [whole(held.pop(event.row)) for event in events if event.finish_reason]


def whole(events: Sequence[Event]) -> Event:
    """The events of a row as one."""
    tokens = [id for event in events for id in event.tokens]
    logprobs = [logprob for event in events for logprob in event.logprobs]
    best = [found for event in events for found in event.top_logprobs]
    text = "".join(event.text for event in events)
    return Event(events[-1].row, text, tokens, logprobs, events[-1].finish_reason, best)


def drains(
    stream: Callable[Concatenate[Any, P], Stream],
) -> Callable[[Callable[[Any, Stream], T]], Callable[Concatenate[Any, P], T]]:
    """Make a method that takes what the method `stream` takes, and returns what the decorated one makes of the
    stream."""

    def decorate(method: Callable[[Any, Stream], T]) -> Callable[Concatenate[Any, P], T]:
        @functools.wraps(method)
        def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
            return method(self, stream(self, *args, **kwargs))

        returns = inspect.signature(method).return_annotation
        call.__signature__ = inspect.signature(stream).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return call

    return decorate
