"""The page's pictures with layers far apart, long names and gaps in what is known."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from lmprobe_zarr.pages.pictures import Chart, Series, draw_chart, draw_grid, one_hue


def chart(layers: tuple[int, ...], unit: str = "accuracy", scale: float = 1.0, low: list[float] | None = None) -> str:
    values = np.linspace(0.5, 0.9, len(layers)) * scale
    edge = None if low is None else np.array(low)
    series = Series(name="s", values=values, low=edge, high=None if edge is None else edge + 0.1)
    return str(draw_chart(Chart(title="t", unit=unit, layers=layers, series=(series,))))


@pytest.mark.parametrize("layers", [(0, 1, 2, 3, 30, 100_000), tuple(range(120)), (0, 98, 99, 100), tuple(range(0, 20_000, 999))])
def test_numbers_of_layers_do_not_touch(layers: tuple[int, ...]) -> None:
    marks = re.findall(r'<text class="tick" x="([0-9.]+)" y="[0-9.]+" text-anchor="middle">(\d+)</text>', chart(layers))
    spans = [(float(x) - 3.5 * len(text), float(x) + 3.5 * len(text)) for x, text in marks]
    assert len(spans) > 1
    assert all(end < start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= 722


@pytest.mark.parametrize("unit", ["accuracy", "the_share_of_prompts_that_are_scored_as_annotators_would", "今" * 60])
def test_the_label_of_the_vertical_axis_has_room(unit: str) -> None:
    (shown,) = re.findall(r'transform="rotate[^>]*>([^<]*)</text>', chart((0, 1), unit))
    assert len(shown) <= 28
    assert (shown == unit) == (len(unit) <= 28)
    assert shown[:4] == unit[:4]
    assert shown[-4:] == unit[-4:]


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1, 1e3, 123_456_789, 1e12])
def test_numbers_of_the_vertical_axis_have_at_most_seven_characters_or_an_exponent(scale: float) -> None:
    shown = re.findall(r'text-anchor="end">([^<]*)</text>', chart((0, 1), scale=scale))
    assert shown
    assert all(len(text) <= 8 for text in shown)
    assert len(set(shown)) == len(shown)


def test_no_band_is_drawn_over_a_layer_that_has_none() -> None:
    page = chart((0, 1, 2, 3, 4), low=[0.4, 0.5, np.nan, 0.6, 0.7])
    bands = re.findall(r'<polygon class="band" points="([^"]*)"', page)
    assert len(bands) == 2
    assert all(len(points.split()) == 4 for points in bands)
    assert 'class="band"' not in chart((0, 1, 2), low=[0.4, np.nan, 0.6])


@pytest.mark.parametrize("names", [["0", "7"], ["99999", "100000"], ["10000000"]])
def test_a_grid_has_room_for_the_names_of_its_rows(names: list[str]) -> None:
    page = str(draw_grid(one_hue(np.ones((len(names), 3))), label="l", describe_rows=list(enumerate(names)), cell=(9, 9)))
    places = [float(x) for x in re.findall(r'<text class="tick" x="([0-9.]+)"', page)]
    assert all(x - 7 * len(name) >= 0 for x, name in zip(places, names, strict=True))
