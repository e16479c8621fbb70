"""Folders that activault's own code wrote, imported into a store and read where they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import DATA

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, ModelNotStoredError, NotAStoreError

RUN = DATA / "activault-run"
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in (0, 2, 3)]
TRUTH = np.load(DATA / "activault-truth.npz")
#: `hidden_states` of one plain pass, rounded to bfloat16, shape (row, layer + 1, token, hidden).
STATES = TRUTH["states"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def imported(folder: Path, place: Path, **options: Any) -> tuple[lz.Store, lz.ImportSummary]:
    summary = lz.import_activault(folder, place, progress=False, **options)
    return lz.open_store(place), summary


def test_every_row_is_the_output_of_its_block(tmp_path: Path) -> None:
    store, summary = imported(RUN, tmp_path / "acts")
    assert (summary.imported, summary.models) == (4, ("acme/tiny-llama",))
    (info,) = store.groups().values()
    assert info.provenance == {"engine": "activault"}
    tokens = store.tokens(dtype="stored")
    assert tokens.layer.values.tolist() == [0, 2]
    assert tokens.resid.attrs["stored_dtype"] == "bfloat16"
    for ids, states in zip(TRUTH["ids"], STATES, strict=True):
        mine = tokens.sel(prompt=lz.prompt_hash(ids.tolist()))
        np.testing.assert_array_equal(mine.resid, states[[1, 3]])
        np.testing.assert_array_equal(mine.token_id, ids)
    _, again = imported(RUN, tmp_path / "acts")
    assert (again.stored, again.imported) == (4, 0)


def test_the_highest_layer_is_no_output_of_a_block_and_is_named(tmp_path: Path) -> None:
    _, summary = imported(RUN, tmp_path / "acts")
    (reason,) = summary.skipped
    assert (reason.count, reason.names) == (1, ("blocks.3.hook_resid_post",))
    assert "final norm" in reason.detail
    with pytest.raises(CorruptFileError, match="hook_resid_post"):
        imported(RUN, tmp_path / "strict", strict=True)
    store, summary = imported(RUN, tmp_path / "named", mapping={"normed": {3: "blocks.3.hook_resid_post"}}, strict=True)
    tokens = store.tokens(dtype="stored")
    assert [*tokens.data_vars] == ["normed"]
    np.testing.assert_array_equal(tokens.normed.sel(prompt=lz.prompt_hash(TRUTH["ids"][2].tolist()))[0], STATES[2, 4])


def test_rows_are_read_where_they_lie(tmp_path: Path) -> None:
    opened = lz.open_legacy(RUN, tool="activault", level="tokens", layers=[2])
    assert opened.model.item() == "acme/tiny-llama"
    for ids, states in zip(TRUTH["ids"], STATES, strict=True):
        np.testing.assert_array_equal(opened.resid.sel(prompt=lz.prompt_hash(ids.tolist()))[0, 2:5], states[3, 2:5])
    one = lz.open_legacy(RUN, "mine", tool="activault", level="tokens", prompts=[lz.prompt_hash(TRUTH["ids"][3].tolist())])
    assert (one.sizes["token"], one.model.item()) == (6, "mine")
    assert "hook_resid_post" in one.attrs["skipped"]
    with pytest.raises(ModelNotStoredError, match="prompts"):
        lz.open_legacy(RUN, tool="activault")
    with pytest.raises(InvalidArgumentError, match="no option of 'activault'"):
        lz.open_legacy(RUN, tool="activault", options={"layer": 3})


def test_a_hook_alone_needs_its_meaning_and_its_model(tmp_path: Path) -> None:
    hook = RUN / HOOKS[1]
    with pytest.raises(InvalidArgumentError, match=r"cfg\.json.*mapping="):
        imported(hook, tmp_path / "acts", model="m")
    mapping = {"resid": "blocks.{layer}.hook_resid_post"}
    with pytest.raises(InvalidArgumentError, match="model="):
        imported(hook, tmp_path / "acts", mapping=mapping)
    store, _ = imported(hook, tmp_path / "acts", mapping=mapping, model="m", strict=True)
    np.testing.assert_array_equal(store.tokens(dtype="stored").resid.sel(prompt=lz.prompt_hash(TRUTH["ids"][0].tolist()))[0], STATES[0, 3])
    with pytest.raises(InvalidArgumentError, match=r"no hook 'blocks\.7\.x'"):
        imported(RUN, tmp_path / "acts", mapping={"resid": {7: "blocks.7.x"}})


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("models.layers.1.mlp.pre", "mlp_input"), ("models.layers.1.mlp.post", "mlp_output"),
        ("models.layers.1.self_attn.post", "attn_output"),
        ("models.layers.1.self_attn.pre", None), ("blocks.1.hook_mlp_post", None),
    ],
)  # fmt: skip
def test_modules_are_named_as_what_they_are_and_others_are_not_guessed(copy: Path, tmp_path: Path, name: str, variable: str | None) -> None:
    (copy / HOOKS[1]).rename(copy / name)
    store, summary = imported(copy, tmp_path / "acts")
    skipped = {name for reason in summary.skipped for name in reason.names}
    variables = set(store.tokens().data_vars)
    assert (variables, name in skipped) == (({"resid"} if variable is None else {"resid", variable}), variable is None)


def test_rows_of_one_uuid_with_other_tokens_are_not_mixed(copy: Path, tmp_path: Path) -> None:
    first, second = sorted((copy / HOOKS[1]).glob("*.pt"))
    second.write_bytes(first.read_bytes())
    store, summary = imported(copy, tmp_path / "acts")
    (reason,) = [reason for reason in summary.skipped if "another hook" in reason.text]
    assert reason.names == (f"{HOOKS[1]}/{second.name}",)
    assert summary.imported == 4
    tokens = store.tokens(dtype="stored").sel(prompt=lz.prompt_hash(TRUTH["ids"][2].tolist()))
    np.testing.assert_array_equal(tokens.resid.sel(layer=0), STATES[2, 1])
    assert np.isnan(tokens.resid.sel(layer=2)).all()


@pytest.mark.parametrize("how", ["cut", "no archive", "empty", "link", "bits"])
def test_a_damaged_file_is_skipped_and_named(copy: Path, tmp_path: Path, how: str) -> None:
    victim = min((copy / HOOKS[0]).glob("*.pt"))
    data = victim.read_bytes()
    if how == "link":
        (tmp_path / "elsewhere.pt").write_bytes(data)
        victim.unlink()
        victim.symlink_to(tmp_path / "elsewhere.pt")
    else:
        changed = {
            "cut": data[:-200],
            "no archive": b"PK" * 500,
            "empty": b"",
            "bits": data.replace(b"BFloat16Storage", b"BFloat16Storing"),
        }
        victim.write_bytes(changed[how])
    _, summary = imported(copy, tmp_path / "acts")
    assert f"{HOOKS[0]}/{victim.name}" in {name for reason in summary.skipped for name in reason.names}
    with pytest.raises(CorruptFileError, match=victim.name):
        imported(copy, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_documents_that_are_damaged_are_errors(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAStoreError, match=r"metadata\.json"):
        imported(tmp_path / "empty", tmp_path / "acts")
    with pytest.raises(InvalidArgumentError, match="nothing does not exist: check the path"):
        imported(tmp_path / "nothing", tmp_path / "acts")
    metadata = copy / HOOKS[0] / "metadata.json"
    said = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**said, "d_in": 17}))
    _, summary = imported(copy, tmp_path / "acts")
    assert [reason.count for reason in summary.skipped if "shape" in reason.text] == [2]
    metadata.write_text("[]")
    with pytest.raises(CorruptFileError, match=r"blocks\.0\.hook_resid_post/metadata\.json"):
        imported(copy, tmp_path / "acts")
    (copy / "cfg.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"cfg\.json"):
        imported(copy, tmp_path / "acts")


def test_a_run_is_read_by_ranges_where_it_was_uploaded(tmp_path: Path) -> None:
    import fsspec

    files: Any = fsspec.filesystem("memory")
    files.put(str(RUN), "memory://vault/run", recursive=True)
    try:
        store, summary = imported("memory://vault/run", tmp_path / "acts")  # type: ignore[arg-type]
        opened = lz.open_legacy("memory://vault/run", tool="activault", level="tokens")
        assert summary.imported == 4
        for data in (store.tokens(dtype="stored"), opened):
            np.testing.assert_array_equal(data.resid.sel(prompt=lz.prompt_hash(TRUTH["ids"][1].tolist())), STATES[1, [1, 3]])
    finally:
        files.rm("memory://vault", recursive=True)
