"""Text <-> token ids, by the SentencePiece model that comes with the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """Llama 2's tokenizer: BPE with byte fallback, so that any text can be encoded and nothing is normalized away.

    Attributes: n_words, the size of the vocabulary; bos_id, eos_id; pad_id, which is -1: there is no padding token.
    Raises FileNotFoundError without a file at model_path and ValueError for one that is no SentencePiece model.
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        path = Path(model_path)
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

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, with BOS before and EOS after it if asked for; text that spells them stays text."""
        if not isinstance(s, str):
            raise ValueError(f"only a str can be encoded, not {s!r}")
        s.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
        return [self.bos_id] * bos + self.sp_model.encode(s) + [self.eos_id] * eos

    def decode(self, t: Sequence[int]) -> str:
        """The text of ids. The space that marks the first word is dropped, as SentencePiece does; bytes that form no
        character become U+FFFD."""
        return self.sp_model.decode(list(t))

    def decode_pieces(self, t: Sequence[int]) -> list[str]:
        """What each id adds to the text; joined, exactly `decode(t)`. A character comes with the last of its bytes."""
        texts: list[str] = []
        run = b""  # bytes since the last ordinary piece
        first = True
        for i in t:
            piece = self.sp_model.id_to_piece(i)
            if self.sp_model.is_byte(i):
                run += bytes([int(piece[1:-1], 16)])  # <0xE4>
                continue
            texts += _characters(run)
            run = b""
            if self.sp_model.is_control(i):
                texts.append("")
                continue
            if self.sp_model.is_unknown(i):
                piece = " \u2047 "
            elif first and not any(texts):
                first, piece = not piece.startswith("▁"), piece.removeprefix("▁")
            texts.append(piece.replace("▁", " "))
        return texts + list(_characters(run))


def _characters(run: bytes) -> Iterator[str]:
    """One string for each byte: empty until a UTF-8 character is complete, U+FFFD for a byte that is part of none."""
    i = 0
    while i < len(run):
        for size in range(1, 5):
            try:
                character = run[i : i + size].decode()
            except UnicodeDecodeError:
                continue
            yield from [""] * (size - 1) + [character]
            break
        else:
            size = 1
            yield "\ufffd"
        i += size
