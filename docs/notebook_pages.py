"""Notebooks as pages of the site, as they are committed, outputs included. Nothing is run. An extension of Sphinx, named in ``conf.py``."""

import html
import json
from pathlib import Path

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser

_STYLE = """<style>
pre { font-family: var(--pst-font-family-monospace, monospace); margin: 0; }
table.dataframe { border: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.dataframe :is(th, td) { border: 0; padding: 0.2em 0.8em; text-align: right; }
table.dataframe tbody tr:nth-child(odd) { background: var(--pst-color-surface); }
</style>"""


def page_of(notebook, name):
    """The Markdown of a notebook, and the HTML of its outputs by the text that stands for each."""
    blocks, outputs = [], {}
    for cell in notebook["cells"]:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"````python\n{source}\n````")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(_text(data["image/png"]).split())
                blocks.append(f"![{cell['metadata']['alt']}](data:image/png;base64,{picture})")
                continue
            mark = f"output-{len(outputs) + 1}-of-{name}"
            outputs[mark] = _text(data["text/html"]) if "text/html" in data else _plain(output)
            blocks.append(mark)
    blocks.insert(1, f"{{download}}`The notebook itself <{name}.ipynb>`")
    return "\n\n".join(blocks) + "\n", outputs


class NotebookParser(MystParser):
    """Reads a notebook as the Markdown of its page."""

    supported = ("ipynb",)

    def parse(self, inputstring, document):
        """Parse the page, then put each output in its place: the parser of Markdown never sees HTML of others."""
        name = Path(document["source"]).stem
        text, outputs = page_of(json.loads(inputstring), name)
        super().parse(text, document)
        for paragraph in list(document.findall(nodes.paragraph)):
            if (mark := paragraph.astext()) in outputs:
                shown = f'<div class="notebook-output" id="{mark}" tabindex="0">{apart(outputs[mark])}</div>'
                paragraph.replace_self(nodes.raw("", shown, format="html"))


def apart(output):
    """HTML with styles of its own, and the site's: in a shadow tree neither sees the other."""
    hosted = output.replace(":root", ":host")
    return f'<template shadowrootmode="open">{_STYLE}{hosted}</template>'


def _text(value):
    return value if isinstance(value, str) else "".join(value)


def _plain(output):
    text = _text(output["text"]) if output["output_type"] == "stream" else _text(output["data"]["text/plain"])
    return f"<pre>{html.escape(text.rstrip())}</pre>"


def setup(app):
    """Tell Sphinx of the parser."""
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
