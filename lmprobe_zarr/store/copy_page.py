"""The page beside a published copy: what it holds and how to open it. Reads documents and columns of a few prompts, never activations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import xarray as xr

from lmprobe_zarr.display import Html, escape, shorten, table, visible
from lmprobe_zarr.pages import PUBLISHED, Chart, GroupPage, write_page
from lmprobe_zarr.store.contents import describe_view, measure_coverage
from lmprobe_zarr.store.datasets import to_dataset
from lmprobe_zarr.store.format import FORMAT_COLUMNS, GroupInfo
from lmprobe_zarr.store.parts import View
from lmprobe_zarr.sweeps.charts import choose_layer, describe_charts, draw_scores, find_scored, thin_layers
from lmprobe_zarr.version import __version__

__all__ = ["plan_copy_page"]

# What bounds the page, whatever the size of the copy.
SHOWN_GROUPS: Final = 4
SHOWN_PROMPTS: Final = 12
SHOWN_COLUMNS: Final = 6
TEXT_COLUMNS: Final = 200
VALUE_COLUMNS: Final = 40


def plan_copy_page(
    groups: Sequence[GroupInfo], scores: xr.Dataset | None, *, text: bool, licence: str | None
) -> Callable[[Sequence[View], str], str]:
    """Check what a page is to show besides the copy; returns the function that writes the page.

    Parameters
    ----------
    groups : sequence of GroupInfo
        Those that are published.
    scores : Dataset, optional
        From a sweep of one of them: drawn by layer.
    text : bool
        Whether the page may contain texts of prompts.
    licence : str, optional

    Returns
    -------
    callable
        Takes the views of the copy, one for each of `groups`, and its URL; returns the page as HTML.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        `scores` are not those of a sweep, or of a model that is not published.
    """
    scored = None if scores is None else groups[find_scored(scores, [group.model for group in groups])].name
    charts = () if scores is None else draw_scores(scores)
    note = "" if scores is None else describe_charts(scores)

    def page(views: Sequence[View], url: str) -> str:
        contents = {view.group.name: describe_view(view) for view in views}
        # The group with scores is always shown in full.
        ordered = sorted(views, key=lambda view: (view.group.name != scored, -len(view)))
        shown = ordered[:SHOWN_GROUPS]
        pages = [_describe(view, *((charts, note) if view.group.name == scored else ((), "")), text=text) for view in shown]
        made = f"Made by lmprobe-zarr {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. This page fetches nothing."
        if len(shown) < len(views):
            made += f" {len(shown)} of {len(views)} groups are shown in full."
        return write_page(
            _name_of(url),
            [contents[view.group.name].listed() for view in ordered],
            pages,
            made=made,
            kind=PUBLISHED,
            opening=_describe_opening(ordered[0], url, text=text, licence=licence),
        )

    return page


def _name_of(url: str) -> str:
    """The copy as its page names it. A local folder is named without its path, since the copy may be moved and shared."""
    return url if "://" in url else url.rstrip("/").rpartition("/")[2]


def _describe(view: View, charts: tuple[Chart, ...], note: str, *, text: bool) -> GroupPage:
    contents = describe_view(view)
    layers = thin_layers(contents.layers)
    return GroupPage(
        contents=contents.listed(),
        layers=layers,
        coverage=measure_coverage(view, layers),
        profile=None,
        scores=charts,
        scores_note=note,
        tokens=None,
        missing=(),
        start=choose_layer(layers, charts),
        listed=_list_prompts(view, text=text),
    )


def _list_prompts(view: View, *, text: bool) -> Html:
    """The first prompts with the user's own columns, and with their texts where these may be shown."""
    data = to_dataset(view, "prompts").isel(prompt=slice(SHOWN_PROMPTS))
    names = [name for name in view.columns("prompts") if name not in FORMAT_COLUMNS and name in data and data[name].dims == ("prompt",)]
    columns = {name: [_value(v) for v in data[name].values.tolist()] for name in names[:SHOWN_COLUMNS]}
    texts = {}
    if text and "text" in data.coords:
        texts["text"] = [shorten(visible(v), TEXT_COLUMNS) if isinstance(v, str) else "—" for v in data["text"].values.tolist()]
    hashes = [Html(f"<code>{escape(name)}</code>") for name in data["prompt"].values.tolist()]
    rows = list(zip(hashes, *texts.values(), *columns.values(), strict=True))
    more = f"The first {len(rows)} of {len(view):,}, in the order of the copy." if len(rows) < len(view) else ""
    more += f"{' ' * bool(more)}{SHOWN_COLUMNS} of {len(names)} columns." if len(names) > SHOWN_COLUMNS else ""
    return Html(
        f'<h3>Prompts</h3><p class="dim">{escape(more)}</p><div class="scroll" role="region" tabindex="0" aria-label="Prompts">'
        f"{table(('prompt', *texts, *columns), rows)}</div>"
    )


def _value(value: Any) -> str:
    if value is None or value != value:
        return "—"
    # Integers of a column that some prompts lack are floats in the dataset.
    return shorten(visible(int(value) if isinstance(value, float) and value.is_integer() else value), VALUE_COLUMNS)


def _describe_opening(view: View, url: str, *, text: bool, licence: str | None) -> Html:
    """The lines that open the copy. Of a local one the page's script fills in where it lies now."""
    part = view.parts[0].path
    level = next((level for level in ("tokens", "prompts") if view.variables(level)), "prompts")
    return Html(
        '<section><h2>Opening it</h2><pre tabindex="0"><code>import lmprobe_zarr as lz\n\n'
        f"store = lz.open_store({_place(url)})\n"
        f"ds = store.dataset({_literal(view.group.model)})</code></pre>"
        '<p class="dim">A part at a time, with xarray and zarr alone:</p><pre tabindex="0"><code>import xarray as xr\n\n'
        f"ds = xr.open_zarr({_place(url, part)}, group={_literal(level)})</code></pre>"
        f"<p>{'Prompts are there with their texts.' if text else 'Prompts are there by the sha256 of their texts only.'}"
        f"{f' License: {escape(licence)}.' if licence else ''}</p></section>"
    )


def _literal(text: str) -> str:
    """A text as Python and the page's script both write it."""
    return escape(json.dumps(text, ensure_ascii=False))


def _place(url: str, key: str = "") -> str:
    whole = "/".join(piece for piece in (_name_of(url).rstrip("/"), key) if piece)
    shown = _literal(whole)
    return shown if "://" in url else f'<span data-here="{escape(key)}">{shown}</span>'
