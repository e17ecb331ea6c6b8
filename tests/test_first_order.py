"""The controls that see the network: back-propagation with checkpointing, and forward mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_tutorial import MNIST_CNN, MNIST_FC, MNIST_TTM
from zo_tutorial.directions import Directions
from zo_tutorial.experiments import ExperimentError, load_config, run
from zo_tutorial.experiments.first_order import FirstOrder
from zo_tutorial.experiments.forward_mode import ForwardMode
from zo_tutorial.models import Encoder

ADAM = {"adam": True, "beta_1": 0.9, "beta_2": 0.98, "eps": 1e-6, "opt_layers_strs": []}
BACK = ADAM | {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "dampening": 0.0}
FORWARD = ADAM | {"lr": 0.01, "n_sample": 5, "directions": "gaussian"}


def sentences(dropout=0.2):
    """An encoder with dropout, its loss, and a batch."""
    draws = torch.Generator().manual_seed(0)
    model = Encoder(30, 4, 6, d_model=16, heads=2, d_hidden=24, positions=9, dropout=dropout, generator=draws).double()
    tokens = torch.randint(3, 30, (8, 9), generator=draws)
    return model, lambda outputs, y: F.cross_entropy(outputs[0], y) + outputs[1].square().mean(), tokens


def images(net):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(8, 784, generator=draws, dtype=torch.float64)
    return net(generator=draws).double(), F.cross_entropy, x


class Norm(nn.Sequential):
    def __init__(self, generator):
        super().__init__(nn.Linear(784, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 10))


CASES = {
    "FC": lambda: images(MNIST_FC),
    "TTM": lambda: images(MNIST_TTM),
    "CNN": lambda: images(MNIST_CNN),
    "batch norm": lambda: images(Norm),
    "encoder": sentences,
}
Y = torch.arange(8) % 4


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("directions", ["gaussian", "rademacher", "orthogonal"])
def test_forward_mode_is_the_sum_of_exact_directional_derivatives(case, masked, directions):
    """(1/n) Σ (uᵀg) u with g by back-propagation, under the same dropout, and the buffers of one pass."""
    model, criterion, x = CASES[case]()
    others = nn.Embedding | nn.LayerNorm | nn.BatchNorm1d
    layers = [m for m in model.modules() if not list(m.children()) and not isinstance(m, others)]
    names = [n for n, p in model.named_parameters() if any(p is q for m in layers for q in m.parameters())]
    shapes = {n: p.shape for n, p in model.named_parameters() if n in names}
    masks = {n: torch.rand(s, generator=generator(1)) < 0.5 for n, s in shapes.items()} if masked else None
    twin = copy.deepcopy(model)
    optimizer = ForwardMode(model, criterion, masks, **FORWARD | {"directions": directions}, generator=generator())
    start = [parameter.clone() for parameter in model.parameters()]
    _, loss = optimizer.estimate(x, Y)
    assert all(map(torch.equal, start, model.parameters())) and optimizer.queries == 5

    by_back = FirstOrder(twin, criterion, masks, **BACK, generator=generator())
    _, same = by_back.estimate(x, Y)
    kept = {n: torch.arange(twin.get_parameter(n).numel())[i] for n, i in optimizer.index.items()}
    g = torch.cat([twin.get_parameter(name).grad.flatten()[i] for name, i in kept.items()])
    draws = generator()
    torch.randint(2**62, (), generator=draws)  # the seed of the step
    u = Directions(5, len(g), directions, draws).rows(0, 5).double()
    torch.testing.assert_close(loss, same, rtol=1e-12, atol=0)
    mine = torch.cat([model.get_parameter(name).grad.flatten()[i] for name, i in kept.items()])
    torch.testing.assert_close(mine, u.T @ (u @ g) / 5, rtol=1e-9, atol=1e-12)
    for (name, here), there in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(here, there, msg=name)


def test_forward_mode_keeps_no_graph():
    model, criterion, x = sentences()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        outputs, loss = ForwardMode(model, criterion, None, **FORWARD, generator=generator()).step(x, Y)
    assert kept == [] and not loss.requires_grad and not outputs[0].requires_grad
    assert not any(torch.autograd.forward_ad.unpack_dual(p).tangent is not None for p in model.parameters())


def test_forward_mode_says_where_the_loss_is_no_number():
    model, criterion, x = images(MNIST_FC)
    optimizer = ForwardMode(model, criterion, None, **FORWARD, generator=generator())
    optimizer.step(x, Y)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        optimizer.step(x * torch.nan, Y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def kept_bytes(optimizer, x):
    """Bytes that autograd keeps for the backward pass of a step, outside of what is computed again."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        optimizer.step(x, Y)
    return sum(kept.values())


def test_checkpointing_is_the_same_step_with_less_memory():
    """With dropout; and each block runs twice."""
    ends, memory, runs = [], [], []
    for checkpointing in (False, True):
        model, criterion, x = sentences()
        optimizer = FirstOrder(model, criterion, None, **BACK, checkpointing=checkpointing, generator=generator())
        count = []
        note = lambda *_, count=count: count.append(1)  # noqa: E731
        handles = [block.up.register_forward_hook(note) for block in model.blocks]
        memory.append(kept_bytes(optimizer, x))
        runs.append(len(count))
        for handle in handles:
            handle.remove()
        optimizer.step(x, Y)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
        assert not any("forward" in vars(block) for block in model.blocks)
    assert all(map(torch.equal, *ends))
    assert runs == [2, 4] and memory[1] < 0.6 * memory[0]


def test_checkpointing_needs_blocks():
    config = load_config("MNIST/FC/FO", {"optimizer.checkpointing": True}, quick=True)
    with pytest.raises(ExperimentError, match=r"FO\.yml: optimizer: checkpointing: the model has no list of blocks"):
        run(config, quiet=True)


def test_both_are_methods_of_a_config():
    quick = {"training.max_steps": 4, "training.epochs": 1}
    plain = run(load_config("ATIS/TTM/FO", quick, quick=True), quiet=True)
    again = run(load_config("ATIS/TTM/FO", quick | {"optimizer.checkpointing": True}, quick=True), quiet=True)
    assert plain["test"] == again["test"] and plain["config_hash"] != again["config_hash"]
    forward = {"optimizer": {"name": "forward_mode", "n_sample": 3}, "pruning": None}
    record = run(load_config("MNIST/FC/FO", forward | quick, quick=True), quiet=True)
    assert record["queries"] == 12 and record["trained_parameters"] == 203_264
