"""Going on from rows that are stored: the blocks up to one layer give what is known of them, and only those after it are computed.

Whether a model can be run so is seen by running it: a short batch, plain and continued, has to give the same. Never a store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from lmprobe_zarr.batch import Outputs
from lmprobe_zarr.errors import LmprobeZarrError
from lmprobe_zarr.extraction.models.architectures import Place
from lmprobe_zarr.extraction.models.batching import is_out_of_memory
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected
from lmprobe_zarr.extraction.models.conduct import Conduct, Layout
from lmprobe_zarr.extraction.models.forward import KnownRows, ModelCall, run_forward_pass
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.paired import PairedBody
from lmprobe_zarr.extraction.models.standing_in import Forms, form_of
from lmprobe_zarr.extraction.models.streamed import not_streamed
from lmprobe_zarr.extraction.models.structure import first_line, plain_ids
from lmprobe_zarr.typing import Array, Ints

__all__ = ["BlockForms", "StoredRows", "forms_by_block", "forms_for", "is_rounded"]

# What a model's own code may raise where blocks are given other values than it expects.
ERRORS: Final = (LmprobeZarrError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

# The largest difference of a row, relative to the length of its vector, or of logits to the largest of them, that is rounding.
ROUNDING: Final = {"float64": 1e-9, "float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
LONG: Final = 7
SHORT: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """The residual stream of all tokens after one layer, as it is stored.

    Parameters
    ----------
    layer : int
    read : callable
        Gives the rows of prompts by their digests, one prompt after the other: (token, hidden).
    """

    layer: int
    read: Callable[[Sequence[str]], Array]


def is_rounded(values: Array, dtype: str) -> bool:
    """Whether values were rounded after a model computed them in `dtype`: the last bit of the fraction is zero in every one of them.

    Rounding to fewer bits always leaves it zero. Of values as computed, half have a one there.
    """
    if dtype == "bfloat16":  # stored as float32
        last, bits = 1 << 16, values.astype(np.float32, copy=False).view(np.uint32)
    elif dtype == values.dtype.name and dtype in ("float16", "float32", "float64"):
        last, bits = 1, values.view(f"u{values.dtype.itemsize}")
    else:
        return True
    return not bool((bits & bits.dtype.type(last)).any())


def forms_for(loaded: LoadedModel, conduct: Conduct, layer: int, *, head: bool) -> Forms | None:
    """What the blocks up to `layer` return beside their rows, if the model can be continued from there; None if it cannot.

    Examined once for each loaded model, layer and whether logits are needed.
    """
    key = f"continues {layer} {head}"
    if key not in loaded.checked:
        loaded.checked[key] = _examine(loaded, conduct, layer, head)
    found: Forms | None = loaded.checked[key]
    return found


def _examine(loaded: LoadedModel, conduct: Conduct, layer: int, head: bool) -> Forms | None:
    blocks = loaded.located.blocks
    shared = {id(block) for block in blocks[: layer + 1]} & {id(block) for block in blocks[layer + 1 :]}
    if shared or _unusual(loaded, conduct) or not (head or layer + 1 < len(blocks)):
        return None
    plain = _plain_request(loaded, head)
    after = replace(plain, layers=plain.layers[layer + 1 :])
    if not after.layers:
        after = replace(after, places={}, keep_tokens=False)
    prompts = _examples(loaded, conduct)
    try:
        right, forms = _with_forms(loaded, conduct, plain, prompts, layer + 1)
        known = KnownRows(layer=layer, rows=right.tokens["resid"][layer], forms=forms)
        found: Collected = run_forward_pass(loaded, ModelCall.of(loaded, after, conduct), after, prompts, known=known)
    except ERRORS as error:
        if is_out_of_memory(error):
            raise
        return None
    same = not after.layers or _same_rows(loaded, right.tokens["resid"][layer + 1 :], found.tokens["resid"])
    return forms if same and (not head or _same_logits(loaded, right, found)) else None


def _unusual(loaded: LoadedModel, conduct: Conduct) -> bool:
    """Whether the blocks of a model return more, or something else, than one row for each token."""
    every = conduct.layers == tuple(range(len(loaded.located.blocks)))
    return conduct.layout != Layout() or conduct.extra_rows or not every or isinstance(loaded.located.body, PairedBody)


def _plain_request(loaded: LoadedModel, head: bool) -> CaptureRequest:
    """The rows of all tokens after every block, and all logits."""
    blocks = loaded.located.blocks
    return CaptureRequest(
        layers=tuple(range(len(blocks))), places={"resid": Place(modules=dict(enumerate(blocks)))}, poolings=(), keep_tokens=True,
        outputs=Outputs(logits="all") if head else Outputs(),
    )  # fmt: skip


def _examples(loaded: LoadedModel, conduct: Conduct) -> list[Ints]:
    """Two short prompts, or one where prompts of different lengths do not share a batch."""
    every = plain_ids(loaded.located.body, LONG + SHORT)
    together = conduct.padding not in ("equal", "single")
    return [np.array(ids, np.int64) for ids in (every[:LONG], every[LONG:])[: 2 if together else 1]]


def _with_forms(
    loaded: LoadedModel, conduct: Conduct, request: CaptureRequest, prompts: Sequence[Ints], blocks: int
) -> tuple[Collected, Forms]:
    """A plain pass, and what the first blocks return in it beside their rows."""
    forms: Forms = {}

    def note(block: nn.Module, _args: Any, output: Any) -> None:
        forms[id(block)] = form_of(output)

    with ExitStack() as stack:
        for block in loaded.located.blocks[:blocks]:
            stack.callback(block.register_forward_hook(note).remove)
        return run_forward_pass(loaded, ModelCall.of(loaded, request, conduct), request, prompts), forms


def _same_rows(loaded: LoadedModel, right: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether rows are equal but for rounding. What is not finite in the plain pass is not compared."""
    right, found = right.double(), found.double()
    off = (right - found).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-30)
    off = torch.where(torch.isfinite(right).all(dim=-1), off, torch.zeros_like(off))
    return bool((off <= ROUNDING.get(loaded.dtype, 1e-5)).all())


def _same_logits(loaded: LoadedModel, right: Collected, found: Collected) -> bool:
    logits, others = right.tokens["logits"].double(), found.tokens["logits"].double()
    finite = torch.isfinite(logits)
    most = logits[finite].abs().max() if bool(finite.any()) else 0.0
    return bool(((logits - others)[finite].abs() <= ROUNDING.get(loaded.dtype, 1e-5) * most).all())


# ------------------------------------------------------------------------------------------------------ block by block


@dataclass(frozen=True, slots=True)
class BlockForms:
    """What is known of a model that runs block by block: what its blocks return beside their rows, and the bytes of a row."""

    forms: Forms
    row_nbytes: int


def forms_by_block(loaded: LoadedModel, conduct: Conduct, *, head: bool) -> BlockForms:
    """What the blocks of a model whose weights are streamed return beside their rows; examined once for each loaded model.

    Block by block, a short batch has to give the rows, and the logits, of a plain pass over the same blocks. Which weights these have
    does not matter for that.

    Raises
    ------
    UnknownArchitectureError
        It gives others: blocks need more from those before them than rows, or a pass changes weights.
    """
    key = f"by block {head}"
    if key not in loaded.checked:
        loaded.checked[key] = _examine_blocks(loaded, conduct, head)
    found: BlockForms = loaded.checked[key]
    return found


def _examine_blocks(loaded: LoadedModel, conduct: Conduct, head: bool) -> BlockForms:
    streamed = loaded.streamed
    assert streamed is not None  # noqa: S101 - asked of such models only
    if loaded.located.blocks != streamed.blocks:
        raise not_streamed(
            loaded.name, f"its blocks {loaded.located.paths.get('layers')!r} are not those of {streamed.path!r}, or run twice"
        )
    if _unusual(loaded, conduct):
        raise not_streamed(loaded.name, "its blocks return more, or something else, than one row for each token")
    before = streamed.digest()
    try:
        found = _compare_blocks(loaded, conduct, head)
    except ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise not_streamed(loaded.name, f"it does not run block by block ({first_line(error)})") from error
    if isinstance(found, str):
        raise not_streamed(loaded.name, found)
    if streamed.digest() != before:
        raise not_streamed(loaded.name, "a pass changes its weights")
    return found


def _compare_blocks(loaded: LoadedModel, conduct: Conduct, head: bool) -> BlockForms | str:
    """What blocks return beside their rows, or why a model does not run block by block."""
    layers, plain, prompts = range(len(loaded.located.blocks)), _plain_request(loaded, head), _examples(loaded, conduct)
    right, forms = _with_forms(loaded, conduct, plain, prompts, len(layers))
    known: KnownRows | None = None
    nbytes = 0
    for layer in layers:
        one = replace(plain, layers=(layer,), outputs=Outputs(), ends=layer)
        found: Collected = run_forward_pass(loaded, ModelCall.of(loaded, one, conduct), one, prompts, known=known)
        rows = found.handed_on
        if rows is None or not _same_rows(loaded, right.tokens["resid"][layer : layer + 1], rows[None]):
            return f"block {layer} needs more from the blocks before it than their rows"
        known, nbytes = KnownRows(layer=layer, rows=rows, forms=forms), rows.shape[-1] * rows.element_size()
    if head:
        last = replace(plain, layers=(), places={}, keep_tokens=False)
        if not _same_logits(loaded, right, run_forward_pass(loaded, ModelCall.of(loaded, last, conduct), last, prompts, known=known)):
            return "its head needs more than the rows of its last block"
    return BlockForms(forms, nbytes)
