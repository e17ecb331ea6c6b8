"""The exercises of the book: each check takes its solution and rejects plausible wrong answers.

`tests/answers/CHAPTER.yml` holds for every exercise the right answer, as lines that take the place of `name = ...`, and
at least three wrong ones, each run after the right one, so that it need only say what it changes.
"""

import linecache
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import yaml

import zo_tutorial.exercises

BOOK = Path(__file__).parent.parent / "book"
ANSWERS = Path(__file__).parent / "answers"
CHAPTERS = sorted(path.stem for path in BOOK.glob("[0-9][0-9]_*.ipynb"))
BLANK = re.compile(r"^\w+ = \.\.\..*\n?", flags=re.MULTILINE)  # the line that a reader fills in


def parts(chapter):
    """The chapter's code cells outside exercises, and of each exercise the cells that ask and those that solve."""
    plain, asked, solved, label, solving = [], {}, {}, None, False
    for cell in nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4).cells:
        if cell.cell_type == "markdown":
            if start := re.search(r"\{exercise(?:-start)?\}[^\n]*\n:label: (\S+)", cell.source):
                label, solving = start[1], False
                asked[label], solved[label] = [], []
            solving = solving or "{solution-start}" in cell.source
            if "{solution-end}" in cell.source:
                label, solving = None, False
        elif cell.source.strip():
            place = plain if label is None else solved[label] if solving else asked[label]
            place.append(cell.source)
    return plain, asked, solved


def execute(source, namespace):
    """Run a cell. As in a notebook, `inspect.getsource` finds its functions."""
    name = f"<cell {len(linecache.cache)}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    exec(compile(source, name, "exec"), namespace)


class Marks(list):
    """What `mark` returned, call by call."""

    def mark(self, *args, **options):
        self.append(zo_tutorial.exercises.mark(*args, **options))
        return self[-1]

    def of(self, source, namespace):
        self.clear()
        execute(source, namespace)
        return list(self)


@pytest.fixture(autouse=True)
def put_back():
    """Chapters set what holds for a whole process."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    with matplotlib.rc_context():
        yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_checks_take_the_solution_and_no_wrong_answer(chapter, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(BOOK)
    plain, asked, solved = parts(chapter)
    answers = yaml.safe_load((ANSWERS / f"{chapter}.yml").read_text())
    assert answers.keys() == asked.keys()
    namespace = {"__name__": chapter, "display": lambda *_: None}
    accepted = []
    for source in plain:
        execute(source, namespace)
        plt.close("all")  # as the notebook does after each cell
    marks = Marks()
    namespace["mark"] = marks.mark
    for label, (*setting, question) in asked.items():
        for source in setting:
            execute(source, namespace)
        assert BLANK.search(question), f"{label}: no line for the reader to fill in"
        assert not any(marks.of(question, namespace)), f"{label}: no answer is marked right"
        for source in solved[label]:
            execute(source, namespace)
        right, wrong = answers[label]["right"], answers[label]["wrong"]
        assert len(set(wrong)) >= 3, f"{label}: fewer than three wrong answers"
        heard = marks.of(filled(question, right), dict(namespace))
        assert heard and all(heard), f"{label}: its solution is rejected: {heard}"
        for answer in wrong:
            heard = marks.of(filled(question, f"{right}\n{answer}"), dict(namespace))
            if all(heard):
                accepted.append(f"{label} accepts:\n{answer}")
    assert not accepted, "\n".join(accepted)


def filled(question, answer):
    """The question's cell with an answer in place of its first blank line; the other blank lines go."""
    head, tail = BLANK.split(question, maxsplit=1)
    return head + answer + "\n" + BLANK.sub("", tail)


def test_at_least_four_exercises_a_chapter_and_three_wrong_answers_each():
    counted = [yaml.safe_load((ANSWERS / f"{chapter}.yml").read_text()) for chapter in CHAPTERS]
    exercises, wrong = sum(map(len, counted)), sum(len(one["wrong"]) for entries in counted for one in entries.values())
    print(f"{exercises} exercises, {wrong} wrong answers")
    assert exercises >= 4 * len(CHAPTERS) and wrong >= 3 * exercises
