"""Coordinate queries from the structure of the network: only what lies behind a weight is computed again.

One weight moves its layer's output from z to z + s J, exactly (`affine`). What comes before the layer is computed once,
in the step's first query; what comes after it is run from the recording of that query (`tape`), for many shifted outputs
in one call. Two forms are cheaper still (chapter 9):

- An elementwise activation φ and a linear layer H follow: only the slice of z that J touches goes through φ, and H
  maps the change of that slice, o + H_slice (φ(z + s J) − φ(z)).
- Softmax cross-entropy of the output follows: it is evaluated here, with the batch as the long, contiguous dimension.
"""

from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from zo_tutorial.affine import RowSlices, UnitSlices, matrix, response, units_back, units_first
from zo_tutorial.tape import Call, Tape, Unsuitable, bytes_of

ELEMENTWISE = {
    F.relu, torch.relu, Tensor.relu, torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid,
    F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.hardtanh, F.logsigmoid,
}  # fmt: skip
CACHE = 2**20  # bytes of sensitivities handled at once: they stay in the cache of a core from one operation to the next


class Tail:
    """From the output of one layer to the loss.

    Args:
        call: the recorded call of the layer.

    Raises:
        Unsuitable: the recording does not tell.
    """

    def __init__(self, tape: Tape, call: Call):
        self.tape, self.call, self.calls = tape, call, tape.after(call)
        self.targets = _cross_entropy_targets(tape, call, self.calls)
        # of one point: twice the results of all calls, for what they need beside them
        self.bytes = 4 * bytes_of(call.results) + 2 * sum(c.bytes for c in self.calls)

    def losses(self, z: Tensor) -> Tensor:
        """(K,) losses for K outputs z (K, units, R)."""
        if self.targets is not None:
            # L = mean over b of log Σ_k exp(o_kb) − o_yb
            chosen = z[:, self.targets, torch.arange(z.shape[2], device=z.device)]  # (K, B)
            return (z.logsumexp(1) - chosen).mean(1)
        z = units_back(self.call.layer, z, self.call.results[0].shape)
        if len(z) <= 3:  # cheaper one by one
            return torch.stack([self._loss(point).reshape(()) for point in z])
        return vmap(self._loss, randomness="same")(z).reshape(-1)

    def _loss(self, z: Tensor) -> Tensor:
        return self.tape.replay(self.calls, {id(self.call.results[0]): z})


class Hidden:
    """An elementwise activation φ and a linear layer H behind a layer: o = H φ(z), then the tail of H."""

    def __init__(self, tape: Tape, call: Call):
        follow = tape.after(call)
        if len(follow) < 2 or isinstance(call.layer, nn.Conv2d):
            raise Unsuitable
        self.activation, head = follow[:2]
        z, a = call.results[0], self.activation.results[0]
        between = self.activation.function in ELEMENTWISE and [id(t) for t in self.activation.tensors] == [id(z)]
        enters = head.layer is not None and not isinstance(head.layer, nn.Conv2d) and head.args[0] is a
        elsewhere = {id(tensor) for c in follow[2:] for tensor in c.tensors} | {id(tape.loss)}
        if not (between and enters) or elsewhere & {id(z), id(a)}:
            raise Unsuitable
        tape.call_of(head.layer)  # once
        self.z = id(z)
        self.tail = Tail(tape, head)
        self.weight = matrix(head.layer)  # (C, units)
        self.bias = head.layer.bias

    def activate(self, z: Tensor) -> Tensor:
        return self.activation.again({self.z: z}, None)

    def outputs(self, a: Tensor) -> Tensor:
        """o = H a: (C, R) from (units, R)."""
        o = self.weight @ a
        return o if self.bias is None else o + self.bias[:, None]


class Site:
    """One parameter of one layer at the current point, and what its changes do to the loss.

    Args:
        layer, name: the layer, and the name of its parameter within it.
        limit: bytes that may be used at once.

    Raises:
        Unsuitable: the recording does not tell.
    """

    def __init__(self, tape: Tape, layer: nn.Module, name: str, limit: float):
        call = tape.call_of(layer)
        if any(t._version != v for t, v in zip(call.tensors, call.versions, strict=True)):
            raise Unsuitable("the input of the layer is not there any more")
        x, z = call.args[0], call.results[0]
        if z._version != call.result_versions[0]:  # an activation in place: compute it again
            z = layer(x)
        self.z = units_first(layer, z).clone(memory_format=torch.contiguous_format)  # (units, R)
        self.response = response(layer, name, x, self.z)
        self.parameter = layer.get_parameter(name)
        self.limit = limit
        try:
            self.hidden = Hidden(tape, call)
        except Unsuitable:
            self.hidden, self.tail = None, Tail(tape, call)
        self._refresh()

    def _refresh(self) -> None:
        if self.hidden is not None:
            self.a = self.hidden.activate(self.z.clone())  # (units, R)
            self.o = self.hidden.outputs(self.a)  # (C, R)

    @property
    def portion(self) -> float:
        """Bytes of sensitivities to handle at once."""
        if self.hidden is None:
            points = self.limit / (self.tail.bytes + 2 * bytes_of([self.z]))
            return max(1, int(points) - 1) * self.response.bytes()
        each = 3 * self.response.bytes() + 4 * bytes_of([self.o]) + self.hidden.tail.bytes
        return min(CACHE, self.limit / each * self.response.bytes())

    def look(self, positions: Tensor, shifts: list[float]) -> Tensor:
        """The changes of the loss under each of S shifts of each of K coordinates: (S, K)."""
        value = self.parameter.reshape(-1)[positions]
        steps = torch.stack([(value + shift) - value for shift in shifts])  # (S, K): the shifts after rounding
        changes = torch.empty_like(steps)
        for slices in self.response.slices(positions, self.portion / len(shifts)):
            changes[:, slices.where] = self._changes(slices, steps[:, slices.where])
        return changes

    def _changes(self, slices: UnitSlices | RowSlices, steps: Tensor) -> Tensor:
        """L(z + s J) − L(z) for the coordinates of `slices` and S steps of each: (S, K) from (S, K)."""
        sensitivity, points = slices.sensitivity, steps.numel()
        s = steps.view(*steps.shape, *[1] * (sensitivity.dim() - 1))  # (S, K, 1..)
        if self.hidden is None:
            z = self.z.repeat(points + 1, 1, 1)  # (S K + 1, units, R); the last stays as it is
            slices.add(z[:-1].view(*steps.shape, *self.z.shape), s * sensitivity)
            losses = self.tail.losses(z)
        else:
            # o = H φ(z + s J) = H φ(z) + H_slice (φ(z + s J) − φ(z))
            z = torch.addcmul(slices.of(self.z), s, sensitivity)  # (S, K, *rows, R)
            change = self.hidden.activate(z).sub_(slices.of(self.a))
            o = self.o.new_empty(points + 1, *self.o.shape)  # (S K + 1, C, R)
            slices.through(self.hidden.weight, change, self.o, out=o[:-1].view(*steps.shape, *self.o.shape))
            o[-1] = self.o
            losses = self.hidden.tail.losses(o)
        return (losses[:-1] - losses[-1]).view_as(steps)

    def move(self, position: Tensor, shift: float) -> None:
        """Follow a move of one coordinate (1,), before the parameter makes it."""
        value = self.parameter.reshape(-1)[position]
        for slices in self.response.slices(position, 1):
            slices.add(self.z[None, None], slices.sensitivity[None] * ((value + shift) - value))
        self._refresh()


def _cross_entropy_targets(tape: Tape, call: Call, calls: list[Call]) -> Tensor | None:
    """The classes (B,), if `calls` is nothing but the mean cross-entropy of outputs (B, C), else None."""
    if len(calls) != 1 or calls[0].function is not F.cross_entropy or calls[0].results[0] is not tape.loss:
        return None
    options = signature(F.cross_entropy).bind(*calls[0].args, **calls[0].kwargs).arguments
    outputs, targets = options.pop("input"), options.pop("target")
    default = {p.name: p.default for p in signature(F.cross_entropy).parameters.values()}
    plain = all(value == default[name] for name, value in options.items())
    classes = outputs is call.results[0] and outputs.dim() == 2 and targets.shape == outputs.shape[:1]
    if not (plain and classes) or (targets == default["ignore_index"]).any():
        return None
    return targets
