"""Pictures on a light and on a dark ground, for everybody's eyes: lines and letters stand out, and curves differ without colour."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import xarray as xr
from drawn import texts

from lmprobe_zarr.plots import plot_calibration, plot_cosine, plot_heatmap, plot_roc, plot_scores, plot_tokens, save_plot
from lmprobe_zarr.plots.style import COLOURS, LINES, MARKERS, contrast

matplotlib = pytest.importorskip("matplotlib")


def scores() -> xr.Dataset:
    values = np.random.default_rng(0).uniform(0.6, 0.9, size=(4, 3, 3))
    coords = {"layer": np.arange(4), "probe": ["a", "b", "words"], "kind": ("probe", ["probe", "probe", "control"])}
    values[1, 0] = np.nan
    return xr.Dataset({"accuracy": (("layer", "probe", "fold"), values)}, coords=coords, attrs={"majority_share": 0.5, "model": "m"})


def tokens() -> xr.DataArray:
    coords = {
        "layer": [0, 1],
        "token_text": ("token", list("abcd")),
        "role": ("token", ["", "user", "user", "assistant"]),
        "generated": ("token", [False, False, False, True]),
    }
    values = np.random.default_rng(0).normal(size=(2, 4))
    values[0, 0] = np.nan
    return xr.DataArray(values, dims=("layer", "token"), coords=coords, name="score")


def curves() -> xr.Dataset:
    rates = {name: (("curve", "point"), [[0.0, 0.4, 1.0]]) for name in ("true_positive_rate", "false_positive_rate")}
    bins = {name: (("curve", "bin"), [[0.2, 0.8]]) for name in ("predicted", "observed", "n")}
    return xr.Dataset({**rates, **bins, "auroc": ("curve", [0.5]), "ece": ("curve", [0.1])}, coords={"curve": ["a"]})


def cosines() -> xr.DataArray:
    return xr.DataArray(np.eye(3), dims=("direction", "other"), coords={"direction": list("abc"), "other": list("abc")})


DRAWN: dict[str, Any] = {
    "scores": lambda **how: plot_scores(scores(), baseline=0.7, **how),
    "heat map": lambda **how: plot_heatmap(scores(), **how),
    "tokens": lambda **how: plot_tokens(tokens(), **how),
    "roc": lambda **how: plot_roc(curves(), **how),
    "calibration": lambda **how: plot_calibration(curves(), **how),
    "matrix": lambda **how: plot_cosine(cosines(), **how),
}
GROUNDS: dict[str, Any] = {"light": {}, "black": None, "slate": {"figure.facecolor": "#1e2129", "axes.facecolor": "#1e2129"}}
DARK = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#e6e8ea")


def rgb(colour: Any) -> Any:
    return matplotlib.colors.to_rgb(colour)


def style(ground: str) -> Any:
    import matplotlib.style

    return matplotlib.style.context("dark_background" if ground == "black" else {} if ground == "light" else {**GROUNDS[ground], **DARK})


@pytest.mark.few(2)
@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("name", DRAWN)
def test_letters_and_lines_stand_out_from_the_ground(name: str, ground: str) -> None:
    with style(ground):
        axes = DRAWN[name]()
        back = rgb(axes.get_facecolor())
        assert (contrast(back, (1, 1, 1)) < 1.1) == (ground == "light")
        inside = set(axes.texts)  # numbers in cells stand on the cells' colours
        for text in texts(axes.figure):
            assert text in inside or contrast(rgb(text.get_color()), rgb(axes.figure.get_facecolor())) >= 4.5, text
        for line in axes.lines:
            if line.get_gid() != "gap":
                assert contrast(rgb(line.get_color()), back) >= 2.2, line
        if axes.patch.get_hatch():
            assert contrast(rgb(axes.patch.get_edgecolor()), back) >= 2.0


@pytest.mark.few(2)
@pytest.mark.parametrize("name", DRAWN)
def test_a_dark_picture_is_dark_in_its_file(name: str, tmp_path: Any) -> None:
    from matplotlib.image import imread

    with style("black"):
        save_plot(DRAWN[name](), tmp_path / "a.png", dpi=60)
    pixels = imread(tmp_path / "a.png")
    assert pixels[0, 0, :3].max() == 0
    assert 0.005 < (pixels[..., :3].min(axis=-1) > 0.6).mean() < 0.5, "letters are light, and nothing large is"


def test_axes_that_were_made_dark_before_are_drawn_on_in_light_tones() -> None:
    from matplotlib.figure import Figure

    with style("black"):
        mine: Any = Figure(layout="constrained").subplots()
    plot_scores(scores(), ax=mine)
    back = rgb(mine.get_facecolor())
    assert all(contrast(rgb(text.get_color()), back) >= 4.5 for text in mine.get_legend().get_texts())
    assert all(contrast(rgb(line.get_color()), back) >= 3 for line in mine.lines)


def test_numbers_in_cells_can_be_read_on_their_colours() -> None:
    for axes in (plot_heatmap(scores()), plot_cosine(cosines())):
        mesh: Any = axes.collections[0]
        values = mesh.get_array()
        assert axes.texts
        for text in axes.texts:
            column, row = (round(place) for place in text.get_position())
            assert contrast(rgb(text.get_color()), mesh.cmap(mesh.norm(values[row, column]))) >= 4.0


#: From linear RGB to what people without long-, middle- or short-wave cones see. Source: G. M. Machado, M. M. Oliveira and
#: L. A. F. Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE TVCG 15 (2009), severity 1.
EYES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(linear: Any) -> Any:
    """CIE L*a*b* of linear sRGB. Source: CIE 15:2004, IEC 61966-2-1."""
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    x, y, z = np.cbrt(np.clip(to_xyz @ np.clip(linear, 0, 1) / [0.95047, 1.0, 1.08883], 0.008856, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
def test_the_first_four_colours_differ_for_every_eye_and_all_curves_differ_without_colour(eyes: str) -> None:
    seen = []
    for colour in COLOURS:
        part = np.array(rgb(colour))
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        seen.append(lab(np.array(EYES[eyes]) @ linear))
    distances = [float(np.linalg.norm(a - b)) for a, b in combinations(seen[:4], 2)]
    assert min(distances) >= 10, distances
    assert len({(MARKERS[n % len(MARKERS)], str(LINES[n % len(LINES)])) for n in range(40)}) == 40


def test_the_colours_of_heat_maps_rise_in_lightness() -> None:
    mesh: Any = plot_heatmap(scores()).collections[0]
    light = [contrast(mesh.cmap(share), (0, 0, 0)) for share in np.linspace(0, 1, 33)]
    assert (np.diff(light) > 0).all()
