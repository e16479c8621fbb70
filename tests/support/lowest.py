"""The lowest versions that pyproject.toml allows, as constraints for pip: ``python tests/support/lowest.py > constraints-lowest.txt``."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
HEAD: Final = """\
# The lowest version of each dependency that pyproject.toml allows, for `make test-lowest`; written by tests/support/lowest.py.
# torch is not here: on the index its old releases bring gigabytes of CUDA packages, so the release of constraints.txt is used.
"""
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?>=([0-9.]+)")


def lowest_versions(project: dict[str, Any]) -> dict[str, str]:
    """Name and lowest version of each dependency, optional ones included.

    Raises
    ------
    ValueError
        A dependency without a lowest version, or with two.
    """
    found: dict[str, str] = {}
    own = f"{project['name']}["
    for requirement in [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]:
        if requirement.startswith(own):
            continue
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lowest version of the form name>=1.2")
        name, version = match.groups()
        if found.setdefault(name, version) != version:
            raise ValueError(f"{name} has two lowest versions, {found[name]} and {version}")
    return found


def constraints() -> str:
    """The text of ``constraints-lowest.txt``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [f"{name}=={version}\n" for name, version in sorted(lowest_versions(project).items()) if name != "torch"]
    return HEAD + "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(constraints())
