"""Sweeps that write as they go: whole layers only, resumed by any process, readable with xarray alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from paths import SUPPORT

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, NotAStoreError
from lmprobe_zarr.probes import fit
from lmprobe_zarr.sweeps.sweep import sweep

LAYERS, N, HIDDEN = 6, 80, 8
Y = np.arange(N) % 2
TEXTS = [f"{'good' if y else 'bad'} number {i}" for i, y in enumerate(Y)]


def activations() -> xr.DataArray:
    values = np.random.default_rng(0).normal(size=(LAYERS, N, HIDDEN)).astype("float32")
    values[:, :, 3] += Y * np.linspace(0, 3, LAYERS)[:, None]
    coords: dict[str, Any] = {
        "layer": np.arange(LAYERS),
        "prompt": [lz.prompt_hash(text) for text in TEXTS],
        "text": ("prompt", TEXTS),
        "label": ("prompt", Y),
        "model": "a/model",
    }
    return xr.DataArray(values, dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


OPTIONS: dict[str, Any] = {
    "labels": "label",
    "probes": ["ridge", "sgd", "mass_mean"],
    "controls": ["shuffled_labels", "bag_of_words", "layer_0"],
    "predictions": True,
    "seeds": [0, 1],
}


def same(first: xr.Dataset, other: xr.Dataset) -> None:
    """Bit for bit, but for the times that fit took."""
    assert set(first.data_vars) == set(other.data_vars)
    for name in set(first.data_vars) - {"fit_seconds"}:
        xr.testing.assert_identical(first[name], other[name])
    assert first.attrs == other.attrs


@pytest.fixture(scope="module")
def whole() -> xr.Dataset:
    """The scores of a sweep that writes nothing."""
    return sweep(activations(), **OPTIONS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, xr.Dataset]:
    """A sweep that has come to its end, for tests to copy, and the scores that it returned."""
    place = tmp_path_factory.mktemp("finished") / "scores"
    return place, sweep(activations(), **OPTIONS, out=place)


@pytest.fixture
def copied(finished: tuple[Path, xr.Dataset], tmp_path: Path) -> Path:
    """A copy of the finished sweep."""
    shutil.copytree(finished[0], tmp_path / "scores")
    return tmp_path / "scores"


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Variable and layer of every task that is run, in order."""
    seen: list[tuple[int, int]] = []
    run = fit.fit_task

    def noted(plan: Any, task: Any, values: Any) -> Any:
        seen.append((task.variable, task.layer))
        return run(plan, task, values)

    monkeypatch.setattr(sys.modules["lmprobe_zarr.sweeps.sweep"], "fit_task", noted)
    return seen


def test_written_scores_equal_the_returned_ones_and_plain_xarray_reads_them(finished: tuple[Path, xr.Dataset], whole: xr.Dataset) -> None:
    place, scores = finished
    same(scores, whole)
    stored = xr.open_zarr(place).load()
    assert stored.done.all()
    for name in scores.data_vars:
        np.testing.assert_array_equal(stored[name], scores[name], err_msg=str(name))
    for name in scores.coords:
        assert stored.coords[name].values.tolist() == scores.coords[name].values.tolist(), name
    assert {key: stored.attrs[key] for key in ("labels", "classes", "majority_share", "model")} == {
        key: scores.attrs[key] for key in ("labels", "classes", "majority_share", "model")
    }
    np.testing.assert_allclose(lz.selectivity(stored).mean(), lz.selectivity(scores).mean())


def test_a_finished_sweep_is_read_and_nothing_is_fitted_again(tmp_path: Path, fitted: list[tuple[int, int]]) -> None:
    first = sweep(activations(), **OPTIONS, out=tmp_path / "scores")
    assert len(fitted) == LAYERS + 1
    fitted.clear()
    again = sweep(activations(), **OPTIONS, out=tmp_path / "scores")
    assert fitted == []
    xr.testing.assert_identical(again, first)


def test_an_error_in_the_middle_loses_only_what_was_not_done(tmp_path: Path, fitted: list[tuple[int, int]], whole: xr.Dataset) -> None:
    spoilt = activations()
    spoilt[4, 2, 0] = np.nan
    with pytest.raises(InvalidArgumentError, match=r"layer 4 .* NaN"):
        sweep(spoilt, **OPTIONS, out=tmp_path / "scores", scheduler="synchronous", n_workers=1)
    half = xr.open_zarr(tmp_path / "scores").load()
    done = np.flatnonzero(half.done)
    assert 0 < len(done) < LAYERS
    assert np.isfinite(half.accuracy[done]).all()
    assert half.accuracy[~half.done.values].isnull().all()
    fitted.clear()
    resumed = sweep(activations(), **OPTIONS, out=tmp_path / "scores")
    # What knows no layer is in every layer that is there, and so is not fitted again either.
    assert sorted(fitted) == [(0, layer) for layer in range(LAYERS) if layer not in done]
    same(resumed, whole)


def test_a_damaged_or_missing_chunk_is_fitted_again(copied: Path, finished: tuple[Path, xr.Dataset], fitted: list[tuple[int, int]]) -> None:
    chunks = sorted((copied / "accuracy").glob("c.*"))
    assert len(chunks) == LAYERS
    chunks[1].write_bytes(b"\0" * len(chunks[1].read_bytes()))
    chunks[3].unlink()
    (copied / "auroc" / chunks[4].name).write_bytes(b"short")
    same(sweep(activations(), **OPTIONS, out=copied), finished[1])
    assert sorted(fitted) == [(0, 1), (0, 3), (0, 4)]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"probes": ["ridge"]}, "probes"),
        ({"random_state": 1, "seeds": [0, 1]}, "folds, seeds"),
        ({"metrics": ["accuracy"]}, "metrics"),
        ({"labels": {text: int(y) for text, y in zip(TEXTS, 1 - Y, strict=True)}}, "labels"),
        ({"activations": activations().isel(layer=slice(1, None)), "controls": None}, "layers, variables, probes"),
        ({"activations": activations().rename("resid_last_token")}, "variables"),
        ({"activations": activations() - activations().mean("prompt")}, "activations"),
        ({"activations": -activations()}, "activations"),
        ({"activations": activations()[::-1].assign_coords(layer=np.arange(LAYERS))}, "activations"),
        ({"activations": activations().where(activations().layer != 3, 0)}, "activations"),
    ],
)
def test_another_sweep_is_refused_and_what_is_not_the_same_is_named(copied: Path, change: dict[str, Any], named: str) -> None:
    changed = {"activations": activations(), **OPTIONS, **change}
    with pytest.raises(
        InvalidArgumentError, match=f"holds the scores of another sweep, with other .*{named.split(',', maxsplit=1)[0]}"
    ) as caught:
        sweep(**changed, out=copied)
    for name in named.split(", "):
        assert name in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_the_last_digits_of_activations_may_differ_as_they_do_between_machines(
    copied: Path, finished: tuple[Path, xr.Dataset], fitted: list[tuple[int, int]]
) -> None:
    near = activations().copy(data=np.nextafter(activations().values, np.float32(np.inf)))
    same(sweep(near, **OPTIONS, out=copied), finished[1])
    assert fitted == []


def test_the_identity_of_activations_reads_eight_prompts_of_each_layer(tmp_path: Path, chunk_reads: list[tuple[str, int, int]]) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    for half in (slice(0, 40), slice(40, 80)):
        pooled = {"resid_mean": {layer: activations().values[layer, half] for layer in range(LAYERS)}}
        lz.write_activations(store, model="m", prompts=TEXTS[half], pooled=pooled, coords={"label": Y[half]})
    stored = store.dataset().resid_mean
    sweep(stored, "label", "ridge", out=tmp_path / "scores")
    chunk_reads.clear()
    sweep(stored, "label", "ridge", out=tmp_path / "scores")
    assert len(chunk_reads) == 2 * LAYERS, "once for each chunk that holds some of the eight"


def test_the_callers_estimators_are_identified_by_their_parameters(tmp_path: Path, fitted: list[tuple[int, int]]) -> None:
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def mine(alpha: float) -> dict[str, Any]:
        return {"mine": make_pipeline(StandardScaler(), RidgeClassifier(alpha=alpha))}

    sweep(activations(), "label", mine(2.0), out=tmp_path / "scores")
    fitted.clear()
    sweep(activations(), "label", mine(2.0), out=tmp_path / "scores")
    assert fitted == []
    with pytest.raises(InvalidArgumentError, match="another sweep, with other probes:"):
        sweep(activations(), "label", mine(3.0), out=tmp_path / "scores")


def test_a_place_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(NotAStoreError, match=r"holds 'thesis\.txt' and no scores"):
        sweep(activations(), **OPTIONS, out=tmp_path / "notes")
    lz.write_activations(lz.open_store(tmp_path / "acts"), model="m", prompts=TEXTS, pooled={"resid_mean": {0: activations().values[0]}})
    with pytest.raises(NotAStoreError, match="something else than scores"):
        sweep(activations(), **OPTIONS, out=tmp_path / "acts")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.txt"]


def test_variables_and_strengths_are_stored_by_layer_too(tmp_path: Path, fitted: list[tuple[int, int]]) -> None:
    ds = xr.Dataset({"resid_mean": activations(), "mlp_mean": activations()[1:3] * 2})
    options: dict[str, Any] = {"labels": "label", "probes": ["ridge", "lda"], "strengths": (0.1, 10), "repeats": 2, "controls": "layer_0"}
    scores = sweep(ds, **options, out=tmp_path / "scores")
    same(scores, sweep(ds, **options))
    assert scores.accuracy.dims == ("variable", "layer", "probe", "fold", "strength")
    stored = xr.open_zarr(tmp_path / "scores").load()
    np.testing.assert_array_equal(stored.accuracy, scores.accuracy)
    fitted.clear()
    (tmp_path / "scores" / "done" / "c.1.2").unlink()
    same(sweep(ds, **options, out=tmp_path / "scores"), scores)
    assert fitted == [(1, 2)]


@pytest.mark.few(1)
def test_remote_places_and_worker_processes_write_the_same(root: str, whole: xr.Dataset) -> None:
    same(sweep(activations(), **OPTIONS, out=root, scheduler="processes", n_workers=2), whole)
    same(sweep(activations(), **OPTIONS, out=root), whole)


def test_a_sweep_on_s3_goes_on_where_it_was_interrupted(
    s3: Any, fitted: list[tuple[int, int]], whole: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"s3://team/{uuid.uuid4().hex}/scores"
    run = sys.modules["lmprobe_zarr.sweeps.sweep"].fit_task

    def fails_at_four(plan: Any, task: Any, values: Any) -> Any:
        if task.layer == 4:
            raise KeyboardInterrupt
        return run(plan, task, values)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sys.modules["lmprobe_zarr.sweeps.sweep"], "fit_task", fails_at_four)
        sweep(activations(), **OPTIONS, out=place, scheduler="synchronous")
    half = xr.open_zarr(place).load()
    assert 0 < half.done.sum() < LAYERS
    assert half.accuracy.isel(layer=4).isnull().all()
    fitted.clear()
    scores = sweep(activations(), **OPTIONS, out=place)
    assert sorted(layer for _, layer in fitted) == np.flatnonzero(~half.done).tolist()
    same(scores, whole)
    np.testing.assert_array_equal(xr.open_zarr(place).accuracy, scores.accuracy)


HERE = Path(__file__).parent
SCRIPT = """
import sys, time
import numpy as np
sys.path[:0] = sys.argv[2:]
from test_score_store import OPTIONS, activations
from lmprobe_zarr import sweep as package
import lmprobe_zarr.sweeps.sweep
from lmprobe_zarr.probes import fit
run = fit.fit_task
def slow(plan, task, values):
    time.sleep(0.05)
    return run(plan, task, values)
sys.modules["lmprobe_zarr.sweeps.sweep"].fit_task = slow
package(activations(), **OPTIONS, out=sys.argv[1], n_workers=2)
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("layers_before", [1, 3] if not os.environ.get("LMPROBE_ZARR_STRESS") else range(1, LAYERS))
def test_kill_9_in_the_middle_and_another_process_goes_on_to_the_same_scores(tmp_path: Path, layers_before: int, whole: xr.Dataset) -> None:
    place = tmp_path / "scores"
    # What it says is kept in a file: a full pipe would stop it.
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(place), str(Path(__file__).parent), str(SUPPORT)],
            stdout=output,
            stderr=output,
            cwd=Path(__file__).parent,
        )
        deadline = time.monotonic() + 60
        while len(list((place / "done").glob("c.*"))) < layers_before:
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    half = xr.open_zarr(place).load()
    assert layers_before <= int(half.done.sum()) < LAYERS
    assert half.accuracy[~half.done.values].isnull().any()
    same(sweep(activations(), **OPTIONS, out=place), whole)
    stored = xr.open_zarr(place).load()
    for name in set(whole.data_vars) - {"fit_seconds"}:
        np.testing.assert_array_equal(stored[name], whole[name], err_msg=str(name))
    # What was done before the kill was not fitted again: its times are still those of the killed process.
    np.testing.assert_array_equal(stored.fit_seconds[half.done.values][:, :3], half.fit_seconds[half.done.values][:, :3])
    assert json.loads((place / "zarr.json").read_bytes())["attributes"]["format"] == "lmprobe-zarr-scores"
