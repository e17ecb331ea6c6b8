"""What one unit of one sample does to the loss through a norm, by a series in two numbers.

Behind unit u come an elementwise φ, a layer norm over the d units, a linear layer and softmax cross-entropy:

    a = φ(z),   y = γ (a − m) / s + β,   o = W y + b,   s² = v + ε.

If a_u moves by D, the mean moves by D/d and the variance by Δv = (2 D (a_u − m) + D² (1 − 1/d)) / d, so

    o' − o = r A + q V_u   with   r = s/s' − 1 = −Δv / (s' (s + s')),   q = D / s',

and A = o − (W β + b), V_u = (W γ)_u − mean over all units of it. A root-mean-square norm has no mean: m = 0,
Δv = (2 D a_u + D²) / d, V_u = (W γ)_u. So two numbers of each entry give the move of all its logits (chapter 9). As for
one number (`cross_entropy`), the change of the loss is a series, with the cumulants κ_ij i! j! of A_k and V_uk under
p = softmax(o):

    log Σ_k p_k exp(r A_k + q V_uk) − (r A_y + q V_uy) = Σ_ij r^i q^j κ_ij − (r A_y + q V_uy).

An entry costs at most 27 terms, up to sixth order, where running its row costs d C.
"""

from inspect import signature
from math import factorial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.cost import CACHED
from zo_tutorial.queries.cross_entropy import order_of
from zo_tutorial.queries.recording import TENSOR_LAYERS, Call
from zo_tutorial.queries.rows import SHARE, Places, TailRows, run
from zo_tutorial.queries.sensitivity import matrix
from zo_tutorial.queries.way import Unsuitable

PASSES = 60  # over all units and rows, that one value of f takes
Pair = tuple[int, int]


class NormRows:
    """f in front of a norm and a linear layer. Where the series does not suffice, the rows of `tail` are run.

    Raises:
        Unsuitable: something else comes behind the layer.
    """

    def __init__(self, tail: TailRows):
        self.tail, self.z, self.rows, self.shares = tail, tail.z, tail.rows, tail.shares
        if len(tail.behind) != 2:
            raise Unsuitable("no norm and linear layer follow")
        self.centred, gamma, beta, eps = _norm(tail.behind[0])
        last, d = tail.behind[1].layer, len(self.z)
        assert isinstance(last, (nn.Linear, *TENSOR_LAYERS))
        a = run(tail.activations, self.z.T.clone())  # (B, d)
        o = run(tail.behind, a).T.double()  # (C, B)
        shift = a.new_zeros(1, d) if beta is None else beta[None]
        self.targets = tail.cross_entropy.targets
        of_units = o - run(tail.behind[1:], shift).T  # A, (C, B)
        self.A = of_units - of_units.gather(0, self.targets[None])  # so that A_y = 0
        weight = (matrix(last) if gamma is None else matrix(last) * gamma).double()  # (C, d)
        self.V = weight - weight.mean(1, keepdim=True) if self.centred else weight
        self.a = a.T.double() - a.T.double().mean(0) if self.centred else a.T.double()  # a − m, (d, B)
        self.square = self.a.square().mean(0) + eps  # s² (B,)
        self.size = self.A.abs().max().item(), self.V.abs().max().item()
        self.p = o.softmax(0)
        self.moments: dict[Pair, Tensor] = {}  # E A^i V^j / (i! j!), (d, B), or (1, B) for j = 0
        self.cumulants: dict[Pair, Tensor] = {}
        self.terms: dict[Pair, Tensor] = {}  # the cumulants, less A_y and V_y in the first ones
        self.rounding, self.seconds = 0.0, PASSES * self.z.element_size() / CACHED

    def changes(self, at: Places, change: Tensor) -> Tensor:
        z, d = self.z[at].double(), len(self.z)
        moved = run(self.tail.activations, z + change) - run(self.tail.activations, z.clone())  # D
        a, square = (self.a, self.square) if at is ... else (self.a[at], self.square[at[1]])
        more = moved * (2 * a + moved * (1 - 1 / d if self.centred else 1.0)) / d  # Δv
        s, after = square.sqrt(), (square + more).sqrt()
        r, q = (-more / (after * (s + after))).to(change), (moved / after).to(change)
        reach = r.abs().max().item() * self.size[0] + q.abs().max().item() * self.size[1]
        order = order_of(reach, SHARE[change.dtype])
        if order is None:
            self.rounding = self.tail.rounding
            return self.tail.changes(at, change)
        total = torch.zeros_like(change)
        for i in range(order, -1, -1):  # Horner's scheme in r, and in q for each power of r
            inner = torch.zeros_like(change)
            for j in range(order - i, -1, -1):
                inner = torch.addcmul(self._term(i, j, at), inner, q) if i + j else inner * q
            total = torch.addcmul(inner, total, r)
        return total * (self.shares if at is ... else self.shares[at[1]])

    def _term(self, i: int, j: int, at: Places) -> Tensor:
        """κ_ij at some places, less A_y = 0 or V_y in the first ones."""
        if (i, j) not in self.terms:
            first = self.V[self.targets].T if (i, j) == (0, 1) else 0.0
            self.terms[i, j] = (self._cumulant(i, j) - first).to(self.z).expand(self.z.shape)  # (d, B)
        return self.terms[i, j][at]

    def _cumulant(self, i: int, j: int) -> Tensor:
        """κ_ij = M_ij − Σ (k + m)/(i + j) κ_km M_(i−k, j−m) over smaller k + m: the logarithm of a series."""
        if (i, j) not in self.cumulants:
            found = self._moment(i, j)
            for k in range(i + 1):
                for m in range(j + 1):
                    if 0 < k + m < i + j:
                        found = found - (k + m) / (i + j) * self._cumulant(k, m) * self._moment(i - k, j - m)
            self.cumulants[i, j] = found
        return self.cumulants[i, j]

    def _moment(self, i: int, j: int) -> Tensor:
        if (i, j) not in self.moments:
            weighted = self.p * self.A**i / (factorial(i) * factorial(j))  # (C, B)
            self.moments[i, j] = (self.V**j).T @ weighted if j else weighted.sum(0, keepdim=True)
        return self.moments[i, j]


def _norm(call: Call) -> tuple[bool, Tensor | None, Tensor | None, float]:
    """Whether a norm takes the mean away, its γ, β and ε. Raises Unsuitable for a call that is none."""
    if isinstance(call.layer, nn.LayerNorm | nn.RMSNorm):
        options = vars(call.layer) | dict(call.layer.named_parameters())
    elif call.function in (F.layer_norm, F.rms_norm):
        options = signature(call.function).bind(*call.args, **call.kwargs).arguments
    else:
        raise Unsuitable("no norm follows")
    centred = call.function is F.layer_norm or isinstance(call.layer, nn.LayerNorm)
    default = 1e-5 if centred else torch.finfo(call.results[0].dtype).eps
    eps = options.get("eps")
    return centred, options.get("weight"), options.get("bias"), default if eps is None else eps
