"""TODO: lmprobe_zarr/extraction/request.py."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmprobe_zarr.batch import LAYERED_SITES, LayerSpec, Outputs, is_top_k, parse_poolings, parse_sites
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.store import Store
from lmprobe_zarr.store.format import Level, Provenance

if TYPE_CHECKING:
    pass

__all__ = ["Request", "Wanted", "check_request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for, checked, with the model and the prompts as the caller gave them."""

    model: Any
    given: list[Any]
    kind: extraction.PromptKind
    store: Store
    layers: LayerSpec
    sites: tuple[str, ...]
    poolings: tuple[str, ...]
    keep_tokens: bool
    outputs: Outputs
    keep_passed: bool
    name: str | None
    tokenizer: Any
    revision: str | None
    dtype: Any
    max_length: int | None
    truncation: bool
    refresh: bool
    provenance: Provenance
    modules: Mapping[str, str] | None
    trust_remote_code: bool
    group: str | None = None

    @property
    def by_name(self) -> bool:
        """Whether the model is named, so that it need not be loaded to be known."""
        return isinstance(self.model, (str, os.PathLike))

    @property
    def own_provenance(self) -> dict[str, Any]:
        """The fields of the caller's own, such as ``steering``: they become part of the group."""
        return {name: value for name, value in self.provenance.items() if name not in extraction.PROVENANCE_FIELDS}

    @property
    def layered(self) -> bool:
        """Whether anything is asked for that each layer has its own of."""
        return self.outputs.router or bool(set(self.sites) & set(LAYERED_SITES))

    def kept_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """The layers that are stored of what is run: where they cost nothing more, those that are passed on the way too."""
        passed = layers and self.keep_passed and not self.keep_tokens and not self.outputs.router
        return tuple(range(max(layers) + 1)) if passed else layers

    def wanted(self, layers: tuple[int, ...], routers: tuple[int, ...] | None = None) -> list[Wanted]:
        """Every variable asked for.

        Parameters
        ----------
        layers : tuple of int
            Layers asked for.
        routers : tuple of int, optional
            Layers that have a router, where that is known; otherwise all are taken to have one.
        """
        found = []
        for site in self.sites:
            held = layers if site in LAYERED_SITES else ()
            found += [Wanted(level="prompts", name=f"{site}_{pooling}", layers=held, pooled_from=site) for pooling in self.poolings]
            found += [Wanted(level="tokens", name=site, layers=held)] if self.keep_tokens else []
        for place, name, layered in self.outputs.variables():
            level: Level = "tokens" if place == "tokens" else "prompts"
            held = tuple(layer for layer in layers if routers is None or layer in routers) if layered else ()
            top_k = self.outputs.top_k if is_top_k(name) else None
            found.append(Wanted(level=level, name=name, layers=held, at_least=top_k))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One variable that is asked for.

    Parameters
    ----------
    level, name : str
    layers : tuple of int
        Empty for variables without layers.
    pooled_from : str, optional
        The site whose stored tokens it can be computed from, as well.
    at_least : int, optional
        How many values a row must hold, for the largest few of many.
    """

    level: Level
    name: str
    layers: tuple[int, ...]
    pooled_from: str | None = None
    at_least: int | None = None


def check_request(
    *,
    model: Any,
    prompts: Iterable[Any],
    sites: str | Sequence[str],
    pooling: str | Sequence[str],
    provenance: Provenance | None,
    outputs: Outputs,
    keep_passed: bool = False,
    **rest: Any,
) -> Request:
    if isinstance(prompts, str):
        raise InvalidTypeError("prompts is one text: give a list of prompts")
    given = list(prompts)
    if not given:
        raise InvalidArgumentError("prompts is empty: give at least one prompt")
    names = parse_sites(sites, outputs)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling or ()))
    if not poolings and not rest["keep_tokens"]:
        if not outputs:
            raise InvalidArgumentError("nothing would be stored: give a pooling, or keep_tokens=True")
        names = ()
    kind = extraction.prompts_kind(given)
    return Request(
        model=model, given=given, kind=kind, sites=names, poolings=poolings, provenance=dict(provenance or {}), outputs=outputs,
        keep_passed=keep_passed, **rest,
    )  # fmt: skip
