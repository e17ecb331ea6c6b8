"""What a forward pass may leave behind in a model: buffers, attributes, caches. Kept, and put back."""

import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SMALL = 2**16  # numbers; a larger tensor is known to have changed by its version alone
LONG = 1000  # items; a longer container is known to have changed by its length alone


class Snapshot:
    """The attributes, buffers and submodules of some modules as they are now, and the insides of these.

    The insides are those of tensors, arrays, lists, dicts, sets, deques and random generators. Parameters are left out,
    and so are views of them: queries change those.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        modules = list(modules)
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        self.parameters = {_memory(parameter) for parameter in parameters}
        self.insides: list[Callable[[], object]] = []
        self.seen: set[int] = set()
        self.held = []
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):  # its attributes are out of Python's reach
                continue
            for content in (vars(module), module._buffers, module._parameters, module._modules):
                self.held.append((content, dict(content), _ids(content.values())))
            for key, value in vars(module).items():
                if key not in ("_parameters", "_modules") and "_hooks" not in key:
                    self._look_into(value)

    def restore(self) -> None:
        """Put everything back that is not as it was."""
        for content, saved, ids in self.held:
            if _ids(content.values()) != ids:
                content.clear()
                content.update(saved)
        for put_back in self.insides:
            put_back()

    def _look_into(self, value: Any) -> None:
        """Note how to put back what is inside a value, and inside of that."""
        if isinstance(value, bool | int | float | str | None) or id(value) in self.seen:
            return
        self.seen.add(id(value))
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, np.ndarray):
            self.insides.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, torch.Generator):
            self.insides.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self.insides.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self.insides.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, dict | list | set | deque):
            self.insides.append(_refill(value))
            for item in list(value.values() if isinstance(value, dict) else value)[:LONG]:
                self._look_into(item)
        elif isinstance(value, tuple):
            for item in value[:LONG]:
                self._look_into(item)

    def _keep_tensor(self, value: Tensor) -> None:
        if value.is_inference() or _memory(value) in self.parameters:
            return
        saved, version = value.detach().clone(), value._version

        def put_back():
            if value._version != version or (value.numel() <= SMALL and not torch.equal(value, saved)):
                value.detach().copy_(saved)

        self.insides.append(put_back)


def _ids(values: Iterable) -> list[int]:
    return list(map(id, values))


def _memory(tensor: Tensor) -> int:
    """Where the memory of a tensor lies; a number of its own for one that has none to be seen."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # sparse, nested, without data
        return id(tensor)


def _refill(value) -> Callable[[], None]:
    """What gives a container the items that it has now."""
    saved, keyed = value.copy(), isinstance(value, dict)
    ids = _ids(saved.values() if keyed else saved) if len(saved) <= LONG else []

    def put_back():
        changed = len(value) != len(saved)
        if changed or (ids and _ids(value.values() if keyed else value) != ids):
            value.clear()
            value.extend(saved) if isinstance(value, list | deque) else value.update(saved)

    return put_back
