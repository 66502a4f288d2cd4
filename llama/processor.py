"""Texts, dialogs and token ids -> checked requests for the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any

import torch

from .chat import ChatFormat, Dialog
from .grammar import Grammars
from .model import ModelArgs
from .options import Settings, spread_options
from .request import Request
from .scoring import Scores
from .text import Text, border
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class InputProcessor:
    """Turns a model's inputs into requests. Methods raise ValueError that names a bad input and its limit."""

    params: ModelArgs
    tokenizer: Tokenizer
    chat_format: ChatFormat
    generator: torch.Generator  # draws the seeds of prompts without one
    grammars: Grammars

    def encode(self, texts: Any, name: str = "prompts") -> list[list[int]]:
        """The ids of each text, with BOS before it."""
        check_texts(texts, name)
        return [self.tokenizer.encode(text, bos=True, eos=False) for text in texts]

    def encode_continuations(self, prompts: Any, continuations: Any) -> tuple[list[list[int]], list[int]]:
        """The ids of BOS + prompt + continuation, and the index of the first token of each continuation."""
        check_texts(prompts, "prompts")
        check_texts(continuations, "continuations")
        if len(continuations) != len(prompts):
            raise ValueError(f"there are {len(continuations)} continuations for {len(prompts)} prompts")
        rows, begins = [], []
        for i, (prompt, more) in enumerate(zip(prompts, continuations, strict=True)):
            ids = self.tokenizer.encode(prompt + more, bos=True, eos=False)
            begin = border(self.tokenizer, prompt.rstrip(), ids)
            if begin == len(ids) or not more:
                names = f"continuation {i}, {shorten(more)}, adds nothing to prompt {i}, {shorten(prompt)}"
                raise ValueError(f"{names}; there is nothing to score")
            rows.append(ids)
            begins.append(begin)
        return rows, begins

    def encode_dialog(self, dialog: Dialog, name: str, answered: bool = False, unfinished: bool = False) -> list[int]:
        """The ids of a dialog in the chat format. An `answered` one ends with the assistant's message, which is left
        open if `unfinished`."""
        self.chat_format.check(dialog, name, answered=answered)
        if refusal := self.chat_format.refusal(dialog):
            raise ValueError(f"{name}: {refusal}")
        return self.chat_format.encode(self.tokenizer, dialog, answered, unfinished)

    def check_all(self, prompts: Sequence[Sequence[int]], name: str) -> None:
        for i, prompt in enumerate(prompts):
            self.check(prompt, f"{name} {i}")

    def check(self, prompt: Sequence[int], name: str) -> None:
        """ValueError for a prompt that is empty, has another model's ids or does not fit in the cache."""
        size, limit = self.params.vocab_size, self.params.max_seq_len
        if not prompt:
            raise ValueError(f"{name} is empty; it needs at least one token, such as bos_id")
        if odd := [id for id in prompt if type(id) is not int or not 0 <= id < size]:
            raise ValueError(f"{name} contains {shorten(odd[0])}; ids are ints from 0 to {size - 1}")
        if len(prompt) > limit:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, more than max_seq_len {limit}; "
                "shorten it or build with a larger max_seq_len"
            )

    def settings(self, B: int, options: Mapping[str, Any], continues: bool = True) -> list[Settings]:
        """The settings of each of B prompts; `continues` as for `requests`."""
        self.params.check_output()
        limits = self.params.vocab_size, self.tokenizer.eos_ids, self.params.max_seq_len
        found = spread_options(B, *limits, self.generator, options)
        for grammar in {row.grammar for row in found if row.grammar}:
            self.grammars.compile(grammar, continues)
        return found

    def requests(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[Settings],
        logprobs: bool,
        echo: bool = False,
        continues: bool = True,
        top_logprobs: int = 0,
    ) -> list[Request]:
        """A request for each prompt. Its answer `continues` the prompt's text, or is a new text, as in a chat."""
        requests = []
        for prompt, row in zip(prompts, settings, strict=True):
            text = Text(self.tokenizer, row.stop, row.min_new, prompt if continues and not echo else ())
            if echo:
                text.preface(prompt)
            matcher = self.grammars.matcher(row.grammar, continues) if row.grammar else None
            request = Request(
                prompt,
                max_len=min(self.params.max_seq_len, len(prompt) + row.max_new),
                sampling=row.sampling,
                eos_ids=self.tokenizer.eos_ids,
                stop_ids=row.stop_ids,
                min_new=row.min_new,
                lookup=0 if matcher else row.lookup,
                logprobs=logprobs,
                top_logprobs=top_logprobs,
                text=text,
                matcher=matcher,
                echo=echo,
            )
            if echo and logprobs:
                request.observe = scores = Scores(prompt, top=top_logprobs)
                request.compute_from, request.prompt_logprobs = 0, scores.logprobs
            requests.append(request)
        return requests


def check_texts(texts: Any, name: str) -> None:
    if not isinstance(texts, list):
        raise ValueError(f"{name} is {shorten(texts)}; it must be a list of str")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name.removesuffix('s')} {i} is {shorten(text)}, which is not a str")
