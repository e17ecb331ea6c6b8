"""Queries of models that users bring: the losses of a perturbed copy, and the model as one forward pass leaves it."""

import copy
import functools
import itertools
import random
import warnings
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jvp, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zo_tutorial import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.pruning import grasp
from zo_tutorial.queries import LossQueries

SHIFTS = [0.1, -0.1]
MODES = ["auto", "loop", "batched", "structured"]
ESTI = dict(lr=0.0, grad_sparsity=0, grad_estimator="esti")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def call(model, inputs):
    """One forward pass as the contract has it."""
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if type(inputs) in (tuple, list) else model(inputs)


def entry(parameter, i):
    return parameter[tuple(int(k) for k in np.unravel_index(i, parameter.shape))]


def direction(parameters):
    """One direction, of all parameters at once: (1, d)."""
    return torch.randn(1, sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(1))


def naive(model, reference, inputs, targets, criterion, shifts):
    """Losses of a fresh deep copy at each point, the last row along a direction: {name: (S, n)}."""

    def loss():
        with torch.no_grad():
            return float(criterion(call(copy.deepcopy(reference), inputs), targets))

    losses = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            losses[name] = torch.empty(len(shifts), parameter.numel(), dtype=torch.float64)
            for k, i in itertools.product(range(len(shifts)), range(parameter.numel())):
                before = entry(parameter, i).clone()
                entry(parameter, i).add_(shifts[k])
                losses[name][k, i] = loss()
                entry(parameter, i).copy_(before)
        parameters, before = list(model.parameters()), [p.clone() for p in model.parameters()]
        u = direction(parameters)[0]
        losses["direction"] = torch.empty(len(shifts), 1, dtype=torch.float64)
        for k, shift in enumerate(shifts):
            for p, piece in zip(parameters, u.split([p.numel() for p in parameters]), strict=True):
                p.add_(shift * piece.view(p.shape).to(p))
            losses["direction"][k, 0] = loss()
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
    return losses


def asked(queries, shifts):
    """The same from the queries."""
    losses = {}
    for name, parameter in queries.parameters.items():
        losses[name] = queries.coordinates(name, torch.arange(parameter.numel()), shifts)
    u = direction(queries.parameters.values())
    index = {name: torch.arange(parameter.numel()) for name, parameter in queries.parameters.items()}
    losses["direction"] = queries.directions(index, u.to(next(iter(queries.parameters.values()))), shifts)
    return losses


def alike(a, b):
    """Whether two states are the same, whatever holds them."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if isinstance(a, np.random.Generator):
        return a.bit_generator.state == b.bit_generator.state
    if isinstance(a, random.Random):
        return a.getstate() == b.getstate()
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, SimpleNamespace):
        return alike(vars(a), vars(b))
    return isinstance(a, nn.Module) or callable(a) or a == b or repr(a) == repr(b)


def same_state(model, twin):
    """Parameters, buffers, flags and plain attributes of all modules."""

    def state(module):
        plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        return plain | {"parameters": dict(module._parameters), "buffers": dict(module._buffers)}

    return all(alike(state(m), state(t)) for m, t in zip(model.modules(), twin.modules(), strict=True))


def slots(model):
    """Every place that holds a parameter."""
    return [(key, p) for module in model.modules() for key, p in module._parameters.items() if p is not None]


def check(model, batch, criterion=cross_entropy, mode="auto", shifts=SHIFTS, reference=None):
    """Two steps: the losses are those of deep copies, the model is left as one forward pass leaves it.

    `reference` is the model in a plain form, with the same parameters, where a copy of it is not to be had.
    """
    queries = LossQueries(model, criterion, dict(model.named_parameters()), mode)
    reference = reference or model
    places = slots(model)
    for seed in range(2):
        expected = naive(model, reference, *batch, criterion, shifts)
        twin = copy.deepcopy(reference)
        call(twin, batch[0])
        asked_before = queries.count
        _, loss = queries.start(*batch, seed)
        assert queries.count == asked_before + 1 and loss.is_floating_point() and loss.shape == ()
        assert same_state(reference, twin)
        still = queries.coordinates(next(iter(queries.parameters)), torch.tensor([0]), [0.0]).double().item()
        assert still == pytest.approx(loss.item(), rel=1e-6)
        losses = asked(queries, shifts)
        assert same_state(reference, twin)
        scale = max((value - still).abs().max() for value in expected.values())
        wide = {loss.dtype, *(p.dtype for p in model.parameters())} == {torch.float64}
        tolerance = scale * (1e-7 if wide else 1e-2)
        assert tolerance > 0
        for name, value in expected.items():
            assert losses[name].shape == value.shape
            assert (losses[name].double() - value).abs().max() < tolerance, name
        now = slots(model)
        assert len(now) == len(places)
        assert all(isinstance(p, nn.Parameter) and p is before for (_, p), (_, before) in zip(now, places, strict=True))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)


def right_or_refused(mode, *arguments, **options):
    """A forced way may say that it cannot; the others may not."""
    try:
        check(*arguments, mode=mode, **options)
    except RuntimeError as refusal:
        assert mode in ("batched", "structured")
        assert f"query_mode {mode!r} cannot query this model, 'loop' and 'auto' can" in str(refusal)


# ---- A. one parameter in several places


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        self.first = self.body[0]

    def forward(self, x):
        return self.body(x)


class ListAndAttribute(nn.Module):
    """One of two layers of a list is also an attribute, and called under that name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)])
        self.stem = self.blocks[0]

    def forward(self, x):
        return self.blocks[1](torch.tanh(self.blocks[0](torch.tanh(self.stem(x)))))


class TiedEmbedding(nn.Module):
    """Two modules of different types, one parameter."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 6), nn.Linear(6, 3)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(x + self.embedding((x[:, 0] > 0).long()))


class BareAndOwned(nn.Module):
    """A layer's weight under a name of the parent's own, and in a list of parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.scale = self.layer.bias
        self.all = nn.ParameterList(self.layer.parameters())

    def forward(self, x):
        return self.layer(x) * self.scale + x @ self.all[0].T


def one_layer_twice():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


def shared_blocks():
    return nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh())] * 3, nn.Linear(6, 3))


SHARED = [one_layer_twice, Alias, ListAndAttribute, TiedEmbedding, BareAndOwned, shared_blocks]


@pytest.mark.parametrize("make", SHARED)
@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_held_in_several_places_is_perturbed_in_all_of_them(make, mode, batch):
    check(make().double(), batch, mode=mode)


@pytest.mark.parametrize("make", SHARED)
@pytest.mark.parametrize("mode", ["auto", "batched"])
def test_a_parameter_held_in_several_places_is_still_one_that_backpropagation_trains(make, mode, batch):
    model = make().double()
    places = slots(model)
    ZO_SGD_mask(model, cross_entropy, None, n_sample=2, query_mode=mode).step(*batch)
    assert all(p is before and p.is_leaf for (_, p), (_, before) in zip(slots(model), places, strict=True))
    cross_entropy(model(batch[0]), batch[1]).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("make", [one_layer_twice, Alias, ListAndAttribute])
def test_pruning_leaves_a_parameter_in_all_its_places(make, batch):
    model = make().double()
    places = slots(model)
    grasp(model, cross_entropy, *batch, 0.5)
    assert all(isinstance(p, nn.Parameter) and p is before
               for (_, p), (_, before) in zip(slots(model), places, strict=True))  # fmt: skip


# ---- B. a weight that something else reads too


class Driven(nn.Module):
    """A driver outside of the module tree holds the weight: all of it, a part, or a view."""

    def __init__(self, hold):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.driver = SimpleNamespace(w=hold(self.linear.weight))

    def forward(self, x):
        return x @ self.driver.w.T + self.linear.bias


class PartlyDriven(Driven):
    """Only the second row is the driver's; the others are read from the layer as always."""

    def forward(self, x):
        z = self.linear(x)
        return torch.stack([z[:, 0], x @ self.driver.w[1], z[:, 2]], 1)


class Partial(nn.Module):
    """The weight is bound into a function once and for all."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.apply_weight = functools.partial(F.linear, weight=self.linear.weight)

    def forward(self, x):
        return self.linear(torch.tanh(x)) + self.apply_weight(x)


def hooked():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    weight = model[0].weight
    model[2].register_forward_hook(lambda module, args, output: output * weight.norm())
    return model


HELD_OUTSIDE = {
    "the parameter": lambda: Driven(lambda w: w),
    "a detached view": lambda: Driven(lambda w: w.detach()),
    "a part": lambda: PartlyDriven(lambda w: w.detach()),
    "a bound function": Partial,
    "a hook": hooked,
}


@pytest.mark.parametrize("name", HELD_OUTSIDE)
@pytest.mark.parametrize("size", [0.1, 1e-3, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_weight_held_outside_of_its_module_is_perturbed_there_too(name, size, mode, batch):
    model = HELD_OUTSIDE[name]()
    x, y = batch[0].float(), batch[1]
    right_or_refused(mode, model, (x, y), lambda z, y: cross_entropy(z.double(), y), shifts=[size, -size])


@pytest.mark.parametrize("name", ["the parameter", "a part"])
def test_inputs_that_are_always_zero_do_not_hide_a_wrong_way(name, batch):
    """The first and the last coordinate change nothing: equal losses there prove nothing."""
    model = HELD_OUTSIDE[name]()
    x = batch[0].float()
    x[:, [0, 1, -1]] = 0
    check(model, (x, batch[1]), lambda z, y: cross_entropy(z.double(), y))


@pytest.mark.parametrize("weight", [1.0, 1e-2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("h", [1e-1, 1e-3])
def test_a_penalty_over_a_captured_list_of_parameters_counts(weight, mode, h, batch):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    parameters = list(model.parameters())

    def penalised(z, y):
        return cross_entropy(z, y) + weight * sum(p.square().sum() for p in parameters)

    right_or_refused(mode, model, batch, penalised, shifts=[h, -h])


class DrawsTwice(nn.Module):
    """Dropout, then another draw; both are in the outputs, so that the gradient can be told from them."""

    def __init__(self, drop, draw):
        super().__init__()
        self.linear, self.drop, self.draw = nn.Linear(6, 3, bias=False), drop, draw

    def forward(self, x):
        dropped = self.drop(x)
        noise = self.draw()
        return dropped @ self.linear.weight.T * noise, dropped, noise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "drop, draw",
    [
        (lambda x: F.dropout(x, 0.5), lambda: torch.rand(3, dtype=torch.float64)),
        (lambda x: F.dropout(F.dropout(x, 0.3), 0.3), lambda: torch.randn(3, dtype=torch.float64)),
        (lambda x: F.alpha_dropout(x, 0.3, training=True), lambda: torch.rand(3, dtype=torch.float64)),
        (lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)), lambda: torch.rand(3, dtype=torch.float64)),
        (lambda x: torch.dropout(x, 0.5, True), lambda: torch.empty(3, dtype=torch.float64).exponential_()),
        (lambda x: F.dropout(x, 0.5), lambda: torch.from_numpy(np.random.rand(3))),  # noqa: NPY002
        (lambda x: F.dropout(x, 0.5), lambda: random.random() * torch.randint(5, (3,)).double()),
    ],
)
def test_a_draw_behind_dropout_is_the_same_in_every_query(drop, draw, mode, batch):
    """The first and the last coordinate change nothing: they do not tell that the noise is another one."""
    model = DrawsTwice(drop, draw).double()
    x = batch[0].clone()
    x[:, [0, -1]] = 0
    queries = LossQueries(model, lambda outputs, _: outputs[0].sum(), dict(model.named_parameters()), mode)
    for seed in range(2):
        (_, dropped, noise), loss = queries.start(x, batch[1], seed)
        expected = noise[:, None] * dropped.sum(0)
        assert noise.abs().sum() > 0
        try:
            losses = queries.coordinates("linear.weight", torch.arange(18), [0.1])[0]
            along = queries.directions({"linear.weight": torch.arange(18)}, torch.ones(1, 18).double(), [0.1])
        except RuntimeError as refusal:
            assert mode in ("batched", "structured") and "cannot query this model" in str(refusal)
        else:
            torch.testing.assert_close((losses - loss).view(3, 6), 0.1 * expected)
            torch.testing.assert_close((along - loss).item(), 0.1 * expected.sum().item())


# ---- C. values derived from a weight


def narrow(model):
    """A model whose forward pass opens autocast itself."""
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    return model


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 4), nn.Flatten()),
        lambda: nn.Bilinear(6, 6, 3),
        one_layer_twice,
    ],
)
def test_autocast_around_the_step_does_not_keep_the_weights(make, mode, batch):
    model, x = make(), batch[0].float()
    inputs = (x, x) if isinstance(model, nn.Bilinear) else x

    def criterion(z, y):
        return cross_entropy(z.float(), y)

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = naive(model, model, inputs, batch[1], criterion, SHIFTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queries = LossQueries(model, criterion, dict(model.named_parameters()), mode)
        queries.start(inputs, batch[1], seed=0)
        losses = asked(queries, SHIFTS)
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
    for name, value in expected.items():
        assert value.std() > 0
        torch.testing.assert_close(losses[name].double(), value, rtol=0, atol=0.02 * float(value.max() - value.min()))


def test_the_gradient_under_autocast_is_about_that_in_full_precision(batch):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = batch[0].float(), batch[1]
    g = torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(model(x), y), model.parameters())])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer = ZO_SCD_mask(model, lambda z, y: cross_entropy(z.float(), y), None, **ESTI, h_smooth=0.25)
        optimizer.step(x, y)
    estimate = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (estimate - g).norm() < 0.15 * g.norm()


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_a_model_that_opens_autocast_itself_is_queried_alike(mode, batch):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    plain, x = copy.deepcopy(model), batch[0].float()
    queries = LossQueries(narrow(model), lambda z, y: cross_entropy(z.float(), y), dict(model.named_parameters()), mode)
    queries.start(x, batch[1], seed=0)
    change = queries.coordinates("0.weight", torch.arange(30), [0.25, -0.25])
    g = torch.autograd.grad(cross_entropy(plain(x), batch[1]), plain[0].weight)[0].flatten()
    assert ((change[0] - change[1]) / 0.5 - g).norm() < 0.2 * g.norm()


def test_weights_that_parametrize_caches_are_not_taken_for_those_of_a_query(batch):
    """`parametrize.cached()` around a step keeps the weight that the first pass computed: right, or refused."""
    model = parametrizations.weight_norm(nn.Linear(6, 3).double())
    expected = naive(model, model, *batch, cross_entropy, SHIFTS)
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), "auto")
    with parametrize.cached():
        try:
            queries.start(*batch, seed=0)
            losses = asked(queries, SHIFTS)
        except RuntimeError as refusal:
            assert "cache" in str(refusal)
            return
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


# ---- D. models that remember


class Remembering(nn.Module):
    """A linear layer, and a function of (module, output) that reads and writes attributes."""

    def __init__(self, use, **state):
        super().__init__()
        self.linear, self.use = nn.Linear(6, 3), use
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.use(self, self.linear(x))


def counts(module, z):
    module.calls += 1
    return z / module.calls


def counts_in_a_dict(module, z):
    module.memory["calls"] += 1
    module.memory["last"] = z.detach()
    return z / module.memory["calls"]


def counts_deep_inside(module, z):
    module.memory["a"][1]["n"] += 1
    module.memory["a"][0].mul_(2)
    return z * module.memory["a"][0] / module.memory["a"][1]["n"]


def grows_a_list(module, z):
    module.seen.append(z.detach().mean())
    return z + sum(module.seen) * torch.arange(3)


def rolls_a_bank(module, z):
    module.bank = torch.cat([module.bank, z.detach()])[-10:]
    return z * module.bank.mean()


def steps_in_place(module, z):
    module.state.mul_(0.5).add_(z.detach().mean(0))
    return z + module.state


def steps_through_an_alias(module, z):
    module.state += 1
    return z * module.other


def replaces(module, z):
    module.hidden = torch.tanh(z.detach() + module.hidden)
    return z * module.hidden


def starts_from_none(module, z):
    module.hidden = z.detach() if module.hidden is None else torch.tanh(z.detach() + module.hidden)
    return z + module.hidden


def first_time_only(module, z):
    if hasattr(module, "started"):
        return z
    module.started = True
    return 2 * z


def keeps_the_first_weight(module, z):
    if module.cached is None:
        module.cached = module.linear.weight.detach() * 2
    return z + module.cached.sum(1)


def draws(module, z):
    return z * torch.rand(3, generator=module.generator)


def draws_from_a_list(module, z):
    return z * torch.rand(3, generator=module.generators[0]) + torch.rand(3, generator=module.generators[1])


def draws_from_a_dict(module, z):
    return z * torch.randn(3, generator=module.generators["noise"])


def anneals(module, z):
    module.temperature *= 0.9
    return z / module.temperature


REMEMBERING = {
    "a counter": lambda: Remembering(counts, calls=1),
    "a float": lambda: Remembering(anneals, temperature=2.0),
    "a dict": lambda: Remembering(counts_in_a_dict, memory={"calls": 1}),
    "nested containers": lambda: Remembering(counts_deep_inside, memory={"a": [torch.ones(3), {"n": 1}]}),
    "a list that grows": lambda: Remembering(grows_a_list, seen=[]),
    "a bank": lambda: Remembering(rolls_a_bank, bank=torch.ones(1, 3).double()),
    "a tensor, in place": lambda: Remembering(steps_in_place, state=torch.zeros(3).double()),
    "a tensor, replaced": lambda: Remembering(replaces, hidden=torch.zeros(3).double()),
    "a tensor, at first None": lambda: Remembering(starts_from_none, hidden=None),
    "an attribute that comes with the first call": lambda: Remembering(first_time_only),
    "a weight cached for good": lambda: Remembering(keeps_the_first_weight, cached=None),
    "a generator": lambda: Remembering(draws, generator=torch.Generator().manual_seed(3)),
    "generators in a list": lambda: Remembering(
        draws_from_a_list, generators=[torch.Generator().manual_seed(k) for k in (3, 4)]
    ),
    "a generator in a dict": lambda: Remembering(
        draws_from_a_dict, generators={"noise": torch.Generator().manual_seed(3)}
    ),
}


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("mode", MODES)
def test_what_a_model_remembers_is_the_same_in_every_query(name, mode, batch):
    """Each query starts from where the unperturbed pass started, and the model ends where that pass ended."""
    right_or_refused(mode, REMEMBERING[name]().double(), batch)


def test_two_names_of_one_tensor_stay_one_tensor(batch):
    state = torch.ones(3).double()
    model = Remembering(steps_through_an_alias, state=state, other=state).double()
    check(model, batch)
    assert model.state is model.other and model.state is state


def draws_from_numpy(module, z):
    return z * module.source.random()


def counts_outside(module, z):
    module.driver.calls += 1
    return z / module.driver.calls


def steps_an_array(module, z):
    module.array += 1
    return z * float(module.array[0])


def rolls_a_deque(module, z):
    module.seen.append(z.detach().mean().item())
    return z + sum(module.seen) * torch.arange(3)


def takes_the_next(module, z):
    return z * next(module.counter)


def steps_unseen(module, z):
    module.array.data.mul_(0.5)  # the version of the tensor does not tell
    return z * (1 + module.array[0])


def steps_in_a_long_list(module, z):
    module.seen[1200] += 1
    return z * module.seen[1200]


def nests_in_a_tuple(module, z):
    module.pair[1][0]["n"] += 1
    return z / module.pair[1][0]["n"]


def adds_to_a_set(module, z):
    module.seen.add(len(module.seen))
    return z * len(module.seen)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Remembering(draws_from_numpy, source=np.random.default_rng(0)),
        lambda: Remembering(draws_from_numpy, source=random.Random(0)),
        lambda: Remembering(counts_outside, driver=SimpleNamespace(calls=1)),
        lambda: Remembering(steps_an_array, array=np.ones(2)),
        lambda: Remembering(rolls_a_deque, seen=deque([1.0], maxlen=3)),
        lambda: Remembering(takes_the_next, counter=itertools.count(1)),
        lambda: Remembering(adds_to_a_set, seen=set()),
        lambda: Remembering(steps_unseen, array=torch.ones(3).double()),
        lambda: Remembering(steps_unseen, array=torch.ones(100_000).double()),
        lambda: Remembering(steps_in_a_long_list, seen=[1.0] * 2000),
        lambda: Remembering(nests_in_a_tuple, pair=(0, [{"n": 1}])),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_memories_of_other_kinds_are_restored_or_refused(make, mode, batch):
    try:
        check(make().double(), batch, mode=mode)
    except RuntimeError as refusal:
        assert "not repeat" in str(refusal)


OUTSIDE = torch.Generator().manual_seed(0)
CALLS = itertools.count(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "use",
    [
        lambda module, z: z * torch.rand(3, generator=OUTSIDE),
        lambda module, z: z * next(CALLS),
        lambda module, z: z + random.SystemRandom().random() * torch.arange(3),
    ],
)
def test_a_loss_that_does_not_repeat_is_refused_in_the_first_step(use, mode, batch):
    model = Remembering(use).double()
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), mode)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="not repeat"):
        queries.start(*batch, seed=0)
    assert alike(before, model.state_dict())


def test_a_criterion_that_counts_its_calls_into_the_loss_is_refused(batch):
    calls = itertools.count(1)
    model = nn.Linear(6, 3).double()
    optimizer = ZO_SGD_mask(model, lambda z, y: cross_entropy(z, y) * next(calls), None)
    with pytest.raises(RuntimeError, match="not repeat"):
        optimizer.step(*batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_called_unrepeatable(value, batch):
    model = nn.Linear(6, 3).double()
    queries = LossQueries(model, lambda z, y: z.sum() * value, dict(model.named_parameters()))
    with pytest.raises(FloatingPointError, match="step 1, unperturbed"):
        queries.start(*batch, seed=0)


class Writes(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.linear, self.write = nn.Linear(6, 3), write

    def forward(self, x):
        self.write(x["values"] if isinstance(x, dict) else x)
        return self.linear(x["values"] if isinstance(x, dict) else x)


class TakesKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, values, extra):
        extra["scale"] += 1
        return self.linear(values) * extra["scale"]


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.sub_(0.1),
        lambda x: x[:, 0].zero_(),  # the same at each call after the first
        lambda x: x.relu_(),
        lambda x: F.dropout(x, 0.5, inplace=True),
    ],
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: ({"values": x},), lambda x: {"x": x}])
def test_a_model_that_writes_into_its_input_is_refused(write, wrap, mode, batch):
    model = Writes(write).double()
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), mode)
    with pytest.raises(RuntimeError, match="writes into its input"):
        queries.start(wrap(batch[0].clone()), batch[1], seed=0)


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("write", [lambda x: x.data.sub_(0.1), lambda x: x.numpy().__isub__(0.1)])
def test_writing_into_the_input_behind_the_back_of_torch_is_refused_too(write, mode, batch):
    model = Writes(write).double()
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), mode)
    with pytest.raises(RuntimeError, match=r"writes into its input|not repeat"):
        queries.start(batch[0].clone(), batch[1], seed=0)


def test_layers_in_place_on_the_input_are_refused_too(batch):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="writes into its input"):
        queries.start(batch[0].clone(), batch[1], seed=0)


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_a_keyword_input_that_is_written_into_is_refused(mode, batch):
    model = TakesKeywords().double()
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), mode)
    inputs = {"values": batch[0], "extra": {"scale": torch.ones(())}}
    with pytest.raises(RuntimeError, match=r"writes into its input|not repeat"):
        queries.start(inputs, batch[1], seed=0)


def test_a_criterion_that_writes_into_its_targets_is_refused(batch):
    model, targets = nn.Linear(6, 3).double(), torch.zeros(8, 3).double()
    queries = LossQueries(model, lambda z, t: (z - t.sub_(0.1)).square().mean(), dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match=r"writes into|not repeat"):
        queries.start(batch[0], targets, seed=0)


class Clamps(nn.Module):
    def __init__(self, clamp):
        super().__init__()
        self.linear, self.clamp = nn.Linear(6, 3), clamp

    def forward(self, x):
        with torch.no_grad():
            self.clamp(self.linear.weight)
        return self.linear(x)


class MaxNorm(nn.Module):
    """PyTorch's own embedding renormalises its rows when they are looked up."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(3, 6, max_norm=0.5), nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x + self.embedding((x[:, 0] > 0).long()))


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Clamps(lambda w: w.clamp_(-0.1, 0.1)),
        lambda: Clamps(lambda w: w.data.mul_(0.9)),  # leaves no trace in the version counter
        lambda: Clamps(lambda w: w.detach().numpy().clip(-0.1, 0.1, out=w.detach().numpy())),
        MaxNorm,
    ],
)
def test_a_model_that_changes_its_own_parameters_is_refused(make, mode, batch):
    model = make().double()
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), mode)
    with pytest.raises(RuntimeError, match="parameter"):
        queries.start(*batch, seed=0)


@pytest.mark.parametrize("mode", ["auto", "loop", "batched", "structured"])
@pytest.mark.parametrize("where", ["attribute", "outside"])
def test_activations_that_a_hook_keeps_are_living_tensors_afterwards(where, mode, batch):
    model, outside = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double(), {}
    model.activations = {}
    kept = model.activations if where == "attribute" else outside
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda module, args, output, name=name: kept.update({name: output}))
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), mode)
    queries.start(*batch, seed=0)
    asked(queries, SHIFTS)
    assert list(kept) == ["0", "1", "2"]
    assert all(type(value) is torch.Tensor and np.isfinite(value.numpy()).all() for value in kept.values())
    if where == "attribute":
        torch.testing.assert_close(kept["0"], model[0](batch[0]).detach())


# ---- E. the dtype of the loss


def errors(z, y):
    return (z.argmax(1) != y).sum()


LOSSES = {
    "Python float": (lambda z, y: float(cross_entropy(z, y)), torch.float64),
    "numpy float64": (lambda z, y: np.float64(cross_entropy(z, y).item()), torch.float64),
    "numpy float32": (lambda z, y: np.float32(cross_entropy(z, y).item()), torch.float64),
    "Python int": (lambda z, y: int(errors(z, y)), torch.float64),
    "numpy int": (lambda z, y: errors(z, y).numpy().sum(), torch.float64),
    "whole count": (errors, torch.float64),
    "small whole count": (lambda z, y: errors(z, y).to(torch.int8), torch.float64),
    "whether all are right": (lambda z, y: (z.argmax(1) == y).float().mean() > 0.4, torch.float64),
    "float64": (lambda z, y: cross_entropy(z.double(), y), torch.float64),
    "float32": (lambda z, y: cross_entropy(z.float(), y), torch.float32),
    "bfloat16": (lambda z, y: cross_entropy(z, y).bfloat16(), torch.float32),
    "float16": (lambda z, y: cross_entropy(z, y).half(), torch.float32),
    "one row": (lambda z, y: cross_entropy(z.double(), y).reshape(1, 1), torch.float64),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_a_loss_of_any_real_type_is_one_floating_type(name, dtype, mode, batch):
    criterion, expected_type = LOSSES[name]
    model, shifts = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype), [1.0, -1.0]
    x, y = batch[0].to(dtype), batch[1]
    expected = naive(model, model, x, y, criterion, shifts)
    queries = LossQueries(model, criterion, dict(model.named_parameters()), mode)
    _, loss = queries.start(x, y, seed=0)
    assert loss.dtype == expected_type and loss.shape == ()
    losses = asked(queries, shifts)
    for key, value in expected.items():
        assert losses[key].dtype == expected_type
        torch.testing.assert_close(losses[key].double(), value, rtol=1e-6, atol=1e-2 if "float16" in name else 1e-6)
    assert torch.cat([value.flatten() for value in expected.values()]).std() > 0


METHODS = {
    "sgd": (ZO_SGD_mask, dict(sigma=0.5, n_sample=4, lr=0.3)),
    "one-sided": (ZO_SGD_mask, dict(sigma=0.5, n_sample=4, lr=0.3, two_sided=False)),
    "esti": (ZO_SCD_mask, dict(grad_estimator="esti", h_smooth=0.5, grad_sparsity=0, lr=0.3)),
    "esti one-sided": (ZO_SCD_mask, dict(grad_estimator="esti", h_smooth=0.5, grad_sparsity=0, lr=0.3, STP=False)),
    "batch": (ZO_SCD_mask, dict(grad_estimator="batch", grad_sparsity=0, lr=0.3)),
    "sign": (ZO_SCD_mask, dict(grad_sparsity=0, lr=0.3)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_estimator_takes_a_loss_of_any_real_type(name, method, batch):
    """The same path as with the same numbers in float64 tensors."""
    (cls, options), (criterion, _) = METHODS[method], LOSSES[name]

    def in_double(z, y):
        return torch.tensor(float(criterion(z, y)), dtype=torch.float64)

    start, results = nn.Linear(6, 3).double(), []
    for loss in (criterion, in_double):
        model = copy.deepcopy(start)
        optimizer = cls(model, loss, None, **options, generator=torch.Generator().manual_seed(1), query_mode="loop")
        for _ in range(2):
            optimizer.step(*batch)
        results.append(model.weight.detach())
    assert not torch.equal(results[1], start.weight)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda z: z.sum() * 1j, lambda z: complex(z.sum()), lambda z: np.complex64(1j)])
def test_a_complex_loss_is_refused(make, batch):
    model = nn.Linear(6, 3).double()
    queries = LossQueries(model, lambda z, y: make(z), dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"(?i)complex"):
        queries.start(*batch, seed=0)


class TwoTypes(nn.Module):
    """A narrow trunk and a wide head, as where only the head is kept in full precision."""

    def __init__(self, trunk, head):
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 4).to(trunk), nn.Linear(4, 3).to(head)

    def forward(self, x):
        return self.head(torch.tanh(self.trunk(x.to(self.trunk.weight.dtype))).to(self.head.weight.dtype))


@pytest.mark.parametrize("trunk, head", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_two_types_is_queried_in_every_way(trunk, head, mode, batch):
    right_or_refused(mode, TwoTypes(trunk, head), batch, lambda z, y: cross_entropy(z.float(), y))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "trunk, head",
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_every_estimator_trains_a_model_of_two_types(trunk, head, method, batch):
    cls, options = METHODS[method]
    model = TwoTypes(trunk, head)
    before = [p.clone() for p in model.parameters()]
    optimizer = cls(model, lambda z, y: cross_entropy(z.float(), y), None, **options)
    _, loss = optimizer.step(*batch)
    assert loss.dtype == torch.float32
    assert [p.dtype for p in model.parameters()] == [trunk, trunk, head, head]
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# ---- F. what a recording cannot follow


class FrozenBackbone(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.backbone, self.head, self.mode = nn.Linear(6, 4), nn.Linear(4, 3), mode

    def forward(self, x):
        with self.mode():
            h = torch.tanh(self.backbone(x))
        return self.head(h.clone())


class Inside(nn.Module):
    """A function of (module, input), with two layers at hand."""

    def __init__(self, run):
        super().__init__()
        self.first, self.last, self.run = nn.Linear(6, 4), nn.Linear(4, 3), run

    def forward(self, x):
        return self.run(self, x)


def per_sample(module, x):
    return vmap(lambda row: module.last(torch.tanh(module.first(row))))(x)


def with_tangent(module, x):
    h, tangent = jvp(lambda x: torch.tanh(module.first(x)), (x,), (torch.ones_like(x),))
    return module.last(h + tangent)


def with_gradient(module, x):
    return module.last(vmap(torch.func.grad(lambda h: h.sin().sum()))(module.first(x)))


def through_a_checkpoint(module, x):
    return module.last(torch.utils.checkpoint.checkpoint(module.first, x, use_reentrant=False))


def through_numpy(module, x):
    return torch.from_numpy(np.tanh(module.last(torch.tanh(module.first(x))).detach().numpy()))


def routed(module, x):
    """Rows go to one of two experts, by the values of a layer."""
    h = module.first(x)
    z = torch.zeros(len(x), 3, dtype=x.dtype)
    chosen = h[:, 0] > 0
    z[chosen] = module.last(h[chosen])
    z[~chosen] = module.last(torch.sin(h[~chosen]))
    return z


def with_unique(module, x):
    _, counts = torch.unique(torch.round(module.first(x) * 10), return_counts=True)
    return module.last(torch.tanh(module.first(x))) * len(counts)


def through_frequencies(module, x):
    return module.last(torch.fft.irfft(torch.fft.rfft(module.first(x)) * torch.tensor(0.5 + 0.5j), n=4))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Labelled(torch.Tensor):
    """A subclass as users make it: nothing but a type."""


INSIDE = [
    per_sample,
    with_tangent,
    with_gradient,
    through_a_checkpoint,
    through_numpy,
    routed,
    with_unique,
    through_frequencies,
    lambda module, x: module.last(Cube.apply(module.first(x))),
    lambda module, x: module.last(torch.tanh(module.first(x.as_subclass(Labelled)))).as_subclass(torch.Tensor),
    lambda module, x: torch.func.functional_call(module.last, dict(module.last.named_parameters()), module.first(x)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", INSIDE)
def test_transforms_and_values_that_leave_torch_inside_a_model(run, mode, batch):
    right_or_refused(mode, Inside(run).double(), batch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_backbone_under_another_gradient_mode(context, mode, batch):
    right_or_refused(mode, FrozenBackbone(context).double(), batch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_another_gradient_mode_around_the_step(context, mode, batch):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with context():
        right_or_refused(mode, model, batch)
    cross_entropy(model(batch[0]), batch[1]).backward()  # and backpropagation still works


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_step_under_inference_mode_is_the_one_outside(method, batch):
    (cls, options), results = METHODS[method], []
    start = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for context in (torch.inference_mode, torch.no_grad):
        model = copy.deepcopy(start)
        optimizer = cls(model, cross_entropy, None, **options, generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            with context():
                optimizer.step(*batch)
        cross_entropy(model(batch[0]), batch[1]).backward()
        results.append(list(model.parameters()))
    assert all(map(torch.allclose, *results)) and not torch.equal(results[0][0], start[0].weight)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(x @ self.first.weight.T))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_inputs(layout, mode, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR is in beta
        right_or_refused(mode, Sparse().double(), (getattr(batch[0].relu(), layout)(), batch[1]))


class Ragged(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h.values() if h.layout == torch.jagged else torch.cat(h.unbind()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs(layout, mode, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        inputs = torch.nested.nested_tensor([batch[0][:3], batch[0][3:]], layout=layout)
        right_or_refused(mode, Ragged().double(), (inputs, batch[1]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model(whole, mode, batch):
    torch.compiler.reset()
    plain = nn.Sequential(nn.Linear(6, 3), nn.Tanh()).double()
    model = torch.compile(plain, backend="eager") if whole else nn.Sequential(torch.compile(plain, backend="eager"))
    right_or_refused(mode, model, batch, reference=plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compiler", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(8, 6).double())])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model(compiler, whole, mode, batch):
    plain = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = compiler(plain) if whole else nn.Sequential(nn.Linear(6, 6).double(), compiler(plain))
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), mode)
    expected = naive(model, model, *batch, cross_entropy, SHIFTS)
    try:
        queries.start(*batch, seed=0)
        losses = asked(queries, SHIFTS)
    except RuntimeError as refusal:
        assert mode in ("batched", "structured") and "cannot query this model" in str(refusal)
    else:
        assert all(torch.allclose(losses[name], value, rtol=1e-9) for name, value in expected.items())
    assert all(isinstance(p, nn.Parameter) for p in model.parameters()) and model(batch[0]).requires_grad


# ---- H. buffers of a training forward


class Averaged(nn.Module):
    """A moving average of its own, in buffers: one in place, one replaced."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        z = self.linear(x)
        if self.training:
            self.mean.lerp_(z.detach().mean(0), 0.1)
            self.steps = self.steps + 1
        return z - self.mean


class Quantised(nn.Module):
    """A codebook in a buffer, moved by the rows that it serves (VQ-VAE)."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 2), nn.Linear(2, 3)
        self.register_buffer("codes", torch.tensor([[-1.0, 0.0], [1.0, 0.5]]))

    def forward(self, x):
        h = self.linear(x)
        nearest = torch.cdist(h, self.codes).argmin(1)
        for k in range(2):
            if (nearest == k).any():
                self.codes[k].lerp_(h[nearest == k].detach().mean(0), 0.1)
        return self.head(h + self.codes[nearest])


def images(*layers):
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2, padding=1), *layers, nn.Flatten())


BUFFERED = {
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
    "BatchNorm1d, hidden": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
    "BatchNorm1d, cumulative": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=None)),
    "BatchNorm1d, in evaluation": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).eval(),
    "BatchNorm2d": lambda: images(nn.BatchNorm2d(2), nn.Tanh()),
    "InstanceNorm2d": lambda: images(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), nn.Tanh()),
    "two batch norms, one frozen": lambda: nn.Sequential(
        nn.Linear(6, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 3), nn.BatchNorm1d(3)
    ),
    "one batch norm, called twice": lambda: nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))] * 2),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 3)),
    "spectral norm, hidden": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)
    ),
    "an average": Averaged,
    "a codebook": Quantised,
}


@pytest.mark.parametrize("name", BUFFERED)
@pytest.mark.parametrize("mode", MODES)
def test_buffers_advance_once_a_step_and_queries_start_from_before(name, mode, batch):
    right_or_refused(mode, BUFFERED[name]().double(), batch)


METHODS_IN_TRAINING = [(method, mode) for method in METHODS for mode in ("auto", "loop")]


@pytest.mark.parametrize("method, mode", METHODS_IN_TRAINING)
@pytest.mark.parametrize("name", ["BatchNorm1d, hidden", "BatchNorm2d", "spectral norm, hidden", "an average"])
def test_buffers_after_training_are_those_of_one_forward_pass_a_step(name, method, mode, batch):
    """Beside the optimiser a twin sees each batch once, with the weights of that step."""
    cls, options = METHODS[method]
    model = BUFFERED[name]().double()
    optimizer = cls(model, lambda z, y: cross_entropy(z[:, :3], y), None, **options, query_mode=mode)
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(model)
    start = {key: value.clone() for key, value in model.named_buffers()}
    for _ in range(3):
        x = batch[0] + torch.randn(8, 6, generator=generator).double()
        with torch.no_grad():
            for mine, his in zip(model.parameters(), twin.parameters(), strict=True):
                his.copy_(mine)
        call(twin, x)
        optimizer.step(x, batch[1])
        for key, value in twin.named_buffers():
            torch.testing.assert_close(dict(model.named_buffers())[key], value)
    assert any(not torch.equal(value, start[key]) for key, value in model.named_buffers())


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_a_net_with_batch_norm_is_as_good_in_evaluation_as_in_training(mode):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator) * 2 + 20
    y = (x[:, 0] > x[:, 1]).long()
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = ZO_SCD_mask(
        model, cross_entropy, None, lr=0.05, grad_sparsity=0, grad_estimator="esti", adam=True, query_mode=mode
    )
    for k in range(90):
        if k == 30:
            optimizer.param_groups[0]["lr"] = 0.0  # the averages catch up with the weights
        optimizer.step(x, y)
    accuracy = [(model.train(training)(x).argmax(1) == y).float().mean() for training in (True, False)]
    assert accuracy[0] > 0.9 and abs(accuracy[0] - accuracy[1]) < 0.05


# ---- J. low precision


class Weighted(nn.Module):
    """A bare weight in some precision, used in float64: a linear loss whose gradient is the input, exactly."""

    def __init__(self, values, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=dtype))

    def forward(self, x):
        return (x * self.weight.double()).sum()


WEIGHTS = [
    (torch.float32, [1000.0, -3.0, 0.1], 1e-3),
    (torch.float32, [1e4, 1.0, 2e-3], 1e-3),
    (torch.float32, [3e6, -1e6, 5.0], 1.0),
    (torch.bfloat16, [0.3, -0.2, 0.15], 1e-3),
    (torch.bfloat16, [1.0, -1.5, 0.7], 1e-2),
    (torch.bfloat16, [1.0, 2.0, -4.0], 3e-2),  # a step down from a power of two is finer than one up
    (torch.float16, [1.0, -1.3, 0.1], 1e-3),
    (torch.float16, [100.0, -30.0, 7.0], 0.1),
]


@pytest.mark.parametrize("stp", [True, False])
@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("dtype, values, h", WEIGHTS)
def test_differences_are_divided_by_the_step_that_was_realised(dtype, values, h, mode, stp):
    model, x = Weighted(values, dtype), torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    with torch.no_grad():
        if not stp and (model.weight + h == model.weight).any():
            pytest.skip("lost on the upper side")
    optimizer = ZO_SCD_mask(
        model, lambda z, _: z, None, **ESTI, h_smooth=h, STP=stp, parameters=["weight"], query_mode=mode
    )
    optimizer.step(x, None)
    torch.testing.assert_close(model.weight.grad.double(), x, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)


@pytest.mark.parametrize("stp", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_step_realised_in_a_layer_is_the_one_divided_by(stp, mode):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1000.0)
    optimizer = ZO_SCD_mask(model, lambda z, _: z.sum(), None, **ESTI, STP=stp, query_mode=mode)
    optimizer.step(torch.ones(1, 1), None)
    assert model.weight.grad.item() == pytest.approx(1, rel=1e-6)


LOST = [
    (torch.float32, 1e5, 1e-3),
    (torch.float32, -3e8, 1.0),
    (torch.bfloat16, 1.0, 1e-3),
    (torch.bfloat16, 300.0, 0.1),
    (torch.float16, 8.0, 1e-3),
    (torch.float64, 1e14, 1e-3),
]


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("dtype, value, h", LOST)
@pytest.mark.parametrize("method", ["esti", "esti one-sided", "sgd", "one-sided"])
def test_a_probe_that_is_all_lost_in_rounding_is_an_error(method, dtype, value, h, mode):
    cls, options = METHODS[method]
    options = options | (dict(h_smooth=h) if cls is ZO_SCD_mask else dict(sigma=h / 8, n_sample=2))
    model = Weighted([value, -value], dtype)
    optimizer = cls(model, lambda z, _: z, None, **options, parameters=["weight"], query_mode=mode)
    with pytest.raises(FloatingPointError, match="lost in rounding"):
        optimizer.step(torch.ones(2).double(), None)
    assert model.weight.tolist() == [value, -value]


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("dtype, value, h", LOST)
@pytest.mark.parametrize("method", ["esti", "sgd"])
def test_a_probe_that_is_partly_lost_is_warned_of_once(method, dtype, value, h, mode):
    cls, options = METHODS[method]
    options = options | (dict(h_smooth=h) if cls is ZO_SCD_mask else dict(sigma=h / 8, n_sample=8)) | dict(lr=0.0)
    model = Weighted([value, 0.0], dtype)
    optimizer = cls(model, lambda z, _: z, None, **options, parameters=["weight"], query_mode=mode)
    with pytest.warns(UserWarning, match="lost in rounding") as caught:
        optimizer.step(torch.tensor([0.0, 1.0]).double(), None)
    assert sum("lost in rounding" in str(warning.message) for warning in caught) == 1
    if method == "esti":
        assert model.weight.grad.tolist() == [0.0, pytest.approx(1, rel=1e-2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(torch.tensor([0.0, 1.0]).double(), None)


@pytest.mark.parametrize("method", METHODS)
def test_no_warning_where_nothing_is_lost(method, batch):
    cls, options = METHODS[method]
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[0] = 0  # whose rounding is finest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(model, cross_entropy, None, **options).step(batch[0].float(), batch[1])


class InDouble(nn.Module):
    """Weights in half precision, arithmetic in double: what is off in a difference is the step alone."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4).to(dtype), nn.Linear(4, 3).to(dtype)

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.first.weight.double(), self.first.bias.double()))
        return F.linear(h, self.last.weight.double(), self.last.bias.double())


@pytest.mark.parametrize("dtype, h", [(torch.bfloat16, 3e-3), (torch.bfloat16, 5e-3), (torch.float16, 3e-4)])
@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_the_gradient_of_a_whole_net_in_half_precision(dtype, h, mode, batch):
    """The steps are hardly larger than the numbers lie apart; against autograd in float64 at the same weights."""
    model = InDouble(dtype)
    wide = copy.deepcopy(model).double()
    g = torch.autograd.grad(cross_entropy(wide(batch[0]), batch[1]), wide.parameters())
    ZO_SCD_mask(model, cross_entropy, None, **ESTI, h_smooth=h, query_mode=mode).step(*batch)
    for p, expected in zip(model.parameters(), g, strict=True):
        assert (p.grad.double() - expected).norm() < 0.02 * expected.norm()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase, self.linear = nn.Parameter(torch.ones(6, dtype=torch.complex64)), nn.Linear(6, 3)

    def forward(self, x):
        return self.linear((x * self.phase).abs())


@pytest.mark.parametrize("cls", [ZO_SGD_mask, ZO_SCD_mask])
@pytest.mark.parametrize(
    "make, options",
    [
        (Complex, dict(parameters=["phase"])),
        (Complex, dict(parameters=lambda name, p: True)),
        (lambda: nn.Linear(6, 3, dtype=torch.complex64), dict()),
        (lambda: nn.Conv2d(1, 1, 2, dtype=torch.complex64), dict(opt_layers_strs="nn.Conv2d")),
    ],
)
def test_complex_parameters_are_refused(cls, make, options):
    with pytest.raises(ValueError, match=r"(?i)complex"):
        cls(make(), cross_entropy, None, **options)


def test_complex_parameters_that_are_not_trained_do_no_harm(batch):
    model = Complex()
    queries = LossQueries(model, cross_entropy, dict(model.linear.named_parameters(prefix="linear")))
    queries.start(batch[0].float(), batch[1], seed=0)
    before = model.phase.clone()
    changes = queries.coordinates("linear.weight", torch.arange(18), [0.1, -0.1])
    g = torch.autograd.grad(cross_entropy(model(batch[0].float()), batch[1]), model.linear.weight)[0].flatten()
    assert ((changes[0] - changes[1]) / 0.2 - g).norm() < 0.02 * g.norm() and torch.equal(before, model.phase)


# ---- K. memory, and attempts in vain


@pytest.mark.parametrize("kind_of_directions", ["gaussian", "rademacher", "orthogonal"])
@pytest.mark.parametrize("options", [dict(), dict(two_sided=False), dict(layer_by_layer=True), dict(signSGD=True)])
@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_directions_that_do_not_fit_into_memory_are_drawn_again_to_the_bit(kind_of_directions, options, mode, batch):
    start, results = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double(), []
    for memory in (512, 1e-3, 1e-4):  # 7 directions of 43 numbers take 2.4 kB
        model = copy.deepcopy(start)
        optimizer = ZO_SGD_mask(
            model, cross_entropy, None, n_sample=7, sigma=0.01, directions=kind_of_directions, **options,
            generator=torch.Generator().manual_seed(2), query_mode="loop" if memory < 1 else mode, memory=memory,
        )  # fmt: skip
        for _ in range(2):
            optimizer.step(*batch)
        results.append((list(model.parameters()), optimizer.generator.get_state(), optimizer.queries))
    for parameters, state, queries in results[1:]:
        assert queries == results[0][2] and torch.equal(state, results[0][1])
        for mine, first in zip(parameters, results[0][0], strict=True):
            if mode == "loop":
                assert torch.equal(mine, first)
            torch.testing.assert_close(mine, first, rtol=1e-6, atol=1e-9)


class Counting:
    """A criterion that counts how often it runs."""

    def __init__(self, criterion=cross_entropy):
        self.criterion, self.calls = criterion, 0

    def __call__(self, z, y):
        self.calls += 1
        return self.criterion(z, y)


@pytest.mark.parametrize("run", [through_numpy, routed, with_unique])
def test_an_attempt_in_vain_is_not_repeated_in_each_step(run, batch):
    model, criterion = Inside(run).double(), Counting()
    optimizer = ZO_SCD_mask(model, criterion, None, **ESTI)
    optimizer.step(*batch)
    for _ in range(2):
        before = criterion.calls, optimizer.queries
        optimizer.step(*batch)
        assert criterion.calls - before[0] <= optimizer.queries - before[1] + 2


def test_an_lstm_is_not_attempted_in_each_step(batch):
    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x[:, :, None])[0][:, -1]

    model, criterion = Last(1, 3, batch_first=True).double(), Counting()
    optimizer = ZO_SCD_mask(model, criterion, None, **ESTI, parameters=lambda name, p: True)
    optimizer.step(*batch)
    before = criterion.calls, optimizer.queries
    optimizer.step(*batch)
    assert criterion.calls - before[0] <= optimizer.queries - before[1] + 2


# ---- L. inputs and outputs


Pair = namedtuple("Pair", ["x", "scale"])


@dataclass
class Example:
    x: torch.Tensor
    scale: torch.Tensor


class Output(OrderedDict):
    """As of Hugging Face: a dict whose entries are attributes too, and integers index it."""

    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class TakesTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x, scale):
        return self.linear(torch.tanh(x)) * scale


class TakesOne(TakesTwo):
    """One argument with fields."""

    def forward(self, pair):
        return super().forward(pair.x, pair.scale)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(2, 3, batch_first=True)

    def forward(self, packed):
        padded, lengths = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return padded[torch.arange(len(lengths)), lengths - 1]


SCALE = torch.tensor(1.5, dtype=torch.float64)
INPUTS = {
    "tuple": (TakesTwo, lambda x: (x, SCALE)),
    "list": (TakesTwo, lambda x: [x, SCALE]),
    "dict": (TakesTwo, lambda x: {"scale": SCALE, "x": x}),
    "ordered dict": (TakesTwo, lambda x: OrderedDict(scale=SCALE, x=x)),
    "other mapping": (TakesTwo, lambda x: UserDict(x=x, scale=SCALE)),
    "dict with a number": (TakesTwo, lambda x: {"x": x, "scale": 1.5}),
    "namedtuple": (TakesOne, lambda x: Pair(x, SCALE)),
    "dataclass": (TakesOne, lambda x: Example(x, SCALE)),
    "object": (TakesOne, lambda x: SimpleNamespace(x=x, scale=SCALE)),
    "packed sequence": (
        Packed, lambda x: pack_padded_sequence(x.view(8, 3, 2), [3, 3, 2, 2, 2, 1, 1, 1], batch_first=True)
    ),
    "packed sequence, unsorted": (
        Packed,
        lambda x: pack_padded_sequence(x.view(8, 3, 2), [1, 3, 2, 1, 3, 2, 1, 2], True, enforce_sorted=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_of_every_kind_reach_the_model_as_they_are_meant(name, mode, batch):
    make, wrap = INPUTS[name]
    right_or_refused(mode, make().double(), (wrap(batch[0]), batch[1]))


class Outputs(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(6, 3), wrap

    def forward(self, x):
        z = self.linear(torch.tanh(x))
        return self.wrap(z, cross_entropy(z, torch.arange(len(z)) % 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "wrap, criterion",
    [
        (lambda z, loss: Output(logits=z, loss=loss), lambda out, y: out.loss),
        (lambda z, loss: Output(loss=loss, logits=z), lambda out, y: out[0] + cross_entropy(out.logits, y)),
        (lambda z, loss: SimpleNamespace(logits=z, loss=loss), lambda out, y: cross_entropy(out.logits, y)),
        (lambda z, loss: Pair(z, loss), lambda out, y: cross_entropy(out.x, y) + out.scale),
        (lambda z, loss: {"logits": [z], "loss": loss}, lambda out, y: cross_entropy(out["logits"][0], y)),
        (lambda z, loss: Example(z, loss), lambda out, y: out.scale),
        (lambda z, loss: loss, lambda out, y: out),
    ],
)
def test_outputs_of_every_kind_reach_the_criterion_and_the_user(wrap, criterion, mode, batch):
    model = Outputs(wrap).double()
    right_or_refused(mode, model, batch, criterion)
    queries = LossQueries(model, criterion, dict(model.named_parameters()))
    outputs, loss = queries.start(*batch, seed=0)
    asked(queries, SHIFTS)
    assert type(outputs) is type(model(batch[0]))
    assert criterion(outputs, batch[1]).item() == pytest.approx(loss.item())


def test_targets_may_be_missing_or_of_any_shape(batch):
    model = nn.Linear(6, 3).double()
    for targets, criterion in (
        (None, lambda z, _: z.square().mean()),
        ({"y": batch[1]}, lambda z, t: cross_entropy(z, t["y"])),
        ([batch[1], 0.5], lambda z, t: t[1] * cross_entropy(z, t[0])),
        (Pair(batch[1], 2), lambda z, t: t.scale * cross_entropy(z, t.x)),
    ):
        check(model, (batch[0], targets), criterion)


@pytest.mark.parametrize("count", [np.int64(4), np.int32(4), np.uint8(4), torch.tensor(4)])
def test_whole_numbers_of_every_kind_count_directions(count, batch):
    optimizer = ZO_SGD_mask(nn.Linear(6, 3).double(), cross_entropy, None, n_sample=count)
    optimizer.step(*batch)
    assert optimizer.queries == 1 + 2 * 4


@pytest.mark.parametrize("count", [True, np.True_, 4.0, np.float64(4), "4", np.int64(0), -1, None])
def test_what_does_not_count_directions_is_refused(count):
    with pytest.raises(ValueError, match="n_sample"):
        ZO_SGD_mask(nn.Linear(6, 3), cross_entropy, None, n_sample=count)


# ---- a sweep: every way has the gradient of backpropagation


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(6, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.GELU())

    def forward(self, x):
        h = self.first(x)
        return h + self.block(h)


class LowRank(nn.Module):
    """A frozen matrix in a buffer, and two bare factors beside it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frozen", torch.randn(3, 6))
        self.A, self.B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return x @ self.frozen.T + x @ self.A.T @ self.B.T


class FixedPoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(6, 3)
        nn.init.uniform_(self.inner.weight, -0.3, 0.3)

    def forward(self, x):
        z, drive = torch.zeros(len(x), 3, dtype=x.dtype), self.outer(x)
        for _ in range(25):
            z = torch.tanh(self.inner(z) + drive)
        return z


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 3), nn.Linear(3, 2)
        adjacency = (torch.rand(8, 8) < 0.4).float() + torch.eye(8)
        self.register_buffer("adjacency", adjacency / adjacency.sum(1, keepdim=True))

    def forward(self, x):
        return self.last(self.adjacency @ torch.tanh(self.first(self.adjacency @ x)))


class Physics(nn.Module):
    """The residual of u'' = u along the first input, by forward- or reverse-mode transforms or by autograd."""

    def __init__(self, derivative):
        super().__init__()
        self.net, self.derivative = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)), derivative

    def forward(self, x):
        return self.derivative(self.net, x)


def by_func(net, x):
    def u(row):
        return net(row).squeeze()

    return vmap(torch.func.grad(u))(x)[:, 0] - vmap(u)(x)


def by_autograd(net, x):
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        u = net(x).squeeze(1)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    return slope[:, 0] - u


class Tokens(nn.Module):
    """Token numbers, made of the inputs, into some layer."""

    def __init__(self, embedding, *rest):
        super().__init__()
        self.embedding, self.rest = embedding, nn.Sequential(*rest)

    def forward(self, x):
        return self.rest(self.embedding((x * 2).long().abs() % 5))


class First(nn.Module):
    """The first output of a layer for sequences of two numbers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.view(8, 3, 2))[0]


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.MultiheadAttention(2, 1, batch_first=True)
        self.options = options

    def forward(self, x):
        x = x.view(8, 3, 2)
        return self.layer(x, x, x, **self.options)[0]


class Sequences(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.view(8, 3, 2))


class Unrolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(2, 3)

    def forward(self, x):
        h = torch.zeros(8, 3, dtype=x.dtype)
        for step in x.view(8, 3, 2).unbind(1):
            h = self.cell(step, h)
        return h


class Hyper(nn.Module):
    """One net makes the weights of another."""

    def __init__(self):
        super().__init__()
        self.maker = nn.Linear(2, 12)

    def forward(self, x):
        weight = self.maker(x[:, :2])
        return (weight.view(8, 2, 6) @ x[:, :, None]).squeeze(2).sin()


class Autoencoder(nn.Module):
    """The decoder is the encoder's transpose."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 3)

    def forward(self, x):
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T)


class Doubly(nn.Module):
    def forward(self, x):
        return x * 1.1


class Bilinear(nn.Bilinear):
    def forward(self, x):
        return super().forward(x[:, :3], x[:, 3:])


def parametrized():
    layer = nn.Linear(6, 3)
    parametrize.register_parametrization(layer, "weight", Doubly())
    return layer


@functools.cache
def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        return nn.utils.weight_norm


def encoder_layer():
    return nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True, activation="gelu")


SWEEP = {
    "residual": Residual,
    "LayerNorm": lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh()),
    "RMSNorm": lambda: nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4), nn.Tanh()),
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh()),
    "GroupNorm": lambda: nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Tanh()),
    "Embedding": lambda: Tokens(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(12, 2)),
    "Embedding, padded": lambda: Tokens(nn.Embedding(5, 2, padding_idx=4), nn.Linear(2, 2)),
    "EmbeddingBag": lambda: Tokens(nn.EmbeddingBag(5, 3, mode="mean"), nn.Linear(3, 2)),
    "EmbeddingBag, largest": lambda: Tokens(nn.EmbeddingBag(5, 3, mode="sum"), nn.Tanh()),
    "Bilinear": lambda: Bilinear(3, 3, 2),
    "PReLU": lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4), nn.Linear(4, 2), nn.PReLU()),
    "Conv1d": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten()),
    "Conv2d, depthwise": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 4, (1, 2), groups=2, dilation=(1, 2)), nn.Tanh()
    ),
    "Conv3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 1, 2, 3)), nn.Conv3d(1, 2, (1, 2, 2)), nn.Tanh()),
    "ConvTranspose2d": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.ConvTranspose2d(1, 2, 2, 2), nn.Tanh()),
    "LSTM": lambda: First(nn.LSTM(2, 2, batch_first=True)),
    "LSTM, two ways": lambda: First(nn.LSTM(2, 1, 2, bidirectional=True, batch_first=True)),
    "GRU": lambda: First(nn.GRU(2, 2, batch_first=True)),
    "RNN": lambda: First(nn.RNN(2, 2, batch_first=True)),
    "GRUCell": Unrolled,
    "attention": Attention,
    "attention, fused": lambda: Attention(need_weights=False),
    "attention, in evaluation": lambda: Attention(need_weights=False).eval(),
    "encoder layer": lambda: Sequences(encoder_layer()),
    "encoder layer, in evaluation": lambda: Sequences(encoder_layer()).eval(),
    "LoRA": LowRank,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3)), nn.Tanh()),
    "weight norm, old": lambda: nn.Sequential(old_weight_norm()(nn.Linear(6, 3)), nn.Tanh()),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "parametrized": parametrized,
    "fixed point": FixedPoint,
    "graph": Graph,
    "physics, transforms": lambda: Physics(by_func),
    "physics, autograd": lambda: Physics(by_autograd),
    "hypernetwork": Hyper,
    "tied autoencoder": Autoencoder,
    "shared layer": lambda: nn.Sequential(*[nn.Linear(6, 6), nn.Tanh()] * 2),
    "odd shapes": lambda: Shaped(),
    "parameters in containers": lambda: Contained(),
}


class Shaped(nn.Module):
    """Parameters of odd shapes and layouts: a number (as CLIP's scale), one entry, a transposed and a strided one."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(1, 1, 1))
        self.transposed = nn.Parameter(torch.randn(3, 6).T)
        self.strided = nn.Parameter(torch.randn(3, 4)[:, ::2])

    def forward(self, x):
        return torch.tanh((x @ self.transposed) * self.scale.exp() + self.shift[0]) @ self.strided


class Contained(nn.Module):
    def __init__(self):
        super().__init__()
        self.several = nn.ParameterList([torch.randn(6, 3), torch.randn(3)])
        self.named = nn.ParameterDict({"scale": torch.randn(3)})

    def forward(self, x):
        return torch.tanh(x @ self.several[0] + self.several[1]) * self.named["scale"]


def wavy(z, _):
    """One number in which every output counts differently."""
    return (z.flatten() * torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype)).sin().sum()


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_the_estimate_is_the_gradient_of_backpropagation(name, mode, batch):
    model = SWEEP[name]().double()
    places = slots(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    g = torch.autograd.grad(wavy(model(batch[0]), None), parameters, materialize_grads=True)
    g = torch.cat([piece.flatten() for piece in g])
    optimizer = ZO_SCD_mask(model, wavy, None, **ESTI, h_smooth=1e-5, parameters=lambda name, p: True, query_mode=mode)
    for _ in range(2):
        optimizer.step(batch[0], None)
        assert tuple(optimizer.trained) == names and optimizer.queries % (1 + 2 * len(g)) == 0
        estimate = torch.cat([p.grad.flatten() for p in parameters])
        if name == "Embedding, padded":  # the padding row has no gradient by decree, and yet it acts
            moved = torch.ones(5, 2, dtype=torch.bool)
            moved[4] = False
            keep = torch.cat([moved.flatten(), torch.ones(len(g) - 10, dtype=torch.bool)])
            estimate, g = estimate * keep, g * keep
        assert (estimate - g).norm() < 1e-6 * g.norm()
    assert all(p is before for (_, p), (_, before) in zip(slots(model), places, strict=True))


@pytest.mark.parametrize("name", SWEEP)
def test_directions_have_the_differences_that_backpropagation_foretells(name, batch):
    """All d directions at right angles give the whole gradient: ĝ = 1/n Σ (g·u) u with n = d is g."""
    model = SWEEP[name]().double()
    parameters = list(model.parameters())
    d = sum(p.numel() for p in parameters)
    g = torch.autograd.grad(wavy(model(batch[0]), None), parameters, materialize_grads=True)
    g = torch.cat([piece.flatten() for piece in g])
    optimizer = ZO_SGD_mask(
        model, wavy, None, lr=0.0, sigma=1e-6, n_sample=d, directions="orthogonal", parameters=lambda name, p: True
    )
    optimizer.step(batch[0], None)
    estimate = torch.cat([p.grad.flatten() for p in parameters])
    if name == "Embedding, padded":
        estimate[8:10] = 0
    assert (estimate - g).norm() < 1e-5 * g.norm()


class Hollow(nn.Module):
    """One of the parameters has no entries."""

    def __init__(self):
        super().__init__()
        self.empty, self.linear = nn.Parameter(torch.empty(0, 3)), nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x) + self.empty.sum(0)


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_without_entries_does_no_harm(method, batch):
    cls, options = METHODS[method]
    model = Hollow().double()
    before = model.linear.weight.clone()
    optimizer = cls(model, cross_entropy, None, **options, parameters=lambda name, p: True)
    optimizer.step(*batch)
    assert not torch.equal(model.linear.weight, before) and model.empty.shape == (0, 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_may_change_its_type_after_the_optimizer_is_made(method, batch):
    """As with torch's optimisers: the parameters stay the same objects."""
    (cls, options), results = METHODS[method], []
    for early in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        model = model.double() if early else model
        optimizer = cls(model, cross_entropy, None, **options, generator=torch.Generator().manual_seed(1))
        model.double()
        for _ in range(2):
            optimizer.step(*batch)
        results.append(list(model.parameters()))
    assert all(map(torch.equal, *results)) and results[0][0].dtype == torch.float64


@pytest.mark.parametrize("directions", ["gaussian", "rademacher", "orthogonal", "low_rank"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_type_of_torch_does_not_touch_the_directions(directions, default, batch):
    """Without a component along itself no direction would tell the slope: ĝ·u averages to g·u over many."""
    model, x = nn.Linear(6, 3), batch[0].float()
    g = torch.autograd.grad(cross_entropy(model(x), batch[1]), model.weight)[0]
    optimizer = ZO_SGD_mask(
        model, cross_entropy, None, lr=0.0, sigma=1e-2, n_sample=18, directions=directions, parameters=["weight"],
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    estimate, repeats = torch.zeros(3, 6), 1 if directions == "orthogonal" else 100
    torch.set_default_dtype(default)
    try:
        for _ in range(repeats):
            optimizer.step(x, batch[1])
            estimate += model.weight.grad / repeats
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.weight.grad.dtype == torch.float32
    assert (estimate - g).norm() < (0.02 if directions == "orthogonal" else 0.25) * g.norm()
