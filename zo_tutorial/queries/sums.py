"""What all weights of a layer do to the loss, from a few matrix products: the sum over the samples comes first.

A weight W_ij moves unit i of sample b by δ = s x_jb, and nothing else. Where no sample sees another one behind the
layer, the change of the loss is a sum over the samples of functions of one number,

    L(θ + s e_ij) − L(θ) = Σ_b f_ib(s x_jb).

As far as these δ reach, from −r_b to r_b, f is nearly a polynomial, f_ib(δ) = Σ_m c_m,ib δ^m, which a few values of f
give. Then the two sums change places, and what depends on j is a matrix product for each order (chapter 9):

    Σ_b Σ_m c_m,ib (s x_jb)^m = Σ_m s^m (C_m (X^m)ᵀ)_ij.

Where the polynomial does not fit, as at a kink of the activation, f is asked for weight by weight.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zo_tutorial.queries.cost import RATE, SETUP
from zo_tutorial.queries.rows import RowLosses
from zo_tutorial.queries.way import Unsuitable

NEAR = {torch.float32: 1e-6, torch.float64: 1e-11}  # of the largest f, by which a polynomial may be off
NODES = 4  # values of f that make a polynomial
FEW = 1 / 8  # of the samples of all weights, that may be asked for weight by weight
AT_ONCE = 2**18  # values of f to ask for in one call


def summing(losses: RowLosses, inputs: int) -> float:
    """An estimate of what `summed` takes (seconds), of a layer with so many inputs."""
    entries = losses.z.numel()
    return SETUP + NODES * entries * losses.seconds + 2 * entries * inputs / RATE


def summed(losses: RowLosses, columns: Tensor, positions: Tensor, steps: Tensor) -> Tensor:
    """The changes Σ_b f of the loss under steps (S, K) of weights at K ascending flat positions: (S, K).

    Args:
        losses: f.
        columns: the inputs X (Q, B); the weight at position i Q + j moves unit i by the j-th of them.

    Raises:
        Unsuitable: there are too many places where no polynomial fits, or the steps are too large.
    """
    low, high = steps.aminmax()
    longest = torch.maximum(-low, high)
    reach = longest * columns.abs().amax(0)  # (B,)
    reach = torch.where(reach > 0, reach, longest)
    (units, rows), inputs = losses.z.shape, len(columns)

    def f(t: Tensor) -> Tensor:  # (T, units, B) at δ = t r, for t (T, 1, 1)
        return losses.changes(..., (t * reach).expand(-1, units, rows))

    # the weights of unit i stand from starts[i] to starts[i + 1]
    starts = torch.searchsorted(positions, torch.arange(0, (units + 1) * inputs, inputs, device=positions.device))
    powers, bad = _polynomials(f, losses, starts.diff().to(steps) / len(positions))
    total, whole = torch.zeros_like(steps), units * inputs == len(positions) and is_range(positions)
    for m, coefficients in reversed(list(enumerate(powers, 1))):
        coefficients = (coefficients / reach**m).masked_fill_(bad, 0.0)  # (units, B)
        power = columns if m == 1 else columns**m
        values = (coefficients @ power.T).view(-1)
        total += values if whole else values[positions]
        total *= steps
    for weights, i, b in _touched(bad, starts, AT_ONCE // len(steps)):
        change = losses.changes((i, b), steps[:, weights] * columns[positions[weights] % inputs, b])  # (S, T)
        total.index_add_(1, weights, change)
    return total


def is_ascending(positions: Tensor) -> bool:
    return bool((positions[1:] >= positions[:-1]).all())


def is_range(positions: Tensor) -> bool:
    """Whether they are 0, 1, 2, …"""
    ends = positions[[0, -1]].tolist() == [0, len(positions) - 1]
    return ends and bool((positions[1:] > positions[:-1]).all())


def _polynomials(f: Callable[[Tensor], Tensor], losses: RowLosses, weight: Tensor) -> tuple[list[Tensor], Tensor]:
    """Coefficients of t, t², … of f(t) for t between −1 and 1, each (units, B), and where they do not fit.

    Args:
        losses: which has the rounding of f.
        weight: the share of weights that each unit has (units,).

    Raises:
        Unsuitable: they do not fit in too many places.
    """
    weight = weight[:, None]
    (odd, halfway_odd), (even, halfway_even) = _parts(f, weight.new_tensor([1.0, 0.5]).view(2, 1, 1))
    # odd = a_1 + a_3, halfway_odd = a_1 / 2 + a_3 / 8; even = a_2 + a_4, halfway_even = a_2 / 4 + a_4 / 16
    third, fourth = (odd - 2 * halfway_odd) * 4 / 3, (even - 4 * halfway_even) * 4 / 3
    allowed = NEAR[odd.dtype] * max(odd.abs().max(), even.abs().max()) + losses.rounding
    powers = [odd - third, even - fourth]
    bad = (third.abs() + fourth.abs() > allowed) & (weight > 0)
    if (bad * weight).sum() > FEW * bad.shape[1]:
        powers += [third, fourth]
        (odd,), (even,) = _parts(f, weight.new_tensor([0.75]).view(1, 1, 1))
        off = (0.75 * powers[0] + 0.75**3 * third - odd).abs() + (0.75**2 * powers[1] + 0.75**4 * fourth - even).abs()
        bad = (off > allowed) & (weight > 0)
        if (bad * weight).sum() > FEW * bad.shape[1]:
            raise Unsuitable("no polynomial fits")
    return powers, bad


def _parts(f: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """The odd and the even part of f at T points t (T, 1, 1): (T, units, B) each."""
    plus, minus = f(torch.cat([t, -t])).chunk(2)
    return (plus - minus) / 2, (plus + minus) / 2


def _touched(bad: Tensor, starts: Tensor, portion: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All weights of the units at which samples are `bad` (units, B): weights, units and samples (T,), in portions."""
    count = starts.diff()
    for some in bad.nonzero().split(max(1, portion * len(count) // int(starts[-1]))):  # (P, 2)
        if not len(some):
            return
        i, b = some.T
        times = count[i]  # (P,)
        begin = starts[i] - (times.cumsum(0) - times)
        weights = begin.repeat_interleave(times)
        weights += torch.arange(len(weights), device=weights.device)
        yield weights, i.repeat_interleave(times), b.repeat_interleave(times)
