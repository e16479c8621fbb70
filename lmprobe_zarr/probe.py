"""`Probe`: a classifier on a model's activations, which come from the cache, and into it where the model has to be run.

Puts together what `build` extracts, what a store holds, and the estimators of `probes`. Arithmetic is theirs.
"""

from __future__ import annotations

import inspect
import os
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr import config
from lmprobe_zarr.build import Keeping, ModelMemory, Outcome, Running, carry_out, keeping_of
from lmprobe_zarr.errors import (
    CacheWarning,
    CorruptPartError,
    InvalidArgumentError,
    InvalidTypeError,
    LabelError,
    NoSpaceError,
    NotAStoreError,
    NotFittedError,
    PartGoneError,
    ReadOnlyError,
)
from lmprobe_zarr.index import TokenIndex
from lmprobe_zarr.layers import LayerSpec, parse_sweep
from lmprobe_zarr.missing import check_request
from lmprobe_zarr.plan import ExtractStats
from lmprobe_zarr.precision import Precision
from lmprobe_zarr.probes.files import dump_probe, parse_probe
from lmprobe_zarr.probes.metrics import evaluate_classification, evaluate_regression
from lmprobe_zarr.probes.pipelines import make_pipeline_for
from lmprobe_zarr.probes.stages import Stage, parse_stage, reduce_scores
from lmprobe_zarr.ragged import concat_ranges, offsets_of
from lmprobe_zarr.reread import read_values
from lmprobe_zarr.schema import GroupInfo, Provenance
from lmprobe_zarr.sites import Outputs
from lmprobe_zarr.store import Store, open_store
from lmprobe_zarr.view import hashes_of

if TYPE_CHECKING:
    import torch

__all__ = ["LayerSweep", "Probe"]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

TASKS: Final = ("classification", "regression")
# A part that is evicted or found damaged under a call is looked for again; more often than this something is wrong.
ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class _Activations:
    """What a probe learns from or scores.

    Parameters
    ----------
    features : ndarray of float, shape (row, layer × hidden)
        A row is a prompt or a token; the layers of a row stand side by side.
    layers : tuple of int
    n_tokens : ndarray of int, shape (prompt,), optional
        Rows of each prompt, where a row is a token.
    hashes : ndarray of str, shape (prompt,)
    """

    features: Array
    layers: tuple[int, ...]
    n_tokens: Ints | None
    hashes: npt.NDArray[np.str_]


@dataclass(slots=True)
class _Session:
    """What probes of one fit share and no file keeps: the loaded model, and what was warned of."""

    memory: ModelMemory = field(default_factory=ModelMemory)
    store: Store | None = None
    warned: set[str] = field(default_factory=set)


class Probe:
    """A classifier or regressor on the activations of a language model.

    Activations come from the cache; the model is loaded only where some are missing, run once, and what it gave is kept: the pooled vectors
    of every layer up to the deepest asked for, tokens only where every token has to be classified.

    Parameters
    ----------
    model : str, path or torch Module, optional
        A hub id, a folder, or a loaded model (then `name` and `tokenizer` too). None where only activations are given.
    layers : "middle", "all", "last", int, sequence of int, slice, "sweep", "sweep:N" or "sweep:A-B"
        Several layers are put side by side. A sweep fits one probe per layer (every N-th, or A up to and with B); see `sweep_result_`.
    pooling : str
        ``last_token``, ``first_token``, ``mean``: activations are pooled, then classified. ``max``, ``min``, or any name behind ``score:``:
        every token is classified, then the scores are pooled. ``activation:max`` and ``activation:min`` pool activations. ``all``: one
        score per token.
    train_pooling, inference_pooling : str, optional
        Where the two differ. Training takes ``last_token``, ``first_token``, ``mean`` and ``all`` (every token is an example).
    classifier : str or scikit-learn estimator
        See `lmprobe_zarr.probes.named_probes`; for regression the default is ``ridge_regression``.
    task : {"classification", "regression"}
    device : str
        ``"auto"`` takes CUDA, then MPS, then the CPU.
    random_state : int, optional
    batch_size : int, optional
        Prompts per forward pass at most; None goes by what the device holds.
    normalize_layers : bool, "per_neuron" or "per_layer"
        How several layers are brought to one scale; True is ``"per_neuron"``.
    dtype : str, optional
        What to compute in. None takes what is stored, whatever that was computed in, and else float32, as lmprobe does.
    classifier_kwargs : mapping, optional
        Parameters of a named classifier.
    preprocessing : str or sequence of str, optional
        ``"standard"``, ``"pca:N"``, ``"standard+pca:N"``.
    pca_components : int, optional
        For ``"pca"`` without a number.
    store : Store, path or URL, optional
        Another place than the cache.
    cache_only : bool
        Whether prompts that are not stored are an error, rather than run.
    name, tokenizer, revision, max_length, truncation, provenance, modules, trust_remote_code, device_map
        As for `lmprobe_zarr.extract`.

    Attributes
    ----------
    pipeline_ : scikit-learn Pipeline
        What was fitted, scaling included.
    classes_ : ndarray or None
        The labels, sorted; None for regression.
    layers_ : tuple of int
        The layers that it learned from.
    sweep_result_ : LayerSweep or None
        The probes of a sweep.

    Examples
    --------
    >>> probe = Probe(model="gpt2", layers=6).fit(positive, negative)  # doctest: +SKIP
    >>> probe.predict(["What a lovely day."])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | torch.nn.Module | None = None,
        layers: LayerSpec = "middle",
        pooling: str = "last_token",
        train_pooling: str | None = None,
        inference_pooling: str | None = None,
        classifier: Any = "logistic_regression",
        task: str = "classification",
        device: Any = "auto",
        random_state: int | None = None,
        batch_size: int | None = None,
        normalize_layers: bool | str = True,
        dtype: Any = None,
        classifier_kwargs: Mapping[str, Any] | None = None,
        preprocessing: str | Sequence[str] | None = None,
        pca_components: int | None = None,
        store: Store | str | os.PathLike[str] | None = None,
        cache_only: bool = False,
        name: str | None = None,
        tokenizer: Any = None,
        revision: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        provenance: Provenance | None = None,
        modules: Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
        device_map: Any = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.pooling = pooling
        self.train_pooling = train_pooling
        self.inference_pooling = inference_pooling
        self.classifier = classifier
        self.task = task
        self.device = device
        self.random_state = random_state
        self.batch_size = batch_size
        self.normalize_layers = normalize_layers
        self.dtype = dtype
        self.classifier_kwargs = classifier_kwargs
        self.preprocessing = preprocessing
        self.pca_components = pca_components
        self.store = store
        self.cache_only = cache_only
        self.name = name
        self.tokenizer = tokenizer
        self.revision = revision
        self.max_length = max_length
        self.truncation = truncation
        self.provenance = provenance
        self.modules = modules
        self.trust_remote_code = trust_remote_code
        self.device_map = device_map
        self.pipeline_: Any = None
        self.classes_: Array | None = None
        self.layers_: tuple[int, ...] = ()
        self.sweep_result_: LayerSweep | None = None
        self._session = _Session()
        self._check()

    def _check(self) -> None:
        """Raise for what could not be fitted, before anything is run."""
        if self.task not in TASKS:
            raise InvalidArgumentError(f"task={self.task!r} is unknown: use {' or '.join(map(repr, TASKS))}")
        parse_stage(self.train_pooling or self.pooling, training=True)
        parse_stage(self.inference_pooling or self.pooling)
        if self.batch_size is not None:
            _check_batch_size(self.batch_size)
        self._new_pipeline(1)

    # ------------------------------------------------------------------------------------------------- as scikit-learn has it

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments that this was made with."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> Self:
        """Change arguments; what was fitted stays as it is.

        Raises
        ------
        InvalidArgumentError
            Nothing of that name.
        """
        for name, value in params.items():
            if name not in _PARAMETERS:
                raise InvalidArgumentError(f"Probe has no parameter {name!r}: there is {', '.join(_PARAMETERS)}")
            setattr(self, name, value)
        self._check()
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, RegressorTags, Tags, TargetTags

        kind = "classifier" if self.task == "classification" else "regressor"
        return Tags(
            estimator_type=kind,
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags() if kind == "classifier" else None,
            regressor_tags=RegressorTags() if kind == "regressor" else None,
        )

    @property
    def _estimator_type(self) -> str:
        return "classifier" if self.task == "classification" else "regressor"

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name, p in _PARAMETERS.items() if not _same(getattr(self, name), p.default)}
        fitted = "" if self.pipeline_ is None else f" fitted on layers {list(self.layers_)}"
        return f"Probe({', '.join(f'{name}={_short(value)}' for name, value in given.items())}){fitted}"

    def __getstate__(self) -> dict[str, Any]:
        # A loaded model stays where it is: the copy loads its own when it needs one.
        return {**self.__dict__, "_session": _Session()}

    # --------------------------------------------------------------------------------------------------------- activations

    def warmup(self, prompts: Iterable[Any], *, batch_size: int | None = None) -> ExtractStats:
        """Extract what later calls with these prompts need, and keep it.

        Parameters
        ----------
        prompts : iterable of str, of chats, or of token ids
        batch_size : int, optional
            For this call.

        Returns
        -------
        ExtractStats
            With ``hit_rate`` and ``seconds``.

        Raises
        ------
        As `lmprobe_zarr.extract` does.
        """
        given = _listed(prompts)
        stages = {parse_stage(self.train_pooling or self.pooling), parse_stage(self.inference_pooling or self.pooling)}
        poolings = tuple(dict.fromkeys(stage.pooling for stage in stages if not stage.needs_tokens))
        outcome, sink = self._extract(given, poolings, any(s.needs_tokens for s in stages), self._layers_to_extract(), batch_size)
        _drop(sink)
        return outcome.stats

    def _layers_to_extract(self) -> LayerSpec:
        sweep = parse_sweep(self.layers)
        return self.layers if sweep is None else sweep

    def _extract(
        self,
        prompts: list[Any],
        poolings: tuple[str, ...],
        keep_tokens: bool,
        layers: LayerSpec,
        batch_size: int | None,
        *,
        refresh: bool = False,
    ) -> tuple[Outcome, Store | None]:
        """See that all is there; also returns where new values went, if that was not the store."""
        if self.model is None:
            raise InvalidArgumentError("this probe has no model to run prompts through: give Probe(model=…), or activations")
        if batch_size is not None:
            _check_batch_size(batch_size)
        store = self._open()
        request = check_request(
            model=self.model, prompts=prompts, store=store, layers=layers, sites=("resid",), pooling=poolings, keep_tokens=keep_tokens,
            name=self.name, outputs=Outputs(), tokenizer=self.tokenizer, revision=self.revision, dtype=self.dtype,
            max_length=self.max_length, truncation=self.truncation, refresh=refresh, provenance=self.provenance, modules=self.modules,
            trust_remote_code=self.trust_remote_code, keep_passed=True,
        )  # fmt: skip
        running = Running(device=self.device, device_map=self.device_map, batch_prompts=batch_size or self.batch_size, progress=False)
        keeping = keeping_of(store, Precision())
        options: dict[str, Any] = {"memory": self._session.memory, "cache_only": self.cache_only}
        if keeping.limit != 0:
            try:
                return carry_out(request, keeping, running, **options), None
            except (ReadOnlyError, NoSpaceError, NotAStoreError) as error:
                if not store.is_default:
                    raise
                self._warn_unwritable(store, error)
        # Nothing may be stored, or can be: what is missing goes into memory, for this call only.
        sink = open_store(f"memory://lmprobe-zarr-{uuid.uuid4().hex}")
        try:
            return carry_out(request, Keeping(precision=keeping.precision), running, sink=sink, **options), sink
        except BaseException:
            _drop(sink)
            raise

    def _open(self) -> Store:
        """The store; while it lies at the same place always the same object, which knows its parts already, and the damaged ones."""
        if isinstance(self.store, Store):
            return self.store
        opened, kept = self._open_anew(), self._session.store
        if kept is None or (kept.url, kept.mode, kept.is_default) != (opened.url, opened.mode, opened.is_default):
            self._session.store = kept = opened
        return kept

    def _open_anew(self) -> Store:
        try:
            return open_store(self.store)
        except (NotAStoreError, ReadOnlyError) as error:
            if self.store is not None:
                raise
            # Computing goes on without a cache.
            self._warn_unwritable(None, error)
            empty = open_store("memory://lmprobe-zarr-nothing")
            return Store(empty.storage, mode="r", is_default=True)

    def _warn_unwritable(self, store: Store | None, error: Exception) -> None:
        place = str(config.default_root()) if store is None else store.url
        if place not in self._session.warned:
            self._session.warned.add(place)
            backend = config.cache_backend() is not None
            variable = "LMPROBE_CACHE_BACKEND" if backend else "LMPROBE_CACHE_DIR"
            warnings.warn(
                f"nothing is stored in the cache {place} ({error.args[0] if error.args else error}): "
                f"activations are computed again at every call; make room there, or name another place with {variable}",
                CacheWarning,
                stacklevel=2,
            )

    def _activations(
        self, prompts: Iterable[Any], stage: Stage, layers: LayerSpec, batch_size: int | None = None, *, refresh: bool = False
    ) -> _Activations:
        given = _listed(prompts)
        poolings = () if stage.needs_tokens else (stage.pooling,)
        for attempt in range(ATTEMPTS):
            # Only the first time: what is run again after that was damaged or has gone.
            outcome, sink = self._extract(given, poolings, stage.needs_tokens, layers, batch_size, refresh=refresh and not attempt)
            store = self._open()
            try:
                return _read(outcome, [place for place in (sink, store) if place is not None], stage)
            except CorruptPartError as error:
                # Left out from now on; other parts serve what it held, or the model is run again.
                store.set_aside(error)
            except PartGoneError:
                # Evicted between the two looks: the next one finds what is there now, and the model makes up for the rest.
                store.forget_all()
            finally:
                _drop(sink)
        raise PartGoneError(f"parts of {store.url} went {ATTEMPTS} times while they were read: is its limit smaller than one call needs?")

    # ------------------------------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        positive_prompts: Any,
        negative_prompts: Any = None,
        *,
        labels: Any = None,
        sample_weight: Any = None,
        invalidate_cache: bool = False,
        batch_size: int | None = None,
    ) -> Self:
        """Fit on prompts: ``fit(positive, negative)``, or ``fit(prompts, labels)``.

        Parameters
        ----------
        positive_prompts : iterable of prompts, or array of float, shape (row, hidden)
            Prompts of class 1; or all of them. An array is taken for activations, as by `fit_from_activations`.
        negative_prompts : iterable of prompts, or of numbers or truth values
            Prompts of class 0; or the label of each prompt, or its value for a regression.
        labels : sequence, optional
            The same, where labels are texts, which `negative_prompts` would take for prompts.
        sample_weight : sequence of float, optional
            One per prompt.
        invalidate_cache : bool
            Run the model on all prompts, stored or not; the new activations win.
        batch_size : int, optional
            For this call.

        Returns
        -------
        Probe
            This one.

        Raises
        ------
        LabelError
            Fewer than two classes, another number of labels than prompts, or labels that are missing.
        others
            As `lmprobe_zarr.extract` does.
        """
        if _is_matrix(positive_prompts):
            return self.fit_from_activations(positive_prompts, negative_prompts if labels is None else labels, sample_weight=sample_weight)
        prompts, y = _prompts_and_labels(positive_prompts, negative_prompts, labels)
        y = self._checked_labels(y, len(prompts))
        weights = _checked_weights(sample_weight, len(prompts))
        stage = parse_stage(self.train_pooling or self.pooling, training=True)
        sweep = parse_sweep(self.layers)
        if sweep is not None:
            return self._fit_sweep(prompts, y, weights, sweep, invalidate_cache=invalidate_cache, batch_size=batch_size)
        read = self._activations(prompts, stage, self.layers, batch_size, refresh=invalidate_cache)
        if read.n_tokens is not None:
            y = np.repeat(y, read.n_tokens)
            weights = None if weights is None else np.repeat(weights, read.n_tokens)
        self._fit(read.features, y, weights, read.layers)
        return self

    def fit_from_activations(self, X: Any, y: Any, *, sample_weight: Any = None, n_layers: int = 1) -> Self:  # noqa: N803
        """Fit on activations that are given.

        Parameters
        ----------
        X : array of float, shape (row, hidden) or (row, layer × hidden); or DataArray over prompt, hidden and perhaps layer
        y : sequence
            A label or value per row.
        sample_weight : sequence of float, optional
        n_layers : int
            Layers side by side in a row; a DataArray tells it itself.

        Raises
        ------
        LabelError
            As for `fit`.
        InvalidArgumentError
            Not a matrix of finite numbers, or one whose width is no multiple of `n_layers`.
        """
        features, layers = _matrix(X, n_layers)
        labels = self._checked_labels(_as_array(y), len(features))
        self._fit(features, labels, _checked_weights(sample_weight, len(features)), layers)
        return self

    def _new_pipeline(self, n_layers: int) -> Any:
        classifier = self.classifier
        if self.task == "regression" and isinstance(classifier, str) and classifier == "logistic_regression":
            classifier = "ridge_regression"
        return make_pipeline_for(
            classifier,
            task=self.task,
            n_layers=n_layers,
            normalize_layers=self.normalize_layers,
            preprocessing=self.preprocessing,
            pca_components=self.pca_components,
            params=self.classifier_kwargs,
            random_state=0 if self.random_state is None else self.random_state,
        )

    def _fit(self, features: Array, labels: Array, weights: Array | None, layers: tuple[int, ...]) -> None:
        pipeline = self._new_pipeline(max(1, len(layers)))
        options = {} if weights is None else {f"{pipeline.steps[-1][0]}__sample_weight": weights}
        pipeline.fit(features, labels, **options)
        self.pipeline_, self.layers_ = pipeline, layers
        self.classes_ = np.asarray(pipeline.classes_) if self.task == "classification" else None
        self.sweep_result_ = None

    def _fit_sweep(
        self, prompts: list[Any], y: Array, weights: Array | None, sweep: LayerSpec, *, invalidate_cache: bool, batch_size: int | None
    ) -> Self:
        stage = parse_stage(self.train_pooling or self.pooling, training=True)
        outcome, sink = self._extract(
            prompts, () if stage.needs_tokens else (stage.pooling,), stage.needs_tokens, sweep, batch_size, refresh=invalidate_cache
        )
        _drop(sink)
        probes = {}
        for layer in outcome.layers:
            probe = Probe(**{**self.get_params(), "layers": layer})
            probe._session = self._session
            probes[layer] = probe.fit(prompts, labels=y, sample_weight=weights, batch_size=batch_size)
        result = LayerSweep(probes)
        self._take(probes[outcome.layers[0]])
        self.sweep_result_ = result
        return self

    def _take(self, other: Probe) -> None:
        """What another probe has learned."""
        self.pipeline_, self.classes_, self.layers_ = other.pipeline_, other.classes_, other.layers_

    def _checked_labels(self, labels: Array, n: int) -> Array:
        if labels.ndim != 1 or len(labels) != n:
            raise LabelError(f"there are labels of shape {labels.shape} for {n} prompts: give one for each, in their order")
        if labels.dtype.kind == "f" and not np.isfinite(labels).all():
            raise LabelError(f"{int((~np.isfinite(labels)).sum())} of {n} labels are missing or infinite: leave those prompts out")
        if self.task == "classification":
            classes = np.unique(labels)
            if len(classes) < 2:
                raise LabelError(
                    f"all {n} labels are {classes[0].item()!r}: a probe needs prompts of at least two classes"
                    if len(classes)
                    else "there are no prompts to learn from: give some of at least two classes"
                )
            if labels.dtype.kind == "f" and (labels != np.round(labels)).any():
                raise LabelError("labels are not whole numbers: give classes, or task='regression' for values")
        return labels

    # ------------------------------------------------------------------------------------------------------------- scoring

    def predict(self, prompts: Any, *, batch_size: int | None = None) -> Any:
        """The class of each prompt, or its value for a regression.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        batch_size : int, optional
            For this call.

        Returns
        -------
        ndarray, shape (prompt,)
            With ``inference_pooling="all"`` a DataArray over ``token``, indexed by prompt and position.

        Raises
        ------
        NotFittedError
        others
            As `lmprobe_zarr.extract` does.
        """
        self._check_fitted()
        if _is_matrix(prompts):
            return self.predict_from_activations(prompts)
        stage, read = self._to_score(prompts, batch_size)
        if self.task == "regression":
            values = np.asarray(self.pipeline_.predict(read.features))
            return _pooled(values, stage, read)
        assert self.classes_ is not None  # noqa: S101 — a classification is fitted
        if not stage.needs_tokens:
            return np.asarray(self.pipeline_.predict(read.features))
        scores = np.asarray(_scores(self.pipeline_, read.features))
        if stage.of == "nothing":
            return _by_token(_classes_of(scores, self.classes_), read)
        return _classes_of(reduce_scores(scores, _counts(read), stage.pooling), self.classes_)

    def predict_proba(self, prompts: Any, *, batch_size: int | None = None) -> Any:
        """The probability of each class.

        Returns
        -------
        ndarray of float, shape (prompt, class)
            In the order of ``classes_``. Pooled scores of ``max`` and ``min`` are those of each class by itself. With
            ``inference_pooling="all"`` a DataArray over ``token`` and ``class``, indexed by prompt and position.

        Raises
        ------
        InvalidArgumentError
            A regression, or a classifier without probabilities.
        NotFittedError
        """
        self._check_fitted()
        self._check_probabilities()
        if _is_matrix(prompts):
            return self.predict_proba_from_activations(prompts)
        stage, read = self._to_score(prompts, batch_size)
        return _pooled(np.asarray(self.pipeline_.predict_proba(read.features)), stage, read, self.classes_)

    def _to_score(self, prompts: Any, batch_size: int | None) -> tuple[Stage, _Activations]:
        stage = parse_stage(self.inference_pooling or self.pooling)
        layers = list(self.layers_)
        if not layers:
            raise InvalidArgumentError("this probe learned from activations of unknown layers: predict from activations too")
        return stage, self._activations(prompts, stage, layers, batch_size)

    def _check_probabilities(self) -> None:
        if self.task == "regression":
            raise InvalidArgumentError("a regression has no probabilities: use predict")
        if not hasattr(self.pipeline_, "predict_proba"):
            raise InvalidArgumentError(f"{self.classifier!r} gives no probabilities: use predict, or 'logistic_regression'")

    def predict_from_activations(self, X: Any) -> Array:  # noqa: N803
        """The class or value of each row of activations, shape (row,)."""
        self._check_fitted()
        return np.asarray(self.pipeline_.predict(self._same_width(X)))

    def predict_proba_from_activations(self, X: Any) -> Array:  # noqa: N803
        """The probability of each class for each row of activations, shape (row, class)."""
        self._check_fitted()
        self._check_probabilities()
        return np.asarray(self.pipeline_.predict_proba(self._same_width(X)))

    def score_from_activations(self, X: Any, y: Any) -> float:  # noqa: N803
        """Accuracy, or R² for a regression, on rows of activations."""
        return self._score(self.predict_from_activations(X), _as_array(y))

    def _same_width(self, X: Any) -> Array:  # noqa: N803
        features, _ = _matrix(X, max(1, len(self.layers_)))
        if features.shape[1] != self.pipeline_.n_features_in_:
            raise InvalidArgumentError(
                f"these activations are {features.shape[1]} wide, and the probe learned from {self.pipeline_.n_features_in_}: "
                "give the same layers of the same model"
            )
        return features

    def score(self, prompts: Any, labels: Any, *, batch_size: int | None = None) -> float:
        """The share of prompts whose class is predicted, 0 to 1; R² for a regression."""
        return self._score(np.asarray(self.predict(prompts, batch_size=batch_size)), _as_array(labels))

    def _score(self, predicted: Array, labels: Array) -> float:
        if len(predicted) != len(labels):
            raise LabelError(
                f"there are {len(labels)} labels for {len(predicted)} predictions: give one for each prompt, and pool the tokens"
            )
        if self.task == "regression":
            return evaluate_regression(predicted, labels)["r2"]
        return float(np.mean(predicted == labels))

    def evaluate(self, prompts: Any, labels: Any, *, batch_size: int | None = None) -> dict[str, Any]:
        """The usual measures on prompts that it has not seen.

        Returns
        -------
        dict
            ``accuracy``, ``f1``, ``precision``, ``recall``, ``auroc`` (where there are probabilities or scores) and ``n_eval``; ``r2`` and
            ``mae`` for a regression. Of a sweep: those of the best layer, ``best_layer``, ``best_accuracy``, and ``layer_results`` by
            layer; the probe of the best layer is in use afterwards.
        """
        self._check_fitted()
        if self.sweep_result_ is not None:
            return self._evaluate_sweep(self.sweep_result_, prompts, labels, batch_size)
        y = _as_array(labels)
        predicted = np.asarray(self.predict(prompts, batch_size=batch_size))
        if len(predicted) != len(y):
            raise LabelError(f"there are {len(y)} labels for {len(predicted)} predictions: give one for each prompt, and pool the tokens")
        if self.task == "regression":
            return {**evaluate_regression(predicted, y), "n_eval": len(y)}
        proba = self.predict_proba(prompts, batch_size=batch_size) if hasattr(self.pipeline_, "predict_proba") else None
        assert self.classes_ is not None  # noqa: S101 — a classification is fitted
        found = evaluate_classification(predicted, None if proba is None else np.asarray(proba), y, self.classes_)
        return {**{name: value for name, value in found.items() if not np.isnan(value)}, "n_eval": len(y)}

    def _evaluate_sweep(self, sweep: LayerSweep, prompts: Any, labels: Any, batch_size: int | None) -> dict[str, Any]:
        given = prompts if _is_matrix(prompts) else _listed(prompts)
        results = {layer: probe.evaluate(given, labels, batch_size=batch_size) for layer, probe in sweep.probes.items()}
        measure = "accuracy" if self.task == "classification" else "r2"
        best = max(results, key=lambda layer: results[layer][measure])
        self._take(sweep[best])
        return {**results[best], "layer_results": results, "best_layer": best, f"best_{measure}": results[best][measure]}

    def _check_fitted(self) -> None:
        if self.pipeline_ is None:
            raise NotFittedError("this probe has learned nothing yet: call fit first")

    # ---------------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted probe into one file, safetensors with JSON inside; never a pickle.

        The model is kept by name only, the cache's place not at all.

        Raises
        ------
        NotFittedError
        InvalidArgumentError
            The classifier is an estimator of one's own, the model is an object, or this is a sweep.
        """
        self._check_fitted()
        if self.sweep_result_ is not None:
            raise InvalidArgumentError("a sweep is many probes: save one of them, probe.sweep_result_[layer].save(…)")
        parameters = {name: value for name, value in self.get_params().items() if name not in _NOT_SAVED}
        if self.model is not None and not isinstance(self.model, (str, os.PathLike)):
            parameters["model"] = None
        header = {
            "parameters": {name: _as_json(value) for name, value in parameters.items()},
            "layers": list(self.layers_),
            "task": self.task,
        }
        if not isinstance(self.classifier, str):
            raise InvalidArgumentError(
                f"only named classifiers can be saved, since no pickle is written, and {type(self.classifier).__name__} is none: "
                "keep its coefficients yourself"
            )
        data = dump_probe(self.pipeline_, header)
        target = Path(path)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            staged.write_bytes(data)
            staged.replace(target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, store: Store | str | os.PathLike[str] | None = None) -> Probe:
        """The probe that `save` wrote; no code in the file is ever run.

        Parameters
        ----------
        path : str or path
        store : Store, path or URL, optional
            Where it reads activations, instead of the cache.

        Raises
        ------
        NotAProbeError
            Something else, or a damaged file.
        UnsupportedVersionError
            Written by a newer release.
        FileNotFoundError
        """
        pipeline, header = parse_probe(Path(path).read_bytes(), str(path))
        parameters = {name: value for name, value in header["parameters"].items() if name in _PARAMETERS and name not in _NOT_SAVED}
        probe = cls(**{**parameters, "store": store})
        probe.pipeline_, probe.layers_ = pipeline, tuple(header["layers"])
        probe.classes_ = np.asarray(pipeline.classes_) if probe.task == "classification" else None
        return probe


@dataclass(frozen=True)
class LayerSweep:
    """One fitted probe per layer.

    Parameters
    ----------
    probes : dict of int to Probe
    """

    probes: dict[int, Probe]

    @property
    def layers(self) -> list[int]:
        """The layers, ascending."""
        return sorted(self.probes)

    def __len__(self) -> int:
        return len(self.probes)

    def __getitem__(self, layer: int) -> Probe:
        return self.probes[layer]

    def score(self, prompts: Iterable[Any], labels: Any) -> dict[int, float]:
        """Accuracy (R² for a regression) of each layer."""
        given = _listed(prompts)
        self._together(given)
        return {layer: self.probes[layer].score(given, labels) for layer in self.layers}

    def predict(self, prompts: Iterable[Any]) -> dict[int, Any]:
        """What each layer's probe predicts."""
        given = _listed(prompts)
        self._together(given)
        return {layer: self.probes[layer].predict(given) for layer in self.layers}

    def predict_proba(self, prompts: Iterable[Any]) -> dict[int, Any]:
        """The probabilities that each layer's probe gives."""
        given = _listed(prompts)
        self._together(given)
        return {layer: self.probes[layer].predict_proba(given) for layer in self.layers}

    def best_layer(self, prompts: Iterable[Any], labels: Any) -> int:
        """The layer with the highest score."""
        scores = self.score(prompts, labels)
        return max(scores, key=lambda layer: scores[layer])

    def _together(self, prompts: list[Any]) -> None:
        """All layers in one pass, so that the probes find theirs in the cache."""
        first = self.probes[self.layers[0]]
        together = Probe(**{**first.get_params(), "layers": self.layers})
        together._session = first._session
        together.warmup(prompts)


_PARAMETERS: Final = {name: p for name, p in inspect.signature(Probe.__init__).parameters.items() if name != "self"}
# Of this machine, of this moment, or no JSON.
_NOT_SAVED: Final = ("store", "tokenizer", "device_map", "cache_only", "trust_remote_code")


# ------------------------------------------------------------------------------------------------------------------ reading


def _read(outcome: Outcome, stores: list[Store], stage: Stage) -> _Activations:
    """What an extraction has made sure of, from the places that hold it, in the order of the given prompts."""
    prompts, layers = outcome.prompts, outcome.layers
    level, name = ("tokens", "resid") if stage.needs_tokens else ("prompts", f"resid_{stage.pooling}")
    pieces: dict[int, Array] = {}
    for store in stores:
        info: GroupInfo | None = store.groups().get(outcome.group.name)
        if info is None:
            continue
        view = store.view(info, whole=False)
        rows = view.find(prompts.sha256)
        places = np.array([i for i in np.flatnonzero(rows >= 0) if i not in pieces], np.int64)
        there = view.covers(level, name, rows[places], layers).all(axis=0)  # type: ignore[arg-type]
        places = places[there]
        if not len(places):
            continue
        values = read_values(view, level, name, rows[places], layers)  # type: ignore[arg-type]
        counts = view.token_counts()[rows[places]] if stage.needs_tokens else np.ones(len(places), np.int64)
        bounds = offsets_of(counts)
        pieces |= {int(i): values[:, a:b] for i, a, b in zip(places, bounds[:-1], bounds[1:], strict=True)}
    absent = [i for i in range(len(prompts)) if i not in pieces]
    if absent:
        raise PartGoneError(f"{len(absent)} of {len(prompts)} prompts went from {stores[-1].url} while they were read: call again")
    counts = np.array([pieces[i].shape[1] for i in range(len(prompts))], np.int64)
    joined = np.concatenate([pieces[i] for i in range(len(prompts))], axis=1)
    chosen = concat_ranges(offsets_of(counts)[prompts.row], counts[prompts.row])
    ordered = joined[:, chosen]
    wide = np.float64 if ordered.dtype == np.float64 else np.float32
    features = np.ascontiguousarray(ordered.transpose(1, 0, 2), wide).reshape(ordered.shape[1], -1)
    digests = np.frombuffer(bytes.fromhex("".join(prompts.sha256)), np.uint8).reshape(-1, 32)
    hashes = hashes_of(digests)[prompts.row]
    return _Activations(features, layers, counts[prompts.row] if stage.needs_tokens else None, hashes)


def _drop(sink: Store | None) -> None:
    if sink is not None:
        sink.storage.remove_tree("")


# ------------------------------------------------------------------------------------------------------------------ scores


def _scores(pipeline: Any, features: Array) -> Array:
    """Probabilities, or a decision function where there are none."""
    method = "predict_proba" if hasattr(pipeline, "predict_proba") else "decision_function"
    return np.asarray(getattr(pipeline, method)(features))


def _classes_of(scores: Array, classes: Array) -> Array:
    """The class with the largest score; the second where a single one is above 0."""
    return np.asarray(classes[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)])


def _counts(read: _Activations) -> Ints:
    assert read.n_tokens is not None  # noqa: S101 — the stage says that rows are tokens
    return read.n_tokens


def _pooled(scores: Array, stage: Stage, read: _Activations, classes: Array | None = None) -> Any:
    if stage.of == "activation":
        return scores
    if stage.of == "nothing":
        return _by_token(scores, read, classes)
    return reduce_scores(scores, _counts(read), stage.pooling)


def _by_token(values: Array, read: _Activations, classes: Array | None = None) -> xr.DataArray:
    """One row per token, found by prompt and position; a prompt that was given twice is there twice."""
    counts = _counts(read)
    uniques, codes = np.unique(read.hashes, return_inverse=True)
    positions = concat_ranges(np.zeros(len(counts), np.int64), counts)
    index = TokenIndex(uniques, np.repeat(codes.astype(np.int32), counts), positions)
    dims = ("token",) if values.ndim == 1 else ("token", "class")
    array = xr.DataArray(values, dims=dims, coords={} if values.ndim == 1 or classes is None else {"class": classes}, name="score")
    return array.assign_coords(xr.Coordinates(index.create_variables(), indexes={"prompt": index, "position": index}))


# --------------------------------------------------------------------------------------------------------------- what is given


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        raise InvalidTypeError("prompts is one text: give a list of prompts")
    if not isinstance(prompts, Iterable):
        raise InvalidTypeError(f"prompts is a {type(prompts).__name__}: give a list of prompts")
    return list(prompts)


def _is_matrix(given: Any) -> bool:
    """Whether these are activations: numbers with a fraction in rows. Whole numbers are token ids."""
    dtype = getattr(given, "dtype", None)
    if dtype is None or getattr(given, "ndim", 0) not in (2, 3):
        return False
    return bool(getattr(dtype, "is_floating_point", False)) or getattr(dtype, "kind", "") == "f"


def _as_array(values: Any) -> Array:
    return np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)


def _matrix(given: Any, n_layers: int) -> tuple[Array, tuple[int, ...]]:
    """Activations as rows, and their layers where these are known."""
    layers: tuple[int, ...] = ()
    if isinstance(given, xr.DataArray):
        sample = next((dim for dim in ("prompt", "token") if dim in given.dims), None)
        if sample is None or "hidden" not in given.dims:
            raise InvalidArgumentError(
                f"activations have dims {given.dims}, expected prompt or token, hidden, and perhaps layer: rename or select"
            )
        if "layer" in given.coords:
            layers = tuple(int(layer) for layer in np.atleast_1d(given.coords["layer"].values))
        n_layers = given.sizes.get("layer", 1)
        values = given.transpose(sample, "layer", "hidden", missing_dims="ignore").values
    else:
        tensor = given.detach().cpu() if hasattr(given, "detach") else given
        values = np.asarray(tensor.float().numpy() if hasattr(tensor, "float") and str(tensor.dtype) == "torch.bfloat16" else tensor)
    if values.ndim < 2 or values.dtype.kind not in "fiu" or not len(values):
        raise InvalidArgumentError(f"activations have shape {values.shape} and dtype {values.dtype}, expected (row, hidden) numbers")
    features = values.reshape(len(values), -1)
    features = features.astype(np.float64 if features.dtype.itemsize > 4 else np.float32, copy=False)
    if features.shape[1] % n_layers:
        raise InvalidArgumentError(
            f"activations are {features.shape[1]} wide, which is not {n_layers} layers of the same width: check n_layers"
        )
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise InvalidArgumentError(f"{len(bad)} of {len(features)} rows hold NaN or infinity, first row {bad[0]}: leave them out")
    return features, layers or (tuple(range(n_layers)) if n_layers > 1 else ())


def _prompts_and_labels(first: Any, second: Any, labels: Any) -> tuple[list[Any], Array]:
    if (second is None) == (labels is None):
        raise InvalidArgumentError(
            "fit takes (positive, negative) prompts, or (prompts, labels): give exactly one of the two after the first"
        )
    prompts = _listed(first)
    if labels is not None:
        return prompts, _as_array(labels)
    others = _as_array(second) if hasattr(second, "detach") else second
    listed = _listed(others)
    if listed and all(isinstance(one, (bool, int, float, np.number, np.bool_)) for one in listed):
        return prompts, np.asarray(listed)
    return [*prompts, *listed], np.array([1] * len(prompts) + [0] * len(listed))


def _checked_weights(weights: Any, n: int) -> Array | None:
    if weights is None:
        return None
    values = np.asarray(weights, float)
    if values.shape != (n,) or not np.isfinite(values).all() or (values < 0).any():
        raise InvalidArgumentError(
            f"sample_weight has shape {values.shape}, expected {n} finite numbers of at least 0: give one per prompt"
        )
    return values


def _check_batch_size(size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidArgumentError(f"batch_size={size!r} is no number of prompts: give a whole number of at least 1, or None")


def _as_json(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, slice):
        raise InvalidArgumentError(f"layers={value!r} cannot be saved: give a list of layer numbers")
    if isinstance(value, (np.ndarray, tuple, range)):
        return [_as_json(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (str, bool, int, float, list)) else str(value)


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (str, int, bool, float)) and value == default)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, list, tuple, dict, slice)) or value is None else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"
