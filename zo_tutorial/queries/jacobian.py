"""How a layer's output answers to all entries of one parameter at once, sample by sample.

A function of the output z of a sample with the derivative g by z has the derivative g J_e by the entry e, J_e being the
sensitivity of z (`sensitivity`). The U numbers in the z of a sample are viewed as `factors`, (left, G, right). An entry
belongs to one of the G groups, moves the K = left · right numbers of that group only, and does so alike in all groups:
entry e = (group, t) has the sensitivity J[b, :, t]. So J is (N, K, T) for N samples and G T entries.

Each class here has the attributes `factors`; `blocks` and `inner`, the G and K of J; and `size`, T.
"""

import torch
from torch import Tensor

from zo_tutorial.queries.sensitivity import Units
from zo_tutorial.queries.way import Unsuitable

Products = tuple[list[Tensor], list[Tensor], list[Tensor]]


class Jacobian:
    """What the kinds have in common."""

    factors: tuple[int, int, int]
    blocks: int
    inner: int
    size: int

    def form(self, some: slice, out: Tensor) -> None:
        """J of some samples (N, K, T)."""
        raise NotImplementedError

    def entries(self, positions: Tensor) -> Tensor:
        """Which entries lie at these flat positions of the parameter."""
        return positions

    def arranged(self, g: Tensor) -> Tensor:
        """Derivatives g (N, C, U) as the factor of J: (N, C G, K)."""
        return g.unflatten(2, self.factors).transpose(2, 3).reshape(len(g), -1, self.inner)

    def reach(self, j: Tensor) -> Tensor:
        """How far a step of 1 may move each number, alike in all groups: (N, left right)."""
        return j.abs().amax(2)

    def rows(self, j: Tensor, sample: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """The entries that move some of the U numbers, and their sensitivities (K, T)."""
        _, groups, right = self.factors
        group, place = number // right % groups, number // right // groups * right + number % right
        entries = group.unsqueeze(1) * self.size + torch.arange(self.size, device=j.device)
        return entries, j[sample, place]


class UnitJacobian(Jacobian):
    """Of a parameter whose entries move one unit each, at all its places: of dense layers, convolutions, biases."""

    def __init__(self, response: Units, samples: int):
        if response.group != response.factors[1]:
            raise Unsuitable("the units are in groups")
        self.columns = response.columns.reshape(len(response.columns), samples, -1)  # (T, N, places)
        self.size, _, places = self.columns.shape
        self.factors = 1, response.factors[1], places
        self.blocks, self.inner = response.factors[1], places

    def form(self, some: slice, out: Tensor) -> None:
        out.copy_(self.columns[:, some].permute(1, 2, 0))


class CoreJacobian(Jacobian):
    """Of the core G_k (r, m, n, s) of a tensor layer, J = L[r, mL, nL] x[nL, n, nR] R[nR, mR, s].

    Args:
        x: the layer's input (N, in).
    """

    def __init__(self, k: int, products: Products, x: Tensor):
        cores, left, right = products
        self.shape = r, m, n, s = cores[k].shape
        before, after = left[k][0].movedim(-1, 0), right[k][..., 0].permute(2, 1, 0)  # (r, mL, nL), (nR, mR, s)
        self.tall, self.wide = before.shape[1], after.shape[1]
        self.before, self.after = before.flatten(0, 1), after.flatten(1)  # (r mL, nL), (nR, mR s)
        self.x = x.reshape(len(x), before.shape[2], n, len(after))
        self.factors, self.size = (self.tall, m, self.wide), r * n * s
        self.blocks, self.inner = m, self.tall * self.wide
        # which product is the smaller one, and comes first
        self.left_first = self.before.numel() * n * len(after) + self.after.numel() * r * self.tall * n < (
            self.after.numel() * n * before.shape[2] + self.before.numel() * n * s * self.wide
        )

    def form(self, some: slice, out: Tensor) -> None:
        # T in the order (r, n, s)
        x, (r, _, n, s) = self.x[some], self.shape
        samples, nl, _, nr = x.shape
        if self.left_first:
            product = self.before @ x.transpose(0, 1).reshape(nl, -1)
            product = product.view(r, self.tall, samples, n, nr).permute(2, 1, 0, 3, 4).reshape(-1, nr) @ self.after
            product = product.view(samples, self.tall, r * n, self.wide, s).transpose(2, 3)
        else:
            product = (x.reshape(-1, nr) @ self.after).view(samples, nl, n, self.wide, s)
            product = self.before @ product.permute(1, 0, 3, 2, 4).reshape(nl, -1)  # (r mL, N mR n s)
            product = product.view(r, self.tall, samples, self.wide, n * s).permute(2, 1, 3, 0, 4)
        out.view(product.shape).copy_(product)

    def entries(self, positions: Tensor) -> Tensor:
        r, m, n, s = self.shape  # their order
        rm, ns = positions // (n * s), positions % (n * s)
        return (rm % m * r + rm // m) * (n * s) + ns


class WideJacobian(Jacobian):
    """Of a core with mL = m = 1, as those of the input in TT, whose entries move all numbers of z.

    J = Σ over nR of R[nR, mR, s] X[nR, r, n] with X = L x. Not J is formed, but X (N, nR, r n), and g R in the place of
    g: `blocks` and `inner` count s and nR.
    """

    def __init__(self, core: CoreJacobian):
        r, _, n, s = self.shape = core.shape
        self.x, self.before = core.x, core.before  # (N, nL, n, nR), (r, nL)
        self.inner, self.blocks, self.size = len(core.after), s, r * n
        self.after = core.after.view(self.inner, -1, s).permute(1, 2, 0)  # (mR, s, nR)
        self.factors = 1, 1, len(self.after)

    def form(self, some: slice, out: Tensor) -> None:
        x = self.x[some]
        product = self.before @ x.transpose(0, 1).flatten(1)  # (r, N n nR)
        out.view(len(x), self.inner, -1, x.shape[2]).copy_(product.view(-1, len(x), *x.shape[2:]).permute(1, 3, 0, 2))

    def entries(self, positions: Tensor) -> Tensor:
        s = self.blocks
        return positions % s * self.size + positions // s  # (r, n, s) as (s, r, n)

    def arranged(self, g: Tensor) -> Tensor:
        return (g @ self.after.flatten(1)).view(len(g), -1, self.inner)

    def reach(self, j: Tensor) -> Tensor:
        return super().reach(j) @ self.after.abs().amax(1).T  # a bound

    def rows(self, j: Tensor, sample: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        found = (self.after[number] @ j[sample]).flatten(1)  # (K, s r n)
        return torch.arange(found.shape[1], device=j.device).expand(len(found), -1), found
