"""Direction queries from the structure of the network: one product serves both sides of the first layer.

The first dense layer sees the same input at every perturbed point, and so

    X (W ± σU)ᵀ = X Wᵀ ± σ X Uᵀ,

where U has the zeros of the mask: for few kept weights the product is sparse. What comes before the perturbed layers
is not computed again; those behind the first run with a copy of their parameters for each point, many points in one
call of `torch.func.vmap`. Where U = A Cᵀ is of low rank, no dense layer needs a copy: the points share X Wᵀ, and each
adds its σ (X C) Aᵀ (chapter 9).
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap

from zo_tutorial.directions import Directions
from zo_tutorial.low_rank import LowRank
from zo_tutorial.queries.chain import Chain
from zo_tutorial.queries.cost import product, vmapped
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
        shared: the parameters whose low-rank directions stay in factors.

    Raises:
        Unsuitable: the recording does not tell, or there is nothing to gain: no dense layer comes first or has factors.
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
        self.base = {layer: units_first(layer, layer(call.args[0])) for layer, call in self.dense.items()}  # (out, R)
        self.chain = self._chain(starts)
        if not self.dense and not self.shared and self.chain is None:
            raise Unsuitable("no dense layer comes first")
        others = [call for call in starts if call.layer not in self.dense]
        self.calls = sorted(recording.after(*starts) + others, key=recording.calls.index)

    def _chain(self, starts: list[Call]) -> Chain | None:
        """The chain that the perturbed layers are in, if they are in one."""
        if len(starts) > 1 or not isinstance(starts[0].layer, (nn.Linear, *TENSOR_LAYERS)):
            return None
        chain = Chain(self.recording, starts[0])
        return chain if {layer for layer, _ in self.index} <= set(chain.layers) else None

    def losses(self, directions: Directions, scales: list[float]) -> Tensor:
        """L(θ + s u) for S scales and n directions: (S, n)."""
        parameters = [layer.get_parameter(name) for layer, name in self.index.keys() - self.shared]
        each = len(scales) * 2 * self.recording.bytes + (2 * len(scales) + 1) * bytes_of(parameters)
        if each > self.limit:
            raise Unsuitable("the memory does not suffice for one direction")
        points = AT_ONCE / self.recording.bytes if self.chain is None else CACHE / self.chain.bytes  # to run at once
        portion = max(1, int(min(self.limit / each, points / len(scales))))
        starts = range(0, directions.n, portion)
        parts = (directions.part(start, min(start + portion, directions.n)) for start in starts)
        return torch.cat([self._losses(part, scales) for part in parts], 1)

    def seconds(self, asked: int) -> float:
        """An estimate of what a query takes."""
        kept = {layer: len(positions) for (layer, name), positions in self.index.items() if name != "bias"}
        kept |= {layer: sum(layer.weight.shape) for layer, _ in self.shared}  # multiply-adds of rank 1
        first = sum(product(layer, call, kept.get(layer, 0)) for layer, call in self.dense.items())
        own = self.index.keys() - self.shared
        copied = [layer.get_parameter(name) for layer, name in own if layer not in self.dense]
        return first + vmapped(self.recording, asked, copied, self.calls)

    def _losses(self, directions: Directions, scales: list[float]) -> Tensor:
        outputs: dict[nn.Linear, Tensor] = {}
        parameters: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        factors: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for ((layer, name), positions), part in zip(self.index.items(), self._split(directions), strict=True):
            if isinstance(layer, nn.Linear) and layer in self.dense:
                x = self.dense[layer].args[0]
                if isinstance(part, Tensor):
                    z = _linear_change(layer, name, positions, part.to(layer.weight), x)  # (n, out, R) or (n, out, 1)
                else:
                    a, c = part
                    z = a @ (c.mT @ units_first(layer, x))  # (n, out, r) @ (n, r, R)
                outputs[layer] = outputs[layer] + z if layer in outputs else z
            elif isinstance(part, Tensor):
                parameter = layer.get_parameter(name)
                points = copies(parameter, len(scales) * len(part))  # (S n, *shape)
                for some, scale in zip(points.flatten(1).view(len(scales), len(part), -1), scales, strict=True):
                    add_at(some, positions, part, scale)
                parameters.setdefault(layer, []).append((parameter, points))
            else:
                a, c = part
                factors[layer] = torch.cat([scale * a for scale in scales]), torch.cat([c for _ in scales])  # (S n, …)
        values = {}
        for layer, change in outputs.items():
            call, z = self.dense[layer], self.base[layer]
            z = torch.stack([torch.add(z, change, alpha=scale) for scale in scales]).flatten(0, 1)  # (S n, out, R)
            if self.chain is not None:
                return self.chain.losses(z, parameters, factors).view(len(scales), directions.n)
            values[id(call.results[0])] = units_back(layer, z, call.results[0].shape)

        if self.chain is not None:
            z = self.chain.first(parameters[self.chain.start.layer])
            return self.chain.losses(z, parameters, factors).view(len(scales), directions.n)

        copied = {layer: [points for _, points in pairs] for layer, pairs in parameters.items()}

        def loss(values, copied, factors):
            added: dict[nn.Module, Callable] = {layer: partial(_change, *pair) for layer, pair in factors.items()}
            pairs = {
                layer: [(old, new) for (old, _), new in zip(parameters[layer], points, strict=True)]
                for layer, points in copied.items()
            }
            return self.recording.replay(self.calls, values, pairs, added).reshape(())

        return vmap(loss, randomness="same")(values, copied, factors).view(len(scales), directions.n)

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


def _change(a: Tensor, c: Tensor, x: Tensor) -> Tensor:
    """What W + A Cᵀ gives more than W: (X C) Aᵀ, (..., out)."""
    return (x @ c) @ a.mT


def _linear_change(layer: nn.Linear, name: str, positions: Index, u: Tensor, x: Tensor) -> Tensor:
    """What the direction u (n, d) of a dense layer's weight or bias adds to its output: (n, out, R) or (n, out, 1)."""
    if name == "bias":
        change = u.new_zeros(len(u), layer.out_features)
        add_at(change, positions, u, 1.0)
        return change.unsqueeze(2)
    x = units_first(layer, x)  # (in, R)
    rows, columns = layer.weight.shape
    few = len(positions) < SPARSE * layer.weight.numel()
    if few and not isinstance(positions, range) and (positions.diff() > 0).all():
        # All U below each other, (n out, in), in compressed rows.
        ends = (positions // columns).bincount(minlength=rows).cumsum(0)
        ends = ends + len(positions) * torch.arange(len(u), device=u.device).unsqueeze(1)
        ends = torch.cat([ends.new_zeros(1), ends.flatten()])
        entries = (positions % columns).repeat(len(u))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "sparse CSR tensor support is in beta state"
            whole = torch.sparse_csr_tensor(ends, entries, u.flatten(), (len(u) * rows, columns))
            return (whole @ x).view(len(u), rows, -1)
    whole = u.new_zeros(len(u), rows * columns)
    add_at(whole, positions, u, 1.0)
    return (whole.view(-1, columns) @ x).view(len(u), rows, -1)
