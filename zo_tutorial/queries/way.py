"""What every way of answering queries has in common."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from zo_tutorial.directions import Directions

Index = Tensor | range  # flat positions in a parameter, ascending: (K,), or all of them


class Unsuitable(Exception):
    """A way cannot answer; the message says why."""


class Moves(NamedTuple):
    """Coordinates to be moved in turn; the arguments of `LossQueries.descend`.

    counted: what each loss that the rule asks for goes through.
    """

    name: str
    positions: Tensor
    shift: float
    three_points: bool
    running: float
    counted: Callable[[float], float]


class Way(Protocol):
    """One way to answer what a step asks.

    All give the losses of the loop, up to rounding, from where the parameters stand, and leave the model as it was;
    only `descend` moves parameters. A new way is a class with these methods, entered in `zo_tutorial.queries.choice`.
    Each may raise `Unsuitable`.
    """

    def coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        """L(θ + s e_i) for every shift s and every i in `index` (K,) of one parameter: (S, K)."""
        ...

    def directions(self, index: dict[str, Index], directions: Directions, scales: list[float]) -> Tensor:
        """L(θ + s u) for every scale s and every direction u over the positions in `index`: (S, n)."""
        ...

    def descend(self, moves: Moves) -> float:
        """Move coordinates in place, one by one, as `LossQueries.descend` says; the loss where they end."""
        ...

    def seconds(self, kind: str, index: dict[str, Index], asked: int) -> float:
        """An estimate of what a query takes, in a round of so many "coordinates", "directions" or "low-rank
        directions" (`cost`)."""
        ...

    def at_once(self, kind: str, index: dict[str, Index]) -> bool:
        """Whether a part of such a round takes about as long as the whole."""
        ...


def pieces_of(index: dict[Any, Index], u: Tensor) -> list[Tensor]:
    """Directions (..., d) split among the parameters: (..., K) for each."""
    return list(u.split([len(positions) for positions in index.values()], dim=-1))


def add_at(flat: Tensor, positions: Index, values: Tensor, scale: float) -> None:
    """flat[..., positions] += scale · values, for flat (..., size) and values (..., K)."""
    if isinstance(positions, range):
        flat.add_(values.to(flat), alpha=scale)
    elif flat.dim() == 1 or flat.is_cuda:
        flat.index_add_(-1, positions, values.to(flat), alpha=scale)
    else:  # where index_add_ takes several times as long
        flat.scatter_add_(-1, positions.expand(values.shape), values.to(flat) * scale)
