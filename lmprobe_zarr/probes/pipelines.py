"""One pipeline from raw activations to a prediction: scale the layers, preprocess, fit. Never folds, files or fitted estimators.

The order is that of lmprobe. First, every hidden unit is scaled, once. Then come the steps of `preprocessing`. The estimator is last, and
standardises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes.classifiers import check_task, make_probe, standardises
from lmprobe_zarr.probes.sequences import is_sequence_classifier
from lmprobe_zarr.typing import is_listed

__all__ = ["PreprocessingStep", "keep_zeros", "make_pipeline_for", "parse_preprocessing"]

_STANDARD = ("standard", "standard_scaler")


@dataclass(frozen=True, slots=True)
class PreprocessingStep:
    """One step of preprocessing.

    Parameters
    ----------
    kind : {"standard", "per_layer", "pca"}
        Mean 0 and variance 1 for each column; one mean and variance for all columns of a layer; or the principal components.
    n_components : int, optional
        For "pca": how many components are kept.
    """

    kind: str
    n_components: int | None = None

    def __str__(self) -> str:
        return self.kind if self.n_components is None else f"{self.kind}:{self.n_components}"


def parse_preprocessing(spec: str | Iterable[str] | None, pca_components: int | None = None) -> tuple[PreprocessingStep, ...]:
    """The steps in their order; an empty tuple for None.

    Parameters
    ----------
    spec : str, iterable of str, or None
        "standard" (also "standard_scaler"), "per_layer", "pca:N" (N components) and "pca" (`pca_components` of them), joined by "+" or
        as a list: "standard+pca:50".
    pca_components : int, optional
        The number of components of each "pca" without a number of its own.

    Raises
    ------
    InvalidArgumentError
        An unknown step, a missing or impossible number of components, or `pca_components` without a "pca".
    InvalidTypeError
        Neither texts nor None; or a number that is not whole.
    """
    if pca_components is not None:
        if isinstance(pca_components, bool) or not isinstance(pca_components, int | np.integer):
            raise InvalidTypeError(f"pca_components={pca_components!r} is not a whole number")
        if pca_components < 1:
            raise InvalidArgumentError(f"pca_components={pca_components!r} keeps nothing: give at least 1")
    if spec is None:
        words: list[Any] = []
    elif isinstance(spec, str):
        words = spec.split("+")
    elif is_listed(spec) and not isinstance(spec, bytes | Mapping):
        words = list(spec)
    else:
        raise InvalidTypeError(f"preprocessing is a text such as 'standard+pca:50', a list of steps or None, not {type(spec).__name__}")
    steps = tuple(_step(word, pca_components) for word in words)
    if pca_components is not None and not any(step.kind == "pca" for step in steps):
        raise InvalidArgumentError(f"pca_components={pca_components!r} but preprocessing={spec!r} has no 'pca': give preprocessing='pca'")
    return steps


def _step(word: Any, pca_components: int | None) -> PreprocessingStep:
    if not isinstance(word, str):
        raise InvalidTypeError(f"a step of preprocessing is a text such as 'standard' or 'pca:50', not {word!r}")
    kind, colon, number = word.strip().partition(":")
    if kind in _STANDARD and not colon:
        return PreprocessingStep("standard")
    if kind == "per_layer" and not colon:
        return PreprocessingStep("per_layer")
    if kind != "pca":
        raise InvalidArgumentError(f"there is no preprocessing step {word!r}: use 'standard', 'per_layer', 'pca:N' (N components) or 'pca'")
    if not colon:
        if pca_components is None:
            raise InvalidArgumentError("preprocessing step 'pca' does not say how many components: give 'pca:50', or pca_components=50")
        return PreprocessingStep("pca", int(pca_components))
    if not (number.isascii() and number.isdigit() and 0 < len(number) < 10 and int(number)):
        raise InvalidArgumentError(f"preprocessing step {word!r} has no number of components: give a positive one, such as 'pca:50'")
    return PreprocessingStep("pca", int(number))


def keep_zeros(pipeline: Any) -> None:
    """Make the scalers of a pipeline divide alone, so that sparse rows stay sparse. What is linear after them fits the same, but for its
    intercept.
    """
    from sklearn.preprocessing import StandardScaler

    for _, step in pipeline.steps:
        if isinstance(step, StandardScaler):
            step.set_params(with_mean=False)


def make_pipeline_for(
    probe: Any,
    *,
    task: str = "classification",
    n_layers: int = 1,
    normalize_layers: bool | str = True,
    preprocessing: str | Iterable[str] | None = None,
    pca_components: int | None = None,
    params: Mapping[str, Any] | None = None,
    random_state: int = 0,
    strength: float | None = None,
    mass_mean_augment: bool = False,
) -> Any:
    """A fresh, unfitted scikit-learn pipeline for activations of shape (prompt, layer × hidden).

    Its steps by name, each if it applies:

    1. A scaler of every hidden unit, unless `preprocessing` has a "standard" or "per_layer" step, which then takes its place:
       ``layer_scaler`` (:class:`~lmprobe_zarr.probes.scaling.LayerScaler`) for several layers, unless `normalize_layers` is
       False; ``standard`` for a single layer, where the named estimator standardises by default.
    2. ``mass_mean``, with `mass_mean_augment`: one more column (:class:`~lmprobe_zarr.probes.augment.MassMeanColumn`), which the next
       steps pass on as it is.
    3. ``standard``, ``per_layer`` and ``pca``, as `preprocessing` says.
    4. ``probe``, the estimator alone.

    For several layers a named estimator's own standardisation is left out, since it would undo "per_layer" and False.

    Parameters
    ----------
    probe : str or estimator
        As for :func:`~lmprobe_zarr.probes.make_probe`, or a classifier that learns how to pool tokens
        (:func:`~lmprobe_zarr.probes.sequence_probes`). A single layer is not standardised for the caller's own estimator.
    task : {"classification", "regression"}
    n_layers : int
        How many layers a row holds, end to end.
    normalize_layers : bool, "per_neuron" or "per_layer"
        How several layers are scaled; True is "per_neuron", False leaves them as they are. Ignored for a single layer.
    preprocessing, pca_components
        See :func:`parse_preprocessing`.
    params : mapping, optional
        Arguments that replace defaults of the named estimator's constructor.
    random_state : int
        Seeds the estimator and the principal components.
    strength : float, optional
        As for :func:`~lmprobe_zarr.probes.make_probe`.
    mass_mean_augment : bool
        Whether the projection on the difference of the two class means, of the scaled rows before `preprocessing`, is one more column.
        A single layer is then scaled first even if `preprocessing` has a "standard" step, as lmprobe scales it.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        As :func:`~lmprobe_zarr.probes.make_probe` and :func:`parse_preprocessing`; or an unknown way to normalise, no layer, or
        `mass_mean_augment` for a regression or a classifier that learns how to pool.
    """
    check_task(task)
    if isinstance(n_layers, bool) or not isinstance(n_layers, int | np.integer):
        raise InvalidTypeError(f"n_layers={n_layers!r} is not a whole number")
    if n_layers < 1:
        raise InvalidArgumentError(f"n_layers={n_layers!r} leaves nothing to fit: give at least 1")
    if not isinstance(normalize_layers, bool | str) or normalize_layers not in (True, False, "per_neuron", "per_layer"):
        raise InvalidArgumentError(f"normalize_layers={normalize_layers!r} is unknown: use True, False, 'per_neuron' or 'per_layer'")
    wanted = parse_preprocessing(preprocessing, pca_components)
    if not isinstance(mass_mean_augment, bool | np.bool_):
        raise InvalidTypeError(f"mass_mean_augment={mass_mean_augment!r} is neither True nor False")
    if mass_mean_augment and (task == "regression" or is_sequence_classifier(probe)):
        what = "a regression has none" if task == "regression" else f"{probe!r} learns from the tokens of prompts"
        raise InvalidArgumentError(
            f"mass_mean_augment=True projects vectors of prompts on the difference of class means, and {what}: leave it out"
        )
    estimator: Any
    if is_sequence_classifier(probe) and task == "classification":
        from lmprobe_zarr.probes.sequence_classifiers import make_sequence_classifier

        estimator = make_sequence_classifier(probe, random_state, params)
    else:
        estimator = make_probe(probe, random_state, task=task, params=params, standardise=False, strength=strength)

    from sklearn.decomposition import PCA
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    from lmprobe_zarr.probes.augment import AllButLast, MassMeanColumn
    from lmprobe_zarr.probes.scaling import LayerScaler

    steps: list[tuple[str, Any]] = []
    scaled_by_step = any(step.kind in ("standard", "per_layer") for step in wanted)
    if not scaled_by_step or (mass_mean_augment and n_layers == 1):
        if n_layers > 1 and normalize_layers is not False:
            mode = normalize_layers if isinstance(normalize_layers, str) else "per_neuron"
            steps.append(("layer_scaler", LayerScaler(int(n_layers), mode)))
        elif n_layers == 1 and (standardises(probe) or is_sequence_classifier(probe)):
            steps.append(("standard", StandardScaler()))
    if mass_mean_augment:
        steps.append(("mass_mean", MassMeanColumn()))
    for step in wanted:
        made: Any = PCA(step.n_components, random_state=random_state)
        if step.kind == "standard":
            made = StandardScaler()
        elif step.kind == "per_layer":
            # After principal components there are no layers any more.
            made = LayerScaler(1 if any(name.startswith("pca") for name, _ in steps) else int(n_layers), "per_layer")
        taken = sum(name == step.kind or name.startswith(f"{step.kind}_") for name, _ in steps)
        steps.append((step.kind if not taken else f"{step.kind}_{taken + 1}", AllButLast(made) if mass_mean_augment else made))
    return Pipeline([*steps, ("probe", estimator)])
