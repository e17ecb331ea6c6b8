"""Coordinate queries from the structure of the network: only what lies behind a weight is computed again.

One weight moves its layer's output from z to z + s J, exactly (`sensitivity`). The prefix, what comes before the layer,
is computed once, in a recorded pass (`recording`); the suffix, what comes after it, is run for many shifted outputs in
one call (`suffix`).

What bounds a two-sided step, from the rates of one core (2.6e9 numbers a second for an operation in its cache, 0.7e9
for log1p, 41e9 multiply-adds a second) and batch 128 in float32, and what was measured on that core (a second one
gains little: most operations are too short to share):

- Dense 784-256-10, all or some weights: overhead. Two products of 51 million multiply-adds (`sums`): 0.7 ms; four
  values of 33 thousand changes: 0.5 ms. Measured: 8 ms for 10,164 weights, 4 first-order steps; weight by weight, as
  for larger steps, 18 ms.
- TTM of rank 4, 1,504 weights: flops, then dispatch. By the logits (`logits`) 0.18e9 multiply-adds: 5 ms; a dozen
  passes over 2.5 million numbers: 4 ms; the recorded pass and the round of each of 8 cores: 8 ms. Measured: 27 ms, 8
  first-order steps; by shifting 17 million hidden numbers, as for smooth activations, 33 ms.
- Convolutions: flops, then dispatch. By the logits, 0.55e9 multiply-adds for 8,557 queries of the 4,278-weight net: 14
  ms. Measured: 66 ms, 16 to 20 first-order steps, a third of it for the kinks behind the first convolution. For smooth
  activations or larger steps, of the next layer only what one changed channel needs, then all of the network behind it,
  is run for each shift: 0.4 to 0.6 s.
- Encoder of two blocks 128 wide, one-sided, 32 sentences of 12 words: flops. A query of the first block multiplies 50
  to 70 million times, of the second 13 to 32 million: 1.2 to 1.6 and 0.3 to 0.7 ms; normalisation, GELU, attention and
  cross-entropy take 0.3 and 0.2 ms. Measured: 1.4 to 1.8 times their sum.
- A dense layer 128 wide in front of a norm and 121 tags, 224 words: dispatch. 3,277 queries take 11 ms by the series of
  `norm_rows`, 118 by running the rows of `sums`, 600 one by one.
- `sign`: dispatch. A look is some forty operations for a dozen coordinates or two (`walk`): 22 µs a coordinate of the
  dense net, 80 of the TTM net, of which 25 are for the recordings that each core begins with.

Compilers were weighed on what the TTM step does most, the sums over the moves of the logits (128 samples, 10 classes,
64 to 1,024 entries): numba's loops take 1.5 to 1.8 times as long as torch's products, torch.compile 1.2 to 1.4 times,
and 16 seconds at its first use. What is left is spread over hundreds of calls, none of which takes a tenth of a step.
"""

import torch
from torch import Tensor, nn

from zo_tutorial.directions import Directions
from zo_tutorial.low_rank import LowRank
from zo_tutorial.queries.cost import MEMORY, SETUP, beside, looped, vmapped
from zo_tutorial.queries.descent import descend_ahead
from zo_tutorial.queries.directional import Directional
from zo_tutorial.queries.evaluation import Evaluation
from zo_tutorial.queries.logits import logits_behind
from zo_tutorial.queries.norm_rows import NormRows
from zo_tutorial.queries.parts import Part
from zo_tutorial.queries.recording import AT_ONCE, TENSOR_LAYERS, Recording, overlap, span
from zo_tutorial.queries.rows import RowLosses, SeriesRows, TailRows
from zo_tutorial.queries.sensitivity import CONVOLUTIONS, Units, response
from zo_tutorial.queries.slices import Slice
from zo_tutorial.queries.suffix import CACHE, ONE_BY_ONE, CachedLayer
from zo_tutorial.queries.sums import is_ascending, is_range, summed, summing
from zo_tutorial.queries.walk import Walk
from zo_tutorial.queries.way import Index, Moves, Unsuitable
from zo_tutorial.selection import layer_of

MANY = 8  # losses asked for with each unit from which summing first pays
FEW = 16  # entries of a convolution for which the logits do not pay, unless they are all of them
DIGITS = 16  # roundings of a change that a series may be off


class Structured:
    """The way for parameters of layers whose output is affine in each of them; `Way` says what its methods do."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation

    def coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        changes = self._by_logits(name, index, shifts)
        if changes is None:
            changes = self._probe(name).look(index, shifts)
        return self.evaluation.base + changes

    def _by_logits(self, name: str, positions: Tensor, shifts: list[float]) -> Tensor | None:
        """The changes of the loss where that is the cheaper way; None where it is not."""
        if not self._logits_pay(name, positions):
            return None
        layer, parameter = self._layer(name)
        recording, value = self.evaluation.recorded(), layer.get_parameter(parameter)
        try:
            logits = logits_behind(recording, layer, self.evaluation.room())
            steps = rounded(value.reshape(-1)[positions], shifts)
            return logits.look(parameter, positions, steps, self.evaluation.room())
        except Unsuitable:
            return None

    def directions(self, index: dict[str, Index], directions: Directions, scales: list[float]) -> Tensor:
        return self._directional(index, isinstance(directions, LowRank)).losses(directions, scales)

    def descend(self, moves: Moves) -> float:
        probe = self._probe(moves.name)
        steps = rounded(probe.parameter.reshape(-1)[moves.positions], [moves.shift, -moves.shift, 0.0])  # (3, K)
        walk = Walk(probe.cached, probe.response, moves.positions, steps.T.contiguous(), probe.points)
        return descend_ahead(self.evaluation, walk, moves)

    def seconds(self, kind: str, index: dict[str, Index], asked: int) -> float:
        if kind in ("directions", "low-rank directions"):
            return self._directional(index, kind == "low-rank directions").seconds(asked)
        recording = self.evaluation.recorded()
        return sum(self._probe(name).seconds(recording, kind, asked) for name in index)

    def at_once(self, kind: str, index: dict[str, Index]) -> bool:
        """Of coordinates those that the logits may answer, or sums."""
        if kind != "coordinates":
            return False
        ((name, positions),) = index.items()
        return self._logits_pay(name, positions) or self._probe(name).summing(len(positions)) is not None

    def _logits_pay(self, name: str, positions: Index) -> bool:
        """Whether the logits may answer. A dense layer's weights are summed first (`sums`)."""
        layer, parameter = self._layer(name)
        core = isinstance(layer, TENSOR_LAYERS) and parameter != "bias"
        entries = layer.get_parameter(parameter).numel()
        least = entries / 8 if core else min(entries, max(FEW, entries / 8))
        return len(positions) >= least and (core or isinstance(layer, CONVOLUTIONS))

    def _directional(self, index: dict[str, Index], low_rank: bool) -> Directional:
        """What answers along directions; the last one is kept, for all the portions in which they are asked."""
        recording = self.evaluation.recorded()
        if recording.along[:1] != (low_rank,) or recording.along[1] is not index:
            layers = {self._layer(name): positions for name, positions in index.items()}
            recording.along = low_rank, index, Directional(recording, layers, self.evaluation.room(), low_rank)
        return recording.along[2]

    def _probe(self, name: str) -> "Probe":
        """What the parameter answers; the last one is kept, for all the portions in which it is asked."""
        (layer, parameter), recording = self._layer(name), self.evaluation.recorded()
        if recording.probed[:2] != (layer, parameter):
            recording.probed = ()  # before the next one takes its memory
            recording.probed = layer, parameter, Probe(recording, layer, parameter, self.evaluation.room())
        return recording.probed[2]

    def _layer(self, name: str) -> tuple[nn.Module, str]:
        """The layer of a parameter, and the parameter's name in it.

        Raises:
            Unsuitable: it is no layer of a known form, or something else reads the parameter too.
        """
        recording, owner = self.evaluation.recorded(), layer_of(self.evaluation.modules, name)
        layer, here = self.evaluation.modules[owner], span(self.evaluation.parameters[name])
        if layer not in recording.layers:
            raise Unsuitable("no form is known for the layer")
        holders = sum(overlap(here, held) for held in recording.held)
        if holders > 1 or any(overlap(here, read) for read in recording.read):
            raise Unsuitable("the weight is read outside its layer")
        return layer, name[len(owner) :].removeprefix(".")


class Probe:
    """One parameter of one layer where the parameters stand, and what its changes do to the loss.

    Args:
        layer, name: the layer, and the name of its parameter within it.
        limit: bytes that may be used at once.

    Raises:
        Unsuitable: the recording does not tell, or the memory does not suffice.
    """

    def __init__(self, recording: Recording, layer: nn.Module, name: str, limit: float):
        if layer not in recording.layers_seen:
            recording.layers_seen[layer] = CachedLayer(recording, layer)
        cached = self.cached = recording.layers_seen[layer]
        self.head, self.suffix, self.series = cached.head, cached.suffix, cached.series
        self.z, self.a, self.o = cached.z, cached.a, cached.o
        self.recording, self.layer = recording, layer
        self.behind = cached.points
        self.response = response(layer, name, cached.x, self.z, limit, cached.products)
        self.parameter = layer.get_parameter(name)
        points = (limit - cached.copied) / 2 / (cached.bytes + 4 * self.response.bytes)
        if points < 2:
            raise Unsuitable("the memory does not suffice for two points")
        quick = 2 * AT_ONCE / cached.bytes if self.head is None else CACHE / self.response.bytes
        self.points = int(min(points, max(2, quick)))  # to handle at once
        self.together = 0 if self.behind is None else int(min(points, self.behind.many))  # to run at once, by rules

    def seconds(self, recording: Recording, kind: str, asked: int) -> float:
        """An estimate of what a query takes. `descend` looks at both sides of one coordinate, and where it stands."""
        if kind == "coordinates" and (seconds := self.summing(asked)) is not None:
            return seconds / asked
        if self.behind is not None and kind != "descend":
            return SETUP / asked + beside(self.behind.calls, min(asked, self.together))
        if self.head is not None:
            shifted = self.z.shape[1] if self.series is not None else self.response.bytes + self.o.numel()
            again = self.suffix.calls if self.suffix.cross_entropy is None else []
            return shifted * self.z.element_size() / MEMORY + vmapped(recording, asked, [], again)
        if kind == "descend":
            return SETUP / asked + 3 * looped(self.suffix.calls)
        if self.points <= ONE_BY_ONE:
            return SETUP / asked + looped(self.suffix.calls)
        whole = 4 * self.z.numel() * self.z.element_size() / MEMORY  # each point has an output of its own
        return whole + vmapped(recording, asked, [], self.suffix.calls)

    def summing(self, asked: int) -> float | None:
        """An estimate of what a round takes that sums first; None where it does not."""
        try:
            return summing(self._row_losses(), self.response.run) if self._many(asked) else None
        except Unsuitable:
            return None

    def look(self, positions: Tensor, shifts: list[float]) -> Tensor:
        """The changes of the loss under each of S shifts of each of K coordinates: (S, K)."""
        changes = self._look(positions, shifts)
        if self.suffix.cross_entropy is not None and not changes.sum().isfinite():
            self.suffix.cross_entropy.stable = True
            changes = self._look(positions, shifts)
            self.suffix.cross_entropy.stable = False  # the next parameter begins as it would alone
        return changes

    def _look(self, positions: Tensor, shifts: list[float]) -> Tensor:
        value = self.parameter.reshape(-1)
        if len(positions) != len(value) or not is_range(positions):
            value = value[positions]
        steps = rounded(value, shifts)
        if self._many(steps.numel()):
            try:
                return self._sum_first(positions, steps)
            except Unsuitable:  # one by one, then
                pass
        if self.behind is not None:
            count = -(-len(positions) // max(1, self.together // len(shifts)))  # of portions, all about as large
            portions = zip(positions.tensor_split(count), steps.tensor_split(count, 1), strict=True)
            return torch.cat([self._change_behind(p, s) for p, s in portions], 1)
        size = max(1, self.points // len(shifts))
        if self.series is not None and isinstance(self.response, Units):
            portions = zip(positions.split(size), steps.split(size, 1), strict=True)
            return torch.cat([self._change_units(p, s) for p, s in portions], 1)
        # slice by slice, and within each in the order in which the sensitivities lie
        i, at = positions // self.response.run % self.response.factors[1], self.response.at(positions)
        order = (i * (at.max() + 1) + at).argsort()
        places, steps, start, parts = at[order].tolist(), steps[:, order], 0, []
        for one, count in zip(*(t.tolist() for t in i[order].unique_consecutive(return_counts=True)), strict=True):
            part = Slice(self.cached, self.response.factors, one)
            for begin in range(start, start + count, size):
                these = slice(begin, min(begin + size, start + count))
                parts.append(part.look(self.response.sensitivities(places[these]), steps[:, these]))
            start += count
        changes = torch.empty_like(steps)
        changes[:, order] = torch.cat(parts, 1)
        return changes

    def _row_losses(self) -> RowLosses:
        """What one unit of one row does to the loss. Raises Unsuitable where rows depend on each other."""
        if self.head is not None and self.series is not None:
            return SeriesRows(self.head, self.series, self.z)
        tail = TailRows(self.recording, self.recording.call_of(self.layer), self.z)
        try:
            return NormRows(tail)
        except Unsuitable:
            return tail

    def _many(self, asked: int) -> bool:
        """Whether to sum first: many losses for each unit, all units with the same inputs."""
        response, units = self.response, len(self.z)
        return isinstance(response, Units) and response.group == units and asked >= MANY * units

    def _sum_first(self, positions: Tensor, steps: Tensor) -> Tensor:
        """`look` at coordinates of many units at once: (S, K) from steps (S, K). Raises Unsuitable."""
        assert isinstance(self.response, Units)
        losses, columns = self._row_losses(), self.response.columns
        columns = columns if losses.rows is None else columns[:, losses.rows]
        if is_ascending(positions):
            return summed(losses, columns, positions, steps)
        order, changes = positions.argsort(stable=True), torch.empty_like(steps)
        changes[:, order] = summed(losses, columns, positions[order], steps[:, order])
        return changes

    def _change_behind(self, positions: Tensor, steps: Tensor) -> Tensor:
        """`look` at coordinates of any slices, run side by side: (S, K) from steps (S, K)."""
        assert self.behind is not None
        left, slices, right = self.response.factors
        i = positions // self.response.run % slices
        units = torch.arange(left * slices * right, device=i.device).view(left, slices, right)
        units = units[:, i].transpose(0, 1).flatten(1)  # (K, rows)
        sensitivity = self.response.sensitivities(self.response.at(positions).tolist())  # (K, rows, R)
        z = torch.addcmul(self.z[units], steps[..., None, None], sensitivity).flatten(0, 1)  # (S K, rows, R)
        z = z.transpose(1, 2).reshape(len(z), *self.behind.start.shape[:-1], -1)
        part = Part(z, -1, units.repeat(len(steps), 1), self.behind.start)
        return (self.behind.moved(part) - self.behind.base).view_as(steps)

    def _change_units(self, positions: Tensor, steps: Tensor) -> Tensor:
        """`look` at coordinates of any units in front of a cross-entropy: (S, K) from steps (S, K)."""
        assert self.head is not None and self.series is not None and isinstance(self.response, Units)
        unit = positions // self.response.run
        # D = φ(z + s J) − φ(z)
        sensitivity = self.response.columns[self.response.at(positions)]  # (K, R)
        z = torch.addcmul(self.z[unit], steps.unsqueeze(2), sensitivity)  # (S, K, R)
        change = self.head.activate(z).sub_(self.a[unit])
        each = self.series.changes(unit, change, DIGITS * torch.finfo(change.dtype).eps)  # (S, K, R)
        if each is not None:
            return self.series.cross_entropy.mean(each)
        # the steps are too large for the series
        o = torch.addcmul(self.o, self.head.transposed[unit].unsqueeze(2), change.unsqueeze(2))  # (S, K, C, R)
        losses = self.suffix.losses(torch.cat([o.flatten(0, 1), self.o.unsqueeze(0)]))
        return (losses[:-1] - losses[-1]).view_as(steps)


def rounded(value: Tensor, shifts: list[float]) -> Tensor:
    """How far S shifts move K weights, after rounding: (S, K)."""
    return torch.stack([value + shift for shift in shifts]).sub_(value)
