"""What one training step may ask of a model: the face of the queries, the bill, and the checks of what comes back.

A query is one forward pass of the whole batch that returns one number, the loss. `LossQueries` is the only place in
the package that asks for losses, so its counter is the bill of a training run. Chapter 1 defines the query, chapter 9
makes it cheap.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from zo_tutorial.directions import Directions
from zo_tutorial.queries.choice import QUERY_MODES, Choice
from zo_tutorial.queries.evaluation import Evaluation
from zo_tutorial.queries.rows_of_batch import RowsOfBatch
from zo_tutorial.queries.shared import Coordinates, Round, Sharing
from zo_tutorial.queries.state import fingerprint
from zo_tutorial.queries.way import Index, Moves
from zo_tutorial.selection import layer_of
from zo_tutorial.workers import Workers, is_due, numbers_of


class LossQueries:
    """Losses of a model at perturbed points of one batch, counted.

    `start` fixes a batch and returns the unperturbed outputs and loss. It leaves the model as one forward pass does: a
    running mean of batch normalisation has moved on. Until the next `start`, every query sees that batch, the same
    random numbers and the model's state of before that pass, so the loss is a deterministic function of the parameters.
    A round of queries leaves parameters, buffers, attributes, train/eval mode and the global random generators exactly
    as they were, also when the model or the criterion raises. (Not seen are memories outside of modules, criterion and
    plain objects that they hold, such as a global list; and changes within containers of more than 20,000 items, or
    through `.data` to tensors of more than 262,144 numbers. Where these change the loss at once, the first step says
    so.)

    The modes differ in time, not in losses or counts, up to rounding. (Where a weight does not matter at all, such as a
    bias in front of a batch normalisation, rounding decides what `sign` does.)

    - "loop" perturbs, runs and restores, one query after the other: the reference, for any callable.
    - "batched" runs many perturbed copies of the parameters in one call of `torch.func.vmap`.
    - "structured" shifts the output of a coordinate's layer, and runs only what comes after it; what it has no form
      for is batched.
    - "auto" takes the one of these that is valid and by an estimate of the work the cheapest.

    A model that is not a module is always looped. The first round of each kind is compared with the loop where it
    changes the loss most. Where the changes differ, or vmap refuses the model, "auto" goes on to the next way, and
    warns once if only the loop is left; the others raise.

    Args:
        model: a callable from inputs to outputs: a module, or a function that PyTorch cannot see into.
        criterion: a callable from (outputs, targets) to one number.
        parameters: the tensors that queries may perturb, by name. They are perturbed in place, so a model that is not
            a module must read them anew in each call.
        mode: "auto", "loop", "batched" or "structured".
        memory: bound for what a round of queries may use beside the model (MB).
        workers: who shares the work; None: nobody else. All of them make the same calls, with the same whole batch.
        share: "queries": each of them asks a part of the rounds given to `ask`. "batch": each query is asked by all of
            them, by the loop, of a part of the batch each; the loss must be a mean over its rows.

    Attributes:
        count: queries asked so far (queries). Comparisons of a way with the loop, and of the loss with itself in the
            first step, are not counted.
    """

    def __init__(
        self,
        model: Callable,
        criterion: Callable,
        parameters: dict[str, Tensor],
        mode: str = "auto",
        memory: float = 512,
        workers: Workers | None = None,
        share: str = "queries",
    ):
        if mode not in QUERY_MODES:
            raise ValueError(f"query_mode {mode!r} is unknown; choose one of {', '.join(QUERY_MODES)}")
        if not memory > 0:
            raise ValueError(f"memory must be above 0 MB, not {memory}")
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name!r} is of {parameter.dtype}: only real weights can be perturbed. Train the real and the "
                    "imaginary part of complex ones as two parameters"
                )
        self.parameters = parameters
        self.evaluation = Evaluation(model, criterion, parameters, memory * 1e6)
        if workers is not None and share == "batch":
            self.evaluation.rows, mode = RowsOfBatch(workers), "loop"
        self.choice = Choice(self.evaluation, mode)
        self.count = 0
        self.workers = workers
        self.sharing = None if workers is None or share == "batch" else Sharing(workers)
        self.lost: set[str] = set()  # parameters at which a step was seen to be lost in rounding
        self.repeatable = False  # whether the loss was seen to come out the same twice

    def start(self, inputs, targets, seed: int, *, closure: Callable | None = None) -> tuple:
        """Fix the batch and the seed of the step's randomness; return outputs and loss of the unperturbed model.

        One query. In the first step the loss is asked for twice, to see that it repeats.

        Args:
            inputs: a tuple or list for `model(*inputs)`, a dict for `model(**inputs)`, anything else for
                `model(inputs)`.
            targets: anything; the criterion gets it as it is.
            closure: a function that returns the loss, in the place of inputs, targets, model and criterion. It is
                called without gradients, so it must not call `backward`.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the message names the step.
            RuntimeError: the loss does not repeat, or the model writes into its input or its parameters.
            ValueError: the criterion returned more than one number.
        """
        if self.workers is not None and is_due(self.steps + 1):
            known = {repr(name): numbers_of(parameter) for name, parameter in self.parameters.items()}
            self.workers.check(self.steps + 1, known | {"the seed": str(seed).encode()})
        with _plain():
            if self.repeatable:
                outputs, loss = self.evaluation.fix(inputs, targets, seed, closure)
            else:
                outputs, loss = self._first(inputs, targets, seed, closure)
            self.count += 1
            with self.evaluation.unharmed():
                return outputs, self._checked(loss, "unperturbed")

    @property
    def steps(self) -> int:
        """Batches started so far."""
        return self.evaluation.steps

    def ask(self, rounds: Sequence[Round]) -> list[Tensor]:
        """The losses of all rounds of a step, as `coordinates` and `directions` give them, shared out among workers."""
        units = [self.choice.units(asked) for asked in rounds]
        every = [unit for parts in units for unit in parts]
        answers, count, known = None, self.count, self.choice.state()
        if self.sharing is not None:
            answers = self.sharing.losses(every, self._answer, self.choice.state, self.evaluation.base, self.steps)
            self.count = count if answers is None else count + sum(unit.queries for unit in every)
        if answers is None:
            self.choice.load_state(known)
            answers = [self._answer(unit) for unit in every]
        parts = iter(answers)
        return [torch.cat([next(parts) for _ in some], 1) for some in units]

    def _answer(self, asked: Round) -> Tensor:
        if isinstance(asked, Coordinates):
            return self.coordinates(asked.name, asked.index, asked.shifts)
        return self.directions(asked.index, asked.directions, asked.scales)

    def coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        """Losses with one coordinate shifted at a time: L(θ + s e_i) for every shift s and every i in `index`.

        Args:
            name: the parameter.
            index: (K,) flat positions in it, K at least 1.
            shifts: S numbers.

        Returns:
            (S, K) losses; S·K queries.
        """
        where = f"with layer {self._layer(name)!r} perturbed"
        return self._round(lambda: self.choice.coordinates(name, index, shifts), where)

    def distances(self, name: str, index: Tensor, low: float, high: float) -> Tensor:
        """How far θ_i + high and θ_i + low really lie apart, in the precision of the parameter: (K,).

        Raises:
            FloatingPointError: no shift moves any of these weights.
        """
        value = self.parameters[name].detach().flatten()[index]
        precise = torch.promote_types(value.dtype, torch.float32)
        distance = (value + high).to(precise).sub_((value + low).to(precise))
        distance = distance if high > low else -distance
        lost = int((distance == 0).sum()) if high != low else 0
        if lost:
            self._lost(name, max(abs(high), abs(low)), lost == len(index), f"{lost:,} of {len(index):,} weights")
        return distance

    def check_radius(self, name: str, radius: float) -> None:
        """Warn, or raise FloatingPointError, where a step of this length is lost in the rounding of a parameter."""
        parameter = self.parameters[name].detach()
        low, high = parameter.aminmax()
        largest = max(-low.item(), high.item())
        if largest + radius != largest and radius > largest * torch.finfo(parameter.dtype).eps / 4:
            return
        stuck = (parameter + radius == parameter) & (parameter - radius == parameter)
        if stuck.any():
            self._lost(name, radius, bool(stuck.all()), f"{int(stuck.sum()):,} of {parameter.numel():,} weights")

    def directions(self, index: dict[str, Index], directions: Tensor | Directions, scales: list[float]) -> Tensor:
        """Losses along directions: L(θ + s u) for every scale s and every row u of `directions`.

        Args:
            index: for each perturbed parameter, the flat positions that take part; d of them in all.
            directions: (n, d), columns in the order of `index`.
            scales: S numbers.

        Returns:
            (S, n) losses; S·n queries.
        """
        given = Directions.of(directions) if isinstance(directions, Tensor) else directions
        self.evaluation.directions = given.bytes
        layers = dict.fromkeys(self._layer(name) for name in index)
        where = f"with layer {', '.join(map(repr, layers))} perturbed"
        try:
            return self._round(lambda: self.choice.directions(index, given, scales), where)
        finally:
            self.evaluation.directions = 0

    def descend(self, name: str, positions: Tensor, shift: float, three_points: bool, running: float) -> float:
        """Move coordinates in place, one by one: the estimator `sign`.

        For each position in turn: θ_i + s is kept if it lowers the running loss (one query). Otherwise θ_i − s is kept:
        always, or, with `three_points`, if it lowers the running loss (two queries).

        Args:
            name: the parameter.
            positions: (K,) flat positions in it.
            shift: s.
            running: the loss where the parameters stand.

        Returns:
            The loss where they stand afterwards.
        """
        if not len(positions):
            return running

        def counted(loss: float) -> float:
            self.count += 1
            if not isfinite(loss):
                self._checked(torch.tensor(loss), f"with layer {self._layer(name)!r} perturbed")
            return loss

        evaluation, drew = self.evaluation, self.evaluation.draws
        with _plain(), evaluation.unharmed():
            with evaluation.fenced(notice=True):
                try:
                    loss = self.choice.descend(Moves(name, positions, shift, three_points, running, counted))
                finally:
                    evaluation.moved()
            if evaluation.draws and not drew:
                raise RuntimeError("the model draws random numbers at some points only, so they cannot be held fixed")
            return loss

    def _round(self, ask: Callable[[], Tensor], where: str) -> Tensor:
        """The losses of a round, counted and checked."""
        evaluation, drew = self.evaluation, self.evaluation.draws
        with _plain(), evaluation.unharmed():
            with evaluation.fenced(notice=True):
                losses = ask()
            if evaluation.draws and not drew:  # at perturbed points only: again, with the same numbers for all
                evaluation.moved()
                with evaluation.fenced():
                    losses = ask()
            self.count += losses.numel()
            return self._checked(losses, where)

    def ways(self) -> dict[tuple[str, ...], tuple[str, dict[str, str]]]:
        """{(kind of round, parameters…): (the way that answered it last, {faster way: why it did not})}."""
        return self.choice.answered

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to count and to choose on as this one does."""
        return {
            "queries": self.count,
            "steps": self.steps,
            "record next": self.evaluation.record_next,
            "bytes sent": 0 if self.workers is None else self.workers.bytes_sent,
            **self.choice.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.count, self.evaluation.steps = state["queries"], state["steps"]
        self.choice.load_state(state)
        self.evaluation.record_next = state["record next"]
        if self.workers is not None:
            self.workers.bytes_sent = state.get("bytes sent", 0)

    def _first(self, inputs, targets, seed: int, closure: Callable | None) -> tuple:
        """The first pass, and whether a second one comes out the same and neither changes a parameter."""
        evaluation = self.evaluation
        if evaluation.rows is not None and closure is not None:
            raise ValueError("share 'batch': the batch of a closure cannot be parted; give inputs and targets")
        weights = [p for m in evaluation.modules.values() for p in m._parameters.values() if p is not None]
        before = [fingerprint(weight) for weight in weights]
        outputs, loss = evaluation.fix(inputs, targets, seed, closure)
        with evaluation.unharmed(), evaluation.fenced():
            again = evaluation.loss()
            if evaluation.rows is not None:
                evaluation.try_parts()
        if [fingerprint(weight) for weight in weights] != before:
            raise RuntimeError("the model changes its own parameters in a forward pass, so its loss cannot be queried")
        if not torch.isclose(loss, again, rtol=8 * torch.finfo(loss.dtype).eps, atol=0, equal_nan=True):
            message = (
                f"the loss does not repeat: asked twice at the same point it is {loss.item():.6g} and "
                f"{again.item():.6g}, and a difference over 2h magnifies that"
            )
            if evaluation.modules and closure is None:
                raise RuntimeError(
                    f"{message}. Let model and criterion draw from torch's, numpy's or Python's global generator, "
                    "which are reset for each query, and write what they remember into buffers and attributes, not "
                    "through .data"
                )
            warnings.warn(f"{message}: choose steps that move the loss by far more than that", stacklevel=4)
        self.repeatable = True
        return outputs, loss

    def _lost(self, name: str, shift: float, all_of_them: bool, what: str) -> None:
        parameter = self.parameters[name]
        spacing = parameter.detach().abs().max().item() * torch.finfo(parameter.dtype).eps
        message = (
            f"a step of {shift:g} is lost in rounding at {what} of {name!r} ({parameter.dtype}, numbers up to "
            f"{spacing:.2g} apart): take a larger one, or a wider type"
        )
        if all_of_them:
            raise FloatingPointError(message)
        if name not in self.lost:
            self.lost.add(name)
            warnings.warn(message, stacklevel=3)

    def _checked(self, losses: Tensor, where: str) -> Tensor:
        """The losses, or an error that names step and layer if one of them is not a finite number."""
        if not losses.sum().isfinite():  # a single pass
            finite = losses.isfinite()
            if finite.all():
                return losses
            value = losses[~finite].flatten()[0].item() if losses.dim() else losses.item()
            raise FloatingPointError(f"the loss is {value} at step {self.steps}, {where}")
        return losses

    def _layer(self, name: str) -> str:
        """The name of the layer of a parameter, or of the parameter where there is none."""
        return layer_of(self.evaluation.modules, name) or name


@contextmanager
def _plain():
    """No gradients, and no inference mode, whose tensors could not be written to afterwards."""
    with torch.inference_mode(False), torch.no_grad():
        yield
