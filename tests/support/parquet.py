"""pyarrow for the tests that read Parquet, and for no other.

It lies in a folder of its own beside the packages (`make setup`): where pandas finds it, texts of data frames become strings of pyarrow,
and an import of pandas starts a thread, after which no script can be run in a forked child.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pandas as pd  # noqa: F401  (imported before, so that it does without)
import pytest

__all__ = ["with_pyarrow"]

FOLDER = Path(sys.prefix) / "parquet"
_kept: dict[str, ModuleType] = {}


@contextmanager
def with_pyarrow() -> Iterator[None]:
    """Whoever imports pyarrow within finds it; the test is skipped where it is not installed."""
    if find_spec("pyarrow") is not None:
        yield
        return
    if not (FOLDER / "pyarrow").is_dir():
        pytest.skip("pyarrow is not installed: pip install lmprobe-zarr[parquet]")
    sys.path.append(str(FOLDER))
    sys.modules.update(_kept)
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        # It cannot be loaded twice in a process, so what is loaded is kept.
        for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
            _kept[name] = sys.modules.pop(name)
