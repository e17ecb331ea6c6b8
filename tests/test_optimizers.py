"""One contract that every optimiser keeps on every layer type, then what each one estimates."""

import copy
import gc
import inspect
import io

import pytest
import torch
from conftest import make_net
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from zo_tutorial import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.selection import LAYER_TYPES, select_parameters

SGD = dict(lr=0.05, sigma=1e-3, n_sample=3)
ESTI = dict(lr=0.05, h_smooth=1e-4, grad_estimator="esti", grad_sparsity=0.3)
OPTIMIZERS = {
    "sgd": (ZO_SGD_mask, SGD),
    "sgd one-sided": (ZO_SGD_mask, SGD | dict(two_sided=False)),
    "sgd rademacher": (ZO_SGD_mask, SGD | dict(directions="rademacher")),
    "sgd orthogonal": (ZO_SGD_mask, SGD | dict(directions="orthogonal")),
    "sgd low rank": (ZO_SGD_mask, SGD | dict(directions="low_rank", rank=2)),
    "sgd leave-one-out": (ZO_SGD_mask, SGD | dict(two_sided=False, baseline="leave_one_out")),
    "signSGD": (ZO_SGD_mask, SGD | dict(signSGD=True)),
    "sgd layer by layer": (ZO_SGD_mask, SGD | dict(layer_by_layer=True)),
    "sgd adam": (ZO_SGD_mask, SGD | dict(adam=True)),
    "esti": (ZO_SCD_mask, ESTI),
    "esti one-sided": (ZO_SCD_mask, ESTI | dict(STP=False)),
    "esti momentum decay": (ZO_SCD_mask, ESTI | dict(momentum=0.9, dampening=0.1, weight_decay=0.1)),
    "esti adam": (ZO_SCD_mask, ESTI | dict(adam=True, weight_decay=0.1)),
    "batch": (ZO_SCD_mask, ESTI | dict(grad_estimator="batch", STP=False, lr=0.01)),
    "batch three points": (ZO_SCD_mask, ESTI | dict(grad_estimator="batch", momentum=0.5)),
    "sign": (ZO_SCD_mask, ESTI | dict(grad_estimator="sign", STP=False, lr=0.01)),
    "sign three points": (ZO_SCD_mask, ESTI | dict(grad_estimator="sign", lr=0.01)),
}


@pytest.fixture(params=OPTIMIZERS)
def method(request) -> str:
    return request.param


@pytest.fixture(params=["loop", "batched", "structured"])
def mode(request) -> str:
    return request.param


def make(method, net, criterion=cross_entropy, masks=None, seed=3, **changes):
    cls, options = OPTIMIZERS[method]
    return cls(net, criterion, masks, **(options | changes), generator=torch.Generator().manual_seed(seed))


def half_masks(net):
    """Keep every other weight of each matrix and core; say nothing of biases."""
    trained = select_parameters(net).trained
    return {
        name: (torch.arange(p.numel()) % 2 == 0).view(p.shape)
        for name, p in trained.items()
        if not name.endswith("bias")
    }


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def weights_of(net):
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Counted:
    """Cross-entropy that counts its calls and can break at one of them."""

    def __init__(self, fail_at=None, failure=None):
        self.calls, self.fail_at, self.failure = 0, fail_at, failure

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.failure
        return cross_entropy(outputs, targets)


class FiniteAt:
    """Cross-entropy that is finite only at the given outputs, or wherever none are given."""

    def __init__(self, value):
        self.value, self.finite_at = value, None

    def __call__(self, outputs, targets):
        loss = cross_entropy(outputs, targets)
        if self.finite_at is None:
            return loss
        return torch.where((outputs - self.finite_at).abs().sum() < 1e-12, loss, self.value)


# ---- the contract: every optimiser x every layer type


def test_step_returns_the_unperturbed_model_before_the_update(method, kind, batch):
    net = make_net(kind)
    optimizer = make(method, net)
    for _ in range(3):  # a copy that is one update old would show from the second step on
        with torch.no_grad():
            expected = copy.deepcopy(net)(batch[0])
        before = snapshot(net)
        outputs, loss = optimizer.step(*batch)
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(loss, cross_entropy(expected, batch[1]))
        assert loss.shape == () and not same(before, snapshot(net))


def test_masked_weights_never_move(method, kind, batch):
    net = make_net(kind)
    masks = half_masks(net)
    optimizer = make(method, net, masks=masks)
    before = snapshot(net)
    for _ in range(3):
        optimizer.step(*batch)
    after = snapshot(net)
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        assert not torch.equal(after[name][mask], before[name][mask])
    # A mask is not a switch for its layer: a bias that it does not name is trained.
    assert all(not torch.equal(after[name], before[name]) for name in optimizer.trained if name.endswith("bias"))
    # Batch normalisation is no supported layer: its weights stay, and its buffers see one pass a step.
    assert all(torch.equal(after[name], before[name]) for name in ("2.weight", "2.bias"))
    assert after["2.num_batches_tracked"] == 3


def test_queries_are_counted_exactly(method, kind, batch):
    net, criterion = make_net(kind), Counted()
    everything = {} if "gd" in method.lower() else dict(grad_sparsity=0)
    optimizer = make(method, net, criterion, query_mode="loop", **everything)
    optimizer.step(*batch)
    assert optimizer.queries == criterion.calls - 1  # the first step also sees that the loss repeats
    d, layers = sum(p.numel() for p in optimizer.trained.values()), len(optimizer.layers)
    expected = {
        "sgd one-sided": 1 + 3,
        "sgd leave-one-out": 1 + 3,
        "sgd layer by layer": 1 + layers * 2 * 3,
        "esti one-sided": 1 + d,
        "batch": 1 + d,
    }.get(method, 1 + 2 * 3 if "gd" in method.lower() else 1 + 2 * d)
    if method.startswith("sign ") or method == "sign":
        assert 1 + d < optimizer.queries < expected
    else:
        assert optimizer.queries == expected


@pytest.mark.parametrize("mode", ["batched", "structured"])
def test_every_query_mode_takes_the_same_path(method, kind, mode, batch):
    """Two steps under dropout, half the weights masked: same weights, same losses, same count as in the loop."""
    results = []
    for m in (mode, "loop"):
        net = make_net(kind, dropout=0.2)
        optimizer = make(method, net, masks=half_masks(net), query_mode=m)
        losses = torch.stack([optimizer.step(*batch)[1] for _ in range(2)])
        results.append((snapshot(net), losses, optimizer.queries))
    (weights, losses, queries), (expected, others, count) = results
    assert queries == count
    torch.testing.assert_close(losses, others)
    # a difference of losses that agree to 1e-15 is off by 1e-15 over the step; signSGD may see it as a sign
    torch.testing.assert_close(weights, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["esti", "batch three points", "sign", "sgd adam", "sgd low rank"])
def test_a_step_leaves_no_tensor_to_the_garbage_collector(method, kind, mode, batch):
    optimizer = make(method, make_net(kind), query_mode=mode)
    optimizer.step(*batch)
    gc.disable()
    gc.freeze()  # only what is made from here on is looked through
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        optimizer.step(*batch)
        optimizer.step(*batch)
        gc.collect()
        assert not [held.shape for held in gc.garbage if isinstance(held, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


def test_an_exception_passes_through_and_leaves_no_trace(method, kind, mode, batch):
    for fail_at in (1, 2, 4) if mode == "loop" else (1, 2):
        failure = RuntimeError("device unplugged")
        net = make_net(kind, dropout=0.2)
        net[3].eval()  # a mode of its own, to be found again
        optimizer = make(method, net, Counted(fail_at, failure), query_mode=mode)
        before, modes = snapshot(net), [m.training for m in net.modules()]
        random_state = torch.get_rng_state()
        with pytest.raises(RuntimeError) as raised:
            optimizer.step(*batch)
        assert raised.value is failure
        assert same(before, snapshot(net)) and modes == [m.training for m in net.modules()]
        assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_layer(method, kind, mode, batch, value):
    net, criterion = make_net(kind), FiniteAt(value)
    optimizer = make(method, net, criterion, query_mode=mode)
    optimizer.step(*batch)
    before = snapshot(net)
    with torch.no_grad():
        criterion.finite_at = copy.deepcopy(net)(batch[0])
    with pytest.raises(FloatingPointError, match=r"step 2, with layer .*'0(\.1)?'.* perturbed"):
        optimizer.step(*batch)
    assert same(before, snapshot(net))
    criterion.finite_at = 0
    with pytest.raises(FloatingPointError, match="step 3, unperturbed"):
        optimizer.step(*batch)


def test_a_run_resumes_bit_for_bit(method, kind, batch):
    def run(net, optimizer, steps):
        return [optimizer.step(*batch)[1].item() for _ in range(steps)]

    whole = make_net(kind, dropout=0.2)
    whole_optimizer = make(method, whole)
    losses = run(whole, whole_optimizer, 6)

    net = make_net(kind, dropout=0.2)
    optimizer = make(method, net)
    first = run(net, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net = make_net(kind, dropout=0.2)
    optimizer = make(method, net, seed=99)
    net.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert first + run(net, optimizer, 3) == losses
    assert same(snapshot(whole), snapshot(net)) and optimizer.queries == whole_optimizer.queries


def test_the_generator_is_the_only_source_of_randomness(method, kind, batch):
    def run(seed, global_seed):
        net = make_net(kind, dropout=0.2)
        torch.manual_seed(global_seed)
        optimizer = make(method, net, seed=seed)
        for _ in range(2):
            optimizer.step(*batch)
        return snapshot(net)

    assert same(run(3, 0), run(3, 1))
    assert not same(run(3, 0), run(4, 0))


def test_without_learning_rate_nothing_moves(method, kind, batch):
    net = make_net(kind)
    before = weights_of(net)
    make(method, net, lr=0.0).step(*batch)
    assert same(before, weights_of(net))


def test_torch_schedulers_set_the_step(method, kind, batch):
    """After a scheduler has cut the learning rate a thousandfold, a step moves the weights a thousandth as far."""

    def distance(cut):
        net = make_net(kind)
        optimizer = make(method, net, **({} if "gd" in method.lower() else dict(grad_sparsity=0)))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=1e-3)
        if cut:
            with torch.no_grad():
                optimizer.rule.step()  # no gradient yet: nothing moves, but the scheduler has seen a step
            optimizer._opt_called = True
            scheduler.step()
        before = weights_of(net)
        optimizer.step(*batch)
        return sum((value - before[name]).square().sum() for name, value in weights_of(net).items()).sqrt()

    ratio = (distance(True) / distance(False)).item()
    # batch and sign also probe at the learning rate, so some of their signs may change
    assert ratio == pytest.approx(1e-3, rel=1e-6 if method.startswith(("sgd", "signSGD", "esti")) else 0.3)


def test_only_chosen_layers_are_touched(method, kind, batch):
    net = make_net(kind)
    chosen = kind.split()[0]
    if chosen == "nn.Linear":
        pytest.skip("both layers are chosen")
    optimizer = make(method, net, opt_layers_strs=chosen)
    before = weights_of(net)
    mark = torch.ones_like(net[4].weight)
    net[4].weight.grad = mark
    optimizer.step(*batch)
    assert all(name.startswith("0.") for name in optimizer.trained)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(net).items() if not name.startswith("0."))
    assert net[4].weight.grad is mark and torch.equal(mark, torch.ones_like(mark)) and net[4].bias.grad is None


# ---- what the estimates are worth


def autograd(net, batch):
    """The gradient that back-propagation gives, in the order of the trained parameters: (d,)."""
    trained = select_parameters(net).trained
    loss = cross_entropy(net(batch[0]), batch[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained.values())])


def estimate(optimizer, batch):
    optimizer.step(*batch)
    return torch.cat([p.grad.flatten() for p in optimizer.trained.values()])


@pytest.mark.parametrize("stp, tolerance", [(True, 1e-6), (False, 1e-3)])
def test_esti_is_the_gradient(kind, batch, stp, tolerance):
    net = make_net(kind)
    g = autograd(copy.deepcopy(net), batch)
    options = dict(lr=0.0, grad_sparsity=0, h_smooth=1e-4, grad_estimator="esti", STP=stp)
    estimated = estimate(ZO_SCD_mask(net, cross_entropy, None, **options), batch)
    assert (estimated - g).norm() < tolerance * g.norm()


@pytest.mark.parametrize("stp", [True, False])
def test_batch_is_the_sign_of_the_gradient(kind, batch, stp):
    net = make_net(kind)
    g = autograd(copy.deepcopy(net), batch)
    options = dict(lr=1e-6, grad_sparsity=0, grad_estimator="batch", STP=stp)
    estimated = estimate(ZO_SCD_mask(net, cross_entropy, None, **options), batch)
    clear = g.abs() > 1e-3
    assert clear.sum() > 10 and torch.equal(estimated[clear], g.sign()[clear])


@pytest.mark.parametrize(
    "options, factor",
    [
        (dict(), +1),
        (dict(two_sided=False), +1),
        (dict(directions="rademacher"), -1),
        (dict(layer_by_layer=True), +1),
    ],
)
@pytest.mark.parametrize("n", [1, 50])
def test_random_direction_error_follows_its_law(kind, batch, options, factor, n):
    """E‖ĝ−g‖² = (d±1)/n ‖g‖² for a small σ: right sign, right scale, every direction weighted 1/n, no two the same."""
    net = make_net(kind)
    g = autograd(copy.deepcopy(net), batch)
    generator = torch.Generator().manual_seed(5)
    optimizer = ZO_SGD_mask(net, cross_entropy, None, lr=0.0, sigma=1e-5, n_sample=n, generator=generator, **options)
    repeats = max(8, 200 // n)
    squares = torch.stack([(estimate(optimizer, batch) - g).square() for _ in range(repeats)]).mean(0)  # (d,)
    if options.get("layer_by_layer"):
        sizes = [sum(optimizer.trained[name].numel() for name in names) for names in optimizer.layers.values()]
        expected = sum((d + factor) / n * piece.square().sum() for d, piece in zip(sizes, g.split(sizes), strict=True))
    else:
        expected = (len(g) + factor) / n * g.square().sum()
    assert squares.sum() / expected == pytest.approx(1, abs=0.35)


def test_orthogonal_directions_span_k_of_d(batch):
    """The squared cosine with the gradient is k/d on average, and 1 when k = d."""
    net = nn.Linear(6, 3).double()
    g = autograd(net, batch)

    def cosine_squared(k, seed):
        generator = torch.Generator().manual_seed(seed)
        options = dict(lr=0.0, sigma=1e-5, n_sample=k, directions="orthogonal", generator=generator)
        return torch.cosine_similarity(estimate(ZO_SGD_mask(net, cross_entropy, None, **options), batch), g, dim=0) ** 2

    assert cosine_squared(21, 0) == pytest.approx(1, abs=1e-6)
    assert torch.stack([cosine_squared(7, seed) for seed in range(200)]).mean() == pytest.approx(7 / 21, abs=0.03)


def test_sign_sgd_hands_over_the_sign(batch):
    net = make_net("nn.Linear")
    plain = estimate(make("sgd", copy.deepcopy(net), lr=0.0), batch)
    signed = estimate(make("signSGD", net, lr=0.0), batch)
    assert torch.equal(signed, plain.sign())


@pytest.mark.parametrize("stp", [True, False])
def test_sign_agrees_with_its_definition(kind, batch, stp):
    """A second, naive implementation on copies of the weights takes the same path."""
    net, lr = make_net(kind), 0.01
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    reference = copy.deepcopy(net)

    def loss_at(weights):
        with torch.no_grad():
            return cross_entropy(functional_call(copy.deepcopy(reference), weights, batch[0]), batch[1])

    optimizer = ZO_SCD_mask(net, cross_entropy, None, lr=lr, grad_sparsity=0, STP=stp)
    optimizer.step(*batch)
    running, queries = loss_at(weights), 1
    for name in optimizer.trained:
        for i in range(weights[name].numel()):
            trials = []
            for shift in (lr, -lr):
                moved = {**weights, name: weights[name].clone()}
                moved[name].view(-1)[i] += shift
                trials.append((loss_at(moved), moved))
            if trials[0][0] < running:
                (running, weights), asked = trials[0], 1
            elif trials[1][0] < running or not stp:
                (running, weights), asked = trials[1], 2
            else:
                asked = 2
            queries += asked
    assert queries == optimizer.queries
    assert all(torch.equal(value, weights[name]) for name, value in net.named_parameters())
    if stp:  # three points never raise the loss of their batch
        assert loss_at(weights) < loss_at(dict(reference.named_parameters()))


def test_three_points_break_ties_as_defined():
    """A loss that no single coordinate can lower: sign and batch stay; without three points both must move."""
    for estimator in ("sign", "batch"):
        for stp in (True, False):
            net = nn.Linear(1, 2, bias=False)
            nn.init.zeros_(net.weight)
            options = dict(lr=0.1, grad_sparsity=0, grad_estimator=estimator, STP=stp)
            optimizer = ZO_SCD_mask(net, lambda outputs, _: outputs.square().sum(), None, **options)
            optimizer.step(torch.ones(1, 1), None)
            assert net.weight.flatten().tolist() == ([0, 0] if stp else pytest.approx([-0.1, -0.1]))


# ---- the update rule is torch's


@pytest.mark.parametrize(
    "options, rule",
    [
        (dict(momentum=0.9, dampening=0.3, weight_decay=0.05), torch.optim.SGD),
        (dict(adam=True, weight_decay=0.05), torch.optim.Adam),
    ],
)
def test_updates_are_those_of_torch_optim(batch, options, rule):
    """Sixty steps: an Adam that stored its bias correction would have stopped after some twenty."""
    net, twin = make_net("TensorizedLinear_module"), make_net("TensorizedLinear_module")
    optimizer = ZO_SCD_mask(
        net, cross_entropy, None, lr=0.02, grad_sparsity=0, h_smooth=1e-5, grad_estimator="esti", **options
    )
    trained = select_parameters(twin).trained
    options = dict(options)
    if options.pop("adam", False):
        options |= dict(betas=(0.9, 0.98), eps=1e-6)
    first_order = rule(trained.values(), lr=0.02, **options)
    for _ in range(60):
        first_order.zero_grad()
        cross_entropy(twin(batch[0]), batch[1]).backward()
        first_order.step()
        optimizer.step(*batch)
    for name, parameter in optimizer.trained.items():
        torch.testing.assert_close(parameter, trained[name], atol=1e-5, rtol=1e-4)


def test_skipped_coordinates_count_as_zero_and_their_share_repeats(batch):
    def kept(seed):
        generator = torch.Generator().manual_seed(seed)
        options = dict(lr=0.0, grad_sparsity=0.75, grad_estimator="batch", STP=False, generator=generator)
        optimizer = ZO_SCD_mask(make_net("nn.Linear"), cross_entropy, None, **options)
        return torch.stack([estimate(optimizer, batch) != 0 for _ in range(100)]).double()

    share = kept(0).mean()
    assert share == pytest.approx(0.25, abs=0.02)  # 6,300 tosses
    assert torch.equal(kept(0), kept(0)) and not torch.equal(kept(0), kept(1))


@pytest.mark.parametrize("stp", [False, True])
@pytest.mark.parametrize("estimator", ["sign", "batch", "esti"])
def test_modules_can_skip_shares_of_their_own_and_the_innermost_counts(batch, estimator, stp):
    net = make_net("nn.Linear")
    shares = {"0": 1.0, "0.bias": 0.0, "4": 0.5}
    options = dict(lr=1e-3, grad_sparsity=shares, grad_estimator=estimator, STP=stp)
    optimizer = ZO_SCD_mask(net, cross_entropy, None, **options, generator=torch.Generator().manual_seed(0))
    asked = {name: 0 for name in optimizer.trained}
    for _ in range(200):
        before = {name: parameter.clone() for name, parameter in optimizer.trained.items()}
        optimizer.step(*batch)
        for name, parameter in optimizer.trained.items():
            asked[name] += (parameter != before[name]).sum().item() / parameter.numel() / 200
    assert asked["0.weight"] == 0
    if estimator != "sign":  # there a coordinate may stay where it was
        assert asked["0.bias"] > 0.9 and {0.4 < asked[name] < 0.6 for name in ("4.weight", "4.bias")} == {True}


def test_shares_that_are_all_the_same_are_as_one_number(batch):
    def trained(shares):
        net = make_net("nn.Linear")
        optimizer = make("esti", net, grad_sparsity=shares)
        for _ in range(5):
            optimizer.step(*batch)
        return optimizer.queries, torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    (queries, one), (others, many) = trained(0.3), trained({"0": 0.3, "4": 0.3})
    assert queries == others and torch.equal(one, many)


def test_a_parameter_that_no_share_speaks_of_is_refused_also_where_it_comes_late():
    net = make_net("nn.Linear")
    optimizer = ZO_SCD_mask(net, cross_entropy, None, grad_sparsity={"4": 0.5}, parameters=["4.weight"])
    optimizer.add_param_group({"params": [net[0].weight]})
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match=r"grad_sparsity: says nothing of '0\.weight'; it names 4"):
        optimizer.step(torch.ones(2, 6, dtype=torch.double), torch.zeros(2, dtype=torch.long))
    assert torch.equal(net[0].weight, before)


def test_all_coordinates_skipped_is_legal(batch):
    net = make_net("nn.Linear")
    for estimator in ("sign", "batch", "esti"):
        optimizer = ZO_SCD_mask(net, cross_entropy, None, grad_sparsity=1, grad_estimator=estimator)
        optimizer.step(*batch)
        assert optimizer.queries == 1


# ---- arguments


def test_signatures_are_the_documented_ones():
    def positional(cls):
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][3:]

    assert positional(ZO_SGD_mask) == [
        ("lr", 0.01), ("sigma", 0.1), ("n_sample", 20), ("signSGD", False), ("layer_by_layer", False),
        ("opt_layers_strs", []),
    ]  # fmt: skip
    assert positional(ZO_SCD_mask) == [
        ("lr", 0.1), ("grad_sparsity", 0.1), ("h_smooth", 0.001), ("grad_estimator", "sign"), ("opt_layers_strs", []),
        ("STP", True), ("momentum", 0), ("weight_decay", 0), ("dampening", 0), ("adam", False), ("beta_1", 0.9),
        ("beta_2", 0.98), ("eps", 1e-06),
    ]  # fmt: skip


NOTHING = [(0, "weight", (6, 6)), (0, "bias", 6), (4, "weight", (3, 6)), (4, "bias", 3)]


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (ZO_SGD_mask, dict(sigma=0.0), "sigma"),
        (ZO_SGD_mask, dict(n_sample=0), "n_sample"),
        (ZO_SGD_mask, dict(lr=-1.0), "learning rate"),
        (ZO_SGD_mask, dict(directions="sideways"), "directions"),
        (ZO_SGD_mask, dict(directions="low_rank", rank=0), "rank"),
        (ZO_SGD_mask, dict(baseline="mean", two_sided=False), "baseline"),
        (ZO_SGD_mask, dict(baseline="leave_one_out"), "two_sided=False"),
        (ZO_SGD_mask, dict(baseline="leave_one_out", two_sided=False, n_sample=1), "n_sample"),
        (ZO_SGD_mask, dict(query_mode="fast"), "query_mode"),
        (ZO_SCD_mask, dict(grad_estimator="exact"), "sign, batch, esti"),
        (ZO_SCD_mask, dict(grad_sparsity=1.5), "grad_sparsity"),
        (ZO_SCD_mask, dict(grad_sparsity={"0": 0.5, "4": -0.1}), "grad_sparsity must lie between 0 and 1, not -0.1"),
        (ZO_SCD_mask, dict(grad_sparsity={"0": 0.5}), "says nothing of '4.weight'; it names 0"),
        (ZO_SCD_mask, dict(grad_sparsity={}), "says nothing of '0.weight'; it names no module"),
        (ZO_SCD_mask, dict(grad_sparsity={"0": 0.5, "4": 0.5, "head": 0}), "head decides for no trained parameter"),
        (ZO_SCD_mask, dict(grad_sparsity={"0": 0.5, "4": 0, "4.w": 0}), "4.w decides for no trained parameter"),
        (ZO_SCD_mask, dict(h_smooth=0.0), "h_smooth"),
        (ZO_SCD_mask, dict(momentum=0.9), "sign"),
        (ZO_SCD_mask, dict(weight_decay=0.1), "sign"),
        (ZO_SCD_mask, dict(adam=True), "sign"),
        (ZO_SCD_mask, dict(grad_estimator="esti", adam=True, momentum=0.9), "momentum"),
        (ZO_SCD_mask, dict(opt_layers_strs="nn.Bilinear"), "choose from nn.Linear, nn.Conv2d, TensorizedLinear"),
        (ZO_SCD_mask, dict(opt_layers_strs=["nn.Conv2d"]), "no layer of nn.Conv2d; it has .*Linear"),
        (ZO_SCD_mask, dict(masks={}), "no weight is kept"),
        (
            ZO_SCD_mask,
            dict(masks={f"{k}.{n}": torch.zeros(s, dtype=torch.bool) for k, n, s in NOTHING}),
            "no weight is kept",
        ),
        (ZO_SCD_mask, dict(masks={"5.weight": torch.ones(3, 6, dtype=torch.bool)}), "no parameter '5.weight'"),
        (ZO_SCD_mask, dict(masks={"4.weight": torch.ones(6, 3, dtype=torch.bool)}), "shape"),
        (ZO_SCD_mask, dict(masks={"4.weight": torch.ones(3, 6)}), "bool"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(cls, options, message):
    with pytest.raises(ValueError, match=f"(?i){message}") as raised:
        cls(make_net("nn.Linear"), cross_entropy, **dict(masks=None) | options)
    assert "\n" not in str(raised.value)


def test_every_layer_type_can_be_chosen_by_name():
    assert list(LAYER_TYPES) == [
        "nn.Linear", "nn.Conv2d", "TensorizedLinear", "TensorizedLinear_module", "TensorizedLinear_module_tonn"
    ]  # fmt: skip
    for name in LAYER_TYPES:
        net = make_net(name)
        layers = ZO_SGD_mask(net, cross_entropy, None, opt_layers_strs=name).layers
        types = {type(net.get_submodule(layer)) for layer in layers}
        assert types == {LAYER_TYPES[name]} and len(layers) == (2 if name == "nn.Linear" else 1)


def test_weights_in_any_memory_layout_are_trained_the_same(batch):
    """channels_last weights are not contiguous: they must not be perturbed in a copy."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Unflatten(-1, (3, 2, 1)), nn.Conv2d(3, 4, (2, 1)), nn.Flatten()).double()
        net[1].to(memory_format=layout)
        for method in ("sgd", "esti", "sign"):
            make(method, net, lambda outputs, targets: cross_entropy(outputs[:, :3], targets)).step(*batch)
        results.append(net[1].weight.detach().clone().contiguous())
    torch.testing.assert_close(*results)
