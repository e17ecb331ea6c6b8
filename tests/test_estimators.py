"""Estimators as pure functions: their mean, their error law and their signs."""

import pytest
import torch

from zo_tutorial.estimators import (
    estimate_gradient,
    finite_difference,
    from_directions,
    random_directions,
    three_point_sign,
    two_point_sign,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthogonal"])
def test_directions_are_isotropic(kind):
    """E[u uᵀ] = I, which makes every kind unbiased on a linear function."""
    draws = generator()
    u = torch.cat([random_directions(4, 5, kind, draws) for _ in range(3000)])  # (12000, 5)
    assert (u.T @ u / len(u) - torch.eye(5)).abs().max() < 0.06
    assert u.mean(0).abs().max() < 0.04


def test_orthogonal_directions_are_orthogonal_and_of_length_sqrt_d():
    u = random_directions(4, 9, "orthogonal", generator())
    torch.testing.assert_close(u @ u.T, 9 * torch.eye(4), atol=1e-5, rtol=0)


def test_directions_repeat_with_the_seed():
    for kind in ("gaussian", "rademacher", "orthogonal"):
        first, again = (random_directions(3, 7, kind, generator(1)) for _ in range(2))
        assert torch.equal(first, again) and not torch.equal(first, random_directions(3, 7, kind, generator(2)))


def test_impossible_directions_are_refused():
    with pytest.raises(ValueError, match="4 orthogonal directions do not fit into 3 dimensions"):
        random_directions(4, 3, "orthogonal")
    with pytest.raises(ValueError, match="gaussian, rademacher, orthogonal"):
        random_directions(4, 3, "diagonal")


@pytest.mark.parametrize("kind, sign", [("gaussian", 1), ("rademacher", -1)])
@pytest.mark.parametrize("n", [1, 10, 100])
def test_error_on_a_linear_function(kind, sign, n):
    """E‖ĝ−g‖² = (d±1)/n ‖g‖²: pitfall, the first of n directions weighted 1 instead of 1/n stops the fall with n."""
    d = 30
    g = torch.randn(d, generator=generator(7))
    draws = generator(8)
    shots = [
        estimate_gradient(lambda x: x @ g, torch.zeros(d), 0.1, n, directions=kind, generator=draws) for _ in range(600)
    ]
    assert (torch.stack(shots) - g).square().sum(1).mean() / g.square().sum() * n == pytest.approx(d + sign, rel=0.15)


def test_cosine_law():
    """cos² ≈ n/(n+d+1) for Gaussian directions."""
    d, n, draws = 50, 25, generator(3)
    g = torch.randn(d, generator=generator(7))
    estimates = [estimate_gradient(lambda x: x @ g, torch.zeros(d), 0.1, n, generator=draws) for _ in range(500)]
    cosine = torch.cosine_similarity(torch.stack(estimates), g[None], dim=1)
    assert cosine.square().mean() == pytest.approx(n / (n + d + 1), rel=0.05)


def test_the_mean_is_the_gradient_of_the_smoothed_loss():
    """L = Σ θ⁴ smoothed by σ has gradient 4θ³ + 12σ²θ: the bias of large σ, in both forms."""
    theta, sigma = torch.tensor([1.0, -0.5], dtype=torch.float64), 0.5
    expected = 4 * theta**3 + 12 * sigma**2 * theta
    for two_sided in (True, False):
        ghat = estimate_gradient(
            lambda x: (x**4).sum(-1), theta, sigma, 400_000, two_sided=two_sided, generator=generator()
        )
        torch.testing.assert_close(ghat, expected, atol=0.1, rtol=0.02)


def test_the_best_step_lies_between_rounding_and_bias():
    """Pitfall: in float32 a tiny h measures rounding, a large one bias; the error over h is U-shaped."""
    theta = torch.tensor([1.0, -0.5])
    exact = theta.exp()
    errors = []
    for h in (1e-6, 1e-2, 1.0):
        plus, minus = ((theta + s * h * torch.eye(2)).exp().sum(-1) for s in (1, -1))
        errors.append((finite_difference(plus, minus, 2 * h) - exact).norm())
    assert errors[1] < 0.01 * errors[0] and errors[1] < 0.01 * errors[2]


def test_from_directions_is_the_mean_of_single_shots():
    u = random_directions(3, 4, generator=generator())
    difference = torch.tensor([1.0, -2.0, 0.5])
    expected = sum(delta / 0.2 * row for delta, row in zip(difference, u, strict=True)) / 3
    torch.testing.assert_close(from_directions(u, difference, 0.2), expected)


def test_signs():
    base = torch.tensor(1.0)
    plus = torch.tensor([0.5, 1.0, 2.0, 2.0, 0.5, 1.0, 0.5])
    minus = torch.tensor([2.0, 1.0, 0.5, 2.0, 0.5, 0.5, 0.4])
    assert two_point_sign(plus, base).tolist() == [-1, 1, 1, 1, -1, 1, -1]
    assert three_point_sign(plus, minus, base).tolist() == [-1, 0, 1, 0, -1, 1, 1]
