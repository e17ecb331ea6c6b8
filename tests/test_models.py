"""The MNIST models: their counts, their inputs, their start."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, vmap

from zo_tutorial.models import MNIST_CNN, MNIST_FC, MNIST_TT, MNIST_TTM

RANK_6 = {
    "in_factors": [7, 4, 4, 7], "hidden_factors": [8, 4, 4, 8], "out_factors": [1, 5, 2, 1], "max_rank": 6, "bias": True
}  # fmt: skip
MODELS = {
    "FC": MNIST_FC,
    "FC pooled": lambda **options: MNIST_FC(64, 2, **options),
    "CNN": MNIST_CNN,
    "TTM": MNIST_TTM,
    "TTM rank 6": lambda **options: MNIST_TTM(**RANK_6, **options),
    "photonic": lambda **options: MNIST_TTM(layer="TensorizedLinear_module_tonn", **options),
    "TT": MNIST_TT,
}
every_model = pytest.mark.parametrize("name", MODELS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("FC", 203_264),
        ("FC pooled", 13_184),
        ("TTM", 1_504),
        ("photonic", 1_504),
        ("TTM rank 6", 3_962),
        ("TT", 10_685),
        ("CNN", 4_278),
    ],
)
def test_parameter_counts(name, count):
    assert sum(parameter.numel() for parameter in MODELS[name]().parameters()) == count


def test_the_widths_of_the_models_are_arguments():
    assert sum(p.numel() for p in MNIST_FC(hidden=32).parameters()) == 32 * (784 + 10)
    expected = (25 * 4 + 4) + (9 * 4 * 5 + 5) + (9 * 5 * 6 + 6) + (9 * 6 * 10 + 10)
    assert sum(p.numel() for p in MNIST_CNN(widths=[4, 5, 6]).parameters()) == expected
    expected = (25 * 4 + 4) + (9 * 4 * 5 + 5) + (36 * 5 * 10 + 10)
    assert sum(p.numel() for p in MNIST_CNN(widths=[4, 5]).parameters()) == expected


def test_a_convolution_less_is_the_same_net_up_to_there():
    three, two = (MNIST_CNN(widths, generator=seeded()) for widths in ((4, 5, 6), (4, 5)))
    images = torch.randn(3, 784, generator=seeded())
    inside = []
    three.conv3.register_forward_pre_hook(lambda module, given: inside.append(given[0]))
    three(images)
    torch.testing.assert_close(two(images), two.fc(inside[0].flatten(1)))


def test_a_pooled_input_is_the_mean_of_a_square_of_pixels():
    model, images = MNIST_FC(8, 4, generator=seeded()), torch.randn(3, 784, generator=seeded(1))
    pooled = images.view(3, 7, 4, 7, 4).mean((2, 4)).flatten(1)  # (3, 49)
    expected = (pooled @ model.fc1.weight.T).relu() @ model.fc2.weight.T
    torch.testing.assert_close(model(images), expected)
    for pool in (0, 3):
        with pytest.raises(ValueError, match="divisor of 28"):
            MNIST_FC(8, pool)


@every_model
def test_images_flat_or_square_give_the_same_logits(name):
    model = MODELS[name](generator=seeded())
    images = torch.randn(5, 784, generator=seeded(1))
    logits = model(images)
    assert logits.shape == (5, 10)
    torch.testing.assert_close(model(images.reshape(5, 1, 28, 28)), logits)


@every_model
def test_a_seed_fixes_the_start_and_nothing_else_is_drawn(name):
    state = torch.get_rng_state()
    one, two, other = (MODELS[name](generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_dense_weights_start_with_variance_two_over_fan_in():
    model = MNIST_FC(generator=seeded())
    for layer in (model.fc1, model.fc2):
        n = layer.weight.numel()
        variance = layer.weight.var().item() * layer.in_features / 2
        assert abs(variance - 1) < 4 * (2 / n) ** 0.5  # the standard error of a variance of n normal numbers
    cnn = MNIST_CNN(widths=(64, 64, 64), generator=seeded())
    for layer in (cnn.conv2, cnn.conv3):
        variance = layer.weight.var().item() * 9 * 64 / 2
        assert abs(variance - 1) < 4 * (2 / layer.weight.numel()) ** 0.5
        assert not layer.bias.any()


@every_model
def test_many_weights_at_once_under_vmap(name):
    model = MODELS[name](generator=seeded())
    images = torch.randn(3, 784, generator=seeded(1))
    many = {
        key: p.detach() + 0.01 * torch.randn(2, *p.shape, generator=seeded(2)) for key, p in model.named_parameters()
    }
    together = vmap(lambda parameters: functional_call(model, parameters, (images,)))(many)  # (2, 3, 10)
    for k in range(2):
        alone = functional_call(model, {key: values[k] for key, values in many.items()}, (images,))
        torch.testing.assert_close(together[k], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("widths", [(), (8,), (8, 8, 8, 8)])
def test_other_numbers_of_convolutions_are_refused(widths):
    with pytest.raises(ValueError, match="widths must be two or three"):
        MNIST_CNN(widths=widths)


def test_bad_arguments_are_one_clear_line():
    with pytest.raises(ValueError, match=r"layer: 'nn\.Linear' is unknown; choose from TensorizedLinear_module, "):
        MNIST_TTM(layer="nn.Linear")
    with pytest.raises(ValueError, match=r"in factors \[4, 7, 7, 5\] do not multiply to in_features = 784"):
        MNIST_TTM(in_factors=[4, 7, 7, 5])
    with pytest.raises(ValueError, match=r"out factors \[1, 5, 2, 2\] do not multiply to out_features = 10"):
        MNIST_TTM(out_factors=[1, 5, 2, 2])


def test_sizes_may_be_integers_of_numpy():
    factors = {"in_factors": np.array([4, 7, 7, 4], dtype=np.int8), "max_rank": np.int64(4)}
    factors |= {"hidden_factors": np.array([4, 4, 4, 4], dtype=np.int8), "out_factors": np.array([1, 5, 2, 1])}
    for model, same in (
        (MNIST_TTM(**factors), MNIST_TTM()),
        (MNIST_TTM(layer="TensorizedLinear_module_tonn", **factors), MNIST_TTM(layer="TensorizedLinear_module_tonn")),
        (MNIST_TT(**factors), MNIST_TT(max_rank=4)),
        (MNIST_FC(np.int64(16)), MNIST_FC(16)),
        (MNIST_CNN(np.array([4, 5, 6])), MNIST_CNN([4, 5, 6])),
    ):
        assert [p.shape for p in model.parameters()] == [p.shape for p in same.parameters()]
        assert model(torch.zeros(2, 784)).shape == (2, 10)
