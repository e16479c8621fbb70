"""``report``: one self-contained page about a store. Looks things up and hands them to the page; what is computed, others compute."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import LAYERED_SITES, POOLINGS
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probe import LayerSweep, Probe
from lmprobe_zarr.probes import parse_labels
from lmprobe_zarr.reports.page import GroupPage, ShownPrompt, ShownTokens, write_page
from lmprobe_zarr.reports.pictures import Chart, Series
from lmprobe_zarr.reports.profiles import Score, bin_coverage, choose_profiled, fit_by_layer, map_tokens, profile_layers, score_of
from lmprobe_zarr.store import Place, Store, describe_view, open_store, to_dataset
from lmprobe_zarr.store.format import LEVELS, Provenance
from lmprobe_zarr.store.parts import View, read_values
from lmprobe_zarr.sweeps import sweep
from lmprobe_zarr.typing import Array, Ints
from lmprobe_zarr.version import __version__

__all__ = ["Report", "report"]

# What bounds the page, whatever the store's size.
SHOWN_GROUPS: Final = 4
SHOWN_LAYERS: Final = 160
SHOWN_CURVES: Final = 12
SHOWN_VARIABLES: Final = 8
SHOWN_PROMPTS: Final = 4
MOST_PROMPTS: Final = 12
MOST_TOKENS: Final = 160
TOKEN_CELLS: Final = 48_000
COVERAGE_CELLS: Final = 24_000
COVERAGE_BINS: Final = 240
SAMPLE_BYTES: Final = 256 * 2**20

_SCORES: Final = {"accuracy": "Accuracy", "auroc": "AUROC", "r2": "R²"}
# Of a sweep, but no score.
_NO_SCORES: Final = ("fit_seconds", "n_train", "n_test")


@dataclass(frozen=True, slots=True)
class Report:
    """One self-contained page about a store. Shows itself in notebooks.

    Parameters
    ----------
    html : str
        The page: no network, no other file.
    """

    html: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file; one that is there is replaced, once the page is whole.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        Path
            Where it lies.

        Raises
        ------
        InvalidArgumentError
            It cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.write_text(self.html, encoding="utf-8")
            partial.replace(target)
        except OSError as error:
            raise InvalidArgumentError(f"the page cannot be written to {str(target)!r} ({error.strerror}): give another path") from error
        return target

    def __repr__(self) -> str:
        return f"<lmprobe_zarr report, {len(self.html.encode()) / 1024:.0f} KiB: save(path) writes it>"

    def _repr_html_(self) -> str:
        # A frame of its own: neither the notebook's styles nor its scripts and the page's get at one another.
        return (
            f'<iframe title="lmprobe-zarr report" sandbox="allow-scripts" style="width:100%;height:640px;border:0" '
            f'srcdoc="{_attribute(self.html)}"></iframe>'
        )


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;")


def report(
    store: Place = None,
    path: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    provenance: Provenance | None = None,
    group: str | None = None,
    scores: xr.Dataset | None = None,
    labels: str | Mapping[Any, Any] | None = None,
    probe: Probe | LayerSweep | None = None,
    variable: str | None = None,
    prompts: int | Iterable[Any] = SHOWN_PROMPTS,
    text: bool = True,
    sample_bytes: int = SAMPLE_BYTES,
) -> Report:
    """One self-contained page about a store: contents, coverage, norms and outliers, scores by layer, tokens.

    Parameters
    ----------
    store : Store, path or URL, or a sequence of these, optional
        By default the cache.
    path : str or path, optional
        Where to write the page.
    model, provenance, group : optional
        Which groups are shown in full; by default the four with most prompts. All are listed.
    scores : Dataset, optional
        From :func:`lmprobe_zarr.sweep`: drawn by layer, with controls where they are in it.
    labels : str or mapping, optional
        A column, or ``{text or hash: label}``. Without `scores` a logistic regression is swept over the layers of `variable`. With two
        classes and without `probe`, tokens show the log-odds of the second by such a regression of each layer, fitted on all prompts but
        those shown (2,000 at most, evenly spaced).
    probe : Probe or LayerSweep, optional
        Fitted on one layer, or swept over layers: tokens show its scores.
    variable : str, optional
        What is fitted on for `labels`: pooled, with layers. By default the pooled residual stream.
    prompts : int or iterable of texts, hashes or token ids
        Whose tokens are shown, at most 12; a number means the first ones, of each class as many.
    text : bool
        Whether texts of prompts and tokens may stand in the page; else their hashes and positions do.
    sample_bytes : int
        How much is read for norms and outliers, over all layers. Where there is more, eight runs of neighbouring prompts are looked at.

    Returns
    -------
    Report
        At most about 3 MB: of many prompts, layers, tokens and groups some are shown, and the page says which.

    Raises
    ------
    ModelNotStoredError, MissingPromptsError, CorruptPartError, LabelError
    InvalidArgumentError
        Scores of a model that is not shown, or of no sweep; a probe that is not fitted, or learned from several layers side by side; no
        such variable; more prompts than 12; a path that cannot be written.
    """
    opened = store if isinstance(store, Store) else open_store(store, "r")
    if isinstance(sample_bytes, bool) or not isinstance(sample_bytes, int) or sample_bytes < 1:
        raise InvalidArgumentError(f"sample_bytes={sample_bytes!r} is no amount to read: give bytes, at least 1")
    if model is not None or group is not None or provenance:
        meant = [info for info in opened.matching(model, provenance, group) if opened.holds_parts(info.name)]
        if not meant:
            opened.find_group(model, provenance=provenance, group=group)  # which says what there is
    else:
        meant = list(opened.groups().values())
    views = {info.name: opened.view(info) for info in opened.groups().values()}
    contents = sorted((describe_view(view) for view in views.values()), key=lambda one: -one.prompts)
    shown = [one for one in contents if one.group.name in {info.name for info in meant} and one.prompts][:SHOWN_GROUPS]
    scored = None if scores is None else _scored_group(scores, [one.group.name for one in shown], [one.group.model for one in shown])
    if (labels is not None or probe is not None or variable is not None or not isinstance(prompts, int)) and len(shown) != 1:
        raise InvalidArgumentError(
            f"labels, probe, variable and prompts are of one group, and {len(shown)} are shown: choose it with model= or group="
        )
    pages = []
    for one in shown:
        view = views[one.group.name]
        layers = one.layers[:: -(-len(one.layers) // SHOWN_LAYERS) or 1]
        own = scores if scored == one.group.name else None
        pages.append(_look(view, layers, own, labels, probe, variable, prompts, text=text, sample_bytes=sample_bytes))

    made = f"Made by lmprobe-zarr {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. This page fetches nothing."
    if len(meant) > len(shown):
        made += f" {len(shown)} of {len(meant)} groups are shown in full: those with most prompts."
    page = Report(write_page(" and ".join(_place(one) for one in opened.stack), contents, pages, made=made))
    if path is not None:
        page.save(path)
    return page


def _place(store: Store) -> str:
    """A store as the page names it. Of a folder of this machine only its own name: the page may be given to others."""
    return store.url.rstrip("/").rpartition("/")[2] if store.storage.is_local else store.url


def _scored_group(scores: Any, names: Sequence[str], models: Sequence[str]) -> str:
    """Which group some scores are of."""
    if not isinstance(scores, xr.Dataset):
        raise InvalidTypeError(f"scores are the xarray.Dataset that sweep gives, not {type(scores).__name__}")
    if not _metrics(scores):
        raise InvalidArgumentError(f"scores have no variable over layer and probe (dims {dict(scores.sizes)}): give what sweep gives")
    told = scores.attrs.get(
        "model", scores.coords["model"].item() if "model" in scores.coords and not scores.coords["model"].ndim else None
    )
    if told is None and len(names) == 1:
        return names[0]
    if told not in models:
        raise InvalidArgumentError(f"scores are of model {told!r}, and shown is {', '.join(models) or 'nothing'}: choose it with model=")
    return names[list(models).index(str(told))]


def _look(
    view: View,
    layers: tuple[int, ...],
    scores: xr.Dataset | None,
    labels: Any,
    probe: Probe | LayerSweep | None,
    variable: str | None,
    prompts: int | Iterable[Any],
    *,
    text: bool,
    sample_bytes: int,
) -> GroupPage:
    """Everything that the page says of one group."""
    missing: list[str] = []
    pooled = _pooled(view, variable)
    y: Array | None = None
    named = ""
    if labels is not None:
        if pooled is None:
            raise InvalidArgumentError(
                f"{view.where} holds nothing pooled with layers to fit labels on: extract with pooling=, or give scores="
            )
        data = to_dataset(view, "prompts")
        named, y = parse_labels(data[pooled], labels)
        if scores is None:
            # What the words say without the model, where they are stored: a curve alone shows nothing.
            controls = ["shuffled_labels", *(["bag_of_words"] if "text" in data.coords and (data.text.values != "").all() else [])]
            scores = sweep(data[pooled].sel(layer=list(layers)), labels=labels, controls=controls)
    charts = () if scores is None else _charts_of(scores)
    note = "" if scores is None else _scores_note(scores)
    if scores is None:
        missing.append("No scores: give labels, or the scores of a sweep, and curves by layer are shown here.")
    profiled = choose_profiled(view)
    profile = None
    if profiled is None:
        missing.append("Nothing with layers is stored, so there are no norms to show.")
    else:
        held = tuple(layer for layer in layers if layer in view.layers(profiled[0]))
        profile = profile_layers(view, *profiled, held, sample_bytes=sample_bytes)
    tokens = None
    if profiled is None or profiled[0] != "tokens":
        missing.append("No tokens are stored: extract with keep_tokens=True to see them one by one.")
    else:
        rows = _shown_rows(view, prompts, y)
        tokens = _tokens(view, profiled[1], rows, layers, probe, pooled, named, y, text=text)
    names = [(level, name) for level in LEVELS for name in view.variables(level)][:SHOWN_VARIABLES]
    bins = max(20, min(COVERAGE_BINS, COVERAGE_CELLS // max(1, len(names) * len(layers))))
    coverage = tuple(bin_coverage(view, level, name, layers, bins=bins) for level, name in names)
    return GroupPage(
        contents=describe_view(view),
        layers=layers,
        coverage=coverage,
        profile=profile,
        scores=charts,
        scores_note=note,
        tokens=tokens,
        missing=tuple(missing),
        start=_start(layers, charts),
    )


def _pooled(view: View, variable: str | None) -> str | None:
    """What labels are fitted on."""
    held = [name for name, info in view.variables("prompts").items() if info.layered]
    if variable is not None:
        if variable not in held:
            raise InvalidArgumentError(
                f"{variable!r} is not stored per prompt and layer in {view.where}: there is {', '.join(held) or 'none'}"
            )
        return variable
    wanted = [f"{site}_{pooling}" for site in LAYERED_SITES for pooling in POOLINGS]
    return next((name for name in wanted if name in held), held[0] if held else None)


# ------------------------------------------------------------------------------------------------------------------ scores


def _metrics(scores: xr.Dataset) -> list[str]:
    """Names of what is a score: numbers over layer and probe, those that everybody knows first."""
    found = [
        str(name)
        for name, v in scores.data_vars.items()
        if {"layer", "probe"} <= set(v.dims) and v.dtype.kind == "f" and name not in _NO_SCORES and v.dims[-1] not in ("prompt", "hidden")
    ]
    return sorted(found, key=lambda name: (name not in _SCORES, list(_SCORES).index(name) if name in _SCORES else 0))


def _charts_of(scores: xr.Dataset) -> tuple[Chart, ...]:
    """One chart per metric: for each probe, and each place on further dims, the mean over folds and seeds and the band of all of them."""
    scores = scores.sortby("layer")
    layers = tuple(int(layer) for layer in scores.layer.values)
    step = -(-len(layers) // SHOWN_LAYERS)
    charts = []
    for metric in _metrics(scores)[:SHOWN_VARIABLES]:
        array = scores[metric].isel(layer=slice(None, None, step))
        over = [dim for dim in ("fold", "seed", "repeat") if dim in array.dims]
        rest = [dim for dim in array.dims if dim not in ("layer", *over)]
        flat = array.transpose(*rest, "layer", *over)
        shape = [flat.sizes[dim] for dim in rest]
        series = []
        for place in np.ndindex(*shape):
            values = np.asarray(flat.values[place], float).reshape(flat.sizes["layer"], -1)
            at = dict(zip(rest, place, strict=True))
            name = ", ".join(
                str(flat[dim].values[i]) if dim == "probe" else f"{dim} {flat[dim].values[i] if dim in flat.coords else i}"
                for dim, i in at.items()
            )
            kind = (
                str(scores["kind"].isel(probe=at["probe"]).item())
                if "kind" in scores.coords and scores["kind"].dims == ("probe",)
                else "probe"
            )
            series.append(_curve(name, values, kind))
        series.sort(key=lambda one: one.kind == "control")
        lines = []
        if metric == "auroc":
            lines = [("chance", 0.5)]
        elif metric == "accuracy" and "majority_share" in scores.attrs:
            lines = [(f"majority class {float(scores.attrs['majority_share']):.2f}", float(scores.attrs["majority_share"]))]
        dropped = len(series) - SHOWN_CURVES
        title = _SCORES.get(metric, str(scores[metric].attrs.get("long_name", metric)))
        charts.append(
            Chart(
                title=title[:1].upper() + title[1:],
                unit=metric,
                layers=layers[::step],
                series=tuple(series[:SHOWN_CURVES]),
                lines=tuple(lines),
                note=f"The first {SHOWN_CURVES} of {len(series)} curves." if dropped > 0 else "",
            )
        )
    return tuple(charts)


def _curve(name: str, values: Array, kind: str) -> Series:
    known = np.isfinite(values).any(axis=1)
    mean, low, high = (np.full(len(values), np.nan) for _ in range(3))
    mean[known], low[known], high[known] = (f(values[known], axis=1) for f in (np.nanmean, np.nanmin, np.nanmax))
    banded = values.shape[1] > 1
    return Series(
        name=name, values=mean, low=low if banded else None, high=high if banded else None, kind="control" if kind == "control" else "probe"
    )


def _scores_note(scores: xr.Dataset) -> str:
    attrs = scores.attrs
    of = " from ".join(str(attrs[name]) for name in ("labels", "variable") if attrs.get(name))
    folds = scores.sizes.get("fold", 1)
    over = f"Mean of {folds} folds; the band reaches from the lowest to the highest." if folds > 1 else "One fold."
    controls = " Dashed and grey: controls." if "kind" in scores.coords and (scores["kind"].values == "control").any() else ""
    return f"{of[:1].upper() + of[1:]}. {over}{controls}" if of else f"{over}{controls}"


def _start(layers: tuple[int, ...], charts: tuple[Chart, ...]) -> int:
    """The layer that is chosen at first: the best of the first metric's probes, else the middle one."""
    for chart in charts[:1]:
        means = [np.asarray(one.values, float) for one in chart.series if one.kind == "probe"]
        if means and np.isfinite(means).any():
            best = int(chart.layers[int(np.nanargmax(np.nan_to_num(np.array(means), nan=-np.inf).max(axis=0)))])
            if best in layers:
                return best
    return layers[len(layers) // 2] if layers else 0


# ------------------------------------------------------------------------------------------------------------------ tokens


def _shown_rows(view: View, prompts: int | Iterable[Any], y: Array | None) -> Ints:
    """Whose tokens are shown."""
    counts = view.token_counts()
    if not isinstance(prompts, (int, np.integer)):
        rows = view.select(prompts)
        if len(rows) > MOST_PROMPTS:
            raise InvalidArgumentError(f"{len(rows)} prompts are more than a page shows: choose at most {MOST_PROMPTS}")
        if len(bare := rows[counts[rows] == 0]):
            raise InvalidArgumentError(f"prompt {view.hashes[bare[0]]} is stored without tokens: extract it with keep_tokens=True")
        return rows
    if isinstance(prompts, bool) or not 0 <= prompts <= MOST_PROMPTS:
        raise InvalidArgumentError(f"prompts={prompts!r}: a page shows 0 to {MOST_PROMPTS}")
    held = np.flatnonzero(counts)
    if y is None:
        return held[:prompts]
    # As many of each class as can be, those that come first.
    of_class = [held[y[held] == label] for label in np.unique(y)]
    turns = [rows[i] for i in range(int(prompts)) for rows in of_class if i < len(rows)]
    return np.sort(np.array(turns[: int(prompts)], np.int64))


def _tokens(
    view: View,
    variable: str,
    rows: Ints,
    layers: tuple[int, ...],
    probe: Probe | LayerSweep | None,
    pooled: str | None,
    named: str,
    y: Array | None,
    *,
    text: bool,
) -> ShownTokens | None:
    if not len(rows):
        return None
    held = tuple(layer for layer in layers if layer in view.layers("tokens"))
    scores: dict[int, Score] | None = None
    what, note = f"norm of {variable}", f"Euclidean norm of {variable} for each token."
    two = False
    if probe is not None:
        scores, positive = _scores_of(probe)
        what, two = f"score of {positive}", True
        note = f"Score of each token by the probe that was given: above 0 for {positive}, below for the other class."
    elif y is not None and pooled is not None:
        others = np.setdiff1d(np.arange(len(view)), rows)
        if len(np.unique(y)) == len(np.unique(y[others])) == 2:
            # A probe is asked about tokens of the site that it learned from.
            site = next((one for one in LAYERED_SITES if pooled.startswith(f"{one}_")), None)
            variable = site if site in view.variables("tokens") else variable
            scores = fit_by_layer(view, pooled, others, y[others], held)
            positive = str(np.unique(y)[1])
            what, two = f"log-odds of {named} = {positive}", True
            note = (
                f"Log-odds of {named} = {positive} for each token of {variable}, by a logistic regression of each layer on {pooled} of the "
                "other prompts. It learned from whole prompts and is asked about tokens: a direction, not a calibrated chance."
            )
    if scores is not None:
        held = tuple(layer for layer in held if layer in scores)
        if not held:
            raise InvalidArgumentError(f"the probe's layers {sorted(scores)} are not among those stored with tokens in {view.where}")
    most = max(8, min(MOST_TOKENS, TOKEN_CELLS // (len(rows) * len(held))))
    found = map_tokens(view, variable, rows, held, scores, most=most)
    shown = tuple(_prompt(view, int(row), int(count), named, y, text=text) for row, count in zip(rows, found.counts, strict=True))
    return ShownTokens(values=found, prompts=shown, what=what, two=two, note=note)


def _scores_of(probe: Any) -> tuple[dict[int, Score], str]:
    """For each layer of a fitted probe what it says of rows of activations, and the class that this is the probability of."""
    if isinstance(probe, LayerSweep):
        each = dict(probe.probes)
    elif isinstance(probe, Probe):
        each = {probe.layers_[0]: probe} if len(probe.layers_) == 1 else {}
        each = each if probe.sweep_result_ is None else dict(probe.sweep_result_.probes)
    else:
        raise InvalidTypeError(f"probe is a {type(probe).__name__}: give a fitted lmprobe_zarr.Probe, or a LayerSweep")
    if not each or any(one.pipeline_ is None for one in each.values()):
        why = (
            "learned from several layers side by side"
            if isinstance(probe, Probe) and len(probe.layers_) > 1
            else "is not fitted on any layer"
        )
        raise InvalidArgumentError(f"the probe {why}: give one that was fitted on one layer, or with layers='sweep'")
    classes = next(iter(each.values())).classes_
    if classes is None or len(classes) != 2:
        raise InvalidArgumentError(
            f"the probe has {'no classes' if classes is None else f'{len(classes)} classes'}: give one of two classes"
        )

    return {layer: score_of(one.pipeline_) for layer, one in each.items()}, str(classes[1])


def _prompt(view: View, row: int, count: int, named: str, y: Array | None, *, text: bool) -> ShownPrompt:
    """A prompt's tokens as they can be shown: by their texts where these are stored, else by their ids or positions."""
    rows = np.array([row])
    columns = view.columns("tokens")

    def column(name: str) -> list[Any]:
        return list(read_values(view, "tokens", name, rows, ())[:count].tolist()) if name in columns else [-1] * count

    whole = str(read_values(view, "prompts", "text", rows, ())[0]) if text and "text" in view.columns("prompts") else ""
    starts, ends = column("char_start"), column("char_end")
    ids = column("token_id") if text else [-1] * count
    pieces: list[tuple[str, str]] = []
    names: list[str] = []
    at = 0
    for position in range(count):
        start, end = int(starts[position]), int(ends[position])
        own = whole[start:end] if 0 <= start < end <= len(whole) else ""
        between = whole[at:start] if own and start > at else ""
        at = max(at, end) if own else at
        pieces.append((between if own else "", own))
        names.append(own or (f"#{ids[position]}" if ids[position] >= 0 else str(position)))
    label = "" if y is None else f"{named} {y[row]}"
    unplaced = whole if not any(own for _, own in pieces) else ""
    return ShownPrompt(hash=str(view.hashes[row]), label=label, text=unplaced, pieces=tuple(pieces), names=tuple(names))
