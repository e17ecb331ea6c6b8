"""The two problems that a config may pose, images or sentences: what to load, to build, to minimise and to measure.

Both have the same face: `train`, `validation` and `test`, parts with a first tensor to feed and others to aim at;
`batches`, `batch`, `model`, `loss`, `sample`; `measure`, which returns metrics by name; `score`, by which epochs are
compared; `results`, what a record says of them, and `outcome`, the same in words.
"""

from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from zo_tutorial import models
from zo_tutorial.data import atis, mnist
from zo_tutorial.experiments import schema
from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.metrics import joint_metrics
from zo_tutorial.experiments.schema import Config
from zo_tutorial.models import Encoder, Window
from zo_tutorial.tensor import TensorizedEmbedding_module, TensorizedLinear_module

EVALUATION_BATCH = 1000  # images or sentences
SORTED = 16  # batches


def task_of(config: Config, root: str | Path | None, device: torch.device) -> "Task":
    """The problem of a config, with its data loaded. Raises DataError."""
    return (Sentences if config.about == "sentences" else Digits)(config, root, device)


class Digits:
    """MNIST: the accuracy of one answer to each image."""

    loss = staticmethod(cross_entropy)

    def __init__(self, config: Config, root: str | Path | None, device: torch.device):
        if config.data.names != "own":
            raise ExperimentError(f"{config.file}: data.names: images have none; leave it at own")
        data = mnist.load(config.data.source, root, config.data.seed)
        self.config, self.source, self.name = config, data.source, f"{data.source} MNIST"
        self.train, self.validation, self.test = (mnist.Split(*(t.to(device) for t in part)) for part in data[1:])

    def model(self, generator: Generator) -> nn.Module:
        options = self.config.model.model_dump(exclude={"name"})
        return getattr(models, self.config.model.name)(**options, generator=generator)

    def batches(self, size: int, generator: Generator) -> list[Tensor]:
        """The training images of one epoch, by their indices, in batches."""
        return list(torch.randperm(len(self.train.images), generator=generator).split(size))

    def batch(self, part: mnist.Split, index: Tensor, moving: Generator | None = None) -> tuple:
        """The images at `index`; with a generator each is moved by up to `training.shift` pixels."""
        images, shift = part.images[index], self.config.training.shift
        return mnist.shifted(images, shift, moving) if shift and moving else images, part.labels[index]

    def sample(self, per_class: int, generator: Generator) -> tuple:
        """Training images, so many of each class, for the scores of pruning."""
        return mnist.class_balanced(self.train, per_class, generator)

    @staticmethod
    def measure(model: nn.Module, part: mnist.Split) -> dict[str, float]:
        pairs = zip(part.images.split(EVALUATION_BATCH), part.labels.split(EVALUATION_BATCH), strict=True)
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
        return {"accuracy": right / len(part.labels)}

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["accuracy"]

    def results(self, validation: dict[str, float], test: dict[str, float]) -> dict:
        return {"val_accuracy": validation["accuracy"], "test_accuracy": test["accuracy"]}

    def outcome(self, results: dict) -> str:
        return f"test {results['test_accuracy']:.2%}, validation {results['val_accuracy']:.2%}"


class JointLoss:
    """Cross-entropy of the intents plus that of the tags, the mean over all words of the batch."""

    def __call__(self, outputs: tuple, targets: tuple) -> Tensor:
        (intents, tags), (intent_targets, tag_targets) = outputs, targets
        return cross_entropy(intents, intent_targets) + cross_entropy(tags.flatten(0, 1), tag_targets.flatten())

    def of_part(self, outputs: tuple, targets: tuple, whole: tuple) -> Tensor:
        """What some sentences add to the loss of a batch: for workers that share it."""
        (intents, tags), (intent_targets, tag_targets) = outputs, targets
        words = int((whole[1] != atis.IGNORED).sum())
        of_intents = cross_entropy(intents, intent_targets, reduction="sum") / len(whole[0])
        return of_intents + cross_entropy(tags.flatten(0, 1), tag_targets.flatten(), reduction="sum") / words


class Sentences:
    """ATIS: an intent for each sentence and a slot tag for each of its words."""

    loss = JointLoss()

    def __init__(self, config: Config, root: str | Path | None, device: torch.device):
        if config.training.shift:
            raise ExperimentError(f"{config.file}: training.shift: sentences cannot be moved; leave it at 0")
        self.data = atis.load(config.data.source, root, config.data.seed, config.data.names)
        self.config, self.source = config, self.data.source
        self.name = "full ATIS" if self.source == "full" else "synthetic sentences in the format of ATIS"
        parts = (self.data.train, self.data.validation, self.data.test)
        self.train, self.validation, self.test = (atis.Split(*(t.to(device) for t in part)) for part in parts)

    def model(self, generator: Generator) -> Encoder | Window:
        group, sizes = self.config.model, (len(self.data.words), len(self.data.intents), len(self.data.tags))
        if isinstance(group, schema.Window):
            return Window(*sizes, **group.model_dump(exclude={"name"}), generator=generator)
        assert isinstance(group, schema.Encoder)
        tensorised = {"name", "tensor_type", "max_rank", "factors", "word_factors", "embedding_rank"}
        options = group.model_dump(exclude=tensorised)
        if tensor_type := group.tensor_type:

            def linear(n: int, m: int) -> nn.Module:
                shape = [group.factors_of(n), group.factors_of(m)]
                return TensorizedLinear_module(n, m, True, shape, tensor_type, group.max_rank, generator=generator)

            options["linear"] = linear
        if word_factors := group.word_factors:

            def embedding(words: int, width: int) -> nn.Module:
                shape = [word_factors, group.factors_of(width, len(word_factors))]
                return TensorizedEmbedding_module(words, width, shape, group.embedding_rank, generator=generator)

            options["embedding"] = embedding
        return Encoder(*sizes, **options, positions=self.train.tokens.shape[1], generator=generator)

    def batches(self, size: int, generator: Generator) -> list[Tensor]:
        """The training sentences of one epoch, by their indices, in batches of like lengths, in random order.

        A batch is as long as its longest sentence, and padding costs as much as words: sorting by length within random
        portions of `SORTED` batches takes the padded size of an epoch of full ATIS from 2.0 to 1.1 times its words.
        """
        lengths, batches = (self.train.tokens != 0).sum(1).cpu(), []
        for portion in torch.randperm(len(lengths), generator=generator).split(SORTED * size):
            batches += portion[lengths[portion].argsort(stable=True)].split(size)
        return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]

    def batch(self, part: atis.Split, index: Tensor, moving: Generator | None = None) -> tuple:
        """The sentences at `index`, cut to the longest of them. They do not move."""
        tokens = part.tokens[index]
        length = int((tokens != 0).sum(1).max())
        return tokens[:, :length], (part.intents[index], part.slots[index, :length])

    def sample(self, per_class: int, generator: Generator) -> tuple:
        """Training sentences, at most so many of each intent, for the scores of pruning."""
        order = torch.randperm(len(self.train.intents), generator=generator).to(self.train.intents.device)
        rank = torch.zeros_like(order)  # how many of the same intent stand before
        for intent in self.train.intents.unique():
            here = (self.train.intents[order] == intent).nonzero().flatten()
            rank[here] = torch.arange(len(here), device=rank.device)
        return self.batch(self.train, order[rank < per_class])

    def measure(self, model: nn.Module, part: atis.Split) -> dict[str, float]:
        intents, tags = [], []
        for index in torch.arange(len(part.intents)).split(EVALUATION_BATCH):
            answers = model(part.tokens[index])
            intents.append(answers[0].argmax(1))
            tags.append(answers[1].argmax(2))
        return joint_metrics(torch.cat(intents), torch.cat(tags), part, self.data.tags)

    def baseline(self) -> dict[str, float]:
        """The metrics of always answering the commonest intent and tag of the training set, on the test set."""
        intent, tag = atis.majority(self.train)
        intents, tags = torch.full_like(self.test.intents, intent), torch.full_like(self.test.slots, tag)
        return joint_metrics(intents, tags, self.test, self.data.tags)

    def score(self, metrics: dict[str, float]) -> float:
        """The mean of intent accuracy and slot F1."""
        return (metrics["intent_accuracy"] + metrics["slot_f1"]) / 2

    def results(self, validation: dict[str, float], test: dict[str, float]) -> dict:
        return {"validation": validation, "test": test, "baseline": self.baseline()}

    def outcome(self, results: dict) -> str:
        """The test metrics, each with that of the majority answer beside it."""
        pairs = [f"{n} {v:.1%} (majority {results['baseline'][n]:.1%})" for n, v in results["test"].items()]
        return f"test on {self.name}: " + ", ".join(pairs)


Task = Digits | Sentences
