"""Loss queries by the dozen: many perturbed copies of the parameters, one vectorised forward pass.

`torch.func.functional_call` runs the model on given parameters, `torch.func.vmap` on many of them at once. Model and
criterion run inside, so whatever reads a parameter sees its perturbed copy. Chapter 9.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from zo_tutorial.tape import AT_ONCE, Call, Tape, Unsuitable, bytes_of, copies


class _Loss(nn.Module):
    """Model and criterion as one module from (inputs, targets) to the loss."""

    def __init__(self, model: nn.Module, criterion: Callable):
        super().__init__()
        self.model = model
        self.__dict__["criterion"] = criterion  # not a submodule: its parameters keep their names

    def forward(self, inputs: tuple, targets) -> Tensor:
        return self.criterion(self.model(*inputs), targets)


class _AsRecorded(TorchFunctionMode):
    """Dropout with the masks that the recorded pass drew; batch normalisation without its running averages.

    vmap draws a mask in a memory layout of its own, and cannot write averages of many points into one buffer.
    """

    def __init__(self, tape: Tape):
        super().__init__()
        self.dropouts = iter([call for call in tape.calls if call.function is F.dropout])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.dropout:
            return next(self.dropouts).with_input(Call(function, args, kwargs or {}).named()["input"])
        if function is F.batch_norm:
            named = Call(function, args, kwargs or {}).named()
            if named["training"]:
                named |= dict(running_mean=None, running_var=None)
            return F.batch_norm(**named)
        return function(*args, **(kwargs or {}))


class Batched:
    """Losses of a module at points given by perturbed copies of some parameters.

    Args:
        parameters: the parameters that may be perturbed, by their names in the model.
        tape: a recording of the unperturbed pass.
        reset: to be called before each pass; puts back buffers and random numbers.
        limit: bytes that may be used at once.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable,
        parameters: dict[str, Tensor],
        inputs: tuple,
        targets,
        tape: Tape,
        limit: float,
        reset: Callable,
    ):
        self.module, self.parameters = _Loss(model, criterion), parameters
        self.inputs, self.targets, self.tape, self.limit, self.reset = inputs, targets, tape, limit, reset

    def losses(self, points: dict[str, Tensor]) -> Tensor:
        """(P,) losses from P copies of each perturbed parameter: `{name: (P, *shape)}`."""

        def loss(copies):
            return functional_call(self.module, copies, (self.inputs, self.targets)).reshape(())

        self.reset()
        with _AsRecorded(self.tape):
            return vmap(loss, randomness="same")({f"model.{name}": copies for name, copies in points.items()})

    def portion(self, names: list[str]) -> int:
        """How many points to handle at once. Each needs copies and twice the results of a forward pass."""
        each = 2 * self.tape.bytes + 3 * bytes_of(self.parameters[name] for name in names)
        if 2 * each > self.limit:
            raise Unsuitable("the memory does not suffice for two points")
        return max(1, int(min(self.limit / each, AT_ONCE / self.tape.bytes)) - 1)

    def directions(self, index: dict[str, Tensor], directions: Tensor, scales: list[float]) -> Tensor:
        """Losses at θ + s u for S scales and n directions: (S, n)."""
        sizes, losses = [len(positions) for positions in index.values()], []
        for scale in scales:
            for u in directions.split(self.portion(list(index))):
                points = {}
                for (name, positions), piece in zip(index.items(), u.split(sizes, dim=1), strict=True):
                    points[name] = copies(self.parameters[name], len(u))  # (n, *shape)
                    points[name].view(len(u), -1).index_add_(1, positions, piece, alpha=scale)
                losses.append(self.losses(points))
        return torch.cat(losses).view(len(scales), -1)


class BatchedSite:
    """One parameter where the parameters stand, and what its changes do to the loss: as `structured.Site`, for any."""

    def __init__(self, batched: Batched, name: str):
        self.batched, self.name = batched, name

    def look(self, positions: Tensor, shifts: list[float]) -> Tensor:
        """The changes of the loss under each of S shifts of each of K coordinates: (S, K)."""
        parameter, changes = self.batched.parameters[self.name], []
        for shift in shifts:
            for portion in positions.split(self.batched.portion([self.name])):
                k = torch.arange(len(portion), device=portion.device)
                points = copies(parameter, len(portion) + 1)  # the last stays as it is
                points.view(len(points), -1)[k, portion] += shift
                losses = self.batched.losses({self.name: points})
                changes.append(losses[:-1] - losses[-1])
        return torch.cat(changes).view(len(shifts), -1)


class BatchedWalk:
    """As `structured.Walk`: what the next coordinates would change, from where those before them stand."""

    def __init__(self, site: BatchedSite, positions: Tensor, shift: float):
        self.site, self.positions, self.shift = site, positions, shift
        batched = site.batched
        # moved here, on a copy: the caller moves the parameter itself in the end
        batched.parameters = {**batched.parameters, site.name: copies(batched.parameters[site.name], 1)[0]}

    def look(self, start: int, count: int) -> list[tuple[float, float]]:
        """The changes of the loss under both steps of up to `count` coordinates from the start-th on."""
        return self.site.look(self.positions[start : start + count], [self.shift, -self.shift]).T.tolist()

    def move(self, k: int, side: int) -> None:
        """The k-th coordinate makes its step: side 0 is s, side 1 is −s."""
        self.site.batched.parameters[self.site.name].view(-1)[self.positions[k]] += (self.shift, -self.shift)[side]
