from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store.store import Store

PROMPTS = ["a", "b", "c"]
COUNTS = [2, 1, 4]


def ragged(layers: tuple[int, ...] = (0, 2), hidden: int = 4, seed: int = 0) -> dict[int, list[npt.NDArray[Any]]]:
    rng = np.random.default_rng(seed)
    return {layer: [rng.standard_normal((n, hidden)).astype("f2") for n in COUNTS] for layer in layers}


def test_ones_own_activations_come_back(store: Store) -> None:
    acts = ragged()
    pooled = {layer: np.stack([a.mean(0) for a in arrays]) for layer, arrays in acts.items()}
    ids = [[1, 2], [3], [4, 5, 6, 7]]
    given: dict[str, Any] = {"activations": {"resid": acts}, "pooled": {"resid_mean": pooled}}
    group = lz.write_activations(store, model="mine", prompts=PROMPTS, token_ids=ids, coords={"label": [1, 0, 1]}, **given)
    tokens, data = store.tokens("mine"), store.dataset(group=group)
    for layer, arrays in acts.items():
        for text, array in zip(PROMPTS, arrays, strict=True):
            np.testing.assert_array_equal(tokens.resid.sel(layer=layer, prompt=lz.prompt_hash(text)).values, array)
        np.testing.assert_array_equal(data.resid_mean.sel(layer=layer).values, pooled[layer])
    assert tokens.token_id.values.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert data.label.values.tolist() == [1, 0, 1]


def test_embeddings_have_no_layer(store: Store) -> None:
    arrays = [np.full((n, 4), n, "f4") for n in COUNTS]
    lz.write_activations(store, model="m", prompts=PROMPTS, activations={"embed": arrays, "resid": ragged()}, pooled=None)
    assert store.tokens().embed.dims == ("token", "hidden")
    np.testing.assert_array_equal(store.tokens().embed.values, np.concatenate(arrays))


def test_token_ids_are_prompts_too(store: Store) -> None:
    lz.write_activations(store, model="m", prompts=[[1, 2], [3]], pooled={"resid_mean": {0: np.ones((2, 4), "f4")}})
    assert store.dataset().prompt.values.tolist() == [lz.prompt_hash([1, 2]), lz.prompt_hash([3])]


@pytest.mark.model
def test_pairs_are_prompts_with_both_texts(store: Store) -> None:
    pairs = [("Rain", "Regen"), ("Snow", "Schnee")]
    values = np.arange(8, dtype="f4").reshape(2, 4)
    lz.write_activations(store, model="m", prompts=pairs, pooled={"resid_mean": {0: values}})
    data = store.dataset(prompts=pairs[::-1])
    assert (data.text.values.tolist(), data.encoder_text.values.tolist()) == (["Schnee", "Regen"], ["Snow", "Rain"])
    np.testing.assert_array_equal(data.resid_mean.isel(layer=0), values[::-1])
    for bad in [("Rain", "Regen \ud83d"), ("Rain \ud83d", "Regen")]:
        with pytest.raises(InvalidArgumentError, match=r"prompts\[1\] .* holds a lone surrogate"):
            lz.write_activations(store, model="m", prompts=[("a", "b"), bad], pooled={"resid_mean": {0: values}})
    with pytest.raises(InvalidArgumentError, match="coords names 'encoder_text'"):
        lz.write_activations(store, model="m", prompts=pairs, pooled={"resid_mean": {0: values}}, coords={"encoder_text": ["x", "y"]})


def test_torch_tensors_are_taken_bfloat16_exactly(store: Store) -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(3, 4).to(torch.bfloat16)
    lz.write_activations(store, model="m", prompts=PROMPTS, pooled={"resid_mean": {0: values}})
    data = store.dataset().resid_mean
    assert data.attrs["stored_dtype"] == "bfloat16"
    assert torch.equal(data.isel(layer=0).lz.to_torch(), values)


POOLED = {"resid_mean": {0: np.ones((3, 4), "f4")}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to store"),
        ({"pooled": {"resid": {0: np.ones((3, 4), "f4")}}}, "no pooled variable"),
        ({"pooled": {"resid_mode": {0: np.ones((3, 4), "f4")}}}, "no pooled variable"),
        ({"activations": {"resid_mean": ragged()}}, "no site"),
        ({"pooled": {"resid_mean": np.ones((3, 4), "f4")}}, "give {layer"),
        ({"pooled": {"resid_mean": {0: np.ones((2, 4), "f4")}}}, "3 prompts"),
        ({"pooled": {"resid_mean": {0: np.ones((3, 4), "f4"), 1: np.ones((3, 5), "f4")}}}, "differ in shape"),
        ({"pooled": {"resid_mean": {0: np.ones((3, 4), "i4")}}}, "int32"),
        ({"pooled": {**POOLED, "attn_mean": {1: np.ones((3, 4), "f4")}}}, "different layers"),
        ({"activations": {"resid": {0: ragged()[0][:2]}}}, "2 arrays for 3 prompts"),
        ({"activations": {"resid": {0: ragged()[0], 1: ragged()[0][::-1]}}}, "tokens for prompt number 0"),
        ({"activations": {"resid": {0: [np.ones(4, "f4")] * 3}}}, "prompt number 0 has shape"),
        ({"activations": {"resid": {0: [np.ones((0, 4), "f4")] * 3}}}, "no tokens"),
        ({"pooled": POOLED, "coords": {"label": [1, 2]}}, "label has 2 values for 3 prompts"),
        ({"pooled": POOLED, "coords": {"prompt": [1, 2, 3]}}, "name of the format"),
        ({"pooled": POOLED, "coords": {"label": [1, None, "3"]}}, "several kinds, the integer 1 in row 0 and the text '3' in row 2"),
        ({"pooled": POOLED, "num_layers": 0}, "num_layers=0"),
        ({"pooled": {"embed_mean": np.ones((3, 4), "f4")}, "num_layers": True}, "num_layers=True"),
        ({"pooled": {"resid_mean": {0: np.ones((3, 0), "f4")}}}, "holds no values"),
        ({"pooled": {"resid_mean": {0: np.ones(3, "f4")}}}, r"give \(rows, hidden\)"),
        ({"pooled": {"embed_mean": 1.0}}, r"give \(rows, hidden\)"),
        ({"pooled": {"resid_mean": {2**70: np.ones((3, 4), "f4")}}}, "layer numbers"),
        ({"pooled": POOLED, "provenance": {"seed": 10**30}}, "beyond 64 bits"),
        ({"activations": {"resid": ragged()}, "token_ids": [[1], [2, 3], [4, 5, 6, 7]]}, "1 ids for prompt number 0, which has 2 tokens"),
        ({"activations": {"resid": ragged()}, "token_ids": [[1] * 7]}, "1 lists for 3 prompts"),
        ({"pooled": POOLED, "coords": {"label": [1, 0.5, 2**60]}}, "too large"),
        ({"pooled": POOLED, "coords": {"label": [1, 0.5, 10**400]}}, "too large"),
        ({"pooled": POOLED, "coords": {"day": np.array(["2026-01-01T00:00:00.0000000000001"] * 3, "M8[as]")}}, "not exact in ns"),
    ],
)
def test_unsuitable_arguments_are_refused_before_anything_is_written(store: Store, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        lz.write_activations(store, model="m", prompts=PROMPTS, **arguments)
    assert store.storage.list("") == []


def test_repeated_prompts_and_a_bare_text_are_refused(store: Store) -> None:
    with pytest.raises(InvalidArgumentError, match="a prompt occurs twice"):
        lz.write_activations(store, model="m", prompts=["a", "b", "a"], pooled=POOLED)
    with pytest.raises(InvalidTypeError, match="one text"):
        lz.write_activations(store, model="m", prompts="abc", pooled=POOLED)
    for column in ({"a": 1, "b": 2, "c": 3}, {1, 2, 3}, "abc", pd.Series([1, 2, 3], index=[2, 1, 0])):
        with pytest.raises(InvalidTypeError, match="column 'label' is a"):
            lz.write_activations(store, model="m", prompts=PROMPTS, pooled=POOLED, coords={"label": column})
    with pytest.raises(InvalidArgumentError, match=r"column 'label' is a Series .* prompts\[0\]"):
        lz.write_activations(
            store, model="m", prompts=PROMPTS, pooled=POOLED, coords={"label": pd.Series([1, 2, 3], index=["x", "y", "z"])}
        )
    with pytest.raises(InvalidTypeError, match="activations is a list"):
        lz.write_activations(store, model="m", prompts=PROMPTS, activations=[1])  # type: ignore[arg-type]
    assert store.storage.list("") == []
    with pytest.raises(InvalidTypeError, match="not float"):
        lz.write_activations(store, model="m", prompts=[1.0, 2.0, 3.0], pooled=POOLED)  # type: ignore[list-item]
    with pytest.raises(InvalidArgumentError, match="no name of a model"):
        lz.write_activations(store, model=" ", prompts=PROMPTS, pooled=POOLED)
