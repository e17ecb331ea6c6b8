"""Other tensors in the place of a model's parameters, for a while.

`torch.func.functional_call` does this too, but leaves a module that is registered under two names with dead tensors
(pytorch#164759). Here a parameter is resolved once to all the slots that hold it, each slot is filled once and put back
once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Slot = tuple[Any, str | int]  # a container and the key under which it holds the parameter


def slots_of(model: nn.Module, parameter: Tensor) -> list[Slot]:
    """Where the modules of a model hold a parameter; a tied one is held in several places."""
    slots: list[Slot] = []
    for module in model.modules():
        slots += [(module._parameters, key) for key, held in module._parameters.items() if held is parameter]
        if isinstance(module, nn.RNNBase):  # it calls its kernels with a list of its own
            slots += [(module._flat_weights, k) for k, held in enumerate(module._flat_weights) if held is parameter]
    return slots


@contextmanager
def substituted(pairs: Iterable[tuple[list[Slot], Tensor]]) -> Iterator[None]:
    """Within it, the slots of each pair hold its tensor; afterwards what they held before, whatever is raised."""
    held = []
    try:
        for slots, tensor in pairs:
            for container, key in slots:
                held.append((container, key, container[key]))
                container[key] = tensor
        yield
    finally:
        for container, key, before in reversed(held):
            container[key] = before
