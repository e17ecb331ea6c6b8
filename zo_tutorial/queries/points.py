"""A recorded suffix for many points at once, side by side in a first dimension, and only of what moves.

A changed unit of a query, key or value meets one attention head, a changed hidden unit one column of the next linear
layer. So a tensor that differs from the recorded one in a few slices only is held as those slices (`Part`), as long as
the calls let it be; a linear layer behind it makes a whole tensor by adding what the change makes,

    o' = o + (z' − z) W_slicesᵀ.

The points share each call. There are as many as keep their largest tensor within the cache, and every result is dropped
after its last use, so that the next one lies in the same memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.cross_entropy import DEFAULTS
from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, Recording, bytes_of
from zo_tutorial.queries.way import Unsuitable

VECTOR = 16  # torch's softmax handles shorter rows number by number


class Part(NamedTuple):
    """P tensors that differ from a recorded one in some slices along one dimension.

    Attributes:
        values: those slices (P, ..., w, ...).
        dim: the dimension, counted from the end.
        index: which slices (P, w).
        rest: the recorded tensor (...).
    """

    values: Tensor
    dim: int
    index: Tensor
    rest: Tensor

    def whole(self) -> Tensor:
        """(P, ...)."""
        return _put(self.rest.repeat(len(self.index), *[1] * self.rest.dim()), self)

    def pick(self, tensor: Tensor) -> Tensor:
        """The same slices of a tensor that all points share, (P, ..., w, ...); itself where it has none."""
        if tensor.dim() < -self.dim or tensor.shape[self.dim] == 1:
            return tensor
        return tensor.movedim(self.dim, 0)[self.index].movedim(1, self.dim)


def _put(whole: Tensor, part: Part) -> Tensor:
    """Write the slices of a part into P whole tensors."""
    points = torch.arange(len(whole), device=whole.device)[:, None]
    whole.movedim(part.dim, 1)[points, part.index] = part.values.movedim(part.dim, 1)
    return whole


Moved = Tensor | Part  # a recorded tensor of each of P points: (P, ...)


class Points:
    """The calls between a layer's output and the loss, for many points.

    Args:
        call: of the layer.
        calls: those behind it, in order.

    Raises:
        Unsuitable: for some call there is no rule.
    """

    def __init__(self, recording: Recording, call: Call, calls: list[Call]):
        self.start, self.calls, self.loss = call.results[0], calls, recording.loss
        if any(c.changed or len(c.results) != 1 for c in calls):
            raise Unsuitable("a call writes into its argument or has several results")
        self.rules = [_rule(c) for c in calls]
        self.plain: dict[int, Tensor] = {}  # recorded tensors as they are read, in plain memory order
        last = {id(tensor): k for k, c in enumerate(calls) for tensor in c.tensors}
        self.used: list[list[int]] = [[] for _ in calls]  # tensors of which each call is the last reader
        for key, k in last.items():
            self.used[k].append(key)
        self.size = max(bytes_of(c.results) for c in [call, *calls])
        first = torch.zeros(1, 1, dtype=torch.long, device=self.start.device)
        self.base = self.losses(Part(self.start.unsqueeze(0)[..., :1], -1, first, self.start))  # where nothing moved
        if not torch.allclose(self.base, recording.loss, 1e-4, 1e-4, equal_nan=True):
            raise Unsuitable("the calls do not give the recorded loss")

    def losses(self, z: Moved) -> Tensor:
        """(P,) losses for P outputs of the layer."""
        moved: dict[int, Moved] = {id(self.start): z}
        for call, rule, used in zip(self.calls, self.rules, self.used, strict=True):
            moved[id(call.results[0])] = rule(call, _Arguments(call, moved, self.plain))
            for key in used:
                moved.pop(key, None)
        return _whole(moved[id(self.loss)]).reshape(-1)


class _Arguments:
    """The arguments of a call at P points."""

    def __init__(self, call: Call, moved: dict[int, Moved], plain: dict[int, Tensor]):
        self.call, self.moved, self.plain_of = call, moved, plain

    def get(self, tensor: Any) -> Any:
        """What stands in the place of a recorded argument."""
        return self.moved.get(id(tensor), None) if self.moves(tensor) else self.plain(tensor)

    def moves(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and id(tensor) in self.moved

    def plain(self, tensor: Any) -> Any:
        """A recorded tensor, contiguous."""
        if not isinstance(tensor, Tensor) or tensor.is_contiguous():
            return tensor
        if id(tensor) not in self.plain_of:
            self.plain_of[id(tensor)] = tensor.contiguous()
        return self.plain_of[id(tensor)]

    def part(self, values: Tensor, of: Part, **changed: Any) -> Part:
        """A result that is part of the recorded one."""
        return of._replace(values=values, rest=self.plain(self.call.results[0]), **changed)


Rule = Callable[[Call, _Arguments], Moved]


def _whole(x: Moved) -> Tensor:
    return x.whole() if isinstance(x, Part) else x


def _named(call: Call, *names: str) -> dict[str, Any]:
    """The arguments of a call by these names."""
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def _from_end(dim: int, dims: int) -> int:
    return dim if dim < 0 else dim - dims


def _only(call: Call, at: _Arguments) -> Tensor:
    """The first tensor among the arguments, the only one that may move."""
    if any(at.moves(tensor) for tensor in call.tensors[1:] if tensor is not call.tensors[0]):
        raise Unsuitable("an argument moves that should stand still")
    return call.tensors[0]


def _replaced(call: Call, first: Tensor) -> Any:
    """The call with another first tensor."""
    old = call.tensors[0]
    args = [first if argument is old else argument for argument in call.args]
    return call.function(*args, **{key: first if value is old else value for key, value in call.kwargs.items()})


def _elementwise(call: Call, at: _Arguments) -> Moved:
    x = at.get(_only(call, at))
    if isinstance(x, Part):
        return at.part(_replaced(call, x.values), x)
    return _replaced(call, x)


def _rowwise(call: Call, at: _Arguments) -> Moved:
    """What treats the last dimension as one: a norm."""
    return _replaced(call, _whole(at.get(_only(call, at))))


def _broadcast(call: Call, at: _Arguments) -> Moved:
    """An operation on two tensors, or on one and a number."""
    return _pairwise(call, at, call.function, *call.args, **call.kwargs)


def _dropout(call: Call, at: _Arguments) -> Moved:
    if not call.named()["training"] or call.named()["p"] == 0:
        return at.get(call.tensors[0])
    return _pairwise(call, at, torch.mul, call.tensors[0], call.factor)


def _pairwise(call: Call, at: _Arguments, function: Callable, *operands: Any, **options: Any) -> Moved:
    result, values = call.results[0], [at.get(operand) for operand in operands]
    parts = [value for value in values if isinstance(value, Part)]
    alone = len(parts) == 1 == sum(map(at.moves, operands))  # all else stands still
    if alone and parts[0].rest.dim() == result.dim() and parts[0].rest.shape[parts[0].dim] == result.shape[parts[0].dim]:
        part = parts[0]
        picked = [v.values if v is part else part.pick(v) if isinstance(v, Tensor) else v for v in values]
        own = [v is part or (isinstance(v, Tensor) and p is not v) for v, p in zip(values, picked, strict=True)]
        picked = [_aligned(p, result.dim()) if mine else p for p, mine in zip(picked, own, strict=True)]
        return at.part(function(*picked, **options), part)
    whole = [
        _aligned(_whole(value), result.dim()) if at.moves(operand) else value
        for operand, value in zip(operands, values, strict=True)
    ]
    return function(*whole, **options)


def _aligned(x: Tensor, dims: int) -> Tensor:
    """(P, ...) with so many dimensions behind the first."""
    return x if x.dim() > dims else x.view(len(x), *[1] * (dims + 1 - x.dim()), *x.shape[1:])


def _linear(call: Call, at: _Arguments) -> Moved:
    x = at.get(_only(call, at))
    if isinstance(call.layer, TENSOR_LAYERS):
        if call.matrix is None:
            call.matrix = call.layer.to_matrix()
        weight, bias = call.matrix, call.layer.bias
    elif call.layer is not None:
        weight, bias = call.layer.weight, call.layer.bias
    else:
        named = _named(call, "input", "weight", "bias")
        weight, bias = named["weight"], named.get("bias")
    if not isinstance(x, Part) or x.dim != -1:
        return F.linear(_whole(x), weight, bias)
    # o' = o + (z' − z) W_slicesᵀ
    change = (x.values - x.pick(x.rest)).flatten(1, -2)  # (P, R, w)
    o = at.plain(call.results[0])
    columns = weight.T[x.index]  # (P, w, out)
    o_points = torch.baddbmm(o.flatten(0, -2).expand(len(change), -1, -1), change, columns)  # (P, R, out)
    return o_points.view(len(change), *o.shape)


def _matmul(call: Call, at: _Arguments) -> Moved:
    a, b = call.tensors
    moved = [tensor for tensor in (a, b) if at.moves(tensor)]
    if min(a.dim(), b.dim()) < 2:
        raise Unsuitable("a product with a vector")
    x = at.get(moved[0])
    if len(moved) == 1 and a.dim() == b.dim() and isinstance(x, Part) and x.dim < -2:  # all within one head
        if moved[0] is a:
            return at.part(x.values @ x.pick(at.plain(b)), x)
        return at.part(x.pick(at.plain(a)) @ x.values, x)
    dims = max(a.dim(), b.dim())
    values = [_aligned(_whole(at.get(t)), dims) if at.moves(t) else at.plain(t) for t in (a, b)]
    return values[0] @ values[1]


def _softmax(call: Call, at: _Arguments) -> Moved:
    x, named = at.get(_only(call, at)), _named(call, "input", "dim")
    dim = _from_end(named["dim"], call.tensors[0].dim())
    if named.get("dtype") is not None:
        raise Unsuitable("a softmax in another type")
    if isinstance(x, Part) and x.dim != dim:
        return at.part(_softmax_of(x.values, dim), x)
    return _softmax_of(_whole(x), dim)


def _softmax_of(x: Tensor, dim: int) -> Tensor:
    if dim != -1 or x.shape[-1] >= VECTOR:
        return x.softmax(dim)
    e = (x - x.amax(-1, keepdim=True)).exp_()
    return e.div_(e.sum(-1, keepdim=True))


def _permute(call: Call, at: _Arguments) -> Moved:
    x, dims = at.get(call.tensors[0]), call.tensors[0].dim()
    order = list(range(-dims, 0))
    if call.function in _of("permute"):
        given = call.args[1:] if isinstance(call.args[1], int) else call.args[1]
        order = [_from_end(dim, dims) for dim in given]
    elif call.function in _of("transpose"):
        named = _named(call, "input", "dim0", "dim1")
        a, b = _from_end(named["dim0"], dims), _from_end(named["dim1"], dims)
        order[a], order[b] = b, a
    else:  # .mT
        order[-2:] = [-1, -2]
    if isinstance(x, Part):
        return at.part(x.values.permute(0, *order), x, dim=order.index(x.dim) - dims)
    return x.permute(0, *order)


def _reshape(call: Call, at: _Arguments) -> Moved:
    x, before, after = at.get(call.tensors[0]), call.tensors[0], call.results[0]
    if before.dtype != after.dtype:
        raise Unsuitable("a view as another type")
    size = after.shape[-1]
    if isinstance(x, Part) and x.dim == -1 and after.shape[:-2] == before.shape[:-1]:  # into heads
        head, within = x.index // size, x.index % size  # (P, w)
        if (head == head[:, :1]).all():  # all of it in one head
            one = Part(x.values, -2, head[:, :1], at.plain(after))
            values = one.pick(one.rest)  # (P, ..., 1, size)
            _put(values, Part(x.values.unsqueeze(-2), -1, within, values))
            return one._replace(values=values)
    if isinstance(x, Part) and x.dim == -2 and before.shape[:-2] == after.shape[:-1]:  # heads side by side
        size = before.shape[-1]
        index = x.index[:, :, None] * size + torch.arange(size, device=x.index.device)  # (P, w, size)
        return at.part(x.values.flatten(-2), x, dim=-1, index=index.flatten(1))
    return _whole(x).reshape(-1, *after.shape)


def _getitem(call: Call, at: _Arguments) -> Moved:
    x, index = call.args
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index):
        raise Unsuitable("an index of another kind")
    return _whole(at.get(x))[(slice(None), *index)]


def _reduce(call: Call, at: _Arguments) -> Moved:
    named, dims = _named(call, "input", "dim", "keepdim"), call.tensors[0].dim()
    dim, keepdim = named.get("dim"), named.get("keepdim", False)
    if named.keys() - {"input", "dim", "keepdim"}:
        raise Unsuitable("a sum in another type")
    chosen = range(-dims, 0) if dim is None else (dim,) if isinstance(dim, int) else dim
    x = _whole(at.get(_only(call, at)))
    if not dims:
        return x
    return call.function(x, dim=[_from_end(d, dims) for d in chosen], keepdim=keepdim)


def _attention(call: Call, at: _Arguments) -> Moved:
    """`scaled_dot_product_attention`, the points with the batch."""
    query, key, value, *more = call.args
    named = _named(call, "query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    mask = named.get("attn_mask")
    if query.dim() < 3 or at.moves(mask):
        raise Unsuitable("an attention of another kind")
    points = next(len(_whole(at.get(t))) for t in (query, key, value) if at.moves(t))

    def folded(tensor: Tensor) -> Tensor:
        x = _whole(at.get(tensor)) if at.moves(tensor) else tensor.expand(points, *tensor.shape)
        return x.flatten(0, 1)

    if mask is not None and mask.dim() == query.dim() and len(mask) > 1:
        mask = folded(mask)
    options = {key: named[key] for key in ("dropout_p", "is_causal", "scale", "enable_gqa") if key in named}
    o = F.scaled_dot_product_attention(*map(folded, (query, key, value)), attn_mask=mask, **options)
    return o.unflatten(0, (points, -1))


def _cross_entropy(call: Call, at: _Arguments) -> Moved:
    """The mean over the samples, with the points as further samples."""
    options = dict(zip(DEFAULTS, call.args, strict=False)) | call.kwargs
    given, targets, weight = options.pop("input"), options.pop("target"), options.get("weight")
    plain = options.get("size_average") is None and options.get("reduce") is None
    if given.dim() < 2 or targets.is_floating_point() or not plain or not at.moves(given) or at.moves(targets):
        raise Unsuitable("a cross-entropy of another kind")
    reduction = options.pop("reduction", "mean")
    x = _whole(at.get(given))  # (P, B, C, ...)
    repeated = targets.repeat(len(x), *[1] * (targets.dim() - 1))
    terms = F.cross_entropy(x.flatten(0, 1), repeated, **options, reduction="none").unflatten(0, (len(x), -1))
    if reduction == "none":
        return terms
    total = terms.flatten(1).sum(1)
    if reduction == "mean":
        counted = targets[targets != options.get("ignore_index", DEFAULTS["ignore_index"])]
        total = total / (len(counted) if weight is None else weight[counted].sum())
    return total


def _of(*names: str) -> set:
    """The functions of torch by some names."""
    return {getattr(place, name) for place in (torch, Tensor, F) for name in names if hasattr(place, name)}


RELU = _of("relu")
ELEMENTWISE = RELU | _of("tanh", "sigmoid") - {F.tanh, F.sigmoid} | {
    F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.hardtanh, F.logsigmoid,
}  # fmt: skip
RULES: dict[Any, Rule] = {
    **dict.fromkeys(ELEMENTWISE | _of("exp", "log", "sqrt", "square", "abs", "neg", "clone", "contiguous"), _elementwise),
    **dict.fromkeys(_of("add", "sub", "mul", "div", "__rsub__", "__rdiv__", "masked_fill", "where"), _broadcast),
    **dict.fromkeys(_of("layer_norm", "rms_norm") | {nn.LayerNorm, nn.RMSNorm}, _rowwise),
    **dict.fromkeys(_of("matmul", "__matmul__", "bmm"), _matmul),
    **dict.fromkeys(_of("softmax"), _softmax),
    **dict.fromkeys(_of("permute", "transpose") | {Tensor.mT.__get__}, _permute),
    **dict.fromkeys(_of("flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(_of("sum", "mean"), _reduce),
    **dict.fromkeys([F.linear, nn.Linear, *TENSOR_LAYERS], _linear),
    Tensor.__getitem__: _getitem,
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    F.cross_entropy: _cross_entropy,
}


def _rule(call: Call) -> Rule:
    """Of a call. Raises Unsuitable where there is none."""
    rule = RULES.get(call.function if call.layer is None else type(call.layer))
    if rule is None:
        raise Unsuitable(f"no rule is known for {call.function}")
    return rule
