"""Structured output: answers that match a JSON schema or a regular expression, by the package llguidance.

A grammar is a text in llguidance's variant of Lark. It is compiled once; each request has a matcher of its own, which
knows the tokens that may come next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from reprlib import repr as shorten
from typing import Any

import torch
from torch import Tensor

from .text import encode_inside
from .tokenizer import Tokenizer

# As json.dumps writes: small models repeat white space without end where it is free.
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ESCAPE = re.compile(r"\\?[/\n]|\\.")  # slashes and newlines, which need an escape between slashes, and other escapes


def to_grammar(json_schema: str | Mapping[str, Any] | None, regex: str | None) -> str:
    """The grammar of one request, empty for neither; ValueError for a value of another type, or for both."""
    if json_schema is not None and regex is not None:
        raise ValueError("json_schema and regex are given; an answer can follow one of them")
    if regex is not None:
        if not isinstance(regex, str):
            raise ValueError(f"regex is {shorten(regex)}; it must be a str")
        return f"body: /(?:{ESCAPE.sub(escape, regex)})/"
    if json_schema is None:
        return ""
    schema: Any = json_schema
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(schema, dict):
            raise TypeError("not a JSON object")
        return f"body: %json {json.dumps({'x-guidance': JSON_OPTIONS, **schema})}"
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json_schema is {shorten(json_schema)}; it must be a JSON object: {error}") from error


def escape(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(found[0][-1], found[0])


class Grammars:
    """Compiles grammars for a tokenizer and logits of `vocab_size`."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.compile = lru_cache(64)(self._compile)

    def matcher(self, grammar: str, continues: bool) -> Matcher:
        """A matcher of a new request; see `_compile`."""
        return Matcher(self.compile(grammar, continues).deep_copy(), self.vocab_size)

    def _compile(self, grammar: str, continues: bool) -> Any:
        """A matcher to copy. ValueError if llguidance is missing or refuses the grammar. Where the answer does not
        continue a text, decoding may drop a space before its first token, so the grammar allows one."""
        name = "regex" if grammar.startswith("body: /") else "json_schema"
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            text = f"{name} needs the package llguidance: pip install 'llama-reference[grammar]'"
            raise ValueError(text) from error
        drops = self.tokenizer.vocabulary.drops and not continues
        start = 'start: " "? body' if drops else "start: body"
        found = LLMatcher(self.vocabulary, f"{start}\n{grammar}\n", log_level=0)
        if found.is_error():
            why = re.sub(r"^at \d+\(\d+\): ", "", found.get_error()).partition("\n   1 | ")[0]  # the grammar follows
            raise ValueError(f"{name} is not supported: {' '.join(why.split())}")
        return found

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer, prepared by llguidance."""
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = sorted(self.tokenizer.eos_ids)
        return LLTokenizer(TokenizerWrapper(Tokens(self.tokenizer)), n_vocab=self.vocab_size, eos_token=ends)


class Tokens:
    """A tokenizer with the interface that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = sorted({*tokenizer.special.values()})
        pieces = map(tokenizer.vocabulary.id_to_piece, range(tokenizer.n_words))
        # Decoding may drop a first "▁" but never a space that is a byte token, so that token is left out.
        unused = b" " if tokenizer.vocabulary.drops else None
        self.tokens = [
            b"" if piece == unused else piece if isinstance(piece, bytes) else piece.replace("▁", " ").encode()
            for piece in pieces
        ]

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that continues another."""
        if self.tokenizer.vocabulary.drops:
            return encode_inside(self.tokenizer, text)
        return self.tokenizer.encode(text, bos=False, eos=False)


class Matcher:
    """The state of one request's answer in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher, self.vocab_size = matcher, vocab_size

    def mask(self, without: Sequence[int] = ()) -> Tensor:
        """Bool (V,) on the CPU, true for tokens that may come next; not those in `without`, unless only they may."""
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        mask = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).view(-1)[: self.vocab_size].bool()
        other = mask.clone()
        other[list(without)] = False
        return other if other.any() else mask

    def take(self, id: int) -> bool:
        """Take the token that was sampled; whether the answer is complete. ValueError for one that the mask excludes,
        which is sampled where other options exclude all the rest."""
        if not self.matcher.consume_token(id):
            raise ValueError(f"the answer cannot follow its grammar: {self.matcher.get_error().splitlines()[0]}")
        stopped: bool = self.matcher.is_stopped()
        return stopped
