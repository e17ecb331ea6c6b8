"""ZO-SCD: stochastic coordinate descent from losses at shifted coordinates (chapter 4)."""

from collections.abc import Callable, Iterable
from math import inf
from typing import Any

import torch
from torch import Tensor

from zo_tutorial.estimators import finite_difference, three_point_sign, two_point_sign
from zo_tutorial.optimizer.base import ABSENT, Rule, ZerothOrderOptimizer, torch_rule
from zo_tutorial.queries import Coordinates
from zo_tutorial.selection import Layers, Parameters, chosen_positions
from zo_tutorial.workers import Workers

GRAD_ESTIMATORS = ("sign", "batch", "esti")


class ZO_SCD_mask(ZerothOrderOptimizer):
    """Coordinate descent on loss queries, with d trained coordinates of which a step skips a random share.

    sign: one coordinate after the other, in place. Try θ_i + η and keep it if the running loss drops. Otherwise take
    θ_i − η: always (STP off), or only if that lowers the running loss (STP on, stochastic three points: Bergou et al.,
    2020). 1 + k to 1 + 2k queries for k kept coordinates.

    batch: all around the same θ. ĝ_i = −1 if L(θ+η e_i) < L(θ), else +1 (1 + k queries); STP on: −1, +1 or 0 for the
    smallest of L(θ+η e_i), L(θ−η e_i), L(θ) (1 + 2k queries). Probe and step are both the current learning rate η.

    esti: finite differences around the same θ, (L(θ+h e_i) − L(θ)) / h (1 + k queries); STP on: two-sided,
    (L(θ+h e_i) − L(θ−h e_i)) / 2h (1 + 2k queries). h is the distance that rounding has left of `h_smooth`.

    batch and esti hand ĝ, zero for skipped coordinates, to torch.optim.SGD or torch.optim.Adam. Chapter 4 derives all
    three.

    Args:
        model, criterion, masks, opt_layers_strs, rule, parameters, generator, query_mode, memory, share: as for
            `ZO_SGD_mask`; sign can share the batch only.
        lr: learning rate η; 0 is legal.
        grad_sparsity: probability that a trained coordinate is skipped in a step; or one for each module, by name, such
            as {"blocks": 0.9, "blocks.1": 0.5, "head": 0.0}: of several that hold a parameter the innermost counts.
        h_smooth: finite-difference step h of esti.
        grad_estimator: "sign", "batch" or "esti".
        STP: stochastic three points (sign, batch), two-sided differences (esti).
        momentum, weight_decay, dampening: of torch.optim.SGD (weight_decay also of Adam).
        adam: use torch.optim.Adam, with `beta_1`, `beta_2`, `eps`.

    Raises:
        ValueError: an impossible value or combination (sign with an update rule, adam with momentum or dampening), an
            unknown layer or parameter name, a mask that keeps nothing.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ZO_SCD_mask(model, torch.nn.functional.cross_entropy, None, grad_estimator="esti",
        ...                         grad_sparsity=0)
        >>> outputs, loss = optimizer.step(torch.ones(5, 3), torch.zeros(5, dtype=torch.long))
        >>> optimizer.queries
        17
    """

    def __init__(
        self, model: Callable, criterion: Callable, masks: dict[str, Tensor] | None,
        lr: float = 0.1,
        grad_sparsity: float | dict[str, float] = 0.1,
        h_smooth: float = 0.001,
        grad_estimator: str = "sign",
        opt_layers_strs: Layers = [],  # noqa: B006 (never changed)
        STP: bool = True,
        momentum: float = 0, weight_decay: float = 0, dampening: float = 0,
        adam: bool = False, beta_1: float = 0.9, beta_2: float = 0.98, eps: float = 1e-06,
        *,
        rule: Rule | None = None, parameters: Parameters | None = None,
        generator: torch.Generator | None = None, query_mode: str = "auto", memory: float = 512,
        share: str = "queries",
    ):  # fmt: skip
        if grad_estimator not in GRAD_ESTIMATORS:
            raise ValueError(f"grad_estimator {grad_estimator!r} is unknown; choose from {', '.join(GRAD_ESTIMATORS)}")
        for skipped in grad_sparsity.values() if isinstance(grad_sparsity, dict) else [grad_sparsity]:
            if not 0 <= skipped <= 1:
                raise ValueError(f"grad_sparsity must lie between 0 and 1, not {skipped}")
        if not 0 < h_smooth < inf:
            raise ValueError(f"h_smooth must be above 0 and finite, not {h_smooth}")
        if grad_estimator == "sign" and (momentum or weight_decay or dampening or adam or rule):
            raise ValueError(
                "grad_estimator 'sign' moves weights itself: no momentum, weight_decay, dampening, adam or rule"
            )
        if grad_estimator == "sign" and share == "queries" and Workers.present():
            raise ValueError("grad_estimator 'sign' asks one query after the other, so workers need share='batch'")
        self.grad_sparsity, self.h_smooth = grad_sparsity, h_smooth
        self.grad_estimator, self.STP = grad_estimator, STP
        made = torch_rule(rule, adam, (beta_1, beta_2), eps, momentum, weight_decay, dampening)
        super().__init__(
            model, criterion, masks, opt_layers_strs, parameters, made, lr, generator, query_mode, memory, share
        )
        if isinstance(grad_sparsity, dict):
            used = {self._around(name, grad_sparsity) for name in self.trained}
            unused = ", ".join(module for module in grad_sparsity if module not in used)
            if unused:
                trained = ", ".join(self.trained)
                raise ValueError(f"grad_sparsity: {unused} decides for no trained parameter; these are {trained}")

    def step(  # type: ignore[override]  # as in the parent class
        self, inputs: Any = None, targets: Any = ABSENT, *, closure: Callable | None = None
    ) -> Any:
        """One update; the class docstring counts its queries. See `ZerothOrderOptimizer.step`."""
        if self.grad_estimator != "sign":
            return super().step(inputs, targets, closure=closure)
        closure = self._closure(inputs, targets, closure)
        outputs, loss = self.loss_queries.start(inputs, targets, self._seed(), closure=closure)
        self._descend_in_turn(self._choose(), loss.item())
        return loss if closure is not None else (outputs, loss)

    def _add_estimate(self, loss: Tensor) -> None:
        if self.grad_estimator == "sign":
            raise ValueError("grad_estimator 'sign' moves weights itself, it has no estimate to update from: use step")
        chosen = self._choose()
        rounds = {name: self._round(name, chosen_positions(self.index[name], kept)) for name, kept in chosen.items()}
        rounds = {name: asked for name, asked in rounds.items() if asked.points}
        answers = dict(zip(rounds, self.loss_queries.ask(list(rounds.values())), strict=True))
        for name, kept in chosen.items():
            found = self._estimate(rounds[name], answers[name], loss) if name in rounds else loss.new_zeros(0)
            estimate = found
            if len(found) < len(kept):
                estimate = torch.zeros(len(kept), dtype=loss.dtype, device=loss.device)
                estimate[kept] = found
            self._add(name, estimate)

    def _choose(self) -> dict[str, Tensor]:
        """Toss a coin for each trained coordinate: True for those that this step does not skip."""
        counts, active = [len(positions) for positions in self.index.values()], self.active()
        tosses = torch.rand(sum(counts), generator=self.generator, device=self.generator.device).split(counts)
        kept = {name: toss >= self._skipped(name) for name, toss in zip(self.index, tosses, strict=True)}
        return {name: chosen.to(self.trained[name].device) for name, chosen in kept.items() if name in active}

    def _skipped(self, name: str) -> float:
        """The probability that a coordinate of a parameter is skipped."""
        if not isinstance(self.grad_sparsity, dict):
            return self.grad_sparsity
        return self.grad_sparsity[self._around(name, self.grad_sparsity)]

    @staticmethod
    def _around(name: str, modules: Iterable[str]) -> str:
        """The innermost of some modules that holds a parameter. Raises ValueError where none does."""
        around = [module for module in modules if f"{name}.".startswith(f"{module}.")]
        if not around:
            raise ValueError(f"grad_sparsity: says nothing of {name!r}; it names {', '.join(modules) or 'no module'}")
        return max(around, key=len)

    def _round(self, name: str, positions: Tensor) -> Coordinates:
        """What is asked of some positions of one parameter."""
        step = self.h_smooth if self.grad_estimator == "esti" else self.lr_of(name)
        return Coordinates(name, positions, [step, -step] if self.STP else [step])

    def _estimate(self, asked: Coordinates, losses: Tensor, loss: Tensor) -> Tensor:
        """ĝ at the positions of a round (K,), from its losses (2 or 1, K)."""
        name, positions, step = asked.name, asked.index, asked.shifts[0]
        plus, minus = losses[0], losses[-1]
        # 2h or h, as rounding has left it
        distance = self.loss_queries.distances(name, positions, -step if self.STP else 0.0, step).to(losses)  # (K,)
        if self.grad_estimator == "esti":
            slope = finite_difference(plus, minus if self.STP else loss, distance)
            return torch.where(distance > 0, slope, 0.0)
        return three_point_sign(plus, minus, loss) if self.STP else two_point_sign(plus, loss)

    @torch.no_grad()
    def _descend_in_turn(self, chosen: dict[str, Tensor], running: float) -> None:
        """`sign`: move the coordinates one by one. If a query fails, all weights return to where the step began."""
        before = {name: parameter.clone() for name, parameter in self.trained.items()}
        try:
            for name, kept in chosen.items():
                positions, lr = chosen_positions(self.index[name], kept), self.lr_of(name)
                if len(positions):
                    self.loss_queries.distances(name, positions, -lr, lr)
                running = self.loss_queries.descend(name, positions, lr, self.STP, running)
        except BaseException:
            for name, parameter in self.trained.items():
                parameter.copy_(before[name])
            raise
