"""What a pass kept of some prompts, as arrays, to batches of tokens for a writer. Knows neither torch nor how the model was run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmprobe_zarr.batch import Outputs, TokenBatch, positions_of, split_variable
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts
from lmprobe_zarr.typing import Array

__all__ = ["Kept", "KeptSite", "token_batches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSite:
    """What is known of a site whose values are kept.

    Parameters
    ----------
    layers : tuple of int
        Those that are kept; none for a site outside of the blocks.
    layered : bool
        Whether it is inside of the blocks.
    of_model : tuple of int
        All layers of the model that have it.
    path : str
        As the caller named it; empty for a site that is known by its own name.
    heads : int, optional
        How many heads these values are of, end to end.
    """

    layers: tuple[int, ...]
    layered: bool = True
    of_model: tuple[int, ...] = ()
    path: str = ""
    heads: int | None = None

    def attributes(self, num_layers: int) -> dict[str, Any]:
        """What is noted of it in its arrays: the path that the caller named, the heads, and the layers of the model that have it."""
        noted: dict[str, Any] = {}
        if self.path:
            noted["site_path"] = self.path
        if self.heads:
            noted["num_heads"] = self.heads
        if self.of_model and len(self.of_model) < num_layers:
            noted["site_layers"] = list(self.of_model)
        return noted


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept of every pass of an extraction.

    Parameters
    ----------
    sites : mapping of str to KeptSite
        The router's scores among them.
    outputs : Outputs
    parts : mapping of str to str
        The parts of the tokens that are pooled, by name, with what is noted of each.
    token_level : bool
        Whether anything is kept per token.
    num_layers : int
        Of the model.
    """

    sites: Mapping[str, KeptSite]
    outputs: Outputs
    parts: Mapping[str, str]
    token_level: bool
    num_layers: int


def token_batches(
    part: TokenizedPrompts, levels: Mapping[str, Mapping[str, Array]], stored_dtype: Mapping[str, str], kept: Kept
) -> Iterator[TokenBatch]:
    """One batch for every set of layers that variables are in; those without layers come with the first.

    Parameters
    ----------
    part : TokenizedPrompts
        The prompts of the arrays.
    levels : mapping of str to mapping of str to ndarray
        ``tokens`` and ``prompts``: the arrays by the names of their variables.
    stored_dtype : mapping of str to str
        The dtypes that numpy lacks, by variable.
    kept : Kept
    """
    columns: dict[str, Array] = {}
    if kept.token_level:
        columns = {"position": positions_of(part.lengths), "token_id": part.token_ids, **part.columns}
        if part.char_start is not None and part.char_end is not None:
            columns |= {"char_start": part.char_start, "char_end": part.char_end}
    flat = {name for _, name, layered in kept.outputs.variables() if not layered}
    flat |= {name for arrays in levels.values() for name in arrays if _is_outside(kept, split_variable(name)[0])}
    # The router's own last: its layers are those that have one.
    names = sorted((name for arrays in levels.values() for name in arrays if name not in flat), key="router".__eq__)
    layers_of = {name: kept.sites[split_variable(name)[0]].layers for name in names}
    kinds = list(dict.fromkeys(layers_of.values())) or [()]
    for number, layers in enumerate(kinds):
        held = {
            level: {name: array for name, array in arrays.items() if layers_of.get(name) == layers or (number == 0 and name in flat)}
            for level, arrays in levels.items()
        }
        here = {*held["tokens"], *held["prompts"]}
        by_token = bool(held["tokens"]) or (kept.token_level and number == 0)
        yield TokenBatch(
            sha256=part.sha256,
            text=part.text,
            prompt_length=part.lengths,
            n_tokens=part.lengths if by_token else None,
            layers=layers,
            tokens=held["tokens"],
            token_columns=columns if by_token else {},
            role_names=part.role_names if by_token else (),
            prompts=held["prompts"],
            unlayered=frozenset(here & flat),
            stored_dtype={name: dtype for name, dtype in stored_dtype.items() if name in here},
            site_attributes=_site_attributes(kept, here) | _part_attributes(kept, here),
        )


def _is_outside(kept: Kept, site: str) -> bool:
    """Whether a variable is of a site that has no layers."""
    return site in kept.sites and not kept.sites[site].layered


def _part_attributes(kept: Kept, names: set[str]) -> dict[str, dict[str, Any]]:
    """What is noted of the variables that are pooled over a part of the tokens."""
    described = {name: kept.parts.get(split_variable(name)[2], "") for name in sorted(names)}
    return {name: {"over": text} for name, text in described.items() if text}


def _site_attributes(kept: Kept, names: set[str]) -> dict[str, dict[str, Any]]:
    """What is noted of the sites in their arrays."""
    sites = sorted({split_variable(name)[0] for name in names} & set(kept.sites))
    return {site: noted for site in sites if (noted := kept.sites[site].attributes(kept.num_layers))}
