"""The simulated chip: its meshes, its ideal twin, its errors, and how queries see it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_tutorial import TensorizedLinear_module_tonn, ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.models.analogue import AnalogueLinear, mesh, phases_of

ERRORS = {"bits": 7, "offset": 0.1, "gain": 0.05, "crosstalk": 0.02}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photonic(tensor_type="TensorTrainMatrix", bias=True):
    shape = [[4, 3, 2], [1, 5, 2]]
    layer = TensorizedLinear_module_tonn(24, 10, bias, shape, tensor_type, max_rank=3, generator=generator())
    if bias:
        nn.init.normal_(layer.bias, generator=generator(1))
    return layer


def chip(seed=0, **errors):
    first = TensorizedLinear_module_tonn(24, 6, True, [[6, 4], [2, 3]], max_rank=2, generator=generator(2))
    second = TensorizedLinear_module_tonn(6, 4, False, [[2, 3], [2, 2]], max_rank=2, generator=generator(3))
    draws = generator(seed)
    layers = (AnalogueLinear(layer, generator=draws, **errors) for layer in (first, second))
    return nn.Sequential(next(layers), nn.ReLU(), next(layers))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_a_mesh_is_orthogonal_and_the_product_of_its_rotations_in_order(n):
    phases = torch.randn(n * (n - 1) // 2, generator=generator()).double()
    product, t = torch.eye(n).double(), 0
    for j in range(n - 1):
        for i in range(n - 1, j, -1):
            rotation, c, s = torch.eye(n).double(), phases[t].cos(), phases[t].sin()
            rotation[[i - 1, i, i - 1, i], [i - 1, i, i, i - 1]] = torch.stack([c, c, -s, s])
            product, t = product @ rotation, t + 1
    torch.testing.assert_close(mesh(phases, n), product)
    torch.testing.assert_close(product.T @ product, torch.eye(n).double())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_any_orthogonal_matrix_is_a_mesh_up_to_the_sign_of_its_determinant(n, seed):
    q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed)).double())[0]
    phases, signs = phases_of(q)
    assert len(phases) == n * (n - 1) // 2
    torch.testing.assert_close(mesh(phases, n) * signs, q)
    assert signs[:-1].eq(1).all() and torch.isclose(signs[-1], q.det())


@pytest.mark.parametrize("tensor_type", ["TensorTrainMatrix", "TensorTrain"])
@pytest.mark.parametrize("bias", [True, False])
def test_without_errors_the_chip_computes_the_map_of_its_layer(tensor_type, bias):
    layer = photonic(tensor_type, bias)
    analogue = AnalogueLinear(layer)
    x = torch.randn(2, 5, 24, generator=generator(4))
    torch.testing.assert_close(analogue(x), layer(x))
    torch.testing.assert_close(analogue.to_matrix(), layer.to_matrix())
    torch.testing.assert_close(analogue.contract(x[0]), layer.contract(x[0]))


def test_from_linear_sets_an_ideal_chip():
    linear = nn.Linear(24, 10)
    analogue = AnalogueLinear.from_linear(linear, [4, 3, 2], [1, 5, 2], 100)
    torch.testing.assert_close(analogue.to_matrix(), linear.weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_chip_has_the_precision_of_its_layer(dtype):
    linear = nn.Linear(24, 10).to(dtype)
    analogue = AnalogueLinear.from_linear(linear, [4, 3, 2], [1, 5, 2], 100)
    assert {tensor.dtype for tensor in (*analogue.parameters(), *analogue.buffers())} == {dtype}
    assert analogue(torch.randn(5, 24).to(dtype)).dtype == dtype
    error = 1e-12 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(analogue.to_matrix(), linear.weight, atol=error, rtol=0)


def test_many_bits_come_to_continuous_phases_and_few_do_not():
    layer = photonic()
    truth = layer.to_matrix().detach()
    errors = [(AnalogueLinear(layer, bits=bits).to_matrix() - truth).norm() / truth.norm() for bits in (4, 8, 12, 20)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-4


def test_the_errors_are_those_of_the_formula():
    analogue = AnalogueLinear(photonic(), **ERRORS, generator=generator())
    step = 2 * torch.pi / 2**7
    q = [step * round(phase / step) for phase in analogue.phases.tolist()]
    t = 3
    p = q[t] + 0.02 * (q[t - 1] + q[t + 1])
    phases, gains = analogue.realised()
    assert torch.isclose(phases[t], (1 + analogue.slopes[t]) * p + analogue.offsets[t], atol=1e-5)
    assert torch.isclose(gains[2], (1 + analogue.errors[2]) * analogue.gains[2])
    assert 0.05 < analogue.offsets.std() < 0.15 and 0.02 < analogue.slopes.std() < 0.08


def test_a_seed_makes_a_chip_and_another_seed_another_one():
    x = torch.randn(5, 24, generator=generator(4))
    one, same, other = (chip(seed, **ERRORS)(x) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other, atol=0.01)


def test_a_chip_that_is_drawn_anew_is_another_one_of_the_same_make():
    make = dict(offset=0.1, gain=0.05, crosstalk=0.02, bits=6)
    first, second = (AnalogueLinear(photonic(), generator=generator(seed), **make) for seed in (5, 6))
    commands = [parameter.clone() for parameter in first.parameters()]
    first.redraw(generator(6))
    assert all(map(torch.equal, first.buffers(), second.buffers()))
    assert all(map(torch.equal, first.parameters(), commands))
    ideal = AnalogueLinear(photonic())
    ideal.redraw(generator(6))
    torch.testing.assert_close(ideal.to_matrix(), AnalogueLinear(photonic()).to_matrix())


def test_drift_is_a_random_walk_of_the_phases():
    """The variance grows by spread² a call; gains and commands stay, and what the chip does changes."""
    aged = AnalogueLinear(photonic(), offset=0.1, generator=generator(5)).double()
    new, commands = [buffer.clone() for buffer in aged.buffers()], [p.clone() for p in aged.parameters()]
    matrix, draws = aged.to_matrix().detach(), generator(1)
    for calls in range(1, 401):
        aged.drift(0.01, draws)
        if calls in (1, 20, 400):  # χ² / K of K phases
            ratio = (aged.offsets - new[0]).square().mean() / (0.01**2 * calls)
            assert abs(ratio - 1) < 5 * (2 / len(aged.offsets)) ** 0.5 < 1
    assert torch.equal(aged.slopes, new[1]) and torch.equal(aged.errors, new[2])
    assert all(map(torch.equal, aged.parameters(), commands))
    assert (aged.to_matrix() - matrix).abs().max() > 0.01
    again = AnalogueLinear(photonic(), offset=0.1, generator=generator(5)).double()
    draws = generator(1)
    for _ in range(400):
        again.drift(0.01, draws)
    assert torch.equal(again.offsets, aged.offsets)


def test_the_errors_are_no_state_to_be_copied_from_chip_to_chip():
    assert {name.split(".")[1] for name in chip(**ERRORS).state_dict()} == {"phases", "gains", "bias"}


@pytest.mark.parametrize("errors", [{}, ERRORS])
def test_all_ways_of_querying_agree(errors):
    x, y = torch.randn(20, 24, generator=generator(4)), torch.arange(20) % 4
    options = {
        ZO_SGD_mask: {"sigma": 0.1, "n_sample": 5},
        ZO_SCD_mask: {"grad_estimator": "esti", "h_smooth": 0.1, "grad_sparsity": 0.5},
    }
    for optimiser, chosen in options.items():
        estimates, queries = [], []
        for mode in ("loop", "auto", "batched"):
            model = chip(**errors)
            names = "TensorizedLinear_module_tonn"
            step = optimiser(model, F.cross_entropy, None, 0.0, **chosen, opt_layers_strs=names,
                             query_mode=mode, generator=generator())  # fmt: skip
            step.step(x, y)
            estimates.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            queries.append(step.queries)
        assert queries[0] == queries[1] == queries[2]
        torch.testing.assert_close(estimates[1], estimates[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(estimates[2], estimates[0], atol=1e-4, rtol=1e-3)


def test_queries_descend_the_loss_of_an_imperfect_chip():
    x, y = torch.randn(40, 24, generator=generator(4)), torch.arange(40) % 4
    model = chip(**ERRORS)
    step = ZO_SCD_mask(model, F.cross_entropy, None, 0.05, 0, 0.05, "esti", adam=True, generator=generator())
    losses = [step.step(x, y)[1].item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
