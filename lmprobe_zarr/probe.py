"""`Probe`: a classifier on a model's activations. They are read from the cache; missing ones are computed and added to it.

`extraction` supplies the activations, and `probes` has the estimators and the arithmetic.
"""

from __future__ import annotations

import inspect
import json
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import (
    BY_PROBE,
    ChatOptions,
    LayerFractions,
    LayerSpec,
    OverSpec,
    Stage,
    choose_layers,
    concat_ranges,
    describe_layers,
    one_part,
    parse_candidates,
    parse_chat_options,
    parse_stage,
    parse_sweep,
    reduce_scores,
    resolve_layers,
)
from lmprobe_zarr.display import card, definitions, describe_error, section, table
from lmprobe_zarr.errors import InvalidArgumentError, LabelError, LmprobeZarrError, NotAProbeError, NotFittedError
from lmprobe_zarr.extraction import Activations, Callback, ExtractStats, ModelChoice, Supply, SupplyMemory, Watch
from lmprobe_zarr.probes import (
    BoundSequences,
    WatchedProbe,
    align_labels,
    as_array,
    check_agreement,
    check_batch_size,
    check_labels,
    check_weights,
    class_scores,
    dump_probe,
    evaluate_classification,
    evaluate_regression,
    evaluation_folds,
    fit_probe,
    fit_sequence_pipeline,
    group_tokens,
    has_weights,
    is_matrix,
    is_sequence_classifier,
    is_sparse,
    keep_together,
    keep_zeros,
    list_given,
    make_pipeline_for,
    not_finite_rows,
    parse_matrix,
    parse_probe,
    rows_for,
    rows_together,
    select_labelled_tokens,
    split_labels,
    true_labels,
    watch_pipeline,
)
from lmprobe_zarr.probes.devices import parse_device
from lmprobe_zarr.probes.layer_choice import check_alpha, check_top_k, choose_by_importance, choose_by_lasso, layer_importance
from lmprobe_zarr.store import GivenProvenance, Place, parse_provenance
from lmprobe_zarr.sweeps.origin import Origin, warn_of_origin
from lmprobe_zarr.tokens import TokenIndex, sequences_of
from lmprobe_zarr.typing import Array, Ints

if TYPE_CHECKING:
    import torch

__all__ = ["LayerSweep", "Probe"]

TASKS: Final = ("classification", "regression")
LEGACY: Final = ("auto", "never")
#: Words for `layers` that choose some of several candidates.
CHOOSING: Final = ("auto", "fast_auto")


class Probe:
    """A classifier or regressor on the activations of a language model.

    Activations come from the cache. The model is loaded only if some are missing. It is run once, and its results are kept: the pooled
    vectors of every layer up to the deepest requested one, and tokens only if every token has to be classified.

    Parameters
    ----------
    model : str, path or torch Module, optional
        A hub id, a folder, or a loaded model (then give `name` and `tokenizer` too). None if only activations are given.
    layers : "middle", "all", "last", int, sequence of int, slice, "sweep", "sweep:N" or "sweep:A-B", "auto" or "fast_auto"
        Several layers are put side by side. A sweep fits one probe per layer (every N-th, or A to B inclusive); see `sweep_result_`.
        ``"auto"`` and ``"fast_auto"`` choose some of `auto_candidates` by the labels, the one by a group lasso (of two classes), the other
        by the coefficients of the classifier on all candidates; then the probe is fitted on the chosen ones as if they had been named,
        and reads no others. Both choices see all training prompts: only other prompts give a score that means something.
    pooling : str
        ``last_token``, ``first_token``, ``mean``: activations are pooled, then classified. ``max``, ``min``, or any name after ``score:``:
        every token is classified, then the scores are pooled. ``activation:max`` and ``activation:min`` pool activations. ``all``: one
        score per token.
    train_pooling, inference_pooling : str, optional
        If the two differ. Training takes ``last_token``, ``first_token``, ``mean`` and ``all`` (every token is a row of its own).
    over : str or mapping
        Which tokens activations are pooled over: ``"all"``, ``"generated"``, a role of chats such as ``"assistant"``, or one part by
        criteria, ``{"tail": {"position": slice(-8, None)}}``; see `lmprobe_zarr.extract`. For poolings of activations only.
    classifier : str or scikit-learn estimator
        See `lmprobe_zarr.probes.named_probes`; for regression the default is ``ridge_regression``. Or one that learns how to pool the
        tokens of a prompt, ``attention``, ``multimax``, ``softmax_mean`` or ``rolling_mean_max``, see
        `lmprobe_zarr.probes.sequence_probes`; then the three poolings are left out.
    task : {"classification", "regression"}
    device : str
        Of the model, and of a classifier that learns how to pool. ``"auto"`` takes CUDA, then MPS, then the CPU; for the classifier
        CUDA, then the CPU.
    random_state : int, optional
    batch_size : int, optional
        At most this many prompts per forward pass; None chooses by the device's memory.
    normalize_layers : bool, "per_neuron" or "per_layer"
        How several layers are scaled; True is ``"per_neuron"``.
    dtype : str, optional
        The dtype to compute in. None takes stored activations of any dtype (of several, float32), and otherwise computes in float32, as
        lmprobe does. A fitted probe keeps the dtype that it learned from.
    classifier_kwargs : mapping, optional
        Parameters of a named classifier.
    preprocessing : str or sequence of str, optional
        ``"standard"``, ``"pca:N"``, ``"standard+pca:N"``.
    pca_components : int, optional
        For ``"pca"`` without a number.
    store : Store, path or URL, or a sequence of these, optional
        A store to use instead of the cache.
    cache_only : bool
        Whether prompts that are not stored are an error; otherwise the model is run on them.
    legacy : {"auto", "never"}
        Whether lmprobe's own entries beside the cache serve a call if they hold all of its prompts and layers.
    group : str, optional
        Name of a stored group, if several of the model match, or if it is of this model and does not record that, as after an import.
    name, tokenizer, revision, max_length, truncation, provenance, modules, trust_remote_code, device_map
        As for `lmprobe_zarr.extract`.
    add_special_tokens, add_generation_prompt, continue_final_message, tools, chat_template_kwargs
        As for `lmprobe_zarr.extract`.
    auto_candidates : sequence of int or of float, optional
        Among which layers ``"auto"`` and ``"fast_auto"`` choose: numbers, or fractions of the depth from 0.0 (the first block) to 1.0
        (the last). None is ``[0.25, 0.5, 0.75]``.
    auto_alpha : float
        Strength of the group lasso of ``"auto"``: larger chooses fewer layers.
    fast_auto_top_k : int, optional
        How many layers ``"fast_auto"`` chooses; None is half of the candidates.
    mass_mean_augment : bool
        Whether the classifier is given one more column: the projection of the scaled activations, before `preprocessing`, on the
        difference of the two class means. Not for regressions, or classifiers that learn how to pool.

    Attributes
    ----------
    pipeline_ : scikit-learn Pipeline
        What was fitted, scaling included.
    classes_ : ndarray or None
        The labels, sorted; None for regression.
    layers_ : tuple of int
        The layers that it learned from; empty where it learned from activations of unknown layers.
    selected_layers_ : list of int or None
        The same where ``"auto"`` or ``"fast_auto"`` chose them, else None.
    candidate_layers_ : list of int or None
        Among which they were chosen.
    layer_importances_ : ndarray of float, shape (candidate,), or None
        The norm of each candidate's coefficients: in the group lasso, or in the classifier on all candidates.
    dtype_ : str or None
        The dtype that its activations were computed in, if known.
    origin_ : Origin
        The model, the variable and the weights that it learned from, as far as they are known: what it is given later is compared with it.
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
        store: Place = None,
        cache_only: bool = False,
        legacy: str = "auto",
        group: str | None = None,
        name: str | None = None,
        tokenizer: Any = None,
        revision: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        provenance: GivenProvenance = None,
        modules: Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
        device_map: Any = None,
        add_special_tokens: bool = True,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        over: OverSpec = "all",
        auto_candidates: Iterable[float] | None = None,
        auto_alpha: float = 0.01,
        fast_auto_top_k: int | None = None,
        mass_mean_augment: bool = False,
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
        self.legacy = legacy
        self.group = group
        self.name = name
        self.tokenizer = tokenizer
        self.revision = revision
        self.max_length = max_length
        self.truncation = truncation
        self.provenance = provenance
        self.modules = modules
        self.trust_remote_code = trust_remote_code
        self.device_map = device_map
        self.add_special_tokens = add_special_tokens
        self.add_generation_prompt = add_generation_prompt
        self.continue_final_message = continue_final_message
        self.tools = tools
        self.over = over
        self.chat_template_kwargs = chat_template_kwargs
        self.auto_candidates = auto_candidates
        self.auto_alpha = auto_alpha
        self.fast_auto_top_k = fast_auto_top_k
        self.mass_mean_augment = mass_mean_augment
        self.pipeline_: Any = None
        self.classes_: Array | None = None
        self.layers_: tuple[int, ...] = ()
        self.n_layers_ = 1
        self.dtype_: str | None = None
        self.selected_layers_: list[int] | None = None
        self.candidate_layers_: list[int] | None = None
        self.layer_importances_: Array | None = None
        self.sweep_result_: LayerSweep | None = None
        self.origin_ = Origin()
        self._memory = SupplyMemory()
        self._check()

    def _check(self) -> None:
        """Raise for arguments that cannot be fitted with, before anything is run."""
        if self.task not in TASKS:
            raise InvalidArgumentError(f"task={self.task!r} is unknown: use {' or '.join(map(repr, TASKS))}")
        if self.legacy not in LEGACY:
            raise InvalidArgumentError(f"legacy={self.legacy!r} is unknown: use {' or '.join(map(repr, LEGACY))}")
        if is_sequence_classifier(self.classifier):
            given = {name: getattr(self, name) for name in ("pooling", "train_pooling", "inference_pooling")}
            strange = next((name for name, value in given.items() if value not in (None, "last_token")), None)
            if strange is not None:
                raise InvalidArgumentError(
                    f"{self.classifier!r} learns how to pool the tokens of a prompt, so {strange}={given[strange]!r} has nothing to pool: "
                    "leave it out"
                )
        for stage in self._stages():
            if stage.needs_tokens and one_part(self.over) is not None:
                raise InvalidArgumentError(
                    f"over={self.over!r} is for pooled activations, and this probe classifies every token: leave over= out, or fit tokens "
                    "with sweep_tokens(…, where=mask_tokens(tokens, role=…))"
                )
        one_part(self.over)
        if self.batch_size is not None:
            check_batch_size(self.batch_size)
        self._chat_options()
        self._check_choice(self._new_pipeline(1))

    def _check_choice(self, pipeline: Any) -> None:
        """Raise for arguments by which no layers can be chosen."""
        parse_candidates(self.auto_candidates)
        check_alpha(self.auto_alpha)
        check_top_k(self.fast_auto_top_k)
        if not self._chooses:
            return
        if self.layers == "auto" and self.task == "regression":
            raise InvalidArgumentError("layers='auto' chooses for two classes: for a regression use layers='fast_auto', or name layers")
        if is_sequence_classifier(self.classifier):
            raise InvalidArgumentError(f"{self.classifier!r} learns from the tokens of prompts, by which no layers are chosen: name layers")
        if self.layers == "fast_auto" and type(pipeline.steps[-1][1]).__name__ in ("MLPClassifier", "DummyClassifier"):
            raise InvalidArgumentError(f"layers='fast_auto' chooses by coefficients, and {self.classifier!r} has none: use layers='auto'")

    @property
    def _chooses(self) -> bool:
        """Whether layers are chosen by the labels."""
        return isinstance(self.layers, str) and self.layers in CHOOSING

    @property
    def _layers_to_read(self) -> LayerSpec:
        """The layers that a fit needs."""
        return parse_candidates(self.auto_candidates) if self._chooses else self.layers

    def _check_training(self, y: Array, weights: Array | None) -> None:
        """Raise for labels and weights that this probe cannot learn from, before anything is run."""
        n_classes = len(np.unique(y)) if self.task == "classification" else 0
        if self.layers == "auto" and n_classes != 2:
            raise LabelError(f"layers='auto' chooses for two classes, and there are {n_classes}: use layers='fast_auto', or name layers")
        if self.layers == "auto" and weights is not None:
            raise InvalidArgumentError("the group lasso of layers='auto' takes no sample_weight: use layers='fast_auto', or name layers")
        if self.mass_mean_augment and n_classes != 2:
            raise LabelError(f"mass_mean_augment takes the difference of two class means, and there are {n_classes} classes: leave it out")

    def _stages(self) -> tuple[Stage, Stage]:
        """What is pooled to train, and to predict."""
        if is_sequence_classifier(self.classifier):
            return BY_PROBE, BY_PROBE
        return parse_stage(self.train_pooling or self.pooling, training=True), parse_stage(self.inference_pooling or self.pooling)

    def _chat_options(self) -> ChatOptions:
        return parse_chat_options(
            add_generation_prompt=self.add_generation_prompt, continue_final_message=self.continue_final_message, tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ scikit-learn's interface

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of this probe."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> Self:
        """Change arguments; what was fitted does not change.

        Raises
        ------
        InvalidArgumentError
            There is no parameter of that name.
        """
        unknown = sorted(set(params) - set(_PARAMETERS))
        if unknown:
            raise InvalidArgumentError(f"Probe has no parameter {unknown[0]!r}: there is {', '.join(_PARAMETERS)}")
        before = self.get_params()
        self.__dict__.update(params)
        try:
            self._check()
        except BaseException:
            self.__dict__.update(before)
            raise
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

    def _repr_html_(self) -> str:
        given = {name: getattr(self, name) for name, p in _PARAMETERS.items() if not _same(getattr(self, name), p.default)}
        model = given.pop("model", None)
        learned: dict[str, object] = {}
        if self.pipeline_ is not None:
            learned = {
                "layers": (", ".join(map(str, self.layers_)) or "unknown")
                + ("" if self.selected_layers_ is None else f", chosen from {', '.join(map(str, self.candidate_layers_ or ()))}"),
                "classes": "none: a regression"
                if self.classes_ is None
                else ", ".join(f"{label!r:.40}" for label in self.classes_.tolist()[:20]),
                "computed in": self.dtype_ or "unknown",
                "steps": " → ".join(type(step).__name__ for _, step in self.pipeline_.steps),
            }
        elif self.sweep_result_ is not None:
            learned = {"one probe for each of layers": describe_layers(self.sweep_result_.layers)}
        fitted = section("Fitted", definitions(learned), opened=True) if learned else definitions({"fitted": "not yet"})
        shown = {name: _short(value) for name, value in given.items()}
        parameters = section("Parameters", definitions(shown or {"": "all by default"}), opened=bool(shown), note=f"({len(shown)} given)")
        named = "activations only" if model is None else model if isinstance(model, str) else _short(model)
        return str(card("lmprobe_zarr.Probe", named, fitted, parameters))

    def __getstate__(self) -> dict[str, Any]:
        # A loaded model is not copied: the copy loads its own when it needs it.
        return {**self.__dict__, "_memory": SupplyMemory()}

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
        given = list_given(prompts)
        stages = self._stages()
        sweep = parse_sweep(self.layers)
        with self._supply(batch_size).supplied(given, stages, self._layers_to_read if sweep is None else sweep) as supplied:
            return supplied.outcome.stats

    def _supply(self, batch_size: int | None = None, *, as_fitted: bool = False) -> Supply:
        """The supply of activations; with `as_fitted`, of those computed in the dtype that the probe learned from."""
        if batch_size is not None:
            check_batch_size(batch_size)
        fields, any_provenance = parse_provenance(self.provenance)
        choice = ModelChoice(
            model=self.model, name=self.name, tokenizer=self.tokenizer, revision=self.revision, max_length=self.max_length,
            dtype=self.dtype_ if as_fitted and self.dtype is None else self.dtype, truncation=self.truncation, modules=self.modules,
            provenance=dict(fields), trust_remote_code=self.trust_remote_code,
            add_special_tokens=self.add_special_tokens,
        )  # fmt: skip
        return Supply(
            choice=choice, store=self.store, device=self.device, device_map=self.device_map, batch_size=batch_size or self.batch_size,
            cache_only=self.cache_only, legacy=self.legacy, group=self.group,
            any_provenance=any_provenance, memory=self._memory, chat=self._chat_options(), over=self.over,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        positive_prompts: Any,
        negative_prompts: Any = None,
        *,
        labels: Any = None,
        sample_weight: Any = None,
        groups: Any = None,
        invalidate_cache: bool = False,
        batch_size: int | None = None,
    ) -> Self:
        """Fit on prompts: ``fit(positive, negative)``, or ``fit(prompts, labels)``.

        Parameters
        ----------
        positive_prompts : iterable of prompts, or array of float, shape (row, hidden)
            Prompts of class 1; or all of them. An array is treated as activations, as by `fit_from_activations`.
        negative_prompts : iterable of prompts, or of numbers or truth values
            Prompts of class 0; or the label of each prompt, or its value for a regression.
        labels : sequence, optional
            The labels or values, if they are texts, which as `negative_prompts` would be taken for prompts. A mapping, a Series whose index
            is the prompts, or a DataArray over ``prompt`` is matched by prompt.
        sample_weight : sequence of float, optional
            One per prompt.
        groups : sequence, optional
            One per prompt. Prompts of an equal group stay together in the folds within which a classifier such as
            ``logistic_regression_cv`` chooses; without groups, all rows of a prompt do.
        invalidate_cache : bool
            Run the model on all prompts, stored or not; the new activations win.
        batch_size : int, optional
            For this call.

        Returns
        -------
        Probe
            This probe.

        Raises
        ------
        LabelError
            Fewer than two classes, not one label per prompt, or missing labels.
        InvalidArgumentError
            The classifier cannot be fitted on these activations; of a sweep, on any of its layers.
        others
            As `lmprobe_zarr.extract` does.

        Warns
        -----
        FitFailedWarning
            scikit-learn's own: some layers of a sweep could not be fitted. ``sweep_result_.failed`` has the reasons.
        """
        if is_matrix(positive_prompts):
            given = negative_prompts if labels is None else labels
            return self.fit_from_activations(positive_prompts, given, sample_weight=sample_weight, groups=groups)
        prompts, y = split_labels(positive_prompts, negative_prompts, labels)
        y = check_labels(y, len(prompts), classes=self.task == "classification")
        check_agreement(prompts, y)
        weights = check_weights(sample_weight, len(prompts))
        self._check_training(y, weights)
        together = rows_together(prompts, groups, len(prompts))
        stage, _ = self._stages()
        sweep = parse_sweep(self.layers)
        if sweep is not None:
            return self._fit_sweep(prompts, y, weights, together, sweep, invalidate_cache=invalidate_cache, batch_size=batch_size)
        read = self._supply(batch_size).activations(prompts, stage, self._layers_to_read, refresh=invalidate_cache)
        check_finite(read)
        self._fit_read(read, y, weights, together)
        return self

    def _fit_read(self, read: Activations, y: Array, weights: Array | None, together: Array) -> None:
        if read.stage != BY_PROBE and read.n_tokens is not None:
            y, together = np.repeat(y, read.n_tokens), np.repeat(together, read.n_tokens)
            weights = None if weights is None else np.repeat(weights, read.n_tokens)
        n_tokens = read.n_tokens if read.stage == BY_PROBE else None
        self._fit(read.features, y, weights, together, read.layers, len(read.layers), n_tokens)
        named = self.name or (os.fspath(self.model) if isinstance(self.model, str | os.PathLike) else "")
        variable = "resid" if one_part(self.over) is not None else _variable_of(read.stage)
        self.dtype_, self.origin_ = read.compute_dtype, Origin(named, variable, read.weights)

    def fit_from_activations(
        self,
        X: Any,  # noqa: N803
        y: Any,
        *,
        sample_weight: Any = None,
        groups: Any = None,
        n_layers: int = 1,
    ) -> Self:
        """Fit on given activations, of all layers that they hold.

        With ``layers="auto"`` or ``"fast_auto"`` a DataArray over ``layer`` is chosen from: `auto_candidates` are some of its layers, or
        fractions of its length. Other values of ``layers`` play no part.

        Parameters
        ----------
        X : array of float, shape (row, hidden) or (row, layer × hidden); or DataArray over prompt, hidden and perhaps layer
            Or a sparse array of scipy, such as :func:`lmprobe_zarr.pool_latents` gives, which stays sparse: nothing is centred then, and
            ``"logistic_l1"``, ``"logistic_regression"``, ``"ridge"`` and ``"svm"`` can be fitted. For a classifier that learns how to
            pool, a DataArray over token, hidden and perhaps layer.
        y : sequence
            A label or value per row; for such a classifier as for `lmprobe_zarr.fit_tokens`.
        sample_weight : sequence of float, optional
        groups : sequence, optional
            As for `fit`.
        n_layers : int
            Number of layers side by side in a row; a DataArray knows it itself.

        Returns
        -------
        Probe
            This probe.

        Raises
        ------
        LabelError
            As for `fit`.
        InvalidArgumentError
            Not a matrix of finite numbers, or its width is no multiple of `n_layers`.
        """
        if is_sequence_classifier(self._classifier):
            self._fit_sequences(X, y, sample_weight, groups)
            return self
        y, sample_weight = align_labels(X, y), align_labels(X, sample_weight, "weight")
        features, layers, n_layers = parse_matrix(X, n_layers)
        n = features.shape[0]
        labels = check_labels(as_array(y), n, classes=self.task == "classification")
        weights, together = check_weights(sample_weight, n), rows_together(X, groups, n)
        self._check_training(labels, weights)
        if self._chooses:
            if len(layers) != n_layers:
                raise InvalidArgumentError(
                    f"layers={self.layers!r} chooses among layers, and these activations do not say which they are of: give a DataArray "
                    "with the coordinate layer, or name layers"
                )
            wanted = choose_layers(layers, self._of_given(layers), where="these activations", num_layers=max(layers) + 1)
            features, layers, n_layers = _columns_of(features, layers, wanted), wanted, len(wanted)
        self._fit(features, labels, weights, together, layers, n_layers)
        self.dtype_, self.origin_ = None, Origin.of(X)
        return self

    def _of_given(self, layers: tuple[int, ...]) -> list[int]:
        """The candidates among layers of given activations; fractions are of their number."""
        candidates = parse_candidates(self.auto_candidates)
        if isinstance(candidates, LayerFractions):
            return [layers[place] for place in candidates.of(len(layers))]
        return list(resolve_layers(candidates, max(layers) + 1))

    def _fit_sequences(self, given: Any, y: Any, sample_weight: Any, groups: Any) -> None:
        """Fit a classifier that learns how to pool on the tokens of whole prompts."""
        dim = _token_dim(given, self.classifier)
        labelled = select_labelled_tokens(given, dim, y)
        if not labelled.by_prompt:
            raise InvalidArgumentError(
                f"labels {labelled.name!r} differ within a prompt, and {self.classifier!r} gives one score for all its tokens: use a "
                "classifier of tokens, with train_pooling='all'"
            )
        features, layers, n_layers = parse_matrix(given, 1)
        n_tokens, order = sequences_of(given, dim)
        first = np.unique(labelled.prompt, return_index=True)[1]
        unit = group_tokens(given, dim, labelled, groups)[1]
        together = np.arange(len(n_tokens)) if unit is None else unit
        labels, weights = labelled.classes[labelled.codes[first]], check_weights(sample_weight, len(n_tokens))
        self._fit(features[order], labels, weights, together, layers, n_layers, n_tokens)
        self.dtype_, self.origin_ = None, Origin.of(given)

    @property
    def _classifier(self) -> Any:
        """The classifier or regressor that is fitted."""
        default = self.task == "regression" and isinstance(self.classifier, str) and self.classifier == "logistic_regression"
        return "ridge_regression" if default else self.classifier

    def _new_pipeline(self, n_layers: int) -> Any:
        return make_pipeline_for(
            self._classifier,
            task=self.task,
            n_layers=n_layers,
            normalize_layers=self.normalize_layers,
            preprocessing=self.preprocessing,
            pca_components=self.pca_components,
            params=self.classifier_kwargs,
            random_state=0 if self.random_state is None else self.random_state,
            mass_mean_augment=self.mass_mean_augment,
        )

    def _fit(
        self,
        features: Array,
        labels: Array,
        weights: Array | None,
        together: Array,
        layers: tuple[int, ...],
        n_layers: int,
        n_tokens: Ints | None = None,
    ) -> None:
        """Fit on rows; with `n_tokens`, on the rows of prompts, whose labels and `together` are one per prompt."""
        candidates: list[int] | None = None
        importances: Array | None = None
        if self._chooses:
            candidates = list(layers)
            places, importances = self._choose(features, labels, weights, together, n_layers)
            chosen = tuple(layers[place] for place in places)
            features, layers, n_layers = _columns_of(features, layers, chosen), chosen, len(chosen)
        pipeline = self._new_pipeline(n_layers)
        self._fit_pipeline(pipeline, features, labels, weights, together, n_tokens)
        self.pipeline_, self.layers_, self.n_layers_ = pipeline, layers, n_layers
        self.candidate_layers_, self.layer_importances_ = candidates, importances
        self.selected_layers_ = None if candidates is None else list(layers)
        self.classes_ = np.asarray(pipeline.classes_) if self.task == "classification" else None
        self.sweep_result_ = None

    def _choose(self, features: Array, labels: Array, weights: Array | None, together: Array, n_layers: int) -> tuple[list[int], Array]:
        """Which of the layers of the rows are chosen, by their places, and the importance of each."""
        if self.layers == "auto":
            return choose_by_lasso(features, labels, n_layers, self.auto_alpha, self.normalize_layers)

        def fit(rows: Array) -> Any:
            pipeline = make_pipeline_for(
                self._classifier, task=self.task, n_layers=n_layers, normalize_layers=False, params=self.classifier_kwargs,
                random_state=0 if self.random_state is None else self.random_state,
            )  # fmt: skip
            self._fit_pipeline(pipeline, rows, labels, weights, together, None)
            return pipeline

        return choose_by_importance(features, n_layers, self.fast_auto_top_k, self.normalize_layers, fit)

    def _fit_pipeline(
        self, pipeline: Any, features: Array, labels: Array, weights: Array | None, together: Array, n_tokens: Ints | None
    ) -> None:
        estimator = pipeline.steps[-1][1]
        if is_sparse(features):
            keep_zeros(pipeline)
        if weights is not None and not has_weights(estimator):
            raise InvalidArgumentError(f"{self.classifier!r} takes no sample_weight: leave it out, or use 'logistic_regression' or 'ridge'")
        codes = np.unique(labels, return_inverse=True)[1] if self.task == "classification" else None
        keep_together(pipeline, self._classifier, codes, together, 0 if self.random_state is None else self.random_state)
        try:
            rows = rows_for(self._classifier, features, labels if self.task == "regression" else None)
            if n_tokens is None:
                fit_probe(self._classifier, pipeline, rows, labels, weights)
            else:
                fit_sequence_pipeline(
                    pipeline, rows, labels, n_tokens, together, parse_device(self.device, needed_by="a probe that learns how to pool")
                )
        except (LmprobeZarrError, MemoryError):
            raise
        except Exception as error:
            # Whatever the caller's own estimators raise.
            reason = str(error).strip().split("\n")[0][:200] if isinstance(error, ValueError | TypeError) else describe_error(error)
            raise InvalidArgumentError(f"{self.classifier!r} cannot be fitted on these {features.shape[0]} rows: {reason}") from error

    def _fit_sweep(
        self,
        prompts: list[Any],
        y: Array,
        weights: Array | None,
        together: Array,
        sweep: LayerSpec,
        *,
        invalidate_cache: bool,
        batch_size: int | None,
    ) -> Self:
        stage, _ = self._stages()
        probes: dict[int, Probe] = {}
        failed: dict[int, InvalidArgumentError] = {}
        with self._supply(batch_size).supplied(prompts, (stage,), sweep, refresh=invalidate_cache) as supplied:
            for layer in supplied.outcome.layers:
                probe = Probe(**{**self.get_params(), "layers": layer})
                probe._memory = self._memory
                read = supplied.read(stage, layer)
                check_finite(read)
                try:
                    probe._fit_read(read, y, weights, together)
                except InvalidArgumentError as error:
                    failed[layer] = error
                else:
                    probes[layer] = probe
        if not probes:
            raise failed[min(failed)]
        # The first layer is in use until `evaluate` chooses; where it failed, nothing is, rather than another layer.
        self._adopt(probes.get(min([*probes, *failed]), Probe(**self.get_params())))
        self.sweep_result_ = LayerSweep(probes, {layer: str(error) for layer, error in failed.items()})
        _warn_failed(self.sweep_result_)
        return self

    def _adopt(self, other: Probe) -> None:
        """Take over what another probe has learned."""
        for name in (
            "pipeline_", "classes_", "layers_", "n_layers_", "dtype_", "selected_layers_", "candidate_layers_", "layer_importances_",
            "origin_",
        ):  # fmt: skip
            setattr(self, name, getattr(other, name))

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
            Nothing was fitted; or, of a sweep that was not evaluated, not its first layer.
        others
            As `lmprobe_zarr.extract` does.
        """
        fitted = self._fitted
        return self.predict_from_activations(prompts) if is_matrix(prompts) else fitted.predict(self._read(prompts, batch_size))

    def predict_proba(self, prompts: Any, *, batch_size: int | None = None) -> Any:
        """The probability of each class.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        batch_size : int, optional
            For this call.

        Returns
        -------
        ndarray of float, shape (prompt, class)
            In the order of ``classes_``. ``max`` and ``min`` pool each class separately. With ``inference_pooling="all"`` a
            DataArray over ``token`` and ``class``, indexed by prompt and position.

        Raises
        ------
        InvalidArgumentError
            A regression, or a classifier without probabilities.
        NotFittedError
        """
        fitted = self._fitted
        fitted.check_probabilities()
        if is_matrix(prompts):
            return self.predict_proba_from_activations(prompts)
        return fitted.probabilities(self._read(prompts, batch_size))

    def _read(self, prompts: Any, batch_size: int | None) -> Activations:
        """Activations of prompts, of the layers and the dtype that the probe learned from."""
        _, stage = self._stages()
        if not self.layers_:
            raise InvalidArgumentError("this probe learned from activations of unknown layers: predict from activations too")
        read = self._supply(batch_size, as_fitted=True).activations(list_given(prompts), stage, list(self.layers_))
        check_finite(read)
        self._warn_of_weights(read)
        return read

    def _warn_of_weights(self, read: Activations) -> None:
        """Warn where the model of this name has other weights now than those that the probe learned from."""
        warn_of_origin(self.origin_, replace(self.origin_, weights=read.weights))

    @property
    def decision_function(self) -> Any:
        """The decision function of rows of activations, as in scikit-learn; AttributeError if the classifier has none."""
        if self.pipeline_ is None or not hasattr(self.pipeline_, "decision_function"):
            raise AttributeError(f"{self.classifier!r} has no decision function, or learned nothing yet")

        def decision_function(X: Any) -> Array:  # noqa: N803
            return np.asarray(self._bound(X).decision_function(self._same_width(X)))

        return decision_function

    def predict_from_activations(self, X: Any) -> Array:  # noqa: N803
        """The class or value of each row of activations, shape (row,).

        Parameters
        ----------
        X : array of float, shape (row, hidden) or (row, layer × hidden); or DataArray over prompt, hidden and perhaps layer

        Returns
        -------
        ndarray, shape (row,)
        """
        bound = self._bound(X)
        return np.asarray(bound.predict(self._same_width(X)))

    def predict_proba_from_activations(self, X: Any) -> Array:  # noqa: N803
        """The probability of each class for each row of activations, shape (row, class).

        Parameters
        ----------
        X : array of float, shape (row, hidden) or (row, layer × hidden); or DataArray over prompt, hidden and perhaps layer

        Returns
        -------
        ndarray of float, shape (row, class)
            In the order of ``classes_``.
        """
        self._fitted.check_probabilities()
        return np.asarray(self._bound(X).predict_proba(self._same_width(X)))

    def score_from_activations(self, X: Any, y: Any) -> float:  # noqa: N803
        """Accuracy, or R² for a regression, on rows of activations.

        Parameters
        ----------
        X : array of float, shape (row, hidden) or (row, layer × hidden); or DataArray over prompt, hidden and perhaps layer
        y : sequence
            A label or value per row.

        Returns
        -------
        float
        """
        return self._fitted.score(self.predict_from_activations(X), true_labels(X, y))

    def _bound(self, X: Any) -> Any:  # noqa: N803
        """What predicts from the rows that `_same_width` gives."""
        pipeline = self._fitted.pipeline
        return BoundSequences(pipeline, sequences_of(X, _token_dim(X, self.classifier))[0]) if self._pools else pipeline

    @property
    def _pools(self) -> bool:
        """Whether the classifier pools the tokens of a prompt itself."""
        return is_sequence_classifier(self._classifier)

    def _same_width(self, X: Any) -> Array:  # noqa: N803
        given = Origin.of(X)
        # A probe may be made to learn from one pooling and to predict from another.
        is_as_made = given.variable == _variable_of(self._stages()[1])
        warn_of_origin(self.origin_, replace(given, variable=self.origin_.variable) if is_as_made else given)
        if self._pools:
            X = X.isel({(dim := _token_dim(X, self.classifier)): sequences_of(X, dim)[1]})  # noqa: N806
        features, layers, _ = parse_matrix(X, self.n_layers_)
        if layers and self.layers_ and layers != self.layers_:
            raise InvalidArgumentError(f"these activations are of layers {list(layers)}, and the probe learned from {list(self.layers_)}")
        if features.shape[1] != self.pipeline_.n_features_in_:
            raise InvalidArgumentError(
                f"these activations are {features.shape[1]} wide, and the probe learned from {self.pipeline_.n_features_in_}: "
                "give the same layers of the same model"
            )
        return features if is_sparse(features) else np.asarray(rows_for(self._classifier, features))

    def score(self, prompts: Any, labels: Any, *, batch_size: int | None = None) -> float:
        """The share of prompts whose class is predicted, 0 to 1; R² for a regression.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        labels : sequence
            A label or value per prompt, in their order.
        batch_size : int, optional
            For this call.

        Returns
        -------
        float
        """
        labels = true_labels(prompts, labels)
        return self._fitted.score(np.asarray(self.predict(prompts, batch_size=batch_size)), labels)

    def watch(
        self,
        model: torch.nn.Module,
        *,
        layers: int | Iterable[int] | None = None,
        threshold: float | None = None,
        label: Any = None,
        callback: Callback | None = None,
        tokens: str | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> Watch:
        """A context in which this probe scores every token that a model reads or generates, by forward hooks on its blocks.

        The pooling is the one that it predicts with, and is kept up to date as tokens come in, which is exact: scores are those of
        `predict_proba` for the same tokens. Each step costs one matrix product per layer, and one copy of its result to the host; for
        ``activation:max`` and ``activation:min``, and for probes that are not linear, a copy of the rows. What a step costs does not grow
        with the text.

        Parameters
        ----------
        model : torch Module
            A loaded model of transformers, or around one. It is not copied, moved or changed otherwise.
        layers : int or iterable of int, optional
            Of a sweep: which of its probes, all at once, ``layer`` becoming a dimension of the scores; if not given, the probe in use. Of
            a probe that learned from activations of unknown layers: their numbers.
        threshold : float, optional
            A prompt whose score is above it is one of `Watch.above`, and its answer ends where the watch is among the
            ``stopping_criteria`` of ``generate``; in any layer, where there are several.
        label : optional
            For more than two classes, whose score is compared.
        callback : callable, optional
            Called with the number of the step and its scores, an array of shape (prompt,), after each pass: 0 after the prompts have been
            read. It returns None, or truth values: for each prompt, whether its answer ends, as with a threshold.
        tokens : {"all", "generated"}, optional
            Which tokens are pooled: all, or those after the prompts. If not given, as ``over=`` says.
        modules : mapping, optional
            As for `lmprobe_zarr.extract`.

        Returns
        -------
        Watch
            Its scores are probabilities, of the second of two classes or of each; decision values of a classifier without probabilities;
            values of a regression. Hooks are there between its beginning and its end, whatever ends it.

        Raises
        ------
        NotFittedError
        InvalidTypeError
            A model that is not loaded.
        InvalidArgumentError
            A layer that the probe was not trained on; a probe that pools over other tokens; no threshold that can be compared. When the
            context is entered: a model of another width, or with fewer layers. While the model runs: beam search, or another call that
            takes tokens back; a batch whose size changes; a cache that was filled before; activations that are NaN.
        UnknownArchitectureError
            The blocks of the model were not found.

        Examples
        --------
        >>> with probe.watch(model, threshold=0.9) as seen:  # doctest: +SKIP
        ...     model.generate(**inputs, stopping_criteria=[seen])
        >>> seen.scores.sel(step=0)  # doctest: +SKIP
        """
        if tokens is None:
            part = one_part(self.over)
            if part is not None and json.loads(part.described) != {"generated": True}:
                raise InvalidArgumentError(
                    f"over={self.over!r}: which tokens these are is not known while a model generates, give tokens='generated' or 'all'"
                )
            tokens = "all" if part is None else "generated"
        by_layer = layers is not None and self.sweep_result_ is not None
        asked = None if layers is None else [layers] if isinstance(layers, int | np.integer) else list(layers)
        if self.sweep_result_ is None or asked is None:
            watched = [self._watched(asked)]
        else:
            strange = [layer for layer in asked if layer not in self.sweep_result_.layers]
            if strange or not asked:
                raise InvalidArgumentError(
                    f"layers={layers!r}: the probes of this sweep were trained on layers {self.sweep_result_.layers}, give some of these"
                )
            watched = [self.sweep_result_[layer]._watched(None) for layer in asked]
        return Watch(model, watched, by_layer=by_layer, threshold=threshold, label=label, callback=callback, tokens=tokens, modules=modules)

    def _watched(self, layers: list[Any] | None) -> WatchedProbe:
        """What was learned, in the form in which it scores a text that grows."""
        fitted, (_, stage) = self._fitted, self._stages()
        if self.layers_ and layers is not None and layers != list(self.layers_):
            raise InvalidArgumentError(f"layers={layers!r}: this probe was trained on layers {list(self.layers_)}, leave it out")
        chosen = self.layers_ or tuple(layers or ())
        if len(chosen) != self.n_layers_ or len(set(chosen)) != len(chosen):
            raise InvalidArgumentError(
                f"this probe learned from activations of {self.n_layers_} unknown layers: give their numbers, layers=[…]"
            )
        return watch_pipeline(fitted.pipeline, stage, chosen, fitted.classifier, fitted.classes)

    def evaluate(
        self, prompts: Any, labels: Any, *, choose: str | None = None, groups: Any = None, batch_size: int | None = None
    ) -> dict[str, Any]:
        """The usual measures on prompts that the probe has not seen.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        labels : sequence
            A label or value per prompt, in their order.
        choose : {"layer"}, optional
            Of a sweep: the measures are the mean over five folds of these prompts, each scored by the layer that is best on the other
            four, so that no prompt has a part in the choice of the layer by which it is scored.
        groups : sequence, optional
            With `choose`: prompts of an equal value are in one fold.
        batch_size : int, optional
            For this call.

        Returns
        -------
        dict
            ``accuracy``, ``f1``, ``precision``, ``recall``, ``auroc`` (where there are probabilities or scores) and ``n_eval``; ``r2`` and
            ``mae`` for a regression. Of a sweep: those of the best layer, ``best_layer``, ``best_accuracy``, and ``layer_results`` by
            layer; the probe of the best layer is in use afterwards. The best of many layers scores too high on the prompts that it was
            chosen by, and ``chosen_by`` says so. With `choose` the measures are free of that, ``chosen_layers`` has the layer of each fold,
            and ``best_layer`` and ``best_accuracy`` are of all prompts as before. Layers that could not be fitted are NaN and never
            chosen; ``failed_layers`` has the reason of each, where there are any.

        Raises
        ------
        InvalidArgumentError
            `choose` is another word, or this is no sweep.
        LabelError
            With `choose`: fewer than two prompts (or groups) of a class.
        """
        if choose not in (None, "layer") or (choose is not None and self.sweep_result_ is None) or (choose is None and groups is not None):
            problem = "'layer' can be chosen, of a probe that was fitted with layers='sweep'; groups= are for choose='layer'"
            raise InvalidArgumentError(f"choose={choose!r} chooses nothing here: {problem}")
        if self.sweep_result_ is not None:
            return self._evaluate_sweep(self.sweep_result_, prompts, labels, batch_size, choose, groups)
        fitted = self._fitted
        y = true_labels(prompts, labels)
        if is_matrix(prompts):
            features, bound = self._same_width(prompts), self._bound(prompts)
            return fitted.measure(np.asarray(bound.predict(features)), class_scores(bound, features), y)
        return fitted.evaluate(self._read(prompts, batch_size), y)

    def _evaluate_sweep(
        self, sweep: LayerSweep, prompts: Any, labels: Any, batch_size: int | None, choose: str | None, groups: Any
    ) -> dict[str, Any]:
        y = true_labels(prompts, labels)
        if is_matrix(prompts):
            raise InvalidArgumentError("a sweep has a probe per layer: evaluate one of them on activations, probe.sweep_result_[layer]")
        listed = list_given(prompts)
        answers = {layer: fitted.answer(read) for layer, fitted, read in sweep._read(listed, batch_size) if fitted is not None}

        def score(layer: int, rows: Any = slice(None)) -> dict[str, Any]:
            predicted, scores = answers[layer]
            return sweep[layer]._fitted.measure(predicted[rows], None if scores is None else scores[rows], y[rows])

        results = {layer: score(layer) for layer in answers}
        measure = "accuracy" if self.task == "classification" else "r2"
        best = _best({layer: held[measure] for layer, held in results.items()})
        found, chosen_by = results[best], f"these prompts, on which the best of {len(results)} layers scores too high: give choose='layer'"
        chosen: dict[str, Any] = {}
        if choose is not None:
            together = None if groups is None else rows_together(listed, groups, len(listed))
            folds = evaluation_folds(listed, None if self.task == "regression" else y, together)
            layers = [_best({layer: score(layer, others)[measure] for layer in results}) for others, _ in folds]
            by_fold = [score(layer, rows) for layer, (_, rows) in zip(layers, folds, strict=True)]
            names = dict.fromkeys(name for each in by_fold for name in each)
            found = {name: float(np.mean([each[name] for each in by_fold if name in each])) for name in names} | {"n_eval": len(y)}
            chosen, chosen_by = {"chosen_layers": layers}, f"the other prompts, in each of {len(folds)} folds"
        self._adopt(sweep[best])
        nothing = {name: np.nan for name in results[best] if name != "n_eval"} | {"n_eval": len(y)}
        results = {layer: results.get(layer, nothing) for layer in sweep.layers}
        if sweep.failed:
            chosen["failed_layers"] = dict(sweep.failed)
        shown = {"layer_results": results, "best_layer": best, f"best_{measure}": results[best][measure]}
        return {**found, **shown, **chosen, "chosen_by": chosen_by}

    @property
    def _fitted(self) -> _Fitted:
        """What was learned, in a form that scores activations."""
        if self.pipeline_ is None and self.sweep_result_ is not None:
            first = self.sweep_result_.layers[0]
            raise NotFittedError(
                f"the first layer, which is in use before evaluate chooses the best, could not be fitted (layer {first}: "
                f"{self.sweep_result_.failed[first]}): call evaluate, or take another layer, "
                f"probe.sweep_result_[{min(self.sweep_result_.probes)}]"
            )
        if self.pipeline_ is None:
            raise NotFittedError("this probe has learned nothing yet: call fit first")
        return _Fitted(self.pipeline_, self.classes_, self._classifier)

    def compute_layer_importance(self, metric: str = "l2", normalize: bool = True) -> Array:
        """How large the coefficients of each layer are that this probe learned from; kept as `layer_importances_` too.

        Parameters
        ----------
        metric : {"l2", "l1", "mean_abs", "max_abs"}
            Over all coefficients of a layer, those of every class.
        normalize : bool
            Whether they are divided by their sum.

        Returns
        -------
        ndarray of float64, shape (layer,)
            In the order of ``layers_``, which `candidate_layers_` then names. Coefficients are those of the scaled layers; principal
            components and a mass-mean column are undone.

        Raises
        ------
        NotFittedError
        InvalidArgumentError
            No such metric, or a classifier without coefficients.
        """
        importances = layer_importance(self._fitted.pipeline, self.n_layers_, metric)
        total = float(importances.sum())
        if normalize and total > 0:
            importances = importances / total
        self.candidate_layers_ = list(self.layers_ or range(self.n_layers_))
        self.layer_importances_ = importances
        return importances

    # ---------------------------------------------------------------------------------------------------------------- files

    def _to_bytes(self) -> bytes:
        """What `save` writes."""
        if self.sweep_result_ is not None:
            raise InvalidArgumentError("a sweep is many probes: save one of them, probe.sweep_result_[layer].save(…)")
        pipeline = self._fitted.pipeline
        parameters = {name: value for name, value in self.get_params().items() if name not in _NOT_SAVED}
        if self.model is not None and not isinstance(self.model, (str, os.PathLike)):
            parameters["model"] = None
        if self.tools is not None:
            parameters["tools"] = self._chat_options().arguments["tools"]  # schemas instead of functions
        part = one_part(self.over)
        parameters["over"] = "all" if part is None else {part.name: json.loads(part.described)}
        header = {
            "parameters": {name: _as_json(value) for name, value in parameters.items()},
            "layers": list(self.layers_),
            "n_layers": self.n_layers_,
            "dtype": self.dtype_,
            "task": self.task,
            "origin": {"model": self.origin_.model, "variable": self.origin_.variable, "weights": dict(self.origin_.weights)},
        }
        if self.selected_layers_ is not None and self.candidate_layers_ is not None and self.layer_importances_ is not None:
            header["chosen_from"] = {"layers": self.candidate_layers_, "importances": self.layer_importances_.tolist()}
        if not isinstance(self.classifier, str):
            raise InvalidArgumentError(
                f"only named classifiers can be saved, since no pickle is written, and {type(self.classifier).__name__} is none: "
                "keep its coefficients yourself"
            )
        return dump_probe(pipeline, header)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted probe into one file, safetensors with JSON inside; never a pickle.

        A model is saved by its name and what identifies its weights, and a loaded one by the latter alone: where the model of that name
        has other weights later, predictions warn. The place of the cache is not saved.

        Parameters
        ----------
        path : str or path
            The file; an existing one is replaced.

        Raises
        ------
        NotFittedError
        InvalidArgumentError
            The classifier is the caller's own estimator, `layers` is a slice, this is a sweep, or the file cannot be written.
        """
        write_saved(path, self._to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, store: Place = None) -> Probe:
        """The probe that `save` wrote; no code in the file is ever run.

        Parameters
        ----------
        path : str or path
        store : Store, path or URL, or a sequence of these, optional
            Where it reads activations, instead of the cache.

        Returns
        -------
        Probe
            The fitted probe; its model is not loaded.

        Raises
        ------
        NotAProbeError
            The file is no saved probe, or is damaged.
        UnsupportedVersionError
            The file was written by a newer release.
        FileNotFoundError
        """
        return cls._from_bytes(read_saved(path), str(path), store=store)

    @classmethod
    def _from_bytes(cls, data: bytes, where: str, *, store: Place = None) -> Probe:
        """What `load` reads; `where` is what the file is called in messages."""
        pipeline, header = parse_probe(data, where)
        parameters = {name: value for name, value in header["parameters"].items() if name in _PARAMETERS and name not in _NOT_SAVED}
        probe = cls(**{**parameters, "store": store})
        probe.pipeline_, probe.layers_, probe.n_layers_, probe.dtype_ = (
            pipeline,
            tuple(header["layers"]),
            header["n_layers"],
            header["dtype"],
        )
        probe.classes_ = np.asarray(pipeline.classes_) if probe.task == "classification" else None
        probe.origin_ = Origin.parse(header.get("origin"))
        if "chosen_from" in header:
            held = header["chosen_from"]
            layers, importances = (held.get("layers"), held.get("importances")) if isinstance(held, dict) else (None, None)
            if (
                not isinstance(layers, list)
                or not isinstance(importances, list)
                or len(layers) != len(importances)
                or not all(type(each) is int for each in layers)
                or not all(type(each) is float for each in importances)
            ):
                raise NotAProbeError(f"{where} is damaged: it does not say among which layers its own were chosen")
            probe.selected_layers_, probe.candidate_layers_ = list(probe.layers_), layers
            probe.layer_importances_ = np.asarray(importances, np.float64)
        return probe


def write_saved(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole: beside its place first, then into it.

    Raises
    ------
    InvalidArgumentError
        It cannot be written.
    """
    target = Path(path)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        staged.write_bytes(data)
        staged.replace(target)
    except OSError as error:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise InvalidArgumentError(f"{str(target)!r} cannot be written ({error.strerror}): give a file in a folder that exists") from error


def read_saved(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file that `write_saved` wrote.

    Raises
    ------
    NotAProbeError
        A folder.
    FileNotFoundError
    """
    try:
        return Path(path).read_bytes()
    except IsADirectoryError as error:
        raise NotAProbeError(f"{str(path)!r} is a folder: give the file that save wrote") from error


@dataclass(frozen=True)
class LayerSweep:
    """One fitted probe per layer.

    Parameters
    ----------
    probes : dict of int to Probe
        Those that could be fitted.
    failed : dict of int to str
        The layers whose fits ended in an error, each with that error. Their scores and predictions are NaN.
    """

    probes: dict[int, Probe]
    failed: dict[int, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """The layers, ascending, those that failed among them."""
        return sorted({*self.probes, *self.failed})

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> Probe:
        if layer in self.failed:
            raise NotFittedError(f"layer {layer} could not be fitted ({self.failed[layer]}): take one of layers {sorted(self.probes)}")
        return self.probes[layer]

    def __repr__(self) -> str:
        failed = f"; failed on layers {describe_layers(sorted(self.failed))}" if self.failed else ""
        return f"<lmprobe_zarr.LayerSweep, {len(self.probes)} probes on layers {describe_layers(sorted(self.probes))}{failed}>"

    def _repr_html_(self) -> str:
        rows = [(layer, repr(self.probes[layer]) if layer in self.probes else self.failed[layer]) for layer in self.layers]
        each = section("Probes", table(("layer", "probe"), rows), note=f"({len(rows)})")
        return str(card("lmprobe_zarr.LayerSweep", f"one probe for each of layers {describe_layers(self.layers)}", each))

    def score(self, prompts: Iterable[Any], labels: Any) -> dict[int, float]:
        """Accuracy (R² for a regression) of each layer.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        labels : sequence
            A label or value per prompt, in their order.

        Returns
        -------
        dict of int to float
            By layer; NaN for a layer that could not be fitted.
        """
        y = true_labels(prompts, labels)
        return {
            layer: np.nan if fitted is None else fitted.score(np.asarray(fitted.predict(read)), y)
            for layer, fitted, read in self._read(prompts)
        }

    def predict(self, prompts: Iterable[Any]) -> dict[int, Any]:
        """What each layer's probe predicts.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations

        Returns
        -------
        dict of int to ndarray, shape (prompt,)
            By layer; NaN for a layer that could not be fitted.
        """
        return {layer: _nan(read) if fitted is None else fitted.predict(read) for layer, fitted, read in self._read(prompts)}

    def predict_proba(self, prompts: Iterable[Any]) -> dict[int, Any]:
        """The probabilities that each layer's probe gives.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations

        Returns
        -------
        dict of int to ndarray of float, shape (prompt, class)
            By layer; NaN for a layer that could not be fitted.
        """
        # All layers learned from the same labels.
        known = self.probes[min(self.probes)]._fitted
        known.check_probabilities()
        return {
            layer: _nan(read, known.classes) if fitted is None else fitted.probabilities(read)
            for layer, fitted, read in self._read(prompts)
        }

    def best_layer(self, prompts: Iterable[Any], labels: Any) -> int:
        """The layer with the highest score; that score is too high, as the best of many on the prompts that it was chosen by.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        labels : sequence
            A label or value per prompt, in their order.

        Returns
        -------
        int
            Never a layer that could not be fitted.
        """
        return _best({layer: score for layer, score in self.score(prompts, labels).items() if layer in self.probes})

    def _read(self, prompts: Any, batch_size: int | None = None) -> Iterator[tuple[int, _Fitted | None, Activations]]:
        """Each layer with what was learned of it, None where its fit failed, and its activations.

        The model is run at most once; a layer is read when it is needed.
        """
        first = self.probes[min(self.probes)]
        _, stage = first._stages()
        with first._supply(batch_size, as_fitted=True).supplied(list_given(prompts), (stage,), self.layers) as supplied:
            for layer in self.layers:
                read = supplied.read(stage, layer)
                check_finite(read)
                if layer == self.layers[0]:
                    first._warn_of_weights(read)
                yield layer, self.probes[layer]._fitted if layer in self.probes else None, read


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What a probe has learned, and its answers for activations.

    Parameters
    ----------
    pipeline : scikit-learn Pipeline
    classes : ndarray, optional
        The labels, sorted; None for a regression.
    classifier : str or estimator
        As the probe was given it, for messages.
    """

    pipeline: Any
    classes: Array | None
    classifier: Any

    def _bound(self, read: Activations) -> Any:
        """What predicts for prompts from the rows of their tokens."""
        return BoundSequences(self.pipeline, _counts(read))

    def _rows(self, read: Activations) -> Array:
        """The activations in the dtype in which the probe predicts."""
        return np.asarray(rows_for(self.classifier, read.features))

    def predict(self, read: Activations) -> Any:
        """The class or value of each prompt, or of each token if nothing is pooled."""
        if self.classes is None:
            return _pooled(np.asarray(self.pipeline.predict(self._rows(read))), read)
        if read.stage == BY_PROBE:
            return self._bound(read).predict(self._rows(read))
        if not read.stage.needs_tokens:
            return np.asarray(self.pipeline.predict(self._rows(read)))
        scores = self._scores(self._rows(read), self.classes)
        if read.stage.of == "nothing":
            return _by_token(_classes_of(scores, self.classes), read)
        return _classes_of(reduce_scores(scores, _counts(read), read.stage.pooling), self.classes)

    def probabilities(self, read: Activations) -> Any:
        """The probability of each class."""
        if read.stage == BY_PROBE:
            return self._bound(read).predict_proba(self._rows(read))
        return _pooled(np.asarray(self.pipeline.predict_proba(read.features)), read, self.classes)

    def check_probabilities(self) -> None:
        """Raise if there are no probabilities."""
        if self.classes is None:
            raise InvalidArgumentError("a regression has no probabilities: use predict")
        if not hasattr(self.pipeline, "predict_proba"):
            raise InvalidArgumentError(f"{self.classifier!r} gives no probabilities: use predict, or 'logistic_regression'")

    def score(self, predicted: Array, labels: Array) -> float:
        """Accuracy, or R² for a regression."""
        self._check_labels(predicted, labels)
        if self.classes is None:
            return evaluate_regression(predicted, labels)["r2"]
        return float(np.mean(predicted == labels))

    def evaluate(self, read: Activations, labels: Array) -> dict[str, Any]:
        """The usual measures."""
        return self.measure(*self.answer(read), labels)

    def answer(self, read: Activations) -> tuple[Array, Array | None]:
        """The predictions, and scores or probabilities if there are any."""
        scores = None
        if read.stage == BY_PROBE:
            scores = class_scores(self._bound(read), self._rows(read))
        elif self.classes is not None and read.stage.needs_tokens:
            scores = np.asarray(_pooled(self._scores(self._rows(read), self.classes), read))
        elif self.classes is not None:
            scores = class_scores(self.pipeline, self._rows(read))
        return np.asarray(self.predict(read)), scores

    def measure(self, predicted: Array, scores: Array | None, labels: Array) -> dict[str, Any]:
        """The usual measures of predictions, and of scores if there are any."""
        self._check_labels(predicted, labels)
        if self.classes is None:
            return {**evaluate_regression(predicted, labels), "n_eval": len(labels)}
        if scores is not None and scores.ndim == 2 and scores.shape[1] == len(self.classes) == 2:
            scores = scores[:, 1]
        found = evaluate_classification(predicted, scores, labels, self.classes)
        return {**{name: value for name, value in found.items() if not np.isnan(value)}, "n_eval": len(labels)}

    def _scores(self, features: Array, classes: Array) -> Array:
        """Probabilities, or decision values if there are none: one column per class, or one value per row for two classes."""
        if hasattr(self.pipeline, "predict_proba"):
            return np.asarray(self.pipeline.predict_proba(features))
        scores = None if not hasattr(self.pipeline, "decision_function") else np.asarray(self.pipeline.decision_function(features))
        columns = 0 if scores is None else 2 if scores.ndim == 1 else scores.shape[1]
        if scores is None or columns != len(classes):
            raise InvalidArgumentError(
                f"{self.classifier!r} gives no score per class, which scores of tokens are pooled by: use 'logistic_regression', "
                "or decision_function_shape='ovr'"
            )
        return scores

    def _check_labels(self, predicted: Array, labels: Array) -> None:
        """Raise if the true labels cannot belong to the predictions."""
        if len(predicted) != len(labels):
            raise LabelError(
                f"there are {len(labels)} labels for {len(predicted)} predictions: give one for each prompt, and pool the tokens"
            )
        if self.classes is not None and len(labels) and not set(labels.tolist()) & set(self.classes.tolist()):
            raise LabelError(
                f"none of the labels, such as {labels[0]!r:.40}, is a class of this probe: it knows {self.classes.tolist()!r:.80}"
            )


_PARAMETERS: Final = {name: p for name, p in inspect.signature(Probe.__init__).parameters.items() if name != "self"}
# Parameters that belong to this machine or this moment, or that JSON cannot hold.
_NOT_SAVED: Final = ("store", "tokenizer", "device_map", "cache_only", "trust_remote_code", "legacy", "group")


# ------------------------------------------------------------------------------------------------------------------ scores


def _columns_of(features: Array, layers: tuple[int, ...], wanted: tuple[int, ...]) -> Array:
    """The columns of some layers of rows that hold several side by side."""
    places = [layers.index(layer) for layer in wanted]
    return np.ascontiguousarray(features.reshape(len(features), len(layers), -1)[:, places].reshape(len(features), -1))


def check_finite(read: Activations) -> None:
    """Raise if activations hold NaN or infinity, which no classifier learns from or scores."""
    bad = not_finite_rows(read.features)
    if bad:
        rows = bad if read.n_tokens is None else np.unique(np.repeat(np.arange(len(read.n_tokens)), read.n_tokens)[bad])
        shown = ", ".join(read.hashes[rows[:3]])
        raise InvalidArgumentError(
            f"layers {list(read.layers)} are NaN or infinite for {len(rows)} of {len(read.hashes)} prompts ({shown}): "
            "leave them out, or compute in another dtype"
        )


def _warn_failed(sweep: LayerSweep) -> None:
    if sweep.failed:
        from sklearn.exceptions import FitFailedWarning

        layer = min(sweep.failed)
        warnings.warn(
            f"{len(sweep.failed)} of {len(sweep)} layers could not be fitted, and their scores are NaN (layer {layer}: "
            f"{sweep.failed[layer]}): sweep_result_.failed says which",
            FitFailedWarning,
            stacklevel=4,
        )


def _best(scores: Mapping[int, float]) -> int:
    """The layer with the highest score, the first of equal ones; a score that is NaN is below all others."""
    return max(scores, key=lambda layer: -np.inf if np.isnan(scores[layer]) else scores[layer])


def _nan(read: Activations, classes: Array | None = None) -> Any:
    """NaN in place of the predictions of a layer that could not be fitted, or of its probabilities of some classes."""
    n = len(read.hashes) if read.stage == BY_PROBE else len(read.features)
    shape = (n,) if classes is None else (n, len(classes))
    return _pooled(np.full(shape, np.nan), read, classes)


def _classes_of(scores: Array, classes: Array) -> Array:
    """The class with the largest score. With one score per row, the second class if it is above 0, else the first."""
    return np.asarray(classes[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)])


def _variable_of(stage: Stage) -> str:
    """The variable of the residual stream that a stage pools to."""
    return f"resid_{stage.pooling}" if stage.of == "activation" else "resid"


def _token_dim(given: Any, classifier: Any) -> str:
    """The dimension of the tokens of given activations.

    Raises
    ------
    InvalidArgumentError
        It is not known which rows belong to one prompt.
    """
    dim = next((dim for dim in ("token", "prompt") if isinstance(given, xr.DataArray) and dim in given.dims), None)
    if dim is None:
        raise InvalidArgumentError(
            f"{classifier!r} pools the tokens of whole prompts, and {type(given).__name__} does not say which rows those are: "
            "give a DataArray over token, as store.tokens() has it"
        )
    return dim


def _counts(read: Activations) -> Ints:
    assert read.n_tokens is not None  # noqa: S101 — the stage says that rows are tokens
    return read.n_tokens


def _pooled(scores: Array, read: Activations, classes: Array | None = None) -> Any:
    """Scores of tokens, pooled to scores of prompts as the stage says."""
    if read.stage.of in ("activation", "learned"):
        return scores
    if read.stage.of == "nothing":
        return _by_token(scores, read, classes)
    return reduce_scores(scores, _counts(read), read.stage.pooling)


def _by_token(values: Array, read: Activations, classes: Array | None = None) -> xr.DataArray:
    """One row per token, indexed by prompt and position. The tokens of a prompt that was given twice occur twice."""
    counts = _counts(read)
    uniques, codes = np.unique(read.hashes, return_inverse=True)
    positions = concat_ranges(np.zeros(len(counts), np.int64), counts)
    index = TokenIndex(uniques, np.repeat(codes.astype(np.int32), counts), positions)
    dims = ("token",) if values.ndim == 1 else ("token", "class")
    array = xr.DataArray(values, dims=dims, coords={} if values.ndim == 1 or classes is None else {"class": classes}, name="score")
    return array.assign_coords(xr.Coordinates(index.create_variables(), indexes={"prompt": index, "position": index}))


# ----------------------------------------------------------------------------------------------------------------- printing


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
