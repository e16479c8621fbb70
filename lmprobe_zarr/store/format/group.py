"""`GroupInfo`, one model and provenance, and the document of its folder, written and parsed. No I/O."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from lmprobe_zarr.batch import has_utf8
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, UnsupportedVersionError
from lmprobe_zarr.store.format.names import FORMAT, FORMAT_VERSION, check_version, dump, reason_of

__all__ = ["GroupInfo", "Provenance", "check_new_provenance", "parse_group", "validate_provenance"]

ProvenanceValue: TypeAlias = str | int | float | bool | None
Provenance: TypeAlias = Mapping[str, ProvenanceValue]


def validate_provenance(provenance: Mapping[str, Any]) -> dict[str, ProvenanceValue]:
    """The same fields in sorted order, checked to be JSON scalars.

    Raises
    ------
    InvalidArgumentError
        A name is not a string, or a value is neither string, number, truth value nor None.
    """
    for name, value in provenance.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, (str, bool, int, float))):
            raise InvalidArgumentError(f"provenance field {name!r}={value!r}: use a string name and a string, number, truth value or None")
        if isinstance(value, float) and not np.isfinite(value):
            raise InvalidArgumentError(f"provenance field {name!r}={value!r} is not finite")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise InvalidArgumentError(f"provenance field {name!r} is an integer beyond 64 bits: use a string")
    return {_own(name): _own(provenance[name]) for name in sorted(provenance)}


def _own(value: Any) -> Any:
    """A subclass of str, int or float, such as a member of an enumeration, as the value that it is equal to."""
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    return value


def check_new_provenance(provenance: Provenance) -> None:
    """Raise `InvalidArgumentError` for a text that no UTF-8 can hold; groups that have one already stay readable."""
    for name, value in provenance.items():
        if not all(has_utf8(text) for text in (name, value) if isinstance(text, str)):
            raise InvalidArgumentError(
                f"provenance field {name!a}={value!a} holds a lone surrogate, which no UTF-8 can hold: mend the text, "
                'text.encode("utf-8", "replace").decode()'
            )


# --------------------------------------------------------------------------------------------------------------- group


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """What all parts of one group have in common: the model and how its activations came about.

    Two groups are the same exactly when all four fields are, so a group's document never differs between two writers.

    Parameters
    ----------
    model : str
        Name of the model.
    provenance : mapping of str to str, int, float, bool or None
        Everything known that changes the values: revision, weights, compute_dtype, tokenizer, …; empty where unknown.
    num_layers : int, optional
        Blocks of the model; None where unknown.
    hidden_size : int, optional
        Width of the residual stream; None where unknown.
    """

    model: str
    provenance: Provenance = field(default_factory=dict)
    num_layers: int | None = None
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise InvalidArgumentError(f"model={self.model!r} is no name of a model: give a text that is not empty")
        if not self.model.isprintable():
            # The name is printed wherever the store is, on terminals too, and may come from a store that somebody else made.
            raise InvalidArgumentError(f"model={self.model[:80]!r} holds characters that cannot be shown: give a name without them")
        object.__setattr__(self, "model", str.__str__(self.model))
        object.__setattr__(self, "provenance", validate_provenance(self.provenance))
        for name in ("num_layers", "hidden_size"):
            object.__setattr__(self, name, _validate_count(name, getattr(self, name)))

    @property
    def name(self) -> str:
        """Folder of the group: a readable slug and a short hash of all four fields."""
        identity = [self.model, self.num_layers, self.hidden_size, dict(self.provenance)]
        digest = hashlib.sha256(dump(identity)).hexdigest()[:12]
        slug = re.sub(r"[^a-z0-9.]+", "-", self.model.lower().replace("/", "--"))
        slug = re.sub(r"\.{2,}", ".", slug).strip("-.")[:64]
        return f"{slug}-{digest}" if slug else digest

    def to_document(self) -> bytes:
        """The group's ``zarr.json``."""
        attributes = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": "group",
            "model": self.model,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "provenance": dict(self.provenance),
        }
        return dump({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def parse_group(data: bytes, where: str) -> GroupInfo:
    """The record of a group's document.

    Raises
    ------
    CorruptPartError
        The document is not one of a group.
    UnsupportedVersionError
        It is of a version that this release does not know.
    """
    try:
        attributes = json.loads(data)["attributes"]
        if attributes["format"] != FORMAT or attributes["kind"] != "group":
            raise ValueError("another document")
        check_version(attributes["format_version"], where)
        return GroupInfo(
            model=attributes["model"],
            provenance=attributes["provenance"],
            num_layers=attributes["num_layers"],
            hidden_size=attributes["hidden_size"],
        )
    except UnsupportedVersionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptPartError(f"{where}/zarr.json is no group document of {FORMAT}: {reason_of(error)}") from error


def _validate_count(name: str, value: Any) -> int | None:
    try:
        count = None if value is None else operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or (count is not None and not 0 < count < 2**31):
        raise InvalidArgumentError(f"{name}={value!r} is no count: give a whole number of at least 1, or None where it is not known")
    return count
