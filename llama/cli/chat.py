"""python -m llama chat: a conversation in a terminal, on any number of ranks. Rank 0 reads and writes."""

from __future__ import annotations

import json
import os
from ast import literal_eval
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import parallel
from ..checkpoint import write_file
from ..conversation import Chat
from ..generation import Llama
from .flags import documented
from .script import say
from .terminal import next_line, terminal

HELP = """\
/reset              forget the conversation
/system TEXT        start a new conversation with this system message; without TEXT, with none
/set NAME VALUE     set an option, such as /set temperature 0.2; without a name, show all
/save FILE          write the conversation to a file
/load FILE          continue a saved conversation
/help               show this list
A line that ends with \\ continues on the next one. Ctrl-C stops an answer, Ctrl-D ends the chat."""


@documented
def chat(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    system: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    max_seq_len: int = 2048,
    seed: int = 1,
    prompt_lookup: int = 0,
    **options: Any,
) -> None:
    """Chat with a model in the terminal, or pipe in prompts, one per line; /help lists the commands.

    Args:
        system: system message of the conversation
        temperature: 0 for greedy decoding
        top_p: sample from the smallest set of tokens whose total probability reaches this
        max_gen_len: maximum number of tokens of an answer
        max_seq_len: maximum number of tokens of the conversation that the model sees
        seed: random seed; the same seed gives the same answers
        prompt_lookup: number of draft tokens per step, taken from the conversation; faster where answers repeat it
    """
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, 1, seed=seed, **options)
    sampling = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "prompt_lookup": prompt_lookup}
    chat = Chat(llama, system, **sampling)  # type: ignore[arg-type]
    with terminal() as (read, interrupted, tty):
        if tty:
            say("Ask something, or /help.")
        while (line := next_line(read)) is not None:
            try:
                if line.startswith("/"):
                    chat = command(chat, line)
                elif line.strip():
                    answer(chat, line, interrupted)
            except (ValueError, TypeError, OSError, parallel.RankError) as error:
                say(f"error: {' '.join(str(error).split())}")


def answer(chat: Chat, text: str, interrupted: Callable[[], bool]) -> None:
    dropped = chat.dropped
    with chat.stream(text) as stream:
        for event in stream:
            say(event.text, end="")
            if parallel.rank() == 0 and interrupted():
                say(" ...", end="")
                break  # closing the stream stops the other ranks too
    say("")
    if chat.dropped > dropped:
        say(f"(the conversation is too long: its {chat.dropped - dropped} oldest messages are forgotten)")


def command(chat: Chat, line: str) -> Chat:
    """Execute a line that begins with /, on every rank; only rank 0 reads and writes files. Returns the conversation to
    continue."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        system = chat.dialog[:1] if chat.dialog and chat.dialog[0]["role"] == "system" else []
        return Chat(chat.llama, dialog=system, **chat.options)
    if name == "/system":
        return Chat(chat.llama, rest or None, **chat.options)
    file = Path(os.path.expanduser(rest))
    if name == "/save" and rest:
        text = json.dumps(chat.dialog, indent=1, ensure_ascii=False)
        parallel.ask_first_rank(write_file, file, text.encode())
        say(f"saved to {rest}")
    elif name == "/load" and rest:
        saved = parallel.ask_first_rank(file.read_bytes)
        try:
            loaded = Chat(chat.llama, dialog=json.loads(saved), **chat.options)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{rest}: {error}") from error
        say(f"{len(loaded.dialog)} messages")
        return loaded
    elif name == "/set":
        option, _, value = rest.partition(" ")
        if option:
            with suppress(ValueError, SyntaxError):
                value = literal_eval(value)
            chat.set(**{option: value})
        for name, value in chat.options.items():
            if value is not None:
                say(f"{name} {value}")
    else:
        say(HELP)
    return chat
