"""Pictures of scores. That they are good to look at is judged by eye; here: that they say what they must."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, MissingDependencyError
from lmprobe_zarr.plots import plot_calibration, plot_cosine, plot_roc, plot_scores, plot_tokens, plot_transfer, save_plot
from lmprobe_zarr.probes import calibration_curves, roc_curves

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


def test_a_plot_notes_fits_that_did_not_converge() -> None:
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


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.b.SVG", b"<?xml"), ("a.pdf", b"%PDF")])
def test_the_file_ending_chooses_the_format_of_a_plot(tmp_path: Path, name: str, start: bytes) -> None:
    save_plot(plot_scores(scores()), str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(start)


def test_dots_per_inch_give_the_width_in_pixels(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    part: Any = Figure(figsize=(4, 3)).subfigures(1, 2)
    save_plot(plot_scores(scores(), ax=part[0].subplots()), tmp_path / "a.png", dpi=50)
    assert imread(tmp_path / "a.png").shape[:2] == (150, 200)


@pytest.mark.few(1)
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


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "lmprobe-zarr\[plot\]"'):
        plot_scores(scores())


def test_the_error_names_what_cannot_be_plotted() -> None:
    with pytest.raises(InvalidArgumentError, match=r"no score 'f1'.*accuracy, auroc"):
        plot_scores(scores(), "f1")
    with pytest.raises(InvalidTypeError, match="not DataArray"):
        plot_scores(scores().accuracy)


# -- controls and intervals ------------------------------------------------------------------------------------------------


def test_controls_are_grey_with_open_markers_and_differ_without_colour() -> None:
    given = scores(probes=("ridge", "lda", "shuffled labels", "bag of words"))
    given = given.assign_coords(kind=("probe", ["probe", "probe", "control", "control"]))
    axes: Any = plot_scores(given)
    lines = axes.lines[:4]
    assert legend(axes)[:4] == ["ridge", "lda", "shuffled labels (control)", "bag of words (control)"]
    ground = matplotlib.colors.to_rgb(axes.get_facecolor())
    assert [matplotlib.colors.to_rgb(line.get_markerfacecolor()) == ground for line in lines] == [False, False, True, True]
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in lines}) == 4
    assert len({line.get_marker() for line in lines}) == 4
    for line in lines[2:]:
        red, green, blue = matplotlib.colors.to_rgb(line.get_color())
        assert red == green == blue


def test_intervals_are_the_bands_where_they_are_given() -> None:
    given = scores()
    mean = given.accuracy.mean("fold")
    bounds = xr.concat([mean - 0.2, mean, mean + 0.1], "bound").assign_coords(bound=["lower", "estimate", "upper"])
    intervals = bounds.to_dataset(name="accuracy").isel(layer=slice(None, None, -1)).assign_attrs(level=0.95)
    axes: Any = plot_scores(given, intervals=intervals)
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(float(mean.sel(probe="ridge").min()) - 0.2)
    assert edges.max() == pytest.approx(float(mean.sel(probe="ridge").max()) + 0.1)
    assert axes.get_ylabel() == "accuracy\n(mean of 3 folds, band: 95 % interval)"
    assert "bar: 95 % interval" in plot_scores(given.isel(layer=[0]), intervals=intervals).get_ylabel()
    with pytest.raises(InvalidArgumentError, match="no 'auroc' over layer, probe and bound"):
        plot_scores(given, "auroc", intervals=intervals)


def test_seeds_are_more_folds_and_other_dims_are_drawn_one_at_a_time() -> None:
    given = xr.concat([scores(), scores() + 0.01], "seed").assign_coords(seed=[0, 1])
    given = given.assign(given.astype(float)).assign_attrs(scores().attrs)
    axes: Any = plot_scores(given.drop_vars("converged"))
    assert "mean of 6 folds" in axes.get_ylabel()
    sites = given.drop_vars("converged").rename(seed="site").assign_coords(site=["resid", "mlp"])
    with pytest.raises(InvalidArgumentError, match=r"2 along 'site': .*scores.sel\(site='resid'\)"):
        plot_scores(sites)
    assert plot_scores(sites.sel(site=["mlp"])).get_xlabel() == "layer"


# -- tokens ----------------------------------------------------------------------------------------------------------------


def token_scores(n: int = 5, layers: tuple[int, ...] = (4, 8, 16), texts: list[str] | None = None) -> xr.DataArray:
    coords: dict[str, Any] = {
        "layer": list(layers),
        "prompt": ("token", ["aaaa"] * n),
        "position": ("token", np.arange(n)),
        "token_text": ("token", texts or [f"t{i}" for i in range(n)]),
        "model": "a/model",
    }
    attrs = {"classes": ["false", "true"], "labels": "truth", "probe": "lda"}
    values = np.random.default_rng(0).normal(size=(len(layers), n))
    return xr.DataArray(values, dims=("layer", "token"), coords=coords, attrs=attrs, name="score")


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_heat_map_of_tokens_shows_every_value_at_its_layer_and_token() -> None:
    given = token_scores(5, texts=["The", " quick", "\n", "$5$", "an extraordinarily long one"])
    given[1, 2] = np.nan
    axes: Any = plot_tokens(given)
    mesh = axes.collections[0]
    np.testing.assert_allclose(mesh.get_array().filled(np.nan), given.values)
    assert mesh.norm.vmin == -mesh.norm.vmax == pytest.approx(-float(np.abs(given).max()))
    assert ticks(axes.xaxis) == ["The", "␣quick", "↵", r"\$5\$", "an␣extraordinar…"]
    assert ticks(axes.yaxis) == ["4", "8", "16"]
    assert axes.get_title() == "a/model · truth · lda"
    assert axes.figure.axes[1].get_ylabel() == "score (above 0: true)"
    assert axes.patch.get_hatch() == "////"


def test_weights_of_tokens_are_drawn_from_zero_on() -> None:
    given = abs(token_scores(5)).rename("weight").assign_attrs(token_scores().attrs)
    axes: Any = plot_tokens(given)
    mesh = axes.collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, pytest.approx(float(given.max())))
    assert axes.figure.axes[1].get_ylabel() == "weight in its prompt"
    assert axes.get_title() == "a/model · truth · lda"
    with pytest.raises(InvalidArgumentError, match="select one class or head"):
        plot_tokens(given.expand_dims(head=2))


def test_many_tokens_and_layers_have_few_ticks_that_people_count_in(tmp_path: Path) -> None:
    axes: Any = plot_tokens(token_scores(300, tuple(range(80))))
    save_plot(axes, tmp_path / "tokens.png")
    assert ticks(axes.xaxis)[:3] == ["0", "20", "40"]
    assert ticks(axes.yaxis)[:3] == ["0", "5", "10"]
    assert axes.get_xlabel() == "position of the token"


@pytest.mark.few(1)
@pytest.mark.parametrize("n", [2, 30, 64])
def test_names_of_tokens_do_not_overlap(n: int) -> None:
    axes: Any = plot_tokens(token_scores(n, texts=[f" extraordinarily{i}" for i in range(n)]))
    axes.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(box.x1 <= other.x0 + 1 for box, other in pairwise(boxes))


def test_one_prompt_of_several_is_chosen_by_hash_or_text() -> None:
    from lmprobe_zarr.batch import prompt_hash

    both = xr.concat([token_scores(3), token_scores(2).assign_coords(prompt=("token", [prompt_hash("a text")] * 2))], "token")
    with pytest.raises(InvalidArgumentError, match="tokens of 2 prompts"):
        plot_tokens(both)
    assert len(ticks(plot_tokens(both, "a text").xaxis)) == 2
    assert len(ticks(plot_tokens(both, "aaaa").xaxis)) == 3
    with pytest.raises(InvalidArgumentError, match="no scores of that prompt"):
        plot_tokens(both, "another")
    with pytest.raises(InvalidArgumentError, match=r"expected \(layer, token\)"):
        plot_tokens(both.expand_dims("class"))
    with pytest.raises(InvalidTypeError, match="not Dataset"):
        plot_tokens(both.to_dataset())  # type: ignore[arg-type]


# -- curves and matrices ---------------------------------------------------------------------------------------------------


def test_roc_curves_are_scikit_learns_and_say_their_area() -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    rng = np.random.default_rng(0)
    y = np.array(["no", "yes"])[rng.integers(0, 2, 50)]
    given = xr.DataArray(
        rng.normal(size=(2, 50)) + (y == "yes"), dims=("layer", "prompt"), coords={"layer": [3, 7], "label": ("prompt", y)}
    )
    curves = roc_curves(given, "label")
    axes: Any = plot_roc(curves)
    for number, layer in enumerate((3, 7)):
        fpr, tpr, _ = roc_curve(y == "yes", given[number])
        np.testing.assert_allclose(axes.lines[1 + number].get_xdata(), fpr)
        np.testing.assert_allclose(axes.lines[1 + number].get_ydata(), tpr)
        assert legend(axes)[1 + number] == f"layer {layer} ({roc_auc_score(y == 'yes', given[number]):.2f})"
    named = roc_curves({"a": given[0], "b": given[1].values}, y)
    np.testing.assert_allclose(named.auroc, curves.auroc)
    with pytest.raises(LabelError, match="one label per score"):
        roc_curves({"a": given[0]}, y[:-1])
    with pytest.raises(LabelError, match="1 classes"):
        roc_curves({"a": given[0]}, np.zeros(50))
    with pytest.raises(InvalidTypeError, match="roc_curves"):
        plot_roc(given.to_dataset(name="a"))


def test_calibration_curves_are_the_shares_by_bin() -> None:
    given = np.array([0.05, 0.05, 0.15, 0.95, 0.95, 0.95, 1.0])
    true = np.array([0, 1, 0, 1, 1, 0, 1])
    curves = calibration_curves({"a": given}, true)
    np.testing.assert_allclose(curves.observed[0, [0, 1, 9]], [0.5, 0, 0.75])
    np.testing.assert_allclose(curves.predicted[0, [0, 1, 9]], [0.05, 0.15, 3.85 / 4])
    assert curves.n[0].values.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 4]
    assert curves.ece[0] == pytest.approx((2 * 0.45 + 0.15 + 4 * (3.85 / 4 - 0.75)) / 7)
    axes: Any = plot_calibration(curves)
    assert legend(axes) == ["calibrated", f"a (ECE {float(curves.ece[0]):.2f})"]
    with pytest.raises(InvalidArgumentError, match="no probabilities"):
        calibration_curves({"a": given * 2}, true)


def test_a_transfer_matrix_has_training_sets_as_rows_and_a_number_in_each_cell() -> None:
    values = np.array([[0.9, 0.6], [np.nan, 0.8]])[None, None]
    given = xr.Dataset(
        {"accuracy": (("layer", "probe", "train", "test"), values)},
        coords={"layer": [16], "probe": ["lda"], "train": ["a", "b"], "test": ["a", "b"]},
        attrs={"cv": 5},
    )
    axes: Any = plot_transfer(given)
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {((0, 0), "0.90"), ((1, 0), "0.60"), ((1, 1), "0.80")}
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("fitted on", "tested on (diagonal: 5 folds)")
    assert axes.get_title() == "lda · layer 16"
    assert axes.yaxis_inverted()
    two = xr.concat([given, given.assign_coords(layer=[17])], "layer")
    with pytest.raises(InvalidArgumentError, match=r"2 along 'layer'.*sel\(layer=16\)"):
        plot_transfer(two)
    with pytest.raises(InvalidArgumentError, match="'f1'"):
        plot_transfer(given, "f1")


def test_cosines_are_drawn_from_minus_one_to_one() -> None:
    from lmprobe_zarr.sweeps.directions import cosine_similarity

    rng = np.random.default_rng(0)
    coef = xr.DataArray(rng.normal(size=(3, 5)), dims=("layer", "hidden"), coords={"layer": [1, 2, 3]})
    axes: Any = plot_cosine(cosine_similarity({"a": coef}))
    assert ticks(axes.xaxis) == ["a layer 1", "a layer 2", "a layer 3"]
    assert (axes.collections[0].norm.vmin, axes.collections[0].norm.vmax) == (-1, 1)
    assert len(axes.texts) == 9
    many = xr.DataArray(rng.normal(size=(80, 5)), dims=("layer", "hidden"), coords={"layer": np.arange(80)})
    assert not plot_cosine(cosine_similarity(many)).texts
    with pytest.raises(InvalidTypeError, match="cosine_similarity"):
        plot_cosine(coef)
