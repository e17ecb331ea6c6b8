"""Moving coordinates one by one, with looks ahead: the estimator `sign` where looks are cheap."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from zo_tutorial.queries.evaluation import Evaluation

LOOK_AHEAD = 64  # the most coordinates that are tried ahead of a move


class Walk(Protocol):
    """Coordinates to be moved in turn: what the next ones would change, from where those before them stand."""

    def look(self, start: int, count: int) -> list[tuple[float, float]]:
        """The changes of the loss under s and −s of up to `count` coordinates from the start-th on, at least one."""
        ...

    def move(self, k: int, side: int) -> None:
        """The k-th coordinate makes its step: side 0 is s, side 1 is −s. It is one of those looked at last."""
        ...


def descend_ahead(
    evaluation: Evaluation,
    walk: Walk,
    name: str,
    positions: Tensor,
    shift: float,
    three_points: bool,
    running: float,
    counted: Callable[[float], float],
) -> float:
    """`Way.descend` that looks at several coordinates from one point, and again from behind the first that moves.

    What was looked at in vain is no query: the rule never asked for it.
    """
    start, ahead, moves = 0, 1, {}
    try:
        while start < len(positions):
            for k, (plus, minus) in enumerate(walk.look(start, ahead), start):
                side, loss = 0, counted(running + plus)
                if not loss < running:
                    side, loss = 1, counted(running + minus)
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
            evaluation.move(name, positions[list(moves)], list(moves.values()))
    return running
