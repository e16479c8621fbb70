"""Controls: what is fitted beside the probes, so that a good score means something. A trial is one probe or one control.

Holds the names of the controls, what each is fitted on, and shuffled labels. Never activations themselves, fits or scores.

A probe's score on held-out prompts says that a label can be read from the activations. It does not say that the model computed it: the
words alone, the length of the prompt or the embedding may predict it as well. Nor does it say how much of the score comes from what the
probe itself has memorised (J. Hewitt and P. Liang, "Designing and Interpreting Probes with Control Tasks", 2019, arXiv:1909.03368;
Y. Belinkov, "Probing Classifiers: Promises, Shortcomings, and Advances", Computational Linguistics 48, 2022).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes.bags import BAGS, BAGS_OF_TOKENS, make_bag, read_token_ids
from lmprobe_zarr.probes.classifiers import draws_at_random, has_strength, make_probe
from lmprobe_zarr.probes.folds import Fold, group_codes
from lmprobe_zarr.probes.identity import list_prompts, show_prompts
from lmprobe_zarr.probes.labels import Groups, Labels, bare_variable
from lmprobe_zarr.probes.pipelines import make_pipeline_for, parse_preprocessing
from lmprobe_zarr.probes.sentence_embeddings import check_encoder, embed_texts, is_encoder
from lmprobe_zarr.tokens import check_listed
from lmprobe_zarr.typing import Array, is_listed

__all__ = [
    "BAGS_OF_TOKENS", "CONTROLS", "OF_MODELS", "Shuffle", "Trial", "check_shuffles", "deal_to_units", "list_trials", "make_estimator",
    "parse_controls", "read_features", "shuffle_labels",
]  # fmt: skip
#: Shuffled labels, shape (prompt,), and the folds that were drawn for them.
Shuffle = tuple[Array, tuple[Fold, ...]]

#: Every control by name, and what it says.
CONTROLS: Final[Mapping[str, str]] = {
    "shuffled_labels": "each probe on labels dealt anew to prompts, or to whole groups: what it scores without anything to learn",
    "bag_of_words": "logistic regression on counts of the text's words, signs and, of scripts without spaces, characters",
    "tfidf": "logistic regression on the same counts by how rare each is (TF-IDF)",
    "length": "logistic regression on the logarithm of the number of tokens (of characters where tokens are not known)",
    "perplexity": "logistic regression on the logarithm of the model's own perplexity of the prompt",
    "layer_0": "the first probe on layer 0: what is there before the model has worked on it",
    "embed": "the first probe on the embeddings",
    "random_direction": "logistic regression on the activations' projection on one random direction",
    "majority": "the most frequent label (of a regression: the mean) for every prompt",
}
#: Controls that are fitted on what a model makes of the texts that is given with them.
OF_MODELS: Final[Mapping[str, str]] = {
    "sentence_embedding": "logistic regression on sentence embeddings of the text by another model, an encoder",
}
#: Values of `Trial.features` that have a meaning of their own.
ACTIVATIONS: Final = "activations"
DIRECTION: Final = "random_direction"
LAYER_0: Final = "layer_0"
SENTENCES: Final = "sentence_embedding"
_SIMPLE: Final[Mapping[str, str]] = {"classification": "logistic_regression", "regression": "ridge_regression"}


@dataclass(frozen=True, slots=True)
class Trial:
    """A probe or a control that a sweep fits: one entry of the dim ``probe``.

    Parameters
    ----------
    name : str
    probe : str or estimator
        What is fitted, as for :func:`~lmprobe_zarr.probes.make_probe`.
    control : str
        Which control it is; empty for a probe.
    features : str
        What it is fitted on: ``"activations"`` of each layer, their projection on one ``"random_direction"``, the activations of
        ``"layer_0"``, or a key of :func:`read_features`, whose features do not depend on a layer.
    shuffled : bool
        Whether its labels are shuffled.
    shuffles : int
        How many times, for a p-value; 0 for a control whose labels are shuffled once.
    """

    name: str
    probe: Any
    control: str = ""
    features: str = ACTIVATIONS
    shuffled: bool = False
    shuffles: int = 0

    @property
    def kind(self) -> str:
        """Either "probe" or "control"."""
        return "control" if self.control else "probe"

    @property
    def by_layer(self) -> bool:
        """Whether it has a score of its own in every layer."""
        return self.features in (ACTIVATIONS, DIRECTION)

    @property
    def constant(self) -> bool:
        """Whether it is fitted on no stored layer at all."""
        return not self.by_layer and self.features != LAYER_0

    def random(self, preprocessing: str | None) -> bool:
        """Whether another seed may give another score."""
        pca = any(step.kind == "pca" for step in parse_preprocessing(preprocessing))
        return self.shuffled or self.features == DIRECTION or draws_at_random(self.probe) or (pca and not self.of_words)

    @property
    def of_words(self) -> bool:
        """Whether it is fitted on texts, or on token ids as texts."""
        return self.features in BAGS

    @property
    def penalised(self) -> bool:
        """Whether it has a regularisation strength."""
        return self.features in (ACTIVATIONS, LAYER_0) and has_strength(self.probe)


def list_trials(probes: Mapping[str, Any], controls: Mapping[str, Any], task: str) -> tuple[Trial, ...]:
    """Probes and controls, in this order.

    Parameters
    ----------
    probes : mapping of name to probe
    controls : mapping
        From :func:`parse_controls`.
    task : {"classification", "regression"}

    Raises
    ------
    InvalidArgumentError
        A control has the name of a probe.
    """
    trials = [Trial(name, probe) for name, probe in probes.items()]
    first = next(iter(probes.values()))
    for name, given in controls.items():
        if name == "shuffled_labels":
            trials += [Trial(f"{name}:{probe}", each, name, shuffled=True, shuffles=given or 0) for probe, each in probes.items()]
        elif given is not None or name in BAGS_OF_TOKENS:
            trials.append(Trial(name, _SIMPLE[task], name, name))
        elif name in ("bag_of_words", "tfidf"):
            trials.append(Trial(name, _SIMPLE[task], name, "text"))
        elif name in ("layer_0", "embed"):
            trials.append(Trial(name, first, name, name))
        else:
            trials.append(Trial(name, name if name == "majority" else _SIMPLE[task], name, name))
    names = [trial.name for trial in trials]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidArgumentError(
            f"a probe and a control are both called {twice!r}: give the probe as {{'another name': …}}, or leave one out"
        )
    return tuple(trials)


def parse_controls(controls: Any) -> dict[str, Any]:
    """Name to the caller's own features, or to None for a control that needs none from the caller; "shuffled_labels" to their number.

    Parameters
    ----------
    controls : str, iterable of str, mapping of name to features, or None
        Features of "bag_of_tokens" and "tfidf_of_tokens" are what :func:`~lmprobe_zarr.probes.bags.read_token_ids` takes.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        `controls` has none of these forms, or a name is unknown.
    """
    if controls is None:
        return {}
    if isinstance(controls, Mapping):
        found = dict(controls)
    else:
        listed = [controls] if isinstance(controls, str) else list(controls) if is_listed(controls) else [controls]
        found = dict.fromkeys(listed) if all(isinstance(name, str) for name in listed) else {None: None}
    for name, features in found.items():
        if not isinstance(name, str):
            raise InvalidTypeError(f"controls={controls!r:.60} are no names: give some of {', '.join(CONTROLS)}, or {{name: features}}")
        if features is None and name not in CONTROLS and name not in BAGS_OF_TOKENS and name not in OF_MODELS:
            known = (*CONTROLS, *BAGS_OF_TOKENS, *OF_MODELS)
            raise InvalidArgumentError(
                f"there is no control {name!r}{nearest(name, known)}: use some of {', '.join(known)}, or give its features as {{name: …}}"
            )
        if name == "shuffled_labels":
            check_shuffles(features)
        elif name == SENTENCES and features is None:
            raise InvalidArgumentError(
                "control 'sentence_embedding' needs an encoder: give its folder, {'sentence_embedding': 'models/all-MiniLM-L6-v2'}"
            )
        elif name == SENTENCES and is_encoder(features):
            check_encoder(features)
        elif features is not None and name in ("layer_0", "majority", "random_direction", "text", "activations"):
            raise InvalidArgumentError(f"control {name!r} takes no features: give None for it, or call yours otherwise")
    return found


def check_shuffles(number: Any) -> int:
    """How many times labels are shuffled; 0 where no number is given, so that they are shuffled once and there is no p-value.

    Raises
    ------
    InvalidArgumentError
        Not a whole number of at least 1.
    """
    if number is None:
        return 0
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        raise InvalidArgumentError(
            f"control 'shuffled_labels' was given {number!r:.60}: give how many times labels are shuffled, such as 100, or None for once"
        )
    return int(number)


def make_estimator(trial: Trial, random_state: int, task: str, *, preprocessing: str | None = None, strength: float | None = None) -> Any:
    """A fresh, unfitted estimator for one trial."""
    if trial.of_words:
        return make_bag(trial.control, make_probe(trial.probe, random_state, task=task, standardise=False))
    if trial.control == "majority" and task == "regression":
        from sklearn.dummy import DummyRegressor

        return DummyRegressor()
    if preprocessing is None or trial.features not in (ACTIVATIONS, LAYER_0, "embed"):
        return make_probe(trial.probe, random_state, task=task, strength=strength)
    return make_pipeline_for(trial.probe, task=task, preprocessing=preprocessing, random_state=random_state, strength=strength)


def shuffle_labels(
    labels: Labels,
    prompts: Sequence[str],
    groups: Groups | None,
    draw_folds: Callable[[Labels], tuple[Fold, ...]],
    random_state: int,
    number: int = 0,
) -> Shuffle:
    """Shuffled labels, shape (prompt,), and folds drawn for them: labels without meaning, of data that otherwise are alike.

    All rows of one prompt have the same label. Where there are groups, each of one label, whole groups exchange their labels. Where
    labels differ within groups, groups of equal size exchange them, and they are dealt anew within each group: so pairs stay pairs of
    opposites. Folds are stratified by the shuffled labels, as those of the true labels are by these.

    Source: J. Hewitt and P. Liang (2019), arXiv:1909.03368, whose control task gives each type of word a random label. A group is on one
    side of a fold only, so memorised labels do not help and the expected score is chance; a higher score shows a leak.
    :func:`lmprobe_zarr.selectivity` subtracts it.

    Parameters
    ----------
    labels : Labels
    prompts : sequence of str, shape (prompt,)
    groups : Groups, optional
    draw_folds : callable
        The folds for some labels. Labels are shuffled again where it raises a LabelError, since a fold trains on one class.
    random_state : int
    number : int
        Which of several shuffles.
    """
    words = f"{random_state}\0shuffled labels\0{labels.name}" + (f"\0{number}" if number else "")
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:8], "little"))
    codes = group_codes([prompts[row] for row in labels.rows], None)
    _, first, of_prompt = np.unique(codes, return_index=True, return_inverse=True)
    given = labels.values[labels.rows][first]
    unit = None if groups is None else groups.codes[labels.rows][first]
    shuffled = labels.values.copy()
    for _ in range(100):
        shuffled[labels.rows] = deal_to_units(given, unit, rng)[of_prompt]
        try:
            return shuffled, draw_folds(replace(labels, values=shuffled))
        except LabelError:
            continue
    raise InvalidArgumentError("control 'shuffled_labels' found no labels of two classes for every fold: use fewer folds, or leave it out")


def deal_to_units(given: Array, unit: Array | None, rng: np.random.Generator) -> Array:
    """Labels dealt anew, shape (prompt,).

    Parameters
    ----------
    given : ndarray, shape (prompt,)
        The labels of different prompts.
    unit : ndarray of int, shape (prompt,), or None
        The group of each. Groups of one label exchange it as wholes. Otherwise groups of equal size exchange their labels, which are
        dealt anew within each.
    rng : Generator
    """
    if unit is None:
        return np.asarray(rng.permutation(given))
    _, heads, number = np.unique(unit, return_index=True, return_inverse=True)
    if (given[heads][number] == given).all():
        return np.asarray(rng.permutation(given[heads])[number])
    order = np.argsort(number, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(number))[:-1])
    dealt = given.copy()
    for size in sorted({len(rows) for rows in members}):
        of_size = [rows for rows in members if len(rows) == size]
        for rows, place in zip(of_size, rng.permutation(len(of_size)), strict=True):
            dealt[rows] = rng.permutation(given[of_size[place]])
    return dealt


# -- what controls are fitted on -------------------------------------------------------------------------------------------


def read_features(
    trials: Sequence[Trial], controls: Mapping[str, Any], array: xr.DataArray, given: xr.Dataset | None, rows: Array, *, run: bool = True
) -> dict[str, Any]:
    """By name, what trials without a layer are fitted on: texts, small matrices of float64, or a lazy variable.

    Parameters
    ----------
    trials : sequence of Trial
    controls : mapping
        From :func:`parse_controls`.
    array : DataArray over prompt
        Whose coordinates are read.
    given : Dataset, optional
        Where embeddings and perplexities are looked up.
    rows : ndarray of int
        The prompts that must have a value.
    run : bool
        Whether an encoder of sentences is run. Without, zeros stand for its embeddings, for a plan that is never fitted.

    Raises
    ------
    InvalidArgumentError
        The features of a control are not stored, or some prompts lack them.
    """
    own = {name: features for name, features in controls.items() if features is not None and name != "shuffled_labels"}
    found: dict[str, Any] = {}
    for trial in trials:
        key = trial.features
        if not trial.constant or key in found:
            continue
        if key in BAGS_OF_TOKENS:
            found[key] = read_token_ids(key, controls[key], array, given, rows)
        elif key == SENTENCES and is_encoder(own[key]):
            texts = _texts(trial.name, array, rows)
            embedded = embed_texts([texts[row] for row in rows], own[key]) if run else np.zeros((len(rows), 1))
            found[key] = np.full((len(texts), embedded.shape[1]), np.nan)
            found[key][rows] = embedded
        elif key in own:
            found[key] = _own_features(key, own[key], array)
        elif key == "text":
            found[key] = _texts(trial.name, array, rows)
        elif key == "length":
            found[key] = _lengths(array, rows)
        elif key == "perplexity":
            found[key] = _perplexity(array, given)
        elif key == "embed":
            found[key] = _embeddings(array, given)
        else:
            found[key] = np.zeros((array.sizes["prompt"], 1))
        if isinstance(found[key], np.ndarray):
            bad = [int(row) for row in rows if not np.isfinite(found[key][row]).all()]
            if bad:
                raise InvalidArgumentError(
                    f"control {trial.name!r} has no finite value for {len(bad)} of {len(rows)} prompts ({show_prompts(array, bad)}): "
                    "leave these prompts out, or the control"
                )
    return found


def _texts(name: str, array: xr.DataArray, rows: Array) -> list[str]:
    if "text" not in array.coords:
        raise InvalidArgumentError(
            f"control {name!r} needs the prompts' texts, and there is no coordinate 'text': add one, or leave it out"
        )
    texts = [str(text) for text in array.coords["text"].values.tolist()]
    without = [int(row) for row in rows if not texts[row].strip()]
    if without:
        raise InvalidArgumentError(
            f"control {name!r} needs the prompts' texts, which {len(without)} of {len(rows)} prompts lack "
            f"({show_prompts(array, without)}): leave it out"
        )
    return texts


def _lengths(array: xr.DataArray, rows: Array) -> Array:
    for name in ("prompt_length", "n_tokens"):
        if name in array.coords and array.coords[name].dims == ("prompt",):
            lengths = np.asarray(array.coords[name].values, np.float64)
            if (lengths[rows] > 0).all():
                return np.asarray(np.log(np.maximum(lengths, 1))[:, None])
    texts = _texts("length", array, rows)
    return np.log([[max(len(text), 1)] for text in texts])


def _perplexity(array: xr.DataArray, given: xr.Dataset | None) -> Array:
    held = given if given is not None and "perplexity" in given else array.coords
    if "perplexity" not in held or "prompt" not in held["perplexity"].dims:
        raise InvalidArgumentError(
            "control 'perplexity' needs the model's perplexities, which are not there:\n"
            "extract with perplexity=True and give the whole dataset, or give them as {'perplexity': values}"
        )
    values = held["perplexity"]
    values = values.sel(statistic="mean") if "statistic" in values.dims else values
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(np.asarray(values.values, np.float64)).reshape(len(values), -1))


def _embeddings(array: xr.DataArray, given: xr.Dataset | None) -> Any:
    name = str(array.name)
    pooled = name.partition("_")[2]
    candidates = [str(key) for key in (() if given is None else given.data_vars) if str(key).partition("_")[0] == "embed"]
    wanted = f"embed_{pooled}"
    if given is None or not candidates:
        raise InvalidArgumentError(
            "control 'embed' needs the embeddings, which are not there: give the dataset that holds them, or {'embed': embeddings}"
        )
    chosen = wanted if wanted in candidates else candidates[0]
    return _bare_matrix(chosen, given[chosen], array)


def _own_features(name: str, features: Any, array: xr.DataArray) -> Any:
    if isinstance(features, xr.DataArray):
        if "prompt" not in features.coords:
            check_listed(array, features, f"the features of control {name!r}")
        return _bare_matrix(name, features, array)
    check_listed(array, features, f"the features of control {name!r}")
    try:
        values = np.asarray(features, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"control {name!r} holds {type(features).__name__}, expected numbers, one row per prompt") from error
    if values.ndim not in (1, 2) or len(values) != array.sizes["prompt"] or not values.size:
        raise InvalidArgumentError(f"control {name!r} has shape {values.shape}, expected one row per prompt: ({array.sizes['prompt']}, …)")
    return values.reshape(len(values), -1)


def _bare_matrix(name: str, features: xr.DataArray, array: xr.DataArray) -> Any:
    """A lazy variable over prompt and one more dimension, in the order of the array's prompts."""
    if "prompt" not in features.dims or features.ndim > 2:
        raise InvalidArgumentError(f"control {name!r} has dims {features.dims}, expected prompt and at most one more")
    if "prompt" in features.coords and "prompt" in array.coords and list_prompts(features) != list_prompts(array):
        raise InvalidArgumentError(f"control {name!r} has other prompts, or another order, than the activations: give both the same")
    if features.sizes["prompt"] != array.sizes["prompt"]:
        raise InvalidArgumentError(f"control {name!r} has {features.sizes['prompt']} prompts, expected {array.sizes['prompt']}")
    matrix = features if features.ndim == 2 else features.expand_dims("feature", axis=-1)
    return bare_variable(matrix.variable)
