"""The page on notation is true: every symbol of every equation is listed, and nothing that no equation uses."""

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).parent.parent / "book"
CHAPTERS = sorted(path.stem for path in BOOK.glob("[0-9][0-9]_*.ipynb"))
CODE = re.compile(r"```(?!\{math\}).*?```|`[^`\n]*`", re.DOTALL)  # of another fence than math
MATH = re.compile(r"\$\$(.+?)\$\$|```\{math\}(.+?)```|(?<!\$)\$([^$]+?)\$", re.DOTALL)
NAMES = r"\\(?:text\w*|mathrm|mathsf|operatorname\*?|label|begin|end|tag)\s*\{[^{}]*\}"
WORDS = re.compile(rf"{NAMES}|^:\w+:.*$", re.MULTILINE)
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
SCRIPT = re.compile(rf"[_^]\s*(?:{GROUP}|\\[A-Za-z]+|.)", re.DOTALL)
ACCENTS = "hat|widehat|tilde|bar|dot|mathbb|mathcal|mathbf|boldsymbol"
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho sigma "
    "tau phi varphi chi psi omega upsilon Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell odot otimes"
)
SYMBOL = re.compile(rf"\\(?:{ACCENTS})(?![A-Za-z])\s*\{{?\s*(?:\\[A-Za-z]+|[A-Za-z])\s*\}}?|\\[A-Za-z]+|[A-Za-z]")
EVERYWHERE = {r"\pi", "e", r"\mathbb{R}", "O"}  # constants


def symbols(text):
    """The symbols in the equations of a text, without what stands in their indices."""
    found = set()
    for formula in MATH.findall(text):
        bare = SCRIPT.sub(" ", WORDS.sub(" ", "".join(formula)))
        for symbol in SYMBOL.findall(bare):
            name = symbol.lstrip("\\")
            if symbol[0] != "\\" or name in GREEK.split():
                found.add(symbol)
            elif accent := re.fullmatch(rf"({ACCENTS})(?![A-Za-z])\s*\{{?\s*(\\?[A-Za-z]+)\s*\}}?", name):
                found.add(rf"\{accent[1]}{{{accent[2]}}}")
    return found - EVERYWHERE


@cache
def used(chapter):
    cells = nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4).cells
    return symbols("\n\n".join(CODE.sub(" ", cell.source) for cell in cells if cell.cell_type == "markdown"))


@cache
def listed():
    """{"": the symbols of all chapters, "01": those that chapter 1 has for itself, …}."""
    parts = re.split(r"^## \[Chapter (\d+)\].*$", (BOOK / "notation.md").read_text(), flags=re.MULTILINE)
    tables = {"": parts[0]} | {f"{int(number):02}": text for number, text in zip(parts[1::2], parts[2::2], strict=True)}
    rows = {key: re.findall(r"^\| *(\$.*?\$[^|]*)\|", text, flags=re.MULTILINE) for key, text in tables.items()}
    return {key: set().union(*map(symbols, found)) for key, found in rows.items()}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_symbol_is_listed(chapter):
    missing = used(chapter) - listed()[""] - listed().get(chapter[:2], set())
    assert not missing


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_symbol_is_listed_in_vain(chapter):
    assert not listed().get(chapter[:2], set()) - used(chapter)


def test_the_symbols_of_all_chapters_are_those_of_several():
    lonely = {symbol for symbol in listed()[""] if sum(symbol in used(chapter) for chapter in CHAPTERS) < 2}
    assert not lonely


def test_symbols_are_read_off_equations():
    text = (
        r"With $\hat g_k = \frac{1}{n} \sum_i s_i u^{(i)}$ and $$\mathbb{E}\,\bar{z}^2 \le \lambda_{\max}"
        r"\text{ for all } x$$"
    )
    assert symbols(text) == {r"\hat{g}", "n", "s", "u", r"\mathbb{E}", r"\bar{z}", r"\lambda", "x"}
