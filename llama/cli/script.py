"""Runs a function as a command: flags are parsed before anything runs, and an error is one line."""

from __future__ import annotations

import ctypes
import functools
import io
import os
import pydoc
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO, get_args, get_origin, get_type_hints

import fire

from ..parallel import RankError, first_to_fail, launched, rank

# Errors whose message says what to do, so that a traceback would only bury it.
FORESEEN = (ValueError, ArithmeticError, OSError, RuntimeError, MemoryError)
LONGEST = 2000  # characters of an error's line


def run(command: Callable[..., None] | dict[str, Callable[..., None]]) -> None:
    """Call a function, or the one that the command line selects, with its flags, within `readable_errors`."""
    keep_memory()
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - the caller has closed it
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    with readable_errors():
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
        if launched() == 1:  # a rank that waits for another would not react to it
            end_on_signals()
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        for call in parse(command, sys.argv[1:]):
            call()


def say(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Print on rank 0, and flush."""
    if rank() == 0:
        print(text, end=end, file=file, flush=True)


def end_on_signals() -> None:
    """Make SIGTERM and a closed terminal end this process with an exception, so that partial files are removed."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one
            with suppress(ValueError):  # in another thread than the main one
                signal.signal(number, end)


def end_with(parent: int) -> None:
    """End this process when its parent has ended. Otherwise ranks whose torchrun was killed would keep running, or wait
    for half an hour for a connection."""
    while os.getppid() == parent:
        time.sleep(0.5)
    _exit(1)


def parse(
    command: Callable[..., None] | Mapping[str, Callable[..., None]], args: Sequence[str]
) -> list[Callable[[], None]]:
    """Parse a command line into the calls to make. Arguments of type str or Path are taken as they are typed; fire
    parses the others as Python literals. Raises ValueError for a str flag without a value."""
    calls: list[Callable[[], None]] = []

    def note(function: Callable[..., None]) -> Callable[..., None]:
        # fire complains about flags that a function does not have only after calling it
        noted = functools.wraps(function)(lambda *args, **flags: calls.append(partial(function, *args, **flags)))
        return fire.decorators.SetParseFns(**texts(function))(noted)

    chosen = command.get(args[0] if args else "") if isinstance(command, Mapping) else command
    if own := getattr(chosen, "parse", None):  # most flags are another program's
        return [own(args[1:])]
    words = [*attached(args, chosen)]
    with help_shown():
        fire.Fire({k: note(v) for k, v in command.items()} if isinstance(command, Mapping) else note(command), words)
    return calls


@contextmanager
def help_shown() -> Iterator[None]:
    """Show fire's help on stdout, or in a pager on a terminal, and its errors on stderr, with the command as the user
    typed it. Fire's help lists public attributes of functions as command groups, even the one that fire itself sets, so
    that attribute gets an underscore for the time being."""
    shown, attribute, code = io.StringIO(), fire.decorators.FIRE_METADATA, None
    fire.decorators.FIRE_METADATA = f"_{attribute}"
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            yield
    except SystemExit as end:
        code = end.code
        raise
    finally:
        fire.decorators.FIRE_METADATA = attribute
        text = re.sub(r"\AINFO: Showing help.*\n\s*", "", shown.getvalue()).replace("__main__.py", "python -m llama")
        wrong = re.compile(r"(ERROR: Could not consume arg: .*\n)Usage: (python -m llama \w+|\S+).*", re.DOTALL)
        text = wrong.sub(r"\1For its flags, run:\n  \2 --help\n", text)  # fire's usage repeats what was right
        if code:
            sys.stderr.write(text)
        elif text:
            pydoc.pager(text)
            sys.stdout.flush()


def texts(function: Callable[..., None]) -> dict[str, Callable[[str], Any]]:
    """The arguments that may be a str or a Path, and the function that parses each."""
    hints: dict[str, Any] = {}
    with suppress(NameError):  # of a script whose types only type checkers import
        hints = get_type_hints(function)
    kinds = {name: {hint, *(get_origin(kind) or kind for kind in get_args(hint))} for name, hint in hints.items()}
    return {name: _list_or_text if list in some else str for name, some in kinds.items() if some & {str, Path}}


def _list_or_text(value: str) -> Any:
    parsed = fire.parser.DefaultParseValue(value) if value.lstrip().startswith(("[", "(")) else value
    return parsed if isinstance(parsed, (list, tuple)) else value


def attached(args: Sequence[str], function: Callable[..., None] | None) -> Iterator[str]:
    """Rewrite `--name value` as `--name=value` for str arguments: fire would read `-` as a separator, and a flag
    without a value as True."""
    names, rest = texts(function) if function else {}, iter(args)
    for arg in rest:
        name = arg.lstrip("-").replace("-", "_")
        text = name if name in names else name.removeprefix("no")
        if not arg.startswith("-") or text not in names:
            yield arg
            continue
        value = next(rest, "--")
        if text != name or re.fullmatch(r"--|--?[A-Za-z][\w-]*(=.*)?", value, re.DOTALL):
            raise ValueError(f"{arg} needs a value; one that looks like a flag is given as --{text}=VALUE")
        yield f"--{text}={value}"


def keep_memory() -> None:
    """Make glibc keep freed memory for the next tensor instead of returning it to the system: otherwise page faults
    take a quarter of a long prompt's time on a CPU. This affects the whole process, so only commands do it."""
    try:
        allocator = ctypes.CDLL(None)
    except TypeError:  # Windows
        return
    if hasattr(allocator, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # what malloc.h calls them
        allocator.mallopt(trim_threshold, 2**31 - 1)
        allocator.mallopt(mmap_threshold, 2**25)  # the largest that it takes


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with exit code 1 and one line on stderr if the block raises one of `FORESEEN`; any other error
    prints its traceback. Of several ranks, only the first to fail prints, because the others fail as a consequence."""
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
