"""A heat map of tokens shows whose tokens they are, each role by a colour and a pattern, and what the model generated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from drawn import assert_readable

from lmprobe_zarr.plots import plot_tokens

matplotlib = pytest.importorskip("matplotlib")

ROLES = ["", "system", "system", "", "user", "user", "user", "", "assistant", "assistant", ""]
MADE = [False] * 8 + [True] * 3


def scores(**columns: Any) -> xr.DataArray:
    n = len(ROLES)
    coords = {
        "layer": [2, 4],
        "position": ("token", np.arange(n)),
        "token_text": ("token", [f"t{i}" for i in range(n)]),
        **{name: ("token", values) for name, values in columns.items()},
    }
    return xr.DataArray(np.random.default_rng(0).normal(size=(2, n)), dims=("layer", "token"), coords=coords, name="score")


def bands(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Where the band of each role begins and ends."""
    found: dict[str, list[tuple[float, float]]] = {}
    for patch in axes.patches:
        if str(patch.get_gid()).startswith("role "):
            found.setdefault(patch.get_gid()[5:], []).append((patch.get_x(), patch.get_x() + patch.get_width()))
    return found


def lines(axes: Any) -> list[tuple[float, float]]:
    return [tuple(line.get_xdata()) for line in axes.lines if line.get_gid() == "generated"]


def legend(axes: Any) -> list[str]:
    return [] if axes.get_legend() is None else [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_band_has_the_role_of_every_token_and_a_line_what_was_generated() -> None:
    axes: Any = plot_tokens(scores(role=ROLES, generated=MADE))
    assert bands(axes) == {"system": [(0.5, 2.5)], "user": [(3.5, 6.5)], "assistant": [(7.5, 9.5)]}
    assert lines(axes) == [(7.5, 10.5)]
    assert legend(axes) == ["system", "user", "assistant", "generated"]
    assert_readable(axes)
    frame = axes.get_window_extent()
    drawn = [artist.get_window_extent() for artist in (*axes.patches, *axes.lines) if artist.get_gid()]
    assert all(box.y0 >= frame.y1 for box in drawn)
    assert max(box.y1 for box in drawn) <= axes.figure.bbox.y1
    patches = [patch for patch in axes.patches if patch.get_gid()]
    assert len({patch.get_facecolor() for patch in patches}) == len({patch.get_hatch() for patch in patches}) == 3


def test_two_turns_of_one_role_have_two_bands_of_one_colour() -> None:
    axes: Any = plot_tokens(scores(role=["user", "", "user"] + [""] * 8))
    assert bands(axes) == {"user": [(-0.5, 0.5), (1.5, 2.5)]}
    assert legend(axes) == ["user"]


def test_without_roles_or_where_they_are_not_wanted_there_is_no_band() -> None:
    for given in (scores(), scores(role=[""] * 11), scores(generated=[False] * 11)):
        axes: Any = plot_tokens(given)
        assert (bands(axes), lines(axes), legend(axes)) == ({}, [], [])
    assert legend(plot_tokens(scores(role=ROLES), roles=False)) == []
    alone: Any = plot_tokens(scores(generated=MADE))
    assert (bands(alone), legend(alone)) == ({}, ["generated"])


@pytest.mark.few(1)
@pytest.mark.parametrize("width", ["page", "column"])
def test_the_band_the_title_and_the_legend_do_not_touch(width: Any) -> None:
    given = scores(role=ROLES, generated=MADE).assign_coords(model="an-organisation/a-model-with-a-long-name-7B-Instruct")
    axes: Any = plot_tokens(given.assign_attrs(labels="truth of the statement"), width=width)
    assert_readable(axes)
    title = axes.title.get_window_extent()
    assert not any(title.overlaps(artist.get_window_extent()) for artist in (*axes.patches, *axes.lines) if artist.get_gid())


def test_in_axes_of_the_caller_the_legend_of_roles_lies_above_the_tokens() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    plot_tokens(scores(role=ROLES, generated=MADE).assign_coords(model="a/model"), ax=axes)
    figure.draw_without_rendering()
    frame, box, title = axes.get_window_extent(), axes.get_legend().get_window_extent(), axes.title.get_window_extent()
    assert frame.y1 < box.y0 < box.y1 < title.y0 < title.y1 <= figure.bbox.y1
    assert tuple(figure.get_size_inches()) == (7, 3.4)


@pytest.mark.model
def test_the_roles_of_a_stored_chat_are_drawn(tmp_path: Any, tiny_models: Any) -> None:
    from transformers import AutoTokenizer

    import lmprobe_zarr as lz

    folder = tiny_models("gpt2", head="AutoModelForCausalLM", n_layer=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    chat = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "It was me."}]
    lz.extract(str(folder), [chat], store=tmp_path / "s", tokenizer=tokenizer, keep_tokens=True)
    toks = lz.open_store(tmp_path / "s").tokens()
    axes: Any = toks.resid.mean("hidden").lz.plot_tokens()
    places = {role: np.flatnonzero(toks.role.values == role) for role in ("user", "assistant")}
    assert bands(axes) == {role: [(found[0] - 0.5, found[-1] + 0.5)] for role, found in places.items()}
