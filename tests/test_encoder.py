"""The encoder against PyTorch's own transformer layer, and what it promises of padding, sizes and torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.nn.functional import cross_entropy

from zo_tutorial import Encoder, TensorizedLinear_module

SIZES = {"words": 11, "intents": 3, "slots": 5, "d_model": 8, "heads": 2, "d_hidden": 12, "positions": 7}


def small(**changes) -> Encoder:
    return Encoder(**SIZES | changes, generator=torch.Generator().manual_seed(0)).double()


def sentences() -> torch.Tensor:
    """(4, 6) tokens; the last two sentences are padded."""
    tokens = torch.randint(1, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    tokens[2, 4:] = tokens[3, 1:] = 0
    return tokens


def test_the_dense_net_of_the_reference_sizes_has_16_479_119_parameters():
    with torch.device("meta"):
        net = Encoder(800, 22, 121, d_model=768, heads=12, d_hidden=3072, positions=512)
    assert sum(p.numel() for p in net.parameters()) == 16_479_119


def test_a_block_is_pytorchs_encoder_layer():
    net, tokens = small(), sentences()
    ours = net.blocks[0]
    theirs = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True).double()
    state = ours.state_dict()
    for kind in ("weight", "bias"):
        parts = [state[f"{name}.{kind}"] for name in ("query", "key", "value")]
        renamed = {
            f"self_attn.in_proj_{kind}": torch.cat(parts),
            f"self_attn.out_proj.{kind}": state[f"output.{kind}"],
            f"linear1.{kind}": state[f"up.{kind}"],
            f"linear2.{kind}": state[f"down.{kind}"],
            f"norm1.{kind}": state[f"norm1.{kind}"],
            f"norm2.{kind}": state[f"norm2.{kind}"],
        }
        theirs.load_state_dict(renamed, strict=False)
    x, padded = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), tokens == 0
    expected = theirs(x, src_key_padding_mask=padded)
    torch.testing.assert_close(ours(x, net.mask(tokens)), expected)
    focused = small(focus=[(-1, 2.0), (0, 0.5)])
    mask = focused.mask(tokens)  # (4, heads, 6, 6)
    assert mask[0, 0, 3].tolist() == [-4, -2, 0, -2, -4, -6] and mask[3, 1, 0].tolist() == [0] + 5 * [-torch.inf]
    torch.testing.assert_close(ours(x, mask), theirs(x, src_mask=mask.flatten(0, 1)))


def test_a_focus_has_a_pair_for_each_head():
    with pytest.raises(ValueError, match="1 pairs of offset and slope for 2 heads"):
        small(focus=[(0, 1.0)])


@pytest.mark.parametrize("linear", [None, lambda n, m: TensorizedLinear_module(n, m, shape=[[2, n // 2], [2, m // 2]])])
def test_scales_of_the_start(linear):
    def net(**scales):
        torch.manual_seed(0)  # of tensor layers
        return small(linear=linear, **scales)

    plain, scaled = net(), net(position_scale=0.3, branch_scale=0.1)
    torch.testing.assert_close(scaled.positions.weight, 0.3 * plain.positions.weight)
    matrix = (lambda layer: layer.weight) if linear is None else (lambda layer: layer.to_matrix())
    for part, factor in (("output", 0.1), ("down", 0.1), ("up", 1), ("value", 1)):
        ours, theirs = (matrix(getattr(one.blocks[1], part)) for one in (scaled, plain))
        torch.testing.assert_close(ours, factor * theirs)


def test_padding_changes_nothing():
    net, tokens = small(), sentences()
    intent, slots = net(tokens)
    alone_intent, alone_slots = net(tokens[2:3, :4])
    torch.testing.assert_close(intent[2:3], alone_intent)
    torch.testing.assert_close(slots[2:3, :4], alone_slots)


@pytest.mark.parametrize("focus", [None, [(-1, 2.0), (0, 0.5)]])
@pytest.mark.parametrize("empty", [[0], [1, 3], [0, 1, 2, 3]])
def test_a_row_of_padding_is_finite_and_changes_no_other(focus, empty):
    net, tokens = small(focus=focus), sentences()
    others = [row for row in range(4) if row not in empty]
    before, mask = net(tokens), net.mask(tokens)
    tokens[empty] = 0
    after = net(tokens)
    for ours, theirs in zip(after, before, strict=True):
        assert ours.isfinite().all() and torch.equal(ours[others], theirs[others])
    assert torch.equal(net.mask(tokens)[others], mask[others])
    sum(part.sum() for part in after).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    theta = {name: torch.stack([p.detach(), p.detach()]) for name, p in net.named_parameters()}
    many = vmap(lambda parameters: functional_call(net, parameters, (tokens,))[0])(theta)
    torch.testing.assert_close(many, torch.stack([after[0], after[0]]))


def test_order_and_segments_matter():
    net, tokens = small(), sentences()[:1]
    intent, _ = net(tokens)
    assert not torch.allclose(intent, net(tokens.flip(1))[0])
    assert not torch.allclose(intent, net(tokens, torch.ones_like(tokens))[0])
    torch.testing.assert_close(intent, net(tokens, torch.zeros_like(tokens))[0])


def test_a_tensorised_net_is_its_dense_twin():
    factors = {8: [2, 4], 12: [3, 4]}

    def ttm(n, m):
        return TensorizedLinear_module(n, m, shape=[factors[n], factors[m]], max_rank=2, generator=generator)

    generator = torch.Generator().manual_seed(0)
    net, twin = small(linear=ttm), small()
    state = net.state_dict()
    for name, layer in net.named_modules():
        if isinstance(layer, TensorizedLinear_module):
            state[f"{name}.weight"] = layer.to_matrix()
    twin.load_state_dict({name: value for name, value in state.items() if ".cores." not in name})
    for ours, theirs in zip(net(sentences()), twin(sentences()), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_many_points_in_one_call_and_forward_mode(dropout):
    net, tokens = small(dropout=dropout).eval(), sentences()
    theta = {name: p.detach() for name, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    u = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in theta.items()}

    def loss(t):
        intent, _ = functional_call(net, {name: theta[name] + t * u[name] for name in theta}, (tokens,))
        return cross_entropy(intent, torch.tensor([0, 1, 2, 0]))

    steps = torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(vmap(loss)(steps), torch.stack([loss(t) for t in steps]))
    value, slope = jvp(loss, (steps[1],), (torch.ones_like(steps[1]),))
    torch.testing.assert_close(value, loss(steps[1]))
    torch.testing.assert_close(slope, (loss(steps[1] + 1e-5) - loss(steps[1] - 1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


def test_the_generator_fixes_the_weights():
    first, second = small(), small()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_width_that_the_heads_do_not_divide():
    with pytest.raises(ValueError, match="d_model = 8 is no multiple of heads = 3"):
        small(heads=3)
