"""A table that a cell shows, with a caption above it and a number among the tables.

myst-nb puts what a cell with the metadata `mystnb: figure` shows into a figure, even a table.
What has a caption and no image is a table here: "Table 3.1", where it would be "Figure 3.1".
pandas gives the name of an index a row of its own below the heads; here it goes beside them.
"""

import re

from docutils import nodes
from sphinx.transforms import SphinxTransform
from sphinx.writers.html5 import HTML5Translator


class table_figure(nodes.figure):
    """A figure that Sphinx counts among the tables."""


class Tables(SphinxTransform):
    default_priority = 840  # before Sphinx notes the labels

    def apply(self, **kwargs):
        for node in self.document.findall(nodes.raw):
            if "dataframe" in node.astext():
                node.children = [nodes.Text(in_one_row(node.astext()))]
        for figure in list(self.document.findall(nodes.figure)):
            captions = [child for child in figure if isinstance(child, nodes.caption)]
            if captions and not any(figure.findall(nodes.image)):
                figure.__class__ = table_figure
                figure.remove(captions[0])
                end = nodes.raw("", "</figcaption>\n", format="html")
                figure[:0] = [captions[0], end]  # its start is written with the caption


ROW = r"\s*<tr[^>]*>(.*?)</tr>\s*"
HEADS = re.compile(rf"<thead>{ROW}{ROW}</thead>", re.DOTALL)


def in_one_row(html):
    """A table with two rows of heads, one of them, where no column has a head in both."""
    rows = HEADS.search(html)
    if rows is None or "span=" in rows[0]:
        return html
    above_and_below = (re.findall("<th>(.*?)</th>", row) for row in rows.groups())
    columns = list(zip(*above_and_below, strict=True))
    if any(map(all, columns)):
        return html
    heads = "".join(f"<th>{above or below}</th>" for above, below in columns)
    return html.replace(rows[0], f"<thead><tr>{heads}</tr></thead>")


def depart(translator, node):
    translator.body.append("</figure>\n")


def setup(app):
    html = HTML5Translator.visit_figure, depart
    app.add_enumerable_node(table_figure, "table", html=html)
    app.add_transform(Tables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
