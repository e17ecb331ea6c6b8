"""Random directions with E[u uᵀ] = I, which need not all be there at once. Chapter 2.

Up to `WHOLE` numbers are drawn in one go. Of more, every row has a seed of its own, so that it can be drawn again
whenever it is needed: n seeds stand for n directions of any length (chapter 9).
"""

from collections.abc import Iterator
from copy import copy

import torch
from torch import Generator, Tensor

DIRECTIONS = ("gaussian", "rademacher", "orthogonal")
WHOLE = 2**22  # numbers that are drawn and kept together, whatever the memory
PIECE = 2**20  # numbers of a row that are drawn at once


class Directions:
    """n directions u_i of d coordinates: the rows of a matrix (n, d).

    gaussian: u ~ N(0, I). rademacher: independent signs ±1. orthogonal: n ≤ d uniformly random directions at right
    angles to each other, each of length √d.

    Args:
        generator: on whose device they are drawn; None is torch's global generator.
        room: bytes that the matrix may take. Where it does not fit, rows are drawn again; the numbers are the same.

    Attributes:
        bytes: that they take, if they are kept; of a part, those of the whole.

    Raises:
        ValueError: unknown kind; more than d orthogonal directions, or too many for the room.
    """

    def __init__(
        self, n: int, d: int, kind: str = "gaussian", generator: Generator | None = None, room: float = float("inf")
    ):
        if kind not in DIRECTIONS:
            raise ValueError(f"directions {kind!r} are unknown; choose one of {', '.join(DIRECTIONS)}")
        self.n, self.d, self.kind = n, d, kind
        self.device = torch.device("cpu") if generator is None else generator.device
        self.matrix: Tensor | None = None  # (n, d), where it is kept
        fits = n * d * torch.finfo(torch.get_default_dtype()).bits / 8 <= room
        if kind == "orthogonal":
            self.matrix = _orthogonal(n, d, generator, fits)
        elif n * d <= WHOLE:
            self.matrix = self._draw((n, d), generator)
        else:
            self.seeds = torch.randint(2**62, (n,), generator=generator, device=self.device).tolist()
            if fits:
                self.matrix = torch.stack([torch.cat([piece for _, piece in self.pieces(i)]) for i in range(n)])
        self.bytes = 0 if self.matrix is None else self.matrix.numel() * self.matrix.element_size()

    @classmethod
    def of(cls, matrix: Tensor) -> "Directions":
        """The rows of a given matrix (n, d)."""
        directions = cls(0, matrix.shape[1])
        directions.n, directions.matrix = len(matrix), matrix
        return directions

    def rows(self, start: int, stop: int) -> Tensor:
        """Some of the directions: (stop - start, d)."""
        if self.matrix is not None:
            return self.matrix[start:stop]
        return torch.stack([torch.cat([piece for _, piece in self.pieces(i)]) for i in range(start, stop)])

    def part(self, start: int, stop: int) -> "Directions":
        """Some of the directions, as directions of their own."""
        some = copy(self)
        some.n = stop - start
        if self.matrix is not None:
            some.matrix = self.matrix[start:stop]
        else:
            some.seeds = self.seeds[start:stop]
        return some

    def pieces(self, i: int) -> Iterator[tuple[int, Tensor]]:
        """The i-th direction in pieces: where each begins, and its numbers."""
        if self.matrix is not None:
            yield 0, self.matrix[i]
            return
        generator = Generator(self.device).manual_seed(self.seeds[i])
        for start in range(0, self.d, PIECE):
            yield start, self._draw((min(PIECE, self.d - start),), generator)

    def combined(self, weights: Tensor) -> Tensor:
        """Σ_i w_i u_i for weights (n,): (d,)."""
        if self.n * self.d <= WHOLE or self.kind == "orthogonal":
            return weights @ self.rows(0, self.n).to(weights)  # (n,) @ (n, d) -> (d,)
        total = weights.new_zeros(self.d)
        for i, weight in enumerate(weights.tolist()):
            for start, piece in self.pieces(i):
                for part, chunk in zip(total[start : start + len(piece)].split(PIECE), piece.split(PIECE), strict=True):
                    part.add_(chunk.to(total), alpha=weight)
        return total

    def _draw(self, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
        if self.kind == "rademacher":
            return 2.0 * torch.randint(2, shape, generator=generator, device=self.device) - 1.0
        return torch.randn(shape, generator=generator, device=self.device)


def _orthogonal(n: int, d: int, generator: Generator | None, fits: bool) -> Tensor:
    if n > d:
        raise ValueError(f"{n} orthogonal directions do not fit into {d} dimensions")
    if not fits and n * d > WHOLE:
        raise ValueError(
            f"{n} orthogonal directions of {d:,} coordinates do not fit into the memory, and cannot be drawn again "
            "one by one: raise memory, or take gaussian ones"
        )
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # QR is not made for half precision
    u = torch.randn(n, d, generator=generator, device=None if generator is None else generator.device, dtype=dtype)
    q, r = torch.linalg.qr(u.T)  # (d, n), (n, n)
    # The signs of diag(r) make q uniform over all orthonormal frames (Mezzadri, 2007).
    return (d**0.5 * (q * r.diagonal().sign()).T).to(torch.get_default_dtype())
