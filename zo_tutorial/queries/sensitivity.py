"""How a layer's output answers to a change of one weight: z(θ + s e_c) = z(θ) + s J_c, exactly.

The output z of a layer is affine in each single one of its parameters. So a sensitivity J_c, formed from the layer's
input x and its other parameters, gives the output under any change s::

    dense        z_i = Σ_j W_ij x_j                    W_ij changes one feature of z:  J = x_j
    convolution  z_i = Σ_q W_iq x_q, x_q the patches   W_iq changes one channel of z:  J = x_q
    norm         z_i = γ_i x̂_i + β_i                   γ_i changes one feature of z:  J = x̂_i, x normalised
    embedding    z_j = E_vj where x is v               E_vj changes one feature of z:  J = 1 where x is v, else 0
    bias, shift                                        b_i changes feature or channel i:  J = 1
    TTM, TT      z = L G_k R x                         G_k[r,m,n,s] changes the rows of z with m_k = m:
                                                       J = L[:,:,r] x[:,n,:] R[s,:,:]

with L and R the products of the cores before and after the k-th. Chapter 9 derives it.

Shapes: a feature or channel is a unit; z is held as (units, R), where R runs over the batch and all else.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.recording import TENSOR_LAYERS, TensorLayer
from zo_tutorial.queries.way import Unsuitable

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
ALWAYS = (nn.Linear, nn.Conv2d, *TENSOR_LAYERS)
CONV_FORWARDS = {layer._conv_forward for layer in CONVOLUTIONS}
FORWARDS = {layer.forward for layer in (*ALWAYS, nn.Conv1d, *NORMS, nn.Embedding)}


def is_affine(layer: nn.Module, trained: set[int]) -> bool:
    """Whether a module computes what this file says: a supported layer, its forward not overridden, without hooks.

    Convolutions in one dimension, norms and embeddings are single calls only if one of their parameters is trained.
    """
    if type(layer).forward not in FORWARDS or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if "forward" in vars(layer) or "parametrizations" in layer._modules:  # replaced, or its weight computed
        return False
    if isinstance(layer, CONVOLUTIONS) and type(layer)._conv_forward not in CONV_FORWARDS:
        return False
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:  # it writes into its weight
        return False
    return isinstance(layer, ALWAYS) or any(id(p) in trained for p in layer.parameters())


def units_first(layer: nn.Module, z: Tensor) -> Tensor:
    """z as (units, R)."""
    first, last = _unit_dims(layer, z.dim())
    z = z.flatten(first, last).movedim(first, 0)
    return z.reshape(len(z), -1)


def units_back(layer: nn.Module, z: Tensor, shape: torch.Size) -> Tensor:
    """(K, units, R) as K outputs of the layer's own shape: `(K, *shape)`."""
    first, last = _unit_dims(layer, len(shape))
    rest = shape[:first] + shape[last + 1 :]
    return z.reshape(len(z), z.shape[1], *rest).movedim(1, first + 1).unflatten(first + 1, shape[first : last + 1])


def _unit_dims(layer: nn.Module, dims: int) -> tuple[int, int]:
    """The first and the last of the dimensions of z that count its units."""
    if isinstance(layer, CONVOLUTIONS):
        return (dims - len(layer.kernel_size) - 1,) * 2
    if isinstance(layer, (*BATCH_NORMS, nn.GroupNorm)):
        return 1, 1
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return dims - len(layer.normalized_shape), dims - 1
    return dims - 1, dims - 1


def has_units_last(layer: nn.Module, z: Tensor) -> bool:
    """Whether the last dimension of z counts the units, as in front of a dense layer."""
    return _unit_dims(layer, z.dim()) == (z.dim() - 1, z.dim() - 1)


class Units:
    """The answer to a parameter whose entries change one unit each.

    Attributes:
        factors: z (units, R) viewed as `(*factors, R)`; an entry changes one of its slices along the second factor.
        run: so many consecutive entries change the same slice; entry p changes slice p // run % factors[1].
        group: units that share their columns.
        columns: the sensitivities that occur, (Q, R), formed when first asked for; entry p has the column
            p % run + p // run // group * run.
        bytes: of one sensitivity.
    """

    def __init__(self, layer: nn.Module, name: str, x: Tensor, z: Tensor, limit: float):
        parameter = getattr(layer, name)
        self.factors = 1, len(z), 1
        self.run, self.group = parameter[0].numel(), len(parameter)
        self.bytes = z.shape[1] * z.element_size()
        self.layer: Any = layer
        self.name, self.x, self.z = name, x, z
        if name == "bias":
            self.run, self.group = 1, parameter.numel()
        elif isinstance(layer, NORMS):
            self.run, self.group = 1, 1
        elif isinstance(layer, CONVOLUTIONS):
            if x.numel() * x.element_size() * prod(layer.kernel_size) > limit / 4:
                raise Unsuitable("the patches need too much memory")
            self.group = len(parameter) // layer.groups

    @cached_property
    def columns(self) -> Tensor:
        if self.name == "bias":
            return torch.ones((), dtype=self.z.dtype, device=self.z.device).expand(1, self.z.shape[1])
        if isinstance(self.layer, NORMS):
            return _normal(self.layer, self.x)
        if isinstance(self.layer, CONVOLUTIONS):
            return _patches(self.layer, self.padded)
        return self.x.movedim(-1, 0).reshape(self.x.shape[-1], -1).contiguous()

    @cached_property
    def padded(self) -> Tensor:
        """The input of a convolution, ([B,] channels, height, width)."""
        return _padded(self.layer, self.x)

    def at(self, positions: Tensor) -> Tensor:
        """Which of the columns are the sensitivities of these entries: (K,)."""
        return positions % self.run + positions // self.run // self.group * self.run

    def sensitivities(self, at: list[int]) -> Tensor:
        """J of entries of one unit, by what `at` finds: (K, 1, R)."""
        patches = self.name != "bias" and isinstance(self.layer, CONVOLUTIONS)
        if patches and "columns" not in self.__dict__ and len(at) * self.factors[1] < self.run * self.layer.groups:
            # few of all patches are ever asked for
            return torch.stack([_patch(self.layer, self.padded, q) for q in at]).unsqueeze(1)
        return self.columns[at].unsqueeze(1)


class Rows:
    """The answer to an embedding's table (rows, units); attributes as in `Units`, but J is formed when asked for."""

    def __init__(self, x: Tensor, z: Tensor):
        self.factors, self.run = (1, len(z), 1), 1
        self.tokens, self.dtype, self.bytes = x.flatten(), z.dtype, z.shape[1] * z.element_size()

    def at(self, positions: Tensor) -> Tensor:
        """Which rows of the table these entries are in: (K,)."""
        return positions // self.factors[1]

    def sensitivities(self, at: list[int]) -> Tensor:
        """J of entries of one unit, by what `at` finds: (K, 1, R)."""
        rows = torch.tensor(at, device=self.tokens.device)
        return (self.tokens == rows[:, None]).to(self.dtype).unsqueeze(1)


def _normal(layer: nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """The input of a norm as it is before gain and shift: (units, R)."""
    if isinstance(layer, nn.LayerNorm):
        normal = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    elif isinstance(layer, nn.RMSNorm):
        normal = F.rms_norm(x, layer.normalized_shape, None, layer.eps)
    elif isinstance(layer, nn.GroupNorm):
        normal = F.group_norm(x, layer.num_groups, None, None, layer.eps)
    else:
        training = layer.training or layer.running_mean is None
        mean, var = (None, None) if training else (layer.running_mean, layer.running_var)
        normal = F.batch_norm(x, mean, var, None, None, training, 0.0, layer.eps)
    return units_first(layer, normal).contiguous()


def _padded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The input of a convolution with its margins; that of a one-dimensional one is of height 1."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    return x.unsqueeze(-2) if isinstance(layer, nn.Conv1d) else x


def _both(layer: nn.Conv1d | nn.Conv2d, option: str) -> tuple[int, int]:
    """An option of a convolution, down and across."""
    value = getattr(layer, option)
    return (1, *value) if isinstance(layer, nn.Conv1d) else value


def _patches(layer: nn.Conv1d | nn.Conv2d, padded: Tensor) -> Tensor:
    """What each weight of a convolution's kernel sees at every place: (Q, R)."""
    kernel, dilation, stride = (_both(layer, option) for option in ("kernel_size", "dilation", "stride"))
    patches = F.unfold(padded, kernel, dilation, stride=stride)  # ([B,] Q, places)
    return patches.movedim(-2, 0).reshape(patches.shape[-2], -1)


def _patch(layer: nn.Conv1d | nn.Conv2d, padded: Tensor, q: int) -> Tensor:
    """One row of `_patches`: (R,)."""
    kernel, dilation, stride = (_both(layer, option) for option in ("kernel_size", "dilation", "stride"))
    channel, place = divmod(q, prod(kernel))
    seen = []
    for size, k, spread, step, first in zip(
        padded.shape[-2:], kernel, dilation, stride, divmod(place, kernel[1]), strict=True
    ):
        last = size - spread * (k - 1) + spread * first  # behind the last place of the kernel, for this weight
        seen.append(slice(spread * first, last, step))
    return padded[..., channel, seen[0], seen[1]].flatten()


class Core:
    """The answer to the core G_k (r, m, n, s) of a tensor layer; attributes as in `Units`."""

    def __init__(self, name: str, products: tuple, x: Tensor, z: Tensor, limit: float):
        k = int(name.rpartition(".")[2])
        cores, left, right = products
        _, m, n, s = cores[k].shape
        left, right = left[k][0], right[k][..., 0]  # (mL, nL, r), (s, mR, nR)
        self.run, self.factors = n * s, (left.shape[0], m, right.shape[1])
        # Which product with x comes first, and is held? In TTM mostly that with R; in TT that with L, where m is 1.
        with_left, with_right = left.shape[0] * left.shape[2] * right.shape[2], left.shape[1] * s * right.shape[1]
        self.left_first, held = with_left < with_right, min(with_left, with_right)
        if held * n * z.shape[1] * z.element_size() > limit / 4:
            raise Unsuitable("the products of the cores with the input need too much memory")
        self.left = left.movedim(-1, 0).contiguous()  # (r, mL, nL)
        x = x.movedim(-1, 0).reshape(left.shape[1], n, right.shape[2], -1)  # (nL, n, nR, R)
        if self.left_first:
            self.right = right  # (s, mR, nR)
            # Σ over nL of L[r, mL, nL] x[nL, n, nR, :]
            inner = self.left.flatten(0, 1) @ x.flatten(1)  # (r mL, n nR R)
            inner = inner.view(len(self.left), left.shape[0], *x.shape[1:])  # (r, mL, n, nR, R)
            self.inner = inner.movedim(2, 0).contiguous()  # (n, r, mL, nR, R)
        else:
            # Σ over nR of R[s, mR, nR] x[nL, n, nR, :]
            inner = (right.flatten(0, 1) @ x).unflatten(2, right.shape[:2])  # (nL, n, s, mR, R)
            self.inner = inner.movedim(0, 2).flatten(3).flatten(0, 1).contiguous()  # (n s, nL, mR R)
        self.bytes = z.shape[1] * left.shape[0] * right.shape[1] * z.element_size()
        self.all = None
        if len(self.left) * self.run * self.bytes <= limit / 4:
            if self.left_first:
                product = torch.einsum("smx,nrlxb->nsrlmb", self.right, self.inner)
            else:
                product = self.left.flatten(0, 1) @ self.inner  # (n s, r mL, mR R)
            self.all = product.reshape(len(self.left) * self.run, -1, z.shape[1])  # (n s r, mL mR, R)

    def _form(self, at: Tensor) -> Tensor:
        """The sensitivities at some places of their order (n, s, r): (K, mL mR, R)."""
        ns, r = at // len(self.left), at % len(self.left)
        if self.left_first:
            n, s = ns // len(self.right), ns % len(self.right)
            product = self.right[s].unsqueeze(1) @ self.inner[n, r]  # (K, mL, mR, R)
        else:
            product = self.left[r] @ self.inner[ns]  # (K, mL, mR R)
        return product.reshape(len(at), self.factors[0] * self.factors[2], -1)

    def at(self, positions: Tensor) -> Tensor:
        """Which of the sensitivities, in the order (n, s, r), are those of these entries: (K,). None depends on m."""
        return positions % self.run * len(self.left) + positions // (self.run * self.factors[1])

    def sensitivities(self, at: list[int]) -> Tensor:
        """J of entries, by what `at` finds: (K, mL mR, R)."""
        if self.all is None:
            return self._form(torch.tensor(at, device=self.left.device))
        stride = max(1, at[-1] - at[0]) // max(1, len(at) - 1)
        if stride and at == list(range(at[0], at[0] + stride * len(at), stride)):
            return self.all[at[0] : at[-1] + 1 : stride]
        return self.all[at]


Response = Units | Rows | Core


def response(layer: nn.Module, name: str, x: Tensor, z: Tensor, limit: float, products: tuple | None) -> Response:
    """How the output z (units, R) of a layer answers to the entries of one of its parameters.

    Args:
        name: of the parameter, within the layer.
        x: the layer's input, as it was given.
        limit: bytes that may be used.
        products: what `products` finds, of a tensor layer.

    Raises:
        Unsuitable: they do not suffice.
    """
    if products is not None and name != "bias":
        return Core(name, products, x, z, limit)
    if isinstance(layer, nn.Embedding):
        return Rows(x, z)
    return Units(layer, name, x, z, limit)


def as_ttm(layer: TensorLayer) -> Sequence[tuple[int, ...]]:
    """The shapes (r, m, n, s) of the cores; a core of TT is one of TTM with n = 1 or m = 1."""
    p = len(layer.in_factors)
    if layer.tensor_type == "TensorTrainMatrix":
        return layer.core_shapes
    inputs = [(r, 1, n, s) for r, n, s in layer.core_shapes[:p]]
    return inputs + [(r, m, 1, s) for r, m, s in layer.core_shapes[p:]]


def products(layer: TensorLayer) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The cores (r, m, n, s) of a tensor layer, and for each one the products of those before it and after it."""
    cores = [core.reshape(shape) for core, shape in zip(layer.tensor_cores(), as_ttm(layer), strict=True)]
    one = torch.ones(1, 1, 1, 1, dtype=cores[0].dtype, device=cores[0].device)
    left = list(accumulate(cores[:-1], _product, initial=one))
    right = list(accumulate(reversed(cores[1:]), lambda after, core: _product(core, after), initial=one))
    return cores, left, right[::-1]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Two neighbouring cores as one: (r, M m, N n, s) from (r, M, N, t) and (t, m, n, s)."""
    whole = torch.tensordot(a, b, 1).transpose(2, 3)  # (r, M, m, N, n, s)
    return whole.flatten(3, 4).flatten(1, 2)


def matrix(layer: nn.Linear | TensorLayer) -> Tensor:
    """The weight (out, in) of a dense or tensor layer."""
    return layer.to_matrix() if isinstance(layer, TENSOR_LAYERS) else layer.weight


def slice_of(z: Tensor, factors: tuple[int, int, int], i: int) -> Tensor:
    """The i-th slice of z (..., units, R): a view (..., left, right, R)."""
    *leading, _, rest = z.shape
    return z.view(*leading, *factors, rest).select(-3, i)
