"""Coordinates of one layer, moved one after the other: what the next ones change, on a path that is guessed.

What a coordinate does is known once all before it have moved. But small steps hardly change what the next ones do: so
the path is guessed from the gradient, and the points on it and beside it,

    z + Σ_{j<k} step_j J_j ± s J_k        for all k at once,

are run together. Up to the first wrong guess they are those of the loop.
"""

from copy import copy
from math import isfinite

import torch
from torch import Tensor

from zo_tutorial.queries.descent import STAY
from zo_tutorial.queries.sensitivity import Response
from zo_tutorial.queries.slices import Slice
from zo_tutorial.queries.suffix import CachedLayer


class Walk:
    """`descent.Walk` by slices of the layer's output.

    Only the slice of z that moves is kept up to date; the rest follows when the next run of coordinates begins.

    Args:
        positions: (K,) flat positions.
        steps: the two steps that each may make, and that to stay (K, 3).
        points: how many to handle at once.
    """

    def __init__(self, layer: CachedLayer, response: Response, positions: Tensor, steps: Tensor, points: int):
        self.response, self.positions, self.steps, self.points = response, positions, steps, points
        self.layer = copy(layer)
        self.layer.z, self.layer.a, self.layer.o = layer.z.clone(), layer.a.clone(), layer.o.clone()
        runs, counts = (positions // response.run).unique_consecutive(return_counts=True)
        self.parts, self.ends = (runs % response.factors[1]).tolist(), counts.cumsum(0).tolist()
        self.stayed = False  # whether the last coordinate did
        self._enter(0)

    def look(self, start: int, guesses: list[int], ahead: int) -> list[tuple[float, float, int]]:
        if start >= self.stop:
            self.part.leave()
            self._enter(start)
        here = start - self.begin
        count = 1 if self.layer.head is None else min(ahead, self.stop - start)
        fill = [STAY] * count if self.stayed else self.downhill[here : here + count]
        guesses = (guesses + fill[len(guesses) :])[:count]
        steps = self.steps[start : start + count]  # (K, 3)
        taken = steps.gather(1, torch.tensor(guesses, device=steps.device).unsqueeze(1)).squeeze(1)  # (K,)
        # the steps that lead to each point: the first side of all coordinates, the second, and where the slice stands
        points = torch.diag_embed(steps[:, :2].T) + taken.expand(count, count).tril(-1)  # (2, K, K)
        self.to = torch.cat([points.flatten(0, 1), points.new_zeros(1, count)])  # (2 K + 1, K)
        self.sensitivity = self.sensitivities[here : here + count].flatten(1)  # (K, rows R)
        losses = self._losses()
        changes, self.rows, begin = [], [], 2 * count
        for k, guess in enumerate(guesses):
            self.rows.append((k, count + k, begin))
            plus, minus = (0.0 if self.still[here + k][side] else losses[side * count + k] - losses[begin] for side in (0, 1))
            changes.append((plus, minus, guess))
            begin = begin if guess == STAY else guess * count + k
        return changes

    def go(self, k: int, side: int) -> None:
        self.stayed = side == STAY
        self.part.z += (self.to[self.rows[k][side]] @ self.sensitivity).view_as(self.part.z)

    def _losses(self) -> list[float]:
        """Of the points."""
        z = torch.addmm(self.part.z.view(1, -1), self.to, self.sensitivity)
        losses = self.part.losses(z.view(len(z), *self.part.z.shape)).tolist()
        cross_entropy = self.layer.suffix.cross_entropy
        if cross_entropy is not None and not cross_entropy.stable and not all(map(isfinite, losses)):
            cross_entropy.stable = True
            return self._losses()
        return losses

    def _enter(self, start: int) -> None:
        """Go on to the coordinates of one slice that begin at `start`, as many as fit into the memory."""
        if start == self.ends[0]:
            del self.ends[0], self.parts[0]
        self.begin, self.stop = start, min(self.ends[0], start + self.points)
        self.part = Slice(self.layer, self.response.factors, self.parts[0])
        here = slice(start, self.stop)
        self.sensitivities = self.response.sensitivities(self.response.at(self.positions[here]).tolist())  # (K, rows, R)
        size = self.sensitivities.flatten(1).abs().amax(1, keepdim=True)  # (K, 1)
        self.still = (self.steps[here] * size == 0).tolist()
        slope = self.part.slope()
        if slope is None:
            self.downhill = [STAY] * (self.stop - self.begin)
        else:
            slopes = self.sensitivities.flatten(1) @ slope.flatten()  # (K,)
            self.downhill = (slopes * self.steps[here, 0] > 0).long().tolist()
