"""Read-through: a folder that lmprobe itself has filled serves probes, and is never changed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, call_json
from paths import DATA
from tiny_models import SharedModels
from warmed import Warmed

import lmprobe_zarr as lz
from lmprobe_zarr import config
from lmprobe_zarr.errors import InvalidArgumentError

TOY = "acme/toy-4l"
TRUTH = json.loads((DATA / "lmprobe-0.10.3-truth.json").read_text())

torch_only = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="old entries are torch's files")
peer = pytest.mark.skipif(importlib.util.find_spec("lmprobe") is None, reason="lmprobe==0.10.3, the peer, is not installed")


def everything_below(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".zarr" not in path.parts]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture(params=["lmprobe-0.10.3", pytest.param("lmprobe-0.4.9", marks=torch_only)])
def old(request: pytest.FixtureRequest) -> Path:
    """The cache's folder, filled by lmprobe in either format."""
    shutil.copytree(DATA / request.param, config.cache_dir(), dirs_exist_ok=True)
    return config.cache_dir()


# ------------------------------------------------------------------------------------------------------------- looking in


def test_discover_cached_finds_lmprobes_entries_without_an_import(old: Path) -> None:
    before = everything_below(old)
    info = lz.discover_cached(TOY, TRUTH["prompts"][0])
    assert info is not None
    assert info.raw_layers == [0, 1, 2, 3]
    assert info.pooled["last_token"] == [0, 1, 2, 3]
    assert info.has_perplexity
    assert info.num_tokens == int(np.load(DATA / "lmprobe-0.10.3-truth.npz")["mask"][0].sum())
    assert lz.discover_cached(TOY, TRUTH["prompts"][0], legacy="never") is None
    assert lz.discover_cached(TOY, "never seen") is None
    assert lz.discover_cached("another/model", TRUTH["prompts"][0]) is None
    with pytest.raises(InvalidArgumentError, match="'auto' or 'never'"):
        lz.discover_cached(TOY, "a", legacy="sometimes")
    assert everything_below(old) == before
    assert not (old / ".zarr").exists()


def test_cache_info_shows_lmprobes_entries_apart(old: Path) -> None:
    info = lz.cache_info()
    assert info.models == ()
    assert info.total_size_bytes == 0, "they do not count"
    (model,) = info.legacy
    noted = (old / "c9299c54fe49c0cc" / "_model_name.txt").exists()
    assert model.model_name == (TOY if noted else "(folder c9299c54fe49c0cc)"), "v1 notes no names"
    assert model.num_prompts == 4
    files = [path for path in old.rglob("*") if path.suffix in {".safetensors", ".pt"}]
    assert model.size_bytes == sum(path.stat().st_size for path in files)
    assert "lmprobe's" in str(info)
    assert lz.cache_info(legacy="never").legacy == ()
    lz.set_cache_limit(1e-9)
    lz.evict()
    assert lz.cache_info().legacy == info.legacy, "and are never evicted"


def test_prompts_are_listed_behind_those_of_the_store() -> None:
    shutil.copytree(DATA / "lmprobe-0.10.3", config.cache_dir(), dirs_exist_ok=True)
    lz.write_activations(
        lz.open_store(), model=TOY, prompts=["mine", TRUTH["prompts"][0]], pooled={"resid_mean": {0: np.ones((2, 8), "f4")}}
    )
    listed = [cached.prompt for cached in lz.list_cached_prompts(TOY)]
    assert listed[:2] == ["mine", TRUTH["prompts"][0]]
    assert sorted(p for p in listed if p) == sorted({"mine", *TRUTH["prompts"]} & set(listed)), "none twice"
    assert len(lz.list_cached_prompts(TOY, legacy="never")) == 2


def test_clear_cache_keeps_lmprobes_entries_without_legacy(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    (old / "c9299c54fe49c0cc" / "notes.txt").write_text("mine")
    (old / "0123456789abcdef").mkdir()
    (old / "0123456789abcdef" / "weights.bin").write_text("mine")
    (old / "photos").mkdir()
    (old / "photos" / "cat.safetensors").write_text("mine")
    lz.write_activations(lz.open_store(), model="m", prompts=["a"], pooled={"resid_mean": {0: [[1.0]]}})
    with caplog.at_level("INFO", "lmprobe_zarr.cache"):
        assert lz.clear_cache() == 1
    assert "4 entries of lmprobe's own remain" in caplog.text
    assert lz.cache_info().legacy
    assert lz.clear_cache(legacy=True) == 4
    assert lz.cache_info().legacy == ()
    left = sorted(str(path.relative_to(old)) for path in old.rglob("*") if path.is_file() and ".zarr" not in path.parts)
    assert left == ["0123456789abcdef/weights.bin", "c9299c54fe49c0cc/notes.txt", "photos/cat.safetensors"], "and nothing but entries"


def test_a_link_that_leads_out_is_neither_followed_nor_cleared(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(DATA / "lmprobe-0.10.3", outside)
    (config.cache_dir() / "c9299c54fe49c0cc").symlink_to(outside / "c9299c54fe49c0cc")
    before = everything_below(outside)
    assert lz.cache_info().legacy == ()
    assert lz.clear_cache(legacy=True) == 0
    assert everything_below(outside) == before


def test_a_backends_root_has_its_own_entries_beside_it() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in (DATA / "lmprobe-0.10.3").rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/prefix/{path.relative_to(DATA / 'lmprobe-0.10.3')}", path.read_bytes())
    lz.set_cache_backend("memory://bucket/prefix")
    info = lz.discover_cached(TOY, TRUTH["prompts"][1])
    assert info is not None
    assert info.raw_layers == [0, 1, 2, 3]
    assert lz.cache_info().legacy[0].num_prompts == 4
    with pytest.raises(InvalidArgumentError, match="remote"):
        lz.clear_cache(legacy=True)
    assert lz.cache_info().legacy[0].num_prompts == 4
    memory.rm("/bucket", recursive=True)


# ---------------------------------------------------------------------------------------------------------------- serving

FILL = """
import warnings
warnings.simplefilter("default")  # its warnings are not ours
import sys, json, lmprobe
model, positive, negative, pooling = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
probe = lmprobe.Probe(model=model, layers=[0, 1, 2, 3], pooling=pooling, random_state=0, device="cpu", batch_size=4).fit(positive, negative)
print(json.dumps(lmprobe.Probe(model=model, layers=2, pooling=pooling, random_state=0, device="cpu").fit(positive, negative)
                 .predict_proba(positive + negative).tolist()))
"""
POSITIVE = [f"I love the dog number {i}" for i in range(5)]
NEGATIVE = [f"The {i} rainy foxes are sad today" for i in range(5)]


@pytest.fixture
def filled(tmp_path: Path, tiny_models: SharedModels, warmed: Warmed) -> Callable[[str], tuple[Path, list[list[float]]]]:
    """A cache that lmprobe has filled for a tiny Llama, whose weights are then taken away; and what lmprobe's probe predicts."""
    pytest.importorskip("torch")

    def fill(pooling: str) -> tuple[Path, list[list[float]]]:
        model = Path(shutil.copytree(tiny_models("llama", head="AutoModelForCausalLM"), tmp_path / "llama"))
        environment = {**os.environ, "LMPROBE_CACHE_DIR": str(config.cache_dir()), "OMP_NUM_THREADS": "1"}
        done = warmed.run(FILL, str(model), json.dumps(POSITIVE), json.dumps(NEGATIVE), pooling, env=environment)
        assert done.returncode == 0, done.stderr
        (model / "model.safetensors").unlink()
        return model, json.loads(done.stdout.splitlines()[-1])

    return fill


@pytest.mark.few(1)
@pytest.mark.model
@peer
@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_a_probe_is_fitted_from_lmprobes_entries_without_the_model(
    filled: Callable[[str], tuple[Path, list[list[float]]]], pooling: str, runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, expected = filled(pooling)
    before = everything_below(config.cache_dir())
    with caplog.at_level("INFO", "lmprobe_zarr.cache"):
        probe = lz.Probe(str(model), layers=2, pooling=pooling, random_state=0).fit(POSITIVE, NEGATIVE)
    assert "10 hits among lmprobe's own entries" in caplog.text
    np.testing.assert_allclose(probe.predict_proba(POSITIVE + NEGATIVE), expected, atol=1e-5)
    stats = probe.warmup(POSITIVE)
    assert (stats.hit_rate, stats.extracted) == (1.0, 0)
    other = lz.Probe(str(model), layers=[1, 3], pooling="first_token", inference_pooling="max").fit(POSITIVE, NEGATIVE)
    assert other.predict(POSITIVE).shape == (5,), "any pooling, since lmprobe keeps every token"
    assert runs == []
    assert everything_below(config.cache_dir()) == before
    assert not lz.cache_info().models, "nothing is copied"


@pytest.mark.model
@peer
def test_lmprobes_entries_serve_a_call_only_if_they_hold_all_of_it(
    filled: Callable[[str], tuple[Path, list[list[float]]]], tmp_path: Path, runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    from tiny_models import save_tiny

    model, _ = filled("last_token")
    save_tiny("llama", model, head="AutoModelForCausalLM")  # the weights are back, as old as they were
    os.utime(model / "model.safetensors", (1, 1))
    with caplog.at_level("INFO", "lmprobe_zarr.cache"):
        lz.Probe(str(model), layers=2).fit([*POSITIVE, "a new one"], NEGATIVE)
    assert "hold 10 of 11 prompts" in caplog.text
    assert runs == [11], "none is mixed with what has another provenance"
    lz.Probe(str(model), layers=2, legacy="never").fit(POSITIVE[:2], NEGATIVE[:2])
    assert runs == [11], "which are in the store now"
    lz.clear_cache()
    lz.Probe(str(model), layers=2, legacy="never").fit(POSITIVE, NEGATIVE)
    assert runs == [11, 10]
    lz.clear_cache()
    for options in ({"dtype": "bfloat16"}, {"name": "mine"}, {"provenance": {"steering": "v1"}}):
        lz.Probe(str(model), layers=2, **options).fit(POSITIVE, NEGATIVE)
    assert runs == [11, 10, 10, 10, 10], "what the caller knows, the entries do not"
    with pytest.raises(InvalidArgumentError, match="legacy="):
        lz.Probe(str(model), legacy="yes")


@pytest.mark.model
@peer
def test_entries_older_than_the_weights_are_of_another_model(
    filled: Callable[[str], tuple[Path, list[list[float]]]], runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    from tiny_models import save_tiny

    model, _ = filled("last_token")
    save_tiny("llama", model, head="AutoModelForCausalLM")
    with caplog.at_level("INFO", "lmprobe_zarr.cache"):
        lz.Probe(str(model), layers=2).fit(POSITIVE, NEGATIVE)
    assert runs == [10]
    assert "older than the weights" in caplog.text


@pytest.mark.model
@peer
def test_a_damaged_entry_is_logged_and_the_model_runs(filled: Callable[[str], tuple[Path, list[list[float]]]], runs: list[int]) -> None:
    from tiny_models import save_tiny

    model, expected = filled("last_token")
    save_tiny("llama", model, head="AutoModelForCausalLM")
    os.utime(model / "model.safetensors", (1, 1))
    for path in config.cache_dir().glob(f"*/{lz.prompt_hash(POSITIVE[0])}.safetensors"):
        path.write_bytes(path.read_bytes()[:-50])
    probe = lz.Probe(str(model), layers=2, random_state=0).fit(POSITIVE, NEGATIVE)
    np.testing.assert_allclose(probe.predict_proba(POSITIVE + NEGATIVE), expected, atol=1e-4)
    assert runs == [10]


@pytest.mark.model
@peer
def test_importing_everything_moves_it_into_the_store(
    filled: Callable[[str], tuple[Path, list[list[float]]]], capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = filled("last_token")
    plan = call_json(capsys, "import", "--all", "--dry-run")
    assert plan["dry_run"] is True or plan["imported"] == 0 or not lz.cache_info().models
    assert not lz.cache_info().models
    summary: Any = call_json(capsys, "import", "--all")
    assert summary["imported"] == 10
    assert lz.cache_info().models[0].num_prompts == 10
    again = call_json(capsys, "import", "--all")
    assert again["imported"] == 0
    ds = lz.open_store().tokens(str(model), prompts=POSITIVE)
    assert np.isfinite(ds.resid.values).all()


# ----------------------------------------------------------------------------------------------------------- command line


def test_import_and_export_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, store, out = str(DATA / "lmprobe-0.10.3"), str(tmp_path / "s"), str(tmp_path / "out")
    code, text, _ = call(capsys, "import", "--from", source, "--to", store, "--all", "--dry-run")
    assert code == 0
    assert "4" in text
    assert not Path(store).exists()
    summary = call_json(capsys, "import", "--from", source, "--to", store, "--model", TOY)
    assert summary["imported"] == 4
    (tmp_path / "p.txt").write_text(TRUTH["prompts"][0] + "\n")
    exported = call_json(capsys, "export", "--from", store, "--to", out, "--prompts", str(tmp_path / "p.txt"), "--layers", "0,2")
    assert exported["written"] == 1 if "written" in exported else exported
    files = [path.name for path in Path(out).rglob("*.safetensors") if path.name.count(".") == 1]
    assert files == [f"{lz.prompt_hash(TRUTH['prompts'][0])}.safetensors"]
    for arguments in (
        ["import", "--from", str(tmp_path), "--to", store, "--all"],
        ["import", "--from", source, "--to", store, "--model", "nobody"],
        ["import", "--from", source, "--to", store, "--all", "--v1"],
        ["export", "--from", store, "--to", out, "--model", "nobody"],
    ):
        code, _, err = call(capsys, *arguments)
        assert code == 1
        assert err.count("\n") <= 2


def test_places_are_named_by_options_or_by_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, store, out = str(DATA / "lmprobe-0.10.3"), str(tmp_path / "s"), str(tmp_path / "out")
    assert call_json(capsys, "import", source, store)["imported"] == 4  # the only model of the cache
    assert lz.open_store(store).models() == [TOY]
    assert call_json(capsys, "export", store, out)["prompts"] == 4
    for arguments, message in (
        (["import", source, "--from", source], "both say that place: give one of them"),
        (["import", source, store, out], "3 places were given: give one to read from and one to write to"),
        (["export", store], "give the folder or URL of the cache with --to"),
        (["import", str(tmp_path / "nowhere"), store], f"the folder {tmp_path / 'nowhere'} does not exist: check the path"),
        *(
            (["import", str(tmp_path / "nowhere"), store, *options], "does not exist: check the path")
            for options in (["--all"], ["--model", "m"], ["--model", "m", "--v1"], ["--dataset"], ["--tool", "activault"])
        ),
    ):
        code, _, err = call(capsys, *arguments)
        assert (code, message in err) == (1, True), err


def test_of_several_models_one_is_to_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        folder = tmp_path / "cache" / hashlib.sha256(name.encode()).hexdigest()[:16]
        folder.mkdir(parents=True)
        (folder / "_model_name.txt").write_text(name)
    code, _, err = call(capsys, "import", str(tmp_path / "cache"), str(tmp_path / "s"))
    assert code == 1
    assert err.endswith("holds 'one', 'two': choose one with --model, or all with --all\n")
    assert call(capsys, "import", str(tmp_path / "cache"), str(tmp_path / "s"), "--all", "--dry-run")[0] == 0


@pytest.mark.few(1)
@torch_only
def test_extract_says_that_lmprobes_entries_hold_the_prompts(
    old: Path, tiny_models: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    model = tiny_models("llama")
    (old / hashlib.sha256(TOY.encode()).hexdigest()[:16]).rename(old / hashlib.sha256(str(model).encode()).hexdigest()[:16])
    plan = lz.plan_extract(model, [*TRUTH["prompts"], "never seen"])
    assert plan.in_lmprobe == len(TRUTH["prompts"])
    assert "lmprobe's own entries beside the store" in str(plan)
    with caplog.at_level(logging.WARNING, "lmprobe_zarr.cache"):
        lz.extract(model, TRUTH["prompts"], device="cpu", progress=False)
    assert f"{len(TRUTH['prompts'])} of {len(TRUTH['prompts'])} prompts that the model runs on are among lmprobe's own" in caplog.text
    assert lz.plan_extract(model, TRUTH["prompts"], refresh=True).in_lmprobe == 0
