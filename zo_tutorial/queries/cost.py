"""What a query costs by each way: an estimate of the work from the recorded pass, not a clock, so that runs repeat.

A call to torch takes `CALL` seconds before it does anything, and `VMAP` times as long inside of vmap. Its work is the
larger of its multiply-adds and its bytes over the rates of one core; small tensors stay in the core's cache, those of
many points together do not. So vmap pays the calls once for many points, and the memory for each one. `points` runs
fewer, which stay in the cache. A convolution with a kernel for every point runs as a grouped one, `GROUPED` times as
long. The bench shows what that chooses, beside the clock.
"""

from collections.abc import Iterable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.recording import AT_ONCE, TENSOR_LAYERS, Call, Recording, bytes_of

CALL = 6e-6  # seconds
VMAP = 8
RULE = 2e-5  # seconds that a call takes by its rule (`points`)
RATE = 4e10  # multiply-adds a second
CACHED, MEMORY = 2e10, 5e9  # bytes a second
CACHE = 1e6  # bytes
GROUPED = 6
QUERY = 2.5e-5  # seconds that a query of the loop takes beside its calls
SETUP = 2e-4  # seconds that a round of another way takes beside its queries
TRIES = 1.5  # queries that a coordinate of `descend` takes in the loop
MARGIN = 0.9  # another way must promise to be faster than the loop by a tenth
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


def looped(calls: Iterable[Call]) -> float:
    """Seconds of a query that runs some calls."""
    return QUERY + sum(_seconds(call, CALL, together=False) for call in calls)


def perturbing(parameters: Iterable[Tensor]) -> float:
    """Seconds to put parameters back and to add a direction to them."""
    size = bytes_of(parameters)
    return 3 * size / (MEMORY if size > CACHE else CACHED)


def beside(calls: Iterable[Call], points: float) -> float:
    """Seconds of a query that runs some calls by their rules, so many points side by side in the cache."""
    total = 0.0
    for call in calls:
        moved = bytes_of(call.results) + bytes_of(call.tensors)
        total += RULE / points + max(multiply_adds(call) / RATE, moved / CACHED)
    return total


def vmapped(
    recording: Recording, asked: int, perturbed: Iterable[Tensor], among: Iterable[Call] | None = None
) -> float:
    """Seconds a query if many points run at once, with a copy of some parameters for each.

    Args:
        asked: how many points there are.
        perturbed: those parameters. What does not depend on them is computed once.
        among: the calls that run; None: all.
    """
    parameters = list(perturbed)
    reached = {id(parameter) for parameter in parameters}
    own = set(reached)
    calls = list(recording.calls if among is None else among)
    points = max(1.0, min(asked, AT_ONCE / max(1, recording.bytes)))
    total = SETUP / asked + 3 * bytes_of(parameters) / MEMORY
    for call in calls:
        inputs = set(map(id, call.tensors)) | {id(p) for p in (call.layer.parameters() if call.layer else ())}
        total += VMAP * CALL * call.primitive / points
        if among is not None or not reached.isdisjoint(inputs):
            reached.update(map(id, call.results))
            grouped = _is_convolution(call) and not own.isdisjoint(inputs)
            total += _seconds(call, 0.0, together=True) * (GROUPED if grouped else 1)
        else:
            total += _seconds(call, 0.0, together=False) / points
    return total


def product(layer: nn.Linear, call: Call, kept: int) -> float:
    """Seconds for what a direction with so many weights adds to the output of a dense layer in its call."""
    return max(multiply_adds(call) * kept / layer.weight.numel() / RATE, bytes_of(call.results) / MEMORY)


def _seconds(call: Call, overhead: float, together: bool) -> float:
    """Of one call, alone or for each of many points together."""
    moved = call.bytes + bytes_of(call.tensors)
    if getattr(call.function, "__name__", "") == "multi_head_attention_forward":  # one call from outside
        moved, overhead = 4 * moved, 12 * overhead
    rate = MEMORY if together or moved > CACHE else CACHED
    return call.primitive * overhead + max(multiply_adds(call) / RATE, moved / rate)


def _is_convolution(call: Call) -> bool:
    return call.function in CONVOLUTIONS or isinstance(call.layer, nn.Conv1d | nn.Conv2d)


def multiply_adds(call: Call) -> int:
    """Of the products in a call; 0 where it has none."""
    results = sum(tensor.numel() for tensor in call.results)
    if isinstance(call.layer, TENSOR_LAYERS):
        rows = results // call.layer.out_features
        return min(call.layer.contract_flops(rows), call.layer.dense_flops(rows))
    if isinstance(call.layer, nn.Linear):
        return results * call.layer.in_features
    if _is_convolution(call):
        weight = call.layer.weight if isinstance(call.layer, nn.Conv1d | nn.Conv2d) else call.tensors[1]
        return results * prod(weight.shape[1:])
    name = getattr(call.function, "__name__", "")
    if name in PRODUCTS:
        return results * call.tensors[0].shape[-1]
    if name == "multi_head_attention_forward":
        length, width = call.tensors[0].shape[0], call.tensors[0].shape[-1]
        return call.tensors[0].numel() * (4 * width + 2 * length)
    if call.function in RECURRENT:
        steps = call.tensors[0].shape[:-1].numel()
        return steps * sum(tensor.numel() for tensor in call.tensors if tensor.dim() == 2)
    return 0
