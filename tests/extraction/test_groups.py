"""Imported groups serve `extract`, `plan_extract` and `Probe` where the caller says that they are of the same model, and that is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import local_client
from command_line import call, call_json

import lmprobe_zarr as lz
from lmprobe_zarr.errors import AmbiguousProvenanceError, CacheWarning, InvalidArgumentError, InvalidTypeError, MissingPromptsError
from lmprobe_zarr.store.format import GroupInfo, unrecorded_fields
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from foreign_caches import add_folder, sha16  # noqa: E402 — needs torch
from tiny_models import tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.model

POSITIVE = [f"I love the dog number {i}, what a walk" for i in range(5)]
NEGATIVE = [f"The {i} rainy foxes are sad" for i in range(5)]
PROMPTS = [*POSITIVE, *NEGATIVE]
NEW = ["a walk in the park", "sad foxes everywhere"]


@pytest.fixture(scope="module")
def llama(tiny_models: Callable[..., Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def truth(llama: Path) -> dict[str, list[Any]]:
    """Every block's output of each prompt alone, by transformers itself: {prompt: [array(token, hidden) by layer]}."""
    from transformers import AutoModel

    model, tokenizer = AutoModel.from_pretrained(llama, dtype=torch.float32).eval(), tiny_tokenizer()
    found: dict[str, list[Any]] = {}
    kept: list[Any] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).reshape(-1, 32).numpy())

    for block in model.layers:
        block.register_forward_hook(keep)
    for prompt in [*PROMPTS, *NEW]:
        kept.clear()
        with torch.no_grad():
            model(**tokenizer(prompt, return_tensors="pt"))
        found[prompt] = list(kept)
    return found


def write(store: Store, truth: dict[str, list[Any]], name: str, **options: Any) -> str:
    tokens = {layer: [truth[prompt][layer] for prompt in PROMPTS] for layer in range(4)}
    return lz.write_activations(store, model=name, prompts=PROMPTS, activations={"resid": tokens}, **options)


def written(folder: Path, truth: dict[str, list[Any]], llama: Path) -> str:
    return write(lz.open_store(folder / "acts"), truth, llama.name)


def imported_v2(folder: Path, truth: dict[str, list[Any]], llama: Path) -> str:
    """By way of lmprobe's files, under the path that lmprobe was given."""
    source = lz.open_store(folder / "source")
    write(source, truth, str(llama))
    lz.export_safetensors(source, folder / "cache", progress=False)
    return lz.import_safetensors(folder / "cache", folder / "acts", progress=False).groups[0]


def imported_v1(folder: Path, truth: dict[str, list[Any]], llama: Path) -> str:
    for prompt in PROMPTS:
        tensors = {f"layer_{layer}": torch.tensor(truth[prompt][layer])[None] for layer in range(4)}
        mask = torch.ones(1, len(truth[prompt][0]), dtype=torch.int64)
        add_folder(folder / "cache", sha16(prompt), {**tensors, "attention_mask": mask}, model=str(llama))
    summary = lz.import_pt(folder / "cache", folder / "acts", model=llama, prompts=PROMPTS, progress=False)
    assert summary.imported == len(PROMPTS)
    return summary.groups[0]


MADE = {"write_activations": written, "lmprobe's v2": imported_v2, "lmprobe's v1": imported_v1}


@pytest.fixture(params=list(MADE))
def moved(request: pytest.FixtureRequest, tmp_path: Path, truth: dict[str, list[Any]], llama: Path) -> tuple[Store, str]:
    """A store that holds all prompts in a group of unknown provenance, and the name of that group."""
    group = MADE[request.param](tmp_path, truth, llama)
    return lz.open_store(tmp_path / "acts"), group


def options_of(how: str, group: str) -> dict[str, Any]:
    return {"group": group} if how == "group" else {"provenance": "any"}


# ----------------------------------------------------------------------------------------------------------- the caller says so


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["group", "any"])
def test_an_imported_group_serves_where_the_caller_says_that_it_is_this_model(
    moved: tuple[Store, str], truth: dict[str, list[Any]], llama: Path, how: str, runs: list[int], tmp_path: Path
) -> None:
    store, group = moved
    given = options_of(how, group)
    plan = lz.plan_extract(llama, PROMPTS, store=store, **given)
    assert (plan.found, plan.missing, plan.group) == (10, 0, group)
    stats = lz.extract(llama, PROMPTS, store=store, progress=False, **given)
    assert (stats.found, stats.extracted, stats.model_loaded, stats.group) == (10, 0, False, group)
    rows = store.dataset(llama, PROMPTS, group=group).resid_last_token
    for number, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(rows.values[:, number], [layer[-1] for layer in truth[prompt]])
    probe = lz.Probe(llama, layers="all", store=store, cache_only=True, **given).fit(POSITIVE, NEGATIVE)
    assert probe.warmup(PROMPTS).hit_rate == 1.0
    own = lz.Probe(llama, layers="all", store=tmp_path / "own", device="cpu").fit(POSITIVE, NEGATIVE)
    np.testing.assert_allclose(probe.predict_proba(PROMPTS), own.predict_proba(PROMPTS), atol=1e-5)
    found = lz.discover_cached(llama, PROMPTS[0], store=store, **given)
    assert found is not None
    assert found.raw_layers == [0, 1, 2, 3]
    assert len(lz.list_cached_prompts(llama, store=store, **given)) == 10
    assert runs == [10]  # by the probe with a store of its own


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["group", "any"])
def test_what_the_group_lacks_is_added_to_it_with_its_provenance_in_the_part(
    moved: tuple[Store, str], truth: dict[str, list[Any]], llama: Path, how: str, runs: list[int], tmp_path: Path
) -> None:
    store, group = moved
    stats = lz.extract(llama, [*NEW, *PROMPTS], store=store, device="cpu", progress=False, **options_of(how, group))
    assert (stats.found, stats.extracted, stats.group) == (10, 2, group)
    assert runs == [2]
    rows = store.dataset(group=group, prompts=[*NEW, *PROMPTS]).resid_last_token.values
    for number, prompt in enumerate([*NEW, *PROMPTS]):
        np.testing.assert_allclose(rows[:, number], [layer[-1] for layer in truth[prompt]], atol=1e-5)
    last = store.view(store.groups()[group]).parts[-1].info.recorded["provenance"]
    assert last["compute_dtype"] == "float32"
    assert str(last["weights"]).startswith("sha256:")
    assert list(store.groups()) == [group]


@pytest.mark.few(2)
def test_a_model_object_is_served_too(moved: tuple[Store, str], llama: Path, runs: list[int]) -> None:
    from transformers import AutoModel

    store, group = moved
    model = AutoModel.from_pretrained(llama, dtype=torch.float32)
    given = {"name": "mine", "tokenizer": tiny_tokenizer(), "store": store}
    with pytest.raises(InvalidArgumentError, match="if that is the same model, say so with name="):
        lz.plan_extract(model, PROMPTS, group=group, **given)
    named = {**given, "name": store.groups()[group].model}
    assert lz.plan_extract(model, PROMPTS, group=group, **named).missing == 0
    assert lz.extract(model, PROMPTS, provenance="any", progress=False, **named).extracted == 0
    assert runs == []


def test_workers_add_to_the_group_that_was_found(tmp_path: Path, truth: dict[str, list[Any]], llama: Path) -> None:
    store = lz.open_store(tmp_path)
    group = write(store, truth, llama.name)
    with local_client(workers=1) as client:
        stats = lz.extract(llama, [*PROMPTS, *NEW], store=store, device="cpu", client=client, provenance="any", progress=False)
    assert (stats.found, stats.extracted, stats.group) == (10, 2, group)
    assert list(lz.open_store(tmp_path).groups()) == [group]


# ---------------------------------------------------------------------------------------------------------------- what is said


@pytest.mark.few(1)
def test_what_is_unknown_is_said_in_plan_log_result_and_info(
    moved: tuple[Store, str], llama: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    store, group = moved
    unknown = unrecorded_fields({})
    assert set(unknown) >= {"revision", "weights", "compute_dtype", "tokenizer", "special_tokens", "truncation"}
    plan = lz.plan_extract(llama, PROMPTS, store=store, group=group)
    assert plan.unknown == unknown
    assert "not recorded by group" in str(plan)
    with caplog.at_level(logging.WARNING, "lmprobe_zarr.cache"):
        for _ in range(3):
            stats = lz.extract(llama, PROMPTS, store=store, group=group, progress=False)
    (line,) = [record.getMessage() for record in caplog.records if "although it does not record" in record.getMessage()]
    assert group in line
    assert all(name in line for name in unknown)
    assert stats.unknown == unknown
    assert "does not record anything of how it was computed" in str(stats)
    (described,) = lz.cache_info(store=store).models
    assert described.unknown == unknown
    assert "provenance not recorded" in str(described)
    assert call_json(capsys, "info", store.storage.url)["groups"][0]["unknown"] == list(unknown)
    assert "revision, weights" in call(capsys, "info", store.storage.url)[1]


@pytest.mark.few(1)
def test_nothing_is_extracted_twice_without_a_word(moved: tuple[Store, str], llama: Path) -> None:
    store, group = moved
    plan = lz.plan_extract(llama, [*PROMPTS, *NEW], store=store)
    assert (plan.found, plan.missing) == (0, 12)
    (held,) = plan.elsewhere
    assert (held.group, held.prompts, held.can_serve) == (group, 10, True)
    assert f"group={group!r} or provenance='any'" in str(plan)
    with pytest.raises(MissingPromptsError, match=f"10 of 12 prompts to extract are stored in group '{group}'"):
        lz.Probe(llama, store=store, layers=0, cache_only=True).warmup([*PROMPTS, *NEW])
    with pytest.warns(CacheWarning, match=f"10 of 12 prompts to extract are stored in group '{group}'"):
        lz.extract(llama, [*PROMPTS, *NEW], store=store, device="cpu", progress=False)
    lz.extract(llama, ["another prompt"], store=store, device="cpu", progress=False)  # which that group does not hold: no warning
    assert lz.plan_extract(llama, PROMPTS, store=store).elsewhere == ()


def test_a_group_in_another_dtype_is_worth_a_word_where_the_call_names_none(tmp_path: Path, tiny_models: Callable[..., Path]) -> None:
    bfloat16 = tiny_models("llama", dtype="bfloat16")
    lz.extract(bfloat16, PROMPTS, store=tmp_path, dtype="float32", device="cpu", progress=False)
    with pytest.warns(CacheWarning, match="computed in another dtype than bfloat16: name that dtype with dtype="):
        lz.extract(bfloat16, PROMPTS[:3], store=tmp_path, device="cpu", progress=False)
    lz.extract(bfloat16, PROMPTS, store=tmp_path, dtype="bfloat16", device="cpu", progress=False)  # it is named: no warning


# ------------------------------------------------------------------------------------------------------ what is not the same model


def test_what_a_group_records_must_agree(tmp_path: Path, truth: dict[str, list[Any]], llama: Path) -> None:
    store = lz.open_store(tmp_path)
    group = write(store, truth, llama.name, provenance={"compute_dtype": "bfloat16", "weights": "sha256:other"})
    with pytest.raises(InvalidArgumentError, match=r"weights is 'sha256:other' there, and 'sha256:"):
        lz.plan_extract(llama, PROMPTS, store=store, group=group)
    assert lz.plan_extract(llama, PROMPTS, store=store, provenance="any").found == 0
    own = write(store, truth, llama.name, provenance={"compute_dtype": "bfloat16"})
    with pytest.raises(InvalidArgumentError, match="compute_dtype is 'bfloat16' there, and 'float32' here"):
        lz.plan_extract(llama, PROMPTS, store=store, group=own, dtype="float32")
    assert lz.plan_extract(llama, PROMPTS, store=store, group=own).found == 10  # no dtype is named: that of the group


def test_a_group_of_another_width_is_of_another_model(tmp_path: Path, llama: Path) -> None:
    group = lz.write_activations(tmp_path, model=llama.name, prompts=PROMPTS, pooled={"resid_last_token": {0: np.ones((10, 7), "f4")}})
    with pytest.raises(InvalidArgumentError, match="hidden_size is 7 there, and 32 here"):
        lz.Probe(llama, layers=0, store=tmp_path, group=group).warmup(PROMPTS)
    with pytest.raises(MissingPromptsError):
        lz.Probe(llama, layers=0, store=tmp_path, provenance="any", cache_only=True).warmup(PROMPTS)


def test_steered_activations_serve_no_plain_call_but_one_that_names_them(tmp_path: Path, llama: Path) -> None:
    lz.extract(llama, PROMPTS, store=tmp_path, provenance={"steering": "v3"}, device="cpu", progress=False)
    assert lz.plan_extract(llama, PROMPTS, store=tmp_path).found == 0
    lz.extract(llama, PROMPTS[:2], store=tmp_path, device="cpu", progress=False)  # of other activations nothing is said


def test_any_prefers_what_records_everything(tmp_path: Path, truth: dict[str, list[Any]], llama: Path) -> None:
    store = lz.open_store(tmp_path)
    own = lz.extract(llama, PROMPTS, store=store, device="cpu", progress=False).group
    imported = write(store, truth, str(llama))
    assert lz.plan_extract(llama, PROMPTS, store=store, provenance="any").group == own
    assert lz.plan_extract(llama, PROMPTS, store=store, provenance="any").unknown == ()
    assert lz.plan_extract(llama, PROMPTS, store=store, group=imported).group == imported
    assert lz.plan_extract(llama, PROMPTS, store=store, provenance="any", keep_tokens=True).group == imported
    found = lz.discover_cached(llama, PROMPTS[0], store=store, provenance="any")
    assert found is not None
    assert found.group == own


@pytest.mark.parametrize("given", ["all", 3, ["any"]])
def test_another_word_for_provenance_is_refused(llama: Path, given: Any) -> None:
    with pytest.raises(InvalidTypeError, match="give a mapping of fields"):
        lz.plan_extract(llama, PROMPTS, provenance=given)


# ------------------------------------------------------------------------------------------------- imported as a model's own


@pytest.fixture
def cache(tmp_path: Path, truth: dict[str, list[Any]], llama: Path) -> Path:
    """A folder of lmprobe's files."""
    write(lz.open_store(tmp_path / "source"), truth, str(llama))
    lz.export_safetensors(tmp_path / "source", tmp_path / "cache", progress=False)
    return tmp_path / "cache"


def test_an_import_that_names_the_model_is_found_as_if_extracted(
    cache: Path, tmp_path: Path, truth: dict[str, list[Any]], llama: Path, runs: list[int]
) -> None:
    store = lz.open_store(tmp_path / "acts")
    summary = lz.import_safetensors(cache, store, as_model=llama, progress=False)
    assert summary.unknown == ()
    assert "computed in float32, on your word" in str(summary)
    assert lz.plan_extract(llama, PROMPTS, store=store).missing == 0
    assert lz.Probe(llama, layers=2, store=store).fit(POSITIVE, NEGATIVE).score(PROMPTS, [1] * 5 + [0] * 5) == 1.0
    assert lz.discover_cached(llama, PROMPTS[0], store=store) is not None
    assert runs == []
    more = lz.extract(llama, [*PROMPTS, *NEW], store=store, device="cpu", progress=False)
    assert (more.found, more.extracted) == (10, 2)
    fresh = lz.extract(llama, NEW, store=tmp_path / "fresh", device="cpu", progress=False)
    assert {more.group} == {fresh.group} == set(summary.groups) == set(store.groups())
    rows = store.dataset(llama, [*PROMPTS, *NEW]).resid_last_token.values
    for number, prompt in enumerate([*PROMPTS, *NEW]):
        np.testing.assert_allclose(rows[:, number], [layer[-1] for layer in truth[prompt]], atol=1e-5)


def test_an_old_cache_is_imported_as_a_model_too(tmp_path: Path, truth: dict[str, list[Any]], llama: Path) -> None:
    imported_v1(tmp_path, truth, llama)
    lz.import_pt(tmp_path / "cache", tmp_path / "own", model=str(llama), prompts=PROMPTS, as_model=llama, progress=False)
    assert lz.plan_extract(llama, PROMPTS, store=tmp_path / "own").missing == 0


def test_the_dtype_that_it_was_computed_in_can_be_named(cache: Path, tmp_path: Path, llama: Path) -> None:
    lz.import_safetensors(cache, tmp_path / "acts", as_model=llama, provenance={"compute_dtype": "bfloat16"}, progress=False)
    assert lz.plan_extract(llama, PROMPTS, store=tmp_path / "acts").found == 0
    assert lz.plan_extract(llama, PROMPTS, store=tmp_path / "acts", dtype="bfloat16").found == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, "these activations are 32 wide, and the model 'other' is 64 wide"),
        ({"num_hidden_layers": 3}, "these activations have a layer 3, and the model 'other' has 3 layers"),
    ],
)
def test_an_import_as_another_model_is_refused_before_anything_is_written(
    cache: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    from tiny_models import save_tiny

    other = save_tiny("llama", tmp_path / "other", **options)
    with pytest.raises(InvalidArgumentError, match=message):
        lz.import_safetensors(cache, tmp_path / "acts", as_model=other, progress=False)
    assert not (tmp_path / "acts").exists()


def test_a_hub_model_that_is_not_on_this_machine_cannot_be_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"revision, .*cannot be known from what is on this machine"):
        lz.import_safetensors(cache, tmp_path / "acts", as_model="acme/never-seen", progress=False)


def test_of_a_cache_with_several_models_the_one_that_is_meant_is_taken(
    cache: Path, tmp_path: Path, truth: dict[str, list[Any]], llama: Path
) -> None:
    write(lz.open_store(tmp_path / "source2"), truth, "acme/another")
    lz.export_safetensors(tmp_path / "source2", cache, progress=False)
    summary = lz.import_safetensors(cache, tmp_path / "acts", as_model=llama, progress=False)
    assert (summary.models, summary.imported) == ((str(llama),), 10)
    write(lz.open_store(tmp_path / "source3"), truth, "acme/third")
    lz.export_safetensors(tmp_path / "source3", tmp_path / "two", progress=False)
    lz.export_safetensors(tmp_path / "source2", tmp_path / "two", progress=False)
    with pytest.raises(InvalidArgumentError, match="say with model= which of them"):
        lz.import_safetensors(tmp_path / "two", tmp_path / "acts", as_model=llama, progress=False)


# ------------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_uses_what_was_imported(
    cache: Path, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runs: list[int]
) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(cache))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ("extract", str(llama), str(tmp_path / "prompts.txt"))
    (group,) = call_json(capsys, "import", "--all")["groups"]
    plan = call_json(capsys, *arguments, "--dry-run")
    assert (plan["found"], plan["missing"], plan["elsewhere"][0]["group"]) == (0, 10, group)
    for given in (("--group", group), ("--any-provenance",)):
        plan = call_json(capsys, *arguments, *given, "--dry-run")
        assert (plan["found"], plan["missing"], plan["group"]) == (10, 0, group)
        assert call_json(capsys, *arguments, *given)["extracted"] == 0
    imported = call_json(capsys, "import", "--model", str(llama), "--as-model", str(llama), "--to", str(tmp_path / "own"))
    assert imported["unknown"] == []
    assert call_json(capsys, *arguments, "--store", str(tmp_path / "own"))["extracted"] == 0
    assert runs == []
    code, _, error = call(capsys, "import", "--all", "--compute-dtype", "bfloat16")
    assert (code, "--as-model" in error) == (1, True)


def test_what_records_nothing_is_unknown_altogether() -> None:
    assert len(unrecorded_fields(GroupInfo(model="m").provenance)) == 10


def test_an_import_under_the_path_from_before_a_move_is_of_the_folder(tmp_path: Path, truth: dict[str, list[Any]], llama: Path) -> None:
    store = lz.open_store(tmp_path)
    group = write(store, truth, f"/old/place/{llama.name}")
    (held,) = lz.plan_extract(llama, PROMPTS, store=store).elsewhere
    assert held.group == group
    assert lz.plan_extract(llama, PROMPTS, store=store, provenance="any").found == 10
    assert lz.discover_cached(llama, PROMPTS[0], store=store, provenance="any") is not None
    assert lz.discover_cached(llama, PROMPTS[0], store=store, group=group) is not None
    assert lz.discover_cached(llama, PROMPTS[0], store=store) is None
    other = write(store, truth, f"/another/place/{llama.name}")
    with pytest.raises(AmbiguousProvenanceError, match="does not say which of"):
        lz.plan_extract(llama, PROMPTS, store=store, provenance="any")
    assert lz.plan_extract(llama, PROMPTS, store=store, group=other).found == 10
