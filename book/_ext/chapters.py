"""References between chapters by their files: a page shows the number in the table of contents.

Notebooks link to a chapter as `[chapter 9](09_cheap_queries.ipynb)`, which reads on a code host
too. Should the number differ from the table of contents, the page has the right one, and
`tests/test_book.py` fails. Docstrings of the package say "Chapter 9" and no more: that becomes
such a link, to the file whose name starts with 09.
"""

import re

from docutils import nodes

FILE = re.compile(r"(?:.*/)?(\d\d_\w+)\.html(?:#.*)?")
NAMED = re.compile(r"[Cc]hapters? \d+(?:(?:, | and | to )\d+)*\b")
NUMBER = re.compile(r"([Cc]hapter )?(\d+)\b")


def renumber(app, doctree, docname):
    """Give links to chapters the chapter's number."""
    for link in doctree.findall(nodes.reference):
        target, text = FILE.fullmatch(link.get("refuri", "")), NUMBER.fullmatch(link.astext())
        if target and text:
            number = app.env.toc_secnumbers[target[1]][""][0]
            link.children = []
            link += nodes.Text(f"{text[1] or ''}{number}")


def link_docstrings(app, what, name, obj, options, lines):
    """Make links of the chapters that a docstring names."""
    files = {int(file[:2]): file for file in app.env.found_docs if file[:2].isdigit()}

    def link(number):
        file = files.get(int(number[2]))
        return f":doc:`{number[0]} </{file}>`" if file else number[0]

    lines[:] = [NAMED.sub(lambda named: NUMBER.sub(link, named[0]), line) for line in lines]


def setup(app):
    app.connect("doctree-resolved", renumber)
    app.connect("autodoc-process-docstring", link_docstrings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
