"""What lies behind a layer: from its output to the loss, run again for many outputs in one call.

Two forms are cheaper than running all calls of the suffix (chapter 9):

- An elementwise activation φ and a linear layer W follow (`Head`): only the slice of z that changes goes through φ, and
  o = W φ(z) + b changes by W_slice times the change of that slice.
- Softmax cross-entropy of o follows: it is evaluated in `cross_entropy`, with the batch as the long dimension.

All calls run as `points` runs them, if it knows each one, or else in `torch.func.vmap`.
"""

from collections.abc import Callable, Collection
from contextlib import suppress
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from zo_tutorial.queries.cross_entropy import RESHAPE, Series, cross_entropy_of
from zo_tutorial.queries.points import Points
from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, Recording, TensorLayer, bytes_of
from zo_tutorial.queries.rules import ELEMENTWISE, RELU
from zo_tutorial.queries.sensitivity import has_units_last, matrix, products, slice_of, units_back, units_first
from zo_tutorial.queries.way import Unsuitable

HeadLayer = nn.Linear | nn.Conv2d | TensorLayer
ONE_BY_ONE = 3  # so few points are run without vmap
CACHE = 3 * 2**19  # bytes of slices handled at once: they stay in the cache of a core from one operation to the next

SPARSE = 12  # times the size of its kernel that an image needs for a convolution to be quicker than its matrix


class Suffix:
    """From the output of one layer to the loss.

    Args:
        call: the recorded call of the layer.

    Raises:
        Unsuitable: the recording does not tell.
    """

    def __init__(self, recording: Recording, call: Call):
        self.recording, self.call, self.calls = recording, call, recording.after(call)
        self.cross_entropy = cross_entropy_of(recording, call, self.calls)
        # of one point: the results of all calls and as much again for what they need beside them
        self.bytes = 4 * bytes_of(call.results) + 2 * sum(bytes_of(c.results) for c in self.calls)

    def losses(self, z: Tensor) -> Tensor:
        """(K,) losses for K outputs z (K, units, R)."""
        if self.cross_entropy is not None:
            return self.cross_entropy.losses(z)
        assert self.call.layer is not None
        return self.replayed(units_back(self.call.layer, z, self.call.results[0].shape))

    def replayed(self, z: Tensor) -> Tensor:
        """(K,) losses for K outputs of the layer's own shape."""
        if len(z) <= ONE_BY_ONE:
            return torch.stack([self._loss(point).reshape(()) for point in z])
        return vmap(self._loss, randomness="same")(z).reshape(-1)

    def _loss(self, z: Tensor) -> Tensor:
        return self.recording.replay(self.calls, {id(self.call.results[0]): z})


class Head:
    """An elementwise activation φ and a linear layer behind a layer, o = W φ(z) + b, then the suffix of that layer.

    Outputs that go straight into cross-entropy have this form too, with φ the identity and W the unit matrix.

    Raises:
        Unsuitable: something else comes behind the layer.
    """

    def __init__(self, recording: Recording, call: Call):
        self.activation: Call | None = None
        self.bias: Tensor | None = None
        suffix = Suffix(recording, call)
        if suffix.cross_entropy is not None:
            self.suffix = suffix
            size = call.results[0].shape[-1]
            if size**2 * call.results[0].element_size() > CACHE:  # so many classes that the unit matrix is too large
                raise Unsuitable
            self.weight = self.transposed = torch.eye(size, dtype=call.results[0].dtype, device=call.results[0].device)
            return
        head = self._follow(recording, call, suffix)
        if isinstance(head, nn.Conv2d):
            raise Unsuitable
        self.weight, self.bias = matrix(head), head.bias  # (C, units), (C,)
        self.transposed = self.weight.T.contiguous()

    def _follow(self, recording: Recording, call: Call, suffix: Suffix, between: Collection = ()) -> HeadLayer:
        """Find activation and suffix; return the linear layer. Calls of `between` may stand in front of it."""
        if len(suffix.calls) < 2:
            raise Unsuitable
        activation, *calls = suffix.calls
        z, a = call.results[0], activation.results[0]
        passed, enters = [z, a], a
        while calls and calls[0].function in between and calls[0].args[0] is enters:
            enters = calls.pop(0).results[0]
            passed.append(enters)
        elementwise = activation.function in ELEMENTWISE and [id(t) for t in activation.tensors] == [id(z)]
        elsewhere = {id(tensor) for c in calls[1:] for tensor in c.tensors} | {id(recording.loss)}
        layer = calls[0].layer if calls else None
        if not isinstance(layer, (nn.Linear, nn.Conv2d, *TENSOR_LAYERS)) or not elementwise:
            raise Unsuitable
        if elsewhere & set(map(id, passed)) or not calls[0].args or calls[0].args[0] is not enters:
            raise Unsuitable
        self.activation, self.suffix, self.z = activation, Suffix(recording, recording.call_of(layer)), id(z)
        return layer

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

    def back(self, factors: tuple, i: int, slope: Tensor) -> Tensor:
        """dL/da of a slice, (rows, R), from dL/do (C, R)."""
        transposed = slice_of(self.transposed, factors, i)
        return transposed.reshape(-1, transposed.shape[-1]) @ slope

    def losses(self, o: Tensor) -> Tensor:
        """(P,) losses from outputs o (P, C, R)."""
        return self.suffix.losses(o)


class ConvolutionHead(Head):
    """The same behind a convolution: φ, then a convolution, or a linear layer that takes all places of all channels.

    That linear layer is a convolution too, with a kernel as large as the image. A changed channel meets one channel of
    the kernel only, 1 of c: a small linear map. Its matrix is what it makes of unit images; that of the linear layer
    stands in its weight. Outputs o have the layer's own shape (B, C, height, width), except in front of a
    cross-entropy, which takes (C, B).
    """

    def __init__(self, recording: Recording, call: Call):
        if not isinstance(call.layer, nn.Conv2d) or call.results[0].dim() != 4:
            raise Unsuitable
        layer = self._follow(recording, call, Suffix(recording, call), RESHAPE)
        if self.suffix.cross_entropy is not None and self.suffix.cross_entropy.rows is not None:
            raise Unsuitable
        _, channels, *self.size = call.results[0].shape
        self.bias = layer.bias
        self.options: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            same = recording.call_of(layer).args[0].shape == call.results[0].shape
            if not same or layer.groups > 1 or layer.padding_mode != "zeros":
                raise Unsuitable
            self.kernel = layer.weight
            self.options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        else:
            weight = matrix(layer)
            if weight.shape[1] != channels * prod(self.size):
                raise Unsuitable
            self.kernel = weight.view(-1, channels, *self.size)  # (C, channels, height, width)
        self.flat, pixels = not isinstance(layer, nn.Conv2d), prod(self.size)
        made = recording.call_of(layer).results[0][0].numel()  # of one image
        small = pixels * max(pixels, made) * self.kernel.element_size() <= CACHE
        # with many zeros the matrix costs more than torch's convolution of a single channel
        self.dense = self.flat or (small and pixels < SPARSE * prod(self.kernel.shape[2:]))

    def _convolve(self, images: Tensor, i: int) -> Tensor:
        """What the i-th channel of the kernel makes of images (N, 1, H, W): (N, C, height, width)."""
        return F.conv2d(images, self.kernel[:, i : i + 1], **self.options)

    def outputs(self, a: Tensor) -> Tensor:
        """o from a (channels, R)."""
        a = a.view(len(a), -1, *self.size).transpose(0, 1)  # (B, channels, H, W)
        return self._shaped(F.conv2d(a, self.kernel, self.bias, **self.options))

    def part(self, factors: tuple, i: int) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives rest + W_slice a, P outputs, from a rest in the shape of one and P slices a (P, 1, R)."""
        if not self.dense:
            return lambda rest, a: self._convolve(a.view(-1, 1, *self.size), i).view(len(a), *rest.shape).add_(rest)
        weight = self._matrix(i)

        def add(rest, a):
            if self.suffix.cross_entropy is not None:
                a = a.view(len(a), -1, len(weight)).transpose(1, 2)  # (P, H W, B)
                return torch.baddbmm(rest.expand(len(a), -1, -1), weight.T.expand(len(a), -1, -1), a)
            a = a.view(len(a), -1, len(weight))  # (P, B, H W)
            o = torch.baddbmm(rest.flatten(1).expand(len(a), -1, -1), a, weight.expand(len(a), -1, -1))
            return o.unflatten(2, rest.shape[1:])  # (P, B, C, height, width)

        return add

    def back(self, factors: tuple, i: int, slope: Tensor) -> Tensor:
        return (self._matrix(i) @ slope).T.reshape(1, -1)

    def _matrix(self, i: int) -> Tensor:
        """The map from the i-th channel of an image to what the layer makes of it: (H W, C height width)."""
        if self.flat:
            return self.kernel[:, i].flatten(1).T
        images = torch.eye(prod(self.size), dtype=self.kernel.dtype, device=self.kernel.device)
        return self._convolve(images.view(-1, 1, *self.size), i).flatten(1)

    def _shaped(self, o: Tensor) -> Tensor:
        return o if self.suffix.cross_entropy is None else o.flatten(1).T

    def losses(self, o: Tensor) -> Tensor:
        if self.suffix.cross_entropy is not None:
            return self.suffix.losses(o)
        return self.suffix.replayed(o.flatten(2) if self.flat else o)


class CachedLayer:
    """A layer's output where the parameters stand, and what lies between it and the loss.

    Attributes:
        x, z: the layer's input as it was given, and its output (units, R).
        products: of a tensor layer's cores.
        head, suffix: the special form of what comes next, if it has one, and all the rest.
        a, o: φ(z) (units, R) and W φ(z) + b (C, R), with a head.
        series: with a head that enters cross-entropy.
        points: what runs the calls behind it by rules, if there are such; not in front of a cross-entropy.
        bytes: what one perturbed output needs, apart from the slice that changes.
        copied: what `points` may copy of the recording at most (bytes), whatever it has copied so far.
    """

    def __init__(self, recording: Recording, layer: nn.Module):
        call = recording.call_of(layer)
        if not recording.undisturbed(call):
            raise Unsuitable("the input of the layer is not there any more")
        self.x, z = call.args[0], recording.result(call)
        self.z = units_first(layer, z).contiguous()
        self.products = products(layer) if isinstance(layer, TENSOR_LAYERS) else None
        self.head: Head | None = None
        self.series: Series | None = None
        self.a = self.o = self.z.new_empty(0)  # without a head there are none
        self.points: Points | None = None
        tensors = {id(t): t for c in recording.calls for t in (*c.tensors, *c.results)}.values()
        self.copied = bytes_of(t for t in tensors if t.layout == torch.strided and not t.is_contiguous())
        try:
            self.head = Head(recording, call) if has_units_last(layer, z) else ConvolutionHead(recording, call)
            cross_entropy = self.head.suffix.cross_entropy
            some = cross_entropy is not None and cross_entropy.rows is not None
            if some and not isinstance(layer, (nn.Linear, *TENSOR_LAYERS)):  # its rows may depend on each other
                self.head = None
                raise Unsuitable
        except Unsuitable:
            self.suffix = Suffix(recording, call)
            self.bytes = self.suffix.bytes + 2 * bytes_of([self.z])
            self._side_by_side(recording, call)
            return
        self.suffix = self.head.suffix
        self.bytes = self.suffix.bytes
        if self.suffix.cross_entropy is None:
            self._side_by_side(recording, call)
        if self.suffix.cross_entropy is not None and self.suffix.cross_entropy.rows is not None:
            # each row of x makes the same row of the outputs, and some do not count
            rows = self.suffix.cross_entropy.rows
            self.x, self.z = self.x.flatten(0, -2)[rows], self.z[:, rows]
        self.a = self.head.activate(self.z.clone())
        self.o = self.head.outputs(self.a)
        if self.suffix.cross_entropy is not None:
            self.o = self.suffix.cross_entropy.shifted(self.o)
            if not isinstance(self.head, ConvolutionHead):
                self.series = Series(self.suffix.cross_entropy, self.o, self.head.weight)

    def _side_by_side(self, recording: Recording, call: Call) -> None:
        """Find out whether there is a rule for each call."""
        if call.layer is not None and has_units_last(call.layer, call.results[0]):
            with suppress(Unsuitable):
                self.points = Points(recording, call)
                self.bytes = Suffix(recording, call).bytes + 2 * bytes_of([self.z])
