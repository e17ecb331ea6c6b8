"""Pruning at initialisation: the GraSP score against brute force, and what every mask must be."""

import copy
import warnings
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import make_net
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from zo_tutorial import MNIST_FC, MNIST_TTM, pruning
from zo_tutorial.randomness import RandomState
from zo_tutorial.temperature import divided


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(width=3, n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, width, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def brute_force(net, temperature):
    """Names, θ, gradient and full Hessian of the tempered loss by the weights, as one vector and one matrix."""
    x, y = batch()
    weights = {name: p.detach() for name, p in net.named_parameters() if name.endswith("weight")}
    sizes = [w.numel() for w in weights.values()]

    def loss(flat):
        pieces = {name: piece.view_as(w) for (name, w), piece in zip(weights.items(), flat.split(sizes), strict=True)}
        return cross_entropy(functional_call(net, pieces, x) / temperature, y)

    theta = torch.cat([w.flatten() for w in weights.values()])
    g = torch.autograd.functional.jacobian(loss, theta)
    return loss, theta, g, torch.autograd.functional.hessian(loss, theta)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_the_score_is_minus_theta_times_hg(temperature):
    net = tiny()
    _, theta, g, hessian = brute_force(net, temperature)
    scores = pruning.grasp_scores(net, cross_entropy, *batch(), temperature)
    flat = torch.cat([score.flatten() for score in scores.values()])
    torch.testing.assert_close(flat, -theta * (hessian @ g))


def test_its_sign_shrinking_a_weight_of_large_score_raises_the_gradient_norm():
    net = tiny()
    loss, theta, g, _ = brute_force(net, 1.0)
    scores = pruning.grasp_scores(net, cross_entropy, *batch(), 1.0)
    flat = torch.cat([score.flatten() for score in scores.values()])
    shrink = 1e-5
    for i in flat.abs().topk(8).indices.tolist():
        smaller = theta.clone()
        smaller[i] *= 1 - shrink
        change = torch.autograd.functional.jacobian(loss, smaller).square().sum() - g.square().sum()
        assert (change / shrink / 2).item() == pytest.approx(flat[i].item(), rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_scores_from_losses_are_those_of_autograd(kind, temperature):
    net = make_net(kind, dropout=0.0).eval()  # its layers are smooth
    x, y = batch(6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    exact = pruning.grasp_scores(net, cross_entropy, x, y, temperature)
    scores, queries = pruning.grasp_scores_from_losses(net, cross_entropy, x, y, 1e-3, temperature=temperature)
    assert queries == 4 * sum(score.numel() for score in exact.values()) + 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    largest = max(score.abs().max() for score in exact.values()).item()
    for name, score in exact.items():
        torch.testing.assert_close(scores[name], score, rtol=0, atol=1e-5 * largest)


def test_the_error_of_scores_from_losses_falls_with_the_square_of_h():
    net = tiny()
    exact = pruning.grasp_scores(net, cross_entropy, *batch(), 1.0)
    error = {}
    for h in (0.1, 0.05):
        scores, _ = pruning.grasp_scores_from_losses(net, cross_entropy, *batch(), h, "loop", 1.0)
        error[h] = sum((scores[name] - exact[name]).square().sum() for name in exact).sqrt()
    assert error[0.1] / error[0.05] == pytest.approx(4, rel=0.1)


def test_all_ways_of_querying_give_the_same_scores():
    net = tiny()
    answers = [
        pruning.grasp_scores_from_losses(net, cross_entropy, *batch(), 1e-2, mode)
        for mode in ("loop", "batched", "structured")
    ]
    for scores, queries in answers[1:]:
        assert queries == answers[0][1] == 4 * 24 + 3
        for name, score in scores.items():
            torch.testing.assert_close(score, answers[0][0][name], rtol=1e-6, atol=1e-12)


def test_queries_that_fail_leave_the_weights_where_they_were():
    net, asked = tiny(), []
    before = net[0].weight.detach().clone()

    def failing(outputs, y):
        asked.append(1)
        return cross_entropy(outputs, y) if len(asked) < 60 else outputs.sum() * float("nan")

    with pytest.raises(FloatingPointError):
        pruning.grasp_scores_from_losses(net, failing, *batch(), 1e-2, "loop")
    assert torch.equal(net[0].weight, before)
    with pytest.raises(ValueError, match="h must be above 0"):
        pruning.grasp_scores_from_losses(net, cross_entropy, *batch(), 0)


def test_the_largest_scores_go_under_one_threshold():
    net = MNIST_FC(hidden=16, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(40, 784, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 10
    scores = pruning.grasp_scores(net, cross_entropy, x, y)
    masks = pruning.grasp(net, cross_entropy, x, y, 0.9)
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    removed = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert kept.max() <= removed.min() and len(removed) == int(0.9 * (784 * 16 + 160))


def test_scoring_leaves_the_model_alone():
    net = make_net("nn.Linear", dropout=0.3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = batch(6)
    pruning.grasp(net, cross_entropy, x, y, 0.5)
    pruning.snip(net, cross_entropy, x, y, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_cores_of_ttm_layers_are_scored():
    net = MNIST_TTM(generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(40, 784, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 10
    masks = pruning.grasp(net, cross_entropy, x, y, 0.5)
    assert set(masks) == {name for name, _ in net.named_parameters()}
    assert sum(int((~mask).sum()) for mask in masks.values()) == 752


def test_only_weights_in_the_named_modules_are_removed():
    net = tiny()
    x, y = batch()
    scores = pruning.grasp_scores(net, cross_entropy, x, y)["2.weight"]  # (3, 4), of the loss of the whole net
    masks = pruning.grasp(net, cross_entropy, x, y, 0.5, modules=["2"])
    assert masks.keys() == {"2.weight"} and torch.equal(masks["2.weight"], scores < scores.flatten().sort()[0][6])
    for other in (
        pruning.snip(net, cross_entropy, x, y, 0.5, ["2"]),
        pruning.magnitude(net, 0.5, ["2"]),
        pruning.random(net, 0.5, torch.Generator().manual_seed(0), ["2"]),
    ):
        assert other.keys() == {"2.weight"} and other["2.weight"].sum() == 6
    for module, message in (("3", "the model has no '3'; it has 0, 1, 2"), ("1", "no weight to prune in 1")):
        with pytest.raises(ValueError, match=message):
            pruning.magnitude(net, 0.5, [module])


def test_dense_mnist_keeps_10164():
    net = MNIST_FC()
    masks = pruning.magnitude(net, 0.95)
    assert sum(int(mask.sum()) for mask in masks.values()) == 10_164


def all_methods(net, ratio):
    x, y = batch(6)
    generator = torch.Generator().manual_seed(0)
    grasp = pruning.grasp(net, cross_entropy, x, y, ratio)
    return {
        "grasp": grasp,
        "snip": pruning.snip(net, cross_entropy, x, y, ratio),
        "magnitude": pruning.magnitude(net, ratio),
        "random": pruning.random(net, ratio, generator),
        "shuffle": pruning.shuffle(grasp, generator),
    }


@pytest.mark.parametrize("ratio", [0.0, 0.37, 0.95])
def test_every_method_removes_the_same_number(kind, ratio):
    net = make_net(kind)
    for masks in all_methods(net, ratio).values():
        shapes = {name: p.shape for name, p in net.named_parameters()}
        total = sum(mask.numel() for mask in masks.values())
        assert all(mask.dtype == torch.bool and mask.shape == shapes[name] for name, mask in masks.items())
        assert not any(name.endswith("bias") or name.startswith("2.") for name in masks)
        assert sum(int((~mask).sum()) for mask in masks.values()) == int(ratio * total)


def test_magnitude_and_snip_keep_the_largest():
    net = tiny()
    x, y = batch()
    g = torch.autograd.grad(cross_entropy(net(x), y), [net[0].weight, net[2].weight])
    for masks, score in (
        (pruning.magnitude(net, 0.5), [net[0].weight.abs(), net[2].weight.abs()]),
        (pruning.snip(net, cross_entropy, x, y, 0.5), [(net[0].weight * g[0]).abs(), (net[2].weight * g[1]).abs()]),
    ):
        mask, score = torch.cat([m.flatten() for m in masks.values()]), torch.cat([s.flatten() for s in score])
        assert score[mask].min() >= score[~mask].max()


def test_controls_keep_what_they_promise():
    net = tiny()
    generator = torch.Generator().manual_seed(0)
    grasp = pruning.grasp(net, cross_entropy, *batch(), 0.5)
    shuffled = pruning.shuffle(grasp, generator)
    assert all(mask.sum() == grasp[name].sum() for name, mask in shuffled.items())
    assert any(not torch.equal(mask, grasp[name]) for name, mask in shuffled.items())
    for name, mask in pruning.random(net, 0.5, generator).items():
        assert abs(int(mask.sum()) - mask.numel() / 2) <= 1, name


def test_removed_weights_become_zero_and_kept_ones_stay():
    net = tiny()
    before = net[0].weight.detach().clone()
    masks = pruning.magnitude(net, 0.5)
    pruning.apply_masks(net, masks)
    assert torch.equal(net[0].weight, before * masks["0.weight"])


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_an_impossible_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="target_ratio is the fraction removed"):
        pruning.magnitude(tiny(), ratio)


def test_the_table_adds_up():
    masks = {"a.weight": torch.tensor([True, False, False, False]), "b.weight": torch.ones(2, 3, dtype=torch.bool)}
    lines = pruning.table(masks).splitlines()
    assert lines[1].split() == ["a.weight", "4", "1", "3", "25.00"]
    assert lines[-1].split() == ["all", "10", "7", "3", "70.00"]


# Scores that cannot be ranked, layers that vanish.


def scoring(net, x, y):
    """What ranks scores, each as a call."""
    return {
        "grasp": lambda: pruning.grasp(net, cross_entropy, x, y, 0.5),
        "grasp_scores": lambda: pruning.grasp_scores(net, cross_entropy, x, y, 1.0),
        "snip": lambda: pruning.snip(net, cross_entropy, x, y, 0.5),
        "from losses": lambda: pruning.grasp_scores_from_losses(net, cross_entropy, x, y, 1e-2, "loop", 1.0),
        "magnitude": lambda: pruning.magnitude(net, 0.5),
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["grasp", "grasp_scores", "snip", "from losses", "magnitude"])
def test_a_weight_that_is_not_finite_is_an_error(method, value):
    net = tiny()
    with torch.no_grad():
        net[2].weight[1, 2] = value
    with pytest.raises(FloatingPointError, match="loss" if method == "from losses" else "weight"):
        scoring(net, *batch())[method]()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["grasp", "grasp_scores", "snip", "from losses"])
def test_an_input_that_is_not_finite_is_an_error(method, value):
    x, y = batch()
    x[3, 1] = value
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).double()
    with pytest.raises(FloatingPointError):
        scoring(net, x, y)[method]()


def test_magnitude_looks_at_the_weights_that_it_ranks():
    net = tiny()
    with torch.no_grad():
        net[2].weight[1, 2] = float("nan")
        net[0].bias[0] = float("inf")
    assert pruning.magnitude(net, 0.5, ["0"])["0.weight"].sum() == 6
    with pytest.raises(FloatingPointError, match=r"the scores of '2\.weight' are NaN or infinite"):
        pruning.magnitude(net, 0.5)


def test_finite_losses_with_infinite_scores_are_an_error():
    net = tiny()
    with pytest.raises(FloatingPointError, match=r"the scores of '0\.weight'"):
        pruning.grasp_scores_from_losses(net, cross_entropy, *batch(), 1e-170, "loop", 1.0)  # h² is 0


@pytest.mark.parametrize("method", ["grasp", "snip", "magnitude", "random"])
def test_a_layer_that_is_pruned_away_is_named(method):
    net = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 1), nn.Tanh(), nn.Linear(1, 3)).double()
    with torch.no_grad():
        net[2].weight.mul_(1e-9)
    x, y = batch()
    prune = {
        "grasp": lambda ratio: pruning.grasp(net, lambda o, y: -cross_entropy(o, y), x, y, ratio, 1.0),
        "snip": lambda ratio: pruning.snip(net, lambda o, y: o.square().sum(), x, y, ratio),
        "magnitude": lambda ratio: pruning.magnitude(net, ratio),
        "random": lambda ratio: pruning.random(net, ratio, torch.Generator().manual_seed(0)),
    }[method]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(mask.any() for mask in prune(0.0).values())
    with pytest.warns(UserWarning, match=r"pruning keeps no weight of .*\d\.weight") as caught:
        masks = prune(0.99)
    assert caught[0].filename == __file__
    gone = [name for name, mask in masks.items() if not mask.any()]
    assert gone and str(caught[0].message) == f"pruning keeps no weight of {', '.join(gone)}"


# Draws of the model.


@pytest.mark.parametrize("method", ["grasp", "snip", "from losses"])
def test_dropout_follows_the_seed_and_the_global_generators_stand_still(method):
    net = make_net("nn.Linear", dropout=0.5)
    x, y = batch(6)
    score = {
        "grasp": lambda **seed: pruning.grasp(net, cross_entropy, x, y, 0.5, **seed),
        "snip": lambda **seed: pruning.snip(net, cross_entropy, x, y, 0.5, **seed),
        "from losses": lambda **seed: pruning.grasp_scores_from_losses(net, cross_entropy, x, y, 1e-2, **seed)[0],
    }[method]
    found = []
    for elsewhere, seed in ((7, {}), (8, {"seed": 0}), (8, {"seed": 1})):
        torch.manual_seed(elsewhere)
        state = RandomState()
        found.append(torch.cat([score.flatten() for score in score(**seed).values()]))
        assert RandomState() == state
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


# What autograd meets in other models.


class Attention(nn.Module):
    """Self-attention by one of three ways, between two linear layers; (B, 6) -> (B, 3)."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.query, self.head = way, nn.Linear(6, 6), nn.Linear(6, 3)
        self.layer = {
            "function": nn.Identity,
            "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
            "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True),
        }[way]()

    def forward(self, x):
        x = self.query(torch.stack([x, x.roll(1, 1), x.square()], 1))  # (B, 3, 6)
        if self.way == "function":
            x = nn.functional.scaled_dot_product_attention(x, x, x)
        else:
            x = self.layer(x, x, x, need_weights=False)[0] if self.way == "attention" else self.layer(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["function", "attention", "encoder"])
def test_fused_attention_is_scored(way, training):
    torch.manual_seed(0)
    net = Attention(way).double().train(training)
    x, y = batch(6)
    scores = pruning.grasp_scores(net, cross_entropy, x, y, 1.0)
    shift = 1e-5  # along Hg: θᵀHg is the change of gᵀg / 2 when all weights grow in proportion

    def slope(scale):
        weights = {name: p.detach() * scale for name, p in net.named_parameters() if name in scores}
        weights = {name: weight.requires_grad_() for name, weight in weights.items()}
        loss = cross_entropy(functional_call(net, weights, (x,)), y)
        return sum(g.square().sum() for g in torch.autograd.grad(loss, weights.values())) / 2

    expected = (slope(1 - shift) - slope(1 + shift)) / (2 * shift)
    torch.testing.assert_close(sum(score.sum() for score in scores.values()), expected, rtol=1e-5, atol=1e-9)
    assert pruning.snip(net, cross_entropy, x, y, 0.5).keys() == scores.keys()


class TwoHeads(nn.Module):
    def __init__(self, kind=tuple):
        super().__init__()
        self.body, self.used, self.unused, self.kind = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2), kind

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.kind((self.used(hidden), self.unused(hidden)))


def test_weights_without_effect_have_score_0():
    net = TwoHeads().double()
    x, y = batch()
    scores = pruning.grasp_scores(net, lambda outputs, y: cross_entropy(outputs[0], y), x, y)
    assert not scores["unused.weight"].any() and scores["used.weight"].all() and scores["body.weight"].all()
    assert not pruning.snip(net, lambda outputs, y: cross_entropy(outputs[0], y), x, y, 0.3)["unused.weight"].any()


def test_a_loss_that_is_linear_in_the_weights_has_scores_0():
    scores = pruning.grasp_scores(nn.Linear(3, 3).double(), lambda outputs, y: outputs.sum(), *batch())
    assert not scores["weight"].any()


class Rounded(nn.Linear):
    """Autograd follows the bias only."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.detach().round(), self.bias)


@pytest.mark.parametrize(
    "net, criterion",
    [
        (nn.Linear(3, 3), lambda outputs, y: cross_entropy(outputs, y).item()),
        (nn.Linear(3, 3), lambda outputs, y: cross_entropy(outputs, y).detach()),
        (nn.Linear(3, 3), lambda outputs, y: cross_entropy(outputs, y, reduction="none")),
        (nn.Linear(3, 3), lambda outputs, y: (outputs.argmax(1) != y).sum()),
        (Rounded(3, 3), cross_entropy),
    ],
)
def test_a_loss_that_autograd_cannot_follow_is_one_clear_line(net, criterion):
    for prune in (pruning.grasp, pruning.snip):
        with pytest.raises(ValueError, match="one number that autograd can follow back to the weights"):
            prune(net.double(), criterion, *batch(), 0.5)


class Once(torch.autograd.Function):
    """exp, whose derivative autograd takes for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0]


class Fused(torch.autograd.Function):
    """The same, with a derivative that raises."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, slope):
        return Fused.Slope.apply(ctx.saved_tensors[0]) * slope

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, slope):
            raise NotImplementedError("derivative for aten::fused_backward is not implemented\nand more")


@pytest.mark.parametrize("function", [Once, Fused])
def test_second_derivatives_that_do_not_exist(function):
    class Exp(nn.Module):
        def forward(self, x):
            return function.apply(x)

    net = nn.Sequential(nn.Linear(3, 4), Exp(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="GraSP needs second derivatives, snip only first ones") as caught:
        pruning.grasp(net, cross_entropy, *batch(), 0.5)
    assert "\n" not in str(caught.value)
    assert sum(int(mask.sum()) for mask in pruning.snip(net, cross_entropy, *batch(), 0.5).values()) == 12


def test_scoring_works_where_gradients_are_off():
    net = tiny()
    expected = pruning.grasp(net, cross_entropy, *batch(), 0.5)
    with torch.no_grad():
        found = pruning.grasp(net, cross_entropy, *batch(), 0.5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_frozen_layer_is_not_pruned():
    net = tiny()
    net[0].requires_grad_(False)
    assert list(pruning.grasp(net, cross_entropy, *batch(), 0.5)) == ["2.weight"]


# Inputs and outputs of all kinds.

Pair = namedtuple("Pair", "first second")


class Sum(nn.Module):
    """Takes one thing or two, and has the map of `tiny`."""

    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, first, second=None):
        if isinstance(first, Pair):
            first, second = first
        if isinstance(first, PackedSequence):
            first = first.data
        return self.net(first if second is None else first + second)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: (x / 2, x / 2),
        lambda x: [x / 2, x / 2],
        lambda x: (x,),
        lambda x: Pair(x / 2, x / 2),
        lambda x: {"first": x / 2, "second": x / 2},
        lambda x: UserDict(first=x / 2, second=x / 2),
        lambda x: pack_sequence([x]),
    ],
)
def test_inputs_of_all_kinds(inputs):
    x, y = batch()
    net = Sum()
    for prune in (pruning.grasp, pruning.snip):
        expected, found = prune(net, cross_entropy, x, y, 0.5), prune(net, cross_entropy, inputs(x), y, 0.5)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@dataclass
class Output(OrderedDict):
    """Entries that are attributes too, as of Hugging Face's ModelOutput."""

    logits: torch.Tensor
    loss: None = None

    def __post_init__(self):
        self["logits"] = self.logits


@dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor
    hidden: torch.Tensor


class Attributes(dict):
    __getattr__ = dict.__getitem__


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


Named = namedtuple("Named", "hidden logits")
OUTPUTS = {  # how an output is made of logits, and how they are got back, which says what must have been divided
    "dict": (lambda z: {"logits": z, "loss": None, "n": 3}, lambda o: o["logits"]),
    "dict of any names": (lambda z: {"intent": z, "ids": z.argmax(1), "kind": "a"}, lambda o: o["intent"]),
    "list": (lambda z: [z, None], lambda o: o[0]),
    "tuple": (lambda z: (z, (z, [z])), lambda o: o[0] + o[1][0] - o[1][1][0]),
    "nested": (lambda z: ({"a": [z]}, 5), lambda o: o[0]["a"][0]),
    "object": (lambda z: SimpleNamespace(logits=z, hidden=z), lambda o: o.logits),
    "only the logits": (lambda z: SimpleNamespace(logits=z, hidden=z), lambda o: o.logits + 0 * o.hidden),
    "slots": (Slots, lambda o: o.logits),
    "frozen": (lambda z: Frozen(z, z), lambda o: o.logits),
    "named tuple": (lambda z: Named(z.exp(), z), lambda o: o.logits),
    "other named tuple": (lambda z: Pair(z, 2), lambda o: o.first),
    "model output, by name": (Output, lambda o: o.logits),
    "model output, by key": (Output, lambda o: o["logits"]),
    "attributes, by name": (lambda z: Attributes(logits=z), lambda o: o.logits),
    "attributes, by key": (lambda z: Attributes(logits=z), lambda o: o["logits"]),
    "logits of two heads": (lambda z: SimpleNamespace(logits=(z, z)), lambda o: o.logits[0] / 2 + o.logits[1] / 2),
    "object in a list": (lambda z: [SimpleNamespace(logits=z)], lambda o: o[0].logits),
    "return type": (lambda z: z.sort(stable=True), lambda o: o.values.gather(1, o.indices.argsort(1))),
}


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = tiny(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_temperature_divides_the_logits_of_any_output(kind, temperature):
    wrap, unwrap = OUTPUTS[kind]
    expected = pruning.grasp_scores(Wrapped(lambda z: z), cross_entropy, *batch(), temperature)

    def criterion(outputs, y):
        return cross_entropy(unwrap(outputs), y)

    found = pruning.grasp_scores(Wrapped(wrap), criterion, *batch(), temperature)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert pruning.snip(Wrapped(wrap), criterion, *batch(), 0.5).keys() == expected.keys()


def test_what_is_not_called_logits_stays_where_something_is():
    z = torch.ones(2, 3)
    output = divided(SimpleNamespace(logits=z, hidden=z), 4.0)
    assert torch.equal(output.logits, z / 4) and output.hidden is z
    output = divided({"logits": z, "hidden": z, "past": ((z,),)}, 4.0)
    assert torch.equal(output["logits"], z / 4) and output["hidden"] is z and output["past"][0][0] is z


@pytest.mark.parametrize(
    "wrap",
    [lambda z: SimpleNamespace(scores=z), lambda z: z.argmax(1), lambda z: {"ids": z.argmax(1)}, lambda z: [], str],
)
def test_an_output_without_logits_is_one_clear_line(wrap):
    with pytest.raises(ValueError, match="set temperature=1, which takes any output") as caught:
        pruning.grasp(Wrapped(wrap), cross_entropy, *batch(), 0.5)
    assert "\n" not in str(caught.value)


def test_temperature_1_takes_any_output():
    net = Wrapped(lambda z: SimpleNamespace(scores=z))
    masks = pruning.grasp(net, lambda outputs, y: cross_entropy(outputs.scores, y), *batch(), 0.5, 1.0)
    expected = pruning.grasp(net.net, cross_entropy, *batch(), 0.5, 1.0)
    assert all(torch.equal(masks[f"net.{name}"], mask) for name, mask in expected.items())


# The model afterwards.


class Noisy(nn.Module):
    """A layer that is registered twice and has an alias, tied weights, and a forward pass that leaves traces."""

    def __init__(self):
        super().__init__()
        layer, self.embedding = nn.Linear(6, 6), nn.Embedding(3, 6)
        self.body, self.norm = nn.Sequential(layer, nn.Tanh(), layer), nn.BatchNorm1d(6)
        self.first, self.head = self.body[0], nn.Linear(6, 3)
        self.head.weight = self.embedding.weight
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x):
        self.seen += 1
        self.last = x.sum()
        self.norm.eval()
        return self.head(self.lstm(self.norm(self.first(self.body(x)))[:, None])[0][:, 0])


def holders(model):
    """Every place of a model that holds a tensor, with the tensor, its version and its values."""
    found = []
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            found += [(module, name, t, t if t is None else (t._version, t.clone())) for name, t in held.items()]
    return found


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["grasp", "grasp_scores", "snip"])
def test_the_model_is_the_very_same_afterwards(method, fails):
    torch.manual_seed(0)
    net = Noisy().double()
    answer = copy.deepcopy(net)(batch(6)[0])
    before, modes = holders(net), [module.training for module in net.modules()]
    parameters = list(net.parameters())

    def criterion(outputs, y):
        if fails:
            raise KeyError("in the criterion")
        return cross_entropy(outputs, y)

    score = {
        "grasp": lambda: pruning.grasp(net, criterion, *batch(6), 0.5),
        "grasp_scores": lambda: pruning.grasp_scores(net, criterion, *batch(6)),
        "snip": lambda: pruning.snip(net, criterion, *batch(6), 0.5),
    }[method]
    if fails:
        with pytest.raises(KeyError, match="in the criterion"):
            score()
    else:
        score()
    for ours, theirs in zip(holders(net), before, strict=True):
        assert ours[:2] == theirs[:2] and ours[2] is theirs[2], ours[:2]
        if ours[2] is not None:
            assert ours[3][0] == theirs[3][0] and torch.equal(ours[3][1], theirs[3][1]), ours[:2]
    assert all(type(p) is nn.Parameter and p.grad is None and p.requires_grad for p in net.parameters())
    assert all(ours is theirs for ours, theirs in zip(net.parameters(), parameters, strict=True))
    assert net.body[0] is net.body[2] is net.first and net.head.weight is net.embedding.weight
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(copy.deepcopy(net)(batch(6)[0]), answer)


def test_a_layer_that_is_used_twice_is_scored_as_one():
    torch.manual_seed(0)
    layer, head = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), head)
    _, theta, g, hessian = brute_force(net, 1.0)
    scores = pruning.grasp_scores(net, cross_entropy, *batch(), 1.0)
    assert scores.keys() == {"0.weight", "4.weight"}
    torch.testing.assert_close(torch.cat([s.flatten() for s in scores.values()]), -theta * (hessian @ g))
