"""How a layer's output answers to all entries of one parameter at once, sample by sample.

A function of the output z of a sample with the derivative g by z has the derivative g J_e by the entry e, J_e being the
sensitivity of z (`sensitivity`). The U numbers in the z of a sample are viewed as `factors`, (left, G, right). An entry
belongs to one of the G groups, moves the K = left · right numbers of that group only, and does so alike in all groups:
entry e = (group, t) has the sensitivity J[b, :, t]. So J is (N, K, T) for N samples and G T entries.
"""

from torch import Tensor

from zo_tutorial.queries.sensitivity import Units
from zo_tutorial.queries.way import Unsuitable

Products = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _arranged(g: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """(N, C G, K) from derivatives g (N, C, U)."""
    left, groups, right = factors
    return g.unflatten(2, factors).transpose(2, 3).reshape(len(g), g.shape[1] * groups, left * right)


class UnitJacobian:
    """Of a parameter whose entries move one unit each, at all its places: of dense layers, convolutions, biases.

    Attributes:
        factors: of the numbers of z.
        size: T.
    """

    def __init__(self, response: Units, samples: int):
        if response.group != response.factors[1]:
            raise Unsuitable("the units are in groups")
        self.columns = response.columns.reshape(len(response.columns), samples, -1)  # (T, N, places)
        self.size, _, places = self.columns.shape
        self.factors = 1, response.factors[1], places

    def form(self, some: slice, out: Tensor) -> None:
        """J of some samples (N, K, T)."""
        out.copy_(self.columns[:, some].permute(1, 2, 0))

    def arranged(self, g: Tensor) -> Tensor:
        """Derivatives g (N, C, U) as the factor of J: (N, C G, K)."""
        return _arranged(g, self.factors)

    def entries(self, positions: Tensor) -> Tensor:
        """Which entries lie at these flat positions of the parameter."""
        return positions


class CoreJacobian:
    """Of the core G_k (r, m, n, s) of a tensor layer, J = L[r, mL, nL] x[nL, n, nR] R[nR, mR, s]; attributes as above.

    Args:
        x: the layer's input (N, in).
    """

    def __init__(self, k: int, products: Products, x: Tensor):
        cores, left, right = products
        self.shape = r, m, n, s = cores[k].shape
        before, after = left[k][0].movedim(-1, 0), right[k][..., 0].permute(2, 1, 0)  # (r, mL, nL), (nR, mR, s)
        self.rows, self.columns = before.shape[1], after.shape[1]
        self.before, self.after = before.flatten(0, 1), after.flatten(1)  # (r mL, nL), (nR, mR s)
        self.x = x.reshape(len(x), before.shape[2], n, len(after))
        self.factors, self.size = (self.rows, m, self.columns), r * n * s
        # which product is the smaller one, and comes first
        self.left_first = self.before.numel() * n * len(after) + self.after.numel() * r * self.rows * n < (
            self.after.numel() * n * before.shape[2] + self.before.numel() * n * s * self.columns
        )

    def form(self, some: slice, out: Tensor) -> None:
        """J of some samples (N, K, T), T in the order (r, n, s)."""
        x, (r, _, n, s) = self.x[some], self.shape
        samples, nl, _, nr = x.shape
        if self.left_first:
            product = self.before @ x.transpose(0, 1).reshape(nl, -1)
            product = product.view(r, self.rows, samples, n, nr).permute(2, 1, 0, 3, 4).reshape(-1, nr) @ self.after
            product = product.view(samples, self.rows, r * n, self.columns, s).transpose(2, 3)
        else:
            product = (x.reshape(-1, nr) @ self.after).view(samples, nl, n, self.columns, s)
            product = self.before @ product.permute(1, 0, 3, 2, 4).reshape(nl, -1)  # (r mL, N mR n s)
            product = product.view(r, self.rows, samples, self.columns, n * s).permute(2, 1, 3, 0, 4)
        out.view(product.shape).copy_(product)

    def arranged(self, g: Tensor) -> Tensor:
        """Derivatives g (N, C, U) as the factor of J: (N, C G, K)."""
        return _arranged(g, self.factors)

    def entries(self, positions: Tensor) -> Tensor:
        """Which entries lie at these flat positions of the parameter: its order is (r, m, n, s)."""
        r, m, n, s = self.shape
        rm, ns = positions // (n * s), positions % (n * s)
        return (rm % m * r + rm // m) * (n * s) + ns


Jacobian = UnitJacobian | CoreJacobian
