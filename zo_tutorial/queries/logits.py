"""To the logits, then to the loss: all entries of a parameter at once, where what lies behind is linear but for kinks.

Away from the kinks of its activations (ReLU and its like) the network behind a layer is linear. A step s of the entry e
moves the logits of sample b by s v, with v the derivatives of the logits by e: C backward passes for each sample, for
all entries together. With p = softmax, y the class and w = v − Σ_c p_c v_c

    L' − L = mean over b of  log Σ_c p_c exp(s w_c) − s w_y  =  Σ_m s^m/m! κ_m,      κ_m the mean over b of cumulants

κ_1 = −w_y (its mean is the gradient), κ_2 = Σ p w², κ_3 = Σ p w³, κ_4 = Σ p w⁴ − 3 κ_2². So the samples are summed
before there is a step. Where the series does not suffice, the logarithm itself is computed.

A number z in front of an activation φ is near a kink if some entry can move it there. These few are computed for
themselves: φ(z + δ) = φ(z) + φ'(z) δ + ζ, and ζ, 0 on this side of the kink, moves the logits, and what lies in
between, as any change of φ(z) does. Only the terms (step, sample, entry) with a ζ are computed once more.
"""

from inspect import signature
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.cross_entropy import RESHAPE
from zo_tutorial.queries.jacobian import CoreJacobian, UnitJacobian
from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, Recording, version
from zo_tutorial.queries.sensitivity import CONVOLUTIONS, Units, matrix, products, units_first
from zo_tutorial.queries.suffix import RELU, Head, Suffix
from zo_tutorial.queries.way import Unsuitable

ORDERS = 4  # of the series, at most
TAIL = {3: 13 / 12, 4: 5 / 4}  # the first coefficient of −log(2 − e^x) behind that of an order
NEAR = 1 / 16  # the largest share of numbers near a kink
CACHE = 2**21  # bytes to handle at once: most of them stay in the cache of a core
MOVES = 2**22  # the most numbers that tell how kinks move


def kinks(call: Call) -> tuple[list[float], list[float]]:
    """Where the slope of a piecewise-linear activation changes, and the slopes before, between and after.

    Raises:
        Unsuitable: it is another one.
    """
    if call.function in RELU:
        return [0.0], [0.0, 1.0]
    if call.function is F.relu6:
        return [0.0, 6.0], [0.0, 1.0, 0.0]
    if call.function in (F.leaky_relu, F.hardtanh):
        given = signature(call.function).bind(*call.args, **call.kwargs)
        given.apply_defaults()
        if call.function is F.leaky_relu:
            return [0.0], [given.arguments["negative_slope"], 1.0]
        return [given.arguments["min_val"], given.arguments["max_val"]], [0.0, 1.0, 0.0]
    raise Unsuitable


class Stage(Head):
    """A piecewise-linear activation φ of numbers z, and the layer W φ(z) + b behind it.

    Attributes:
        call: of that layer.
        before, after, slope: z where the parameters stand, φ(z) and φ'(z) (N, U).
        distance: of each z to the nearest kink.
        steepest: the largest slope of φ.
        g: the derivatives of C functions of the logits by φ(z): (N, C, U).
    """

    def __init__(self, recording: Recording, call: Call):
        layer = self._follow(recording, call, Suffix(recording, call), RESHAPE)
        assert self.activation is not None
        self.places, self.slopes = kinks(self.activation)
        self.steepest = max(map(abs, self.slopes))
        self.call, self.image = recording.call_of(layer), None
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise Unsuitable
            self.weight, self.image = layer.weight, self.call.args[0].shape[1:]
            self.options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        else:
            self.weight = matrix(layer)

    def enter(self, z: Tensor) -> None:
        """Stand at z (N, U)."""
        self.before, self.after = z, self.activate(z.clone())
        self.slope = torch.full_like(z, self.slopes[0])
        self.distance = torch.full_like(z, torch.inf)
        for place, low, high in zip(self.places, self.slopes[:-1], self.slopes[1:], strict=True):
            self.slope += (z > place) * (high - low)
            self.distance = torch.minimum(self.distance, (z - place).abs())

    def bound(self, reach: Tensor) -> Tensor:
        """How far the layer's output may move (K, U') where each z moves as far as `reach` (K, U)."""
        weight, reach = self.weight.abs(), reach * self.steepest
        if self.image is None:
            return reach @ weight.T
        return F.conv2d(reach.view(-1, *self.image), weight, None, **self.options).flatten(1)

    def backward(self, g: Tensor) -> Tensor:
        """The derivatives by φ(z) (K, U) of functions with the derivatives g by the layer's output (K, U')."""
        if self.image is None:
            return g @ self.weight
        g = g.reshape(-1, *self.call.results[0].shape[1:])
        return nn.grad.conv2d_input((len(g), *self.image), self.weight, g, **self.options).flatten(1)

    def rest(self, sample: Tensor, number: Tensor, change: Tensor) -> Tensor:
        """ζ = φ(z + δ) − φ(z) − φ'(z) δ for changes δ (S, K, T) of K numbers; 0 where it is no more than rounding."""
        z, a, slope = (t[sample, number].unsqueeze(1) for t in (self.before, self.after, self.slope))
        rest = self.activate(z + change).sub_(a).sub_(slope * change)
        rounding = 4 * torch.finfo(z.dtype).eps * max(1, self.steepest)
        return rest.masked_fill_(rest.abs() <= rounding * (z.abs() + change.abs()), 0)


def logits_behind(recording: Recording, layer: nn.Module, limit: float) -> "Logits":
    """What lies behind a layer up to the logits, found out once for each recording.

    Raises:
        Unsuitable: as `Logits` says.
    """
    key = "logits", layer
    if key not in recording.layers_seen:
        recording.layers_seen[key] = None
        recording.layers_seen[key] = Logits(recording, layer, limit)
    if recording.layers_seen[key] is None:
        raise Unsuitable
    return recording.layers_seen[key]


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
        if suffix.cross_entropy is None:
            stage = Stage(recording, call)
            behind = logits_behind(recording, stage.call.layer, limit)
            if behind.rows != self.rows:
                raise Unsuitable("the samples are not independent")
            self.cross_entropy, self.shares, self.chosen = behind.cross_entropy, behind.shares, behind.chosen
            self.p, self.log_p, self.weights = behind.p, behind.log_p, behind.weights
        else:
            self.cross_entropy = suffix.cross_entropy
        if self.cross_entropy.rows is not None:
            self.x, z = self.x[self.cross_entropy.rows], z[self.cross_entropy.rows]
        self.z, self.samples = z, len(z)
        z = z.flatten(1)  # (N, U)
        self.products = products(layer) if isinstance(layer, TENSOR_LAYERS) else None
        if suffix.cross_entropy is None:
            classes = self.p.shape[1]
            if 8 * z.numel() * classes * z.element_size() > limit:
                raise Unsuitable("the derivatives of all logits need too much memory")
            stage.enter(z)
            stage.g = stage.backward(behind.g.flatten(0, 1)).view(self.samples, classes, -1)
            self.stages, self.g = [stage, *behind.stages], stage.g * stage.slope.unsqueeze(1)  # (N, C, U)
            return
        self.stages = []
        self.p, self.log_p = z.softmax(1), z.log_softmax(1)  # (N, C)
        shares = self.cross_entropy.shares
        self.shares = self.p.new_full((self.samples,), 1 / self.samples) if shares is None else shares
        self.weights = self.shares.unsqueeze(1) * self.p
        self.chosen = F.one_hot(self.cross_entropy.targets, z.shape[1]) * -self.shares.unsqueeze(1)
        # of o_c − Σ_k p_k o_k by o
        self.g = torch.eye(z.shape[1], dtype=z.dtype, device=z.device) - self.p.unsqueeze(1)  # (N, C, C)

    def look(self, name: str, positions: Tensor, steps: Tensor, limit: float) -> Tensor | None:
        """The changes of the loss when entries make steps (S, K): (S, K); None where another way is better.

        Args:
            limit: bytes that may be used.
        """
        if (
            (self.products is None or name == "bias")
            and len(self.stages) < 2
            and not isinstance(self.layer, CONVOLUTIONS)
        ):
            return None  # one unit in front of a head: `Series` is quicker
        if self.products is not None and name != "bias":
            jacobian = CoreJacobian(int(name.rpartition(".")[2]), self.products, self.x)
        else:
            jacobian = UnitJacobian(
                Units(self.layer, name, self.x, units_first(self.layer, self.z), limit), self.samples
            )
        left, groups, right = jacobian.factors
        size, classes = left * right, self.p.shape[1]
        each = (size + classes * groups) * jacobian.size
        numbers = 4 * each
        if len(self.stages) > 1:
            numbers += 4 * groups * (self.stages[0].before.shape[1] + self.stages[1].before.shape[1])
        if 2 * numbers * self.samples * self.g.element_size() > limit:
            return None
        entries, asked = jacobian.entries(positions), steps
        steps = steps.new_zeros(len(steps), groups * jacobian.size)
        steps[:, entries] = asked
        largest = asked.abs().max()
        j = self.g.new_empty(self.samples, size, jacobian.size)
        v = self.g.new_empty(self.samples, classes * groups, jacobian.size)
        reach, most = self.g.new_empty(self.samples, size), self.g.new_empty(self.samples)
        cumulants = [steps.new_zeros(steps.shape[1]) for _ in range(3)]
        portion = max(1, int(CACHE / each / v.element_size()))
        for start in range(0, self.samples, portion):
            some = slice(start, min(start + portion, self.samples))
            jacobian.form(some, j[some])
            if self.stages:
                torch.amax(j[some].abs(), 2, out=reach[some])
            g = self.g[some].unflatten(2, jacobian.factors).transpose(2, 3)  # (N, C, G, left, right)
            torch.bmm(g.reshape(-1, classes * groups, size), j[some], out=v[some])
            w = v[some].view(-1, steps.shape[1])  # (N C, E)
            squares, weights = w * w, self.weights[some].flatten()
            torch.amax(squares.view(len(g), -1), 1, out=most[some])
            cumulants[0] += self.chosen[some].flatten() @ w
            cumulants[1] += weights @ squares
            cumulants[2] += weights @ squares.mul_(w)
        v = v.view(self.samples, classes, -1)
        order = _order(largest * most.sqrt(), self.shares)
        if order == 4:
            cumulants.append(self._fourth(v, portion))
        changes = self._exactly(v, steps) if order is None else _summed(cumulants, steps)
        if self.stages and not self._mend(changes, jacobian, j, v, reach * largest, steps):
            return None
        return changes[:, entries]

    def _fourth(self, v: Tensor, portion: int) -> Tensor:
        """κ_4 of each entry."""
        total = 0.0
        for p, shares, w in zip(self.p.split(portion), self.shares.split(portion), v.split(portion), strict=True):
            squares = w * w
            second = (p.unsqueeze(1) @ squares).squeeze(1)  # (N, E)
            fourth = (p.unsqueeze(1) @ squares.square()).squeeze(1)
            total = total + shares @ (fourth - 3 * second.square())
        return total

    def _exactly(self, v: Tensor, steps: Tensor) -> Tensor:
        """The changes (S, E) when the logits move by s v, by the logarithm."""
        rows = torch.arange(self.samples, device=v.device)
        v = v - v[rows, self.cross_entropy.targets].unsqueeze(1)  # against the logit of the class
        return torch.stack([self.shares @ torch.logsumexp(v * step + self.log_p.unsqueeze(2), 1) for step in steps])

    def _mend(
        self, changes: Tensor, jacobian: UnitJacobian | CoreJacobian, j: Tensor, v: Tensor, reach: Tensor, steps: Tensor
    ) -> bool:
        """Add what the kinks change; False if too many are near.

        Args:
            changes: (S, E).
            j, v, reach: J, what it makes of the logits (N, C, E), and how far a step may move each number (N, K).
        """
        left, groups, right = jacobian.factors
        samples, _, size = v.shape
        t = torch.arange(jacobian.size, device=v.device)
        rests: list[tuple[Tensor, ...]] = []
        keys, logits = [], []
        for k, stage in enumerate(self.stages):
            if k == 0:
                near = stage.distance.view(-1, *jacobian.factors) <= reach.view(-1, left, 1, right)
                sample, a, group, b = near.nonzero(as_tuple=True)
                number, entries = (a * groups + group) * right + b, group.unsqueeze(1) * jacobian.size + t  # (K, T)
                moves = steps.unflatten(1, (groups, -1))[:, group] * j[sample, a * right + b]  # (S, K, T)
            else:
                if k == 1:  # a bound for each number and each group of entries
                    bound = torch.eye(groups, dtype=v.dtype, device=v.device).view(groups, 1, 1, groups, 1)
                    bound = (bound * reach.view(-1, left, 1, right)).flatten(2)  # (G, N, U)
                bound = self.stages[k - 1].bound(bound.flatten(0, 1)).view(groups, samples, -1)
                sample, number = (stage.distance <= bound.amax(0)).nonzero(as_tuple=True)
                if len(sample) * size * len(steps) > MOVES:
                    return False
                entries = torch.arange(size, device=v.device).expand(len(sample), -1)
                moves = self._moves(k, jacobian, j, sample, number, rests, steps)
            if len(sample) > NEAR * stage.distance.numel():
                return False
            rest = stage.rest(sample, number, moves)
            rests.append((sample, number, entries, rest))
            side, which, t_ = rest.nonzero(as_tuple=True)
            keys.append((side * samples + sample[which]) * size + entries[which, t_])
            logits.append(stage.g[sample[which], :, number[which]] * rest[side, which, t_].unsqueeze(1))
        key, place = torch.cat(keys).unique(return_inverse=True)
        change = v.new_zeros(len(key), v.shape[1]).index_add_(0, place, torch.cat(logits))
        side, sample, e = key // (samples * size), key // size % samples, key % size
        before = steps[side, e].unsqueeze(1) * v[sample, :, e] + self.log_p[sample]
        terms = self.shares[sample] * (before.softmax(1) * change.expm1()).sum(1).log1p()
        terms += (self.chosen[sample] * change).sum(1)
        changes.view(-1).index_add_(0, side * size + e, terms)
        return True

    def _moves(
        self,
        k: int,
        jacobian: UnitJacobian | CoreJacobian,
        j: Tensor,
        sample: Tensor,
        number: Tensor,
        rests: list[tuple[Tensor, ...]],
        steps: Tensor,
    ) -> Tensor:
        """How far the steps move some numbers of the k-th stage: (S, K, E)."""
        g = torch.zeros(len(number), self.stages[k].before.shape[1], dtype=j.dtype, device=j.device)
        g[torch.arange(len(number), device=g.device), number] = 1
        moves = steps.new_zeros(len(steps), len(number), steps.shape[1])
        for stage, (others, numbers, entries, rest) in zip(self.stages[k - 1 :: -1], rests[::-1], strict=True):
            g = stage.backward(g)  # (K, U), by φ(z)
            whole = rest.new_zeros(*rest.shape[:2], steps.shape[1])
            whole.scatter_(2, entries.expand(len(steps), -1, -1), rest)
            moves += (g[:, numbers] * (sample.unsqueeze(1) == others)) @ whole
            g = g * stage.slope[sample]
        g = g.unflatten(1, jacobian.factors).transpose(1, 2).flatten(2)  # (K, G, left right)
        return moves.add_((g @ j[sample]).flatten(1) * steps.unsqueeze(1))


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
