"""The loop: perturb, run, restore. The reference for all other ways, and right for any callable."""

import numpy as np
import torch
from torch import Tensor

from zo_tutorial.directions import Directions
from zo_tutorial.queries.cost import TRIES, looped, perturbing
from zo_tutorial.queries.evaluation import Evaluation
from zo_tutorial.queries.way import Index, Moves, add_at


class Loop:
    """One query after the other, in place; `Way` says what its methods do."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation

    def coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        parameter, losses = self.evaluation.parameters[name], []
        for position in index.tolist():
            entry = _entry(parameter, position)
            value = entry.clone()
            try:
                for shift in shifts:
                    entry.copy_(value + shift)
                    losses.append(self.evaluation.loss())
            finally:
                entry.copy_(value)
        return torch.stack(losses).reshape(len(index), len(shifts)).T  # (S, K)

    def directions(self, index: dict[str, Index], directions: Directions, scales: list[float]) -> Tensor:
        parameters, losses = self.evaluation.parameters, []
        original = {name: parameters[name].detach().clone() for name in index}
        try:
            for i in range(directions.n):
                for scale in scales:
                    for name, value in original.items():
                        parameters[name].copy_(value)
                    for start, piece in directions.pieces(i):
                        for name, positions, part in _parts(index, start, piece):
                            _add(parameters[name], positions, part, scale)
                    losses.append(self.evaluation.loss())
        finally:
            for name, value in original.items():
                parameters[name].copy_(value)
        return torch.stack(losses).reshape(directions.n, len(scales)).T  # (S, n)

    def descend(self, moves: Moves) -> float:
        running = moves.running
        for position in moves.positions.split(1):
            for step in (moves.shift, -moves.shift):
                loss = moves.counted(self.coordinates(moves.name, position, [step]).item())
                if loss < running or (step == -moves.shift and not moves.three_points):
                    self.evaluation.move(moves.name, position, [step])
                    running = loss
                    break
        return running

    def seconds(self, kind: str, index: dict[str, Index], asked: int) -> float:
        query = looped(self.evaluation.recorded().calls)
        if kind in ("directions", "low-rank directions"):  # which move whole parameters
            query += perturbing(self.evaluation.parameters[name] for name in index)
        return query * (TRIES if kind == "descend" else 1)

    def at_once(self, kind: str, index: dict[str, Index]) -> bool:
        return False


def _entry(parameter: Tensor, position: int) -> Tensor:
    """A 0-d view of one entry, by its flat position; right for any memory layout."""
    return parameter.detach()[tuple(int(k) for k in np.unravel_index(position, parameter.shape))]


def _parts(index: dict[str, Index], start: int, piece: Tensor):
    """What the numbers of a direction from `start` on are for: (name, positions in the parameter, numbers) in turn."""
    begin = 0
    for name, positions in index.items():
        end = begin + len(positions)
        low, high = max(begin, start), min(end, start + len(piece))
        if low < high:
            yield name, positions[low - begin : high - begin], piece[low - start : high - start]
        begin = end


def _add(parameter: Tensor, positions: Index, values: Tensor, scale: float) -> None:
    """Add scale · values at some flat positions, in place."""
    if not parameter.is_contiguous():
        moved = parameter.detach().flatten()
        _add(moved, positions, values, scale)
        parameter.copy_(moved.view(parameter.shape))
        return
    flat = parameter.detach().view(-1)
    if isinstance(positions, range):
        flat, positions = flat[positions.start : positions.stop], range(len(positions))
    add_at(flat, positions, values, scale)
