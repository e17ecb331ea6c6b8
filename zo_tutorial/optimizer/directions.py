"""ZO-SGD: descend along the average of directional differences (chapter 3)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zo_tutorial.estimators import DIRECTIONS, from_directions, random_directions
from zo_tutorial.optimizer.base import ZerothOrderOptimizer, torch_rule


class ZO_SGD_mask(ZerothOrderOptimizer):
    """Stochastic gradient descent on a random-direction estimate of the gradient (Nesterov and Spokoiny, 2017).

    Two-sided: ĝ = 1/n Σ_i (L(θ+σu_i) − L(θ−σu_i)) / 2σ · u_i, 2n+1 queries a step.
    One-sided: ĝ = 1/n Σ_i (L(θ+σu_i) − L(θ)) / σ · u_i, n+1 queries a step.
    With `layer_by_layer` each layer has its own n directions, drawn and evaluated while the others stand still:
    2n (one-sided n) queries a layer, and one. Chapter 2 derives the estimate, chapter 3 the optimiser.

    Args:
        model: a module with layers of the supported types. `requires_grad` is not looked at.
        criterion: a callable from (outputs, targets) to one number.
        masks: {parameter name: bool tensor, True = trained}; a name left out is all True; None trains everything in
            the chosen layers.
        lr: learning rate η; 0 is legal.
        sigma: smoothing radius σ.
        n_sample: number of directions n.
        signSGD: step along sign(ĝ).
        layer_by_layer: estimate the layers in turn, all around the same θ.
        opt_layers_strs: a layer type or a list of them: nn.Linear, nn.Conv2d, TensorizedLinear,
            TensorizedLinear_module, TensorizedLinear_module_tonn. None named: all of these.
        two_sided: difference of θ+σu and θ−σu, else of θ+σu and θ.
        directions: "gaussian", "rademacher" or "orthogonal".
        adam: use torch.optim.Adam, with `beta_1`, `beta_2`, `eps`, instead of torch.optim.SGD.
        generator: source of all randomness of a step, dropout included; seeded from torch's global one by default.
        query_mode, memory: how losses are evaluated, and in how many MB; see `LossQueries`.

    Raises:
        ValueError: an impossible value, an unknown layer or parameter name, a mask that keeps nothing.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ZO_SGD_mask(model, torch.nn.functional.cross_entropy, None, lr=0.1, n_sample=4)
        >>> outputs, loss = optimizer.step(torch.ones(5, 3), torch.zeros(5, dtype=torch.long))
        >>> optimizer.queries
        9
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable,
        masks: dict[str, Tensor] | None,
        lr: float = 0.01,
        sigma: float = 0.1,
        n_sample: int = 20,
        signSGD: bool = False,
        layer_by_layer: bool = False,
        opt_layers_strs: str | list[str] = [],  # noqa: B006 (never changed)
        *,
        two_sided: bool = True,
        directions: str = "gaussian",
        adam: bool = False,
        beta_1: float = 0.9,
        beta_2: float = 0.98,
        eps: float = 1e-06,
        generator: torch.Generator | None = None,
        query_mode: str = "auto",
        memory: float = 512,
    ):
        if not sigma > 0:
            raise ValueError(f"sigma must be above 0, not {sigma}")
        if not (isinstance(n_sample, int) and n_sample >= 1):
            raise ValueError(f"n_sample must be a whole number of at least 1, not {n_sample}")
        if directions not in DIRECTIONS:
            raise ValueError(f"directions {directions!r} are unknown; choose one of {', '.join(DIRECTIONS)}")
        self.sigma, self.n_sample, self.signSGD = sigma, n_sample, signSGD
        self.two_sided, self.directions, self.layer_by_layer = two_sided, directions, layer_by_layer
        rule = torch_rule(lr, adam, beta_1, beta_2, eps)
        super().__init__(model, criterion, masks, opt_layers_strs, rule, generator, query_mode, memory)

    def step(self, inputs, targets) -> tuple:
        """One update from 2n+1 (one-sided n+1) queries; layer by layer, the n for each layer.

        Returns:
            (outputs, loss) of the unperturbed model before the update.
        """
        outputs, loss = self._start(inputs, targets)
        blocks = self.layers.values() if self.layer_by_layer else [list(self.trained)]
        estimate = {}
        for names in blocks:
            index = {name: self.index[name] for name in names}
            grad = self._estimate(index, loss)
            estimate |= zip(names, grad.split([len(positions) for positions in index.values()]), strict=True)
        self._update(estimate)
        return outputs, loss

    def _estimate(self, index: dict[str, Tensor], loss: Tensor) -> Tensor:
        """ĝ of the coordinates in `index`, all others unperturbed: (d,)."""
        like = self.trained[next(iter(index))]
        d = sum(map(len, index.values()))
        u = random_directions(self.n_sample, d, self.directions, self.generator).to(like)  # (n, d)
        scales = [self.sigma, -self.sigma] if self.two_sided else [self.sigma]
        losses = self.loss_queries.directions(index, u, scales)  # (2 or 1, n)
        if self.two_sided:
            grad = from_directions(u, losses[0] - losses[1], 2 * self.sigma)
        else:
            grad = from_directions(u, losses[0] - loss, self.sigma)
        return grad.sign() if self.signSGD else grad
