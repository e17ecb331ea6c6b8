"""No `assert` of a chapter reads a clock: a busy machine would break the book. Times are printed and drawn."""

import ast

import pytest
from test_book import CHAPTERS, code_cells

CLOCKS = {"perf_counter", "process_time", "monotonic"}


def stored(node):
    """The names that a piece of code binds: targets, and the variables of comprehensions."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}


def reads(node, timed):
    """Does a piece of code read a clock, or a name that holds what one said?"""
    timed = timed - stored(node)
    return any(getattr(one, "id", None) in timed or getattr(one, "attr", None) in CLOCKS for one in ast.walk(node))


def asks(function, timed):
    """Does a function ask a clock, or call a function that does?"""
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return any(getattr(one, "id", None) in timed or getattr(one, "attr", None) in CLOCKS for one in called)


def statements(node):
    """All statements in order, those inside functions left out. Where a loop ends, its variables are forgotten."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if not isinstance(child, ast.FunctionDef):
            yield from statements(child)
        if isinstance(child, ast.For):
            yield ast.Delete([child.target])


def bound(statement):
    """Pairs of a target and what is bound to it: tuples by elements; what is put into a list counts too."""
    match statement:
        case ast.For(target, iterable):
            yield target, iterable
        case ast.Delete([target]):
            yield target, ast.Tuple([])
        case ast.AugAssign(target, _, value):
            yield target, ast.Tuple([target, value])
        case ast.Expr(ast.Call(ast.Attribute(ast.Name() as filled, "append" | "extend"), arguments)):
            yield filled, ast.Tuple([filled, *arguments])
        case ast.Assign([ast.Subscript(ast.Name() as filled)], value):
            yield filled, ast.Tuple([filled, value])
        case ast.Assign([ast.Tuple(left)], ast.Tuple(right)) if len(left) == len(right):
            yield from zip(left, right, strict=True)
        case ast.Assign([target], value):
            yield target, value


def timed_claims(cells):
    """The `assert`s that depend on a clock, through whatever names and functions."""
    timed, found = set(), []
    for statement in (one for cell in cells for one in statements(ast.parse(cell))):
        if isinstance(statement, ast.FunctionDef):
            timed = timed - {statement.name} | ({statement.name} if asks(statement, timed) else set())
        for target, value in bound(statement):
            names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
            timed = timed | names if reads(value, timed) else timed - names
        if isinstance(statement, ast.Assert) and reads(statement, timed):
            found.append(ast.unparse(statement))
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_claim_of_a_chapter_reads_a_clock(chapter):
    assert timed_claims([cell.source for cell in code_cells(chapter)]) == []


@pytest.mark.parametrize(
    "use",
    [
        "assert seconds() < 1",
        "slow, n = seconds(), 3\nassert slow > n",
        "rates = []\nfor k in range(3):\n    rates.append(k / seconds())\nbest = max(rates)\nassert best > 2",
        "def rate(k):\n    return k / seconds()\n\n\nassert all(r > 1 for r in map(rate, range(3)))",
        "cost = {}\ncost['loop'] = seconds()\nfor name, taken in cost.items():\n    assert taken > 1, name",
    ],
)
def test_a_timed_claim_is_found(use):
    clock = "def seconds():\n    start = time.perf_counter()\n    return time.perf_counter() - start"
    assert len(timed_claims([clock, use])) == 1
    assert timed_claims([clock, use.replace("seconds()", "queries()")]) == []
