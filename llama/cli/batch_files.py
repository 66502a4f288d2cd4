"""The input and output files of a batch. One process reads the input and writes the output."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..textfile import lock
from .batch_lines import Key, parse_line

START = b'{"id": '  # of every answer
PATIENCE = 10  # seconds that the processes of a killed job may take to end, and to release its lock


class Files:
    """The input file, and the output file to append to. However the writing process ends, the output has complete lines
    and at most one incomplete line at the end, which the next process removes. Raises ValueError for an output file
    that no batch has written, and leaves it unchanged."""

    def __init__(self, source: Path, target: Path) -> None:
        if target.exists() and target.samefile(source):
            raise ValueError(f"outfile {target} is infile too")
        if target.exists() and not target.is_file():  # what it has is read
            raise ValueError(f"outfile {target} is not a file; answers cannot go to a folder, pipe or device")
        self.source, self.target = source, target
        seen: dict[Key, int] = {}
        for key, number, _ in lines(source):
            if key in seen:
                raise ValueError(f"{source}: lines {seen[key]} and {number} have the same id, {key!r}")
            seen[key] = number
        self.answers = target.open("ab", buffering=0)
        lock_alone(self.answers)
        self.done = self._resume()
        self.count, self.answered = len(seen), len(seen.keys() & self.done)

    def _resume(self) -> set[Key]:
        """The keys of the lines that have answers."""
        done, end = set[Key](), 0
        with self.target.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.endswith(b"\n"):
                        done.add(answered(json.loads(line)))
                        end += len(line)
                    elif not line.startswith(START[: len(line)]):
                        raise ValueError("it does not begin as an answer")
                except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
                    text = f"line {number} of {self.target} is {line[:40]!r}, which is not a batch's answer"
                    raise ValueError(f"{text}; choose another outfile") from error
        self.answers.truncate(end)
        return done

    def unanswered(self) -> Iterator[tuple[int, bytes]]:
        """The number and content of each line that has no answer yet."""
        return ((number, content) for key, number, content in lines(self.source) if key not in self.done)

    def write(self, answers: bytes) -> None:
        """Append complete lines."""
        while answers:
            answers = answers[self.answers.write(answers) or 0 :]


def answered(answer: Any) -> Key:
    """The key of the line that was answered."""
    id = answer.get("custom_id", answer["id"])
    return ("line", answer["line"]) if id is None else id


def lines(source: Path) -> Iterator[tuple[Key, int, bytes]]:
    """The key, the number, counted from 1, and the content of each line that is not blank."""
    with source.open("rb") as file:
        for number, content in enumerate(file, 1):
            if content.strip():
                yield parse_line(number, content).key, number, content


def lock_alone(file: BinaryIO) -> None:
    """Lock a file against other jobs as long as this process lives. Raises FileExistsError if another job has the
    lock."""
    for _ in range(PATIENCE):
        if lock(file):
            return
        time.sleep(1)
    raise FileExistsError(f"{file.name} is being written by another job")
