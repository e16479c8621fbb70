"""Every name of the format: levels, dimensions, columns; and what all documents share (version, JSON, consolidated metadata). No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias

from lmprobe_zarr.batch import ALL, INNER_DIMS, SCALARS, SITES, split_variable
from lmprobe_zarr.errors import InvalidArgumentError, UnsupportedVersionError

__all__ = [
    "ANNOTATIONS",
    "COLUMN",
    "COLUMN_NAME",
    "COMMITS",
    "FORMAT",
    "FORMAT_COLUMNS",
    "FORMAT_VERSION",
    "GROUP_NAME",
    "LEVELS",
    "MADE_BY_WRITER",
    "PART_VERSION",
    "PROMPT_COLUMNS",
    "SAE",
    "SAMPLE_DIM",
    "STAMPS",
    "TOKEN_COLUMNS",
    "TOMBSTONE_VERSION",
    "Json",
    "Level",
    "check_version",
    "consolidated",
    "dump",
    "reason_of",
    "validate_column_names",
]

STAMPS: Final = ".used"
COMMITS: Final = ".committed"

FORMAT: Final = "lmprobe-zarr"
FORMAT_VERSION: Final = 1  # of roots and groups, and of the first parts
PART_VERSION: Final = 2
TOMBSTONE_VERSION: Final = 2  # a tombstone had this number before other parts did

ANNOTATIONS: Final = "annotations"
GROUP_NAME: Final = re.compile(r"(?:[a-z0-9.-]+-)?[0-9a-f]{12}")

Level = Literal["prompts", "tokens"]
LEVELS: Final[tuple[Level, ...]] = ("prompts", "tokens")
SAMPLE_DIM: Final[Mapping[Level, str]] = {"prompts": "prompt", "tokens": "token"}


# Columns that the format itself uses; a user's column may not bear these names, nor that of a dimension or variable.
PROMPT_COLUMNS: Final = ("prompt", "prompt_sha256", "text", "n_tokens", "prompt_length")
TOKEN_COLUMNS: Final = ("prompt_row", "position", "token_id", "char_start", "char_end")
DIMENSIONS: Final = ("prompt", "token", "layer", "hidden")
FORMAT_COLUMNS: Final = frozenset({*PROMPT_COLUMNS, *TOKEN_COLUMNS, "layer"})
# Columns that the writer makes itself, from the part's index: no batch holds them, and lost ones can be written again.
MADE_BY_WRITER: Final = frozenset(
    {"prompts/prompt", "prompts/prompt_sha256", "prompts/n_tokens", "prompts/layer", "tokens/layer", "tokens/prompt_row"}
)
COLUMN_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# The attribute of a column's array that says what its dtype does not.
COLUMN: Final = "column"
# That of the arrays of latents: which autoencoder they are of, as JSON.
SAE: Final = "sae"
Json: TypeAlias = dict[str, Any]


def validate_column_names(names: Iterable[str], *, new: bool = False) -> None:
    """Raise `InvalidArgumentError` for a user's column that could not be stored under its name.

    With `new`, also for names that differ by case alone from each other or from a name of the format: their folders would be one folder on
    file systems that ignore case.
    """
    lower: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not COLUMN_NAME.fullmatch(name):
            raise InvalidArgumentError(f"{name!r:.80} is no column name: use the letters a to z, digits and _, a letter first, at most 64")
        taken = (*PROMPT_COLUMNS, *TOKEN_COLUMNS, *DIMENSIONS, *INNER_DIMS, *INNER_DIMS.values(), *SCALARS, "model")
        if name in taken or _is_variable(name, new=new):
            raise InvalidArgumentError(f"{name!r} is a name of the format itself: choose another name for that column")
        if not new:
            continue
        other = lower.setdefault(name.lower(), name)
        if other == name and (name.lower() in taken or _is_variable(name.lower(), new=True)):
            other = name.lower()
        if other != name:
            raise InvalidArgumentError(
                f"the column name {name!r} differs from {other!r} by case alone, and some file systems ignore case: choose another name"
            )


def _is_variable(name: str, *, new: bool) -> bool:
    """Whether a name is that of a variable of a site of format 1. What is pooled over a part of the tokens counts in `new` names only."""
    site, _, part = split_variable(name)
    return site in SITES and (new or part == ALL)


def check_version(version: object, where: str, known: tuple[int, ...] = (FORMAT_VERSION,)) -> None:
    """Raise `UnsupportedVersionError` for another version of the format, TypeError for something that is no version."""
    if type(version) is not int:
        raise TypeError(f"format version {version!r:.40} is no number")
    if version not in known:
        read = f"version {known[0]}" if len(known) == 1 else f"versions {' and '.join(map(str, known))}"
        raise UnsupportedVersionError(f"{where} has format version {version!r}, this release reads {read}: upgrade lmprobe-zarr to open it")


def consolidated(metadata: Json) -> Json:
    """Documents of arrays and groups, by key, as the inline consolidated metadata of a group."""
    return {"kind": "inline", "must_understand": False, "metadata": metadata}


def dump(document: object, *, sort: bool = True) -> bytes:
    """A document as compact JSON."""
    return json.dumps(document, allow_nan=False, separators=(",", ":"), sort_keys=sort).encode()


def reason_of(error: Exception) -> str:
    """Type and text of an error, shortened for a message."""
    return f"{type(error).__name__}: {error}"[:160]
