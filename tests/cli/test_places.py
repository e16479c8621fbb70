"""What one command writes another one reads, and a place that cannot be written is refused before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from command_line import call, call_json

import lmprobe_zarr as lz
from lmprobe_zarr.cli import main
from lmprobe_zarr.cli.arguments import join_negative
from lmprobe_zarr.errors import InvalidArgumentError

N = 24


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("places") / "acts")
    rng = np.random.default_rng(0)
    split = ["train" if i % 3 else "test" for i in range(N)]
    lz.write_activations(
        lz.open_store(place),
        model="m",
        prompts=[f"t{i}" for i in range(N)],
        pooled={"resid_mean": {layer: rng.normal(size=(N, 4)) for layer in range(3)}},
        coords={"label": np.arange(N) % 2, "split": split},
    )
    return place


SWEEP = ["--probes", "mass_mean", "--cv", "2"]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["scores", "scores.zarr", "scores.v2/", "of the sweep"])
def test_report_opens_what_sweep_wrote_whatever_it_is_called(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    place = f"{tmp_path}/{name}"
    document = call_json(capsys, "sweep", stored, *SWEEP, "--out", place)
    code, _, err = call(capsys, "report", stored, "--scores", place, "-o", str(tmp_path / "page.html"))
    assert code == 0, err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for row in document["scores"]:
        assert f"{row['accuracy']:.4g}" in page


@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["netcdf", "no ending", "zarr 2", "zarr 3", "not consolidated"])
def test_report_opens_scores_by_what_is_stored(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    scores = lz.sweep(lz.open_store(stored).dataset().resid_mean, "label", "mass_mean", cv=2)
    place = tmp_path / {"netcdf": "a.nc", "no ending": "a", "zarr 2": "b", "zarr 3": "c.zarr", "not consolidated": "d"}[how]
    if how in ("netcdf", "no ending"):
        scores.to_netcdf(place)
    else:
        # zarr warns of consolidated metadata in its version 3 when it writes them; those that sweep writes are read above.
        options: Any = {"zarr 2": {"zarr_format": 2}, "zarr 3": {"zarr_format": 3, "consolidated": False}}.get(how, {"consolidated": False})
        # Texts of fixed width have no specification in Zarr 3 yet, of which zarr warns.
        written = scores.assign_coords({name: scores[name].astype(object) for name in scores.coords if scores[name].dtype.kind == "U"})
        written.to_zarr(place, **options)
    code, _, err = call(capsys, "report", stored, "--scores", str(place), "-o", str(tmp_path / "page.html"))
    assert code == 0, err
    assert "mass_mean" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("layers", ["-1", "-2,-1", "-2:", "-3:-1", "-1,0", ":-1"])
def test_layers_may_begin_with_a_minus(stored: str, capsys: pytest.CaptureFixture[str], layers: str) -> None:
    expected = {"-1": [2], "-2,-1": [1, 2], "-2:": [1, 2], "-3:-1": [0, 1], "-1,0": [2, 0], ":-1": [0, 1]}[layers]
    for options in (["--layers", layers], [f"--layers={layers}"]):
        plan = call_json(capsys, "sweep", stored, *options, *SWEEP, "--dry-run")
        assert sorted(plan["layers"]) == sorted(expected)


def test_every_command_with_layers_takes_them_from_the_end(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "publish", stored, str(tmp_path / "copy"), "--layers", "-2,-1")
    assert code == 0, err
    assert lz.open_store(tmp_path / "copy", mode="r").dataset().layer.values.tolist() == [1, 2]
    code, _, err = call(capsys, "export", "--from", stored, "--to", str(tmp_path / "cache"), "--layers", "-2,-1")
    assert "--layers" not in err


def test_only_numbers_are_joined_to_the_option_before_them() -> None:
    assert join_negative(["sweep", "s", "--layers", "-2,-1", "--json"]) == ["sweep", "s", "--layers=-2,-1", "--json"]
    assert join_negative(["report", "-o", "x", "--sample-mb", "-1.5"]) == ["report", "-o", "x", "--sample-mb=-1.5"]
    assert join_negative(["show", "--prompt", "-x"]) == ["show", "--prompt", "-x"]
    assert join_negative(["delete", "s", "-"]) == ["delete", "s", "-"]
    assert join_negative(["show", "--", "--layers", "-1,2"]) == ["show", "--", "--layers", "-1,2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "{tmp}/scores.jpg2"], "ending .jpg2 for a picture"),
        (["--plot", "{tmp}/scores"], "no ending for a picture"),
        (["--plot", "{tmp}/folder.png"], "is a folder"),
        (["--plot", "{tmp}/nowhere/a.png"], "does not exist"),
        (["--table", "{tmp}/scores.xlsx"], "ending .xlsx for a table"),
        (["--out", "{tmp}/scores.nc"], "folder of Zarr"),
        (["--out", "{tmp}/scores.csv"], "folder of Zarr"),
    ],
)
def test_a_wrong_ending_is_refused_before_anything_is_read_or_fitted(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("lmprobe_zarr.cli.sweep.open_to_read", lambda place: pytest.fail("opened"))
    for more in ([], ["--dry-run"]):
        code, out, err = call(capsys, "sweep", stored, *SWEEP, *(o.format(tmp=tmp_path) for o in options), *more)
        assert (code, out) == (1, "")
        assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("page.pdf", ".pdf"), ("page", "no ending"), ("nowhere/page.html", "does not exist"), ("folder.html", "is a folder")],
)
def test_the_place_of_a_report_is_checked_before_the_store_is_read(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    # The function of that name hides the module in its package.
    monkeypatch.setattr(sys.modules["lmprobe_zarr.reports.report"], "open_to_read", lambda place: pytest.fail("opened"))
    code, out, err = call(capsys, "report", stored, "-o", str(tmp_path / name))
    assert (code, out) == (1, "")
    assert message in err
    for path in (tmp_path / "nowhere" / "page.html", tmp_path / "folder.html"):
        with pytest.raises(InvalidArgumentError, match="cannot be written"):
            lz.report(stored, path)


def test_a_demo_whose_folder_is_a_file_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lmprobe_zarr.demo.bundled_model", lambda: pytest.fail("loaded"))
    assert main(["demo", "--store", str(tmp_path / "acts"), "--output", str(tmp_path / "file")]) == 1
    assert "no folder for the plot" in capsys.readouterr().err
    assert not (tmp_path / "acts").exists()


def test_a_single_score_has_no_spread(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sweep", stored, "--probes", "mass_mean", "--split", "split"]
    _, out, _ = call(capsys, *options)
    assert "±" not in out
    rows = call_json(capsys, *options)["scores"]
    assert {row["accuracy_std"] for row in rows} == {None}
    assert all(np.isfinite(row["accuracy"]) for row in rows)
    _, out, _ = call(capsys, "sweep", stored, *SWEEP)
    assert out.count("±") == 2 * 3


def test_a_score_of_a_single_fold_has_no_spread_in_any_table_or_report() -> None:
    from lmprobe_zarr.cli.sweep import _rows
    from lmprobe_zarr.sweeps.charts import draw_scores

    dims = ("layer", "probe", "fold")
    values = np.array([[[0.5, np.nan, np.nan]], [[0.5, 0.7, np.nan]]])
    coords = {"layer": [0, 1], "probe": ["p"], "kind": ("probe", ["probe"])}
    scores = xr.Dataset({"accuracy": (dims, values)}, coords=coords)
    first, second = _rows(scores, ["accuracy"])
    assert np.isnan(first["accuracy_std"])
    assert second["accuracy_std"] == pytest.approx(0.1)
    assert "±" not in scores.lz.table().iloc[0, 0]
    (chart,) = draw_scores(scores)
    low, high = chart.series[0].low, chart.series[0].high
    assert low is not None
    assert high is not None
    assert np.isnan([low[0], high[0]]).all()
    assert (low[1], high[1]) == (0.5, 0.7)
