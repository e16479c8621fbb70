"""Probes with a pooling of their own on rows in memory: what they compute, how they learn, and what a file keeps of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from lmprobe_zarr.batch import concat_ranges, offsets_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError, NotAProbeError
from lmprobe_zarr.probes import (
    SEQUENCE_PROBES,
    SequenceSolution,
    dump_probe,
    make_pipeline_for,
    make_probe,
    named_probes,
    parse_probe,
    parse_sequence_probe,
    sequence_probes,
)
from lmprobe_zarr.probes.devices import parse_device
from lmprobe_zarr.probes.sequence_fits import POOL_PADDED, SequenceFit, Trained, Training, draw_looks, fit_sequences
from lmprobe_zarr.typing import Array, Floats, Ints

pytestmark = pytest.mark.model
torch: Any = pytest.importorskip("torch")

NAMES = ["attention", "attention:3", "multimax", "softmax_mean", "softmax_mean:2.5", "rolling_mean_max:3", "mlp:5"]
CLASSIFIERS = [name for name in NAMES if not name.startswith("mlp")]


def sequences(n: int = 60, hidden: int = 6, classes: int = 2, seed: int = 0, longest: int = 9) -> tuple[Array, Ints, Ints]:
    """Rows, tokens of each prompt, and labels that all its tokens carry; some prompts have one token."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, longest, n)
    y = np.arange(n) % classes
    rows = rng.normal(size=(counts.sum(), hidden))
    rows[np.arange(len(rows)), np.repeat(y, counts)] += 1.5
    return (5 + 2 * rows).astype(np.float32), counts.astype(np.int64), y.astype(np.int64)


def by_hand(name: str, projected: Floats, outputs: int) -> Any:
    """The pooled value of one prompt and the weights of its tokens, head by head, in plain numpy."""
    probe = parse_sequence_probe(name)
    assert probe is not None
    if probe.name == "mlp":
        return np.maximum(0, projected.mean(axis=0)), np.full((len(projected), 1, 1), 1 / len(projected))
    values = projected[:, -probe.heads * outputs :].reshape(-1, probe.heads, outputs)
    total, weights = np.zeros(outputs), np.zeros((len(projected), probe.heads, 1 if probe.name == "attention" else outputs))
    for head in range(probe.heads):
        for output in range(outputs):
            v = values[:, head, output]
            if probe.name == "multimax":
                w = np.eye(len(v))[v.argmax()]
            elif probe.name == "rolling_mean_max":
                size = min(int(probe.size), len(v))
                means = [v[start : start + size].mean() for start in range(len(v) - size + 1)]
                w = np.zeros(len(v))
                w[int(np.argmax(means)) : int(np.argmax(means)) + size] = 1 / size
            else:
                scores = projected[:, head] if probe.name == "attention" else v / probe.size
                w = np.exp(scores) / np.exp(scores).sum()
            weights[:, head, 0 if weights.shape[2] == 1 else output] = w
            total[output] += w @ v
    return total, weights


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_numpy_and_torch_pool_as_plain_numpy_does_prompt_by_prompt(name: str, outputs: int) -> None:
    probe = parse_sequence_probe(name)
    assert probe is not None
    rng = np.random.default_rng(1)
    counts = np.array([1, 4, 2, 7, 3, 1, 12])
    projected = rng.normal(size=(counts.sum(), probe.projections(outputs)))
    inner = rng.normal(size=(outputs, probe.inner))
    solution = SequenceSolution(
        probe, np.zeros((1, 1)), np.zeros(1), inner, np.arange(outputs, dtype=np.float64) + 0.5, np.arange(max(2, outputs))
    )
    expected = [by_hand(name, each, outputs) for each in np.split(projected, np.cumsum(counts)[:-1])]
    pooled = np.stack([value for value, _ in expected])
    scores = (pooled @ inner.T if probe.inner else pooled) + np.arange(outputs) + 0.5
    np.testing.assert_allclose(solution.pool(projected, counts), scores[:, 0] if outputs == 1 else scores, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(solution.weights(projected, counts), np.concatenate([w for _, w in expected]), atol=1e-12)
    there = torch.as_tensor(np.arange(counts.max())[None] < counts[:, None])
    padded = torch.zeros((len(counts), int(counts.max()), projected.shape[1]), dtype=torch.float64)
    padded[there] = torch.as_tensor(projected)
    np.testing.assert_allclose(POOL_PADDED[probe.name](padded, there, probe, outputs), pooled, rtol=1e-12, atol=1e-12)


def test_a_prompt_with_an_absent_token_is_nan_and_leaves_the_others_as_they_are() -> None:
    rng = np.random.default_rng(2)
    counts = np.array([3, 2, 4])
    for name in NAMES:
        probe = parse_sequence_probe(name)
        assert probe is not None
        projected = rng.normal(size=(9, probe.projections(1)))
        holed = projected.copy()
        holed[4] = np.nan
        solution = SequenceSolution(probe, np.zeros((1, 1)), np.zeros(1), np.ones((1, probe.inner)), np.zeros(1), np.arange(2))
        whole, found = solution.pool(projected, counts), solution.pool(holed, counts)
        np.testing.assert_array_equal(np.isnan(found), [False, True, False])
        np.testing.assert_array_equal(found[[0, 2]], whole[[0, 2]])
        assert np.isnan(solution.weights(holed, counts)[3:5]).all()
        assert np.isfinite(np.delete(solution.weights(holed, counts), [3, 4], axis=0)).all()


def fit(name: str, rows: Array, counts: Ints, y: Ints, training: Training, seed: int = 3) -> tuple[Trained, SequenceFit]:
    probe = parse_sequence_probe(name)
    assert probe is not None
    offsets = offsets_of(counts)
    looks = draw_looks(y, np.arange(len(y)), 0)
    wide = rows.astype(np.float64)
    asked = SequenceFit(probe=probe, learns=~looks, looks=looks, mean=wide.mean(axis=0), scale=wide.std(axis=0), seed=seed)
    # A second fit beside it, on other prompts, must change nothing.
    other = dataclasses.replace(asked, learns=looks, looks=~looks, seed=8)
    (trained, _) = fit_sequences(
        [asked, other], lambda p: rows[concat_ranges(offsets[p], counts[p])], counts, y, seed=seed, training=training
    )
    return trained, asked


@pytest.mark.few(2)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_a_plain_torch_loop(name: str, classes: int) -> None:
    rows, counts, y = sequences(classes=classes)
    training = Training(batch_prompts=20, max_epochs=6, patience=50)
    trained, asked = fit(name, rows, counts, y, training)
    # The loop: prompt by prompt, padding nothing, on rows that were standardised before.
    probe, r = asked.probe, 1 if classes == 2 else classes
    x = [torch.as_tensor(each) for each in np.split((rows - asked.mean) / asked.scale, np.cumsum(counts)[:-1])]
    rng = np.random.default_rng(asked.seed)
    n, hidden = probe.projections(r), rows.shape[1]
    held = {"coef": (1.0 if probe.inner else 0.1) / np.sqrt(hidden) * rng.normal(size=(n, hidden)), "bias": np.zeros(r)}
    if probe.inner:
        held |= {"intercept": np.zeros(n), "output": rng.normal(size=(r, n)) / np.sqrt(n)}
    weights = {key: torch.tensor(value, requires_grad=True) for key, value in held.items()}
    groups = [
        {"params": [weights["coef"]], "lr": 0.5 / hidden, "weight_decay": 0.01},
        {"params": [weights[key] for key in ("bias", "intercept") if key in weights], "lr": 0.05, "weight_decay": 0.0},
    ]
    groups += [{"params": [weights["output"]], "lr": 0.5 / n, "weight_decay": 0.01}] if probe.inner else []
    optimiser = torch.optim.AdamW(groups)

    def score(tokens: Any) -> Any:
        projected = tokens @ weights["coef"].T
        if probe.name == "mlp":
            return (projected.mean(0) + weights["intercept"]).relu() @ weights["output"].T + weights["bias"]
        total = weights["bias"]
        for head in range(probe.heads):
            start = probe.heads * (probe.name == "attention") + head * r
            values = projected[:, start : start + r]
            if probe.name == "attention":
                total = total + projected[:, head].softmax(0) @ values
            elif probe.name == "multimax":
                total = total + values.amax(0)
            elif probe.name == "softmax_mean":
                total = total + ((values / probe.size).softmax(0) * values).sum(0)
            else:
                size = min(int(probe.size), len(values))
                total = total + torch.stack([values[at : at + size].mean(0) for at in range(len(values) - size + 1)]).amax(0)
        return total

    def loss_of(prompts: Any) -> Any:
        scores, targets = torch.stack([score(x[i]) for i in prompts]), torch.as_tensor(y[prompts])
        if r == 1:
            return torch.nn.functional.binary_cross_entropy_with_logits(scores[:, 0], targets.double(), reduction="none")
        return torch.nn.functional.cross_entropy(scores, targets, reduction="none")

    losses, inner = [], []
    for epoch in range(training.max_epochs):
        seen = []
        for batch in np.array_split(np.random.default_rng([3, epoch]).permutation(len(y)), 8):
            mine = batch[asked.learns[batch]]
            loss = loss_of(mine)
            optimiser.zero_grad()
            loss.mean().backward()
            optimiser.step()
            seen.append(loss.detach())
        losses.append(float(torch.cat(seen).mean()))
        with torch.no_grad():
            inner.append(float(loss_of(np.flatnonzero(asked.looks)).mean()))
    np.testing.assert_allclose(trained.losses, losses, rtol=2e-4)
    np.testing.assert_allclose(trained.inner_losses, inner, rtol=2e-4)
    # The coefficients are those of the epoch with the smallest loss of the inner fold, in the units of the activations.
    if int(np.argmin(inner)) == training.max_epochs - 1:
        scores = trained.solution.pool(trained.solution.project(rows), counts)
        with torch.no_grad():
            expected = torch.stack([score(each) for each in x]).numpy()
        np.testing.assert_allclose(scores, expected[:, 0] if r == 1 else expected, rtol=1e-3, atol=1e-3)
    assert not trained.converged


def test_a_fit_ends_where_the_inner_fold_no_longer_improves_and_keeps_the_best() -> None:
    rows, counts, y = sequences(n=40, hidden=20, seed=4)
    rows = np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)  # nothing to learn
    trained, asked = fit("attention", rows, counts, y, Training(patience=3))
    best = int(np.argmin(trained.inner_losses))
    mark, since = np.inf, 0
    for number, loss in enumerate(trained.inner_losses):
        assert since < 3 or number == 0, "it should have ended"
        mark, since = (loss, 0) if loss < mark - 0.001 else (mark, since + 1)
    assert since == 3
    assert trained.converged
    assert len(trained.losses) == len(trained.inner_losses)
    scores = trained.solution.pool(trained.solution.project(rows), counts)[asked.looks]
    signs = 2 * y[asked.looks] - 1
    np.testing.assert_allclose(np.logaddexp(0, -signs * scores).mean(), trained.inner_losses[best], rtol=1e-4)


def test_reading_in_lots_learns_and_gives_the_same_numbers_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.probes import sequence_fits

    rows, counts, y = sequences(n=80)
    whole, _ = fit("attention", rows, counts, y, Training(max_epochs=15, patience=20))
    monkeypatch.setattr(sequence_fits, "LOT_BYTES", 4 * rows.shape[1] * 130)
    reads: list[Ints] = []
    looks = draw_looks(y, np.arange(len(y)), 0)
    offsets = offsets_of(counts)

    def read(prompts: Ints) -> Array:
        assert (np.diff(prompts) > 0).all()
        reads.append(prompts)
        return rows[concat_ranges(offsets[prompts], counts[prompts])]

    def again() -> Trained:
        wide = rows.astype(np.float64)
        probe = parse_sequence_probe("attention")
        assert probe is not None
        asked = SequenceFit(probe=probe, learns=~looks, looks=looks, mean=wide.mean(axis=0), scale=wide.std(axis=0), seed=3)
        return fit_sequences([asked], read, counts, y, seed=3, training=Training(max_epochs=15, patience=20))[0]

    first, second = again(), again()
    np.testing.assert_array_equal(first.solution.coef, second.solution.coef)
    np.testing.assert_array_equal(first.losses, second.losses)
    lots = [each for each in reads if len(each) > 1]
    assert max(counts[lot].sum() for lot in lots) <= 2 * 130
    epoch = np.concatenate(lots[: next(k for k in range(1, len(lots) + 1) if sum(map(len, lots[:k])) == len(y))])
    np.testing.assert_array_equal(np.sort(epoch), np.arange(len(y)))
    assert abs(first.inner_losses.min() - whole.inner_losses.min()) < 0.2


def test_the_inner_fold_keeps_groups_whole_and_has_every_class() -> None:
    y, groups = np.tile([0, 1, 0, 1], 10), np.repeat(np.arange(20), 2)
    looks = draw_looks(y, groups, 1, grouped=True)
    assert set(groups[looks]).isdisjoint(groups[~looks])
    assert set(y[looks]) == set(y[~looks]) == {0, 1}
    assert 0.1 < looks.mean() < 0.3
    with pytest.raises(LabelError, match="a single prompt"):
        draw_looks(np.array([0, 0, 0, 1]), np.arange(4), 0)


# -- names and devices -----------------------------------------------------------------------------------------------------


def test_names_and_their_sources_are_pinned() -> None:
    described = sequence_probes()
    assert (
        list(described)
        == ["attention", "multimax", "softmax_mean", "rolling_mean_max", "mlp"]
        == list(POOL_PADDED)
        == list(SEQUENCE_PROBES)
    )
    assert all("arXiv:" in text for text in described.values())
    assert not set(described) & (set(named_probes()) - {"mlp"})
    assert str(parse_sequence_probe("attention:4")) == "attention:4"
    assert parse_sequence_probe("ridge") is None
    assert parse_sequence_probe(5) is None


@pytest.mark.parametrize("name", ["attention:0", "attention:", "attention:1.5", "attention:-2", "multimax:x", "softmax_mean:0", "mlp:99999",
                                  "rolling_mean_max:1e9", "attention:4:4", "softmax_mean:nan"])  # fmt: skip
def test_numbers_that_a_probe_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="that can be used: give"):
        parse_sequence_probe(name)


def test_a_device_that_does_not_exist_is_named_with_those_that_do() -> None:
    assert parse_device("cpu", needed_by="a probe that learns how to pool") == "cpu"
    assert parse_device("auto", needed_by="a probe that learns how to pool") in ("cpu", "cuda")
    for device in ("cuda:99", "gpu", "", 5.5, None):
        with pytest.raises(InvalidArgumentError, match=r"cannot be used here: there is cpu"):
            parse_device(device, needed_by="a probe that learns how to pool")


def test_one_vector_per_prompt_has_nothing_to_pool() -> None:
    with pytest.raises(InvalidArgumentError, match="'attention' learns how to pool the tokens of a prompt, and here there is one vector"):
        make_probe("attention")
    assert make_probe("mlp") is not None


# -- estimators and files --------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.filterwarnings("ignore:.*was still improving")
def test_a_saved_classifier_predicts_bit_for_bit_as_before(name: str, classes: int) -> None:
    rows, counts, y = sequences(classes=classes)
    pipeline = make_pipeline_for(name, params={"max_epochs": 3}, random_state=4)
    scaled = pipeline.steps[0][1].fit_transform(rows)
    last = pipeline.steps[-1][1].fit(scaled, np.array(["a", "b", "c"])[y], counts)
    again, header = parse_probe(dump_probe(pipeline, {"some": "header"}), "a file")
    assert header == {"some": "header"}
    read = again.steps[-1][1]
    assert type(read) is type(last)
    assert read.get_params() == last.get_params()
    for method in ("decision_function", "predict_proba", "predict", "weights"):
        np.testing.assert_array_equal(getattr(read, method)(scaled, counts), getattr(last, method)(scaled, counts))
    np.testing.assert_array_equal(read.loss_curve_, last.loss_curve_)
    np.testing.assert_allclose(last.predict_proba(scaled, counts).sum(axis=1), 1)
    weights = last.weights(scaled, counts)
    np.testing.assert_allclose(np.add.reduceat(weights, np.cumsum(counts) - counts), 1)


@pytest.mark.filterwarnings("ignore:.*was still improving")
def test_a_file_whose_heads_do_not_match_is_damaged() -> None:
    rows, counts, y = sequences()
    pipeline = make_pipeline_for("attention:2", params={"max_epochs": 1})
    pipeline.steps[-1][1].fit(pipeline.steps[0][1].fit_transform(rows), y, counts)
    pipeline.steps[-1][1].n_heads = 3
    with pytest.raises(NotAProbeError, match="AttentionClassifier has 2 heads"):
        parse_probe(dump_probe(pipeline, {}), "a file")


def test_reading_a_saved_classifier_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    rows, counts, y = sequences()
    pipeline = make_pipeline_for("multimax:2", params={"max_epochs": 1})
    with pytest.warns(ConvergenceWarning, match="MultimaxClassifier was still improving after 1 passes"):
        pipeline.steps[-1][1].fit(pipeline.steps[0][1].fit_transform(rows), y, counts)
    path = tmp_path / "probe.safetensors"
    path.write_bytes(dump_probe(pipeline, {}))
    script = (
        "import sys, json, numpy as np\nfrom lmprobe_zarr.probes import parse_probe\n"
        f"probe, _ = parse_probe(open({str(path)!r}, 'rb').read(), 'it')\n"
        "print(json.dumps([probe.steps[-1][1].decision_function(np.ones((4, 6)), [1, 3]).tolist(), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    scores, imported = json.loads(done.stdout)
    assert not imported
    np.testing.assert_allclose(scores, pipeline.steps[-1][1].decision_function(np.ones((4, 6)), [1, 3]))


def test_parameters_that_cannot_be_are_refused() -> None:
    for params, message in (
        ({"n_heads": 0}, "cannot be made with"), ({"n_heads": True}, "cannot be made with"), ({"max_epochs": 0}, "no whole number"),
        ({"learning_rate": 0.0}, "no number up to"), ({"C": 1}, "has no parameter 'C': its parameters are"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=message):
            make_pipeline_for("attention", params=params)
    with pytest.raises(InvalidTypeError, match="parameters are a mapping"):
        make_pipeline_for("attention", params=[1])  # type: ignore[arg-type]
    rows, counts, y = sequences()
    classifier = make_pipeline_for("attention").steps[-1][1]
    with pytest.raises(InvalidArgumentError, match="give one row per token"):
        classifier.fit(rows, y, counts + 1)
    with pytest.raises(InvalidArgumentError, match="there are 59 labels for 60 prompts"):
        classifier.fit(rows, y[1:], counts)
