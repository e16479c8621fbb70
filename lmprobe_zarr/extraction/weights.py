"""Whether the weights of a model are loaded whole or streamed, a block at a time. Decides, and loads nothing."""

from __future__ import annotations

import importlib.metadata
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lmprobe_zarr.display import format_bytes
from lmprobe_zarr.errors import InvalidArgumentError, ModelNotFoundError
from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.lookup import Lookup
from lmprobe_zarr.extraction.options import WEIGHTS, Options
from lmprobe_zarr.extraction.request import Request

__all__ = ["LOADED", "ChosenWeights", "check_weights_choice", "choose_weights"]


@dataclass(frozen=True, slots=True)
class ChosenWeights:
    """How the weights come into memory, and why.

    Parameters
    ----------
    streamed : bool
    why : str
        Empty where they are loaded.
    """

    streamed: bool = False
    why: str = ""


LOADED = ChosenWeights()


def check_weights_choice(weights: str, request: Request, device_map: object) -> None:
    """Check the argument ``weights``.

    Raises
    ------
    InvalidArgumentError
        It is no known choice, or weights cannot be streamed for such a request.
    """
    if weights not in WEIGHTS:
        raise InvalidArgumentError(f"weights={weights!r} is unknown: use one of {', '.join(map(repr, WEIGHTS))}")
    why = _why_not(request, device_map)
    if weights == "streamed" and why:
        raise InvalidArgumentError(f"weights='streamed' was given {why}: leave it out")


def _why_not(request: Request, device_map: object) -> str:
    """Why weights cannot be streamed for a request, whatever the model; empty where they can."""
    if not request.choice.by_name:
        return "for a model object, whose weights are in memory already"
    if device_map is not None:
        return "with device_map=, which spreads all weights over devices"
    if request.generate is not None:
        return "with generate=, and every token of an answer would read all weights again"
    return "for pairs of texts, which run through two stacks of blocks" if request.kind == "pair" else ""


def choose_weights(lookup: Lookup, options: Options) -> ChosenWeights:
    """How the weights come into memory for what is missing."""
    request = lookup.request
    if lookup.loaded is not None or not len(lookup.missing) or _why_not(request, options.device_map):
        return LOADED
    if options.weights == "streamed":
        return ChosenWeights(streamed=True, why="as asked")
    if options.weights == "loaded" or options.client is not None or not _can_stream():
        return LOADED
    if lookup.model.provenance.get("quantization") is not None:
        return LOADED  # which cannot be streamed, and whose size in memory the files do not tell
    needed = _nbytes(request, lookup.compute_dtype)
    device = models.device_types(options.device)[0] if str(options.device) == "auto" else str(options.device)
    free = models.free_on(device)
    if needed is None or free is None:
        return LOADED
    free += options.memory.nbytes  # which is freed, or is this very model
    if needed <= free:
        return LOADED
    return ChosenWeights(streamed=True, why=f"they take {format_bytes(needed)}, and {format_bytes(free)} are free on {device!r}")


def _can_stream() -> bool:
    with suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return int(importlib.metadata.version("transformers").partition(".")[0]) >= 5
    return False


def _nbytes(request: Request, dtype: str) -> int | None:
    """Bytes of a model's weights in memory; None where its files are not here, or say nothing of it."""
    source = os.fspath(request.choice.model)
    folder = Path(source).expanduser()
    try:
        found = models.weight_files(folder if folder.is_dir() else models.cached_snapshot(source, request.choice.revision)[1] or Path())
    except ModelNotFoundError:
        return None  # loading says what is wrong with them
    return None if found is None else found.nbytes_in(dtype)
