"""What a query costs by each way: an estimate of the work from the recorded pass, not a clock, so that runs repeat.

A call to torch takes `CALL` seconds before it does anything, `VMAP` as many inside of vmap; then the larger of its
multiply-adds and its bytes over the rates of one core. vmap pays the calls once for many points. But it has to copy
the parameters for every point, and a convolution with a kernel for every point runs as a grouped one, `GROUPED` times
as long. The bench shows estimate and clock beside each other.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_tutorial.queries.recording import TENSOR_LAYERS, Call, Recording, bytes_of

CALL = 8e-6  # seconds
VMAP = 6  # times as long
RATE = 3e10  # multiply-adds a second
BANDWIDTH = 4e9  # bytes a second
GROUPED = 6  # times as long
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
MARGIN = 0.9  # batched must promise to be faster by a tenth


def batched_pays(recording: Recording, parameters: list[Tensor]) -> bool:
    """Whether points with copies of these parameters are cheaper by the dozen than one by one."""
    perturbed = {id(parameter) for parameter in parameters}
    reached: set[int] = set(perturbed)
    alone = 3 * bytes_of(parameters) / BANDWIDTH  # of one point
    together = loop = 0.0
    for call in recording.calls:
        work = max(multiply_adds(call) / RATE, (call.bytes + bytes_of(call.tensors)) / BANDWIDTH)
        loop += call.primitive * CALL + work
        together += call.primitive * CALL * VMAP
        own = {id(parameter) for parameter in call.layer.parameters()} if call.layer else set(map(id, call.tensors))
        if reached.isdisjoint(own) and reached.isdisjoint(map(id, call.tensors)):
            together += work  # before the perturbed layer: once for all points
            continue
        reached.update(map(id, call.results))
        grouped = is_convolution(call) and not perturbed.isdisjoint(own)
        alone += work * (GROUPED if grouped else 1)
    points = max(1.0, min(64.0, 40e6 / max(1, recording.bytes)))
    return alone + together / points < MARGIN * loop


def is_convolution(call: Call) -> bool:
    return call.function in CONVOLUTIONS or isinstance(call.layer, nn.Conv1d | nn.Conv2d)


def multiply_adds(call: Call) -> int:
    """Of the products in a call; 0 where it has none."""
    results = sum(tensor.numel() for tensor in call.results)
    if isinstance(call.layer, TENSOR_LAYERS):
        rows = results // call.layer.out_features
        return min(call.layer.contract_flops(rows), call.layer.dense_flops(rows))
    if isinstance(call.layer, nn.Linear):
        return results * call.layer.in_features
    if is_convolution(call):
        weight = call.layer.weight if call.layer else call.tensors[1]
        return results * prod(weight.shape[1:])
    if getattr(call.function, "__name__", "") in PRODUCTS:
        return results * call.tensors[0].shape[-1]
    if call.function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
        steps = call.tensors[0].shape[:-1].numel()
        return steps * sum(tensor.numel() for tensor in call.tensors if tensor.dim() == 2)
    return 0
