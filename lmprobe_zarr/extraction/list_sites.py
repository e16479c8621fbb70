"""`list_sites`: what can be taken of a model, as a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from lmprobe_zarr.batch import describe_layers
from lmprobe_zarr.extraction import models

if TYPE_CHECKING:
    import torch

__all__ = ["list_sites"]


def list_sites(
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    device: Any = "auto",
    modules: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """Every site of a model that :func:`extract` can take, by two passes over a few tokens.

    Parameters
    ----------
    model : str, path or torch Module
        As for :func:`extract`; a loaded model needs neither `name` nor `tokenizer` here.
    revision, dtype, device, modules, trust_remote_code : optional
        As for :func:`extract`.

    Returns
    -------
    DataFrame
        One row for each built-in site, then one for what each module is given (``path:input``) and one for what it returns (``path``):
        ``site``, the built-in name, or empty; ``path``, for ``sites={name: path}``; ``layers``, empty outside of the blocks; ``width``,
        values of a token; ``nbytes``, bytes of a token in one layer as the model computes it. Modules that have no row for every token, or
        that one pass calls more often than there are layers of them, are left out.

    Raises
    ------
    ModelNotFoundError, UnknownArchitectureError
        The model cannot be loaded or run, or its blocks are not found.

    Examples
    --------
    >>> lz.list_sites("gpt2").query("path.str.startswith('attn')")  # doctest: +SKIP
    """
    given: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    defaults = {"revision": None, "dtype": "auto", "device": "auto", "trust_remote_code": False}
    options = {name: value for name, value in given.items() if value != defaults[name]} | ({"modules": modules} if modules else {})
    rows = models.site_rows(model, **options)
    return pd.DataFrame(
        {
            "site": [row.site for row in rows],
            "path": [row.path for row in rows],
            "layers": [describe_layers(row.layers) if row.layers else "" for row in rows],
            "width": [row.width for row in rows],
            "nbytes": [row.nbytes for row in rows],
        }
    )
