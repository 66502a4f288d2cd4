"""A packed batch: tokens of any number of sequences, one after the other without padding, and where each belongs.

Take two sequences in slots 0 and 3 of the cache. The first has 5 tokens there already and decodes one more, the second
begins with a prompt of 3:

    tokens     [ 17,    1, 400, 401 ]
    positions  [  5,    0,   1,   2 ]
    slots      [  0,    3,   3,   3 ]
    sequences  (slot 0, start 5, length 1), (slot 3, start 0, length 3)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .devices import to_device

if TYPE_CHECKING:
    from .args import ModelArgs


class Span(NamedTuple):
    """Consecutive tokens of one sequence."""

    slot: int  # of the KV cache
    start: int  # position of the first token
    length: int


class Batch(NamedTuple):
    """The N tokens of one forward pass. The tensors are on the model's device; `sequences` is known to the host."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, of each token in its sequence
    slots: Tensor  # (N,) int64, where the keys and values of each token are stored
    sequences: tuple[Span, ...]  # in the order of the tokens; the lengths sum to N
    # For each sequence, the number of last tokens whose hidden states are needed; None if all are.
    outputs: Sequence[int] | None = None

    def needed(self) -> list[int] | None:
        """The rows whose hidden states are needed; None if all are."""
        if self.outputs is None or sum(self.outputs) == len(self.tokens):
            return None
        ends = itertools.accumulate(sequence.length for sequence in self.sequences)
        return [row for end, count in zip(ends, self.outputs, strict=True) for row in range(end - count, end)]

    @staticmethod
    def of(parts: Iterable[tuple[int, int, Sequence[int]]], device: torch.device | str = "cpu") -> Batch:
        """A batch of sequences, each (slot, start, ids)."""
        parts = list(parts)
        tokens = torch.tensor([id for _, _, ids in parts for id in ids], device=device)
        return Batch.arrange(tokens, [Span(slot, start, len(ids)) for slot, start, ids in parts])

    @staticmethod
    def arrange(tokens: Tensor, sequences: Sequence[Span], outputs: Sequence[int] | None = None) -> Batch:
        """A batch of tokens (N,) of `sequences`. The tokens may still be in computation on a GPU."""
        positions = to_device([s.start + i for s in sequences for i in range(s.length)], tokens.device)
        slots = to_device([s.slot for s in sequences for _ in range(s.length)], tokens.device)
        return Batch(tokens, positions, slots, tuple(sequences), outputs)

    @staticmethod
    def rows(tokens: Tensor, start_pos: int | Sequence[int] | Tensor, params: ModelArgs) -> Batch:
        """A batch of tokens (B, T), whose rows are in slots 0 to B - 1 from position `start_pos` on, one number for all
        or one for each. ValueError for what does not fit in the cache."""
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}, not ids (batch, seqlen)")
        starts = torch.as_tensor(start_pos, device="cpu").reshape(-1)
        if starts.is_floating_point() or not len(starts):
            raise ValueError(f"start_pos is {start_pos}; give an int, or one for each row")
        B, T = tokens.shape
        if len(starts) not in (1, B):
            raise ValueError(f"start_pos has {len(starts)} values for a batch of {B}; give one, or one per row")
        sequences = [Span(slot, int(start), T) for slot, start in enumerate(starts.expand(B).tolist())]
        check(sequences, params)
        return Batch.arrange(tokens.reshape(-1), sequences)


def check(sequences: Sequence[Span], params: ModelArgs) -> None:
    """ValueError unless the sequences fit in the cache."""
    for slot, start, length in sequences:
        if length < 1 or start < 0:
            raise ValueError(f"{length} tokens at start_pos {start}; give at least one, from position 0 on")
        if not params.max_batch_size:
            if start:
                raise ValueError("start_pos must be 0 in a model without a cache (max_batch_size 0)")
        elif slot >= params.max_batch_size:
            raise ValueError(
                f"a batch of {len(sequences)} exceeds max_batch_size {params.max_batch_size}; build a larger one"
            )
        elif start + length > params.max_seq_len:
            raise ValueError(
                f"position {start + length} exceeds max_seq_len {params.max_seq_len}; build with a larger one"
            )


class Group(NamedTuple):
    """Consecutive sequences of a batch with the same length and start and in consecutive slots, so that one operation
    attends for all of them."""

    tokens: slice  # of the batch
    slots: slice
    T: int  # tokens of each
    S: int  # positions that the last of them attends to
    mask: Tensor | None  # (T, S), true where a query attends; None where T is 1, or T is S and attention is causal


def groups(batch: Batch) -> list[Group]:
    """The groups of a batch, in its order."""
    found: list[Group] = []
    at, device = 0, batch.tokens.device
    for slot, start, T in batch.sequences:
        S = start + T
        last = found[-1] if found else None
        if last and (last.T, last.S, last.slots.stop) == (T, S, slot):
            tokens, slots = slice(last.tokens.start, at + T), slice(last.slots.start, slot + 1)
            found[-1] = last._replace(tokens=tokens, slots=slots)
        else:
            # MPS is given the causal mask too: some of its releases leak the future into half precision without one.
            full = T == 1 or (start == 0 and device.type != "mps")
            mask = None if full else torch.ones(T, S, dtype=torch.bool, device=device).tril(start)
            found.append(Group(slice(at, at + T), slice(slot, slot + 1), T, S, mask))
        at += T
    return found
