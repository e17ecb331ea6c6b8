"""Which parameters of a model are trained: chosen by layer type, thinned out by masks."""

import torch
from torch import Tensor, nn

from zo_tutorial.tensor import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn

LAYER_TYPES = {
    "nn.Linear": nn.Linear,
    "nn.Conv2d": nn.Conv2d,
    "TensorizedLinear": TensorizedLinear,
    "TensorizedLinear_module": TensorizedLinear_module,
    "TensorizedLinear_module_tonn": TensorizedLinear_module_tonn,
}


def select_parameters(model: nn.Module, opt_layers_strs: str | list[str]) -> tuple[dict, dict]:
    """The parameters of the layers of the chosen types, all supported types if none is named.

    Returns:
        {parameter name: parameter} in the order of `named_parameters()`, and {layer name: its parameters' names}.

    Raises:
        ValueError: unknown layer type, or none of the chosen layers in the model; the message lists what there is.
    """
    chosen = [opt_layers_strs] if isinstance(opt_layers_strs, str) else list(opt_layers_strs or LAYER_TYPES)
    for name in chosen:
        if name not in LAYER_TYPES:
            raise ValueError(f"opt_layers_strs: {name!r} is unknown; choose from {', '.join(LAYER_TYPES)}")
    types = tuple(LAYER_TYPES[name] for name in chosen)
    owner = {}  # id of a parameter -> name of its layer
    for layer_name, module in model.named_modules():
        if isinstance(module, types):
            owner |= {id(parameter): layer_name for parameter in module.parameters()}
    trained = {name: p for name, p in model.named_parameters() if id(p) in owner}
    if not trained:
        present = sorted({type(module).__name__ for module in model.modules()} - {type(model).__name__})
        raise ValueError(
            f"opt_layers_strs: the model has no layer of {', '.join(chosen)}; it has {', '.join(present) or 'none'}"
        )
    layers = {}
    for name, parameter in trained.items():
        layers.setdefault(owner[id(parameter)], []).append(name)
    return trained, layers


def names_within(model: nn.Module, modules: list[str]) -> set[str]:
    """The names of the parameters in some modules. Raises ValueError for a name that is none of the model's modules."""
    known = dict(model.named_modules())
    for name in modules:
        if name not in known:
            raise ValueError(f"modules: the model has no {name!r}; it has {', '.join(filter(None, known))}")
    return {f"{module}.{name}" for module in modules for name, _ in known[module].named_parameters()}


def kept_positions(model: nn.Module, trained: dict, masks: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The flat positions of each trained parameter that its mask keeps; all of them where it has no mask.

    Raises:
        ValueError: unknown name, wrong shape, not bool, or nothing kept.
    """
    known = dict(model.named_parameters())
    for name, mask in (masks or {}).items():
        if name not in known:
            raise ValueError(f"masks: the model has no parameter {name!r}; it has {', '.join(known)}")
        if mask.shape != known[name].shape:
            raise ValueError(f"masks: {name!r} has shape {tuple(mask.shape)}, not {tuple(known[name].shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"masks: {name!r} is of {mask.dtype}, not torch.bool")
    index = {}
    for name, parameter in trained.items():
        mask = (masks or {}).get(name)
        mask = torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask
        index[name] = mask.to(parameter.device).flatten().nonzero().flatten()  # (kept,)
    nothing_kept = masks is not None and not any(mask.any() for mask in masks.values())
    if nothing_kept or not any(map(len, index.values())):
        raise ValueError("masks: no weight is kept, so there is nothing to train")
    return index
