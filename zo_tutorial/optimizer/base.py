"""What all optimisers share: which coordinates they train, the loss queries they ask, the update that torch makes."""

import operator
from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from zo_tutorial.queries import LossQueries
from zo_tutorial.selection import Layers, Parameters, kept_positions, layer_of, names_of, select_parameters
from zo_tutorial.workers import SHARES, Workers

Rule = Callable[..., torch.optim.Optimizer]  # makes an update rule: rule(parameters, lr=lr)


class _Absent:
    """No targets are given, which is not the same as None."""

    def __repr__(self) -> str:
        return "(none)"


ABSENT: Any = _Absent()


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """A torch optimiser whose gradients come from loss queries.

    A step is an estimate and an update. `estimate` adds ĝ to the `.grad` of the trained parameters, as `backward`
    would; `update` lets `rule`, an optimiser of torch.optim, move the weights along `.grad`. Between the two, gradients
    can be accumulated and clipped. The rule shares its parameter groups and state with this object, so learning-rate
    schedulers and checkpoints see one optimiser.

    Attributes:
        model: what is trained.
        trained: the trained parameters by name, in the order of `model.named_parameters()`; a mask that keeps nothing
            of a parameter leaves it out.
        index: for each of them the flat positions its mask keeps, ascending; d of them in all. A range where all are.
        layers: the names of the trained parameters of each layer.
        left_out: {parameter name: why it is not trained}.
        generator: the source of all randomness of a step: directions, skipped coordinates, dropout masks.
    """

    def __init__(
        self,
        model: Callable,
        criterion: Callable,
        masks: dict[str, Tensor] | None,
        opt_layers_strs: Layers,
        parameters: Parameters | None,
        rule: Rule,
        lr: float,
        generator: torch.Generator | None,
        query_mode: str,
        memory: float = 512,
        share: str = "queries",
    ):
        if share not in SHARES:
            raise ValueError(f"share {share!r} is unknown; choose one of {', '.join(SHARES)}")
        selected, self.left_out, groups = select_parameters(model, opt_layers_strs, parameters)
        known: dict[str, Tensor] = dict(model.named_parameters()) if isinstance(model, nn.Module) else selected
        self.masks = masks
        index = kept_positions(selected, masks, known)
        self.left_out |= {name: "its mask keeps nothing" for name, kept in index.items() if not len(kept)}
        self.model = model
        self.index = {name: kept for name, kept in index.items() if len(kept)}
        self.trained = {name: selected[name] for name in self.index}
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.generator = generator
        self.loss_queries = LossQueries(model, criterion, self.trained, query_mode, memory, Workers.present(), share)
        for group in groups:
            group["params"] = [self.trained[name] for name in group["params"] if name in self.trained]
        made = rule(groups, lr=lr)
        if isinstance(made, torch.optim.LBFGS):
            raise ValueError("rule: LBFGS asks for losses itself, and needs exact gradients")
        super().__init__(made.param_groups, made.defaults)
        self.rule = made  # from now on `add_param_group` adds to what is trained
        self._share_with_rule()

    @property
    def layers(self) -> dict[str, list[str]]:
        layers: dict[str, list[str]] = {}
        modules = dict(self.model.named_modules()) if isinstance(self.model, nn.Module) else {}
        for name in self.trained:
            layers.setdefault(layer_of(modules, name), []).append(name)
        return layers

    @property
    def queries(self) -> int:
        """Loss queries asked so far."""
        return self.loss_queries.count

    def lr_of(self, name: str) -> float:
        """The current learning rate of a parameter, that of its group as a scheduler left it."""
        parameter = self.trained[name]
        return next(float(g["lr"]) for g in self.param_groups if any(p is parameter for p in g["params"]))

    def step(  # type: ignore[override]  # a batch comes first here, not a closure
        self, inputs: Any = None, targets: Any = ABSENT, *, closure: Callable | None = None
    ) -> Any:
        """One update, from the queries that the class docstring counts.

        Args:
            inputs, targets: a batch. A tuple or list of inputs is for `model(*inputs)`, a dict for `model(**inputs)`.
            closure: instead of a batch, also as the only argument, as for optimisers of torch.optim: a function that
                returns the loss at the present parameters. It is called once a query, and must not call `backward`.

        Returns:
            (outputs, loss) of the unperturbed model before the update; with a closure, the loss.
        """
        for parameter in self.trained.values():
            parameter.grad = None
        answer = self.estimate(inputs, targets, closure=closure)
        self.update()
        return answer

    @torch.inference_mode(False)
    def estimate(self, inputs: Any = None, targets: Any = ABSENT, *, closure: Callable | None = None) -> Any:
        """Add an estimate of the gradient to `.grad`; arguments and returns as in `step`."""
        closure = self._closure(inputs, targets, closure)
        outputs, loss = self._estimate_from(inputs, targets, closure)
        return loss if closure is not None else (outputs, loss)

    def active(self) -> dict[str, Tensor | range]:
        """The index of what is trained now: a parameter that was frozen since, as torch would, is passed over.

        Raises RuntimeError where the model holds another tensor by now.
        """
        if not isinstance(self.model, nn.Module):
            return self.index
        held = dict(self.model.named_parameters())
        for name, parameter in self.trained.items():
            if held.get(name) is not parameter:
                raise RuntimeError(f"{name!r} is another tensor than when the optimiser was made: make a new optimiser")
        return {name: kept for name, kept in self.index.items() if self.trained[name].requires_grad}

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        """Move the weights along what stands in `.grad`. A weight that its mask takes out stays as it is."""
        before = {}
        for name, parameter in self.trained.items():
            index = self.index[name]
            if not isinstance(index, range) and parameter.grad is not None:
                kept = parameter.grad.take(index)
                parameter.grad.zero_().put_(index, kept)
                before[name] = parameter.clone()
        self.rule.step()
        for name, value in before.items():
            parameter, kept = self.trained[name], torch.as_tensor(self.index[name], device=value.device)
            parameter.copy_(value.put_(kept, parameter.take(kept)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters of the model, such as those of a layer that is unfrozen.

        Raises ValueError for a parameter that is not the model's, is frozen, or is trained already.
        """
        if getattr(self, "rule", None) is None:  # the groups that the constructor makes
            super().add_param_group(param_group)
            return
        if not isinstance(self.model, nn.Module):
            raise ValueError("add_param_group: a model that is no module has all its parameters from the beginning")
        names = names_of(self.model, param_group["params"])
        again = [name for name in names if name in self.trained]
        if again:
            raise ValueError(f"add_param_group: {', '.join(again)}: trained already")
        known = dict(self.model.named_parameters())
        added: dict[str, Tensor] = {name: known[name] for name in names}
        masks = {name: mask for name, mask in (self.masks or {}).items() if name in added}
        index = kept_positions(added, masks or None)
        super().add_param_group(param_group | {"params": list(added.values())})
        self.left_out = {name: reason for name, reason in self.left_out.items() if name not in added}
        trained, index = self.trained | added, self.index | index
        for name in known:  # in the order of the model; the dicts stay the same, for LossQueries has one of them
            if name in trained:
                self.trained.pop(name, None)
                self.trained[name], self.index[name] = trained[name], index[name]
        self.index = {name: self.index[name] for name in self.trained}

    def report(self) -> str:
        """What is trained, by which way its queries are answered, and why not by a faster one; what is left out."""
        d = sum(map(len, self.index.values()))
        lines = [
            f"{type(self).__name__}: {d:,} coordinates of {len(self.trained)} parameters, {self.queries:,} queries in "
            f"{self.loss_queries.steps:,} steps"
        ]
        answered = {name: answer for key, answer in self.loss_queries.ways().items() for name in key[1:]}
        width = max(map(len, [*self.trained, *self.left_out]))
        for name, parameter in self.trained.items():
            way, reasons = answered.get(name, ("not asked yet", {}))
            why = "".join(f"; not {other}: {reason}" for other, reason in reasons.items())
            lines.append(f"  {name:{width}}  {len(self.index[name]):,} of {parameter.numel():,}  {way}{why}")
        lines += [f"  {name:{width}}  left out: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = report

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model: state of the update rule, generator, counters, choices."""
        state = super().state_dict() | {"generator": self.generator.get_state(), "identity": self._identity()}
        return state | self.loss_queries.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state. Raises ValueError, and changes nothing, where it is that of another optimiser."""
        missing = {"identity", "generator", "queries", "steps", "known", "undecided", "record next"} - state_dict.keys()
        if missing:
            raise ValueError(f"the state is not one of {type(self).__name__}: it has no {', '.join(sorted(missing))}")
        theirs, mine = state_dict["identity"], self._identity()
        for key in mine | theirs:
            there, here = theirs.get(key), mine.get(key)
            if there != here:
                raise ValueError(f"the state belongs to another optimiser: {key} is {there!r} there and {here!r} here")
        numbers = state_dict["generator"].cpu()
        torch.Generator(self.generator.device).set_state(numbers)  # raises, if at all, before anything is changed
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._share_with_rule()
        self.generator.set_state(numbers)
        self.loss_queries.load_state(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: everything but the wrappers that schedulers put around `step`."""
        return {key: value for key, value in self.__dict__.items() if key not in ("step", "generator")} | {
            "generator state": (str(self.generator.device), self.generator.get_state())
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        device, numbers = state.pop("generator state", (None, None))  # torch's load_state_dict comes through here too
        super().__setstate__(state)
        if device is not None:
            self.generator = torch.Generator(device)
            self.generator.set_state(numbers)

    def _identity(self) -> dict[str, str]:
        """What a state must fit: the class, and the coordinates of each parameter."""
        identity = {"class": type(self).__name__, "rule": type(self.rule).__name__}
        for name, kept in self.index.items():
            which = "all" if isinstance(kept, range) else f"{len(kept)}, sum {crc32(kept.cpu().numpy().tobytes()):08x}"
            identity[f"trained {name}"] = f"{which} of {self.trained[name].numel()}"
        names = {id(parameter): name for name, parameter in self.trained.items()}
        for k, group in enumerate(self.param_groups):
            identity[f"group {k}"] = ", ".join(names[id(parameter)] for parameter in group["params"])
        return identity

    def _closure(self, inputs: Any, targets: Any, closure: Callable | None) -> Callable | None:
        """The closure, however it is given; None where a batch is."""
        if closure is not None and (inputs is not None or targets is not ABSENT):
            raise TypeError("a step takes inputs and targets, or a closure, not both")
        if closure is None and targets is ABSENT and callable(inputs) and not isinstance(inputs, Tensor):
            return inputs
        if closure is None and targets is ABSENT:
            raise TypeError("a step needs inputs and targets, or a closure that returns the loss")
        return closure

    def _seed(self) -> int:
        """A fresh seed, for the step's randomness."""
        return int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))

    def _estimate_from(self, inputs: Any, targets: Any, closure: Callable | None) -> tuple:
        outputs, loss = self.loss_queries.start(inputs, targets, self._seed(), closure=closure)
        self._add_estimate(loss)
        return outputs, loss

    def _add_estimate(self, loss: Tensor) -> None:
        """Add ĝ to the `.grad` of the trained parameters, through `_add`."""
        raise NotImplementedError

    @torch.no_grad()
    def _add(self, name: str, values: Tensor) -> None:
        """Add the estimate of the kept coordinates of a parameter (K,) to its `.grad`."""
        parameter, index = self.trained[name], self.index[name]
        if isinstance(index, range):
            grad = values.to(parameter).view(parameter.shape)
        else:
            grad = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            grad.view(-1)[index] = values.to(grad)
        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def _share_with_rule(self) -> None:
        self.rule.param_groups, self.rule.state = self.param_groups, self.state


def torch_rule(
    rule: Rule | None,
    adam: bool,
    betas: tuple[float, float],
    eps: float,
    momentum: float = 0,
    weight_decay: float = 0,
    dampening: float = 0,
) -> Rule:
    """The update rule: the one given, else torch.optim.Adam, or torch.optim.SGD.

    Raises ValueError for options that do not go together.
    """
    if rule is not None:
        if adam or momentum or weight_decay or dampening:
            raise ValueError("rule brings options of its own: leave adam, momentum, dampening and weight_decay alone")
        return rule
    if not adam:
        return lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum, dampening, weight_decay)
    if momentum or dampening:
        raise ValueError("adam has moments of its own: leave momentum and dampening at 0")
    return lambda parameters, lr: torch.optim.Adam(parameters, lr, betas, eps, weight_decay)


def whole_number(name: str, value: Any) -> int:
    """An argument as an int, of any integer type. Raises ValueError for what is none, and below 1."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return number
