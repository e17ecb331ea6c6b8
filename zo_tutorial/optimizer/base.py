"""What both optimisers share: which coordinates they train, the loss queries they ask, the update that torch makes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zo_tutorial.queries import LossQueries
from zo_tutorial.selection import kept_positions, select_parameters


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """A torch optimiser whose gradients come from loss queries.

    A subclass estimates ĝ and hands it to `_update`, which writes it into `.grad` and lets `rule`, an optimiser of
    torch.optim, move the weights. The rule shares its parameter groups and state with this object, so learning-rate
    schedulers and checkpoints see one optimiser.

    Attributes:
        trained: the trained parameters by name, in the order of `model.named_parameters()`; a mask that keeps nothing
            of a parameter leaves it out.
        index: for each of them the flat positions its mask keeps, ascending; d of them in all.
        layers: the names of the trained parameters of each layer.
        generator: the source of all randomness of a step: directions, skipped coordinates, dropout masks.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable,
        masks: dict[str, Tensor] | None,
        opt_layers_strs: str | list[str],
        rule: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        generator: torch.Generator | None,
        query_mode: str,
        memory: float = 512,
    ):
        selected, layers = select_parameters(model, opt_layers_strs)
        self.index = {name: kept for name, kept in kept_positions(model, selected, masks).items() if len(kept)}
        self.trained = {name: selected[name] for name in self.index}
        kept = {layer: [name for name in names if name in self.index] for layer, names in layers.items()}
        self.layers = {layer: names for layer, names in kept.items() if names}
        if generator is None:
            generator = torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        self.generator = generator
        self.loss_queries = LossQueries(model, criterion, self.trained, query_mode, memory)
        self.rule = rule(list(self.trained.values()))
        super().__init__(self.rule.param_groups, self.rule.defaults)
        self._share_with_rule()

    @property
    def queries(self) -> int:
        """Loss queries asked so far."""
        return self.loss_queries.count

    @property
    def lr(self) -> float:
        """The current learning rate, as a scheduler left it."""
        return self.param_groups[0]["lr"]

    def _start(self, inputs, targets) -> tuple:
        """Ask for the unperturbed loss, with a fresh seed for the step's randomness."""
        seed = torch.randint(2**62, (), generator=self.generator, device=self.generator.device).item()
        return self.loss_queries.start(inputs, targets, seed)

    @torch.no_grad()
    def _update(self, estimate: dict[str, Tensor]) -> None:
        """Write the estimate, one value a kept coordinate, into `.grad`; step; put back what the masks fix."""
        fixed = {}
        for name, parameter in self.trained.items():
            grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            grad.view(-1)[self.index[name]] = estimate[name].to(grad)
            parameter.grad = grad
            if len(self.index[name]) < parameter.numel():
                fixed[name] = parameter.clone()
        self.rule.step()
        for name, before in fixed.items():
            kept = torch.zeros_like(before, dtype=torch.bool, memory_format=torch.contiguous_format)
            kept.view(-1)[self.index[name]] = True
            self.trained[name].copy_(torch.where(kept, self.trained[name], before))

    def _share_with_rule(self) -> None:
        self.rule.param_groups, self.rule.state = self.param_groups, self.state

    def state_dict(self) -> dict:
        """All that a resumed run needs beside the model: state of the update rule, generator, counters."""
        return super().state_dict() | {
            "generator": self.generator.get_state(),
            "queries": self.loss_queries.count,
            "steps": self.loss_queries.steps,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._share_with_rule()
        self.generator.set_state(state_dict["generator"].cpu())
        self.loss_queries.count = state_dict["queries"]
        self.loss_queries.steps = state_dict["steps"]


def torch_rule(
    lr: float,
    adam: bool,
    beta_1: float,
    beta_2: float,
    eps: float,
    momentum: float = 0,
    weight_decay: float = 0,
    dampening: float = 0,
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """What makes torch.optim.Adam, or torch.optim.SGD, from the parameters to train.

    Raises ValueError for adam with momentum or dampening.
    """
    if not adam:
        options = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        return lambda parameters: torch.optim.SGD(parameters, lr, **options)
    if momentum or dampening:
        raise ValueError("adam has moments of its own: leave momentum and dampening at 0")
    options = {"betas": (beta_1, beta_2), "eps": eps, "weight_decay": weight_decay}
    return lambda parameters: torch.optim.Adam(parameters, lr, **options)
