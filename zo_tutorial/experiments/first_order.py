"""The control of every zeroth-order run: back-propagation on the same layers, under the same masks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zo_tutorial.optimizer.base import ZerothOrderOptimizer, torch_rule


class FirstOrder(ZerothOrderOptimizer):
    """torch.optim.SGD or Adam on true gradients, where the ZO optimisers have estimates.

    All else is shared with them: which weights are trained, masked weights that never move, the state of a resumed
    run. A step counts one query. The arguments are those of `ZO_SCD_mask` by the same names.

    Raises:
        ValueError: adam with momentum or dampening, an unknown layer or parameter name, a mask that keeps nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable,
        masks: dict[str, Tensor] | None,
        lr: float,
        opt_layers_strs: str | list[str],
        momentum: float,
        weight_decay: float,
        dampening: float,
        adam: bool,
        beta_1: float,
        beta_2: float,
        eps: float,
        *,
        generator: torch.Generator,
    ):
        self.model, self.criterion = model, criterion
        rule = torch_rule(lr, adam, beta_1, beta_2, eps, momentum, weight_decay, dampening)
        super().__init__(model, criterion, masks, opt_layers_strs, rule, generator, "loop")

    def step(self, inputs, targets) -> tuple:
        """One update from a forward and a backward pass; returns (outputs, loss) before the update.

        Raises FloatingPointError where the loss is NaN or infinite.
        """
        self.loss_queries.steps += 1
        self.loss_queries.count += 1
        seed = torch.randint(2**62, (), generator=self.generator).item()
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)  # of dropout masks
            outputs = self.model(inputs)
            loss = self.criterion(outputs, targets)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.loss_queries.steps}")
        gradients = torch.autograd.grad(loss, list(self.trained.values()))
        self._update({name: g.flatten()[self.index[name]] for name, g in zip(self.trained, gradients, strict=True)})
        outputs = tuple(o.detach() for o in outputs) if isinstance(outputs, tuple) else outputs.detach()
        return outputs, loss.detach()
