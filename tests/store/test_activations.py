from __future__ import annotations

from pathlib import Path
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


def test_what_is_written_again_is_counted_in_the_log(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def said(prompts: list[str], layer: int, **more: Any) -> str:
        caplog.clear()
        with caplog.at_level("INFO", "lmprobe_zarr.cache"):
            lz.write_activations(
                store, model="m", prompts=prompts, pooled={"resid_mean": {layer: np.ones((len(prompts), 4), "f4")}}, **more
            )
        return caplog.text

    assert "replaces" not in said(["a", "b", "c"], 0, coords={"label": [0, 1, 0]})
    assert "write_activations replaces values or columns of 2 prompts in" in said(["c", "d", "a"], 0)
    assert "replaces" not in said(["a", "b"], 1), "another layer"
    assert "replaces values or columns of 1 prompt in" in said(["b"], 2, coords={"label": [1]})
    store.annotate("m", {"note": {"d": 1}})
    assert "replaces values or columns of 1 prompt in" in said(["d"], 3, coords={"note": [2]})


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


# -- sites of any name and width -------------------------------------------------------------------------------------------


def test_sites_of_several_widths_are_written_in_one_call(store: Store) -> None:
    sites = {"resid": ragged(hidden=4), "neurons": ragged(hidden=9, seed=1), "attn_z": ragged(hidden=4, seed=2)}
    final = [array[0] for array in zip(*ragged(hidden=5, seed=3).values(), strict=True)]
    pooled: dict[str, Any] = {
        "neurons_max": {layer: np.stack([a.max(0) for a in arrays]) for layer, arrays in sites["neurons"].items()},
        "final_mean": np.stack([a.mean(0) for a in final]),
    }
    group = lz.write_activations(store, model="m", prompts=PROMPTS, activations={**sites, "final": final}, pooled=pooled)
    tokens, data = store.tokens("m", dtype="stored", prompts=PROMPTS), store.dataset("m", dtype="stored", prompts=PROMPTS)
    assert store.groups()[group].hidden_size == 4
    assert (tokens.resid.dims, tokens.attn_z.dims) == (("layer", "token", "hidden"),) * 2
    assert tokens.neurons.dims == ("layer", "token", "neurons_unit")
    assert tokens.final.dims == ("token", "final_unit")
    assert data.neurons_max.dims == ("layer", "prompt", "neurons_unit")
    assert data.final_mean.dims == ("prompt", "final_unit")
    for name, by_layer in sites.items():
        for layer, arrays in by_layer.items():
            np.testing.assert_array_equal(tokens[name].sel(layer=layer).values, np.concatenate(arrays))
            assert tokens[name].dtype == np.float16
    np.testing.assert_array_equal(tokens.final.values, np.concatenate(final))
    np.testing.assert_array_equal(data.final_mean.values, pooled["final_mean"])
    np.testing.assert_array_equal(data.neurons_max.sel(layer=2).values, pooled["neurons_max"][2])
    assert store.verify(progress=False).ok
    store.compact(progress=False)
    np.testing.assert_array_equal(lz.open_store(store.url).tokens("m", dtype="stored", prompts=PROMPTS).final.values, tokens.final.values)


def test_the_width_of_the_model_may_be_said_where_no_site_has_it(store: Store) -> None:
    pooled = {"neurons_mean": {0: np.ones((3, 9), "f4")}, "z_mean": {0: np.ones((3, 4), "f4")}}
    known = lz.write_activations(store, model="said", prompts=PROMPTS, pooled=pooled, hidden_size=4)
    assert store.groups()[known].hidden_size == 4
    assert store.dataset("said").z_mean.dims == ("layer", "prompt", "hidden")
    assert store.dataset("said").neurons_mean.dims == ("layer", "prompt", "neurons_unit")
    unknown = lz.write_activations(store, model="unsaid", prompts=PROMPTS, pooled=pooled)
    assert store.groups()[unknown].hidden_size is None
    assert store.dataset("unsaid").z_mean.dims == ("layer", "prompt", "z_unit")
    for size in (0, True, 1.5, "4"):
        with pytest.raises(InvalidArgumentError, match="is no width: give a whole number"):
            lz.write_activations(store, model="bad", prompts=PROMPTS, pooled=pooled, hidden_size=size)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"differ in hidden size \({'hidden_size': 5, 'resid_mean': 4}\).*name another site"):
        lz.write_activations(store, model="bad", prompts=PROMPTS, pooled={"resid_mean": {0: np.ones((3, 4), "f4")}}, hidden_size=5)
    assert store.models() == ["said", "unsaid"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"activations": {"a b": ragged()}}, "'a b' is no site: .*letters a to z"),
        ({"activations": {"z_mean": ragged()}}, "'z_mean' is no site: .*without a pooling"),
        ({"activations": {"hidden": ragged()}}, "'hidden' is no site: .*a name of the format itself"),
        ({"activations": {"token_id": ragged()}}, "a name of the format itself"),
        ({"activations": {1: ragged()}}, "1 is no site"),
        ({"activations": {"z" * 65: ragged()}}, "at most 64"),
        ({"pooled": {"z": {0: np.ones((3, 4))}}}, "'z' is no pooled variable: give <site>_<pooling>"),
        ({"pooled": {"layer_mean": {0: np.ones((3, 4))}}}, "'layer_mean' is no pooled variable: .*a name of the format itself"),
        ({"activations": {"z": ragged((0,))}, "pooled": {"z_mean": {0: np.ones((3, 5))}}}, "'z' is 4 wide and 'z_mean' is 5"),
        ({"activations": {"z": ragged(), "Z": ragged()}}, "'z' and 'Z' differ by case alone"),
        ({"activations": {"z": ragged()}, "coords": {"z": [1, 2, 3]}}, "'z' is a column of coords= and a variable"),
        ({"activations": {"z": ragged(), "y": ragged((0, 1))}}, "hold different layers.*a call of its own"),
        ({"activations": {"mlp": [np.ones((n, 4)) for n in COUNTS]}}, "'mlp' has layers: give {layer: …}"),
    ],
)  # fmt: skip
def test_names_and_widths_that_cannot_be_are_refused_and_nothing_is_written(store: Store, given: Any, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=problem):
        lz.write_activations(store, model="m", prompts=PROMPTS, **given)
    assert not lz.open_store(store.url).groups()


@pytest.mark.model
def test_tensors_of_any_site_keep_their_numbers(store: Store) -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pooled = {"z_mean": {0: values}, "norm_mean": values.float().numpy(), "half_mean": {0: values.half()}}
    lz.write_activations(store, model="m", prompts=PROMPTS, pooled=pooled, hidden_size=32)
    data = store.dataset("m", prompts=PROMPTS)
    assert data.z_mean.attrs["stored_dtype"] == "bfloat16"
    np.testing.assert_array_equal(data.z_mean.values[0], values.float().numpy())
    assert torch.equal(data.z_mean.lz.to_torch()[0], values)
    np.testing.assert_array_equal(data.norm_mean.values, values.float().numpy())
    assert store.dataset("m", dtype="stored").half_mean.dtype == np.float16


def test_what_is_pooled_over_a_part_of_the_tokens_is_named_as_extraction_names_it(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    pooled = {"resid_mean_assistant": {0: np.ones((2, 4), np.float32)}, "wide_mean_assistant": {0: np.ones((2, 6), np.float32)}}
    lz.write_activations(store, model="m", prompts=["a", "b"], pooled=pooled)
    ds = store.dataset()
    assert ds.resid_mean_assistant.dims == ("layer", "prompt", "hidden")
    assert ds.wide_mean_assistant.dims == ("layer", "prompt", "wide_unit")
