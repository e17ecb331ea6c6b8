"""Loss queries: what one training step may ask of a model.

A query is one forward pass of the whole batch that returns one number, the loss. `LossQueries` is the only place in
the package that asks for losses, so its counter is the bill of a training run. Chapter 1 defines the query, chapter 9
makes it cheap.
"""

import random
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

QUERY_MODES = ("auto", "loop")


class LossQueries:
    """Losses of a model at perturbed points of one batch, counted.

    `start` fixes a batch and returns the unperturbed outputs and loss. Until the next `start`, every query sees that
    batch and the same random numbers: dropout masks are drawn once a step, so the loss is a deterministic function of
    the parameters. A round of queries leaves parameters, buffers, train/eval mode and the global random generators
    exactly as they were, also when the model or the criterion raises. (A running mean of batch normalisation is a
    buffer: queries do not update it.)

    Args:
        model: a callable from inputs to outputs: a module, or a function that PyTorch cannot see into.
        criterion: a callable from (outputs, targets) to one number.
        parameters: the tensors that queries may perturb, by name. They are perturbed in place, so a model that is not
            a module must read them anew in each call.
        mode: "loop" perturbs, runs and restores, one query after the other; "auto" takes the fastest way that is
            valid for the model.

    Attributes:
        count: queries asked so far (queries).
        steps: batches started so far.
    """

    def __init__(self, model: Callable, criterion: Callable, parameters: dict[str, Tensor], mode: str = "auto"):
        if mode not in QUERY_MODES:
            raise ValueError(f"query_mode {mode!r} is unknown; choose one of {', '.join(QUERY_MODES)}")
        self.model, self.criterion, self.parameters = model, criterion, parameters
        self.modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        self.count = 0
        self.steps = 0

    @torch.no_grad()
    def start(self, inputs, targets, seed: int) -> tuple:
        """Fix the batch and the seed of the step's randomness; return outputs and loss of the unperturbed model.

        One query. `inputs` is a tensor, or a tuple for `model(*inputs)`.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the message names the step.
            ValueError: the criterion returned more than one number.
        """
        self.steps += 1
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.targets, self.seed = targets, seed
        self.draws = True  # does the model draw random numbers? the first forward pass shows it
        with self._unharmed():
            outputs, loss = self._evaluate()
            drawn = _RandomState()
            _seed_everything(seed)
            self.draws = drawn != _RandomState()
        return outputs, self._checked(loss, "unperturbed")

    @torch.no_grad()
    def coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        """Losses with one coordinate shifted at a time: L(θ + s e_i) for every shift s and every i in `index`.

        Args:
            name: the parameter.
            index: (K,) flat positions in it.
            shifts: S numbers.

        Returns:
            (S, K) losses; S·K queries.
        """
        parameter, losses = self.parameters[name], []
        with self._unharmed():
            for position in index.tolist():
                entry = _entry(parameter, position)
                value = entry.clone()
                try:
                    for shift in shifts:
                        entry.copy_(value + shift)
                        losses.append(self._evaluate()[1])
                finally:
                    entry.copy_(value)
        losses = torch.stack(losses).reshape(len(index), len(shifts)).T  # (S, K)
        return self._checked(losses, f"with layer {self._layer(name)!r} perturbed")

    @torch.no_grad()
    def directions(self, index: dict[str, Tensor], directions: Tensor, scales: list[float]) -> Tensor:
        """Losses along directions: L(θ + s u) for every scale s and every row u of `directions`.

        Args:
            index: for each perturbed parameter, the flat positions that take part; d of them in all.
            directions: (n, d), columns in the order of `index`.
            scales: S numbers.

        Returns:
            (S, n) losses; S·n queries.
        """
        original = {name: self.parameters[name].clone() for name in index}
        sizes, losses = [len(positions) for positions in index.values()], []
        with self._unharmed():
            try:
                for u in directions:
                    for scale in scales:
                        for (name, value), piece in zip(original.items(), u.split(sizes), strict=True):
                            moved = value.flatten().index_add(0, index[name], piece, alpha=scale)
                            self.parameters[name].copy_(moved.view(value.shape))
                        losses.append(self._evaluate()[1])
            finally:
                for name, value in original.items():
                    self.parameters[name].copy_(value)
        losses = torch.stack(losses).reshape(len(directions), len(scales)).T  # (S, n)
        layers = dict.fromkeys(self._layer(name) for name in index)
        return self._checked(losses, f"with layer {', '.join(map(repr, layers))} perturbed")

    def probe(self, name: str, position: int, shift: float) -> float:
        """The loss with one coordinate shifted; one query."""
        return self.coordinates(name, torch.tensor([position]), [shift]).item()

    @torch.no_grad()
    def move(self, name: str, position: int, shift: float) -> None:
        """Shift one coordinate for good; later probes of this step start from here. No query."""
        _entry(self.parameters[name], position).add_(shift)

    def _evaluate(self) -> tuple:
        """One query: forward pass and criterion, under the step's random numbers."""
        self.count += 1
        if self.draws:
            _seed_everything(self.seed)
        outputs = self.model(*self.inputs)
        loss = self.criterion(outputs, self.targets)
        self._restore_buffers()
        loss = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        if loss.numel() != 1:
            raise ValueError(f"the criterion must return one number, not a tensor of shape {tuple(loss.shape)}")
        return outputs, loss.reshape(())

    def _checked(self, losses: Tensor, where: str) -> Tensor:
        """The losses, or an error that names step and layer if one of them is not a finite number."""
        finite = losses.isfinite()
        if not finite.all():
            value = losses[~finite].flatten()[0].item()
            raise FloatingPointError(f"the loss is {value} at step {self.steps}, {where}")
        return losses

    def _layer(self, name: str) -> str:
        """The name of the layer that owns a parameter: "fc1" for "fc1.weight" and for "fc1.cores.0"."""
        owner = name.rpartition(".")[0]
        while isinstance(self.modules.get(owner), nn.ParameterList | nn.ParameterDict):
            owner = owner.rpartition(".")[0]
        return owner or name

    @contextmanager
    def _unharmed(self):
        """Put back buffers, train/eval modes and global random generators at the end, whatever happens."""
        self.buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.modules.values()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        modes = [(module, module.training) for module in self.modules.values()]
        random_state = _RandomState() if self.draws else None
        try:
            yield
        finally:
            self._restore_buffers()
            for module, training in modes:
                module.training = training
            if random_state is not None:
                random_state.restore()

    def _restore_buffers(self):
        for module, name, buffer, saved in self.buffers:
            module._buffers[name] = buffer.copy_(saved)


class _RandomState:
    """The states of all global random generators that a model may draw from."""

    def __init__(self):
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.numpy = np.random.get_state()
        self.python = random.getstate()

    def __eq__(self, other):
        return (
            torch.equal(self.torch, other.torch)
            and all(map(torch.equal, self.cuda, other.cuda))
            and self.numpy[2] == other.numpy[2]
            and np.array_equal(self.numpy[1], other.numpy[1])
            and self.python == other.python
        )

    def restore(self):
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _entry(parameter: Tensor, position: int) -> Tensor:
    """A 0-d view of one entry, by its flat position; right for any memory layout."""
    return parameter[tuple(int(k) for k in np.unravel_index(position, parameter.shape))]
