"""Both groups of a part open without this package: with zarr, xarray and numcodecs alone, to the same numbers.

Parts of both versions of the format, and with one chunk, many chunks and shards of chunks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from stores import GROUP, make_batch
from versions import small_chunks, write_part, write_version

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store

# Version of the format, whether it is compressed, whether it has shards, and the bytes of a chunk; two rows have 64.
LAYOUTS = {
    "version 1": (1, True, False, 2**21),
    "chunks of version 1": (1, True, False, 64),
    "version 2": (2, True, False, 2**21),
    "chunks": (2, True, False, 64),
    "raw chunks": (2, False, False, 64),
    "shards": (2, True, True, 64),
    "shards of raw chunks": (2, False, True, 64),
}


@pytest.fixture(params=LAYOUTS)
def written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Store, str]:
    """A store of one part, and the path of that."""
    version, compressed, shards, nbytes = LAYOUTS[request.param]
    write_version(monkeypatch, version)
    small_chunks(monkeypatch, nbytes, in_shard=2)
    store = lz.open_store(tmp_path / "s")
    columns = {"label": [1, 0, 1], "split": ["train", "test", "träin"], "seen": [True, False, True], "weight": [0.5, 1.0, 2.0]}
    info = write_part(store, GROUP, make_batch(["a", "bb", "ccc"], columns=columns), compressed=compressed, shards=shards)
    assert info.version == version
    for key in ("prompts/resid_mean", "tokens/resid"):
        assert (info.arrays[key].n_blocks > 1) == (nbytes == 64)
        assert info.arrays[key].shard_blocks == (2 if shards else 0)
    assert info.arrays["tokens/resid"].n_files == (1 if nbytes > 64 else 3 if shards else 5)
    return store, f"{store.url}/{GROUP.name}/{info.name}"


@pytest.mark.few(6)
def test_plain_xarray_reads_both_groups_of_a_part(written: tuple[Store, str]) -> None:
    store, part = written
    prompts, tokens = xr.open_zarr(part, group="prompts"), xr.open_zarr(part, group="tokens", chunks=None)
    ours, our_tokens = store.dataset(), store.tokens()
    np.testing.assert_array_equal(prompts.resid_mean.values, ours.resid_mean.values)
    np.testing.assert_array_equal(tokens.resid.values, our_tokens.resid.values)
    for name in ("prompt", "prompt_sha256", "text", "label", "split", "seen", "weight", "n_tokens", "prompt_length", "layer"):
        assert name in prompts.coords, name
        assert prompts[name].values.tolist() == ours[name].values.tolist(), name
    assert tokens.position.values.tolist() == our_tokens.position.values.tolist()
    assert tokens.token_id.values.tolist() == our_tokens.token_id.values.tolist()
    assert prompts.prompt.values[tokens.prompt_row.values].tolist() == our_tokens.prompt.values.tolist()
    assert prompts.n_tokens.attrs["sample_dimension"] == "token"
    assert tokens.prompt_row.attrs["instance_dimension"] == "prompt"


@pytest.mark.few(6)
def test_plain_zarr_reads_every_array_with_and_without_consolidated_metadata(written: tuple[Store, str]) -> None:
    store, part = written
    for consolidated in (True, False):
        group = zarr.open_group(part, mode="r", use_consolidated=consolidated)
        assert sorted(group["prompts"].array_keys()) == sorted(  # type: ignore[union-attr]
            ["label", "layer", "n_tokens", "prompt", "prompt_length", "prompt_sha256", "resid_mean", "seen", "split", "text", "weight"]
        )
        assert np.isnan(group["tokens/resid"].fill_value)  # type: ignore[union-attr]
        assert group["prompts/n_tokens"].fill_value == -1  # type: ignore[union-attr]
        # Single rows of single layers, which a chunk within a shard has.
        tokens = store.tokens().resid.transpose("layer", "token", "hidden").values
        for layer, row in ((0, 0), (1, 4), (2, 8)):
            np.testing.assert_array_equal(group["tokens/resid"][layer, row], tokens[layer, row])  # type: ignore[index]


def test_the_root_and_the_groups_are_plain_zarr_groups(written: tuple[Store, str]) -> None:
    store, _ = written
    root = zarr.open_group(store.url, mode="r")
    assert root.attrs["format"] == "lmprobe-zarr"
    assert root[GROUP.name].attrs["provenance"] == {"revision": "abc"}


def test_a_compacted_store_and_a_published_copy_with_shards_are_plain_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 2**17, in_shard=3)
    store = lz.open_store(tmp_path / "s")
    batches = [make_batch([f"{seed} {i}" for i in range(60)], hidden=1024, seed=seed, tokens=False) for seed in (0, 1)]
    for batch in batches:
        store.write(GROUP, batch)
    store.compact(progress=False)
    store.publish(tmp_path / "published", shards=True, progress=False)
    expected = np.concatenate([batch.prompts["resid_mean"] for batch in batches], axis=1)
    for place in ("s", "published"):
        (part,) = lz.open_store(tmp_path / place).view(GROUP).parts
        assert part.info.arrays["prompts/resid_mean"].shard_blocks == 3
        assert part.info.arrays["prompts/resid_mean"].n_files == 2
        plain = xr.open_zarr(f"{tmp_path / place}/{part.path}", group="prompts")
        np.testing.assert_array_equal(plain.resid_mean.values, expected)
        np.testing.assert_array_equal(plain.resid_mean[1, 57:64, 3:9].values, expected[1, 57:64, 3:9])


@pytest.mark.few(1)
def test_an_interpreter_without_this_package_reads_the_same_numbers(written: tuple[Store, str], tmp_path: Path) -> None:
    store, part = written
    np.save(tmp_path / "resid.npy", store.tokens().resid.values)
    np.save(tmp_path / "mean.npy", store.dataset().resid_mean.values)
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'lmprobe_zarr': raise ImportError('not here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import numpy as np, xarray as xr\n"
        "part, resid, mean = sys.argv[1:]\n"
        "assert (xr.open_zarr(part, group='tokens', chunks=None).resid.values == np.load(resid)).all()\n"
        "assert (xr.open_zarr(part, group='prompts', chunks=None).resid_mean.values == np.load(mean)).all()\n"
        "assert 'lmprobe_zarr' not in sys.modules\n"
    )
    # xarray looks at every installed engine's entry point, and warns of ours, which cannot be imported there.
    code = code.replace("warnings.simplefilter('error')", "warnings.filterwarnings('ignore', message='Engine')")
    subprocess.run([sys.executable, "-c", code, part, tmp_path / "resid.npy", tmp_path / "mean.npy"], check=True, timeout=120)
