"""Exercises that mark themselves."""

from math import isclose


def mark(answer, expected, rel: float = 0.01) -> bool:
    """Print whether an answer is right, and return it.

    Args:
        answer: the reader's answer; `...` while there is none.
        expected: what it must equal, numbers to within `rel`; or a function that takes the answer and says whether it
            is right.
        rel: relative tolerance for numbers.
    """
    if answer is ...:
        print("No answer yet: put yours in place of the dots.")
        return False
    if callable(expected):
        right = bool(expected(answer))
    elif isinstance(expected, int | float) and isinstance(answer, int | float):
        right = isclose(answer, expected, rel_tol=rel)
    else:
        right = answer == expected
    print("Right." if right else "Not yet. Try again, or open the solution.")
    return right
