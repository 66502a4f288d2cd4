"""What generation tells as it happens, and judges who may keep it from being told."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from inspect import GEN_CLOSED, getgeneratorstate
from typing import NamedTuple

from .chat import Dialog
from .parallel import ask_first_rank, open_streams, rank

JudgeInput = Callable[[Dialog], "str | None"]  # None where the dialog may be answered, or what to say instead
JudgeOutput = Callable[[str], "str | None"]  # None where the answer may be given, or what to say instead


class Event(NamedTuple):
    """What a row of a batch has gained."""

    row: int
    text: str = (
        ""  # final: it may lag behind the tokens, where they are part of a character or perhaps of a stop string
    )
    tokens: list[int] = []  # noqa: RUF012 - never changed
    logprobs: list[float] = []  # noqa: RUF012 - of each token, if asked for
    finish_reason: str | None = None  # "eos", "stop", "length" or "refused": once, at the end


class Stream:
    """An iterator of events. Under torchrun every rank has one; when the first rank closes its own, or drops it, the
    others end."""

    def __init__(self, steps: Generator[list[Event], None, None]) -> None:
        self._steps = steps
        open_streams.add(self)
        # The first is fetched at once, so that a stream that nobody reads has begun on all ranks, and can end on all.
        self._waiting = next(steps, [])[::-1]

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        while not self._waiting:
            self._waiting = next(self._steps)[::-1]
        return self._waiting.pop()

    def close(self) -> None:
        """End all rows here and now. Ranks but the first go on, unheard, until the first ends, as judges are asked."""
        self._waiting = []
        if getgeneratorstate(self._steps) == GEN_CLOSED:
            return
        for _ in self._steps if rank() else ():
            pass
        self._steps.close()

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def judged(
    steps: Generator[list[Event], None, None],
    rows: Sequence[int],
    refusals: Mapping[int, str],
    judge: JudgeOutput | None,
) -> Generator[list[Event], None, None]:
    """Events of those `rows` of a batch that were not refused; texts as a whole, if there is someone to judge them."""
    # Refusals come with the first step, so that whoever hears them has begun what the other ranks have begun.
    first = [refused(row, text) for row, text in refusals.items()]
    parts: dict[int, list[Event]] = {row: [] for row in rows}
    with closing(steps):
        for step in steps:
            events = [event._replace(row=rows[event.row]) for event in step]
            if judge is not None:
                for event in events:
                    parts[event.row].append(event)
                ended = [whole(parts[event.row]) for event in events if event.finish_reason]
                verdicts = [ask_first_rank(judge, event.text) for event in ended]
                events = [
                    event if verdict is None else refused(event.row, check_verdict(verdict))
                    for event, verdict in zip(ended, verdicts, strict=True)
                ]
            if first or events:
                yield first + events
            first = []
    if first:
        yield first


def refused(row: int, text: str) -> Event:
    return Event(row, text, finish_reason="refused")


def check_verdict(verdict: object) -> str:
    if not isinstance(verdict, str):
        raise ValueError(f"a judge has returned {verdict!r}; it must be None, or a str to say instead")
    return verdict


def whole(events: Sequence[Event]) -> Event:
    """All that a row has gained, as one event."""
    row, *_, finish = events[-1]
    tokens = [id for event in events for id in event.tokens]
    logprobs = [logprob for event in events for logprob in event.logprobs]
    return Event(row, "".join(event.text for event in events), tokens, logprobs, finish)


def collect(steps: Iterable[list[Event]], B: int) -> list[Event]:
    """All that happens to each row, as one event."""
    rows: list[list[Event]] = [[Event(i)] for i in range(B)]
    for step in steps:
        for event in step:
            rows[event.row].append(event)
    return [whole(events) for events in rows]
