"""Direction queries from the structure of the network: one product serves both sides of the first layer.

The first dense layer sees the same input at every perturbed point, and so

    X (W ± σU)ᵀ = X Wᵀ ± σ X Uᵀ,

where U has the zeros of the mask: for few kept weights the product is sparse. What comes before the perturbed layers
is not computed again. Those behind the first run with a copy of their parameters for each point: by batched products
where they are a `Chain`, by rules where there is one for each call (`points`), else many points in one call of
`torch.func.vmap`. Where U = A Cᵀ is of low rank, no dense layer needs a copy: the points share W, and each adds its
σ (X C) Aᵀ (chapter 9).
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from zo_tutorial.directions import Directions
from zo_tutorial.low_rank import LowRank
from zo_tutorial.queries.chain import Chain, Factors, LayerOfChain, Pairs, outputs_of
from zo_tutorial.queries.cost import MEMORY, SETUP, beside, product, vmapped
from zo_tutorial.queries.points import Program
from zo_tutorial.queries.recording import AT_ONCE, TENSOR_LAYERS, Call, Recording, bytes_of, copies
from zo_tutorial.queries.sensitivity import units_back, units_first
from zo_tutorial.queries.suffix import CACHE
from zo_tutorial.queries.way import Index, Unsuitable, add_at, pieces_of

SPARSE = 1 / 5  # share of kept weights below which the sparse product is the faster one


class Directional:
    """Losses along directions.

    Args:
        index: {(layer, name within it): the flat positions that take part}, in the order of the directions' columns.
        limit: bytes that may be used at once.
        low_rank: whether the directions are `LowRank`.

    Attributes:
        chain, program: what runs the perturbed layers and all behind them; both None: vmap does.
        shared: the parameters whose low-rank directions stay in factors.

    Raises:
        Unsuitable: the recording does not tell, or there is nothing to gain: no dense layer comes first or has
            factors, the layers are no chain, and there is no rule for some call.
    """

    def __init__(
        self, recording: Recording, index: dict[tuple[nn.Module, str], Index], limit: float, low_rank: bool = False
    ):
        self.recording, self.index, self.limit = recording, index, limit
        whole = [key for key, positions in index.items() if low_rank and isinstance(positions, range)]
        self.shared = {(layer, name) for layer, name in whole if isinstance(layer, nn.Linear) and name == "weight"}
        perturbed = [call for call in recording.calls if call.layer in {layer for layer, _ in index}]
        for layer, _ in index:
            recording.call_of(layer)
        starts: list[Call] = []  # the perturbed layers that no other one reaches
        for call in perturbed:
            if not starts or call not in recording.after(*starts):
                starts.append(call)
        if not all(map(recording.undisturbed, starts)):
            raise Unsuitable("the input of a layer is not there any more")
        self.dense = {call.layer: call for call in starts if isinstance(call.layer, nn.Linear)}
        # inputs (in, R) and outputs (out, R) with the batch contiguous, as all that follows has it
        self.x = {layer: units_first(layer, call.args[0]).contiguous() for layer, call in self.dense.items()}
        results = {layer: recording.result(call) for layer, call in self.dense.items()}
        self.z = {layer: units_first(layer, z).contiguous() for layer, z in results.items()}
        self.added = {
            (layer, name): _Added(layer, name, positions, self.x[layer])
            for (layer, name), positions in index.items()
            if isinstance(layer, nn.Linear) and layer in self.dense and (layer, name) not in self.shared
        }
        self.chain = self._chain(starts)
        others = [call for call in starts if call.layer not in self.dense]
        self.calls = sorted(recording.after(*starts) + others, key=recording.calls.index)
        # a chain that ends before the loss leaves the rest to vmap: rules, if there are such, are quicker
        whole_chain = self.chain is not None and self.chain.suffix.cross_entropy is not None
        self.program = None if whole_chain else self._program(starts)
        self.chain = None if self.program is not None else self.chain
        if not self.dense and not self.shared and self.chain is None and self.program is None:
            raise Unsuitable("no dense layer comes first, and there is no rule for some call")

    def _chain(self, starts: list[Call]) -> Chain | None:
        """The chain that the perturbed layers are in, if they are in one."""
        try:
            chain = Chain(self.recording, starts[0])
        except Unsuitable:
            return None
        return chain if {layer for layer, _ in self.index} <= set(chain.layers) else None

    def _program(self, starts: list[Call]) -> Program | None:
        """The calls by their rules, if there is one for each and the perturbed layers are known to `_made`."""
        if not all(isinstance(layer, (nn.Linear, nn.LayerNorm, *TENSOR_LAYERS)) for layer, _ in self.index):
            return None
        try:
            return Program(self.recording, self.calls, starts)
        except Unsuitable:
            return None

    def losses(self, directions: Directions, scales: list[float]) -> Tensor:
        """L(θ + s u) for S scales and n directions: (S, n)."""
        if self.chain is not None and self.chain.suffix.cross_entropy is not None:
            self.chain.suffix.cross_entropy.stable = False  # begin as one would who was not asked before
        parameters = [layer.get_parameter(name) for layer, name in self.index.keys() - self.shared]
        results = self.recording.bytes if self.program is None else self.program.bytes
        each = len(scales) * 2 * results + (2 * len(scales) + 1) * bytes_of(parameters)
        if each > self.limit:
            raise Unsuitable("the memory does not suffice for one direction")
        points = AT_ONCE / self.recording.bytes if self.chain is None else CACHE / self.chain.bytes  # to run at once
        points = points if self.program is None else self.program.many
        portion = max(1, int(min(self.limit / each, points / len(scales))))
        starts = range(0, directions.n, portion)
        parts = (directions.part(start, min(start + portion, directions.n)) for start in starts)
        return torch.cat([self._losses(part, scales) for part in parts], 1)

    def seconds(self, asked: int) -> float:
        """An estimate of what a query takes."""
        kept = {layer: len(positions) for (layer, name), positions in self.index.items() if name != "bias"}
        kept |= {layer: sum(layer.weight.shape) for layer, _ in self.shared}  # multiply-adds of rank 1
        first = sum(product(layer, call, kept.get(layer, 0)) for layer, call in self.dense.items())
        if self.chain is not None:
            return first + self.chain.seconds(asked, first > 0)
        own = self.index.keys() - self.shared
        copied = [layer.get_parameter(name) for layer, name in own if layer not in self.dense]
        if self.program is not None:
            together = beside(self.calls, min(asked, self.program.many))
            return first + SETUP / asked + 3 * bytes_of(copied) / MEMORY + together
        return first + vmapped(self.recording, asked, copied, self.calls)

    def _losses(self, directions: Directions, scales: list[float]) -> Tensor:
        changes: dict[nn.Linear, Tensor] = {}  # of the outputs of first layers (n, out, R)
        parameters: dict[nn.Module, Pairs] = {}
        factors: dict[nn.Module, Factors] = {}
        for ((layer, name), positions), part in zip(self.index.items(), self._split(directions), strict=True):
            if isinstance(layer, nn.Linear) and layer in self.dense:
                if isinstance(part, Tensor):
                    change = self.added[layer, name](part.to(self.z[layer]))  # (n, out, R) or (n, out, 1)
                else:
                    a, c = part
                    change = a @ (c.mT @ self.x[layer])  # (n, out, r) @ (n, r, R)
                changes[layer] = changes[layer] + change if layer in changes else change
            elif isinstance(part, Tensor):
                parameter = layer.get_parameter(name)
                points = copies(parameter, len(scales) * len(part))  # (S n, *shape)
                for some, scale in zip(points.flatten(1).view(len(scales), len(part), -1), scales, strict=True):
                    add_at(some, positions, part, scale)
                parameters.setdefault(layer, []).append((parameter, points))
            else:
                a, c = part
                factors[layer] = torch.cat([scale * a for scale in scales]), torch.cat([c for _ in scales])  # (S n, …)
        outputs = {layer: self._moved(layer, change, scales) for layer, change in changes.items()}
        if self.chain is None:
            losses = self._replayed(outputs, parameters, factors)
        else:
            first = list(outputs.values()) or [self.chain.first(parameters)]
            losses = self.chain.losses(first[0], parameters, factors)
        return losses.view(len(scales), directions.n)

    def _moved(self, layer: nn.Linear, change: Tensor, scales: list[float]) -> Tensor:
        """z + s change of a first layer, for S scales and n changes (n, out, R): (S n, out, R)."""
        z = change.new_empty(len(scales), len(change), *self.z[layer].shape)
        for some, scale in zip(z, scales, strict=True):
            torch.add(self.z[layer], change, alpha=scale, out=some)
        return z.flatten(0, 1)

    def _replayed(
        self, outputs: dict[nn.Linear, Tensor], parameters: dict[nn.Module, Pairs], factors: dict[nn.Module, Factors]
    ) -> Tensor:
        """(P,) losses of P points, from the outputs of first layers (P, out, R), and weights of others."""
        values = {}
        for layer, z in outputs.items():
            result = self.dense[layer].results[0]
            values[id(result)] = units_back(layer, z, result.shape)
        if self.program is not None:
            layers: dict[nn.Module | None, Callable] = {}
            for own in parameters.keys() | factors.keys():
                layers[own] = partial(_made, own, parameters.get(own, []), factors.get(own))
            return self.program.losses(values, layers)
        copied = {layer: [points for _, points in pairs] for layer, pairs in parameters.items()}

        def loss(values, copied, factors):
            added: dict[nn.Module, Callable] = {layer: partial(_change, *pair) for layer, pair in factors.items()}
            pairs = {
                layer: [(old, new) for (old, _), new in zip(parameters[layer], points, strict=True)]
                for layer, points in copied.items()
            }
            return self.recording.replay(self.calls, values, pairs, added).reshape(())

        return vmap(loss, randomness="same")(values, copied, factors)

    def _split(self, directions: Directions) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """The directions of each parameter: numbers (n, K), or factors A (n, out, r) and C (n, in, r)."""
        if not isinstance(directions, LowRank):
            yield from pieces_of(self.index, directions.rows(0, directions.n))
            return
        for k, (layer, name) in enumerate(self.index):
            if (layer, name) in self.shared:
                a, c = (factor.to(layer.get_parameter(name)) for factor in directions.factors[k])
                yield a, c
            else:
                yield directions.of_parameter(k)


def _made(layer: nn.Module, pairs: Pairs, factors: Factors | None, x: Tensor) -> Tensor:
    """What a layer makes of x (P, ..., in), or of one x for all points (1, ..., in): (P, ..., out)."""
    own, one = {id(old): new for old, new in pairs}, [1] * (x.dim() - 1)
    if isinstance(layer, nn.LayerNorm):
        z = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
        for parameter, join in ((layer.weight, torch.mul), (layer.bias, torch.add)):
            if parameter is not None:
                points = own.get(id(parameter), parameter.unsqueeze(0))  # (P or 1, *shape)
                z = join(z, points.view(len(points), *one[parameter.dim() :], *parameter.shape))
        return z
    assert isinstance(layer, LayerOfChain)
    rows = x.reshape(len(x), -1, x.shape[-1])  # (P, R, in)
    if isinstance(layer, TENSOR_LAYERS):
        z = outputs_of(layer, rows.mT, pairs, None).mT
    else:
        weight, bias = own.get(id(layer.weight)), own.get(id(layer.bias))
        z = F.linear(rows, layer.weight) if weight is None else rows @ weight.mT  # (P, R, out)
        if factors is not None:
            z = z + _change(*factors, rows)
        if layer.bias is not None:
            z = z + (layer.bias if bias is None else bias.unsqueeze(1))
    return z.reshape(len(z), *x.shape[1:-1], -1)


def _change(a: Tensor, c: Tensor, x: Tensor) -> Tensor:
    """What W + A Cᵀ gives more than W: (X C) Aᵀ, (..., out)."""
    return (x @ c) @ a.mT


class _Added:
    """What directions of a dense layer's weight or bias add to its output.

    Args:
        positions: those that take part.
        x: the layer's input (in, R).
    """

    def __init__(self, layer: nn.Linear, name: str, positions: Index, x: Tensor):
        self.name, self.positions, self.x = name, positions, x
        self.rows, self.columns = layer.weight.shape
        few = name != "bias" and len(positions) < SPARSE * layer.weight.numel()
        self.sparse = False
        if few and not isinstance(positions, range) and (positions.diff() > 0).all():
            self.sparse = True
            self.ends = (positions // self.columns).bincount(minlength=self.rows).cumsum(0)  # of the rows
            self.entries = (positions % self.columns).int()

    def __call__(self, u: Tensor) -> Tensor:
        """From u (n, K): (n, out, R), or (n, out, 1) of a bias."""
        if self.name == "bias":
            change = u.new_zeros(len(u), self.rows)
            add_at(change, self.positions, u, 1.0)
            return change.unsqueeze(2)
        if not self.sparse:
            whole = u.new_zeros(len(u), self.rows * self.columns)
            add_at(whole, self.positions, u, 1.0)
            return (whole.view(-1, self.columns) @ self.x).view(len(u), self.rows, -1)
        # All U below each other, (n out, in), in compressed rows.
        ends = self.ends + len(self.positions) * torch.arange(len(u), device=u.device).unsqueeze(1)
        ends = torch.cat([ends.new_zeros(1), ends.flatten()]).int()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "sparse CSR tensor support is in beta state"
            whole = torch.sparse_csr_tensor(
                ends, self.entries.repeat(len(u)), u.flatten(), (len(u) * self.rows, self.columns)
            )
            return (whole @ self.x).view(len(u), self.rows, -1)
