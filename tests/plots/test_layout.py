"""Whatever is written in a picture lies inside of it, beside the axes and not over anything else, with one entry or with 120."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from drawn import assert_readable, texts

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.plots import plot_calibration, plot_cosine, plot_roc, plot_scores, plot_tokens, plot_transfer

matplotlib = pytest.importorskip("matplotlib")

LONG = "a_rather_long_name_of_a_probe_with_settings_{}_and_an_ending"


def names(n: int, *, long: bool) -> list[str]:
    return [LONG.format(i) if long else f"p{i}" for i in range(n)]


def scores(probes: list[str], n_layers: int = 4, n_folds: int = 3) -> xr.Dataset:
    dims = ("layer", "probe", "fold")
    values = np.random.default_rng(0).uniform(0.6, 0.9, size=(n_layers, len(probes), n_folds))
    kinds = ["control" if i % 2 else "probe" for i in range(len(probes))]
    coords = {"layer": np.arange(n_layers), "probe": probes, "fold": np.arange(n_folds), "kind": ("probe", kinds)}
    attrs = {
        "majority_share": 0.55,
        "model": "an-organisation/a-model-7B-Instruct",
        "labels": "truth of it",
        "variable": "resid_last_token",
    }
    return xr.Dataset({"accuracy": (dims, values)}, coords=coords, attrs=attrs)


@pytest.mark.few(1)
@pytest.mark.parametrize(("n", "long"), [(1, True), (3, False), (12, True), (40, False), (120, True)])
def test_scores_of_any_number_of_probes_can_be_read(n: int, long: bool) -> None:
    axes: Any = plot_scores(scores(names(n, long=long)))
    assert_readable(axes)
    assert len(axes.get_legend().get_texts()) == n + 1
    assert axes.figure.get_size_inches()[0] == pytest.approx(7)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "metric", ["accuracy", "the_share_of_prompts_that_are_scored_as_the_annotators_of_the_dataset_would_have_scored_them"]
)
def test_labels_and_titles_of_any_length_are_broken_into_lines(metric: str) -> None:
    given = scores(["a"]).rename(accuracy=metric).assign_attrs(model="m" * 200, labels="words of a title " * 20)
    axes = plot_scores(given, metric, baseline={"a baseline with a name that goes on and on and on and on and on and on": 0.7})
    assert_readable(axes)


def test_layers_with_names_and_layers_far_apart_have_ticks_that_do_not_touch() -> None:
    assert_readable(plot_scores(scores(["a"], 12).assign_coords(layer=[f"encoder block {i}" for i in range(12)])))
    apart = plot_scores(scores(["a"], 8).assign_coords(layer=[0, 1, 2, 3, 4, 5, 6, 500]))
    assert_readable(apart)
    assert [label.get_text() for label in apart.get_xticklabels()][-1] == "500"


@pytest.mark.few(1)
@pytest.mark.parametrize(("n", "long"), [(1, True), (12, True), (40, False)])
def test_curves_can_be_read(n: int, long: bool) -> None:
    rng = np.random.default_rng(0)
    rates = {name: (("curve", "point"), np.sort(rng.uniform(size=(n, 9)))) for name in ("true_positive_rate", "false_positive_rate")}
    curves = xr.Dataset({**rates, "auroc": ("curve", rng.uniform(size=n))}, coords={"curve": names(n, long=long)})
    assert_readable(plot_roc(curves))
    bins = {name: (("curve", "bin"), np.sort(rng.uniform(size=(n, 5)))) for name in ("predicted", "observed")}
    counts = np.ones((n, 5), int)
    calibration = xr.Dataset({**bins, "n": (("curve", "bin"), counts), "ece": ("curve", rng.uniform(size=n))}, coords=dict(curves.coords))
    assert_readable(plot_calibration(calibration))


@pytest.mark.few(1)
@pytest.mark.parametrize(("n", "long"), [(1, True), (3, True), (12, False), (40, False), (40, True), (120, True)])
def test_matrices_can_be_read_and_name_every_row_up_to_sixty(n: int, long: bool) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (n, n))
    given = names(n, long=long)
    axes = plot_cosine(xr.DataArray(values, dims=("direction", "other"), coords={"direction": given, "other": given}))
    assert_readable(axes)
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(shown)) == len(shown)
    assert n > 60 or len(shown) == n


def test_a_transfer_between_any_number_of_datasets_can_be_read() -> None:
    for n in (1, 4):
        values = np.random.default_rng(0).uniform(0.3, 1, (n, n))
        coords = {"train": names(n, long=True), "test": names(n, long=True), "layer": 16, "probe": "logistic_regression"}
        given = xr.Dataset({"accuracy": (("train", "test"), values)}, coords=coords, attrs={"cv": 5, "model": "meta/a-model-8B-Instruct"})
        assert_readable(plot_transfer(given))


@pytest.mark.few(1)
@pytest.mark.parametrize(("n", "layers"), [(1, 1), (3, 12), (12, 40), (64, 3), (120, 120)])
def test_tokens_can_be_read(n: int, layers: int) -> None:
    coords = {
        "layer": np.arange(layers),
        "position": ("token", np.arange(n)),
        "token_text": ("token", [f" extraordinarily{i}" for i in range(n)]),
        "model": "an-organisation/a-model-7B-Instruct",
    }
    attrs = {"classes": ["no", "a class with a rather long name"], "labels": "truth of the statement", "probe": "logistic_regression"}
    values = np.random.default_rng(0).normal(size=(layers, n))
    axes: Any = plot_tokens(xr.DataArray(values, dims=("layer", "token"), coords=coords, attrs=attrs))
    assert_readable(axes)
    assert axes.figure.get_size_inches()[0] <= 7.01
    if n <= 64:
        assert len({label.get_text() for label in axes.get_xticklabels()}) == n


@pytest.mark.few(1)
@pytest.mark.parametrize("n", [12, 120])
def test_in_axes_of_the_caller_the_legend_stays_inside_and_counts_what_it_leaves_out(n: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    for empty in figure.subplots(1, 2):
        plot_scores(scores(names(n, long=True)), ax=empty)
    figure.draw_without_rendering()
    axes: Any
    for axes in figure.axes:
        box, frame = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert (box.x0 >= frame.x0, box.x1 <= frame.x1 + 1, box.y0 >= frame.y0) == (True, True, True)
        assert box.height <= 0.5 * frame.height
        entries = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(entries) == n + 1 or entries[-1] == f"… and {n + 2 - len(entries)} more"
    inside = figure.bbox
    for text in texts(figure):
        assert inside.x0 - 1 <= text.get_window_extent().x0


def test_a_layer_with_a_single_score_has_no_band() -> None:
    given = scores(["a"])
    given.accuracy[1, 0, 1:] = np.nan
    axes = plot_scores(given)
    edges = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    assert not (edges[:, 0] == 1).any()
    assert {0.0, 2.0, 3.0} >= set(edges[:, 0]) >= {2.0, 3.0}
    single = plot_scores(given.isel(layer=[1]))
    assert not single.containers
    assert not single.collections


# -- in a paper ------------------------------------------------------------------------------------------------------------


def curves(n: int) -> tuple[xr.Dataset, xr.Dataset]:
    """ROC and calibration curves with long names."""
    rng = np.random.default_rng(0)
    rates = {name: (("curve", "point"), np.sort(rng.uniform(size=(n, 9)))) for name in ("true_positive_rate", "false_positive_rate")}
    roc = xr.Dataset({**rates, "auroc": ("curve", rng.uniform(size=n))}, coords={"curve": names(n, long=True)})
    bins = {name: (("curve", "bin"), np.sort(rng.uniform(size=(n, 5)))) for name in ("predicted", "observed")}
    counts = ("bin", np.ones(5, int))
    calibration = xr.Dataset({**bins, "ece": ("curve", rng.uniform(size=n))}, coords=dict(roc.coords)).assign(n=counts)
    return roc, calibration.assign(n=calibration.n.broadcast_like(calibration.predicted))


def tokens(n: int, layers: int, **columns: Any) -> xr.DataArray:
    coords = {
        "layer": np.arange(layers),
        "position": ("token", np.arange(n)),
        "token_text": ("token", [f" extraordinarily{i}" for i in range(n)]),
        **{name: ("token", values) for name, values in columns.items()},
    }
    return xr.DataArray(np.random.default_rng(0).normal(size=(layers, n)), dims=("layer", "token"), coords=coords, name="score")


def square(n: int) -> xr.DataArray:
    values = np.random.default_rng(0).uniform(-1, 1, (n, n))
    return xr.DataArray(values, dims=("direction", "other"), coords={"direction": names(n, long=True), "other": names(n, long=True)})


DRAWN: dict[str, Any] = {
    "scores": lambda **how: plot_scores(scores(names(6, long=True), 32), **how),
    "layers with a number each": lambda **how: plot_scores(scores(["a"], 16), **how),
    "fits that did not converge": lambda **how: plot_scores(
        scores(["logistic_regression"]).assign(converged=(("layer", "probe"), np.zeros((4, 1), bool))), **how
    ),
    "roc": lambda **how: plot_roc(curves(4)[0], **how),
    "calibration": lambda **how: plot_calibration(curves(4)[1], **how),
    "tokens": lambda **how: plot_tokens(tokens(24, 12), **how),
    "matrix": lambda **how: plot_cosine(square(6), **how),
    "large matrix": lambda **how: plot_cosine(square(40), **how),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize(("width", "inches", "letters"), [("page", 7.0, 9.0), ("column", 3.4, 8.0), (5.5, 5.5, 9.0)])
def test_a_figure_fits_a_page_or_a_column_with_letters_that_can_be_read(name: str, width: Any, inches: float, letters: float) -> None:
    axes = DRAWN[name](width=width)
    assert_readable(axes)
    assert axes.figure.get_size_inches()[0] <= inches + 0.02
    sizes = {text.get_fontsize() for text in texts(axes.figure)}
    assert min(sizes) >= 5
    assert max(sizes) <= letters
    assert axes.xaxis.label.get_fontsize() == letters


def test_sixteen_layers_in_a_column_are_numbered_in_even_steps() -> None:
    axes: Any = DRAWN["layers with a number each"](width="column")
    numbers = [int(label.get_text()) for label in axes.get_xticklabels()]
    assert len(set(np.diff(numbers))) == 1
    assert len(numbers) >= 6


def test_the_callers_size_of_letters_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 12.0)
    axes: Any = plot_scores(scores(["a"]), width="page")
    assert axes.xaxis.label.get_fontsize() == 12
    assert axes.get_xticklabels()[0].get_fontsize() == 12
    assert_readable(axes)
    monkeypatch.setitem(matplotlib.rcParams, "axes.labelsize", 7.0)
    assert plot_scores(scores(["a"])).xaxis.label.get_fontsize() == 7


@pytest.mark.parametrize("width", ["wide", 0.5, True, float("nan"), None])
def test_a_width_that_no_figure_can_have_is_refused(width: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"width=.*'page' \(7 inches\), 'column' \(3.4 inches\), or inches"):
        plot_scores(scores(["a"]), width=width)
