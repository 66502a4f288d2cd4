"""Linear layers and embeddings that are split over the ranks: fairscale's, trimmed.

fairscale's constructors build the whole matrix on every rank, on the CPU, and then cut it; these allocate this rank's
slice alone, on the default device (torch.device("meta") included), and use this library's groups, not fairscale's. A
weight may be a quantized matrix instead of a tensor: something that multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import Tensor, nn

from .parallel import all_gather, all_reduce, divide, replicated


def linear(x: Tensor, weight: Any) -> Tensor:
    """x (..., in) times the transpose of a weight (out, in) -> (..., out)."""
    if not isinstance(weight, Tensor):
        return weight(x) if x.numel() else x.new_empty(*x.shape[:-1], weight.shape[0])
    if x.device.type == "cpu" and x.dtype != torch.float32:
        return padded_linear(x, weight)
    return F.linear(x, weight)


def padded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` of x (..., in), padded to a rounded number of rows. oneDNN, which computes 16 bits on CPUs, caches a
    kernel for each number of rows: 41 MB after 1,000 small requests."""
    rows = x.numel() // x.shape[-1]
    step = 1 if rows <= 8 else 16 if rows <= 256 else 64
    padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, -rows % step))
    return F.linear(padded, weight)[:rows].view(*x.shape[:-1], len(weight))


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """y = x Wᵀ with the rows of W (out_features, in_features) split over the ranks."""

    def __init__(self, in_features: int, out_features: int, gather_output: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.gather_output = in_features, out_features, gather_output
        self.output_size_per_partition = divide(out_features, "a layer's output size")
        self.weight = _new_weight(self.output_size_per_partition, in_features)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(replicated(x), self.weight)
        return all_gather(y) if self.gather_output else y


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """y = x Wᵀ with the columns of W (out_features, in_features) split over the ranks, as x already is."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, True
        self.input_size_per_partition = divide(in_features, "a layer's input size")
        self.weight = _new_weight(out_features, self.input_size_per_partition)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(linear(x, self.weight))


class ReplicatedLinear(nn.Linear):
    """y = x Wᵀ with W (out_features, in_features) whole on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """Rows of a table (num_embeddings, embedding_dim) whose columns are split over the ranks."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.embedding_dim_per_partition = divide(embedding_dim, "dim")
        self.weight = _new_weight(num_embeddings, self.embedding_dim_per_partition)

    def forward(self, ids: Tensor) -> Tensor:
        return all_gather(F.embedding(ids, self.weight))


def _new_weight(rows: int, columns: int) -> nn.Parameter:
    weight = torch.empty(rows, columns)
    if not weight.is_meta:  # initializing a meta tensor does nothing, but imports modules for most of a second
        nn.init.normal_(weight, std=0.02)
    return nn.Parameter(weight)
