"""A recording of one forward pass: which calls led from each layer's output to the loss.

Within a step the loss is a deterministic function of the parameters, so one recorded pass tells what every later query
will do. `Recording` writes down each call to torch, a supported layer being one call. Chapter 9 replays from it only
the suffix of a changed weight, what lies behind it: all other results stand.

A recording refuses (`Unsuitable`) rather than guess: where a value left torch (`.item()`, numpy), came from a place
that torch does not show, or was overwritten after its use. Where it cannot follow at all (inside of vmap, compiled
code, sparse tensors) it breaks off, and the pass goes on without it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zo_tutorial.queries.way import Unsuitable
from zo_tutorial.substitution import slots_of, substituted
from zo_tutorial.tensor import TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn

TENSOR_LAYERS = (TensorizedLinear, TensorizedLinear_module, TensorizedLinear_module_tonn)
TensorLayer = TensorizedLinear | TensorizedLinear_module | TensorizedLinear_module_tonn
# Calls that return no tensor and yet say nothing about values.
FACTS = {"dim", "size", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "__len__", "__get__"}
ARGUMENTS = {function: list(signature(function).parameters) for function in (F.dropout, F.batch_norm)}

# Bytes of results to make in one call of vmap, if the memory allows. With more, single tensors outgrow the 32 MB up to
# which malloc keeps memory for reuse, and every one of them is paged in anew.
AT_ONCE = 40e6


class Call:
    """One recorded call.

    Attributes:
        layer: the supported layer that it is, or None.
        tensors, results: the tensors among its arguments and in its result.
        changed: ids of the arguments that it wrote into.
        draws: whether it drew random numbers.
        bytes: memory of its results, and of those within a layer (bytes).
    """

    def __init__(self, function: Callable, args: tuple, kwargs: dict, random_state: list[Tensor] | None = None):
        self.function, self.args, self.kwargs = function, args, kwargs
        self.layer = function if isinstance(function, nn.Module) else None
        self.tensors = list(tensors_in((args, kwargs)))
        self.versions = list(map(version, self.tensors))
        self.random_state, self.bytes = random_state, 0
        self.matrix: Tensor | None = None  # of a tensor layer, once it is asked for
        self.primitive = 1  # calls to torch, those within a layer counted

    def close(self, result: Any, random_state: list[Tensor] | None) -> None:
        """Note the result, and the random state after the call."""
        self.results = list(tensors_in(result))
        now = map(version, self.tensors)
        self.changed = {id(t) for t, a, b in zip(self.tensors, self.versions, now, strict=True) if a != b}
        self.result_versions = list(map(version, self.results))
        self.draws = not all(map(torch.equal, self.random_state or (), random_state or ()))
        self.bytes += bytes_of(self.results)
        if self.function is F.dropout and self._drops():
            if self.random_state is not None:
                set_random_state(self.random_state)
            self.factor = self.draw()

    def draw(self) -> Tensor:
        """What this dropout multiplies its input with, 0 or 1/(1-p): drawn in the memory layout of that input."""
        return F.dropout(torch.ones_like(self.named()["input"]), self.named()["p"], training=self._drops())

    def with_input(self, x: Tensor) -> Tensor:
        """This dropout of another input."""
        if not self._drops():
            return x
        return x.mul_(self.factor) if self.changed else x * self.factor

    def weight(self) -> Tensor:
        """The matrix of this dense or tensor layer, formed once."""
        if isinstance(self.layer, nn.Linear):
            return self.layer.weight
        assert isinstance(self.layer, TensorLayer)
        if self.matrix is None:
            self.matrix = self.layer.to_matrix().contiguous()
        return self.matrix

    def _drops(self) -> bool:
        """Whether this dropout changes anything."""
        named = self.named()
        return named["training"] and named["p"] > 0

    def named(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(ARGUMENTS[self.function], self.args, strict=False)) | self.kwargs

    def again(self, values: dict[int, Tensor], parameters: dict | None) -> Any:
        """The call once more, with the tensors of `values` in the place of the recorded ones."""
        args, kwargs = _replace(self.args, values), _replace(self.kwargs, values)
        if parameters and self.layer is not None and self.layer in parameters:
            pairs = [(slots_of(self.layer, old), new) for old, new in parameters[self.layer]]
            with substituted(pairs):
                return self.function(*args, **kwargs)
        if isinstance(self.layer, nn.modules.batchnorm._BatchNorm):
            return _batch_norm(self.layer, *args, **kwargs)
        if isinstance(self.layer, TENSOR_LAYERS):
            # for many inputs: one long product is quicker than several short ones
            return F.linear(args[0] if args else kwargs["x"], self.weight(), self.layer.bias)
        if self.function is F.dropout:
            return self.with_input(values[id(self.named()["input"])])
        if self.function is F.batch_norm and self.named()["training"]:
            named = _replace(self.named(), values) | dict(running_mean=None, running_var=None)  # not to be updated
            return F.batch_norm(**named)
        return self.function(*args, **kwargs)


class Recording(TorchFunctionMode):
    """Records while it is active (`with recording:`).

    Args:
        layers: the modules to record as one call each.
        known: the tensors that the pass starts from: inputs, targets, parameters, buffers.
        draws: whether the pass may draw random numbers.
        limit: bytes of results after which it gives up.
    """

    def __init__(self, layers: Iterable[nn.Module], known: Iterable[Tensor], draws: bool, limit: float):
        super().__init__()
        self.layers, self.draws, self.limit = list(layers), draws, limit
        self.calls: list[Call] = []
        self.known = {id(tensor): tensor for tensor in known}
        self.read: set[range] = set()  # the spans that calls outside the layers have read
        self.held: list[range] = []  # the spans of all parameters
        self.open: Call | None = None
        self.bytes = 0
        self.loss: Any = None
        self.broken = ""  # why it broke off
        self.plain: dict[int, Tensor] = {}  # for `points`: contiguous copies of recorded tensors, by their id
        self.layers_seen: dict = {}  # for `structured`: what it has found out about layers
        self.logits_seen: dict = {}  # for `logits`: the same
        self.probed: tuple = ()  # for `structured`: layer, parameter and what it found out of them last
        self.along: tuple = ()  # for `structured`: the same of directions: whether they are of low rank, where they go

    def __enter__(self):
        self.handles = []
        for layer in self.layers:
            self.handles.append(layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._leave_layer))
        return super().__enter__()

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exception)

    def forget(self) -> None:
        """Drop what was found out: it points back here, and so would keep all results until garbage is collected."""
        self.layers_seen.clear()
        self.logits_seen.clear()
        self.probed = self.along = ()

    def _enter_layer(self, layer, args, kwargs):
        if not self.broken:
            self.open = self._followed(Call, layer, args, kwargs)

    def _leave_layer(self, layer, args, output):
        if self.open is not None:
            self._followed(self._close, self.open, output)
        self.open = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.broken:
            return function(*args, **kwargs)
        if self.open is not None:
            result = function(*args, **kwargs)
            self.open.bytes += self._followed(bytes_of, tensors_in(result)) or 0
            self.open.primitive += 1
            return result
        call = self._followed(Call, function, args, kwargs, random_state() if self.draws else None)
        result = function(*args, **kwargs)
        if call is not None:
            self._followed(self._close, call, result, random_state() if self.draws else None)
        return result

    def _followed(self, note: Callable, *args) -> Any:
        """note(*args); where that fails, the recording breaks off."""
        try:
            with torch._C.DisableTorchFunction():
                return note(*args)
        except Exception as error:  # of tensors that have no version, no memory of their own, no values yet
            self.broken = f"the forward pass cannot be recorded ({str(error).partition(chr(10))[0]})"
            self.calls.clear()
            return None

    def _close(self, call: Call, result: Any, random_state: list[Tensor] | None = None) -> None:
        call.close(result, random_state)
        self.bytes += call.bytes
        if self.bytes > self.limit:
            self.calls.clear()
            return
        self.calls.append(call)
        self.read.update(map(span, call.tensors))
        if all(id(tensor) in self.known for tensor in call.tensors):
            self.known.update((id(tensor), tensor) for tensor in call.results)

    def call_of(self, layer: nn.Module) -> Call:
        """The one call of a layer.

        Raises:
            Unsuitable: it was called twice, or never, or its input or output is not there any more.
        """
        calls = [call for call in self.calls if call.layer is layer]
        if len(calls) != 1 or len(calls[0].args) != 1 or calls[0].kwargs:
            raise Unsuitable("the layer is not called just once, with one tensor")
        return calls[0]

    def undisturbed(self, call: Call) -> bool:
        """Whether the arguments of a call still are what they were."""
        return all(version(t) == v for t, v in zip(call.tensors, call.versions, strict=True))

    def result(self, call: Call) -> Tensor:
        """What a layer's call returned; computed again where that was overwritten, as by an activation in place."""
        if version(call.results[0]) == call.result_versions[0]:
            return call.results[0]
        return call.function(*call.args)

    def after(self, *starts: Call) -> list[Call]:
        """The calls that the results of `starts` reach, in order, without `starts`.

        Raises:
            Unsuitable: replaying them would not give the loss.
        """
        if not isinstance(self.loss, Tensor) or id(self.loss) not in self.known:
            raise Unsuitable("the loss does not come from recorded calls alone")
        reached, calls = {id(tensor) for start in starts for tensor in start.results}, []
        for call in self.calls[self.calls.index(starts[0]) + 1 :]:
            inputs = [id(tensor) in reached for tensor in call.tensors]
            if call in starts or not any(inputs):
                continue
            if not call.results:
                if getattr(call.function, "__name__", None) not in FACTS:
                    raise Unsuitable(f"a value leaves torch: {call.function}")
                continue
            running = set()  # of a batch normalisation in training: written, not read
            if call.function is F.batch_norm and call.named()["training"]:
                running = {id(call.named()["running_mean"]), id(call.named()["running_var"])}
            for tensor, before, is_reached in zip(call.tensors, call.versions, inputs, strict=True):
                if not is_reached and id(tensor) not in running:
                    if id(tensor) not in self.known or version(tensor) != before:
                        raise Unsuitable("a call reads what is not there any more")
            if call.changed - running - reached:
                raise Unsuitable("a call writes into what is not its own")
            if call.draws and call.function is not F.dropout:
                raise Unsuitable("a call draws random numbers")
            reached.update(map(id, call.results))
            calls.append(call)
        return calls

    def replay(
        self,
        calls: list[Call],
        values: dict[int, Tensor],
        parameters: dict | None = None,
        added: dict[nn.Module, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """The loss when `calls` run again.

        Args:
            values: {id of a recorded tensor: the one to put in its place}.
            parameters: {layer: [(its parameter, the one to put in its place)]}.
            added: {layer: what to add to its output, from its input}.
        """
        values = dict(values)
        for call in calls:
            result = call.again(values, parameters)
            if added and call.layer in added:
                result = result + added[call.layer](_replace(call.args, values)[0])
            results = tensors_in(result)
            values.update(zip(map(id, call.results), results, strict=True))
        return values.get(id(self.loss), self.loss)


def tensors_in(structure: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, tuple | list):
        for item in structure:
            yield from tensors_in(item)
    elif isinstance(structure, Mapping):
        yield from tensors_in(list(structure.values()))


def _replace(structure: Any, values: dict[int, Tensor]) -> Any:
    """The structure with other tensors: {id of the old one: the new one}."""
    if isinstance(structure, Tensor):
        return values.get(id(structure), structure)
    if isinstance(structure, tuple | list):
        items = [_replace(item, values) for item in structure]
        return type(structure)(*items) if hasattr(structure, "_fields") else type(structure)(items)
    if isinstance(structure, dict):
        return {key: _replace(value, values) for key, value in structure.items()}
    return structure


def version(tensor: Tensor) -> int:
    """How often a tensor was written into; an inference tensor never is."""
    return 0 if tensor.is_inference() else tensor._version


def _batch_norm(layer: nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    """A batch normalisation that leaves its running averages alone."""
    training = layer.training or layer.running_mean is None
    mean, var = (None, None) if training else (layer.running_mean, layer.running_var)
    return F.batch_norm(input, mean, var, layer.weight, layer.bias, training, 0.0, layer.eps)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copies(parameter: Tensor, count: int) -> Tensor:
    """Copies in one contiguous tensor: `(count, *shape)`."""
    return parameter.detach().contiguous().repeat(count, *[1] * parameter.dim())


def span(tensor: Tensor) -> range:
    """Where the numbers of a tensor lie in memory, from the first byte to behind the last."""
    entries = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(tensor.data_ptr(), tensor.data_ptr() + max(0, entries) * tensor.element_size())


def overlap(a: range, b: range) -> bool:
    """Whether two tensors may share numbers, by their spans."""
    return a.start < b.stop and b.start < a.stop


def random_state() -> list[Tensor]:
    """The states of torch's global generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])
