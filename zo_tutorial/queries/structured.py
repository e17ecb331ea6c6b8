"""Coordinate queries from the structure of the network: only what lies behind a weight is computed again.

One weight moves its layer's output from z to z + s J, exactly (`sensitivity`). The prefix, what comes before the layer,
is computed once, in a recorded pass (`recording`); the suffix, what comes after it, is run for many shifted outputs in
one call (`suffix`).

What bounds a two-sided step, from the rates of one core (2.6e9 numbers a second for an operation in its cache, 0.7e9
for log1p, 41e9 multiply-adds a second) and batch 128 in float32, and what was measured on that core (a second one
gains little: most operations are too short to share):

- Dense 784-256-10, 10,164 weights: bytes. 2.6 million changes of hidden units, each through eight operations and a
  log1p, and six gathers for both sides: 15 ms. Measured: 18 ms.
- TTM of rank 4, 1,504 weights: flops, then dispatch. By the logits (`logits`) 0.16e9 multiply-adds: 4 ms; a dozen
  passes over 2.5 million numbers: 4 ms; the recorded pass and the round of each of 8 cores: 8 ms. Measured: 25 ms, 7.7
  first-order steps; by shifting 17 million hidden numbers, as for smooth activations, 33 ms.
- Convolutions: flops. By the logits, 0.2e9 multiply-adds for 8,557 queries of the 4,278-weight net: 5 ms. Measured: 60
  ms, 15 first-order steps, a third of it for the kinks behind the first convolution. For smooth activations or larger
  steps, of the next layer only what one changed channel needs, then all of the network behind it, is run for each
  shift: 0.4 to 0.6 s.
- `sign`: dispatch. A look is a dozen operations on a few thousand numbers, 45 to 100 µs a coordinate.
"""

from math import isfinite

import torch
from torch import Tensor, nn

from zo_tutorial.directions import Directions
from zo_tutorial.low_rank import LowRank
from zo_tutorial.queries.cost import MEMORY, SETUP, looped, vmapped
from zo_tutorial.queries.descent import descend_ahead
from zo_tutorial.queries.directional import Directional
from zo_tutorial.queries.evaluation import Evaluation
from zo_tutorial.queries.logits import logits_behind
from zo_tutorial.queries.recording import AT_ONCE, Recording, overlap, span
from zo_tutorial.queries.sensitivity import Units, response, slice_of
from zo_tutorial.queries.suffix import CACHE, ONE_BY_ONE, CachedLayer
from zo_tutorial.queries.way import Index, Moves, Unsuitable
from zo_tutorial.selection import layer_of


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
        layer, parameter = self._layer(name)
        recording, value = self.evaluation.recorded(), layer.get_parameter(parameter)
        if len(positions) < value.numel() / 8:
            return None
        try:
            logits = logits_behind(recording, layer, self.evaluation.room())
            at = value.reshape(-1)[positions]
            steps = torch.stack([(at + shift) - at for shift in shifts])  # after rounding
            return logits.look(parameter, positions, steps, self.evaluation.room())
        except Unsuitable:
            return None

    def directions(self, index: dict[str, Index], directions: Directions, scales: list[float]) -> Tensor:
        return self._directional(index, isinstance(directions, LowRank)).losses(directions, scales)

    def descend(self, moves: Moves) -> float:
        return descend_ahead(self.evaluation, Walk(self._probe(moves.name), moves.positions, moves.shift), moves)

    def seconds(self, kind: str, index: dict[str, Index], asked: int) -> float:
        if kind in ("directions", "low-rank directions"):
            return self._directional(index, kind == "low-rank directions").seconds(asked)
        recording = self.evaluation.recorded()
        return sum(self._probe(name).seconds(recording, kind, asked) for name in index)

    def _directional(self, index: dict[str, Index], low_rank: bool) -> Directional:
        layers = {self._layer(name): positions for name, positions in index.items()}
        return Directional(self.evaluation.recorded(), layers, self.evaluation.room(), low_rank)

    def _probe(self, name: str) -> "Probe":
        layer, parameter = self._layer(name)
        return Probe(self.evaluation.recorded(), layer, parameter, self.evaluation.room())

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
        cached = recording.layers_seen[layer]
        self.head, self.suffix, self.series = cached.head, cached.suffix, cached.series
        self.z, self.a, self.o = cached.z, cached.a, cached.o
        self.response = response(layer, name, cached.x, self.z, limit, cached.products)
        self.parameter = layer.get_parameter(name)
        points = limit / 2 / (cached.bytes + 4 * self.response.bytes)
        if points < 2:
            raise Unsuitable("the memory does not suffice for two points")
        quick = 2 * AT_ONCE / cached.bytes if self.head is None else CACHE / self.response.bytes
        self.points = int(min(points, max(2, quick)))  # to handle at once

    def seconds(self, recording: Recording, kind: str, asked: int) -> float:
        """An estimate of what a query takes. `descend` looks at both sides of one coordinate, and where it stands."""
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

    def look(self, positions: Tensor, shifts: list[float]) -> Tensor:
        """The changes of the loss under each of S shifts of each of K coordinates: (S, K)."""
        changes = self._look(positions, shifts)
        if self.suffix.cross_entropy is not None and not changes.isfinite().all():
            self.suffix.cross_entropy.stable = True
            changes = self._look(positions, shifts)
        return changes

    def _look(self, positions: Tensor, shifts: list[float]) -> Tensor:
        value = self.parameter.reshape(-1)[positions]
        steps = torch.stack([(value + shift) - value for shift in shifts])  # (S, K): the shifts after rounding
        size = max(1, self.points // len(shifts))
        if self.series is not None and isinstance(self.response, Units):
            portions = zip(positions.split(size), steps.split(size, 1), strict=True)
            return torch.cat([self._change_units(p, s) for p, s in portions], 1)
        # slice by slice, and within each in the order in which the sensitivities lie
        i, at = positions // self.response.run % self.response.factors[1], self.response.at(positions)
        order = (i * (at.max() + 1) + at).argsort()
        places, steps, start, parts = at[order].tolist(), steps[:, order], 0, []
        for one, count in zip(*(t.tolist() for t in i[order].unique_consecutive(return_counts=True)), strict=True):
            part = Slice(self, one)
            for begin in range(start, start + count, size):
                these = slice(begin, min(begin + size, start + count))
                parts.append(part.look(self.response.sensitivities(places[these]), steps[:, these]))
            start += count
        changes = torch.empty_like(steps)
        changes[:, order] = torch.cat(parts, 1)
        return changes

    def _change_units(self, positions: Tensor, steps: Tensor) -> Tensor:
        """`look` at coordinates of any units in front of a cross-entropy: (S, K) from steps (S, K)."""
        assert self.head is not None and self.series is not None and isinstance(self.response, Units)
        unit = positions // self.response.run
        # D = φ(z + s J) − φ(z)
        sensitivity = self.response.columns[self.response.at(positions)]  # (K, R)
        z = torch.addcmul(self.z[unit], steps.unsqueeze(2), sensitivity)  # (S, K, R)
        change = self.head.activate(z).sub_(self.a[unit])
        changes = self.series.changes(unit, change)
        if changes is None:  # the steps are too large for the series
            o = torch.addcmul(self.o, self.head.transposed[unit].unsqueeze(2), change.unsqueeze(2))  # (S, K, C, R)
            losses = self.suffix.losses(torch.cat([o.flatten(0, 1), self.o.unsqueeze(0)]))
            changes = (losses[:-1] - losses[-1]).view_as(steps)
        return changes


class Slice:
    """The i-th slice of a layer's output z, which some coordinates change while the rest of z stands still."""

    def __init__(self, probe: Probe, i: int):
        self.probe, self.i = probe, i
        self.z = self._slice(probe.z)  # (rows, R)
        if probe.head is not None:
            # o = W φ(z) + b, of which only W_slice φ(z_slice) changes
            self.add = probe.head.part(probe.response.factors, i)
            self.rest = self.add(probe.o, -self._slice(probe.a).unsqueeze(0))[0]  # (C, R)

    def _slice(self, z: Tensor) -> Tensor:
        """(rows, R) from (units, R), a copy."""
        part = slice_of(z, self.probe.response.factors, self.i)  # (left, right, R)
        return part.reshape(-1, part.shape[-1]).clone()

    def shifted(self, sensitivity: Tensor, steps: Tensor) -> Tensor:
        """z + s J for S steps of K coordinates, and z itself: (S K + 1, rows, R)."""
        z = self.z.new_empty(steps.numel() + 1, *self.z.shape)
        torch.addcmul(self.z, steps[..., None, None], sensitivity, out=z[:-1].view(*steps.shape, *self.z.shape))
        z[-1] = self.z
        return z

    def losses(self, z: Tensor) -> Tensor:
        """(P,) losses for P slices z (P, rows, R), which it may overwrite."""
        probe = self.probe
        if probe.head is None:
            whole = probe.z.repeat(len(z), 1, 1)  # (P, units, R)
            target = slice_of(whole, probe.response.factors, self.i)
            target.copy_(z.view_as(target))
            return probe.suffix.losses(whole)
        return probe.head.losses(self.outputs(z))

    def outputs(self, z: Tensor) -> Tensor:
        """P outputs o, as the head has them, for P slices z (P, rows, R), which it may overwrite."""
        return self.add(self.rest, self.probe.head.activate(z))

    def leave(self) -> None:
        """Tell the probe where the slice has come to."""
        probe, factors = self.probe, self.probe.response.factors
        target = slice_of(probe.z, factors, self.i)
        target.copy_(self.z.view_as(target))
        if probe.head is not None:
            probe.o = self.outputs(self.z.unsqueeze(0).clone())[0]
            slice_of(probe.a, factors, self.i).copy_(probe.head.activate(self.z.clone()).view_as(target))

    def look(self, sensitivity: Tensor, steps: Tensor) -> Tensor:
        """The changes of the loss when K coordinates with sensitivities (K, rows, R) make steps (S, K): (S, K)."""
        losses = self.losses(self.shifted(sensitivity, steps))
        return (losses[:-1] - losses[-1]).view_as(steps)


class Walk:
    """Coordinates to be moved one after the other: what the next ones would change, from where those before them stand.

    Only the slice of z that moves is kept up to date; the rest follows when the next run of coordinates begins.

    Args:
        positions: (K,) flat positions.
        shift: s; each coordinate may make the step s or −s.
    """

    def __init__(self, probe: Probe, positions: Tensor, shift: float):
        self.probe, self.positions = probe, positions
        value = probe.parameter.reshape(-1)[positions]
        self.steps = torch.stack([(value + shift) - value, (value - shift) - value], 1)  # (K, 2), after rounding
        runs, counts = (positions // probe.response.run).unique_consecutive(return_counts=True)
        self.parts, self.ends = (runs % probe.response.factors[1]).tolist(), counts.cumsum(0).tolist()
        probe.z, probe.a, probe.o = probe.z.clone(), probe.a.clone(), probe.o.clone()
        self.base = 0.0  # the loss where the slice stands
        self._enter(0)

    def look(self, start: int, count: int) -> list[tuple[float, float]]:
        """The changes of the loss under both steps of up to `count` coordinates from the start-th on, at least one."""
        if start >= self.stop:
            self.part.leave()
            self._enter(start)
        if self.probe.head is None:
            count = 1
        first = 2 * (start - self.begin)
        losses = self.part.losses(self.part.z + self.changes[first : first + 2 * count]).tolist()
        self.losses = dict(enumerate(losses, first))
        changes = [loss - self.base for loss in losses]
        cross_entropy = self.probe.suffix.cross_entropy
        if cross_entropy is not None and not cross_entropy.stable and not all(map(isfinite, changes)):
            cross_entropy.stable = True
            self.base = self._loss()
            return self.look(start, count)
        return list(zip(changes[::2], changes[1::2], strict=True))

    def move(self, k: int, side: int) -> None:
        """The k-th coordinate makes its step: side 0 is s, side 1 is −s. It is one of those looked at last."""
        step = 2 * (k - self.begin) + side
        self.part.z += self.changes[step]
        self.base = self.losses[step]

    def _enter(self, start: int) -> None:
        """Go on to the coordinates of one slice that begin at `start`, as many as fit into the memory."""
        if start == self.ends[0]:
            del self.ends[0], self.parts[0]
        self.begin, self.stop = start, min(self.ends[0], start + self.probe.points)
        self.part = Slice(self.probe, self.parts[0])
        here = slice(start, self.stop)
        response = self.probe.response
        sensitivity = response.sensitivities(response.at(self.positions[here]).tolist())  # (K, rows, R)
        self.changes = (self.steps[here, :, None, None] * sensitivity.unsqueeze(1)).flatten(0, 1)  # (2 K, rows, R)
        self.base = self._loss()

    def _loss(self) -> float:
        """The loss where the slice stands, computed as the others are: equal points get equal losses."""
        points = 1 if self.probe.head is None else 2  # without a head, points are run one by one
        return self.part.losses(self.part.z.repeat(points, 1, 1))[0].item()
