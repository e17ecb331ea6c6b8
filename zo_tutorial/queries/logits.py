"""To the logits, then to the loss: all entries of a parameter at once, where what lies behind is linear but for kinks.

Away from the kinks of its activations (ReLU and its like) the network behind a layer is linear. A step s of the entry e
moves the logits of sample b by s v, with v the derivatives of the logits by e: C backward passes for each sample, for
all entries together. With p = softmax, y the class and w = v − Σ_c p_c v_c

    L' − L = mean over b of  log Σ_c p_c exp(s w_c) − s w_y  =  Σ_m s^m/m! κ_m,      κ_m the mean over b of cumulants

κ_1 = −w_y (its mean is the gradient), κ_2 = Σ p w², κ_3 = Σ p w³, κ_4 = Σ p w⁴ − 3 κ_2². So the samples are summed
before there is a step. Where the series does not suffice, the logarithm itself is computed. The few terms (step,
sample, entry) in which an activation crosses a kink (`kinks`) are computed once more.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.cross_entropy import CrossEntropy
from zo_tutorial.queries.jacobian import CoreJacobian, Jacobian, UnitJacobian, WideJacobian
from zo_tutorial.queries.kinks import Crossing, Stage, crossings, near
from zo_tutorial.queries.recording import TENSOR_LAYERS, Recording, version
from zo_tutorial.queries.sensitivity import CONVOLUTIONS, Units, products, units_first
from zo_tutorial.queries.suffix import Suffix
from zo_tutorial.queries.way import Unsuitable

TAIL = {3: 13 / 12, 4: 5 / 4}  # the first coefficient of −log(2 − e^x) behind that of an order
FEW = 16  # samples whose kinks tell of the others
LARGE = 30.0  # of a move of a logit: exp of it is no more precise, or overflows
CACHE = 2**21  # bytes to handle at once: most of them stay in the cache of a core


def logits_behind(recording: Recording, layer: nn.Module, limit: float) -> "Logits":
    """What lies behind a layer up to the logits, found out once for each recording.

    Raises:
        Unsuitable: as `Logits` says.
    """
    if layer not in recording.logits_seen:
        recording.logits_seen[layer] = None  # unless the next line succeeds
        recording.logits_seen[layer] = Logits(recording, layer, limit)
    if recording.logits_seen[layer] is None:
        raise Unsuitable
    return recording.logits_seen[layer]


class Logits:
    """What lies behind a layer, up to the logits, where the parameters stand.

    Raises:
        Unsuitable: it is something else than piecewise-linear activations, dense, tensor and convolutional layers, and
            cross-entropy; or the samples are not independent.
    """

    def __init__(self, recording: Recording, layer: nn.Module, limit: float):
        call = recording.call_of(layer)
        if not recording.undisturbed(call):
            raise Unsuitable("the input of the layer is not there any more")
        self.layer, self.x, z = layer, call.args[0], call.results[0]
        if version(z) != call.result_versions[0]:  # an activation in place: compute it again
            z = layer(self.x)
        # a sample is a row of a dense layer's output, and an image of a convolution's
        if not isinstance(layer, CONVOLUTIONS):
            self.x, z = self.x.flatten(0, -2), z.flatten(0, -2)
        elif z.dim() < 2 + len(layer.kernel_size):
            raise Unsuitable("there is one image only")
        self.rows = len(z)
        suffix = Suffix(recording, call)
        cross_entropy = suffix.cross_entropy
        if cross_entropy is None:
            stage = Stage(recording, call)
            assert stage.call.layer is not None
            behind = logits_behind(recording, stage.call.layer, limit)
            if behind.rows != self.rows:
                raise Unsuitable("the samples are not independent")
            cross_entropy = behind.cross_entropy
        self.cross_entropy: CrossEntropy = cross_entropy
        if cross_entropy.rows is not None:
            self.x, z = self.x[cross_entropy.rows], z[cross_entropy.rows]
        self.z, self.samples = z, len(z)
        z = z.flatten(1)  # (N, U)
        self.products = products(layer) if isinstance(layer, TENSOR_LAYERS) else None
        self.stages: list[Stage] = []
        if suffix.cross_entropy is not None:
            self.p = z.softmax(1)  # (N, C)
            equal = self.p.new_full((self.samples,), 1 / self.samples)
            self.shares = equal if cross_entropy.shares is None else cross_entropy.shares
            self.weights = self.shares.unsqueeze(1) * self.p
            self.chosen = F.one_hot(cross_entropy.targets, z.shape[1]) * -self.shares.unsqueeze(1)
            # of o_c − Σ_k p_k o_k by o: (N, C, C)
            self.g = torch.eye(z.shape[1], dtype=z.dtype, device=z.device) - self.p.unsqueeze(1)
            return
        self.p, self.shares = behind.p, behind.shares
        self.weights, self.chosen = behind.weights, behind.chosen
        if 8 * self.p.shape[1] * z.numel() * z.element_size() > limit:
            raise Unsuitable("the derivatives of all logits need too much memory")
        stage.enter(z)
        stage.g = stage.backward(behind.g.flatten(0, 1)).view(self.samples, -1, z.shape[1])
        self.stages, self.g = [stage, *behind.stages], stage.g * stage.slope.unsqueeze(1)  # (N, C, U)

    def look(self, name: str, positions: Tensor, steps: Tensor, limit: float) -> Tensor | None:
        """The changes of the loss when entries make steps (S, K): (S, K); None where another way is better.

        Args:
            limit: bytes that may be used.
        """
        jacobian = self._jacobian(name, limit)
        classes, rows = self.p.shape[1], self.p.shape[1] * jacobian.blocks
        each = (jacobian.inner + rows) * jacobian.size
        numbers = 4 * (each + rows * jacobian.inner)
        if len(self.stages) > 1:
            numbers += 4 * jacobian.factors[1] * sum(stage.before.shape[1] for stage in self.stages[:2])
        if 2 * numbers * self.samples * self.g.element_size() > limit:
            return None
        entries, asked = jacobian.entries(positions), steps
        steps = steps.new_zeros(len(steps), jacobian.blocks * jacobian.size)
        steps[:, entries] = asked
        largest = asked.abs().max()
        j = self.g.new_empty(self.samples, jacobian.inner, jacobian.size)
        v = self.g.new_empty(self.samples, rows, jacobian.size)
        reach, most = list[Tensor](), self.g.new_empty(self.samples)
        cumulants = [steps.new_zeros(steps.shape[1]) for _ in range(3)]
        portion = max(1, int(CACHE / each / v.element_size()))
        for start in range(0, self.samples, portion):
            some = slice(start, min(start + portion, self.samples))
            jacobian.form(some, j[some])
            if self.stages:
                reach.append(jacobian.reach(j[some]) * largest)
                if start == 0 and near(self.stages, jacobian.factors, reach[0][:FEW], 2) is None:
                    return None
            torch.bmm(jacobian.arranged(self.g[some]), j[some], out=v[some])
            w = v[some].view(-1, steps.shape[1])  # (N C, E)
            squares, weights = w * w, self.weights[some].flatten()
            torch.amax(squares.view(len(v[some]), -1), 1, out=most[some])
            cumulants[0] += self.chosen[some].flatten() @ w
            cumulants[1] += weights @ squares
            cumulants[2] += weights @ squares.mul_(w)
        v = v.view(self.samples, classes, -1)
        x = largest * most.sqrt()  # the largest |s w| of each sample
        if not x.max() < LARGE:
            return None
        order = _order(x, self.shares)
        if order == 4:
            cumulants.append(self._fourth(v, portion))
        changes = self._exactly(v, steps) if order is None else _summed(cumulants, steps)
        if self.stages:
            found = crossings(self.stages, jacobian, j, torch.cat(reach), steps, limit)
            if found is None:
                return None
            self._cross(changes, found, v, steps)
        return changes[:, entries]

    def _jacobian(self, name: str, limit: float) -> Jacobian:
        if self.products is not None and name != "bias":
            core = CoreJacobian(int(name.rpartition(".")[2]), self.products, self.x)
            r, m, n, _ = core.shape
            return WideJacobian(core) if m == core.tall == 1 and r * n > self.p.shape[1] else core
        return UnitJacobian(Units(self.layer, name, self.x, units_first(self.layer, self.z), limit), self.samples)

    def _fourth(self, v: Tensor, portion: int) -> Tensor:
        """κ_4 of each entry."""
        total = v.new_zeros(v.shape[2])
        for p, shares, w in zip(self.p.split(portion), self.shares.split(portion), v.split(portion), strict=True):
            squares = w * w
            second = (p.unsqueeze(1) @ squares).squeeze(1)  # (N, E)
            fourth = (p.unsqueeze(1) @ squares.square()).squeeze(1)
            total += shares @ (fourth - 3 * second.square())
        return total

    def _exactly(self, v: Tensor, steps: Tensor) -> Tensor:
        """The changes (S, E) when the logits move by s v, by the logarithm."""
        p = self.p.unsqueeze(1)  # (N, 1, C)
        means = [self.shares @ (p @ torch.mul(v, step).exp_()).squeeze(1).log_() for step in steps]
        return torch.stack(means) + steps * (self.chosen.flatten() @ v.flatten(0, 1))

    def _cross(self, changes: Tensor, found: list[Crossing], v: Tensor, steps: Tensor) -> None:
        """Add to the changes (S, E) what lies beyond the kinks."""
        samples, _, size = v.shape
        # the terms (step, sample, entry) that differ, each once, and how their logits move on
        places = [one.rest.nonzero(as_tuple=True) for one in found]
        many = sum(len(k) for _, k, _ in places) > samples * steps.numel()
        key, change = _product(found, len(steps)) if many else _one_by_one(found, places, samples)
        side, sample, e = key // (samples * size), key // size % samples, key % size
        p = (steps[side, e].unsqueeze(1) * v[sample, :, e]).exp_().mul_(self.p[sample])  # but for its sum
        gain = (p * change.expm1()).sum(1).div_(p.sum(1)).log1p_()
        terms = self.shares[sample] * gain + (self.chosen[sample] * change).sum(1)
        changes.view(-1).index_add_(0, side * size + e, terms)


def _one_by_one(found: list[Crossing], places: list[tuple[Tensor, ...]], samples: int) -> tuple[Tensor, Tensor]:
    """How the logits of some terms move beyond the kinks: the terms' numbers (T,), by step, sample, entry; and (T, C).

    places: where the rests of each stage are not 0.
    """
    keys, logits = [], []
    for crossing, (side, k, t) in zip(found, places, strict=True):
        sample, g = crossing.sample[k], crossing.stage.g
        keys.append((side * samples + sample) * crossing.size + crossing.entries[k, t])
        logits.append(g[sample, :, crossing.number[k]] * crossing.rest[side, k, t].unsqueeze(1))
    key, place = torch.cat(keys).unique(return_inverse=True)
    moves = torch.cat(logits)
    return key, moves.new_zeros(len(key), moves.shape[1]).index_add_(0, place, moves)


def _product(found: list[Crossing], sides: int) -> tuple[Tensor, Tensor]:
    """The same where terms meet several kinks each: by products for each sample."""
    moves = torch.stack([crossing.logits() for crossing in found if len(crossing.sample)]).sum(0)  # (N, C, S E)
    moves = moves.unflatten(2, (sides, -1)).permute(2, 0, 3, 1)  # (S, N, E, C)
    key = (moves != 0).any(3).flatten().nonzero().flatten()
    return key, moves.flatten(0, 2)[key]


def _summed(cumulants: list[Tensor], steps: Tensor) -> Tensor:
    """Σ_m s^m/m! κ_m for steps (S, E), by Horner's scheme."""
    total = torch.zeros_like(steps)
    for m in range(len(cumulants), 0, -1):
        total.add_(cumulants[m - 1]).mul_(steps).div_(m)
    return total


def _order(x: Tensor, shares: Tensor) -> int | None:
    """At which m, 3 or 4, to cut Σ_m s^m/m! κ_m for an error below eps / 16; None if that does not suffice.

    Where |s w| <= x (N,), the terms are at most those of −log(2 − e^x) = Σ_m d_m x^m, with d_{m+1} < d_m / log 2.
    """
    tails = {order: d * (shares @ (x ** (order + 1) / (1 - x / log(2)))) for order, d in TAIL.items()}
    third, fourth, largest = torch.stack([tails[3], tails[4], x.max()]).tolist()
    enough = torch.finfo(x.dtype).eps / 16
    if not largest < log(2) / 2:
        return None
    return 3 if third < enough else 4 if fourth < enough else None
