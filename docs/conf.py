"""How Sphinx builds the site: `make docs`. The sections and the order of their pages are at the end of ``index.md``."""

import re
import shutil
import sys
from pathlib import Path

from sphinx import addnodes

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the notebooks' parser, and the package of this folder rather than one that is installed

project = "lmprobe-zarr"
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx_copybutton", "notebook_pages"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["templates", "static"]
default_role = "py:obj"  # a name in backticks leads to its entry in the reference, where it has one
nitpicky = True  # what a docstring names by a role, as in :func:`sweep`, has to be there
nitpick_ignore_regex = [("py:obj", ".*")]
highlight_language = "text"

myst_enable_extensions = ["alert", "attrs_inline"]
myst_heading_anchors = 4  # named as GitHub names them, so that a link to one works there and here

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings say them in words
autosummary_generate = False
numpydoc_show_class_members = False
maximum_signature_line_length = 120

html_theme = "pydata_sphinx_theme"
html_theme_options = {"navbar_center": [], "show_toc_level": 2, "footer_start": [], "footer_end": []}
html_sidebars = {"**": ["sections.html"]}
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
templates_path = ["templates"]


def _copy_notebooks(app, _config):
    """Sphinx reads pages below this folder alone, and the notebooks stand at the top of the project, where people look for them."""
    if Path(app.srcdir) == HERE:  # a test builds another folder with these settings
        shutil.rmtree(HERE / "notebooks", ignore_errors=True)
        (HERE / "notebooks").mkdir()
        for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
            shutil.copy2(notebook, HERE / "notebooks")


def _adapt_source(_app, _name, source):
    """Lead links to the folders of the site, and give a picture for light or dark ground the class that the theme hides on the other."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/").replace("](../docs/", "](../")
    source[0] = re.sub(r"(\]\([^)]*\.png)#(only-(?:light|dark))\)", r"\1){.\2}", source[0])


def _list_pages(app, _name, _template, context, _doctree):
    """Give the template of the sidebar the pages of each section."""
    trees = app.env.get_doctree("index").findall(addnodes.toctree)
    context["sections"] = [(tree["caption"], {name: title for title, name in tree["entries"]}) for tree in trees]


def setup(app):
    """Tell Sphinx what is done to each page."""
    app.connect("config-inited", _copy_notebooks)
    app.connect("source-read", _adapt_source)
    app.connect("html-page-context", _list_pages)
