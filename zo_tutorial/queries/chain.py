"""Many points through a chain of layers at once, each point with weights of its own: plain batched products.

A chain is a dense or tensor layer, then in turn an elementwise activation and another such layer, then the loss. Its
points need no `vmap`: the batch is the long dimension, a dense layer is one batched product, and an activation does not
care about shapes.
"""

from functools import reduce
from math import prod

import torch
from torch import Tensor, nn

from zo_tutorial.queries.cost import CACHED, CALL, MEMORY, RATE, SETUP, multiply_adds, vmapped
from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, Recording, TensorLayer, bytes_of
from zo_tutorial.queries.sensitivity import as_ttm, units_first
from zo_tutorial.queries.suffix import CACHE, Head, Suffix
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
        bytes: of one point's largest output.
    """

    def __init__(self, recording: Recording, start: Call):
        if not isinstance(start.layer, (nn.Linear, *TENSOR_LAYERS)):
            raise Unsuitable("no dense or tensor layer comes first")
        self.recording = recording
        self.x = units_first(start.layer, start.args[0]).contiguous().unsqueeze(0)  # (1, in, R)
        self.suffix, self.links, call = Suffix(recording, start), list[Link](), start
        self.layers: list[LayerOfChain] = [start.layer]
        while self.suffix.cross_entropy is None:
            try:
                link = Link(recording, call)
            except Unsuitable:
                break
            self.links.append(link)
            self.layers.append(link.layer)
            self.suffix, call = link.suffix, recording.call_of(link.layer)
        self.bytes = max(bytes_of(recording.call_of(layer).results) for layer in self.layers)
        self.after = self.suffix.calls if self.suffix.cross_entropy is None else []
        if self.suffix.cross_entropy is not None:
            o = units_first(self.layers[-1], recording.result(call)).contiguous()  # (C, R)
            self.largest = o.amax(0)  # so much lower, exp cannot overflow
            self.terms = 0.0  # what the loss has beside the cross-entropy
            self.terms = recording.loss.detach().reshape(()) - self._cross_entropy(o.unsqueeze(0))

    def seconds(self, asked: int, known: bool) -> float:
        """An estimate of what a query takes; `known`: without the product of the first layer."""
        calls = list(map(self.recording.call_of, self.layers))
        points = max(1.0, min(asked, CACHE / self.bytes))
        moved = 4 * sum(bytes_of(call.results) for call in calls) / CACHED
        copied = 3 * bytes_of(p for layer in self.layers[1:] for p in layer.parameters()) / MEMORY
        products = sum(map(multiply_adds, calls[1:] if known else calls)) / RATE
        tail = vmapped(self.recording, asked, [], self.after) if self.after else 0.0
        return SETUP / asked + 10 * CALL * len(calls) / points + moved + copied + products + tail

    def first(self, pairs: dict[nn.Module, Pairs]) -> Tensor:
        """The outputs of the first layer (P, out, R), with weights of each point; see `losses`."""
        return outputs_of(self.layers[0], self.x, pairs[self.layers[0]], None)

    def losses(self, z: Tensor, pairs: dict[nn.Module, Pairs], factors: dict[nn.Module, Factors]) -> Tensor:
        """(P,) losses from outputs z of the first layer (P, out, R), which it may overwrite.

        Args:
            pairs, factors: {layer: what its weights are at the points}.
        """
        for link in self.links:
            z = outputs_of(link.layer, link.activate(z), pairs.get(link.layer, []), factors.get(link.layer))
        return self.suffix.losses(z) if self.suffix.cross_entropy is None else self._cross_entropy(z)

    def _cross_entropy(self, o: Tensor) -> Tensor:
        """(P,) losses from outputs (P, C, R)."""
        cross_entropy = self.suffix.cross_entropy
        assert cross_entropy is not None
        o = o - self.largest
        if cross_entropy.rows is not None:
            o = o[:, :, cross_entropy.rows]
        losses = cross_entropy.losses(o)
        if not cross_entropy.stable and not losses.isfinite().all():
            cross_entropy.stable = True
            losses = cross_entropy.losses(o)
        return losses + self.terms


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
        here = x[p % len(x)].reshape(count, n, -1)  # (nL, nR, R)
        torch.bmm(right[p % len(right)].expand(count, -1, -1), here, out=inner)  # (nL, r mR, R)
        torch.mm(left[p % len(left)], inner.view(left.shape[2], -1), out=y[p])  # (mL, nL r) @ (nL r, mR R)
    return y.view(points, -1, x.shape[2])


def _multiply_adds(cores: list[Tensor], split: int, columns: int) -> int:
    """Of a point, with so many cores to the left."""
    sizes = [core.shape[2:4] for core in cores]
    m_left, n_left = prod(m for m, _ in sizes[:split]), prod(n for _, n in sizes[:split])
    m, n = prod(m for m, _ in sizes[split:]), prod(n for _, n in sizes[split:])
    rank = cores[split].shape[1]
    joining = rank * (m_left * n_left + m * n) * max(core.shape[4] for core in cores)
    return joining + (rank * m * n_left * (n + m_left) if split else m * n) * columns


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Two neighbouring cores of each point as one: (P, r, M m, N n, s) from (P, r, M, N, t) and (P, t, m, n, s)."""
    whole = a.flatten(1, 3) @ b.flatten(2)  # (P, r M N, t) @ (P, t, m n s)
    whole = whole.view(len(whole), *a.shape[1:4], *b.shape[2:]).transpose(3, 4)  # (P, r, M, m, N, n, s)
    return whole.flatten(4, 5).flatten(2, 3)
