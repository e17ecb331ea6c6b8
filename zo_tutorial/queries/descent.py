"""Moving coordinates one by one, with looks ahead: the estimator `sign` where looks are cheap."""

from typing import Protocol

from zo_tutorial.queries.evaluation import Evaluation
from zo_tutorial.queries.way import Moves

LOOK_AHEAD = 64  # the most coordinates that are tried ahead of a wrong guess
STAY = 2  # what a coordinate may do: its step s, −s, or none


class Walk(Protocol):
    """Coordinates to be moved in turn: what the next ones would change, on a path that is guessed."""

    def look(self, start: int, guesses: list[int], ahead: int) -> list[tuple[float, float, int]]:
        """The changes of the loss under s and −s of up to `ahead` coordinates from the start-th on, at least one.

        Each begins where those before it lead if they do what is guessed, which is returned too: 0 is s, 1 is −s, or
        `STAY`. It is up to the walk where `guesses` ends.
        """
        ...

    def go(self, k: int, side: int) -> None:
        """The k-th coordinate of the last look does this, and all before it did what was guessed."""
        ...


def descend_ahead(evaluation: Evaluation, walk: Walk, moves: Moves) -> float:
    """`Way.descend` that looks at several coordinates on a guessed path, and again from behind the first wrong guess.

    A guess is what the coordinate would have done on the path of the last look. What was looked at in vain is no query:
    the rule never asked for it.
    """
    start, ahead, running = 0, 1, moves.running
    moved: dict[int, float] = {}
    guesses: list[int] = []
    try:
        while start < len(moves.positions):
            changes = walk.look(start, guesses, min(ahead, len(moves.positions) - start))
            for k, (plus, minus, guess) in enumerate(changes):
                side, loss = 0, moves.counted(running + plus)
                if not loss < running:
                    side, loss = 1, moves.counted(running + minus)
                if loss < running or (side == 1 and not moves.three_points):
                    moved[start + k], running = (moves.shift, -moves.shift)[side], loss
                else:
                    side = STAY
                if side != guess:
                    break
            walk.go(k, side)
            ahead = min(2 * ahead, LOOK_AHEAD) if k + 1 == len(changes) else max(k + 1, ahead // 2)
            start += k + 1
            guesses = [_guess(plus, minus, moves.three_points) for plus, minus, _ in changes[k + 1 :]]
    finally:
        if moved:
            evaluation.move(moves.name, moves.positions[list(moved)], list(moved.values()))
    return running


def _guess(plus: float, minus: float, three_points: bool) -> int:
    """What a coordinate does whose steps change the loss so."""
    if plus < 0:
        return 0
    return 1 if minus < 0 or not three_points else STAY
