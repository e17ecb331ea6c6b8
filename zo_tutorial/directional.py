"""Direction queries from the structure of the network: one product serves both sides of the first layer.

The first dense layer sees the same input at every perturbed point, and so

    X (W ± σU)ᵀ = X Wᵀ ± σ X Uᵀ,

where U has the zeros of the mask: for few kept weights the product is sparse. What comes before the perturbed layers
is not computed again; those behind the first run with a copy of their parameters for each point, many points in one
call of `torch.func.vmap` (chapter 9).
"""

import warnings

import torch
from torch import Tensor, nn
from torch.func import vmap

from zo_tutorial.affine import units_back, units_first
from zo_tutorial.tape import AT_ONCE, Call, Tape, Unsuitable, bytes_of, copies

SPARSE = 1 / 5  # share of kept weights below which the sparse product is the faster one


class Directional:
    """Losses along directions.

    Args:
        index: {(layer, name within it): the flat positions that take part}, in the order of the directions' columns.
        limit: bytes that may be used at once.

    Raises:
        Unsuitable: the recording does not tell, or no dense layer comes first: then there is nothing to gain.
    """

    def __init__(self, tape: Tape, index: dict[tuple[nn.Module, str], Tensor], limit: float):
        self.tape, self.index, self.limit = tape, index, limit
        perturbed = [call for call in tape.calls if call.layer in {layer for layer, _ in index}]
        for layer, _ in index:
            tape.call_of(layer)
        starts: list[Call] = []  # the perturbed layers that no other one reaches
        for call in perturbed:
            if not starts or call not in tape.after(*starts):
                starts.append(call)
        if any(t._version != v for call in starts for t, v in zip(call.tensors, call.versions, strict=True)):
            raise Unsuitable("the input of a layer is not there any more")
        self.dense = {call.layer: call for call in starts if isinstance(call.layer, nn.Linear)}
        if not self.dense:
            raise Unsuitable("no dense layer comes first")
        others = [call for call in starts if call.layer not in self.dense]
        self.calls = sorted(tape.after(*starts) + others, key=tape.calls.index)

    def losses(self, directions: Tensor, scales: list[float]) -> Tensor:
        """L(θ + s u) for S scales and n directions (n, d): (S, n)."""
        parameters = [layer.get_parameter(name) for layer, name in self.index]
        each = len(scales) * 2 * self.tape.bytes + (2 * len(scales) + 1) * bytes_of(parameters)
        if each > self.limit:
            raise Unsuitable("the memory does not suffice for one direction")
        portion = max(1, int(min(self.limit / each, AT_ONCE / (len(scales) * self.tape.bytes))))
        return torch.cat([self._losses(u, scales) for u in directions.split(portion)], 1)

    def _losses(self, directions: Tensor, scales: list[float]) -> Tensor:
        pieces = directions.split([len(positions) for positions in self.index.values()], dim=1)
        outputs, parameters = {}, {}
        for ((layer, name), positions), u in zip(self.index.items(), pieces, strict=True):
            if layer in self.dense:
                z = _linear_change(layer, name, positions, u, self.dense[layer].args[0])  # (n, out, R) or (n, out, 1)
                outputs[layer] = outputs[layer] + z if layer in outputs else z
                continue
            points = copies(layer.get_parameter(name), len(scales) * len(u))  # (S n, *shape)
            for part, scale in zip(points.flatten(1).view(len(scales), len(u), -1), scales, strict=True):
                part.index_add_(1, positions, u, alpha=scale)
            parameters.setdefault(layer, {})[name] = points
        values = {}
        for layer, change in outputs.items():
            call = self.dense[layer]
            z = units_first(layer, layer(call.args[0]))  # (out, R)
            z = torch.stack([torch.add(z, change, alpha=scale) for scale in scales]).flatten(0, 1)  # (S n, out, R)
            values[id(call.results[0])] = units_back(layer, z, call.results[0].shape)

        def loss(values, parameters):
            return self.tape.replay(self.calls, values, parameters).reshape(())

        return vmap(loss, randomness="same")(values, parameters).view(len(scales), len(directions))


def _linear_change(layer: nn.Linear, name: str, positions: Tensor, u: Tensor, x: Tensor) -> Tensor:
    """What the direction u (n, d) of a dense layer's weight or bias adds to its output: (n, out, R) or (n, out, 1)."""
    if name == "bias":
        return u.new_zeros(len(u), layer.out_features).index_copy_(1, positions, u).unsqueeze(2)
    x = units_first(layer, x)  # (in, R)
    rows, columns = layer.weight.shape
    if len(positions) < SPARSE * layer.weight.numel() and (positions.diff() > 0).all():
        # All U below each other, (n out, in), in compressed rows.
        ends = (positions // columns).bincount(minlength=rows).cumsum(0)
        ends = ends + len(positions) * torch.arange(len(u), device=u.device).unsqueeze(1)
        ends = torch.cat([ends.new_zeros(1), ends.flatten()])
        entries = (positions % columns).repeat(len(u))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "sparse CSR tensor support is in beta state"
            whole = torch.sparse_csr_tensor(ends, entries, u.flatten(), (len(u) * rows, columns))
            return (whole @ x).view(len(u), rows, -1)
    whole = u.new_zeros(len(u), rows * columns).index_copy_(1, positions, u)
    return (whole.view(-1, columns) @ x).view(len(u), rows, -1)
