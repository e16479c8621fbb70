"""Going on from rows that are stored: the blocks up to one layer give what is known of them, and only those after it are computed.

Whether a model can be run so is seen by running it: a short batch, plain and continued, has to give the same. Never a store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from torch import nn

from lmprobe_zarr.batch import Outputs
from lmprobe_zarr.errors import LmprobeZarrError
from lmprobe_zarr.extraction.models.architectures import Place
from lmprobe_zarr.extraction.models.batching import is_out_of_memory
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected
from lmprobe_zarr.extraction.models.conduct import Conduct, Layout
from lmprobe_zarr.extraction.models.forward import KnownRows, ModelCall, run_forward_pass
from lmprobe_zarr.extraction.models.loading import LoadedModel
from lmprobe_zarr.extraction.models.paired import PairedBody
from lmprobe_zarr.extraction.models.standing_in import Forms, form_of
from lmprobe_zarr.extraction.models.structure import plain_ids
from lmprobe_zarr.typing import Array, Ints

__all__ = ["StoredRows", "forms_for", "is_rounded"]

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
    unusual = conduct.layout != Layout() or conduct.extra_rows or conduct.layers != tuple(range(len(blocks)))
    if shared or unusual or isinstance(loaded.located.body, PairedBody) or not (head or layer + 1 < len(blocks)):
        return None
    plain = CaptureRequest(
        layers=tuple(range(len(blocks))), places={"resid": Place(modules=dict(enumerate(blocks)))}, poolings=(), keep_tokens=True,
        outputs=Outputs(logits="all") if head else Outputs(),
    )  # fmt: skip
    after = replace(plain, layers=plain.layers[layer + 1 :])
    if not after.layers:
        after = replace(after, places={}, keep_tokens=False)
    every = plain_ids(loaded.located.body, LONG + SHORT)
    prompts: list[Ints] = [np.array(every[:LONG], np.int64)]
    if conduct.padding not in ("equal", "single"):
        prompts.append(np.array(every[LONG:], np.int64))
    forms: Forms = {}

    def note(block: nn.Module, _args: Any, output: Any) -> None:
        forms[id(block)] = form_of(output)

    try:
        with ExitStack() as stack:
            for block in blocks[: layer + 1]:
                stack.callback(block.register_forward_hook(note).remove)
            right: Collected = run_forward_pass(loaded, ModelCall.of(loaded, plain, conduct), plain, prompts)
        known = KnownRows(layer=layer, rows=right.tokens["resid"][layer], forms=forms)
        found: Collected = run_forward_pass(loaded, ModelCall.of(loaded, after, conduct), after, prompts, known=known)
    except (LmprobeZarrError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return None
    tolerance = ROUNDING.get(loaded.dtype, 1e-5)
    same = True
    if after.layers:
        rows, others = right.tokens["resid"][layer + 1 :].double(), found.tokens["resid"].double()
        off = (rows - others).norm(dim=-1) / rows.norm(dim=-1).clamp_min(1e-30)
        same = bool((off <= tolerance).all())
    if head:
        logits, others = right.tokens["logits"].double(), found.tokens["logits"].double()
        same = same and bool(((logits - others).abs() <= tolerance * logits.abs().max()).all())
    return forms if same else None
