"""Activations that SAELens' own code wrote, imported into a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parquet import with_pyarrow
from paths import DATA

import lmprobe_zarr as lz
from lmprobe_zarr.batch import site_of_hook
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, NotAStoreError

FOLDER = DATA / "saelens-activations-6.54.12"
TRUTH = np.load(DATA / "saelens-activations-truth.npz")


@pytest.fixture(scope="module", autouse=True)
def _pyarrow() -> Iterator[None]:
    with with_pyarrow():
        yield


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "copy"))


def imported(folder: Path, place: Path, **options: Any) -> tuple[lz.Store, lz.ImportSummary]:
    summary = lz.import_saelens(folder, place, model="gpt2", progress=False, **options)
    return lz.open_store(place), summary


def test_every_value_is_the_one_that_saelens_was_given(tmp_path: Path) -> None:
    store, summary = imported(FOLDER, tmp_path / "acts", strict=True)
    assert (summary.imported, summary.skipped) == (6, ())
    (info,) = store.groups().values()
    assert info.provenance == {"engine": "transformer_lens"}
    tokens = store.tokens(dtype="stored")
    assert tokens.layer.values.tolist() == [2], "what goes into block 3 is the output of block 2"
    for ids, values in zip(TRUTH["ids"], TRUTH["values"], strict=True):
        mine = tokens.sel(prompt=lz.prompt_hash(ids.tolist()))
        np.testing.assert_array_equal(mine.resid[0], values)
        np.testing.assert_array_equal(mine.token_id, ids)
    _, again = imported(FOLDER, tmp_path / "acts")
    assert (again.stored, again.imported) == (6, 0)


def test_contexts_are_read_where_they_lie() -> None:
    opened = lz.open_legacy(FOLDER, "gpt2", tool="saelens", level="tokens", dtype="stored")
    for ids, values in zip(TRUTH["ids"], TRUTH["values"], strict=True):
        mine = opened.sel(prompt=lz.prompt_hash(ids.tolist()))
        np.testing.assert_array_equal(mine.resid.sel(layer=2)[1:4, [0, 2]], values[1:4, [0, 2]])
        np.testing.assert_array_equal(mine.token_id, ids)
    with pytest.raises(InvalidArgumentError, match="model="):
        lz.open_legacy(FOLDER, tool="saelens", level="tokens")


def test_files_are_read_where_datasets_has_registered_its_types(tmp_path: Path) -> None:
    import pyarrow

    (field,) = [each for each in pyarrow.ipc.open_stream(min(FOLDER.glob("*.arrow")).read_bytes()).schema if each.name != "token_ids"]
    name = field.metadata[b"ARROW:extension:name"].decode()

    class Registered(pyarrow.ExtensionType):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(field.type, name)

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Any:
            return cls()

    pyarrow.register_extension_type(Registered())
    try:
        store, summary = imported(FOLDER, tmp_path / "acts", strict=True)
    finally:
        pyarrow.unregister_extension_type(name)
    assert summary.imported == 6
    mine = store.tokens(dtype="stored").resid.sel(prompt=lz.prompt_hash(TRUTH["ids"][4].tolist()))
    np.testing.assert_array_equal(mine[0], TRUTH["values"][4])


def test_a_context_that_repeats_is_imported_once(copy: Path, tmp_path: Path) -> None:
    state = json.loads((copy / "state.json").read_text())
    state["_data_files"].append(state["_data_files"][0])
    (copy / "state.json").write_text(json.dumps(state))
    store, summary = imported(copy, tmp_path / "acts")
    assert summary.imported == 6
    assert [(reason.count, "twice" in reason.text) for reason in summary.skipped] == [(2, True)]
    assert store.tokens().sizes["token"] == TRUTH["ids"].size


@pytest.mark.parametrize("how", ["removed", "cut", "no Arrow file"])
def test_a_damaged_file_is_an_error_and_nothing_is_written(copy: Path, tmp_path: Path, how: str) -> None:
    victim = max(copy.glob("*.arrow"))
    if how == "removed":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:200] if how == "cut" else b"PK" * 40)
    with pytest.raises(CorruptFileError, match=victim.name):
        imported(copy, tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_what_is_no_such_dataset_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match=r"state\.json"):
        imported(tmp_path, tmp_path / "acts")
    (copy / "state.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="lists no files"):
        imported(copy, tmp_path / "acts")


def write(folder: Path, columns: dict[str, Any]) -> Path:
    import pyarrow

    folder.mkdir()
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def test_other_hooks_need_a_name_and_without_token_ids_there_is_no_prompt(tmp_path: Path) -> None:
    rows = np.arange(24, dtype="float32").reshape(2, 3, 4)
    ids = [[1, 2, 3], [4, 5, 6]]
    folder = write(tmp_path / "hook", {"blocks.0.attn.hook_pattern": rows.tolist(), "token_ids": ids})
    with pytest.raises(InvalidArgumentError, match="variable="):
        imported(folder, tmp_path / "acts")
    store, _ = imported(folder, tmp_path / "acts", variable="pattern", layer=0)
    np.testing.assert_array_equal(store.tokens(dtype="stored").pattern.sel(prompt=lz.prompt_hash(ids[1]))[0], rows[1])
    with pytest.raises(InvalidArgumentError, match="without token ids"):
        imported(write(tmp_path / "no-ids", {"blocks.0.hook_mlp_out": rows.tolist()}), tmp_path / "other")
    ragged = write(tmp_path / "ragged", {"blocks.0.hook_mlp_out": [rows[0].tolist(), rows[1][:2].tolist()], "token_ids": ids})
    store, summary = imported(ragged, tmp_path / "ragged-acts")
    assert (summary.imported, [reason.count for reason in summary.skipped]) == (1, [1])


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.3.hook_resid_post", ("resid", 3)), ("blocks.4.hook_resid_pre", ("resid", 3)), ("blocks.0.hook_resid_pre", ("embed", None)),
        ("hook_embed", ("embed", None)), ("blocks.12.hook_mlp_out", ("mlp", 12)), ("blocks.1.mlp.hook_post", ("neurons", 1)),
        ("blocks.1.attn.hook_q", (None, 1)), ("ln_final.hook_normalized", (None, None)), (None, (None, None)),
    ],
)  # fmt: skip
def test_hooks_are_sites_of_this_package(hook: str | None, site: tuple[str | None, int | None]) -> None:
    assert site_of_hook(hook) == site
