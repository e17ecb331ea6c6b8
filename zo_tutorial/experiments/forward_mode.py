"""Forward mode, between back-propagation and loss queries: exact directional derivatives, and no graph is kept."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zo_tutorial.directions import Directions
from zo_tutorial.optimizer.base import ZerothOrderOptimizer, torch_rule
from zo_tutorial.queries import Snapshot, call
from zo_tutorial.randomness import seeded
from zo_tutorial.substitution import slots_of, substituted


class ForwardMode(ZerothOrderOptimizer):
    """Forward gradients, ĝ = 1/n Σ_i (u_iᵀ∇L) u_i (Baydin et al., 2022; chapter 14).

    The estimate of `ZO_SGD_mask` without σ: u_iᵀ∇L is exact. A pass carries the derivative along u_i from number to
    number and keeps no graph. It took the time of three to five forward passes on an encoder of four blocks. Unlike a
    query it needs the network's weights and the inside of it. A step counts n queries, one a direction.

    Args:
        n_sample: number of directions n.
        directions: "gaussian", "rademacher" or "orthogonal".
        model, criterion, masks, lr, opt_layers_strs, adam, beta_1, beta_2, eps, generator: as for `ZO_SGD_mask`.

    Raises:
        ValueError: an unknown layer or parameter name, a mask that keeps nothing.
        FloatingPointError: in a step, where the loss is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable,
        masks: dict[str, Tensor] | None,
        lr: float,
        n_sample: int,
        directions: str,
        opt_layers_strs: str | list[str],
        adam: bool,
        beta_1: float,
        beta_2: float,
        eps: float,
        *,
        generator: torch.Generator,
    ):
        self.module, self.criterion = model, criterion
        self.n_sample, self.directions = n_sample, directions
        rule = torch_rule(None, adam, (beta_1, beta_2), eps)
        super().__init__(model, criterion, masks, opt_layers_strs, None, rule, lr, generator, "loop")

        with warnings.catch_warnings(), forward_ad.dual_level():
            warnings.simplefilter("ignore", FutureWarning)  # torch's first dual number warns of torch's own old parts
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))

    @torch.no_grad()
    def _estimate_from(self, inputs: Any, targets: Any, closure: Callable | None) -> tuple:
        self.loss_queries.evaluation.steps += 1
        index, seed = self.active(), self._seed()
        sizes = [len(kept) for kept in index.values()]
        u = Directions(self.n_sample, sum(sizes), self.directions, self.generator)
        before, after = Snapshot(self.module.modules()), None
        slopes = []
        for i in range(u.n):
            before.restore()  # buffers, such as running averages: each pass begins with the same
            pieces = dict(zip(index, u.rows(i, i + 1)[0].split(sizes), strict=True))
            answer, slope = self._pass(inputs, targets, pieces, seed)
            slopes.append(slope)
            if after is None:
                after, (outputs, loss) = Snapshot(self.module.modules()), answer
        if after is not None:
            after.restore()
        grad = u.combined(torch.stack(slopes)).div_(u.n)  # 1/n Σ_i (u_iᵀ∇L) u_i
        for name, piece in zip(index, grad.split(sizes), strict=True):
            self._add(name, piece)
        return outputs, loss

    def _pass(self, inputs: Any, targets: Any, direction: dict[str, Tensor], seed: int) -> tuple:
        """(outputs, loss) and uᵀ∇L for the pieces of u, by parameter."""
        self.loss_queries.count += 1
        with forward_ad.dual_level(), seeded(seed):
            pairs = []
            for name, piece in direction.items():
                parameter, kept = self.trained[name], self.index[name]
                tangent = piece.to(parameter)
                if not isinstance(kept, range):
                    tangent = tangent.new_zeros(parameter.numel()).index_copy_(0, kept, tangent)
                tangent = tangent.view_as(parameter)
                pairs.append((slots_of(self.module, parameter), forward_ad.make_dual(parameter, tangent)))
            with substituted(pairs):
                outputs = call(self.module, inputs)
                loss, slope = forward_ad.unpack_dual(self.criterion(outputs, targets))
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at step {self.loss_queries.evaluation.steps}")
            parts = outputs if isinstance(outputs, tuple) else (outputs,)
            parts = tuple(forward_ad.unpack_dual(part).primal for part in parts)
            return (parts if isinstance(outputs, tuple) else parts[0], loss), slope
