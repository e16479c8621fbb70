"""What every module of a model would give as a site: one row for the input and one for the output of each. Runs two short passes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmprobe_zarr.batch import BUILT_IN_SITES, Sites
from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.architectures import Place
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.loading import as_it_is, load_model
from lmprobe_zarr.extraction.models.places import SHORT_PASS, given_and_returned, places_of, row_of, short_pass

__all__ = ["SiteRow", "site_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRow:
    """What one module gives, or is given.

    Parameters
    ----------
    site : str
        The built-in site that it is; empty for none.
    path : str
        As `sites` of `extract` takes it; empty for a built-in site that is no module's input or output.
    layers : tuple of int
        The layers that have it; empty outside of the blocks.
    width : int
        Values of one token.
    nbytes : int
        Bytes of one token in one layer, in the dtype that the model computes in.
    """

    site: str
    path: str
    layers: tuple[int, ...]
    width: int
    nbytes: int


def site_rows(model: str | os.PathLike[str] | nn.Module, **options: Any) -> list[SiteRow]:
    """Built-in sites first, then the modules of the blocks in the order of the module tree, then those outside of the blocks.

    Parameters
    ----------
    model : str, path or torch Module
    **options
        As for `load_model`, for a model that is named.

    Raises
    ------
    As `load_model` and `locate`.
    """
    loaded = _of_object(model, options) if isinstance(model, nn.Module) else load_model(model, **options)
    blocks = loaded.located.blocks
    inside = [dict(block.named_modules()) for block in blocks]
    in_blocks = {id(module) for paths in inside for module in paths.values()}
    outside = {path: module for path, module in loaded.located.body.named_modules() if path and id(module) not in in_blocks}
    every = {id(module): module for paths in (*inside, outside) for module in paths.values()}
    with short_pass(loaded):
        seen = [given_and_returned(loaded, every, tokens) for tokens in SHORT_PASS]
    named = _built_in(loaded)
    item = torch.empty(0, dtype=getattr(torch, loaded.dtype)).element_size()
    rows = [
        SiteRow(site=site, path="", layers=place.layers, width=place.width, nbytes=place.width * item)
        for site, place in named.items()
        if place.width
    ]
    prefix = next((f"{path}." for path, module in loaded.module.named_modules() if path and module is loaded.located.body), "")
    found: list[tuple[str, dict[int | None, nn.Module]]] = [*_rows_inside(inside)]
    found += [(f"/{prefix}{path}", {None: module}) for path, module in outside.items()]
    for path, held in found:
        # A block that is called several times stands for as many layers.
        turns = Counter(map(id, held.values()))
        for given in (True, False):
            widths: dict[int, list[int | None]] = {}
            for layer, module in held.items():
                shapes = [each[id(module)].given if given else each[id(module)].returned for each in seen]
                if (row := row_of(shapes)) is not None and seen[0][id(module)].calls == turns[id(module)]:
                    widths.setdefault(row[1], []).append(layer)
            for width, layers in widths.items():
                rows.append(
                    SiteRow(
                        site="", path=f"{path}:input" if given else path, layers=tuple(layer for layer in layers if layer is not None),
                        width=width, nbytes=width * item,
                    )
                )  # fmt: skip
    return rows


def _of_object(model: nn.Module, options: Mapping[str, Any]) -> LoadedModel:
    if strange := sorted(set(options) - {"modules", "name"}):
        raise InvalidArgumentError(f"{strange[0]}= is for a model that is loaded by its name, and this one is an object: leave it out")
    return as_it_is(model, modules=options.get("modules"), name=options.get("name"))


def _built_in(loaded: LoadedModel) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for site in BUILT_IN_SITES:
        if site == "router":
            if loaded.router_layers and loaded.num_experts:
                gates: dict[int | None, nn.Module] = {layer: router.gate for layer, router in loaded.located.routers.items()}
                found[site] = Place(modules=gates, width=loaded.num_experts)
            continue
        try:
            found[site] = places_of(loaded, Sites((site,)), range(loaded.num_layers))[site]
        except (InvalidArgumentError, UnknownArchitectureError):
            continue  # this model has no such site, or one of several widths, whose modules are listed below
    return found


def _rows_inside(inside: Sequence[Mapping[str, nn.Module]]) -> Iterator[tuple[str, dict[int | None, nn.Module]]]:
    """Every path that any block has, in the order of the tree, with the module of each layer that has it."""
    paths: dict[str, dict[int | None, nn.Module]] = {}
    for layer, modules in enumerate(inside):
        for path, module in modules.items():
            if path:
                paths.setdefault(path, {})[layer] = module
    yield from paths.items()
