"""Coordinate queries from the structure of the network: only what lies behind a weight is computed again.

One weight moves its layer's output from z to z + s J, exactly (`affine`). What comes before the layer is computed
once, in the step's first query; what comes after it is run from the recording of that query (`tape`), for many shifted
outputs in one call. Two forms are cheaper still (chapter 9):

- An elementwise activation φ and a linear layer W follow: only the slice of z that J touches goes through φ, and
  o = W φ(z) + b changes by W_slice times the change of that slice.
- Softmax cross-entropy of o follows: it is evaluated here (`cross_entropy`), with the batch as the long dimension.

What bounds a two-sided step, from the rates of one core (2.6e9 numbers a second for an operation in its cache, 0.7e9
for log1p, 41e9 multiply-adds a second) and batch 128 in float32, and what was measured on that core (a second one
gains little: most operations are too short to share):

- Dense 784-256-10, 10,164 weights: bytes. 2.6 million changes of hidden units, each through eight operations and a
  log1p, and six gathers for both sides: 15 ms. Measured: 18 ms.
- TTM of rank 4, 1,504 weights: bytes, then flops. 17 million numbers are shifted and activated: 13 ms; 0.23e9
  multiply-adds: 6 ms; softmax: 3 ms. Measured: 32 ms; the rest is dispatch, some 60 portions of 30 operations. (For
  the ReLU, most of it is linear in J. That halves the bytes, but saved a tenth at most, for its extra operations.)
- Convolutions: flops. Of the next layer only what one changed channel needs, then all of the network behind it, is run
  for each shift. 8,557 queries of the 4,278-weight net: 0.4 to 0.6 s, of which matrix products 0.15 s.
- `sign`: dispatch. A look is a dozen operations on a few thousand numbers, 45 to 100 µs a coordinate.
"""

from collections.abc import Callable
from math import isfinite, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from zo_tutorial.affine import TENSOR_LAYERS, Units, matrix, products, response, slice_of, units_back, units_first
from zo_tutorial.cross_entropy import RESHAPE, CrossEntropy, Series, cross_entropy_targets
from zo_tutorial.tape import AT_ONCE, Call, Tape, Unsuitable, bytes_of

RELU = {F.relu, torch.relu, Tensor.relu}
ELEMENTWISE = RELU | {
    torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid,
    F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.hardtanh, F.logsigmoid,
}  # fmt: skip
CACHE = 3 * 2**19  # bytes of slices handled at once: they stay in the cache of a core from one operation to the next


class Tail:
    """From the output of one layer to the loss.

    Args:
        call: the recorded call of the layer.

    Raises:
        Unsuitable: the recording does not tell.
    """

    def __init__(self, tape: Tape, call: Call):
        self.tape, self.call, self.calls = tape, call, tape.after(call)
        targets = cross_entropy_targets(tape, call, self.calls)
        self.cross_entropy = None if targets is None else CrossEntropy(*targets)
        # of one point: the results of all calls and as much again for what they need beside them
        self.bytes = 4 * bytes_of(call.results) + 2 * sum(bytes_of(c.results) for c in self.calls)

    def losses(self, z: Tensor) -> Tensor:
        """(K,) losses for K outputs z (K, units, R)."""
        if self.cross_entropy is not None:
            return self.cross_entropy.losses(z)
        return self.replayed(units_back(self.call.layer, z, self.call.results[0].shape))

    def replayed(self, z: Tensor) -> Tensor:
        """(K,) losses for K outputs of the layer's own shape."""
        if len(z) <= 3:  # cheaper one by one
            return torch.stack([self._loss(point).reshape(()) for point in z])
        return vmap(self._loss, randomness="same")(z).reshape(-1)

    def _loss(self, z: Tensor) -> Tensor:
        return self.tape.replay(self.calls, {id(self.call.results[0]): z})


class Head:
    """An elementwise activation φ and a linear layer behind a layer, o = W φ(z) + b, then the tail of that layer.

    Outputs that go straight into cross-entropy have this form too, with φ the identity and W the unit matrix.

    Raises:
        Unsuitable: something else comes behind the layer.
    """

    def __init__(self, tape: Tape, call: Call):
        self.activation, self.bias = None, None
        tail = Tail(tape, call)
        if tail.cross_entropy is not None:
            self.tail = tail
            size = call.results[0].shape[-1]
            self.weight = self.transposed = torch.eye(size, dtype=call.results[0].dtype, device=call.results[0].device)
            return
        head = self._follow(tape, call, tail)
        if isinstance(head, nn.Conv2d):
            raise Unsuitable
        self.weight, self.bias = matrix(head), head.bias  # (C, units), (C,)
        self.transposed = self.weight.T.contiguous()

    def _follow(self, tape: Tape, call: Call, tail: Tail, between: set = frozenset()) -> nn.Module:
        """Find activation and tail; return the linear layer. Calls of `between` may stand in front of it."""
        if len(tail.calls) < 2:
            raise Unsuitable
        self.activation, *calls = tail.calls
        z, a = call.results[0], self.activation.results[0]
        passed, enters = [z, a], a
        while calls and calls[0].function in between and calls[0].args[0] is enters:
            enters = calls.pop(0).results[0]
            passed.append(enters)
        elementwise = self.activation.function in ELEMENTWISE and [id(t) for t in self.activation.tensors] == [id(z)]
        elsewhere = {id(tensor) for c in calls[1:] for tensor in c.tensors} | {id(tape.loss)}
        if not elementwise or not calls or calls[0].layer is None or elsewhere & set(map(id, passed)):
            raise Unsuitable
        if calls[0].args[0] is not enters:
            raise Unsuitable
        self.tail, self.z = Tail(tape, tape.call_of(calls[0].layer)), id(z)
        return calls[0].layer

    def activate(self, z: Tensor) -> Tensor:
        """φ(z); it may overwrite z."""
        if self.activation is None:
            return z
        if self.activation.function in RELU:
            return z.relu_()
        return self.activation.again({self.z: z}, None)

    def outputs(self, a: Tensor) -> Tensor:
        """o = W a + b: (C, R) from (units, R)."""
        o = self.weight @ a
        return o if self.bias is None else o + self.bias[:, None]

    def part(self, factors: tuple, i: int) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives rest + W_slice a, (P, C, R), from a rest (C, R) and P slices a (P, rows, R)."""
        transposed = slice_of(self.transposed, factors, i)
        weight = transposed.reshape(-1, transposed.shape[-1]).T.contiguous()  # (C, rows)
        return lambda rest, a: torch.baddbmm(rest.expand(len(a), -1, -1), weight.expand(len(a), -1, -1), a)

    def losses(self, o: Tensor) -> Tensor:
        """(P,) losses from outputs o (P, C, R)."""
        return self.tail.losses(o)


class ConvolutionHead(Head):
    """The same behind a convolution: φ, then a convolution, or a linear layer that takes all places of all channels.

    That linear layer is a convolution too, with a kernel as large as the image. A changed channel meets one channel of
    the kernel only, 1 of c: a small linear map, whose matrix is what it makes of unit images. Outputs o have the
    layer's own shape (B, C, height, width), except in front of a cross-entropy, which takes (C, B).
    """

    def __init__(self, tape: Tape, call: Call):
        if not isinstance(call.layer, nn.Conv2d) or call.results[0].dim() != 4:
            raise Unsuitable
        layer = self._follow(tape, call, Tail(tape, call), RESHAPE)
        if self.tail.cross_entropy is not None and self.tail.cross_entropy.rows is not None:
            raise Unsuitable
        _, channels, *self.size = call.results[0].shape
        self.weight, self.bias, self.options = None, layer.bias, {}
        if isinstance(layer, nn.Conv2d):
            same = tape.call_of(layer).args[0].shape == call.results[0].shape
            if not same or layer.groups > 1 or layer.padding_mode != "zeros":
                raise Unsuitable
            self.kernel = layer.weight
            self.options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        else:
            weight = matrix(layer)
            if weight.shape[1] != channels * prod(self.size):
                raise Unsuitable
            self.kernel = weight.view(-1, channels, *self.size)  # (C, channels, height, width)
        pixels = prod(self.size)
        self.unit_images = torch.eye(pixels, dtype=self.kernel.dtype, device=self.kernel.device)
        self.unit_images = self.unit_images.view(pixels, 1, *self.size)
        if bytes_of([self._convolve(self.unit_images, 0)]) > CACHE:
            raise Unsuitable

    def _convolve(self, images: Tensor, i: int) -> Tensor:
        """What the i-th channel of the kernel makes of images (N, 1, H, W): (N, C, height, width)."""
        return F.conv2d(images, self.kernel[:, i : i + 1], **self.options)

    def outputs(self, a: Tensor) -> Tensor:
        """o from a (channels, R)."""
        a = a.view(len(a), -1, *self.size).transpose(0, 1)  # (B, channels, H, W)
        return self._shaped(F.conv2d(a, self.kernel, self.bias, **self.options))

    def part(self, factors: tuple, i: int) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives rest + W_slice a, P outputs, from a rest in the shape of one and P slices a (P, 1, R)."""
        images = self._convolve(self.unit_images, i)  # (H W, C, height, width)
        weight = images.flatten(1)  # (H W, C height width)

        def add(rest, a):
            if self.tail.cross_entropy is not None:
                a = a.view(len(a), -1, len(weight)).transpose(1, 2)  # (P, H W, B)
                return torch.baddbmm(rest.expand(len(a), -1, -1), weight.T.expand(len(a), -1, -1), a)
            a = a.view(len(a), -1, len(weight))  # (P, B, H W)
            o = torch.baddbmm(rest.flatten(1).expand(len(a), -1, -1), a, weight.expand(len(a), -1, -1))
            return o.unflatten(2, images.shape[1:])  # (P, B, C, height, width)

        return add

    def _shaped(self, o: Tensor) -> Tensor:
        return o if self.tail.cross_entropy is None else o.flatten(1).T

    def losses(self, o: Tensor) -> Tensor:
        return self.tail.losses(o) if self.tail.cross_entropy is not None else self.tail.replayed(o)


class Behind:
    """A layer's output where the parameters stand, and what lies between it and the loss.

    Attributes:
        x, z: the layer's input as it was given, and its output (units, R).
        products: of a tensor layer's cores.
        head, tail: the special form of what comes next, if it has one, and all the rest.
        a, o: φ(z) (units, R) and W φ(z) + b (C, R), with a head.
        series: with a head that enters cross-entropy.
        bytes: what one perturbed output needs, apart from the slice that changes.
    """

    def __init__(self, tape: Tape, layer: nn.Module):
        call = tape.call_of(layer)
        if any(t._version != v for t, v in zip(call.tensors, call.versions, strict=True)):
            raise Unsuitable("the input of the layer is not there any more")
        self.x, z = call.args[0], call.results[0]
        if z._version != call.result_versions[0]:  # an activation in place: compute it again
            z = layer(self.x)
        self.z = units_first(layer, z).contiguous()
        self.products = products(layer) if isinstance(layer, TENSOR_LAYERS) else None
        self.a = self.o = self.head = self.series = None
        try:
            self.head = ConvolutionHead(tape, call) if isinstance(layer, nn.Conv2d) else Head(tape, call)
        except Unsuitable:
            self.tail = Tail(tape, call)
            self.bytes = self.tail.bytes + 2 * bytes_of([self.z])
            return
        self.tail = self.head.tail
        self.bytes = self.tail.bytes
        if self.tail.cross_entropy is not None and self.tail.cross_entropy.rows is not None:
            # each row of x makes the same row of the outputs, and some do not count
            rows = self.tail.cross_entropy.rows
            self.x, self.z = self.x.flatten(0, -2)[rows], self.z[:, rows]
        self.a = self.head.activate(self.z.clone())
        self.o = self.head.outputs(self.a)
        if self.tail.cross_entropy is not None:
            self.o = self.tail.cross_entropy.shifted(self.o)
            if self.head.weight is not None:
                self.series = Series(self.tail.cross_entropy, self.o, self.head.weight)


class Site:
    """One parameter of one layer where the parameters stand, and what its changes do to the loss.

    Args:
        layer, name: the layer, and the name of its parameter within it.
        limit: bytes that may be used at once.

    Raises:
        Unsuitable: the recording does not tell, or the memory does not suffice.
    """

    def __init__(self, tape: Tape, layer: nn.Module, name: str, limit: float):
        if layer not in tape.behind:
            tape.behind[layer] = Behind(tape, layer)
        behind = tape.behind[layer]
        self.head, self.tail, self.series = behind.head, behind.tail, behind.series
        self.z, self.a, self.o = behind.z, behind.a, behind.o
        self.response = response(layer, name, behind.x, self.z, limit, behind.products)
        self.parameter = layer.get_parameter(name)
        points = limit / 2 / (behind.bytes + 4 * self.response.bytes)
        if points < 2:
            raise Unsuitable("the memory does not suffice for two points")
        quick = 2 * AT_ONCE / behind.bytes if self.head is None else CACHE / self.response.bytes
        self.points = int(min(points, max(2, quick)))  # to handle at once

    def look(self, positions: Tensor, shifts: list[float]) -> Tensor:
        """The changes of the loss under each of S shifts of each of K coordinates: (S, K)."""
        changes = self._look(positions, shifts)
        if self.tail.cross_entropy is not None and not changes.isfinite().all():
            self.tail.cross_entropy.stable = True
            changes = self._look(positions, shifts)
        return changes

    def _look(self, positions: Tensor, shifts: list[float]) -> Tensor:
        value = self.parameter.reshape(-1)[positions]
        steps = torch.stack([(value + shift) - value for shift in shifts])  # (S, K): the shifts after rounding
        size = max(1, self.points // len(shifts))
        if isinstance(self.response, Units) and self.series is not None:
            portions = zip(positions.split(size), steps.split(size, 1), strict=True)
            return torch.cat([self._change_units(p, s) for p, s in portions], 1)
        # slice by slice, and within each in the order in which the sensitivities lie
        i, at = positions // self.response.run % self.response.factors[1], self.response.at(positions)
        order = (i * (at.max() + 1) + at).argsort()
        at, steps, start, parts = at[order].tolist(), steps[:, order], 0, []
        for one, count in zip(*(t.tolist() for t in i[order].unique_consecutive(return_counts=True)), strict=True):
            place = Place(self, one)
            for begin in range(start, start + count, size):
                these = slice(begin, min(begin + size, start + count))
                parts.append(place.look(self.response.sensitivities(at[these]), steps[:, these]))
            start += count
        changes = torch.empty_like(steps)
        changes[:, order] = torch.cat(parts, 1)
        return changes

    def _change_units(self, positions: Tensor, steps: Tensor) -> Tensor:
        """`look` at coordinates of any units in front of a cross-entropy: (S, K) from steps (S, K)."""
        unit = positions // self.response.run
        # D = φ(z + s J) − φ(z)
        sensitivity = self.response.columns[self.response.at(positions)]  # (K, R)
        z = torch.addcmul(self.z[unit], steps.unsqueeze(2), sensitivity)  # (S, K, R)
        change = self.head.activate(z).sub_(self.a[unit])
        changes = self.series.changes(unit, change)
        if changes is None:  # the steps are too large for the series
            o = torch.addcmul(self.o, self.head.transposed[unit].unsqueeze(2), change.unsqueeze(2))  # (S, K, C, R)
            losses = self.tail.losses(torch.cat([o.flatten(0, 1), self.o.unsqueeze(0)]))
            changes = (losses[:-1] - losses[-1]).view_as(steps)
        return changes


class Place:
    """The i-th slice of a layer's output z, which some coordinates change while the rest of z stands still."""

    def __init__(self, site: Site, i: int):
        self.site, self.i = site, i
        self.z = self._slice(site.z)  # (rows, R)
        if site.head is not None:
            # o = W φ(z) + b, of which only W_slice φ(z_slice) changes
            self.add = site.head.part(site.response.factors, i)
            self.rest = self.add(site.o, -self._slice(site.a).unsqueeze(0))[0]  # (C, R)

    def _slice(self, z: Tensor) -> Tensor:
        """(rows, R) from (units, R), a copy."""
        part = slice_of(z, self.site.response.factors, self.i)  # (left, right, R)
        return part.reshape(-1, part.shape[-1]).clone()

    def shifted(self, sensitivity: Tensor, steps: Tensor) -> Tensor:
        """z + s J for S steps of K coordinates, and z itself: (S K + 1, rows, R)."""
        z = self.z.new_empty(steps.numel() + 1, *self.z.shape)
        torch.addcmul(self.z, steps[..., None, None], sensitivity, out=z[:-1].view(*steps.shape, *self.z.shape))
        z[-1] = self.z
        return z

    def losses(self, z: Tensor) -> Tensor:
        """(P,) losses for P slices z (P, rows, R), which it may overwrite."""
        site = self.site
        if site.head is None:
            whole = site.z.repeat(len(z), 1, 1)  # (P, units, R)
            target = slice_of(whole, site.response.factors, self.i)
            target.copy_(z.view_as(target))
            return site.tail.losses(whole)
        return site.head.losses(self.outputs(z))

    def outputs(self, z: Tensor) -> Tensor:
        """P outputs o, as the head has them, for P slices z (P, rows, R), which it may overwrite."""
        return self.add(self.rest, self.site.head.activate(z))

    def leave(self) -> None:
        """Tell the site where the slice has come to."""
        site, factors = self.site, self.site.response.factors
        target = slice_of(site.z, factors, self.i)
        target.copy_(self.z.view_as(target))
        if site.head is not None:
            site.o = self.outputs(self.z.unsqueeze(0).clone())[0]
            slice_of(site.a, factors, self.i).copy_(site.head.activate(self.z.clone()).view_as(target))

    def look(self, sensitivity: Tensor, steps: Tensor) -> Tensor:
        """The changes of the loss when K coordinates with sensitivities (K, rows, R) make steps (S, K): (S, K)."""
        losses = self.losses(self.shifted(sensitivity, steps))
        return (losses[:-1] - losses[-1]).view_as(steps)


class Walk:
    """Coordinates to be moved one after the other: what the next ones would change, from where those before them stand.

    Only the slice of z that moves is kept up to date; the rest follows when the next run of coordinates begins.

    Args:
        positions: (K,) flat positions.
        shift: s; each coordinate may make the step s or −s.
    """

    def __init__(self, site: Site, positions: Tensor, shift: float):
        self.site, self.positions = site, positions
        value = site.parameter.reshape(-1)[positions]
        self.steps = torch.stack([(value + shift) - value, (value - shift) - value], 1)  # (K, 2), after rounding
        runs, counts = (positions // site.response.run).unique_consecutive(return_counts=True)
        self.slices, self.ends = (runs % site.response.factors[1]).tolist(), counts.cumsum(0).tolist()
        self.begin, self.stop, self.place = 0, 0, None
        site.z, site.a, site.o = (t if t is None else t.clone() for t in (site.z, site.a, site.o))

    def look(self, start: int, count: int) -> list[tuple[float, float]]:
        """The changes of the loss under both steps of up to `count` coordinates from the start-th on, at least one."""
        if start >= self.stop:
            self._enter(start)
        if self.site.head is None:
            count = 1
        first = 2 * (start - self.begin)
        losses = self.place.losses(self.place.z + self.changes[first : first + 2 * count]).tolist()
        self.losses = dict(enumerate(losses, first))
        changes = [loss - self.base for loss in losses]
        cross_entropy = self.site.tail.cross_entropy
        if cross_entropy is not None and not cross_entropy.stable and not all(map(isfinite, changes)):
            cross_entropy.stable = True
            self.base = self._loss()
            return self.look(start, count)
        return list(zip(changes[::2], changes[1::2], strict=True))

    def move(self, k: int, side: int) -> None:
        """The k-th coordinate makes its step: side 0 is s, side 1 is −s. It is one of those looked at last."""
        step = 2 * (k - self.begin) + side
        self.place.z += self.changes[step]
        self.base = self.losses[step]

    def _enter(self, start: int) -> None:
        """Go on to the coordinates of one slice that begin at `start`, as many as fit into the memory."""
        if self.place is not None:
            self.place.leave()
        if start == self.ends[0]:
            del self.ends[0], self.slices[0]
        self.begin, self.stop = start, min(self.ends[0], start + self.site.points)
        self.place = Place(self.site, self.slices[0])
        here = slice(start, self.stop)
        response = self.site.response
        sensitivity = response.sensitivities(response.at(self.positions[here]).tolist())  # (K, rows, R)
        self.changes = (self.steps[here, :, None, None] * sensitivity.unsqueeze(1)).flatten(0, 1)  # (2 K, rows, R)
        self.base = self._loss()

    def _loss(self) -> float:
        """The loss where the slice stands, computed as the others are: equal points get equal losses."""
        return self.place.losses(self.place.z.repeat(2, 1, 1))[0].item()
