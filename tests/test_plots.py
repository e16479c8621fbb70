"""Pictures of scores. That they are good to look at is judged by eye; here: that they say what they must."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.plots import plot_scores, save_plot

matplotlib = pytest.importorskip("matplotlib")


def scores(n_layers: int = 6, probes: tuple[str, ...] = ("ridge", "lda"), n_folds: int = 3) -> xr.Dataset:
    values = np.random.default_rng(0).uniform(0.6, 0.9, size=(n_layers, len(probes), n_folds))
    dims = ("layer", "probe", "fold")
    return xr.Dataset(
        {"accuracy": (dims, values), "auroc": (dims, values + 0.05), "converged": (dims, np.ones(values.shape, dtype=bool))},
        coords={"layer": np.arange(n_layers), "probe": list(probes), "fold": np.arange(n_folds)},
        attrs={"majority_share": 0.55, "model": "a/model", "variable": "resid_mean", "labels": "tone"},
    )


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_line_is_the_mean_over_folds_and_its_band_reaches_from_the_lowest_to_the_highest() -> None:
    given = scores()
    axes: Any = plot_scores(given)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), given.accuracy.sel(probe="ridge").mean("fold"))
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(given.accuracy.sel(probe="ridge").min().item())
    assert edges.max() == pytest.approx(given.accuracy.sel(probe="ridge").max().item())


def test_axes_title_and_legend_say_what_is_drawn() -> None:
    axes: Any = plot_scores(scores(), baseline={"bag of words": 0.71})
    assert axes.get_xlabel() == "layer"
    assert axes.get_ylabel() == "accuracy\n(mean of 3 folds, band: lowest to highest)"
    assert axes.get_title() == "a/model · tone from resid_mean"
    assert legend(axes) == ["ridge", "lda", "majority class (0.55)", "bag of words (0.71)"]
    assert len({line.get_marker() for line in axes.lines[:2]}) == 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3", "4", "5"]


def test_chance_is_one_half_for_auroc_and_a_bare_number_is_a_baseline() -> None:
    axes: Any = plot_scores(scores(), "auroc", baseline=0.7)
    assert legend(axes)[2:] == ["chance (0.50)", "baseline (0.70)"]


def test_fits_that_did_not_converge_are_told() -> None:
    given = scores()
    given.converged[0, 1, 0] = False
    assert "lda (1 of 18 fits not converged)" in legend(plot_scores(given))


def test_a_single_layer_shows_points_side_by_side() -> None:
    axes: Any = plot_scores(scores(1))
    assert axes.lines[0].get_xdata()[0] < axes.containers[-1].lines[0].get_xdata()[0]
    assert "bar: lowest to highest" in axes.get_ylabel()


def test_eighty_layers_have_few_whole_ticks(tmp_path: Path) -> None:
    axes: Any = plot_scores(scores(80))
    save_plot(axes, tmp_path / "scores.png")
    ticks = axes.get_xticks()
    assert len(ticks) <= 14
    assert all(tick == int(tick) for tick in ticks)


def test_scores_that_are_nan_leave_a_gap_or_say_so() -> None:
    given = scores()
    given.auroc[:, 0] = np.nan
    assert "ridge (undefined)" in legend(plot_scores(given, "auroc"))


def test_given_axes_are_drawn_on() -> None:
    from matplotlib.figure import Figure

    mine = Figure().subplots()
    assert plot_scores(scores(), ax=mine) is mine


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.b.SVG", b"<?xml"), ("a.pdf", b"%PDF")])
def test_the_ending_says_how_a_picture_is_written(tmp_path: Path, name: str, start: bytes) -> None:
    save_plot(plot_scores(scores()), str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(start)


def test_dots_per_inch_give_the_width_in_pixels(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    part: Any = Figure(figsize=(4, 3)).subfigures(1, 2)
    save_plot(plot_scores(scores(), ax=part[0].subplots()), tmp_path / "a.png", dpi=50)
    assert imread(tmp_path / "a.png").shape[:2] == (150, 200)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pong", r"a.pong' has the ending .pong for a picture: .*one of .*\.pdf, .*\.png, .*\.svg"),
        ("scores", r"scores' has no ending .*\.png"),
        ("nowhere/a.png", r"nowhere/a.png' \(.*No such file.*\.png"),
        ("folder.png", r"folder.png' \(.*directory.*\.png"),
    ],
)
def test_a_picture_that_cannot_be_written_is_named_with_the_endings_that_can(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InvalidArgumentError, match=message):
        save_plot(plot_scores(scores()), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_picture_that_cannot_be_drawn_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"before")
    with pytest.raises(InvalidArgumentError, match=r"a\.png"):
        save_plot(plot_scores(scores()), tmp_path / "a.png", dpi=-1)
    assert (tmp_path / "a.png").read_bytes() == b"before"


def test_matplotlib_comes_when_something_is_drawn_nothing_global_changes_and_pyplot_stays_away() -> None:
    code = (
        "import sys, numpy as np, xarray as xr\n"
        "from lmprobe_zarr.plots import plot_scores\n"
        "light = 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        "before = repr(dict.items(matplotlib.rcParams))\n"
        "ones = (('layer', 'probe', 'fold'), np.ones((2, 1, 1)))\n"
        "d = xr.Dataset({'accuracy': ones}, coords={'layer': [0, 1], 'probe': ['a'], 'fold': [0]})\n"
        "plot_scores(d)\n"
        "print(light, before == repr(dict.items(matplotlib.rcParams)), 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "lmprobe-zarr\[plot\]"'):
        plot_scores(scores())


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"no score 'f1'.*accuracy, auroc"):
        plot_scores(scores(), "f1")
    with pytest.raises(InvalidTypeError, match="not DataArray"):
        plot_scores(scores().accuracy)
