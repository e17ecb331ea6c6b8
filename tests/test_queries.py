"""Loss queries: deterministic within a step, counted, and without a trace."""

import random

import numpy as np
import pytest
import torch
from conftest import make_net
from torch import nn
from torch.nn.functional import cross_entropy

from zo_tutorial.queries import LossQueries


def trained(net):
    return {name: p for name, p in net.named_parameters() if not name.startswith("2.")}


def test_losses_are_those_of_the_shifted_model(kind, batch):
    net, shift = make_net(kind), 0.1
    queries = LossQueries(net, cross_entropy, trained(net))
    queries.start(*batch, seed=0)
    for name, parameter in trained(net).items():
        index = torch.arange(parameter.numel())[::2]
        losses = queries.coordinates(name, index, [shift, -shift])
        assert losses.shape == (2, len(index))
        for k, s in enumerate([shift, -shift]):
            for j, i in enumerate(index.tolist()):
                twin = make_net(kind)
                with torch.no_grad():
                    dict(twin.named_parameters())[name].view(-1)[i] += s
                    torch.testing.assert_close(losses[k, j], cross_entropy(twin(batch[0]), batch[1]))
    assert queries.count == 1 + sum(2 * len(torch.arange(p.numel())[::2]) for p in trained(net).values())


def test_losses_along_directions_are_those_of_the_shifted_model(kind, batch):
    net, index = make_net(kind), {}
    for name, parameter in trained(net).items():
        index[name] = torch.arange(parameter.numel())[1::2]
    queries = LossQueries(net, cross_entropy, trained(net))
    queries.start(*batch, seed=0)
    u = torch.randn(3, sum(map(len, index.values())), generator=torch.Generator().manual_seed(0)).double()
    losses = queries.directions(index, u, [0.1, -0.2])
    assert losses.shape == (2, 3) and queries.count == 1 + 6
    for k, scale in enumerate([0.1, -0.2]):
        for j in range(3):
            twin = make_net(kind)
            pieces = u[j].split([len(i) for i in index.values()])
            with torch.no_grad():
                for (name, i), piece in zip(index.items(), pieces, strict=True):
                    dict(twin.named_parameters())[name].view(-1)[i] += scale * piece
                torch.testing.assert_close(losses[k, j], cross_entropy(twin(batch[0]), batch[1]))


class Noisy(nn.Module):
    """Dropout, and noise from torch, numpy and Python's random."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3).double()

    def forward(self, x):
        noise = torch.rand(()) + np.random.rand() + random.random()
        return self.linear(torch.nn.functional.dropout(x, 0.5)) * noise


def test_all_queries_of_a_step_see_the_same_random_numbers(batch):
    """Pitfall: a difference taken under two dropout masks measures the masks, not the weight."""
    net = Noisy()
    queries = LossQueries(net, cross_entropy, trained(net))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    losses = []
    for seed in (0, 1):
        _, loss = queries.start(*batch, seed=seed)
        still = queries.coordinates("linear.weight", torch.arange(18), [0.0])
        assert torch.equal(still, loss.expand(1, 18))
        losses.append(loss)
    assert losses[0] != losses[1]
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()


def test_estimates_under_dropout_do_not_grow_as_h_shrinks(batch):
    """With two masks the difference would be a constant, and its quotient by h would grow a thousandfold."""
    net = make_net("nn.Linear", dropout=0.5)
    queries = LossQueries(net, cross_entropy, trained(net))
    estimates = []
    for h in (1e-3, 1e-6):
        queries.start(*batch, seed=0)
        plus, minus = queries.coordinates("0.weight", torch.arange(36), [h, -h])
        estimates.append((plus - minus) / (2 * h))
    torch.testing.assert_close(*estimates, atol=1e-5, rtol=1e-4)


def test_a_function_that_pytorch_cannot_see_into(batch):
    """Any callable can be queried; here the model and its loss are numpy, and the loss a Python float."""
    weight = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model(x):
        return np.asarray(x) @ weight.numpy().T

    queries = LossQueries(model, lambda z, _: float((z**2).sum()), {"weight": weight})
    before = weight.clone()
    outputs, loss = queries.start(batch[0], None, seed=0)
    assert isinstance(outputs, np.ndarray) and loss.dtype == torch.float64
    plus, minus = queries.coordinates("weight", torch.arange(18), [1e-4, -1e-4])
    expected = 2 * before @ batch[0].T @ batch[0]
    torch.testing.assert_close(((plus - minus) / 2e-4).view(3, 6), expected)
    assert torch.equal(weight, before)
    with pytest.raises(FloatingPointError, match="step 1, with layer 'weight' perturbed"):
        queries.coordinates("weight", torch.tensor([0]), [float("inf")])


class Stateful(nn.Module):
    """A model that counts its calls in a buffer, replaces another, and leaves training mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3).double()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(8, 3).double(), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.last = self.linear(x)
        self.eval()
        return self.last * self.calls


def test_a_model_with_a_memory_is_left_as_one_pass_leaves_it(batch):
    net = Stateful()
    queries = LossQueries(net, cross_entropy, trained(net))
    for step in (1, 2):
        outputs, loss = queries.start(*batch, seed=0)
        calls, last = net.calls, net.last
        still = queries.coordinates("linear.bias", torch.arange(3), [0.0])
        assert torch.equal(still, loss.expand(1, 3))
        assert net.calls is calls and calls == step and net.last is last and net.training
        torch.testing.assert_close(last * step, outputs)


def test_a_module_of_two_inputs_takes_a_tuple(batch):
    net = nn.Bilinear(6, 6, 3).double()
    queries = LossQueries(net, cross_entropy, dict(net.named_parameters()))
    outputs, _ = queries.start((batch[0], batch[0]), batch[1], seed=0)
    torch.testing.assert_close(outputs, net(batch[0], batch[0]))


def test_a_loss_that_is_not_one_number_is_refused(batch):
    net = make_net("nn.Linear")
    queries = LossQueries(net, lambda z, y: cross_entropy(z, y, reduction="none"), trained(net))
    with pytest.raises(ValueError, match="one number, not a tensor of shape"):
        queries.start(*batch, seed=0)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="auto, loop"):
        LossQueries(nn.Linear(1, 1), cross_entropy, {}, mode="fast")
