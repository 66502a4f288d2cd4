"""Text <-> token ids, by the tokenizer that comes with the weights."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

from .vocabulary import open_vocabulary


class Tokenizer:
    """The tokenizer of any Llama: tokenizer.model of Llama 1 and 2 (SentencePiece) or 3 (tiktoken), or tokenizer.json.
    Any text can be encoded, and nothing is normalized away.

    Attributes: n_words, the size of the vocabulary; bos_id, eos_id; eos_ids, all ids that end an answer; pad_id, -1 if
    there is no padding token; special, the ids by name of special tokens, which text never becomes. Raises
    FileNotFoundError without a file at model_path and ValueError for one of another kind.
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        path = Path(os.path.expanduser(model_path))
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}; give the path of tokenizer.model as tokenizer_path")
        self.vocabulary = open_vocabulary(path)
        self.n_words, self.pad_id = self.vocabulary.n_words, self.vocabulary.pad_id
        self.bos_id, self.eos_id, self.eos_ids = self.vocabulary.bos_id, self.vocabulary.eos_id, self.vocabulary.eos_ids
        self.special = self.vocabulary.special

    @property
    def sp_model(self) -> Any:
        """The SentencePieceProcessor of Llama 2's tokenizer; None for others."""
        return getattr(self.vocabulary, "model", None)

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, with EOS after it if `eos`, and BOS before it if `bos` and the model was trained with BOS.
        Text that spells them stays text."""
        if not isinstance(s, str):
            raise ValueError(f"only a str can be encoded, not {s!r}")
        s.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
        before = [self.bos_id] if bos and self.vocabulary.adds_bos and self.bos_id >= 0 else []
        return before + self.vocabulary.encode(s) + [self.eos_id] * eos

    def encode_special(self, s: str) -> list[int]:
        """The ids of a text with special tokens spelled out. A tokenizer.json may have rules for the text after such a
        token."""
        s.encode()  # as in `encode`
        return self.vocabulary.encode_special(s)

    def decode(self, t: Sequence[int]) -> str:
        """The text of ids. The space that marks the first word is dropped where encoding adds it; special tokens have
        no text; bytes that form no character become U+FFFD."""
        return "".join(self.decode_pieces(t))

    def piece(self, id: int) -> str:
        """The text of one id that is not the first of a text; U+FFFD for a byte."""
        decoder = Decoder(self)
        decoder.empty = False
        return decoder.push(id) + decoder.flush()

    def decode_pieces(self, t: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """The text that each id adds after the ids `before`; joined it is decode(before + t) without decode(before). A
        character comes with the last of its bytes."""
        decoder = Decoder(self, before)
        pieces = [decoder.push(index(i)) for i in t]
        return [*pieces[:-1], pieces[-1] + decoder.flush()] if pieces else []


class Decoder:
    """Incremental decoding: all that `push` and a last `flush` return, joined, is `Tokenizer.decode` of all ids. Bytes
    are held back until they are a character or cannot become one. The text continues that of the ids `before`, if any:
    decode(before) + text = decode(before + ids)."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.vocabulary = tokenizer.vocabulary
        self.bytes = codecs.getincrementaldecoder("utf-8")(self.vocabulary.errors)
        self.empty = True  # no text yet, so that a leading space is dropped
        for ids in (before[-4:], before):  # the last four have any unfinished character, and usually some text
            if self.empty:
                self.bytes.reset()
                for id in ids:
                    self.push(id)

    def push(self, id: int) -> str:
        piece = self.vocabulary.id_to_piece(id)
        if isinstance(piece, bytes):
            text = self.bytes.decode(piece)
        else:
            text = self.flush()
            if self.empty and not text and self.vocabulary.drops and piece.startswith("▁"):
                piece, self.empty = piece[1:], self.vocabulary.drops > 1
            text += piece.replace("▁", " ")
        self.empty = self.empty and not text
        return text

    def flush(self) -> str:
        """The text of bytes that were held back, when no more ids come."""
        return self.bytes.decode(b"", final=True)
