"""Linear layers and embeddings that are split over the ranks, and the fastest product that this device has for them.

The layers are fairscale's. Its constructors build the whole matrix on every rank, on the CPU, and then cut it; these
allocate this rank's slice alone, on the default device (torch.device("meta") included). To compute gradients they are
fairscale's still; without them, its mappings are left out and a product is `linear`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import Tensor, nn

from .cpp import Matrix, cpp
from .parallel import all_gather, all_reduce, cpu_has, divide

Product = Callable[[Tensor], Tensor]  # x (..., in) -> (..., out)

# Products on a CPU. MKL, by which PyTorch multiplies float32, leaves half of the vectors of an AMD with AVX-512 idle;
# oneDNN does not.
MKL = torch.backends.mkl.is_available()
AMD = MKL and cpu_has("sse4a") and cpu_has("avx512_f")
# The libraries' usual way with few rows is to rearrange the weight first. With the numbers of rows in LEFT it is faster
# to have the weight on the left, (weight xᵀ)ᵀ, where oneDNN rearranges x alone and reads the weight as it lies. So does
# MKL for IN_STRIPS rows of float32, if it is given strips of 16 outputs, too narrow to be worth rearranging.
ANY, STRIP, IN_STRIPS = range(1, 2**63), 16, range(4, 9)
LEFT = {torch.float32: range(4, 128), torch.bfloat16: range(1, 256), torch.float16: range(1, 256)}
# MANY rows of float32 MKL multiplies faster by a weight on the left too, if that has TALL times as many outputs as
# inputs. The result lies transposed, which does no harm to gate and up.
MANY, TALL = 128, 4
# On an AMD MKL reads a weight at the bandwidth, if it is given parts of 64 outputs and up to 4 rows of FEW numbers.
PART, IN_PARTS, FEW = 64, range(1, 5), 6144
TILES = cpu_has("amx_bf16")  # which multiply 32 rows at a time: fewer take as long
# What cpu.cpp multiplies faster than all of these.
IN_CPP = {torch.float32: ANY, torch.bfloat16: range(1, 5 if TILES else 17), torch.float16: range(1, 17)}


def product(weight: Any, rows: int, compiled: bool = False) -> Product:
    """The fastest way here, or that can be compiled, to multiply the transposed weight (out, in) by x (..., in) of so
    many rows. A quantized matrix chooses for itself."""
    if not isinstance(weight, Tensor):
        return weight.product(rows)
    if weight.device.type != "cpu":
        return partial(F.linear, weight=weight)
    whole, single = weight.is_contiguous() and weight.shape[1] % 16 == 0, weight.dtype == torch.float32
    if compiled and whole and rows in IN_CPP.get(weight.dtype, ()) and cpp():
        return Matrix(weight)
    if single and MKL and not AMD and rows in IN_STRIPS and not len(weight) % STRIP:
        return partial(in_strips, weight)
    if single and AMD and rows in IN_PARTS and rows * weight.shape[1] <= FEW and not len(weight) % PART:
        return partial(in_parts, weight)
    if rows in LEFT.get(weight.dtype, ()) and onednn_knows(weight.dtype):
        return partial(from_left, weight)
    if single and AMD and onednn_knows(weight.dtype):
        return partial(from_right, weight)
    return partial(F.linear, weight=weight)


@cache
def onednn_knows(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies this dtype on this CPU; older ones have no way to do it in 16 bits."""
    half = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    known = torch.backends.mkldnn.is_available()
    return known and (dtype not in half or getattr(torch.ops.mkldnn, half[dtype])())


def from_left(weight: Tensor, x: Tensor) -> Tensor:
    y = by_onednn(weight, x.reshape(-1, x.shape[-1]))
    return y.t().view(*x.shape[:-1], -1)  # its columns lie one behind the other


def from_right(weight: Tensor, x: Tensor) -> Tensor:
    return by_onednn(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def by_onednn(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) bᵀ (K, N) -> (M, N)"""
    # Of what lies in no order of rows or columns it makes something a hundred times as slow.
    a, b = (some if some.is_contiguous() or some.t().is_contiguous() else some.contiguous() for some in (a, b))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return y


def in_strips(weight: Tensor, x: Tensor) -> Tensor:
    strips = weight.view(-1, STRIP, weight.shape[1]).transpose(1, 2)  # (out / STRIP, in, STRIP)
    y = torch.bmm(x.reshape(-1, x.shape[-1]).expand(len(strips), -1, -1), strips)  # (out / STRIP, rows, STRIP)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def in_parts(weight: Tensor, x: Tensor) -> Tensor:
    parts = weight.view(-1, PART, weight.shape[1])
    columns = x.reshape(-1, x.shape[-1]).contiguous().t()  # with other strides it takes five times as long
    return torch.bmm(parts, columns.expand(len(parts), -1, -1)).flatten(0, 1).t().view(*x.shape[:-1], -1)


def linear(x: Tensor, weight: Any) -> Tensor:
    """x (..., in) times the transposed weight (out, in) -> (..., out)."""
    rows = x.numel() // x.shape[-1]
    if not rows:  # as a prompt of one token has to score
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    multiply = product(weight, rows)
    if x.device.type != "cpu" or isinstance(multiply, Matrix):
        return multiply(x)
    extra = missing(rows, weight.dtype) if isinstance(weight, Tensor) else weight.pads and missing(rows, torch.int8)
    if not extra:
        return multiply(x)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, extra))
    return product(weight, len(padded))(padded)[:rows].reshape(*x.shape[:-1], -1)


def missing(rows: int, dtype: torch.dtype) -> int:
    """How many rows to add. oneDNN keeps something for every number of rows that it meets: a few hundred MB after a
    thousand prompts."""
    if dtype == torch.float32 and not AMD and rows not in LEFT[dtype]:
        return 0
    exact, step = (4, 32) if dtype == torch.bfloat16 and TILES else (max(IN_STRIPS), 16)
    return 0 if rows <= exact else -rows % (step if rows <= 256 else 64)


def columns(x: Tensor, *layers: ColumnParallelLinear) -> Tensor:
    """What the layers make of x, one behind the other along the last dimension; in one product where their weights lie
    one behind the other in memory."""
    whole = joined([layer.weight for layer in layers])
    if whole is None or (torch.is_grad_enabled() and isinstance(whole, Tensor)):
        return torch.cat([layer(x) for layer in layers], -1)
    many = x.numel() >= MANY * x.shape[-1] and x.device.type == "cpu" and MKL and not AMD
    if many and isinstance(whole, Tensor) and whole.dtype == torch.float32 and len(whole) > TALL * whole.shape[1]:
        return F.linear(whole, x.reshape(-1, x.shape[-1])).t().view(*x.shape[:-1], -1)
    return linear(x, whole)


def joined(weights: Sequence[Any]) -> Any:
    """The matrix that these matrices are the rows of, where they lie one behind the other in one storage; else None."""
    first = weights[0]
    if not isinstance(first, Tensor):
        return first.whole
    end = first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage or not weight.is_contiguous():
            return None
        end += weight.nbytes
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """y = x Wᵀ with the rows of W (out_features, in_features) split over the ranks."""

    def __init__(self, in_features: int, out_features: int, gather_output: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.gather_output = in_features, out_features, gather_output
        self.output_size_per_partition = divide(out_features, "a layer's output size")
        self.weight = _new_weight(self.output_size_per_partition, in_features)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and isinstance(self.weight, Tensor):
            return super().forward(x)
        y = linear(x, self.weight)
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
        if torch.is_grad_enabled() and isinstance(self.weight, Tensor):
            return super().forward(x)
        return all_reduce(linear(x, self.weight))


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
        return super().forward(ids) if torch.is_grad_enabled() else all_gather(F.embedding(ids, self.weight))


def _new_weight(rows: int, columns: int) -> nn.Parameter:
    weight = torch.empty(rows, columns)
    if not weight.is_meta:  # nothing to fill there, and asking for it imports for most of a second
        nn.init.normal_(weight, std=0.02)
    return nn.Parameter(weight)
