"""The book as it lies in the repository: what a reader on a code host, and the build, rely on."""

import ast
import html
import json
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from PIL import Image

from zo_tutorial.experiments.schema import Config

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted(path.stem for path in BOOK.glob("[0-9][0-9]_*.ipynb"))
PATH_OF_A_MACHINE = re.compile(r"(?<![\w.])/(home|Users|root|tmp|work|var|opt|usr|mnt)/|[A-Z]:\\\\?Users")
CODE = r"```\{?code.*?```|`[^`\n]*`"
LINK = re.compile(r"\[(?:[Cc]hapter )?(\d+)\]\((\d\d)_\w+\.ipynb(?:#[^)]+)?\)")
CITATION = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")


def toc_files():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]


def chapter_files():
    return [file for file in toc_files() if re.match(r"\d\d_", file)]


@cache
def read(chapter):
    return nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4)


def code_cells(chapter):
    return [cell for cell in read(chapter).cells if cell.cell_type == "code" and cell.source.strip()]


def prose(chapter):
    return "\n\n".join(cell.source for cell in read(chapter).cells if cell.cell_type == "markdown")


def outputs(chapter):
    """Each output that is displayed, with its cell."""
    for cell in code_cells(chapter):
        for output in cell.outputs:
            if output.output_type in ("display_data", "execute_result"):
                yield cell, output.data


# The table of contents


def test_both_tables_of_contents_are_the_same():
    # On a checkout without symlinks book/_toc.yml is a text file that names its target: README says what to do.
    assert (BOOK / "_toc.yml").read_text() == (ROOT / "_toc.yml").read_text()


def test_every_entry_of_the_table_of_contents_exists():
    for file in toc_files():
        assert any((BOOK / f"{file}{suffix}").is_file() for suffix in (".ipynb", ".md")), file


def test_every_page_is_in_the_table_of_contents():
    pages = {path.stem for path in BOOK.iterdir() if path.suffix in (".ipynb", ".md")}
    assert pages == set(toc_files())


def test_chapters_have_the_number_of_their_place():
    # Pages count the chapters of the table of contents; files, maps and links have the number in their text.
    assert [int(file[:2]) for file in chapter_files()] == list(range(1, len(CHAPTERS) + 1))
    assert chapter_files() == CHAPTERS


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_one_title_and_below_it_its_question(chapter):
    first = next(cell.source for cell in read(chapter).cells if cell.cell_type == "markdown")
    title, question = re.match(r"# (.+)\n\n\*(.+\?)\*\n", first).groups()
    for page, folder in (BOOK / "intro.md", ""), (ROOT / "README.md", "book/"):
        assert f"| {int(chapter[:2])} | [{title}]({folder}{chapter}.ipynb) | {question} |" in page.read_text()


def test_the_pictures_of_the_start_page_show_the_book_as_it_is(monkeypatch):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    import pictures

    drawn = {name: Image.open(BOOK / f"_static/{name}.png") for name in ("map", "learning")}
    told = {name: json.loads(image.info["Description"]) for name, image in drawn.items()}
    assert told["map"] == json.loads(json.dumps([pictures.needs(), pictures.titles()])), "run book/_ext/pictures.py"
    shares = {queries: share for queries, (_, share) in pictures.learning()[1].items()}
    assert shares == pytest.approx({int(queries): share for queries, (_, share) in told["learning"].items()}, abs=0.05)


# References between chapters


def without_code(text):
    return re.sub(CODE, " ", text, flags=re.DOTALL)


PAGES = [path.stem for path in sorted(BOOK.glob("*.md"))]


@pytest.mark.parametrize("page", [*CHAPTERS, *PAGES])
def test_a_chapter_is_named_by_a_link_that_has_its_number(page):
    text = without_code(prose(page) if page in CHAPTERS else (BOOK / f"{page}.md").read_text())
    assert [(number, file) for number, file in LINK.findall(text) if int(number) != int(file)] == []
    bare = re.findall(r"[Cc]hapters?\s\d+.{,30}", LINK.sub("", text))
    assert bare == [], "write [chapter 9](09_cheap_queries.ipynb), so that pages count it themselves"


@pytest.mark.parametrize("page", [*CHAPTERS, *PAGES])
def test_links_between_pages_lead_to_files(page):
    text = without_code(prose(page) if page in CHAPTERS else (BOOK / f"{page}.md").read_text())
    for file in re.findall(r"\]\(([\w/.]+\.(?:ipynb|md))(?:#[^)]+)?\)", text):
        assert (BOOK / file).is_file(), file


# Pitfalls


def test_every_pitfall_names_tests_that_exist_and_a_chapter():
    entries = re.split(r"^### ", (BOOK / "pitfalls.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) >= 9
    for entry in entries:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", entry)
        assert tests and "**Symptom**: " in entry and LINK.search(entry), entry
        for file, name in tests:
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), name


# Citations


def bib_keys():
    return re.findall(r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text(), flags=re.MULTILINE)


def test_the_references_page_lists_every_entry_once():
    assert len(set(bib_keys())) == len(bib_keys()) > 0
    assert ":all:" in (BOOK / "references.md").read_text()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_citations_have_an_entry(chapter):
    cited = {key.strip() for keys in CITATION.findall(prose(chapter)) for key in keys.split(",")}
    assert cited, "a chapter cites at least one source"
    assert cited <= set(bib_keys())


def test_citation_file_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == version("zo_tutorial")


# The notebooks as they are committed


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_outputs_are_committed_as_one_clean_run_leaves_them(chapter):
    cells = code_cells(chapter)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.get("text")
        assert "execution" not in cell.metadata, "times of day would change with every run"
        if "nbval-check-output" in cell.metadata.get("tags", []) or "NBVAL_CHECK_OUTPUT" in cell.source:
            assert cell.outputs, f"nothing to check: {cell.source}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_widget_is_stored(chapter):
    assert "widgets" not in read(chapter).metadata
    for _, data in outputs(chapter):
        assert not [mime for mime in data if "widget" in mime]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_path_of_a_machine(chapter):
    for cell in read(chapter).cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [output.get("text", "")] + [
                text for mime, text in output.get("data", {}).items() if mime == "text/plain"
            ]
        for text in texts:
            assert not PATH_OF_A_MACHINE.search(text), text


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_cells_are_short(chapter):
    lines = {cell.execution_count: len(cell.source.strip().splitlines()) for cell in code_cells(chapter)}
    assert {number: length for number, length in lines.items() if length > 15} == {}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_figures_have_captions_and_alternative_texts(chapter):
    for cell, data in outputs(chapter):
        if "zo-explore" in data.get("text/html", ""):
            page = data["text/html"]
            state = json.loads(html.unescape(page.split('data-state="')[1].split('"')[0]))
            assert all(state["alts"]) and 'alt=""' not in page, cell.source
        elif "image/png" in data:
            settings = cell.metadata.get("mystnb", {})
            assert settings.get("image", {}).get("alt"), f"no alternative text: {cell.source}"
            assert settings.get("figure", {}).get("caption"), f"no caption: {cell.source}"


# What every chapter has at least


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_starts_with_its_title(chapter):
    assert re.search(r"^# \S", read(chapter).cells[0].source, flags=re.MULTILINE)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_four_exercises_each_with_a_folded_solution(chapter):
    text = prose(chapter)
    exercises = re.findall(r"\{exercise(?:-start)?\}[^\n]*\n:label: (\S+)", text)
    solutions = re.findall(r"\{solution(?:-start)?\} *(\S+)\n((?::[^\n]*\n)*)", text)
    assert len(exercises) >= 4
    assert sorted(exercises) == sorted(label for label, _ in solutions)
    assert all(":class: dropdown" in options for _, options in solutions)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_three_checks_outside_the_solutions(chapter):
    checks, in_solution = 0, False
    for cell in read(chapter).cells:
        if cell.cell_type == "markdown":
            in_solution = (in_solution or "{solution-start}" in cell.source) and "{solution-end}" not in cell.source
        elif cell.cell_type == "code" and not in_solution:
            checks += any(is_check(node) for node in ast.walk(ast.parse(cell.source)))
    assert checks >= 3


def is_check(node):
    """`assert x`, or a call such as `torch.testing.assert_close(x, y)`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert_")
    return isinstance(node, ast.Assert)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_two_figures_and_a_slider(chapter):
    shown = [data for _, data in outputs(chapter)]
    sliders = ["zo-explore" in data.get("text/html", "") for data in shown]
    assert sum(sliders) >= 1
    assert sum("image/png" in data and not slider for data, slider in zip(shown, sliders, strict=True)) >= 2


# The page of configs


def test_the_page_of_configs_has_every_group_of_the_schema():
    named = re.findall(r"```\{config-keys\} (\w+)", (BOOK / "configs.md").read_text())
    assert sorted(named) == sorted(Config.model_json_schema()["$defs"])


def test_a_table_has_one_row_of_heads(monkeypatch):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    from tables import in_one_row

    plain = pd.DataFrame({"a": [1], "b": [2]})
    named, double = plain.rename_axis("n"), plain.set_index(["a", "b"]).assign(c=3)
    for table, heads in ((plain, ["", "a", "b"]), (named, ["n", "a", "b"]), (double, ["a", "b", "c"])):
        made = in_one_row(table.to_html())
        assert re.findall("<th>(.*?)</th>", made.split("</thead>")[0]) == heads
        assert made.split("</thead>")[1] == table.to_html().split("</thead>")[1]
    for unchanged in (named.rename_axis(columns="k"), pd.concat({"x": plain}, axis=1).rename_axis("n")):
        assert in_one_row(unchanged.to_html()) == unchanged.to_html()
