"""Piecewise-linear activations: where their kinks are, and what happens there.

In front of such an activation φ, a number z is near a kink if some entry of a layer can move it there. For a move δ

    φ(z + δ) = φ(z) + φ'(z) δ + ζ

and ζ is 0 unless a kink is crossed. `crossings` finds the few that are not 0, of all stages behind the layer. A ζ of an
earlier stage moves the numbers of a later one, as any change of φ(z) does.
"""

from dataclasses import dataclass
from functools import cached_property
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from zo_tutorial.queries.cross_entropy import RESHAPE
from zo_tutorial.queries.jacobian import Jacobian
from zo_tutorial.queries.recording import Call, Recording
from zo_tutorial.queries.rules import RELU
from zo_tutorial.queries.sensitivity import matrix
from zo_tutorial.queries.suffix import CACHE, Head, Suffix
from zo_tutorial.queries.way import Unsuitable

NEAR = 1 / 20  # the largest share of a stage's numbers near a kink
DEEP = 1 / 6  # the same where there are several stages: then the other ways take longer
MOVES = 2**23  # the most moves of such numbers to compute


def kinks(call: Call) -> tuple[list[float], list[float]]:
    """Where the slope of a piecewise-linear activation changes, and the slopes before, between and after.

    Raises:
        Unsuitable: it is another one.
    """
    if call.function in RELU:
        return [0.0], [0.0, 1.0]
    if call.function is F.relu6:
        return [0.0, 6.0], [0.0, 1.0, 0.0]
    if call.function in (F.leaky_relu, F.hardtanh):
        given = signature(call.function).bind(*call.args, **call.kwargs)
        given.apply_defaults()
        if call.function is F.leaky_relu:
            return [0.0], [given.arguments["negative_slope"], 1.0]
        return [given.arguments["min_val"], given.arguments["max_val"]], [0.0, 1.0, 0.0]
    raise Unsuitable


class Stage(Head):
    """A piecewise-linear activation φ of numbers z, and the layer W φ(z) + b behind it.

    Attributes:
        call: of that layer.
        before, after, slope: z where the parameters stand, φ(z) and φ'(z) (N, U).
        distance: of each z to the nearest kink.
        steepest: the largest slope of φ.
        g: the derivatives of C functions of the logits by φ(z): (N, C, U).
    """

    g: Tensor

    def __init__(self, recording: Recording, call: Call):
        layer = self._follow(recording, call, Suffix(recording, call), RESHAPE)
        assert self.activation is not None
        self.places, self.slopes = kinks(self.activation)
        self.steepest = max(map(abs, self.slopes))
        self.call, self.image = recording.call_of(layer), None
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise Unsuitable
            self.weight, self.image = layer.weight, self.call.args[0].shape[1:]
            self.options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
            self.row = self._row(self.image)
        else:
            self.weight = matrix(layer)

    def enter(self, z: Tensor) -> None:
        """Stand at z (N, U)."""
        self.before, self.after = z, self.activate(z.clone())
        self.slope = torch.full_like(z, self.slopes[0])
        self.distance = torch.full_like(z, torch.inf)
        for place, low, high in zip(self.places, self.slopes[:-1], self.slopes[1:], strict=True):
            self.slope += (z > place).to(z.dtype) * (high - low)
            self.distance = torch.minimum(self.distance, (z - place).abs())

    def bound(self, reach: Tensor) -> Tensor:
        """How far the layer's output may move (K, U') where each z moves as far as `reach` (K, U)."""
        weight, reach = self.weight.abs(), reach * self.steepest
        if self.image is None:
            return reach @ weight.T
        return F.conv2d(reach.view(-1, *self.image), weight, None, **self.options).flatten(1)

    def first_bound(self, reach: Tensor, groups: int) -> Tensor:
        """The same by each group of entries, which moves its own numbers as far as `reach` (N, left, 1, right)."""
        samples, left = reach.shape[:2]
        if self.image is not None and self.image[0] == groups and self.options["groups"] == left == 1:
            # a group is a channel: what it alone makes of the next layer's
            weight = self.weight.abs().transpose(0, 1).flatten(0, 1).unsqueeze(1)  # (G C', 1, height, width)
            bound = F.conv2d(reach.view(-1, 1, *self.image[1:]) * self.steepest, weight, None, **self.options)
            return bound.view(samples, groups, -1).transpose(0, 1)  # (G, N, U')
        own = torch.eye(groups, dtype=reach.dtype, device=reach.device).view(groups, 1, 1, groups, 1)
        return self.bound((own * reach).view(groups * samples, -1)).view(groups, samples, -1)

    def backward(self, g: Tensor) -> Tensor:
        """The derivatives by φ(z) (K, U) of functions with the derivatives g by the layer's output (K, U')."""
        if self.image is None:
            return g @ self.weight
        g = g.reshape(-1, *self.call.results[0].shape[1:])  # (K, C', height', width')
        if self.row is None:
            return conv2d_input((len(g), *self.image), self.weight, g, **self.options).flatten(1)
        # row by row: torch's own takes four times as long for few channels
        (step, _), (margin, _) = self.options["stride"], self.options["padding"]
        channels, height, width = self.image
        rows = self.row.shape[1] // channels // width
        whole = g.new_zeros(len(g), channels, max(height + margin, (g.shape[2] - 1) * step + rows), width)
        for y in range(g.shape[2]):
            whole[:, :, y * step : y * step + rows] += (g[:, :, y].flatten(1) @ self.row).view(
                -1, channels, rows, width
            )
        return whole[:, :, margin : margin + height].flatten(1)

    def _row(self, image: torch.Size) -> Tensor | None:
        """What one row of a convolution's output has from the rows of its input: (C' width', C rows width).

        None where that is large.
        """
        (_, step), (_, margin) = self.options["stride"], self.options["padding"]
        down, across = self.options["dilation"]
        channels, wide = self.call.results[0].shape[1::2]
        rows, columns = (d * (size - 1) + 1 for d, size in zip((down, across), self.weight.shape[2:], strict=True))
        if channels * wide * image[0] * rows * image[2] * self.weight.element_size() > CACHE:
            return None
        units = torch.eye(channels * wide, dtype=self.weight.dtype, device=self.weight.device)
        more = image[2] - ((wide - 1) * step + columns - 2 * margin)  # which the kernel does not reach
        places = {"stride": (1, step), "padding": (0, margin), "dilation": (down, across), "output_padding": (0, more)}
        units = units.view(-1, channels, 1, wide)
        return F.conv_transpose2d(units, self.weight, None, groups=self.options["groups"], **places).flatten(1)

    def rest(self, sample: Tensor, number: Tensor, change: Tensor) -> Tensor:
        """ζ = φ(z + δ) − φ(z) − φ'(z) δ for changes δ (S, K, T) of K numbers; 0 where it is no more than rounding."""
        z, a, slope = (t[sample, number].unsqueeze(1) for t in (self.before, self.after, self.slope))
        rest = self.activate(z + change).sub_(a).sub_(slope * change)
        rounding = 4 * torch.finfo(z.dtype).eps * max(1, self.steepest)
        return rest.masked_fill_(rest.abs() <= rounding * (z.abs() + change.abs()), 0)


@dataclass
class Crossing:
    """What lies beyond the kinks of one stage, at K of its numbers."""

    stage: Stage
    sample: Tensor  # which they are (K,)
    number: Tensor  # (K,)
    entries: Tensor  # those that move each one (K, T), of `size` entries
    rest: Tensor  # ζ for each of their steps (S, K, T)
    size: int

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Numbers and their ζ for all E entries, a row for each sample, filled up with zeros: (N, M), (N, M, S E)."""
        samples, rest = len(self.stage.before), self.rest.transpose(0, 1)  # (K, S, T)
        slots, most = _slots(self.sample, samples)
        if rest.shape[2] < self.size:  # else T are all entries, in their order
            every = rest.new_zeros(len(slots), rest.shape[1], self.size)
            rest = every.scatter_(2, self.entries.unsqueeze(1).expand(-1, rest.shape[1], -1), rest)
        table = rest.new_zeros(samples * most, rest[:1].numel()).index_copy_(0, slots, rest.flatten(1))
        numbers = slots.new_zeros(samples * most).index_copy_(0, slots, self.number)
        return numbers.view(samples, most), table.view(samples, most, -1)

    def logits(self) -> Tensor:
        """What ζ does to the logits: (N, C, S E)."""
        numbers, rest = self.tables
        g = self.stage.g  # (N, C, U)
        return g.gather(2, numbers.unsqueeze(1).expand(-1, g.shape[1], -1)) @ rest


def near(
    stages: list[Stage], factors: tuple[int, int, int], reach: Tensor, slack: float = 1
) -> list[tuple[Tensor, Tensor]] | None:
    """The numbers near a kink, stage by stage: sample and number (K,). None if they are too many.

    Args:
        factors: of the layer's numbers (`jacobian`).
        reach: how far a step may move each of them in all groups, in the first samples (N, K).
        slack: times the usual share of numbers.
    """
    most = slack * (NEAR if len(stages) == 1 else DEEP)
    left, groups, right = factors
    reach, found = reach.view(-1, left, 1, right), []
    for k, stage in enumerate(stages):
        distance = stage.distance[: len(reach)]
        if k == 0:
            bound = reach.expand(-1, -1, groups, -1).reshape(1, *distance.shape)  # alike by all groups
        elif k == 1:
            bound = stages[0].first_bound(reach, groups)  # (G, N, U)
        else:
            bound = stages[k - 1].bound(bound.flatten(0, 1)).view(groups, *distance.shape)
        sample, number = (distance <= bound.amax(0)).nonzero(as_tuple=True)
        if len(sample) > most * distance.numel():
            return None
        found.append((sample, number))
    return found


def crossings(
    stages: list[Stage], jacobian: Jacobian, j: Tensor, reach: Tensor, steps: Tensor, limit: float
) -> list[Crossing] | None:
    """Where entries cross a kink, stage by stage; None if too many numbers are near one.

    Args:
        j: J (N, K, T).
        reach: how far a step may move each number behind the layer (N, K).
        steps: (S, E).
        limit: bytes that may be used.
    """
    numbers = near(stages, jacobian.factors, reach)
    if numbers is None:
        return None
    if len(stages) == 1:
        held = len(numbers[0][0]) / jacobian.factors[1]  # one group of entries moves each
    else:
        held = sum(_slots(sample, len(j))[1] * len(j) for sample, _ in numbers)
    if held * steps.numel() > min(MOVES, limit / 8 / j.element_size()):
        return None
    found: list[Crossing] = []
    for stage, (sample, number) in zip(stages, numbers, strict=True):
        if not found:
            entries, rows = jacobian.rows(j, sample, number)
            moves = steps[:, entries] * rows  # (S, K, T)
        else:
            entries = torch.arange(steps.shape[1], device=j.device).expand(len(sample), -1)
            moves = _moves(stage, found, sample, number, jacobian, j, steps)
        found.append(Crossing(stage, sample, number, entries, stage.rest(sample, number, moves), steps.shape[1]))
    return found


def _moves(
    last: Stage,
    crossed: list[Crossing],
    sample: Tensor,
    number: Tensor,
    jacobian: Jacobian,
    j: Tensor,
    steps: Tensor,
) -> Tensor:
    """How far the steps of all entries move some numbers of the last stage: (S, K, E)."""
    if not len(number):
        return steps.new_zeros(len(steps), 0, steps.shape[1])
    g = j.new_zeros(len(number), last.before.shape[1])
    g[torch.arange(len(number), device=g.device), number] = 1
    moves = steps.new_zeros(len(number), steps.numel())
    for before in reversed(crossed):
        g = before.stage.backward(g)  # (K, U), by φ(z)
        if len(before.sample):
            numbers, rest = before.tables
            moves += _sample_by_sample(sample, g.gather(1, numbers[sample]), rest).flatten(1)
        g = g * before.stage.slope[sample]
    straight = _sample_by_sample(sample, jacobian.arranged(g.unsqueeze(1)), j).flatten(1)  # (K, E)
    return moves.view(-1, *steps.shape).addcmul_(straight.unsqueeze(1), steps).transpose(0, 1)


def _slots(sample: Tensor, samples: int) -> tuple[Tensor, int]:
    """Places for K numbers, their samples ascending, in a table with a row for each sample; and how long a row is."""
    counts = sample.bincount(minlength=samples)
    most = int(counts.max())
    place = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample]
    return sample * most + place, most


def _sample_by_sample(sample: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left (K, R, P) times right[sample] (K, P, Q), in one product for each of N samples: (K, R, Q)."""
    slots, most = _slots(sample, len(right))
    left = left.view(len(slots), -1, right.shape[1])
    table = left.new_zeros(len(right) * most, *left.shape[1:]).index_copy_(0, slots, left)
    product = table.view(len(right), -1, right.shape[1]) @ right  # (N, most R, Q)
    return product.view(len(table), left.shape[1], -1)[slots]
