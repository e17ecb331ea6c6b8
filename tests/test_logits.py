"""All entries of a parameter at once, by the logits: the changes of the loss that the loop shows, kinks or not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_tutorial import MNIST_CNN, MNIST_TTM, TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn
from zo_tutorial.queries import LossQueries, kinks, logits, structured
from zo_tutorial.queries.way import Unsuitable

TTM = dict(shape=[[2, 3], [3, 2]], max_rank=2)


class Net(nn.Module):
    """Layers with one activation between them, a function; the last one gives the logits."""

    def __init__(self, activation, *layers):
        super().__init__()
        self.activation, self.layers = activation, nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x.flatten(1))


class Images(Net):
    def forward(self, x):
        return super().forward(x.unflatten(1, (1, 2, 3)))


NETS = {
    "TTM": lambda act: Net(act, TensorizedLinear_module(6, 6, **TTM), nn.Linear(6, 3)),
    "TTM, rank 1": lambda act: Net(act, TensorizedLinear_module(6, 6, shape=[[6], [6]]), nn.Linear(6, 3)),
    "two TTM": lambda act: Net(
        act,
        TensorizedLinear_module_tonn(6, 6, **TTM),
        TensorizedLinear_module(6, 3, shape=[[2, 3], [3, 1]], max_rank=2),
    ),
    "TT": lambda act: Net(act, TensorizedLinear([2, 3], [3, 2], 2), nn.Linear(6, 3)),
    "three TTM": lambda act: Net(
        act, *(TensorizedLinear_module(6, 6, **TTM) for _ in range(2)), nn.Linear(6, 3, bias=False)
    ),
    "deep": lambda act: Net(
        act, TensorizedLinear_module(6, 6, **TTM), nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)
    ),
    "convolution": lambda act: Images(act, nn.Conv2d(1, 3, 2, padding=1), nn.Linear(36, 3)),
    "convolutions": lambda act: Images(
        act, nn.Conv2d(1, 3, 2, padding=1), nn.Conv2d(3, 4, 2, stride=2, padding=1), nn.Conv2d(4, 2, 2), nn.Linear(4, 3)
    ),
    "groups behind": lambda act: Images(
        act, nn.Conv2d(1, 4, 2, padding=1), nn.Conv2d(4, 6, 2, groups=2, dilation=(1, 2)), nn.Linear(24, 3)
    ),
}
ACTIVATIONS = {
    "relu": F.relu,
    "in place": lambda z: F.relu(z, inplace=True),
    "leaky": lambda z: F.leaky_relu(z, 0.3),
    "steep": lambda z: F.leaky_relu(z, negative_slope=-1.5),
    "relu6": F.relu6,
    "hardtanh": lambda z: F.hardtanh(z, -0.3, 0.4),
    "narrow": lambda z: F.hardtanh(z, max_val=1e-3, min_val=-1e-3),
}
SMOOTH = {"gelu": F.gelu, "tanh": torch.tanh, "elu": F.elu, "softplus": F.softplus}


def data(dtype=torch.float64, samples=24):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    x[:, 4] = 0  # an input that is off
    x[0] = 0  # and a sample: its numbers are 0, on the kink, where there is no bias
    return x.to(dtype), torch.randint(3, (samples,), generator=generator)


def made(net, activation, dtype=torch.float64):
    torch.manual_seed(0)
    model = NETS[net]({**ACTIVATIONS, **SMOOTH}[activation]).to(dtype)
    with torch.no_grad():  # a unit that never fires, and one that stands on the kink
        for layer in model.layers[:-1]:
            if layer.bias is not None:
                layer.bias[0], layer.bias[1] = -20, 0
    return model


def answers(model, batch, shift, criterion=F.cross_entropy, only=None, share=1, directly=False, **options):
    """{parameter: (changes by "structured", by the loop)} for both sides of every coordinate.

    directly: without the comparison with the loop that the queries make for themselves.
    """
    parameters = dict(model.named_parameters())
    queries, loop = (LossQueries(model, criterion, parameters, mode, **options) for mode in ("structured", "loop"))
    base, expected = (q.start(*batch, seed=0)[1] for q in (queries, loop))
    way, found = queries.choice.ways["structured"] if directly else queries, {}
    for name, parameter in parameters.items():
        if only is None or name in only:
            question = name, torch.arange(0, parameter.numel(), share), [shift, -shift]
            with torch.no_grad():
                found[name] = way.coordinates(*question) - base, loop.coordinates(*question) - expected
    return found


def same(found, tolerance):
    """A change is right to within a share of the largest one, and the rounding of a loss."""
    for name, (mine, loop) in found.items():
        error = (mine - loop).abs().max() - 1e-14
        assert error < tolerance * loop.abs().max(), (name, error, loop.abs().max())


@pytest.fixture
def no_probe(monkeypatch):
    """Let all rounds fail that are not answered by the logits."""

    def look(*_):
        raise AssertionError("not by the logits")

    monkeypatch.setattr(structured.Probe, "look", look)


@pytest.fixture
def crossed(monkeypatch):
    """The crossings that were found, by stage."""
    counts = []
    find = logits.crossings

    def counted(*arguments):
        found = find(*arguments)
        counts.append(None if found is None else [int((crossing.rest != 0).sum()) for crossing in found])
        return found

    monkeypatch.setattr(logits, "crossings", counted)
    return counts


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("activation", ["relu", "in place", "leaky", "steep", "relu6", "hardtanh", "narrow"])
@pytest.mark.parametrize("shift", [1e-4, 1e-2, 0.1, 1.0])
def test_changes_are_those_of_the_loop(net, activation, shift):
    same(answers(made(net, activation), data(), shift), 1e-8)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations_are_left_to_another_way(net, activation):
    same(answers(made(net, activation), data(), 1e-3), 1e-8)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("shift", [1e-3, 1e-2, 0.1])
def test_losses_in_single_precision(net, shift):
    model = made(net, "relu", torch.float32)
    for mine, loop in answers(model, data(torch.float32), shift).values():
        torch.testing.assert_close(mine, loop, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("net", ["convolutions", "deep", "three TTM"])
def test_kinks_are_crossed_in_every_stage(net, crossed, no_probe, monkeypatch):
    """There are terms that cross, and without them the changes are wrong."""
    monkeypatch.setattr(kinks, "NEAR", 1.0)
    monkeypatch.setattr(kinks, "DEEP", 1.0)
    model = made(net, "relu")
    first = next(name for name, parameter in model.named_parameters() if parameter.dim() > 1)
    question = dict(only=[first], directly=True)
    same(answers(model, data(), 0.1, **question), 1e-9)
    assert len(crossed[0]) == len(model.layers) - 1 and min(crossed[0]) > 0
    monkeypatch.setattr(logits.Logits, "_cross", lambda *_: None)
    with pytest.raises(AssertionError):
        same(answers(model, data(), 0.1, **question), 1e-4)


def test_near_too_many_kinks_another_way_answers(no_probe):
    for shift in (1e-3, 1.0):
        question = made("TTM", "relu"), data(), shift, F.cross_entropy, ["layers.0.cores.0"], 1, True
        if shift < 1:
            same(answers(*question), 1e-9)
        else:
            with pytest.raises(AssertionError, match="not by the logits"):
                answers(*question)


@pytest.mark.parametrize("shift, order", [(1e-5, 3), (1e-4, 4), (1e-3, None)])
def test_the_series_is_cut_by_its_bound(shift, order, no_probe, monkeypatch):
    """In double precision; the exact logarithm follows where four terms do not suffice."""
    orders, cut = [], logits._order
    monkeypatch.setattr(logits, "_order", lambda *given: orders.append(cut(*given)) or orders[-1])
    same(answers(made("TTM", "relu"), data(), shift, only=["layers.0.cores.1"], directly=True), 1e-9)
    assert order in orders


def test_the_bound_holds():
    """Against the exact change, for logits that move as far as the bound says, in all directions."""
    generator = torch.Generator().manual_seed(0)
    for x in (1e-2, 5e-2, 0.1, 0.3):
        p = torch.rand(1000, 4, generator=generator, dtype=torch.float64) ** 6
        p /= p.sum(1, keepdim=True)
        v = torch.randn(1000, 4, generator=generator, dtype=torch.float64)
        w = v - (p * v).sum(1, keepdim=True)
        w *= x / w.abs().amax(1, keepdim=True)
        second, third, fourth = ((p * w**m).sum(1) for m in (2, 3, 4))
        exact = (p * w.exp()).sum(1).log()
        for order, series in ((3, second / 2 + third / 6), (4, second / 2 + third / 6 + (fourth - 3 * second**2) / 24)):
            bound = logits.TAIL[order] * x ** (order + 1) / (1 - x / torch.log(torch.tensor(2.0)))
            assert (series - exact).abs().max() < bound


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), ignore_index=2),
        lambda z, y: F.cross_entropy(z, torch.where(y == 0, -100, y)) + 3.0,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda z, y: F.cross_entropy(z, y) + z.square().mean(),
        lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double()),
    ],
)
@pytest.mark.parametrize("net", ["TTM", "convolutions", "deep"])
def test_other_criteria(criterion, net):
    same(answers(made(net, "relu"), data(), 1e-3, criterion), 1e-7)


class Mixed(nn.Module):
    """A normalisation over the batch between the layers: samples are not independent."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = TensorizedLinear_module(6, 6, **TTM), nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.relu(self.norm(F.relu(self.first(x)))))


class Swapped(nn.Module):
    """Sample and place exchanged by a reshape: as many rows, but others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = TensorizedLinear_module(6, 6, **TTM), nn.Linear(6, 3)

    def forward(self, x):
        h = F.relu(self.first(x.unflatten(0, (4, -1)))).transpose(0, 1)
        return self.last(h.reshape(-1, 6))


class Tokens(nn.Module):
    """Rows of a sequence, all of which go to the loss."""

    def __init__(self):
        super().__init__()
        self.first, self.last = TensorizedLinear_module(6, 6, **TTM), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.relu(self.first(x.unflatten(0, (4, -1))))).flatten(0, 1)


class Pooled(Tokens):
    """Rows of a sequence that are reshaped into one."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        h = F.relu(self.first(x.unflatten(0, (-1, 2))))  # (B / 2, 2, 6)
        return self.last(h.flatten(1)).repeat_interleave(2, 0)


class Residual(Tokens):
    def forward(self, x):
        h = self.first(x)
        return self.last(F.relu(h) + h)


@pytest.mark.parametrize("make", [Mixed, Swapped, Tokens, Pooled, Residual])
def test_what_is_no_chain_of_independent_samples_is_right_too(make):
    torch.manual_seed(0)
    same(answers(make().double(), data(), 1e-3), 1e-7)


def test_a_part_of_the_entries(no_probe):
    same(answers(made("three TTM", "relu"), data(), 1e-3, only=["layers.0.cores.0"], share=3, directly=True), 1e-8)


def test_few_entries_and_little_memory_are_left_to_another_way(no_probe):
    for options in (dict(share=12), dict(memory=0.06)):
        with pytest.raises((AssertionError, Unsuitable), match=r"not by the logits|memory does not suffice"):
            answers(made("TTM", "relu"), data(), 1e-3, only=["layers.0.cores.0"], directly=True, **options)


@pytest.mark.parametrize("make", [MNIST_TTM, MNIST_CNN])
def test_the_models_of_the_book_are_answered_by_the_logits(make, no_probe):
    torch.manual_seed(0)
    model, names = make(), ["fc1.cores.1", "fc2.cores.1", "conv1.bias", "conv2.weight", "conv3.weight"]
    queries = LossQueries(model, F.cross_entropy, dict(model.named_parameters()), "structured")
    queries.start(torch.randn(32, 784), torch.randint(10, (32,)), seed=0)
    for name, parameter in model.named_parameters():
        if name in names:
            way = queries.choice.ways["structured"]
            with torch.no_grad():
                assert way.coordinates(name, torch.arange(parameter.numel()), [1e-3, -1e-3]).isfinite().all()


def test_many_crossings_are_moved_on_by_products(monkeypatch):
    """Behind a step so long that terms meet several kinks each, and near to it, where they are moved on one by one."""
    from zo_tutorial.queries import logits

    taken = []
    for name in ("_product", "_one_by_one"):
        way = getattr(logits, name)
        monkeypatch.setattr(logits, name, lambda *a, way=way, name=name: taken.append(name) or way(*a))
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(576, 3)).double()
    x, y = torch.randn(16, 1, 16, 16, dtype=torch.float64), torch.arange(16) % 3
    weights = {"0.weight": model[0].weight}
    index = torch.arange(model[0].weight.numel())
    for step in (1e-4, 3e-3, 1e-2, 1.5e-2):
        queries, loop = (LossQueries(model, F.cross_entropy, weights, mode) for mode in ("structured", "loop"))
        base = queries.start(x, y, 0)[1]
        loop.start(x, y, 0)
        mine, theirs = (q.coordinates("0.weight", index, [step, -step]) - base for q in (queries, loop))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())
    assert set(taken) == {"_product", "_one_by_one"}
