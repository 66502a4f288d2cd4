"""What a command is around its main function: flags parsed before anything runs, and errors that are one line."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import fire

from .parallel import RankError, first_to_fail, launched

# What can be foreseen to go wrong; its message says what to do, and a traceback would bury it.
FORESEEN = (ValueError, ArithmeticError, OSError, RuntimeError, MemoryError)
LONGEST = 2000  # characters of a line


def run(command: Callable[..., None] | dict[str, Callable[..., None]]) -> None:
    """Call a function, or the one of several that the command line names, with its flags, under `readable_errors`."""
    calls: list[Callable[[], None]] = []
    keep_memory()

    def note(function: Callable[..., None]) -> Callable[..., None]:
        # fire complains about flags that a function does not have only after calling it
        return functools.wraps(function)(lambda *args, **flags: calls.append(partial(function, *args, **flags)))

    with readable_errors():
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
        if isinstance(command, dict):
            fire.Fire({name: note(function) for name, function in command.items()})
        else:
            fire.Fire(note(command))
        for call in calls:
            call()


def keep_memory() -> None:
    """Let glibc keep freed memory for the next tensor, in place of giving it back to the system: asking for it
    anew takes a quarter of a long prompt's time on a CPU. It is the whole process's, and so for commands alone."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # what malloc.h calls them
        allocator.mallopt(trim_threshold, 2**31 - 1)
        allocator.mallopt(mmap_threshold, 2**25)  # the largest that it takes


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the process with exit code 1 and one line on stderr in place of a traceback, which only an error that nobody
    foresaw still gets. Of several ranks the first to fail speaks: the others fail because of it."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        _exit(1)
    except Exception as error:
        if launched() > 1 and not first_to_fail():
            time.sleep(5)  # torchrun ends this process once it sees the one that spoke; without torchrun, end anyway
        elif isinstance(error, FORESEEN):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        _exit(1)


def _exit(code: int) -> None:
    # An ordinary exit would wait for ranks that may never answer, and write to streams that may be closed.
    os._exit(code)


def one_line(error: Exception) -> str:
    """The message of an error, and under torchrun the rank that it is from."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ... ({len(text):,} characters)"
    if launched() == 1 or isinstance(error, RankError):
        return text
    lost = type(error) is RuntimeError and ("gloo" in text or "NCCL" in text)
    return f"rank {os.environ['RANK']}: {'lost contact with another rank: ' * lost}{text}"
