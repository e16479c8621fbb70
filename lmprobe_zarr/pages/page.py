"""Writes the markup of the page, and the data for its script, from records. Reads no store and computes no score."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any, Final

import numpy as np

from lmprobe_zarr.display import Html, escape, format_bytes, shorten, table, visible
from lmprobe_zarr.pages.pictures import Chart, Series, draw_chart, draw_grid, layer_places, mark, one_hue, style_of, two_hues
from lmprobe_zarr.pages.records import Coverage, GroupPage, LayerProfile, ListedGroup, ShownPrompt, ShownTokens
from lmprobe_zarr.typing import Array

__all__ = ["PUBLISHED", "embed_json", "generator", "write_page"]

#: What the page beside a published copy is.
PUBLISHED: Final = "published copy"
LISTED_GROUPS: Final = 200
NAMED_MODELS: Final = 2
GRID_HEIGHT: Final = 150
TEXT_COLUMNS: Final = 2000


def generator(kind: str) -> str:
    """What a page says of itself, at the beginning of its head: by it a later call knows which pages it may replace."""
    return f'<meta name="generator" content="lmprobe-zarr {escape(kind)}">'


def embed_json(document: object) -> Html:
    """JSON for a ``<script type="application/json">``: it contains nothing that could end the element or become markup."""
    text = json.dumps(_without_nan(document), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    # A lone surrogate, as in a text that was cut in the wrong place, cannot be encoded as UTF-8.
    return Html(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float):
        # The page shows four digits.
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def write_page(
    place: str,
    contents: Sequence[ListedGroup],
    groups: Sequence[GroupPage],
    *,
    made: str,
    kind: str = "report",
    opening: Html | None = None,
) -> str:
    """The whole page.

    Parameters
    ----------
    place : str
        The store.
    contents : sequence of ListedGroup
        Every group.
    groups : sequence of GroupPage
        The groups that are shown in full.
    made : str
        What made the page, and when.
    kind : str
        What the page is.
    opening : Html, optional
        How to open what it shows, below the list of groups.
    """
    files = resources.files(__package__)
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # A second line of defence: even if markup were injected, the browser would fetch nothing and run no other script.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = _page_title(contents)
    body = [
        _head(title, kind, place, contents),
        *([] if opening is None else [opening]),
        *(_group(number, group) for number, group in enumerate(groups)),
    ]
    head = (
        f'<meta charset="utf-8">{generator(kind)}<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · lmprobe-zarr {escape(kind)}</title><style>{style}</style>"
    )
    main = f"<main>{''.join(map(str, body))}</main>\n<footer><p>{escape(made)}</p></footer>"
    rest = f'<div id="tip" role="tooltip" hidden></div>\n<script>{script}</script>'
    page = f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{main}\n{rest}\n</body>\n</html>\n'
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _page_title(contents: Sequence[ListedGroup]) -> str:
    """What the page shows: whose activations."""
    models = list(dict.fromkeys(group.model for group in contents))
    if len(models) > NAMED_MODELS:
        return f"Activations of {len(models)} models"
    return f"Activations of {' and '.join(models)}" if models else "An empty store of activations"


def _head(title: str, kind: str, place: str, contents: Sequence[ListedGroup]) -> Html:
    total = sum(group.nbytes for group in contents)
    raw = sum(group.raw_nbytes for group in contents)
    prompts = sum(group.prompts for group in contents)
    before = f" for {format_bytes(raw)} of activations" if raw else ""
    what = f"{len(contents)} group{'' if len(contents) == 1 else 's'}, {prompts:,} prompts, {format_bytes(total)} stored{before}"
    rows = [
        (
            group.model,
            group.prompts,
            group.tokens,
            group.layers,
            group.hidden,
            group.stored_in,
            format_bytes(group.raw_nbytes),
            format_bytes(group.nbytes),
            group.name,
        )
        for group in contents[:LISTED_GROUPS]
    ]
    head = ("model", "prompts", "tokens", "layers", "hidden", "in", "values", "stored", "group")
    listed = table(head, rows, caption="Groups: one for each model and provenance") if rows else Html('<p class="none">It is empty.</p>')
    more = f"<p>and {len(contents) - LISTED_GROUPS} more.</p>" if len(contents) > LISTED_GROUPS else ""
    whose = "Published copy" if kind == PUBLISHED else f"{kind.capitalize()} on the store"
    return Html(
        f'<header><h1>{escape(title)}</h1><p class="dim">{escape(whose)} {escape(place)}: {escape(what)}</p></header>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="Groups">{listed}</div>{more}'
    )


def _group(number: int, group: GroupPage) -> Html:
    name = group.contents.model
    pieces = [f'<section class="group" aria-labelledby="group-{number}"><h2 id="group-{number}">{escape(name)}</h2>']
    pieces.append(f'<p class="dim">{escape(group.contents.summary)}, {escape(format_bytes(group.contents.nbytes))}</p>')
    data: dict[str, Any] = {"layers": list(group.layers), "layer": group.start, "charts": [], "coverage": [], "maps": []}
    if group.layers:
        pieces.append(_layer_slider(number, group))
    if group.scores:
        pieces += [_title("Scores by layer", group.scores_note), _charts(group.scores, data, f"scores-{number}")]
    if group.tokens is not None:
        pieces += [_title("Tokens", group.tokens.note), _maps(group.tokens, data, group.start)]
    if group.profile is not None:
        pieces += _profile(group.profile, data)
    if group.coverage:
        pieces.append(
            _title("What is stored", "Prompts from left to right in the store's order, layers from below. Full colour: every prompt.")
        )
        pieces.append(_coverage(group.coverage, data, f"coverage-{number}"))
    if group.listed is not None:
        pieces.append(str(group.listed))
    pieces.append("<h3>Contents</h3>")
    pieces += map(str, group.contents.sections)
    pieces += [f'<p class="none">{escape(text)}</p>' for text in group.missing]
    pieces.append(f'<script type="application/json" class="lz-data">{embed_json(data)}</script></section>')
    return Html("".join(map(str, pieces)))


def _title(title: str, note: str) -> str:
    return f'<h3>{escape(title)}</h3><p class="dim">{escape(note)}</p>'


def _layer_slider(number: int, group: GroupPage) -> str:
    at = group.layers.index(group.start)
    return (
        f'<div class="bar"><label for="layer-{number}">Layer</label>'
        f'<input id="layer-{number}" type="range" min="0" max="{len(group.layers) - 1}" step="1" value="{at}" '
        f'title="Arrow keys change the layer">'
        f'<output for="layer-{number}">layer {group.start}</output><span class="now" aria-live="polite"></span></div>'
    )


def _charts(charts: Sequence[Chart], data: dict[str, Any], name: str) -> str:
    """Charts with a menu to choose one; without scripts, all are visible."""
    out = []
    if len(charts) > 1:
        options = "".join(f"<option>{escape(chart.title)}</option>" for chart in charts)
        out.append(f'<select class="pick" data-of="{name}" aria-label="Which score">{options}</select>')
    return "".join((*out, *(_chart(chart, data, name) for chart in charts)))


def _chart(chart: Chart, data: dict[str, Any], name: str) -> str:
    number = len(data["charts"])
    series = [(series.name, np.asarray(series.values, float).tolist()) for series in chart.series]
    data["charts"].append({"title": chart.title, "layers": list(chart.layers), "x": layer_places(chart.layers), "series": series})
    legend = "".join(
        f'<li><svg class="{style_of(i, series.kind)}" viewBox="0 0 30 12" aria-hidden="true">'
        f'<path class="line" d="M0 6H30"/>{mark(15, 6, i)}</svg>{escape(series.name)}</li>'
        for i, series in enumerate(chart.series)
    )
    rows = [
        (
            layer,
            *("—" if not math.isfinite(float(series.values[i])) else Html(_format(float(series.values[i]))) for series in chart.series),
        )
        for i, layer in enumerate(chart.layers)
    ]
    values = table(("layer", *(series.name for series in chart.series)), rows, caption=chart.title)
    note = f" <span>{escape(chart.note)}</span>" if chart.note else ""
    return (
        f'<figure data-n="{number}" data-of="{name}"><figcaption><strong>{escape(chart.title)}</strong>{note}</figcaption>'
        f'<ul class="legend">{legend}</ul><div class="scroll">{draw_chart(chart)}</div>'
        f"<details><summary>Values as a table</summary><div>{values}</div></details></figure>"
    )


def _format(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _profile(profile: LayerProfile, data: dict[str, Any]) -> list[str]:
    unit = "tokens" if profile.level == "tokens" else "prompts"
    seen = f"{profile.rows:,} of {profile.of_rows:,} {unit}"
    how = (
        f"A sample: {seen}, of {profile.prompts:,} of {profile.of_prompts:,} prompts, in eight runs of neighbours, evenly spaced."
        if profile.is_sample
        else f"All {profile.rows:,} {unit}."
    )
    left = int(profile.not_finite.max(initial=0))
    how += f" In some layers up to {left:,} are left out: not stored, NaN or infinite." if left else ""
    series = [
        Series(
            name="median norm",
            values=profile.norms[1],
            low=profile.norms[0],
            high=profile.norms[2],
        ),
        Series(name="largest norm", values=profile.largest_norm),
    ]
    if profile.first_norm is not None:
        series.append(Series(name="median norm of first tokens", values=profile.first_norm))
    norms = Chart(
        title=f"Norm of {profile.variable}",
        unit="Euclidean norm",
        layers=profile.layers,
        series=tuple(series),
        log=_spans_factor(series, 20),
        note="band: 5th to 95th percentile",
    )
    outliers = (
        Series(name="largest unit ÷ median unit", values=profile.ratio),
        Series(name="units above 6 × the median unit", values=profile.n_outliers.astype(float)),
    )
    ratio = Chart(
        title=f"Outlier units of {profile.variable}",
        unit="times; number",
        note="by root mean square",
        layers=profile.layers,
        series=outliers[:1] if not profile.n_outliers.any() else outliers,
        log=bool(np.nanmax(profile.ratio, initial=1) > 50) and not profile.n_outliers.any(),
    )
    rows = [
        (
            layer,
            Html(_format(float(p))) if math.isfinite(p) else "—",
            int(u),
            Html(_format(float(r))) if math.isfinite(r) else "—",
            int(n),
        )
        for layer, p, u, r, n in zip(profile.layers, profile.peak, profile.unit, profile.ratio, profile.n_outliers, strict=True)
    ]
    head = ("layer", "largest |value|", "largest unit", "times the median unit", "units over 6 times")
    listed = f"<details><summary>Outlier units by layer</summary><div>{table(head, rows)}</div></details>"
    return [_title("Norms and outliers", how), _chart(norms, data, "norms"), _chart(ratio, data, "outliers"), listed]


def _spans_factor(series: Sequence[Series], factor: float) -> bool:
    values = np.concatenate([np.asarray(curve.values, float) for curve in series])
    values = values[np.isfinite(values) & (values > 0)]
    return bool(len(values)) and bool(values.max() > factor * values.min())


def _coverage(coverage: Sequence[Coverage], data: dict[str, Any], name: str) -> str:
    out = []
    if len(coverage) > 1:
        options = "".join(f"<option>{escape(variable.variable)}</option>" for variable in coverage)
        out.append(f'<select class="pick" data-of="{name}" aria-label="Which variable">{options}</select>')
    for variable in coverage:
        number = len(data["coverage"])
        shares = variable.shares
        data["coverage"].append({"layers": list(variable.layers), "edges": list(variable.edges), "shares": shares.tolist()})
        whole = float((shares * np.diff(variable.edges)).sum() / max(1, variable.edges[-1] * len(shares)))
        stored_share = f"{100 * whole:.3g} % of prompts × layers stored" if variable.layers else f"{100 * whole:.3g} % of prompts stored"
        label = f"{variable.variable}: {stored_share}"
        columns = shares.shape[1]
        height = max(3.0, min(16.0, GRID_HEIGHT / len(shares)))
        picture = draw_grid(one_hue(shares), label=label, describe_rows=_label_rows(variable.layers, height), cell=(680 / columns, height))
        bins = variable.edges[-1] / max(1, len(variable.edges) - 1)
        note = f"{stored_share}; {'one column for each prompt' if bins == 1 else f'each column stands for about {bins:.0f} prompts'}."
        rows = [(layer, Html(f"{100 * float(row.mean()):.3g} %")) for layer, row in zip(variable.layers or ("all",), shares, strict=True)]
        caption = f"<figcaption><strong>{escape(variable.variable)}</strong> {escape(note)}</figcaption>"
        listed = f"<details><summary>Values as a table</summary><div>{table(('layer', 'stored'), rows)}</div></details>"
        out.append(f'<figure class="coverage" data-n="{number}" data-of="{name}">{caption}{picture}{listed}</figure>')
    return "".join(out)


def _label_rows(layers: Sequence[int], height: float) -> list[tuple[int, str]]:
    """The labels of a grid's rows: as many as there is room for."""
    step = max(1, math.ceil(13 / height))
    return [(i, str(layer)) for i, layer in enumerate(layers)][::step]


def _place_colours(shown: ShownTokens) -> Array:
    """Values as places on the colour scale, 0 to 1. Norms are logarithmic; weights are shares of the largest.

    Scores have 0 in the middle, and twice the layer's root mean square at the ends.
    """
    values = shown.values.values
    if shown.two:
        scale = np.sqrt(np.nanmean(values**2, axis=1, keepdims=True)) if values.size else np.ones((len(values), 1))
        return np.asarray(np.clip(0.5 + values / (4 * np.where(scale > 0, scale, 1.0)), 0, 1))
    if shown.weights:
        largest = np.nanmax(values) if np.isfinite(values).any() else 1.0
        return np.asarray(values / (largest or 1.0))
    logs = np.log(np.where(values > 0, values, np.nan))
    if not np.isfinite(logs).any():
        return np.full(values.shape, np.nan)
    low, high = np.nanmin(logs), np.nanmax(logs)
    return np.asarray((logs - low) / ((high - low) or 1.0))


def _maps(shown: ShownTokens, data: dict[str, Any], start: int) -> str:
    all_values, shares = shown.values.values, _place_colours(shown)
    layers = shown.values.layers
    paint = two_hues if shown.two else one_hue
    finite = all_values[np.isfinite(all_values)]
    low, high = (_format(float(finite.min())), _format(float(finite.max()))) if len(finite) else ("", "")
    colours = paint(np.linspace(0, 1, 9))
    stops = ", ".join(_css(colour) for colour in colours)
    bar = f'<i style="background:linear-gradient(90deg, {stops})"></i>'
    ends = f"0 {bar} {high}" if shown.weights else f"{low} {bar} {high} (logarithmic)"
    ends = f"below 0 {bar} above 0 (full colour: twice the layer's root mean square)" if shown.two else ends
    scale = f'<span class="scale">{escape(shown.what)}: {ends}</span>'
    row = layers.index(start) if start in layers else len(layers) - 1
    roles = list(dict.fromkeys(role for prompt in shown.prompts for role in prompt.roles if role))
    out = [scale, _role_legend(roles, any(any(prompt.generated) for prompt in shown.prompts))]
    end = 0
    for number, (prompt, count, of) in enumerate(zip(shown.prompts, shown.values.counts, shown.values.of_counts, strict=True)):
        begin, end = end, end + int(count)
        values, part = all_values[:, begin:end], shares[:, begin:end]
        data["maps"].append(
            {
                "layers": list(layers), "what": shown.what, "two": shown.two, "tokens": [visible(name) for name in prompt.names],
                "values": values.tolist(), "shares": np.round(part, 3).tolist(),
                "marks": [visible(mark) for mark in _marks(prompt)],
            }
        )  # fmt: skip
        kinds = [_word_class(prompt, place, roles) for place in range(len(prompt.names))]
        words = "".join(
            _word(piece, name, colour, kind)
            for piece, name, colour, kind in zip(prompt.pieces, prompt.names, paint(part[row]), kinds, strict=True)
        )
        width = max(4.0, min(18.0, 680 / max(1, count)))
        height = max(3.0, min(14.0, GRID_HEIGHT / len(layers)))
        label = f"{shown.what} of each token by layer, prompt {prompt.hash}; the table below has the values of layer {layers[row]}"
        picture = draw_grid(paint(part), label=label, describe_rows=_label_rows(layers, height), cell=(width, height))
        told = bool(prompt.roles or prompt.generated)
        head = ("position", "token", *(("role",) if told else ()), shown.what)
        rows = [
            (i, visible(name), *([visible(mark)] if told else []), Html(_format(float(v))) if math.isfinite(v) else "—")
            for i, (name, mark, v) in enumerate(zip(prompt.names, _marks(prompt), values[row], strict=True))
        ]
        cut = f" · the first {count} of {of} tokens" if count < of else ""
        labelled = f" · {escape(prompt.label)}" if prompt.label else ""
        whole = f'<p class="text">{_escape_lines(shorten(prompt.text, TEXT_COLUMNS))}</p>' if prompt.text else ""
        out.append(
            f'<figure class="tokens" data-n="{number}"><figcaption>prompt <code>{escape(prompt.hash)}</code>{labelled}{cut}</figcaption>'
            f'{whole}<p class="words">{words}</p>'
            f'<div class="walk" tabindex="0" role="application" aria-label="Tokens by layer: arrow keys, left and right for the token, '
            f'up and down for the layer">{picture}</div><details><summary>Layer {layers[row]} as a table</summary>'
            f"<div>{table(head, rows)}</div></details></figure>"
        )
    return "".join(out)


def _css(colour: Array) -> str:
    red, green, blue, alpha = (int(v) for v in colour)
    return f"rgba({red},{green},{blue},{alpha / 255:.3f})"


# Colours of the style for roles; further roles begin again.
ROLE_COLOURS: Final = 6


def _marks(prompt: ShownPrompt) -> list[str]:
    """What is known of each token beside its value: its role, and whether it was generated."""
    roles = prompt.roles or ("",) * len(prompt.names)
    made = prompt.generated or (False,) * len(prompt.names)
    return [", ".join(([role] if role else []) + (["generated"] if own else [])) for role, own in zip(roles, made, strict=True)]


def _word_class(prompt: ShownPrompt, place: int, roles: list[str]) -> list[str]:
    """The classes of a word: its role by number, and whether it was generated."""
    role = prompt.roles[place] if prompt.roles else ""
    made = bool(prompt.generated) and prompt.generated[place]
    return ([f"r{roles.index(role) % ROLE_COLOURS}"] if role else []) + (["made"] if made else [])


def _role_legend(roles: list[str], generated: bool) -> str:
    """Which line under a word stands for which role, and what marks the generated ones."""
    kinds = [(f"r{number % ROLE_COLOURS}", role) for number, role in enumerate(roles)] + ([("made", "generated")] if generated else [])
    if not kinds:
        return ""
    shown = "".join(f'<b class="{kind}">{escape(visible(name))}</b> ' for kind, name in kinds)
    return f'<p class="words roles">{shown}</p>'


def _word(piece: tuple[str, str], name: str, colour: Array, kinds: list[str]) -> str:
    between, text = piece
    shown = visible(text, lines=True) if text else visible(name)
    classes = [*([] if text else ["id"]), *kinds]
    kind = f' class="{" ".join(classes)}"' if classes else ""
    return f'{_escape_lines(between)}<b{kind} style="background:{_css(colour)}">{_escape_lines(shown)}</b>'


def _escape_lines(text: str) -> str:
    """Escaped, with line breaks kept."""
    return "\n".join(escape(line) for line in text.split("\n"))
