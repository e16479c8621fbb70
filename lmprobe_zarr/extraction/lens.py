"""`logit_lens`: what a model's final norm and head make of rows of the residual stream, block by block."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.display import name_in_messages
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError, ModelNotFoundError
from lmprobe_zarr.extraction import models
from lmprobe_zarr.interchange import TEXT, to_interchange
from lmprobe_zarr.tokens import token_texts

if TYPE_CHECKING:
    import torch

    from lmprobe_zarr.extraction.models import Lens

__all__ = ["logit_lens"]

# Bounds the rows that are read at a time, as float32.
BLOCK_BYTES: Final = 64 << 20
# As `extract` names what it stores of the largest logits.
VALUES: Final = "logits_top_k_values"
IDS: Final = "logits_top_k_indices"
LOG_PROBS: Final = "logits_top_k_log_probs"
TEXTS: Final = "logits_top_k_texts"


def logit_lens(
    activations: xr.DataArray,
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    top_k: int = 5,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: Any = "auto",
    device: Any = "auto",
    modules: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> xr.Dataset:
    """The tokens that a model's final norm and head read from the residual stream at every layer: the logit lens.

    No block runs. What does run is the model's own code, with its scaling and its caps, so the last layer gives the model's own logits.

    Parameters
    ----------
    activations : DataArray, with a dimension ``hidden``
        The residual stream, such as ``store.tokens().resid``, a selection of it, or a pooled variable of ``store.dataset()``; any other
        rows as wide are taken for what the final norm is given. Rounded values (`storage_dtype`, `keep_bits`) are taken as they are.
    model : str, path or torch Module
        The model that they are of. Of a folder or hub id its blocks are not loaded, but for two by which the lens is checked. A loaded
        model is used as it is.
    top_k : int
        How many of the largest logits of each row.
    tokenizer : transformers tokenizer, str or path, optional
        For the texts of the tokens; a folder's or hub id's own by default. Without one there are no texts.
    revision, dtype, device, modules, trust_remote_code : optional
        As for :func:`extract`; `revision`, `dtype` and `device` only for a model that is loaded by its name.

    Returns
    -------
    Dataset
        With the dimensions of `activations`, ``top_k`` in the place of ``hidden``, and its coordinates: ``logits_top_k_values``, the
        largest logits, descending; ``logits_top_k_indices``, their token ids; ``logits_top_k_log_probs``, their log-probabilities among
        the whole vocabulary; ``logits_top_k_texts``, what the token ids stand for. Tokens whose texts are stored have the coordinate
        ``token_text``. Rows that are not stored have NaN, the token id −1 and an empty text.

        Lazy where `activations` has Dask arrays (``.chunk()``): blocks are computed when they are asked for. Otherwise rows are read some
        64 MiB at a time, and only the result is kept.

    Raises
    ------
    UnknownArchitectureError
        The rows after the last block of the model are not what its norm and head make logits of, by a short prompt.
    InvalidArgumentError, LayerOutOfRangeError
        No dimension ``hidden``, or rows of another width than the model's; a layer that the model does not have; `top_k` out of range; a
        model without a head.
    InvalidTypeError
        No DataArray of floating-point numbers.
    ModelNotFoundError
        The model cannot be loaded.

    Examples
    --------
    >>> lens = lz.logit_lens(store.tokens().resid, "gpt2", top_k=5)  # doctest: +SKIP
    >>> lens.logits_top_k_texts.sel(layer=6).isel(top_k=0)  # doctest: +SKIP
    """
    _check_activations(activations)
    count = _check_top_k(top_k)
    lens = models.load_lens(
        model, revision=revision, dtype=dtype, device=device, modules=modules, trust_remote_code=trust_remote_code
    )  # fmt: skip
    _check_fits(activations, lens, count)
    held = _tokenizer_of(model, tokenizer, revision, trust_remote_code)
    dims = tuple(dim for dim in activations.dims if dim != "hidden")
    if activations.chunks is None:
        values, ids, log_probs = _computed(activations.variable, dims, lens, count)
    else:
        values, ids, log_probs = _lazily(activations.variable, dims, lens, count)
    found = {VALUES: values, IDS: ids, LOG_PROBS: log_probs}
    variables = {name: ((*dims, "top_k"), array) for name, array in found.items()}
    coords = activations.isel(hidden=0, drop=True).coords
    result = coords.to_dataset().assign(variables)
    if held is not None:
        named = xr.apply_ufunc(_Texts(held), result[IDS], dask="parallelized", output_dtypes=[TEXT], keep_attrs=False)
        result = result.assign({TEXTS: named})
    if "token" in dims and "token_text" not in result.coords and (texts := token_texts(activations)) is not None:
        result = result.assign_coords(token_text=("token", texts))
    result[VALUES].attrs["long_name"], result[LOG_PROBS].attrs["long_name"] = "logit", "log-probability"
    result[IDS].attrs["long_name"] = "token id"
    result.attrs = {"lens_of": str(activations.name or "activations"), "num_layers": lens.num_layers}
    return to_interchange(result)


# ---------------------------------------------------------------------------------------------------------------- arguments


def _check_activations(activations: Any) -> None:
    if not isinstance(activations, xr.DataArray):
        ways = "give one variable of it, such as toks.resid" if isinstance(activations, xr.Dataset) else "give store.tokens().resid"
        raise InvalidTypeError(f"activations is a {type(activations).__name__}, and a lens takes a DataArray: {ways}")
    if activations.dtype.kind != "f":
        raise InvalidTypeError(f"{name_in_messages(activations)} has dtype {activations.dtype}: give floating-point activations")
    if "hidden" not in activations.dims:
        raise InvalidArgumentError(
            f"{name_in_messages(activations)} has dims {activations.dims}, and a lens reads the residual stream, of dimension hidden: give "
            "a variable such as resid or resid_mean, or rename the dimension, .rename(…='hidden')"
        )


def _check_top_k(top_k: Any) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer):
        raise InvalidTypeError(f"top_k={top_k!r:.60} is no whole number: give one, such as 5")
    if top_k < 1:
        raise InvalidArgumentError(f"top_k={top_k} keeps nothing: give 1 or more")
    return int(top_k)


def _check_fits(activations: xr.DataArray, lens: Lens, top_k: int) -> None:
    name, width = lens.loaded.name, activations.sizes["hidden"]
    if width != lens.width:
        raise InvalidArgumentError(
            f"{name_in_messages(activations)} has rows of {width} values, and the residual stream of {name!r} has {lens.width}: give the "
            "model that they are of, and whole rows"
        )
    if top_k > lens.vocabulary:
        raise InvalidArgumentError(f"top_k={top_k} is more than the {lens.vocabulary} logits of {name!r}: give at most {lens.vocabulary}")
    if "layer" in activations.coords and activations.coords["layer"].dtype.kind in "iu":
        deepest = int(activations.coords["layer"].max()) if activations.coords["layer"].size else 0
        if deepest >= lens.num_layers:
            raise LayerOutOfRangeError(
                f"{name_in_messages(activations)} has layer {deepest}, and {name!r} has layers 0 to {lens.num_layers - 1}: give the model "
                "that it is of"
            )


def _tokenizer_of(model: Any, tokenizer: Any, revision: str | None, trust_remote_code: bool) -> Any:
    if tokenizer is None:
        if not isinstance(model, str | os.PathLike):
            return None
        try:
            return models.load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
        except ModelNotFoundError:
            return None  # a folder with a model alone
    if isinstance(tokenizer, str | os.PathLike):
        return models.load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    if not hasattr(tokenizer, "decode"):
        raise InvalidTypeError(f"tokenizer is a {type(tokenizer).__name__}: give a transformers tokenizer, a folder or a hub id")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------- computing


def _blocks(sizes: Mapping[Hashable, int], rows: int) -> Iterator[dict[Hashable, Any]]:
    """Selections of at most `rows` rows, which together are all: some along the longest dimension, at one place of all others."""
    if not sizes:
        yield {}
        return
    longest = max(sizes, key=lambda dim: sizes[dim])
    others = [dim for dim in sizes if dim != longest]
    for place in np.ndindex(*(sizes[dim] for dim in others)):
        for start in range(0, sizes[longest], rows):
            yield {**dict(zip(others, place, strict=True)), longest: slice(start, start + rows)}


def _computed(
    variable: xr.Variable, dims: tuple[Hashable, ...], lens: Lens, top_k: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Values, token ids and log-probabilities, of rows that are read a block at a time."""
    sizes = {dim: variable.sizes[dim] for dim in dims}
    shape = (*sizes.values(), top_k)
    found = (np.empty(shape, np.float32), np.empty(shape, np.int32), np.empty(shape, np.float32))
    for chosen in _blocks(sizes, max(1, BLOCK_BYTES // (4 * lens.width))):
        block = variable.isel(chosen).transpose(..., "hidden").values
        rows = block.reshape(-1, lens.width)
        place = tuple(chosen[dim] for dim in dims)
        for array, part in zip(found, lens.top(rows, top_k), strict=True):
            array[place] = part.reshape(*block.shape[:-1], top_k)
    return found


def _packed(block: npt.NDArray[Any], lens: Lens, top_k: int) -> npt.NDArray[np.float64]:
    """Values, token ids and log-probabilities of one Dask block as one array; float64 holds all three exactly: shape (…, 3, top_k)."""
    parts = lens.top(block.reshape(-1, block.shape[-1]), top_k)
    return np.stack([part.astype(np.float64) for part in parts], axis=1).reshape(*block.shape[:-1], 3, top_k)


def _lazily(variable: xr.Variable, dims: tuple[Hashable, ...], lens: Lens, top_k: int) -> tuple[Any, Any, Any]:
    """As `_computed`, as Dask arrays of the same chunks."""
    whole: Any = variable.transpose(*dims, "hidden").chunk({"hidden": -1}).data
    axes = len(dims)
    packed = whole.map_blocks(
        _packed, lens, top_k, dtype=np.float64, drop_axis=[axes], new_axis=[axes, axes + 1],
        chunks=(*whole.chunks[:-1], (3,), (top_k,)), meta=np.empty((0,) * (axes + 2)),
    )  # fmt: skip
    return tuple(packed[..., number, :].astype(kind) for number, kind in enumerate((np.float32, np.int32, np.float32)))


class _Texts:
    """What token ids stand for; one at a time, so a piece of a letter is what the tokenizer makes of it alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __dask_tokenize__(self) -> tuple[str, int]:
        return "lmprobe_zarr texts", id(self.tokenizer)

    def __call__(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        known, inverse = np.unique(ids, return_inverse=True)
        # A head may be padded to more tokens than the tokenizer has.
        texts = ["" if token < 0 else str(self.tokenizer.decode([token]) or "") for token in known.tolist()]
        return np.array(texts, TEXT)[inverse.reshape(ids.shape)]
