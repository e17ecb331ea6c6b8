"""Recorded calls for many points side by side, and only of what moves.

For each call there is a rule (`rules`), which says what becomes of it with the points in one more dimension in front.
Where one is missing, `torch.func.vmap` finds it (`suffix`), at several times the price: its points are so many, and all
their results are kept, that they leave the cache. Here they are few, and a result is dropped after its last use: the
next one gets its memory.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor, nn

from zo_tutorial.queries.parts import Moved, Part, same, whole
from zo_tutorial.queries.recording import Call, Recording, bytes_of, version
from zo_tutorial.queries.rules import Step, rule_of
from zo_tutorial.queries.way import Unsuitable

# After a block of so many bytes was freed, malloc keeps all smaller ones for reuse, and does not page them in anew.
KEPT = 31 * 2**20
CACHE = 3 * 2**20  # bytes of the largest tensor of all points that are run at once


class Program:
    """Recorded calls up to the loss, for many points.

    Args:
        calls: those to make, in order.
        starts: calls of layers that may move, some of which may be among `calls`.

    Attributes:
        many: so many points are best run at once.
        bytes: the most that the results of one point take at a time.

    Raises:
        Unsuitable: for some call there is no rule.
    """

    def __init__(self, recording: Recording, calls: list[Call], starts: list[Call]):
        self.calls, self.recording = calls, recording
        if any(list(map(version, c.results)) != c.result_versions for c in [*starts, *calls]):
            raise Unsuitable("a result was written into")
        self.rules = [rule_of(c) for c in calls]
        last = {id(tensor): k for k, c in enumerate(calls) for tensor in c.tensors}
        self.used = [[key for key, k in last.items() if k == here] for here in range(len(calls))]
        self.base: Tensor | None = None
        self.many = max(1, CACHE // max(bytes_of(c.results) for c in [*starts, *calls]))
        self.bytes, held = 0, {id(t): bytes_of([t]) for c in starts for t in c.results}
        for call, used in zip(calls, self.used, strict=True):
            held |= {id(t): bytes_of([t]) for t in call.results}
            self.bytes = max(self.bytes, sum(held.values()))
            for key in used:
                held.pop(key, None)
        torch.empty(min(KEPT, int(recording.limit)), dtype=torch.uint8)

    def losses(
        self, moved: Mapping[int, Moved], layers: Mapping[nn.Module | None, Callable[[Tensor], Tensor]] = {}
    ) -> Tensor:
        """(P,) losses at P points.

        Args:
            moved: {id of a recorded tensor: what stands in its place}.
            layers: {layer whose own weights move: what gives its outputs (P, ..., out) from inputs (P or 1, ..., in)}.
        """
        moved = dict(moved)
        still: dict[int, Tensor] = {}  # the points where a whole tensor is the recorded one (P,)
        tensors = {id(t): t for c in self.calls for t in c.tensors} if self.base is not None else {}
        for key, value in moved.items():
            if self.base is not None and isinstance(value, Tensor):
                still[key] = same(value, tensors[key])
        for call, rule, used in zip(self.calls, self.rules, self.used, strict=True):
            moving = [id(tensor) for tensor in call.tensors if id(tensor) in moved]
            step = Step(call, moved, self.recording.plain)
            if call.layer in layers:
                made: Any = layers[call.layer](whole(step.first()) if moving else step.plain(call.args[0]).unsqueeze(0))
            else:
                made = rule(step)
            for result, value in zip(call.results, made if type(made) is tuple else (made,), strict=True):
                if isinstance(value, Tensor):
                    if value.shape[1:] != result.shape:
                        raise Unsuitable(f"the rule of {call.function} does not fit")
                    if self.base is not None:
                        known = [still[key] for key in moving if key in still]
                        all_known = len(known) == len(moving)
                        still[id(result)] = reduce(and_, known) if all_known else same(value, result)
                moved[id(result)] = value
            for key in used:
                moved.pop(key, None)
        losses, unmoved = whole(moved[id(self.recording.loss)]).reshape(-1), still.get(id(self.recording.loss))
        # a product of matrices rounds the same numbers otherwise in another place
        return losses if self.base is None or unmoved is None else torch.where(unmoved, self.base, losses)


class Points(Program):
    """The calls between a layer's output and the loss.

    Args:
        call: of the layer, whose output has its units in the last dimension.

    Attributes:
        base: the loss where nothing has moved (1,).

    Raises:
        Unsuitable: as `Program` says.
    """

    def __init__(self, recording: Recording, call: Call):
        super().__init__(recording, recording.after(call), [call])
        self.start = call.results[0]
        first = torch.zeros(1, 1, dtype=torch.long, device=self.start.device)
        self.base = self.moved(Part(self.start[None, ..., :1], -1, first, self.start))
        if not torch.allclose(self.base, recording.loss, 1e-4, 1e-4, equal_nan=True):
            raise Unsuitable("the calls do not give the recorded loss")

    def moved(self, z: Moved) -> Tensor:
        """(P,) losses for P outputs of the layer."""
        return self.losses({id(self.start): z})
