"""A command around its main function: flags are parsed before anything runs, and an error is one line."""

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

from ..parallel import RankError, first_to_fail, launched

# Errors whose message says what to do, so that a traceback would only bury it.
FORESEEN = (ValueError, ArithmeticError, OSError, RuntimeError, MemoryError)
LONGEST = 2000  # characters of an error's line


def run(command: Callable[..., None] | dict[str, Callable[..., None]]) -> None:
    """Call a function, or the one of several that the command line names, with its flags, within `readable_errors`."""
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
    """Let glibc keep freed memory for the next tensor instead of returning it to the system: page faults take a quarter
    of a long prompt's time on a CPU. It affects the whole process, so that only commands do it."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # what malloc.h calls them
        allocator.mallopt(trim_threshold, 2**31 - 1)
        allocator.mallopt(mmap_threshold, 2**25)  # the largest that it takes


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with exit code 1 and one line on stderr if the block fails with one of `FORESEEN`; any other
    error has its traceback. Of several ranks only the first to fail prints: the others fail because of it."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _exit(130)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        _exit(1)
    except Exception as error:
        if launched() > 1 and not first_to_fail():
            time.sleep(5)  # torchrun ends this process once the first has ended; without torchrun, end anyway
        elif isinstance(error, FORESEEN):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        _exit(1)


def _exit(code: int) -> None:
    # An ordinary exit would wait for ranks that may never answer, and write to streams that may be closed.
    os._exit(code)


def one_line(error: Exception) -> str:
    """The message of an error, with the rank that raised it if there are several."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ... ({len(text):,} characters)"
    if launched() == 1 or isinstance(error, RankError):
        return text
    lost = type(error) is RuntimeError and ("gloo" in text or "NCCL" in text)
    return f"rank {os.environ['RANK']}: {'lost contact with another rank: ' * lost}{text}"
