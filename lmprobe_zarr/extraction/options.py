"""How an extraction is carried out: how it runs, how it is stored, and who does it. Decides nothing about what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from lmprobe_zarr import config
from lmprobe_zarr.batch import Precision
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.model_choice import ModelMemory
from lmprobe_zarr.store import PART_BYTES, PART_SECONDS, Store, part_bytes_within

__all__ = ["WEIGHTS", "Keeping", "Options", "Weights", "keeping_of"]

Weights = Literal["auto", "loaded", "streamed"]
WEIGHTS: Final = get_args(Weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How a store keeps what is extracted.

    Parameters
    ----------
    precision : Precision
    part_bytes : int
        Bytes of activations in one part, at most.
    limit : int, optional
        At most this many bytes in the store; 0 if nothing may be stored.
    shards : bool
        Whether many chunks of a layer are written to one file.
    """

    precision: Precision
    part_bytes: int = PART_BYTES
    limit: int | None = None
    shards: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an extraction is carried out; see `lmprobe_zarr.extract` for what is not explained here.

    Parameters
    ----------
    keeping : Keeping
    sink : Store, optional
        Where new values are written, instead of the store that is searched.
    device, device_map, batch_tokens, batch_prompts, part_seconds, store_text, progress
        As for `lmprobe_zarr.extract`.
    cache_only : bool
        Whether missing prompts are an error.
    client : distributed.Client, optional
        Its workers run the model.
    watch : callable, optional
        Called after every batch; may raise.
    weights : {"auto", "loaded", "streamed"}
        Whether the weights of a block are in memory only when it is its turn; ``"auto"``: where all do not fit.
    memory : ModelMemory
        Where the model is kept for the next call.
    """

    keeping: Keeping
    sink: Store | None = None
    device: Any = "auto"
    device_map: Any = None
    batch_tokens: int | None = None
    batch_prompts: int | None = None
    part_seconds: float = PART_SECONDS
    store_text: bool = True
    progress: bool = True
    cache_only: bool = False
    client: Any = None
    weights: Weights = "auto"
    watch: Callable[[], None] | None = None
    memory: ModelMemory = field(default_factory=ModelMemory)

    def __post_init__(self) -> None:
        if not 0 <= self.part_seconds < math.inf:
            raise InvalidArgumentError(f"part_seconds={self.part_seconds!r} is not a time: give seconds, at least 0")


def keeping_of(
    *,
    is_default: bool,
    dtype: str | None = None,
    keep_bits: int | None = None,
    overflow: str | None = None,
    part_bytes: int = PART_BYTES,
    shards: bool = False,
) -> Keeping:
    """How a store keeps what is extracted: by these arguments; for the default store, the cache's settings replace those not given.

    If the cache has a limit, a part takes at most a fiftieth of it, so that eviction frees little more than it has to.
    """
    setting = config.cache_precision() if is_default else Precision()
    precision = Precision(
        dtype=dtype or setting.dtype,
        keep_bits=setting.keep_bits if keep_bits is None else keep_bits,
        overflow=overflow or setting.overflow,
    )
    limit = config.cache_limit() if is_default else None
    return Keeping(precision=precision, part_bytes=part_bytes_within(part_bytes, limit), limit=limit, shards=shards)
