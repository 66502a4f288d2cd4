"""Lines from rank 0's terminal or pipe, for all ranks, and Ctrl-C while an answer is written."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import parallel

KEEP_ALIVE = 60  # seconds after which ranks that wait for a line get a message, so that their wait does not time out


def next_line(read: Callable[[], str | None]) -> str | None:
    """The next line of rank 0, on all ranks; None at the end of the input."""
    if parallel.world_size() == 1:
        return read()
    lines: list[str | None] = []
    # In a thread, so that this one can speak to the other ranks.
    reader = threading.Thread(target=lambda: lines.append(read()), daemon=True)
    if parallel.rank() == 0:
        reader.start()
    waiting = True
    while waiting:
        if parallel.rank() == 0:
            reader.join(KEEP_ALIVE)
        waiting, found = parallel.broadcast_object((reader.is_alive(), lines))
    return found[0] if found else None


@contextmanager
def terminal() -> Iterator[tuple[Callable[[], str | None], Callable[[], bool], bool]]:
    """A function that reads a line, one that says whether Ctrl-C was pressed since, and whether stdin is a terminal.

    Ctrl-C sends no signal here, because torchrun would end the job: it is read as a character like any other.
    """
    if parallel.rank() > 0 or not sys.stdin.isatty():
        yield _piped, lambda: False, False
        return
    try:
        import termios
    except ImportError:  # Windows, where Ctrl-C ends the program
        yield lambda: _joined(input), lambda: False, True
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    raw = termios.tcgetattr(fd)
    raw[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
    cooked = termios.tcgetattr(fd)
    cooked[3] &= ~termios.ISIG

    def plain_input(prompt: str) -> str:
        termios.tcsetattr(fd, termios.TCSANOW, cooked)
        return input(prompt)

    read = _line_editor() or plain_input

    def interrupted() -> bool:
        termios.tcsetattr(fd, termios.TCSANOW, raw)
        while select.select([fd], [], [], 0)[0]:
            keys = os.read(fd, 1024)
            if not keys or b"\x03" in keys:
                return bool(keys)
        return False

    def lines() -> str | None:
        try:
            return _joined(read)
        finally:
            termios.tcsetattr(fd, termios.TCSANOW, raw)

    try:
        yield lines, interrupted, True
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _piped() -> str | None:
    """One prompt per line, as other programs write them: without a byte order mark or \\r."""
    line = sys.stdin.readline()
    return line.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r") if line else None


def _joined(read: Callable[[str], str]) -> str | None:
    """One prompt of one or several lines, all but the last ending with a backslash. Ctrl-C discards the input."""
    lines: list[str] = []
    while True:
        try:
            line = read("  " if lines else "> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            line = "\x03"
        if "\x03" in line:
            lines = []
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return "\n".join([*lines, line])


def _line_editor() -> Callable[[str], str] | None:
    """prompt_toolkit's line editor, with history, if it is installed. It sets the terminal's modes itself."""
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return None
    return PromptSession[str]().prompt
