"""Where the sites of a model are that no name tells: found in one or two short passes, by structure or by the caller's path.

``resid_mid`` is the input of the module that is given the residual stream between attention and MLP. ``heads`` is the input of the
attention's output projection, and ``neurons`` that of the MLP's last projection: the projection whose output, perhaps behind a norm, is
what attention or MLP add to the residual stream. A path names a module inside each block, or with a leading slash one outside of them.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from lmprobe_zarr.batch import Sites, describe_layers
from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.architectures import Place, submodule
from lmprobe_zarr.extraction.models.inside import inside_of
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.loading_report import quiet_logging
from lmprobe_zarr.extraction.models.structure import (
    evaluating,
    first_line,
    first_tensor,
    input_device,
    input_tensor,
    original_attention,
    plain_ids,
    signature,
    text_settings,
    trace,
    without_cache,
)
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.extraction.models.wrappers import uncompiled

__all__ = ["SHORT_PASS", "Given", "given_and_returned", "places_of", "row_of", "short_pass"]

# Tokens of the two prompts whose shapes tell which axis counts tokens.
SHORT_PASS: Final = (6, 11)
NEAREST: Final = 5


def places_of(loaded: LoadedModel, sites: Sites, layers: Sequence[int]) -> dict[str, Place]:
    """Where each site is.

    Parameters
    ----------
    loaded : LoadedModel
    sites : Sites
    layers : sequence of int
        Layers that are wanted; the width of a site must be the same in all of these that have it.

    Raises
    ------
    UnknownArchitectureError
        The model has no such site, as far as is known; or what is there has no row for every token.
    InvalidArgumentError
        A path names no module, or no layer that is wanted has the site; or its width differs between layers.
    """
    key = f"places {sorted(sites.names)} {sorted(sites.paths.items())} {list(layers)}"
    if key not in loaded.checked:
        loaded.checked[key] = _find(loaded, sites, layers)
    places: dict[str, Place] = loaded.checked[key]
    return {site: places[site] for site in sites}


def _find(loaded: LoadedModel, sites: Sites, layers: Sequence[int]) -> dict[str, Place]:
    found = {site: place for site in sites if (place := _known(loaded, site, sites.paths)) is not None}
    rest = [site for site in sites if site not in found]
    named = {site: sites.paths[site] for site in rest if site in sites.paths}
    by_structure = [site for site in rest if site not in named]
    if not rest:
        return found
    with short_pass(loaded):
        inner = _by_structure(loaded, by_structure) if by_structure else {}
        for site, path in named.items():
            inner[site] = _by_path(loaded, site, path)
        shaped = _with_shapes(loaded, inner, layers)
    return found | shaped


def _known(loaded: LoadedModel, site: str, paths: Mapping[str, str]) -> Place | None:
    """The place of a site that is known without a pass; None of one that is not."""
    blocks = loaded.located.blocks
    if site in paths:
        return None
    if site == "resid":
        return Place(modules=dict(enumerate(blocks)), width=loaded.hidden_size)
    if site == "embed":
        return Place(modules={None: blocks[0]}, given=True, width=loaded.hidden_size)
    if site not in ("attn", "mlp"):
        return None
    added = loaded.located.attn if site == "attn" else loaded.located.mlp
    if added is None:
        raise UnknownArchitectureError(f"site {site!r} of {loaded.name!r} is not known: name it, modules={{'layers': '…', {site!r}: '…'}}")
    return replace(Place.of(added), width=loaded.hidden_size)


@contextmanager
def short_pass(loaded: LoadedModel) -> Iterator[None]:
    """The turn of a model for a pass outside of a run; compiled code runs as it was written, so that hooks are called."""
    with running(loaded.turn), uncompiled(loaded.module), quiet_logging():
        yield


# ------------------------------------------------------------------------------------------------------------ by structure


def _by_structure(loaded: LoadedModel, sites: Sequence[str]) -> dict[str, Place]:
    located = loaded.located
    calls, _ = trace(located.body, located.blocks, plain_ids(located.body, SHORT_PASS[0]), inside=True, **without_cache(located.body))
    # A block that is called several times stands for as many layers, in the order of its calls.
    in_order = len(set(map(id, located.blocks))) < len(located.blocks)
    by_layer = {number if in_order else call.index: call for number, call in enumerate(calls)}
    votes: dict[tuple[tuple[str, ...], str], Counter[str]] = {}
    for layer, call in by_layer.items():
        attn, mlp = ((added or {}).get(layer) for added in (located.attn, located.mlp))
        for site, path in inside_of(call, attn, mlp).items():
            votes.setdefault((signature(located.blocks[layer]), site), Counter())[path] += 1
    found = {}
    for site in sites:
        modules: dict[int | None, nn.Module] = {}
        for layer, block in enumerate(located.blocks):
            counted = votes.get((signature(block), site))
            module = None if counted is None else submodule(block, counted.most_common(1)[0][0])
            if module is not None:
                modules[layer] = module
        if not modules:
            raise UnknownArchitectureError(
                f"{loaded.name!r} has no {site!r} that is found by structure ({_LACKING[site]}): leave it out, or name a module, "
                f"sites={{{site + '_own'!r}: 'path.in.a.block:input'}}; `lmprobe-zarr sites` lists them"
            )
        found[site] = Place(modules=modules, given=True)
    return found


_LACKING: Final = {
    "resid_mid": "its attention and its MLP are added to the residual stream at once, or one of them is not known",
    "neurons": "its MLP does not end in one projection, as in a mixture of experts, or is not known",
    "heads": "its blocks have no attention that ends in one projection, or it is not known",
}


# ----------------------------------------------------------------------------------------------------------------- by path


def _by_path(loaded: LoadedModel, site: str, path: str) -> Place:
    where, given = Sites.parse_path(path)
    if where.startswith("/"):
        outside, own = _outside(loaded, site, where[1:])
        return Place(modules={None: outside}, given=given, path=f"/{own}:input" if given else f"/{own}")
    modules: dict[int | None, nn.Module] = {
        layer: module for layer, block in enumerate(loaded.located.blocks) if (module := submodule(block, where)) is not None
    }
    if not modules:
        paths = {name for block in loaded.located.blocks for name, _ in block.named_modules() if name}
        raise InvalidArgumentError(
            f"sites={{{site!r}: {path!r}}}: no block of {loaded.name!r} has a module {where!r}{_nearest(where, paths)}; a path outside "
            "of the blocks begins with a slash, and `lmprobe-zarr sites` lists all"
        )
    return Place(modules=modules, given=given, path=path)


def _outside(loaded: LoadedModel, site: str, where: str) -> tuple[nn.Module, str]:
    """A module outside of the blocks, and its path in the part that runs them.

    It is found by its path in the model, which may lack what stands around the model, as a wrapper or a head does.
    """
    whole = dict(loaded.module.named_modules())
    prefix = getattr(loaded.module, "base_model_prefix", "")
    candidates = [where, *([where.removeprefix(prefix + "."), f"{prefix}.{where}"] if prefix else [])]
    names = [name for name in candidates if name in whole] or [name for name in whole if name.endswith(f".{where}")]
    inside = {id(part) for block in loaded.located.blocks for part in block.modules()}
    outer = {name: module for name, module in whole.items() if id(module) not in inside}
    chosen = [name for name in names if name in outer]
    if not chosen and names:
        raise InvalidArgumentError(
            f"sites={{{site!r}: '/{where}'}} is inside of a block of {loaded.name!r}: give its path in the block, without a slash, and "
            "layers="
        )
    if not chosen or len({id(outer[name]) for name in chosen}) > 1:
        several = f", but {len(chosen)} modules end so" if chosen else _nearest(where, outer)
        raise InvalidArgumentError(f"sites={{{site!r}: '/{where}'}}: no module of {loaded.name!r} has this path{several}")
    module: nn.Module = outer[chosen[0]]
    own = next((path for path, part in loaded.located.body.named_modules() if part is module), None)
    if own is None:
        raise InvalidArgumentError(
            f"sites={{{site!r}: '/{where}'}} is outside of the part of {loaded.name!r} that runs its blocks, as its head is: logits= keeps "
            "what the head returns, and its input is what the last norm returns"
        )
    return module, own


def _nearest(where: str, paths: set[str] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(where, sorted(path for path in paths if path), NEAREST, 0.4)
    return f"; the nearest are {', '.join(map(repr, near))}" if near else ""


# ------------------------------------------------------------------------------------------------------------------ shapes


@dataclass(slots=True)
class Given:
    """What a module is given and what it returns in a pass: the shapes of the first floating-point tensors, None where there is none."""

    given: tuple[int, ...] | None = None
    returned: tuple[int, ...] | None = None
    calls: int = 0


def given_and_returned(loaded: LoadedModel, modules: Mapping[int, nn.Module], tokens: int) -> dict[int, Given]:
    """The shapes of what goes in and out of some modules, by `id`, in one pass over one prompt of this many tokens.

    Raises
    ------
    UnknownArchitectureError
        The model does not run.
    """
    found = {key: Given() for key in modules}
    body = loaded.located.body

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes = found[id(module)]
        shapes.calls += 1
        tensor = input_tensor(args, kwargs)
        shapes.given = None if tensor is None else tuple(tensor.shape)

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        found[id(module)].returned = None if tensor is None else tuple(tensor.shape)

    ids = (plain_ids(body, tokens) * tokens)[:tokens]
    with ExitStack() as stack:
        stack.enter_context(evaluating(loaded.module))
        stack.enter_context(original_attention(loaded.module))
        stack.enter_context(torch.no_grad())
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        try:
            body(input_ids=torch.tensor([ids], device=input_device(body)), **without_cache(body))
        except Exception as error:
            raise UnknownArchitectureError(
                f"{loaded.name!r} does not run on a short prompt ({first_line(error)}), so its sites cannot be examined"
            ) from error
    return found


def _with_shapes(loaded: LoadedModel, places: Mapping[str, Place], layers: Sequence[int]) -> dict[str, Place]:
    """The places with the axis of the tokens and the width, which two short passes show."""
    modules = {id(module): module for place in places.values() for module in place.modules.values()}
    seen = [given_and_returned(loaded, modules, tokens) for tokens in SHORT_PASS]
    return {site: _with_shape(loaded, site, place, seen, layers) for site, place in places.items()}


def _with_shape(loaded: LoadedModel, site: str, place: Place, seen: Sequence[Mapping[int, Given]], layers: Sequence[int]) -> Place:
    named = f" ({place.path!r})" if place.path else ""
    called = {layer: module for layer, module in place.modules.items() if seen[0][id(module)].calls}
    kept = {layer: module for layer, module in called.items() if layer is None or layer in layers}
    if not called:
        raise UnknownArchitectureError(f"the model ran without calling the module of site {site!r}{named} of {loaded.name!r}: name another")
    if not kept:
        has = describe_layers(sorted(layer for layer in called if layer is not None))
        raise InvalidArgumentError(
            f"site {site!r}{named} is in layers {has} of {loaded.name!r}, and none of them is asked for: ask for some of them, or "
            "leave it out"
        )
    rows: dict[tuple[int, int], list[int | None]] = {}
    for layer, module in kept.items():
        shapes = [each[id(module)].given if place.given else each[id(module)].returned for each in seen]
        row = row_of(shapes)
        if row is None:
            what = "is given" if place.given else "returns"
            got = " and ".join("nothing with a fraction" if shape is None else str(shape) for shape in shapes)
            raise UnknownArchitectureError(
                f"the module of site {site!r}{named} of {loaded.name!r} {what} {got} for prompts of {SHORT_PASS[0]} and "
                f"{SHORT_PASS[1]} tokens, which is not a row for every token: choose another module"
            )
        rows.setdefault(row, []).append(layer)
    if len(rows) > 1:
        numbers = {row: [layer for layer in held if layer is not None] for row, held in rows.items()}
        told = "; ".join(f"{width} in layers {describe_layers(held)}" for (_, width), held in numbers.items())
        raise InvalidArgumentError(
            f"the width of site {site!r}{named} of {loaded.name!r} differs between layers ({told}): ask for layers of one width at a time"
        )
    axis, width = next(iter(rows))
    heads = getattr(text_settings(loaded.located.body), "num_attention_heads", None) if site == "heads" else None
    known = isinstance(heads, int) and heads > 0 and width % heads == 0
    return replace(place, modules=called, token_axis=axis, width=width, heads=heads if known else None)


def row_of(shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, int] | None:
    """The axis that counts tokens, and how many values a token has; None where there is no row for every token.

    Parameters
    ----------
    shapes : sequence of tuple of int or None
        Of one tensor, for prompts of as many tokens as `SHORT_PASS` says.
    """
    axis = _token_axis(shapes)
    if axis is None or shapes[0] is None:
        return None
    others = (size for place, size in enumerate(shapes[0]) if place != axis and not (len(shapes[0]) > 2 and place == _batch_axis(axis)))
    return axis, math.prod(others)


def _batch_axis(token_axis: int) -> int:
    """The axis that counts prompts: the first, or the second where tokens come first."""
    return 1 if token_axis == 0 else 0


def _token_axis(shapes: Sequence[tuple[int, ...] | None]) -> int | None:
    """The axis that counts tokens; None where none or several do, or where prompts have no axis of their own."""
    short, long = shapes
    if short is None or long is None or len(short) != len(long) or len(short) < 2:
        return None
    differ = [axis for axis, (a, b) in enumerate(zip(short, long, strict=True)) if a != b]
    if len(differ) != 1 or (short[differ[0]], long[differ[0]]) != SHORT_PASS:
        return None
    axis = differ[0]
    if len(short) == 2:
        return axis if axis == 0 else None  # all tokens of all prompts, end to end
    return axis if short[_batch_axis(axis)] == 1 and axis < len(short) - 1 and (axis < 2 or len(short) > 3) else None
