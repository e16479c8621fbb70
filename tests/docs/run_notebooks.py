"""The notebooks, run from top to bottom. ``python tests/docs/run_notebooks.py [name …]`` writes them again with fresh outputs."""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# A warning is an error in the cells, as in all tests. Not in the kernel's own machinery, which would not even shut down.
_STRICT = "import warnings; warnings.simplefilter('error'); warnings.filterwarnings('ignore', module='ipykernel')"
BAR = "application/vnd.jupyter.widget-view+json"


def run_notebook(path: Path, folder: Path) -> Any:
    """A notebook with its outputs, run in a folder."""
    import nbclient

    nbformat: Any = importlib.import_module("nbformat")  # it has no types

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources, record_timing=False)
    client.extra_arguments = [f"--IPKernelApp.exec_lines={_STRICT}"]
    return client.execute()


def write_notebook(path: Path) -> None:
    """Run a notebook in an empty folder, and write it as it is committed: nothing of this machine in it, and nothing that is random."""
    nbformat: Any = importlib.import_module("nbformat")

    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"LMPROBE_CACHE_DIR": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1"}
        notebook = run_notebook(path, Path(folder))
        text = nbformat.writes(notebook).replace(f"{folder}/", "")
    drawn: dict[str, str] = {}  # xarray's tables name their parts by chance
    text = re.sub(
        r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\b",
        lambda found: drawn.setdefault(found[0], f"00000000-0000-4000-8000-{len(drawn):012}"),
        text,
    )
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:  # bars are for those who wait
        cell["outputs"] = [output for output in cell.get("outputs", []) if BAR not in output.get("data", {})]
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for notebook_path in NOTEBOOKS:
        if not sys.argv[1:] or notebook_path.stem in sys.argv[1:]:
            write_notebook(notebook_path)
