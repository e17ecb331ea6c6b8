"""How a layer's output answers to a change of one weight: z(θ + s e_c) = z(θ) + s J_c, exactly.

The output z of a dense, convolutional, TT or TTM layer is affine in each single one of its parameters. So a
sensitivity J_c, formed from the layer's input x and its other parameters, gives the output under any change s:

    dense        z_i = Σ_j W_ij x_j                    W_ij changes one feature of z:  J = x_j
    convolution  z_i = Σ_q W_iq x_q, x_q the patches   W_iq changes one channel of z:  J = x_q
    bias                                               b_i changes feature or channel i:  J = 1
    TTM, TT      z = L G_k R x                         G_k[r,m,n,s] changes the rows of z with m_k = m:
                                                       J = L[:,:,r] x[:,n,:] R[s,:,:]

with L and R the products of the cores before and after the k-th. Chapter 9 derives it.

Shapes: a feature or channel is a unit; z is held as (units, R), where R runs over the batch and all else.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.tensor import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn

TENSOR_LAYERS = (TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn)
FORWARDS = {layer.forward for layer in (nn.Linear, nn.Conv2d, *TENSOR_LAYERS)}


def is_affine(layer: nn.Module) -> bool:
    """Whether a module computes what this file says: a supported layer, its forward not overridden, without hooks."""
    return type(layer).forward in FORWARDS and not layer._forward_hooks and not layer._forward_pre_hooks


def units_first(layer: nn.Module, z: Tensor) -> Tensor:
    """z as (units, R)."""
    z = z.movedim(_unit_dim(layer), 0)
    return z.reshape(len(z), -1)


def units_back(layer: nn.Module, z: Tensor, shape: torch.Size) -> Tensor:
    """(K, units, R) as K outputs of the layer's own shape: (K, *shape)."""
    dim = _unit_dim(layer)
    rest = [*shape]
    del rest[dim]
    return z.reshape(len(z), z.shape[1], *rest).movedim(1, dim)


def _unit_dim(layer: nn.Module) -> int:
    return -3 if isinstance(layer, nn.Conv2d) else -1


class UnitSlices(NamedTuple):
    """K coordinates of a parameter, each of which changes one unit of z.

    Attributes:
        where: (K,) their places among the positions asked for.
        sensitivity: J, (K, R).
        unit: (K,).
    """

    where: Tensor
    sensitivity: Tensor
    unit: Tensor

    def of(self, z: Tensor) -> Tensor:
        """The slice of z (units, R) that each coordinate changes: (K, R)."""
        return z[self.unit]

    def add(self, z: Tensor, change: Tensor) -> None:
        """z (S, K, units, R) += change (S, K, R), in place."""
        z[:, torch.arange(z.shape[1], device=z.device), self.unit] += change

    def through(self, weight: Tensor, change: Tensor, o: Tensor, out: Tensor) -> None:
        """out (S, K, C, R) = o (C, R) + weight (C, units) times the change (S, K, R)."""
        torch.addcmul(o, weight.T[self.unit].unsqueeze(2), change.unsqueeze(2), out=out)


class RowSlices(NamedTuple):
    """K coordinates of a core, all of which change the same rows of z: those with m_k = m.

    Attributes:
        where: (K,) their places among the positions asked for.
        sensitivity: J, (K, mL, mR, R).
        factors: (mL, m_k, mR), whose product is the number of units.
        row: m.
    """

    where: Tensor
    sensitivity: Tensor
    factors: tuple[int, int, int]
    row: int

    def of(self, z: Tensor) -> Tensor:
        """The slice of z (units, R) that all coordinates change: (mL, mR, R)."""
        return z.view(*self.factors, -1)[:, self.row]

    def add(self, z: Tensor, change: Tensor) -> None:
        """z (S, K, units, R) += change (S, K, mL, mR, R), in place."""
        z.view(*z.shape[:2], *self.factors, -1)[:, :, :, self.row] += change

    def through(self, weight: Tensor, change: Tensor, o: Tensor, out: Tensor) -> None:
        """out (S, K, C, R) = o (C, R) + weight (C, units) times the change (S, K, mL, mR, R)."""
        weight = weight.reshape(-1, *self.factors)[:, :, self.row].flatten(1)  # (C, mL mR)
        change, out = change.flatten(2, 3).flatten(0, 1), out.flatten(0, 1)  # (S K, mL mR, R), (S K, C, R)
        torch.baddbmm(o.expand_as(out), weight.expand(len(out), -1, -1), change, out=out)


class Units:
    """A parameter whose entries change one unit each: a bias, or the weight of a dense layer or a convolution."""

    def __init__(self, layer: nn.Module, name: str, x: Tensor, z: Tensor):
        parameter = getattr(layer, name)
        self.row = parameter[0].numel()  # entries that one unit has
        self.group, groups = len(parameter), 1  # units that share their columns
        if name == "bias":
            self.columns = torch.ones((), dtype=z.dtype, device=z.device).expand(1, z.shape[1])  # (1, R)
        elif isinstance(layer, nn.Conv2d):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
            patches = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)  # ([B,] Q, positions)
            self.columns = patches.movedim(-2, 0).reshape(patches.shape[-2], -1)  # (Q, R)
            self.group = len(parameter) // layer.groups
        else:
            self.columns = x.movedim(-1, 0).reshape(x.shape[-1], -1).contiguous()  # (in, R)

    def bytes(self) -> int:
        """Of one coordinate's sensitivity."""
        return self.columns.shape[1] * self.columns.element_size()

    def slices(self, positions: Tensor, limit: float) -> Iterator[UnitSlices]:
        """The coordinates in portions of at most so many bytes of sensitivities."""
        unit = positions // self.row
        column = positions % self.row + unit // self.group * self.row
        size = max(1, int(limit / self.bytes()))
        for where in torch.arange(len(positions), device=positions.device).split(size):
            yield UnitSlices(where, self.columns[column[where]], unit[where])


class Core:
    """A core of a tensor layer: G_k[r, m, n, s] changes the rows of z with m_k = m."""

    def __init__(self, layer: nn.Module, name: str, x: Tensor, z: Tensor):
        k = int(name.rpartition(".")[2])
        cores = [core.reshape(shape) for core, shape in zip(layer.tensor_cores(), _as_ttm(layer), strict=True)]
        self.shape = cores[k].shape  # (r, m, n, s)
        left, right = _product(cores[:k], x), _product(cores[k + 1 :], x)  # (1, mL, nL, r), (s, mR, nR, 1)
        self.left = left[0].movedim(-1, 0)  # (r, mL, nL)
        x = x.movedim(-1, 0).reshape(self.left.shape[2], self.shape[2], right.shape[2], -1)  # (nL, n, nR, R)
        # Σ over nR of R[s, mR, nR] x[nL, n, nR, :]
        self.right = torch.einsum("tMN,LnNR->ntLMR", right[..., 0], x)  # (n, s, nL, mR, R)
        self.factors = self.left.shape[1], self.shape[1], right.shape[1]

    def bytes(self) -> int:
        left, _, right = self.factors
        return left * right * self.right.shape[-1] * self.right.element_size()

    def slices(self, positions: Tensor, limit: float) -> Iterator[RowSlices]:
        """The coordinates in portions of at most so many bytes of sensitivities; one m to a portion."""
        r, m, n, s = torch.unravel_index(positions, self.shape)
        # J does not depend on m: form each one once.
        triples, which = torch.unique((r * self.shape[2] + n) * self.shape[3] + s, return_inverse=True)
        size = max(1, int(limit / self.bytes()))
        for start in range(0, len(triples), size):
            r1, n1, s1 = torch.unravel_index(triples[start : start + size], (self.shape[0], *self.shape[2:]))
            pieces = self.right[n1, s1].flatten(2)  # (J, nL, mR R)
            sensitivity = torch.bmm(self.left[r1], pieces).unflatten(2, self.right.shape[-2:])  # (J, mL, mR, R)
            here = (which >= start) & (which < start + size)
            for row in m[here].unique().tolist():
                where = (here & (m == row)).nonzero().flatten()
                chosen = which[where] - start
                whole = len(chosen) == len(sensitivity) and bool((chosen.diff() == 1).all())
                yield RowSlices(where, sensitivity if whole else sensitivity[chosen], self.factors, row)


def response(layer: nn.Module, name: str, x: Tensor, z: Tensor) -> Units | Core:
    """How the output z (units, R) answers to the entries of one parameter of the layer.

    Args:
        name: of the parameter, within the layer.
        x: the layer's input, as it was given.
    """
    if isinstance(layer, TENSOR_LAYERS) and name != "bias":
        return Core(layer, name, x, z)
    return Units(layer, name, x, z)


def _as_ttm(layer: nn.Module) -> list[tuple[int, int, int, int]]:
    """The shapes (r, m, n, s) of the cores; a core of TT is one of TTM with n = 1 or m = 1."""
    p = len(layer.in_factors)
    if layer.tensor_type == "TensorTrainMatrix":
        return list(layer.core_shapes)
    inputs = [(r, 1, n, s) for r, n, s in layer.core_shapes[:p]]
    return inputs + [(r, m, 1, s) for r, m, s in layer.core_shapes[p:]]


def _product(cores: list[Tensor], like: Tensor) -> Tensor:
    """Neighbouring cores multiplied out to one: (r, m, n, s); of none, the number 1."""
    if not cores:
        return torch.ones(1, 1, 1, 1, dtype=like.dtype, device=like.device)
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.einsum("aMNr,rmnb->aMmNnb", whole, core)
        whole = whole.flatten(3, 4).flatten(1, 2)
    return whole


def matrix(layer: nn.Module) -> Tensor:
    """The weight (out, in) of a dense or tensor layer."""
    return layer.to_matrix() if isinstance(layer, TENSOR_LAYERS) else layer.weight


