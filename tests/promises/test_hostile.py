"""Input of people who mean harm: nothing outside of the store is read, written or removed, and no code of theirs runs."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from foreign_caches import MODEL, add_model, add_prompt, prompt_tensors, sha16
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.bridges import lmprobe_folders
from lmprobe_zarr.bridges.files import open_files
from lmprobe_zarr.cli.prompt_files import read_prompts
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, LmprobeZarrError, NotAStoreError, ReadOnlyError
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.store import Store


def reseal(document: Path, change: Callable[[Any], object]) -> None:
    """Change a part's document as somebody does who knows the format: its digest holds."""
    content = json.loads(document.read_bytes())
    change(content)
    content["attributes"]["digest"] = "crc32c:00000000"
    data = json.dumps(content, separators=(",", ":")).encode()
    document.write_bytes(data.replace(b"crc32c:00000000", b"crc32c:%08x" % google_crc32c.value(data), 1))


def state_of(*folders: Path) -> dict[str, bytes | None]:
    """Everything below some folders, byte by byte."""
    return {str(p): p.read_bytes() if p.is_file() else None for folder in folders for p in [folder, *folder.rglob("*")]}


def one_part(root: Path, **options: Any) -> tuple[Store, Path]:
    store = lz.open_store(root, durable=False)
    store.write(GROUP, make_batch(["a", "b"], **options))
    return store, root / store.view(GROUP).parts[0].path


# ------------------------------------------------------------------------------------------------- paths that climb


CLIMBS = ["../../../victim", "../../../../victim", "prompts/../../../../victim", "{victim}", "prompts/resid_mean/../../../../../victim"]


@pytest.mark.few(7)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("climb", CLIMBS)
def test_a_part_that_names_files_outside_of_itself_is_refused_whole(
    tmp_path: Path, climb: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are what eviction removes and what a copy writes: believed, a shared store could do both anywhere."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    monkeypatch.setattr(writer, "PART_VERSION", version)
    _, part = one_part(tmp_path / "s")
    name = climb.format(victim=victim)
    reseal(part / "zarr.json", lambda d: d["attributes"]["files"].update({name: [4, google_crc32c.value(b"mine")]}))
    before = state_of(tmp_path)
    fresh = lz.open_store(tmp_path / "s", durable=False)
    # The table of files stays bytes while a view is opened; whatever uses any of it finds the whole of it false.
    # Chunks of the variables of format 2 are not in it.
    tokens = (lambda: fresh.tokens().resid.isel(layer=0, token=0).values) if version == 1 else (lambda: fresh.tokens().token_id.values)
    for read in (lambda: fresh.dataset().load(), tokens):
        with pytest.raises(CorruptPartError, match="is no file of a part") as caught:
            read()
        assert caught.value.part == str(part.relative_to(tmp_path / "s"))
    for act in (
        lambda: fresh.delete("acme/toy", ["a", "b"]),
        lambda: fresh.drop("acme/toy", ["resid"]),
        lambda: fresh.compact(progress=False),
        lambda: fresh.copy_to(tmp_path / "home" / "mine", progress=False),
        lambda: fresh.publish(tmp_path / "home" / "pub", progress=False),
    ):
        with pytest.raises(CorruptPartError):
            act()
    with pytest.warns(lz.errors.CacheWarning):
        lz.evict(fresh, max_gb=0, min_age=0)
    fresh.gc(max_age=0)
    lz.clear_cache(url=fresh)
    after = state_of(tmp_path)
    assert {path: after.get(path) for path in before} == before or not (tmp_path / "s" / GROUP.name / "zarr.json").exists()
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "home").exists() or not [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.name != "zarr.json"]


NAMES = [
    "../../outside",
    "/etc/passwd",
    "..",
    ".",
    "~root",
    "a\0b",
    "C:\\windows\\system32",
    "\\\\server\\share",
    "CON",
    "NUL.txt",
    "com1",
    "con",
    "Con",
    "a/../../b",
    "%2e%2e%2fup",
    "\u202egpj.exe",
    "tail. ",
    "\n\r\t\x1b[2J",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    "Ⅷ",
    "VIII",
    "ﬁ",
    "fi",
    "x" * 300,
    "z" * 10_000_000,
    "\ud800",
]


UNSHOWN = [name for name in NAMES if not name.isprintable()]
SHOWN = [name for name in NAMES if name.isprintable()]


@pytest.mark.parametrize("name", UNSHOWN)
def test_model_names_that_would_act_on_a_terminal_are_refused_wherever_they_come_from(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be shown"):
        lz.write_activations(tmp_path / "s", model=name, prompts=["p"], pooled={"resid_mean": {0: np.zeros((1, 4), "f4")}})
    assert list(tmp_path.iterdir()) == []
    one_part(tmp_path / "s")
    group = tmp_path / "s" / GROUP.name / "zarr.json"
    document = json.loads(group.read_bytes())
    document["attributes"]["model"] = name
    group.write_text(json.dumps(document))
    with pytest.raises(CorruptPartError) as error:
        lz.open_store(tmp_path / "s").models()
    assert str(error.value).replace("\n", "").isprintable()
    add_prompt(add_model(tmp_path / "cache", "good"), "a", prompt_tensors(0))
    folder = tmp_path / "cache" / lmprobe_folders.model_hash(name)
    folder.mkdir()
    (folder / "_model_name.txt").write_bytes(name.encode("utf-8", "surrogatepass"))
    summary = lz.import_safetensors(tmp_path / "cache", tmp_path / "t", progress=False)
    assert summary.imported == 1
    assert str(summary).replace("\n", "").isprintable()


def test_provenance_that_would_act_on_a_terminal_is_shown_as_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lmprobe_zarr.cli import main

    store = lz.open_store(tmp_path / "s", durable=False)
    provenance = {"template": "\x1b[2J\x07", "half": "\ud800"}
    pooled = {"resid_mean": {0: np.zeros((2, 4), "f4")}}
    for texts, fields in ((["\x1b[2J", "\ud800"], {}), (["\x1b[2J", "b"], provenance)):
        with pytest.raises(InvalidArgumentError, match=r"'.ud800' holds a lone surrogate"):
            lz.write_activations(store, model="m", prompts=texts, pooled=pooled, provenance=fields)
    # As versions before this check stored them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmprobe_zarr.store.store.check_new_provenance", lambda provenance: None)
        lz.write_activations(store, model="m", prompts=["\x1b[2J", "b"], pooled=pooled, provenance=provenance)
    for command in (["info"], ["show", "--list", "5"], ["info", "--json"], ["show", "--json"]):
        assert main([command[0], str(tmp_path / "s"), *command[1:]]) in (0, None)
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        printed.encode()
    store.publish(tmp_path / "pub", progress=False)
    assert "\x1b" not in (tmp_path / "pub" / "README.md").read_text()


def test_model_names_made_to_climb_each_get_a_folder_of_their_own_in_the_root(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "er" / "s"
    store = lz.open_store(root, durable=False)
    every = SHOWN if "LMPROBE_ZARR_STRESS" in os.environ else SHOWN[::3]
    for i, name in enumerate(every):
        lz.write_activations(store, model=name, prompts=["p"], pooled={"resid_mean": {0: np.full((1, 4), i, "f4")}})
    fresh = lz.open_store(root)
    assert fresh.models() == sorted(every)
    for i, name in enumerate(every):
        assert fresh.dataset(name).resid_mean.values.ravel().tolist() == [i] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["s"]
    groups = [p.name for p in root.iterdir() if p.is_dir()]
    assert len({name.casefold() for name in groups}) == len(every), "none meets another where case is folded"
    assert all(len(name) < 100 and name.isascii() for name in groups)
    with pytest.raises(lz.errors.AmbiguousProvenanceError) as error:
        fresh.dataset()
    assert len(str(error.value)) < 3000
    assert len(str(error.value).splitlines()) <= 2
    exported = every if "LMPROBE_ZARR_STRESS" in os.environ else every[::3]
    for name in exported:
        lz.export_safetensors(fresh, tmp_path / "out" / "cache", model=name, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["cache"]
    assert {p.name for p in (tmp_path / "out" / "cache").iterdir()} == {lmprobe_folders.model_hash(name) for name in exported}


def test_prompts_made_to_climb_are_only_ever_hashed_and_come_back_as_they_were(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "s"
    values = {"resid_mean": {0: np.arange(len(NAMES) * 4, dtype="f4").reshape(-1, 4)}}
    with pytest.raises(InvalidArgumentError, match=rf"prompts\[{len(NAMES) - 1}\] '.ud800' holds a lone surrogate"):
        lz.write_activations(lz.open_store(root, durable=False), model="m", prompts=NAMES, pooled=values)
    values = {"resid_mean": {0: values["resid_mean"][0][:-1]}}
    lz.write_activations(lz.open_store(root, durable=False), model="m", prompts=NAMES[:-1], pooled=values)
    data = lz.open_store(root).dataset(prompts=NAMES[:-1])
    assert data.text.values.tolist() == NAMES[:-1]
    np.testing.assert_array_equal(data.resid_mean.values[0], values["resid_mean"][0])
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s"]
    assert "passwd" not in "".join(str(p) for p in root.rglob("*"))
    with pytest.raises(LmprobeZarrError):
        lz.open_store(root).dataset(prompts=["../outside"])


@pytest.mark.parametrize("name", ["../up", "/abs", "a\0b", "resid_mean/../../x", "resid/..", "", "resid_mean\n"])
def test_names_of_variables_and_columns_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    store = lz.open_store(tmp_path / "s", durable=False)
    value = np.zeros((1, 4), "f4")
    with pytest.raises(InvalidArgumentError):
        lz.write_activations(store, model="m", prompts=["p"], pooled={name: {0: value}})
    with pytest.raises(InvalidArgumentError):
        lz.write_activations(store, model="m", prompts=["p"], activations={name: {0: [value]}})
    with pytest.raises(InvalidArgumentError):
        lz.write_activations(store, model="m", prompts=["p"], pooled={"resid_mean": {0: value}}, coords={name: [1]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["a\0b", "", "s3://\0/x", "nosuchprotocol://x"])
def test_places_that_cannot_be_are_refused(place: str) -> None:
    with pytest.raises(LmprobeZarrError):
        lz.open_store(place, "r").models()


# -------------------------------------------------------------------------------------------------------------- links


def acts() -> dict[str, Callable[[Store], object]]:
    return {
        "clear": lambda s: lz.clear_cache(url=s),
        "evict": lambda s: lz.evict(s, max_gb=0, min_age=0),
        "gc": lambda s: s.gc(max_age=0),
        "delete": lambda s: s.delete("acme/toy", ["a", "b"]),
        "drop": lambda s: s.drop("acme/toy", ["resid", "resid_mean"]),
        "compact and gc": lambda s: (s.compact(progress=False), s.gc(max_age=0)),
        "clear in place of the owner": lambda s: lz.clear_cache("acme/toy", url=s),
    }


@pytest.mark.few(11)
@pytest.mark.parametrize("act", acts())
@pytest.mark.parametrize("where", ["the group", "the part", "prompts", "prompts/resid_mean", "an unfinished part", "the annotations"])
def test_what_a_link_in_a_store_leads_to_is_never_removed(tmp_path: Path, where: str, act: str) -> None:
    """Somebody links a part of a shared store into their own: emptying theirs must not empty the shared one."""
    theirs, part = one_part(tmp_path / "theirs")
    theirs.annotate("acme/toy", {"label": {"a": 1}})
    mine = lz.open_store(tmp_path / "mine", durable=False)
    mine.write(GROUP, make_batch(["c"], seed=3))
    mine.write(GROUP, make_batch(["c"], seed=4))
    group = tmp_path / "mine" / GROUP.name
    if where == "the group":
        for path in sorted(group.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        group.rmdir()
        group.symlink_to(tmp_path / "theirs" / GROUP.name)
    elif where == "the annotations":
        (group / "annotations").symlink_to(tmp_path / "theirs" / GROUP.name / "annotations")
    else:
        if where == "an unfinished part":
            (part / "zarr.json").unlink()
        if "part" in where:
            (group / part.name).symlink_to(part)
        else:
            (group / part.name).mkdir()
            for path in [p for p in part.rglob("*") if p.is_file()]:
                name = path.relative_to(part)
                if not str(name).startswith(f"{where}/"):
                    (group / part.name / name).parent.mkdir(parents=True, exist_ok=True)
                    (group / part.name / name).write_bytes(path.read_bytes())
            link = group / part.name / where
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(part / where)
    before = state_of(tmp_path / "theirs")
    fresh = lz.open_store(tmp_path / "mine", durable=False)
    try:
        acts()[act](fresh)
    except ReadOnlyError as error:
        assert "link" in str(error)  # noqa: PT017
    except lz.errors.MissingPromptsError:
        assert where in ("an unfinished part", "the annotations")
    after = state_of(tmp_path / "theirs")
    stamps = {path for path in after if "/.used" in path}
    assert {path for path in before if before[path] is not None and after.get(path) != before[path]} == set(), "nothing of theirs changes"
    if where != "the group":  # what is written into a linked group is written there, as anywhere behind a link
        assert set(after) - stamps == set(before)
    if act in ("clear", "evict") and where != "the group":
        assert not any((path / "zarr.json").is_file() for path in group.iterdir() if path.name not in (part.name, "annotations"))


def test_a_linked_store_and_a_linked_part_still_read(tmp_path: Path) -> None:
    _, part = one_part(tmp_path / "theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    assert len(lz.open_store(tmp_path / "link").dataset().prompt) == 2
    mine = lz.open_store(tmp_path / "mine", durable=False)
    mine.write(GROUP, make_batch(["c"], seed=3))
    (tmp_path / "mine" / GROUP.name / part.name).symlink_to(part)
    assert sorted(lz.open_store(tmp_path / "mine").dataset().text.values) == ["a", "b", "c"]
    # Where the root itself is a link, what lies in it is its own.
    lz.clear_cache(url=tmp_path / "link")
    assert lz.open_store(tmp_path / "theirs").models() == []


def test_files_that_are_links_are_unlinked_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    _, part = one_part(tmp_path / "s")
    secret = tmp_path / "secret"
    secret.write_bytes((part / "prompts/resid_mean/c.0.0.0").read_bytes())
    (part / "prompts/resid_mean/c.0.0.0").unlink()
    (part / "prompts/resid_mean/c.0.0.0").symlink_to(secret)
    before = secret.read_bytes()
    lz.clear_cache(url=tmp_path / "s")
    assert secret.read_bytes() == before
    assert not part.exists()


def test_links_to_nowhere_and_to_themselves_disturb_nothing(tmp_path: Path) -> None:
    store, _ = one_part(tmp_path / "s")
    group = tmp_path / "s" / GROUP.name
    for folder in (tmp_path / "s", group):
        (folder / "loop").symlink_to("loop")
        (folder / "nowhere").symlink_to(tmp_path / "gone")
        (folder / "pipe").mkdir()
    store.compact(progress=False)
    store.gc(max_age=0)
    fresh = lz.open_store(tmp_path / "s")
    assert fresh.models() == ["acme/toy"]
    assert len(fresh.dataset().prompt) == 2
    assert len(lz.cache_info(store=fresh).models) == 1
    lz.evict(fresh, max_gb=0, min_age=0)
    assert (group / "loop").is_symlink()


def test_clearing_lmprobes_own_entries_removes_nothing_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    for name in ("inside", "linked"):
        add_prompt(add_model(outside if name == "linked" else cache, name), "a", prompt_tensors(0))
    (cache / sha16("linked")).symlink_to(outside / sha16("linked"), target_is_directory=True)
    entry = next((cache / sha16("inside")).glob("*.safetensors"))
    entry.rename(outside / "entry")
    entry.symlink_to(outside / "entry")
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(cache))
    before = state_of(outside)
    lz.clear_cache(legacy=True)
    assert state_of(outside) == before


# ---------------------------------------------------------------------------------------------------------- documents


ENDLESS = {"lists": b"[" * 100_000, "objects": b'{"a":' * 50_000, "ff": b"\xff" * 100, "nul": b"\0" * 1000, "a number": b"9" * 100_000}


@pytest.mark.parametrize("content", ENDLESS.values(), ids=list(ENDLESS))
def test_documents_without_end_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    one_part(tmp_path / "s")
    group = tmp_path / "s" / GROUP.name
    part = next(p for p in group.iterdir() if len(p.name) == 26)
    for document, kind in (
        (part / "zarr.json", CorruptPartError),
        (group / "zarr.json", CorruptPartError),
        (tmp_path / "s" / "zarr.json", NotAStoreError),
    ):
        document.write_bytes(content)
        with pytest.raises(kind) as error:
            lz.open_store(tmp_path / "s").dataset()
        assert len(str(error.value)) < 600
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(InvalidArgumentError):
        read_prompts(str(tmp_path / "p.jsonl"))
    folder = add_model(tmp_path / "cache", MODEL)
    (folder / "_manifest.jsonl").write_bytes(content)
    assert lmprobe_folders.read_manifest(open_files(tmp_path / "cache"), folder.name).texts == {}


def test_a_manifest_that_names_anything_but_texts_costs_only_those_lines(tmp_path: Path) -> None:
    folder = add_model(tmp_path, MODEL)
    good = {"hash": lz.prompt_hash("good"), "prompt": "good"}
    strange: list[Any] = [
        {"hash": lz.prompt_hash([1, 2]), "prompt": [1, 2]},
        {"hash": "0" * 16, "prompt": [2**70]},
        {"hash": [], "prompt": "x"},
        {"hash": lz.prompt_hash("x"), "prompt": {"x": 1}},
        {"prompt": "x"},
        ["hash", "prompt"],
        "hash prompt",
        7,
    ]
    (folder / "_manifest.jsonl").write_text("\n".join(json.dumps(line) for line in [*strange, good]))
    manifest = lmprobe_folders.read_manifest(open_files(tmp_path), folder.name)
    assert (dict(manifest.texts), manifest.bad_lines) == ({lz.prompt_hash("good"): "good"}, len(strange))


def test_prompts_in_files_are_cut_at_ends_of_lines_only(tmp_path: Path) -> None:
    texts = ["one\u2028line", "and\x0bone", "next\x85one", "file\x1cseparator"]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), encoding="utf-8")
    (tmp_path / "p.txt").write_text("\r\n".join(texts), encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.jsonl"))[0] == texts
    assert read_prompts(str(tmp_path / "p.txt"))[0] == texts


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "numcodecs.pickle", "configuration": {}}],
        [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {"protocol": 5}}],
        [{"name": "vlen-utf8"}, {"name": "os.system", "configuration": {"command": "touch trap"}}],
        [{"name": "numcodecs.json2", "configuration": {}}],
        [{"name": "bytes"}, {"name": "zstd"}, {"name": "crc32c"}],
        [{"name": ["bytes"]}],
        "pickle",
    ],
)
def test_codecs_that_we_do_not_write_are_refused_and_never_looked_up(tmp_path: Path, codecs: Any) -> None:
    _, part = one_part(tmp_path / "s")
    arrays = [p for p in part.rglob("zarr.json") if json.loads(p.read_bytes())["node_type"] == "array"]
    for path in arrays:  # the arrays' own documents are for others: ours is the part's
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "codecs": codecs}))
    assert np.isfinite(lz.open_store(tmp_path / "s").dataset().resid_mean.values).all()
    reseal(part / "zarr.json", lambda d: d["consolidated_metadata"]["metadata"]["prompts/resid_mean"].update(codecs=codecs))
    with pytest.raises(CorruptPartError):
        lz.open_store(tmp_path / "s").dataset()


def test_attributes_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    _, part = one_part(tmp_path / "s")
    lie = {"stored_dtype": [1, {"a": 2}]}
    reseal(part / "zarr.json", lambda d: d["consolidated_metadata"]["metadata"]["prompts/resid_mean"].update(attributes=lie))
    with pytest.raises(CorruptPartError):
        lz.open_store(tmp_path / "s").compact(progress=False)


def set_written(written: Any, document: Any) -> None:
    document["attributes"]["recorded"]["written"] = written


def test_a_part_from_beyond_the_end_of_time_is_listed_like_any_other(tmp_path: Path) -> None:
    _, part = one_part(tmp_path / "s")
    for written in ("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "0001-01-01T00:00:00", "", "never", None, [1]):
        reseal(part / "zarr.json", partial(set_written, written))
        info = lz.cache_info(store=tmp_path / "s")
        assert "acme/toy" in str(info)
        assert [p.prompt for p in lz.list_cached_prompts("acme/toy", store=tmp_path / "s")] == ["a", "b"]
    late = part.with_name("7zzzzzzzzz" + part.name[10:])
    part.rename(late)
    reseal(late / "zarr.json", lambda d: d["attributes"].update(name=late.name))
    reseal(late / "zarr.json", lambda d: d["attributes"]["recorded"].pop("written"))
    assert "acme/toy" in str(lz.cache_info(store=tmp_path / "s"))
    lz.evict(tmp_path / "s", max_gb=0, min_age=0)
    assert lz.open_store(tmp_path / "s").models() == []


def test_a_header_of_a_million_names_with_one_twice_is_refused_at_once() -> None:
    from lmprobe_zarr.safetensors_file import parse_header

    body = b"{" + b",".join(b'"%x":0' % i for i in range(400_000)) + b',"zz":0,"zz":0}'
    with pytest.raises(ValueError, match="'zz' occurs twice"):
        parse_header(len(body).to_bytes(8, "little") + body)


def test_values_nested_almost_as_deep_as_python_goes_are_a_value_error() -> None:
    from lmprobe_zarr.safetensors_file import parse_header

    for depth in range(850, 1000):
        deep = "[" * depth + "]" * depth
        for body in (
            f'{{"a":{{"dtype":"F32","shape":{deep},"data_offsets":[0,0]}}}}',
            f'{{"a":{{"dtype":{deep},"shape":[],"data_offsets":[]}}}}',
        ):
            with pytest.raises(ValueError):  # noqa: PT011 — which of many is of no interest
                parse_header(len(body).to_bytes(8, "little") + body.encode())


# ------------------------------------------------------------------------------------------------------------ the models


@pytest.mark.model
def test_a_pt_file_that_claims_terabytes_or_unpacks_to_gigabytes_is_skipped(tmp_path: Path) -> None:
    import io
    import zipfile

    torch = pytest.importorskip("torch")
    from foreign_caches import add_folder, prompt_folder

    wide = torch.zeros(1).expand(1, 2**38)
    add_folder(tmp_path / "c", sha16("mask"), {**prompt_folder(0), "attention_mask": torch.zeros(1, dtype=torch.int64).expand(1, 2**38)})
    add_folder(tmp_path / "c", sha16("layer"), {**prompt_folder(0), "layer_1": wide[..., None].expand(1, 2**38, 3)})
    good = add_folder(tmp_path / "c", sha16("good"), prompt_folder(0))
    packed = add_folder(tmp_path / "c", sha16("packed"), prompt_folder(0))
    data = io.BytesIO()
    with zipfile.ZipFile(packed / "layer_1.pt") as old, zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.namelist():
            new.writestr(item, old.read(item))
    (packed / "layer_1.pt").write_bytes(data.getvalue())
    summary = lz.import_pt(tmp_path / "c", tmp_path / "s", model=MODEL, progress=False)
    assert summary.imported == 1
    assert sum(reason.count for reason in summary.skipped) == 3
    assert [p.hash for p in lz.list_cached_prompts(MODEL, store=tmp_path / "s")] == [good.name]


OWN_CODE = """
import pathlib
pathlib.Path({trap!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "made_up"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.model
def test_code_in_a_models_folder_runs_only_with_trust_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from tiny_models import save_tiny

    from lmprobe_zarr.extraction.models import load_model

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, trap = save_tiny("llama", tmp_path / "tiny"), tmp_path / "was-run"
    (folder / "made_up.py").write_text(OWN_CODE.format(trap=str(trap)))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "made_up.Config", "AutoModelForCausalLM": "made_up.Model", "AutoModel": "made_up.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "made_up", "auto_map": own}))
    # There is no question on the terminal either, where any key could be taken for a yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    calls: list[Callable[[], object]] = [
        lambda: load_model(folder, device="cpu"),
        lambda: lz.extract(str(folder), ["a"], store=tmp_path / "s", device="cpu", progress=False),
        lambda: lz.Probe(model=str(folder), layers=0).fit(["a"], ["b"]),
    ]
    for call in calls:
        with pytest.raises(LmprobeZarrError):
            call()
        assert not trap.exists()
    lz.plan_extract(str(folder), ["a"], store=tmp_path / "s")
    lz.cache_info(str(folder))
    assert not trap.exists()
    with suppress(LmprobeZarrError):
        load_model(folder, device="cpu", trust_remote_code=True)
    assert trap.exists(), "it would have been noticed"
