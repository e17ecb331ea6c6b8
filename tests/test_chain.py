"""Directions of layers in a chain: the losses of the loop, by batched products alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_tutorial import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn
from zo_tutorial.low_rank import LowRank
from zo_tutorial.queries import LossQueries, directional
from zo_tutorial.queries.chain import _joined, contracted
from zo_tutorial.selection import select_parameters
from zo_tutorial.tensor.formats import FORMATS


def ttm(inputs, outputs, kind=TensorizedLinear_module, bias=True, **options):
    sizes = {6: [2, 3], 12: [3, 4], 8: [4, 2], 3: [3, 1]}
    return kind(inputs, outputs, bias, [sizes[inputs], sizes[outputs]], max_rank=3, **options)


ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.Tanh(), nn.LeakyReLU(), nn.ELU(), nn.Hardtanh(-0.3, 0.3)]
NETS = {
    "one layer": lambda act: nn.Linear(12, 3),
    "dense": lambda act: nn.Sequential(nn.Linear(12, 8), act, nn.Linear(8, 3)),
    "three layers": lambda act: nn.Sequential(nn.Linear(12, 8, False), act, nn.Linear(8, 6), act, nn.Linear(6, 3)),
    "behind a start": lambda act: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 8), act, nn.Linear(8, 3)),
    "TTM": lambda act: nn.Sequential(ttm(12, 8), act, ttm(8, 3)),
    "TTM one layer": lambda act: ttm(12, 3, bias=False),
    "photonic": lambda act: nn.Sequential(ttm(12, 8, TensorizedLinear_module_tonn), act, nn.Linear(8, 3)),
    "TT": lambda act: nn.Sequential(TensorizedLinear([3, 4], [4, 2], 3), act, TensorizedLinear([4, 2], [3, 1], 2)),
    "TT, photonic": lambda act: nn.Sequential(
        ttm(12, 8, TensorizedLinear_module_tonn, tensor_type="TensorTrain"), act, ttm(8, 3)
    ),
    "sequence": lambda act: nn.Sequential(nn.Linear(12, 8), act, ttm(8, 3), nn.Flatten(0, 1)),
}
IGNORED = -100


def batch(name, dtype=torch.float64):
    torch.manual_seed(2)
    shape = (7, 3, 12) if name == "sequence" else (21, 12)
    x = torch.randn(shape, dtype=dtype) * (torch.rand(shape) > 0.2)
    return x, torch.randint(3, (21,))


def chained(monkeypatch):
    """From here on, no direction may go through vmap."""

    def refuse(*args, **kwargs):
        raise AssertionError("by vmap")

    monkeypatch.setattr(directional, "vmap", refuse)


def same(
    model, x, y, criterion=F.cross_entropy, scales=(0.01, -0.01), share=1.0, low_rank=False, names=None, **options
):
    trained = select_parameters(model, parameters=names).trained
    queries, loop = (LossQueries(model, criterion, trained, mode, **options) for mode in ("structured", "loop"))
    generator = torch.Generator().manual_seed(0)
    index = {}
    for name, parameter in trained.items():
        kept = torch.rand(parameter.numel(), generator=generator) < share
        index[name] = range(parameter.numel()) if share == 1 else kept.nonzero().flatten()
    if low_rank:
        u = LowRank(5, list(trained.values()), list(index.values()), 2, generator)
    else:
        u = torch.randn(5, sum(map(len, index.values())), generator=generator).to(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = queries.start(x, y, 0)[1]
    loop.start(x, y, 0)
    mine, theirs = (q.directions(index, u, list(scales)) for q in (queries, loop))
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6}[start.dtype]
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0)
    if start.dtype == torch.float64:  # the changes too
        atol = 1e-4 * (theirs - start).abs().max().item()
        torch.testing.assert_close(mine - start, theirs - start, rtol=0, atol=atol)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {way for way, _ in queries.ways().values()} == {"structured"}


def of(name, activation=None):
    torch.manual_seed(1)
    return NETS[name](activation or nn.ReLU()).double()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scales", [(1e-4, -1e-4), (0.1,), (1.0, -1.0, 0.5)])
def test_losses_are_those_of_the_loop(name, scales, monkeypatch):
    chained(monkeypatch)
    model, (x, y) = of(name), batch(name)
    same(model, x, y, scales=scales)
    same(model, x, y, scales=scales, share=0.5)
    same(model, x, y, scales=scales, share=0.1)
    same(model.float(), x.float(), y, scales=scales)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["three layers", "TTM"])
def test_any_elementwise_activation(activation, name, monkeypatch):
    chained(monkeypatch)
    same(of(name, activation), *batch(name), scales=(0.3, -0.3))


@pytest.mark.parametrize("name", NETS)
def test_low_rank_directions_stay_in_factors(name, monkeypatch):
    chained(monkeypatch)
    same(of(name), *batch(name), low_rank=True)
    same(of(name), *batch(name), low_rank=True, share=0.5)


@pytest.mark.parametrize("name", ["three layers", "TTM", "photonic"])
def test_any_part_of_the_parameters(name, monkeypatch):
    """The first layer, the last, biases alone, one core alone: the others are shared by all points."""
    chained(monkeypatch)
    model = of(name)
    names = [name for name, _ in model.named_parameters()]
    for some in ([names[0]], [names[-1]], [n for n in names if "bias" in n], names[1:-1], names[::2]):
        same(model, *batch(name), names=some)


@pytest.mark.parametrize("name", ["dense", "TTM", "sequence"])
def test_the_loss_may_weigh_ignore_and_add(name, monkeypatch):
    chained(monkeypatch)
    x, y = batch(name)
    y[::4] = IGNORED
    weights = torch.tensor([1.0, 3.0, 0.5]).double()
    same(of(name), x, y, lambda z, y: F.cross_entropy(z, y, weights) + 0.5)


@pytest.mark.parametrize("name", ["dense", "TTM"])
def test_another_loss_is_run_for_each_point(name):
    same(of(name), *batch(name), lambda z, y: z.square().mean() + F.cross_entropy(z[:, :2], y.clamp(max=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_whose_exponential_overflows(dtype, monkeypatch):
    chained(monkeypatch)
    for name in ("dense", "TTM"):
        model = of(name).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 20
        same(model, *batch(name, dtype), scales=(1.0, -1.0))


def test_outputs_whose_exponential_vanishes(monkeypatch):
    chained(monkeypatch)
    model = of("dense").float()
    with torch.no_grad():
        model[2].bias -= 95  # in single precision exp(-95) has few digits left
    same(model, *batch("dense", torch.float32))


class Skips(nn.Module):
    """A layer's activation is read twice: no chain."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = F.relu(self.first(x))
        return self.last(h + F.relu(self.middle(h)))


@pytest.mark.parametrize(
    "model", [Skips(), nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))]
)
def test_what_is_no_chain_goes_another_way(model):
    same(model.double(), *batch("dense"))


def test_little_memory_makes_small_portions(monkeypatch):
    chained(monkeypatch)
    sizes, losses = [], directional.Chain.losses

    def counted(chain, z, *others):
        sizes.append(len(z))
        return losses(chain, z, *others)

    monkeypatch.setattr(directional.Chain, "losses", counted)
    same(of("TTM"), *batch("TTM"), memory=0.07)
    assert max(sizes) < 10 and len(sizes) > 1


@pytest.mark.parametrize("ranks", [(1, 2, 3, 1), (1, 5, 1, 1), (1, 1, 1, 1), (1, 4, 4, 1)])
@pytest.mark.parametrize("shapes", [((2, 3, 4), (5, 1, 2)), ((7, 1, 2), (1, 6, 3)), ((1, 1, 1), (2, 2, 2))])
@pytest.mark.parametrize("columns", [1, 40])
def test_the_contraction_is_the_product_with_the_matrix(ranks, shapes, columns):
    """Whichever way is the cheapest, with a batch for each point or one for all."""
    torch.manual_seed(0)
    inputs, outputs = shapes
    cores = [torch.randn(4, ranks[k], outputs[k], inputs[k], ranks[k + 1]).double() for k in range(3)]
    cores[1] = cores[1][:1]  # shared by all points
    whole = [FORMATS["TensorTrainMatrix"].to_matrix([core[p % len(core)] for core in cores]) for p in range(4)]
    for points in (1, 4):
        x = torch.randn(points, whole[0].shape[1], columns).double()
        torch.testing.assert_close(contracted(cores, x), torch.stack(whole) @ x)
    both = _joined(cores[0], cores[1])
    assert both.shape == (4, 1, outputs[0] * outputs[1], inputs[0] * inputs[1], ranks[2])


def test_an_answer_does_not_depend_on_what_was_asked_before():
    """A worker has asked other directions of the step before, and some may have been too long for exp."""
    model, (x, y) = of("TTM"), batch("TTM")
    trained = select_parameters(model).trained
    index = {name: range(p.numel()) for name, p in trained.items()}
    u = torch.randn(2, sum(map(len, index.values())), generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    answers = []
    for before in (False, True):
        queries = LossQueries(model, F.cross_entropy, trained, "structured")
        queries.start(x, y, 0)
        if before:
            far = queries.directions(index, u[:1], [3e3])
            assert far.isfinite().all()
        answers.append(queries.directions(index, u[1:], [0.01, -0.01]))
    assert torch.equal(*answers)
