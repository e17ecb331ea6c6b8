"""Moving coordinates one by one, with looks ahead: the estimator `sign` where looks are cheap."""

from typing import Protocol

from zo_tutorial.queries.evaluation import Evaluation
from zo_tutorial.queries.way import Moves

LOOK_AHEAD = 64  # the most coordinates that are tried ahead of a move


class Walk(Protocol):
    """Coordinates to be moved in turn: what the next ones would change, from where those before them stand."""

    def look(self, start: int, count: int) -> list[tuple[float, float]]:
        """The changes of the loss under s and −s of up to `count` coordinates from the start-th on, at least one."""
        ...

    def move(self, k: int, side: int) -> None:
        """The k-th coordinate makes its step: side 0 is s, side 1 is −s. It is one of those looked at last."""
        ...


def descend_ahead(evaluation: Evaluation, walk: Walk, moves: Moves) -> float:
    """`Way.descend` that looks at several coordinates from one point, and again from behind the first that moves.

    What was looked at in vain is no query: the rule never asked for it.
    """
    start, ahead, running = 0, 1, moves.running
    moved: dict[int, float] = {}
    try:
        while start < len(moves.positions):
            for k, (plus, minus) in enumerate(walk.look(start, ahead), start):
                side, loss = 0, moves.counted(running + plus)
                if not loss < running:
                    side, loss = 1, moves.counted(running + minus)
                if loss < running or (side == 1 and not moves.three_points):
                    walk.move(k, side)
                    moved[k], running = (moves.shift, -moves.shift)[side], loss
                    ahead = max(1, ahead // 2)
                    break
            else:
                ahead = min(2 * ahead, LOOK_AHEAD)
            start = k + 1
    finally:
        if moved:
            evaluation.move(moves.name, moves.positions[list(moved)], list(moved.values()))
    return running
