"""What an experiment is: the schema of a config.

A config has the groups model, pruning, optimizer, scheduler, training and data. The keys of a group are those of what
it builds: `optimizer` those of ZO_SGD_mask and ZO_SCD_mask, `model` those of the models.
"""

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from zo_tutorial.data.atis import NAMES
from zo_tutorial.directions import DIRECTIONS
from zo_tutorial.estimators import BASELINES, check_baseline
from zo_tutorial.experiments.fields import (
    ByModule,
    Group,
    In,
    LayerTypes,
    LearningRate,
    Number,
    Positive,
    QueryMode,
    Share,
)
from zo_tutorial.models import TTM_LAYERS
from zo_tutorial.optimizer.coordinates import GRAD_ESTIMATORS
from zo_tutorial.optimizer.directions import KINDS
from zo_tutorial.workers import SHARES


class FC(Group):
    """A dense net 784–hidden–10."""

    name: Literal["MNIST_FC"]
    hidden: int = Field(256, ge=1, description="hidden units")
    pool: Literal[1, 2, 4, 7, 14] = Field(
        1,
        exclude_if=lambda pool: pool == 1,  # so configs without it keep their hash, and their records
        description="an input is the mean of so many pixels squared",
    )


Factors = list[Annotated[int, Field(ge=1)]]


class TT(Group):
    """A net 784–hidden–10 with both weights in TT format."""

    name: Literal["MNIST_TT"]
    in_factors: Factors = Field([4, 7, 7, 4], description="factors of 784")
    hidden_factors: Factors = Field([4, 4, 4, 4], description="factors of the hidden width")
    out_factors: Factors = Field([1, 5, 2, 1], description="factors of 10")
    max_rank: int = Field(20, ge=1, description="bound for the ranks of both layers")
    bias: bool = Field(False, description="whether both layers have a bias")


class TTM(TT):
    """A net 784–hidden–10 with both weights in TTM format."""

    name: Literal["MNIST_TTM"]  # type: ignore[assignment]  # another tag, and so another group
    max_rank: int = Field(4, ge=1, description="bound for the ranks of both layers")
    layer: Annotated[str, In(TTM_LAYERS)] = Field("TensorizedLinear_module", description="…_tonn is the photonic form")


class CNN(Group):
    """Two or three convolutions and a linear layer."""

    name: Literal["MNIST_CNN"]
    widths: list[Annotated[int, Field(ge=1)]] = Field(
        [8, 12, 16], min_length=2, max_length=3, description="channels after each of two or three convolutions"
    )


class Encoder(Group):
    """A transformer encoder for the sentences of ATIS, dense or with linear layers in TTM or TT."""

    name: Literal["Encoder"]
    d_model: int = Field(64, ge=1, description="width, a multiple of the heads")
    heads: int = Field(4, ge=1, description="attention heads")
    d_hidden: int = Field(128, ge=1, description="width within the feed-forward part")
    layers: int = Field(2, ge=1, description="encoder blocks")
    dropout: float = Field(0.0, ge=0, lt=1, description="of embeddings, attention and the parts of a block")
    focus: list[Annotated[tuple[int, Number], Field(strict=False)]] | None = Field(
        None, description="[offset, slope] for each head: where it looks at the start; none: anywhere"
    )
    position_scale: Positive = Field(1.0, description="size of the position embeddings; that of the words is 1")
    branch_scale: Positive = Field(1.0, description="size of what a block adds at the start; 1: as large as its input")
    tensor_type: Literal["TensorTrainMatrix", "TensorTrain"] | None = Field(
        None, description="format of the linear layers but for the last ones of the heads; none: dense"
    )
    max_rank: int = Field(20, ge=1, description="bound for the ranks of these layers")
    factors: list[Factors] = Field([], description="factors of each width that such a layer has")
    word_factors: Factors | None = Field(
        None, description="factors that make at least as many words as there are: the embedding in TTM; none: dense"
    )
    embedding_rank: int = Field(30, ge=1, description="bound for the ranks of that embedding")

    def factors_of(self, width: int, count: int | None = None) -> list[int]:
        """The first factors of a width that are given, or the first so many. Raises ValueError where there are none."""
        for factors in self.factors:
            if prod(factors) == width and count in (None, len(factors)):
                return factors
        number = "" if count is None else f" by {count} factors"
        raise ValueError(f"factors: none of {self.factors} multiply to the width {width}{number}")


class Window(Group):
    """A tagger of a few words at a time, for the sentences of ATIS: a control without attention."""

    name: Literal["Window"]
    width: int = Field(128, ge=1, description="length of a word's vector, which is drawn and not trained")
    reach: int = Field(2, ge=0, description="neighbours on each side that a tag sees")
    hidden: int = Field(0, ge=0, description="hidden units of each of the two heads; 0: these are linear")


class Pruning(Group):
    """Which weights are trained: the others are set to zero before training and stay there. No group: all are kept."""

    method: Literal["grasp", "snip", "magnitude", "random"] = Field("grasp", description="how weights are scored")
    target_ratio: Share = Field(description="fraction of the weights that is removed")
    modules: list[str] | None = Field(
        None,
        min_length=1,
        exclude_if=lambda modules: modules is None,  # so configs without it keep their hash, and their records
        description="names of modules, such as blocks: only their weights are counted and removed; no key: all",
    )
    per_class: int = Field(10, ge=1, description="images of each class in the batch that grasp and snip score on")
    temperature: float = Field(200.0, gt=0, description="grasp divides the logits by it")
    shuffle: bool = Field(False, description="shuffle the mask within each parameter, as a control")


class FO(Group):
    """First-order training by back-propagation, the control: torch.optim.SGD, or Adam, on the same weights."""

    name: Literal["FO"] = "FO"
    lr: LearningRate = Field(0.001, description="learning rate")
    momentum: float = Field(0.0, ge=0, description="of torch.optim.SGD")
    weight_decay: float = Field(0.0, ge=0, description="of torch.optim.SGD and Adam")
    dampening: float = Field(0.0, description="of torch.optim.SGD")
    adam: bool = Field(True, description="torch.optim.Adam instead of torch.optim.SGD")
    beta_1: Share = Field(0.9, description="of torch.optim.Adam")
    beta_2: Share = Field(0.999, description="of torch.optim.Adam")
    eps: float = Field(1e-8, ge=0, description="of torch.optim.Adam")
    opt_layers_strs: LayerTypes = Field([])
    checkpointing: bool = Field(
        False,
        exclude_if=lambda checkpointing: not checkpointing,  # as above, for the hashes
        description="run the blocks of the encoder again in the backward pass instead of keeping what they computed",
    )


class Forward(Group):
    """Forward gradients: random directions as in SGD, with exact directional derivatives, weights and all seen."""

    name: Literal["forward_mode"] = "forward_mode"
    lr: LearningRate = Field(0.01, description="learning rate")
    n_sample: int = Field(20, ge=1, description="directions a step, one pass each")
    directions: Annotated[str, In(DIRECTIONS)] = Field("gaussian", description="distribution of the directions")
    opt_layers_strs: LayerTypes = Field([])
    adam: bool = Field(False, description="torch.optim.Adam instead of torch.optim.SGD")
    beta_1: Share = Field(0.9, description="of torch.optim.Adam")
    beta_2: Share = Field(0.98, description="of torch.optim.Adam")
    eps: float = Field(1e-6, ge=0, description="of torch.optim.Adam")


class ZerothOrder(Group):
    """What both zeroth-order optimisers take."""

    name: str
    beta_1: Share = Field(0.9, description="of torch.optim.Adam")
    beta_2: Share = Field(0.98, description="of torch.optim.Adam")
    eps: float = Field(1e-6, ge=0, description="of torch.optim.Adam")
    query_mode: QueryMode = "auto"
    share: Annotated[str, In(SHARES)] = Field(
        "queries",
        exclude_if=lambda share: share == "queries",
        description="under torchrun: whether workers ask a part of the queries each, or all of a part of the batch",
    )


class SGD(ZerothOrder):
    """Zeroth-order SGD, `ZO_SGD_mask`: random directions."""

    name: Literal["SGD"] = "SGD"
    lr: LearningRate = Field(0.01, description="learning rate")
    sigma: float = Field(0.1, gt=0, description="smoothing radius")
    n_sample: int = Field(20, ge=1, description="directions a step")
    signSGD: bool = Field(False, description="step along the sign of the estimate")
    layer_by_layer: bool = Field(False, description="perturb one layer at a time, with n_sample directions each")
    opt_layers_strs: LayerTypes = Field([])
    two_sided: bool = Field(True, description="2·n_sample + 1 queries a step, not n_sample + 1")
    baseline: Annotated[str, In(BASELINES)] = Field(
        "unperturbed",
        exclude_if=lambda baseline: baseline == "unperturbed",  # as above, for the hashes
        description="of one-sided differences; leave_one_out: the mean of the other losses",
    )
    directions: Annotated[str, In(KINDS)] = Field("gaussian", description="distribution of the directions")
    rank: int = Field(1, ge=1, exclude_if=lambda rank: rank == 1, description="of low_rank directions")
    adam: bool = Field(False, description="torch.optim.Adam instead of torch.optim.SGD")

    @model_validator(mode="after")
    def _baseline_fits(self):
        try:
            check_baseline(self.baseline, self.two_sided, self.n_sample)
        except ValueError as error:
            raise PydanticCustomError("baseline", "{error}", {"error": str(error)}) from None
        return self


class SCD(ZerothOrder):
    """Zeroth-order stochastic coordinate descent, `ZO_SCD_mask`."""

    name: Literal["SCD"] = "SCD"
    lr: LearningRate = Field(0.1, description="learning rate; sign and batch probe at this distance too")
    grad_sparsity: ByModule = Field(
        0.1, description="probability that a coordinate is skipped in a step, or one for each module by name"
    )
    h_smooth: float = Field(0.001, gt=0, description="finite-difference step of esti")
    grad_estimator: Annotated[str, In(GRAD_ESTIMATORS)] = Field("sign", description="what is asked for each coordinate")
    opt_layers_strs: LayerTypes = Field([])
    STP: bool = Field(True, description="stochastic three points in sign and batch, two-sided differences in esti")
    momentum: float = Field(0.0, ge=0, description="of torch.optim.SGD; not for sign")
    weight_decay: float = Field(0.0, ge=0, description="of torch.optim.SGD and Adam; not for sign")
    dampening: float = Field(0.0, description="of torch.optim.SGD; not for sign")
    adam: bool = Field(False, description="torch.optim.Adam instead of torch.optim.SGD; not for sign")


class Mix(Group):
    """SGD first, SCD from a given epoch on; each has a scheduler of its own over its epochs."""

    name: Literal["mix"]
    switch_epoch: int = Field(ge=2, description="the first epoch of SCD; a run that ends before it stays with SGD")
    SGD: SGD
    SCD: SCD


class Part(Group):
    """A method for the layers in some modules of the model."""

    modules: list[str] = Field(min_length=1, description="names of modules, such as blocks or slots.3")
    method: SGD | SCD = Field(discriminator="name")


class Split(Group):
    """Two methods at every step, each on modules of its own: queries of the last layers are so cheap that all their
    coordinates can be asked for, those of the depths are not. `heads` moves first."""

    name: Literal["split"]
    heads: Part
    body: Part


class Cosine(Group):
    """CosineAnnealingLR, from lr down to eta_min over the whole run, step by step."""

    name: Literal["cosine"]
    eta_min: LearningRate = Field(0.0, description="learning rate at the end")


class Step(Group):
    """StepLR: the learning rate falls by a factor once in some epochs."""

    name: Literal["step"]
    step_size: int = Field(ge=1, description="epochs between two falls")
    gamma: float = Field(0.1, gt=0, le=1, description="factor of each fall")


class Exponential(Group):
    """ExponentialLR: the learning rate falls by a factor an epoch, in equal parts at every step."""

    name: Literal["exponential"]
    gamma: float = Field(gt=0, le=1, description="factor an epoch")


class Training(Group):
    epochs: int = Field(ge=1, description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images a step")
    seed: int = Field(0, ge=0, description="of weights, pruning, shuffling and the optimiser's draws")
    shift: int = Field(
        0,
        ge=0,
        le=8,
        exclude_if=lambda shift: shift == 0,  # as above, for the hashes
        description="every training image is moved by up to so many pixels each way, anew in every epoch",
    )
    max_steps: int | None = Field(None, ge=1, description="the run ends after so many steps, whatever the epochs")


class Data(Group):
    source: Literal["auto", "full", "embedded"] = Field("auto", description="see `load` of `zo_tutorial.data`")
    seed: int = Field(0, ge=0, description="of the split; not training.seed, so that all runs share one test set")
    names: Annotated[str, In(NAMES)] = Field(
        "own",
        exclude_if=lambda names: names == "own",  # as above, for the hashes
        description="of words, tags and intents; full: synthetic sentences numbered as full ATIS is",
    )


class Config(Group):
    """One experiment."""

    model: FC | TTM | TT | CNN | Encoder | Window = Field(discriminator="name")
    pruning: Pruning | None = Field(None, description="no group: nothing is removed")
    optimizer: FO | Forward | SGD | SCD | Mix | Split = Field(discriminator="name")
    scheduler: Cosine | Step | Exponential | None = Field(None, discriminator="name", description="no group: lr stays")
    training: Training
    data: Data = Data()

    _file: Path = PrivateAttr(Path("config"))

    @property
    def file(self) -> Path:
        """The file that the config was read from."""
        return self._file

    @property
    def name(self) -> str:
        """The file's path below its last folder named configs, without .yml; elsewhere the file's name alone."""
        parts = self.file.resolve().with_suffix("").parts
        folders = [position for position, part in enumerate(parts[:-1]) if part == "configs"]
        return "/".join(parts[folders[-1] + 1 :]) if folders else parts[-1]

    @property
    def about(self) -> Literal["images", "sentences"]:
        """What the model is for."""
        return "sentences" if self.model.name in ("Encoder", "Window") else "images"

    def flat(self) -> dict:
        """All values by dotted key: {"optimizer.lr": 0.01, …}."""
        return _flat(self.model_dump())

    def hash(self) -> str:
        """sha256 of all values, as hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def _flat(values: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
