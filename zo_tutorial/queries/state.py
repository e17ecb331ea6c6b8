"""What a forward pass may leave behind in a model: buffers, attributes, caches. Kept, and put back."""

import random
import types
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_tutorial.queries.recording import version

SMALL = 2**18  # numbers; a larger tensor is known to have changed by its version alone
LONG = 20_000  # items; a longer container is known to have changed by its length alone


OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


class Snapshot:
    """The attributes, buffers and submodules of some modules as they are now, and the insides of these.

    The insides are those of tensors, arrays, lists, dicts, sets, deques, random generators, and of objects that are
    neither functions nor classes. Parameters are left out, and so are views of them: queries change those.

    Args:
        earlier: a snapshot whose copies of tensors may be used again.
    """

    def __init__(self, modules: Iterable[nn.Module], earlier: "Snapshot | None" = None):
        modules = list(modules)
        self.copies: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id: a tensor, its version, a copy
        self.earlier = earlier.copies if earlier is not None else {}
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        self.parameters = {_memory(parameter) for parameter in parameters}
        self.insides: list[Callable[[], object]] = []
        self.seen: set[int] = set()
        self.held = []
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):  # its attributes are out of Python's reach
                for buffer in module.buffers(recurse=False):
                    self._keep_tensor(buffer)
                continue
            for content in (vars(module), module._buffers, module._parameters, module._modules):
                self.held.append((content, dict(content), list(content), _ids(content.values())))
            for key, value in vars(module).items():
                if key not in ("_parameters", "_modules") and "_hooks" not in key:
                    self._look_into(value)
        self.earlier = {}

    def restore(self) -> None:
        """Put everything back that is not as it was."""
        for content, saved, keys, ids in self.held:
            if _ids(content.values()) != ids or list(content) != keys:
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
        elif hasattr(value, "__dict__") and not isinstance(value, OPAQUE):
            self.insides.append(_refill(vars(value)))
            for item in list(vars(value).values()):
                self._look_into(item)

    def _keep_tensor(self, value: Tensor) -> None:
        if value.is_inference() or _memory(value) in self.parameters:
            return
        version = value._version
        before, at, saved = self.earlier.get(id(value), (None, -1, value))
        if before is not value or at != version or (value.numel() <= SMALL and not torch.equal(value, saved)):
            saved = value.detach().clone()
        self.copies[id(value)] = value, version, saved

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
    long = len(saved) > LONG
    keys = list(saved) if keyed and not long else None
    ids = None if long else _ids(saved.values() if keyed else saved)

    def put_back():
        changed = len(value) != len(saved) or (keys is not None and list(value) != keys)
        if changed or (ids is not None and _ids(value.values() if keyed else value) != ids):
            value.clear()
            value.extend(saved) if isinstance(value, list | deque) else value.update(saved)

    return put_back


def fingerprint(weight: Tensor) -> tuple:
    """What tells whether a parameter was written to."""
    weight = weight.detach()
    return version(weight), str(weight.sum().item()), str(torch.linalg.vector_norm(weight).item())  # "nan" is "nan"
