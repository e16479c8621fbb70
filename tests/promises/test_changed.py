"""`make check` runs the tests of what has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from changed import select_tests
from paths import TESTS


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["lmprobe_zarr/streaming/order.py"], ["tests/streaming/test_order.py"]),
        (["lmprobe_zarr/store/upkeep/gc.py", "docs/format.md"], ["tests/store/upkeep/test_gc.py"]),
        (["lmprobe_zarr/store/upkeep/removal.py"], ["tests/store/upkeep"]),
        (["lmprobe_zarr/store/upkeep/removal.py", "lmprobe_zarr/store/upkeep/gc.py"], ["tests/store/upkeep"]),
        (["lmprobe_zarr/config.py"], ["tests/test_config.py"]),
        (["lmprobe_zarr/errors.py"], ["tests/promises/test_package.py"]),
        (["tests/support/stores.py"], ["tests/promises/test_package.py"]),
        (["tests/cli/test_cli.py", "tests/cli/test_cli.py", "tests/gone/test_gone.py", "README.md"], ["tests/cli/test_cli.py"]),
        ([], []),
    ],
)
def test_a_changed_file_runs_its_tests(changed: list[str], expected: list[str]) -> None:
    assert select_tests(changed) == expected


def test_every_room_that_is_a_folder_has_a_folder_of_tests() -> None:
    rooms = {path.parent.relative_to(TESTS.parent / "lmprobe_zarr") for path in (TESTS.parent / "lmprobe_zarr").rglob("__init__.py")}
    missing = {str(room) for room in rooms if room != Path() and not (TESTS / room).is_dir()}
    assert missing <= {"plots", "store/parts"}, missing
