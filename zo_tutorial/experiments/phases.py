"""The optimisers of a config with their schedulers, and the steps that each takes part in."""

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.first_order import FirstOrder
from zo_tutorial.experiments.forward_mode import ForwardMode
from zo_tutorial.experiments.schema import FO, SCD, SGD, Config, Forward
from zo_tutorial.optimizer import ZO_SCD_mask, ZO_SGD_mask
from zo_tutorial.optimizer.base import ZerothOrderOptimizer
from zo_tutorial.selection import names_within, select_parameters
from zo_tutorial.workers import Workers

METHODS = {"FO": FirstOrder, "forward_mode": ForwardMode, "SGD": ZO_SGD_mask, "SCD": ZO_SCD_mask}


class Phase(NamedTuple):
    """An optimiser with its scheduler, and the steps that it takes part in: mix has one phase after the other, split
    two side by side."""

    optimizer: ZerothOrderOptimizer
    scheduler: lr_scheduler.LRScheduler
    steps: range


def generator_of(config: Config, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose, so that no draw depends on how often another one draws."""
    digest = hashlib.sha256(f"{config.training.seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


@contextmanager
def blame(config: Config, group: str):
    """Name file and group in an error about values that are each allowed, but not together."""
    try:
        yield
    except ValueError as error:
        raise ExperimentError(f"{config.file}: {group}: {error}") from error


def phases_of(
    config: Config, model: nn.Module, criterion: Callable, masks: dict | None, epoch_steps: int, steps: int
) -> list[Phase]:
    """The optimiser and its scheduler; for mix and split two pairs, each scheduler over its own steps."""
    group, whole = config.optimizer, range(steps)
    parts: list[tuple[str, FO | Forward | SGD | SCD, dict | None, range]]
    if group.name == "mix":
        switch = min(steps, (group.switch_epoch - 1) * epoch_steps)
        parts = [("SGD", group.SGD, masks, range(switch)), ("SCD", group.SCD, masks, range(switch, steps))]
    elif group.name == "split":
        parts = []
        for purpose, part in (("heads", group.heads), ("body", group.body)):
            with blame(config, f"optimizer: {purpose}"):
                chosen = select_parameters(model, part.method.opt_layers_strs).trained
                parts.append((purpose, part.method, _within(model, chosen, masks, part.modules), whole))
    else:
        parts = [(group.name, group, masks, whole)]
    phases = []
    if group.name in ("FO", "forward_mode") and Workers.present():
        raise ExperimentError(f"{config.file}: optimizer: first-order steps have no queries to share: run one process")
    for purpose, method, kept, taken in parts:
        options = method.model_dump(exclude={"name"})
        with blame(config, "optimizer"):
            generator = generator_of(config, f"optimizer {purpose}")
            optimizer = METHODS[method.name](model, criterion, kept, **options, generator=generator)
        phases.append(Phase(optimizer, _scheduler(config, optimizer, epoch_steps, len(taken)), taken))
    if group.name == "split":
        both = phases[0].optimizer.trained.keys() & phases[1].optimizer.trained.keys()
        if both:
            raise ExperimentError(f"{config.file}: optimizer: heads and body both train {', '.join(sorted(both))}")
    return phases


def _within(
    model: nn.Module, chosen: dict[str, Tensor], masks: dict[str, Tensor] | None, modules: list[str]
) -> dict[str, Tensor]:
    """Masks of the chosen parameters with nothing kept outside of some modules.

    Raises ValueError for a name that is none of the model's.
    """
    inside, kept = names_within(model, modules), {}
    for name, parameter in chosen.items():
        whole = torch.full_like(parameter, name in inside, dtype=torch.bool)
        kept[name] = (masks or {}).get(name, whole) & whole
    return kept


def _scheduler(config: Config, optimizer, epoch_steps: int, steps: int) -> lr_scheduler.LRScheduler:
    """A scheduler that is stepped once a training step."""
    group = config.scheduler
    if group is None:
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if group.name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), group.eta_min)
    if group.name == "step":
        return lr_scheduler.StepLR(optimizer, group.step_size * epoch_steps, group.gamma)
    return lr_scheduler.ExponentialLR(optimizer, group.gamma ** (1 / epoch_steps))
