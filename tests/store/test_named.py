"""One model, one answer: whatever `extract` took as the model, every call that asks for a model takes too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from command_line import call, call_json

import lmprobe_zarr as lz
from lmprobe_zarr.errors import AmbiguousProvenanceError, InvalidTypeError, ModelNotStoredError
from lmprobe_zarr.model_files import weights_digest
from lmprobe_zarr.store import Store
from lmprobe_zarr.store.format import GroupInfo
from lmprobe_zarr.store.named import NamedModel

PROMPTS = ["one", "two words", "three words here"]


def make_folder(folder: Path, seed: int) -> Path:
    """A folder that looks like a model's, which no call here loads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4}))
    (folder / "model.safetensors").write_bytes(bytes([seed]) * 100)
    return folder


def fill(store: Store, model: str, value: float, provenance: Mapping[str, Any]) -> str:
    rows = np.full((3, 4), value, "float32") + np.arange(3, dtype="float32")[:, None]
    tokens = {0: [np.full((2, 4), value, "float32") for _ in PROMPTS]}
    return lz.write_activations(
        store, model=model, prompts=PROMPTS, pooled={"resid_mean": {0: rows}}, activations={"resid": tokens}, provenance=provenance,
        coords={"label": [0, 1, 0]},
    )  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, with the folder of a model in it; the working directory is that of the models."""
    make_folder(tmp_path / "models" / "toy", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "models")
    return tmp_path


@pytest.fixture
def acts(home: Path) -> Store:
    """A store as `extract` leaves it of that folder, and of a hub model."""
    store = lz.open_store(home / "acts")
    fill(store, "toy", 10, {"weights": weights_digest(home / "models" / "toy"), "revision": None})
    fill(store, "acme/other", 20, {"weights": None, "revision": "c" * 40})
    return store


def _export(store: Store, model: Any) -> float:
    target = Path(store.storage.url).parent / "exported"
    lz.export_safetensors(store, target, model=model, progress=False)
    return float(lz.open_legacy(target, store.find_group(model).model, level="tokens").resid.values[0, 0, 0])


def _copied(store: Store, model: Any) -> float:
    target = lz.open_store(Path(store.storage.url).parent / "copied")
    store.copy_to(target, model=model, progress=False)
    (name,) = target.models()
    return float(target.dataset(name).resid_mean.values[0, 0, 0])


def _published(store: Store, model: Any) -> float:
    target = Path(store.storage.url).parent / "published"
    store.publish(target, model=model, progress=False)
    (name,) = lz.open_store(target).models()
    return float(lz.open_store(target).dataset(name).resid_mean.values[0, 0, 0])


def _annotated(store: Store, model: Any) -> float:
    store.annotate(model, {"note": {"one": 1.5}})
    (held,) = [info for info in store.groups().values() if "note" in store.dataset(group=info.name)]
    return float(store.dataset(group=held.name).resid_mean.values[0, 0, 0])


def _left(store: Store, count: int) -> float:
    """The value of the model that lost `count` prompts, parts or variables."""
    values = {"toy": 10.0, "acme/other": 20.0}
    left = {info.model: len(store.view(info)) for info in store.groups().values() if store.holds_parts(info.name)}
    (gone,) = [name for name in values if left.get(name, 0) == 3 - count]
    return values[gone]


def _deleted(store: Store, model: Any) -> float:
    store.delete(model, ["one"])
    return _left(store, 1)


def _cleared(store: Store, model: Any) -> float:
    assert lz.clear_cache(model, url=store) == 1
    return _left(store, 3)


def _dropped(store: Store, model: Any) -> float:
    assert store.drop(model, ["resid_mean"]) == 1
    (kept,) = [info for info in store.groups().values() if "resid_mean" in store.view(info).variables("prompts")]
    return {"toy": 20.0, "acme/other": 10.0}[kept.model]


def _of_group(group: str) -> float:
    return 10.0 if group.startswith("toy") else 20.0


def _verified(store: Store, model: Any) -> float:
    """Only the model's parts are checked: the other's are damaged."""
    for path in Path(store.storage.url).glob("acme*/*/prompts/resid_mean/c/*/*/*"):
        path.write_bytes(b"broken")
    return 10.0 if lz.open_store(store.storage.url).verify(model, progress=False) else 20.0


def _repaired(store: Store, model: Any) -> float:
    for path in Path(store.storage.url).glob("acme*/*/prompts/resid_mean/c/*/*/*"):
        path.write_bytes(b"broken")
    return 20.0 if lz.open_store(store.storage.url).repair(model, dry_run=True, progress=False).changes else 10.0


def _compacted(store: Store, model: Any) -> float:
    part = store.dataset("toy")
    lz.write_activations(
        store, model="toy", prompts=["more"], pooled={"resid_mean": {0: part.resid_mean.values[0, :1]}},
        activations={"resid": {0: [np.zeros((2, 4), "float32")]}}, provenance=store.find_group("toy").provenance, coords={"label": [1]},
    )  # fmt: skip
    return 10.0 if store.compact(model, dry_run=True, progress=False).parts == 2 else 20.0


def _engine(store: Store, model: Any) -> float:
    with xr.open_dataset(store.storage.url, engine="lmprobe_zarr", model=model) as data:
        return float(data.resid_mean.values[0, 0, 0])


def _tree(store: Store, model: Any) -> float:
    with xr.open_datatree(store.storage.url, engine="lmprobe_zarr", model=model) as tree:
        (group,) = tree.children
        return _of_group(group)


def _discovered(store: Store, model: Any) -> float:
    found = lz.discover_cached(model, "one", store=store)
    assert found is not None
    assert found.group is not None
    return _of_group(found.group)


# Every call that asks for a model; each gives the value of the model that it took.
CALLS: dict[str, Callable[[Store, Any], float]] = {
    "dataset": lambda s, m: float(s.dataset(m).resid_mean.values[0, 0, 0]),
    "tokens": lambda s, m: float(s.tokens(m).resid.values[0, 0, 0]),
    "coverage": lambda s, m: 10.0 if s.coverage(m).sizes and s.find_group(m).model == "toy" else 20.0,
    "find_group": lambda s, m: _of_group(s.find_group(m).name),
    "matching": lambda s, m: _of_group(*[info.name for info in s.matching(m)]),
    "datatree": lambda s, m: _of_group(*s.datatree(m).children),
    "engine": _engine,
    "engine's tree": _tree,
    "annotate": _annotated,
    "delete": _deleted,
    "drop": _dropped,
    "compact": _compacted,
    "verify": _verified,
    "repair": _repaired,
    "publish": _published,
    "copy_to": _copied,
    "clear_cache": _cleared,
    "cache_info": lambda s, m: _of_group(*[info.group for info in lz.cache_info(m, store=s).models]),
    "discover_cached": _discovered,
    "list_cached_prompts": lambda s, m: 10.0 if len(lz.list_cached_prompts(m, store=s)) == 3 and s.find_group(m).model == "toy" else 20.0,
    "export_safetensors": _export,
    "report": lambda s, m: 10.0 if "acme/other" not in lz.report(s, model=m).html.partition("Coverage")[2] else 20.0,
}


def _link(home: Path) -> str:
    (home / "latest").symlink_to(home / "models" / "toy")
    return str(home / "latest")


SPELLINGS: dict[str, Callable[[Path], Any]] = {
    "the name": lambda home: "toy",
    "a path": lambda home: str(home / "models" / "toy"),
    "a Path": lambda home: home / "models" / "toy",
    "a slash at the end": lambda home: f"{home}/models/toy/",
    "relative": lambda home: "./toy",
    "relative, as a Path": lambda home: Path("toy"),
    "through the parent": lambda home: "../models/toy",
    "the home folder": lambda home: "~/models/toy",
    "through a link": _link,
}


@pytest.mark.few(6)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_takes_every_spelling_of_a_model(home: Path, acts: Store, name: str, spelling: str) -> None:
    assert CALLS[name](acts, SPELLINGS[spelling](home)) == 10.0


@pytest.mark.few(6)
@pytest.mark.parametrize("name", sorted(set(CALLS) - {"report", "verify", "repair", "compact"}))
def test_every_call_takes_a_hub_id(acts: Store, name: str) -> None:
    assert CALLS[name](acts, "acme/other") == 20.0


COMMANDS: dict[str, tuple[str, ...]] = {
    "show": ("show", "STORE", "--list", "1", "--model"),
    "info": ("info", "STORE", "--model"),
    "cache info": ("cache", "info", "STORE", "--model"),
    "delete": ("delete", "STORE", "PROMPTS", "--yes", "--model"),
    "clear": ("clear", "STORE", "--yes", "--model"),
    "compact": ("compact", "STORE", "--model"),
    "verify": ("verify", "STORE", "--model"),
    "repair": ("repair", "STORE", "--yes", "--model"),
    "publish": ("publish", "STORE", "TARGET", "--model"),
    "export": ("export", "--from", "STORE", "--to", "TARGET", "--model"),
    "report": ("report", "STORE", "-o", "PAGE", "--model"),
    "sweep": ("sweep", "STORE", "--dry-run", "--variable", "resid_mean", "--cv", "2", "--missing", "drop", "--model"),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("spelling", ["a path", "a slash at the end", "relative", "the home folder", "the name"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_path(home: Path, acts: Store, capsys: pytest.CaptureFixture[str], command: str, spelling: str) -> None:
    (home / "prompts.txt").write_text("one\n")
    if command == "sweep":
        acts.annotate("toy", {"label": dict(zip(PROMPTS, [0, 1, 0], strict=True))})
        lz.write_activations(
            acts, model="toy", prompts=["four"], pooled={"resid_mean": {0: np.ones((1, 4), "float32")}}, coords={"label": [1]},
            activations={"resid": {0: [np.ones((2, 4), "float32")]}}, provenance=acts.find_group("toy").provenance,
        )  # fmt: skip
    places = {"STORE": acts.storage.url, "PROMPTS": f"{home}/prompts.txt", "TARGET": f"{home}/target", "PAGE": f"{home}/page.html"}
    code, out, error = call(capsys, *(places.get(word, word) for word in COMMANDS[command]), str(SPELLINGS[spelling](home)))
    assert code == 0, error
    assert "acme" not in out
    if command == "delete":
        assert {info.model: len(acts.view(info)) for info in lz.open_store(home / "acts").groups().values()}["toy"] == 2


def test_a_command_that_is_given_another_path_says_what_is_stored(home: Path, acts: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = call(capsys, "info", acts.storage.url, "--model", str(home / "models" / "none"))
    assert code == 1
    assert "acme/other, toy" in error
    assert call_json(capsys, "info", acts.storage.url, "--model", str(home / "models" / "toy"), "--json")["groups"][0]["model"] == "toy"


# ------------------------------------------------------------------------------------------------------- several of one name


@pytest.fixture
def two(home: Path) -> Store:
    """Two folders of one base name, both extracted."""
    store = lz.open_store(home / "acts")
    for value, folder in ((10, home / "models" / "toy"), (30, make_folder(home / "elsewhere" / "toy", 2))):
        fill(store, "toy", value, {"weights": weights_digest(folder), "revision": None})
    return store


def test_a_name_that_two_folders_have_names_both_groups_and_says_how_to_choose(home: Path, two: Store) -> None:
    os.chdir(home)  # where no folder of that name is
    with pytest.raises(AmbiguousProvenanceError) as caught:
        two.dataset("toy")
    message = str(caught.value)
    for info in two.groups().values():
        assert info.name in message
        assert str(info.provenance["weights"]) in message
    assert "model= the path of the folder" in message
    assert "group=" in message


@pytest.mark.parametrize("name", ["dataset", "tokens", "find_group", "engine", "list_cached_prompts"])
def test_of_two_folders_with_one_name_the_path_chooses(home: Path, two: Store, name: str) -> None:
    read: Callable[[Any], float] = {
        "list_cached_prompts": lambda m: 10.0 * len(lz.list_cached_prompts(m, store=two)) / 3 if m == home / "models" / "toy" else 30.0,
        "find_group": lambda m: 10.0 if two.find_group(m).provenance["weights"] == weights_digest(home / "models" / "toy") else 30.0,
    }.get(name, lambda m: CALLS[name](two, m))
    assert read(home / "models" / "toy") == 10.0
    assert read(home / "elsewhere" / "toy") == 30.0


def test_the_name_of_a_folder_that_is_here_means_that_folder_as_for_extract(two: Store, home: Path) -> None:
    assert CALLS["dataset"](two, "toy") == 10.0  # the working directory has a folder of that name
    os.chdir(home / "elsewhere")
    assert CALLS["dataset"](two, "toy") == 30.0


def test_a_path_never_deletes_what_another_folder_of_its_name_computed(home: Path, acts: Store) -> None:
    other = make_folder(home / "elsewhere" / "toy", 2)
    removals: list[Callable[[], object]] = [lambda: acts.delete(other, ["one"]), lambda: acts.drop(other, ["resid"])]
    for remove in removals:
        with pytest.raises(ModelNotStoredError, match="has other weights, or does not record them"):
            remove()
    assert lz.clear_cache(other, url=acts) == 0
    assert acts.dataset("toy").sizes["prompt"] == 3


def test_a_model_whose_weights_changed_is_another_one_by_its_path_and_the_same_by_its_name(home: Path, acts: Store) -> None:
    (home / "models" / "toy" / "model.safetensors").write_bytes(b"trained further")
    with pytest.raises(ModelNotStoredError, match="name it by model='toy'"):
        acts.dataset(home / "models" / "toy")
    assert acts.dataset("toy").sizes["prompt"] == 3


def test_a_folder_that_was_extracted_under_another_name_is_found_by_its_path(home: Path) -> None:
    store = lz.open_store(home / "acts")
    fill(store, "mine", 40, {"weights": weights_digest(home / "models" / "toy")})
    assert CALLS["dataset"](store, home / "models" / "toy") == 40.0
    assert CALLS["dataset"](store, "mine") == 40.0


def test_a_folder_that_is_gone_is_known_by_its_name(home: Path, acts: Store) -> None:
    shutil.rmtree(home / "models" / "toy")
    assert CALLS["dataset"](acts, str(home / "models" / "toy")) == 10.0
    assert CALLS["dataset"](acts, Path("toy")) == 10.0


def test_a_snapshot_in_the_hubs_cache_is_the_folder_that_extract_took(home: Path) -> None:
    folder = make_folder(home / "hub" / "models--acme--tiny" / "snapshots" / ("d" * 40), 5)
    store = lz.open_store(home / "acts")
    fill(store, "acme/tiny", 50, {"weights": weights_digest(folder)})
    assert CALLS["dataset"](store, folder) == CALLS["dataset"](store, "acme/tiny") == 50.0


def test_a_hub_model_is_found_by_its_snapshot(home: Path) -> None:
    snapshots = home / "hub" / "models--acme--tiny" / "snapshots"
    store = lz.open_store(home / "acts")
    for value, letter in ((60, "a"), (70, "b")):
        make_folder(snapshots / (letter * 40), value)
        fill(store, "acme/tiny", value, {"weights": None, "revision": letter * 40})
    assert CALLS["dataset"](store, snapshots / ("a" * 40)) == 60.0
    assert CALLS["dataset"](store, snapshots / ("b" * 40)) == 70.0
    with pytest.raises(AmbiguousProvenanceError):
        store.dataset("acme/tiny")


def test_a_name_is_looked_up_without_reading_a_folder(home: Path, acts: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.store.named.weights_digest", lambda *_: pytest.fail("the weights were read"))
    assert CALLS["dataset"](acts, "toy") == 10.0


def test_a_loaded_model_is_refused_with_what_to_give(acts: Store) -> None:
    calls: list[Callable[[Any], object]] = [acts.dataset, acts.coverage, acts.find_group]
    for call_of in calls:
        with pytest.raises(InvalidTypeError, match="give the name that it is stored under"):
            call_of(object())


# ------------------------------------------------------------------------------------------------------ names that are paths


@pytest.mark.few(8)
@pytest.mark.parametrize("given", ["models/toy", "./models/toy/", "HOME/models/toy", "~/models/toy"])
@pytest.mark.parametrize("asked", ["models/toy", "models/toy/", "HOME/models/toy", "~/models/toy", "./models/../models/toy"])
def test_an_import_under_a_path_is_found_by_every_path_of_that_folder(home: Path, given: str, asked: str) -> None:
    os.chdir(home)
    name = given.replace("HOME", str(home))
    store = lz.open_store(home / "acts")
    fill(store, name, 60, {})
    assert CALLS["dataset"](store, asked.replace("HOME", str(home))) == 60.0


def test_what_names_a_model_is_one_rule() -> None:
    groups = [GroupInfo(model="acme/toy"), GroupInfo(model="toy"), GroupInfo(model="/old/place/toy")]
    chosen = {given: [info.model for info in NamedModel(given).choose(groups)] for given in ("toy", "acme/toy", "/old/place/toy", "x")}
    assert chosen == {"toy": ["toy"], "acme/toy": ["acme/toy"], "/old/place/toy": ["/old/place/toy"], "x": []}
    assert [info.model for info in NamedModel("/new/place/toy").choose(groups)] == ["toy"]
