"""What Sphinx writes and screen readers stumble over, mended in the finished page.

The parameters of a signature, one a line, are a list without terms: spans instead. The entries
of a bibliography are no items of the list that they are in.
"""

import re

LINES = re.compile(r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>")


def mend(app, pagename, templatename, context, doctree):
    def spans(found):
        return f'<span class="sig-lines">{re.sub("dd>", "span>", found[1])}</span>'

    body = LINES.sub(spans, context.get("body", ""))
    context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    app.connect("html-page-context", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
