"""Scores of a sweep as a heat map: every cell is the mean of its folds, and what is marked says how it was chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from drawn import assert_readable

import lmprobe_zarr as lz  # noqa: F401 — registers .lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.plots import plot_heatmap
from lmprobe_zarr.plots.scores import NOT_RANKED, SMALLER_IS_BETTER
from lmprobe_zarr.probes.metrics import named_metrics, parse_metrics

matplotlib = pytest.importorskip("matplotlib")


def scores(n_layers: int = 6, probes: tuple[str, ...] = ("bag_of_words", "ridge", "lda"), n_folds: int = 3) -> xr.Dataset:
    """The first probe is a control."""
    dims = ("layer", "probe", "fold")
    values = np.random.default_rng(0).uniform(0.6, 0.9, size=(n_layers, len(probes), n_folds))
    kinds = ["control"] + ["probe"] * (len(probes) - 1)
    coords = {"layer": np.arange(n_layers), "probe": list(probes), "fold": np.arange(n_folds), "kind": ("probe", kinds)}
    attrs = {"majority_share": 0.55, "model": "a/model", "variable": "resid_mean", "labels": "tone"}
    return xr.Dataset({"accuracy": (dims, values), "log_loss": (dims, 1 - values)}, coords=coords, attrs=attrs)


def cells(axes: Any) -> Any:
    return axes.collections[0].get_array().filled(np.nan)


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def outlined(axes: Any) -> set[tuple[int, int]]:
    """Row and column of the cells that are outlined."""
    found = [patch.get_xy() for patch in axes.patches if patch.get_gid() == "best"]
    return {(round(y + 0.5), round(x + 0.5)) for x, y in found}


def remarks(axes: Any) -> str:
    return str(axes.figure.get_supxlabel()).replace("\n", " ")


def test_cells_are_means_over_folds_with_controls_below_the_probes() -> None:
    given = scores()
    axes: Any = given.lz.plot_heatmap()
    expected = np.stack([given.accuracy.sel(probe=name).values.mean(axis=-1) for name in ("ridge", "lda", "bag_of_words")])
    np.testing.assert_allclose(cells(axes), expected, rtol=1e-12)
    assert axes.yaxis_inverted()
    assert ticks(axes.yaxis) == ["ridge", "lda", "bag_of_words"]
    assert ticks(axes.xaxis) == ["0", "1", "2", "3", "4", "5"]
    assert axes.get_title() == "a/model · tone from resid_mean"
    assert "below the gap: controls" in remarks(axes)
    (gap,) = [line for line in axes.lines if line.get_gid() == "gap"]
    assert gap.get_ydata()[0] == 1.5
    numbers = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert numbers == {(row, column): f"{value:.2f}" for (row, column), value in np.ndenumerate(expected)}


def test_the_best_cell_of_each_row_is_outlined_and_said_to_be_too_good() -> None:
    given = scores()
    given.accuracy[:, 0] = 0.62  # a control that does not depend on the layer has no best one
    given.accuracy[1, 1] = given.accuracy[4, 1] = 0.95  # two are equally good
    axes: Any = plot_heatmap(given)
    lda = int(given.accuracy.sel(probe="lda").mean("fold").values.argmax())
    assert outlined(axes) == {(0, 1), (0, 4), (1, lda)}
    assert "outlined: best of its row, chosen by these very scores, and so too good" in remarks(axes)
    single: Any = plot_heatmap(given.isel(layer=[0]))
    assert (outlined(single), "outlined" in remarks(single)) == (set(), False)


def test_of_losses_the_least_is_the_best_and_the_lightest() -> None:
    given = scores()
    axes: Any = plot_heatmap(given, "log_loss")
    means = given.log_loss.sel(probe=["ridge", "lda", "bag_of_words"]).mean("fold").transpose("probe", "layer").values
    assert outlined(axes) == {(row, int(column)) for row, column in enumerate(means.argmin(axis=1))}
    mesh = axes.collections[0]
    light, dark = (sum(mesh.cmap(mesh.norm(value))[:3]) for value in (means.min(), means.max()))
    assert light > dark
    assert "less is better" in axes.figure.axes[1].get_ylabel()
    assert {
        name
        for task in ("classification", "regression")
        for name in named_metrics(task)
        if not parse_metrics(name, task, 2)[0].larger_is_better
    } == SMALLER_IS_BETTER
    assert not {name for task in ("classification", "regression") for name in named_metrics(task)} & NOT_RANKED


def test_a_cell_without_a_score_is_hatched_and_a_mean_of_some_folds_is_told() -> None:
    given = scores()
    given.accuracy[2, 1] = np.nan
    given.accuracy[3, 1, 0] = np.inf
    axes: Any = plot_heatmap(given)
    found = cells(axes)
    assert np.isnan(found[0, 2])
    assert np.isnan(found).sum() == 1
    assert found[0, 3] == pytest.approx(float(given.accuracy[3, 1, 1:].mean()))
    assert axes.patch.get_hatch() == "////"
    assert len(axes.texts) == 17
    assert "1 cell is the mean of some of the folds only: the others have no score" in remarks(axes)
    nothing: Any = plot_heatmap(given.assign(accuracy=given.accuracy * np.nan))
    assert (len(nothing.texts), outlined(nothing)) == (0, set())


def test_the_scale_has_room_for_guessing_which_a_line_marks() -> None:
    axes: Any = plot_heatmap(scores())
    mesh, bar = axes.collections[0], axes.figure.axes[1]
    means = cells(axes)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.55, pytest.approx(means.max()))
    assert {line.get_ydata()[0] for line in bar.lines} == {0.55}
    assert "line in the bar: majority class (0.55)" in remarks(axes)
    assert bar.get_ylabel() == "accuracy\n(mean of 3 folds)"


def test_rows_may_be_variables_or_strengths_and_what_is_selected_is_in_the_title() -> None:
    both = xr.concat([scores(), scores() + 0.01], "variable").assign_coords(variable=["resid_mean", "mlp_mean"])
    both = both.assign_attrs(scores().attrs)
    with pytest.raises(InvalidArgumentError, match=r"2 along 'variable': .*sel\(variable='resid_mean'\), or all of one probe with rows='v"):
        plot_heatmap(both)
    with pytest.raises(
        InvalidArgumentError, match=r"3 along 'probe': .*sel\(probe='bag_of_words'\), or all of one variable with rows='probe'"
    ):
        plot_heatmap(both, rows="variable")
    axes: Any = plot_heatmap(both.sel(probe="ridge"), rows="variable")
    np.testing.assert_allclose(cells(axes), both.accuracy.sel(probe="ridge").mean("fold").values, rtol=1e-12)
    assert ticks(axes.yaxis) == ["resid_mean", "mlp_mean"]
    assert (axes.get_title(), axes.get_ylabel()) == ("a/model · tone · ridge", "variable")
    strong = xr.concat([scores(), scores() + 0.01, scores() + 0.02], "strength").assign_coords(strength=[0.01, 1.0, 100.0])
    strong = strong.assign_attrs(scores().attrs)
    graded: Any = plot_heatmap(strong.sel(probe=["lda"]), rows="strength")
    assert ticks(graded.yaxis) == ["0.01", "1", "100"]
    assert plot_heatmap(strong.sel(probe="lda", strength=1.0)).get_title() == "a/model · tone from resid_mean · strength 1"
    with pytest.raises(InvalidArgumentError, match="rows='site' is no dim of the rows of 'accuracy': use one of 'probe', 'strength'"):
        plot_heatmap(strong, rows="site")


def test_seeds_are_more_folds_and_a_mean_over_folds_is_drawn_as_it_is() -> None:
    given = xr.concat([scores(), scores() + 0.01], "seed").assign_coords(seed=[0, 1])
    axes: Any = plot_heatmap(given)
    np.testing.assert_allclose(cells(axes)[0], given.accuracy.sel(probe="ridge").mean(("seed", "fold")).values, rtol=1e-12)
    assert "mean of 6 folds" in axes.figure.axes[1].get_ylabel()
    mean: Any = plot_heatmap(scores().mean("fold"))
    np.testing.assert_allclose(cells(mean)[0], scores().accuracy.mean("fold").sel(probe="ridge").values, rtol=1e-12)


def test_the_error_names_what_cannot_be_drawn() -> None:
    with pytest.raises(InvalidArgumentError, match="no score 'f1' over layer, probe and fold: use one of accuracy, log_loss"):
        plot_heatmap(scores(), "f1")
    with pytest.raises(InvalidTypeError, match="not DataArray"):
        plot_heatmap(scores().accuracy)
    chosen = xr.Dataset({"accuracy": ("probe", [0.5]), "chosen_layer": ("probe", [1])}, coords={"probe": ["a"]})
    with pytest.raises(InvalidArgumentError, match="chosen within each training fold"):
        plot_heatmap(chosen)


@pytest.mark.few(2)
@pytest.mark.parametrize("width", ["page", "column"])
@pytest.mark.parametrize(("n_probes", "n_layers"), [(1, 1), (3, 12), (40, 80)])
def test_a_heat_map_of_any_size_can_be_read(width: Any, n_probes: int, n_layers: int) -> None:
    names = tuple(f"a_rather_long_name_of_a_probe_with_settings_{i}_and_an_ending" for i in range(n_probes))
    axes: Any = plot_heatmap(scores(n_layers, names), width=width)
    assert_readable(axes)
    assert axes.figure.get_size_inches()[0] <= {"page": 7.0, "column": 3.4}[width] + 0.01
    assert len(set(ticks(axes.yaxis))) == n_probes
    if n_layers == 80:
        assert not axes.texts
        assert ticks(axes.xaxis)[:2] in (["0", "5"], ["0", "10"], ["0", "20"])


def test_numbers_stay_inside_of_their_cells() -> None:
    axes: Any = plot_heatmap(scores(18))
    axes.figure.draw_without_rendering()
    assert len(axes.texts) == 54
    cell = axes.get_window_extent().width / 18
    for text in axes.texts:
        assert text.get_window_extent().width <= cell
        assert text.get_fontsize() >= 5
