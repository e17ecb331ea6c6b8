"""Which parameters of a model are trained: by layer type, by name, or by a rule of one's own; thinned out by masks."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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
Layers = str | type[nn.Module] | Iterable[str | type[nn.Module]]
# Parameters or their names, groups of them with options of their own, or a rule.
Parameters = Iterable[Tensor | str | dict[str, Any]] | dict[str, Tensor] | Callable[[str, Tensor], bool]


class Selection(NamedTuple):
    """What is trained.

    trained: {parameter name: parameter}, in the order of `named_parameters()`.
    left_out: {parameter name: why it is not trained}.
    groups: the options of each group of parameters, {"params": names, …}; one group where none are given.
    """

    trained: dict[str, Tensor]
    left_out: dict[str, str]
    groups: list[dict[str, Any]]


def select_parameters(model: Callable, opt_layers_strs: Layers = (), parameters: Parameters | None = None) -> Selection:
    """The parameters of the layers of the chosen types, all supported types if none is named; or those in `parameters`.

    A parameter with requires_grad=False is left out.

    Raises:
        ValueError: unknown layer type or parameter, none of the chosen layers in the model, nothing to train, or
            complex weights; the message lists what there is.
    """
    if parameters is None:
        if not isinstance(model, nn.Module):
            raise ValueError("parameters: a model that is no module needs them, such as parameters={'theta': theta}")
        trained, left_out, groups = _by_layer(model, opt_layers_strs)
    elif opt_layers_strs:
        raise ValueError("parameters and opt_layers_strs both say what is trained: give one of them")
    else:
        trained, left_out, groups = _by_choice(model, parameters)
    for name, parameter in trained.items():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"{name!r} has no shape yet: run the model once before its optimiser is made")
    if not trained:
        listed = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"there is no parameter to train ({listed})")
    return Selection(trained, left_out, groups)


def _by_layer(model: nn.Module, opt_layers_strs: Layers) -> tuple[dict, dict, list]:
    given = [opt_layers_strs] if isinstance(opt_layers_strs, str | type) else list(opt_layers_strs)
    chosen: dict[str, type[nn.Module]] = {}
    for entry in given or LAYER_TYPES:
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            chosen[entry.__name__] = entry
        elif entry in LAYER_TYPES:
            chosen[entry] = LAYER_TYPES[entry]
        else:
            known = ", ".join(LAYER_TYPES)
            raise ValueError(f"opt_layers_strs: {entry!r} is unknown; choose from {known}, or give a class of modules")
    types = tuple(chosen.values())
    inside = {id(p): m for m in model.modules() if isinstance(m, types) for p in m.parameters()}
    owner = {id(p): type(module).__name__ for module in model.modules() for p in module.parameters(recurse=False)}
    trained, left_out = {}, {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            left_out[name] = f"its layer, {owner[id(parameter)]}, is of no chosen type"
        elif not parameter.requires_grad:
            left_out[name] = "requires_grad is False"
        else:
            trained[name] = parameter
    if not any(isinstance(module, types) for module in model.modules()):
        present = sorted({type(module).__name__ for module in model.modules()} - {type(model).__name__})
        raise ValueError(
            f"opt_layers_strs: the model has no layer of {', '.join(chosen)}; it has {', '.join(present) or 'none'}"
        )
    return trained, left_out, [{"params": list(trained)}]


def _by_choice(model: Callable, parameters: Parameters) -> tuple[dict, dict, list]:
    if not isinstance(model, nn.Module):
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        if callable(parameters):
            raise ValueError("parameters: a model that is no module has no names to choose by; give its tensors")
        if not isinstance(parameters, dict):
            parameters = {f"theta{k or ''}": tensor for k, tensor in enumerate(parameters)}
        return dict(parameters), {}, [{"params": list(parameters)}]
    known = dict(model.named_parameters())
    if callable(parameters):
        wanted = [name for name, parameter in known.items() if parameters(name, parameter)]
        frozen = {name: "requires_grad is False" for name in wanted if not known[name].requires_grad}
        groups = [{"params": [name for name in wanted if name not in frozen]}]
    else:
        listed: list[Any] = list(parameters.values() if isinstance(parameters, dict) else parameters)
        grouped = all(isinstance(entry, dict) for entry in listed) and listed
        groups, frozen = [dict(group) for group in listed] if grouped else [{"params": listed}], {}
        for group in groups:
            if "params" not in group:
                raise ValueError(f"parameters: a group needs its 'params'; this one has {', '.join(group)}")
            group["params"] = names_of(model, group["params"])
    chosen = {name for group in groups for name in group["params"]}
    left_out = {name: frozen.get(name, "it is not among the parameters given") for name in known if name not in chosen}
    return {name: known[name] for name in known if name in chosen}, left_out, groups


def names_of(model: nn.Module, parameters: Any) -> list[str]:
    """The names of parameters given by name or as tensors.

    Raises ValueError for what is no parameter of the model, for a frozen one and for one that is given twice.
    """
    known = dict(model.named_parameters())
    by_id = {id(parameter): name for name, parameter in known.items()}
    names = []
    for entry in [parameters] if isinstance(parameters, str | Tensor) else parameters:
        name = entry if isinstance(entry, str) else by_id.get(id(entry))
        if name not in known:
            what = f"{entry!r}" if isinstance(entry, str) else f"a {type(entry).__name__} that is given"
            raise ValueError(f"parameters: {what} is no parameter of the model; it has {', '.join(known)}")
        if not known[name].requires_grad:
            raise ValueError(f"parameters: {name!r} is frozen (requires_grad is False)")
        if name in names:
            raise ValueError(f"parameters: {name!r} is given twice")
        names.append(name)
    return names


def names_within(model: nn.Module, modules: list[str]) -> set[str]:
    """The names of the parameters in some modules. Raises ValueError for a name that is none of the model's modules."""
    known = dict(model.named_modules())
    for name in modules:
        if name not in known:
            raise ValueError(f"modules: the model has no {name!r}; it has {', '.join(filter(None, known))}")
    return {f"{module}.{name}" for module in modules for name, _ in known[module].named_parameters()}


def kept_positions(
    trained: dict[str, Tensor], masks: dict[str, Tensor] | None, known: dict[str, Tensor] | None = None
) -> dict[str, Tensor | range]:
    """The flat positions of each trained parameter that its mask keeps; all of them, a range, where it has no mask.

    Args:
        known: all parameters of the model, if there are more.

    Raises:
        ValueError: no mask at all, unknown name, wrong shape, not bool, or nothing kept.
    """
    known = trained if known is None else known
    if masks is not None and not isinstance(masks, Mapping):
        raise ValueError(f"masks: should be a dict of bool tensors by parameter name, not {type(masks).__name__}")
    if masks is not None and not masks:
        raise ValueError("masks: the dict is empty, so no weight is kept; None trains all of them")
    for name, mask in (masks or {}).items():
        if name not in known:
            raise ValueError(f"masks: the model has no parameter {name!r}; it has {', '.join(known)}")
        if not isinstance(mask, Tensor):
            raise ValueError(f"masks: {name!r} is of {type(mask).__name__}, no tensor")
        if mask.shape != known[name].shape:
            raise ValueError(f"masks: {name!r} has shape {tuple(mask.shape)}, not {tuple(known[name].shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"masks: {name!r} is of {mask.dtype}, not torch.bool")
    index: dict[str, Tensor | range] = {}
    for name, parameter in trained.items():
        own = (masks or {}).get(name)
        if own is None or own.all():
            index[name] = range(parameter.numel())
        else:
            index[name] = own.to(parameter.device).flatten().nonzero().flatten()  # (kept,)
    if not any(map(len, index.values())):
        raise ValueError("masks: no weight is kept, so there is nothing to train")
    ignored = [name for name, mask in (masks or {}).items() if name not in trained and mask.any()]
    if ignored:
        warnings.warn(f"masks: {', '.join(ignored)}: not trained, so these masks have no effect", stacklevel=4)
    return index


def layer_of(modules: dict[str, nn.Module], name: str) -> str:
    """The name of a parameter's layer: "fc1" for "fc1.weight" and for "fc1.cores.0", "" for the model's own.

    modules: all of the model's, by name.
    """
    owner = name.rpartition(".")[0]
    while isinstance(modules.get(owner), nn.ParameterList | nn.ParameterDict):
        owner = owner.rpartition(".")[0]
    return owner


def chosen_positions(positions: Tensor | range, kept: Tensor) -> Tensor:
    """Those of a parameter's positions (K,) where `kept` (K,) is True."""
    return kept.nonzero().flatten() if isinstance(positions, range) else positions[kept]
