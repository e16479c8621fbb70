"""`write_activations`: activations that the caller already has, written as one part. Knows neither models nor files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lmprobe_zarr.batch import (
    HASH_DIGITS,
    HIDDEN_SITES,
    LAYERED_SITES,
    TokenBatch,
    align_columns,
    check_texts,
    given_prompts,
    hashes_of,
    is_pair,
    parse_column,
    pooled_name_problem,
    prompt_sha256,
    split_variable,
    with_encoder_texts,
)
from lmprobe_zarr.display import count_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.log import cache_logger
from lmprobe_zarr.store.format import GroupInfo, Provenance, validate_column_names
from lmprobe_zarr.store.named import Model
from lmprobe_zarr.store.reopen import open_again
from lmprobe_zarr.store.store import Place, Store
from lmprobe_zarr.typing import Array

__all__ = ["write_activations"]


def write_activations(
    store: Place,
    *,
    model: Model,
    prompts: Sequence[str | Sequence[int] | tuple[str, str]],
    activations: Mapping[str, Any] | None = None,
    pooled: Mapping[str, Any] | None = None,
    token_ids: Sequence[Sequence[int]] | None = None,
    coords: Mapping[str, Any] | pd.DataFrame | None = None,
    provenance: Provenance | None = None,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    store_text: bool = True,
) -> str:
    """Store activations that you already have, as one part, visible as a whole or not at all.

    Parameters
    ----------
    store : Store, path or URL, or a sequence of these
        The store to write to.
    model : str or path
        Name of the model.
    prompts : sequence of str, of token ids or of pairs of str, no prompt twice
        What the activations belong to, in the order of every array below.
    activations : mapping of str to mapping of int to list of array, optional
        Site to ``{layer: [array(token, width), …]}``, one array per prompt, without padding; a site that has no layers, such as ``embed``,
        to the list itself. Any name of letters, digits and underscores is a site, and each may have a width of its own.
    pooled : mapping of str to mapping of int to array, optional
        ``<site>_<pooling>`` to ``{layer: array(prompt, width)}``; for a site without layers to the array itself.
    token_ids : sequence of sequence of int, optional
        Token ids of each prompt.
    coords : mapping of str to sequence, optional
        Columns of one value per prompt, or a DataFrame: truth values, integers, floating-point numbers, texts, datetimes, timedeltas, dates
        or categories, some of them missing or none. A Series whose index is the prompts, or that of the prompts' own Series, is put into
        their order.
    provenance : mapping, optional
        How the activations were computed. Other provenance is another group, and so is none.
    num_layers : int, optional
        Blocks of the model, where known.
    hidden_size : int, optional
        Width of the residual stream; by default that of ``resid``, ``resid_mid``, ``attn``, ``mlp`` or ``embed`` where one is given. A
        variable of this width has the dimension ``hidden``, any other ``<site>_unit``.
    store_text : bool
        False leaves the texts out; prompts are then found by text or hash, but no longer read back.

    Returns
    -------
    str
        Name of the group, for ``group=``.

    Raises
    ------
    InvalidArgumentError
        Shapes, layers or columns that do not fit together; nothing is written.
    PromptCollisionError, ReadOnlyError, NoSpaceError
        Nothing becomes visible.

    Notes
    -----
    Arrays may be numpy arrays or torch tensors. bfloat16 is kept exactly, as float32 with ``stored_dtype="bfloat16"``.
    All variables of one call hold the same layers; write others in a second call.
    Prompts that are stored already are written again: what is given replaces their values and columns of the same names, and all other
    values and columns stay. The log says how many prompts these are.
    """
    store = open_again(store)
    store.check_writable()
    given, prompts = prompts, given_prompts(prompts)
    for side in (0, 1):
        check_texts([p[side] if is_pair(p) else p for p in prompts])
    for what, values in (("activations", activations), ("pooled", pooled)):
        if values is not None and not isinstance(values, Mapping):
            raise InvalidTypeError(f"{what} is a {type(values).__name__}: give {{variable: …}}")
    if not activations and not pooled:
        raise InvalidArgumentError("there is nothing to store: give activations=, pooled=, or both")
    tokens, counts, layers_of, dtypes = _read_tokens(activations or {}, len(prompts))
    per_prompt: dict[str, Array] = {}
    for name, values in (pooled or {}).items():
        _check_name(name, pooling=True)
        per_prompt[name], layers_of[name], dtypes[name] = _read_pooled(name, values)
    layered = {name: layers for name, layers in layers_of.items() if layers is not None}
    if len(set(layered.values())) > 1:
        raise InvalidArgumentError(f"the variables hold different layers ({layered}): write each set of layers in a call of its own")
    hidden = _hidden_size(hidden_size, {**tokens, **per_prompt})
    _check_widths({**tokens, **per_prompt})
    layers = next(iter(layered.values()), ())
    lengths = _lengths(token_ids, counts, len(prompts))
    if num_layers is not None and layers and layers[-1] >= num_layers:
        raise InvalidArgumentError(f"layer {layers[-1]} was given for a model of num_layers={num_layers}")
    aligned = align_columns(coords, given, prompts)
    validate_column_names(aligned, new=True)
    if same := sorted({*tokens, *per_prompt} & set(aligned)):
        raise InvalidArgumentError(f"{same[0]!r} is a column of coords= and a variable: choose another name for one of them")
    columns = {name: parse_column(name, values) for name, values in aligned.items()}
    # What stands as the text of a pair is what the decoder reads.
    known = [p[1] if is_pair(p) else p for p in prompts]
    texts = [str.__str__(p) if isinstance(p, str) else "" for p in known] if store_text and any(isinstance(p, str) for p in known) else None
    if store_text and prompts and all(map(is_pair, prompts)):
        columns = with_encoder_texts(columns, prompts)
    batch = TokenBatch(
        sha256=[prompt_sha256(p) for p in prompts],
        text=texts,
        n_tokens=counts,
        prompt_length=counts if counts is not None else lengths,
        layers=layers,
        tokens=tokens,
        token_columns={}
        if token_ids is None or counts is None
        else {"token_id": np.concatenate([np.asarray(i, np.int64) for i in token_ids])},
        prompts=per_prompt,
        prompt_columns=columns,
        unlayered=frozenset(name for name, held in layers_of.items() if held is None),
        stored_dtype={name: dtype for name, dtype in dtypes.items() if dtype == "bfloat16"},
    )
    info = GroupInfo(model=os.fspath(model), provenance=provenance or {}, num_layers=num_layers, hidden_size=hidden)
    _log_replaced(store, info, batch)
    store.write(info, batch, recorded={"written_by": "write_activations"})
    return info.name


def _log_replaced(store: Store, info: GroupInfo, batch: TokenBatch) -> None:
    """Log how many prompts have values or columns already that the call replaces."""
    group = store.groups(whole=False).get(info.name)
    if group is None:
        return
    view = store.view(group, whole=False)
    given = {f"tokens/{name}" for name in batch.tokens} | {f"prompts/{name}" for name in (*batch.prompts, *batch.prompt_columns)}
    place = {digest[:HASH_DIGITS]: row for row, digest in enumerate(batch.sha256)}
    held = np.zeros(len(place), bool)
    for part in (*view.parts, *view.annotations):
        arrays = [array for key, array in part.info.arrays.items() if key in given]
        if any(not array.layered or set(part.info.layers) & set(batch.layers) for array in arrays):
            held[[place[label] for label in hashes_of(part.info.digests).tolist() if label in place]] = True
    if held.any():
        replaced = count_of(int(held.sum()), "prompt")
        cache_logger().info("[cache] write_activations replaces values or columns of %s in %s", replaced, store.url)


def _hidden_size(given: int | None, arrays: Mapping[str, Array]) -> int | None:
    """The width of the residual stream: as given, or that of the sites that have it."""
    widths = {name: int(array.shape[-1]) for name, array in arrays.items() if split_variable(name)[0] in HIDDEN_SITES}
    if given is not None and (isinstance(given, bool) or not isinstance(given, (int, np.integer)) or given < 1):
        raise InvalidArgumentError(f"hidden_size={given!r} is no width: give a whole number of at least 1, or None")
    if len({*widths.values(), *([] if given is None else [int(given)])}) > 1:
        own = {} if given is None else {"hidden_size": int(given)}
        raise InvalidArgumentError(f"the variables differ in hidden size ({own | widths}): one model has one; name another site otherwise")
    return int(given) if given is not None else next(iter(widths.values()), None)


def _check_widths(arrays: Mapping[str, Array]) -> None:
    """Raise where a site has one width by token and another pooled, which share a dimension, or two sites a name but for its case."""
    widths: dict[str, tuple[str, int]] = {}
    lower: dict[str, str] = {}
    for name, array in arrays.items():
        if lower.setdefault(name.lower(), name) != name:
            raise InvalidArgumentError(
                f"{lower[name.lower()]!r} and {name!r} differ by case alone, and some file systems ignore case: choose another name"
            )
        first, width = widths.setdefault(split_variable(name)[0], (name, int(array.shape[-1])))
        if width != array.shape[-1]:
            raise InvalidArgumentError(f"{first!r} is {width} wide and {name!r} is {array.shape[-1]}: a site has one width")


def _check_name(name: object, *, pooling: bool) -> None:
    if problem := pooled_name_problem(name, pooled=pooling):
        raise InvalidArgumentError(f"{name!r:.80} is no {'pooled variable' if pooling else 'site'}: {problem}")


def _is_unlayered(name: str, values: Any) -> bool:
    """Whether a variable has no layers, which the names of format 1 say themselves."""
    site = split_variable(name)[0]
    return site not in LAYERED_SITES and (site == "embed" or not isinstance(values, Mapping))


def _lengths(token_ids: Sequence[Sequence[int]] | None, counts: Array | None, n_prompts: int) -> Array | None:
    """Token ids per prompt, checked against the tokens that were given."""
    if token_ids is None:
        return None
    lengths = np.array([len(ids) for ids in token_ids], np.int64)
    if len(lengths) != n_prompts:
        raise InvalidArgumentError(f"token_ids has {len(lengths)} lists for {n_prompts} prompts: give one per prompt")
    if counts is not None and (lengths != counts).any():
        i = int(np.argmax(lengths != counts))
        raise InvalidArgumentError(f"token_ids has {lengths[i]} ids for prompt number {i}, which has {counts[i]} tokens")
    return lengths


def _read_tokens(
    activations: Mapping[str, Any], n_prompts: int
) -> tuple[dict[str, Array], Array | None, dict[str, tuple[int, ...] | None], dict[str, str]]:
    tokens: dict[str, Array] = {}
    layers_of: dict[str, tuple[int, ...] | None] = {}
    dtypes: dict[str, str] = {}
    counts: Array | None = None
    for name, values in activations.items():
        _check_name(name, pooling=False)
        unlayered = _is_unlayered(name, values)
        by_layer = {0: values} if unlayered else _by_layer(name, values)
        stacked = []
        for layer, arrays in by_layer.items():
            read = [as_array(a) for a in arrays]
            if len(read) != n_prompts:
                raise InvalidArgumentError(f"{name!r} layer {layer} has {len(read)} arrays for {n_prompts} prompts: give one per prompt")
            bad = [i for i, (a, _) in enumerate(read) if a.ndim != 2]
            if bad:
                raise InvalidArgumentError(
                    f"{name!r} layer {layer}, prompt number {bad[0]} has shape {read[bad[0]][0].shape}: give (token, hidden)"
                )
            rows = np.array([len(a) for a, _ in read], np.int64)
            if counts is None:
                counts = rows
            elif (rows != counts).any():
                i = int(np.argmax(rows != counts))
                raise InvalidArgumentError(f"{name!r} layer {layer} has {rows[i]} tokens for prompt number {i}, {counts[i]} elsewhere")
            if len({a.shape[1] for a, _ in read}) > 1:
                raise InvalidArgumentError(f"{name!r} layer {layer} has several hidden sizes: {sorted({a.shape[1] for a, _ in read})}")
            stacked.append(np.concatenate([a for a, _ in read]))
            dtypes[name] = read[0][1]
        _check_alike(name, stacked)
        tokens[name] = stacked[0] if unlayered else np.stack(stacked)
        layers_of[name] = None if unlayered else tuple(by_layer)
    return tokens, counts, layers_of, dtypes


def _read_pooled(name: str, values: Any) -> tuple[Array, tuple[int, ...] | None, str]:
    if _is_unlayered(name, values):
        array, dtype = as_array(values)
        _check_alike(name, [array])
        return array, None, dtype
    by_layer = {layer: as_array(v) for layer, v in _by_layer(name, values).items()}
    arrays = [array for array, _ in by_layer.values()]
    _check_alike(name, arrays)
    return np.stack(arrays), tuple(by_layer), next(iter(by_layer.values()))[1]


def _by_layer(name: str, values: Any) -> dict[int, Any]:
    if not isinstance(values, Mapping) or not values or not all(isinstance(k, (int, np.integer)) and 0 <= k < 2**31 for k in values):
        raise InvalidArgumentError(f"{name!r} has layers: give {{layer: …}} with layer numbers from 0")
    return {int(layer): values[layer] for layer in sorted(values)}


def _check_alike(name: str, arrays: Sequence[Array]) -> None:
    kinds = {(a.shape, a.dtype.name) for a in arrays}
    if len(kinds) > 1:
        raise InvalidArgumentError(f"the layers of {name!r} differ in shape (rows, hidden size) or dtype: {sorted(kinds)}")
    if arrays[0].ndim != 2:
        raise InvalidArgumentError(f"{name!r} has shape {arrays[0].shape}: give (rows, hidden)")


def as_array(values: Any) -> tuple[Array, str]:
    """An array or tensor as numpy, and the dtype it had; bfloat16 widened to float32, which holds it exactly."""
    if hasattr(values, "detach"):  # a torch tensor, without importing torch
        values = values.detach().cpu()
        name = str(values.dtype).removeprefix("torch.")
        return np.asarray((values.float() if name == "bfloat16" else values).numpy()), name
    array = np.asarray(values)
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32), "bfloat16"
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InvalidArgumentError(f"activations have dtype {array.dtype}: use float16, bfloat16, float32 or float64")
    return array, array.dtype.name
