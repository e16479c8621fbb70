"""The constraints of ``make test-lowest`` are the lowest versions that the project declares."""

from __future__ import annotations

from typing import Any

import pytest
from lowest import ROOT, constraints, lowest_versions


def test_the_lowest_versions_are_those_of_the_project() -> None:
    assert (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8") == constraints()


def test_every_dependency_has_one_lowest_version() -> None:
    project: dict[str, Any] = {"name": "p", "dependencies": ["a[x]>=1.2"], "optional-dependencies": {"b": ["b>=3"], "all": ["p[b]"]}}
    assert lowest_versions(project) == {"a": "1.2", "b": "3"}
    for wrong, message in (("c", "no lowest"), ("c<2", "no lowest"), ("c>=1,<2", "no lowest"), ("b>=4", "two lowest")):
        with pytest.raises(ValueError, match=message):
            lowest_versions({**project, "optional-dependencies": {"b": ["b>=3", wrong]}})
