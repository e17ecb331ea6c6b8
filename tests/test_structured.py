"""Batched and structured queries: the losses, counts and moves of the loop, whatever the model; or a clear refusal."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import Decides, make_net
from torch import nn

from zo_tutorial import MNIST_CNN, MNIST_FC, MNIST_TT, MNIST_TTM, TensorizedLinear_module, ZO_SGD_mask
from zo_tutorial.queries import LossQueries
from zo_tutorial.queries.suffix import ConvolutionHead
from zo_tutorial.selection import select_parameters


class Residual(nn.Module):
    """Layers in a functional forward, a residual connection, dropout, a normalisation, an activation in place."""

    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(6, 5), nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5))
        self.last, self.dropout = nn.Linear(5, 3), nn.Dropout(0.3)

    def forward(self, x):
        h = self.first(x)
        h = self.dropout(h + F.gelu(self.block(h)))
        return self.last(F.relu(h, inplace=True))


class Tokens(nn.Module):
    """Two inputs, a sequence dimension, a head for the sequence and one for each token: a tuple of outputs."""

    def __init__(self):
        super().__init__()
        self.first = TensorizedLinear_module(6, 6, shape=[[2, 3], [3, 2]], max_rank=2)
        self.token, self.whole = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x, scale):
        h = torch.tanh(self.first(x.unsqueeze(1).expand(-1, 4, -1) * scale))  # (B, 4, 6)
        return self.whole(h.mean(1)), self.token(h)


class Branches(nn.Module):
    """Only one of two branches runs, decided by a number that no weight changes; a constant tensor takes part."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)
        self.constant = torch.linspace(0, 1, 4, dtype=torch.float64)

    def forward(self, x):
        h = self.a(x) if x.sum() > 1e6 else self.b(x)
        return self.head(torch.cat([h[:, :2], h[:, 2:] * self.constant[2:]], 1).relu())


class ByKeyword(nn.Module):
    """Layers that get their input by its name."""

    def __init__(self, activation=torch.tanh):
        super().__init__()
        self.first, self.between = nn.Linear(6, 6), TensorizedLinear_module(6, 6, shape=[[2, 3], [3, 2]], max_rank=2)
        self.norm, self.last, self.activation = nn.BatchNorm1d(6), nn.Linear(6, 3), activation

    def forward(self, x):
        return self.last(input=self.norm(input=self.between(x=self.activation(self.first(x)))))


def of_tokens(outputs, targets):
    whole, token = outputs
    return F.cross_entropy(whole, targets) + token.flatten(0, 1).square().mean()


def sequential(*layers):
    return nn.Sequential(*layers)


TTM = dict(shape=[[2, 3], [3, 2]], max_rank=2)
MODELS = {
    "dense": lambda: sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    "in place": lambda: sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "no activation": lambda: sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3)),
    "one layer": lambda: nn.Linear(6, 3),
    "deep": lambda: sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3)),
    "tensor head": lambda: sequential(
        nn.Linear(6, 6), nn.Tanh(), TensorizedLinear_module(6, 3, shape=[[2, 3], [3, 1]], max_rank=2)
    ),
    "batch norm": lambda: sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    "batch norm, eval": lambda: sequential(nn.Linear(6, 5), nn.BatchNorm1d(5).eval(), nn.ReLU(), nn.Linear(5, 3)),
    "dropout": lambda: sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.4, inplace=True), nn.Linear(5, 3)),
    # the TTM layer's output lies transposed in memory, and dropout fills its mask in that order
    "dropout, transposed": lambda: sequential(
        TensorizedLinear_module(6, 6, **TTM), nn.Dropout(0.4), nn.Linear(6, 6), nn.Dropout(0.4), nn.Linear(6, 3)
    ),
    "convolutions": lambda: sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2, groups=2), nn.Flatten()
    ),
    "CNN": lambda: sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, stride=2, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 3),
    ),
    "channels last": lambda: sequential(
        nn.Unflatten(1, (3, 2, 1)), nn.Conv2d(3, 4, (2, 1)).to(memory_format=torch.channels_last), nn.Flatten()
    ),
    "residual": Residual,
    "branches": Branches,
}


def pair(model, mode, criterion=F.cross_entropy, **options):
    """Queries of the same model in a mode and in a loop."""
    trained = select_parameters(model).trained
    return [LossQueries(model, criterion, trained, m, **options) for m in (mode, "loop")]


def close(a, b):
    tolerance = 1e-10 if b.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=0)


def compare(model, batch, mode, criterion=F.cross_entropy, shifts=(0.1, -0.1), every=1):
    """All coordinates and some directions give the losses and counts of the loop; returns the ways that were taken."""
    queries, loop = pair(model, mode, criterion)
    for seed in range(2):
        close(queries.start(*batch, seed)[1], loop.start(*batch, seed)[1])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for name, parameter in loop.parameters.items():
            index = torch.arange(seed, parameter.numel(), every)
            if len(index):
                close(queries.coordinates(name, index, shifts), loop.coordinates(name, index, shifts))
        index = {name: torch.arange(p.numel())[seed::2] for name, p in loop.parameters.items()}
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(3, sum(map(len, index.values())), generator=generator, dtype=batch_dtype(batch))
        for scales in ([0.01, -0.01], [0.02]):
            close(queries.directions(index, u, scales), loop.directions(index, u, scales))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert queries.count == loop.count
    return taken(queries)


def taken(queries):
    """The (kind of round, way) pairs that answered, the loop aside."""
    return {(key[0], way) for key, (way, _) in queries.ways().items() if way != "loop"}


def batch_dtype(batch):
    return (batch[0][0] if isinstance(batch[0], tuple) else batch[0]).dtype


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["batched", "structured", "auto"])
def test_losses_are_those_of_the_loop(name, mode, batch):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    if name == "branches" and mode != "auto":
        pytest.skip("vmap refuses a decision that a value takes, even one that no weight changes")
    criterion = (lambda z, y: F.cross_entropy(z[:, :3], y)) if "con" in name or "channels" in name else F.cross_entropy
    ways = compare(model, batch, mode, criterion)
    expected = "structured" if mode == "auto" else mode
    assert ("coordinates", expected) in ways
    first = next(layer for layer in model.modules() if not list(layer.children()) and list(layer.parameters()))
    # one product serves both sides of a first dense layer; for three directions "auto" may find the loop as quick
    if isinstance(first, nn.Linear) and mode != "auto":
        assert ways == {("coordinates", expected), ("directions", expected)}


def test_every_layer_type_has_a_form(kind, batch):
    """Each parameter is answered from the structure, not by a way that would step in."""
    queries, loop = pair(make_net(kind), "structured")
    close(queries.start(*batch, 0)[1], loop.start(*batch, 0)[1])
    for name, parameter in loop.parameters.items():
        question = name, torch.arange(parameter.numel()), [0.1, -0.1]
        close(queries.coordinates(*question), loop.coordinates(*question))
        assert queries.ways()["coordinates", name] == ("structured", {})


@pytest.mark.parametrize("activation", [torch.tanh, lambda z: z.softmax(1)])
def test_layers_behind_may_be_called_by_keyword(activation, batch):
    torch.manual_seed(0)
    queries, loop = pair(ByKeyword(activation).double(), "structured")
    close(queries.start(*batch, 0)[1], loop.start(*batch, 0)[1])
    question = "first.weight", torch.arange(36), [0.1, -0.1]
    close(queries.coordinates(*question), loop.coordinates(*question))
    assert queries.ways()["coordinates", "first.weight"] == ("structured", {})


@pytest.mark.parametrize("mode", ["batched", "structured"])
def test_losses_of_every_layer_type_in_float32(kind, mode, batch):
    compare(make_net(kind, dropout=0.2).float(), (batch[0].float(), batch[1]), mode)


@pytest.mark.parametrize(
    "model",
    [
        lambda: MNIST_FC(24),
        lambda: MNIST_FC(24, 2),
        lambda: MNIST_TTM(),
        lambda: MNIST_TTM(bias=True, layer="TensorizedLinear_module_tonn"),
        lambda: MNIST_TT(max_rank=3, bias=True),
        lambda: MNIST_CNN((2, 3, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_of_the_models_of_the_book(model, dtype):
    torch.manual_seed(0)
    batch = torch.randn(16, 784, dtype=dtype), torch.randint(10, (16,))
    ways = compare(model().to(dtype), batch, "structured", every=97)
    assert ("coordinates", "structured") in ways and len(ways) == 2


def test_a_changed_channel_meets_one_channel_of_the_next_layer():
    torch.manual_seed(0)
    model = MNIST_CNN((2, 3, 4))
    queries, _ = pair(model, "structured")
    queries.start(torch.randn(8, 784), torch.randint(10, (8,)), seed=0)
    for name in ("conv1.weight", "conv2.bias", "conv3.weight"):
        queries.coordinates(name, torch.arange(2), [0.1])
        assert isinstance(queries.evaluation.recording.layers_seen[model.get_submodule(name[:5])].head, ConvolutionHead)


def joint(outputs, targets):
    """The criterion of the encoder: of the sentence and of its tokens, some of which do not count."""
    whole, token = outputs
    return F.cross_entropy(whole, targets[0]) + F.cross_entropy(token.flatten(0, 1), targets[1].flatten())


CONVOLUTIONS = {
    "2d": ((2, 13, 12), nn.Conv2d, dict(kernel_size=(3, 2), stride=(1, 2), padding=(1, 3), dilation=(1, 2), groups=2)),
    "strides": ((2, 26, 25), nn.Conv2d, dict(kernel_size=2, stride=2, padding=1)),
    "circular": ((2, 12, 12), nn.Conv2d, dict(kernel_size=3, padding="same", padding_mode="circular")),
    "1d": ((2, 20), nn.Conv1d, dict(kernel_size=4, padding=2, dilation=2, padding_mode="reflect")),
}


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_some_or_all_patches_and_images_of_any_size(name, few):
    """Few weights are asked by their patches alone; a large image is convolved, a small one multiplied by a matrix."""
    torch.manual_seed(0)
    shape, convolution, options = CONVOLUTIONS[name]
    second = convolution(4, 3, kernel_size=3, stride=2, padding=1)
    model = nn.Sequential(convolution(2, 4, **options), nn.GELU(), second, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    compare_some_or_all(model, torch.randn(4, *shape), few)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("size", [12, 40])
def test_a_convolution_with_one_place_of_a_large_image_may_end_in_cross_entropy(size, few):
    last = nn.Conv2d(4, 3, 2, dilation=size - 1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), last, nn.Flatten())
    compare_some_or_all(model, torch.randn(5, 2, size, size, generator=torch.Generator().manual_seed(0)), few)


def compare_some_or_all(model, images, few):
    """One or two coordinates of each parameter, or all of them, as in the loop, and from the structure."""
    images, targets = images.double(), torch.tensor([0, 1, 2, 1, 0])[: len(images)]
    model.double()(images)
    queries, loop = pair(model, "structured")
    close(queries.start(images, targets, 0)[1], loop.start(images, targets, 0)[1])
    for parameter_name, parameter in loop.parameters.items():
        entries = parameter.numel()
        for index in ([entries // 2], [0, entries - 1]) if few else (range(entries),):
            question = parameter_name, torch.tensor(index), [0.1, -0.05]
            close(queries.coordinates(*question), loop.coordinates(*question))
    assert {way for way, _ in queries.ways().values()} == {"structured"}


@pytest.mark.parametrize("ignored", [0, 5])
def test_only_one_term_of_a_joint_cross_entropy_moves(batch, ignored):
    torch.manual_seed(0)
    tokens = torch.randint(3, (len(batch[1]), 4))
    tokens.view(-1)[torch.randperm(tokens.numel())[:ignored]] = -100
    model, inputs = Tokens().double(), (batch[0], torch.tensor(1.5, dtype=torch.float64))
    compare(model, (inputs, (batch[1], tokens)), "structured", joint)
    queries, _ = pair(model, "structured", joint)
    queries.start(inputs, (batch[1], tokens), seed=0)
    for name in ("token.weight", "whole.weight"):
        queries.coordinates(name, torch.arange(2), [0.1])
        behind = queries.evaluation.recording.layers_seen[model.get_submodule(name[:5])]
        rows = (tokens >= 0).sum() if name == "token.weight" else len(batch[1])
        assert behind.series is not None and behind.z.shape[1] == rows


@pytest.mark.parametrize(
    "criterion",
    [
        lambda outputs, y: joint(outputs, y) * 0.5,
        lambda outputs, y: joint(outputs, y) + outputs[1].square().mean(),
        lambda outputs, y: torch.add(joint(outputs, y), outputs[0].sum(), alpha=2),
        lambda outputs, y: F.cross_entropy(outputs[1].transpose(1, 2), y[1]) + F.cross_entropy(outputs[0], y[0]),
        lambda outputs, y: F.cross_entropy(outputs[1].reshape(len(y[0]), -1), y[0]),
    ],
)
def test_other_sums_are_no_joint_cross_entropy(criterion, batch):
    torch.manual_seed(0)
    inputs = batch[0], torch.tensor(1.5, dtype=torch.float64)
    compare(Tokens().double(), (inputs, (batch[1], torch.randint(3, (len(batch[1]), 4)))), "structured", criterion)


def test_many_inputs_and_outputs_and_a_criterion_of_ones_own(batch):
    torch.manual_seed(0)
    inputs = batch[0], torch.tensor(1.5, dtype=torch.float64)
    for mode in ("batched", "structured"):
        compare(Tokens().double(), (inputs, batch[1]), mode, of_tokens)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda z, y: 0.5 * F.cross_entropy(z, y) + z.square().mean(),
        lambda z, y: F.cross_entropy(z, F.one_hot(y, 3).double()),
        lambda z, y: F.cross_entropy(z, torch.where(y == 0, -100, y)),
        lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
    ],
)
def test_cross_entropy_is_recognised_only_in_its_plain_form(criterion, batch):
    torch.manual_seed(0)
    compare(MODELS["dense"]().double(), batch, "structured", criterion)


@pytest.mark.parametrize("name", ["dense", "one layer", "tensor head"])
@pytest.mark.parametrize("shift", [1e-7, 1e-2, 1.0, 30.0, 1e3, 1e6])
def test_small_and_large_steps(name, shift, batch):
    """From the series of one moment to outputs whose exponential overflows."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    compare(model, batch, "structured", shifts=(shift, -shift))
    compare(model.float(), (batch[0].float(), batch[1]), "structured", shifts=(shift, -shift))


def test_differences_keep_their_digits(batch):
    """A change of 1e-9 of the loss is the one that the gradient foretells, not the rounding of another summation."""
    torch.manual_seed(0)
    model = MODELS["dense"]().double()
    queries, _ = pair(model, "structured")
    queries.start(*batch, seed=0)
    plus, minus = queries.coordinates("0.weight", torch.arange(30), [1e-6, -1e-6])
    grad = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), model[0].weight)[0]
    torch.testing.assert_close((plus - minus) / 2e-6, grad.flatten(), rtol=1e-6, atol=1e-9)


# ---- moves


DESCENDED = ["dense", "in place", "one layer", "tensor head", "deep", "residual", "convolutions", "CNN"]


@pytest.mark.parametrize("name", DESCENDED)
@pytest.mark.parametrize("three_points", [True, False])
@pytest.mark.parametrize("mode", ["batched", "structured", "auto"])
def test_descent_takes_the_path_of_the_loop(name, three_points, mode, batch):
    """The same moves and counts, bit for bit, also where many steps change nothing: a tie is no descent."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = batch[0].clone(), batch[1]
    x[:, 0] = 0  # no step of the weights of this input changes the loss
    with torch.no_grad():
        for parameter in list(model.parameters())[1:2]:
            if parameter.dim() == 1:
                parameter[:2] -= 30  # two hidden units that never fire
    criterion = (lambda z, y: F.cross_entropy(z[:, :3], y)) if "con" in name else F.cross_entropy
    results = []
    for m in (mode, "loop"):
        twin = copy.deepcopy(model)
        queries, _ = pair(twin, m, criterion)
        running = queries.start(x, y, seed=0)[1].item()
        for name_, parameter in queries.parameters.items():
            running = queries.descend(name_, torch.arange(parameter.numel()), 0.02, three_points, running)
        # after the moves, queries start from where the parameters stand
        more = queries.coordinates(name_, torch.arange(2), [0.1])
        results.append((list(twin.parameters()), queries.count, running, more))
        if m == "structured":
            assert {way for _, way in taken(queries)} == {"structured"}
    (mine, count, running, more), (theirs, expected, reference, others) = results
    assert all(map(torch.equal, mine, theirs))
    assert count == expected and running == pytest.approx(reference, rel=1e-10)
    close(more, others)


def test_descent_looks_ahead_where_nothing_moves(batch):
    """At a minimum most looks are in vain; they are made by the dozen and none of them is counted twice."""
    torch.manual_seed(0)
    model = MODELS["dense"]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    queries, loop = pair(model, "structured", lambda z, y: z.square().mean())
    for q in (queries, loop):
        running = q.start(*batch, seed=0)[1].item()
        for name, parameter in q.parameters.items():
            q.descend(name, torch.arange(parameter.numel()), 0.1, True, running)
        assert not any(parameter.any() for parameter in model.parameters())
    assert queries.count == loop.count == 1 + 2 * sum(p.numel() for p in model.parameters())


# ---- what structure cannot answer


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.again(torch.tanh(self.again(self.first(x)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class ReadElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) @ self.first.weight)


class Overridden(nn.Linear):
    def forward(self, x):
        return super().forward(x) * self.weight.norm()


def hooked():
    layer = nn.Linear(6, 3)
    layer.register_forward_hook(lambda module, args, output: output * module.weight.norm())
    return sequential(layer)


def penalised(model):
    return lambda z, y: F.cross_entropy(z, y) + model.last.weight.square().sum()


@pytest.mark.parametrize(
    "make, name",
    [
        (Twice, "again.weight"),
        (Tied, "first.weight"),
        (ReadElsewhere, "first.weight"),
        (lambda: sequential(Overridden(6, 3)), "0.weight"),
        (hooked, "0.weight"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 3)), "parametrizations.weight.original"),
    ],
)
@pytest.mark.parametrize("mode", ["structured", "auto"])
def test_a_weight_that_is_not_read_just_once_is_batched(make, name, mode, batch):
    torch.manual_seed(0)
    model = make().double()
    compare(model, batch, mode)
    queries, _ = pair(model, mode)
    queries.start(*batch, seed=0)
    queries.coordinates(name, torch.arange(9), [0.1])
    assert taken(queries) <= {("coordinates", "batched")} and (mode == "auto" or taken(queries))


def test_a_criterion_that_reads_the_weights_is_seen(batch):
    torch.manual_seed(0)
    model = Twice().double()
    ways = compare(model, batch, "auto", penalised(model))
    assert ("coordinates", "batched") in ways and ("coordinates", "structured") in ways


class Numpy(Decides):
    def forward(self, x):
        return torch.from_numpy(self.linear(x).detach().numpy() * 2)


class Accumulates(Decides):
    def __init__(self):
        super().__init__()
        self.register_buffer("sum", torch.zeros(8, 3))

    def forward(self, x):
        self.sum.zero_()
        self.sum += self.linear(x)
        return self.sum


@pytest.mark.parametrize("make", [Decides, Numpy, Accumulates])
def test_what_vmap_cannot_run_is_looped_or_refused(make, batch):
    torch.manual_seed(0)
    model = make().double()
    assert not compare(model, batch, "auto")
    for mode in ("batched", "structured"):
        queries, _ = pair(model, mode)
        queries.start(*batch, seed=0)
        with pytest.raises(RuntimeError, match=f"query_mode '{mode}' cannot query this model, 'loop' and 'auto' can"):
            queries.coordinates("linear.weight", torch.arange(2), [0.1])
        with pytest.raises(RuntimeError, match=f"query_mode '{mode}' cannot query this model, 'loop' and 'auto' can"):
            queries.directions({"linear.weight": torch.arange(18)}, torch.ones(1, 18).double(), [0.1])


def test_weights_that_are_views_of_one_vector_share_nothing(batch):
    torch.manual_seed(0)
    model = MODELS["dense"]().double()
    vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert ("coordinates", "structured") in compare(model, batch, "structured")


class Stored(nn.Module):
    """A view of a weight, stored beside it: copies of the weight leave it behind."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3, bias=False).double()
        self.view = self.linear.weight.detach().T

    def forward(self, x):
        return x @ self.view


def test_losses_that_differ_from_the_loop_are_never_returned(batch):
    torch.manual_seed(0)
    assert not compare(Stored(), batch, "auto")
    queries, _ = pair(Stored(), "batched")
    queries.start(*batch, seed=0)
    with pytest.raises(RuntimeError, match=r"its losses are not those of the loop|read outside of its module"):
        queries.coordinates("linear.weight", torch.arange(2), [0.1])


@pytest.mark.parametrize("mode", ["batched", "structured", "auto"])
def test_a_model_that_is_no_module_is_looped_in_every_mode(mode, batch):
    weight = torch.zeros(3, 6, dtype=torch.float64)
    queries = LossQueries(lambda x: x @ weight.T, F.cross_entropy, {"weight": weight}, mode)
    _, loss = queries.start(*batch, seed=0)
    assert torch.equal(queries.coordinates("weight", torch.arange(2), [0.0]), loss.expand(1, 2))


@pytest.mark.parametrize("mode", ["batched", "structured", "auto"])
def test_a_failure_of_the_users_code_passes_through(mode, batch):
    """One that comes once, and one that stays; both leave the model as it was, and the next step works."""
    torch.manual_seed(0)
    for stays in (False, True):
        model, failure, broken = Residual().double(), RuntimeError("device unplugged"), []

        def criterion(z, y, failure=failure, broken=broken, stays=stays):
            if broken and (stays or broken.pop()):
                raise failure
            return F.cross_entropy(z, y).log()  # nothing that structured knows by heart

        queries, _ = pair(model, mode, criterion)
        queries.start(*batch, seed=0)
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        broken.append(True)
        with pytest.raises(RuntimeError) as raised:
            queries.coordinates("first.weight", torch.arange(2), [0.1])
        assert raised.value is failure
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(state, torch.get_rng_state())
        broken.clear()
        queries.start(*batch, seed=0)
        queries.coordinates("first.weight", torch.arange(2), [0.1])


@pytest.mark.parametrize("mode", ["batched", "structured"])
def test_a_loss_that_is_not_finite_names_step_and_layer(mode, batch):
    torch.manual_seed(0)
    queries, _ = pair(MODELS["dense"]().double(), mode)
    queries.start(*batch, seed=0)
    for ask in (
        lambda: queries.coordinates("2.weight", torch.arange(2), [float("nan")]),
        lambda: queries.descend("2.weight", torch.arange(2), float("nan"), True, 1.0),
        lambda: queries.directions({"2.weight": torch.arange(2)}, torch.ones(1, 2).double(), [float("nan")]),
    ):
        with pytest.raises(FloatingPointError, match="the loss is nan at step 1, with layer '2' perturbed"):
            ask()


# ---- memory

MEASURE = """
import json, sys, torch
from itertools import accumulate
from torch.profiler import ProfilerActivity, profile
from zo_tutorial import MNIST_CNN, MNIST_TTM
from zo_tutorial.queries import LossQueries
mode, name, memory, file = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
torch.manual_seed(0)
model = MNIST_CNN((16, 16, 16)) if name == "CNN" else MNIST_TTM(max_rank=8)
parameters = dict(model.named_parameters())
batch = torch.randn(256, 784), torch.randint(10, (256,))
def ask(queries, points):
    queries.start(*batch, seed=0)
    for parameter, value in list(parameters.items())[:2]:
        queries.coordinates(parameter, torch.arange(min(points, value.numel())), [0.1, -0.1])
    index = {parameter: torch.arange(value.numel()) for parameter, value in parameters.items()}
    queries.directions(index, torch.randn(points, sum(map(len, index.values()))), [0.1, -0.1])
def peak(*arguments):  # of the tensors that there are at once (MB); what the process holds is more, and left to malloc
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        ask(*arguments)
    watched.export_chrome_trace(file)
    events = [event for event in json.load(open(file))["traceEvents"] if event["name"] == "[memory]"]
    return max(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda e: e["ts"]))) / 1e6
loop = peak(LossQueries(model, torch.nn.functional.cross_entropy, parameters, "loop"), 2)
print(peak(LossQueries(model, torch.nn.functional.cross_entropy, parameters, mode, memory), 60) - loop)
"""


@pytest.mark.parametrize("mode, memory", [("auto", 10), ("auto", 40), ("structured", 150), ("batched", 150)])
@pytest.mark.parametrize("name", ["CNN", "TTM"])
def test_memory_is_bounded(name, mode, memory, tmp_path):
    """Tensors take less than was allowed (MB) over what the loop needs; with too little, there is the loop."""
    command = [sys.executable, "-c", MEASURE, mode, name, str(memory), str(tmp_path / "trace.json")]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert 0 < grown < memory


def test_too_little_memory_is_refused(batch):
    queries, _ = pair(MODELS["dense"]().double(), "structured", memory=1e-3)
    queries.start(*batch, seed=0)
    with pytest.raises(RuntimeError, match=r"structured: the memory does not suffice for .*; batched: the memory does"):
        queries.coordinates("0.weight", torch.arange(2), [0.1])


def test_memory_must_be_positive():
    with pytest.raises(ValueError, match="memory must be above 0 MB, not 0"):
        LossQueries(nn.Linear(1, 1), F.cross_entropy, {}, memory=0)


# ---- low-rank directions


class Attention(nn.Module):
    """Queries, keys and values read one input; a bias, a norm and a convolution stand between dense layers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.norm, self.conv, self.head = nn.LayerNorm(6), nn.Conv1d(6, 6, 1), nn.Linear(6, 3, bias=False)

    def forward(self, x):  # (B, 6) as sequences of 6 words
        x = x.unsqueeze(2) * torch.linspace(-1, 1, 6, dtype=x.dtype)  # (B, 6, 6)
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        x = self.norm(x + self.out(weights @ self.v(x)))
        return self.head(self.conv(x.mT).relu().mean(-1))


FIRST, LATER = ["q.weight", "k.weight", "head.weight"], ["out.weight", "conv.weight"]


@pytest.mark.parametrize("chosen", [None, FIRST, LATER, "masks"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_low_rank_directions_share_the_product_of_a_dense_layer(chosen, rank, dropout, batch):
    """Same estimate as in the loop, in double precision, whether layers come first, later, or are masked."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 6), nn.Dropout(dropout), Attention()).double()
    names = [f"2.{name}" for name in chosen] if isinstance(chosen, list) else [n for n, _ in start.named_parameters()]
    masks = {"2.out.weight": torch.arange(36).view(6, 6) % 3 > 0} if chosen == "masks" else None
    estimates = []
    for mode in ("loop", "batched", "structured"):
        model = copy.deepcopy(start)
        optimizer = ZO_SGD_mask(
            model, F.cross_entropy, masks, sigma=0.1, n_sample=9, directions="low_rank", rank=rank, parameters=names,
            query_mode=mode, generator=torch.Generator().manual_seed(4),
        )  # fmt: skip
        optimizer.estimate(*batch)
        assert {way for way, _ in optimizer.loss_queries.ways().values()} == {mode}
        estimates.append(torch.cat([p.grad.flatten() for p in optimizer.trained.values()]))
    torch.testing.assert_close(estimates[1], estimates[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(estimates[2], estimates[0], rtol=1e-9, atol=1e-12)


def test_low_rank_points_need_no_copy_of_a_dense_weight(batch):
    """50 points of a net of 1.6 million weights (6.4 MB) within 20 MB: by factors, where Gaussian ones do not fit."""
    model = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 4000), nn.Tanh(), nn.Linear(4000, 3))
    x, y = batch[0].float(), batch[1]

    def ask(kind):
        options = dict(sigma=0.1, n_sample=25, query_mode="structured", memory=20)
        ZO_SGD_mask(model, F.cross_entropy, None, directions=kind, **options).step(x, y)

    ask("low_rank")
    with pytest.raises(RuntimeError, match="memory"):
        ask("gaussian")
