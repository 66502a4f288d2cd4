"""Streams of generated tokens and text, and filters that may replace a dialog's answer."""

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

InputFilter = Callable[[Dialog], "str | None"]  # None to answer the dialog, or the text to return instead
OutputFilter = Callable[[str], "str | None"]  # None to return the answer, or the text to return instead
P = ParamSpec("P")
T = TypeVar("T")


class Stream(AbstractContextManager["Stream"], Iterator[Event]):
    """An iterator of events. Under torchrun every rank has one; all end when rank 0 closes or drops its own."""

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
        # The first step is made at once, so that an unread stream has begun on all ranks, and can be closed on all.
        self._events = itertools.chain(next(steps, []), itertools.chain.from_iterable(steps))

    def __next__(self) -> Event:
        return next(self._events)

    def drain(self) -> list[Event]:
        """Read to the end; the events of each row as one."""
        rows: list[list[Event]] = [[Event(i)] for i in range(self.rows)]
        with self:
            for event in self:
                rows[event.row].append(event)
        return [whole(events) for events in rows]

    def close(self) -> None:
        """End all rows. Ranks other than 0 skip events until rank 0 ends, as they take part in asking filters."""
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
    """The events of `steps`, renumbered to `rows` of the batch, with the refusals of the other rows before them. With
    an output filter each row has a single event, for its whole text."""
    # Refusals are part of the first step: a rank that has read them has begun the requests, as all ranks have.
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


def pop_filters(options: dict[str, Any]) -> tuple[InputFilter | None, OutputFilter | None]:
    """Take the filters out of options, under their present or earlier names. ValueError if one is not callable."""
    found = []
    for name, old in (("input_filter", "judge_input"), ("output_filter", "judge_output")):
        if old in options:
            warnings.warn(f"{old} is now called {name}", DeprecationWarning, stacklevel=2)
            options[name] = options.pop(old)
        found.append(options.pop(name, None))
        if found[-1] is not None and not callable(found[-1]):
            raise ValueError(f"{name} is {shorten(found[-1])}; it must be a function")
    return found[0], found[1]


def refused(row: int, text: str) -> Event:
    return Event(row, text, finish_reason="refused")


def check_verdict(verdict: object) -> str:
    if not isinstance(verdict, str):
        raise ValueError(f"a filter has returned {verdict!r}; it must be None, or a str to say instead")
    return verdict


def ended(held: dict[int, list[Event]], events: Sequence[Event]) -> list[Event]:
    """The answers that these events complete, each as one event. `held` keeps the events of the others, by row."""
    for event in events:
        held.setdefault(event.row, []).append(event)
    return [whole(held.pop(event.row)) for event in events if event.finish_reason]


def whole(events: Sequence[Event]) -> Event:
    """A row's events as one."""
    tokens = [id for event in events for id in event.tokens]
    logprobs = [logprob for event in events for logprob in event.logprobs]
    best = [found for event in events for found in event.top_logprobs]
    text = "".join(event.text for event in events)
    return Event(events[-1].row, text, tokens, logprobs, events[-1].finish_reason, best)


def drains(
    stream: Callable[Concatenate[Any, P], Stream],
) -> Callable[[Callable[[Any, Stream], T]], Callable[Concatenate[Any, P], T]]:
    """Decorate a method of a stream: the result takes the arguments of the method `stream`, and passes on the stream
    that this returns."""

    def decorate(method: Callable[[Any, Stream], T]) -> Callable[Concatenate[Any, P], T]:
        @functools.wraps(method)
        def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
            return method(self, stream(self, *args, **kwargs))

        returns = inspect.signature(method).return_annotation
        call.__signature__ = inspect.signature(stream).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return call

    return decorate
