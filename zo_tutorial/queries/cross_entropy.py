"""Softmax cross-entropy of many perturbed outputs, with the batch as the long, contiguous dimension.

    L = mean over b of  log Σ_k exp(o_kb) − o_yb

If one unit in front of a linear layer W changes by D, the outputs move along its column, o_k + D w_k, and with
p = softmax(o)

    L' − L = mean over b of  log Σ_k p_k exp(D w_k) − D w_y
           = mean over b of  D (κ_1 − w_y) + D² κ_2 + D³ κ_3 + …

where m! κ_m is the m-th cumulant of w_k under p. A small change needs few of them, and they are shared by all
coordinates of the unit (chapter 9). With class weights the mean over b has the weight of each sample's class.
"""

from inspect import signature
from math import factorial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, Recording

DEFAULTS = {name: parameter.default for name, parameter in signature(F.cross_entropy).parameters.items()}
RESHAPE = {torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view}
ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
ORDERS = 6  # the most moments for which the series is cheaper than the outputs themselves


class CrossEntropy:
    """The mean cross-entropy with classes `targets` (B,).

    Attributes:
        shares: of each sample in the mean (B,), with class weights; None: all the same.
        rows: which rows of the layer's outputs these are; None: all.
        stable: whether to guard against the overflow of exp; needed where an output grows by some 80.
    """

    def __init__(self, targets: Tensor, rows: Tensor | None, weights: Tensor | None):
        targets = targets.long()
        self.targets, self.rows, self.stable = targets, rows, False
        self.shares = None if weights is None else weights[targets] / weights[targets].sum()
        # the places of o_yb in the flattened outputs (C, B)
        self.chosen = targets * len(targets) + torch.arange(len(targets), device=targets.device)

    def shifted(self, o: Tensor) -> Tensor:
        """Outputs (C, B) of the same cross-entropy whose largest is 0 for each sample: exp of them cannot overflow."""
        return o - o.amax(0)

    def losses(self, o: Tensor) -> Tensor:
        """(K,) losses of K outputs (K, C, B)."""
        chosen = o.flatten(1).index_select(1, self.chosen)  # (K, B)
        total = o.logsumexp(1) if self.stable else o.exp().sum(1).log_()  # (K, B)
        return self.mean(total.sub_(chosen))

    def slopes(self, o: Tensor) -> Tensor:
        """dL/do at outputs o (C, B)."""
        p = o.softmax(0)
        p.view(-1)[self.chosen] -= 1
        return p / len(self.targets) if self.shares is None else p * self.shares

    def mean(self, terms: Tensor) -> Tensor:
        """The mean over the samples of terms (..., B)."""
        return terms.mean(-1) if self.shares is None else terms @ self.shares


class Series:
    """The change of each sample's cross-entropy when one unit behind W changes, at outputs o.

    Args:
        o: (C, B).
        weight: W (C, units).
    """

    def __init__(self, cross_entropy: CrossEntropy, o: Tensor, weight: Tensor):
        self.cross_entropy, self.p, self.weight = cross_entropy, o.softmax(0), weight
        self.size = weight.abs().max().item()
        self.moments: list[Tensor] = []
        self.cumulants: list[Tensor] = []  # κ_m (units, B), less w_y in the first

    def changes(self, at: Any, change: Tensor, share: float) -> Tensor | None:
        """What each sample loses more when one unit changes by D, (..., *) where (units, B)[at] is (*): as D.

        share: of the size of a change, by which the series may be off. None: it takes more than `ORDERS` cumulants.
        """
        low, high = change.aminmax()
        order = order_of(max(-low.item(), high.item()) * self.size, share)
        if order is None:
            return None
        while len(self.cumulants) < order:
            self._add_cumulant()
        # Horner's scheme: Σ_m D^m κ_m = D (κ_1 + D (κ_2 + …))
        total = self.cumulants[order - 1][at]
        for cumulant in reversed(self.cumulants[: order - 1]):
            total = torch.addcmul(cumulant[at], change, total)
        return total * change

    def _add_cumulant(self) -> None:
        """κ_n = M_n − Σ_{j<n} j/n κ_j M_{n−j} with the moments M_n = Σ_k p_k w_k^n / n!: the logarithm of a series."""
        n = len(self.moments) + 1
        self.moments.append((self.weight**n).T @ self.p / factorial(n))  # (units, B)
        if n == 1:
            self.cumulants.append(self.moments[0] - self.weight[self.cross_entropy.targets].T)
            return
        rest = self.moments[0] * self.moments[-2] / n
        for j in range(2, n):
            rest = rest + j / n * self.cumulants[j - 1] * self.moments[n - j - 1]
        self.cumulants.append(self.moments[-1] - rest)


def order_of(x: float, share: float) -> int | None:
    """The order at which Σ_m D^m κ_m can be cut where D w is up to x in size, with an error below that share of x.

    Where D w is at most 1 in size, also for complex D, E exp(D w) lies between e and e⁻¹ cos 1 from 0, in the half
    plane around 1: its logarithm is at most 2. So by Cauchy's estimate D^m κ_m is at most 2 x^m in size, and what is
    cut at most 4 x^(order + 1).
    """
    for order in range(1, ORDERS + 1) if x < 0.5 else ():
        if 4 * x**order <= share:
            return order
    return None


def cross_entropy_of(recording: Recording, call: Call, calls: list[Call]) -> CrossEntropy | None:
    """The mean cross-entropy of a layer's outputs, if `calls` is nothing else.

    The outputs of `call` are (B, C), or are made (B, C) first; terms that do not depend on them may be added. The rows
    are those whose class is not to be ignored, None for all.
    """
    outputs, calls = call.results[0], list(calls)
    size = outputs.shape[-1:]  # the units of a dense or tensor layer
    if not isinstance(call.layer, (nn.Linear, *TENSOR_LAYERS)):
        return None
    while calls and calls[0].function in RESHAPE and calls[0].args[0] is outputs:
        outputs = calls.pop(0).results[0]
    if not calls or calls[0].function is not F.cross_entropy or outputs.dim() != 2 or outputs.shape[1:] != size:
        return None
    loss = calls[0].results[0]
    for term in calls[1:]:
        if term.function not in ADD or term.kwargs or sum(tensor is loss for tensor in term.tensors) != 1:
            return None
        loss = term.results[0]
    options = dict(zip(DEFAULTS, calls[0].args, strict=False)) | calls[0].kwargs
    given, targets, weights = options.pop("input"), options.pop("target"), options.pop("weight", None)
    plain = all(value is None or value == DEFAULTS[name] for name, value in options.items())
    if loss is not recording.loss or not plain or given is not outputs or targets.shape != outputs.shape[:1]:
        return None
    rows = (targets != DEFAULTS["ignore_index"]).nonzero().flatten()
    if len(rows) == len(targets):
        return CrossEntropy(targets, None, weights)
    return CrossEntropy(targets[rows], rows, weights)
