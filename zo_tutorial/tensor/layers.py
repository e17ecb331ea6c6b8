"""Linear layers with a compressed weight: TT, TTM, and TTM as a photonic tensor core computes it.

All three are `y = x W^T + b` with a weight W (out_features, in_features) that exists only as cores. They start from a
weight of variance 2 / in_features (Kaiming) and a bias of zero, so that the variance of an output comes from W alone.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from zo_tutorial.tensor.formats import (
    FORMATS,
    attainable_ranks,
    core_shapes,
    dense_flops,
    parameter_count,
    ttm_in_turn,
    ttm_in_turn_flops,
    whole_numbers,
)

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


Sizes = Sequence[int]
Ranks = int | Sequence[int]


class _TensorLayer(nn.Module):
    """What the three layers share: `cores`, the parameters, and `core_shapes`, their shapes as the format has them."""

    def __init__(self, in_features, out_features, factors, tensor_type, max_rank, bias, generator):
        super().__init__()
        if tensor_type not in FORMATS:
            raise ValueError(f"tensor_type: {tensor_type!r} is unknown; choose from {', '.join(FORMATS)}")
        in_factors, out_factors = map(whole_numbers, factors)
        in_features, out_features = whole_numbers([in_features, out_features])
        if len(in_factors) != len(out_factors) or not in_factors:
            raise ValueError(f"in and out need equally many factors, at least one; got {in_factors} and {out_factors}")
        for side, features, side_factors in (("in", in_features, in_factors), ("out", out_features, out_factors)):
            if prod(side_factors) != features or min(side_factors) < 1:
                raise ValueError(f"the {side} factors {side_factors} do not multiply to {side}_features = {features}")
        self.in_features, self.out_features = in_features, out_features
        self.in_factors, self.out_factors = in_factors, out_factors
        self.tensor_type = tensor_type
        self.format = FORMATS[tensor_type]
        modes = self.format.modes(in_factors, out_factors)
        self.ranks = attainable_ranks(max_rank, modes)
        self.core_shapes = core_shapes(modes, self.ranks)
        # Var W = r_1 ... r_{K-1} s^(2K) for K cores of variance s^2: an entry is a sum of r_1 ... r_{K-1} products.
        std = (2 / in_features / prod(self.ranks)) ** (1 / (2 * len(modes)))
        self.cores = nn.ParameterList()
        for k, shape in enumerate(self.core_shapes):
            core = torch.randn(shape, generator=generator)
            # Scaled to a mean square of exactly s^2: a core of few numbers then cannot blow up or silence the layer.
            core *= std / core.square().mean().sqrt()
            self.cores.append(nn.Parameter(core.reshape(self._stored_shape(k))))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def _stored_shape(self, k: int) -> tuple[int, ...]:
        """The shape in which the k-th core is a parameter."""
        return self.core_shapes[k]

    def tensor_cores(self) -> list[Tensor]:
        """The cores in the shapes of the format: views of the parameters."""
        return [core.reshape(shape) for core, shape in zip(self.cores, self.core_shapes, strict=True)]

    def to_matrix(self) -> Tensor:
        """The weight W, (out_features, in_features)."""
        return self.format.to_matrix(self.tensor_cores())

    def contract(self, x: Tensor) -> Tensor:
        """x W^T without forming W, for x (B, in_features)."""
        return self.format.contract(x, self.tensor_cores())

    def contract_flops(self, rows: int) -> int:
        """Multiply-adds of `contract` for an x of so many rows."""
        return self.format.contract_flops(rows, self.core_shapes)

    def dense_flops(self, rows: int) -> int:
        """Multiply-adds of forming W, the same for any number of rows, and of x W^T with it."""
        return self.format.matrix_flops(self.core_shapes) + dense_flops(rows, self.in_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b for x (..., in_features), by contraction or through W, whichever takes fewer multiply-adds.

        Raises:
            ValueError: the last dimension of x is not in_features.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, the layer takes in_features = {self.in_features}")
        leading, rows = x.shape[:-1], x.shape[:-1].numel()
        if self.dense_flops(rows) < self.contract_flops(rows):
            return F.linear(x, self.to_matrix(), self.bias)
        y = self.contract(x.reshape(rows, self.in_features)).reshape(*leading, self.out_features)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def _take(self, linear: nn.Linear) -> "Self":
        """Take the weight of a dense layer, by TT-SVD, and its bias, device and dtype."""
        if linear.weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"the factors {self.in_factors} and {self.out_factors} make {self.in_features} -> {self.out_features}, "
                f"the linear layer is {linear.in_features} -> {linear.out_features}"
            )
        self.to(linear.weight)
        cores = self.format.svd(linear.weight.detach(), self.in_factors, self.out_factors, self.ranks)
        for mine, theirs in zip(self.cores, cores, strict=True):
            mine.copy_(theirs.reshape(mine.shape))
        if self.bias is not None:
            self.bias.copy_(linear.bias)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, in_factors={self.in_factors}, "
            f"out_factors={self.out_factors}, ranks={self.ranks}, bias={self.bias is not None}, "
            f"core_parameters={parameter_count(self.core_shapes)}"
        )


class TensorizedLinear(_TensorLayer):
    """A linear layer whose weight is in TT format: 2p cores, the p factors of the input first (chapter 6).

    Args:
        in_tensorized_features: the factors n_1..n_p of in_features.
        out_tensorized_features: the factors m_1..m_p of out_features.
        rank: a bound for all ranks, or the list of all 2p + 1 ranks with 1 at both ends; lowered to the attainable.
        bias: whether to add a bias (out_features,).
        generator: where the initial cores are drawn from; None: torch's global generator.

    Raises:
        ValueError: unequal numbers of factors, factors that are no whole numbers, or ranks of the wrong form.
    """

    def __init__(
        self,
        in_tensorized_features: Sequence[int],
        out_tensorized_features: Sequence[int],
        rank: int | Sequence[int],
        bias: bool = True,
        *,
        generator: Generator | None = None,
    ):
        factors = [whole_numbers(side) for side in (in_tensorized_features, out_tensorized_features)]
        super().__init__(prod(factors[0]), prod(factors[1]), factors, "TensorTrain", rank, bias, generator)

    @classmethod
    def from_linear(cls, linear: nn.Linear, in_factors: Sizes, out_factors: Sizes, ranks: Ranks) -> "Self":
        """The TT layer nearest to a dense one that TT-SVD finds with these ranks; exact if they are high enough."""
        return cls(in_factors, out_factors, ranks, linear.bias is not None, generator=Generator())._take(linear)


class TensorizedLinear_module(_TensorLayer):
    """A linear layer whose weight is in TTM format (matrix product operator): one core a factor pair (chapter 7).

    Args:
        in_features: N.
        out_features: M.
        bias: whether to add a bias (out_features,).
        shape: the factors, [[n_1..n_p], [m_1..m_p]]. Needed: the None that stands for it is an error.
        tensor_type: 'TensorTrainMatrix', p cores (r_{k-1}, m_k, n_k, r_k); or 'TensorTrain', 2p cores as in
            `TensorizedLinear`.
        max_rank: a bound for all ranks, or the list of all ranks with 1 at both ends; lowered to the attainable.
        generator: where the initial cores are drawn from; None: torch's global generator.

    Raises:
        ValueError: factors that do not multiply to the features, unknown tensor_type, or ranks of the wrong form.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        shape: Sequence[Sequence[int]] | None = None,
        tensor_type: str = "TensorTrainMatrix",
        max_rank: int | Sequence[int] = 20,
        *,
        generator: Generator | None = None,
    ):
        if shape is None or len(shape) != 2:
            raise ValueError(f"shape must be [[n_1..n_p], [m_1..m_p]], the factors of in and out, not {shape}")
        super().__init__(in_features, out_features, shape, tensor_type, max_rank, bias, generator)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, in_factors: Sizes, out_factors: Sizes, ranks: Ranks, tensor_type="TensorTrainMatrix"
    ) -> "Self":
        """The layer nearest to a dense one that TT-SVD finds with these ranks; exact if they are high enough."""
        sizes, shape = (linear.in_features, linear.out_features), [in_factors, out_factors]
        layer = cls(*sizes, linear.bias is not None, shape, tensor_type, ranks, generator=Generator())
        return layer._take(linear)


class TensorizedLinear_module_tonn(TensorizedLinear_module):
    """The map of `TensorizedLinear_module` as a tensorised optical neural network computes it (chapter 7).

    Each core is one matrix of shape (m_k·r_{k-1}, n_k·r_k), rows ordered (r_{k-1}, m_k) and columns (n_k, r_k), what a
    photonic tensor core implements (Zhao et al. 2024, arXiv:2401.00413). `contract` applies the matrices in turn, the
    last one first. A core of `TensorizedLinear_module`, reshaped, is the matrix here; the arguments are the same.

    With 'TensorTrain' the factor that a core lacks, m_k or n_k, is 1. That order of products is so long for TT that
    `forward` goes through W for all but a few rows.
    """

    def _matrix_core_shapes(self) -> Sequence[tuple[int, ...]]:
        """(r_{k-1}, m_k, n_k, r_k) of each matrix."""
        if self.tensor_type == "TensorTrainMatrix":
            return self.core_shapes
        p = len(self.in_factors)
        return [(r, 1, n, s) for r, n, s in self.core_shapes[:p]] + [(r, m, 1, s) for r, m, s in self.core_shapes[p:]]

    def _stored_shape(self, k: int) -> tuple[int, ...]:
        r, m, n, s = self._matrix_core_shapes()[k]
        return m * r, n * s

    def contract(self, x: Tensor) -> Tensor:
        shapes = self._matrix_core_shapes()
        return ttm_in_turn(x, [core.reshape(shape) for core, shape in zip(self.tensor_cores(), shapes, strict=True)])

    def contract_flops(self, rows: int) -> int:
        return ttm_in_turn_flops(rows, self._matrix_core_shapes())
