"""Summing over the samples first: the changes of the loop for every weight of a layer, or the weights one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_tutorial.queries import Coordinates, LossQueries, norm_rows, structured
from zo_tutorial.queries.rows import TailRows

CLASSES, IGNORED = 4, -100
ACTIVATIONS = {
    "relu": nn.ReLU(), "leaky relu": nn.LeakyReLU(0.2), "hardtanh": nn.Hardtanh(-0.3, 0.4), "relu6": nn.ReLU6(),
    "elu": nn.ELU(0.5), "gelu": nn.GELU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(),
    "in place": nn.ReLU(inplace=True),
}  # fmt: skip


def joint(outputs, targets):
    """Of the first word of each sentence, and of all words that are not to be ignored."""
    return F.cross_entropy(outputs[:, 0], targets[:, 0]) + F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, torch.arange(1, CLASSES + 1).to(outputs.dtype)) + 3


class Words(nn.Module):
    """A label for each word; the first layer's rows are the words."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x).flatten(0, 1)


def heads(activation):
    return nn.Sequential(nn.Linear(12, 9), activation, nn.Linear(9, CLASSES))


def batch_of(samples=40, zeros=True):
    """Inputs of which some are 0, and the first sample is 0 in all: without bias, a unit stands on the kink."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 12, generator=generator, dtype=torch.float64)
    if zeros:
        x[:, :3] *= torch.rand(samples, 3, generator=generator, dtype=torch.float64) > 0.5
        x[0] = 0
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def queries_of(model, criterion, batch, mode):
    queries = LossQueries(model, criterion, dict(model.named_parameters()), mode)
    queries.start(*batch, 0)
    return queries, queries.evaluation.base


@pytest.fixture
def answers(monkeypatch):
    """How often `summed` gave an answer, and how often it refused."""
    count = {"summed": 0, "refused": 0}
    plain = structured.summed

    def watched(*args):
        try:
            result = plain(*args)
        except structured.Unsuitable:
            count["refused"] += 1
            raise
        count["summed"] += 1
        return result

    monkeypatch.setattr(structured, "summed", watched)
    return count


def check(model, criterion, batch, h, name="0.weight", index=None, dtype=torch.float64):
    """The changes, of a model in some precision, are those of the loop in double precision."""
    model = model.double()
    index = torch.arange(model.get_parameter(name).numel()) if index is None else index
    mine = copy.deepcopy(model).to(dtype)
    x, targets = batch
    queries, base = queries_of(mine, criterion, (x.to(dtype), targets), "structured")
    changes = queries.coordinates(name, index, [h, -h]) - base
    assert queries.ways()["coordinates", name][0] == "structured"  # which was compared with the loop
    if dtype == torch.float32:  # the step that rounding leaves, for each weight
        model.load_state_dict(mine.state_dict())
        value = mine.get_parameter(name).detach().flatten()[index]
        steps = [((value + s) - value).double() for s in (h, -h)]
    else:
        steps = [torch.full((len(index),), s, dtype=dtype) for s in (h, -h)]
    loop, base = queries_of(model, criterion, (x.to(dtype).double(), targets), "loop")
    expected = torch.stack(
        [torch.cat([loop.coordinates(name, k[None], [float(s)])[0] for k, s in zip(index, side, strict=True)])
         for side in steps]
    ) - base  # fmt: skip
    rounding = 40 * torch.finfo(dtype).eps * base.abs()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}[dtype] * expected.abs().max() + rounding
    assert (changes - expected).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("h", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_changes_of_all_weights_are_those_of_the_loop(activation, h, dtype, answers):
    torch.manual_seed(0)
    model = heads(ACTIVATIONS[activation])
    check(model, F.cross_entropy, batch_of(), h, dtype=dtype)
    check(model, weighted, batch_of(), h, "2.weight", dtype=dtype)
    if h <= 1e-3 or (h == 1e-2 and dtype == torch.float32):
        assert answers == {"summed": 2, "refused": 0}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_where_few_cumulants_do_not_suffice(activation, answers):
    """A head with large weights: the logits move by some tenths."""
    torch.manual_seed(0)
    model = heads(ACTIVATIONS[activation])
    model[2].weight.data *= 20
    check(model, F.cross_entropy, batch_of(), 1e-2, dtype=torch.float32)
    check(model, weighted, batch_of(), 1e-1, "2.weight", dtype=torch.float32)
    assert answers == {"summed": 2, "refused": 0}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("h", [1e-4, 1e-2])
def test_units_on_the_kink_and_dead_units(h, bias, answers):
    """Without bias, the first sample puts all units on it; some units have weights of 0, and are asked for or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9, bias), nn.ReLU(), nn.Linear(9, CLASSES))
    model[0].weight.data[:2] = 0
    for index in (None, torch.arange(24, 108), torch.randperm(108)[:80]):
        check(model, F.cross_entropy, batch_of(), h, index=index)
        check(model, F.cross_entropy, batch_of(), h, index=index, dtype=torch.float32)
    assert answers["summed"]


TAILS = {
    "norm": lambda: [nn.Linear(12, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, CLASSES)],
    "three layers": lambda: [nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, CLASSES)],
    "two linear layers": lambda: [nn.Linear(12, 9), nn.Linear(9, CLASSES)],
    "one layer": lambda: [nn.Linear(12, CLASSES)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("h", [1e-3, 0.1])
@pytest.mark.parametrize("tail", TAILS)
def test_words_are_rows_and_some_are_ignored(tail, h, dtype, answers):
    torch.manual_seed(0)
    x, targets = batch_of(60)
    targets[torch.arange(0, 60, 7)] = IGNORED
    model = Words(*TAILS[tail]())
    check(model, F.cross_entropy, (x.view(12, 5, 12), targets), h, "layers.0.weight", dtype=dtype)
    if h == 1e-3:
        assert answers == {"summed": 1, "refused": 0}


class Functional(nn.Module):
    """A norm written as a function, with its arguments here and there."""

    def __init__(self, centred, weight=None, bias=None, **options):
        super().__init__()
        self.centred, self.options = centred, options
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x):
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], self.weight, bias=self.bias, **self.options)
        return F.rms_norm(x, x.shape[-1:], weight=self.weight, **self.options)


def random_norm(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0)
    return norm


NORMS = {
    "layer": lambda: random_norm(nn.LayerNorm(9)),
    "layer, no bias": lambda: random_norm(nn.LayerNorm(9, bias=False)),
    "layer, plain": lambda: nn.LayerNorm(9, eps=0.3, elementwise_affine=False),
    "layer, a function": lambda: Functional(True, bias=torch.arange(9.0), eps=0.1),
    "root mean square": lambda: random_norm(nn.RMSNorm(9, eps=1e-3)),
    "root mean square, plain": lambda: nn.RMSNorm(9, eps=0.2, elementwise_affine=False),
    "root mean square, a function": lambda: Functional(False, weight=torch.arange(9.0), eps=1e-4),
}


@pytest.fixture
def series(monkeypatch):
    """Whether each answer through a norm came from the series."""
    seen, plain = [], norm_rows.NormRows.changes

    def watched(self, at, change):
        answer = plain(self, at, change)
        seen.append(self.rounding == 0)
        return answer

    monkeypatch.setattr(norm_rows.NormRows, "changes", watched)
    return seen


@pytest.mark.parametrize("h", [1e-4, 1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), None])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_in_front_of_the_head(norm, activation, h, answers, series):
    """Of words, of which some are ignored, and of samples with class weights."""
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        x, targets = batch_of(60)
        targets[torch.arange(0, 60, 7)] = IGNORED
        layers = [nn.Linear(12, 9), activation or nn.Identity(), NORMS[norm](), nn.Linear(9, CLASSES)]
        check(Words(*layers), F.cross_entropy, (x.view(12, 5, 12), targets), h, "layers.0.weight", dtype=dtype)
        check(nn.Sequential(*layers), weighted, batch_of(), h, "0.weight", dtype=dtype)
        if h == 1e-4 and dtype == torch.float32:
            assert series and all(series)
        if h == 0.3:
            assert not any(series)  # too far: rows are run
        series.clear()
    if h <= 1e-3:
        assert answers["summed"] and not answers["refused"]


@pytest.mark.parametrize("norm", [*NORMS.values(), lambda: nn.RMSNorm(9), lambda: Functional(False)])
def test_the_series_of_a_norm_at_each_entry(norm):
    """Entry by entry against rows that are run, in double precision, with moves of both signs and of 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.GELU(), norm(), nn.Linear(9, CLASSES)).double()
    queries, _ = queries_of(model, F.cross_entropy, batch_of(), "structured")
    with torch.no_grad():
        recording = queries.evaluation.recorded()
        call = recording.call_of(model[0])
        change = 1e-5 * torch.randn(3, 9, 40, dtype=torch.float64)
        change[:, 2] = 0
        rows = TailRows(recording, call, call.results[0].T.contiguous())
        mine = norm_rows.NormRows(rows)
        found, expected = mine.changes(..., change), rows.changes(..., change)
        assert mine.rounding == 0 and (found[:, 2] == 0).all()
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max() + rows.rounding
        i, b = torch.tensor([0, 8, 3]), torch.tensor([39, 0, 5])
        assert torch.allclose(mine.changes((i, b), change[0, i, b]), found[0, i, b], rtol=1e-12)


def test_a_round_that_sums_is_one_unit():
    """Parts of it would be too small to sum, and as long as the whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 40))
    queries, _ = queries_of(model, F.cross_entropy, (torch.randn(2000, 64), torch.randint(40, (2000,))), "auto")
    rounds = Coordinates("0.weight", torch.arange(1024), [1e-3]), Coordinates("0.bias", torch.arange(64), [1e-3])
    for asked in rounds:
        queries.coordinates(asked.name, asked.index, asked.shifts)
    assert len(queries.choice.units(rounds[0])) == 1
    assert len(queries.choice.units(rounds[1])) > 1  # one by one, and shared


class Mixing(nn.Module):
    """What follows the layer mixes rows, in one way or another, or reads an inner value once more."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.last, self.norm = kind, nn.Linear(12, 8), nn.Linear(8, CLASSES), nn.BatchNorm1d(8)

    def forward(self, x):
        h = self.first(x)
        if self.kind == "batch norm":
            h = self.norm(h)
        elif self.kind == "softmax over the samples":
            h = h.softmax(0)
        elif self.kind == "mean":
            h = h - h.mean(0)
        elif self.kind == "norm of all":
            h = F.layer_norm(h, h.shape)
        elif self.kind == "read again":
            return self.last(F.silu(h)) + h[:, :CLASSES]
        elif self.kind == "product":
            h = h * x[:, :8].sum()
        return self.last(F.gelu(h))


@pytest.mark.parametrize(
    "kind", ["batch norm", "softmax over the samples", "mean", "norm of all", "read again", "product"]
)
def test_rows_that_depend_on_each_other_are_not_summed(kind, answers):
    torch.manual_seed(0)
    check(Mixing(kind), F.cross_entropy, batch_of(), 1e-3, "first.weight")
    assert answers["summed"] == 0


def test_other_losses_are_not_summed(answers):
    torch.manual_seed(0)
    for criterion in (
        lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
        lambda o, y: F.cross_entropy(o, y).square(),
        lambda o, y: F.mse_loss(o, F.one_hot(y, CLASSES).to(o)),
    ):
        check(heads(nn.ReLU()), criterion, batch_of(), 1e-3)
    assert answers["summed"] == 0


def test_a_joint_loss_sums_only_what_one_row_is_in_once(answers):
    torch.manual_seed(0)

    class Both(Words):
        def forward(self, x):
            return self.layers(x)

    x, targets = batch_of(60)
    check(Both(*TAILS["norm"]()), joint, (x.view(12, 5, 12), targets.view(12, 5)), 1e-3, "layers.0.weight")
    assert answers["summed"] == 0


def test_few_weights_are_asked_one_by_one(answers):
    torch.manual_seed(0)
    check(heads(nn.ReLU()), F.cross_entropy, batch_of(), 1e-3, index=torch.tensor([5, 77]))
    assert answers == {"summed": 0, "refused": 0}
