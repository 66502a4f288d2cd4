"""A conversation: a dialog that continues."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any
from weakref import ref

import torch

from . import parallel
from .chat import Dialog, Message
from .generation import Llama
from .options import DEFAULTS, plain_arguments
from .stream import Event, Stream, pop_filters


class Chat:
    """A dialog with a Llama. Each turn prefills only what is new, as the engine's cache holds the rest.

    It may begin with a `system` message or a whole `dialog`; options are those of `Llama.chat_completion`. When it
    outgrows max_seq_len, its oldest turns are dropped, but not the system message; `dropped` counts these messages.
    Answers are those to the whole dialog. Under torchrun all ranks make the same calls, and rank 0's arguments count.
    """

    @plain_arguments
    def __init__(self, llama: Llama, system: str | None = None, dialog: Dialog = (), **options: Any) -> None:
        self.llama = llama
        self.options = {**DEFAULTS}
        self.set(**options)
        system, dialog = parallel.broadcast_object((system, dialog))
        if not isinstance(dialog, (list, tuple)):
            raise ValueError(f"dialog is {dialog!r}; it must be a list of messages")
        self.dialog: list[Message] = [*dialog]
        self.dropped = 0
        self._open: Callable[[], Stream | None] = lambda: None  # the last turn's stream, if it still exists
        if system is not None:
            self.dialog.insert(0, {"role": "system", "content": system})
        llama.chat_format.check([*self.dialog, {"role": "user", "content": ""}])
        if self.dialog and self.dialog[0]["role"] == "system":
            alone: Dialog = [self.dialog[0], {"role": "user", "content": ""}]
            count = len(llama.chat_format.encode(llama.tokenizer, alone))
            if count >= llama.model.params.max_seq_len:
                raise ValueError(
                    f"the system message takes {count} of max_seq_len {llama.model.params.max_seq_len} tokens"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Chat:
        """A copy of the conversation that may continue differently, with the same model."""
        twin = copy(self)
        twin.dialog, twin.options = deepcopy(self.dialog, memo), {**self.options}
        twin._open = lambda: None
        return twin

    @parallel.as_first_rank
    @plain_arguments
    def set(self, **options: Any) -> None:
        """Change options. ValueError or TypeError, and no change, where one is not valid."""
        changed = {**self.options, **options}
        input_filter, output_filter = pop_filters(changed)
        inputs = replace(self.llama.inputs, generator=torch.Generator())  # `settings` draws seeds
        [settings] = inputs.settings(1, changed)
        self.options = {**changed, "input_filter": input_filter, "output_filter": output_filter}
        self.max_new = settings.max_new

    def say(self, text: str) -> str:
        """The answer to a message of the user."""
        return self.stream(text).drain()[0].text

    @parallel.as_first_rank
    @plain_arguments
    def stream(self, text: str) -> Stream:
        """The answer as it is generated. When the stream ends or is closed, the user's message and the answer are added
        to the dialog, unless it was refused. An earlier stream that is still open is closed first. ValueError for a
        text that does not fit even alone."""
        if not isinstance(text, str):
            raise ValueError(f"the user's text is {text!r}, which is not a str")
        if last := self._open():
            last.close()
        stream = Stream(self._turn(text))
        self._open = ref(stream)
        return stream

    def _turn(self, text: str) -> Generator[list[Event], None, None]:
        dialog: list[Message] = [*self.dialog, {"role": "user", "content": text}]
        if not self.llama.chat_format.refusal(dialog):
            dialog = self.fitting(dialog)
        said, reason = "", None
        # When the stream is closed, the dialog keeps the part that has been generated; after an error it is unchanged.
        with suppress(GeneratorExit), closing(self.llama._chat([dialog], False, **self.options)) as steps:
            for step in steps:
                said += "".join(event.text for event in step)
                reason = next((event.finish_reason for event in step if event.finish_reason), reason)
                yield step
        answer: Message = {"role": "assistant", "content": self.llama.chat_format.cleaned(said)}
        self.dropped += len(self.dialog) + 1 - len(dialog)
        self.dialog = dialog[:-1] if reason == "refused" else [*dialog, answer]

    def fitting(self, dialog: Sequence[Message]) -> list[Message]:
        """Drop the oldest turns of a dialog that leaves no space for an answer, until half of the context is free, so
        that the next turns drop none and reuse the cache. ValueError if even the last message alone leaves no space."""
        space = self.llama.model.params.max_seq_len
        answer = min(self.max_new, space // 4 if self.options["max_gen_len"] is None else space // 2)
        encode, first = self.llama.chat_format.encode, int(dialog[0]["role"] == "system")
        kept, limit = list(dialog), space - answer
        while (count := len(encode(self.llama.tokenizer, kept))) > limit and len(kept) > first + 1:
            later = (i for i in range(first + 1, len(kept)) if kept[i]["role"] == "user")
            kept, limit = kept[:first] + kept[next(later, len(kept) - 1) :], min(limit, space // 2)
        if count == space and answer:  # for more than that, generation raises an error
            raise ValueError(f"the text takes all of max_seq_len {space}, which leaves no token for an answer")
        return kept
