"""The names that only some scripts use, through lmprobe itself and through this package: chosen layers, the mass-mean column, ensembles.

lmprobe chooses layers with skglm, which compiles itself for a minute or more with numba. Here numba is off, so that the same code runs as
plain Python. One line of it then has to be put right: its line search hands the penalty the coefficients without the last one, as if there
were an intercept, and compiled code reads beyond the end of that view, where the last one lies. `STRESS` runs it compiled, as it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("lmprobe") is None, reason="lmprobe==0.10.3, the peer, is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("skglm") is None, reason="skglm, with which the peer chooses layers, is not installed"),
]
pytest.importorskip("torch")

from tiny_models import SharedModels  # noqa: E402 — needs torch
from warmed import Warmed  # noqa: E402

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
POSITIVE = [f"I love the dog number {i}, what a walk it was" for i in range(6)]
NEGATIVE = [f"The {i} rainy foxes are sad" for i in range(6)]
TEST = ["I love a walk", "sad foxes", "the dog in the rain was there for all of us", "rainy", POSITIVE[0]]
LABELS = [1, 0, 1, 0, 1]

PROBES: dict[str, dict[str, Any]] = {
    "auto": {"layers": "auto"},
    "auto, every layer a candidate": {"layers": "auto", "auto_candidates": [0, 1, 2, 3], "auto_alpha": 0.3},
    "auto, fractions": {"layers": "auto", "auto_candidates": [0.0, 0.34, 1.0], "auto_alpha": 0.2},
    # Of two layers that are chosen: a single one is standardised here, whatever normalize_layers says, and in lmprobe it is not.
    "auto, one scale per layer": {"layers": "auto", "auto_candidates": [1, -1], "auto_alpha": 0.05, "normalize_layers": "per_layer"},
    "fast": {"layers": "fast_auto"},
    "fast, half of four": {"layers": "fast_auto", "auto_candidates": [0, 1, 2, 3], "pooling": "mean"},
    "fast, ridge": {"layers": "fast_auto", "auto_candidates": [0.0, 0.5, 1.0], "fast_auto_top_k": 1, "classifier": "ridge"},
    "column": {"layers": 2, "mass_mean_augment": True},
    "column, two layers": {"layers": [0, 2], "mass_mean_augment": True},
    "column, components": {"layers": 2, "mass_mean_augment": True, "preprocessing": "pca:3"},
    "column, standardised": {"layers": 2, "mass_mean_augment": True, "preprocessing": "standard"},
    "column, two layers standardised": {"layers": [1, 3], "mass_mean_augment": True, "preprocessing": "standard+pca:2"},
}
# All of them in `make stress`: the fits take the time, not the comparisons.
RUN = {name: PROBES[name] for name in list(PROBES)[:: 1 if STRESS else 3]}
# Their tight tolerance makes members comparable: at the default, logistic regressions stop at slightly different places.
MEMBER = {"layers": 2, "random_state": 0, "device": "cpu", "classifier_kwargs": {"tol": 1e-8}}
CONFIGS = [{"layers": 1}, {"layers": [0, 3]}, {"layers": 2, "pooling": "mean"}]

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import {package} as lmprobe

if lmprobe.__name__ == "lmprobe" and {plain}:
    # Not by its variable, which numba reads when it is imported: where pydata's sparse is installed, that is before this script.
    import numba.core.config
    numba.core.config.DISABLE_JIT = 1
    from skglm.penalties import WeightedGroupL2
    value = WeightedGroupL2.value
    WeightedGroupL2.value = lambda self, w: value(self, w if len(w) == len(self.grp_indices) else w.base)

model, job = sys.argv[1], json.loads(sys.argv[2])
positive, negative, test = job["positive"], job["negative"], job["test"]
found = {{}}
for name, options in job["probes"].items():
    probe = lmprobe.Probe(model=model, random_state=0, batch_size=4, device="cpu", **options).fit(positive, negative)
    result = {{"predict": probe.predict(test).tolist(), "selected": probe.selected_layers_, "candidates": probe.candidate_layers_}}
    if probe.layer_importances_ is not None:
        result["importances"] = list(map(float, probe.layer_importances_))
    if options.get("classifier") != "ridge":
        result["proba"] = probe.predict_proba(test).tolist()
    found[name] = result
shares = lmprobe.Probe(model=model, layers=[0, 1, 3], random_state=0, device="cpu").fit(positive, negative)
found["importance"] = {{metric: shares.compute_layer_importance(metric).tolist() for metric in ("l2", "l1", "mean_abs", "max_abs")}}

def describe(ensemble):
    return {{
        "members": [member.predict_proba(test).tolist() for member in ensemble.probes_],
        "predict": ensemble.predict(test).tolist(), "proba": ensemble.predict_proba(test).tolist(),
        "std": ensemble.prediction_std(test).tolist(), "score": ensemble.score(test, job["labels"]), "weights": ensemble.weights_.tolist(),
    }}

for seed in (0, 7):
    base = lmprobe.Probe(model=model, **job["member"])
    made = lmprobe.ProbeEnsemble.bootstrap(base, n_resamples=3, random_state=seed).fit(positive, negative)
    found[f"bootstrap {{seed}}"] = describe(made)
# So few of one class that some resamples are drawn again.
rare = lmprobe.ProbeEnsemble.bootstrap(lmprobe.Probe(model=model, **job["member"]), 4, 3).fit(positive + negative[:1], [1] * 6 + [0])
found["rare"] = describe(rare)
weighted = lmprobe.ProbeEnsemble.bootstrap(lmprobe.Probe(model=model, **job["member"]), 2, 1)
found["weighted"] = describe(weighted.fit(positive, negative, sample_weight=[float(i + 1) for i in range(12)]))
mixed = lmprobe.ProbeEnsemble.from_configs(model, job["configs"], weights=[1, 2, 1], random_state=0, device="cpu")
found["mixed"] = describe(mixed.fit(positive, negative))
hard = lmprobe.ProbeEnsemble.from_configs(model, [*job["configs"], {{"layers": 3, "classifier": "ridge"}}], voting="hard", device="cpu")
hard.fit(positive + negative, [1] * 6 + [0] * 6)
found["hard"] = {{"predict": hard.predict(test).tolist(), "score": hard.score(test, job["labels"])}}
print("RESULT" + json.dumps(found))
"""


def run(package: str, model: Path, cache: Path, warmed: Warmed) -> dict[str, Any]:
    job = {
        "positive": POSITIVE,
        "negative": NEGATIVE,
        "test": TEST,
        "labels": LABELS,
        "probes": RUN,
        "member": MEMBER,
        "configs": CONFIGS,
    }
    environment = {**os.environ, "LMPROBE_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(package=package, plain=not STRESS)
    done = warmed.run(script, str(model), json.dumps(job), env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.split("RESULT")[1])
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_models: SharedModels, warmed: Warmed) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parity")
    model = Path(shutil.copytree(tiny_models("llama", head="AutoModelForCausalLM"), folder / "llama"))
    for name in ("lmprobe", "lmprobe_zarr"):
        (folder / name).mkdir()
    return run("lmprobe", model, folder / "lmprobe", warmed), run("lmprobe_zarr", model, folder / "lmprobe_zarr", warmed)


@pytest.mark.parametrize("name", RUN)
def test_probes_choose_and_predict_what_lmprobes_do(both: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    theirs, ours = (found[name] for found in both)
    assert ours["selected"] == theirs["selected"]
    assert ours["candidates"] == theirs["candidates"]
    assert ours["predict"] == theirs["predict"]
    if "importances" in theirs:
        # skglm stops where the gradient is within 1e-4 of optimal, ours nearer; with so few prompts norms differ by some percent there.
        np.testing.assert_allclose(ours["importances"], theirs["importances"], atol=0.03 * max(theirs["importances"]))
    if "proba" in theirs:
        np.testing.assert_allclose(ours["proba"], theirs["proba"], atol=2e-4)


def test_some_are_chosen_and_others_are_not(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    automatic = [both[0][name] for name in RUN if "auto" in str(RUN[name]["layers"])]
    numbers = [len(found["selected"]) - len(found["candidates"]) for found in automatic]
    assert min(numbers) < 0, "the comparison sees a choice"


def test_importances_of_layers_are_lmprobes(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = (found["importance"] for found in both)
    for metric, values in theirs.items():
        np.testing.assert_allclose(ours[metric], values, atol=1e-3)


@pytest.mark.parametrize("name", ["bootstrap 0", "bootstrap 7", "rare", "weighted", "mixed"])
def test_ensembles_and_their_members_are_lmprobes(both: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    theirs, ours = (found[name] for found in both)
    assert ours["predict"] == theirs["predict"]
    assert ours["score"] == theirs["score"]
    assert ours["weights"] == theirs["weights"]
    for key in ("members", "proba", "std"):
        np.testing.assert_allclose(ours[key], theirs[key], atol=2e-4, err_msg=key)
    if name != "mixed":
        assert not np.allclose(theirs["members"][0], theirs["members"][1], atol=2e-3), "members learned from different resamples"


def test_votes_are_lmprobes(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert both[1]["hard"] == both[0]["hard"]
