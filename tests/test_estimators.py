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
from zo_tutorial.low_rank import LowRank


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


@pytest.mark.parametrize("d, n", [(50, 25), (5, 5), (8, 1)])
def test_cosine_law(d, n):
    """cos² ~ Beta(n/2, (d−1)/2) for Gaussian directions: its mean n/(n+d−1), and its variance."""
    draws, g = generator(3), torch.randn(d, generator=generator(7))
    estimates = [estimate_gradient(lambda x: x @ g, torch.zeros(d), 0.1, n, generator=draws) for _ in range(3000)]
    square = torch.cosine_similarity(torch.stack(estimates), g[None], dim=1).square()
    law = torch.distributions.Beta(n / 2, (d - 1) / 2)
    assert square.mean() == pytest.approx(law.mean.item(), abs=5 * law.stddev.item() / 3000**0.5)
    assert square.std() == pytest.approx(law.stddev.item(), rel=0.1)


@pytest.mark.parametrize("n", [2, 10])
@pytest.mark.parametrize("level", [0.0, 1e3])
def test_leave_one_out_error_on_a_linear_function(n, level):
    """E‖ĝ−g‖² = (d+1)/(n−1) ‖g‖², whatever the level of the loss; n queries."""
    d, draws, asked = 30, generator(8), []
    g = torch.randn(d, generator=generator(7), dtype=torch.float64)

    def loss(x):
        asked.append(len(x))
        return level + x @ g

    def shot():
        options = dict(two_sided=False, baseline="leave_one_out", generator=draws)
        return estimate_gradient(loss, torch.zeros(d, dtype=torch.float64), 0.1, n, **options)

    shots = torch.stack([shot() for _ in range(3000)])
    assert sum(asked) == 3000 * n
    assert (shots - g).square().sum(1).mean() / g.square().sum() * (n - 1) == pytest.approx(d + 1, rel=0.15)
    assert (shots.mean(0) - g).norm() < 5 * ((d + 1) / (n - 1) / 3000) ** 0.5 * g.norm()  # unbiased


def test_baselines_that_do_not_fit_are_refused():
    def ask(**options):
        estimate_gradient(lambda x: x.sum(-1), torch.zeros(3), 0.1, **options)

    with pytest.raises(ValueError, match="two_sided=False"):
        ask(baseline="leave_one_out")
    with pytest.raises(ValueError, match="at least 2"):
        ask(baseline="leave_one_out", two_sided=False, n_sample=1)
    with pytest.raises(ValueError, match="unperturbed, leave_one_out"):
        ask(baseline="mean", two_sided=False)


SHAPES = [(4, 3), (5,), (2, 3, 2)]  # a matrix, a bias, a convolution or a core


def low_rank(n, rank, draws, positions=None):
    parameters = [torch.zeros(shape) for shape in SHAPES]
    return LowRank(n, parameters, positions or [range(p.numel()) for p in parameters], rank, draws)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_directions_are_isotropic_and_of_their_rank(rank):
    u = low_rank(40_000, rank, generator())
    rows = u.rows(0, u.n)  # (n, 12 + 5 + 12)
    assert rows.shape == (40_000, 29)
    assert (rows.T @ rows / u.n - torch.eye(29)).abs().max() < 0.08 and rows.mean(0).abs().max() < 0.03
    assert torch.linalg.matrix_rank(rows[7, :12].view(4, 3)) == min(rank, 3)
    assert torch.linalg.matrix_rank(rows[7, 17:].view(2, 6)) == min(rank, 2)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_low_rank_error_on_a_linear_function(rank):
    """E‖ĝ‖² for one direction: (d+2) ‖g‖² + 2/r Σ_l (out_l + in_l + 1) ‖G_l‖² over the matrices."""
    u = low_rank(400_000, rank, generator(1))
    g = torch.randn(29, generator=generator(2))
    rows = u.rows(0, u.n)
    measured = ((rows @ g).square() * rows.square().sum(1)).mean()
    first, _, last = g.split([12, 5, 12])
    extra = (4 + 3 + 1) * first.square().sum() + (2 + 6 + 1) * last.square().sum()
    assert measured == pytest.approx(((29 + 2) * g.square().sum() + 2 / rank * extra).item(), rel=0.05)


def test_low_rank_pieces_sums_and_parts_are_the_rows():
    positions = [torch.tensor([0, 5, 7, 11]), range(5), torch.tensor([3])]
    u = low_rank(6, 2, generator(3), positions)
    rows, weights = u.rows(0, 6), torch.randn(6, generator=generator(4))
    assert rows.shape == (6, 10)
    for i in range(6):
        pieces = dict(u.pieces(i))
        assert list(pieces) == [0, 4, 9]
        torch.testing.assert_close(torch.cat(list(pieces.values())), rows[i])
    torch.testing.assert_close(u.combined(weights), weights @ rows)
    torch.testing.assert_close(u.part(2, 4).rows(1, 2), rows[3:4])
    whole = low_rank(6, 2, generator(3)).rows(0, 6)
    torch.testing.assert_close(rows, whole[:, [0, 5, 7, 11, *range(12, 17), 17 + 3]])


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
