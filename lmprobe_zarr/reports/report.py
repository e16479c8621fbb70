"""``report``: one self-contained page about a store. Chooses what the page shows; other modules read, compute and draw it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.pages import GroupPage, LayerProfile, ShownTokens, write_page
from lmprobe_zarr.probe import LayerSweep, Probe
from lmprobe_zarr.probes import check_missing, parse_labels
from lmprobe_zarr.reports.groups import find_groups
from lmprobe_zarr.reports.profiles import choose_profiled, list_sites, profile_layers
from lmprobe_zarr.reports.tokens import SHOWN_PROMPTS, PromptLabels, choose_prompts, show_tokens
from lmprobe_zarr.store import GroupContents, Model, Place, Store, describe_view, measure_coverage, open_to_read, to_dataset
from lmprobe_zarr.store.format import Level, Provenance
from lmprobe_zarr.store.parts import View
from lmprobe_zarr.sweeps import sweep
from lmprobe_zarr.sweeps.charts import choose_layer, describe_charts, draw_scores, find_scored, thin_layers
from lmprobe_zarr.version import __version__

__all__ = ["Report", "report"]

# What bounds the page, whatever the store's size; coverage, charts and tokens have bounds of their own.
SHOWN_GROUPS: Final = 4
SAMPLE_BYTES: Final = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Report:
    """One self-contained page about a store. Notebooks display it.

    Parameters
    ----------
    html : str
        The page, which needs no network and no other file.
    """

    html: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file. An existing file is replaced only once the whole page is written.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        Path
            The path of the file.

        Raises
        ------
        InvalidArgumentError
            The file cannot be written.
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
        # In a frame of its own, so that the styles and scripts of the notebook and the page do not affect each other.
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
    model: Model | None = None,
    provenance: Provenance | None = None,
    group: str | None = None,
    scores: xr.Dataset | None = None,
    labels: str | Mapping[Any, Any] | None = None,
    groups: str | None = None,
    missing: str = "raise",
    probe: Probe | LayerSweep | xr.Dataset | None = None,
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
        Which groups are shown in full, the model by its name, hub id or folder; by default the four with most prompts. All are listed.
    scores : Dataset, optional
        From :func:`lmprobe_zarr.sweep`: drawn by layer, with the controls that it holds.
    labels : str or mapping, optional
        A column, or ``{text or hash: label}``. Without `scores` a logistic regression is swept over the layers of `variable`. With two
        classes and without `probe`, tokens show the log-odds of the second class. They come from one such regression for each layer,
        fitted on the prompts that are not shown (2,000 at most, evenly spaced).
    groups : str, optional
        A column: prompts with equal values are in the same fold of that sweep. By default a column whose values show pairs or larger groups
        of prompts, which the page then names; "" for none. `scores` have their folds already, which the page says.
    missing : {"raise", "drop"}
        What happens to prompts without a label. "drop" leaves them out of the sweep, its controls and the regressions for tokens, and
        the page says how many they are. Their tokens are shown only if `prompts` names them.
    probe : Probe, LayerSweep or Dataset, optional
        Fitted on one layer, or swept over layers: tokens show its scores. A Dataset is what :func:`lmprobe_zarr.fit_tokens` gives for two
        classes, with one vector of coefficients for each layer.
    variable : str, optional
        The variable that `labels` are fitted on: a site that is stored pooled, of any width. By default the pooled residual stream.
    prompts : int or iterable of texts, hashes or token ids
        Whose tokens are shown, at most 12; a number means the first ones, equally many of each class.
    text : bool
        Whether the page may contain texts of prompts and tokens; else it has their hashes and positions.
    sample_bytes : int
        How many bytes are read for norms and outliers, over all layers. If there are more, eight runs of neighbouring prompts are read.

    Returns
    -------
    Report
        At most about 3 MB: of many prompts, layers, tokens or groups only some are shown, and the page says which.

    Raises
    ------
    ModelNotStoredError, MissingPromptsError, CorruptPartError, LabelError
    InvalidArgumentError
        Scores of a model that is not shown, or that are not those of a sweep; `groups`, or `missing` without `labels`, beside `scores`,
        where they would do nothing; a probe that is not fitted, or learned from several layers
        side by side; no such variable; more than 12 prompts; a path that cannot be written.
    """
    if path is not None and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
        raise InvalidArgumentError(f"the page cannot be written to {os.fspath(path)!r}: give a file in a folder that exists")
    opened = open_to_read(store)
    if isinstance(sample_bytes, bool) or not isinstance(sample_bytes, int) or sample_bytes < 1:
        raise InvalidArgumentError(f"sample_bytes={sample_bytes!r} is no amount to read: give bytes, at least 1")
    check_missing(missing)
    if scores is not None:
        _check_unused(labels, groups, missing)
    chosen = _choose_groups(opened, model, provenance, group)
    views = {info.name: opened.view(info) for info in opened.groups().values()}
    contents = sorted((describe_view(view) for view in views.values()), key=lambda group: -group.prompts)
    shown = [group for group in contents if group.group.name in chosen and group.prompts][:SHOWN_GROUPS]
    scored = None if scores is None else shown[find_scored(scores, [group.group.model for group in shown])].group.name
    if (labels is not None or probe is not None or variable is not None or not isinstance(prompts, int)) and len(shown) != 1:
        raise InvalidArgumentError(
            f"labels, probe, variable and prompts are of one group, and {len(shown)} are shown: choose it with model= or group="
        )
    options = _Options(
        labels=labels, groups=groups, missing=missing, probe=probe, variable=variable, prompts=prompts, text=text, sample_bytes=sample_bytes
    )  # fmt: skip
    pages = [_describe_group(views[group.group.name], group, scores if scored == group.group.name else None, options) for group in shown]
    made = f"Made by lmprobe-zarr {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. This page fetches nothing."
    if len(chosen) > len(shown):
        made += f" {len(shown)} of {len(chosen)} groups are shown in full: those with most prompts."
    page = Report(
        write_page(" and ".join(_place_name(root) for root in opened.stack), [group.listed() for group in contents], pages, made=made)
    )
    if path is not None:
        page.save(path)
    return page


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What `report` was given for the groups that it shows."""

    labels: str | Mapping[Any, Any] | None
    groups: str | None
    missing: str
    probe: Probe | LayerSweep | xr.Dataset | None
    variable: str | None
    prompts: int | Iterable[Any]
    text: bool
    sample_bytes: int


def _check_unused(labels: str | Mapping[Any, Any] | None, groups: str | None, missing: str) -> None:
    """Raise where an argument would do nothing because scores are given."""
    if groups is not None:
        raise InvalidArgumentError("groups= is for a sweep that the report makes, and scores= are of one that has folds: leave groups= out")
    if missing == "drop" and labels is None:
        raise InvalidArgumentError(
            "missing='drop' is for labels that the report fits, and there are none beside scores=: leave it out, or give labels="
        )


def _choose_groups(store: Store, model: Model | None, provenance: Provenance | None, group: str | None) -> set[str]:
    """Names of the groups that may be shown in full: those that match, by default all."""
    if model is None and group is None and not provenance:
        return set(store.groups())
    matching = {info.name for info in store.matching(model, provenance, group) if store.holds_parts(info.name)}
    if not matching:
        store.find_group(model, provenance=provenance, group=group)  # raises an error that lists the groups
    return matching


def _place_name(store: Store) -> str:
    """A store as the page names it. A local folder is named without its path, since the page may be shared."""
    return store.url.rstrip("/").rpartition("/")[2] if store.storage.is_local else store.url


def _describe_group(view: View, contents: GroupContents, scores: xr.Dataset | None, options: _Options) -> GroupPage:
    """Everything that the page shows of one group."""
    layers = thin_layers(contents.layers)
    pooled = _choose_pooled(view, options.variable)
    labels, scores, note = _score_labels(view, pooled, layers, scores, options)
    charts = () if scores is None else draw_scores(scores)
    profiled = choose_profiled(view)
    tokens: ShownTokens | None = None
    missing: list[str] = []
    if scores is None:
        missing.append("No scores: give labels, or the scores of a sweep, and curves by layer are shown here.")
    if profiled is None:
        missing.append("Nothing with layers is stored, so there are no norms to show.")
    if profiled is None or profiled[0] != "tokens":
        missing.append("No tokens are stored: extract with keep_tokens=True to see them one by one.")
    else:
        rows = choose_prompts(view, options.prompts, labels)
        tokens = show_tokens(view, profiled[1], rows, layers, probe=options.probe, labels=labels, text=options.text)
    return GroupPage(
        contents=contents.listed(),
        layers=layers,
        coverage=measure_coverage(view, layers),
        profile=None if profiled is None else _profile(view, *profiled, layers, options.sample_bytes),
        scores=charts,
        scores_note="" if scores is None else describe_charts(scores) + note,
        tokens=tokens,
        missing=tuple(missing),
        start=choose_layer(layers, charts),
    )


def _choose_pooled(view: View, variable: str | None) -> str | None:
    """The variable that labels are fitted on: the given one, else the pooled residual stream, else any; None if none is stored."""
    stored = list_sites(view, "prompts")
    if variable is not None:
        if variable not in stored:
            raise InvalidArgumentError(
                f"{variable!r} is no site that is stored per prompt in {view.where}: there is {', '.join(stored) or 'none'}"
            )
        return variable
    layered = [name for name in stored if view.variables("prompts")[name].layered]
    return next(iter([*layered, *stored]), None)


def _score_labels(
    view: View, pooled: str | None, layers: Sequence[int], scores: xr.Dataset | None, options: _Options
) -> tuple[PromptLabels | None, xr.Dataset | None, str]:
    """The labels of the prompts, or None; the given scores, else those of a sweep over the labels; and what is to be said of them."""
    note = "" if scores is None else _describe_prompts(scores)
    if options.labels is None:
        return None, scores, note
    if pooled is None:
        raise InvalidArgumentError(f"{view.where} holds no pooled site to fit labels on: extract with pooling=, or give scores=")
    data = to_dataset(view, "prompts")
    parsed = parse_labels(data[pooled], options.labels, missing=options.missing)
    labels = PromptLabels(parsed.name, parsed.values, parsed.rows, variable=pooled)
    if scores is None:
        note = labels.left_out("the scores")
        labelled = data.isel(prompt=labels.rows)
        groups = find_groups(labelled, labels.name) if options.groups is None else options.groups or None
        if groups is not None:
            why = "" if options.groups else ", whose values show that prompts belong together,"
            note += _in_the_same_fold(groups, why)
        # A curve alone says little: if the texts are stored, scores from the words alone, without the model, are drawn beside it.
        controls = ["shuffled_labels", *(["bag_of_words"] if "text" in labelled.coords and (labelled.text.values != "").all() else [])]
        array = data[pooled]
        if "layer" in array.dims:
            held = view.layers_with("prompts", pooled)
            array = array.sel(layer=[layer for layer in layers if layer in held])
        scores = sweep(array, labels=options.labels, controls=controls, groups=groups, missing=options.missing)
    return labels, scores, note


def _describe_prompts(scores: xr.Dataset) -> str:
    """What a sweep has recorded of prompts without a label, and of groups, in the words of a sweep that the report makes."""
    attrs = scores.attrs
    note = ""
    scored, dropped = attrs.get("n_prompts"), attrs.get("n_dropped")
    if isinstance(scored, int | np.integer) and isinstance(dropped, int | np.integer):
        name = str(attrs.get("labels", "labels"))
        note = PromptLabels(name, np.zeros(scored + dropped), np.arange(scored), variable="").left_out("the scores")
    groups = attrs.get("groups")
    return note + (_in_the_same_fold(str(groups)) if isinstance(groups, str) and groups else "")


def _in_the_same_fold(groups: str, why: str = "") -> str:
    return f" Prompts with the same {groups!r}{why} are in the same fold."


def _profile(view: View, level: Level, variable: str, layers: Sequence[int], sample_bytes: int) -> LayerProfile:
    """Norms and outliers of a variable in the shown layers that are stored on its level."""
    stored = view.layers_with(level, variable)
    return profile_layers(view, level, variable, tuple(layer for layer in layers if layer in stored), sample_bytes=sample_bytes)
