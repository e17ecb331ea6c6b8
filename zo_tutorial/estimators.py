"""Gradient estimates from losses alone: pure functions, no model in sight.

Notation: d coordinates, n directions u_i, smoothing radius σ, finite-difference step h, estimate ĝ. Chapter 2 derives
the Gaussian estimator, chapter 4 the coordinate ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zo_tutorial.directions import Directions

BASELINES = ("unperturbed", "leave_one_out")  # of one-sided differences


def random_directions(n: int, d: int, kind: str = "gaussian", generator: torch.Generator | None = None) -> Tensor:
    """Draw n random directions with E[u uᵀ] = I: gaussian, rademacher or orthogonal, as `Directions` says.

    Returns:
        (n, d), in the default dtype, on the generator's device.

    Raises:
        ValueError: unknown kind, or more than d orthogonal directions.
    """
    return Directions(n, d, kind, generator).rows(0, n)


def from_directions(directions: Tensor, difference: Tensor, distance: float) -> Tensor:
    """ĝ = 1/n Σ_i (difference_i / distance) u_i: the random-direction estimator (Nesterov and Spokoiny, 2017).

    One-sided: difference L(θ+σu_i) − L(θ), distance σ. Two-sided: L(θ+σu_i) − L(θ−σu_i), distance 2σ.

    Args:
        directions: (n, d).
        difference: (n,).

    Returns:
        (d,).
    """
    return (difference / distance) @ directions / len(directions)  # (n,) @ (n, d) -> (d,)


def above_baseline(losses: Tensor, unperturbed: Tensor, baseline: str) -> Tensor:
    """L_i − b_i for losses L_i = L(θ+σu_i) (n,): how far each lies above its baseline. Chapter 2.

    "unperturbed": b_i = L(θ). "leave_one_out": b_i, the mean of the other L_j, knows nothing of u_i, so it adds no
    bias, and asks no query (Kool et al., 2019); L_i − b_i = n/(n−1) (L_i − 1/n Σ_j L_j).
    """
    if baseline == "unperturbed":
        return losses - unperturbed
    return (losses - losses.mean()) * (len(losses) / (len(losses) - 1))


def check_baseline(baseline: str, two_sided: bool, n_sample: int) -> None:
    """Raise ValueError for a baseline that is unknown, or does not fit."""
    if baseline not in BASELINES:
        raise ValueError(f"baseline {baseline!r} is unknown; choose one of {', '.join(BASELINES)}")
    if baseline == "leave_one_out" and two_sided:
        raise ValueError("baseline 'leave_one_out' is for one-sided differences: set two_sided=False")
    if baseline == "leave_one_out" and n_sample < 2:
        raise ValueError("baseline 'leave_one_out' needs n_sample of at least 2: there must be others")


def estimate_gradient(
    loss: Callable[[Tensor], Tensor],
    theta: Tensor,
    sigma: float = 0.1,
    n_sample: int = 20,
    *,
    two_sided: bool = True,
    baseline: str = "unperturbed",
    directions: str = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the gradient of `loss` at `theta` from 2n loss queries (two-sided) or n+1 (one-sided). Chapter 2.

    One-sided with the baseline "leave_one_out" it takes n queries.

    Args:
        loss: maps points (B, d) to their losses (B,).
        theta: (d,).

    Returns:
        (d,), an unbiased estimate of the gradient of the smoothed loss E_u[L(θ + σu)] for Gaussian u.

    Raises:
        ValueError: unknown directions or baseline, or a baseline that does not fit.
    """
    check_baseline(baseline, two_sided, n_sample)
    u = random_directions(n_sample, len(theta), directions, generator).to(theta)  # (n, d)
    plus = loss(theta + sigma * u)  # (n,)
    if two_sided:
        return from_directions(u, plus - loss(theta - sigma * u), 2 * sigma)
    unperturbed = loss(theta[None]) if baseline == "unperturbed" else plus
    return from_directions(u, above_baseline(plus, unperturbed, baseline), sigma)


def finite_difference(plus: Tensor, other: Tensor, distance: float | Tensor) -> Tensor:
    """ĝ_i = (L(θ+h e_i) − L(θ)) / h, or two-sided (L(θ+h e_i) − L(θ−h e_i)) / 2h. Chapter 4.

    Args:
        distance: between the two points, h or 2h; of each coordinate where rounding has made them different.
    """
    return (plus - other) / distance


def two_point_sign(plus: Tensor, base: Tensor) -> Tensor:
    """ĝ_i = −1 where the loss at θ + η e_i is below the one at θ, else +1. Chapter 4."""
    return 1 - 2 * (plus < base).to(plus)


def three_point_sign(plus: Tensor, minus: Tensor, base: Tensor) -> Tensor:
    """ĝ_i ∈ {−1, +1, 0} for the smallest of L(θ+η e_i), L(θ−η e_i), L(θ): three points (Bergou et al., 2020).

    A tie with L(θ) gives 0, one between the two sides −1. Chapter 4.
    """
    best = torch.minimum(plus, minus)
    return torch.where(best < base, 1 - 2 * (plus <= minus).to(plus), 0.0)
