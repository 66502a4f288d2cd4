"""Text <-> token ids, by the SentencePiece model that comes with the weights."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from operator import index
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """Llama 2's tokenizer: BPE with byte fallback, so that any text can be encoded and nothing is normalized away.

    Attributes: n_words, the size of the vocabulary; bos_id, eos_id; pad_id, which is -1: there is no padding token.
    Raises FileNotFoundError without a file at model_path and ValueError for one that is no SentencePiece model.
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        path = Path(os.path.expanduser(model_path))
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}; give the path of tokenizer.model as tokenizer_path")
        try:
            self.sp_model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a SentencePiece model: {error}") from error
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        # How the model decodes, of which it tells nothing else: the text of <unk>, and how many of two spaces that
        # begin a text are dropped. 1: of a first word the space that encoding adds; 2: all; 0: none.
        self.unknown: str = self.sp_model.decode([self.sp_model.unk_id()])
        ids, piece = [self.sp_model.piece_to_id("▁"), *range(self.n_words)], self.sp_model.id_to_piece
        space = next((id for id in ids if piece(id).startswith("▁")), None)
        self.drops = 0 if space is None else 2 * len(piece(space)) - len(self.decode([space, space]))

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, with BOS before and EOS after it if asked for; text that spells them stays text."""
        if not isinstance(s, str):
            raise ValueError(f"only a str can be encoded, not {s!r}")
        s.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
        return [self.bos_id] * bos + self.sp_model.encode(s) + [self.eos_id] * eos

    def decode(self, t: Sequence[int]) -> str:
        """The text of ids. The space that marks the first word is dropped where SentencePiece does, which is where it
        was added; bytes that form no character become U+FFFD."""
        return self.sp_model.decode([*map(index, t)])

    def piece(self, id: int) -> str:
        """The text of one id inside of a text; U+FFFD for a byte."""
        decoder = Decoder(self)
        decoder.empty = False
        return decoder.push(id) + decoder.flush()

    def decode_pieces(self, t: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """What each id adds to the text of those `before`; joined, exactly `decode(t)` where there are none. A
        character comes with the last of its bytes."""
        decoder = Decoder(self, before)
        pieces = [decoder.push(index(i)) for i in t]
        return [*pieces[:-1], pieces[-1] + decoder.flush()] if pieces else []


class Decoder:
    """Ids -> text, piece by piece, as it becomes final: all that `push` and a last `flush` give, joined, is exactly
    what `Tokenizer.decode` makes of all ids. Bytes wait until they are a character or can be none. The text continues
    that of the ids `before`, if there are any: decode(before) + text = decode(before + ids)."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.sp_model, self.unknown, self.drops = tokenizer.sp_model, tokenizer.unknown, tokenizer.drops
        self.bytes = codecs.getincrementaldecoder("utf-8")(EACH)
        self.empty = True  # nothing yet, so that a space is dropped
        for ids in (before[-4:], before):  # four hold any unfinished character, and mostly some text
            if self.empty:
                self.bytes.reset()
                for id in ids:
                    self.push(id)

    def push(self, id: int) -> str:
        piece: str = self.sp_model.id_to_piece(id)
        if self.sp_model.is_byte(id):
            text = self.bytes.decode(bytes([int(piece[1:-1], 16)]))  # <0xE4>
        else:
            text = self.flush()
            if self.sp_model.is_unknown(id):
                text += self.unknown
            elif not self.sp_model.is_control(id):
                if self.empty and not text and self.drops and piece.startswith("▁"):
                    piece, self.empty = piece[1:], self.drops > 1
                text += piece.replace("▁", " ")
        self.empty = self.empty and not text
        return text

    def flush(self) -> str:
        """What is left when no more ids come: bytes that wait are no character."""
        return self.bytes.decode(b"", final=True)


EACH = "llama.each"  # U+FFFD for each byte, as SentencePiece has it; "replace" has one for several
codecs.register_error(EACH, lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]
