"""Many points through a chain of layers at once, each point with weights of its own: plain batched products.

A chain is a dense or tensor layer, then in turn an elementwise activation and another such layer, then the loss. Its
points need no `vmap`: the batch is the long dimension, a dense layer is one batched product, and an activation does not
care about shapes.
"""

from functools import reduce
from math import prod

import torch
from torch import Tensor, nn

from zo_tutorial.queries.cost import CACHED, CALL, RATE
from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, Recording, TensorLayer, bytes_of, version
from zo_tutorial.queries.sensitivity import as_ttm, units_first
from zo_tutorial.queries.suffix import Head, Suffix
from zo_tutorial.queries.way import Unsuitable

Pairs = list[tuple[Tensor, Tensor]]  # a parameter (*shape) and what the points have in its place (P, *shape)
Factors = tuple[Tensor, Tensor]  # A (P, out, r) and C (P, in, r) of what W + A Cᵀ has more than W
LayerOfChain = nn.Linear | TensorLayer


class Link(Head):
    """An elementwise activation and a layer behind it."""

    def __init__(self, recording: Recording, call: Call):
        layer = self._follow(recording, call, Suffix(recording, call))
        if isinstance(layer, nn.Conv2d):
            raise Unsuitable
        self.layer: LayerOfChain = layer


class Chain:
    """What follows a layer, as far as it is a chain, and then the loss.

    Args:
        start: the call of its first layer.

    Attributes:
        layers: those of the chain.
        bytes: of what one point needs at once.
    """

    def __init__(self, recording: Recording, start: Call):
        self.start, self.links, call = start, list[Link](), start
        self.suffix = Suffix(recording, start)
        while self.suffix.cross_entropy is None:
            try:
                link = Link(recording, call)
            except Unsuitable:
                break
            self.links.append(link)
            self.suffix, call = link.suffix, recording.call_of(link.layer)
        self.layers = [start.layer, *(link.layer for link in self.links)]
        self.bytes = 3 * max(bytes_of(recording.call_of(layer).results) for layer in self.layers if layer)
        self.after = self.suffix.calls if self.suffix.cross_entropy is None else []
        if self.suffix.cross_entropy is not None:  # so much lower that exp cannot overflow
            outputs = call.results[0] if version(call.results[0]) == call.result_versions[0] else None
            if outputs is None:
                raise Unsuitable("the outputs are not there any more")
            self.largest = units_first(self.links[-1].layer if self.links else start.layer, outputs).amax(0)

    def first(self, pairs: Pairs) -> Tensor:
        """The output of the first layer (P, out, R) with parameters of each point."""
        layer = self.start.layer
        return outputs_of(layer, units_first(layer, self.start.args[0]).unsqueeze(0), pairs, None)

    def losses(self, z: Tensor, pairs: dict, factors: dict) -> Tensor:
        """(P,) losses from outputs z of the first layer (P, out, R), which it may overwrite.

        Args:
            pairs, factors: {layer: what its weights are at the points}.
        """
        for link in self.links:
            z = outputs_of(link.layer, link.activate(z), pairs.get(link.layer, []), factors.get(link.layer))
        cross_entropy = self.suffix.cross_entropy
        if cross_entropy is None:
            return self.suffix.losses(z)
        z = z - self.largest
        if cross_entropy.rows is not None:
            z = z[:, :, cross_entropy.rows]
        losses = cross_entropy.losses(z)
        if not cross_entropy.stable and not losses.isfinite().all():
            cross_entropy.stable = True
            losses = cross_entropy.losses(z)
        return losses


def outputs_of(layer: LayerOfChain, x: Tensor, pairs: Pairs, factors: Factors | None) -> Tensor:
    """What a layer makes of x (P, in, R), or of one x for all points (1, in, R): (P, out, R)."""
    own = {id(old): new for old, new in pairs}

    def of(parameter: Tensor) -> Tensor:
        return own.get(id(parameter), parameter.unsqueeze(0))

    if isinstance(layer, TENSOR_LAYERS):
        shapes = as_ttm(layer)
        cores = [of(core) for core in layer.cores]
        z = contracted([core.reshape(len(core), *shape) for core, shape in zip(cores, shapes, strict=True)], x)
    else:
        z = of(layer.weight) @ x
        if factors is not None:
            a, c = factors
            z = z + a @ (c.mT @ x)  # (P, out, r) @ (P, r, R)
    return z if layer.bias is None else z + of(layer.bias).unsqueeze(2)


def contracted(cores: list[Tensor], x: Tensor) -> Tensor:
    """W x for cores (P, r, m, n, s) and x (P, in, R), or one for all points: (P, out, R).

    The cores are joined to two, L (mL, nL, r) and R (r, mR, nR), or to one, the matrix; whichever takes the fewest
    multiply-adds. With two, R meets x first, then L:

        y[mL, mR] = Σ over nL, r of L[mL, nL, r] Σ over nR of R[r, mR, nR] x[nL, nR]
    """
    split = min(range(len(cores)), key=lambda k: _multiply_adds(cores, k, x.shape[2]))
    right = reduce(_joined, cores[split:])  # (P, r, mR, nR, 1)
    rank, m, n = right.shape[1:4]
    right = right.reshape(len(right), rank * m, n)
    if split == 0:
        return right @ x
    left = reduce(_joined, cores[:split])  # (P, 1, mL, nL, r)
    left = left.reshape(len(left), left.shape[2], -1)  # (P, mL, nL r)
    points, count = max(len(left), len(right), len(x)), left.shape[2] // rank
    y = x.new_empty(points, left.shape[1], m * x.shape[2])
    inner = x.new_empty(count, rank * m, x.shape[2])  # one for all points in turn: it stays in the cache
    for p in range(points):
        here = x[p % len(x)].view(count, n, -1)  # (nL, nR, R)
        torch.bmm(right[p % len(right)].expand(count, -1, -1), here, out=inner)  # (nL, r mR, R)
        torch.mm(left[p % len(left)], inner.view(left.shape[2], -1), out=y[p])  # (mL, nL r) @ (nL r, mR R)
    return y.view(points, -1, x.shape[2])


def _multiply_adds(cores: list[Tensor], split: int, columns: int) -> int:
    """Of a point, with so many cores to the left."""
    shapes = [core.shape[1:] for core in cores]
    left, right = ([prod(sizes) for sizes in zip(*part, strict=True)] for part in (shapes[:split] or [(1,) * 4], shapes[split:]))
    (_, m_left, n_left, _), (_, m, n, _) = left, right
    rank = shapes[split][0] if split else 1
    joining = rank * (m_left * n_left + m * n) * max(shape[0] for shape in shapes)
    if split == 0:
        return m * n * columns + joining
    return rank * m * n_left * (n + m_left) * columns + joining


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Two neighbouring cores of each point as one: (P, r, M m, N n, s) from (P, r, M, N, t) and (P, t, m, n, s)."""
    whole = a.flatten(1, 3) @ b.flatten(2)  # (P, r M N, t) @ (P, t, m n s)
    whole = whole.view(len(whole), *a.shape[1:4], *b.shape[2:]).transpose(3, 4)  # (P, r, M, m, N, n, s)
    return whole.flatten(4, 5).flatten(2, 3)
