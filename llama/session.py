"""A conversation, whose turns cost no more than what is new in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import parallel
from .chat import TAGS, Dialog, Message, check_dialog, encode_dialog, has_tags
from .generation import Llama
from .stream import Event, Stream, collect

# What is an argument of its own, and not one of generation.Options.
DEFAULTS: dict[str, Any] = {
    "temperature": 0.6,
    "top_p": 0.9,
    "max_gen_len": None,
    "judge_input": None,
    "judge_output": None,
}


class Chat:
    """A dialog with a Llama, which keeps what its cache holds of it between turns: each prefills what is new.

    `system` or a whole `dialog` may begin it; options are those of `Llama.chat_completion`. When a dialog outgrows
    max_seq_len, its oldest turns go, and the system message stays; `dropped` counts the messages that went. Answers are
    those that the whole dialog would get. Under torchrun all ranks make the same calls.
    """

    def __init__(self, llama: Llama, system: str | None = None, dialog: Dialog = (), **options: Any) -> None:
        self.llama, self.options = llama, DEFAULTS
        self.set(**options)
        self.dialog: list[Message] = [*dialog]
        self.dropped = 0
        if system is not None:
            self.dialog.insert(0, {"role": "system", "content": system})
        check_dialog([*self.dialog, {"role": "user", "content": ""}])

    def set(self, **options: Any) -> None:
        """Change options; ValueError or TypeError, and no change, for what is none."""
        changed = {**self.options, **options}
        fixed, rest = self._split(changed)
        prompt = [[self.llama.tokenizer.bos_id]]
        self.llama._plan(prompt, fixed["max_gen_len"], fixed["temperature"], fixed["top_p"], rest)
        self.options = changed

    @staticmethod
    def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        return {name: options[name] for name in DEFAULTS}, {n: o for n, o in options.items() if n not in DEFAULTS}

    def say(self, text: str) -> str:
        """The answer to what the user says."""
        [answer] = collect(([event] for event in self.stream(text)), 1)
        return answer.text

    def stream(self, text: str) -> Stream:
        """The answer as it happens. Once this has ended or is closed, the dialog has what was said on both sides; but
        not what was refused. ValueError for a text that does not fit even alone."""
        return Stream(self._turn(parallel.broadcast_object(text)))

    def _turn(self, text: str) -> Iterator[list[Event]]:
        before = len(self.dialog)
        dialog: list[Message] = [*self.dialog, {"role": "user", "content": text}]
        if not has_tags(dialog):
            dialog = self.fitting(dialog)
        fixed, rest = self._split(self.options)
        steps = self.llama._chat([dialog], **fixed, logprobs=False, options=rest, keep=True)
        self.dropped += before + 1 - len(dialog)
        said, refused = "", False
        try:
            for step in steps:
                said += "".join(event.text for event in step)
                refused = refused or any(event.finish_reason == "refused" for event in step)
                yield step
        except Exception:
            self.dropped -= before + 1 - len(dialog)
            raise
        except GeneratorExit:  # what was said until now was said
            self._remember(dialog, said, refused)
            raise
        self._remember(dialog, said, refused)

    def _remember(self, dialog: list[Message], said: str, refused: bool) -> None:
        for tag in TAGS:  # the model may say what no message may contain
            said = said.replace(tag, "")
        self.dialog = dialog[:-1] if refused else [*dialog, {"role": "assistant", "content": said}]

    def fitting(self, dialog: Sequence[Message]) -> list[Message]:
        """A dialog without its oldest turns, where it leaves no room for an answer. If some must go, so many go that
        half of the context is free and the next turns need not begin anew."""
        room = self.llama.model.params.max_seq_len
        most = self.options["max_gen_len"]
        answer = min(room // 4 if most is None else most, room // 2)
        tokenizer, first = self.llama.tokenizer, int(dialog[0]["role"] == "system")
        kept, limit = list(dialog), room - answer
        while len(kept) > first + 1 and len(encode_dialog(tokenizer, kept)) > limit:
            kept, limit = kept[:first] + kept[first + 2 :], min(limit, room // 2)
        return kept
