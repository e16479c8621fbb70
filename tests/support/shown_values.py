"""Everything that a store shows, to compare before and after upkeep."""

from __future__ import annotations

import numpy as np
import xarray as xr
from crash_operations import Truth
from stores import GROUP, kept_tokens

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store

Shown = tuple[xr.Dataset, xr.Dataset | None, xr.DataArray]


def shown(store: Store) -> Shown:
    """All that a store shows, in memory."""
    view = store.view(GROUP)
    tokens = store.tokens().load() if view.variables("tokens") or view.columns("tokens") else None
    return store.dataset().load(), tokens, store.coverage()


def assert_same(store: Store, before: Shown) -> None:
    dataset, tokens, coverage = shown(store)
    xr.testing.assert_identical(dataset, before[0])
    assert dataset.dtypes == before[0].dtypes
    if before[1] is not None:
        assert tokens is not None
        xr.testing.assert_identical(tokens, before[1])
        assert tokens.dtypes == before[1].dtypes
    xr.testing.assert_identical(coverage, before[2])


def truth_of(store: Store, data: xr.Dataset | None = None, tokens: xr.Dataset | None = None) -> Truth:
    """What a store shows, or what views that were opened before give now."""
    if data is None:
        if not store.models():
            return {}
        data, tokens = store.dataset(), kept_tokens(store)
    assert tokens is not None
    data, tokens = data.load(), tokens.load()
    found: Truth = {}
    for i, text in enumerate(data.text.values.tolist()):
        row = data.isel(prompt=i)
        found[text] = {str(name): row[name].values for name in row.data_vars if not np.isnan(row[name].values).all()}
        found[text] |= {c: row[c].values.item() for c in ("label", "split") if c in row.coords and row[c].values == row[c].values != ""}
        for name in tokens.data_vars:
            mine = tokens[name].values[:, tokens.prompt.values == lz.prompt_hash(text)]
            if mine.size and not np.isnan(mine).all():
                found[text][str(name)] = mine
    return found
