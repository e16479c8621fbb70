"""A fitted pipeline as bytes and back, without pickle: numbers in safetensors, the rest in JSON. Never a path or a store.

Nothing in a file names code to run: each step names one of the classes listed here, whose constructor gets plain values and
whose fitted attributes are set to arrays of checked shapes.

The document, a text in the file's metadata: ``{"format", "version", "header", "written_by", "steps": [{"name", "class",
"n_features_in", "params", "values"}]}``; beside it ``sha256`` of document, table of tensors and values. The tensors are called
``<step>.<attribute>``. A step with ``"all_but_last": true`` passes the last column on (version 2).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from itertools import pairwise
from typing import Any, TypeGuard

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, NotAProbeError, UnsupportedVersionError
from lmprobe_zarr.probes.container import LARGEST_HEADER, pack_tensors, parse_json, unpack_tensors
from lmprobe_zarr.probes.file_checks import Kind, Shapes, check_step
from lmprobe_zarr.typing import Array

__all__ = ["FORMAT", "VERSION", "dump_probe", "parse_probe"]

FORMAT = "lmprobe-zarr-probe"
#: Written where it is needed: with a mass-mean column, which older releases do not know.
VERSION = 2

_LINEAR: Shapes = {"coef_": (("r", "n"), ("n",)), "intercept_": (("r",), ())}
_REGRESSION: Shapes = {"coef_": (("n",),), "intercept_": ((), ("1",))}
_OF_HEADS: Shapes = {"coef_": (("a", "r", "n"),), "intercept_": (("r",),)}
_OF_TOKENS: Shapes = {"coef_": (("r", "n"),), "intercept_": (("r",),)}
_CURVES = ("n_iter_", "converged_", "loss_curve_", "inner_loss_curve_")
_SEQUENCES = "lmprobe_zarr.probes.sequence_classifiers"
_KINDS: Mapping[str, Kind] = {
    "StandardScaler": Kind(
        "sklearn.preprocessing",
        {"mean_": (("n",),), "scale_": (("n",),), "var_": (("n",),)},
        ("n_samples_seen_",),
        transforms=True,
        only={"with_mean": (True, False), "with_std": (True,)},
    ),
    "PCA": Kind(
        "sklearn.decomposition",
        {
            "components_": (("m", "n"),),
            "mean_": (("n",),),
            "explained_variance_": (("m",),),
            "explained_variance_ratio_": (("m",),),
            "singular_values_": (("m",),),
        },
        ("n_components_", "n_samples_", "noise_variance_"),
        transforms=True,
    ),
    "LayerScaler": Kind(
        "lmprobe_zarr.probes.scaling",
        {"mean_": (("l", "1"), ("l", "h")), "scale_": (("l", "1"), ("l", "h"))},
        transforms=True,
        only={"mode": ("per_neuron", "per_layer")},
    ),
    "MassMeanColumn": Kind("lmprobe_zarr.probes.augment", {"direction_": (("n",),)}, transforms=True, adds=1),
    "LogisticRegression": Kind("sklearn.linear_model", _LINEAR, ("n_iter_",), classifies=True),
    "LogisticRegressionCV": Kind("sklearn.linear_model", _LINEAR, ("n_iter_", "C_", "Cs_"), classifies=True),
    "RidgeClassifier": Kind("sklearn.linear_model", _LINEAR, ("n_iter_",), classifies=True, negative=-1),
    "DescentClassifier": Kind("lmprobe_zarr.probes.descent", _LINEAR, ("n_iter_", "t_", "converged_"), classifies=True),
    # What 'sgd' was before; saved probes hold it.
    "SGDClassifier": Kind("sklearn.linear_model", _LINEAR, ("n_iter_", "t_"), classifies=True),
    "LinearSVC": Kind("sklearn.svm", _LINEAR, ("n_iter_",), classifies=True),
    "LinearDiscriminantAnalysis": Kind(
        "sklearn.discriminant_analysis", {**_LINEAR, "means_": (("k", "n"),), "priors_": (("k",),)}, classifies=True
    ),
    "MassMeanClassifier": Kind("lmprobe_zarr.probes.mass_mean", {**_LINEAR, "means_": (("k", "n"),)}, classifies=True),
    "EnsembleClassifier": Kind(
        "lmprobe_zarr.probes.ensemble",
        {**_LINEAR, "coefs_": (("c", "r", "n"),), "intercepts_": (("c", "r"),)},
        ("n_iter_",),
        classifies=True,
    ),
    "MLPClassifier": Kind("sklearn.neural_network", {}, ("n_iter_", "loss_", "t_"), classifies=True, negative=0, network=True),
    "DummyClassifier": Kind(
        "sklearn.dummy",
        {"class_prior_": (("k",),)},
        constants={"n_outputs_": 1, "sparse_output_": False},
        classifies=True,
        only={"strategy": ("prior", "most_frequent")},
    ),
    "AttentionClassifier": Kind(_SEQUENCES, {"query_": (("a", "n"),), **_OF_HEADS}, _CURVES, classifies=True),
    "MultimaxClassifier": Kind(_SEQUENCES, _OF_HEADS, _CURVES, classifies=True),
    "SoftmaxMeanClassifier": Kind(_SEQUENCES, _OF_TOKENS, _CURVES, classifies=True),
    "RollingMeanMaxClassifier": Kind(_SEQUENCES, _OF_TOKENS, _CURVES, classifies=True),
    "Ridge": Kind("sklearn.linear_model", _REGRESSION, ("n_iter_",)),
    "ScaledTargetLasso": Kind("lmprobe_zarr.probes.regressors", _REGRESSION, ("n_iter_",)),
    "ScaledTargetLinearSVR": Kind("lmprobe_zarr.probes.regressors", _REGRESSION, ("n_iter_",)),
}
#: Parameters that only fits use and that some versions of scikit-learn lack.
_FIT_ONLY = frozenset({"l1_ratios", "use_legacy_attributes", "n_jobs", "power_iteration_normalizer", "n_oversamples"})


# -- writing ---------------------------------------------------------------------------------------------------------------


def dump_probe(pipeline: Any, header: Mapping[str, Any]) -> bytes:
    """A fitted pipeline of named estimators and preprocessing as one safetensors file.

    The same pipeline and header give the same bytes.

    Parameters
    ----------
    pipeline : fitted pipeline or estimator
        Of steps that :func:`~lmprobe_zarr.probes.make_pipeline_for` or :func:`~lmprobe_zarr.probes.make_probe` makes by name.
    header : mapping of str to JSON value
        The caller's own, which :func:`parse_probe` gives back: texts, finite numbers, truth values, None, lists and mappings.

    Raises
    ------
    InvalidArgumentError
        A step of another class, one that is not fitted, or a parameter or header that JSON cannot hold.
    InvalidTypeError
        The header is no mapping.
    """
    if not isinstance(header, Mapping):
        raise InvalidTypeError(f"the header of a saved probe is a mapping, not {type(header).__name__}")
    tensors: dict[str, Array] = {}
    steps = []
    for name, step in _flat(pipeline):
        passing = type(step).__name__ == "AllButLast"
        described, arrays = _describe_step(name, step.step_ if passing else step)
        steps.append({**described, "all_but_last": True} if passing else described)
        tensors |= {f"{name}.{attribute}": array for attribute, array in arrays.items()}
    if not _in_order([_KINDS[step["class"]] for step in steps]):
        raise InvalidArgumentError("only transformers with one estimator at the end can be saved: the pipeline has no estimator there")
    if len({step["name"] for step in steps}) < len(steps):
        raise InvalidArgumentError("two steps of the pipeline have the same name: only pipelines made by name can be saved")
    document = {
        "format": FORMAT,
        "version": VERSION if any("all_but_last" in step or step["class"] == "MassMeanColumn" for step in steps) else 1,
        "header": _plain(header, "the header"),
        "written_by": [f"{package} {version(package)}" for package in ("lmprobe-zarr", "scikit-learn")],
        "steps": steps,
    }
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    # Doubled, because the text is escaped once more.
    if 2 * len(text) + 1000 * len(tensors) > LARGEST_HEADER:
        raise InvalidArgumentError(f"header and classes take {len(text)} bytes as JSON: a saved probe holds {LARGEST_HEADER // 2} at most")
    return pack_tensors(tensors, {"probe": text, "sha256": _digest(text, tensors)})


def _flat(pipeline: Any) -> list[tuple[str, Any]]:
    """The steps by name, those of inner pipelines in their place."""
    if getattr(pipeline, "steps", None) is None:
        return [("probe", pipeline)]
    found: list[tuple[str, Any]] = []
    for name, step in pipeline.steps:
        if step is None or step == "passthrough":
            continue
        found += _flat(step) if hasattr(step, "steps") else [(name, step)]
    return found


def _digest(text: str, tensors: Mapping[str, Array]) -> str:
    """SHA-256 of everything that is read back, so that any change is detected."""
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        array = tensors[name]
        little = array.dtype.newbyteorder("<")
        found.update(json.dumps([name, little.str, list(array.shape)]).encode())
        found.update(array.astype(little, copy=False).tobytes())
    return found.hexdigest()


def _describe_step(name: str, step: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    kind = _KINDS.get(type(step).__name__)
    called = type(step).__name__
    if kind is None or type(step).__module__.split(".")[0] != kind.module.split(".")[0] or type(step) is not _class(called, kind):
        raise InvalidArgumentError(
            f"{called} cannot be saved: only named probes and preprocessing can, as their numbers; there is no pickle, which would "
            f"run code when it is read. Steps that can: {', '.join(_KINDS)}"
        )
    if not _is_name(name):
        raise InvalidArgumentError(f"a pipeline with a step called {name!r} cannot be saved: only pipelines made by name can")
    params = _params(step, kind)
    missing = [attribute for attribute in _needed(kind) if getattr(step, attribute, None) is None]
    if missing:
        raise InvalidArgumentError(f"{called} cannot be saved: it is not fitted, or otherwise than by name ({', '.join(missing)} missing)")
    values: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    if kind.network:
        for attribute in ("coefs_", "intercepts_"):
            arrays |= {f"{attribute}.{number}": array for number, array in enumerate(getattr(step, attribute))}
    for attribute in kind.arrays:
        value = getattr(step, attribute)
        # A Python float must stay one: unlike an array, it does not turn float32 into float64.
        if type(value) is float:
            values[attribute] = _plain(value, f"{attribute} of {called}")
        else:
            arrays[attribute] = np.asarray(value)
    for attribute in kind.diagnostics:
        value = getattr(step, attribute, None)
        if isinstance(value, np.ndarray) and value.ndim:
            arrays[attribute] = value
        elif value is not None:
            values[attribute] = _plain(value, f"{attribute} of {called}")
    if kind.classifies:
        classes = step.classes_
        if (
            isinstance(classes, np.ndarray)
            and classes.ndim == 1
            and classes.dtype.kind in "UO"
            and all(isinstance(label, str) for label in classes)
        ):
            values["classes_"] = [classes.dtype.kind, classes.tolist()]
        elif isinstance(classes, np.ndarray) and classes.ndim == 1 and classes.dtype.kind in "biuf":
            arrays["classes_"] = classes
        else:
            raise InvalidArgumentError(f"{called} cannot be saved: its classes are neither texts, numbers nor truth values, one per prompt")
    described = {
        "name": str(name),
        "class": called,
        "n_features_in": int(step.n_features_in_),
        "params": params,
        "values": values,
    }
    # The memory order is kept: products with a Fortran-ordered matrix take another path and round differently.
    turned = sorted(attribute for attribute, array in arrays.items() if array.ndim == 2 and _is_fortran_ordered(array))
    if turned:
        values["turned"] = turned
    check_step(name, called, kind, described, arrays, InvalidArgumentError, f"{called} cannot be saved")
    return described, arrays


def _is_fortran_ordered(array: Array) -> bool:
    return min(array.shape, default=0) > 1 and abs(array.strides[0]) < abs(array.strides[1])


def _needed(kind: Kind) -> list[str]:
    classes = ["classes_"] if kind.classifies else []
    return [*kind.arrays, *classes, *(("coefs_", "intercepts_") if kind.network else ()), "n_features_in_"]


def _params(step: Any, kind: Kind) -> dict[str, Any]:
    """The parameters that are not the constructor's own defaults, which differ between versions of scikit-learn."""
    defaults = {name: parameter.default for name, parameter in signature(type(step).__init__).parameters.items()}
    found = {}
    for name, value in step.get_params(deep=False).items():
        if name in kind.only and value not in kind.only[name]:
            raise InvalidArgumentError(f"{type(step).__name__} cannot be saved with {name}={value!r}: it can with {kind.only[name]}")
        if not _same(value, defaults[name]):
            found[name] = _encoded(value, f"{name}={value!r} of {type(step).__name__}")
    return found


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(np.all(value == default)) and np.shape(value) == np.shape(default)


def _encoded(value: Any, what: str) -> Any:
    """A parameter as a JSON value; a mapping becomes pairs, because its keys may be numbers."""
    pairs = isinstance(value, Mapping)
    encoded = {"pairs": [[_plain(key, what), _plain(each, what)] for key, each in value.items()]} if pairs else _plain(value, what)
    if not _is_parameter(encoded):
        raise InvalidArgumentError(f"{what} cannot be saved: a parameter is one plain value, a flat list or a mapping of plain values")
    return encoded


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: each for key, each in value["pairs"]}  # noqa: C416  (pairs of exactly two)
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any, what: str) -> Any:
    """The value in the types that JSON keeps."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | str) or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(each, what) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(each, what) for each in value]
    raise InvalidArgumentError(
        f"{what} cannot be saved: it holds {type(value).__name__}, expected texts, finite numbers, truth values, None, lists and mappings"
    )


# -- reading ---------------------------------------------------------------------------------------------------------------


def parse_probe(data: bytes, where: str) -> tuple[Any, dict[str, Any]]:
    """The fitted pipeline and the caller's header that :func:`dump_probe` was given.

    Its predictions, probabilities and decisions are those of the original bit for bit, on the same versions of scikit-learn and
    numpy. Inner pipelines come back flattened into one. Never runs code that a file names; memory is bounded by the size of `data`.

    Parameters
    ----------
    data : bytes
    where : str
        What the file is called in messages.

    Raises
    ------
    InvalidTypeError
        `data` is not bytes.
    NotAProbeError
        No saved probe, or a damaged one.
    UnsupportedVersionError
        One that a newer release has written, or that the installed scikit-learn cannot hold.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InvalidTypeError(f"a saved probe is bytes, not {type(data).__name__}: read the file first")
    tensors, metadata = unpack_tensors(bytes(data), where)
    text = metadata.get("probe")
    document = parse_json(text, where) if text is not None else None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise NotAProbeError(f"{where} is a safetensors file, but no saved probe: give a file that save wrote")
    written = document.get("version")
    if type(written) is not int or written < 1:
        raise NotAProbeError(f"{where} is damaged: its version is {written!r}"[:300])
    if written > VERSION:
        raise UnsupportedVersionError(
            f"{where} has version {written} of the format of saved probes, this release reads up to {VERSION}: install a newer lmprobe-zarr"
        )
    if metadata.get("sha256") != _digest(str(text), tensors):
        raise NotAProbeError(f"{where} is damaged: its digest is not that of its values; copy it again from where it was saved")
    header, steps = document.get("header"), document.get("steps")
    if not isinstance(header, dict) or not isinstance(steps, list) or not steps:
        raise NotAProbeError(f"{where} is damaged: it has no header or no steps")
    owned: dict[str, dict[str, Array]] = {}
    for name, array in tensors.items():
        owner, _, attribute = name.partition(".")
        owned.setdefault(owner, {})[attribute] = array
    from sklearn.pipeline import Pipeline

    made = [_assemble_step(step, owned, where) for step in steps]
    names = [name for name, _, _ in made]
    kinds = [_KINDS[step["class"]] for step in steps]
    if len(set(names)) < len(names) or set(owned) != set(names):
        raise NotAProbeError(f"{where} is damaged: its tensors are not those of its steps")
    if not _in_order(kinds):
        raise NotAProbeError(f"{where} is damaged: its steps are not transformers with one estimator at the end")
    if any(type(step).__name__ == "AllButLast" for _, step, _ in made) and "MassMeanColumn" not in {step["class"] for step in steps}:
        raise NotAProbeError(f"{where} is damaged: a step passes on a column that no step before it has made")
    for (_, before, width), (_, after, _) in pairwise(made):
        if width != after.n_features_in_:
            raise NotAProbeError(f"{where} is damaged: {type(before).__name__} gives {width} columns, {type(after).__name__} takes others")
    return Pipeline([(name, step) for name, step, _ in made]), header


def _class(called: str, kind: Kind) -> Any:
    return getattr(importlib.import_module(kind.module), called)


def _assemble_step(described: Any, owned: Mapping[str, dict[str, Array]], where: str) -> tuple[str, Any, int]:
    """The name of a step, the step, and the number of columns that it gives."""
    damaged = f"{where} is damaged"
    if not isinstance(described, dict):
        raise NotAProbeError(f"{damaged}: a step is described by {type(described).__name__}")
    name, called, n = described.get("name"), described.get("class"), described.get("n_features_in")
    params, values = described.get("params"), described.get("values")
    if not isinstance(called, str) or called not in _KINDS:
        raise NotAProbeError(f"{damaged}: a step is of class {called!r}"[:200] + f", expected one of {', '.join(_KINDS)}")
    if not _is_name(name):
        raise NotAProbeError(f"{damaged}: a step is called {name!r}"[:300])
    if not _is_count(n) or not isinstance(params, dict) or not isinstance(values, dict):
        raise NotAProbeError(f"{damaged}: step {name[:80]!r} lacks its width, parameters or values")
    kind = _KINDS[called]
    arrays = dict(owned.get(name, {}))
    width = check_step(name, called, kind, described, arrays, NotAProbeError, damaged)

    step = _make_step(called, kind, params, where)
    for attribute in values.get("turned", ()):
        arrays[attribute] = np.asfortranarray(arrays[attribute])
    if kind.network:
        _set_network(step, arrays)
    for attribute, array in arrays.items():
        if attribute != "classes_" and "." not in attribute:
            setattr(step, attribute, array if array.ndim else array[()])
    for attribute in (*kind.diagnostics, *kind.arrays):
        if attribute in values:
            setattr(step, attribute, values[attribute])
    for attribute, value in kind.constants.items():
        setattr(step, attribute, value)
    if kind.classifies:
        _set_classes(step, kind, _class_labels(values, arrays), damaged)
    if called == "DummyClassifier":
        step._strategy, step.n_classes_ = step.strategy, len(step.classes_)
    if called == "LayerScaler" and (type(step.n_layers) is not int or step.n_layers != len(step.mean_)):
        raise NotAProbeError(f"{damaged}: LayerScaler has {len(step.mean_)} layers")
    if hasattr(step, "n_heads") and step.n_heads != len(step.coef_):
        raise NotAProbeError(f"{damaged}: {called} has {len(step.coef_)} heads")
    if called in ("LogisticRegression", "LogisticRegressionCV", "RidgeClassifier", "Ridge") and not hasattr(step, "n_iter_"):
        step.n_iter_ = None
    step.n_features_in_ = n
    if "all_but_last" not in described:
        return name, step, width
    if described["all_but_last"] is not True or not kind.transforms:
        raise NotAProbeError(f"{damaged}: step {name[:80]!r} ({called}) does not say which columns it takes")
    from lmprobe_zarr.probes.augment import AllButLast

    passing = AllButLast(step)
    passing.step_, passing.n_features_in_ = step, step.n_features_in_ + 1
    return name, passing, width + 1


def _is_name(name: Any) -> TypeGuard[str]:
    """Whether a pipeline takes this as a step's name and tensor names can begin with it."""
    reserved = ("memory", "steps", "transform_input", "verbose")
    return isinstance(name, str) and bool(name) and "__" not in name and "." not in name and name not in reserved


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _make_step(called: str, kind: Kind, params: Mapping[str, Any], where: str) -> Any:
    made = _class(called, kind)
    known = signature(made.__init__).parameters
    unknown = [name for name in params if name not in known and name not in _FIT_ONLY]
    if unknown:
        raise UnsupportedVersionError(
            f"{where} was written by another version of scikit-learn: the installed {version('scikit-learn')} knows no "
            f"{unknown[0][:80]!r} of {called}"
        )
    given: dict[str, Any] = {}
    for name, value in params.items():
        if not _is_parameter(value) or (name in kind.only and value not in kind.only[name]):
            raise NotAProbeError(f"{where} is damaged: {called} has {name[:80]}={value!r}"[:300])
        if name in known:
            given[name] = _decoded(value)
    step = made(**given)
    try:
        if hasattr(step, "_parameter_constraints"):
            step._validate_params()
    except (ValueError, TypeError) as error:
        raise NotAProbeError(f"{where} is damaged: {called} cannot have its parameters ({' '.join(str(error).split())[:200]})") from error
    return step


def _is_parameter(value: Any) -> bool:
    """Whether `_encoded` can have made it: a plain value, a flat list, or pairs of plain values."""
    if isinstance(value, dict):
        pairs = value.get("pairs")
        return len(value) == 1 and isinstance(pairs, list) and all(isinstance(p, list) and len(p) == 2 and _are_scalars(p) for p in pairs)
    return _are_scalars(value if isinstance(value, list) else [value])


def _are_scalars(values: list[Any]) -> bool:
    return all(value is None or isinstance(value, bool | int | float | str) for value in values)


def _class_labels(values: Mapping[str, Any], arrays: Mapping[str, Array]) -> Array:
    if "classes_" in arrays:
        return arrays["classes_"]
    kind, labels = values["classes_"]
    return np.array(labels, dtype=object if kind == "O" else None)


def _set_classes(step: Any, kind: Kind, labels: Array, damaged: str) -> None:
    if kind.negative is not None:
        from sklearn.preprocessing import LabelBinarizer

        try:
            # Each label several times: if all were different, scikit-learn would warn that they look like a regression's.
            step._label_binarizer = LabelBinarizer(pos_label=1, neg_label=kind.negative).fit(np.repeat(labels, 4))
        except ValueError as error:
            raise NotAProbeError(f"{damaged}: {type(step).__name__} cannot have its classes") from error
    # Before scikit-learn 1.9 RidgeClassifier takes classes_ from its label binarizer.
    if not isinstance(getattr(type(step), "classes_", None), property):
        step.classes_ = labels


def _set_network(step: Any, arrays: Mapping[str, Array]) -> None:
    depth = sum(name.startswith("coefs_.") for name in arrays)
    step.coefs_ = [arrays[f"coefs_.{number}"] for number in range(depth)]
    step.intercepts_ = [arrays[f"intercepts_.{number}"] for number in range(depth)]
    step.n_layers_ = depth + 1
    step.n_outputs_ = len(step.intercepts_[-1])
    step.out_activation_ = "logistic" if step.n_outputs_ == 1 else "softmax"


# -- both ------------------------------------------------------------------------------------------------------------------


def _in_order(kinds: Sequence[Kind]) -> bool:
    return bool(kinds) and all(kind.transforms for kind in kinds[:-1]) and not kinds[-1].transforms
