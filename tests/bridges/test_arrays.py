"""Other people's files, each made here as its writer makes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from foreign_caches import of_bits, safetensors_bytes, to_bits

import lmprobe_zarr as lz
from lmprobe_zarr.bridges.imports import import_npy, import_tensors, import_vllm
from lmprobe_zarr.bridges.vllm_files import float8_e4m3
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError
from lmprobe_zarr.store.store import Store

Array = npt.NDArray[Any]
PROMPTS = ["one", "two and more", "three"]
COUNTS = [3, 5, 2]
BOUNDS = [0, 3, 8, 10]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "store")


@pytest.fixture
def values() -> Array:
    """(layer, token, hidden) of all prompts."""
    return np.random.default_rng(0).standard_normal((2, 10, 4)).astype("float32")


def check(store: Store, values: Array, layers: Sequence[int] = (0, 1), prompts: Sequence[Any] = PROMPTS) -> None:
    toks = store.tokens("m", prompts=prompts)
    assert toks.layer.values.tolist() == list(layers)
    np.testing.assert_array_equal(toks.resid.values, values)
    assert store.dataset("m", prompts=prompts).n_tokens.values.tolist() == COUNTS


# ------------------------------------------------------------------------------------------------------------------ vLLM


def add_hidden_states(folder: Path, values: Array, *, brain: bool = True, ids: bool = True) -> list[list[int]]:
    folder.mkdir(exist_ok=True)
    numbers = []
    for i, (a, b) in enumerate(pairwise(BOUNDS)):
        states = np.ascontiguousarray(values[:, a:b].transpose(1, 0, 2))
        numbers.append(list(range(100 * i, 100 * i + b - a)))
        tensors: dict[str, Array] = {"hidden_states": to_bits(states) if brain else states}
        if ids:
            tensors["token_ids"] = np.array(numbers[-1], np.int64)
        (folder / f"hs_{i}.safetensors").write_bytes(safetensors_bytes(tensors))
    return numbers


def test_hidden_states_of_vllm_are_imported_and_known_by_their_token_ids(tmp_path: Path, store: Store, values: Array) -> None:
    values = of_bits(to_bits(values))
    ids = add_hidden_states(tmp_path / "hs", values)
    (tmp_path / "hs" / "hs_0.safetensors.lock").touch()
    summary = import_vllm(tmp_path / "hs", store, model="m", layers=[2, 7], progress=False, strict=True)
    assert summary.imported == 3
    check(store, values, [2, 7], ids)
    toks = store.tokens("m", prompts=ids)
    assert toks.resid.attrs["stored_dtype"] == "bfloat16"
    assert toks.token_id.values.tolist() == [i for numbers in ids for i in numbers]


@pytest.mark.parametrize("given", [PROMPTS, dict(enumerate(PROMPTS))])
def test_hidden_states_of_vllm_take_the_texts_that_are_given(tmp_path: Path, store: Store, values: Array, given: Any) -> None:
    add_hidden_states(tmp_path / "hs", values, brain=False, ids=False)
    summary = import_vllm(tmp_path / "hs", store, model="m", layers=[0, 1], prompts=given, progress=False)
    check(store, values)
    assert store.dataset("m", prompts=PROMPTS).text.values.tolist() == PROMPTS
    assert summary.notes[0].count == 3, "no token ids"


def test_bad_files_of_vllm_are_skipped_with_a_reason(tmp_path: Path, store: Store, values: Array) -> None:
    folder = tmp_path / "hs"
    add_hidden_states(folder, values)
    (folder / "hs_3.safetensors").write_bytes(b"")
    bad: dict[int, dict[str, Array]] = {}
    bad[4] = {"hidden_states": np.ones((3, 1, 4), "float32")}
    bad[5] = {"other": np.ones(3, "float32")}
    bad[6] = {"hidden_states": np.ones((3, 2, 4), "float32")}
    bad[7] = {"hidden_states": np.ones((3, 2, 9), "float32"), "token_ids": np.array([1, 2, 3])}
    for number, tensors in bad.items():
        (folder / f"hs_{number}.safetensors").write_bytes(safetensors_bytes(tensors))
    summary = import_vllm(folder, store, model="m", layers=[0, 1], progress=False)
    assert summary.imported == 3
    assert sorted(n for r in summary.skipped for n in r.names) == [f"hs_{i}.safetensors" for i in (3, 4, 5, 6, 7)]
    assert len(summary.skipped) == 5, "each for its own reason"


@pytest.mark.parametrize(
    "given",
    [{"layers": []}, {"layers": [1, 1]}, {"layers": [-1, 0]}, {"layer_ids": []}, {"layer_ids": [2, 2]}, {"layer_ids": [-1]}, {},
     {"layers": [0], "layer_ids": [1]}],
)  # fmt: skip
def test_slots_need_a_layer_each(tmp_path: Path, store: Store, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="slot"):
        import_vllm(tmp_path, store, model="m", **given)


@pytest.mark.parametrize("layers", [[7, 4, 1, 0], [1, 0], [0, 2, 1]])
def test_layers_that_do_not_ascend_are_refused_since_slots_do(tmp_path: Path, store: Store, values: Array, layers: list[int]) -> None:
    add_hidden_states(tmp_path / "hs", values)
    with pytest.raises(InvalidArgumentError, match=r"the slots of hidden_states ascend.*\n?.*layer_ids="):
        import_vllm(tmp_path / "hs", store, model="m", layers=layers)
    assert not store.models()


@pytest.mark.parametrize("layer_ids", [[3, 8], [8, 3]])
def test_layer_ids_are_those_of_vllm_in_any_order(tmp_path: Path, store: Store, values: Array, layer_ids: list[int]) -> None:
    ids = add_hidden_states(tmp_path / "hs", values, brain=False)
    import_vllm(tmp_path / "hs", store, model="m", layer_ids=layer_ids, progress=False)
    check(store, values, [2, 7], ids)


def test_layer_id_0_is_the_embeddings(tmp_path: Path, store: Store) -> None:
    three = np.random.default_rng(1).standard_normal((3, 10, 4)).astype("float32")
    ids = add_hidden_states(tmp_path / "hs", three, brain=False)
    import_vllm(tmp_path / "hs", store, model="m", layer_ids=[5, 0, 1], progress=False)
    toks = store.tokens("m", prompts=ids)
    assert toks.layer.values.tolist() == [0, 4]
    np.testing.assert_array_equal(toks.resid.values, three[1:])
    np.testing.assert_array_equal(toks.embed.values, three[0])
    assert toks.embed.dims == ("token", "hidden")
    only = lz.open_store(tmp_path / "only")
    add_hidden_states(tmp_path / "one", three[:1], brain=False)
    import_vllm(tmp_path / "one", only, model="m", layer_ids=[0], progress=False)
    np.testing.assert_array_equal(only.tokens("m", prompts=ids).embed.values, three[0])


def renamed(folder: Path, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        (folder / f"hs_{i}.safetensors").rename(folder / name)


@pytest.mark.parametrize("names", [["0-a2427cb0", "1-00c0ffee", "2-1234abcd"], ["10-a2427cb0", "hs_9", "2-1234abcd"], ["a", "b", "hs_1x"]])
def test_files_as_vllm_names_them_and_of_any_name_are_imported(tmp_path: Path, store: Store, values: Array, names: list[str]) -> None:
    ids = add_hidden_states(tmp_path / "hs", values, brain=False)
    renamed(tmp_path / "hs", [f"{name}.safetensors" for name in names])
    (tmp_path / "hs" / f"{names[0]}.safetensors.lock").touch()
    summary = import_vllm(tmp_path / "hs", store, model="m", layers=[0, 1], progress=False, strict=True)
    assert (summary.found, summary.imported) == (3, 3)
    check(store, values, prompts=ids)


def test_texts_go_to_the_numbers_of_vllms_own_names_and_never_to_one_of_two(tmp_path: Path, store: Store, values: Array) -> None:
    folder = tmp_path / "hs"
    add_hidden_states(folder, values, brain=False)
    renamed(folder, ["2-1234abcd.safetensors", "0-a2427cb0.safetensors", "1-00c0ffee.safetensors"])
    import_vllm(folder, store, model="m", layers=[0, 1], prompts={2: PROMPTS[0], 0: PROMPTS[1], 1: PROMPTS[2]}, progress=False)
    check(store, values)
    (folder / "2-ffffffff.safetensors").write_bytes((folder / "2-1234abcd.safetensors").read_bytes())
    other = lz.open_store(tmp_path / "other")
    summary = import_vllm(folder, other, model="m", layers=[0, 1], prompts={2: "a", 0: "b", 1: "c"}, progress=False)
    assert summary.imported == 2
    (skipped,) = summary.skipped
    assert sorted(skipped.names) == ["2-1234abcd.safetensors", "2-ffffffff.safetensors"]
    assert "one number" in skipped.text


def test_a_file_without_a_number_takes_no_text(tmp_path: Path, store: Store, values: Array) -> None:
    ids = add_hidden_states(tmp_path / "hs", values, brain=False)
    renamed(tmp_path / "hs", ["a.safetensors", "b.safetensors", "c.safetensors"])
    import_vllm(tmp_path / "hs", store, model="m", layers=[0, 1], prompts={-1: "one", 0: "two"}, progress=False)
    check(store, values, prompts=ids)


def test_a_lock_without_its_file_is_named(tmp_path: Path, store: Store, values: Array) -> None:
    add_hidden_states(tmp_path / "hs", values)
    for name in ("3-deadbeef.safetensors.lock", "0-a2427cb0.safetensors.lock", "hs_0.safetensors.lock", "notes.lock"):
        (tmp_path / "hs" / name).touch()
    summary = import_vllm(tmp_path / "hs", store, model="m", layers=[0, 1], progress=False)
    assert summary.imported == 3
    (skipped,) = summary.skipped
    assert sorted(skipped.names) == ["0-a2427cb0.safetensors", "3-deadbeef.safetensors"]
    assert "nobody holds it" in skipped.text


def test_codes_of_8_bits_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(float8_e4m3(), expected)
    assert float8_e4m3().max(where=~np.isnan(expected), initial=0) == 448
    assert np.isnan(expected).sum() == 2


@pytest.mark.parametrize("per_slot", [False, True])
def test_values_of_8_bits_are_multiplied_with_their_scales(tmp_path: Path, store: Store, per_slot: bool) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "hs"
    folder.mkdir()
    expected = []
    for i, n in enumerate(COUNTS):
        codes = rng.integers(0, 127, (n, 2, 4)).astype(np.uint8) | (rng.integers(0, 2, (n, 2, 4)) << 7).astype(np.uint8)
        scales = rng.uniform(0.01, 3, (n, 2 if per_slot else 1, 1)).astype(np.float32)
        header = {
            "hidden_states": {"dtype": "F8_E4M3", "shape": [n, 2, 4], "data_offsets": [0, 8 * n]},
            "hidden_states_scales": {"dtype": "F32", "shape": list(scales.shape), "data_offsets": [8 * n, 8 * n + scales.nbytes]},
            "token_ids": {"dtype": "I64", "shape": [n], "data_offsets": [8 * n + scales.nbytes, 16 * n + scales.nbytes]},
        }
        text = json.dumps(header).encode()
        ids = np.arange(100 * i, 100 * i + n, dtype=np.int64)
        data = len(text).to_bytes(8, "little") + text + codes.tobytes() + scales.tobytes() + ids.tobytes()
        (folder / f"{i}-0000000{i}.safetensors").write_bytes(data)
        sign, exponent, mantissa = codes >> 7, (codes >> 3 & 15).astype(float), (codes & 7) / 8
        sizes = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2 ** (exponent - 7))
        expected.append(((1 - 2.0 * sign) * sizes).astype(np.float32) * scales)
    summary = import_vllm(folder, store, model="m", layer_ids=[1, 2], progress=False)
    assert summary.imported == 3
    assert summary.notes[0].count == 3, "values of 8 bits"
    ids_of = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(COUNTS)]
    np.testing.assert_array_equal(store.tokens("m", prompts=ids_of).resid.values, np.concatenate(expected).swapaxes(0, 1))


def test_values_of_8_bits_without_scales_are_not_guessed(tmp_path: Path, store: Store) -> None:
    header = {"hidden_states": {"dtype": "F8_E4M3", "shape": [2, 2, 4], "data_offsets": [0, 16]},
              "token_ids": {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]}}  # fmt: skip
    text = json.dumps(header).encode()
    (tmp_path / "hs").mkdir()
    (tmp_path / "hs" / "hs_0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    summary = import_vllm(tmp_path / "hs", store, model="m", layers=[0, 1], progress=False)
    assert summary.imported == 0
    assert summary.skipped[0].names == ("hs_0.safetensors",)


# --------------------------------------------------------------------------------------------------- one array per layer


@pytest.mark.parametrize("offsets", [BOUNDS, COUNTS], ids=["offsets", "counts"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_folder_of_npy_files_is_imported(tmp_path: Path, store: Store, values: Array, offsets: list[int], dtype: str) -> None:
    for i in (0, 1):
        np.save(tmp_path / f"layer_{i}.npy", values[i].astype(dtype))
    np.save(tmp_path / "offsets.npy", np.array(offsets))
    import_npy(tmp_path, store, model="m", prompts=PROMPTS, progress=False, strict=True)
    check(store, values.astype(dtype))
    assert store.tokens("m", dtype="stored").resid.dtype == dtype


def test_a_folder_of_memory_maps_is_imported(tmp_path: Path, store: Store, values: Array) -> None:
    for i in (0, 1):
        to_bits(values[i]).tofile(tmp_path / f"block{i + 4}.bin")
    np.save(tmp_path / "starts.npy", np.array(BOUNDS, np.int32))
    import_npy(
        tmp_path, store, model="m", prompts=PROMPTS, name="block{layer}.bin", offsets="starts.npy", dtype="bfloat16", hidden_size=4,
        progress=False,
    )  # fmt: skip
    check(store, of_bits(to_bits(values)), [4, 5])
    assert store.tokens("m").resid.attrs["stored_dtype"] == "bfloat16"


def test_pooled_arrays_need_no_offsets(tmp_path: Path, store: Store, values: Array) -> None:
    np.save(tmp_path / "layer_3.npy", values[0, :3])
    import_npy(tmp_path, store, model="m", prompts=[*PROMPTS[:2], [1, 2, 3]], variable="resid_mean", progress=False)
    ds = store.dataset("m", prompts=[*PROMPTS[:2], [1, 2, 3]])
    np.testing.assert_array_equal(ds.resid_mean.sel(layer=3), values[0, :3])
    assert ds.text.values.tolist() == [*PROMPTS[:2], ""]


def save(folder: Path, name: str, array: Any) -> None:
    np.save(folder / name, array)


BAD_NPY: dict[str, tuple[Any, type[Exception], str]] = {
    "too few rows": (lambda f: save(f, "layer_1.npy", np.ones((9, 4), "f4")), InvalidArgumentError, "9 rows"),
    "a pickle": (lambda f: save(f, "layer_1.npy", np.array([{}, 1], object)), CorruptFileError, "order"),
    "columns first": (lambda f: save(f, "layer_1.npy", np.asfortranarray(np.ones((10, 4), "f4"))), CorruptFileError, "ascontiguous"),
    "big-endian": (lambda f: save(f, "layer_1.npy", np.ones((10, 4), ">f4")), CorruptFileError, "order"),
    "a list": (lambda f: save(f, "layer_1.npy", np.ones(10, "f4")), CorruptFileError, "shape"),
    "whole numbers": (lambda f: save(f, "layer_1.npy", np.ones((10, 4), "i8")), InvalidArgumentError, "floats"),
    "another file": (lambda f: (f / "layer_1.npy").write_bytes(b"PNG and so on"), CorruptFileError, "not a .npy"),
    "cut off": (lambda f: (f / "layer_1.npy").write_bytes((f / "layer_1.npy").read_bytes()[:-1]), CorruptFileError, "cut off"),
    "no offsets": (
        lambda f: (f / "offsets.npy").unlink(),
        InvalidArgumentError,
        "rows for 3 prompts.*resid_mean.*first row of each prompt",
    ),
    "offsets of others": (lambda f: save(f, "offsets.npy", np.array([0, 10])), InvalidArgumentError, "2 numbers for 3"),
    "offsets backwards": (lambda f: save(f, "offsets.npy", np.array([0, 8, 3, 10])), InvalidArgumentError, "ascending"),
    "offsets of floats": (
        lambda f: save(f, "offsets.npy", np.array([0.0, 3, 8, 10])),
        CorruptFileError,
        "array of integers",
    ),
}


@pytest.mark.parametrize("what", BAD_NPY)
def test_arrays_that_do_not_fit_stop_the_run_before_anything_is_written(tmp_path: Path, store: Store, values: Array, what: str) -> None:
    folder = tmp_path / "npy"
    folder.mkdir()
    for i in (0, 1):
        np.save(folder / f"layer_{i}.npy", values[i])
    np.save(folder / "offsets.npy", np.array(BOUNDS))
    spoil, error, message = BAD_NPY[what]
    spoil(folder)
    with pytest.raises(error, match=message):
        import_npy(folder, store, model="m", prompts=PROMPTS, progress=False)
    assert store.models() == []


def test_a_file_instead_of_a_folder_raises_an_error(tmp_path: Path, store: Store, values: Array) -> None:
    np.save(tmp_path / "layer_0.npy", values[0])
    with pytest.raises(InvalidArgumentError, match=r"layer_0\.npy is a file: give the folder that holds it"):
        import_npy(tmp_path / "layer_0.npy", store, model="m", prompts=PROMPTS, progress=False)


def test_a_prompt_without_tokens_is_skipped(tmp_path: Path, store: Store, values: Array) -> None:
    np.save(tmp_path / "layer_0.npy", values[0])
    np.save(tmp_path / "offsets.npy", np.array([0, 3, 3, 10]))
    summary = import_npy(tmp_path, store, model="m", prompts=PROMPTS, progress=False)
    assert summary.imported == 2
    assert "without a single token" in summary.skipped[0].text


def test_prompts_given_twice_count_once(tmp_path: Path, store: Store, values: Array) -> None:
    np.save(tmp_path / "layer_0.npy", values[0, :3])
    summary = import_npy(tmp_path, store, model="m", prompts=["a", "b", "a"], variable="resid_mean", progress=False)
    assert summary.imported == 2
    assert "twice" in summary.skipped[0].text
    np.testing.assert_array_equal(store.dataset("m", prompts=["a"]).resid_mean[0, 0], values[0, 0])


# ------------------------------------------------------------------------------------------------------ one file of tensors


def test_tensors_of_one_file_are_imported_by_a_mapping(tmp_path: Path, store: Store, values: Array) -> None:
    tensors = {f"blocks.{i}.hook_resid_post": values[i] for i in (0, 1)}
    tensors |= {"starts": np.array(BOUNDS), "mean.3": values[0, :3], "emb": values[1], "weights": np.ones(5, "float32")}
    (tmp_path / "all.safetensors").write_bytes(safetensors_bytes(tensors))
    mapping: dict[str, Any] = {"resid": "blocks.{layer}.hook_resid_post", "resid_mean": {3: "mean.3"}, "embed": "emb"}
    import_tensors(tmp_path / "all.safetensors", store, model="m", prompts=PROMPTS, mapping=mapping, offsets="starts", progress=False)
    check(store, values)
    np.testing.assert_array_equal(store.dataset("m", prompts=PROMPTS).resid_mean.sel(layer=3), values[0, :3])
    np.testing.assert_array_equal(store.tokens("m", prompts=PROMPTS).embed, values[1])


def test_padded_tensors_are_imported_by_a_mask(tmp_path: Path, store: Store, values: Array) -> None:
    padded, mask = np.full((2, 3, 6, 4), 99, "float32"), np.zeros((3, 6), np.int64)
    for i, (a, b) in enumerate(pairwise(BOUNDS)):
        places = slice(6 - (b - a), 6) if i % 2 else slice(0, b - a)  # left and right
        padded[:, i, places], mask[i, places] = values[:, a:b], 1
    tensors = {"h0": padded[0], "h1": padded[1], "mask": mask}
    (tmp_path / "all.safetensors").write_bytes(safetensors_bytes(tensors))
    import_tensors(
        tmp_path / "all.safetensors", store, model="m", prompts=PROMPTS, mapping={"resid": "h{layer}"}, mask="mask", progress=False
    )
    check(store, values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": {"resid": {0: "absent"}}, "offsets": "starts"}, "no tensor absent"),
        ({"mapping": {"resid": "nothing.{layer}"}, "offsets": "starts"}, "the mapping names"),
        ({"mapping": {"resid": {0: "h"}}}, "give the rows of each prompt"),
        ({"mapping": {"resid": {0: "h"}}, "mask": "starts"}, "expected \\(prompt, position\\)"),
        ({"mapping": {"resid_mean": {0: "h"}}}, "10 rows, and the prompts need 3"),
        ({"mapping": {"resid_mean": {0: "starts"}}}, "at least two dimensions"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(tmp_path: Path, store: Store, values: Array, options: dict[str, Any], message: str) -> None:
    (tmp_path / "all.safetensors").write_bytes(safetensors_bytes({"h": values[0], "starts": np.array(BOUNDS)}))
    with pytest.raises(InvalidArgumentError, match=message):
        import_tensors(tmp_path / "all.safetensors", store, model="m", prompts=PROMPTS, progress=False, **options)
    assert store.models() == []
