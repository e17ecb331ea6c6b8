"""What becomes of a call when there are many points, in one more dimension in front of its tensors.

A changed unit of a query, key or value meets one head of the attention, a changed hidden unit one column of the next
linear layer. So a tensor that differs from the recorded one in a few slices only is held as those slices (`parts`), as
long as the calls let it be. A linear layer makes a whole tensor of it: it adds what the change makes,

    o' = o + (z' − z) W_slicesᵀ.

A rule refuses (`Unsuitable`) what it was not written for.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.cross_entropy import DEFAULTS
from zo_tutorial.queries.parts import Moved, Part, whole
from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, TensorLayer
from zo_tutorial.queries.way import Unsuitable

ATTENTION = list(signature(F.multi_head_attention_forward).parameters)
VECTOR = 16  # torch's softmax takes rows that are shorter number by number


class Step:
    """A call to be made at P points.

    Args:
        moved: {id of a recorded tensor: what stands in its place}.
        plain: contiguous copies of recorded tensors, by their id.
    """

    def __init__(self, call: Call, moved: dict[int, Moved], plain: dict[int, Tensor]):
        self.call, self.moved, self.copies = call, moved, plain
        self.result = call.results[0]

    def named(self, *names: str) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(names, self.call.args, strict=False)) | self.call.kwargs

    def moves(self, argument: Any) -> bool:
        return isinstance(argument, Tensor) and id(argument) in self.moved

    def get(self, argument: Any) -> Any:
        """What stands in the place of an argument."""
        return self.moved[id(argument)] if self.moves(argument) else self.plain(argument)

    def plain(self, argument: Any) -> Any:
        """A recorded tensor in plain memory order; anything else as it is."""
        if not isinstance(argument, Tensor) or argument.is_contiguous():
            return argument
        return self.copies.setdefault(id(argument), argument.contiguous())

    def first(self) -> Moved:
        """The first tensor among the arguments, which must be the only one that moves."""
        first = self.call.tensors[0]
        if not self.moves(first) or any(self.moves(t) for t in self.call.tensors[1:] if t is not first):
            raise Unsuitable("an argument moves that should stand still")
        return self.get(first)

    def made(self, values: Tensor, of: Part, **changed: Any) -> Part:
        """The result, where only a part of it moves."""
        return of._replace(values=values, rest=self.plain(self.result), **changed)


def _from_end(dim: int, dims: int) -> int:
    return dim if dim < 0 else dim - dims


def _aligned(x: Tensor, dims: int) -> Tensor:
    """(P, ...) with so many dimensions behind the first."""
    return x.reshape(len(x), *[1] * (dims + 1 - x.dim()), *x.shape[1:])


def _elementwise(step: Step) -> Moved:
    x = step.first()
    return step.made(_again(step, x.values), x) if isinstance(x, Part) else _again(step, x)


def _rowwise(step: Step) -> Moved:
    """What takes each row as a whole: a norm."""
    return _again(step, whole(step.first()))


def _again(step: Step, x: Tensor) -> Tensor:
    """The call with x in the place of its first tensor."""
    call, old = step.call, step.call.tensors[0]
    args = [x if argument is old else argument for argument in call.args]
    return call.function(*args, **{key: x if value is old else value for key, value in call.kwargs.items()})


def _broadcast(step: Step) -> Moved:
    if any(map(step.moves, step.call.kwargs.values())):
        raise Unsuitable("an argument is given by its name")
    return _pairwise(step, step.call.function, *step.call.args, **step.call.kwargs)


def _dropout(step: Step) -> Moved:
    named = step.call.named()
    if not named["training"] or named["p"] == 0:
        return step.get(named["input"])
    return _pairwise(step, torch.mul, named["input"], step.call.factor)


def _pairwise(step: Step, function: Callable, *operands: Any, **options: Any) -> Moved:
    """function(*operands), number by number, with shapes that broadcast."""
    dims, moving = step.result.dim(), [operand for operand in operands if step.moves(operand)]
    part = step.get(moving[0])
    if len(moving) == 1 and isinstance(part, Part) and _kept(part, step.result):
        values = []
        for operand in operands:
            value = part.values if step.moves(operand) else step.plain(operand)
            if isinstance(operand, Tensor) and operand is not moving[0]:
                value = part.pick(value)
            picked = isinstance(value, Tensor) and value is not step.plain(operand)
            values.append(_aligned(value, dims) if picked else value)
        return step.made(function(*values, **options), part)
    values = [_aligned(whole(step.get(o)), dims) if step.moves(o) else step.plain(o) for o in operands]
    return function(*values, **options)


def _kept(part: Part, result: Tensor) -> bool:
    """Whether the slices of a part are slices of the result too."""
    return part.rest.dim() == result.dim() and part.rest.shape[part.dim] == result.shape[part.dim]


def _linear(step: Step) -> Moved:
    x, layer = step.first(), step.call.layer
    if isinstance(layer, nn.Linear | TensorLayer):
        weight, bias = step.call.weight(), layer.bias
    else:
        named = step.named("input", "weight", "bias")
        weight, bias = named["weight"], named.get("bias")
    if not isinstance(x, Part) or x.dim != -1:
        return F.linear(whole(x), weight, bias)
    # o' = o + (z' − z) W_slicesᵀ
    change, o = x.values - x.pick(x.rest), step.plain(step.result)  # (P, ..., w), (..., out)
    rest = o.flatten(0, -2).expand(len(change), -1, -1)  # (P, R, out)
    return torch.baddbmm(rest, change.flatten(1, -2), weight.T[x.slices]).view(len(change), *o.shape)


def _matmul(step: Step) -> Moved:
    a, b = step.call.tensors
    if min(a.dim(), b.dim()) < 2:
        raise Unsuitable("a product with a vector")
    moving = [tensor for tensor in (a, b) if step.moves(tensor)]
    x = step.get(moving[0])
    if len(moving) == 1 and a.dim() == b.dim() and isinstance(x, Part) and x.dim < -2 and _kept(x, step.result):
        # a product for each head, and one head moves
        left, right = (x.values if step.moves(t) else x.pick(step.plain(t)) for t in (a, b))
        return step.made(left @ right, x)
    left, right = (_aligned(whole(step.get(t)), step.result.dim()) if step.moves(t) else step.plain(t) for t in (a, b))
    return left @ right


def _softmax(step: Step) -> Moved:
    x, named = step.first(), step.named("input", "dim", "dtype")
    if named.get("dtype") is not None or named.get("dim") is None:
        raise Unsuitable("a softmax in another type")
    dim = _from_end(named["dim"], step.result.dim())
    if isinstance(x, Part) and x.dim != dim:
        return step.made(_softmax_of(x.values, dim), x)
    return _softmax_of(whole(x), dim)


def _softmax_of(x: Tensor, dim: int) -> Tensor:
    if dim != -1 or x.shape[-1] >= VECTOR:
        return x.softmax(dim)
    e = (x - x.amax(-1, keepdim=True)).exp_()
    return e.div_(e.sum(-1, keepdim=True))


def _permute(step: Step) -> Moved:
    x, dims = step.first(), step.result.dim()
    order = list(range(-dims, 0))
    if step.call.function in _of("transpose"):
        named = step.named("input", "dim0", "dim1")
        a, b = _from_end(named["dim0"], dims), _from_end(named["dim1"], dims)
        order[a], order[b] = b, a
    elif step.call.function in _of("permute"):
        given = step.call.args[1:] if isinstance(step.call.args[1], int) else step.call.args[1]
        order = [_from_end(dim, dims) for dim in given]
    else:  # .mT
        order[-2:] = [-1, -2]
    if isinstance(x, Part):
        return step.made(x.values.permute(0, *order), x, dim=order.index(x.dim) - dims)
    return x.permute(0, *order)


def _reshape(step: Step) -> Moved:
    x, before, after = step.first(), step.call.tensors[0].shape, step.result.shape
    if step.call.tensors[0].dtype != step.result.dtype:
        raise Unsuitable("a view as another type")
    if isinstance(x, Part) and x.dim == -1 and len(after) > 1 < after[-2] and after[:-2] == before[:-1]:
        head, within = x.slices // after[-1], x.slices % after[-1]  # (P, w)
        if (head == head[:, :1]).all():  # all of it in one head
            one = step.made(x.values, x, dim=-2, slices=head[:, :1])
            values = one.pick(one.rest).contiguous()  # (P, ..., 1, size)
            return one._replace(values=Part(x.values.unsqueeze(-2), -1, within, one.rest).put(values))
    if isinstance(x, Part) and x.dim == -2 and after[:-1] == before[:-2]:  # heads side by side
        slices = x.slices[:, :, None] * before[-1] + torch.arange(before[-1], device=x.slices.device)  # (P, w, size)
        return step.made(x.values.flatten(-2), x, dim=-1, slices=slices.flatten(1))
    x = whole(x)
    return x.reshape(len(x), *after)


def _split(step: Step) -> tuple[Tensor, ...]:
    named = step.named("tensor", "many", "dim")
    dim = _from_end(named.pop("dim", 0), step.call.tensors[0].dim())
    if named.keys() != {"tensor", "many"}:
        raise Unsuitable("an argument is given by its name")
    return tuple(step.call.function(whole(step.first()), named["many"], dim))


def _getitem(step: Step) -> Moved:
    index = step.call.args[1] if isinstance(step.call.args[1], tuple) else step.call.args[1:]
    if not all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index):
        raise Unsuitable("an index of another kind")
    return whole(step.first())[(slice(None), *index)]


def _reduce(step: Step) -> Moved:
    named, dims = step.named("input", "dim", "keepdim"), step.call.tensors[0].dim()
    if named.keys() - {"input", "dim", "keepdim"} or not dims or type(named.get("keepdim", False)) is not bool:
        raise Unsuitable("a sum of another kind")
    dim = named.get("dim")
    chosen = range(dims) if dim is None or dim == () else (dim,) if isinstance(dim, int) else dim
    options = {"dim": [_from_end(d, dims) for d in chosen], "keepdim": named.get("keepdim", False)}
    return step.call.function(whole(step.first()), **options)


def _dot_product(step: Step) -> Tensor:
    """`scaled_dot_product_attention`, with the points as a longer batch."""
    named = step.named("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    mask, inputs = named.get("attn_mask"), [named[key] for key in ("query", "key", "value")]
    if min(x.dim() for x in inputs) < 3 or step.moves(mask):
        raise Unsuitable("an attention of another kind")
    count = next(len(whole(step.get(x))) for x in inputs if step.moves(x))
    named |= {key: _batched(step, named[key], count).flatten(0, 1) for key in ("query", "key", "value")}
    if mask is not None and mask.dim() == step.result.dim():
        named["attn_mask"] = mask.expand(len(step.result), *mask.shape[1:]).repeat(count, *[1] * (mask.dim() - 1))
    return F.scaled_dot_product_attention(**named).unflatten(0, (count, -1))


def _batched(step: Step, x: Tensor, count: int) -> Tensor:
    """An argument at so many points, whether it moves or not."""
    return whole(step.get(x)) if step.moves(x) else x.expand(count, *x.shape)


def _attention(step: Step) -> tuple[Tensor, ...]:
    """That of `nn.MultiheadAttention`, of sequences (L, B, E), with the points as a longer batch."""
    named = dict(zip(ATTENTION, step.call.args, strict=False)) | step.call.kwargs
    inputs = {key: named[key] for key in ("query", "key", "value")}
    if step.result.dim() != 3 or any(step.moves(value) for key, value in named.items() if key not in inputs):
        raise Unsuitable("an attention of another kind")
    count = next(len(whole(step.get(x))) for x in inputs.values() if step.moves(x))
    folded = {}  # each tensor once: the function looks for those that are the same
    for x in inputs.values():
        if id(x) not in folded:
            folded[id(x)] = _batched(step, x, count).transpose(0, 1).flatten(1, 2)  # (L, P B, E)
    named |= {key: folded[id(x)] for key, x in inputs.items()}
    if named.get("key_padding_mask") is not None:  # (B, L)
        named["key_padding_mask"] = named["key_padding_mask"].repeat(count, 1)
    if named.get("attn_mask") is not None and named["attn_mask"].dim() == 3:  # (B heads, L, L)
        named["attn_mask"] = named["attn_mask"].repeat(count, 1, 1)
    o, weights = F.multi_head_attention_forward(**named)
    batch = step.result.shape[1]
    results = [o.unflatten(1, (count, batch)).transpose(0, 1)]  # (P, L, B, E)
    return tuple(results if weights is None else [*results, weights.unflatten(0, (count, batch))])


def _cross_entropy(step: Step) -> Moved:
    """The mean over the samples, with the points as further samples."""
    options = dict(zip(DEFAULTS, step.call.args, strict=False)) | step.call.kwargs
    given, targets, weight = options.pop("input"), options.pop("target"), options.get("weight")
    old = options.get("size_average") is not None or options.get("reduce") is not None
    if given.dim() < 2 or targets.is_floating_point() or old or step.moves(targets) or step.moves(weight):
        raise Unsuitable("a cross-entropy of another kind")
    reduction = options.pop("reduction", DEFAULTS["reduction"])
    x = whole(step.get(given))  # (P, B, C, ...)
    repeated = targets.repeat(len(x), *[1] * (targets.dim() - 1))
    terms = F.cross_entropy(x.flatten(0, 1), repeated, **options, reduction="none").view(len(x), *targets.shape)
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


MT = Tensor.mT.__get__  # type: ignore[attr-defined]  # it is a property
RELU = _of("relu")
ELEMENTWISE = RELU | {
    torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid,
    F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.hardtanh, F.logsigmoid,
}  # fmt: skip
RULES: dict[Any, Callable[[Step], Any]] = {
    function: rule
    for rule, functions in [
        (_elementwise, ELEMENTWISE | _of("exp", "log", "sqrt", "square", "abs", "neg", "clone", "contiguous")),
        (_rowwise, _of("layer_norm", "rms_norm") | {nn.LayerNorm, nn.RMSNorm}),
        (_broadcast, _of("add", "sub", "mul", "div", "pow", "__rsub__", "__rdiv__", "__pow__", "masked_fill", "where")),
        (_linear, {F.linear, nn.Linear, *TENSOR_LAYERS}),
        (_matmul, _of("matmul", "bmm")),
        (_softmax, _of("softmax")),
        (_permute, _of("permute", "transpose") | {MT}),
        (_reshape, _of("flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze")),
        (_split, _of("chunk", "split")),
        (_reduce, _of("sum", "mean")),
        (_getitem, {Tensor.__getitem__}),
        (_dropout, {F.dropout}),
        (_dot_product, {F.scaled_dot_product_attention}),
        (_attention, {F.multi_head_attention_forward}),
        (_cross_entropy, {F.cross_entropy}),
    ]
    for function in functions
}


def rule_of(call: Call) -> Callable[[Step], Any]:
    """Of a call. Raises Unsuitable where there is none."""
    rule = RULES.get(call.function if call.layer is None else type(call.layer))
    if rule is None:
        raise Unsuitable(f"no rule is known for {call.function}")
    return rule
