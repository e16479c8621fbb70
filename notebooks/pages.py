"""Pages of the site from the notebooks as they are committed, outputs included. Nothing is run. A hook of mkdocs, named in ``mkdocs.yml``."""

import base64
import html
import json
import re
from pathlib import Path

from mkdocs.structure.files import File

FOLDER = Path(__file__).parent
# Outputs by the mark that stands for them in the page's Markdown, which would read HTML of others as its own.
_outputs = {}
_STYLE = """<style>
pre { font-family: var(--md-code-font-family, monospace); margin: 0; }
table.dataframe { border: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.dataframe :is(th, td) { border: 0; padding: 0.2em 0.8em; text-align: right; }
table.dataframe tbody tr:nth-child(odd) { background: var(--md-code-bg-color); }
</style>"""


def page_of(path):
    """The Markdown of a notebook, the HTML of its outputs by mark, and its pictures by name."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    blocks, outputs, pictures = [], {}, {}
    for cell in notebook["cells"]:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(
                source.replace("](../docs/", "](../").replace(".ipynb)", ".md)")
            )
            continue
        blocks.append(f"````python\n{source}\n````")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}/{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(_text(data["image/png"]))
                blocks.append(f"![{cell['metadata']['alt']}]({name})")
                continue
            mark = f"notebook-output-{path.stem}-{len(outputs) + 1}"
            outputs[mark] = (
                _text(data["text/html"]) if "text/html" in data else _plain(output)
            )
            blocks.append(
                f'<div class="notebook-output" id="{mark}" tabindex="0"></div>'
            )
    blocks.insert(
        1, f"[The notebook itself]({path.name}){{ .notebook-file download }}"
    )
    return "\n\n".join(blocks) + "\n", outputs, pictures


def on_files(files, config):
    """Adds each notebook as a page, its pictures, and the notebook itself to be downloaded."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        text, outputs, pictures = page_of(path)
        _outputs.update(outputs)
        files.append(
            File.generated(config, f"notebooks/{path.stem}.md", content=text)
        )
        files.append(
            File.generated(
                config, f"notebooks/{path.name}", content=path.read_bytes()
            )
        )
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def on_page_markdown(markdown, **_):
    """Links from pages to notebooks lead to their pages."""
    return re.sub(
        r"\]\((?:\.\./)?notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown
    )


def on_page_content(content, **_):
    """Puts the outputs in their places."""
    place = re.compile(r'(<div class="notebook-output" id="([\w-]+)"[^>]*>)')
    return place.sub(lambda found: found[1] + _apart(_outputs[found[2]]), content)


def _apart(output):
    """HTML with styles of its own, and the site's: in a shadow tree neither sees the other."""
    hosted = output.replace(":root", ":host")
    return f'<template shadowrootmode="open">{_STYLE}{hosted}</template>'


def _text(value):
    return value if isinstance(value, str) else "".join(value)


def _plain(output):
    text = (
        _text(output["text"])
        if output["output_type"] == "stream"
        else _text(output["data"]["text/plain"])
    )
    return f"<pre>{html.escape(text.rstrip())}</pre>"
