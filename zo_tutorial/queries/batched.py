"""Loss queries by the dozen: many perturbed copies of the parameters, one vectorised forward pass.

The copies stand in the parameters' slots (`substitution`) while `torch.func.vmap` runs model and criterion on all of
them at once, so whatever reads a parameter sees its perturbed copy. Chapter 9.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from zo_tutorial.directions import Directions
from zo_tutorial.queries.cost import vmapped
from zo_tutorial.queries.descent import STAY, descend_ahead
from zo_tutorial.queries.evaluation import Evaluation, call
from zo_tutorial.queries.recording import AT_ONCE, Call, Recording, bytes_of, copies, overlap, span, tensors_in
from zo_tutorial.queries.way import Index, Moves, Unsuitable, add_at, pieces_of
from zo_tutorial.substitution import slots_of, substituted


class Batched:
    """The way for modules that vmap can run; `Way` says what its methods do."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation

    def coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        changes = self.changes(name, self.evaluation.parameters[name], index, shifts)
        return self.evaluation.base + changes

    def directions(self, index: dict[str, Index], directions: Directions, scales: list[float]) -> Tensor:
        losses, portion = [], self._portion(list(index))
        for scale in scales:
            for start in range(0, directions.n, portion):
                u = directions.rows(start, min(start + portion, directions.n))
                points = {}
                for (name, positions), piece in zip(index.items(), pieces_of(index, u), strict=True):
                    points[name] = copies(self.evaluation.parameters[name], len(u))  # (n, *shape)
                    add_at(points[name].view(len(u), -1), positions, piece, scale)
                losses.append(self._losses(points))
        return torch.cat(losses).view(len(scales), -1)

    def descend(self, moves: Moves) -> float:
        return descend_ahead(self.evaluation, _BatchedWalk(self, moves), moves)

    def seconds(self, kind: str, index: dict[str, Index], asked: int) -> float:
        return vmapped(self.evaluation.recorded(), asked, [self.evaluation.parameters[name] for name in index])

    def at_once(self, kind: str, index: dict[str, Index]) -> bool:
        return False

    def changes(self, name: str, parameter: Tensor, positions: Tensor, shifts: list[float]) -> Tensor:
        """The changes of the loss under each of S shifts of each of K coordinates, where `parameter` stands: (S, K)."""
        changes = []
        for shift in shifts:
            for portion in positions.split(self._portion([name])):
                k = torch.arange(len(portion), device=portion.device)
                points = copies(parameter, len(portion) + 1)  # the last stays as it is
                points.view(len(points), -1)[k, portion] += shift
                losses = self._losses({name: points})
                changes.append(losses[:-1] - losses[-1])
        return torch.cat(changes).view(len(shifts), -1)

    def _losses(self, points: dict[str, Tensor]) -> Tensor:
        """(P,) losses from P copies of each perturbed parameter: `{name: (P, *shape)}`."""
        evaluation = self.evaluation
        slots = {name: slots_of(evaluation.modules[""], evaluation.parameters[name]) for name in points}

        def loss(points):
            with substituted((slots[name], point) for name, point in points.items()):
                outputs = call(evaluation.model, evaluation.inputs)
                return evaluation.criterion(outputs, evaluation.targets).reshape(())

        recording = evaluation.recorded()
        evaluation.reset()
        try:
            with _AsRecorded(recording, [evaluation.parameters[name] for name in points]):
                losses = vmap(loss, randomness="same")(points)
        finally:
            # hooks may keep what they have seen: nothing of vmap's must stay there
            if any(module._forward_hooks or module._forward_pre_hooks for module in evaluation.modules.values()):
                evaluation.loss()
        return losses if losses.dtype == evaluation.base.dtype else losses.to(evaluation.base)

    def _portion(self, names: list[str]) -> int:
        """How many points to handle at once. Each needs copies and twice the results of a forward pass."""
        size, room = self.evaluation.recorded().bytes, self.evaluation.room()
        each = 2 * size + 3 * bytes_of(self.evaluation.parameters[name] for name in names)
        if 2 * each > room:
            raise Unsuitable("the memory does not suffice for two points")
        return max(1, int(min(room / each, AT_ONCE / size)) - 1)


class _AsRecorded(TorchFunctionMode):
    """Dropout with the masks that the recorded pass drew; batch normalisation without its running averages.

    And no call may read a perturbed parameter itself, past the slot where its copies stand.

    vmap draws a mask in a memory layout of its own, and cannot write averages of many points into one buffer. Where
    others draw too, the numbers of the mask are drawn once more and thrown away, so that the others get their own.
    """

    def __init__(self, recording: Recording, perturbed: list[Tensor]):
        super().__init__()
        self.perturbed = list(map(span, perturbed))
        self.dropouts = iter([call for call in recording.calls if call.function is F.dropout])
        self.others = any(call.draws and call.function is not F.dropout for call in recording.calls)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs or {})):
            here = _span_or_none(tensor)
            if here is not None and any(overlap(here, other) for other in self.perturbed):
                raise Unsuitable("a weight is read outside of its module")
        if function is F.dropout:
            recorded = next(self.dropouts, None)
            if recorded is None:
                raise Unsuitable("dropout is called more often than it was recorded")
            if self.others:
                recorded.draw()
            return recorded.with_input(Call(function, args, kwargs or {}).named()["input"])
        if function is F.batch_norm:
            named = Call(function, args, kwargs or {}).named()
            if named["training"]:
                named |= dict(running_mean=None, running_var=None)
            return F.batch_norm(**named)
        return function(*args, **(kwargs or {}))


def _span_or_none(tensor: Tensor) -> range | None:
    """Where a tensor lies in memory; None for one of vmap's, and for one without memory to be seen."""
    if torch._C._functorch.is_batchedtensor(tensor):
        return None
    try:
        return span(tensor)
    except (RuntimeError, NotImplementedError):
        return None


class _BatchedWalk:
    """A walk on a copy of the parameter; see `descent.Walk`."""

    def __init__(self, way: Batched, moves: Moves):
        self.way, self.name, self.positions, self.shift = way, moves.name, moves.positions, moves.shift
        self.parameter = copies(way.evaluation.parameters[moves.name], 1)[0]

    def look(self, start: int, guesses: list[int], ahead: int) -> list[tuple[float, float, int]]:
        self.start, positions = start, self.positions[start : start + ahead]
        changes = self.way.changes(self.name, self.parameter, positions, [self.shift, -self.shift])
        return [(plus, minus, STAY) for plus, minus in changes.T.tolist()]

    def go(self, k: int, side: int) -> None:
        if side != STAY:
            self.parameter.view(-1)[self.positions[self.start + k]] += (self.shift, -self.shift)[side]
