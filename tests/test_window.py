"""The tagger without attention: what it sees, what it does not, and its slopes from losses."""

import pytest
import torch
from torch.nn.functional import gelu

from zo_tutorial import ZO_SCD_mask
from zo_tutorial.experiments.tasks import JointLoss
from zo_tutorial.models import Window

SIZES = {"words": 11, "intents": 3, "slots": 5, "width": 4}


def made(seed: int = 0, **changes) -> Window:
    """In double precision, with last layers away from zero."""
    draws = torch.Generator().manual_seed(seed)
    net = Window(**SIZES | changes, generator=draws).double()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=draws)
    return net


def sentences() -> torch.Tensor:
    """(4, 6) tokens; the last two sentences are padded."""
    tokens = torch.randint(1, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    tokens[2, 4:] = tokens[3, 1:] = 0
    return tokens


@pytest.mark.parametrize("reach", [0, 1, 2])
@pytest.mark.parametrize("hidden", [0, 3])
def test_a_tag_is_read_off_its_neighbours_and_the_intent_off_the_mean(reach, hidden):
    net, tokens = made(reach=reach, hidden=hidden), sentences()

    def answer(head, x):
        return head[2](gelu(head[0](x))) if hidden else head(x)

    intents, tags = net(tokens)
    for b, sentence in enumerate(tokens):
        words = [net.words.weight[token] for token in sentence if token]
        torch.testing.assert_close(intents[b], answer(net.intent, sum(words) / len(words)))
        for place in range(len(words)):
            seen = [
                words[at] if 0 <= at < len(words) else torch.zeros(4, dtype=torch.float64)
                for at in range(place - reach, place + reach + 1)
            ]
            near = torch.stack(seen, dim=-1).flatten()  # an entry of all words, then the next entry
            torch.testing.assert_close(tags[b, place], answer(net.slots, near))


def test_padding_changes_nothing_and_an_empty_sentence_has_an_answer():
    net, tokens = made(), sentences()
    longer = torch.cat([tokens, torch.zeros(4, 3, dtype=torch.long)], 1)
    for short, long in zip(net(tokens), net(longer), strict=True):
        torch.testing.assert_close(short, long[:, :6] if long.ndim == 3 else long)
    intents, tags = net(torch.zeros(1, 6, dtype=torch.long))
    assert intents.isfinite().all() and tags.isfinite().all()


def test_it_starts_without_an_opinion_and_its_words_stay():
    net = Window(**SIZES, hidden=6, generator=torch.Generator().manual_seed(0))
    again = Window(**SIZES, hidden=6, generator=torch.Generator().manual_seed(0))
    assert all(a.equal(b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not any(logits.any() for logits in net(sentences()))
    assert not net.words.weight.requires_grad
    assert sum(p.numel() for p in made().parameters() if p.requires_grad) == 5 * 4 * 5 + 5 + 4 * 3 + 3


@pytest.mark.parametrize("hidden", [0, 7])
def test_its_slopes_from_losses_are_those_of_autograd(hidden):
    net, tokens = made(hidden=hidden), sentences()
    tags = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(2)).masked_fill(tokens == 0, -100)
    targets = (torch.tensor([0, 2, 1, 2]), tags)
    optimizer = ZO_SCD_mask(net, JointLoss(), None, grad_estimator="esti", grad_sparsity=0, h_smooth=1e-4)
    optimizer.estimate(tokens, targets)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert optimizer.trained.keys() == trained.keys() and "loop" not in optimizer.report()
    exact = torch.autograd.grad(JointLoss()(net(tokens), targets), list(trained.values()))
    for parameter, slope in zip(trained.values(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-5, atol=1e-7)
