"""python -m llama chat: a conversation in a terminal, on any number of ranks. The first rank reads and writes."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import parallel
from .conversation import Chat
from .generation import Llama

HELP = """\
/reset              forget the conversation
/system TEXT        begin anew with these instructions; without a text, with none
/set NAME VALUE     an option, such as /set temperature 0.2; without a name, show all
/save FILE          write the conversation to a file
/load FILE          go on with one
/help               this
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer, Ctrl-D ends."""
ALIVE = 60  # seconds after which ranks that wait for a line are told to go on waiting, lest they give up


def converse(llama: Llama, system: str | None, **options: Any) -> None:
    """Read what the user says until that ends, and answer."""
    chat = Chat(llama, system, **options)
    with terminal() as (read, interrupted, tty):
        say("Ask something, or /help.\n" if tty else "")
        while (line := next_line(read)) is not None:
            try:
                if line.startswith("/"):
                    chat = command(chat, line)
                elif line.strip():
                    answer(chat, line, interrupted)
            except (ValueError, TypeError, OSError, parallel.RankError) as error:
                say(f"error: {' '.join(str(error).split())}\n")


def say(text: str) -> None:
    if parallel.rank() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


def answer(chat: Chat, text: str, interrupted: Callable[[], bool]) -> None:
    dropped = chat.dropped
    with chat.stream(text) as stream:
        for event in stream:
            say(event.text)
            if parallel.rank() == 0 and interrupted():
                say(" ...")
                break  # the others are told when the stream is closed
    say("\n")
    if chat.dropped > dropped:
        say(f"(the conversation is too long: its {chat.dropped - dropped} oldest messages are forgotten)\n")


def command(chat: Chat, line: str) -> Chat:
    """What a line that begins with / asks for. Every rank does the same; files are the first rank's."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        system = chat.dialog[:1] if chat.dialog and chat.dialog[0]["role"] == "system" else []
        return Chat(chat.llama, dialog=system, **chat.options)
    if name == "/system":
        return Chat(chat.llama, rest or None, **chat.options)
    if name == "/save" and rest:
        parallel.ask_first_rank(Path(rest).write_bytes, json.dumps(chat.dialog, indent=1, ensure_ascii=False).encode())
        say(f"saved to {rest}\n")
    elif name == "/load" and rest:
        text = parallel.ask_first_rank(Path(rest).read_bytes)
        try:
            loaded = Chat(chat.llama, dialog=json.loads(text), **chat.options)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{rest}: {error}") from error
        say(f"{len(loaded.dialog)} messages\n")
        return loaded
    elif name == "/set":
        option, _, value = rest.partition(" ")
        if option:
            with suppress(ValueError, SyntaxError):
                value = literal_eval(value)
            chat.set(**{option: value})
        say("".join(f"{name} {value}\n" for name, value in chat.options.items() if value is not None))
    else:
        say(HELP + "\n")
    return chat


def next_line(read: Callable[[], str | None]) -> str | None:
    """The next line of the first rank, on all ranks; None at the end."""
    waiting = True
    line: str | None = None
    while waiting:
        line, waiting = parallel.broadcast_object(_read_or_wait(read))
    return line


_reading: list[Any] = []


def _read_or_wait(read: Callable[[], str | None]) -> tuple[str | None, bool]:
    """(line, False), or (None, True) where none came for so long that the other ranks must be told."""
    if parallel.rank() > 0:
        return None, True
    if parallel.world_size() == 1:
        return read(), False
    if not _reading:  # in a thread, so that this one can speak to the other ranks
        lines: list[str | None] = []
        thread = threading.Thread(target=lambda: lines.append(read()), daemon=True)
        thread.start()
        _reading[:] = [thread, lines]
    thread, lines = _reading
    thread.join(ALIVE)
    if thread.is_alive():
        return None, True
    _reading.clear()
    return (lines[0] if lines else None), False


@contextmanager
def terminal() -> Iterator[tuple[Callable[[], str | None], Callable[[], bool], bool]]:
    """How to read a line, how to see whether Ctrl-C was pressed since, and whether somebody is there to press it.

    Keys make no signals here, as torchrun would take one as the end: Ctrl-C is a character like others, and looked for.
    """
    if parallel.rank() > 0 or not sys.stdin.isatty():
        yield _piped, lambda: False, False
        return
    import termios

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    quiet = termios.tcgetattr(fd)
    quiet[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
    cooked = termios.tcgetattr(fd)
    cooked[3] &= ~termios.ISIG
    read = _line_editor() or _cooked(lambda: termios.tcsetattr(fd, termios.TCSANOW, cooked))

    def interrupted() -> bool:
        termios.tcsetattr(fd, termios.TCSANOW, quiet)
        while select.select([fd], [], [], 0)[0]:
            keys = os.read(fd, 1024)
            if not keys or b"\x03" in keys:
                return bool(keys)
        return False

    def lines() -> str | None:
        try:
            return _joined(read)
        finally:
            termios.tcsetattr(fd, termios.TCSANOW, quiet)

    try:
        yield lines, interrupted, True
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _piped() -> str | None:
    """One prompt in each line."""
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _joined(read: Callable[[str], str]) -> str | None:
    """Lines of which each but the last ends with a backslash. Ctrl-C throws away what was typed."""
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
    """prompt_toolkit's, with history, where it is installed. It sets the terminal as it needs it."""
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return None
    session: Any = PromptSession()
    return lambda prompt: str(session.prompt(prompt))


def _cooked(set_terminal: Callable[[], None]) -> Callable[[str], str]:
    def read(prompt: str) -> str:
        set_terminal()
        return input(prompt)

    return read
