"""`ProbeEnsemble`: several probes that answer together, and how far their answers lie apart.

Each member is a `Probe`, which learns and answers; here their activations are read once, and their answers are put together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import LayerSpec, LayerUnion, Stage
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, LmprobeZarrError, NotAProbeError, NotFittedError
from lmprobe_zarr.extraction import Activations, Supplied
from lmprobe_zarr.probe import Probe, check_finite, read_saved, write_saved
from lmprobe_zarr.probes import (
    align_labels,
    as_array,
    check_agreement,
    check_labels,
    check_weights,
    dump_ensemble,
    is_matrix,
    is_sequence_classifier,
    list_given,
    parse_ensemble,
    parse_matrix,
    rows_together,
    split_labels,
    true_labels,
)
from lmprobe_zarr.store import Place
from lmprobe_zarr.typing import Array, Floats, Ints

__all__ = ["ProbeEnsemble"]

VOTING: Final = ("soft", "hard")
#: How many times a resample is drawn again that lacks a class, as in lmprobe.
_DRAWS: Final = 100
#: The parameters of a probe that say where its activations come from: members that agree in them share one extraction.
_SOURCE: Final = (
    "model", "name", "tokenizer", "revision", "max_length", "dtype", "truncation", "modules", "provenance", "trust_remote_code",
    "add_special_tokens", "store", "device", "device_map", "batch_size", "cache_only", "legacy", "group", "add_generation_prompt",
    "continue_final_message", "tools", "chat_template_kwargs", "over",
)  # fmt: skip


class ProbeEnsemble:
    """Several probes that answer together: by the mean of their probabilities, or by a vote.

    Activations are read once for all members of one model: the model is run at most once in each call.

    Parameters
    ----------
    probes : sequence of Probe
        The members, which `fit` fits in place; they may be fitted already. All classify, or all are regressions. None is a sweep, or
        scores every token.
    weights : sequence of float, optional
        One per member, at least 0; they are divided by their sum. None: all are equal.
    voting : {"soft", "hard"}
        "soft" takes the class with the largest weighted mean of the members' probabilities, "hard" the one that members of the largest
        weight predict, of equal ones the first. Values of regressions are averaged, as "soft" says.

    Attributes
    ----------
    probes_ : list of Probe
    weights_ : ndarray of float64, shape (member,)
        Their sum is 1.
    classes_ : ndarray or None
        The labels, sorted; None for a regression.

    Notes
    -----
    Two things differ from lmprobe 0.10. `weights` count in a hard vote, where lmprobe leaves them out. And resamples of `bootstrap` never
    part what belongs together, see there.
    """

    def __init__(self, probes: Sequence[Probe], weights: Sequence[float] | None = None, voting: str = "soft") -> None:
        if isinstance(probes, Probe) or not isinstance(probes, Sequence) or not all(isinstance(probe, Probe) for probe in probes):
            raise InvalidTypeError("probes is a list of lmprobe_zarr.Probe: give [Probe(…), Probe(…)]")
        if not probes:
            raise InvalidArgumentError("probes is empty: an ensemble needs at least one")
        if voting not in VOTING:
            raise InvalidArgumentError(f"voting={voting!r:.60} is unknown: use {' or '.join(map(repr, VOTING))}")
        if len({probe.task for probe in probes}) > 1:
            raise InvalidArgumentError("some of these probes classify and others are regressions: make an ensemble of each")
        if probes[0].task == "regression" and voting == "hard":
            raise InvalidArgumentError("voting='hard' counts classes, and a regression has none: use voting='soft', the mean")
        for number, probe in enumerate(probes):
            if isinstance(probe.layers, str) and probe.layers.startswith("sweep"):
                raise InvalidArgumentError(f"member {number} is a sweep, one probe per layer: name its layers instead")
            if probe._stages()[1].of == "nothing":
                raise InvalidArgumentError(f"member {number} scores every token, and an ensemble answers for prompts: pool the scores")
        self.probes_ = list(probes)
        self.weights_ = _parse_weights(weights, len(self.probes_))
        self.voting = voting
        self._resamples = False
        self._seed: int | None = None

    @classmethod
    def from_configs(
        cls, model: Any, configs: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None, voting: str = "soft", **shared: Any
    ) -> Self:
        """An ensemble of probes of one model.

        Parameters
        ----------
        model : str, path or torch Module
        configs : sequence of mappings
            For each member the arguments of `Probe` that are its own.
        weights, voting
            As for `ProbeEnsemble`.
        **shared
            Arguments of `Probe` for all members.

        Returns
        -------
        ProbeEnsemble
            Not fitted.

        Raises
        ------
        As `Probe` and `ProbeEnsemble`.
        """
        return cls([Probe(**{**shared, **config, "model": model}) for config in configs], weights, voting)

    @classmethod
    def bootstrap(
        cls,
        base_probe: Probe,
        n_resamples: int = 10,
        random_state: int | None = None,
        weights: Sequence[float] | None = None,
        voting: str = "soft",
    ) -> Self:
        """An ensemble of copies of one probe, each of which `fit` fits on its own resample of the prompts.

        A resample holds as many prompts as were given, drawn with replacement, and all classes. Drawn are whole prompts: all rows of a
        prompt that was given twice come together; with ``groups``, whole groups, as many as there are. Where no prompt repeats and no
        groups are given, the draws are those of lmprobe for the same `random_state`. Otherwise lmprobe draws single rows (with groups,
        the same number from each), so that its members differ less than the data would make them, and the spread is too small.

        Parameters
        ----------
        base_probe : Probe
            It is not fitted itself.
        n_resamples : int
            How many members: about 10 for a standard deviation, 100 or more for an interval.
        random_state : int, optional
            Seeds the draws.
        weights, voting
            As for `ProbeEnsemble`.

        Returns
        -------
        ProbeEnsemble
            Not fitted.

        Raises
        ------
        InvalidTypeError, InvalidArgumentError
            No probe, no number of resamples, or no seed; or as `ProbeEnsemble`.

        Notes
        -----
        Source: B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979).
        """
        if not isinstance(base_probe, Probe):
            raise InvalidTypeError(f"base_probe is a lmprobe_zarr.Probe, not {type(base_probe).__name__}")
        if isinstance(n_resamples, bool) or not isinstance(n_resamples, int | np.integer):
            raise InvalidTypeError(f"n_resamples={n_resamples!r:.60} is not a whole number")
        if n_resamples < 1:
            raise InvalidArgumentError(f"n_resamples={n_resamples} leaves no member: give at least 1")
        made = cls([Probe(**base_probe.get_params()) for _ in range(n_resamples)], weights, voting)
        for probe in made.probes_:
            probe._memory = base_probe._memory
        made._resamples, made._seed = True, _parse_seed(random_state)
        return made

    def __len__(self) -> int:
        return len(self.probes_)

    def __repr__(self) -> str:
        fitted = " fitted" if all(probe.pipeline_ is not None for probe in self.probes_) else ""
        kind = f"bootstrap of {self.probes_[0]!r}, {len(self)} members" if self._resamples else f"{len(self)} probes"
        return f"<lmprobe_zarr.ProbeEnsemble, {kind}, voting={self.voting!r}{fitted and ', fitted'}>"

    @property
    def task(self) -> str:
        """Either "classification" or "regression"."""
        return self.probes_[0].task

    @property
    def classes_(self) -> Array | None:
        """The labels, sorted; None for a regression, and before all members are fitted."""
        if self.task == "regression" or any(probe.classes_ is None for probe in self.probes_):
            return None
        return self._classes()

    # ------------------------------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        positive_prompts: Any,
        negative_prompts: Any = None,
        *,
        labels: Any = None,
        sample_weight: Any = None,
        groups: Any = None,
        batch_size: int | None = None,
    ) -> Self:
        """Fit all members, each as `Probe.fit` does: ``fit(positive, negative)``, or ``fit(prompts, labels)``.

        Parameters
        ----------
        positive_prompts, negative_prompts, labels
            As for `Probe.fit`; activations of prompts will do too.
        sample_weight : sequence of float, optional
            One per prompt; a resample takes them along.
        groups : sequence, optional
            One per prompt. Of a bootstrap, prompts of an equal group are drawn together. Within a member, as for `Probe.fit`.
        batch_size : int, optional
            For this call.

        Returns
        -------
        ProbeEnsemble
            This ensemble.

        Raises
        ------
        LabelError
            As for `Probe.fit`; or no resample was found that holds every class.
        others
            As `Probe.fit` does.
        """
        if is_matrix(positive_prompts):
            given = negative_prompts if labels is None else labels
            return self._fit_given(positive_prompts, given, sample_weight, groups)
        prompts, y = split_labels(positive_prompts, negative_prompts, labels)
        y = check_labels(y, len(prompts), classes=self.task == "classification")
        check_agreement(prompts, y)
        weights = check_weights(sample_weight, len(prompts))
        together = rows_together(prompts, groups, len(prompts))
        for probe in self.probes_:
            probe._check_training(y, weights)
        draws = self._draw(y, together)
        for members in self._by_source():
            wanted = [(self.probes_[member]._stages()[0], self.probes_[member]._layers_to_read) for member in members]
            with self._supplied(prompts, members, wanted, batch_size) as supplied:
                for member, read in _read_each(supplied, members, wanted):
                    rows = draws[member]
                    of_rows = None if weights is None else weights[rows]
                    self.probes_[member]._fit_read(read.take(rows), y[rows], of_rows, together[rows])
        return self

    def _fit_given(self, given: Any, y: Any, sample_weight: Any, groups: Any) -> Self:
        """Fit on activations."""
        if any(is_sequence_classifier(probe.classifier) for probe in self.probes_):
            raise InvalidArgumentError("a member learns how to pool the tokens of prompts: give prompts, or fit it alone")
        y, weights = as_array(align_labels(given, y)), align_labels(given, sample_weight, "weight")
        if not isinstance(given, xr.DataArray):
            given = parse_matrix(given, 1)[0]
        dim = next((dim for dim in ("prompt", "token") if isinstance(given, xr.DataArray) and dim in given.dims), None)
        n = len(given) if dim is None else given.sizes[dim]
        y = check_labels(y, n, classes=self.task == "classification")
        weights, together = check_weights(weights, n), rows_together(given, groups, n)
        for probe, rows in zip(self.probes_, self._draw(y, together), strict=True):
            drawn = given[rows] if dim is None else given.isel({dim: rows})
            of_rows = None if weights is None else weights[rows]
            probe.fit_from_activations(drawn, y[rows], sample_weight=of_rows, groups=together[rows])
        return self

    def _draw(self, y: Array, together: Array) -> list[Ints]:
        """The rows that each member learns from."""
        if not self._resamples:
            return [np.arange(len(y))] * len(self)
        # Units in the order in which they first occur: where each is a single row, they are the rows.
        first, unit = np.unique(together, return_index=True, return_inverse=True)[1:]
        place = np.argsort(np.argsort(first))[unit]
        order = np.argsort(place, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(place))[:-1])
        classes = np.unique(y) if self.task == "classification" else None
        rng = np.random.default_rng(self._seed)
        draws: list[Ints] = []
        for _ in self.probes_:
            for _ in range(_DRAWS):
                rows = np.concatenate([members[drawn] for drawn in rng.choice(len(members), size=len(members), replace=True)])
                if classes is None or len(np.unique(y[rows])) == len(classes):
                    break
            else:
                raise LabelError(
                    f"{_DRAWS} resamples of {len(members)} prompts or groups lacked a class: give more prompts or groups of each class"
                )
            draws.append(rows)
        return draws

    def _by_source(self, *, as_fitted: bool = False) -> list[list[int]]:
        """The members, in lists of those that share an extraction."""
        lists: list[list[int]] = []
        for member, probe in enumerate(self.probes_):
            for others in lists:
                other = self.probes_[others[0]]
                alike = all(_alike(getattr(probe, name), getattr(other, name)) for name in _SOURCE)
                if alike and (not as_fitted or probe.dtype_ == other.dtype_):
                    others.append(member)
                    break
            else:
                lists.append([member])
        return lists

    @contextmanager
    def _supplied(
        self, prompts: list[Any], members: list[int], wanted: list[tuple[Stage, Any]], batch_size: int | None, *, as_fitted: bool = False
    ) -> Iterator[Supplied]:
        """All that some members of one model need, after at most one run of it."""
        first = self.probes_[members[0]]
        stages, layers = list(dict.fromkeys(stage for stage, _ in wanted)), LayerUnion(tuple(spec for _, spec in wanted))
        with first._supply(batch_size, as_fitted=as_fitted).supplied(prompts, stages, layers) as supplied:
            yield supplied

    # ------------------------------------------------------------------------------------------------------------- scoring

    def predict(self, prompts: Any, *, batch_size: int | None = None) -> Array:
        """The class of each prompt, or its value for a regression.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        batch_size : int, optional
            For this call.

        Returns
        -------
        ndarray, shape (prompt,)

        Raises
        ------
        NotFittedError, InvalidArgumentError
            As `predict_proba`; members without probabilities need ``voting="hard"``.
        """
        if self.task == "regression":
            return np.asarray(np.tensordot(self.weights_, self._answers(prompts, batch_size, "values")[0], 1))
        classes = self._classes()
        if self.voting == "soft":
            return np.asarray(classes[self.predict_proba(prompts, batch_size=batch_size).argmax(axis=1)])
        predicted, _ = self._answers(prompts, batch_size, "classes")
        votes = np.tensordot(self.weights_, predicted[:, :, None] == classes, 1)
        return np.asarray(classes[np.round(votes, 12).argmax(axis=1)])

    def predict_proba(self, prompts: Any, *, batch_size: int | None = None) -> Floats:
        """The weighted mean of the members' probabilities of each class.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        batch_size : int, optional
            For this call.

        Returns
        -------
        ndarray of float64, shape (prompt, class)
            In the order of ``classes_``.

        Raises
        ------
        NotFittedError
        InvalidArgumentError
            A regression, a member without probabilities, or members of other classes.
        """
        self._classes()
        return np.asarray(np.tensordot(self.weights_, self._answers(prompts, batch_size, "probabilities")[0], 1))

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
        y = true_labels(prompts, labels)
        return self.probes_[0]._fitted.score(self.predict(prompts, batch_size=batch_size), y)

    def prediction_std(self, prompts: Any, *, batch_size: int | None = None) -> Floats:
        """How far the members' probabilities of the second class lie apart, or their values: as lmprobe calls it.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        batch_size : int, optional
            For this call.

        Returns
        -------
        ndarray of float64, shape (prompt,); of more than two classes (prompt, class)
            Standard deviation over the members, whose number it divides by.
        """
        spread = self.predict_spread(prompts, batch_size=batch_size)["std"].values
        return np.asarray(spread[:, 1] if spread.ndim == 2 and spread.shape[1] == 2 else spread)

    def predict_spread(self, prompts: Any, *, level: float = 0.95, batch_size: int | None = None) -> xr.Dataset:
        """How far the members' answers lie apart, for each prompt.

        Of a bootstrap this is how much an answer depends on which prompts were trained on: the bootstrap's standard error, and its
        percentile interval. It says nothing of prompts of another kind. Of other ensembles it is how much the members disagree.

        Parameters
        ----------
        prompts : iterable of prompts, or array of activations
        level : float
            The share of the members that lies within the interval, between 0 and 1. Ten members have no 95 percent: the interval then
            reaches almost from the smallest to the largest.
        batch_size : int, optional
            For this call.

        Returns
        -------
        Dataset
            ``mean`` (weighted, as `predict_proba` or `predict` gives it), ``std`` (over the members, whose number it divides by),
            ``low`` and ``high`` (quantiles, interpolated between members), float64, over ``prompt`` and ``class``; of a regression over
            ``prompt``. The coordinate ``prompt`` holds prompt hashes, where they are known.

        Raises
        ------
        NotFittedError
        InvalidArgumentError
            `level` is no share, or as `predict_proba`.
        """
        if isinstance(level, bool) or not isinstance(level, int | float | np.number) or not 0 < level < 1:
            raise InvalidArgumentError(f"level={level!r:.60} is no share of the members: give a number between 0 and 1, such as 0.95")
        regression = self.task == "regression"
        answers, hashes = self._answers(prompts, batch_size, "values" if regression else "probabilities")
        low, high = np.quantile(answers, [(1 - level) / 2, (1 + level) / 2], axis=0)
        found = {"mean": np.tensordot(self.weights_, answers, 1), "std": answers.std(axis=0), "low": low, "high": high}
        dims = ("prompt",) if regression else ("prompt", "class")
        coords: dict[str, Any] = {} if hashes is None else {"prompt": hashes}
        if not regression:
            coords["class"] = self._classes()
        attrs = {"level": float(level), "members": len(self), "resampled": int(self._resamples)}
        return xr.Dataset({name: (dims, values) for name, values in found.items()}, coords, attrs)

    def _classes(self) -> Array:
        """The labels that all members know."""
        if self.task == "regression":
            raise InvalidArgumentError("a regression has no probabilities: use predict")
        known: list[Array] = []
        for number, probe in enumerate(self.probes_):
            if probe.classes_ is None:
                raise NotFittedError(f"member {number} of this ensemble has learned nothing yet: call fit first")
            known.append(probe.classes_)
        other = next((number for number, classes in enumerate(known) if not np.array_equal(classes, known[0])), None)
        if other is not None:
            raise InvalidArgumentError(
                f"member {other} knows the classes {known[other].tolist()!r:.60} and member 0 {known[0].tolist()!r:.60}: "
                "fit all on the same labels"
            )
        return known[0]

    def _answers(self, prompts: Any, batch_size: int | None, what: str) -> tuple[Array, Array | None]:
        """Each member's answers, shape (member, prompt) or (member, prompt, class), and the prompts' hashes where they are known."""
        for number, probe in enumerate(self.probes_):
            if probe.pipeline_ is None:
                raise NotFittedError(f"member {number} of this ensemble has learned nothing yet: call fit first")
            if what == "probabilities" and not hasattr(probe.pipeline_, "predict_proba"):
                raise InvalidArgumentError(f"member {number}, {probe.classifier!r}, gives no probabilities: use voting='hard'")
        if is_matrix(prompts):
            return self._of_given(prompts, what)
        listed = list_given(prompts)
        answers: dict[int, Array] = {}
        hashes: Array | None = None
        for members in self._by_source(as_fitted=True):
            unknown = next((member for member in members if not self.probes_[member].layers_), None)
            if unknown is not None:
                raise InvalidArgumentError(f"member {unknown} learned from activations of unknown layers: predict from activations too")
            wanted = [(self.probes_[member]._stages()[1], list(self.probes_[member].layers_)) for member in members]
            with self._supplied(listed, members, wanted, batch_size, as_fitted=True) as supplied:
                for member, read in _read_each(supplied, members, wanted):
                    fitted = self.probes_[member]._fitted
                    if member == members[0]:
                        self.probes_[member]._warn_of_weights(read)
                    answers[member] = np.asarray(fitted.probabilities(read) if what == "probabilities" else fitted.predict(read))
                    hashes = read.hashes
        return np.stack([answers[member] for member in range(len(self))]), hashes

    def _of_given(self, given: Any, what: str) -> tuple[Array, Array | None]:
        found = []
        for probe in self.probes_:
            chosen = isinstance(given, xr.DataArray) and "layer" in given.dims and "layer" in given.coords and bool(probe.layers_)
            part = given.sel(layer=list(probe.layers_)) if chosen and set(probe.layers_) <= set(given.layer.values.tolist()) else given
            answer: Callable[[Any], Array] = probe.predict_from_activations
            found.append(np.asarray((probe.predict_proba_from_activations if what == "probabilities" else answer)(part)))
        named = isinstance(given, xr.DataArray) and "prompt" in given.dims and "prompt" in given.coords
        return np.stack(found), given.coords["prompt"].values if named else None

    # ---------------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted ensemble into one file, safetensors with JSON inside; never a pickle.

        Parameters
        ----------
        path : str or path
            The file; an existing one is replaced.

        Raises
        ------
        NotFittedError, InvalidArgumentError
            As for `Probe.save`, of any member.
        """
        settings = {"voting": self.voting, "weights": self.weights_.tolist(), "resampled": self._resamples, "seed": self._seed}
        write_saved(path, dump_ensemble([probe._to_bytes() for probe in self.probes_], settings))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, store: Place = None) -> Self:
        """The ensemble that `save` wrote; no code in the file is ever run.

        Parameters
        ----------
        path : str or path
        store : Store, path or URL, or a sequence of these, optional
            Where its members read activations, instead of the cache.

        Returns
        -------
        ProbeEnsemble
            Fitted; its model is not loaded.

        Raises
        ------
        NotAProbeError
            The file is no saved ensemble, or is damaged.
        UnsupportedVersionError
            The file was written by a newer release.
        FileNotFoundError
        """
        where = str(path)
        members, settings = parse_ensemble(read_saved(path), where)
        probes = [Probe._from_bytes(data, f"{where}, member {number}", store=store) for number, data in enumerate(members)]
        for probe in probes:
            probe._memory = probes[0]._memory
        resampled, seed = settings.get("resampled"), settings.get("seed")
        try:
            made = cls(probes, settings.get("weights"), settings.get("voting", ""))
            made._seed = _parse_seed(seed)
        except LmprobeZarrError as error:
            raise NotAProbeError(f"{where} is damaged: {error}") from error
        made._resamples = resampled is True
        return made


def _parse_weights(weights: Sequence[float] | None, n: int) -> Floats:
    """One weight per member; their sum is 1."""
    if weights is None:
        return np.full(n, 1 / n)
    try:
        given = np.asarray(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"weights={weights!r:.60} are no numbers: give one per member") from error
    if given.shape != (n,):
        raise InvalidArgumentError(f"weights have shape {given.shape} for {n} members: give one for each")
    if not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise InvalidArgumentError(f"weights={weights!r:.60} are no weights: give numbers of at least 0, not all of them 0")
    return np.asarray(given / math.fsum(given))


def _parse_seed(seed: Any) -> int | None:
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise InvalidTypeError(f"random_state={seed!r:.60} is not a whole number")
    if seed < 0:
        raise InvalidArgumentError(f"random_state={seed} is negative: give a seed of at least 0")
    return int(seed)


def _alike(first: Any, other: Any) -> bool:
    return first is other or (type(first) is type(other) and isinstance(first, str | int | float | tuple | list | dict) and first == other)


def _read_each(supplied: Supplied, members: list[int], wanted: Sequence[tuple[Stage, LayerSpec]]) -> Iterator[tuple[int, Activations]]:
    """The activations of each member; those that want the same ones are given one array."""
    held: dict[tuple[Stage, tuple[int, ...]], Activations] = {}
    for member, (stage, spec) in zip(members, wanted, strict=True):
        key = (stage, supplied.numbers(spec))
        if key not in held:
            # Only the last one is kept: members of one kind follow each other.
            held = {key: supplied.read_some(stage, key[1])}
            check_finite(held[key])
        yield member, held[key]
