"""Loss queries: what one training step may ask of a model.

A query is one forward pass of the whole batch that returns one number, the loss. `LossQueries` is the only place in
the package that asks for losses, so its counter is the bill of a training run. Chapter 1 defines the query, chapter 9
makes it cheap.
"""

import random
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from math import isfinite

import numpy as np
import torch
from torch import Tensor, nn

from zo_tutorial.affine import is_affine
from zo_tutorial.batched import Batched, BatchedSite, BatchedWalk
from zo_tutorial.directional import Directional
from zo_tutorial.structured import Site, Walk
from zo_tutorial.tape import Tape, Unsuitable, overlap, span, tensors_in

QUERY_MODES = ("auto", "loop", "batched", "structured")
LOOK_AHEAD = 64  # the most coordinates that `descend` tries ahead of a move


class LossQueries:
    """Losses of a model at perturbed points of one batch, counted.

    `start` fixes a batch and returns the unperturbed outputs and loss. Until the next `start`, every query sees that
    batch and the same random numbers: dropout masks are drawn once a step, so the loss is a deterministic function of
    the parameters. A round of queries leaves parameters, buffers, train/eval mode and the global random generators
    exactly as they were, also when the model or the criterion raises. (A running mean of batch normalisation is a
    buffer: queries do not update it.)

    The modes differ in time, not in losses or counts, up to rounding. (Where a weight does not matter at all, such as a
    bias in front of a batch normalisation, rounding decides what `sign` does.)

    - "loop" perturbs, runs and restores, one query after the other: the reference, for any callable.
    - "batched" runs many perturbed copies of the parameters in one call of `torch.func.vmap`.
    - "structured" shifts the output of a coordinate's layer, and runs only what comes after it; what it has no form
      for is batched.
    - "auto" takes the fastest of these that is valid.

    A model that is not a module is always looped. The first round of each kind is compared with the loop at a few of
    its points. Where the losses differ, or vmap refuses the model, "auto" goes on to the next way; the others raise.

    Args:
        model: a callable from inputs to outputs: a module, or a function that PyTorch cannot see into.
        criterion: a callable from (outputs, targets) to one number.
        parameters: the tensors that queries may perturb, by name. They are perturbed in place, so a model that is not
            a module must read them anew in each call.
        mode: "auto", "loop", "batched" or "structured".
        memory: bound for what a round of queries may use beside the model (MB).

    Attributes:
        count: queries asked so far (queries).
        steps: batches started so far.
    """

    def __init__(
        self,
        model: Callable,
        criterion: Callable,
        parameters: dict[str, Tensor],
        mode: str = "auto",
        memory: float = 512,
    ):
        if mode not in QUERY_MODES:
            raise ValueError(f"query_mode {mode!r} is unknown; choose one of {', '.join(QUERY_MODES)}")
        if not memory > 0:
            raise ValueError(f"memory must be above 0 MB, not {memory}")
        self.model, self.criterion, self.parameters = model, criterion, parameters
        self.modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        self.mode, self.limit = mode, memory * 1e6
        self.ways = self._ways()
        self.compared = set()  # kinds of rounds that gave the losses of the loop
        self.count = 0
        self.steps = 0
        self.draws = True  # whether the model draws random numbers: the first forward pass shows it

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
        self.refused = {}
        outputs, loss = self._unperturbed()
        self.count += 1
        return outputs, self._checked(loss, "unperturbed")

    @torch.no_grad()
    def coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        """Losses with one coordinate shifted at a time: L(θ + s e_i) for every shift s and every i in `index`.

        Args:
            name: the parameter.
            index: (K,) flat positions in it, K at least 1.
            shifts: S numbers.

        Returns:
            (S, K) losses; S·K queries.
        """

        def compare(losses):  # the first and the last coordinate
            return losses[0, [0, -1]], self._loop_coordinates(name, index[[0, -1]], shifts[:1])[0]

        def ask(way):
            changes = self._at_coordinates(way, name).look(index, shifts)
            return self.base + changes

        losses = self._fastest(("coordinates", name), ask, compare)
        if losses is None:
            losses = self._loop_coordinates(name, index, shifts)
        self.count += losses.numel()
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

        def compare(losses):
            return losses[:1, 0], self._loop_directions(index, directions[:1], scales[:1])[0]

        def ask(way):
            if way == "batched":
                return self._batched().directions(index, directions, scales)
            self._follow()
            layers = {self._affine_layer(name): positions for name, positions in index.items()}
            return Directional(self.tape, layers, self._room()).losses(directions, scales)

        losses = self._fastest(("directions", *index), ask, compare)
        if losses is None:
            losses = self._loop_directions(index, directions, scales)
        self.count += losses.numel()
        layers = dict.fromkeys(self._layer(name) for name in index)
        return self._checked(losses, f"with layer {', '.join(map(repr, layers))} perturbed")

    @torch.no_grad()
    def descend(self, name: str, positions: Tensor, shift: float, three_points: bool, running: float) -> float:
        """Move coordinates in place, one by one: the estimator `sign`.

        For each position in turn: θ_i + s is kept if it lowers the running loss (one query). Otherwise θ_i − s is kept:
        always, or, with `three_points`, if it lowers the running loss (two queries).

        Args:
            name: the parameter.
            positions: (K,) flat positions in it.
            shift: s.
            running: the loss where the parameters stand.

        Returns:
            The loss where they stand afterwards.
        """

        def compare(answer):
            _, changes = answer
            first = self._loop_coordinates(name, positions[:1], [shift, -shift])[:, 0]
            return running + torch.tensor(changes[0]).to(first), first

        def ask(way):
            if way == "batched" and self.mode == "auto":
                raise Unsuitable("copies of all parameters cost more than the loop")
            site = self._at_coordinates(way, name)
            walk = Walk(site, positions, shift) if way == "structured" else BatchedWalk(site, positions, shift)
            return walk, walk.look(0, 1)

        if not len(positions):
            return running
        answer = self._fastest(("descend", name), ask, compare)
        self.moved = True
        if answer is not None:
            return self._descend_ahead(answer[0], name, positions, shift, three_points, running)
        for position in positions.split(1):
            for step in (shift, -shift):
                loss = self._counted(name, self._loop_coordinates(name, position, [step]).item())
                if loss < running or (step == -shift and not three_points):
                    self._move(name, position, [step])
                    running = loss
                    break
        return running

    def _descend_ahead(self, walk, name, positions, shift, three_points, running) -> float:
        """`descend` that looks at several coordinates from the same point, and again from behind the first that moves.

        What was looked at in vain is no query: the rule never asked for it.
        """
        start, ahead, moves = 0, 1, {}
        try:
            with self._unharmed():
                while start < len(positions):
                    for k, (plus, minus) in enumerate(walk.look(start, ahead), start):
                        side, loss = 0, self._counted(name, running + plus)
                        if not loss < running:
                            side, loss = 1, self._counted(name, running + minus)
                        if loss < running or (side == 1 and not three_points):
                            walk.move(k, side)
                            moves[k], running = (shift, -shift)[side], loss
                            ahead = max(1, ahead // 2)
                            break
                    else:
                        ahead = min(2 * ahead, LOOK_AHEAD)
                    start = k + 1
        finally:
            if moves:
                self._move(name, positions[list(moves)], list(moves.values()))
        return running

    def _move(self, name: str, positions: Tensor, shifts: list[float]) -> None:
        """Shift some coordinates for good."""
        parameter = self.parameters[name]
        entries = torch.unravel_index(positions, parameter.shape)
        parameter[entries] += torch.tensor(shifts, dtype=parameter.dtype, device=parameter.device)

    def _counted(self, name: str, loss: float) -> float:
        """The loss, counted as a query."""
        self.count += 1
        if not isfinite(loss):
            self._checked(torch.tensor(loss), f"with layer {self._layer(name)!r} perturbed")
        return loss

    # The loop.

    def _loop_coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        """(S, K) losses, one query after the other."""
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
        return torch.stack(losses).reshape(len(index), len(shifts)).T  # (S, K)

    def _loop_directions(self, index: dict[str, Tensor], directions: Tensor, scales: list[float]) -> Tensor:
        """(S, n) losses, one query after the other."""
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
        return torch.stack(losses).reshape(len(directions), len(scales)).T  # (S, n)

    def _evaluate(self, tape: Tape | None = None) -> tuple:
        """Forward pass and criterion, under the step's random numbers: outputs and loss."""
        self._reset()
        with tape or nullcontext():
            outputs = self.model(*self.inputs)
            loss = self.criterion(outputs, self.targets)
        if tape is not None:
            tape.loss = loss
        self._restore_buffers()
        loss = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        if loss.numel() != 1:
            raise ValueError(f"the criterion must return one number, not a tensor of shape {tuple(loss.shape)}")
        return outputs, loss.reshape(())

    # The choice of a way.

    def _fastest(self, kind: tuple, ask: Callable, compare: Callable):
        """What the fastest valid way answers; None where that is the loop.

        A way is valid if it can answer, and if its first answer of this kind has the losses of the loop.

        Args:
            kind: the kind of round.
            ask: from a way to its answer.
            compare: from an answer to some of its losses and the same from the loop.
        """
        if not self.ways:
            return None
        kind = (*kind, *(m.training for m in self.modules.values()), *(t.shape for t in tensors_in(self.inputs)))
        for way in self.ways:
            if (way, kind) in self.refused:
                continue
            try:
                answer = self._attempt(way, ask)
                if (way, kind) not in self.compared:
                    mine, loop = compare(answer)
                    tolerance = 1e-9 if loop.dtype == torch.float64 else 1e-5
                    if not torch.allclose(mine.to(loop), loop, rtol=tolerance, atol=tolerance, equal_nan=True):
                        raise Unsuitable("its losses are not those of the loop")
                    self.compared.add((way, kind))
                return answer
            except Unsuitable as reason:
                self.refused[way, kind] = reason
        if self.mode == "auto":
            return None
        reasons = "; ".join(f"{way}: {self.refused[way, kind]}" for way in self.ways)
        raise RuntimeError(f"query_mode {self.mode!r} cannot query this model, 'loop' and 'auto' can ({reasons})")

    def _attempt(self, way: str, ask: Callable):
        """The answer of a way.

        Raises:
            Unsuitable: the way cannot answer, or vmap refuses the model. That comes back at a second try; an exception
                that does not is the user's own, and passes through. So does one that the plain model raises too.
        """
        try:
            with self._unharmed():
                return ask(way)
        except Unsuitable:
            raise
        except Exception as error:
            first = error
        try:
            with self._unharmed():
                ask(way)
        except Exception:
            with self._unharmed():
                self._evaluate()
            raise Unsuitable(str(first).partition("\n")[0]) from first
        raise first

    def _ways(self) -> tuple[str, ...]:
        """The ways that the mode allows, the fastest first; none stands for the loop."""
        own = dict(self.model.named_parameters()) if self.modules else {}
        if any(own.get(name) is not parameter for name, parameter in self.parameters.items()):
            return ()  # not a module, or not its parameters
        return {"loop": (), "batched": ("batched",)}.get(self.mode, ("structured", "batched"))

    def _unperturbed(self) -> tuple:
        """Outputs and loss where the parameters stand, recorded on `tape` for the ways that need it."""
        known = [self.inputs, self.targets]
        for module in self.modules.values():
            known += [vars(module), module._parameters, module._buffers]
        layers = [module for module in self.modules.values() if is_affine(module)] if self.ways else []
        parameters = [p for module in self.modules.values() for p in module._parameters.values() if p is not None]
        self.held = list(map(span, parameters))
        while True:
            self.tape = Tape(layers, tensors_in(known), self.draws, self.limit / 2)
            may_draw, self.draws = self.draws, True
            with self._unharmed():
                outputs, loss = self._evaluate(self.tape if self.ways else None)
                drawn = _RandomState()
                _seed_everything(self.seed)
                self.draws = drawn != _RandomState()
            if may_draw or not self.draws:  # else the recording lacks the dropout masks
                break
        self.base, self.moved = loss, False
        return outputs, loss

    def _follow(self) -> None:
        """Record anew if the parameters have moved since."""
        if self.moved:
            self._unperturbed()

    def _at_coordinates(self, way: str, name: str) -> Site | BatchedSite:
        """What tells the changes of the loss, from where the parameters stand, by shifts of one parameter's entries."""
        if way == "batched":
            return BatchedSite(self._batched(), name)
        self._follow()
        return Site(self.tape, *self._affine_layer(name), self._room())

    def _affine_layer(self, name: str) -> tuple[nn.Module, str]:
        """The layer of a parameter, and the parameter's name in it.

        Raises:
            Unsuitable: it is no layer of a known form, or something else reads the parameter too.
        """
        owner = self._owner(name)
        layer, here = self.modules.get(owner), span(self.parameters[name])
        if layer is None or not is_affine(layer):
            raise Unsuitable("no form is known for the layer")
        holders = sum(overlap(here, held) for held in self.held)
        if holders > 1 or any(overlap(here, read) for read in self.tape.read):
            raise Unsuitable("the weight is read outside its layer")
        return layer, name.removeprefix(f"{owner}.")

    def _room(self) -> float:
        """The bytes that the recording leaves."""
        if self.tape.bytes > self.limit / 2:
            raise Unsuitable("the memory does not suffice for the recording of a forward pass")
        return self.limit - self.tape.bytes

    def _batched(self) -> Batched:
        self._follow()
        step = self.inputs, self.targets, self.tape, self._room(), self._reset
        return Batched(self.model, self.criterion, self.parameters, *step)

    # What every query leaves as it was.

    def _reset(self) -> None:
        """Put back what the last forward pass may have changed: buffers, and the step's random numbers."""
        self._restore_buffers()
        if self.draws:
            _seed_everything(self.seed)

    def _checked(self, losses: Tensor, where: str) -> Tensor:
        """The losses, or an error that names step and layer if one of them is not a finite number."""
        finite = losses.isfinite()
        if not finite.all():
            value = losses[~finite].flatten()[0].item()
            raise FloatingPointError(f"the loss is {value} at step {self.steps}, {where}")
        return losses

    def _layer(self, name: str) -> str:
        """The name of the layer that owns a parameter: "fc1" for "fc1.weight" and for "fc1.cores.0"."""
        return self._owner(name) or name

    def _owner(self, name: str) -> str:
        owner = name.rpartition(".")[0]
        while isinstance(self.modules.get(owner), nn.ParameterList | nn.ParameterDict):
            owner = owner.rpartition(".")[0]
        return owner

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
            module._buffers[name] = buffer
            if not torch.equal(buffer, saved):
                buffer.copy_(saved)


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
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _entry(parameter: Tensor, position: int) -> Tensor:
    """A 0-d view of one entry, by its flat position; right for any memory layout."""
    return parameter[tuple(int(k) for k in np.unravel_index(position, parameter.shape))]
