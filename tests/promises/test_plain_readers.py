"""Both groups of a part open without this package: with zarr, xarray and numcodecs alone, to the same numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store


def written(path: Path) -> tuple[Store, str]:
    store = lz.open_store(path)
    columns = {"label": [1, 0, 1], "split": ["train", "test", "träin"], "seen": [True, False, True], "weight": [0.5, 1.0, 2.0]}
    name = store.write(GROUP, make_batch(["a", "bb", "ccc"], columns=columns))
    return store, f"{path}/{GROUP.name}/{name}"


def test_plain_xarray_reads_both_groups_of_a_part(tmp_path: Path) -> None:
    store, part = written(tmp_path / "s")
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


def test_plain_zarr_reads_every_array_with_and_without_consolidated_metadata(tmp_path: Path) -> None:
    _, part = written(tmp_path / "s")
    for consolidated in (True, False):
        group = zarr.open_group(part, mode="r", use_consolidated=consolidated)
        assert sorted(group["prompts"].array_keys()) == sorted(  # type: ignore[union-attr]
            ["label", "layer", "n_tokens", "prompt", "prompt_length", "prompt_sha256", "resid_mean", "seen", "split", "text", "weight"]
        )
        assert np.isnan(group["tokens/resid"].fill_value)  # type: ignore[union-attr]
        assert group["prompts/n_tokens"].fill_value == -1  # type: ignore[union-attr]


def test_the_root_and_the_groups_are_plain_zarr_groups(tmp_path: Path) -> None:
    store, _ = written(tmp_path / "s")
    root = zarr.open_group(store.url, mode="r")
    assert root.attrs["format"] == "lmprobe-zarr"
    assert root[GROUP.name].attrs["provenance"] == {"revision": "abc"}


def test_an_interpreter_without_this_package_reads_the_same_numbers(tmp_path: Path) -> None:
    store, part = written(tmp_path / "s")
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
