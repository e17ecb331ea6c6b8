"""A recorded suffix for many points side by side, and only of what moves.

For each call there is a rule (`rules`), which says what becomes of it with the points in one more dimension in front.
Where one is missing, `torch.func.vmap` finds it (`suffix`), at several times the price: its points are so many, and all
their results are kept, that they leave the cache. Here they are few, and a result is dropped after its last use: the
next one gets its memory.
"""

from functools import reduce
from operator import and_

import torch
from torch import Tensor

from zo_tutorial.queries.parts import Moved, Part, same, whole
from zo_tutorial.queries.recording import Call, Recording, bytes_of, version
from zo_tutorial.queries.rules import Step, rule_of
from zo_tutorial.queries.way import Unsuitable

# After a block of so many bytes was freed, malloc keeps all smaller ones for reuse, and does not page them in anew.
KEPT = 31 * 2**20
CACHE = 3 * 2**20  # bytes of the largest tensor of all points that are run at once


class Points:
    """The calls between a layer's output and the loss, for many points.

    Args:
        call: of the layer, whose output has its units in the last dimension.

    Attributes:
        many: so many points are best run at once.
        base: the loss where nothing has moved (1,).

    Raises:
        Unsuitable: for some call there is no rule.
    """

    def __init__(self, recording: Recording, call: Call):
        self.start, self.calls, self.recording = call.results[0], recording.after(call), recording
        if any(list(map(version, c.results)) != c.result_versions for c in [call, *self.calls]):
            raise Unsuitable("a result was written into")
        self.rules = [rule_of(c) for c in self.calls]
        last = {id(tensor): k for k, c in enumerate(self.calls) for tensor in c.tensors}
        self.used = [[key for key, k in last.items() if k == here] for here in range(len(self.calls))]
        self.base: Tensor | None = None
        self.many = max(1, CACHE // max(bytes_of(c.results) for c in [call, *self.calls]))
        torch.empty(min(KEPT, int(recording.limit)), dtype=torch.uint8)
        first = torch.zeros(1, 1, dtype=torch.long, device=self.start.device)
        self.base = self.losses(Part(self.start[None, ..., :1], -1, first, self.start))
        if not torch.allclose(self.base, recording.loss, 1e-4, 1e-4, equal_nan=True):
            raise Unsuitable("the calls do not give the recorded loss")

    def losses(self, z: Moved) -> Tensor:
        """(P,) losses for P outputs of the layer."""
        moved: dict[int, Moved] = {id(self.start): z}
        still: dict[int, Tensor] = {}  # the points where a whole tensor is the recorded one (P,)
        if isinstance(z, Tensor):
            still[id(self.start)] = same(z, self.start)
        for call, rule, used in zip(self.calls, self.rules, self.used, strict=True):
            moving = [id(tensor) for tensor in call.tensors if id(tensor) in moved]
            made = rule(Step(call, moved, self.recording.plain))
            for result, value in zip(call.results, made if type(made) is tuple else (made,), strict=True):
                if isinstance(value, Tensor):
                    if value.shape[1:] != result.shape:
                        raise Unsuitable(f"the rule of {call.function} does not fit")
                    known = [still[key] for key in moving if key in still]
                    all_known = len(known) == len(moving)
                    still[id(result)] = reduce(and_, known) if all_known else same(value, result)
                moved[id(result)] = value
            for key in used:
                moved.pop(key, None)
        losses, unmoved = whole(moved[id(self.recording.loss)]).reshape(-1), still.get(id(self.recording.loss))
        # a product of matrices rounds the same numbers otherwise in another place
        return losses if self.base is None or unmoved is None else torch.where(unmoved, self.base, losses)
