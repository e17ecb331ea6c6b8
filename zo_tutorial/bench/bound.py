"""How fast a step could be on this machine: its arithmetic over the rates of the processor.

The time of a step is at least that of its multiply-adds in the large products, of its exponentials, and of the numbers
that must pass through memory, each at the rate that one plain operation of torch reaches. Overhead has no part in it.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zo_tutorial.bench.cases import Case
from zo_tutorial.queries import LossQueries, multiply_adds
from zo_tutorial.selection import layer_of


class Rates(NamedTuple):
    """What one operation of torch does in a second."""

    multiply_adds: float
    exponentials: float
    logarithms: float
    bytes: float  # that a copy reads and writes


def rates(device: str) -> Rates:
    """The rates of a device: a product (256, 784) by (784, 128), 64 thousand numbers, and a copy of 64 MB."""
    a, b = torch.rand(256, 784, device=device), torch.rand(784, 128, device=device)
    few, many = torch.rand(2**16, device=device), torch.rand(2**24, device=device)
    out, copy = torch.empty_like(few), torch.empty_like(many)
    return Rates(
        256 * 784 * 128 / _seconds(lambda: a @ b, device),
        len(few) / _seconds(lambda: torch.exp(few, out=out), device),
        len(few) / _seconds(lambda: torch.log(few, out=out), device),
        2 * many.nbytes / _seconds(lambda: copy.copy_(many), device, 5),
    )


def _seconds(run: Callable, device: str, times: int = 100) -> float:
    """The shortest of some runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


class Bound:
    """The bound of each method on one case.

    - FO: three passes' products: forward, and backward by inputs and by weights; Adam reads and writes seven numbers a
      weight.
    - esti, batch: forward, and for both sides of all weights the two products of the orders 1 and 2.
    - one-sided: for each coordinate, the products and exponentials of all calls behind its layer. (What does not move
      and does not count could be left out: the bound is of running the suffix whole.)
    - SGD, low rank: a forward pass for each query, the first dense layer's product with the weights but once, and
      Gaussian directions drawn.
    - sign: for each query, the exponentials of the logits.
    """

    def __init__(self, case: Case, measured: Rates):
        self.case, self.rates = case, measured
        trained: dict[str, Tensor] = {name: case.model.get_parameter(name) for name in case.kept()}
        queries = LossQueries(case.model, case.criterion, trained, "loop")
        queries.start(case.batch[0], case.batch[1], seed=0)
        self.recording = queries.evaluation.recorded()
        self.calls = self.recording.calls

    def seconds(self, method: str, queries: int) -> float:
        kept = self.case.kept()
        count = sum(map(len, kept.values()))
        forward = self._time(self.calls)
        products = sum(map(multiply_adds, self.calls)) / self.rates.multiply_adds
        if method == "FO":
            weights = sum(p.numel() * p.element_size() for p in self.case.model.parameters())
            return forward + 2 * products + 7 * weights / self.rates.bytes
        if method in ("esti", "batch"):
            return forward + 2 * products
        if method == "one-sided":
            return forward + sum(len(index) * self._time(self._behind(name)) for name, index in kept.items())
        if method == "sign":
            return queries * self._transcendental(self.calls[-1:])
        # the first dense layer: X Wᵀ once, and X Uᵀ with the zeros of the mask for each pair of queries
        saved = drawn = 0.0
        if method == "SGD":
            drawn = count * queries / 2 * 4 / self.rates.bytes
        names = {id(p): name for name, p in self.case.model.named_parameters()}
        for call in self.calls:
            if isinstance(call.layer, nn.Linear):
                weight = call.layer.weight
                share = len(kept.get(names[id(weight)], ())) / weight.numel() if method == "SGD" else 0.0
                saved = multiply_adds(call) / self.rates.multiply_adds * (queries - 1) * (1 - share / 2)
                break
        return queries * forward - saved + drawn

    def _behind(self, name: str) -> list:
        """The calls behind the layer of a parameter."""
        modules = dict(self.case.model.named_modules())
        layer = modules[layer_of(modules, name)]
        return self.recording.after(self.recording.call_of(layer))

    def _time(self, calls: list) -> float:
        return sum(map(multiply_adds, calls)) / self.rates.multiply_adds + self._transcendental(calls)

    def _transcendental(self, calls: list) -> float:
        """Of the exponentials (or tanh, erf: as one each) and, in a softmax, the logarithms."""
        exponentials = logarithms = 0
        for call in calls:
            name = getattr(call.function, "__name__", "")
            numbers = sum(tensor.numel() for tensor in call.results)
            if name == "cross_entropy":
                logits = call.tensors[0]
                exponentials += logits.numel()
                logarithms += logits.numel() // logits.shape[1]
            elif name in ("softmax", "gelu", "tanh", "sigmoid", "silu"):
                exponentials += numbers
        return exponentials / self.rates.exponentials + logarithms / self.rates.logarithms
