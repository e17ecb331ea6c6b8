"""Which way answers: the cheapest that can, once it has shown the changes of the loss that the loop shows."""

import warnings
from collections.abc import Callable
from typing import Any, cast
from zlib import crc32

import torch
from torch import Generator, Tensor

from zo_tutorial.directions import Directions
from zo_tutorial.queries.batched import Batched
from zo_tutorial.queries.cost import MARGIN
from zo_tutorial.queries.evaluation import Evaluation
from zo_tutorial.queries.loop import Loop
from zo_tutorial.queries.recording import tensors_in
from zo_tutorial.queries.shared import Round, kind_of, units_of
from zo_tutorial.queries.structured import Structured
from zo_tutorial.queries.way import Index, Moves, Unsuitable, Way

QUERY_MODES = ("auto", "loop", "batched", "structured")
NOT_ASKED = "the loop is as quick"
SAMPLE, LEAST = 3, 3  # coordinates at which a way is tried before it is trusted: any, and those that matter least
# A change is that of the loop to within a share of it and a multiple of the rounding of the loss.
SHARE = {torch.float32: 1e-3, torch.float64: 1e-6}
GRAIN = 16  # points that the loop is asked for in one go
MOST = 2**31
ENOUGH = 0.01  # seconds, by the estimate, beside which those do not count that a round takes whatever it asks
ROUNDINGS = {torch.float32: 64, torch.float64: 1000}


class Choice:
    """The ways that may answer, and what is known of them.

    Attributes:
        known: {"way question": "" or why it cannot answer that}. A question is what is asked of which parameters, with
            inputs of roughly which sizes and modules in which modes. No way is asked again what it has failed. With a
            number of points behind the question: "" or that the loop is as quick.
        undecided: {"way question": the step in which it was first put, while no comparison with the loop has decided}.
        grain: {question: so many points of it, asked together, cost hardly more than apart}, as `shared` cuts them.
        answered: {(kind, parameters): (the way that answered last, {faster way: why it did not})}.
    """

    def __init__(self, evaluation: Evaluation, mode: str):
        self.evaluation, self.mode = evaluation, mode
        self.loop = Loop(evaluation)
        self.ways: dict[str, Way] = {"structured": Structured(evaluation), "batched": Batched(evaluation)}
        self.known: dict[str, str] = {}
        self.undecided: dict[str, int] = {}
        self.grain: dict[str, int] = {}
        self.answered: dict[tuple[str, ...], tuple[str, dict[str, str]]] = {}
        self.warned = False

    def coordinates(self, name: str, index: Tensor, shifts: list[float]) -> Tensor:
        """`Way.coordinates`, by the way that is right and cheapest."""

        def check(way: Way, losses: Tensor) -> bool:
            return self._agrees_at(way, name, index, losses[0], shifts[0])

        def ask(way: Way) -> Tensor:
            return way.coordinates(name, index, shifts)

        return self._answer("coordinates", {name: index}, len(index), ask, check)

    def directions(self, index: dict[str, Index], directions: Directions, scales: list[float]) -> Tensor:
        """`Way.directions`, by the way that is right and cheapest."""

        def check(way: Way, losses: Tensor) -> bool:
            # along the first direction: as far as was asked, and as far as the weights are large
            first = directions.part(0, 1)
            far = _size([self.evaluation.parameters[name] for name in index])
            mine = torch.stack([losses[0, 0], way.directions(index, first, [far])[0, 0]])
            return self._same(mine, self.loop.directions(index, first, [scales[0], far])[:, 0])

        def ask(way: Way) -> Tensor:
            return way.directions(index, directions, scales)

        return self._answer(kind_of(directions), index, directions.n, ask, check)

    def units(self, asked: Round) -> list[Round]:
        """A round in parts that can be asked apart; in one part as long as the question is new."""
        kind, index = asked.question
        return units_of(asked, self.grain.get(self._question(kind, list(index)), asked.points))

    def state(self) -> dict[str, dict]:
        """What is known of the ways, and decides which of them answers."""
        return {"known": dict(self.known), "undecided": dict(self.undecided), "grain": dict(self.grain)}

    def load_state(self, state: dict[str, dict]) -> None:
        self.known, self.undecided = dict(state["known"]), dict(state["undecided"])
        self.grain = dict(state.get("grain", {}))

    def descend(self, moves: Moves) -> float:
        """`Way.descend`, by the way that is right and cheapest for coordinates."""
        name, positions, shift = moves.name, moves.positions, moves.shift

        def check(way: Way, losses: Tensor) -> bool:
            return self._agrees_at(way, name, positions, losses[0], shift)

        def first(way: Way) -> Tensor:
            return way.coordinates(name, positions[:1], [shift])

        def rule(way: Way) -> float:
            return way.descend(moves)

        return self._answer("descend", {name: positions}, len(positions), first, check, rule)

    def _answer(
        self,
        kind: str,
        index: dict[str, Index],
        asked: int,
        ask: Callable[[Way], Tensor],
        check: Callable[[Way, Tensor], bool],
        then: Callable[[Way], float] | None = None,
    ) -> Any:
        """What the cheapest valid way answers to `ask`; once it is trusted, to `then`, if that is given.

        Args:
            kind: of round: a method of `Way`, or "low-rank directions".
            index: the positions that are asked for, by parameter.
            asked: how many points the round asks about with each shift or scale.
            check: from a way and its answer to whether this could be compared with the loop; raises if they differ.
            then: what moves parameters, and so must not be tried.
        """
        names, reasons = list(index), dict[str, str]()
        question, only_loop = self._question(kind, names), self._only_loop(index)
        for name in self._order(kind):
            key = f"{name} {question}"
            if only_loop:
                reasons[name] = only_loop
                continue
            try:
                if self.known.get(key):
                    raise Unsuitable(self.known[key])
                way, answer = self.ways[name], None
                if self.mode == "auto" and not self._pays(key, way, kind, index, asked):
                    reasons[name] = NOT_ASKED
                    continue
                new = key not in self.known and self._due(key)
                if new or then is None:
                    answer = self._attempt(ask, way)
                if new and check(way, cast(Tensor, answer)):
                    self.known[key] = ""
                if then is not None:
                    answer = then(way)
                elif question not in self.grain:
                    self.grain[question] = self._grain(way, kind, index, asked)
                self.answered[(kind, *names)] = name, reasons
                self.evaluation.record_next = True
                return answer
            except Unsuitable as reason:
                reasons[name] = self.known[key] = str(reason)
        if self.mode != "auto" and reasons:
            listed = "; ".join(f"{way}: {reason}" for way, reason in reasons.items())
            raise RuntimeError(f"query_mode {self.mode!r} cannot query this model, 'loop' and 'auto' can ({listed})")
        self._tell(names, reasons)
        self.answered[(kind, *names)] = "loop", reasons
        self.grain.setdefault(question, GRAIN)
        return (then or ask)(self.loop)

    def _order(self, kind: str) -> tuple[str, ...]:
        """The ways to try, the cheapest first."""
        evaluation = self.evaluation
        if not evaluation.modules or evaluation.closure is not None or not evaluation.owns_parameters():
            return ()
        if kind == "descend" and self.mode == "auto":
            return ("structured",)  # copies for each single step cost more than the loop
        return {"loop": (), "batched": ("batched",)}.get(self.mode, ("structured", "batched"))

    def _pays(self, key: str, way: Way, kind: str, index: dict[str, Index], asked: int) -> bool:
        """Whether a way promises to be clearly cheaper than the loop for about so many points."""

        def weigh(way: Way) -> bool:
            self.evaluation.room()
            return way.seconds(kind, index, asked) < MARGIN * self.loop.seconds(kind, index, asked)

        key = f"{key} {kind} {asked.bit_length()}"
        if key not in self.known:
            self.known[key] = "" if self._attempt(weigh, way) else NOT_ASKED
        return not self.known[key]

    def _due(self, key: str) -> bool:
        """Whether to compare a way with the loop now: in the 1st, 2nd, 4th, 8th … step, while that decides nothing."""
        first = self.undecided.setdefault(key, self.evaluation.steps)
        return (self.evaluation.steps - first + 1).bit_count() == 1

    def _grain(self, way: Way, kind: str, index: dict[str, Index], asked: int) -> int:
        """How many points to ask for in one go at least, so that what a round takes beside them does not count."""
        if way.at_once(kind, index):
            return MOST
        try:
            return max(1, min(MOST, int(ENOUGH / way.seconds(kind, index, asked))))
        except Unsuitable:
            return MOST

    def _only_loop(self, index: dict[str, Index]) -> str:
        """Why only the loop is right, if that is so."""
        evaluation = self.evaluation
        if evaluation.compiled():
            return "the model is compiled"
        if torch.is_autocast_enabled(evaluation.device.type):
            return "autocast rounds the weights of each query"
        if any(evaluation.parameters[name].element_size() < 4 for name in index):
            return "in half precision the rounding of each query counts"
        return ""

    def _attempt(self, ask: Callable, way: Way) -> Any:
        """The answer of a way.

        Raises:
            Unsuitable: the way cannot answer, or vmap refuses the model. That comes back at a second try; an exception
                that does not is the user's own, and passes through. So does one that the plain model raises too.
        """
        try:
            return ask(way)
        except Unsuitable:
            raise
        except Exception as error:
            first = error
        try:
            ask(way)
        except Unsuitable:
            pass
        except Exception:
            self.evaluation.loss()
            raise Unsuitable(str(first).partition("\n")[0] or type(first).__name__) from first
        raise first

    def _agrees_at(self, way: Way, name: str, index: Tensor, losses: Tensor, shift: float) -> bool:
        """Whether a way could be compared with the loop at coordinates of one parameter; Unsuitable if they differ.

        It is at the one that changes the loss most, as far as was asked; and once for each parameter at those that
        change it most and least, and at some others, as far as the weights are large.
        """
        changes = (losses - self.evaluation.base).abs()
        asked = changes.argsort(descending=True)[:1]
        nearby = self.loop.coordinates(name, index[asked], [shift])[0]
        right = self._same(losses[asked], nearby)
        before = f"{type(way).__name__} {name}"
        if before in self.known:
            return right
        generator = Generator().manual_seed(0)
        drawn = torch.randperm(len(changes), generator=generator)[:SAMPLE].to(index.device)
        sample = index[: len(changes)][torch.cat([asked, changes.argsort()[:LEAST], drawn]).unique()]
        far = 4 * _size([self.evaluation.parameters[name]])
        mine = way.coordinates(name, sample, [far])[0]  # (P,)
        if self._same(mine, self.loop.coordinates(name, sample, [far])[0]):
            self.known[before] = ""
            return True
        # Hardly anything changed. If the loop sees that these weights matter together, then it should have.
        together = Directions.of(torch.ones(1, len(sample), device=index.device))
        along = self.loop.directions({name: sample}, together, [far])[0]
        if not self._differ(mine, self.evaluation.base).any() and self._differ(along, self.evaluation.base, 100).any():
            raise Unsuitable("it sees no change where the loop does")
        return False

    def _same(self, mine: Tensor, loop: Tensor) -> bool:
        """Whether losses of a way (P,) could be compared with those of the loop; Unsuitable if their changes differ."""
        if self._differ(mine, loop).any():
            raise Unsuitable("its losses are not those of the loop")
        return bool(self._differ(loop, self.evaluation.base, 10).any())

    def _differ(self, a: Tensor, b: Tensor, times: float = 1) -> Tensor:
        """Where two losses differ by more than a share of what changed, and so many times their rounding."""
        base = self.evaluation.base
        a, b = a.double(), b.double()
        rounding = ROUNDINGS[base.dtype] * torch.finfo(base.dtype).eps * base.double().abs().clamp_min(1)
        allowed = SHARE[base.dtype] * (b - base.double()).abs() + times * rounding
        return ~((a - b).abs() <= allowed) & ~(a.isnan() & b.isnan()) & (a != b)

    def _question(self, kind: str, names: list[str]) -> str:
        modes = [module.training for module in self.evaluation.modules.values()]
        sizes = [(t.dim(), t.numel().bit_length()) for t in tensors_in(self.evaluation.inputs)]
        kind = "coordinates" if kind == "descend" else kind
        return f"{kind} {crc32(repr((names, modes, sizes)).encode()):08x}"

    def _tell(self, names: list[str], reasons: dict[str, str]) -> None:
        """Warn once that queries are slow, and why."""
        if reasons and NOT_ASKED not in reasons.values() and not self.warned:
            self.warned = True
            listed = "; ".join(f"{way}: {reason}" for way, reason in reasons.items())
            message = f"queries of {names[0]!r} are asked one by one, which is right but slow ({listed})"
            warnings.warn(message, stacklevel=2)


def _size(parameters: list[Tensor]) -> float:
    """The root mean square of some weights; 0.1 where they are all 0."""
    total = sum(float(torch.linalg.vector_norm(p.detach())) ** 2 for p in parameters)
    return (total / sum(parameter.numel() for parameter in parameters)) ** 0.5 or 0.1
