"""One query, asked the same way each time: the step's batch, random numbers and model state."""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zo_tutorial.queries.recording import Recording, span, tensors_in
from zo_tutorial.queries.rows_of_batch import RowsOfBatch
from zo_tutorial.queries.sensitivity import is_affine
from zo_tutorial.queries.state import Snapshot
from zo_tutorial.queries.way import Unsuitable
from zo_tutorial.randomness import RandomState, seed_everything


class Evaluation:
    """The loss of one batch where the parameters stand, as often as it is asked for.

    Every pass begins from the same buffers, attributes and random numbers, so the loss is a function of the parameters.

    Attributes:
        limit: bytes that a round of queries may use beside the model.
        directions: bytes that the directions of the present round take.
        steps: batches fixed so far.
    """

    def __init__(self, model: Callable, criterion: Callable, parameters: dict[str, Tensor], limit: float):
        self.model, self.criterion, self.parameters, self.limit = model, criterion, parameters, limit
        self.modules: dict[str, nn.Module] = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        self.draws = True  # whether a pass draws random numbers: the first one shows it
        self.recording: Recording | None = None
        self.inputs: Any = None
        self.targets: Any = None
        self.closure: Callable | None = None
        self.directions = self.steps = 0
        self._base: Tensor | None = None
        self.state: RandomState | None = None  # of the global generators before the first pass of a round
        self.ran = False  # whether a pass was made since the model was put back
        self.before: Snapshot | None = None
        self.after: Snapshot | None = None
        self.rows: RowsOfBatch | None = None  # those of this worker, where the batch is shared
        self.record_next = False  # whether a way has answered from a recording: the next step begins with one

    def fix(self, inputs, targets, seed: int, closure: Callable | None = None) -> tuple:
        """Fix batch and seed; outputs and loss of a first pass, which leaves its traces in the model."""
        self.inputs, self.targets, self.seed, self.closure = inputs, targets, seed, closure
        self.steps += 1
        if isinstance(self.model, nn.Module):  # anew: it may have got others
            self.modules = dict(self.model.named_modules())
        self.moved()
        drew, self.draws = self.draws, True
        training = {module: module.training for module in self.modules.values()}
        self.before = self.after = self._snapshot(self.after)
        versions = [(t, t._version) for t in tensors_in((inputs, targets)) if not t.is_inference()]
        with self.fenced(), self.unharmed():
            outputs, self._base = self._first_pass(drew)
            self.device = self._base.device
            drawn = RandomState()
            seed_everything(seed)
            self.draws = drawn != RandomState()
            if self.draws and not drew:
                self.recording = None  # it lacks the states from which random numbers were drawn
            for module, mode in training.items():
                module.training = mode
            self.after = self._snapshot(self.before)
        if any(t._version != version for t, version in versions):
            raise RuntimeError("the model writes into its input, so no two queries see the same: let it work on a copy")
        return outputs, self._base

    @property
    def base(self) -> Tensor:
        """The loss where the parameters stand."""
        if self._base is None:
            with self.fenced(), self.unharmed():
                self._base = self.loss()
        return self._base

    def _first_pass(self, draws: bool) -> tuple:
        """Outputs and loss, recorded at once where the step before needed a recording.

        Where that fails, and fails again, but not without recording, then there is no recording.
        """
        if not self.record_next:
            return self.once()
        self.record_next = False
        try:
            return self._record(draws)
        except Exception as error:
            first = error
        try:
            self._record(draws)
        except Exception:
            return self.once()
        raise first

    def _record(self, draws: bool) -> tuple:
        """Outputs and loss of a pass that is recorded, with its random numbers if it draws any."""
        known = [self.inputs, self.targets, held_by(self.criterion)]
        for module in self.modules.values():
            known += [vars(module), module._parameters, module._buffers]
        trained = {id(parameter) for parameter in self.parameters.values()}
        layers = [module for module in self.modules.values() if is_affine(module, trained)]
        recording = Recording(layers, tensors_in(known), draws, self.limit / 2)
        parameters = [p for module in self.modules.values() for p in module._parameters.values() if p is not None]
        recording.held = list(map(span, parameters))
        answer = self.once(recording)
        self.recording = recording
        return answer

    def once(self, recording: Recording | None = None) -> tuple:
        """One pass and the criterion: outputs and loss."""
        self.reset()
        with recording or nullcontext():
            if self.rows is not None:
                return self.rows.once(partial(call, self.model), self.criterion, as_loss, self.inputs, self.targets)
            if self.closure is not None:
                outputs, loss = None, self.closure()
            else:
                outputs = call(self.model, self.inputs)
                loss = self.criterion(outputs, self.targets)
        if recording is not None:
            recording.loss = loss
        return outputs, as_loss(loss)

    def loss(self) -> Tensor:
        return self.once()[1]

    def try_parts(self) -> None:
        """See whether the loss can be shared by rows (`rows_of_batch`)."""
        assert self.rows is not None
        model = partial(call, self.model)
        self.rows.try_parts(model, self.criterion, as_loss, self.inputs, self.targets, self.reset)

    def reset(self) -> None:
        """Put back what a pass begins from: attributes, buffers, random numbers; and what autocast remembers."""
        assert self.before is not None
        self.ran = True
        self.before.restore()
        if self.state is None:
            self.state = RandomState()
        if self.draws:
            seed_everything(self.seed)
        torch.clear_autocast_cache()
        parametrize._cache.clear()  # of torch.nn.utils.parametrize.cached()

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Leave the model as the first pass of the step left it; where something is raised, as it was before that."""
        assert self.before is not None, "no batch is fixed: call start first"
        left: Snapshot | None = self.before
        try:
            yield
            left = self.after if self.ran else None
        finally:
            if left is not None:
                left.restore()
            self.ran = False

    @contextmanager
    def fenced(self, notice: bool = False) -> Iterator[None]:
        """Leave the global generators as they are now; `notice` in `draws` if they were drawn from."""
        outer = self.state
        self.state = None
        try:
            yield
        finally:
            self._settle(outer, notice)

    def _settle(self, outer: RandomState | None, notice: bool) -> None:
        state, self.state = self.state, outer
        if state is not None and state != RandomState():
            state.restore()
            self.draws = self.draws or notice

    def _snapshot(self, earlier: Snapshot | None) -> Snapshot:
        """Of the model's modules, and of the criterion's, which may have a memory too."""
        inner = list(self.criterion.modules()) if isinstance(self.criterion, nn.Module) else []
        return Snapshot([*self.modules.values(), *inner], earlier)

    def recorded(self) -> Recording:
        """A recording of the pass where the parameters stand, made when it is first asked for.

        Raises:
            Unsuitable: the pass cannot be recorded.
        """
        if self.recording is None:
            with self.fenced(), self.unharmed():
                self._base = self._record(self.draws)[1]
        assert self.recording is not None
        if self.recording.broken:
            raise Unsuitable(self.recording.broken)
        return self.recording

    def room(self) -> float:
        """The bytes that the recording and the directions leave."""
        if self.recorded().bytes > self.limit / 2:
            raise Unsuitable("the memory does not suffice for the recording of a forward pass")
        return self.limit - self.recorded().bytes - self.directions

    @torch.no_grad()
    def move(self, name: str, positions: Tensor, shifts: list[float]) -> None:
        """Shift some coordinates for good."""
        parameter = self.parameters[name]
        entries = torch.unravel_index(positions, parameter.shape)
        parameter[entries] += torch.tensor(shifts, dtype=parameter.dtype, device=parameter.device)

    def owns_parameters(self) -> bool:
        """Whether the perturbed parameters are the model's own, by these names."""
        own = [(self.modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self.parameters]
        held = (getattr(module, name, None) for module, name in own)
        return all(mine is parameter for mine, parameter in zip(held, self.parameters.values(), strict=True))

    def compiled(self) -> bool:
        """Whether some of the modules run as compiled code."""
        return any(
            isinstance(module, torch.jit.ScriptModule)
            or type(module).__name__ == "OptimizedModule"  # of torch.compile; to import it takes seconds
            or module._compiled_call_impl is not None
            for module in self.modules.values()
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins between two steps: without batch, recording, and what a pass left."""
        return self.__dict__ | dict.fromkeys(("recording", "_base", "inputs", "targets", "closure", "before", "after"))

    def moved(self) -> None:
        """Forget what is known of where the parameters stood before."""
        if self.recording is not None:
            self.recording.forget()
        self.recording = self._base = None


def call(model: Callable, inputs: Any) -> Any:
    """`model(*inputs)` for a tuple or a list, `model(**inputs)` for a dict, else `model(inputs)`."""
    if type(inputs) in (tuple, list):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def as_loss(value: Any) -> Tensor:
    """A loss as a real floating number, () in single precision at least.

    Raises ValueError for what is not one real number.
    """
    if not isinstance(value, Tensor):
        try:
            if isinstance(value, complex | np.complexfloating):
                raise TypeError("it is complex")
            value = torch.tensor(float(value), dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the criterion must return one number, not {type(value).__name__}") from error
    if value.numel() != 1 or value.is_complex():
        kind = f"a {'complex ' if value.is_complex() else ''}tensor of shape {tuple(value.shape)}"
        raise ValueError(f"the criterion must return one number, not {kind}")
    value = value.detach().reshape(())
    if not value.is_floating_point():
        return value.double()
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def held_by(criterion: Any, depth: int = 3) -> list:
    """What a criterion may hold tensors in, such as class weights: attributes, arguments, its closure, its globals."""
    held: list = []
    if isinstance(criterion, nn.Module):
        for module in criterion.modules():
            held += [vars(module), module._parameters, module._buffers]
    else:
        held += [getattr(criterion, name, None) for name in ("__dict__", "__defaults__", "args", "keywords")]
    code = getattr(criterion, "__code__", None)
    if code is not None:
        held += [cell.cell_contents for cell in criterion.__closure__ or () if cell != types.CellType()]
        held += [criterion.__globals__.get(name) for name in code.co_names]
    inside = [getattr(criterion, name, None) for name in ("__self__", "__func__", "func")]
    for item in inside + held:
        mine = callable(item) and not isinstance(item, type) and not _module_of(item).startswith("torch.")
        if depth and (mine or isinstance(item, nn.Module)):
            held = held + held_by(item, depth - 1)
    return held


def _module_of(item: Any) -> str:
    return str(getattr(item, "__module__", ""))
