"""Boxes, arrows, nodes and legs: what the book's diagrams are drawn with, on white and in the book's palette.

A diagram is laid out in inches: a point (x, y) of `canvas(width, height)` lies x inches from the left and y from the
bottom. matplotlib is imported where it is used, as in `zo_tutorial.viz`.
"""

from typing import Any

INK = "#222222"
# What a colour says, the same in every chapter: fills are pale, so that text in ink reads on them.
FILLS = {
    "plain": "white",  # a thing, or a step that everyone does alike
    "trained": "#f7d9c4",  # weights that are trained, or what a query changes
    "fixed": "#e8e8e8",  # weights that stay, or what need not be computed again
    "asked": "#cfe3f2",  # a query, and what answers it
    "good": "#cfe8dc",  # the outcome to have
}
MARK = "#A04000"  # for an arrow or a word that is the point of the picture


def canvas(width: float, height: float):
    """An empty drawing of so many inches, without axes. Returns its matplotlib Axes."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(width, height), layout="none")
    ax.set_position((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    return ax


def box(ax, x: float, y: float, text: str, wide: float, high=0.5, *, fill="plain", round=False, size=9) -> None:
    """A box around the point (x, y), with its text in the middle; `round` where it is a question or a state.

    Raises:
        KeyError: a fill that `FILLS` does not name.
        ValueError: the text does not fit.
    """
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.12" if round else "square,pad=0"
    corner = (x - wide / 2, y - high / 2)
    ax.add_patch(FancyBboxPatch(corner, wide, high, boxstyle=style, fc=FILLS[fill], ec=INK, lw=1.1, zorder=2))
    written = ax.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, zorder=3)
    extent = written.get_window_extent()
    width, height = extent.width / ax.figure.dpi, extent.height / ax.figure.dpi  # inches
    if width > wide or height > high:
        raise ValueError(f"{text!r} takes {width:.2f} by {height:.2f} inches, and the box has {wide:.2f} by {high:.2f}")


def arrow(ax, start: tuple, end: tuple, text: str = "", *, color=INK, bend: float = 0.0, size=8.5) -> None:
    """An arrow, its text on white over the middle; `bend` turns it into an arc, to the left where it is positive."""
    look: dict[str, Any] = {"arrowstyle": "-|>", "lw": 1.3, "color": color, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=look | {"connectionstyle": f"arc3,rad={-bend}"}, zorder=2)
    if text:
        (x, y), (to_x, to_y) = start, end
        # the middle of a quadratic arc lies half of `bend` times its chord beside the chord
        middle = ((x + to_x) / 2 - bend * (to_y - y) / 2, (y + to_y) / 2 + bend * (to_x - x) / 2)
        ax.text(*middle, text, ha="center", va="center", fontsize=size, color=color, zorder=3,
                bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip


def node(ax, x: float, y: float, text: str, *, fill="trained", radius: float = 0.22, size=9) -> None:
    """A tensor of a tensor network. Raises KeyError: a fill that `FILLS` does not name."""
    from matplotlib.patches import Circle

    ax.add_patch(Circle((x, y), radius, fc=FILLS[fill], ec=INK, lw=1.1, zorder=2))
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, zorder=3)


def leg(ax, start: tuple, end: tuple, text: str = "", *, aside: tuple = (0.0, 0.12), color=INK, size=8.5) -> None:
    """An index of a tensor network: a line, under the nodes that it joins; its text beside the middle, by `aside`."""
    (x, y), (to_x, to_y) = start, end
    ax.plot([x, to_x], [y, to_y], "-", color=color, lw=1.3, zorder=1)
    middle = ((x + to_x) / 2 + aside[0], (y + to_y) / 2 + aside[1])
    ax.text(*middle, text, ha="center", va="center", fontsize=size, color=color, zorder=3)
