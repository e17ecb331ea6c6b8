"""What one unit of one sample does to the loss, where no sample sees another one: f_ib(δ) = L(z_ib + δ) − L.

`sums` asks for it. A sample is a row of the layer's output, such as a word of a sentence. If an activation and a linear
head follow, a few cumulants give f (`SeriesRows`); else the rows run through what follows (`TailRows`), unless that
is a norm and a head (`norm_rows`).
"""

from itertools import takewhile
from types import EllipsisType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.cost import CACHED, looped
from zo_tutorial.queries.cross_entropy import CrossEntropy, Series, cross_entropy_of
from zo_tutorial.queries.parts import same
from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, Recording
from zo_tutorial.queries.rules import ELEMENTWISE
from zo_tutorial.queries.suffix import Head
from zo_tutorial.queries.way import Unsuitable

SHARE = {torch.float32: 1e-6, torch.float64: 1e-12}  # of a change, that may be missing
LARGEST = 1.0  # move of a logit
PASSES = 12  # over all units and rows, that one value of f takes in front of a head
ROUNDINGS = 16  # of a row's loss, that its change may carry
AT_ONCE = 2**18  # numbers of rows that run at once: they stay in the cache of a core
Places = EllipsisType | tuple[Tensor, Tensor]  # all units in all rows, (units, B); or units and rows, (T,) each


class RowLosses(Protocol):
    """f.

    Attributes:
        z: the output of the layer in the rows that count (units, B).
        rows: which rows these are; None: all.
        rounding: of f.
        seconds: an estimate of what one value of f takes.
    """

    z: Tensor
    rows: Tensor | None
    rounding: float
    seconds: float

    def changes(self, at: Places, change: Tensor) -> Tensor:
        """f_ib(δ) for some δ at some places: (..., units, B) or (..., T).

        Raises:
            Unsuitable: δ is too large.
        """
        ...


class SeriesRows:
    """f in front of a head: D = φ(z + δ) − φ(z), then the series of the cross-entropy in D."""

    def __init__(self, head: Head, series: Series, z: Tensor):
        self.head, self.series, self.z = head, series, z
        self.rows: Tensor | None = None  # z holds no other rows
        self.rounding, self.seconds = 0.0, PASSES * z.element_size() / CACHED
        self.shares = _shares(series.cross_entropy, z)

    def changes(self, at: Places, change: Tensor) -> Tensor:
        if self.head.activation is not None:
            z = self.z[at].double()  # a difference of activations needs the digits
            change = self.head.activate(z + change).sub_(self.head.activate(z.clone())).to(self.z)
        losses = self.series.changes(at, change, SHARE[change.dtype])
        if losses is None:
            losses = self._exactly(at, change)
        return losses * (self.shares if at is ... else self.shares[at[1]])

    def _exactly(self, at: Places, change: Tensor) -> Tensor:
        """log(1 + Σ_k p_k (exp(D (w_k − w_y)) − 1)), term by term."""
        weight, p, targets = self.series.weight, self.series.p, self.series.cross_entropy.targets
        if not change.abs().max() * self.series.size < LARGEST:
            raise Unsuitable("the steps are too large")
        if self.head.activation is None:  # unit i is logit i: w_k is 1 for k = i, else 0
            is_class = torch.arange(len(p), device=p.device)[:, None] == targets
            return torch.log1p(p[at] * change.expm1()) - change * is_class[at]
        chosen, total = weight[targets].T[at], torch.zeros_like(change)
        for w, share in zip(weight, p, strict=True):
            w, share = (w[:, None], share) if at is ... else (w[at[0]], share[at[1]])
            total += share * (change * (w - chosen)).expm1_()
        return total.log1p_()


class TailRows:
    """f by running the changed rows through calls that treat each row alone: dense layers, elementwise, norms.

    Args:
        call: of the layer.
        z: its output (units, all rows).

    Raises:
        Unsuitable: something else comes behind the layer.
    """

    def __init__(self, recording: Recording, call: Call, z: Tensor):
        calls = recording.after(call)
        self.calls = list[Call]()
        passed, last = [call.results[0]], call
        cross_entropy = None
        while cross_entropy is None:
            if not calls or not _treats_rows(calls[0], passed[-1]):
                raise Unsuitable("rows may depend on each other")
            last = calls.pop(0)
            self.calls.append(last)
            passed.append(last.results[0])
            cross_entropy = cross_entropy_of(recording, last, calls)
        read = {id(tensor) for later in calls for tensor in later.tensors}
        if read & set(map(id, passed[:-1])) - {id(passed[-1])}:
            raise Unsuitable("an inner value is read elsewhere")
        self.cross_entropy: CrossEntropy = cross_entropy
        self.rows = cross_entropy.rows
        self.z = z if self.rows is None else z[:, self.rows]
        self.shares = _shares(cross_entropy, z)
        self.width = max(len(z), *(made.results[0].shape[-1] for made in self.calls))
        # φ, where it goes on into a dense layer: o = W φ(z) + b
        self.activations = list(takewhile(_is_elementwise, self.calls))
        self.behind = self.calls[len(self.activations) :]
        self.weight: Tensor | None = None
        if self.behind and isinstance(self.behind[0].layer, (nn.Linear, *TENSOR_LAYERS)):
            self.weight = self.behind[0].weight().T.contiguous()  # (units, out)
            self.o = run(self.behind[:1], run(self.activations, self.z.T.clone()))  # (B, out)
        every = torch.arange(self.z.shape[1], device=z.device)
        self.base = self._losses(self.z.T.clone() if self.weight is None else self.o.clone(), every)  # (B,)
        largest = float((self.base * self.shares).abs().max())
        self.seconds = looped(self.calls) / self.z.shape[1]
        self.rounding = ROUNDINGS * torch.finfo(z.dtype).eps * largest

    def changes(self, at: Places, change: Tensor) -> Tensor:
        i, b = (
            at
            if at is not ...
            else torch.meshgrid(*(torch.arange(size, device=change.device) for size in self.z.shape), indexing="ij")
        )
        shape = change.shape
        i, b, change = i.expand(shape).flatten(), b.expand(shape).flatten(), change.flatten()
        portions = (part.split(max(1, AT_ONCE // self.width)) for part in (i, b, change))
        return torch.cat([self._changes(*part) for part in zip(*portions, strict=True)]).view(shape)

    def _changes(self, i: Tensor, b: Tensor, change: Tensor) -> Tensor:
        """(M,) from M entries."""
        if self.weight is None:
            base = self.z.T[b]  # (M, units)
            moved = base.clone()
            moved[torch.arange(len(moved), device=moved.device), i] += change
        else:
            # o' = o + (φ(z + δ) − φ(z)) W_i
            z, base = self.z[i, b], self.o[b]  # (M,), (M, out)
            change = run(self.activations, z + change) - run(self.activations, z)
            moved = torch.addcmul(base, change[:, None], self.weight[i])
        # what moves nothing changes nothing, however a product of matrices rounds in another place
        still = same(moved, base)
        return ((self._losses(moved, b) - self.base[b]) * self.shares[b]).masked_fill_(still, 0)

    def _losses(self, entered: Tensor, b: Tensor) -> Tensor:
        """Cross-entropies (M,) of the rows b: of outputs of the layer (M, units), or of the dense layer's behind it."""
        logits = run(self.calls if self.weight is None else self.behind[1:], entered)
        return F.cross_entropy(logits, self.cross_entropy.targets[b], reduction="none")


def run(calls: list[Call], x: Tensor) -> Tensor:
    """What some calls, one after the other, make of rows (M, units)."""
    for call in calls:
        x = call.again({id(call.args[0]): x}, None)
    return x


def _treats_rows(call: Call, enters: Tensor) -> bool:
    """Whether a call takes the rows of one tensor and makes a row of each."""
    if not call.args or call.args[0] is not enters or sum(tensor is enters for tensor in call.tensors) != 1:
        return False
    if isinstance(call.layer, nn.LayerNorm | nn.RMSNorm):
        return len(call.layer.normalized_shape) == 1
    if call.function in (F.layer_norm, F.rms_norm):
        return len(call.args[1] if len(call.args) > 1 else call.kwargs["normalized_shape"]) == 1
    return isinstance(call.layer, (nn.Linear, *TENSOR_LAYERS)) or _is_elementwise(call)


def _is_elementwise(call: Call) -> bool:
    return call.function in ELEMENTWISE and len(call.tensors) == 1


def _shares(cross_entropy: CrossEntropy, z: Tensor) -> Tensor:
    """Of each row in the mean (B,)."""
    rows = len(cross_entropy.targets)
    return z.new_full((rows,), 1 / rows) if cross_entropy.shares is None else cross_entropy.shares
