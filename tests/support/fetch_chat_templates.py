"""Chat templates of models, as the sources of llama-cpp-python carry them, into a folder: ``python fetch_chat_templates.py FOLDER``.

No installed package has those of SmolLM3. Only the templates are kept, and nothing is built.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Final

SOURCES: Final = "llama-cpp-python==0.3.36"
BELOW: Final = "vendor/llama.cpp/models/templates"


def main(folder: Path) -> None:
    """Fetch the sources with pip, and copy their templates."""
    with tempfile.TemporaryDirectory() as place:
        options = ["--quiet", "--no-deps", "--no-binary", SOURCES.partition("==")[0], "--dest", place]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, SOURCES], check=True)
        (archive,) = Path(place).glob("*.tar.gz")
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive) as sources:
            for member in sources:
                path = PurePosixPath(member.name)
                if member.isfile() and path.suffix == ".jinja" and str(path.parent).endswith(BELOW):
                    held = sources.extractfile(member)
                    assert held is not None
                    (folder / path.name).write_bytes(held.read())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
