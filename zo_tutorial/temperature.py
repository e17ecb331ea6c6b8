"""Logits divided by a temperature, in whatever a model returns."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def divided(outputs: Any, temperature: float) -> Any:
    """The outputs with their logits divided by `temperature`. At 1 they may be anything, and come back as they are.

    Logits are what is called `logits`, an entry or an attribute, where there is such a thing. Else they are all
    floating-point tensors in tuples, lists and dicts, at any depth.

    Raises:
        ValueError: no logits.
    """
    found = False

    def divide(value: Any) -> Any:
        nonlocal found
        if isinstance(value, Tensor) and value.is_floating_point():
            found = True
            return value / temperature
        logits = _logits(value)
        if logits is not None:
            return _with_logits(value, divide(logits))
        if isinstance(value, Mapping):
            changed: Any = copy.copy(value)
            for key, part in value.items():
                changed[key] = divide(part)
            return changed
        if isinstance(value, list | tuple):
            parts = [divide(part) for part in value]
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
        return value

    if temperature == 1:
        return outputs
    answer = divide(outputs)
    if not found:
        raise ValueError(
            f"the temperature divides logits, and there are none in a {type(outputs).__name__}: return tensors, an "
            "entry or an attribute `logits`, or set temperature=1, which takes any output"
        )
    return answer


def _logits(value: Any) -> Any:
    return value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)


def _with_logits(value: Any, logits: Any) -> Any:
    """A copy with other logits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, logits=logits)
    if isinstance(value, tuple) and hasattr(value, "_replace"):
        return value._replace(logits=logits)
    changed = copy.copy(value)
    if isinstance(value, Mapping):
        changed["logits"] = logits
    if getattr(changed, "logits", logits) is not logits:
        changed.logits = logits
    return changed
