"""Diagrams: a point is a place in inches, and no text runs out of its box."""

import matplotlib
import pytest

from zo_tutorial import diagrams
from zo_tutorial.viz import use_style

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture
def ax():
    yield diagrams.canvas(4, 2)
    plt.close("all")


def test_a_point_is_a_place_in_inches(ax):
    corner, far = ax.transData.transform([(0, 0), (4, 2)]) / ax.figure.dpi
    assert list(corner) == pytest.approx([0, 0])
    assert list(far) == pytest.approx([4, 2])


@pytest.mark.parametrize("text, wide, high", [("two words", 0.3, 0.5), ("a\nb\nc", 1.0, 0.4), ("$\\theta$", 0.05, 0.5)])
def test_text_that_does_not_fit_is_refused(ax, text, wide, high):
    with pytest.raises(ValueError, match="inches, and the box has"):
        diagrams.box(ax, 1, 1, text, wide, high)
    diagrams.box(ax, 1, 1, text, 1.5, 1.0)


@pytest.mark.parametrize("draw", [diagrams.box, diagrams.node])
def test_an_unknown_fill_is_refused(ax, draw):
    with pytest.raises(KeyError, match="purple"):
        draw(ax, 1, 1, "x", *([1.0] if draw is diagrams.box else []), fill="purple")


@pytest.mark.parametrize("bend", [0.0, 0.4, -0.4])
@pytest.mark.parametrize("end", [(3, 1), (1, 1.8), (0.2, 0.3)])
def test_the_text_of_an_arrow_lies_on_it(ax, bend, end):
    diagrams.arrow(ax, (1, 1), end, "here", bend=bend)
    ends = ax.transData.transform([(1, 1), end])
    curve = ax.texts[0].arrow_patch.get_connectionstyle()(*ends, shrinkA=0, shrinkB=0).vertices  # (3, 2)
    words = next(text for text in ax.texts if text.get_text())
    place = ax.transData.transform(words.get_position())
    assert list(place) == pytest.approx(list((curve[0] + 2 * curve[1] + curve[2]) / 4))  # a quadratic arc at t = 1/2


def test_legs_are_solid_whatever_the_lines_of_curves_are():
    with matplotlib.rc_context():
        use_style()
        ax = diagrams.canvas(4, 2)
        for k in range(4):
            diagrams.leg(ax, (k, 0), (k, 1))
        assert {line.get_linestyle() for line in ax.lines} == {"-"}
    plt.close("all")
