"""Datasets that lmprobe shares, written by lmprobe itself and imported into a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CorruptFileError, NotAStoreError, UnsupportedVersionError

pytest.importorskip("torch")
pytest.importorskip("lmprobe")

from lmprobe_datasets import LAYERS, MODEL, Truth, make_truth, write_dataset
from parquet import with_pyarrow

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::DeprecationWarning:lmprobe")]


@pytest.fixture(scope="module", autouse=True)
def _pyarrow() -> Iterator[None]:
    with with_pyarrow():
        yield


@pytest.fixture(scope="module")
def truth() -> Truth:
    return make_truth()


@pytest.fixture(scope="module")
def made(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset of whole sequences in many files, one in a single file each, and one of pooled vectors."""
    root = tmp_path_factory.mktemp("lmprobe")
    kinds: dict[str, dict[str, Any]] = {"sequences": {}, "large files": {"shard_bytes": 2**20}, "pooled": {"pooling": "mean"}}
    return {name: write_dataset(root / name, truth, **options) for name, options in kinds.items()}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Path:
    """A dataset of whole sequences that a test may damage."""
    return Path(shutil.copytree(made["sequences"], tmp_path / "copy"))


def imported(folder: Path | str, place: Path, **options: Any) -> tuple[lz.Store, lz.ImportSummary]:
    summary = lz.import_lmprobe_dataset(folder, place, progress=False, **options)
    return lz.open_store(place), summary


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["sequences", "large files"])
def test_every_value_of_a_dataset_of_sequences_is_the_one_that_lmprobe_was_given(
    made: dict[str, Path], truth: Truth, tmp_path: Path, name: str
) -> None:
    if name == "sequences":
        assert len([*(made[name] / "tensors").glob("hidden_layer000_*")]) > 3, "several files, with last tokens apart from the others"
    store, summary = imported(made[name], tmp_path / "acts")
    assert (summary.imported, summary.skipped, summary.models) == (len(truth.prompts), (), (MODEL,))
    tokens, prompts = store.tokens(dtype="stored"), store.dataset(dtype="stored")
    assert tokens.layer.values.tolist() == list(LAYERS)
    for i, text in enumerate(truth.prompts):
        digest = lz.prompt_hash(text)
        mine = tokens.sel(prompt=digest)
        np.testing.assert_array_equal(mine.resid, truth.tokens[i])
        np.testing.assert_array_equal(mine.token_id, truth.token_ids[i])
        np.testing.assert_array_equal(mine.token_perplexity, [np.nan, *truth.token_perplexity[i]])
        row = prompts.sel(prompt=digest)
        np.testing.assert_array_equal(row.perplexity, truth.perplexity[i])
        np.testing.assert_array_equal(row.logits_last_token_top_k_values, truth.top_values[i])
        np.testing.assert_array_equal(row.logits_last_token_top_k_indices, truth.top_indices[i])
        np.testing.assert_array_equal(row.router_logits_last_token, truth.router[i])
        assert row.text.item() == text
        assert row.label.item() == truth.labels[i]
        assert (row.topic.item(), row.weight.item(), bool(row.seen.item())) == tuple(truth.extra[i].values())


def test_pooled_vectors_are_imported_and_read_by_probes(made: dict[str, Path], truth: Truth, tmp_path: Path) -> None:
    store, summary = imported(made["pooled"], tmp_path / "acts", strict=True)
    assert summary.imported == len(truth.prompts)
    pooled = store.dataset(dtype="stored").resid_mean
    for i, text in enumerate(truth.prompts):
        np.testing.assert_array_equal(pooled.sel(prompt=lz.prompt_hash(text)), truth.pooled[i])
    scores = lz.sweep(store.dataset().resid_mean, "label", cv=2, progress=False)
    assert scores.accuracy.sizes["layer"] == len(LAYERS)


def test_some_prompts_again_and_none_twice(made: dict[str, Path], truth: Truth, tmp_path: Path) -> None:
    place = tmp_path / "acts"
    _, first = imported(made["sequences"], place, prompts=[truth.prompts[2], lz.prompt_hash(truth.prompts[0])])
    assert (first.found, first.imported) == (2, 2)
    store, second = imported(made["sequences"], place)
    assert (second.found, second.stored, second.imported) == (7, 2, 5)
    assert store.dataset().label.sel(prompt=[lz.prompt_hash(text) for text in truth.prompts]).values.tolist() == truth.labels
    before = sorted(path.name for path in place.rglob("*"))
    _, third = imported(made["sequences"], place)
    assert (third.stored, third.imported) == (7, 0)
    assert sorted(path.name for path in place.rglob("*")) == before, "columns that are there already are not written again"
    _, plain = imported(made["sequences"], tmp_path / "plain", columns=False)
    assert plain.imported == 7
    assert "label" not in lz.open_store(tmp_path / "plain").dataset().coords


def test_labels_with_gaps_are_not_written_again(copy: Path, tmp_path: Path) -> None:
    import pyarrow

    def with_gaps(table: Any) -> Any:
        labels = [None if n == 3 else value for n, value in enumerate(table.column("label").to_pylist())]
        return table.set_column(table.column_names.index("label"), "label", pyarrow.array(labels, pyarrow.int32()))

    rewrite_index(copy, with_gaps)
    store, _ = imported(copy, tmp_path / "acts")
    assert int(store.dataset().label.isnull().sum()) == 1
    before = sorted(path.name for path in (tmp_path / "acts").rglob("*"))
    imported(copy, tmp_path / "acts")
    assert sorted(path.name for path in (tmp_path / "acts").rglob("*")) == before


def test_an_index_that_does_not_say_where_rows_are_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["pooled"], tmp_path / "copy"))
    rewrite_index(folder, lambda table: table.drop_columns(["row_offset", "row_offset_logits"]))
    _, summary = imported(folder, tmp_path / "acts")
    assert any("does not say where" in note.text for note in summary.notes)


def test_a_dry_run_writes_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    summary = lz.import_lmprobe_dataset(made["sequences"], tmp_path / "acts", dry_run=True, progress=False)
    assert summary.imported == 7
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize("how", ["removed", "cut", "no safetensors"])
def test_prompts_whose_files_are_damaged_are_skipped_and_counted(copy: Path, truth: Truth, tmp_path: Path, how: str) -> None:
    victim = max((copy / "tensors").glob("hidden_layer001_*"))
    if how == "removed":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-10] if how == "cut" else b"PK" * 40)
    store, summary = imported(copy, tmp_path / "acts")
    (reason,) = summary.skipped
    assert "missing, damaged or too short" in reason.text
    assert summary.imported == len(truth.prompts) - reason.count
    assert 0 < reason.count < len(truth.prompts)
    tokens = store.tokens(dtype="stored")
    for i, text in enumerate(truth.prompts):
        if lz.prompt_hash(text) in tokens.prompt.values:
            np.testing.assert_array_equal(tokens.sel(prompt=lz.prompt_hash(text)).resid, truth.tokens[i])
    with pytest.raises(CorruptFileError, match="strict=True"):
        imported(copy, tmp_path / "strict", strict=True)


def rewrite_index(folder: Path, change: Any) -> None:
    from pyarrow import parquet

    path = folder / "index" / "train-00000-of-00001.parquet"
    parquet.write_table(change(parquet.read_table(path)), path)


def with_info(**given: Any) -> Any:
    def change(table: Any) -> Any:
        meta = {**table.schema.metadata, **{f"lmprobe:{key}".encode(): json.dumps(value).encode() for key, value in given.items()}}
        return table.replace_schema_metadata(meta)

    return change


def test_places_that_the_index_gives_wrongly_are_errors_and_never_numbers(copy: Path, tmp_path: Path) -> None:
    import pyarrow

    def shifted(table: Any) -> Any:
        rows = table.column("token_shard_offsets").to_pylist()
        rows[1] = [10**6 for _ in rows[1]]
        return table.set_column(table.column_names.index("token_shard_offsets"), "token_shard_offsets", pyarrow.array(rows))

    rewrite_index(copy, shifted)
    _, summary = imported(copy, tmp_path / "acts")
    assert [reason.count for reason in summary.skipped] == [1]

    def shorter(table: Any) -> Any:
        counts = [count + 1 for count in table.column("num_tokens").to_pylist()]
        return table.set_column(table.column_names.index("num_tokens"), "num_tokens", pyarrow.array(counts, pyarrow.int32()))

    rewrite_index(copy, shorter)
    with pytest.raises(CorruptFileError, match="another number of tokens"):
        imported(copy, tmp_path / "other")


def test_what_is_no_dataset_says_what_it_is_instead(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match=r"import_safetensors"):
        imported(tmp_path, tmp_path / "acts")
    rewrite_index(copy, with_info(format_version="3.0"))
    with pytest.raises(UnsupportedVersionError, match=r"format 3\.0"):
        imported(copy, tmp_path / "acts")
    rewrite_index(copy, lambda table: table.replace_schema_metadata({}))
    with pytest.raises(NotAStoreError, match="metadata"):
        imported(copy, tmp_path / "acts")
    (copy / "index" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(CorruptFileError, match="Parquet"):
        imported(copy, tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_a_revision_is_recorded_and_a_file_outside_the_dataset_is_not_read(copy: Path, tmp_path: Path, made: dict[str, Path]) -> None:
    rewrite_index(copy, with_info(model={"name": MODEL, "revision": "abc"}))
    store, _ = imported(copy, tmp_path / "acts")
    assert [info.provenance for info in store.groups().values()] == [{"revision": "abc"}]
    from pyarrow import parquet

    kinds = json.loads(parquet.read_schema(copy / "index" / "train-00000-of-00001.parquet").metadata[b"lmprobe:tensors"])
    kinds["hidden_layers"]["file_pattern"] = (
        f"../../{made['sequences'].parent.name}/sequences/tensors/hidden_layer{{layer:03d}}_shard{{shard:03d}}.safetensors"
    )
    rewrite_index(copy, with_info(tensors=kinds))
    other, summary = imported(copy, tmp_path / "outside")
    assert "resid" not in other.tokens(dtype="stored")
    assert any("no file can be read" in note.text for note in summary.notes)


def test_layers_that_were_not_downloaded_are_named(copy: Path, truth: Truth, tmp_path: Path) -> None:
    for path in (copy / "tensors").glob("hidden_layer001_*"):
        path.unlink()
    store, summary = imported(copy, tmp_path / "acts")
    assert store.tokens(dtype="stored").layer.values.tolist() == [0, 3]
    assert [(note.count, "no file can be read" in note.text) for note in summary.notes] == [(len(truth.prompts), True)]
