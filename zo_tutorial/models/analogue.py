"""A simulated photonic chip: TTM layers whose small matrices are set by phases, imperfectly (chapter 7).

Each small matrix A (a, b) of `TensorizedLinear_module_tonn` is realised as its singular value decomposition
A = U diag(g) V^T: two meshes of interferometers, with gains between them. Everything is real-valued: an interferometer
is a rotation of two neighbouring channels by an angle, its phase.

Sources: Reck et al. (1994), "Experimental realization of any discrete unitary operator", for the triangular mesh; Shen
et al. (2017), "Deep learning with coherent nanophotonic circuits", for two meshes and gains.
"""

from functools import lru_cache
from math import pi

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from zo_tutorial.tensor import TensorizedLinear_module_tonn


@lru_cache
def _wiring(n: int) -> tuple[Tensor, Tensor]:
    """How the n(n-1)/2 rotations of a mesh lie in columns, the fewest that keep their order.

    Returns:
        (columns, n), the number of the rotation that a channel goes through, n(n-1)/2 where it goes straight; and
        (columns, n, n), -1 from a rotation's upper to its lower channel and 1 back: the place and sign of its sine.
    """
    count, columns = n * (n - 1) // 2, max(2 * n - 3, 1)
    rotation = torch.full((columns, n), count)
    sine = torch.zeros(columns, n, n)
    pairs = [(i, j) for j in range(n - 1) for i in range(n - 1, j, -1)]
    for t, (i, j) in enumerate(pairs):
        column = n - 1 - i + 2 * j  # as early as the rotations before it in the list allow
        rotation[column, [i - 1, i]] = t
        sine[column, i - 1, i], sine[column, i, i - 1] = -1, 1
    return rotation, sine


def mesh(phases: Tensor, n: int) -> Tensor:
    """The orthogonal matrix of a triangular mesh: the product R_1 R_2 ... of its rotations.

    Args:
        phases: (n(n-1)/2,) radians. Rotation R_t turns the channels i-1 and i; i runs from n-1 down to 1, then from
            n-1 down to 2, and so on.

    Returns:
        (n, n).
    """
    rotation, sine = _wiring(n)
    angles = F.pad(phases, (0, 1))[rotation]  # (columns, n)
    product = torch.diag_embed(angles.cos()) + angles.sin()[..., None] * sine.to(angles)  # (columns, n, n)
    while len(product) > 1:  # each column with its neighbour
        pairs = product[:-1:2] @ product[1::2]
        product = torch.cat([pairs, product[-1:]]) if len(product) % 2 else pairs
    return product[0]


def phases_of(orthogonal: Tensor) -> tuple[Tensor, Tensor]:
    """The phases of a mesh, and signs, with orthogonal = mesh(phases) diag(signs): one entry made zero a rotation.

    Args:
        orthogonal: (n, n).

    Returns:
        (n(n-1)/2,) radians and (n,), all 1 but the last, which is the determinant.
    """
    rest, phases = orthogonal.clone(), []
    n = len(rest)
    for j in range(n - 1):
        for i in range(n - 1, j, -1):
            phase = torch.atan2(rest[i, j], rest[i - 1, j])
            upper, lower = rest[i - 1].clone(), rest[i].clone()
            rest[i - 1] = phase.cos() * upper + phase.sin() * lower
            rest[i] = phase.cos() * lower - phase.sin() * upper
            phases.append(phase)
    return torch.stack(phases) if phases else rest.new_zeros(0), rest.diagonal().sign()


class AnalogueLinear(TensorizedLinear_module_tonn):
    """A photonic layer on a chip that does not quite do what it is told.

    Parameters are the commanded `phases` (radians) of all meshes of the layer, in one row, the commanded `gains`, and
    the bias. The chip realises::

        q = step · round(phases / step), step = 2π / 2^bits       it can be set in steps only
        p = q + crosstalk · (q of the phase before + q of the one after)        a phase leaks into its neighbours
        realised phases = (1 + gain ε) p + offset δ,  realised gains = (1 + gain ε') gains

    with ε, ε', δ standard normal, drawn once: the errors of manufacture of this chip. `redraw` makes it another chip of
    the same make, `drift` lets it age.

    Args:
        layer: the layer whose map the chip is set to. Without errors and rounding it computes this map.
        bits: of a phase, None for continuous phases.
        offset: standard deviation of the phases' offsets (radians).
        gain: standard deviation of the relative errors of phases and of gains.
        crosstalk: share of a phase that each neighbour in the row gets, also across two meshes.
        generator: where the errors are drawn from; None is torch's global generator.
    """

    offsets: Tensor
    slopes: Tensor
    errors: Tensor

    def __init__(
        self,
        layer: TensorizedLinear_module_tonn,
        *,
        bits: int | None = None,
        offset: float = 0.0,
        gain: float = 0.0,
        crosstalk: float = 0.0,
        generator: Generator | None = None,
    ):
        factors, bias = [layer.in_factors, layer.out_factors], layer.bias is not None
        sizes = layer.in_features, layer.out_features
        super().__init__(*sizes, bias, factors, layer.tensor_type, layer.ranks, generator=Generator())
        del self.cores
        self.step, self.crosstalk = None if bits is None else 2 * pi / 2**bits, crosstalk
        phases, gains = [], []
        for matrix in layer.cores:  # (a, b)
            u, s, vt = torch.linalg.svd(matrix.detach().double())
            (phases_u, signs_u), (phases_v, signs_v) = phases_of(u), phases_of(vt.T)
            phases += [phases_u, phases_v]
            gains.append(signs_u[: len(s)] * s * signs_v[: len(s)])
        self.sizes = [tuple(matrix.shape) for matrix in layer.cores]
        self.phases, self.gains = (nn.Parameter(torch.cat(parts)) for parts in (phases, gains))
        if self.bias is not None and layer.bias is not None:
            self.bias.data.copy_(layer.bias)
        self.spreads = {"offsets": offset, "slopes": gain, "errors": gain}
        for name in self.spreads:
            like = self.gains if name == "errors" else self.phases
            self.register_buffer(name, torch.zeros(like.shape), persistent=False)
        self.redraw(generator)
        self.to(layer.cores[0])

    @classmethod
    def from_linear(cls, *args, **options) -> "AnalogueLinear":
        """An ideal chip, set to the layer that `from_linear` of the parent class finds."""
        return cls(TensorizedLinear_module_tonn.from_linear(*args, **options))

    @torch.no_grad()
    def redraw(self, generator: Generator | None = None) -> None:
        """Another chip of the same make: new errors of manufacture. What it is told stays."""
        for name, spread in self.spreads.items():
            errors = getattr(self, name)
            errors.copy_(spread * torch.randn(errors.shape, generator=generator))

    @torch.no_grad()
    def drift(self, spread: float, generator: Generator | None = None) -> None:
        """Let every phase wander, as with temperature: offsets += spread · ξ with ξ standard normal, each time anew.

        After T calls the offsets have moved by a standard deviation of spread · √T (radians).
        """
        self.offsets.add_((spread * torch.randn(self.offsets.shape, generator=generator)).to(self.offsets))

    def realised(self) -> tuple[Tensor, Tensor]:
        """The phases (radians) and the gains that the chip has when it is told `phases` and `gains`."""
        q = self.phases if self.step is None else self.step * torch.round(self.phases / self.step)
        p = q + self.crosstalk * (F.pad(q[:-1], (1, 0)) + F.pad(q[1:], (0, 1)))
        return (1 + self.slopes) * p + self.offsets, (1 + self.errors) * self.gains

    def matrices(self) -> list[Tensor]:
        """The small matrix U diag(g) V^T of each core, (m_k r_{k-1}, n_k r_k), as the chip realises it."""
        phases, gains = self.realised()
        counts = [n * (n - 1) // 2 for size in self.sizes for n in size]
        phases, gains = phases.split(counts), gains.split([min(size) for size in self.sizes])
        made = []
        for k, (a, b) in enumerate(self.sizes):
            u, v = mesh(phases[2 * k], a), mesh(phases[2 * k + 1], b)
            rank = min(a, b)
            made.append(u[:, :rank] * gains[k] @ v[:, :rank].T)
        return made

    def tensor_cores(self) -> list[Tensor]:
        return [matrix.reshape(shape) for matrix, shape in zip(self.matrices(), self.core_shapes, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b with the realised W: the same map as `contract`, and quicker to simulate.

        The parent's forward is known to be affine in each parameter, so `LossQueries` must not meet it here.
        """
        return F.linear(x, self.to_matrix(), self.bias)
