"""Moves one by one on a guessed path: those of the loop, whatever is guessed, in few looks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_tutorial import TensorizedLinear, TensorizedLinear_module
from zo_tutorial.queries import LossQueries
from zo_tutorial.queries.slices import Slice
from zo_tutorial.queries.walk import Walk
from zo_tutorial.selection import select_parameters

ACTIVATIONS = {
    "relu": nn.ReLU(), "gelu": nn.GELU(), "tanh": nn.Tanh(), "leaky": nn.LeakyReLU(0.1), "elu": nn.ELU(),
    "hardtanh": nn.Hardtanh(-0.5, 0.5),
}  # fmt: skip
LAYERS = {
    "dense": lambda: nn.Linear(12, 8),
    "TTM": lambda: TensorizedLinear_module(12, 8, True, [[3, 4], [4, 2]], max_rank=3),
    "TT": lambda: TensorizedLinear([3, 4], [4, 2], 3),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 3, 2, padding=1)),
}
HEADS = {"dense": 8, "TTM": 8, "TT": 8, "convolution": 60}


def net(layer, activation="relu"):
    torch.manual_seed(1)
    reshape = [nn.Flatten()] if layer == "convolution" else []
    return nn.Sequential(LAYERS[layer](), ACTIVATIONS[activation], *reshape, nn.Linear(HEADS[layer], 3))


def descended(model, mode, shift, three_points, criterion=F.cross_entropy, share=0.8):
    """Parameters, count and loss after `sign` over a random share of the weights, zeros among the inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = next(model.parameters())
    x = torch.randn(20, 12, generator=generator).to(weight) * (torch.rand(20, 12, generator=generator) > 0.3)
    x[:, 2] = 0  # some weights change nothing
    model, y = copy.deepcopy(model), torch.randint(3, (20,), generator=generator)
    queries = LossQueries(model, criterion, select_parameters(model).trained, mode)
    running = queries.start(x, y, seed=0)[1].item()
    for name, parameter in queries.parameters.items():
        kept = torch.rand(parameter.numel(), generator=generator) < share
        running = queries.descend(name, kept.nonzero().flatten(), shift, three_points, running)
    return list(model.parameters()), queries.count, running, criterion(model(x), y).item()


def same(model, *options):
    mine, count, running, loss = descended(model, "structured", *options)
    theirs, expected, reference, _ = descended(model, "loop", *options)
    assert all(map(torch.equal, mine, theirs))
    assert count == expected
    assert running == pytest.approx(reference, rel=1e-10) and running == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shift", [1e-4, 0.1, 1.0])
def test_the_moves_are_those_of_the_loop(layer, activation, shift):
    for three_points in (True, False):
        same(net(layer, activation).double(), shift, three_points)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shift", [1e-3, 0.5, 3.0])
@pytest.mark.parametrize("three_points", [True, False])
def test_without_a_slope_too(layer, shift, three_points):
    """Of another loss; with large steps many stay, and looks reach ahead."""
    same(net(layer).double(), shift, three_points, lambda z, y: z.square().mean() + F.cross_entropy(z, y).square())


@pytest.mark.parametrize("layer", ["dense", "TTM"])
@pytest.mark.parametrize("slope", ["random", "none"])
def test_guesses_decide_on_the_time_alone(layer, slope, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def guessed(part):
        return torch.randn(part.z.shape, generator=generator).to(part.z) if slope == "random" else None

    monkeypatch.setattr(Slice, "slope", guessed)
    same(net(layer).double(), 0.02, True)
    same(net(layer).double(), 0.02, False)


@pytest.mark.parametrize("layer", LAYERS)
def test_many_moves_are_found_in_one_look(layer, monkeypatch):
    """With small steps the slope foretells nearly all: most of what is looked at counts."""
    model, looks, found = net(layer).double(), [], []
    look, go = Walk.look, Walk.go

    def counted(walk, *args):
        looks.append(look(walk, *args))
        return looks[-1]

    def moved(walk, k, side):
        found.append((k + 1, len(looks[-1])))
        go(walk, k, side)

    monkeypatch.setattr(Walk, "look", counted)
    monkeypatch.setattr(Walk, "go", moved)
    descended(model, "structured", 1e-5, True)
    assert sum(used for used, _ in found) > 0.7 * sum(seen for _, seen in found)
    assert max(used for used, _ in found) >= 4


def test_slopes_of_a_slice_are_the_gradient():
    """Beside kinks, and with class weights; a convolution's head as a dense one."""
    for layer in LAYERS:
        model = net(layer, "gelu").double()
        x, y = torch.randn(20, 12).double(), torch.randint(3, (20,))
        criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double())
        queries = LossQueries(model, criterion, select_parameters(model).trained, "structured")
        queries.start(x, y, seed=0)
        name = next(name for name, parameter in model.named_parameters() if parameter.dim() > 1)
        probe = queries.choice.ways["structured"]._probe(name)
        parameter = model.get_parameter(name)
        steps = torch.full((parameter.numel(), 3), 1.0).double()
        walk = Walk(probe.cached, probe.response, torch.arange(parameter.numel()), steps, 100)
        slopes = walk.sensitivities.flatten(1) @ walk.part.slope().flatten()
        grad = torch.autograd.grad(criterion(model(x), y), parameter)[0].flatten()
        torch.testing.assert_close(slopes, grad[: len(slopes)], rtol=1e-4, atol=1e-7)


def test_moves_in_single_precision_end_where_the_loss_says():
    for layer in LAYERS:
        _, _, running, loss = descended(net(layer), "structured", 0.01, True)
        assert running == pytest.approx(loss, abs=1e-5)


def test_moves_that_overflow_the_exponential():
    model = net("dense").double()
    with torch.no_grad():
        model[2].weight *= 300
    same(model, 10.0, True)
    same(model, 10.0, False)


def test_what_changes_nothing_is_a_tie_however_points_are_rounded(monkeypatch):
    behind = Slice.behind
    monkeypatch.setattr(Slice, "behind", lambda part, o: behind(part, o) + 1e-14 * torch.arange(len(o)))
    same(net("dense", "tanh").double(), 0.05, True)
    same(net("dense", "tanh").double(), 0.05, False)
