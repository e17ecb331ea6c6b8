"""Pruning at initialisation: the GraSP score against brute force, and what every mask must be."""

import pytest
import torch
from conftest import make_net
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from zo_tutorial import MNIST_FC, MNIST_TTM, pruning


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(width=3, n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, width, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def brute_force(net, temperature):
    """Names, θ, gradient and full Hessian of the tempered loss by the weights, as one vector and one matrix."""
    x, y = batch()
    weights = {name: p.detach() for name, p in net.named_parameters() if name.endswith("weight")}
    sizes = [w.numel() for w in weights.values()]

    def loss(flat):
        pieces = {name: piece.view_as(w) for (name, w), piece in zip(weights.items(), flat.split(sizes), strict=True)}
        return cross_entropy(functional_call(net, pieces, x) / temperature, y)

    theta = torch.cat([w.flatten() for w in weights.values()])
    g = torch.autograd.functional.jacobian(loss, theta)
    return loss, theta, g, torch.autograd.functional.hessian(loss, theta)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_the_score_is_minus_theta_times_hg(temperature):
    net = tiny()
    _, theta, g, hessian = brute_force(net, temperature)
    scores = pruning.grasp_scores(net, cross_entropy, *batch(), temperature)
    flat = torch.cat([score.flatten() for score in scores.values()])
    torch.testing.assert_close(flat, -theta * (hessian @ g))


def test_its_sign_shrinking_a_weight_of_large_score_raises_the_gradient_norm():
    net = tiny()
    loss, theta, g, _ = brute_force(net, 1.0)
    scores = pruning.grasp_scores(net, cross_entropy, *batch(), 1.0)
    flat = torch.cat([score.flatten() for score in scores.values()])
    shrink = 1e-5
    for i in flat.abs().topk(8).indices.tolist():
        smaller = theta.clone()
        smaller[i] *= 1 - shrink
        change = torch.autograd.functional.jacobian(loss, smaller).square().sum() - g.square().sum()
        assert (change / shrink / 2).item() == pytest.approx(flat[i].item(), rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_scores_from_losses_are_those_of_autograd(kind, temperature):
    net = make_net(kind, dropout=0.0).eval()  # its layers are smooth
    x, y = batch(6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    exact = pruning.grasp_scores(net, cross_entropy, x, y, temperature)
    scores, queries = pruning.grasp_scores_from_losses(net, cross_entropy, x, y, 1e-3, temperature=temperature)
    assert queries == 4 * sum(score.numel() for score in exact.values()) + 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    largest = max(score.abs().max() for score in exact.values()).item()
    for name, score in exact.items():
        torch.testing.assert_close(scores[name], score, rtol=0, atol=1e-5 * largest)


def test_the_error_of_scores_from_losses_falls_with_the_square_of_h():
    net = tiny()
    exact = pruning.grasp_scores(net, cross_entropy, *batch(), 1.0)
    error = {}
    for h in (0.1, 0.05):
        scores, _ = pruning.grasp_scores_from_losses(net, cross_entropy, *batch(), h, "loop", 1.0)
        error[h] = sum((scores[name] - exact[name]).square().sum() for name in exact).sqrt()
    assert error[0.1] / error[0.05] == pytest.approx(4, rel=0.1)


def test_all_ways_of_querying_give_the_same_scores():
    net = tiny()
    answers = [
        pruning.grasp_scores_from_losses(net, cross_entropy, *batch(), 1e-2, mode)
        for mode in ("loop", "batched", "structured")
    ]
    for scores, queries in answers[1:]:
        assert queries == answers[0][1] == 4 * 24 + 3
        for name, score in scores.items():
            torch.testing.assert_close(score, answers[0][0][name], rtol=1e-6, atol=1e-12)


def test_queries_that_fail_leave_the_weights_where_they_were():
    net, asked = tiny(), []
    before = net[0].weight.detach().clone()

    def failing(outputs, y):
        asked.append(1)
        return cross_entropy(outputs, y) if len(asked) < 60 else outputs.sum() * float("nan")

    with pytest.raises(FloatingPointError):
        pruning.grasp_scores_from_losses(net, failing, *batch(), 1e-2, "loop")
    assert torch.equal(net[0].weight, before)
    with pytest.raises(ValueError, match="h must be above 0"):
        pruning.grasp_scores_from_losses(net, cross_entropy, *batch(), 0)


def test_the_largest_scores_go_under_one_threshold():
    net = MNIST_FC(hidden=16, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(40, 784, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 10
    scores = pruning.grasp_scores(net, cross_entropy, x, y)
    masks = pruning.grasp(net, cross_entropy, x, y, 0.9)
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    removed = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert kept.max() <= removed.min() and len(removed) == int(0.9 * (784 * 16 + 160))


def test_scoring_leaves_the_model_alone():
    net = make_net("nn.Linear", dropout=0.3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = batch(6)
    pruning.grasp(net, cross_entropy, x, y, 0.5)
    pruning.snip(net, cross_entropy, x, y, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_cores_of_ttm_layers_are_scored():
    net = MNIST_TTM(generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(40, 784, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 10
    masks = pruning.grasp(net, cross_entropy, x, y, 0.5)
    assert set(masks) == {name for name, _ in net.named_parameters()}
    assert sum(int((~mask).sum()) for mask in masks.values()) == 752


def test_only_weights_in_the_named_modules_are_removed():
    net = tiny()
    x, y = batch()
    scores = pruning.grasp_scores(net, cross_entropy, x, y)["2.weight"]  # (3, 4), of the loss of the whole net
    masks = pruning.grasp(net, cross_entropy, x, y, 0.5, modules=["2"])
    assert masks.keys() == {"2.weight"} and torch.equal(masks["2.weight"], scores < scores.flatten().sort()[0][6])
    for other in (
        pruning.snip(net, cross_entropy, x, y, 0.5, ["2"]),
        pruning.magnitude(net, 0.5, ["2"]),
        pruning.random(net, 0.5, torch.Generator().manual_seed(0), ["2"]),
    ):
        assert other.keys() == {"2.weight"} and other["2.weight"].sum() == 6
    for module, message in (("3", "the model has no '3'; it has 0, 1, 2"), ("1", "no weight to prune in 1")):
        with pytest.raises(ValueError, match=message):
            pruning.magnitude(net, 0.5, [module])


def test_dense_mnist_keeps_10164():
    net = MNIST_FC()
    masks = pruning.magnitude(net, 0.95)
    assert sum(int(mask.sum()) for mask in masks.values()) == 10_164


def all_methods(net, ratio):
    x, y = batch(6)
    generator = torch.Generator().manual_seed(0)
    grasp = pruning.grasp(net, cross_entropy, x, y, ratio)
    return {
        "grasp": grasp,
        "snip": pruning.snip(net, cross_entropy, x, y, ratio),
        "magnitude": pruning.magnitude(net, ratio),
        "random": pruning.random(net, ratio, generator),
        "shuffle": pruning.shuffle(grasp, generator),
    }


@pytest.mark.parametrize("ratio", [0.0, 0.37, 0.95])
def test_every_method_removes_the_same_number(kind, ratio):
    net = make_net(kind)
    for masks in all_methods(net, ratio).values():
        shapes = {name: p.shape for name, p in net.named_parameters()}
        total = sum(mask.numel() for mask in masks.values())
        assert all(mask.dtype == torch.bool and mask.shape == shapes[name] for name, mask in masks.items())
        assert not any(name.endswith("bias") or name.startswith("2.") for name in masks)
        assert sum(int((~mask).sum()) for mask in masks.values()) == int(ratio * total)


def test_magnitude_and_snip_keep_the_largest():
    net = tiny()
    x, y = batch()
    g = torch.autograd.grad(cross_entropy(net(x), y), [net[0].weight, net[2].weight])
    for masks, score in (
        (pruning.magnitude(net, 0.5), [net[0].weight.abs(), net[2].weight.abs()]),
        (pruning.snip(net, cross_entropy, x, y, 0.5), [(net[0].weight * g[0]).abs(), (net[2].weight * g[1]).abs()]),
    ):
        mask, score = torch.cat([m.flatten() for m in masks.values()]), torch.cat([s.flatten() for s in score])
        assert score[mask].min() >= score[~mask].max()


def test_controls_keep_what_they_promise():
    net = tiny()
    generator = torch.Generator().manual_seed(0)
    grasp = pruning.grasp(net, cross_entropy, *batch(), 0.5)
    shuffled = pruning.shuffle(grasp, generator)
    assert all(mask.sum() == grasp[name].sum() for name, mask in shuffled.items())
    assert any(not torch.equal(mask, grasp[name]) for name, mask in shuffled.items())
    for name, mask in pruning.random(net, 0.5, generator).items():
        assert abs(int(mask.sum()) - mask.numel() / 2) <= 1, name


def test_removed_weights_become_zero_and_kept_ones_stay():
    net = tiny()
    before = net[0].weight.detach().clone()
    masks = pruning.magnitude(net, 0.5)
    pruning.apply_masks(net, masks)
    assert torch.equal(net[0].weight, before * masks["0.weight"])


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_an_impossible_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="target_ratio is the fraction removed"):
        pruning.magnitude(tiny(), ratio)


def test_the_table_adds_up():
    masks = {"a.weight": torch.tensor([True, False, False, False]), "b.weight": torch.ones(2, 3, dtype=torch.bool)}
    lines = pruning.table(masks).splitlines()
    assert lines[1].split() == ["a.weight", "4", "1", "3", "25.00"]
    assert lines[-1].split() == ["all", "10", "7", "3", "70.00"]
