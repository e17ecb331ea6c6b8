"""Faults that begin after a way of asking has been trusted, or after the optimiser was made."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm

from zo_tutorial import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.queries import LossQueries

SHIFTS = [1e-2, -1e-2]
ESTI = dict(grad_estimator="esti", grad_sparsity=0, lr=0.01)


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5), *more).double()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return torch.randn(24, 6).double(), torch.randint(5, (24,))


def agree(model, criterion, name, batches, between=lambda: None, mode="auto"):
    """Changes of the loss are those of a loop at every batch; between two batches something happens to the model."""
    parameters = dict(model.named_parameters())
    queries, loop = (LossQueries(model, criterion, parameters, m) for m in (mode, "loop"))
    index = torch.arange(parameters[name].numel())
    for batch in batches:
        state = copy.deepcopy(model.state_dict())
        queries.start(*batch, 0)
        plus, minus = queries.coordinates(name, index, SHIFTS)
        model.load_state_dict(state)
        loop.start(*batch, 0)
        expected, other = loop.coordinates(name, index, SHIFTS)
        torch.testing.assert_close(plus - minus, expected - other, rtol=1e-6, atol=1e-12)
        with torch.no_grad():
            between()
    return queries.ways()["coordinates", name][0]


def test_a_penalty_over_captured_weights_that_begins_later(data):
    model, strength = net(), [0.0]
    weights = list(model.parameters())

    def criterion(outputs, targets):
        return cross_entropy(outputs, targets) + strength[0] * sum(w.square().sum() for w in weights)

    agree(model, criterion, "0.weight", [data] * 2, lambda: strength.append(strength.pop() + 0.1))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.LayerNorm(6)])
def test_targets_that_are_ignored_later(norm, data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.ReLU(), nn.Linear(6, 5)).double()
    some = data[1].clone()
    some[::3] = -100
    way = agree(model, cross_entropy, "1.weight", [data, (data[0], some)], mode="structured")
    assert way == "structured"


def test_an_adapter_that_was_patched_in_and_starts_at_zero(data):
    model, down, up = net(), torch.randn(2, 6).double(), torch.zeros(5, 2).double()
    last = model[2]
    last.forward = lambda h: F.linear(h, last.weight, last.bias) + h @ down.T @ up.T
    agree(model, cross_entropy, "0.weight", [data] * 2, up.normal_)


def test_a_power_iteration_that_has_to_catch_up(data):
    model = net()
    model[2] = spectral_norm(model[2])
    weight = model[2].parametrizations.weight.original
    agree(model, cross_entropy, "0.weight", [data] * 3, lambda: weight.add_(torch.randn_like(weight)))


class Renames(nn.Module):
    """A dict whose keys change, while its values stay the same objects; and one that is held by a plain object."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen, self.log = nn.Linear(6, 5), {0: True}, type("Log", (), {})()
        self.log.count = 0

    def forward(self, x):
        (key,) = self.seen
        del self.seen[key]
        self.seen[key + 1] = True
        self.log.count += 1
        return self.linear(x)


@pytest.mark.parametrize("mode", ["loop", "auto"])
def test_memories_see_one_pass_a_step(mode, data):
    model = Renames().double()
    optimizer = ZO_SCD_mask(model, cross_entropy, None, **ESTI, query_mode=mode)
    for _ in range(2):
        optimizer.step(*data)
    assert model.seen == {2: True} and model.log.count == 2


@pytest.mark.parametrize("mode", ["loop", "auto"])
@pytest.mark.parametrize("scripted", [False, True])
def test_a_layer_that_comes_later_has_its_buffers_kept(mode, scripted, data):
    model, norm = net(), nn.BatchNorm1d(5).double()
    optimizer = ZO_SCD_mask(model, cross_entropy, None, **ESTI, query_mode=mode)
    model.append(torch.jit.script(norm) if scripted else norm)
    for _ in range(2):
        optimizer.step(*data)
    assert model[3].num_batches_tracked == 2


class DrawsAboveAThreshold(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.threshold = nn.Linear(6, 5), 0.0

    def forward(self, x):
        z = self.linear(x)
        return F.dropout(z, 0.3) if z[0, 0].item() > self.threshold else z


def test_random_numbers_at_perturbed_points_only(data):
    model = DrawsAboveAThreshold().double()
    model.threshold = model(data[0])[0, 0].item() + 1e-6
    queries = LossQueries(model, cross_entropy, dict(model.named_parameters()), "loop")
    queries.start(*data, 0)
    before = torch.get_rng_state()
    first, again = (queries.coordinates("linear.bias", torch.arange(5), [0.1, -0.1]) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(before, torch.get_rng_state())


def test_large_images_and_vocabularies_need_no_unit_matrix():
    """The special forms of a head are for small layers: here they would take gigabytes."""
    torch.manual_seed(0)
    images = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    words = nn.Linear(8, 5000)
    for model, name, x in ((images, "0.weight", torch.randn(2, 1, 128, 128)), (words, "weight", torch.randn(16, 8))):
        queries = LossQueries(model, cross_entropy, {name: model.get_parameter(name)}, "structured")
        queries.start(x, torch.zeros(len(x), dtype=torch.long), 0)
        queries.coordinates(name, torch.arange(4), SHIFTS)
        if queries.ways()["coordinates", name][0] == "structured":
            layer = next(iter(queries.evaluation.recorded().layers_seen.values()))
            assert layer.head is None or not layer.head.dense


def test_a_convolution_and_two_dense_layers_are_structured():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 5)
    model = nn.Sequential(*layers).double()
    batch = torch.randn(8, 1, 8, 8).double(), torch.randint(5, (8,))
    assert agree(model, cross_entropy, "0.weight", [batch], mode="structured") == "structured"


# ---- the optimiser


def test_what_is_frozen_later_stays(data):
    for cls, options in ((ZO_SGD_mask, {}), (ZO_SCD_mask, ESTI), (ZO_SCD_mask, {})):
        model = net()
        optimizer = cls(model, cross_entropy, None, **options)
        optimizer.step(*data)
        model[0].requires_grad_(False)
        before, other = model[0].weight.clone(), model[2].weight.clone()
        optimizer.step(*data)
        assert torch.equal(before, model[0].weight) and not torch.equal(other, model[2].weight)


def test_a_mask_holds_for_a_layer_that_is_unfrozen_later(data):
    model = net()
    mask = torch.arange(36).view(6, 6) % 3 == 0
    with torch.no_grad():
        model[0].weight[~mask] = 0
    with pytest.warns(UserWarning, match="no effect"):
        optimizer = ZO_SCD_mask(model, cross_entropy, {"0.weight": mask}, parameters=["2.weight"], **ESTI)
    optimizer.add_param_group({"params": [model[0].weight]})
    optimizer.step(*data)
    assert not model[0].weight[~mask].any() and list(optimizer.trained) == ["0.weight", "2.weight"]


def test_a_state_of_other_groups_is_refused(data):
    model = net()
    groups = [{"params": ["0.weight"]}, {"params": ["2.weight"]}]
    state = ZO_SCD_mask(model, cross_entropy, None, parameters=groups, **ESTI).state_dict()
    other = ZO_SCD_mask(model, cross_entropy, None, parameters=groups[::-1], **ESTI)
    with pytest.raises(ValueError, match=r"group 0 is '0.weight' there and '2.weight' here"):
        other.load_state_dict(state)


def test_a_state_that_cannot_be_loaded_changes_nothing(data):
    optimizer = ZO_SCD_mask(net(), cross_entropy, None, **ESTI)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"], state["generator"] = 9, torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_parameter_that_was_replaced_is_noticed(data):
    model = net()
    optimizer = ZO_SGD_mask(model, cross_entropy, None)
    model.load_state_dict(model.state_dict(), assign=True)
    model[0].weight = nn.Parameter(model[0].weight.clone())
    with pytest.raises(RuntimeError, match=r"'0.weight' is another tensor"):
        optimizer.step(*data)


@pytest.mark.parametrize("method", ["sgd", "sign"])
def test_a_run_whose_recorded_pass_differs_resumes_bit_for_bit(method):
    """In evaluation mode torch's encoder takes a fast path, but not while it is recorded."""

    def made():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval()
        options = dict(generator=torch.Generator().manual_seed(0), lr=1e-3)
        return model, (ZO_SGD_mask if method == "sgd" else ZO_SCD_mask)(model, criterion, None, **options)

    def criterion(outputs, targets):
        return cross_entropy(outputs.mean(1), targets)

    torch.manual_seed(1)
    batch = torch.randn(4, 5, 6), torch.randint(8, (4,))
    model, optimizer = made()
    for cut in range(3):
        other, resumed = made()
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ahead, follower = copy.deepcopy((model, optimizer)), (other, resumed)
        for _ in range(2):
            assert torch.equal(ahead[1].step(*batch)[1], follower[1].step(*batch)[1]), cut
        assert all(map(torch.equal, ahead[0].parameters(), follower[0].parameters()))
        optimizer.step(*batch)
