"""Files that vLLM and hs-connectors write here and now, imported and compared with one plain pass of transformers: ``make test-engines``.

They need an environment of their own, whose Python `LMPROBE_ZARR_ENGINES` names. Files that were made so are in ``tests/data``, and every
run of the tests imports them.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from engine_states import KINDS, LAYER_IDS, PROMPTS, plain_states, save_model, write_states

import lmprobe_zarr as lz

PYTHON = os.environ.get("LMPROBE_ZARR_ENGINES", "")

pytestmark = [pytest.mark.model, pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-engines")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_vllm_writes_is_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama")
    made = write_states(str(Path(PYTHON).absolute()), model, tmp_path / "states", kind)
    store = lz.open_store(tmp_path / "store")
    summary = lz.import_vllm(tmp_path / "states", store, model="tiny", layer_ids=LAYER_IDS, prompts=PROMPTS, strict=True, progress=False)
    assert summary.imported == len(PROMPTS)
    answers = made["generated"] if kind == "outputs" else [[0]] * len(PROMPTS)
    whole = [[*ids, *answer[:-1]] for ids, answer in zip(PROMPTS, answers, strict=True)]
    toks = store.tokens("tiny", prompts=whole)
    assert toks.token_id.values.tolist() == [i for ids in whole for i in ids]
    assert toks.generated.values.tolist() == [int(i >= len(p)) for p, ids in zip(PROMPTS, whole, strict=True) for i in range(len(ids))]
    assert toks.layer.values.tolist() == [layer - 1 for layer in LAYER_IDS if layer]
    ends = np.cumsum([0, *map(len, whole)])
    for ids, (a, b) in zip(whole, pairwise(ends.tolist()), strict=True):
        expected = plain_states(model, ids)[LAYER_IDS]
        found = np.concatenate([toks.embed.values[None, a:b], toks.resid.values[:, a:b]])
        if kind == "fp8":
            # Three bits of mantissa, and one scale for all values of a token, of which the largest is 448.
            scales = np.abs(expected).max(axis=(0, 2), keepdims=True) / 448
            assert (np.abs(found - expected) <= np.abs(expected) * 2**-4 * 1.001 + scales * 2**-9).all()
        else:
            assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
