"""The same scripts through lmprobe itself and through this package: same layers, same vectors, same predictions."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("lmprobe") is None, reason="lmprobe==0.10.3, the peer, is not installed"),
]
pytest.importorskip("torch")

from tiny_models import SharedModels, tiny_tokenizer  # noqa: E402 — needs torch
from warmed import Warmed  # noqa: E402

POSITIVE = [f"I love the dog number {i}, what a walk it was" for i in range(6)]
NEGATIVE = [f"The {i} rainy foxes are sad" for i in range(6)]
TEST = ["I love a walk", "sad foxes", "the dog in the rain was there for all of us", "rainy", POSITIVE[0]]
LABELS = [1, 0, 1, 0, 1]

# The text before the colon names the script; the arguments are lmprobe's, which are ours too.
PROBES: dict[str, dict[str, Any]] = {
    "one layer": {"layers": 2},
    "a negative layer": {"layers": -1},
    "two layers": {"layers": [0, 2]},
    "the middle": {"layers": "middle"},
    "the last": {"layers": "last"},
    "all layers": {"layers": "all"},
    "one scale per layer": {"layers": [0, 3], "normalize_layers": "per_layer"},
    "mean": {"layers": 2, "pooling": "mean"},
    "max of scores": {"layers": 2, "pooling": "mean", "inference_pooling": "max"},
    "min of scores": {"layers": 2, "pooling": "mean", "inference_pooling": "min"},
    "mean of scores": {"layers": [1, 2], "pooling": "mean", "inference_pooling": "score:mean"},
    "last of scores": {"layers": 2, "inference_pooling": "score:last_token"},
    "max of activations": {"layers": 2, "pooling": "mean", "inference_pooling": "activation:max"},
    "trained on the mean, predicted from the last token": {"layers": 1, "train_pooling": "mean", "inference_pooling": "last_token"},
    "ridge": {"layers": 2, "classifier": "ridge"},
    "other parameters": {"layers": 2, "classifier_kwargs": {"C": 0.01}},
    "components": {"layers": 2, "preprocessing": "pca:4"},
}
# All of them in `make stress`: the fits take the time, not the comparisons.
RUN = {name: PROBES[name] for name in list(PROBES)[:: 1 if os.environ.get("LMPROBE_ZARR_STRESS") else 4]}

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import {package} as lmprobe

model, job = sys.argv[1], json.loads(sys.argv[2])
found = {{}}
for name, options in job["probes"].items():
    probe = lmprobe.Probe(model=model, random_state=0, batch_size=4, device="cpu", **options)
    probe.fit(job["positive"], job["negative"])
    result = {{"predict": probe.predict(job["test"]).tolist(), "score": probe.score(job["test"], job["labels"])}}
    evaluated = probe.evaluate(job["test"], job["labels"])
    result["evaluate"] = {{k: evaluated[k] for k in ("accuracy", "f1", "precision", "recall", "auroc") if k in evaluated}}
    if options.get("classifier") != "ridge":
        result["proba"] = probe.predict_proba(job["test"]).tolist()
    found[name] = result
probe = lmprobe.Probe(model=model, layers=2, task="regression", random_state=0, device="cpu")
probe.fit(job["positive"] + job["negative"], list(range(12)))
found["regression"] = {{"predict": probe.predict(job["test"]).tolist()}}
sweep = lmprobe.Probe(model=model, layers="sweep", random_state=0, device="cpu").fit(job["positive"], job["negative"])
found["sweep"] = {{str(k): v for k, v in sweep.sweep_result_.score(job["test"], job["labels"]).items()}}
found["sweep layers"] = sweep.sweep_result_.layers
stats = probe.warmup(job["test"], batch_size=16)
lmprobe.Probe(model=model, layers="all", device="cpu", pooling="mean", inference_pooling="max").warmup(job["positive"])
info = lmprobe.discover_cached(model, job["positive"][0])
found["discovered"] = {{"raw_layers": info.raw_layers, "num_tokens": info.num_tokens}}
found["nothing"] = lmprobe.discover_cached(model, "never seen") is None
listed = lmprobe.list_cached_prompts(model)
found["listed"] = sorted([one.prompt, one.num_tokens] for one in listed)
size = lmprobe.cache_info()
found["cached"] = [size.total_size_gb > 0, len(size.models), size.models[0].num_prompts]
print("RESULT" + json.dumps(found))
"""


def run(package: str, model: Path, cache: Path, warmed: Warmed) -> dict[str, Any]:
    job = {"positive": POSITIVE, "negative": NEGATIVE, "test": TEST, "labels": LABELS, "probes": RUN}
    environment = {**os.environ, "LMPROBE_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = warmed.run(SCRIPT.format(package=package), str(model), json.dumps(job), env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.split("RESULT")[1])
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_models: SharedModels, warmed: Warmed) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parity")
    model = Path(shutil.copytree(tiny_models("llama", head="AutoModelForCausalLM"), folder / "llama"))
    caches = {name: folder / name for name in ("lmprobe", "lmprobe_zarr")}
    for cache in caches.values():
        cache.mkdir()
    return {"folder": folder, "model": model, **{name: run(name, model, cache, warmed) for name, cache in caches.items()}}


@pytest.mark.parametrize("name", RUN)
def test_probes_predict_what_lmprobes_predict(both: dict[str, Any], name: str) -> None:
    theirs, ours = both["lmprobe"][name], both["lmprobe_zarr"][name]
    assert ours["predict"] == theirs["predict"]
    assert ours["score"] == theirs["score"]
    for measure, value in theirs["evaluate"].items():
        assert ours["evaluate"][measure] == pytest.approx(value, abs=1e-9), measure
    if "proba" in theirs:
        np.testing.assert_allclose(ours["proba"], theirs["proba"], atol=1e-4)


def test_regressions_and_sweeps_agree(both: dict[str, Any]) -> None:
    np.testing.assert_allclose(both["lmprobe_zarr"]["regression"]["predict"], both["lmprobe"]["regression"]["predict"], atol=1e-3)
    assert both["lmprobe_zarr"]["sweep"] == both["lmprobe"]["sweep"]
    assert both["lmprobe_zarr"]["sweep layers"] == both["lmprobe"]["sweep layers"] == [0, 1, 2, 3]


def test_the_caches_tell_the_same(both: dict[str, Any]) -> None:
    assert both["lmprobe_zarr"]["discovered"] == both["lmprobe"]["discovered"]
    assert both["lmprobe_zarr"]["nothing"] is both["lmprobe"]["nothing"] is True
    assert both["lmprobe_zarr"]["listed"] == both["lmprobe"]["listed"]
    assert both["lmprobe_zarr"]["cached"] == both["lmprobe"]["cached"]


def test_layers_and_pooled_vectors_are_lmprobes(both: dict[str, Any]) -> None:
    """Every layer of every token, and what is pooled from it by hand, against lmprobe's own files, padding taken off."""
    from safetensors.numpy import load_file

    store = lz.open_store(both["folder"] / "lmprobe_zarr" / ".zarr", mode="r")
    ds, checked = store.dataset(), 0
    held = {cached.prompt for cached in lz.list_cached_prompts("llama", store=store)}
    for prompt in held:
        assert prompt is not None
        (path,) = (both["folder"] / "lmprobe").glob(f"*/{lz.prompt_hash(prompt)}.safetensors")
        theirs = load_file(path)
        kept = theirs["attention_mask"][0].astype(bool)
        assert kept.sum() == len(tiny_tokenizer()(prompt)["input_ids"])
        for layer in range(4):
            rows = theirs[f"layer_{layer}"][0][kept]
            row = ds.sel(layer=layer, prompt=lz.prompt_hash(prompt))
            for name, pooled in (("resid_last_token", rows[-1]), ("resid_mean", rows.mean(0)), ("resid_max", rows.max(0))):
                mine = row[name].values
                if not np.isnan(mine).all():
                    np.testing.assert_allclose(mine, pooled, atol=1e-5)
                    checked += 1
    assert checked > 60
    tokens = store.tokens(prompts=TEST)
    (path,) = (both["folder"] / "lmprobe").glob(f"*/{lz.prompt_hash(TEST[0])}.safetensors")
    raw = load_file(path)
    rows = raw["layer_2"][0][raw["attention_mask"][0].astype(bool)]
    np.testing.assert_allclose(tokens.resid.sel(layer=2, prompt=lz.prompt_hash(TEST[0])).values, rows, atol=1e-5)


def test_lmprobe_leaves_our_store_alone_when_it_evicts(tmp_path: Path, warmed: Warmed) -> None:
    lz.write_activations(tmp_path / ".zarr", model="m", prompts=["a"], pooled={"resid_mean": {0: [[1.0, 2.0]]}})
    before = sorted((str(p), p.stat().st_size) for p in (tmp_path / ".zarr").rglob("*"))
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import lmprobe, lmprobe.cache as c, torch\n"
        "c.save_prompt_activations('m', 'p', [0], torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.long))\n"
        "lmprobe.set_cache_limit(1e-9); lmprobe.evict(); print(len(lmprobe.cache_info().models))\n"
    )
    environment = {**os.environ, "LMPROBE_CACHE_DIR": str(tmp_path)}
    done = warmed.run(code, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted((str(p), p.stat().st_size) for p in (tmp_path / ".zarr").rglob("*")) == before


@pytest.mark.parametrize("how", ["group", "any", "as the model"])
@pytest.mark.few(1)
def test_probes_over_an_imported_cache_predict_what_lmprobes_do_over_theirs(both: dict[str, Any], how: str, tmp_path: Path) -> None:
    """The model is never run: all activations are lmprobe's own, moved into a store."""
    model, store = both["model"], lz.open_store(tmp_path / "acts")
    summary = lz.import_safetensors(both["folder"] / "lmprobe", store, as_model=model if how == "as the model" else None, progress=False)
    assert summary.imported == len({*POSITIVE, *NEGATIVE, *TEST})
    (group,) = summary.groups
    given: dict[str, Any] = {"group": {"group": group}, "any": {"provenance": "any"}, "as the model": {}}[how]
    assert lz.plan_extract(model, TEST, store=store, **given).missing == 0
    for name, options in RUN.items():
        probe = lz.Probe(model, random_state=0, device="cpu", store=store, cache_only=True, **options, **given)
        probe.fit(POSITIVE, NEGATIVE)
        theirs = both["lmprobe"][name]
        assert probe.predict(TEST).tolist() == theirs["predict"], name
        assert probe.score(TEST, LABELS) == theirs["score"], name
        if "proba" in theirs:
            np.testing.assert_allclose(probe.predict_proba(TEST), theirs["proba"], atol=1e-4, err_msg=name)


def test_lmprobes_entries_are_known_by_every_path_of_their_folder(both: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPROBE_CACHE_DIR", str(both["folder"] / "lmprobe"))
    monkeypatch.chdir(both["folder"])
    for spelling in (both["model"], str(both["model"]) + "/", "./llama", Path("llama")):
        found = lz.discover_cached(spelling, POSITIVE[0])
        assert found is not None
        assert found.raw_layers == [0, 1, 2, 3]
        assert lz.Probe(spelling, layers=2, device="cpu", cache_only=True).fit(POSITIVE, NEGATIVE).predict([POSITIVE[0]]).tolist() == [1]
