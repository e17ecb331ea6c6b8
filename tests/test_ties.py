"""What moves nothing changes nothing, to the last bit, in float32 too: `sign` must not take rounding for descent.

Products of matrices round the same row otherwise in another place of a batch, by a processor's own rule. So it has to
be seen where the numbers stand still, not whether the losses come out equal.
"""

import pytest
import torch
import torch.nn.functional as F
from test_points import encoder, joint, sentences
from torch import nn

from zo_tutorial import TensorizedLinear
from zo_tutorial.queries import LossQueries


def mean_square(outputs, targets):
    return F.mse_loss(outputs, F.one_hot(targets, 10).to(outputs))


def dense(activation, last=nn.Identity):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(49, 12), activation(), nn.Linear(12, 11), last(), activation(), nn.Linear(11, 10)
    )


def images(activation):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), activation(), nn.Conv2d(4, 12, 3), activation(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48, 13), activation(), nn.Linear(13, 10),
    )  # fmt: skip


MODELS = {  # a model, and its layer behind the one that is asked
    "dense": (dense, 3),
    "dense, layer norm": (lambda activation: dense(activation, lambda: nn.LayerNorm(11)), 3),
    "dense, batch norm": (lambda activation: dense(activation, lambda: nn.BatchNorm1d(11)), 3),
    "tensor train": (
        lambda activation: nn.Sequential(
            nn.Flatten(), TensorizedLinear([7, 7], [4, 3], 3), activation(), nn.Linear(12, 11), nn.LayerNorm(11),
            nn.Linear(11, 10),
        ),
        3,
    ),
    "convolution": (images, 2),
}  # fmt: skip


def silent(kind, activation, samples, seed):
    """A model and its data, the name of a parameter, and which of its entries belong to units that say nothing.

    Nothing reads them, or, behind ReLU, they are off for every sample.

    The weights of the network's first layer, a dense one or a convolution; of a tensor train the bias.
    """
    torch.manual_seed(seed)
    make, behind = MODELS[kind]
    model = make(activation)
    first = model[behind - 2]
    with torch.no_grad():
        model[behind].weight[:, 0] = 0
        if activation is nn.ReLU:
            first.bias[3] = -50
        else:
            model[behind].weight[:, 3] = 0
    parameter = first.bias if isinstance(first, TensorizedLinear) else first.weight
    name = next(name for name, p in model.named_parameters() if p is parameter)
    entries = torch.arange(parameter.numel()).view(len(parameter), -1)[[0, 3]].flatten()
    inputs, targets = torch.rand(samples, 1, 7, 7), torch.randint(10, (samples,))
    return model, (inputs, targets), name, entries


@pytest.mark.parametrize("criterion", [F.cross_entropy, mean_square])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("kind", MODELS)
def test_a_unit_that_says_nothing_changes_nothing(kind, activation, criterion):
    for seed, samples in enumerate([6, 33]):
        model, data, name, entries = silent(kind, activation, samples, seed)
        parameters = dict(model.named_parameters())
        for shift in (1e-3, 0.1):
            queries = LossQueries(model, criterion, parameters, "structured")
            loss = queries.start(*data, seed=0)[1]
            every = torch.arange(parameters[name].numel())
            assert (queries.coordinates(name, entries, [shift, -shift]) == loss).all()
            losses = queries.coordinates(name, every, [shift, -shift])
            assert (losses[:, entries] == loss).all()
            assert (losses != loss).any(0).sum() > len(every) / 4
            before = parameters[name].detach().clone()
            some = torch.cat([entries, every[: max(40, len(every) // 3)]]).unique()
            queries.descend(name, some, shift, True, loss.item())
            moved = (parameters[name] != before).flatten()
            assert moved.any() and not moved[entries].any()
            with torch.no_grad():
                parameters[name].copy_(before)


def test_a_hidden_unit_of_an_encoder_that_nothing_reads_is_left_alone():
    model = encoder(False)
    with torch.no_grad():
        model.blocks[0].down.weight[:, 5] = 0
    parameters = dict(model.named_parameters())
    queries = LossQueries(model, joint, parameters, "structured")
    running = queries.start(*sentences(6, True), seed=0)[1].item()
    weight = model.blocks[0].up.weight
    before = weight.detach().clone()
    queries.descend("blocks.0.up.weight", torch.arange(weight.numel()), 0.1, True, running)
    moved = (weight != before).view(12, 8)
    assert moved.any(1).sum() > 6 and not moved[5].any()
