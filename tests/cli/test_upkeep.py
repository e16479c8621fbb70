"""Compaction, garbage and publishing on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from command_line import call, call_json
from stores import GROUP, make_batch

import lmprobe_zarr as lz


@pytest.fixture
def place(tmp_path: Path) -> str:
    store = lz.open_store(tmp_path / "s")
    for i in range(3):
        store.write(GROUP, make_batch([f"p{i}"], seed=i))
    return store.url


def test_publish_counts_parts_and_annotations_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = lz.open_store(tmp_path / "s")
    for name in ("one", "two"):
        store.write(GROUP, make_batch([f"{name} prompt"]))
    hashes = store.dataset().prompt.values.tolist()
    store.annotate(None, {"label": dict.fromkeys(hashes, 1)})
    store.annotate(None, {"tone": {hashes[0]: "calm"}})
    said = call_json(capsys, "publish", store.url, str(tmp_path / "copy"))
    view = lz.open_store(tmp_path / "copy").view(GROUP)
    assert (said["prompts"], said["parts"], said["annotations"]) == (2, len(view.parts), len(view.annotations))
    assert len(view.annotations) == 2
    code, out, _ = call(capsys, "publish", store.url, str(tmp_path / "copy"), "--overwrite", "--licence", "mit")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'copy'}: 2 prompts in {'1 part' if said['parts'] == 1 else '2 parts'}, 2 annotations, ")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "License: mit" in card
    assert str(tmp_path) not in card
    assert 'lz.open_store("…")' in card.replace("'", '"')
    assert "… is the place of this folder" in card


def test_compact_prints_its_plan_and_result(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    planned = call_json(capsys, "compact", place, "--dry-run")
    assert (planned["parts"], planned["parts_after"], planned["dry_run"]) == (3, 1, True)
    assert len(lz.open_store(place).view(GROUP).parts) == 3
    code, out, _ = call(capsys, "compact", place, "--model", "acme/toy")
    assert (code, "3 parts become 1" in out) == (0, True)
    assert call_json(capsys, "compact", place)["runs"] == []
    assert call(capsys, "compact", place, "--part-bytes", "0")[0] == 1


def test_gc_asks_for_confirmation_before_it_deletes(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "compact", place)
    code, out, err = call(capsys, "gc", place, "--max-age", "0")
    assert (code, out, "--yes" in err) == (1, "", True)
    assert len(call_json(capsys, "gc", place, "--max-age", "0", "--dry-run")["replaced"]) == 3
    assert call_json(capsys, "gc", place)["young"] == 3
    out = call(capsys, "gc", place, "--dry-run")[1]
    assert out.endswith("; 3 parts are too young to go: younger than 86400 seconds (--max-age 86400)\n")
    code, out, _ = call(capsys, "gc", place, "--max-age", "0", "--yes")
    assert (code, "3 replaced parts" in out) == (0, True)
    assert len(lz.open_store(place).list_parts(GROUP.name)) == 1


def test_publish_writes_a_copy_that_opens(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.txt").write_text("p0\np2\n")
    document = call_json(
        capsys, "publish", place, str(tmp_path / "some"), "--prompts", str(tmp_path / "some.txt"), "--layers", "0,3", "--no-text"
    )
    assert document["prompts"] == 2
    data = lz.open_store(tmp_path / "some").dataset()
    assert data.layer.values.tolist() == [0, 3]
    assert "text" not in data.coords
    code, out, _ = call(capsys, "publish", place, str(tmp_path / "all"))
    assert (code, "3 prompts in 1 part," in out) == (0, True)
    assert call(capsys, "publish", place, str(tmp_path / "all"))[0] == 1
    assert call(capsys, "publish", place, str(tmp_path / "all"), "--overwrite")[0] == 0
    assert (tmp_path / "all" / "index.html").exists()
    assert call(capsys, "publish", place, str(tmp_path / "all"), "--overwrite", "--no-page")[0] == 0
    assert not (tmp_path / "all" / "index.html").exists()


def test_publish_draws_scores_that_were_saved(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = xr.Dataset(
        {"accuracy": (("layer", "probe", "fold"), np.array([[[0.25, 0.75]], [[0.5, 1.0]]]))},
        {"layer": [0, 1], "probe": ["logistic_regression"]},
        {"model": "acme/toy"},
    )
    found.to_netcdf(tmp_path / "scores.nc")
    assert call(capsys, "publish", place, str(tmp_path / "copy"), "--scores", str(tmp_path / "scores.nc"))[0] == 0
    assert '<td class="lz-n">0</td><td>0.5</td>' in (tmp_path / "copy" / "index.html").read_text()
    code, _, err = call(capsys, "publish", place, str(tmp_path / "wrong"), "--scores", str(tmp_path / "nothing"))
    assert (code, "--scores" in err) == (1, True)
    assert not (tmp_path / "wrong").exists()
