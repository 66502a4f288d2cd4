"""Guesses of what comes next, copied from the text itself: prompt lookup (Saxena 2023)."""

from __future__ import annotations

NGRAM = 3  # tokens that must have stood before for what followed them to be a guess


class Lookup:
    """For a text that grows: what followed its last NGRAM tokens when they last stood there, `most` tokens at most."""

    def __init__(self, most: int) -> None:
        self.most = self.width = most
        self.places: dict[tuple[int, ...], int] = {}  # tokens -> where what followed them begins
        self.seen = NGRAM

    def guess(self, text: list[int]) -> list[int]:
        for end in range(self.seen, len(text)):
            self.places[tuple(text[end - NGRAM : end])] = end
        self.seen = max(len(text), NGRAM)
        place = self.places.get(tuple(text[-NGRAM:]), len(text))
        return text[place : place + self.width]

    def judge(self, guessed: int, right: int) -> None:
        """Guess less after a wrong guess, as each costs a little."""
        if guessed:
            self.width = min(self.most, 2 * right + 1)
