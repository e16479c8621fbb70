"""`encode`: runs a sparse autoencoder over stored tokens, block by block, and stores the largest latents of each beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import TokenBatch, offsets_of
from lmprobe_zarr.display import progress_bar
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError, MissingPromptsError
from lmprobe_zarr.latents.encoder import Encoder
from lmprobe_zarr.latents.folders import load_sae
from lmprobe_zarr.latents.lists import by_prompt, list_width, lists_of
from lmprobe_zarr.latents.sae import SparseAutoencoder
from lmprobe_zarr.latents.stored import INDICES, VALUES, StoredRows, check_name, list_names_of, stored_rows_of
from lmprobe_zarr.store import Ingest, Place, open_again
from lmprobe_zarr.store.format import SAE
from lmprobe_zarr.store.parts import View, merged_order, read_values
from lmprobe_zarr.typing import Array, Ints

__all__ = ["encode"]

# Of the rows that are read at a time, in their widest form.
READ_BYTES: Final = 64 << 20
# How many latents are kept of a token where neither the caller nor the autoencoder says so.
DEFAULT_K: Final = 128


def encode(
    activations: xr.DataArray,
    sae: SparseAutoencoder | str | os.PathLike[str],
    *,
    name: str = "latents",
    k: int | None = None,
    threshold: float = 0.0,
    store: Place = None,
    compute_dtype: Literal["float64", "float32"] = "float64",
    progress: bool = True,
) -> xr.Dataset:
    """The latents of a sparse autoencoder for stored tokens: the largest of each token are computed, and stored beside the rows.

    Parameters
    ----------
    activations : DataArray, dims (layer, token, hidden) or (token, hidden)
        A variable of tokens as it is stored, such as ``store.tokens().resid``, or whole prompts and one layer of it. The rows are read
        block by block.
    sae : SparseAutoencoder, str or path
        The autoencoder, or a folder that SAELens or dictionary_learning wrote (:func:`load_sae`).
    name : str
        The name of the latents: the variables are ``<name>_values`` and ``<name>_indices``. One name is for one autoencoder, with one `k`
        and one `threshold`.
    k : int, optional
        How many latents are kept of each token, at most. By default as many as an autoencoder of TopK has, and 128 of others (or all, where
        it has fewer).
    threshold : float
        Only latents above it are kept. 0 keeps all that are active, as far as there is room for them.
    store : Store, path or URL, optional
        The store to write to, which holds the prompts; by default that of the rows.
    compute_dtype : {"float64", "float32"}
        What the latents are computed in; they are stored as float32. In float64 they are those of the stored rows, rounded once. float32 is
        about twice as fast, and wrong in the last digits.
    progress : bool
        Show a bar on terminals.

    Returns
    -------
    Dataset
        Of these prompts, lazily, with ``<name>_values`` (float32) and ``<name>_indices`` (int32), dims (token, <name>_k): descending, 0 and
        −1 where fewer are active. ``store.tokens()`` has them too; ``.lz.to_sparse()`` makes one sparse array of both.

    Raises
    ------
    InvalidArgumentError
        Rows of another width than the autoencoder's, or of another site; rows that are not finite, or were changed after they were read;
        parts of prompts; several layers, of which the autoencoder does not say the one; `k` or `threshold` out of range; or a name that
        another autoencoder's latents have, or a variable or column.
    LayerOutOfRangeError
        A layer that the autoencoder was not trained on, or that is not there.
    MissingPromptsError
        The layer is not stored for some of the prompts.
    ReadOnlyError
        The store was opened for reading.
    CorruptFileError, NumberRangeError, NoSpaceError

    Notes
    -----
    Prompts that have these latents already are left out, so a call that was interrupted is repeated to go on. Those whose rows were written
    again since, as by ``extract(…, refresh=True)``, are encoded again. Besides what is returned,
    every prompt gets a list of the latents that are active in it, each with its largest value (``<name>_max_values`` and
    ``<name>_max_indices`` of ``store.dataset()``), which `top_tokens` and `pool_latents` read instead of all tokens.

    A token of which more than `k` latents exceed the threshold keeps the largest; its last index is not −1 then.

    Examples
    --------
    >>> latents = lz.encode(store.tokens().resid, "sae-folder", name="latents_8", k=64)  # doctest: +SKIP
    >>> lz.top_tokens(latents, 1234)  # doctest: +SKIP
    """
    name = check_name(name)
    rows, layer, encoder, record = _checked(activations, sae, k, threshold, compute_dtype)
    target = rows.own_store() if store is None else open_again(store)
    target.check_writable()
    info = target.groups().get(rows.group)
    if info is None:
        raise InvalidArgumentError(f"{target.where} has no group {rows.group!r}, which these rows are of: give the store that holds them")
    view = target.view(info)
    work = _planned(view, rows, layer, name, record)
    if len(work.prompts):
        order = merged_order([part.info for part in view.parts])
        with (
            Ingest(target, info, recorded={"written_by": "encode"}, order=order) as ingest,
            progress_bar(int(work.counts.sum()), description="encoding", unit="token", enabled=progress) as advance,
        ):
            for batch in _batches(view, work, encoder, name, record):
                ingest.put(batch)
                advance(0 if batch.n_tokens is None else int(batch.n_tokens.sum()))
    return _read(target.tokens(group=info.name, prompts=None if work.is_all else list(rows.hashes)), name)


def _read(tokens: xr.Dataset, name: str) -> xr.Dataset:
    return tokens[[f"{name}{VALUES}", f"{name}{INDICES}"]]


# -- checks ----------------------------------------------------------------------------------------------------------------


def _checked(
    activations: Any, sae: Any, k: Any, threshold: Any, compute_dtype: Any
) -> tuple[StoredRows, int | None, Encoder, dict[str, Any]]:
    """The rows, the layer, the encoder, and what is recorded of both; raises where they do not fit together."""
    rows = stored_rows_of(activations)
    if isinstance(sae, str | os.PathLike):
        sae = load_sae(sae)
    if not isinstance(sae, SparseAutoencoder):
        raise InvalidTypeError(f"sae is a {type(sae).__name__}: give a folder, or lz.SparseAutoencoder(encoder=…, …) with its weights")
    if compute_dtype not in ("float64", "float32"):
        raise InvalidArgumentError(f"compute_dtype={compute_dtype!r:.60} is unknown: give 'float64' or 'float32'")
    if rows.width != sae.width:
        raise InvalidArgumentError(
            f"{rows.variable!r} has rows of {rows.width} values, and this autoencoder takes {sae.width}: give one of this model and site"
        )
    if sae.site is not None and sae.site != rows.variable:
        raise InvalidArgumentError(
            f"this autoencoder was trained on {sae.site!r}, and these rows are {rows.variable!r}: give toks.{sae.site}"
        )
    layer = _layer(rows, sae)
    count = _count(k, sae)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number):
        raise InvalidTypeError(f"threshold={threshold!r:.60} is no number: give one, or leave it out to keep what is active")
    if not 0 <= threshold < np.inf:
        raise InvalidArgumentError(f"threshold={threshold!r} is out of range: give 0 or more, since latents are never negative")
    record = {
        "sha256": sae.sha256, "architecture": sae.architecture, "normalisation": sae.normalisation, "num_latents": sae.num_latents,
        "site": rows.variable, "layer": layer, "k": count, "threshold": float(threshold), "compute_dtype": compute_dtype,
    }  # fmt: skip
    return rows, layer, Encoder(sae, k=count, threshold=float(threshold), dtype=compute_dtype), record


def _layer(rows: StoredRows, sae: SparseAutoencoder) -> int | None:
    """The layer to encode, None for a variable without layers."""
    if rows.layers is None:
        if sae.layer is not None:
            raise LayerOutOfRangeError(f"this autoencoder was trained on layer {sae.layer}, and {rows.variable!r} has no layers")
        return None
    if sae.layer is None:
        if len(rows.layers) != 1:
            raise InvalidArgumentError(
                f"{rows.variable!r} has layers {list(rows.layers)}, and this autoencoder does not say which it was trained on: give one, "
                f"toks.{rows.variable}.sel(layer={next(iter(rows.layers), 0)})"
            )
        return rows.layers[0]
    if sae.layer not in rows.layers:
        raise LayerOutOfRangeError(
            f"this autoencoder was trained on layer {sae.layer}, and these rows are of {list(rows.layers)}: give that layer, or extract it"
        )
    return sae.layer


def _count(k: Any, sae: SparseAutoencoder) -> int:
    if k is None:
        return sae.k if sae.k is not None else min(DEFAULT_K, sae.num_latents)
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise InvalidTypeError(f"k={k!r:.60} is no whole number: give how many latents of a token are kept")
    if not 1 <= k <= sae.num_latents:
        raise InvalidArgumentError(f"k={k} is out of range: this autoencoder has {sae.num_latents} latents, give 1 to {sae.num_latents}")
    return int(k) if sae.k is None else min(int(k), sae.k)


@dataclass(frozen=True, slots=True)
class _Work:
    """What is encoded: prompts of the view without these latents, of one layer; and how long lists are, where others have some."""

    prompts: Ints
    counts: Ints
    variable: str
    layer: int | None
    list_width: int | None
    is_all: bool


def _planned(view: View, rows: StoredRows, layer: int | None, name: str, record: dict[str, Any]) -> _Work:
    """What is to be encoded, decided before anything is read or written."""
    variables = view.variables("tokens")
    names = {"tokens": (f"{name}{VALUES}", f"{name}{INDICES}"), "prompts": list_names_of(name)}
    taken = {name, *names["tokens"], *names["prompts"]}
    # Of a repaired store perhaps only some of them are left.
    held = {**variables, **view.variables("prompts")}
    stored = next((held[each].attributes[SAE] for each in sorted(taken & held.keys()) if SAE in held[each].attributes), None)
    if stored is not None and stored != _text(record):
        raise InvalidArgumentError(f"{name!r} is taken by latents of another autoencoder or other options ({_difference(stored, record)}): "
                                   f"give another name=, or remove them, store.drop(…, [{names['tokens'][0]!r}, …])")  # fmt: skip
    others = {*held, *view.columns("tokens"), *view.columns("prompts")}
    if stored is None and (same := sorted(taken & others)):
        raise InvalidArgumentError(f"{same[0]!r} is a variable or a column of {view.where}: give the latents another name=")
    chosen = view.select(list(rows.hashes))
    counts = view.token_counts()[chosen]
    if (counts != rows.counts).any():
        first = int(np.argmax(counts != rows.counts))
        raise InvalidArgumentError(
            f"{rows.counts[first]} of the {counts[first]} tokens of prompt {rows.hashes[first]} were given, and latents are stored for "
            "whole prompts: select prompts, not tokens"
        )
    wanted = () if layer is None else (layer,)
    there = view.covers("tokens", rows.variable, chosen, wanted)[0]
    if not there.all():
        where = rows.variable if layer is None else f"{rows.variable} of layer {layer}"
        raise MissingPromptsError(
            f"{int((~there).sum())} of {len(chosen)} prompts are stored without {where}, first {rows.hashes[int(np.argmin(there))]}: "
            "extract them, or leave them out"
        )
    done = np.ones(len(chosen), bool)
    for variable in names["tokens"]:
        done &= view.covers("tokens", variable, chosen, ())[0]
    for variable in names["prompts"]:
        done &= view.covers("prompts", variable, chosen, ())[0]
    if done.any():  # latents of rows that were replaced since are of other rows
        done &= _ages(view, names["tokens"][0], chosen, ()) >= _ages(view, rows.variable, chosen, wanted)
    todo = ~done
    lists = view.variables("prompts").get(names["prompts"][0])
    width = None if lists is None else lists.row_shape[-1]
    with_tokens = int((view.token_counts() > 0).sum())
    return _Work(chosen[todo], counts[todo], rows.variable, layer, width, len(chosen) == with_tokens)


def _ages(view: View, variable: str, prompts: Ints, layers: tuple[int, ...]) -> Ints:
    """For each prompt the place of the part that a variable of its tokens is in, in the order in which parts win; −1 for none."""
    array = view.source("tokens", variable, prompts, layers)
    orders = {(part.storage.url, part.path): part.order for part in view.owners}
    place = {order: number for number, order in enumerate(sorted(orders.values()))}
    ages = np.array([*(place[orders[held.storage.url, held.path.rsplit("/", 2)[0]]] for held in array.arrays), -1], np.int64)
    return np.asarray(ages[array.source[array.classes[0]]])  # what no part holds is the last


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def _difference(stored: Any, record: dict[str, Any]) -> str:
    """In what a record differs from the stored one, for messages."""
    held = json.loads(str(stored))
    fields = [f"{field} {held.get(field)!r:.16} there, {value!r:.16} here" for field, value in record.items() if held.get(field) != value]
    return ", ".join(fields)


# -- encoding --------------------------------------------------------------------------------------------------------------


def _batches(view: View, work: _Work, encoder: Encoder, name: str, record: dict[str, Any]) -> Iterator[TokenBatch]:
    """Batches with the latents of some prompts each."""
    layers = () if work.layer is None else (work.layer,)
    source = view.source("tokens", work.variable, work.prompts, layers, work.counts)
    positions = None if view.holds_whole_prompts else True
    attributes = {variable: {SAE: _text(record)} for variable in (f"{name}{VALUES}", f"{name}{INDICES}", *list_names_of(name))}
    width, offsets = work.list_width, offsets_of(work.counts)
    most = max(1, READ_BYTES // (8 * encoder.sae.width + 8 * encoder.k))
    for start, stop in _cut(work.counts, most):
        first, last = int(offsets[start]), int(offsets[stop])
        values = np.empty((last - first, encoder.k), np.float32)
        indices = np.empty((last - first, encoder.k), np.int32)
        for low in range(first, last, most):  # a prompt may be longer than what is read at a time
            high = min(last, low + most)
            rows = np.asarray(source.read(np.zeros(1, np.int64), slice(low, high), note=True)[0])
            _check_finite(rows, low, view, work, offsets)
            values[low - first : high - first], indices[low - first : high - first] = encoder.encode(rows)
        counts, prompts = work.counts[start:stop], work.prompts[start:stop]
        entries = by_prompt(values, indices, counts, encoder.sae.num_latents)
        if width is None:
            width = list_width(entries[0], len(counts), encoder.sae.num_latents)
        lists = lists_of(entries, len(counts), width)
        columns = {} if positions is None else {"position": read_values(view, "tokens", "position", prompts, ())}
        yield TokenBatch(
            sha256=[view.digests[row].tobytes().hex() for row in prompts],
            n_tokens=counts,
            tokens={f"{name}{VALUES}": values, f"{name}{INDICES}": indices},
            token_columns=columns,
            prompts=dict(zip(list_names_of(name), lists, strict=True)),
            unlayered=frozenset(attributes),
            site_attributes=attributes,
        )


def _cut(counts: Ints, most: int) -> Iterator[tuple[int, int]]:
    """Runs of prompts with at most so many tokens together; a longer prompt is one by itself."""
    start, held = 0, 0
    for number, count in enumerate(counts.tolist()):
        if number > start and held + count > most:
            yield start, number
            start, held = number, 0
        held += count
    yield start, len(counts)


def _check_finite(rows: Array, first: int, view: View, work: _Work, offsets: Ints) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if finite.all():
        return
    token = first + int(np.argmin(finite))
    prompt = int(np.searchsorted(offsets, token, "right")) - 1
    where = "" if work.layer is None else f" in layer {work.layer}"
    raise InvalidArgumentError(
        f"{work.variable} holds values that are not finite{where}: token {token - int(offsets[prompt])} of prompt "
        f"{view.hashes[work.prompts[prompt]]}, and perhaps others. Leave such prompts out of what is encoded, or extract them again; what "
        "was encoded before them stays"
    )
