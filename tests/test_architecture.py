"""The package keeps to the map in CONTRIBUTING.md: who may import whom, no circles, no long files."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from zo_tutorial import queries

ROOT = Path(__file__).parent.parent
LONGEST = 350  # lines
# A unit imports from those of earlier lines only. The package itself gathers the names that users import.
ARROWS = [
    {
        "data",
        "tensor",
        "directions",
        "randomness",
        "substitution",
        "temperature",
        "exercises",
        "viz",
        "diagrams",
        "workers",
    },
    {"models", "selection", "low_rank"},
    {"queries"},
    {"estimators"},
    {"optimizer", "pruning"},
    {"experiments", "bench"},
    {"__main__", ""},
]
RANK = {unit: rank for rank, units in enumerate(ARROWS) for unit in units}


def package():
    """{module: its source}; the name of a package is that of its __init__."""
    files = (ROOT / "zo_tutorial").rglob("*.py")
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return {name: file.read_text() for file, name in names.items()}


SOURCES = package()


def unit(module):
    return module.removeprefix("zo_tutorial").removeprefix(".").partition(".")[0]


def imports(module, sources, at_load=True):
    """What a module imports from the package, as {(module, name or None)}; at_load: not what its functions import."""
    found, ahead = set(), [ast.parse(sources[module])]
    inside = f"{module}." if any(other.startswith(f"{module}.") for other in sources) else module
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), inside.rpartition(".")[0])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add((whole, None) if whole in sources else (source, alias.name))
        if not (at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            ahead += ast.iter_child_nodes(node)
    return {(name, what) for name, what in found if name.partition(".")[0] == "zo_tutorial"}


def too_long(sources):
    return [module for module, source in sources.items() if len(source.splitlines()) > LONGEST]


def circle(sources):
    """Modules that import each other in a ring, when they are loaded."""
    graph = {module: {name for name, _ in imports(module, sources)} for module in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def against_the_arrows(sources):
    return [
        f"{module} imports {name}"
        for module in sources
        for name, _ in imports(module, sources, at_load=False)
        if unit(name) != unit(module) and RANK[unit(name)] >= RANK[unit(module)]
    ]


def past_the_face(sources):
    """Imports from inside of queries, or of what it does not offer."""
    return [
        f"{module} imports {what or 'all'} from {name}"
        for module in sources
        for name, what in imports(module, sources, at_load=False)
        if unit(name) == "queries" != unit(module)
        if name != "zo_tutorial.queries" or (what is not None and what not in queries.__all__)
    ]


RULES = [too_long, circle, against_the_arrows, past_the_face]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule):
    assert rule(SOURCES) == []


@pytest.mark.parametrize(
    "rule, module, source",
    [
        (too_long, "exercises", "x = 1\n" * (LONGEST + 1)),
        (circle, "tensor.formats", "from zo_tutorial.tensor.layers import TensorizedLinear"),
        (circle, "tensor.formats", "if True:\n    from . import layers"),
        (circle, "randomness", "from zo_tutorial import grasp"),
        (against_the_arrows, "queries.way", "import zo_tutorial.optimizer.base"),
        (against_the_arrows, "queries.way", "from zo_tutorial import pruning"),
        (against_the_arrows, "models.mnist", "from zo_tutorial.queries import LossQueries"),
        (against_the_arrows, "viz", "def draw():\n    from .bench import plot"),
        (against_the_arrows, "pruning", "from zo_tutorial.optimizer import ZO_SGD_mask"),
        (past_the_face, "bench", "from zo_tutorial.queries.loop import Loop"),
        (past_the_face, "bench", "def time():\n    from zo_tutorial.queries import Choice"),
        (past_the_face, "bench", "from zo_tutorial.queries import way"),
    ],
)
def test_the_rule_can_be_broken(rule, module, source):
    assert rule(SOURCES | {f"zo_tutorial.{module}": source})


def test_the_map_shows_every_unit():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    units = {unit(module) for module in SOURCES} - {""}
    assert units == RANK.keys() - {""}
    assert [name for name in units if f"{name}.py" not in text and f"{name}/" not in text] == []
