"""Training as users set it up: which parameters, at which rates, by which rule; and all that a torch optimiser can."""

import copy
import io
import itertools
import pickle
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Decides
from torch import nn
from torch.nn.functional import cross_entropy

from zo_tutorial import ZO_SCD_mask, ZO_SGD_mask

METHODS = {
    "sgd": (ZO_SGD_mask, dict(sigma=1e-3, n_sample=3, lr=0.05)),
    "signSGD": (ZO_SGD_mask, dict(sigma=1e-3, n_sample=3, lr=0.05, signSGD=True)),
    "sgd adam": (ZO_SGD_mask, dict(sigma=1e-3, n_sample=3, lr=0.05, adam=True)),
    "layer by layer": (ZO_SGD_mask, dict(sigma=1e-3, n_sample=2, lr=0.05, layer_by_layer=True)),
    "esti": (ZO_SCD_mask, dict(grad_estimator="esti", h_smooth=1e-4, grad_sparsity=0.2, lr=0.05, momentum=0.9)),
    "esti adam": (ZO_SCD_mask, dict(grad_estimator="esti", h_smooth=1e-4, grad_sparsity=0.2, lr=0.05, adam=True)),
    "batch": (ZO_SCD_mask, dict(grad_estimator="batch", grad_sparsity=0.2, lr=0.05)),
    "sign": (ZO_SCD_mask, dict(grad_sparsity=0.2, lr=0.05)),
}
ESTIMATED = [method for method in METHODS if method != "sign"]
EXACT = dict(grad_estimator="esti", h_smooth=1e-5, grad_sparsity=0)


class Adapted(nn.Module):
    """Everything that a choice by layer type leaves out: an embedding, norms, a Conv1d, bare factors, an RNN cell."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(3, 6)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.A, self.B = nn.Parameter(torch.randn(2, 12) / 4), nn.Parameter(torch.randn(4, 2) / 2)
        self.cell = nn.GRUCell(4, 2)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = x + self.embedding((x[:, 0] > 0).long())
        h = self.norm(self.conv(x[:, None]).flatten(1))
        return self.head(self.drop(self.cell(h @ self.A.T @ self.B.T, x[:, :2])))


def adapted(dropout=0.0):
    torch.manual_seed(1)
    return Adapted(dropout).double()


def two_layers(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 3)).double()


def make(method, model, criterion=cross_entropy, masks=None, seed=3, **changes):
    cls, options = METHODS[method]
    return cls(model, criterion, masks, **(options | changes), generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    """The names of the parameters of which any entry is another one now."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradient(model, batch, names):
    """By back-propagation, on a copy: {name: gradient}."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.requires_grad_()
    chosen = [twin.get_parameter(name) for name in names]
    return dict(zip(names, torch.autograd.grad(cross_entropy(twin(batch[0]), batch[1]), chosen), strict=True))


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


# ---- G. which parameters are trained


CHOICES = {
    "everything": (lambda m: lambda name, p: True, lambda name: True),
    "by name": (lambda m: ["A", "B"], {"A", "B"}.__contains__),
    "one name": (lambda m: ["embedding.weight"], {"embedding.weight"}.__contains__),
    "parameters": (lambda m: list(m.norm.parameters()), lambda name: name.startswith("norm")),
    "names and parameters": (lambda m: [m.A, "head.bias"], {"A", "head.bias"}.__contains__),
    "a predicate of the name": (lambda m: lambda name, p: "bias" in name, lambda name: "bias" in name),
    "a predicate of the shape": (
        lambda m: lambda name, p: p.dim() == 1, lambda name: "bias" in name or name == "norm.weight"
    ),
    "groups": (
        lambda m: [{"params": ["A"], "lr": 0.1}, {"params": [m.B, "conv.weight"]}],
        {"A", "B", "conv.weight"}.__contains__,
    ),
    "a group of one tensor": (lambda m: [{"params": m.A}], {"A"}.__contains__),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_exactly_the_chosen_parameters_are_trained(choice, method, batch):
    choose, is_chosen = CHOICES[choice]
    model = adapted()
    before = snapshot(model)
    optimizer = make(method, model, parameters=choose(model))
    for _ in range(7):
        optimizer.step(*batch)
    expected = {name for name in before if is_chosen(name)}
    assert moved(model, before) == expected == set(optimizer.trained)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in expected)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_the_estimate_of_chosen_parameters_is_their_gradient(choice, mode, batch):
    choose, is_chosen = CHOICES[choice]
    model = adapted()
    g = gradient(model, batch, [name for name in snapshot(model) if is_chosen(name)])
    ZO_SCD_mask(model, cross_entropy, None, lr=0.0, **EXACT, parameters=choose(model), query_mode=mode).step(*batch)
    error = sum((model.get_parameter(name).grad - piece).square().sum() for name, piece in g.items())
    assert error < 1e-12 * sum(piece.square().sum() for piece in g.values())


def test_every_coordinate_chosen_is_paid_for(batch):
    model = adapted()
    optimizer = ZO_SCD_mask(model, cross_entropy, None, **EXACT, parameters=["A", model.norm.bias])
    optimizer.step(*batch)
    assert optimizer.queries == 1 + 2 * (24 + 12)


@pytest.mark.parametrize("cls", [ZO_SGD_mask, ZO_SCD_mask])
@pytest.mark.parametrize(
    "parameters, message",
    [
        (["C"], "'C'"),
        (["head"], "'head'"),
        (["head.weights", "A"], r"head\.weights"),
        ([nn.Parameter(torch.zeros(2, 12))], "(?i)parameter"),
        ([torch.zeros(2, 12)], "(?i)parameter"),
        (lambda name, p: False, r"(?i)parameter|nothing"),
        ([], r"(?i)parameter|nothing"),
        ([{"params": ["A"]}, {"params": ["A", "B"]}], r"(?i)more than one|twice|already|'A'"),
        ([{"lr": 0.1}], "params"),
    ],
)
def test_a_choice_that_is_no_choice_is_refused(cls, parameters, message):
    with pytest.raises(ValueError, match=message):
        cls(adapted(), cross_entropy, None, parameters=parameters)


def frozen_first():
    model = two_layers()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("options", [dict(), dict(opt_layers_strs="nn.Linear"), dict(parameters=lambda name, p: True)])
def test_frozen_parameters_are_left_out(options, method, batch):
    model = frozen_first()
    before = snapshot(model)
    optimizer = make(method, model, **options)
    for _ in range(5):
        optimizer.step(*batch)
    assert moved(model, before) == {"3.weight", "3.bias"} == set(optimizer.trained)
    assert model[0].weight.grad is None and not model[0].weight.requires_grad


def test_one_frozen_tensor_of_a_layer_is_left_out(batch):
    model = two_layers()
    model[3].bias.requires_grad_(False)
    optimizer = ZO_SCD_mask(model, cross_entropy, None, **EXACT)
    optimizer.step(*batch)
    assert list(optimizer.trained) == ["0.weight", "0.bias", "3.weight"]
    assert optimizer.queries == 1 + 2 * (24 + 4 + 12)


@pytest.mark.parametrize("cls", [ZO_SGD_mask, ZO_SCD_mask])
@pytest.mark.parametrize(
    "choose",
    [
        lambda m: ["0.weight", "3.weight"],
        lambda m: list(m.parameters()),
        lambda m: [{"params": ["3.weight"]}, {"params": [m[0].bias]}],
    ],
)
def test_a_frozen_parameter_that_is_named_is_an_error(cls, choose):
    model = frozen_first()
    with pytest.raises(ValueError, match="requires_grad"):
        cls(model, cross_entropy, None, parameters=choose(model))


@pytest.mark.parametrize("cls", [ZO_SGD_mask, ZO_SCD_mask])
@pytest.mark.parametrize("options", [dict(), dict(parameters=lambda name, p: True)])
def test_a_model_that_is_all_frozen_is_an_error(cls, options):
    with pytest.raises(ValueError, match=r"requires_grad|nothing|no parameter"):
        cls(two_layers().requires_grad_(False), cross_entropy, None, **options)


@pytest.mark.parametrize(
    "types, expected",
    [
        ([nn.LayerNorm], {"norm.weight", "norm.bias"}),
        (nn.Linear, {"head.weight", "head.bias"}),
        (nn.Embedding, {"embedding.weight"}),
        ([nn.Conv1d, "nn.Linear"], {"conv.weight", "conv.bias", "head.weight", "head.bias"}),
        ([nn.RNNCellBase], {"cell.weight_ih", "cell.weight_hh", "cell.bias_ih", "cell.bias_hh"}),
        ("nn.Linear", {"head.weight", "head.bias"}),
    ],
)
def test_layers_are_chosen_by_class_too(types, expected, method, batch):
    model = adapted()
    before = snapshot(model)
    optimizer = make(method, model, opt_layers_strs=types)
    for _ in range(7):
        optimizer.step(*batch)
    assert moved(model, before) == expected


def test_layers_of_a_class_of_ones_own_are_chosen(batch):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.factor

    model = nn.Sequential(Scale(), nn.Linear(6, 3)).double()
    optimizer = ZO_SCD_mask(model, cross_entropy, None, **EXACT, opt_layers_strs=[Scale])
    optimizer.step(*batch)
    assert list(optimizer.trained) == ["0.factor"] and optimizer.queries == 1 + 2 * 6


@pytest.mark.parametrize("types", [[nn.Bilinear], nn.Conv3d, [int], [nn.ReLU]])
def test_a_class_that_the_model_has_not_is_refused(types):
    with pytest.raises(ValueError, match=r"opt_layers_strs"):
        ZO_SGD_mask(adapted(), cross_entropy, None, opt_layers_strs=types)


# ---- masks


def none_of(model, *names):
    return {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in names}


@pytest.mark.parametrize("names", [["0.weight", "0.bias"], ["0.weight"], ["0.bias", "3.weight", "0.weight"]])
@pytest.mark.parametrize("options", [dict(), dict(parameters=lambda name, p: True)])
def test_a_mask_that_keeps_nothing_freezes_its_parameter(names, options, method, batch):
    model = two_layers()
    before = snapshot(model)
    optimizer = make(method, model, masks=none_of(model, *names), **options)
    for _ in range(5):
        optimizer.step(*batch)
    assert moved(model, before) == set(before) - set(names)


@pytest.mark.parametrize("cls", [ZO_SGD_mask, ZO_SCD_mask])
@pytest.mark.parametrize("options", [dict(), dict(parameters=["0.weight", "3.weight"])])
def test_masks_that_keep_nothing_at_all_are_an_error(cls, options):
    model = two_layers()
    for masks in ({}, none_of(model, *snapshot(model))):
        with pytest.raises(ValueError, match=r"nothing to train|no weight is kept"):
            cls(model, cross_entropy, masks, **options)


@pytest.mark.parametrize("cls", [ZO_SGD_mask, ZO_SCD_mask])
@pytest.mark.parametrize("options", [dict(parameters=["A", "B"]), dict(opt_layers_strs=[nn.LayerNorm])])
def test_a_mask_of_a_parameter_that_is_not_trained_is_warned_of(cls, options):
    model = adapted()
    with pytest.warns(UserWarning, match=r"head\.weight"):
        cls(model, cross_entropy, {"head.weight": torch.ones(3, 2, dtype=torch.bool)}, **options)


def test_a_mask_of_a_frozen_parameter_is_warned_of():
    model = frozen_first()
    with pytest.warns(UserWarning, match=r"0\.weight"):
        ZO_SGD_mask(model, cross_entropy, {"0.weight": torch.ones(4, 6, dtype=torch.bool)})


def test_masked_entries_of_bare_parameters_never_move(method, batch):
    model = adapted()
    masks = {
        name: (torch.arange(model.get_parameter(name).numel()) % 3 > 0).view_as(model.get_parameter(name))
        for name in ("A", "embedding.weight", "cell.weight_hh")
    }
    before = snapshot(model)
    optimizer = make(method, model, masks=masks, parameters=[*masks, "B"])
    for _ in range(5):
        optimizer.step(*batch)
    for name, mask in masks.items():
        now = model.get_parameter(name)
        assert torch.equal(now[~mask], before[name][~mask]) and not torch.equal(now[mask], before[name][mask])
    assert "B" in moved(model, before)


# ---- a plain function as the model


def weights(dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(5)
    return {
        "first": torch.randn(4, 6, generator=generator).to(dtype).requires_grad_(**options),
        "last": torch.randn(3, 4, generator=generator).to(dtype).requires_grad_(**options),
    }


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("give", [dict, lambda w: list(w.values())])
def test_a_function_is_trained_by_its_tensors(give, requires_grad, method, batch):
    w = weights(requires_grad=requires_grad)

    def model(x):
        return torch.tanh(x @ w["first"].T) @ w["last"].T

    before = {name: tensor.detach().clone() for name, tensor in w.items()}
    optimizer = make(method, model, parameters=give(w))
    losses = [optimizer.step(*batch)[1] for _ in range(8)]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in w.items())
    assert losses[-1].dtype == torch.float64 and all(t.requires_grad == requires_grad for t in w.values())


def test_the_estimate_of_a_function_is_its_gradient(batch):
    w = weights(requires_grad=True)

    def model(x):
        return torch.tanh(x @ w["first"].T) @ w["last"].T

    g = torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), w.values())
    ZO_SCD_mask(model, cross_entropy, None, lr=0.0, **EXACT, parameters=w).step(*batch)
    for tensor, expected in zip(w.values(), g, strict=True):
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-6, atol=1e-9)


def test_a_function_in_numpy_with_a_python_number_as_its_loss(method, batch):
    w = weights(requires_grad=False)
    x, y = (t.numpy() for t in batch)

    def model(x):
        return np.tanh(x @ w["first"].numpy().T) @ w["last"].numpy().T

    optimizer = make(method, model, lambda z, y: float(((z - np.eye(3)[y]) ** 2).mean()), parameters=w)
    losses = [optimizer.step(x, y)[1].item() for _ in range(30)]
    assert losses[-1] < losses[0]


def test_a_function_with_masks_and_rates_by_group(batch):
    w = weights(requires_grad=False)
    before = {name: tensor.clone() for name, tensor in w.items()}
    mask = torch.arange(24).view(4, 6) % 2 == 0
    optimizer = ZO_SCD_mask(
        lambda x: torch.tanh(x @ w["first"].T) @ w["last"].T, cross_entropy, {"first": mask}, **EXACT, parameters=w
    )
    optimizer.step(*batch)
    assert torch.equal(w["first"][~mask], before["first"][~mask])
    assert not torch.equal(w["first"][mask], before["first"][mask])
    assert optimizer.queries == 1 + 2 * (12 + 12)


@pytest.mark.parametrize("cls", [ZO_SGD_mask, ZO_SCD_mask])
@pytest.mark.parametrize("options", [dict(), dict(parameters=None), dict(parameters=lambda name, p: True)])
def test_a_function_without_tensors_is_refused(cls, options):
    with pytest.raises(ValueError, match="parameters"):
        cls(lambda x: x, cross_entropy, None, **options)


# ---- the rule


class SquareRoot(torch.optim.Optimizer):
    """A rule of the user's own: by the signed square root of the gradient."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign() * p.grad.abs().sqrt())


RULES = {
    "RMSprop": torch.optim.RMSprop,
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
    "NAdam": torch.optim.NAdam,
    "Adagrad": torch.optim.Adagrad,
    "Nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adamax": lambda params, lr: torch.optim.Adamax(params, lr=lr, betas=(0.8, 0.9)),
    "own": SquareRoot,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["sgd", "esti", "batch"])
def test_any_rule_of_torch_moves_the_weights(rule, method, batch):
    """A twin gets the same gradients through the rule itself: the same weights, to the bit."""
    model = two_layers()
    twin = copy.deepcopy(model)
    options = dict(momentum=0) if method == "esti" else dict()
    optimizer = make(method, model, rule=RULES[rule], lr=0.02, **options)
    reference = RULES[rule](list(twin.parameters()), lr=0.02)
    start = snapshot(model)
    for _ in range(4):
        optimizer.step(*batch)
        for mine, his in zip(model.parameters(), twin.parameters(), strict=True):
            his.grad = mine.grad.clone()
        reference.step()
        assert same(snapshot(model), snapshot(twin))
    assert moved(model, start) == set(start)


@pytest.mark.parametrize("method", ["sgd", "esti"])
def test_masked_entries_stay_under_a_rule_that_decays_weights(method, batch):
    model = two_layers()
    before = snapshot(model)
    mask = torch.arange(24).view(4, 6) % 2 == 0
    options = dict(momentum=0) if method == "esti" else dict()
    rule = partial(torch.optim.AdamW, weight_decay=0.5)
    optimizer = make(method, model, masks={"0.weight": mask}, rule=rule, **options)
    for _ in range(3):
        optimizer.step(*batch)
    assert torch.equal(model[0].weight[~mask], before["0.weight"][~mask])
    assert (model[0].weight[mask] != before["0.weight"][mask]).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_schedule_reaches_the_rule_and_a_run_resumes(rule, batch):
    def run(model, optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step(*batch)
            scheduler.step()

    def begin(seed):
        model = two_layers()
        optimizer = make("sgd", model, rule=RULES[rule], lr=0.02, seed=seed)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    whole = begin(3)
    run(*whole, 6)
    first = begin(3)
    run(*first, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = begin(99)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*second, 3)
    for mine, other in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)  # torch loads NAdam's μ in another precision
    assert second[1].param_groups[0]["lr"] == pytest.approx(0.02 / 8)


@pytest.mark.parametrize(
    "cls, options",
    [
        (ZO_SGD_mask, dict(rule=torch.optim.LBFGS)),
        (ZO_SCD_mask, dict(rule=torch.optim.LBFGS, grad_estimator="esti")),
        (ZO_SGD_mask, dict(rule=partial(torch.optim.LBFGS, max_iter=1))),
        (ZO_SGD_mask, dict(rule=torch.optim.RMSprop, adam=True)),
        (ZO_SCD_mask, dict(rule=torch.optim.RMSprop, adam=True, grad_estimator="esti")),
        (ZO_SCD_mask, dict(rule=torch.optim.RMSprop, momentum=0.9, grad_estimator="esti")),
        (ZO_SCD_mask, dict(rule=torch.optim.RMSprop, weight_decay=0.1, grad_estimator="batch")),
        (ZO_SCD_mask, dict(rule=torch.optim.RMSprop, grad_estimator="esti", momentum=0.5, dampening=0.1)),
        (ZO_SCD_mask, dict(rule=torch.optim.RMSprop)),  # sign moves the weights itself
    ],
)
def test_rules_that_cannot_be_are_refused(cls, options):
    with pytest.raises(ValueError):
        cls(two_layers(), cross_entropy, None, **options)


# ---- learning rates by group


def separable(w):
    """A function of two vectors that is the sum of (t − 0.05)² over all entries."""
    return lambda _: sum((tensor - 0.05).square().sum() for tensor in w)


@pytest.mark.parametrize("stp, wide", [(False, 1.0), (True, 0.0)])
@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_batch_probes_each_group_at_its_own_rate(stp, wide, mode):
    """From 0 a probe of 0.01 falls towards the minimum at 0.05, one of 0.3 flies past it."""

    class Separable(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return separable([self.near, self.far])(x)

    model = Separable()
    optimizer = ZO_SCD_mask(
        model, lambda z, _: z, None, lr=0.01, grad_sparsity=0, grad_estimator="batch", STP=stp, query_mode=mode,
        parameters=[{"params": ["near"]}, {"params": ["far"], "lr": 0.3}],
    )  # fmt: skip
    optimizer.step(torch.zeros(1), None)
    assert model.near.grad.tolist() == [-1.0] * 3 and model.far.grad.tolist() == [wide] * 2
    assert model.near.tolist() == pytest.approx([0.01] * 3) and model.far.tolist() == pytest.approx([-0.3 * wide] * 2)
    optimizer.param_groups[1]["lr"] = 0.02
    optimizer.step(torch.zeros(1), None)
    assert model.far.grad.tolist() == [-1.0] * 2


@pytest.mark.parametrize("stp", [True, False])
@pytest.mark.parametrize("mode", ["auto", "loop", "batched", "structured"])
def test_sign_moves_each_group_by_its_own_rate(stp, mode, batch):
    """A naive descent on copies takes the same path, also after a schedule has changed one of the rates."""
    model = two_layers()
    reference = copy.deepcopy(model)
    rates = {"0.weight": 0.02, "0.bias": 0.1, "3.weight": 0.005, "3.bias": 0.02}
    optimizer = ZO_SCD_mask(
        model, cross_entropy, None, lr=0.02, grad_sparsity=0, STP=stp, query_mode=mode,
        parameters=[
            {"params": ["0.weight", "3.bias"]}, {"params": ["0.bias"], "lr": 0.1}, {"params": ["3.weight"], "lr": 0.005}
        ],
    )  # fmt: skip
    for _ in range(2):
        optimizer.step(*batch)
        with torch.no_grad():
            running = cross_entropy(reference(batch[0]), batch[1]).item()
            for name in optimizer.trained:
                entries = reference.get_parameter(name).view(-1)
                for i in range(len(entries)):
                    start = entries[i].item()
                    for step in (rates[name], -rates[name]):
                        entries[i] = start + step
                        loss = cross_entropy(reference(batch[0]), batch[1]).item()
                        if loss < running or (step < 0 and not stp):
                            running = loss
                            break
                        entries[i] = start
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, reference.get_parameter(name), rtol=0, atol=1e-12)
        optimizer.param_groups[1]["lr"] = rates["0.bias"] = 0.03


@pytest.mark.parametrize("method", ["sgd", "signSGD", "layer by layer", "esti"])
def test_the_rule_moves_each_group_by_its_own_rate(method, batch):
    model = two_layers()
    options = dict(momentum=0) if method == "esti" else dict()
    optimizer = make(
        method, model, lr=0.01, **options,
        parameters=[{"params": ["0.weight", "0.bias"], "lr": 0.3}, {"params": list(model[3].parameters())}],
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 0.5**k, lambda k: 1.0])
    for k in range(3):
        before = snapshot(model)
        optimizer.step(*batch)
        schedule.step()
        for name, p in model.named_parameters():
            rate = 0.3 * 0.5**k if name.startswith("0.") else 0.01
            grad = p.grad.sign() if method == "signSGD" else p.grad
            assert grad.any()
            torch.testing.assert_close(before[name] - p, rate * grad)


def test_groups_keep_options_of_the_rule(batch):
    model = two_layers()
    before = snapshot(model)
    optimizer = ZO_SCD_mask(
        model, cross_entropy, None, lr=0.1, **EXACT, rule=torch.optim.SGD,
        parameters=[{"params": ["0.weight"], "weight_decay": 0.5}, {"params": ["3.weight"]}],
    )  # fmt: skip
    optimizer.step(*batch)
    grad, w = model[0].weight.grad, before["0.weight"]
    torch.testing.assert_close(w - model[0].weight, 0.1 * (grad + 0.5 * w))
    torch.testing.assert_close(before["3.weight"] - model[3].weight, 0.1 * model[3].weight.grad)


# ---- a closure


class Evaluated:
    """The loss of a batch, and how often it was asked for."""

    def __init__(self, model, batch):
        self.model, self.batch, self.calls = model, batch, 0

    def __call__(self):
        self.calls += 1
        return cross_entropy(self.model(self.batch[0]), self.batch[1])


@pytest.mark.parametrize("give", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)])
def test_a_closure_takes_the_path_of_a_batch(give, method, batch):
    start, results = two_layers(dropout=0.3), []
    for by_closure in (True, False):
        model = copy.deepcopy(start)
        optimizer = make(method, model, None if by_closure else cross_entropy, query_mode="auto" if by_closure else
                         "loop")  # fmt: skip
        closure, losses = Evaluated(model, batch), []
        for _ in range(3):
            before = closure.calls, optimizer.queries
            losses.append(give(optimizer, closure) if by_closure else optimizer.step(*batch)[1])
            if by_closure:
                extra = closure.calls - before[0] - (optimizer.queries - before[1])
                assert 0 <= extra <= (1 if len(losses) == 1 else 0)  # the first step asks twice, and counts once
        results.append((snapshot(model), torch.stack(losses), optimizer.queries))
    (mine, losses, queries), (expected, others, count) = results
    assert queries == count and torch.allclose(losses, others, rtol=1e-12)
    assert all(torch.allclose(mine[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)
    assert not same(mine, snapshot(start))


def test_the_gradient_of_a_closure_is_that_of_backpropagation(batch):
    model = adapted()
    g = gradient(model, batch, list(snapshot(model)))
    optimizer = ZO_SCD_mask(model, None, None, lr=0.0, **EXACT, parameters=lambda name, p: True)
    loss = optimizer.step(Evaluated(model, batch))
    assert loss.shape == () and loss.item() == pytest.approx(cross_entropy(model(batch[0]), batch[1]).item())
    for name, expected in g.items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-6, atol=1e-9)


def test_a_closure_over_two_models_and_several_batches(batch):
    """What no pair of inputs and targets can say: a regularised loss of two forward passes, as a Python number."""
    w, teacher = weights(requires_grad=False), two_layers()
    x = batch[0].clone()

    def closure():
        z = torch.tanh(x @ w["first"].T) @ w["last"].T
        return float((z - teacher(x)).square().mean() + 0.1 * sum(t.square().sum() for t in w.values()))

    optimizer = ZO_SCD_mask(lambda x: x, None, None, lr=0.05, **EXACT, parameters=w)
    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert all(b < a for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("noise", [lambda calls: next(calls), lambda calls: 1 + 1e-3 * next(calls)])
@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_a_closure_that_does_not_repeat_is_refused_or_warned_of(mode, noise, batch):
    """A device may be noisy, and its user knows: a warning will do, but not silence."""
    model, calls = two_layers(), itertools.count(1)
    optimizer = ZO_SCD_mask(model, None, None, **EXACT, query_mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, UserWarning), match="not repeat"):
            optimizer.step(lambda: cross_entropy(model(batch[0]), batch[1]) * noise(calls))


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda z, loss: loss * float("nan"), FloatingPointError, "nan"),
        (lambda z, loss: loss / 0, FloatingPointError, "inf"),
        (lambda z, loss: z, ValueError, "one number"),
        (lambda z, loss: None, ValueError, "one number"),
        (lambda z, loss: loss * 1j, ValueError, "(?i)complex"),
        (lambda z, loss: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_a_closure_that_gives_no_loss_is_refused_and_moves_nothing(spoil, error, message, method, batch):
    model = two_layers()
    before = snapshot(model)
    optimizer = make(method, model)

    def closure():
        z = model(batch[0])
        return spoil(z, cross_entropy(z, batch[1]))

    with pytest.raises(error, match=message):
        optimizer.step(closure)
    assert same(before, snapshot(model))


def test_a_scheduler_of_torch_wraps_the_step_with_a_closure(batch):
    model = two_layers()
    optimizer = ZO_SCD_mask(model, None, None, lr=0.1, **EXACT)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    closure, losses = Evaluated(model, batch), []
    for _ in range(4):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < losses[0] and optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


# ---- the estimate apart from the update


@pytest.mark.parametrize("method", ESTIMATED)
def test_a_step_is_an_estimate_into_empty_gradients_and_an_update(method, batch):
    start, results = two_layers(dropout=0.3), []
    for whole in (True, False):
        model = copy.deepcopy(start)
        optimizer = make(method, model)
        for _ in range(3):
            if whole:
                outputs, loss = optimizer.step(*batch)
            else:
                optimizer.zero_grad()
                before = snapshot(model)
                outputs, loss = optimizer.estimate(*batch)
                assert same(before, snapshot(model))
                optimizer.update()
        results.append((snapshot(model), loss, optimizer.queries, outputs))
    assert same(results[0][0], results[1][0]) and results[0][2] == results[1][2]
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][3], results[1][3])
    assert moved(model, snapshot(start)) == set(snapshot(start))


@pytest.mark.parametrize("method", ESTIMATED)
def test_estimates_add_up_like_backward(method, batch):
    model, single = two_layers(), []
    for steps in (1, 2):
        twin = copy.deepcopy(model)
        optimizer = make(method, twin)
        for k in range(steps):
            if steps == 2 and k == 1:
                twin.zero_grad(set_to_none=True)
            optimizer.estimate(*batch)
        single.append({name: p.grad.clone() for name, p in twin.named_parameters()})
    optimizer = make(method, model)
    for _ in range(2):
        optimizer.estimate(*batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, single[0][name] + single[1][name])
    assert not all(torch.equal(single[0][name], single[1][name]) for name in single[0])


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(batch):
    model = adapted()
    names = list(snapshot(model))
    g = gradient(model, batch, names)
    optimizer = ZO_SCD_mask(model, lambda z, y: cross_entropy(z, y) / 2, None, lr=0.1, **EXACT, parameters=names)
    before = snapshot(model)
    for half in (slice(0, 4), slice(4, 8)):
        optimizer.estimate(batch[0][half], batch[1][half])
    optimizer.update()
    for name in names:
        torch.testing.assert_close(model.get_parameter(name).grad, g[name], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(before[name] - model.get_parameter(name), 0.1 * g[name], rtol=1e-6, atol=1e-9)


def test_an_estimate_adds_to_what_backpropagation_left(batch):
    model = two_layers()
    g = gradient(model, batch, list(snapshot(model)))
    cross_entropy(model(batch[0]), batch[1]).backward()
    ZO_SCD_mask(model, cross_entropy, None, **EXACT).estimate(*batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * g[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["sgd", "esti", "batch", "layer by layer"])
def test_gradients_may_be_clipped_in_between(method, batch):
    model = two_layers()
    options = dict(momentum=0) if method == "esti" else dict()
    optimizer = make(method, model, lr=0.5, **options)
    before = snapshot(model)
    optimizer.estimate(*batch)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) > 0.01
    optimizer.update()
    distance = sum((p - before[name]).square().sum() for name, p in model.named_parameters()).sqrt().item()
    assert distance == pytest.approx(5e-4, rel=1e-2)


def test_the_sign_of_sign_sgd_is_taken_of_the_accumulated_gradient(batch):
    model = two_layers()
    before = snapshot(model)
    optimizer = make("signSGD", model, lr=0.1)
    for _ in range(3):
        optimizer.estimate(*batch)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    sizes = torch.cat([grad.flatten() for grad in grads.values()]).abs()
    assert len(sizes.unique()) > len(sizes) / 2  # no signs yet
    optimizer.update()
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p, 0.1 * grads[name].sign())


def test_a_step_replaces_what_was_accumulated(batch):
    model = two_layers()
    g = gradient(model, batch, list(snapshot(model)))
    optimizer = ZO_SCD_mask(model, cross_entropy, None, lr=0.0, **EXACT)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    optimizer.step(*batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, g[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["sgd", "signSGD", "esti", "esti adam", "batch"])
def test_masked_entries_stay_whatever_their_gradients_become(method, batch):
    model = two_layers()
    before = snapshot(model)
    mask = torch.arange(24).view(4, 6) % 2 == 0
    optimizer = make(method, model, masks={"0.weight": mask})
    optimizer.estimate(*batch)
    assert not model[0].weight.grad[~mask].any()
    for p in model.parameters():
        p.grad += 3.0
    optimizer.update()
    assert torch.equal(model[0].weight[~mask], before["0.weight"][~mask])
    assert (model[0].weight[mask] != before["0.weight"][mask]).all()


def test_an_update_without_an_estimate_moves_nothing():
    model = two_layers()
    before = snapshot(model)
    optimizer = make("sgd", model)
    optimizer.update()
    assert same(before, snapshot(model)) and optimizer.queries == 0


@pytest.mark.parametrize("stp", [True, False])
def test_sign_has_no_estimate(stp, batch):
    model = two_layers()
    before = snapshot(model)
    optimizer = ZO_SCD_mask(model, cross_entropy, None, STP=stp)
    with pytest.raises(ValueError, match="sign"):
        optimizer.estimate(*batch)
    assert same(before, snapshot(model)) and all(p.grad is None for p in model.parameters())


# ---- I. copies


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def through_torch(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES = {
    "as it is": dict(),
    "groups": dict(parameters=[{"params": ["A", "head.weight"], "lr": 0.2}, {"params": ["norm.weight"]}]),
    "a predicate": dict(parameters=lambda name, p: "bias" not in name),  # no trace of it may be pickled
}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_of_model_and_optimizer_goes_on_bit_for_bit(change, duplicate, method, batch):
    model = adapted(dropout=0.2)
    optimizer = make(method, model, **CHANGES[change])
    for _ in range(2):
        optimizer.step(*batch)
    twin, other = duplicate((model, optimizer))
    names = {id(p): name for name, p in twin.named_parameters()}
    assert {id(p) for group in other.param_groups for p in group["params"]} <= set(names)
    assert [names[id(p)] for p in other.trained.values()] == list(optimizer.trained)
    assert not any(p is q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    before = snapshot(model)
    losses = [other.step(*batch)[1] for _ in range(3)]
    assert same(before, snapshot(model))  # the original has not moved
    assert [optimizer.step(*batch)[1] for _ in range(3)] == losses
    assert same(snapshot(model), snapshot(twin)) and moved(twin, before) == set(optimizer.trained)
    assert optimizer.queries == other.queries > 0
    assert torch.equal(optimizer.generator.get_state(), other.generator.get_state())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own(duplicate, method, batch):
    model = two_layers()
    optimizer = make(method, model)
    optimizer.step(*batch)
    before = snapshot(model)
    other = duplicate(optimizer)
    assert other.step(*batch)[1].isfinite() and same(before, snapshot(model))
    moving = list(other.trained.values())
    assert any(not torch.equal(p, before[name]) for p, name in zip(moving, other.trained, strict=True))


def test_a_scheduler_made_for_a_copy_drives_the_copy(batch):
    model, optimizer = copy.deepcopy((lambda model: (model, make("sgd", model)))(two_layers()))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    optimizer.step(*batch)
    schedule.step()
    before = snapshot(model)
    optimizer.step(*batch)
    assert same(before, snapshot(model))


# ---- I. more groups


@pytest.mark.parametrize(
    "group, names",
    [
        (lambda m: {"params": [m.A, m.B], "lr": 0.2}, {"A", "B"}),
        (lambda m: {"params": list(m.norm.parameters())}, {"norm.weight", "norm.bias"}),
        (lambda m: {"params": m.embedding.weight, "lr": 0.3}, {"embedding.weight"}),
    ],
)
def test_a_group_that_is_added_is_trained(group, names, method, batch):
    model = adapted()
    optimizer = make(method, model)  # the head
    optimizer.step(*batch)
    optimizer.add_param_group(group(model))
    before = snapshot(model)
    for _ in range(7):
        optimizer.step(*batch)
    assert moved(model, before) == names | {"head.weight", "head.bias"} == set(optimizer.trained)


def test_a_group_that_is_added_has_its_gradient_and_its_rate(batch):
    model = adapted()
    optimizer = ZO_SCD_mask(model, cross_entropy, None, lr=0.1, **EXACT)
    optimizer.add_param_group({"params": [model.A, model.cell.weight_ih], "lr": 0.02})
    names = ["head.weight", "head.bias", "A", "cell.weight_ih"]
    g, before = gradient(model, batch, names), snapshot(model)
    optimizer.step(*batch)
    assert optimizer.queries == 1 + 2 * sum(piece.numel() for piece in g.values())
    for name in names:
        rate = 0.1 if name.startswith("head") else 0.02
        torch.testing.assert_close(before[name] - model.get_parameter(name), rate * g[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cls", [ZO_SGD_mask, ZO_SCD_mask])
@pytest.mark.parametrize(
    "group",
    [
        lambda m: {"params": [nn.Parameter(torch.zeros(2, 12, dtype=torch.float64))]},
        lambda m: {"params": [m.head.weight]},
        lambda m: {"params": [m.A, m.head.bias]},
        lambda m: {"params": [m.conv.weight]},  # frozen below
        lambda m: {"params": list(adapted().norm.parameters())},
    ],
)
def test_a_group_that_cannot_be_trained_is_refused_and_changes_nothing(cls, group, batch):
    model = adapted()
    model.conv.requires_grad_(False)
    optimizer = cls(model, cross_entropy, None)
    groups, trained = len(optimizer.param_groups), list(optimizer.trained)
    with pytest.raises(ValueError):
        optimizer.add_param_group(group(model))
    assert len(optimizer.param_groups) == groups and list(optimizer.trained) == trained
    before = snapshot(model)
    for _ in range(3):
        optimizer.step(*batch)
    assert moved(model, before) == {"head.weight", "head.bias"}


def test_a_run_with_an_added_group_resumes(method, batch):
    def begin(seed):
        model = adapted()
        optimizer = make(method, model, seed=seed)
        optimizer.add_param_group({"params": [model.A], "lr": 0.03})
        return model, optimizer

    whole, half, rest = begin(3), begin(3), begin(99)
    for _ in range(4):
        whole[1].step(*batch)
    for _ in range(2):
        half[1].step(*batch)
    for part, state in zip(rest, [copy.deepcopy(part.state_dict()) for part in half], strict=True):
        part.load_state_dict(state)
    for _ in range(2):
        rest[1].step(*batch)
    assert same(snapshot(whole[0]), snapshot(rest[0])) and rest[1].queries == whole[1].queries


# ---- I. states of others


def half_mask(model, odd=False):
    return {"0.weight": (torch.arange(24).view(4, 6) % 2 == 1) == odd}


def plain_state(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cross_entropy(model(torch.ones(2, 6).double()), torch.tensor([0, 1])).backward()
    optimizer.step()
    return optimizer.state_dict()


OTHERS = {
    "other parameters": lambda m: make(m, two_layers(), parameters=["0.weight", "3.weight"]).state_dict(),
    "as many parameters, other ones": lambda m: make(
        m, adapted(), parameters=["head.weight", "head.bias", "A", "B"]
    ).state_dict(),
    "a mask where there is none": lambda m: make(m, two_layers(), masks=half_mask(two_layers())).state_dict(),
    "a plain optimiser of torch": lambda m: plain_state(two_layers()),
    "an older format": lambda m: {
        key: value for key, value in make(m, two_layers()).state_dict().items() if key in ("state", "param_groups")
    },
    "nothing": lambda m: {},
}


def refuse(method, state, batch, **options):
    """The state is refused, and the optimiser goes on as if nothing had been."""
    model = two_layers()
    optimizer = make(method, model, **options)
    optimizer.step(*batch)
    before = copy.deepcopy(optimizer.state_dict())
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after.keys() == before.keys() and torch.equal(after["generator"], before["generator"])
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys()
    for _ in range(2):
        assert torch.equal(optimizer.step(*batch)[1], other.step(*batch)[1])
    assert same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("method", ["sgd adam", "esti", "sign"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_optimizer_is_refused(method, name, batch):
    refuse(method, OTHERS[name](method), batch)


@pytest.mark.parametrize("mine, other", [("sgd adam", "esti adam"), ("esti", "sgd"), ("sign", "sgd")])
def test_the_state_of_the_other_class_is_refused(mine, other, batch):
    optimizer = make(other, two_layers())
    optimizer.step(*batch)
    refuse(mine, optimizer.state_dict(), batch)


@pytest.mark.parametrize("method", ["sgd adam", "esti", "sign"])
def test_the_state_under_another_mask_is_refused(method, batch):
    """As many kept entries, other ones; and a mask against none."""
    model = two_layers()
    state = make(method, two_layers(), masks=half_mask(model, odd=True)).state_dict()
    refuse(method, state, batch, masks=half_mask(model))
    refuse(method, make(method, two_layers()).state_dict(), batch, masks=half_mask(model))


@pytest.mark.parametrize("method", ["sgd adam", "esti", "sign"])
def test_ones_own_state_is_taken(method, batch):
    """The refusals would be worth nothing if this were refused too."""
    first, second = make(method, two_layers()), make(method, two_layers(), seed=8)
    first.step(*batch)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.generator.get_state(), second.generator.get_state()) and second.queries == first.queries


# ---- the report


def test_the_report_names_what_is_trained_and_what_is_not_and_why(method, batch):
    model = adapted()
    model.head.bias.requires_grad_(False)
    mask = {"B": torch.zeros(4, 2, dtype=torch.bool), "A": torch.arange(24).view(2, 12) % 2 == 0}
    chosen = {"A", "B", "head.weight", "head.bias"}
    optimizer = make(method, model, masks=mask, parameters=lambda name, p: name in chosen)
    optimizer.step(*batch)
    report = optimizer.report()
    for name, _ in model.named_parameters():
        assert re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", report), f"{name} is not in the report"
    assert re.search(r"requires_grad|frozen", report) and "mask" in report
    assert re.search(r"\b18\b", report)  # 12 entries of A, 6 of the head


def test_printing_an_optimizer_shows_its_report(method, batch, capsys):
    optimizer = make(method, two_layers())
    optimizer.step(*batch)
    print(optimizer)
    assert optimizer.report() in capsys.readouterr().out
    assert type(optimizer).__name__ in str(optimizer)


def test_a_report_is_to_be_had_before_the_first_step_and_costs_no_query(method):
    optimizer = make(method, two_layers())
    assert "0.weight" in optimizer.report() and optimizer.queries == 0


@pytest.mark.parametrize("mode, expected", [("loop", "loop"), ("batched", "batched"), ("structured", "structured")])
def test_the_report_tells_which_way_answers(mode, expected, batch):
    optimizer = ZO_SCD_mask(two_layers(), cross_entropy, None, **EXACT, query_mode=mode)
    optimizer.step(*batch)
    assert expected in optimizer.report()


def test_the_report_tells_why_the_loop_answers(batch):
    optimizer = ZO_SCD_mask(Decides().double(), cross_entropy, None, **EXACT)
    optimizer.step(*batch)
    report = optimizer.report()
    assert "loop" in report and re.search(r"item|leaves torch|vmap", report)


def test_class_weights_of_a_criterion_do_not_keep_the_fastest_way_away(batch):
    weight, reports = torch.tensor([1.0, 2.0, 3.0]).double(), []
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=weight), partial(cross_entropy, weight=weight)):
        optimizer = ZO_SCD_mask(two_layers(), criterion, None, **EXACT)
        optimizer.step(*batch)
        reports.append(optimizer.report())
    assert "structured" in reports[0] and reports[1] == reports[2] == reports[0]
