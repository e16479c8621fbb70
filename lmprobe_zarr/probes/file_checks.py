"""What a step of a saved probe must hold: its arrays and their shapes, its classes and its other values. Never bytes or estimators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmprobe_zarr.typing import Array

__all__ = ["Kind", "Shapes", "check_step"]

Shapes = Mapping[str, tuple[tuple[str, ...], ...]]


@dataclass(frozen=True, slots=True)
class Kind:
    """How the estimators of one class are saved and made again.

    Shapes are given by letters that must mean the same number wherever they occur in a step: n columns go in and m come out,
    k classes, r scores (1 for two classes), l layers, h hidden units, c members, a heads; digits stand for themselves. Several shapes
    are alternatives.
    """

    module: str
    #: Fitted arrays that predictions need.
    arrays: Shapes
    #: Fitted arrays and numbers that predictions do not need, such as the number of iterations.
    diagnostics: tuple[str, ...] = ()
    #: Attributes with the same value in every estimator that can be saved.
    constants: Mapping[str, Any] = field(default_factory=dict)
    classifies: bool = False
    transforms: bool = False
    #: How many columns come out beyond those that go in.
    adds: int = 0
    #: The label binarizer's value for the other classes; None without a binarizer.
    negative: int | None = None
    #: Attributes that are lists of arrays, one per layer of a network.
    network: bool = False
    #: The parameters' values that can be saved; with others, predictions would need more than is saved.
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def check_step(
    name: str, called: str, kind: Kind, described: Mapping[str, Any], arrays: Mapping[str, Array], error: type[Exception], prefix: str
) -> int:
    """The number of columns that a step gives, once its arrays are checked: all present, finite, and of matching shapes."""
    values = described["values"]
    what = f"{prefix}: step {name[:80]!r} ({called})"
    sizes: dict[str, int] = {"n": described["n_features_in"], "1": 1}
    classes = arrays.get("classes_", values.get("classes_"))
    if kind.classifies:
        if isinstance(classes, list):
            texts = classes[1] if len(classes) == 2 and classes[0] in ("U", "O") else None
            classes = texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None
        elif isinstance(classes, np.ndarray) and classes.ndim != 1:
            classes = None
        least = 1 if called == "DummyClassifier" else 2
        if classes is None or len(classes) < least or len(set(np.asarray(classes).tolist())) < len(classes):
            raise error(f"{what} has no classes, or one twice")
        sizes |= {"k": len(classes), "r": 1 if len(classes) == 2 else len(classes)}
    shapes = dict(kind.arrays)
    if kind.network:
        shapes |= _network_shapes(arrays, what, error)
    for attribute, alternatives in shapes.items():
        if () in alternatives and attribute in values and attribute not in arrays:
            continue
        if attribute not in arrays:
            raise error(f"{what} lacks its array {attribute}")
        if not any(_matches(arrays[attribute].shape, shape, sizes) for shape in alternatives):
            raise error(f"{what} has an array {attribute} of shape {arrays[attribute].shape}, which does not fit its others")
        if arrays[attribute].dtype.kind != "f" or arrays[attribute].dtype.itemsize < 4:
            raise error(f"{what} has an array {attribute} of {arrays[attribute].dtype}, expected float32 or float64")
    if "h" in sizes and sizes["l"] * sizes["h"] != sizes["n"]:
        raise error(f"{what} has {sizes['l']} layers of {sizes['h']} units, expected {sizes['n']} columns in all")
    if "l" in sizes and sizes["n"] % sizes["l"]:
        raise error(f"{what} has {sizes['l']} layers in {sizes['n']} columns")
    allowed = {*kind.diagnostics, *(["classes_"] if kind.classifies else [])}
    for attribute, array in arrays.items():
        if attribute not in shapes and attribute not in allowed:
            raise error(f"{what} has an array {attribute[:80]!r} that does not belong to it")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise error(f"{what} has an array {attribute[:80]} that is NaN or infinite")
    turned = values.get("turned", [])
    if not isinstance(turned, list) or not all(isinstance(each, str) and each in arrays and arrays[each].ndim == 2 for each in turned):
        raise error(f"{what} does not say how its matrices lie")
    numbers = {*kind.diagnostics, *(attribute for attribute, alternatives in kind.arrays.items() if () in alternatives)}
    if not set(values) <= {*numbers, *allowed, "turned"} or not all(
        isinstance(values[each], int | float) for each in numbers & set(values)
    ):
        raise error(f"{what} has values that do not belong to it")
    return sizes.get("m", sizes["n"]) + kind.adds


def _network_shapes(arrays: Mapping[str, Array], what: str, error: type[Exception]) -> dict[str, Any]:
    """The shapes of a network's weights and intercepts; each layer takes as many columns as the one before gives."""
    depth = sum(name.startswith("coefs_.") for name in arrays)
    if not 0 < depth < 100:
        raise error(f"{what} is a network of {depth} layers")
    shapes: dict[str, Any] = {}
    for number in range(depth):
        before, after = "n" if not number else f"w{number}", "r" if number == depth - 1 else f"w{number + 1}"
        shapes |= {f"coefs_.{number}": ((before, after),), f"intercepts_.{number}": ((after,),)}
    return shapes


def _matches(shape: tuple[int, ...], letters: tuple[str, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape matches its letters; the size of a letter that occurs for the first time is recorded in `sizes`."""
    if (
        len(shape) != len(letters)
        or 0 in shape
        or any(sizes.get(letter, size) != size for letter, size in zip(letters, shape, strict=True))
    ):
        return False
    # The first axis may only be missing where it has length 1.
    if letters == ("n",) and sizes.get("r", 1) != 1:
        return False
    sizes.update(zip(letters, shape, strict=True))
    return True
