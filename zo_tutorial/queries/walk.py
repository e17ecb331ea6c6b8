"""Coordinates of one layer, moved one after the other: what the next ones change, on a path that is guessed.

What a coordinate does is known once all before it have moved. But small steps hardly change what the next ones do: so
the path is guessed from the gradient, and the points on it and beside it,

    z + Σ_{j<k} step_j J_j ± s J_k        for all k at once,

are run together. Up to the first wrong guess they are those of the loop.
"""

from copy import copy

import torch
from torch import Tensor

from zo_tutorial.queries.descent import STAY
from zo_tutorial.queries.parts import same
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
        self.layer: CachedLayer = copy(layer)
        self.layer.z, self.layer.a, self.layer.o = layer.z.clone(), layer.a.clone(), layer.o.clone()
        runs, counts = (positions // response.run).unique_consecutive(return_counts=True)
        self.parts, self.stops = (runs % response.factors[1]).tolist(), counts.cumsum(0).tolist()
        self.stayed = 0  # how many coordinates did since the last move
        self.still = torch.zeros(2, 1, dtype=torch.bool, device=steps.device)  # looks that move nothing (2, K)
        self.base: Tensor | None = None  # the loss where the slice stands, if it is known
        self.part: Slice
        self.sides: list[tuple[Tensor, Tensor]]
        self.downhill: list[int]
        self._enter(0)

    def look(self, start: int, guesses: list[int], ahead: int) -> list[tuple[float, float, int]]:
        if start >= self.stop:
            self.part.leave()
            self._enter(start)
        here = start - self.begin
        count = min(ahead, self.stop - start)
        if self.layer.suffix.cross_entropy is None:  # nothing foretells a move, and a look in vain takes long
            count = 1 if self.layer.head is None else min(count, max(1, self.stayed))
        fill = [STAY] * count if self.stayed else self.downhill[here : here + count]
        guesses = (guesses + fill[len(guesses) :])[:count]
        steps = self.steps[start : start + count]  # (K, 3)
        taken = steps.gather(1, torch.tensor(guesses, device=steps.device).unsqueeze(1)).squeeze(1)  # (K,)
        # the steps that lead to each point: the first side of all coordinates, the second, and where the slice stands
        points = torch.diag_embed(steps[:, :2].T) + taken.expand(count, count).tril(-1)  # (2, K, K)
        self.to = torch.cat([points.flatten(0, 1), points.new_zeros(1, count)])  # (2 K + 1, K)
        self.sensitivity = self.sensitivities[here : here + count].flatten(1)  # (K, rows R)
        self.bases = [2 * count]  # the points where each coordinate begins
        for k, guess in enumerate(guesses[:-1]):
            self.bases.append(self.bases[-1] if guess == STAY else guess * count + k)
        losses = self._losses()
        changes = losses[:-1].view(2, count) - losses[self.bases]
        plus, minus = torch.where(self.moves[:, here : here + count] & ~self.still, changes, 0.0).tolist()
        return list(zip(plus, minus, guesses, strict=True))

    def go(self, k: int, side: int) -> None:
        self.stayed = self.stayed + k + 1 if side == STAY else 0
        if not self.sides:
            point = self.bases[k] if self.stayed else side * (len(self.to) // 2) + k
            self.part.z += (self.to[point] @ self.sensitivity).view_as(self.part.z)
        elif side != STAY:
            self.part.z, self.base = self.sides[side]

    def _losses(self) -> Tensor:
        """Of the points: (2 K + 1,)."""
        z = torch.addmm(self.part.z.view(1, -1), self.to, self.sensitivity).unflatten(1, self.part.z.shape)
        cross_entropy, one = self.layer.suffix.cross_entropy, len(z) == 3
        a = self.part.activated(z.clone() if one else z)
        o = self.part.outputs(a)
        if cross_entropy is None:  # a product of matrices rounds the same numbers otherwise in another place
            bases = self.bases * 2
            self.still = (same(a[:-1], a[bases]) | same(o[:-1], o[bases])).view(2, -1)
            if one:
                # a point takes long: where the slice stands is one of those looked at before
                losses = self.part.behind(o if self.base is None else o[:2])
                self.base = losses[2:] if self.base is None else self.base
                self.sides = [(z[0], losses[:1]), (z[1], losses[1:2])]
                return torch.cat([losses[:2], self.base])
        self.base, self.sides = None, []
        losses = self.part.behind(o)
        if cross_entropy is not None and not cross_entropy.stable and not losses.isfinite().all():
            cross_entropy.stable = True
            return self._losses()
        return losses

    def _enter(self, start: int) -> None:
        """Go on to the coordinates of one slice that begin at `start`, as many as fit into the memory."""
        if start == self.stops[0]:
            del self.stops[0], self.parts[0]
        self.begin, self.stop = start, min(self.stops[0], start + self.points)
        self.base = None
        self.part = Slice(self.layer, self.response.factors, self.parts[0])
        here = slice(start, self.stop)
        at = self.response.at(self.positions[here]).tolist()
        self.sensitivities = self.response.sensitivities(at)  # (K, rows, R)
        size = self.sensitivities.flatten(1).abs().amax(1, keepdim=True)  # (K, 1)
        self.moves = (self.steps[here, :2] * size != 0).T  # whether z changes at all (2, K)
        slope = self.part.slope()
        if slope is None:
            self.downhill = [STAY] * (self.stop - self.begin)
        else:
            slopes = self.sensitivities.flatten(1) @ slope.flatten()  # (K,)
            self.downhill = (slopes * self.steps[here, 0] > 0).long().tolist()
