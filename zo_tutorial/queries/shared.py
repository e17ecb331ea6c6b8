"""The rounds of a step, shared out among workers that all hold the model and the whole batch (chapter 12).

A round is cut into units, runs of its points. Every worker asks its units; one message then tells all losses to all.

One worker and N give the same bits, for nothing that a loss depends on depends on N. What the units are follows from
the problem (`Choice.grain`). A unit is asked as a whole by whoever has it. And what is known of the ways is the same
for all: a step is tried, and where it teaches some worker something of the ways, or ends in an error, all go back to
what they knew before and ask every unit themselves, in order, as one worker would. That happens in first steps.

Who has which unit may depend on anything, for no loss depends on it: on the seconds that units took, so that slow ones
are spread evenly.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from zo_tutorial.directions import Directions
from zo_tutorial.low_rank import LowRank
from zo_tutorial.queries.way import Index
from zo_tutorial.workers import Workers, WorkersError, is_due


@dataclass(frozen=True)
class Coordinates:
    """A round: L(θ + s e_i) for S shifts s and K positions i of one parameter, (S, K)."""

    name: str
    index: Tensor  # (K,)
    shifts: list[float]

    @property
    def points(self) -> int:
        return len(self.index)

    @property
    def question(self) -> tuple[str, dict[str, Index]]:
        """Its kind, and the positions by parameter."""
        return "coordinates", {self.name: self.index}

    @property
    def queries(self) -> int:
        return len(self.index) * len(self.shifts)

    def part(self, start: int, stop: int) -> "Coordinates":
        return replace(self, index=self.index[start:stop])


@dataclass(frozen=True)
class Along:
    """A round: L(θ + s u) for S scales s and n directions u over some positions, (S, n)."""

    index: dict[str, Index]
    directions: Directions
    scales: list[float]

    @property
    def points(self) -> int:
        return self.directions.n

    @property
    def question(self) -> tuple[str, dict[str, Index]]:
        return kind_of(self.directions), self.index

    @property
    def queries(self) -> int:
        return self.directions.n * len(self.scales)

    def part(self, start: int, stop: int) -> "Along":
        return replace(self, directions=self.directions.part(start, stop))


Round = Coordinates | Along


def kind_of(directions: Directions) -> str:
    return "low-rank directions" if isinstance(directions, LowRank) else "directions"


def units_of(asked: Round, grain: int) -> list[Round]:
    """A round in parts of about so many points."""
    count = max(1, round(asked.points / grain))
    if count == 1:
        return [asked]
    bounds = [asked.points * k // count for k in range(count + 1)]
    return [asked.part(start, stop) for start, stop in pairwise(bounds)]


class Sharing:
    """Who asks what, and the messages.

    Attributes:
        rates: {unit: seconds a query}, as far as workers have told each other.
    """

    def __init__(self, workers: Workers):
        self.workers = workers
        self.rates: dict[tuple, float] = {}

    def losses(
        self,
        units: Sequence[Round],
        answer: Callable[[Round], Tensor],
        known: Callable[[], object],
        base: Tensor,
        step: int,
    ) -> list[Tensor] | None:
        """The losses of each unit, (S, K); None where everyone should ask all.

        Args:
            answer: asks one unit.
            known: what is known of the ways; where it changes, all are asked by everyone.
            base: the loss where the parameters stand, which all workers must have alike.
            step: its number.

        Raises:
            WorkersError: the workers have different losses at the same point.
            WorkerLost: one of them has gone.
        """
        workers, keys = self.workers, _keys(units)
        owners = self._plan(units, keys)
        before, mine, seconds, again = known(), list[Tensor](), list[float](), False
        try:
            for unit, owner in zip(units, owners, strict=True):
                if owner == workers.rank:
                    started = time.perf_counter()
                    mine.append(answer(unit).to(base).flatten())
                    seconds.append(time.perf_counter() - started)
        except Exception:  # all of them will have it when they ask all
            again = True
        again = again or known() != before
        lengths = [2] * workers.size
        for unit, owner in zip(units, owners, strict=True):
            lengths[owner] += unit.queries
        head = torch.stack([torch.full_like(base, float(again)), base])
        message = base.new_zeros(lengths[workers.rank]) if again else torch.cat([head, *mine])
        message[:2] = head
        theirs = workers.gather(message, lengths)
        workers.bytes_sent += sum(lengths) * base.element_size()
        others = [rank for rank, part in enumerate(theirs) if not torch.equal(part[1], theirs[0][1])]
        if others:
            raise WorkersError(
                f"the workers do not agree at step {step}: the loss of rank {', '.join(map(str, others))} is "
                f"{theirs[others[0]][1].item():.9g}, that of rank 0 {theirs[0][1].item():.9g}; all need the same "
                "batch, weights and seeds, and a loss that repeats"
            )
        if any(part[0] for part in theirs):
            return None
        if is_due(step):
            self._tell(seconds, owners, units, keys)
        places, found = [2] * workers.size, list[Tensor]()
        for unit, owner in zip(units, owners, strict=True):
            start = places[owner]
            places[owner] += unit.queries
            found.append(theirs[owner][start : places[owner]].view(-1, unit.points))
        return found

    def _plan(self, units: Sequence[Round], keys: list[tuple]) -> list[int]:
        """Who asks each unit: the longest first, each to the one with the least to do."""
        usual = fmean(self.rates.values()) if self.rates else 1.0
        costs = [unit.queries * self.rates.get(key, usual) for unit, key in zip(units, keys, strict=True)]
        owners, load = [0] * len(units), [0.0] * self.workers.size
        for k in sorted(range(len(units)), key=lambda k: -costs[k]):
            owners[k] = min(range(len(load)), key=load.__getitem__)
            load[owners[k]] += costs[k]
        return owners

    def _tell(self, seconds: list[float], owners: list[int], units: Sequence[Round], keys: list[tuple]) -> None:
        """Tell each other how long the units took. One step is a poor sample, so half of what was known stays."""
        lengths = [max(1, owners.count(rank)) for rank in range(self.workers.size)]
        theirs = [part.tolist() for part in self.workers.gather(torch.tensor(seconds or [0.0]), lengths)]
        for unit, key, owner in zip(units, keys, owners, strict=True):
            rate = theirs[owner].pop(0) / max(1, unit.queries)
            self.rates[key] = (self.rates.get(key, rate) + rate) / 2


def _keys(units: Sequence[Round]) -> list[tuple]:
    """What a unit is called from step to step: its parameters, and which of their units it is."""
    seen: dict[tuple, int] = {}
    keys = []
    for unit in units:
        names = tuple(unit.question[1])
        seen[names] = seen.get(names, 0) + 1
        keys.append((names, seen[names]))
    return keys
