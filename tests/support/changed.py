"""The tests to run for files that changed: paths on standard input, one a line; test files and folders on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]


def select_tests(changed: Iterable[str]) -> list[str]:
    """Test files and folders for changed files, without doubles.

    A changed test runs itself. A module runs the test file of its name where there is one, and otherwise the whole folder of its room. Any
    other Python file, such as the shared code of tests, runs the tests of the package's surface.
    """
    found: dict[str, None] = {}
    for name in changed:
        path = PurePosixPath(name)
        if path.suffix != ".py" or path.parts[0] not in ("lmprobe_zarr", "tests"):
            continue
        if path.name.startswith("test_"):
            tests = path
        elif path.parts[0] == "tests":
            tests = PurePosixPath("tests/promises/test_package.py")
        else:
            folder = PurePosixPath("tests", *path.parts[1:-1])
            tests = folder / f"test_{path.name}"
            if not (ROOT / tests).exists():
                tests = folder if len(folder.parts) > 1 and (ROOT / folder).is_dir() else PurePosixPath("tests/promises/test_package.py")
        if (ROOT / tests).exists():
            found[str(tests)] = None
    folders = [f"{name}/" for name in found if not name.endswith(".py")]
    return [name for name in found if not any(name.startswith(folder) for folder in folders)]


if __name__ == "__main__":
    sys.stdout.write(" ".join(select_tests(line.strip() for line in sys.stdin)) + "\n")
