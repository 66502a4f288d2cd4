"""A model's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

MOST_LAYERS = 10_000  # more come from a damaged file, and the names of their weights alone would fill memory


def check_layers(n_layers: int) -> None:
    """ValueError for more layers than any model has."""
    if n_layers > MOST_LAYERS:
        raise ValueError(f"n_layers is {n_layers}; it must be at most {MOST_LAYERS}")


class RopeScaling(NamedTuple):
    """How frequencies of RoPE are scaled for long texts, by the names of Hugging Face's config.json."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rope_type: str = "llama3"  # or linear, for which the factor alone counts

    def check(self) -> None:
        """ValueError for an unsupported type, or a number that is not positive."""
        *numbers, kind = self
        if kind not in ("llama3", "linear"):
            raise ValueError(f"rope_scaling has the rope_type {kind!r}; only llama3 and linear are supported")
        for name, value in zip(self._fields, numbers, strict=False):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
                raise ValueError(f"rope_scaling has the {name} {value!r}; it must be a positive number")


@dataclass
class ModelArgs:
    """A model's shape, by the keys of params.json, and how much cache to hold. ValueError for impossible values."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: the tokenizer decides
    multiple_of: int = 256  # the hidden size of the feed-forward layer is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    max_batch_size: int = 32  # 0: no cache, for training
    max_seq_len: int = 2048
    rope_theta: float = 10000.0  # from here on not in Meta's first ModelArgs, whose order of arguments is kept
    rope_scaling: RopeScaling | None = None  # or a mapping of its fields
    head_dim: int = 0  # 0: dim / n_heads
    tie_word_embeddings: bool = False  # the output matrix is the embeddings: one tensor for both, on one rank
    n_labels: int = 0  # > 0: a score head with this many labels replaces the output matrix

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):
            self.rope_scaling = RopeScaling(**self.rope_scaling)
        if self.rope_scaling is not None:
            self.rope_scaling.check()
        for field in fields(self):
            value = getattr(self, field.name)
            if (value is None and field.default is None) or field.name in ("rope_scaling", "tie_word_embeddings"):
                continue
            kind: Any = Real if "float" in str(field.type) else Integral
            if isinstance(value, bool) or not isinstance(value, kind) or not -math.inf < value < math.inf:
                raise ValueError(f"{field.name} is {value!r}, which is not int{' or float' * (kind is Real)}")
            unset = {"vocab_size": -1, "max_batch_size": 0, "head_dim": 0, "n_labels": 0}.get(field.name)
            if not 0 < value < 2**31 and value != unset:
                raise ValueError(f"{field.name} is {value}; it must be positive and below 2^31")
        check_layers(self.n_layers)
        if not self.head_dim and self.dim % self.n_heads == 0:
            self.head_dim = self.dim // self.n_heads
        if not self.head_dim or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} cannot be divided into n_heads {self.n_heads} heads of even size")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.kv_heads}")
        if not self.ffn_hidden:
            raise ValueError(f"ffn_dim_multiplier {self.ffn_dim_multiplier} gives the feed-forward layer no units")

    def check_output(self) -> None:
        """ValueError for a model without logits over the vocabulary."""
        if self.n_labels:
            raise ValueError("the model has a score head and no output matrix; use classify")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_hidden(self) -> int:
        """7B: int(2 * 4 * 4096 / 3) = 10922, rounded up to a multiple of 256 = 11008."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)
