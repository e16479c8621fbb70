"""Names of TransformerLens' hooks, as SAELens and others keep them, in the words of this package."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["site_of_hook"]

_SITES: Final = {
    "hook_resid_post": "resid", "hook_resid_mid": "resid_mid", "hook_attn_out": "attn", "hook_mlp_out": "mlp", "attn.hook_z": "heads",
    "mlp.hook_post": "neurons",
}  # fmt: skip


def site_of_hook(hook: object) -> tuple[str | None, int | None]:
    """Site and layer of a hook such as ``blocks.3.hook_resid_post``; None for the site of one that is no site of this package.

    ``hook_resid_pre`` is the output of the block before; that of block 0 is ``embed``, which has no layer.
    """
    if hook == "hook_embed":
        return "embed", None
    found = re.fullmatch(r"blocks\.(\d{1,5})\.([a-z_.]+)", str(hook))
    if found is None:
        return None, None
    layer, name = int(found[1]), found[2]
    if name == "hook_resid_pre":
        return ("resid", layer - 1) if layer else ("embed", None)
    return _SITES.get(name), layer
