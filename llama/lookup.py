"""Guesses of what comes next, copied from the text itself: prompt lookup (Saxena 2023)."""

from __future__ import annotations

NGRAM = 3  # tokens that must have stood before for what followed them to be a guess


class Lookup:
    """Finds where the last NGRAM tokens of a growing text last stood before, and what followed them: `most` tokens."""

    def __init__(self, most: int) -> None:
        self.most = self.width = most
        self.places: dict[tuple[int, ...], int] = {}  # tokens -> where what followed them begins
        self.seen = NGRAM
        self.guessed = 0

    def guess(self, text: list[int]) -> list[int]:
        if not self.most:
            return []
        for end in range(self.seen, len(text)):
            self.places[tuple(text[end - NGRAM : end])] = end
        self.seen = max(len(text), NGRAM)
        place = self.places.get(tuple(text[-NGRAM:]), len(text))
        found = text[place : place + self.width]
        self.guessed = len(found)
        return found

    def judge(self, right: int) -> None:
        """How many tokens of the last guess were right. After a wrong one guess less, as each costs a little."""
        if self.guessed:
            self.width = min(self.most, 2 * min(right, self.guessed) + 1)
