from __future__ import annotations

import io

import pytest

from lmprobe_zarr.display import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "enabled", "shown"), [(Terminal, True, True), (io.StringIO, True, False), (Terminal, False, False)])
def test_a_bar_is_shown_on_terminals_only_and_when_enabled(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], enabled: bool, shown: bool
) -> None:
    error = stream()
    monkeypatch.setattr("sys.stderr", error)
    with progress_bar(3, description="work", unit="step", enabled=enabled) as advance:
        advance(2)
        advance(1)
    assert ("3/3" in error.getvalue()) is shown
    assert bool(error.getvalue()) is shown
