"""Exercises that mark themselves."""

from collections.abc import Sequence
from math import isclose
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def mark(answer: Any, expected: Any, rel: float = 0.01) -> bool:
    """Print whether an answer is right, and return it.

    Args:
        answer: the reader's answer; `...` while there is none.
        expected: what it must equal: a whole number exactly, another number to within `rel`, a sequence item by item.
            Or a function that takes the answer and says whether it is right.
        rel: relative tolerance for numbers that are not whole.
    """
    if answer is ...:
        print("No answer yet: put yours in place of the dots.")
        return False
    right = bool(expected(answer)) if callable(expected) else _equal(answer, expected, rel)
    print("Right." if right else "Not yet. Try again, or open the solution.")
    return right


def _equal(answer: Any, expected: Any, rel: float) -> bool:
    answer, expected = (x.tolist() if isinstance(x, Tensor) else x for x in (answer, expected))
    if isinstance(answer, bool) or isinstance(expected, bool):
        return answer is expected
    if isinstance(expected, Integral):
        return isinstance(answer, Real) and answer == expected
    if isinstance(expected, Real):
        return isinstance(answer, Real) and isclose(answer, expected, rel_tol=rel)
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        same_length = isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == len(expected)
        return same_length and all(_equal(*pair, rel) for pair in zip(answer, expected, strict=True))
    return bool(answer == expected)
