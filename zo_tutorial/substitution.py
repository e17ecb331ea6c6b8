"""Other tensors in the place of a model's parameters, for a while.

`torch.func.functional_call` does this too, but leaves a module that is registered under two names with dead tensors
(pytorch#164759). Here a parameter is resolved once to all the slots that hold it, each slot is filled once and put back
once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Slot = tuple[Any, str]  # a container and the key under which it holds the parameter
OF_RNN = ("_flat_weights", "_flat_weight_refs")  # lists that an RNN makes anew when it finds other weights


def slots_of(model: nn.Module, parameter: Tensor) -> list[Slot]:
    """Where the modules of a model hold a parameter; a tied one is held in several places."""
    slots: list[Slot] = []
    for module in model.modules():
        slots += [(module._parameters, key) for key, held in module._parameters.items() if held is parameter]
        if isinstance(module, nn.RNNBase):
            slots += [(vars(module), key) for key in OF_RNN if key in vars(module)]
    return slots


@contextmanager
def substituted(pairs: Iterable[tuple[list[Slot], Tensor | None]]) -> Iterator[None]:
    """Within it, the slots of each pair hold its tensor; afterwards what they held before, whatever is raised."""
    held = []
    try:
        for slots, tensor in pairs:
            for container, key in slots:
                held.append((container, key, container[key]))
                if key not in OF_RNN:
                    container[key] = tensor
        yield
    finally:
        for container, key, before in reversed(held):
            container[key] = before
