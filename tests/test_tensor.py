"""The tensor layers against their dense twins, and the formats against brute force."""

import itertools
from functools import reduce
from math import prod
from operator import matmul

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.flop_counter import FlopCounterMode

from zo_tutorial.tensor import (
    TensorizedEmbedding_module,
    TensorizedLinear,
    TensorizedLinear_module,
    TensorizedLinear_module_tonn,
    formats,
)

IN, OUT = [4, 3, 2], [2, 3, 5]  # 24 -> 30
KINDS = {
    "TT": lambda i, o, rank, **options: TensorizedLinear(i, o, rank, **options),
    "TTM": lambda i, o, rank, **options: TensorizedLinear_module(
        prod(i), prod(o), shape=[i, o], max_rank=rank, **options
    ),
    "TTM as TT": lambda i, o, rank, **options: TensorizedLinear_module(
        prod(i), prod(o), shape=[i, o], tensor_type="TensorTrain", max_rank=rank, **options
    ),
    "photonic": lambda i, o, rank, **options: TensorizedLinear_module_tonn(
        prod(i), prod(o), shape=[i, o], max_rank=rank, **options
    ),
    "photonic as TT": lambda i, o, rank, **options: TensorizedLinear_module_tonn(
        prod(i), prod(o), shape=[i, o], tensor_type="TensorTrain", max_rank=rank, **options
    ),
}
FROM_LINEAR = {
    "TT": TensorizedLinear.from_linear,
    "TTM": TensorizedLinear_module.from_linear,
    "TTM as TT": lambda *args: TensorizedLinear_module.from_linear(*args, tensor_type="TensorTrain"),
    "photonic": TensorizedLinear_module_tonn.from_linear,
    "photonic as TT": lambda *args: TensorizedLinear_module_tonn.from_linear(*args, tensor_type="TensorTrain"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_definition(layer):
    """W entry by entry: a product of one small matrix a core."""
    cores = [core.detach().numpy() for core in layer.tensor_cores()]
    weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.float64)
    all_rows = list(itertools.product(*map(range, layer.out_factors)))
    all_columns = list(itertools.product(*map(range, layer.in_factors)))
    for (i, rows), (j, columns) in itertools.product(enumerate(all_rows), enumerate(all_columns)):
        if layer.tensor_type == "TensorTrain":
            slices = [core[:, index] for core, index in zip(cores, columns + rows, strict=True)]
        else:
            slices = [core[:, row, column] for core, row, column in zip(cores, rows, columns, strict=True)]
        weight[i, j] = reduce(matmul, slices).item()
    return weight


# The map.


@every_kind
def test_matrix_follows_the_definition(kind):
    layer = KINDS[kind](IN, OUT, 3, generator=seeded()).double()
    torch.testing.assert_close(layer.to_matrix(), by_definition(layer))


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 4), (0,), (200,)], ids=str)
def test_layer_equals_its_dense_twin(kind, bias, dtype, leading):
    layer = KINDS[kind](IN, OUT, 3, bias=bias, generator=seeded()).to(dtype)
    if bias:
        nn.init.normal_(layer.bias, generator=seeded(1))
    x = torch.randn(*leading, 24, generator=seeded(2), dtype=dtype)
    y, expected = layer(x), F.linear(x, layer.to_matrix(), layer.bias)
    assert y.shape == (*leading, 30) and y.dtype == dtype
    torch.testing.assert_close(y, expected)


@every_kind
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_contraction_and_matrix_give_the_same(kind, rows):
    layer = KINDS[kind](IN, OUT, 4, generator=seeded()).double()
    x = torch.randn(rows, 24, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(layer.contract(x), x @ layer.to_matrix().T)


@every_kind
def test_a_single_factor_is_a_plain_matrix(kind):
    layer = KINDS[kind]([6], [5], 3, generator=seeded())
    x = torch.randn(4, 6, generator=seeded(1))
    torch.testing.assert_close(layer(x), F.linear(x, layer.to_matrix(), layer.bias))


@pytest.mark.parametrize("tensor_type", ["TensorTrainMatrix", "TensorTrain"])
def test_photonic_layer_is_the_same_map_with_reshaped_cores(tensor_type):
    sizes = dict(shape=[IN, OUT], tensor_type=tensor_type, max_rank=4)
    plain = TensorizedLinear_module(24, 30, **sizes, generator=seeded())
    photonic = TensorizedLinear_module_tonn(24, 30, **sizes, generator=seeded(1))
    with torch.no_grad():
        for mine, theirs in zip(photonic.cores, plain.cores, strict=True):
            mine.copy_(theirs.reshape(mine.shape))
    x = torch.randn(9, 24, generator=seeded(2))
    assert torch.equal(photonic.to_matrix(), plain.to_matrix())
    torch.testing.assert_close(photonic(x), plain(x))


def test_photonic_matrices_applied_in_turn_give_the_output():
    layer = TensorizedLinear_module_tonn(24, 30, False, [IN, OUT], max_rank=3, generator=seeded())
    r = layer.ranks
    for k, core in enumerate(layer.cores):
        assert core.shape == (OUT[k] * r[k], IN[k] * r[k + 1])
    x = torch.randn(24, generator=seeded(1))
    third = layer.cores[2] @ x.reshape(12, 2).T  # (r_2 m_3, n_1 n_2)
    third = third.reshape(r[2], 5, 4, 3).permute(2, 3, 0, 1)  # (n_1, n_2, r_2, m_3)
    second = layer.cores[1] @ third.reshape(4, 3 * r[2], 5)  # (n_1, r_1 m_2, m_3)
    first = layer.cores[0] @ second.reshape(4 * r[1], 15)  # (m_1, m_2 m_3)
    torch.testing.assert_close(first.flatten(), layer(x))


@pytest.mark.parametrize("tensor_type", ["TensorTrainMatrix", "TensorTrain"])
def test_tensorized_linear_is_the_tt_layer_of_the_module(tensor_type):
    same = tensor_type == "TensorTrain"
    one = TensorizedLinear(IN, OUT, 4, generator=seeded())
    other = TensorizedLinear_module(24, 30, shape=[IN, OUT], tensor_type=tensor_type, max_rank=4, generator=seeded())
    assert (one.core_shapes == other.core_shapes) is same


# Ranks and counts.


def test_ranks_are_lowered_to_the_attainable():
    modes = formats.tt_modes([4, 7, 7, 4], [4, 4, 4, 4])
    assert formats.attainable_ranks(20, modes) == [1, 4, 20, 20, 20, 20, 16, 4, 1]
    assert formats.attainable_ranks(3, modes) == [1, 3, 3, 3, 3, 3, 3, 3, 1]
    assert formats.attainable_ranks([1, 2, 50, 50, 1], [(3,), (5,), (2,), (9,)]) == [1, 2, 10, 9, 1]
    assert formats.attainable_ranks(20, formats.ttm_modes([4, 4], [1, 5])) == [1, 4, 1]
    assert formats.attainable_ranks(7, [(6,)]) == [1, 1]


@pytest.mark.parametrize("modes", [[(3,), (2,), (4,), (2,)], [(2, 3), (1, 2), (3, 3)]], ids=str)
def test_attainable_ranks_are_those_of_a_random_full_tensor(modes):
    sizes = [prod(mode) for mode in modes]
    tensor = torch.randn(prod(sizes), generator=seeded(), dtype=torch.float64)
    cuts = [torch.linalg.matrix_rank(tensor.reshape(prod(sizes[:k]), -1)).item() for k in range(len(sizes) + 1)]
    assert formats.attainable_ranks(10**6, modes) == cuts


@pytest.mark.parametrize(
    "rank",
    [0, -1, 2.5, [1, 2, 1], [1, 2, 2, 2], [2, 2, 2, 1], [1, 0, 2, 1], "4"]
    + [True, np.True_, [1, True, 2, 1], np.float64(2), np.array([1.0, 2.0, 2.0, 1.0]), [1, [2], 2, 1], [], None],
    ids=str,
)
def test_impossible_ranks_are_one_clear_line(rank):
    with pytest.raises(ValueError, match=r"^rank must be a positive integer, or the list of all 4 with 1 at both"):
        TensorizedLinear_module(24, 30, shape=[IN, OUT], max_rank=rank)


@every_kind
@pytest.mark.parametrize("rank", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=repr)
def test_a_rank_may_be_an_integer_of_any_type(kind, rank):
    layer = KINDS[kind](IN, OUT, rank)
    assert layer.ranks == KINDS[kind](IN, OUT, 3).ranks and all(type(found) is int for found in layer.ranks)
    for ranks in (list(map(np.int32, layer.ranks)), tuple(map(np.int8, layer.ranks)), np.array(layer.ranks)):
        assert KINDS[kind](IN, OUT, ranks).ranks == layer.ranks
    assert TensorizedEmbedding_module(24, 30, [IN, OUT], rank).ranks == attainable(3)


def attainable(rank):
    return formats.attainable_ranks(rank, formats.ttm_modes(IN, OUT))


@every_kind
def test_factors_may_be_integers_of_any_type(kind):
    for factors in (list(map(np.int64, IN)), np.array(IN, dtype=np.int8)):
        layer = KINDS[kind](factors, OUT, 2)
        assert layer.in_factors == IN and repr(layer) == repr(KINDS[kind](IN, OUT, 2))
    for factors in ([4.0, 3, 2], [True, 12, 2], ["4", 3, 2]):
        with pytest.raises(ValueError, match="should be whole numbers"):
            KINDS[kind](factors, OUT, 2)


def test_a_product_of_small_integers_does_not_overflow():
    factors = np.array([16, 16], dtype=np.int8)
    assert TensorizedLinear(factors, factors, 2).in_features == 256
    assert TensorizedLinear_module(256, np.int64(256), shape=[factors, factors]).out_features == 256


@every_kind
def test_a_list_of_ranks_is_taken_as_given(kind):
    ranks = [1, 2, 3, 1] if kind in ("TTM", "photonic") else [1, 2, 3, 4, 3, 2, 1]
    assert KINDS[kind](IN, OUT, ranks).ranks == ranks


@every_kind
def test_parameter_count_is_that_of_the_cores(kind):
    layer = KINDS[kind](IN, OUT, 3, bias=False)
    assert formats.parameter_count(layer.core_shapes) == sum(p.numel() for p in layer.parameters())
    assert [name for name, _ in layer.named_parameters()] == [f"cores.{k}" for k in range(len(layer.core_shapes))]


def test_the_repr_tells_factors_ranks_and_count():
    text = repr(TensorizedLinear_module(784, 256, False, [[4, 7, 7, 4], [4, 4, 4, 4]], max_rank=4))
    for part in ("in_factors=[4, 7, 7, 4]", "out_factors=[4, 4, 4, 4]", "ranks=[1, 4, 4, 4, 1]", "parameters=1024"):
        assert part in text


SIZES = [
    (IN, OUT, 3),
    ([4, 7, 7, 4], [4, 4, 4, 4], 4),
    ([4, 4, 4, 4], [1, 5, 2, 1], 20),
    ([2] * 5, [3] * 5, 2),
    ([5], [3], 2),
]


def multiply_adds(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2  # torch counts a multiply-add as two


@every_kind
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_flop_counts_are_those_of_the_products_that_run(kind, sizes, rows):
    layer = KINDS[kind](*sizes, bias=False, generator=seeded())
    x = torch.randn(rows, layer.in_features, generator=seeded(1))
    assert multiply_adds(lambda: layer.contract(x)) == layer.contract_flops(rows)
    assert multiply_adds(lambda: F.linear(x, layer.to_matrix())) == layer.dense_flops(rows)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_core_by_core_is_the_same_map_with_its_own_count(sizes):
    layer = KINDS["TTM"](*sizes, bias=False, generator=seeded()).double()
    x = torch.randn(4, layer.in_features, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(formats.ttm_in_turn(x, layer.tensor_cores()), layer.contract(x))
    count = formats.ttm_in_turn_flops(4, layer.core_shapes)
    assert multiply_adds(lambda: formats.ttm_in_turn(x, layer.tensor_cores())) == count


def test_flop_counts_by_hand():
    shapes = formats.core_shapes(formats.ttm_modes([2, 3], [5, 7]), [1, 4, 1])  # (1, 5, 2, 4), (4, 7, 3, 1)
    assert formats.ttm_in_turn_flops(10, shapes) == 10 * (2 * 4 * 7 * 3 + 7 * 5 * 2 * 4)
    assert formats.ttm_contract_flops(10, shapes) == formats.ttm_in_turn_flops(10, shapes)  # its halves are its cores
    assert formats.ttm_matrix_flops(shapes) == 35 * 6 * 4
    shapes = formats.core_shapes(formats.tt_modes([2, 3], [5, 7]), [1, 2, 4, 3, 1])
    assert formats.tt_halves_flops(shapes) == 2 * 2 * 3 * 4 + 4 * 5 * 3 * 7
    assert formats.tt_contract_flops(10, shapes) == formats.tt_halves_flops(shapes) + 10 * 4 * (6 + 35)
    assert formats.tt_matrix_flops(shapes) == formats.tt_halves_flops(shapes) + 6 * 4 * 35
    assert formats.dense_flops(10, 6, 35) == 2100


@every_kind
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_forward_takes_the_cheaper_way(kind, sizes, rows):
    layer = KINDS[kind](*sizes, bias=False, generator=seeded())
    x = torch.randn(rows, layer.in_features, generator=seeded(1))
    assert multiply_adds(lambda: layer(x)) == min(layer.contract_flops(rows), layer.dense_flops(rows))


def test_both_ways_occur_in_the_mnist_net():
    first = TensorizedLinear_module(784, 256, False, [[4, 7, 7, 4], [4, 4, 4, 4]], max_rank=4)
    head = TensorizedLinear_module(256, 10, False, [[4, 4, 4, 4], [1, 5, 2, 1]], max_rank=4)
    for rows in (1, 128):
        assert first.contract_flops(rows) < first.dense_flops(rows)
    assert head.contract_flops(1) < head.dense_flops(1)
    assert head.contract_flops(128) > head.dense_flops(128)


# The start.


@every_kind
@pytest.mark.parametrize("sizes", [(IN, OUT, 3), ([4, 4, 4], [1, 5, 2], 2)], ids=str)
def test_initial_weight_has_variance_two_over_in(kind, sizes):
    layers = [KINDS[kind](*sizes, generator=seeded(seed)) for seed in range(400)]
    weights = torch.stack([layer.to_matrix().detach() for layer in layers])  # (400, out, in)
    squares = weights.square().mean((1, 2)) * layers[0].in_features / 2  # (400,), each of mean 1
    error = squares.std() / 400**0.5
    assert error < 0.04
    assert abs(squares.mean() - 1) < 4 * error
    assert abs(weights.mean()) < 4 * weights.mean((1, 2)).std() / 400**0.5
    # Every entry has it, not only their mean.
    entries = weights.square().mean(0) * layers[0].in_features / 2  # (out, in)
    assert 0.4 < entries.min() and entries.max() < 2.5


@every_kind
def test_bias_starts_at_zero(kind):
    assert torch.equal(KINDS[kind](IN, OUT, 3).bias, torch.zeros(30))


@every_kind
def test_a_seed_fixes_the_start_and_nothing_else_is_drawn(kind):
    state = torch.get_rng_state()
    one, two, other = (KINDS[kind](IN, OUT, 3, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.to_matrix(), two.to_matrix()) and not torch.equal(one.to_matrix(), other.to_matrix())
    torch.manual_seed(5)
    assert torch.equal(KINDS[kind](IN, OUT, 3).to_matrix(), one.to_matrix())


# From a dense layer.


def dense(in_features, out_features, bias=True):
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, dtype=torch.float64)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, generator=seeded())
    return linear


@pytest.mark.parametrize("kind", FROM_LINEAR)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factors", [(IN, OUT), ([6, 4], [5, 6]), ([24], [30])], ids=str)
def test_from_linear_is_exact_at_full_rank(kind, bias, factors):
    linear = dense(24, 30, bias)
    state = torch.get_rng_state()
    layer = FROM_LINEAR[kind](linear, *factors, 10**6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(layer.to_matrix(), linear.weight, rtol=1e-10, atol=1e-10)
    x = torch.randn(5, 24, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-10, atol=1e-10)
    assert (layer.bias is None) is not bias


def unfolded(kind, weight):
    """The tensor that TT-SVD cuts, and the sizes of its modes."""
    if kind.endswith("TT"):
        return weight.T.reshape(*IN, *OUT), [*IN, *OUT]
    pairs = weight.reshape(*OUT, *IN).permute(0, 3, 1, 4, 2, 5)  # (m_1, n_1, m_2, n_2, m_3, n_3)
    return pairs, [m * n for m, n in zip(OUT, IN, strict=True)]


@pytest.mark.parametrize("kind", FROM_LINEAR)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_from_linear_keeps_the_bounds_of_tt_svd(kind, rank):
    linear = dense(24, 30, bias=False)
    layer = FROM_LINEAR[kind](linear, IN, OUT, rank)
    error = (layer.to_matrix() - linear.weight).square().sum().item()
    tensor, sizes = unfolded(kind, linear.weight.detach())
    dropped = []
    for k in range(1, len(sizes)):
        values = torch.linalg.svdvals(tensor.reshape(prod(sizes[:k]), -1))
        dropped.append(values[layer.ranks[k] :].square().sum().item())
    # No tensor of these ranks is nearer than the worst cut allows; TT-SVD is within the sum over all cuts.
    assert max(dropped) - 1e-9 <= error <= sum(dropped) + 1e-9
    assert error > 1e-3


@pytest.mark.parametrize("kind", ["TTM", "photonic"])
def test_from_linear_with_one_cut_is_the_best_there_is(kind):
    linear = dense(24, 30, bias=False)
    layer = FROM_LINEAR[kind](linear, [6, 4], [5, 6], 7)
    cut = linear.weight.detach().reshape(5, 6, 6, 4).permute(0, 2, 1, 3).reshape(30, 24)  # (m_1 n_1, m_2 n_2)
    best = torch.linalg.svdvals(cut)[7:].square().sum()
    torch.testing.assert_close((layer.to_matrix() - linear.weight).square().sum(), best)


def test_from_linear_refuses_factors_of_another_layer():
    for make in FROM_LINEAR.values():
        with pytest.raises(ValueError, match="24"):
            make(dense(24, 30), [5, 5], [5, 6], 3)


@pytest.mark.parametrize("kind", FROM_LINEAR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, 10**6])
def test_from_linear_of_a_low_precision_is_rounded_after_the_decomposition(kind, dtype, rank):
    linear = dense(24, 30).to(dtype)
    layer = FROM_LINEAR[kind](linear, IN, OUT, rank)
    assert {p.dtype for p in layer.parameters()} == {dtype} and torch.equal(layer.bias, linear.bias)
    single = FROM_LINEAR[kind](dense(24, 30).to(dtype).float(), IN, OUT, rank)
    for ours, theirs in zip(layer.cores, single.cores, strict=True):
        assert torch.equal(ours, theirs.to(dtype))
    x = torch.randn(5, 24, generator=seeded(1)).to(dtype)
    torch.testing.assert_close(layer(x).float(), single(x.float()), rtol=0.1, atol=0.5)


@pytest.mark.parametrize("svd, modes", [(formats.ttm_svd, formats.ttm_modes), (formats.tt_svd, formats.tt_modes)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tt_svd_returns_the_precision_it_was_given(svd, modes, dtype):
    matrix = torch.randn(30, 24, generator=seeded()).to(dtype)
    cores = svd(matrix, IN, OUT, formats.attainable_ranks(4, modes(IN, OUT)))
    assert {core.dtype for core in cores} == {dtype}


# Derivatives and batches of weights.


@every_kind
@pytest.mark.parametrize("rows", [2, 100])
def test_many_weights_at_once_under_vmap(kind, rows):
    layer = KINDS[kind](IN, OUT, 3, generator=seeded())
    x = torch.randn(rows, 24, generator=seeded(1))
    many = {
        name: p.detach() + 0.1 * torch.randn(6, *p.shape, generator=seeded(2)) for name, p in layer.named_parameters()
    }
    together = vmap(lambda parameters: functional_call(layer, parameters, (x,)))(many)  # (6, rows, 30)
    for k in range(6):
        alone = functional_call(layer, {name: values[k] for name, values in many.items()}, (x,))
        torch.testing.assert_close(together[k], alone, rtol=1e-4, atol=1e-5)
    # The inputs as a batch too.
    inputs = torch.randn(6, rows, 24, generator=seeded(3))
    both = vmap(lambda parameters, x: functional_call(layer, parameters, (x,)))(many, inputs)
    last = functional_call(layer, {name: values[5] for name, values in many.items()}, (inputs[5],))
    torch.testing.assert_close(both[5], last, rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("rows", [2, 40])
def test_first_and_second_derivatives(kind, rows):
    layer = KINDS[kind]([2, 2], [2, 3], 2, generator=seeded()).double()
    x = torch.randn(rows, 4, generator=seeded(1), dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def loss(*values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,)).tanh().square().mean()

    assert torch.autograd.gradcheck(loss, parameters)
    assert torch.autograd.gradgradcheck(loss, parameters)


@every_kind
def test_output_is_affine_in_one_weight(kind):
    layer = KINDS[kind](IN, OUT, 3, generator=seeded()).double()
    x = torch.randn(5, 24, generator=seeded(1), dtype=torch.float64)
    for name, parameter in layer.named_parameters():
        shift = torch.zeros_like(parameter)
        shift.view(-1)[parameter.numel() // 2] = 0.7
        low, middle, high = (functional_call(layer, {name: parameter + k * shift}, (x,)) for k in (-1, 0, 1))
        torch.testing.assert_close(high - middle, middle - low)


# Bad input.


@pytest.mark.parametrize("make", [TensorizedLinear_module, TensorizedLinear_module_tonn])
def test_factors_that_do_not_multiply_name_both(make):
    with pytest.raises(ValueError, match=r"in factors \[4, 3, 3\] do not multiply to in_features = 24"):
        make(24, 30, shape=[[4, 3, 3], OUT])
    with pytest.raises(ValueError, match=r"out factors \[2, 3, 4\] do not multiply to out_features = 30"):
        make(24, 30, shape=[IN, [2, 3, 4]])
    with pytest.raises(ValueError, match="shape must be"):
        make(24, 30)
    with pytest.raises(ValueError, match="'Tucker' is unknown; choose from TensorTrainMatrix, TensorTrain"):
        make(24, 30, shape=[IN, OUT], tensor_type="Tucker")


@every_kind
def test_unequal_numbers_of_factors(kind):
    with pytest.raises(ValueError, match=r"equally many factors, at least one; got \[4, 6\] and \[2, 3, 5\]"):
        KINDS[kind]([4, 6], OUT, 3)


@every_kind
def test_an_input_of_the_wrong_width(kind):
    with pytest.raises(ValueError, match="x has 12 features, the layer takes in_features = 24"):
        KINDS[kind](IN, OUT, 3)(torch.randn(4, 12))


# The embedding.


def test_an_embedding_looks_up_the_rows_of_its_table():
    table = TensorizedEmbedding_module(25, 12, [[3, 3, 3], [2, 3, 2]], 4, generator=seeded()).double()
    tokens = torch.arange(25).view(5, 5)
    torch.testing.assert_close(table(tokens), table.to_matrix()[tokens])
    assert table.to_matrix().shape == (27, 12) and table.ranks == [1, 4, 4, 1]
    assert [tuple(core.shape) for core in table.cores] == [(1, 2, 3, 4), (4, 3, 3, 4), (4, 2, 3, 1)]


def test_the_entries_of_an_embedding_start_near_one():
    tables = [TensorizedEmbedding_module(729, 64, [[27, 27], [8, 8]], 30, generator=seeded(k)) for k in range(5)]
    squares = [table.to_matrix().square().mean().item() for table in tables]
    assert sum(squares) / 5 == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("shape", [[[3, 3], [2, 3]], [[5, 6], [3, 3]], [[5, 6, 1], [2, 6]]])
def test_an_embedding_of_other_sizes_is_refused(shape):
    with pytest.raises(ValueError, match="do not make a table of 25 × 12"):
        TensorizedEmbedding_module(25, 12, shape)


@pytest.mark.parametrize("token", [-1, -25, 25, 26, 27, 1000])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_token_outside_of_the_table_is_an_index_error(token, shape):
    table = TensorizedEmbedding_module(25, 12, [[3, 3, 3], [2, 3, 2]], 4)  # the factors make 27 rows
    tokens = torch.full(shape, 24)
    assert table(tokens).shape == (*shape, 12)
    tokens.view(-1)[-1] = token
    for layer in (table, nn.Embedding(25, 12)):
        with pytest.raises(IndexError):
            layer(tokens)


def test_an_embedding_under_vmap():
    table = TensorizedEmbedding_module(25, 12, [[3, 3, 3], [2, 3, 2]], 4, generator=seeded()).double()
    tokens = torch.randint(25, (2, 5), generator=seeded(1))
    many = {name: p.detach() * torch.rand(3, *p.shape, generator=seeded(2)) for name, p in table.named_parameters()}
    alone = [functional_call(table, {name: values[k] for name, values in many.items()}, (tokens,)) for k in range(3)]
    together = vmap(lambda parameters: functional_call(table, parameters, (tokens,)))
    torch.testing.assert_close(together(many), torch.stack(alone))
    torch.testing.assert_close(vmap(table)(tokens), table(tokens))
    tokens[1, 2] = 25
    with pytest.raises(IndexError):
        together(many)
