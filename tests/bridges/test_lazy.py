"""An lmprobe cache opened as lazy datasets: they equal those of a store, and only the selected bytes are read."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from foreign_caches import MODEL, add_model, add_prompt, of_bits, prompt_tensors, safetensors_bytes, sha16, state_of
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from parquet import with_pyarrow
from paths import DATA

import lmprobe_zarr as lz
from lmprobe_zarr.bridges.files import LocalFiles, Want
from lmprobe_zarr.bridges.imports import import_safetensors
from lmprobe_zarr.bridges.legacy import open_legacy
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, LayerOutOfRangeError, MissingPromptsError, ModelNotStoredError

Array = npt.NDArray[Any]
TEXTS = ["first", "the second", "third", "fourth", "fifth"]


def fill(root: Path, dtype: str = "float32") -> dict[str, dict[str, Array]]:
    """Prompts of several lengths, paddings and layers, some with pooled values, perplexities, ids and logits."""
    folder = add_model(root)
    truth = {}
    rng = np.random.default_rng(9)
    for i, text in enumerate(TEXTS):
        n, layers = 2 + i, (0, 1, 4) if i != 3 else (1,)
        tensors = prompt_tensors(i, n=n, pad=(i % 3, i % 2), layers=layers, dtype=dtype, pooled=("mean",) if i % 2 == 0 else ())
        if i == 4:
            tensors["attention_mask"][0, 3] = 0
            n -= 1
        ppl = {"perplexity": rng.standard_normal(3).astype("f4"), "token_ids": np.arange(n) + 10 * i}
        ppl["token_perplexity"] = rng.standard_normal(n - 1).astype("float32")
        k = 2 + i % 2
        logits = {
            "logits_top_k_values": rng.standard_normal((1, 1, k)).astype("f4"),
            "logits_top_k_indices": rng.integers(0, 9, (1, 1, k)).astype("i4"),
        }
        add_prompt(folder, text, tensors, perplexity=ppl if i != 1 else None, logits=logits if i != 2 else None)
        truth[text] = tensors
    return truth


def assert_same(a: xr.Dataset, b: xr.Dataset) -> None:
    """Equal in everything but the order of variables and where they came from."""
    assert set(a.variables) == set(b.variables)
    assert set(a.coords) == set(b.coords)
    assert dict(a.sizes) == dict(b.sizes)
    for name in a.variables:
        assert a[name].dims == b[name].dims, name
        assert a[name].dtype == b[name].dtype, name
        assert a[name].attrs == b[name].attrs, name
        np.testing.assert_array_equal(a[name].values, b[name].values, err_msg=str(name))
    assert {name: type(index) for name, index in a.xindexes.items()} == {name: type(index) for name, index in b.xindexes.items()}


def both(tmp_path: Path, level: str, **options: Any) -> tuple[xr.Dataset, xr.Dataset]:
    store = lz.open_store(tmp_path / "store")
    stored = store.dataset(MODEL, **options) if level == "prompts" else store.tokens(MODEL, **options)
    return open_legacy(tmp_path / "cache", MODEL, level=level, **options), stored  # type: ignore[arg-type]


@pytest.fixture(params=["float32", "bfloat16"])
def filled(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A cache, and a store that it was imported into."""
    fill(tmp_path / "cache", request.param)
    import_safetensors(tmp_path / "cache", tmp_path / "store", progress=False, strict=True)
    return tmp_path


@pytest.mark.few(6)
@pytest.mark.parametrize("level", ["prompts", "tokens"])
@pytest.mark.parametrize(
    "options",
    [
        {"prompts": TEXTS},
        {"prompts": ["fourth", "first", "fourth"]},
        {"prompts": TEXTS, "layers": [4, 1]},
        {"prompts": ["the second", sha16("fifth")], "layers": -1},
        {"prompts": TEXTS, "layers": slice(0, 2)},
    ],
)
def test_it_is_the_dataset_that_a_store_shows(filled: Path, level: str, options: dict[str, Any]) -> None:
    legacy, stored = both(filled, level, **options)
    assert_same(legacy, stored)
    assert legacy.attrs["hidden_size"] == stored.attrs["hidden_size"] == 3


@pytest.mark.parametrize("level", ["prompts", "tokens"])
def test_without_prompts_it_shows_all_in_the_order_of_the_manifest(filled: Path, level: str) -> None:
    legacy, stored = both(filled, level)
    assert list(dict.fromkeys(legacy.prompt.values.tolist())) == [sha16(t) for t in TEXTS]
    for h in legacy.prompt.values:
        assert_same(legacy.sel(prompt=[h]), stored.sel(prompt=[h]))


def test_read_values_equal_those_in_the_files(tmp_path: Path) -> None:
    truth = fill(tmp_path / "cache")
    toks = open_legacy(tmp_path / "cache", MODEL, level="tokens")
    for text, tensors in truth.items():
        for layer in (0, 1, 4):
            kept = tensors["attention_mask"][0] == 1
            expected = tensors[f"layer_{layer}"][0, kept] if f"layer_{layer}" in tensors else np.full((kept.sum(), 3), np.nan)
            np.testing.assert_array_equal(toks.resid.sel(layer=layer, prompt=sha16(text)), expected)
    assert toks.resid.dims == ("layer", "token", "hidden")


def test_read_values_are_the_same_on_a_system_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    test_read_values_equal_those_in_the_files(tmp_path)


def test_it_is_sliced_as_a_store_is(filled: Path) -> None:
    legacy, stored = both(filled, "tokens", prompts=TEXTS)
    h, k = sha16("third"), sha16("first")
    for a, b in [(legacy, stored)]:
        np.testing.assert_array_equal(a.resid.sel(prompt=[h, k]), b.resid.sel(prompt=[h, k]))
        np.testing.assert_array_equal(a.resid.sel(position=0, layer=1), b.resid.sel(position=0, layer=1))
        np.testing.assert_array_equal(a.resid[::-1, ::-2, 1], b.resid[::-1, ::-2, 1])
        np.testing.assert_array_equal(a.resid[[0, 2], [5, 0, 5], :][..., [2, 0]], b.resid[[0, 2], [5, 0, 5], :][..., [2, 0]])
        assert_same(a.where(a.prompt_length > 4, drop=True), b.where(b.prompt_length > 4, drop=True))
        np.testing.assert_array_equal(a.lz.at(-1).resid.values, b.lz.at(-1).resid.values)
        np.testing.assert_array_equal(a.lz.pool("mean").resid_mean.values, b.lz.pool("mean").resid_mean.values)
    with pytest.raises(IndexError):
        legacy.resid[:, 1000].values  # noqa: B018


INDEXER = st.one_of(st.slices(6), st.integers(-6, 5), st.lists(st.integers(-6, 5), max_size=5).map(lambda n: np.array(n, np.int64)))


@given(
    rows=INDEXER,
    layers=st.one_of(st.slices(3), st.integers(0, 2), st.lists(st.integers(-3, 2), max_size=3).map(lambda n: np.array(n, np.int64))),
)
def test_any_selection_gives_what_numpy_gives(tmp_path_factory: pytest.TempPathFactory, rows: Any, layers: Any) -> None:
    root = tmp_path_factory.getbasetemp() / "legacy-oracle"
    if not root.exists():
        add_prompt(add_model(root), "a", prompt_tensors(0, n=4, layers=(0, 1, 2)))
        add_prompt(add_model(root), "b", prompt_tensors(1, n=2, layers=(0, 1, 2)))
    truth = np.concatenate(
        [np.stack([prompt_tensors(i, n=n, layers=(0, 1, 2))[f"layer_{j}"][0, 2:] for j in range(3)]) for i, n in ((0, 4), (1, 2))], axis=1
    )
    array = open_legacy(root, MODEL, level="tokens").resid.variable
    expected = xr.Variable(("layer", "token", "hidden"), truth)[layers, rows]
    np.testing.assert_array_equal(array[layers, rows].values, expected.values)


def test_only_the_bytes_that_are_selected_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_model(tmp_path)
    for i in range(3):
        add_prompt(folder, f"p{i}", prompt_tensors(i, n=50, hidden=64, layers=tuple(range(6)), pooled=("mean",)))
    toks, ds = (open_legacy(tmp_path, MODEL, level=level) for level in ("tokens", "prompts"))
    requests: list[tuple[str, int]] = []
    fill_ = LocalFiles.fill

    def count(self: LocalFiles, key: str, wants: list[Want]) -> None:
        requests.extend((key, want.buffer.nbytes) for want in wants if want.start > 0)
        fill_(self, key, wants)

    monkeypatch.setattr(LocalFiles, "fill", count)
    h, name = sha16("p1"), f"{folder.name}/{sha16('p1')}.safetensors"
    np.testing.assert_array_equal(
        toks.resid.sel(prompt=h, layer=3), prompt_tensors(1, n=50, hidden=64, layers=tuple(range(6)))["layer_3"][0, 2:]
    )
    assert requests == [(name, 50 * 64 * 4)]
    requests.clear()
    toks.resid.sel(prompt=h, layer=3, position=[7, 9]).load()
    assert requests == [(name, 3 * 64 * 4)], "from the first to the last of the rows"
    requests.clear()
    ds.resid_mean.sel(prompt=h, layer=2).load()
    assert requests == [(name, 64 * 4)]


class RangedFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Memory that notes how many bytes of which files are requested."""

    protocol = "ranged"
    requests: list[tuple[str, int | None, int | None]] = []  # noqa: RUF012

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.requests.append((path.rsplit("/", 1)[-1], start, end))
        data: bytes = super().cat_file(path, start=start, end=end, **options)
        return data


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    folder = add_model(tmp_path)
    for i in range(4):
        add_prompt(folder, f"p{i}", prompt_tensors(i, n=400, hidden=256, layers=tuple(range(6)), pooled=("mean",)))
    fsspec.register_implementation("ranged", RangedFileSystem, clobber=True)
    url = f"ranged://{uuid.uuid4().hex}"
    fsspec.filesystem("ranged").put(str(tmp_path) + "/", url, recursive=True)
    yield url
    fsspec.filesystem("ranged").rm(url, recursive=True)


def test_on_an_object_store_ranges_are_fetched_and_never_whole_files(url: str) -> None:
    RangedFileSystem.requests.clear()
    toks = open_legacy(url, MODEL, level="tokens")
    assert len([a for a in RangedFileSystem.requests if a[0].endswith("safetensors")]) == 4, "one request for each header"
    RangedFileSystem.requests.clear()
    layer = toks.resid.sel(layer=3).values
    np.testing.assert_array_equal(layer[400:800], prompt_tensors(1, n=400, hidden=256, layers=tuple(range(6)))["layer_3"][0, 2:])
    fetched = sum((b or 0) - (a or 0) for _, a, b in RangedFileSystem.requests)
    assert all(a is not None and b is not None for _, a, b in RangedFileSystem.requests)
    assert fetched < 1.05 * layer.nbytes
    assert len(RangedFileSystem.requests) == 8, "for each file its header, to see that it is the same still, and the layer"


def test_it_can_be_computed_by_dask_and_sent_to_other_processes(filled: Path) -> None:
    legacy, stored = both(filled, "tokens", prompts=TEXTS)
    lazy = legacy.chunk({"layer": 1, "token": 4})
    with dask.config.set(scheduler="threads"):
        np.testing.assert_array_equal(lazy.resid.max("token").compute(), stored.resid.max("token"))
    again = pickle.loads(pickle.dumps(legacy))  # noqa: S301 — what was pickled a moment ago
    assert_same(again, stored)


def test_entries_that_cannot_be_read_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    for i in range(3):
        add_prompt(folder, f"p{i}", prompt_tensors(i))
    add_prompt(folder, "bad", b"junk")
    add_prompt(folder, "wide", prompt_tensors(7, hidden=9))
    ds = open_legacy(tmp_path, MODEL, level="tokens")
    assert len(set(ds.prompt.values)) == 3
    assert sha16("bad") in ds.attrs["skipped"]
    assert sha16("wide") in ds.attrs["skipped"]
    with pytest.raises(MissingPromptsError, match="bad"):
        open_legacy(tmp_path, MODEL, prompts=["p0", "bad"])


def test_a_file_that_was_exchanged_is_an_error_and_never_other_values(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    path = add_prompt(folder, "a", prompt_tensors(0))
    toks = open_legacy(tmp_path, MODEL, level="tokens")
    path.write_bytes(safetensors_bytes(prompt_tensors(1, layers=(0, 1, 2))))
    with pytest.raises(CorruptFileError, match="changed since"):
        toks.resid.load()


def test_missing_models_prompts_and_layers_raise_errors(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    add_prompt(folder, "a", prompt_tensors(0))
    add_prompt(folder, "pooled only", {"pooled_mean_layer_0": np.ones((1, 3), "float32")})
    with pytest.raises(ModelNotStoredError, match="another"):
        open_legacy(tmp_path, "another")
    with pytest.raises(MissingPromptsError, match="absent"):
        open_legacy(tmp_path, MODEL, prompts=["a", "absent"])
    with pytest.raises(MissingPromptsError, match="without tokens"):
        open_legacy(tmp_path, MODEL, level="tokens", prompts=["a", "pooled only"])
    with pytest.raises(LayerOutOfRangeError, match="layer 7"):
        open_legacy(tmp_path, MODEL, layers=[0, 7])
    with pytest.raises(InvalidArgumentError, match="level"):
        open_legacy(tmp_path, MODEL, level="layers")  # type: ignore[arg-type]
    assert open_legacy(tmp_path, MODEL, level="tokens").sizes["token"] == 4


def test_opening_and_reading_in_place_change_nothing() -> None:
    before = state_of(DATA / "lmprobe-0.10.3")
    open_legacy(DATA / "lmprobe-0.10.3", "acme/toy-4l").load()
    open_legacy(DATA / "lmprobe-0.10.3", "acme/toy-4l", level="tokens").load()
    assert state_of(DATA / "lmprobe-0.10.3") == before


def test_bfloat16_is_shown_as_float32_that_holds_it(tmp_path: Path) -> None:
    tensors = prompt_tensors(0, dtype="bfloat16")
    add_prompt(add_model(tmp_path), "a", tensors)
    resid = open_legacy(tmp_path, MODEL, level="tokens").resid
    assert (resid.dtype, resid.attrs["stored_dtype"]) == (np.float32, "bfloat16")
    np.testing.assert_array_equal(resid.sel(layer=0), of_bits(tensors["layer_0"][0, 2:]))


@pytest.mark.parametrize("tool", ["activault", "hallulens", "hallulens zarr", "probelab memmap", "probelab hdf5", "saelens"])
def test_datasets_of_other_tools_are_read_in_other_processes(tool: str) -> None:
    place, options = {
        "activault": ("activault-run", None), "hallulens": ("hallulens-capture", None), "hallulens zarr": ("hallulens-zarr", None),
        "probelab memmap": ("probelab-0.1.0/memmap", {"prompts": ["a", "b", "c"]}),
        "probelab hdf5": ("probelab-0.1.0/tokens-float32-gzip.h5", {"prompts": ["a", "b", "c"]}),
        "saelens": ("saelens-activations-6.54.12", None),
    }[tool]  # fmt: skip
    with with_pyarrow():
        opened = lz.open_legacy(DATA / place, "m", tool=tool.partition(" ")[0], level="tokens", options=options)  # type: ignore[arg-type]
        sent = pickle.dumps(opened)
        assert len(sent) < 40_000
        xr.testing.assert_identical(pickle.loads(sent).compute(), opened.compute())  # noqa: S301 — what was pickled here


def test_tools_that_are_unknown_and_options_of_lmprobes_caches_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="'activault', 'hallulens'"):
        lz.open_legacy(tmp_path, "m", tool="nobody")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="model's name"):
        lz.open_legacy(tmp_path)
    with pytest.raises(InvalidArgumentError, match="model's name"):
        lz.open_legacy(tmp_path, "m", options={"x": 1})


def test_of_other_tools_only_the_selected_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real, counted = LocalFiles.fill, 0

    def fill(self: LocalFiles, key: str, wants: Any) -> None:
        nonlocal counted
        counted += sum(want.buffer.nbytes for want in wants)
        real(self, key, wants)

    folders = {"activault": "activault-run", "hallulens": "hallulens-zarr"}
    opened = {name: lz.open_legacy(DATA / folder, tool=name, level="tokens") for name, folder in folders.items()}  # type: ignore[arg-type]
    monkeypatch.setattr(LocalFiles, "fill", fill)
    for data in opened.values():
        counted = 0
        rows = data.resid.variable.isel(layer=0, token=slice(1, 4)).load()
        assert (rows.shape, counted) == ((3, 16), 3 * 16 * 2)
