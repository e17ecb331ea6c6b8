"""ZO-SGD: descend along the average of directional differences (chapter 3)."""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from zo_tutorial.directions import DIRECTIONS, Directions
from zo_tutorial.estimators import above_baseline, check_baseline
from zo_tutorial.low_rank import LowRank
from zo_tutorial.optimizer.base import Rule, ZerothOrderOptimizer, torch_rule, whole_number
from zo_tutorial.queries import Along
from zo_tutorial.selection import Layers, Parameters

KINDS = (*DIRECTIONS, "low_rank")


class ZO_SGD_mask(ZerothOrderOptimizer):
    """Stochastic gradient descent on a random-direction estimate of the gradient (Nesterov and Spokoiny, 2017).

    Two-sided: ĝ = 1/n Σ_i (L(θ+σu_i) − L(θ−σu_i)) / 2σ · u_i, 2n+1 queries a step.
    One-sided: ĝ = 1/n Σ_i (L(θ+σu_i) − b_i) / σ · u_i, n+1 queries a step, with a baseline b_i: L(θ), or under
    "leave_one_out" the mean of the other L(θ+σu_j).
    With `layer_by_layer` each layer has its own n directions, drawn and evaluated while the others stand still:
    2n (one-sided n) queries a layer, and one. Chapter 2 derives the estimate, chapter 3 the optimiser.

    Args:
        model: a module; or any function of the inputs, with its `parameters` given.
        criterion: a callable from (outputs, targets) to one number.
        masks: {parameter name: bool tensor, True = trained}; a name left out is all True; None trains everything that
            is chosen.
        lr: learning rate η; 0 is legal.
        sigma: smoothing radius σ.
        n_sample: number of directions n.
        signSGD: step along sign(ĝ).
        layer_by_layer: estimate the layers in turn, all around the same θ.
        opt_layers_strs: a layer type or a list of them, by name: nn.Linear, nn.Conv2d, TensorizedLinear,
            TensorizedLinear_module, TensorizedLinear_module_tonn; or a class of modules. None named: all of these.
        two_sided: difference of θ+σu and θ−σu, else of θ+σu and the baseline.
        baseline: "unperturbed" or "leave_one_out", of one-sided differences.
        directions: "gaussian", "rademacher", "orthogonal", or "low_rank": a matrix U = A Cᵀ/√r for every weight, whose
            queries of dense layers share the product with the weight (Sarkar et al., 2025; chapter 9).
        rank: r of low-rank directions.
        adam: use torch.optim.Adam, with `beta_1`, `beta_2`, `eps`, instead of torch.optim.SGD.
        rule: another update rule, called as rule(parameters, lr=lr): a class of torch.optim, or a `functools.partial`
            of one with its options.
        parameters: what is trained, instead of layer types: parameters or their names; groups of them with options of
            their own, {"params": […], "lr": 0.1}; or a function from (name, parameter) to whether to train it. For a
            model that is a function, {name: tensor}: the tensors that it reads. A parameter with requires_grad=False
            is never trained.
        generator: source of all randomness of a step, dropout included; seeded from torch's global one by default.
        share: what the workers of an initialised process group share: "queries" or "batch" (see `LossQueries`).
        query_mode, memory: how losses are evaluated, and in how many MB; see `LossQueries`. Directions that do not fit
            into half of it are drawn again from seeds when they are needed, with the same result.

    Raises:
        ValueError: an impossible value, an unknown layer or parameter name, masks that keep nothing.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ZO_SGD_mask(model, torch.nn.functional.cross_entropy, None, lr=0.1, n_sample=4)
        >>> outputs, loss = optimizer.step(torch.ones(5, 3), torch.zeros(5, dtype=torch.long))
        >>> optimizer.queries
        9
    """

    def __init__(
        self, model: Callable, criterion: Callable, masks: dict[str, Tensor] | None,
        lr: float = 0.01,
        sigma: float = 0.1,
        n_sample: int = 20,
        signSGD: bool = False,
        layer_by_layer: bool = False,
        opt_layers_strs: Layers = [],  # noqa: B006 (never changed)
        *,
        two_sided: bool = True,
        baseline: str = "unperturbed",
        directions: str = "gaussian",
        rank: int = 1,
        adam: bool = False, beta_1: float = 0.9, beta_2: float = 0.98, eps: float = 1e-06,
        rule: Rule | None = None, parameters: Parameters | None = None,
        generator: torch.Generator | None = None, query_mode: str = "auto", memory: float = 512,
        share: str = "queries",
    ):  # fmt: skip
        if not 0 < sigma < inf:
            raise ValueError(f"sigma must be above 0 and finite, not {sigma}")
        if directions not in KINDS:
            raise ValueError(f"directions {directions!r} are unknown; choose one of {', '.join(KINDS)}")
        check_baseline(baseline, two_sided, n_sample)
        self.sigma, self.n_sample, self.signSGD = sigma, whole_number("n_sample", n_sample), signSGD
        self.two_sided, self.baseline, self.layer_by_layer = two_sided, baseline, layer_by_layer
        self.directions, self.rank = directions, whole_number("rank", rank)
        self.room = memory * 1e6 / 2  # bytes for the directions
        made = torch_rule(rule, adam, (beta_1, beta_2), eps)
        super().__init__(
            model, criterion, masks, opt_layers_strs, parameters, made, lr, generator, query_mode, memory, share
        )

    def _add_estimate(self, loss: Tensor) -> None:
        index = self.active()
        for name in index:
            self.loss_queries.check_radius(name, self.sigma)
        layers = list(self.layers.values()) if self.layer_by_layer else [list(index)]
        blocks = [{name: index[name] for name in layer if name in index} for layer in layers]
        rounds, room = list[Along](), self.room
        for block in filter(None, blocks):
            u = self._draw(block, room)
            room -= u.bytes
            rounds.append(Along(block, u, [self.sigma, -self.sigma] if self.two_sided else [self.sigma]))
        for asked, losses in zip(rounds, self.loss_queries.ask(rounds), strict=True):
            grad = self._estimate(asked.directions, losses, loss)
            for name, piece in zip(asked.index, grad.split([*map(len, asked.index.values())]), strict=True):
                self._add(name, piece)

    def _draw(self, index: dict[str, Tensor | range], room: float) -> Directions:
        """Directions of the coordinates in `index`, the rows of (n, d)."""
        if self.directions == "low_rank":
            parameters = [self.trained[name] for name in index]
            return LowRank(self.n_sample, parameters, list(index.values()), self.rank, self.generator)
        return Directions(self.n_sample, sum(map(len, index.values())), self.directions, self.generator, room)

    def _estimate(self, u: Directions, losses: Tensor, loss: Tensor) -> Tensor:
        """ĝ (d,) from losses along n directions (2 or 1, n)."""
        if self.two_sided:
            slopes = (losses[0] - losses[1]) / (2 * self.sigma)
        else:
            slopes = above_baseline(losses[0], loss, self.baseline) / self.sigma
        return u.combined(slopes).div_(u.n)  # 1/n Σ_i slope_i u_i

    def update(self) -> None:
        """Move the weights along what stands in `.grad`, or its sign under signSGD."""
        if self.signSGD:
            for parameter in self.trained.values():
                if parameter.grad is not None:
                    parameter.grad.sign_()
        super().update()
