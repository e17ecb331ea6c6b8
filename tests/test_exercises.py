"""The exercises of the book: each check takes its solution and rejects plausible wrong answers.

`tests/answers/CHAPTER.yml` holds for every exercise the right answer, as lines that take the place of `name = ...`, and
at least three wrong ones, each run after the right one, so that it need only say what it changes.
"""

import ast
import builtins
import re
import symtable
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


def needed(plain, later):
    """The plain cells on which the values depend that the texts `later` read; the notebook's own test runs them all."""
    calls = {}  # a function or class: the global names in it, read when it is called
    for source in plain:
        for table in symtable.symtable(source, "", "exec").get_children():
            calls.setdefault(table.get_name(), set()).update(globals_in(table))
    names, kept = with_calls(set().union(*map(reads, later)), calls), []
    for source in reversed(plain):
        bound = {one.get_name() for one in symtable.symtable(source, "", "exec").get_symbols() if is_bound(one)}
        if (bound | changed(source)) & names or "torch.set_" in source:
            names = with_calls((names - bound) | reads(source), calls)
            kept.insert(0, source)
    return kept


def is_bound(symbol):
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


def reads(source):
    """The global names that some code reads before it binds them, and those read in functions that it defines."""
    first = FirstReads()
    first.visit(ast.parse(source))
    inside = set().union(*map(globals_in, symtable.symtable(source, "", "exec").get_children()))
    return first.read | (inside - first.bound)


class FirstReads(ast.NodeVisitor):
    """In the order of execution: the names that the top level of a cell binds, and those that it reads before."""

    def __init__(self):
        self.read, self.bound = set(), set()

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load):
            self.read |= {node.id} - self.bound
        else:
            self.bound.add(node.id)

    def in_order(self, *parts):
        for part in parts:
            for node in part if isinstance(part, list) else [part]:
                self.visit(node)

    def visit_Assign(self, node):
        self.in_order(node.value, node.targets)

    def visit_AugAssign(self, node):
        self.read |= {each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)} - self.bound
        self.in_order(node.value, node.target)

    def visit_For(self, node):
        self.in_order(node.iter, node.target, node.body, node.orelse)

    def visit_comprehension(self, node):  # its variables are its own, and are dropped below
        self.in_order(node.iter, node.target, node.ifs)

    def visit_ListComp(self, node):
        outside, results = set(self.bound), [getattr(node, part, []) for part in ("key", "value", "elt")]
        self.in_order(node.generators, *results)
        self.bound = outside

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_FunctionDef(self, node):  # what its body reads, `globals_in` tells
        self.in_order(node.decorator_list, node.args.defaults, [each for each in node.args.kw_defaults if each])
        self.bound.add(node.name)

    def visit_ClassDef(self, node):
        self.in_order(node.decorator_list, node.bases)
        self.bound.add(node.name)

    def visit_Lambda(self, node):
        self.in_order(node.args.defaults, [each for each in node.args.kw_defaults if each])

    def visit_alias(self, node):
        self.bound.add((node.asname or node.name).split(".")[0])


def globals_in(table):
    here = {one.get_name() for one in table.get_symbols() if one.is_global()}
    return here.union(*map(globals_in, table.get_children()))


def with_calls(names, calls):
    while more := set().union(*(calls.get(name, ()) for name in names)) - names:
        names = names | more
    return names


def changed(source):
    """The names of objects that some code may change: x.a = …, x[i] = …, x.step(), train(x); drawing changes none."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            names.add(ast.unparse(node).split(".")[0].split("[")[0])
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            of = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            shown = of & {"plt", "ax", "axes", "print", "display", "explore", "pd"}
            names |= set() if shown else of - set(dir(builtins))
    return names


class Marks(list):
    """What `mark` returned, call by call."""

    def mark(self, *args, **options):
        self.append(zo_tutorial.exercises.mark(*args, **options))
        return self[-1]

    def of(self, source, namespace):
        self.clear()
        exec(source, namespace)
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
    texts = [source for cells in [*asked.values(), *solved.values()] for source in cells]
    texts += [answer for entry in answers.values() for answer in [entry["right"], *entry["wrong"]]]
    for source in needed(plain, texts):
        exec(source, namespace)
        plt.close("all")  # as the notebook does after each cell
    marks = Marks()
    namespace["mark"] = marks.mark
    for label, (*setting, question) in asked.items():
        for source in setting:
            exec(source, namespace)
        assert BLANK.search(question), f"{label}: no line for the reader to fill in"
        assert not any(marks.of(question, namespace)), f"{label}: no answer is marked right"
        for source in solved[label]:
            exec(source, namespace)
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
