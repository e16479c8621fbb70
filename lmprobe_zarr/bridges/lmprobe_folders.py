"""The folders of an lmprobe cache, in both of its formats: names of models, the manifest, and the reasons for skipping something.

Knows the names of files; their contents are read in ``lmprobe_v1`` and ``lmprobe_v2``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lmprobe_zarr.batch import HASH_DIGITS, prompt_hash
from lmprobe_zarr.bridges.entry import Skipped
from lmprobe_zarr.bridges.files import Files
from lmprobe_zarr.errors import CorruptFileError

__all__ = [
    "DAMAGED",
    "DTYPE",
    "ENTRY_FILE",
    "FIRST_TOKEN",
    "FLOATS",
    "INTEGERS",
    "MODEL_FOLDER",
    "NOTHING",
    "NO_MASK",
    "NO_TOKENS",
    "OTHER_TOKENS",
    "OUTSIDE",
    "SHAPES",
    "SUFFIXES",
    "UNKNOWN",
    "Manifest",
    "ModelFolder",
    "model_hash",
    "model_name_of",
    "read_manifest",
    "scan_models",
]

SUFFIXES: Final = ("", ".perplexity", ".logits")
MODEL_FOLDER: Final = re.compile(r"[0-9a-f]{16}")
ENTRY_FILE: Final = re.compile(r"([0-9a-f]{16})(|\.perplexity|\.logits)\.safetensors")
NAME_BYTES: Final = 2**16
MANIFEST_BYTES: Final = 2**30
FLOATS: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
INTEGERS: Final = frozenset({"int32", "int64"})

DAMAGED: Final = "damaged files"
OUTSIDE: Final = "links that lead out of the cache"
SHAPES: Final = "tensors of the wrong shape"
NO_TOKENS: Final = "an attention mask without a single token"
NOTHING: Final = "entries that hold nothing that can be stored"
FIRST_TOKEN: Final = "first_token pooled by lmprobe, which may be padding, without the raw layers to compute it again"  # noqa: S105
NO_MASK: Final = "rows of tokens without an attention mask, which would show what is padding"
UNKNOWN: Final = "tensors of an unknown name"
DTYPE: Final = "tensors of a dtype that cannot be stored"
OTHER_TOKENS: Final = "values per token whose number is not that of the tokens"


def model_hash(model: str) -> str:
    """The folder of a model: the first 16 digits of the sha256 of its name, so no name can lead out of the cache."""
    return hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder of lmprobe's cache, and the name of its model."""

    folder: str
    model: str


def scan_models(files: Files) -> list[ModelFolder | Skipped]:
    """The models of a cache, v1 or v2, by the names that lmprobe recorded.

    Folders that are not lmprobe's are ignored. A folder whose model is unknown is reported as skipped.
    """
    found: list[ModelFolder | Skipped] = []
    for listed in files.list(""):
        if not MODEL_FOLDER.fullmatch(listed.name):
            continue
        if listed.outside:
            found.append(Skipped(name=listed.name, reason=OUTSIDE))
        elif listed.is_folder:
            name = model_name_of(files, listed.name)
            found.append(ModelFolder(listed.name, name) if isinstance(name, str) else name)
    return found


def model_name_of(files: Files, folder: str) -> str | Skipped:
    """The model name that lmprobe recorded in a folder, if the folder is that model's."""
    try:
        recorded = files.read(f"{folder}/_model_name.txt", at_most=NAME_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError):
        return Skipped(name=folder, reason="folders without _model_name.txt: name the model with model=")
    except (CorruptFileError, UnicodeDecodeError, PermissionError) as error:
        return Skipped(name=folder, reason="folders whose _model_name.txt cannot be read", detail=str(error))
    for name in (recorded, recorded.strip()):
        if model_hash(name) == folder and name.strip() and name.isprintable():
            return name
    return Skipped(name=folder, reason="folders whose _model_name.txt is that of another model", detail=repr(recorded[:80]))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The texts in ``_manifest.jsonl`` by hash. `bad_lines` counts lines that cannot be read, or whose text has another hash."""

    texts: Mapping[str, str]
    bad_lines: int = 0


def read_manifest(files: Files, folder: str) -> Manifest:
    """The texts of a model's prompts. The last line for a hash counts; a damaged line is skipped."""
    try:
        data = files.read(f"{folder}/_manifest.jsonl", at_most=MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return Manifest({})
    except (CorruptFileError, PermissionError):
        return Manifest({}, 1)
    texts: dict[str, str] = {}
    bad = 0
    # Not splitlines(), which also splits at U+2028 and other characters that prompts may contain.
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = entry["prompt"]
            if not isinstance(text, str) or prompt_hash(text) != entry["hash"]:
                raise ValueError("another prompt")
            texts[entry["hash"]] = text
        except (ValueError, TypeError, KeyError, RecursionError):
            bad += 1
    return Manifest(texts, bad)
