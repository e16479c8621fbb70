"""Controls of words and of the model's own tokens, and the warning where they score clearly below chance."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))


def array_of(x: Any, y: Any, **columns: Any) -> xr.DataArray:
    coords = {
        "layer": [0],
        "prompt": [f"p{i}" for i in range(len(x))],
        "label": ("prompt", y),
        **{name: ("prompt", held) for name, held in columns.items()},
    }
    return xr.DataArray(np.asarray(x, "f4")[None], dims=("layer", "prompt", "hidden"), coords=coords)


# -- bags of tokens --------------------------------------------------------------------------------------------------------

N = 60
RNG = np.random.default_rng(0)
Y = RNG.permutation(np.arange(N) % 2)
#: Tokens of a model that tell the label by one of its ids in most prompts; of different lengths.
IDS: list[list[int]] = [[1, *RNG.integers(3, 40, RNG.integers(2, 7)).tolist(), 7 if y and i % 5 else 8] for i, y in enumerate(Y)]
X = RNG.normal(size=(N, 4))


def counted(*, rare: bool = False) -> Any:
    """Scores by plain counts in numpy, on the same folds."""
    found = []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(X, Y):
        known = sorted({token for i in train for token in IDS[i]})
        counts = np.array([[ids.count(token) for token in known] for ids in IDS], float)
        if rare:
            counts *= np.log((1 + len(train)) / (1 + (counts[train] > 0).sum(0))) + 1
            counts /= np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-300)
        found.append(LogisticRegression(max_iter=1000).fit(counts[train], Y[train]).score(counts[test], Y[test]))
    return np.array(found)


def tokens_of(order: Any) -> xr.Dataset:
    """The same ids as a table of tokens, as a store keeps them, its prompts in another order."""
    rows = [(f"p{i}", place, token) for i in order for place, token in enumerate(IDS[i])]
    coords = {name: ("token", [row[k] for row in rows]) for k, name in enumerate(("prompt", "position", "token_id"))}
    return xr.Dataset(coords=coords)


@pytest.mark.few(6)
@pytest.mark.parametrize("control", ["bag_of_tokens", "tfidf_of_tokens"])
@pytest.mark.parametrize(
    "form",
    [
        lambda: tokens_of(RNG.permutation(N)),
        lambda: tokens_of(range(N)).token_id,
        lambda: tokens_of(range(N)).set_xindex(["prompt", "position"], lz.TokenIndex).isel(token=slice(None, None, -1)),
        lambda: IDS,
        lambda: list(map(np.array, IDS)),
        lambda: {f"p{i}": IDS[i] for i in RNG.permutation(N)},
    ],
    ids=["dataset in another order", "array", "with an index, backwards", "lists", "arrays", "mapping"],
)
def test_bags_of_tokens_are_counts_of_token_ids_matched_by_prompt(control: str, form: Any) -> None:
    scores = lz.sweep(array_of(X, Y), "label", "mass_mean", controls={control: form()}, metrics="accuracy", scheduler="synchronous")
    np.testing.assert_allclose(scores.accuracy.sel(probe=control, layer=0), counted(rare=control.startswith("tfidf")))
    assert scores.control.sel(probe=control) == control
    assert scores.kind.sel(probe=control) == "control"


def test_ids_that_the_activations_carry_need_no_argument() -> None:
    padded = np.full((N, 9), -1)
    for row, ids in zip(padded, IDS, strict=True):
        row[: len(ids)] = ids
    lists = np.empty(N, object)
    lists[:] = IDS
    data = array_of(X, Y).to_dataset(name="resid_mean")
    for held in (data.assign(token_id=(("position", "prompt"), padded.T)), array_of(X, Y, token_id=lists)):
        scores = lz.sweep(held, "label", "mass_mean", controls=["bag_of_tokens"], metrics="accuracy", scheduler="synchronous")
        np.testing.assert_allclose(scores.accuracy.sel(probe="bag_of_tokens", layer=0).squeeze(), counted())


def test_bags_come_from_the_token_ids_of_a_store_in_scripts_without_spaces_too(tmp_path: Path) -> None:
    texts = [f"今天天气很{'坏好'[y]}我去了第{i}个地方" for i, y in enumerate(Y)]
    ids = [list(text.encode()) for text in texts]  # as a tokenizer of bytes
    store = lz.open_store(tmp_path / "acts", durable=False)
    rows = np.split(RNG.normal(size=(sum(map(len, ids)), 4)).astype("f4"), np.cumsum([len(each) for each in ids])[:-1])
    lz.write_activations(
        store, model="a/model", prompts=texts, activations={"resid": {0: rows}}, pooled={"resid_mean": {0: X.astype("f4")}},
        token_ids=ids, coords={"label": Y},
    )  # fmt: skip
    data, tokens = store.dataset(), store.tokens()
    some = data.isel(prompt=RNG.permutation(N)[:50])
    scores = lz.sweep(some.resid_mean, "label", "mass_mean", controls={"bag_of_tokens": tokens, "tfidf_of_tokens": tokens})
    assert (scores.accuracy.sel(probe=["bag_of_tokens", "tfidf_of_tokens"]).mean("fold") > 0.9).all()
    out = lz.sweep(some.resid_mean, "label", "mass_mean", controls={"bag_of_tokens": tokens.resid}, out=tmp_path / "scores")
    np.testing.assert_array_equal(out.accuracy.sel(probe="bag_of_tokens"), scores.accuracy.sel(probe="bag_of_tokens"))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, InvalidArgumentError, r"'bag_of_tokens' needs the prompts' token ids, which are not there: give them with"),
        (IDS[:-1], InvalidArgumentError, "token ids of 59 prompts, expected 60"),
        ([*IDS[:-1], []], InvalidArgumentError, r"which 1 of 60 prompts lack \(p59\)"),
        ([*IDS[:-1], [-1]], InvalidTypeError, "give whole numbers of at least 0"),
        ([*IDS[:-1], "words"], InvalidTypeError, "give whole numbers of at least 0"),
        (3, InvalidArgumentError, "token ids of 1 prompts"),
        (tokens_of(range(N)).drop_vars("token_id"), InvalidArgumentError, "tokens without a coordinate 'token_id'"),
        (tokens_of(range(57)), InvalidArgumentError, r"which 3 of 60 prompts lack \(p57, p58, p59\)"),
        (tokens_of(range(N)).assign_coords(token_id=("token", np.full(sum(map(len, IDS)), -1))), InvalidArgumentError, "60 of 60 prompts"),
    ],
)
def test_token_ids_that_are_not_known_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lz.sweep(array_of(X, Y), "label", "mass_mean", controls={"bag_of_tokens": given})


def test_tokens_are_never_matched_without_prompts() -> None:
    with pytest.raises(InvalidArgumentError, match="without a coordinate 'prompt'"):
        lz.sweep(array_of(X, Y).drop_vars("prompt"), "label", "mass_mean", controls={"bag_of_tokens": tokens_of(range(N))})


# -- below chance ----------------------------------------------------------------------------------------------------------


def pairs(kind: str, n: int, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """Two prompts of each pair that differ in what words do not tell, with opposite labels."""
    rng = np.random.default_rng(seed)

    def some(length: int) -> str:
        return " ".join(f"w{k}" for k in rng.integers(0, 400, length))

    base = [some(6) for _ in range(n)]
    tell: Any = {
        "one word swapped": lambda i: f"{base[i // 2]} v{rng.integers(0, 60)}",
        "copies under other names": lambda i: base[i // 2],
        "sums": lambda i: f"{i // 2 * 7 % 89} + {i // 2 * 5 % 97} = {rng.integers(5, 200)}",
    }[kind]
    columns = {"text": np.array([tell(i) for i in range(2 * n)], object), "pair": np.repeat(np.arange(n), 2)}
    return np.tile([0, 1], n), columns


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("one word swapped", None),
        ("copies under other names", "accuracy"),
        ("sums", "auroc"),
        ("one word swapped", "balanced_accuracy"),
    ],
)
def test_a_control_far_below_chance_warns_of_torn_pairs_and_names_groups(kind: str, metrics: Any) -> None:
    y, columns = pairs(kind, 50)
    array = array_of(np.random.default_rng(1).normal(size=(100, 4)), y, **columns)
    options: dict[str, Any] = {"controls": ["bag_of_words"], "metrics": metrics, "scheduler": "synchronous"}
    with pytest.warns(
        UserWarning, match=r"control 'bag_of_words' has the .* clearly below chance .*name what belongs together with groups="
    ):
        lz.sweep(array, "label", "mass_mean", **options)
    lz.sweep(array, "label", "mass_mean", groups="pair", **options)  # warnings are errors here
    lz.sweep(array, "label", "mass_mean", **options | {"controls": ["majority", "shuffled_labels"]})


def test_groups_that_do_not_keep_pairs_together_are_named() -> None:
    y, columns = pairs("copies under other names", 40)
    array = array_of(np.random.default_rng(1).normal(size=(80, 4)), y, **columns, half=np.arange(80))
    with pytest.warns(UserWarning, match="the groups 'half' do not keep them together: give coarser ones"):
        lz.sweep(array, "label", "mass_mean", groups="half", controls="tfidf", scheduler="synchronous")


def test_tokens_of_torn_pairs_warn_too() -> None:
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(240).reshape(40, 6), 2, axis=0)
    coords = {
        "prompt": ("token", np.repeat([f"p{i}" for i in range(80)], 6)),
        "position": ("token", np.tile(np.arange(6), 80)),
        "token_id": ("token", ids.ravel()),
        "label": ("token", np.repeat(np.tile([0, 1], 40), 6)),
        "pair": ("token", np.repeat(np.arange(40), 12)),
    }
    array = xr.DataArray(rng.normal(size=(480, 3)).astype("f4"), dims=("token", "hidden"), coords=coords)
    for pooling in ("all", "score:mean"):
        with pytest.warns(UserWarning, match="control 'token_identity' has the auroc"):
            lz.sweep_tokens(array, "label", controls=["token_identity", "majority"], pooling=pooling)
        lz.sweep_tokens(array, "label", controls=["token_identity", "majority"], pooling=pooling, groups="pair")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("n", "share", "metrics"), [(20, 0.5, None), (60, 0.2, "auroc"), (60, 0.3, "accuracy"), (100, 0.5, "balanced_accuracy")]
)
def test_controls_of_noise_do_not_warn(n: int, share: float, metrics: Any) -> None:
    for seed in range(300 if STRESS else 2):
        rng = np.random.default_rng(seed)
        y = rng.permutation(np.arange(n) < share * n).astype(int)
        texts = np.array([" ".join(f"w{k}" for k in rng.integers(0, 100, 8)) for _ in range(n)], object)
        controls = {"bag_of_words": None, "tfidf": None, "length": None, "random_direction": None, "own": rng.normal(size=(n, 3))}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*below chance")
            lz.sweep(
                array_of(rng.normal(size=(n, 4)), y, text=texts), "label", "mass_mean", 4, controls=controls, metrics=metrics,
                random_state=seed, scheduler="synchronous",
            )  # fmt: skip


def test_scikit_learns_pipeline_is_as_far_below_chance() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.pipeline import make_pipeline

    y, columns = pairs("one word swapped", 50)
    plain = make_pipeline(CountVectorizer(lowercase=False), LogisticRegression(max_iter=1000))
    assert cross_val_score(plain, columns["text"], y, cv=StratifiedKFold(5, shuffle=True, random_state=0)).mean() < 0.2
