"""What the benchmark times: networks, each with a batch and the weights that are trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from zo_tutorial.data import mnist
from zo_tutorial.models import MNIST_CNN, MNIST_FC, MNIST_TTM, Encoder
from zo_tutorial.pruning import apply_masks, grasp
from zo_tutorial.selection import chosen_positions, kept_positions, select_parameters

BATCH = 128  # images
WORDS, INTENTS, TAGS = 725, 22, 121  # of ATIS
SENTENCES, LENGTH = 32, 12
ASKED = 500  # coordinates of the encoder's body in a step


class Case(NamedTuple):
    """One network to be timed.

    masks, chosen: which weights are trained, as the optimizers take them: masks, and names of parameters.
    methods: which of the benchmark's methods; None: all but those that a case must ask for.
    """

    model: nn.Module
    masks: dict[str, Tensor] | None
    batch: tuple
    criterion: Callable = F.cross_entropy
    chosen: list[str] | None = None
    methods: tuple[str, ...] | None = None

    def kept(self) -> dict:
        """The trained positions of each parameter."""
        return kept_positions(select_parameters(self.model, parameters=self.parameters()).trained, self.masks)

    def parameters(self) -> list | None:
        return None if self.chosen is None else [self.model.get_parameter(name) for name in self.chosen]

    def thinned(self, count: int, generator: Generator) -> "Case":
        """The same with so many of its trained weights, at random."""
        return self._replace(masks=some_of(self.kept(), self.model, count, generator))


def some_of(index: dict, model: nn.Module, count: int, generator: Generator) -> dict[str, Tensor]:
    """Masks that keep so many of some positions, at random."""
    sizes = [len(positions) for positions in index.values()]
    sample = torch.zeros(sum(sizes), dtype=torch.bool)
    sample[torch.randperm(len(sample), generator=generator)[:count]] = True
    masks = {}
    for (name, positions), kept in zip(index.items(), sample.split(sizes), strict=True):
        masks[name] = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
        masks[name].view(-1)[chosen_positions(positions, kept).cpu()] = True
    return masks


def cases_of_book(device: str) -> dict[str, Case]:
    """The networks of chapters 10 and 11; the weights come from a seed, the images are real, the sentences random.

    "FC all" trains all weights. "heads" are the encoder's last layers, two-sided, as its configs train them; "body" are
    `ASKED` of the weights behind its embeddings and in front of the heads, one-sided.
    """
    generator = Generator().manual_seed(0)
    split = mnist.load("embedded").train
    balanced = mnist.class_balanced(split, 25, generator)
    batch = split.images[:BATCH].to(device), split.labels[:BATCH].to(device)
    whole, dense = MNIST_FC(generator=generator).to(device), MNIST_FC(generator=generator).to(device)
    masks = grasp(dense, F.cross_entropy, balanced.images.to(device), balanced.labels.to(device), 0.95)
    apply_masks(dense, masks)
    cases = {
        "FC": Case(dense, masks, batch),
        "FC all": Case(whole, None, batch, methods=("esti",)),
        "TTM": Case(MNIST_TTM(generator=generator).to(device), None, batch),
        "CNN": Case(MNIST_CNN(generator=generator).to(device), None, batch),
    }
    encoder = Encoder(WORDS, INTENTS, TAGS, d_model=128, layers=2, focus=((-1, 2.0), (1, 2.0), (-2, 1.0), (0, 0.0)))
    names = [name for name, _ in encoder.named_parameters() if "norm" not in name]
    heads = [name for name in names if name.startswith(("intent", "slots.3"))]
    body = [name for name in names if name.startswith(("blocks", "slots.0"))]
    tokens = torch.randint(1, WORDS, (SENTENCES, LENGTH), generator=generator)
    words = torch.randint(5, LENGTH + 1, (SENTENCES, 1), generator=generator)
    padding = torch.arange(LENGTH) >= words
    tags = torch.randint(TAGS, tokens.shape, generator=generator).masked_fill(padding, -100)
    intents = torch.randint(INTENTS, (SENTENCES,), generator=generator)
    sentences = tokens.masked_fill(padding, 0).to(device), (intents.to(device), tags.to(device))
    encoder.to(device)
    first = {name: torch.ones_like(encoder.get_parameter(name), dtype=torch.bool) for name in heads}
    first["intent.0.weight"] = torch.rand(128, 128, generator=generator) < 0.05  # as GraSP leaves it
    cases["heads"] = Case(encoder, first, sentences, joint_loss, heads, ("esti",))
    cases["body"] = Case(encoder, None, sentences, joint_loss, body, ("one-sided",)).thinned(ASKED, generator)
    return cases


def joint_loss(outputs: tuple, targets: tuple) -> Tensor:
    """Cross-entropy of the intents plus that of the tags."""
    (intents, tags), (intent_targets, tag_targets) = outputs, targets
    return F.cross_entropy(intents, intent_targets) + F.cross_entropy(tags.flatten(0, 1), tag_targets.flatten())


class Sequence(nn.Module):
    """A layer over a sequence (B, L, 64), and a linear layer on what it makes of it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(16, 64), layer, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h: Any = self.layer(self.embed(x))
        return self.head((h[0] if isinstance(h, tuple) else h).mean(1))


class Intents(nn.Module):
    """The encoder of chapter 11 at full size, dense, without its tags."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder(WORDS, 26, 120, d_model=768, heads=12, d_hidden=3072)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens)[0]


def other_cases(device: str) -> dict[str, Case]:
    """Models of other kinds on random inputs, all their weights trained. Two of them come from torchvision.

    "encoder" has 15 million weights, its embeddings included, and gets 8 sentences.
    """
    import torchvision

    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    models = {
        "resnet18": torchvision.models.resnet18(num_classes=10),
        "mobilenet": torchvision.models.mobilenet_v3_small(num_classes=10),
        "transformer": Sequence(nn.TransformerEncoder(block, 2, enable_nested_tensor=False)),
        "LSTM": Sequence(nn.LSTM(64, 64, batch_first=True)),
        "encoder": Intents(),
    }
    images, words, tokens = torch.randn(8, 3, 64, 64), torch.randn(32, 20, 16), torch.randint(1, WORDS, (8, 16))
    cases = {}
    for (name, model), x in zip(models.items(), (images, images, words, words, tokens), strict=True):
        batch = x.to(device), torch.randint(10, (len(x),)).to(device)
        chosen = [name for name, _ in model.named_parameters()]
        cases[name] = Case(model.to(device), None, batch, chosen=chosen, methods=("SGD", "low rank", "esti"))
    return cases
