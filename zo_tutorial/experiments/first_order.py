"""The control of every zeroth-order run: back-propagation on the same layers, under the same masks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zo_tutorial.optimizer.base import ZerothOrderOptimizer, torch_rule
from zo_tutorial.queries import call
from zo_tutorial.randomness import seeded


class FirstOrder(ZerothOrderOptimizer):
    """torch.optim.SGD or Adam on true gradients, where the ZO optimisers have estimates.

    All else is shared with them: which weights are trained, masked weights that never move, the state of a resumed
    run. A step counts one query. The arguments are those of `ZO_SCD_mask` by the same names.

    Args:
        checkpointing: keep what goes into each block of the model, and run the block again in the backward pass (Chen
            et al., 2016): more time, and what is inside is held for one block at a time. The result is the same.

    Raises:
        ValueError: adam with momentum or dampening, an unknown layer or parameter name, a mask that keeps nothing,
            checkpointing of a model without a list of blocks.
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
        checkpointing: bool = False,
        generator: torch.Generator,
    ):
        self.criterion = criterion
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)] if checkpointing else []
        self.blocks = list(dict.fromkeys(block for each in lists for block in each))
        if checkpointing and not self.blocks:
            raise ValueError("checkpointing: the model has no list of blocks (nn.ModuleList) to run again")
        rule = torch_rule(None, adam, (beta_1, beta_2), eps, momentum, weight_decay, dampening)
        super().__init__(model, criterion, masks, opt_layers_strs, None, rule, lr, generator, "loop")

    def _estimate_from(self, inputs, targets, closure) -> tuple:
        """The true gradient, from a forward and a backward pass; (outputs, loss) before the update.

        Raises FloatingPointError where the loss is NaN or infinite.
        """
        self.loss_queries.evaluation.steps += 1
        self.loss_queries.count += 1
        with seeded(self._seed()), torch.enable_grad(), checkpointed(self.blocks):
            outputs = call(self.model, inputs)
            loss = self.criterion(outputs, targets)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.loss_queries.steps}")
        gradients = torch.autograd.grad(loss, list(self.trained.values()))
        for (name, index), gradient in zip(self.index.items(), gradients, strict=True):
            self._add(name, gradient.flatten() if isinstance(index, range) else gradient.flatten()[index])
        outputs = tuple(o.detach() for o in outputs) if isinstance(outputs, tuple) else outputs.detach()
        return outputs, loss.detach()


@contextmanager
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Within it, what the blocks compute inside is not kept for the backward pass, but computed again there."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
