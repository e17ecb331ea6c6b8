"""Directions that are a matrix of low rank for every weight: U = A Cᵀ / √r. Chapters 2 and 9.

A and C have independent standard normal entries, so E[U_ij U_kl] = 1 where (i, j) = (k, l), and 0 elsewhere: the
estimate along U is as unbiased as along Gaussian directions. What is new is that U is never needed as a whole:

    X (W + σ U)ᵀ = X Wᵀ + σ (X C) Aᵀ / √r,

so all points share the product with W (Sarkar et al., 2025).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from zo_tutorial.directions import Directions


class LowRank(Directions):
    """n directions over the kept positions of some parameters; columns in their order.

    A parameter of two or more dimensions is seen as a matrix of its first against all others. One of a single
    dimension gets Gaussian numbers.

    Args:
        parameters: what the directions are for.
        positions: of each parameter, the flat positions that take part, ascending.
        rank: r.
        generator: on whose device they are drawn; None is torch's global generator.

    Attributes:
        factors: of each parameter A/√r (n, out, r) and C (n, in, r).
    """

    def __init__(
        self,
        n: int,
        parameters: Sequence[Tensor],
        positions: Sequence[Tensor | range],
        rank: int = 1,
        generator: Generator | None = None,
    ):
        super().__init__(0, sum(map(len, positions)), generator=generator)
        self.n, self.matrix, self.kind, self.positions = n, None, "low_rank", list(positions)
        self.factors = []
        for shape, dtype in ((parameter.shape, parameter.dtype) for parameter in parameters):
            if len(shape) < 2:
                a, c = self._draw((n, shape.numel(), 1), generator), torch.ones(n, 1, 1, device=self.device)
            else:
                a = self._draw((n, shape[0], rank), generator)
                c = self._draw((n, shape[1:].numel(), rank), generator)
            wide = torch.promote_types(dtype, torch.float32)  # in which their products are formed
            self.factors.append((a.to(wide) / a.shape[2] ** 0.5, c.to(wide)))

    def part(self, start: int, stop: int) -> "LowRank":
        some = LowRank(0, [], [])
        some.n, some.d, some.device, some.positions = stop - start, self.d, self.device, self.positions
        some.factors = [(a[start:stop], c[start:stop]) for a, c in self.factors]
        return some

    def of_parameter(self, k: int) -> Tensor:
        """The numbers at the kept positions of the k-th parameter: (n, K)."""
        a, c = self.factors[k]
        return self._kept(k, (a @ c.mT).flatten(1))  # (n, out, r) @ (n, r, in)

    def rows(self, start: int, stop: int) -> Tensor:
        some = self.part(start, stop)
        return torch.cat([some.of_parameter(k) for k in range(len(self.factors))], 1)

    def pieces(self, i: int) -> Iterator[tuple[int, Tensor]]:
        one, start = self.part(i, i + 1), 0
        for k, positions in enumerate(self.positions):
            yield start, one.of_parameter(k)[0]
            start += len(positions)

    def combined(self, weights: Tensor) -> Tensor:
        sums = []
        for k, (a, c) in enumerate(self.factors):
            a, c = a.to(weights) * weights[:, None, None], c.to(weights)
            total = a.movedim(1, 0).flatten(1) @ c.movedim(1, 0).flatten(1).T  # (out, n r) @ (n r, in)
            sums.append(self._kept(k, total.view(1, -1))[0])
        return torch.cat(sums)

    def _kept(self, k: int, flat: Tensor) -> Tensor:
        """(n, out · in) at the kept positions: (n, K)."""
        positions = self.positions[k]
        return flat if isinstance(positions, range) else flat[:, positions.to(flat.device)]
