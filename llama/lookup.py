"""Draft tokens copied from the text itself: prompt lookup decoding (Saxena 2023)."""

from __future__ import annotations

NGRAM = 3  # length of the match that a draft continues


class PromptLookup:
    """Drafts up to `max_draft` tokens: those that followed the last NGRAM tokens where the text had them before."""

    def __init__(self, max_draft: int) -> None:
        self.max_draft = self.width = max_draft
        self.index: dict[tuple[int, ...], int] = {}  # NGRAM tokens -> position after them
        self.indexed = NGRAM

    def draft(self, text: list[int]) -> list[int]:
        if not self.max_draft:
            return []
        for end in range(self.indexed, len(text)):
            self.index[tuple(text[end - NGRAM : end])] = end
        self.indexed = max(len(text), NGRAM)
        at = self.index.get(tuple(text[-NGRAM:]), len(text))
        return text[at : at + self.width]

    def accepted(self, count: int) -> None:
        """Say how many tokens of the last draft were right. After a wrong one the next draft is shorter."""
        self.width = min(self.max_draft, 2 * count + 1)
