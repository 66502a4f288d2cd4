"""One row's tokens -> its text as it becomes final, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .tokenizer import Decoder, Tokenizer


class Text:
    """Decodes a row's tokens one by one, and ends its text before the first stop string, which may begin and end within
    tokens. The text continues that of the tokens `before`, if any.

    What all calls of `read` return, joined, is the text; no part of a stop string is ever returned. Stop strings are
    ignored in the first `least` - 1 tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), least: int = 0, before: Sequence[int] = ()
    ) -> None:
        self.decoder, self.stops, self.left = Decoder(tokenizer, before), stops, least
        self.final = ""  # not read yet
        self.held = ""  # may be the beginning of a stop string
        self.stopped = False

    def preface(self, ids: Sequence[int]) -> None:
        """Put tokens before the first one, in which stop strings are ignored."""
        self.final += "".join(map(self.decoder.push, ids))

    def add(self, id: int) -> bool:
        """Add a token; whether it completes a stop string."""
        self._append(self.decoder.push(id))
        return self.stopped

    def read(self, end: bool = False) -> str:
        """The text that has become final since the last call; with `end`, as no tokens follow, all the rest."""
        if end:
            self._append(self.decoder.flush())
            self.final += self.held
            self.held = ""
        text, self.final = self.final, ""
        return text

    def _append(self, new: str) -> None:
        if self.stopped:
            return
        text, self.held = self.held + new, ""
        self.left -= 1
        if self.left > 0:
            self.final += text
            return
        complete = [(text.index(stop) + len(stop), -len(stop)) for stop in self.stops if stop in text]
        if complete:
            end, minus_length = min(complete)  # of two with one end, the longer
            self.stopped = True
            self.final += text[: end + minus_length]
            return
        begins = (n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        begun = max(begins, default=0)
        self.final += text[: len(text) - begun]
        self.held = text[len(text) - begun :]


MARK = "☺"  # merges with nothing, and what follows it gets no space of a first word


def encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that follows another: without the space that the tokenizer may add before a first word."""
    mark, both = (tokenizer.encode(t, bos=False, eos=False) for t in (MARK, MARK + text))
    return both[len(mark) :]


def border(tokenizer: Tokenizer, beginning: str, ids: Sequence[int]) -> int:
    """The index of the first of `ids` (BOS and a text) that is not wholly part of its `beginning`, or len(ids)."""
    alone = tokenizer.decode(tokenizer.encode(beginning, bos=True, eos=False))
    pieces = tokenizer.decode_pieces(ids)
    first = next((n for n, text in enumerate(accumulate(pieces)) if not alone.startswith(text)), len(ids))
    while 1 < first < len(ids) and not pieces[first - 1]:  # it has the first bytes of that id's character
        first -= 1
    return first
