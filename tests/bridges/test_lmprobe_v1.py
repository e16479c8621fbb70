"""lmprobe's .pt caches: read by torch without trusting it, and never touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_caches import MODEL, add_folder, add_model, add_prompt, prompt_folder, prompt_tensors, sha16, state_of
from paths import DATA

import lmprobe_zarr as lz
from lmprobe_zarr.bridges.entry import Entry, Skipped
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.bridges.imports import import_pt, import_safetensors
from lmprobe_zarr.bridges.lmprobe_v1 import LmprobeV1, prompts_hash
from lmprobe_zarr.errors import CorruptFileError, ModelNotStoredError

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.model

TOY, OLD = "acme/toy-4l", DATA / "lmprobe-0.4.9"
KNOWN = json.loads((DATA / "lmprobe-0.4.9-truth.json").read_text())


class RunsCode:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_cache_of_lmprobe_0_4_9_is_imported_and_not_changed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(OLD, cache)
    before, truth = state_of(cache), np.load(DATA / "lmprobe-0.4.9-truth.npz")
    summary = import_pt(cache, tmp_path / "store", model=TOY, prompts=KNOWN["prompts"], progress=False, strict=True)
    assert (summary.found, summary.imported, summary.skipped) == (4, 4, ())
    store = lz.open_store(tmp_path / "store")
    toks, ds = store.tokens(), store.dataset(prompts=KNOWN["prompts"])
    assert ds.text.values.tolist() == KNOWN["prompts"]
    for i, text in enumerate(KNOWN["prompts"]):
        mask = truth["mask"][i] == 1
        np.testing.assert_array_equal(toks.resid.sel(prompt=lz.prompt_hash(text)), truth["acts"][i][:, mask])
        pooled = ds.resid_last_token.isel(prompt=i)
        expected = truth["acts"][i][:, np.flatnonzero(mask)[-1]] if i % 2 == 0 else np.full((4, 8), np.nan)
        np.testing.assert_array_equal(pooled, expected)
        np.testing.assert_array_equal(ds.perplexity[i], [1.5 + i, 2.5, 3.5] if i % 3 == 0 else [np.nan] * 3)
    assert import_pt(cache, store, model=TOY, prompts=KNOWN["prompts"], progress=False).stored == 4
    assert state_of(cache) == before, "not a byte and not a time has changed"


def test_without_texts_the_hashes_stay_the_labels(tmp_path: Path) -> None:
    summary = import_pt(OLD, tmp_path / "store", model=TOY, progress=False)
    assert summary.imported == 4
    assert "unknown text" in str(summary)
    ds = lz.open_store(tmp_path / "store").dataset(prompts=[lz.prompt_hash(t) for t in KNOWN["prompts"]])
    assert "text" not in ds.coords
    assert ds.prompt_sha256.values[0] == lz.prompt_hash(KNOWN["prompts"][0]) + "0" * 48
    again = import_pt(OLD, tmp_path / "store", model=TOY, prompts=KNOWN["prompts"], progress=False)
    assert again.stored == 4, "the same prompts, though only now their texts are known"


def test_a_folder_of_a_whole_list_is_split_into_prompts(tmp_path: Path) -> None:
    prompts = ["one", "two", "three"]
    tensors = prompt_folder(0, batch=3)
    tensors["attention_mask"][1, :4] = 0
    add_folder(tmp_path, prompts_hash(prompts), tensors)
    torch.save(torch.arange(9.0).reshape(3, 3), tmp_path / sha16(MODEL) / f"perplexity_{prompts_hash(prompts)}.pt")
    unknown = import_pt(tmp_path, tmp_path / "store", model=MODEL, progress=False)
    assert unknown.imported == 0
    assert "give that list" in unknown.skipped[0].text
    summary = import_pt(tmp_path, tmp_path / "store", model=MODEL, prompts=prompts, progress=False)
    assert (summary.imported, summary.skipped) == (3, ())
    store = lz.open_store(tmp_path / "store")
    assert store.dataset(prompts=prompts).n_tokens.values.tolist() == [4, 2, 4]
    np.testing.assert_array_equal(store.tokens().resid.sel(prompt=lz.prompt_hash("two"), layer=1), tensors["layer_1"][1, 4:])
    assert store.dataset(prompts=prompts).perplexity.values.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    other = import_pt(tmp_path, tmp_path / "other", model=MODEL, prompts=prompts[::-1], progress=False)
    assert other.imported == 0, "another order is another list"
    assert other.skipped[0].count == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_are_kept(tmp_path: Path, dtype: str) -> None:
    tensors = prompt_folder(0)
    tensors["layer_0"], tensors["layer_1"] = (tensors[k].to(getattr(torch, dtype)) for k in ("layer_0", "layer_1"))
    add_folder(tmp_path, sha16("a"), tensors)
    import_pt(tmp_path, tmp_path / "store", model=MODEL, prompts=["a"], progress=False)
    resid = lz.open_store(tmp_path / "store").tokens().resid
    assert resid.attrs["stored_dtype"] == dtype
    np.testing.assert_array_equal(resid[0], tensors["layer_0"][0, 2:].double().numpy())


def test_first_token_is_pooled_again_from_the_raw_layers(tmp_path: Path) -> None:
    tensors = prompt_folder(0)
    pooled = {f"pooled_first_token/layer_{i}": torch.full((1, 3), 99.0) for i in (0, 1, 2)}
    add_folder(tmp_path, sha16("a"), tensors | pooled | {"pooled_mean/layer_0": torch.ones(1, 3)})
    summary = import_pt(tmp_path, tmp_path / "store", model=MODEL, prompts=["a"], progress=False)
    ds = lz.open_store(tmp_path / "store").dataset()
    np.testing.assert_array_equal(ds.resid_first_token.sel(layer=1)[0], tensors["layer_1"][0, 2])
    assert ds.layer.values.tolist() == [0, 1]
    assert "first_token" in summary.notes[0].text


def test_a_pickle_that_would_run_code_is_refused_and_the_rest_is_imported(tmp_path: Path) -> None:
    cache, trap = tmp_path / "cache", tmp_path / "was-run"
    add_folder(cache, sha16("good"), prompt_folder(0))
    for name, key in (("bad layer", "layer_1"), ("bad mask", "attention_mask"), ("bad perplexity", "perplexity")):
        add_folder(cache, sha16(name), prompt_folder(1) | {key: RunsCode(trap)})
    before = state_of(cache)
    summary = import_pt(cache, tmp_path / "store", model=MODEL, prompts=["good", "bad layer", "bad mask", "bad perplexity"], progress=False)
    assert summary.imported == 1
    (reason,) = summary.skipped
    assert reason.count == 3
    assert "refused" in reason.text
    assert "posix.mkdir" in reason.detail
    with pytest.raises(CorruptFileError, match="refused"):
        import_pt(cache, tmp_path / "strict", model=MODEL, progress=False, strict=True)
    assert not (tmp_path / "strict").exists()
    assert not trap.exists()
    assert state_of(cache) == before


BAD: dict[str, dict[str, Any]] = {
    "a layer of another length": {"layer_1": torch.ones(1, 5, 3)},
    "a layer of another width": {"layer_1": torch.ones(1, 6, 4)},
    "a layer of two prompts": {"layer_1": torch.ones(2, 6, 3)},
    "a matrix": {"layer_1": torch.ones(6, 3)},
    "a list": {"layer_1": [1, 2]},
    "a dict of tensors": {"layer_1": {"a": torch.ones(3)}},
    "a sparse tensor": {"layer_1": torch.ones(1, 6, 3).to_sparse()},
    "a mask of zeros": {"attention_mask": torch.zeros(1, 6, dtype=torch.int64)},
    "a mask of one axis": {"attention_mask": torch.ones(6, dtype=torch.int64)},
    "perplexity of four": {"perplexity": torch.ones(4)},
    "a pooled row of another width": {"pooled_mean/layer_0": torch.ones(1, 4)},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_skipped_with_a_reason(tmp_path: Path, what: str) -> None:
    add_folder(tmp_path, sha16("good"), prompt_folder(0))
    add_folder(tmp_path, sha16("bad"), prompt_folder(1) | BAD[what])
    summary = import_pt(tmp_path, tmp_path / "store", model=MODEL, prompts=["good", "bad"], progress=False)
    assert summary.imported == 1
    assert [r.count for r in summary.skipped] == [1]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"junk" * 50])
def test_damaged_files_are_skipped(tmp_path: Path, content: bytes) -> None:
    add_folder(tmp_path, sha16("good"), prompt_folder(0))
    (add_folder(tmp_path, sha16("bad"), prompt_folder(1)) / "layer_0.pt").write_bytes(content)
    summary = import_pt(tmp_path, tmp_path / "store", model=MODEL, progress=False)
    assert summary.imported == 1
    assert len(summary.skipped) == 1


def test_a_truncated_archive_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    path = add_folder(tmp_path, sha16("a"), prompt_folder(0, n=2000)) / "layer_0.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorruptFileError):
        import_pt(tmp_path, tmp_path / "store", model=MODEL, progress=False, strict=True)


def test_links_out_of_the_cache_are_not_followed(tmp_path: Path) -> None:
    outside = add_folder(tmp_path / "outside", sha16("secret"), prompt_folder(0))
    inside = add_folder(tmp_path / "cache", sha16("half"), prompt_folder(1))
    (inside / "layer_1.pt").unlink()
    (inside / "layer_1.pt").symlink_to(outside / "layer_1.pt")
    (inside.parent / sha16("secret")).symlink_to(outside, target_is_directory=True)
    summary = import_pt(tmp_path / "cache", tmp_path / "store", model=MODEL, progress=False)
    assert summary.imported == 0
    assert [r.count for r in summary.skipped] == [2]


def test_a_prompt_that_is_there_in_v2_too_is_left_to_v2(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    add_folder(cache, sha16("both"), prompt_folder(0))
    add_folder(cache, sha16("old"), prompt_folder(1))
    add_prompt(add_model(cache), "both", prompt_tensors(2))
    first = import_pt(cache, tmp_path / "store", model=MODEL, prompts=["both", "old"], progress=False)
    assert first.imported == 1
    assert "v2" in first.skipped[0].text
    assert import_safetensors(cache, tmp_path / "store", progress=False).imported == 1
    np.testing.assert_array_equal(
        lz.open_store(tmp_path / "store").tokens().resid.sel(prompt=lz.prompt_hash("both"), layer=0), prompt_tensors(2)["layer_0"][0, 2:]
    )


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotStoredError, match="no/such"):
        import_pt(OLD, tmp_path / "store", model="no/such", progress=False)


def test_one_prompt_is_looked_up_by_its_hash() -> None:
    source = LmprobeV1(open_files(OLD), TOY)
    found, absent = source.find([KNOWN["prompts"][0], "absent"])
    assert absent is None
    assert found is not None
    assert isinstance(found[0], Entry)
    assert not any(isinstance(item, Skipped) for item in found)


def test_a_missing_torch_is_a_clear_error(tmp_path: Path) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'torch': raise ModuleNotFoundError('No module named ' + name, name=name)
sys.meta_path.insert(0, Refuse())
from lmprobe_zarr.bridges import import_pt
from lmprobe_zarr.errors import MissingDependencyError
try: import_pt({str(OLD)!r}, {str(tmp_path / "s")!r}, model={TOY!r}, progress=False)
except MissingDependencyError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "lmprobe-zarr[models]" in done.stdout
