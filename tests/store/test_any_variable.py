"""Variables of any name and width, and columns of tokens beyond those of extraction, as format 2 holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store.format import GroupInfo

GROUP = GroupInfo(model="acme/free", num_layers=2, hidden_size=8)
COUNTS = np.array([3, 4, 2])
TEXTS = ["one", "two", "three"]


def batch(**token_columns: Any) -> TokenBatch:
    rng = np.random.default_rng(0)
    n = int(COUNTS.sum())
    tokens: dict[str, Any] = {
        "resid": rng.standard_normal((2, n, 8)).astype(np.float32),
        "attn_z": rng.standard_normal((2, n, 8)).astype(np.float32),
        "mlp_hidden_7B": rng.standard_normal((2, n, 32)).astype(np.float16),
        "head_scores": rng.standard_normal((2, n, 3)).astype(np.float32),
    }
    return TokenBatch(
        sha256=[prompt_sha256(text) for text in TEXTS], text=TEXTS, n_tokens=COUNTS, layers=(0, 1), tokens=tokens,
        prompts={"mlp_hidden_7B_mean": rng.standard_normal((2, 3, 32)).astype(np.float16)}, token_columns=token_columns,
    )  # fmt: skip


def test_each_width_has_a_dimension_of_its_own_and_the_models_is_hidden(root: str) -> None:
    written = batch()
    lz.open_store(root).write(GROUP, written)
    store = lz.open_store(root)
    tokens, prompts = store.tokens("acme/free", dtype="stored"), store.dataset("acme/free", dtype="stored")
    assert tokens.attn_z.dims == tokens.resid.dims == ("layer", "token", "hidden")
    assert tokens.mlp_hidden_7B.dims == ("layer", "token", "mlp_hidden_7B_unit")
    assert tokens.head_scores.dims == ("layer", "token", "head_scores_unit")
    assert prompts.mlp_hidden_7B_mean.dims == ("layer", "prompt", "mlp_hidden_7B_unit")
    for name, values in written.tokens.items():
        np.testing.assert_array_equal(tokens[name].values, values)
    np.testing.assert_array_equal(prompts.mlp_hidden_7B_mean.values, written.prompts["mlp_hidden_7B_mean"])
    np.testing.assert_array_equal(
        tokens.mlp_hidden_7B.sel(prompt=lz.prompt_hash("two"), layer=1).values, written.tokens["mlp_hidden_7B"][1, 3:7]
    )
    assert store.verify(progress=False).ok
    store.compact(progress=False)


def test_role_turn_and_generated_are_columns_of_tokens(tmp_path: Path) -> None:
    columns = {"role": np.array([0, 1, 2, 0, 1, 1, 2, 0, 2]), "turn": np.arange(9) % 2, "generated": np.array([0, 0, 1, 0, 0, 1, 1, 0, 1])}
    store = lz.open_store(tmp_path / "acts")
    store.write(GROUP, batch(**columns))
    store.write(GROUP, TokenBatch(sha256=[prompt_sha256("four")], n_tokens=np.array([1]), layers=(0, 1),
                                  tokens={name: values[:, :1] for name, values in batch().tokens.items()}))  # fmt: skip
    tokens = lz.open_store(tmp_path / "acts").tokens("acme/free")
    for name in ("role", "turn"):
        assert tokens[name].dims == ("token",)
        np.testing.assert_array_equal(tokens[name].values, [*columns[name], -1], err_msg="-1 where a prompt has none")
    assert tokens.generated.dtype == bool
    np.testing.assert_array_equal(tokens.generated.values, [*(columns["generated"] == 1), False])
    answer = tokens.mlp_hidden_7B.sel(generated=True)
    np.testing.assert_array_equal(answer.values, batch().tokens["mlp_hidden_7B"].astype(np.float32)[:, columns["generated"] == 1])


@pytest.mark.parametrize("name", ["", "7th", "a/b", "../x", "a-b", "ä", "a b"])
def test_a_name_that_is_no_name_of_an_array_is_refused_and_nothing_is_visible(root: str, name: str) -> None:
    store = lz.open_store(root)
    values = np.ones((2, 9, 8), np.float32)
    with pytest.raises(InvalidArgumentError, match="is no name of a variable"):
        store.write(GROUP, TokenBatch(sha256=[prompt_sha256(t) for t in TEXTS], n_tokens=COUNTS, layers=(0, 1), tokens={name: values}))
    assert not lz.open_store(root).models()
