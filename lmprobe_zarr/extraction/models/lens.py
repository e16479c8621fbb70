"""The logit lens of one model: its final norm and its head on rows of the residual stream. No block runs. Never a store.

The whole model's own forward is called, with blocks that return the rows they are given to return, so norm, scaling and caps are the
model's own code. Every row stands as a prompt of one token: nothing but the blocks mixes tokens. Before anything is computed, the rows
after the last block of a short prompt have to give the logits that the model gives for it by itself.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError, LmprobeZarrError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.batching import is_out_of_memory
from lmprobe_zarr.extraction.models.captured import logits_of
from lmprobe_zarr.extraction.models.forward import as_run
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.loading import as_it_is, depth_of, load_module
from lmprobe_zarr.extraction.models.loading_report import quiet_logging
from lmprobe_zarr.extraction.models.outputs import largest
from lmprobe_zarr.extraction.models.standing_in import Forms, form_of, standing_in
from lmprobe_zarr.extraction.models.structure import (
    first_line,
    first_tensor,
    input_device,
    plain_ids,
    without_cache,
)
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.extraction.models.wrappers import check_complete, uncompiled, unwrapped

__all__ = ["Lens", "load_lens"]

# Of a named model only so many blocks are loaded: enough to tell the list of blocks from others, and to compare with the model by itself.
LOADED_BLOCKS: Final = 2
COMPARED_TOKENS: Final = 5
# The largest difference to the model's own logits, relative to the largest of them, that is rounding.
ROUNDING: Final = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# With reduced precision of matrix products (TF32), float32 rounds more.
REDUCED: Final = 2e-2
# Bounds the logits that are in memory at a time, as float32.
LOGITS_BYTES: Final = 128 << 20


@dataclass(slots=True, kw_only=True)
class Lens:
    """Final norm and head of a model, ready to run on rows of its residual stream.

    Parameters
    ----------
    loaded : LoadedModel
    num_layers : int
        Blocks of the model, whether they were loaded or not.
    width, vocabulary : int
        Values of a row, and logits of a token.
    dtype, device
        Those of the rows which the model gives to its final norm.
    forms : dict
        What its blocks return beside their rows.
    identity : str
        Another one for every lens that was loaded, so that Dask never takes the results of two for the same.
    """

    loaded: LoadedModel
    num_layers: int
    width: int = 0
    vocabulary: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    forms: Forms = field(default_factory=dict)
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __dask_tokenize__(self) -> str:
        return self.identity

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits of each row: shapes (row, hidden) and (row, vocab)."""
        loaded = self.loaded
        held = rows.to(self.device, self.dtype)[:, None]
        with as_run(loaded), standing_in(loaded.located.blocks, held, self.forms):
            found = logits_of(_call(loaded, torch.full((len(rows), 1), _filler(loaded))))
        if found is None or found.shape[:2] != (len(rows), 1):
            raise _refused(loaded, f"for rows of shape {tuple(rows.shape)} its head gives {None if found is None else tuple(found.shape)}")
        return found[:, 0]

    def top(self, rows: npt.NDArray[Any], top_k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The largest logits of each row, descending, their token ids, and their log-probabilities: shapes (row, top_k).

        Rows with NaN, which stand for what is not stored, give NaN and the token id −1.
        """
        values = np.full((len(rows), top_k), np.nan, np.float32)
        log_probs, ids = values.copy(), np.full((len(rows), top_k), -1, np.int32)
        there = np.flatnonzero(~np.isnan(rows).any(axis=1))
        step = max(1, LOGITS_BYTES // (4 * self.vocabulary))
        for start in range(0, len(there), step):
            part = there[start : start + step]
            # A copy, because rows that are read only are no tensors.
            logits = self.logits(torch.from_numpy(np.array(rows[part])))
            with torch.no_grad():
                found, columns = largest(logits, top_k)
                wide = found.float()
                total = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
                values[part], log_probs[part] = wide.cpu().numpy(), (wide - total).cpu().numpy()
                ids[part] = torch.where(wide.isnan(), -1, columns).cpu().numpy()
        return values, ids, log_probs


# ------------------------------------------------------------------------------------------------------------------- calling


def _device(loaded: LoadedModel) -> torch.device:
    return input_device(loaded.located.body)


def _filler(loaded: LoadedModel) -> int:
    """A token id that is in no prompt of the comparison, so that a head which sees the tokens themselves is found out."""
    return plain_ids(loaded.located.body, COMPARED_TOKENS + 1)[-1]


def _whole(loaded: LoadedModel) -> nn.Module:
    whole = loaded.located.whole
    if whole is None:
        raise InvalidArgumentError(
            f"{loaded.name!r} ({type(loaded.module).__name__}) has no head, which a logit lens needs: give its name or folder, or the "
            "whole model, such as AutoModelForCausalLM loads it"
        )
    return whole


def _call(loaded: LoadedModel, ids: torch.Tensor) -> Any:
    whole = _whole(loaded)
    return whole(input_ids=ids.to(_device(loaded)), **without_cache(whole))


def _refused(loaded: LoadedModel, why: str) -> UnknownArchitectureError:
    return UnknownArchitectureError(
        f"{loaded.name!r} ({type(loaded.module).__name__}) gives no logit lens: {why}. Extract its logits with logits='all' instead"
    )


# ------------------------------------------------------------------------------------------------------------------- checking


def _checked(loaded: LoadedModel, num_layers: int) -> Lens:
    """The lens of a model, if the rows after its last block give its own logits."""
    _whole(loaded)
    lens = Lens(loaded=loaded, num_layers=num_layers)
    blocks, given = loaded.located.blocks, list[Any]()

    def keep(block: nn.Module, _args: Any, output: Any) -> None:
        lens.forms[id(block)] = form_of(output)
        if block is blocks[-1]:
            given.append(first_tensor(output))

    ids = torch.tensor([plain_ids(loaded.located.body, COMPARED_TOKENS + 1)[:-1]])
    with ExitStack() as stack:
        stack.enter_context(as_run(loaded))
        for block in {id(block): block for block in blocks}.values():
            stack.callback(block.register_forward_hook(keep).remove)
        right = logits_of(_call(loaded, ids))
    rows = given[-1] if given else None
    if right is None or right.shape[:2] != ids.shape:
        raise _refused(loaded, "the model gives no logits for every token")
    if rows is None or rows.ndim != 3 or rows.shape[:2] != ids.shape:
        shape = "nothing" if rows is None else f"the shape {tuple(rows.shape)}"
        raise _refused(loaded, f"its last block gives {shape} for {COMPARED_TOKENS} tokens, not one row for each")
    lens.dtype, lens.device = rows.dtype, rows.device
    lens.width, lens.vocabulary = rows.shape[-1], right.shape[-1]
    try:
        found = lens.logits(rows[0])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, LmprobeZarrError) or is_out_of_memory(error):
            raise
        raise _refused(loaded, f"its head does not run without its blocks ({first_line(error)})") from error
    with torch.no_grad():
        off = float((found.double() - right[0].double()).abs().max() / right.double().abs().max().clamp_min(1e-30))
    if not off <= _tolerance(loaded, right.dtype):
        raise _refused(
            loaded, f"the rows after its last block do not give its own logits, from which they differ by {off:.1g} of the largest"
        )
    return lens


def _tolerance(loaded: LoadedModel, dtype: torch.dtype) -> float:
    # A model may compute its logits in another dtype than its blocks.
    tolerance = max(ROUNDING.get(dtype, 1e-5), ROUNDING.get(getattr(torch, loaded.dtype, torch.float32), 1e-5))
    reduced = _device(loaded).type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return max(tolerance, REDUCED) if reduced or torch.get_float32_matmul_precision() != "highest" else tolerance


# -------------------------------------------------------------------------------------------------------------------- loading


def load_lens(
    model: str | os.PathLike[str] | nn.Module,
    *,
    revision: str | None = None,
    dtype: object = "auto",
    device: str | torch.device = "auto",
    modules: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> Lens:
    """The logit lens of a model, compared with the model by itself.

    Parameters
    ----------
    model : str, path or torch Module
        Of a folder or hub id, the first two blocks and everything outside of the blocks are loaded; the whole model where its
        configuration cannot be cut, or where a model of two blocks does not stand the comparison. An object is used as it is.
    revision, dtype, device, modules, trust_remote_code
        As for `load_model`.

    Raises
    ------
    UnknownArchitectureError
        Its blocks are not found, or the rows after its last block are not what its norm and head make logits of.
    InvalidArgumentError
        It has no head, or does not predict the next token; an argument for named models beside an object.
    ModelNotFoundError
        It cannot be loaded.
    """
    if isinstance(model, nn.Module):
        given = {"revision": revision is not None, "dtype": str(dtype) != "auto", "device": str(device) != "auto"}
        if strange := [name for name, is_given in given.items() if is_given]:
            raise InvalidArgumentError(f"{strange[0]}= is for a model that is loaded by its name, and this one is an object: leave it out")
        module = unwrapped(model)
        check_complete(module)
        with uncompiled(module), quiet_logging(), running(module):
            loaded = as_it_is(module, modules=modules)
        return _checked(loaded, loaded.num_layers)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    layers = depth_of(model, revision=revision)
    for depth in (LOADED_BLOCKS, None):
        if depth is not None and (layers is None or layers <= depth):
            continue
        try:
            loaded = _located(model, depth, modules, options)
            if depth is None or loaded.num_layers == depth:
                return _checked(loaded, loaded.num_layers if depth is None or layers is None else layers)
        except (LmprobeZarrError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # A model cut short may be one that cannot be built, or has no block of a kind that it needs.
            if depth is None or is_out_of_memory(error):
                raise
    raise AssertionError  # the whole model either returned or raised


def _located(
    model: str | os.PathLike[str], depth: int | None, modules: Mapping[str, str] | None, options: Mapping[str, Any]
) -> LoadedModel:
    module = load_module(model, depth=depth, **options)
    with quiet_logging(), running(module):
        return as_it_is(module, modules=modules, name=os.fspath(model))
