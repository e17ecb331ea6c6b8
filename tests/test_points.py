"""Suffixes run for many points side by side, of which only parts move: the losses of the loop, or vmap's way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_tutorial import Encoder, TensorizedLinear_module
from zo_tutorial.low_rank import LowRank
from zo_tutorial.queries import LossQueries
from zo_tutorial.queries.parts import Part
from zo_tutorial.queries.points import Points
from zo_tutorial.queries.rules import Step

SIZES = {"words": 11, "intents": 3, "slots": 5, "d_model": 8, "heads": 2, "d_hidden": 12, "positions": 20}


def encoder(tensors: bool, **changes) -> Encoder:
    def linear(n, m):
        return TensorizedLinear_module(n, m, shape=[[2, n // 2], [m // 4, 4]], max_rank=2, generator=generator)

    generator = torch.Generator().manual_seed(0)
    if tensors:
        changes["linear"] = linear
    net = Encoder(**SIZES | changes, generator=generator)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:  # biases are not zero, gains not one
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return net


def sentences(length: int, padded: bool) -> tuple:
    """Tokens (4, length), classes of the sentences and of their tokens; padding has none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 11, (4, length), generator=generator)
    slots = torch.randint(5, (4, length), generator=generator)
    if padded:
        for row, end in enumerate([length, length - 1, 2, 1]):
            tokens[row, end:], slots[row, end:] = 0, -100
    return tokens, (torch.randint(3, (4,), generator=generator), slots)


def joint(outputs, targets):
    (intents, tags), (intent, slots) = outputs, targets
    return F.cross_entropy(intents, intent) + F.cross_entropy(tags.flatten(0, 1), slots.flatten())


def compare(model, batch, criterion, shifts, without=(), memory=512):
    """All parameters against the loop, at several coordinates; those `without` have no rule somewhere behind."""
    parameters = dict(model.named_parameters())
    queries, loop = (LossQueries(model, criterion, parameters, mode, memory) for mode in ("structured", "loop"))
    loss = queries.start(*batch, seed=3)[1]
    loop.start(*batch, seed=3)
    rounding = 1e-10 if loss.dtype == torch.float64 else 5e-6
    for name, parameter in parameters.items():
        if name == "norm.weight" or "self_attn" in name:  # read outside of a layer
            continue
        index = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(4))[:4].sort().values
        mine, theirs = (q.coordinates(name, index, shifts) for q in (queries, loop))
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")
        assert queries.ways()["coordinates", name][0] == "structured"
    seen = queries.evaluation.recording.layers_seen
    names = {module: name for name, module in model.named_modules()}
    side_by_side = {names[layer]: cached.points is not None for layer, cached in seen.items()}
    heads = {name for name, layer in zip(side_by_side, seen.values(), strict=True) if layer.series is not None}
    assert {name for name, yes in side_by_side.items() if not yes} == heads | set(without)


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("dropout, length, padded", [(0.0, 3, False), (0.3, 6, True), (0.0, 17, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_encoder(tensors, dropout, length, padded, dtype):
    model = encoder(tensors, dropout=dropout, focus=[(-1, 2.0), (0, 0.5)]).to(dtype)
    compare(model, sentences(length, padded), joint, [0.1, -0.1])


@pytest.mark.parametrize("shift", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_and_large_steps(shift, dtype):
    compare(encoder(False).to(dtype), sentences(6, True), joint, [shift, -shift])


def test_with_little_memory_the_points_are_few():
    compare(encoder(True).double(), sentences(6, True), joint, [0.1], memory=2)


class Word(nn.Module):
    """Dense layers around a function of their outputs (B, 4, 6); or of those of three layers."""

    def __init__(self, function, inputs=1):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(inputs)])
        self.function, self.last = function, nn.Linear(6, 3)

    def forward(self, x):
        x = x[:, None] * torch.linspace(0.5, 2, 4, dtype=x.dtype)[:, None]
        return self.last(self.function(*[layer(x) for layer in self.layers]))


def fused(z):
    """Queries, keys and values side by side in one layer's output."""
    q, k, v = z.chunk(3, -1)
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v @ torch.ones(2, 6, dtype=z.dtype)


def by_view(q, k, v):
    """Heads as many write them: view, permute, contiguous, a mask that is filled in."""
    q, k, v = (x.view(8, 4, 2, 3).permute(0, 2, 1, 3) for x in (q, k, v))
    scores = torch.matmul(q, k.mT).div(3**0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    return (F.softmax(scores, dim=-1) @ v).permute(0, 2, 1, 3).contiguous().view(8, 4, 6)


def over_other_dims(z):
    """Softmax over words and over heads, sums, a split, a squeeze."""
    heads = z.unflatten(2, (3, 2))
    heads = heads.softmax(1) + heads.softmax(2) * z.mean(1).unflatten(1, (3, 2)).unsqueeze(1)
    a, b = heads.flatten(2).split([2, 4], dim=2)  # (8, 4, 2), (8, 4, 4)
    b = b.reshape(8, 4, 2, 2).sum(-1).unsqueeze(-1).squeeze(-1)  # (8, 4, 2)
    return (a @ b.transpose(1, 2)) @ z + z.sum((1, 2), True) * torch.mean(z, -1, keepdim=True) + z.mean()


class DotProduct(nn.Module):
    """PyTorch's own attention, of two heads."""

    def __init__(self, mask=None, **options):
        super().__init__()
        self.mask, self.options = mask, options

    def forward(self, q, k, v):
        q, k, v = (x.unflatten(-1, (2, 3)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.mask, **self.options).transpose(1, 2).flatten(2)


FUNCTIONS = {
    "numbers": (lambda z: (1 - z.square()).mul(0.5).div(2) + 1 / (1 + z.exp()) - torch.sub(z, 2, alpha=3) ** 2, 1),
    "tensors of fewer dimensions": (lambda z: z * torch.linspace(0, 1, 6, dtype=z.dtype) + z[:, 1:2], 1),
    "a lower tensor that moves": (lambda z: torch.ones(5, 8, 4, 6, dtype=z.dtype) * z, 1),
    "activations": (lambda z: F.leaky_relu(F.elu(z), 0.2) + F.hardtanh(z) + F.gelu(z, approximate="tanh").relu(), 1),
    "norms": (lambda z: F.layer_norm(z, (6,)) + F.rms_norm(z, (4, 6)), 1),
    "by index": (lambda z: z * z[..., 1:2, :] + z[:, 0][:, None], 1),
    "a batch that shares": (lambda z: z @ z[0, 0][:, None] * z, 1),
    "chunks": (lambda z: torch.matmul(*(c.transpose(1, 2) if k else c for k, c in enumerate(z.chunk(2, 2))))
               @ z, 1),
    "three layers by view": (by_view, 3),
    "one layer": (fused, 1),
    "an attention of torch": (DotProduct(is_causal=True), 3),
    "a mask for all": (DotProduct(torch.eye(4).bool(), scale=0.3), 3),
    "a mask of each": (DotProduct(torch.arange(8 * 16).view(8, 1, 4, 4) % 3 < 2), 3),
    "a mask of the heads": (DotProduct(torch.arange(2 * 16).view(1, 2, 4, 4) % 5 < 3), 3),
    "other dimensions": (over_other_dims, 1),
    "one head for three": (lambda z: (z.unflatten(2, (1, 6)) * torch.arange(3.0, dtype=z.dtype)[:, None]).sum(2), 1),
    "a product of each": (lambda z: z @ torch.linspace(0, 1, 288, dtype=z.dtype).view(8, 6, 6), 1),
    "two paths": (lambda a, b: a.tanh() * b + torch.where(torch.arange(6) > 2, a, b), 2),
    "functional layers": (lambda z: F.linear(F.linear(z, torch.eye(6, dtype=z.dtype)[:4]),
                                             torch.ones(6, 4, dtype=z.dtype), torch.ones(6, dtype=z.dtype)), 1),
}  # fmt: skip


def plain(outputs, targets):
    """Of the words; those of the first class do not count."""
    return F.cross_entropy(outputs.reshape(-1, 3)[: 8 * 4], targets.repeat_interleave(4), ignore_index=0)


def weighted(outputs, targets):
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=outputs.dtype)
    words = outputs.reshape(-1, 4, 3)[:8].transpose(1, 2)  # (B, C, 4)
    every = targets[:, None].expand(-1, 4)
    options = dict(weight=weight, label_smoothing=0.1, ignore_index=1)
    return F.cross_entropy(words, every, **options) + 0.1 * F.cross_entropy(words, every, reduction="sum")


def test_one_unit_meets_many(batch):
    torch.manual_seed(0)
    model = Word(lambda z: z * torch.linspace(-1, 1, 6, dtype=z.dtype) + z).double()
    model.layers[0] = nn.Linear(6, 1).double()
    compare(model, batch, plain, [0.1, -2.0])


@pytest.mark.parametrize("criterion", [plain, weighted])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_rule(name, criterion, batch):
    torch.manual_seed(0)
    function, inputs = FUNCTIONS[name]
    model = Word(function, inputs).double()
    compare(model, batch, criterion, [0.1, -2.0])


class Transformer(nn.Module):
    """PyTorch's own layer between an embedding and a head for every token; the tokens 0 are padding."""

    def __init__(self, **options):
        super().__init__()
        self.words, self.first = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, **options)
        self.intent, self.slots = nn.Linear(6, 3), nn.Linear(6, 5)
        self.causal = torch.ones(6, 6).triu(1).bool()

    def forward(self, tokens):
        x = self.first(self.words(tokens))
        padding, first = tokens == 0, self.layer.self_attn.batch_first
        x = self.layer(x if first else x.transpose(0, 1), self.causal, None if padding[:, 0].any() else padding)
        x = x if first else x.transpose(0, 1)
        return self.intent(x.mean(1)), self.slots(x)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"norm_first": True}])
@pytest.mark.parametrize("padded", [False, True])
def test_pytorchs_transformer(first, options, padded):
    torch.manual_seed(0)
    model = Transformer(batch_first=first, **options).double()
    compare(model, sentences(6, padded), joint, [0.1, -1.0])


class TwoSequences(nn.Module):
    """What the words of one sequence find in another one, and how they look at it."""

    def __init__(self, need, mask):
        super().__init__()
        self.first, self.last, self.need = nn.Linear(6, 6), nn.Linear(6, 3), need
        self.self_attn, self.other, self.mask = nn.MultiheadAttention(6, 2), torch.randn(5, 8, 6), mask

    def forward(self, x):
        x = self.first(x.expand(4, -1, -1) * torch.linspace(0.5, 2, 4, dtype=x.dtype)[:, None, None])
        o, weights = self.self_attn(x, self.other, self.other, need_weights=self.need, attn_mask=self.mask)
        return self.last(o if weights is None else o + weights.transpose(0, 1)[..., :1]).transpose(0, 1)


@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("mask", [None, (4, 5), (16, 4, 5)])
def test_pytorchs_attention_of_two_sequences(need, mask, batch):
    torch.manual_seed(0)
    model = TwoSequences(need, None if mask is None else torch.randn(mask).double()).double()
    model.other = model.other.double()
    compare(model, batch, plain, [0.1, -2.0])


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z + z.sort(-1).values,  # for which there is no rule
        lambda z: torch.add(z, other=z),
        lambda z: z[:, torch.tensor([1, 0, 2, 3])],
        lambda z: z.sum(-1, dtype=torch.float64)[..., None] * z,
        lambda z: F.relu(z * 2, inplace=True),
        lambda z: F.linear(z, z[0].mT @ z[0]),
        lambda z: z + F.softmax(z, -1, dtype=torch.float64),
        lambda z: z * (z @ z[0, 0])[..., None],
    ],
)
def test_what_no_rule_was_written_for_is_left_to_vmap(function, batch):
    torch.manual_seed(0)
    compare(Word(function).double(), batch, plain, [0.1, -2.0], without=["layers.0"])


def test_a_result_that_was_written_into_is_not_used(batch):
    torch.manual_seed(0)
    model = Word(torch.tanh).double()

    def criterion(outputs, targets):
        loss = F.cross_entropy(outputs.flatten(0, 1).sin(), targets.repeat_interleave(4))
        outputs.mul_(2)
        return loss

    parameters = dict(model.named_parameters())
    queries = LossQueries(model, criterion, parameters, "structured")
    queries.start(*batch, seed=0)
    queries.coordinates("layers.0.weight", torch.arange(5), [0.1])
    assert queries.evaluation.recording.layers_seen[model.layers[0]].points is None


def test_only_what_moves_is_run(monkeypatch):
    """One head of the attention, one hidden unit of the feed-forward part, until a linear layer comes."""
    model, seen = encoder(False), []
    kept = Step.made

    def made(self, values, of, **changed):
        seen.append((getattr(self.call.function, "__name__", ""), tuple(values.shape[1:])))
        return kept(self, values, of, **changed)

    monkeypatch.setattr(Step, "made", made)
    queries = LossQueries(model, joint, dict(model.named_parameters()), "structured")
    queries.start(*sentences(6, False), seed=0)
    for name in ("query", "key", "value", "up"):
        seen.clear()
        queries.coordinates(f"blocks.0.{name}.weight", torch.arange(3), [0.1])
        parts = dict(seen)
        if name == "up":
            assert parts["gelu"] == (4, 6, 1)
        else:
            assert parts["matmul"] == (4, 1, 6, 4) and parts["flatten"] == (4, 6, 4)
            assert ("softmax" in parts) == (name != "value")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_changes_nothing_changes_nothing(dtype):
    """A tie is a tie to the last bit: words that do not occur, hidden units behind no weight."""
    model = encoder(False).to(dtype)
    with torch.no_grad():
        model.blocks[0].down.weight[:, 5] = 0
    tokens, targets = sentences(6, True)
    tokens[tokens == 7] = 8
    queries = LossQueries(model, joint, dict(model.named_parameters()), "structured")
    loss = queries.start(tokens, targets, seed=0)[1]
    still = queries.coordinates("words.weight", torch.arange(7 * 8, 8 * 8), [0.1, 1.0])
    assert (still == loss).all()
    some = queries.coordinates("blocks.0.up.weight", torch.tensor([1, 39, 40, 41, 47, 48]), [0.1])[0]
    assert (some[2:5] == loss).all() and (some[[0, 1, 5]] != loss).all()


def along(model, batch, names, low_rank=False, kept=1.0, criterion=joint):
    """Losses along directions of some parameters, against the loop; which `directional` answered."""
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(tuple(names))}
    generator = torch.Generator().manual_seed(5)
    index = {name: range(p.numel()) for name, p in parameters.items()}
    if kept < 1:
        masks = {name: torch.rand(p.numel(), generator=generator) < kept for name, p in parameters.items()}
        index = {name: mask.nonzero().flatten() for name, mask in masks.items() if mask.any()}
    parameters = {name: parameters[name] for name in index}
    if low_rank:
        directions = LowRank(5, list(parameters.values()), list(index.values()), 2, generator)
    else:
        directions = torch.randn(5, sum(map(len, index.values())), generator=generator)
    queries, loop = (LossQueries(model, criterion, parameters, mode) for mode in ("structured", "loop"))
    for one in (queries, loop):
        one.start(*batch, seed=3)
    mine, theirs = (q.directions(index, directions, [0.1, -0.2, 1.0]) for q in (queries, loop))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert len(theirs.unique()) == theirs.numel()
    return queries.evaluation.recording.along[2]


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("low_rank, kept", [(False, 1.0), (False, 0.1), (True, 1.0), (True, 0.5)])
@pytest.mark.parametrize("names", [["blocks", "slots.0", "intent.0"], ["blocks.1.up", "slots"], ["blocks.0.output"]])
def test_directions_of_the_encoder(tensors, low_rank, kept, names):
    model = encoder(tensors, dropout=0.2, focus=[(-1, 2.0), (0, 0.5)]).double()
    assert along(model, sentences(6, True), names, low_rank, kept).program is not None


def test_results_are_dropped_after_their_last_use():
    """So long sentences fit into a memory that would not hold all results of one point."""
    directional = along(encoder(True).double(), sentences(17, True), ["blocks", "slots.0"])
    assert directional.program.bytes < directional.recording.bytes / 8


def test_directions_of_embeddings_too():
    """There is no rule for a table of its own at each point: vmap replays, where a layer has factors."""
    names = ["words", "blocks.1.up"]
    assert along(encoder(False).double(), sentences(6, True), names, low_rank=True).program is None


def test_directions_through_what_is_called_between():
    """Two dense layers that nothing but rules connects; of the second the input stands still."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x):
            gate = self.b(x).softmax(-1)
            return self.c(self.a(x).tanh() * gate + gate.mean(1, keepdim=True))

    def last(outputs, targets):
        return F.cross_entropy(outputs[:, -1], targets)

    batch = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(5) % 3
    for names in (["a", "b"], ["b"], ["c", "b"], ["a", "b", "c"]):
        assert along(Net().double(), batch, names, criterion=last).program is not None


def test_a_part_is_put_and_picked():
    rest = torch.arange(24.0).view(2, 3, 4)
    part = Part(torch.full((2, 2, 2, 4), -1.0), -2, torch.tensor([[0, 2], [1, 2]]), rest)
    whole = part.whole()
    assert (whole[0, :, [0, 2]] == -1).all() and (whole[1, :, [1, 2]] == -1).all()
    assert torch.equal(whole[0, :, 1], rest[:, 1]) and torch.equal(whole[1, :, 0], rest[:, 0])
    assert torch.equal(part.pick(rest)[1], rest[:, [1, 2]]) and part.pick(rest[:, :1]).shape == (2, 1, 4)


def test_points_know_the_loss_where_nothing_moved():
    model = encoder(True).double()
    queries = LossQueries(model, joint, dict(model.named_parameters()), "structured")
    loss = queries.start(*sentences(6, True), seed=0)[1]
    recording = queries.evaluation.recorded()
    points = Points(recording, recording.call_of(model.blocks[1].key))
    torch.testing.assert_close(points.base, loss[None])
    torch.testing.assert_close(points.moved(points.start.expand(5, -1, -1, -1)), loss.expand(5))
