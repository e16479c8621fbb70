"""The tokens of a few prompts, each with its score by a probe or its norm, as the page shows them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import split_variable
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.pages import ShownPrompt, ShownTokens
from lmprobe_zarr.probe import LayerSweep, Probe
from lmprobe_zarr.reports.profiles import Score, Weigh, fit_by_layer, map_tokens, score_of, weigh_of
from lmprobe_zarr.store.parts import RoleArray, View, has_role_names, read_values
from lmprobe_zarr.sweeps.origin import Origin, warn_of_origin
from lmprobe_zarr.typing import Array, Ints

__all__ = ["SHOWN_PROMPTS", "PromptLabels", "choose_prompts", "show_tokens"]

#: What bounds the maps, whatever the size of the store.
SHOWN_PROMPTS: Final = 4
MOST_PROMPTS: Final = 12
MOST_TOKENS: Final = 160
TOKEN_CELLS: Final = 48_000


@dataclass(frozen=True, slots=True)
class PromptLabels:
    """The labels of the prompts of a view.

    Parameters
    ----------
    name : str
        What the labels are called.
    values : ndarray, shape (prompt,)
        Prompts that are not in `rows` hold an arbitrary one.
    rows : ndarray of int
        The prompts that have a label, by their places in the view, ascending.
    variable : str
        The variable that a probe of these labels is fitted on: a pooled one.
    """

    name: str
    values: Array
    rows: Ints
    variable: str

    def left_out(self, what: str) -> str:
        """How many prompts have no label and are therefore left out of `what`; empty if every prompt has one."""
        lacking = len(self.values) - len(self.rows)
        if not lacking:
            return ""
        have, are = ("has", "is") if lacking == 1 else ("have", "are")
        return f" {lacking:,} of {len(self.values):,} prompts {have} no label in {self.name!r} and {are} left out of {what}."


def choose_prompts(view: View, prompts: int | Iterable[Any], labels: PromptLabels | None) -> Ints:
    """The places of the prompts whose tokens are shown: the given ones, or the first ones that have tokens and, if there are labels, one.

    Raises
    ------
    InvalidArgumentError
        More prompts than a page shows, or prompts that are stored without tokens.
    """
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
    stored = np.flatnonzero(counts)
    if labels is None:
        return stored[:prompts]
    # The classes take turns, so that as many prompts of each are shown as possible.
    stored = np.intersect1d(stored, labels.rows)
    of_class = [stored[labels.values[stored] == label] for label in np.unique(labels.values)]
    turns = [rows[i] for i in range(int(prompts)) for rows in of_class if i < len(rows)]
    return np.sort(np.array(turns[: int(prompts)], np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenScores:
    """The number that is shown for each token: its score, or its weight in its prompt, by the probe of each layer; or its norm."""

    variable: str
    what: str
    note: str
    by_layer: Mapping[int, Score] | None = None
    weights: Mapping[int, Weigh] | None = None


def show_tokens(
    view: View,
    variable: str,
    rows: Ints,
    layers: Sequence[int],
    *,
    probe: Probe | LayerSweep | xr.Dataset | None,
    labels: PromptLabels | None,
    text: bool,
) -> ShownTokens | None:
    """The tokens of some prompts with their scores, or with norms if there are neither a probe nor labels of two classes.

    Parameters
    ----------
    view : View
    variable : str
        A variable with tokens and layers.
    rows : ndarray of int
        The prompts, by their places in the view.
    layers : sequence of int
    probe : Probe, LayerSweep or Dataset of `fit_tokens`, optional
        Scores the tokens; without it, a regression of each layer on `labels` does.
    labels : PromptLabels, optional
    text : bool
        Whether texts of prompts and tokens may be shown.

    Returns
    -------
    ShownTokens or None
        None if there are no prompts.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        A probe that was not fitted on single layers of two classes, or on none of the stored layers.
    """
    if not len(rows):
        return None
    scores = _choose_scores(view, variable, rows, layers, probe, labels)
    held = view.layers_with("tokens", scores.variable)
    stored = tuple(layer for layer in layers if layer in held)
    of_probe: Mapping[int, Any] | None = scores.by_layer if scores.weights is None else scores.weights
    if of_probe is not None:
        stored = tuple(layer for layer in stored if layer in of_probe)
        if not stored:
            raise InvalidArgumentError(f"the probe's layers {sorted(of_probe)} are not among those stored with tokens in {view.where}")
    most = max(8, min(MOST_TOKENS, TOKEN_CELLS // (len(rows) * len(stored))))
    values = map_tokens(view, scores.variable, rows, stored, scores.by_layer, scores.weights, most=most)
    prompts = tuple(_show_prompt(view, int(row), int(count), labels, text=text) for row, count in zip(rows, values.counts, strict=True))
    weights, two = scores.weights is not None, scores.by_layer is not None
    return ShownTokens(values=values, prompts=prompts, what=scores.what, two=two, note=scores.note, weights=weights)


def _choose_scores(
    view: View, variable: str, rows: Ints, layers: Sequence[int], probe: Probe | LayerSweep | xr.Dataset | None, labels: PromptLabels | None
) -> _TokenScores:
    """Scores by the given probe; else by regressions on the labels of the prompts that are not shown; else norms."""
    if isinstance(probe, xr.Dataset):
        return _scores_of_coefficients(view, variable, probe)
    if probe is not None:
        fitted = _probes_by_layer(probe)
        _check_width(view, variable, {int(each.pipeline_.n_features_in_) for each in fitted.values()})
        warn_of_origin(next(iter(fitted.values())).origin_, _origin_of(view, variable))
        first = next(iter(fitted.values())).pipeline_
        if hasattr(first.steps[-1][1], "weights"):
            kind = type(first.steps[-1][1]).__name__
            note = f"How much each token weighs in the score of its prompt by the probe that was given ({kind}), the mean over its heads."
            return _TokenScores(variable=variable, what="weight", note=note, weights={n: weigh_of(p.pipeline_) for n, p in fitted.items()})
        by_layer, positive = _score_by_layer(fitted)
        note = f"Score of each token by the probe that was given: above 0 for {positive}, below for the other class."
        return _TokenScores(variable=variable, what=f"score of {positive}", note=note, by_layer=by_layer)
    if labels is not None:
        y = labels.values
        others = np.setdiff1d(labels.rows, rows)
        if len(np.unique(y)) == len(np.unique(y[others])) == 2:
            scored, shared = _scored_site(view, variable, labels.variable, layers)
            by_layer = fit_by_layer(view, labels.variable, others, y[others], shared)
            if by_layer:
                positive = f"{labels.name} = {np.unique(y)[1]}"
                note = (
                    f"Log-odds of {positive} for each token of {scored}, by a logistic regression of each layer on {labels.variable} of "
                    "the other prompts. It learned from whole prompts and is asked about tokens: a direction, not a calibrated chance."
                )
                note += labels.left_out("this regression")
                return _TokenScores(variable=scored, what=f"log-odds of {positive}", note=note, by_layer=by_layer)
    return _TokenScores(variable=variable, what=f"norm of {variable}", note=f"Euclidean norm of {variable} for each token.")


def _scored_site(view: View, variable: str, learned: str, layers: Sequence[int]) -> tuple[str, list[int]]:
    """The tokens that a probe on a pooled variable scores, and the layers that both are stored in; none where their rows differ in width.

    The probe learns from one site, so it scores tokens of the same site, or else those of `variable`.
    """
    tokens, pooled = view.variables("tokens"), view.variables("prompts")[learned]
    scored = site if (site := split_variable(learned)[0]) in tokens else variable
    if not (pooled.layered and tokens[scored].layered and tokens[scored].row_shape == pooled.row_shape):
        return scored, []
    held = {*view.layers_with("tokens", scored)} & {*view.layers_with("prompts", learned)}
    return scored, [layer for layer in layers if layer in held]


def _origin_of(view: View, variable: str) -> Origin:
    return Origin.of_group(view.group.model, variable, view.group.provenance)


def _check_width(view: View, variable: str, widths: set[int]) -> None:
    """Raise where a probe was fitted on rows of another width than the tokens that it is to score."""
    width = int(np.prod(view.variables("tokens")[variable].row_shape))
    if widths != {width}:
        raise InvalidArgumentError(
            f"the probe was fitted on rows of {', '.join(map(str, sorted(widths)))} values, and the tokens of {variable!r} have {width}: "
            "give a probe of that site, or store the tokens of its own"
        )


def _scores_of_coefficients(view: View, variable: str, fitted: xr.Dataset) -> _TokenScores:
    """The decision function of what `fit_tokens` gives: a probe with one vector of coefficients for each layer, of two classes."""
    try:
        classes = json.loads(str(fitted.attrs.get("classes", "null")))
    except ValueError:
        classes = None
    dims = fitted["coef"].dims if {"coef", "intercept"} <= set(fitted.data_vars) else ()
    if not isinstance(classes, list) or len(classes) != 2 or len(dims) != 2 or dims[0] != "layer" or dims[1] in ("head", "unit", "class"):
        raise InvalidArgumentError(
            "the probe is a Dataset that does not score single tokens for two classes: give what fit_tokens returns for a linear probe, or "
            "a fitted lmprobe_zarr.Probe; the scores of a sweep are scores="
        )
    site = str(fitted.attrs.get("variable") or "")
    scored = site if site in view.variables("tokens") else variable
    _check_width(view, scored, {int(fitted.sizes[dims[1]])})
    warn_of_origin(Origin(str(fitted.attrs.get("model") or ""), site), _origin_of(view, scored))

    def score_of_layer(layer: int) -> Score:
        held = fitted.sel(layer=layer)
        coef, intercept = held["coef"].values.astype(float), float(held["intercept"])
        return lambda values: np.asarray(values.reshape(len(values), -1).astype(float) @ coef + intercept)

    by_layer = {
        layer: score_of_layer(layer) for layer in fitted["layer"].values.tolist() if bool(fitted["coef"].sel(layer=layer).notnull().all())
    }
    labels = str(fitted.attrs.get("labels") or "")
    positive = f"{labels} = {classes[1]}" if labels else str(classes[1])
    kind = fitted.attrs.get("probe", "linear")
    note = (
        f"Score of each token of {scored} by the probe that was given ({kind}): above 0 for {positive}, below for {classes[0]}. A probe "
        "says most about tokens that it has not learned from."
    )
    return _TokenScores(variable=scored, what=f"score of {positive}", note=note, by_layer=by_layer)


def _probes_by_layer(probe: Any) -> dict[int, Probe]:
    """The fitted probe of each layer."""
    if isinstance(probe, LayerSweep):
        by_layer = dict(probe.probes)
    elif isinstance(probe, Probe):
        by_layer = {probe.layers_[0]: probe} if len(probe.layers_) == 1 else {}
        by_layer = by_layer if probe.sweep_result_ is None else dict(probe.sweep_result_.probes)
    else:
        raise InvalidTypeError(
            f"probe is a {type(probe).__name__}: give a fitted lmprobe_zarr.Probe, a LayerSweep, or what fit_tokens returns"
        )
    if not by_layer or any(fitted.pipeline_ is None for fitted in by_layer.values()):
        why = (
            "learned from several layers side by side"
            if isinstance(probe, Probe) and len(probe.layers_) > 1
            else "is not fitted on any layer"
        )
        raise InvalidArgumentError(f"the probe {why}: give one that was fitted on one layer, or with layers='sweep'")
    return by_layer


def _score_by_layer(by_layer: Mapping[int, Probe]) -> tuple[dict[int, Score], str]:
    """A scoring function for each layer of a fitted probe, and the class that scores above 0 mean."""
    classes = next(iter(by_layer.values())).classes_
    if classes is None or len(classes) != 2:
        raise InvalidArgumentError(
            f"the probe has {'no classes' if classes is None else f'{len(classes)} classes'}: give one of two classes"
        )
    return {layer: score_of(fitted.pipeline_) for layer, fitted in by_layer.items()}, str(classes[1])


def _show_prompt(view: View, row: int, count: int, labels: PromptLabels | None, *, text: bool) -> ShownPrompt:
    """A prompt with its first tokens, named by their texts if these are stored, else by their ids or positions."""
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
    label = "" if labels is None or row not in labels.rows else f"{labels.name} {labels.values[row]}"
    unplaced = whole if not any(own for _, own in pieces) else ""
    made = tuple(flag == 1 for flag in column("generated"))
    return ShownPrompt(
        hash=str(view.hashes[row]), label=label, text=unplaced, pieces=tuple(pieces), names=tuple(names),
        roles=_roles(view, rows, count), generated=made if any(made) else (),
    )  # fmt: skip


def _roles(view: View, rows: Ints, count: int) -> tuple[str, ...]:
    """The roles of a prompt's first tokens, empty where unknown; none where none is known."""
    if "role" not in view.columns("tokens"):
        return ()
    source = view.source("tokens", "role", rows, (), view.token_counts()[rows])
    if not has_role_names(source):
        return ()
    names = tuple(str(name) for name in RoleArray(source).values(slice(0, count)).tolist())
    return names if any(names) else ()
