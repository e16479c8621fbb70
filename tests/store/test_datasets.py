"""Ordinary xarray on both views of a store, against plain xarray in memory over the same values."""

from __future__ import annotations

import copy
import pickle
import random
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.tokens.index import TokenIndex

TEXTS = ["zebra", "apple", "mango", "kiwi", "fig", "date"]
HIDDEN = 3
LEVELS = ("prompts", "tokens")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PartSpec:
    """What one call of write_activations stores."""

    prompts: tuple[str, ...]
    counts: tuple[int, ...]
    layers: tuple[int, ...]
    sites: tuple[str, ...]
    pooled: bool
    dtype: str
    labels: bool
    names: bool


@st.composite
def part_specs(draw: st.DrawFn) -> PartSpec:
    prompts = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4, unique=True))
    sites = draw(st.sampled_from([("resid",), ("resid", "attn"), ("attn",), ()]))
    return PartSpec(
        prompts=tuple(prompts),
        # Mostly the prompt's own length: now and then a refreshed prompt comes back with another one.
        counts=tuple(1 + len(p) % 4 + draw(st.sampled_from([0, 0, 0, 1])) for p in prompts),
        layers=tuple(sorted(draw(st.sets(st.sampled_from([0, 1, 3]), min_size=1, max_size=3)))),
        sites=sites,
        pooled=draw(st.booleans()) or not sites,
        dtype=draw(st.sampled_from(["float16", "float32", "float64"])),
        labels=draw(st.booleans()),
        names=draw(st.booleans()),
    )


@dataclass
class Truth:
    """What was written, prompt by prompt; the view is worked out from it by plain loops."""

    specs: list[PartSpec]
    tokens: list[dict[str, dict[int, list[Array]]]]
    pooled: list[dict[int, Array]]
    labels: list[list[int] | None]
    names: list[list[str] | None]

    @property
    def order(self) -> list[str]:
        return list(dict.fromkeys(p for spec in self.specs for p in spec.prompts))

    def count(self, prompt: str) -> int:
        counts = [s.counts[s.prompts.index(prompt)] for s in self.specs if s.sites and prompt in s.prompts]
        return counts[-1] if counts else 0

    def column(self, prompt: str, columns: list[Any], missing: Any) -> Any:
        found = [c[s.prompts.index(prompt)] for s, c in zip(self.specs, columns, strict=True) if c is not None and prompt in s.prompts]
        return found[-1] if found else missing

    def tokens_of(self, site: str, layer: int, prompt: str) -> Array:
        found = np.full((self.count(prompt), HIDDEN), np.nan)
        for spec, tokens in zip(self.specs, self.tokens, strict=True):
            if not spec.sites or prompt not in spec.prompts:
                continue
            if spec.counts[spec.prompts.index(prompt)] != self.count(prompt):
                found = np.full_like(found, np.nan)  # seen as other tokens: what came before is out of date
            elif site in spec.sites and layer in spec.layers:
                found = tokens[site][layer][spec.prompts.index(prompt)]
        return found

    def pooled_of(self, layer: int, prompt: str) -> Array:
        found = np.full(HIDDEN, np.nan)
        for spec, pooled in zip(self.specs, self.pooled, strict=True):
            if spec.pooled and layer in spec.layers and prompt in spec.prompts:
                found = pooled[layer][spec.prompts.index(prompt)]
        return found

    def dataset(self) -> xr.Dataset:
        """The view per prompt, in memory."""
        holding = [s for s in self.specs if s.pooled]
        layers = sorted({layer for s in holding for layer in s.layers})
        data: dict[str, Any] = {}
        coords: dict[str, Any] = {"layer": layers} if layers else {}
        if holding:
            values = np.array([[self.pooled_of(layer, p) for p in self.order] for layer in layers])
            data["resid_mean"] = (("layer", "prompt", "hidden"), values.astype(np.result_type(*(s.dtype for s in holding), np.float32)))
        coords |= self._columns("prompt", self.order)
        return xr.Dataset(data, {**coords, "prompt": [lz.prompt_hash(p) for p in self.order]})

    def token_dataset(self) -> xr.Dataset:
        """The view per token, in memory, under a pandas MultiIndex."""
        prompts = [p for p in self.order if self.count(p)]
        layers = sorted({layer for s in self.specs if s.sites for layer in s.layers})
        data: dict[str, Any] = {}
        for site in ("resid", "attn"):
            holding = [s for s in self.specs if site in s.sites]
            if holding:
                values = np.array([np.concatenate([self.tokens_of(site, layer, p) for p in prompts]) for layer in layers])
                data[site] = (("layer", "token", "hidden"), values.astype(np.result_type(*(s.dtype for s in holding), np.float32)))
        spelled = [p for p in prompts for _ in range(self.count(p))]
        coords: dict[str, Any] = {**({"layer": layers} if layers else {}), **self._columns("token", spelled)}
        coords["prompt"] = ("token", np.array([lz.prompt_hash(p) for p in spelled], "U16"))
        coords["position"] = ("token", np.array([i for p in prompts for i in range(self.count(p))], np.int64))
        return xr.Dataset(data, coords).set_index(token=["prompt", "position"])

    def _columns(self, dim: str, prompts: list[str]) -> dict[str, Any]:
        columns: dict[str, Any] = {"text": (dim, np.array(prompts, object))}
        if any(self.labels):
            labels = [self.column(p, self.labels, np.nan) for p in prompts]
            columns["label"] = (dim, np.array(labels, np.float64 if any(v != v for v in labels) else np.int64))
        if any(self.names):
            columns["name"] = (dim, np.array([self.column(p, self.names, np.nan) for p in prompts], object))
        return columns


def write(store: Store, specs: list[PartSpec]) -> Truth:
    """Write parts of values that tell every cell from every other (and are exact in float16)."""
    truth = Truth(specs, [], [], [], [])
    rng = np.random.default_rng(len(specs))

    def fresh(shape: tuple[int, ...], dtype: str) -> Array:
        return rng.integers(-2000, 2000, shape).astype(dtype)

    for spec in specs:
        truth.tokens.append({s: {i: [fresh((n, HIDDEN), spec.dtype) for n in spec.counts] for i in spec.layers} for s in spec.sites})
        truth.pooled.append({i: fresh((len(spec.prompts), HIDDEN), spec.dtype) for i in spec.layers} if spec.pooled else {})
        truth.labels.append([int(i) for i in rng.integers(0, 2, len(spec.prompts))] if spec.labels else None)
        truth.names.append([f"n{i}" for i in rng.integers(0, 3, len(spec.prompts))] if spec.names else None)
        coords = {"label": truth.labels[-1], "name": truth.names[-1]}
        lz.write_activations(
            store,
            model="toy",
            prompts=spec.prompts,
            activations=truth.tokens[-1],
            pooled={"resid_mean": truth.pooled[-1]} if spec.pooled else None,
            coords={name: values for name, values in coords.items() if values is not None},
        )
    return truth


@dataclass
class Views:
    """A store's views and what they should be."""

    store: Store
    truth: Truth

    def pair(self, level: str) -> tuple[xr.Dataset, xr.Dataset]:
        names = ["n_tokens", "prompt_length", "prompt_sha256", "model"]
        opened = self.store.dataset() if level == "prompts" else self.store.tokens()
        return opened.drop_vars(names, errors="ignore"), self.truth.dataset() if level == "prompts" else self.truth.token_dataset()


@pytest.fixture
def views(tmp_path: Path) -> Views:
    """Three parts: a refreshed prompt, layers that are missing, a prompt without tokens."""
    store = lz.open_store(tmp_path / "acts", durable=False)
    specs = [
        PartSpec(("zebra", "apple", "mango"), (3, 2, 4), (0, 1), ("resid",), True, "float16", True, True),
        PartSpec(("kiwi", "zebra"), (1, 3), (0, 3), ("resid", "attn"), True, "float32", True, True),
        PartSpec(("fig",), (2,), (0, 1, 3), (), True, "float32", True, False),
    ]
    return Views(store, write(store, specs))


def assert_index_is_fresh(data: Any) -> None:
    """The token index says what the coordinates say, and no coordinate of it is on its own."""
    for index, variables in data.xindexes.group_by_index():
        if isinstance(index, TokenIndex):
            spelled = index.create_variables()
            assert set(spelled) == set(variables)
            for name, variable in spelled.items():
                assert variable.dims == data[name].dims
                np.testing.assert_array_equal(variable.values, data[name].values)


def assert_same(ours: Any, oracle: Any) -> None:
    """The same names, dims and values; the oracle alone has a coordinate of tuples."""
    ours, oracle = (d if isinstance(d, xr.Dataset) else d.rename("values").to_dataset() for d in (ours, oracle))
    assert_index_is_fresh(ours)
    assert {str(n) for n in ours.variables} == {str(n) for n in oracle.variables} - {"token"}
    assert set(ours.data_vars) == set(oracle.data_vars)
    for name, mine in ours.variables.items():
        theirs = oracle.variables[name]
        assert mine.dims == theirs.dims, name
        got, expected = np.asarray(mine.values), np.asarray(theirs.values)
        assert got.shape == expected.shape, name
        if expected.dtype.kind == "f":
            assert got.dtype == expected.dtype, name
            np.testing.assert_allclose(got, expected, rtol=2e-3 if expected.dtype == np.float16 else 1e-6, err_msg=str(name))
        else:
            missing = [value != value for value in expected.reshape(-1).tolist()]  # NaN among texts
            assert missing == [value != value for value in got.reshape(-1).tolist()], name
            assert got.reshape(-1)[~np.array(missing, bool)].tolist() == expected.reshape(-1)[~np.array(missing, bool)].tolist(), name


# ------------------------------------------------------------------------------------------------ chains of operations

Operation = Callable[[Any, random.Random], Any]
CONCAT: dict[str, Any] = {"data_vars": "all", "coords": "different", "compat": "equals", "join": "outer"}


def sample_dim(data: Any) -> str:
    return next((dim for dim in ("token", "prompt") if dim in data.sizes), "")


def dims_of(data: Any) -> list[str]:
    """The dimensions in an order that does not depend on how the dataset was made."""
    return sorted(map(str, data.dims))


def _slice(n: int, rng: random.Random) -> slice:
    step = rng.choice([1, 1, 2, -1, -2, None])
    return slice(rng.choice([None, *range(-n, n + 1)]), rng.choice([None, *range(-n - 1, n + 1)]), step)


def _list(n: int, rng: random.Random) -> list[int]:
    return [rng.randrange(-n, n) for _ in range(rng.randrange(5))] if n else []


def _any_indexer(n: int, rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return n + 3  # beyond the end: an error on both sides
    mask = np.array([rng.random() < 0.6 for _ in range(n)], bool)
    return rng.choice([_slice(n, rng), _list(n, rng), np.array(_list(n, rng), int), mask, rng.randrange(-n, n) if n else slice(0)])


def do_isel(data: Any, rng: random.Random) -> Any:
    dims = [dim for dim in dims_of(data) if rng.random() < 0.6]
    return data.isel({dim: _any_indexer(data.sizes[dim], rng) for dim in dims})


def do_isel_sample(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    return data.isel({dim: _any_indexer(data.sizes[dim], rng)}) if dim else data


def do_permute(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    return data.isel({dim: rng.sample(range(data.sizes[dim]), data.sizes[dim])}) if dim else data


def do_pointwise(data: Any, rng: random.Random) -> Any:
    n = rng.randrange(1, 4)
    dims = [dim for dim in dims_of(data) if dim != "z" and data.sizes[dim] and rng.random() < 0.7]
    name = rng.choice(["z", "z", sample_dim(data) or "z"])
    return data.isel({dim: xr.DataArray([rng.randrange(-data.sizes[dim], data.sizes[dim]) for _ in range(n)], dims=name) for dim in dims})


def do_sel_layers(data: Any, rng: random.Random) -> Any:
    wanted = rng.choice([0, 1, 3, [3, 0], [1], slice(0, 1), slice(1, None), slice(3, 0)])
    return data.sel(layer=wanted) if "layer" in data.dims else data


def do_where_drop(data: Any, rng: random.Random) -> Any:
    return data.where(data.label == 1, drop=True) if "label" in data.coords else data


def do_where(data: Any, rng: random.Random) -> Any:
    return data.where(data.text > "d")


def do_groupby_mean(data: Any, rng: random.Random) -> Any:
    return data.groupby(rng.choice(["text", "label", "prompt"])).mean() if sample_dim(data) else data


def do_groupby_subtract(data: Any, rng: random.Random) -> Any:
    return data.groupby("text").map(lambda group: group - group.mean(sample_dim(group))) if sample_dim(data) else data


def do_reduce(data: Any, rng: random.Random) -> Any:
    dims = [dim for dim in dims_of(data) if rng.random() < 0.4]
    return getattr(data, rng.choice(["mean", "max", "min", "sum"]))(dims)


def do_concat(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    if not dim:
        return data
    at = rng.randrange(data.sizes[dim] + 1)
    return xr.concat([data.isel({dim: slice(at, None)}), data.isel({dim: slice(0, rng.choice([at, at, None]))})], dim, **CONCAT)


def do_concat_layers(data: Any, rng: random.Random) -> Any:
    if "layer" not in data.dims or not sample_dim(data):
        return data
    some = do_isel_sample(data, rng)
    return xr.concat([data, some], "layer", data_vars="all", coords="minimal", compat="override", join=rng.choice(["inner", "outer"]))


def do_add(data: Any, rng: random.Random) -> Any:
    return data + do_isel_sample(data, rng)


def do_subtract_permuted(data: Any, rng: random.Random) -> Any:
    return do_permute(data, rng) - do_isel_sample(data, rng)


def do_align(data: Any, rng: random.Random) -> Any:
    first, other = do_isel_sample(data, rng), do_permute(data, rng)
    return xr.align(first, other, join=rng.choice(["inner", "outer", "left", "right", "exact"]))[rng.randrange(2)]


def do_reindex_like(data: Any, rng: random.Random) -> Any:
    return do_isel_sample(data, rng).reindex_like(do_permute(data, rng))


def do_merge(data: Any, rng: random.Random) -> Any:
    other = do_isel_sample(data, rng).rename({name: f"{name}_2" for name in data.data_vars})
    return xr.merge([data, other], join=rng.choice(["inner", "outer"]), compat="override")


def do_combine_first(data: Any, rng: random.Random) -> Any:
    return do_isel_sample(data, rng).combine_first(do_permute(data, rng))


def do_sortby(data: Any, rng: random.Random) -> Any:
    names = [n for n in ("text", "prompt", "label", "position") if n in data.coords and data[n].ndim == 1]
    return data.sortby(rng.sample(names, min(2, len(names))), ascending=rng.random() < 0.5) if names else data


def do_roll(data: Any, rng: random.Random) -> Any:
    dims = [dim for dim in dims_of(data) if rng.random() < 0.5]
    return data.roll({dim: rng.randrange(-4, 5) for dim in dims}, roll_coords=rng.random() < 0.7)


def do_shift(data: Any, rng: random.Random) -> Any:
    return data.shift({dim: rng.randrange(-2, 3) for dim in dims_of(data)})


def do_pad(data: Any, rng: random.Random) -> Any:
    dim = rng.choice([d for d in dims_of(data) if d != "z"] or [""])
    return data.pad({dim: (1, rng.randrange(2))}) if dim else data


def do_transpose(data: Any, rng: random.Random) -> Any:
    return data.transpose(*rng.sample(dims_of(data), len(data.dims)))


def do_stack(data: Any, rng: random.Random) -> Any:
    if not {"layer", "hidden"} <= set(data.dims):
        return data
    stacked = data.stack(both=("layer", "hidden"))
    return stacked.isel(both=slice(None, None, -1)).unstack("both")


def do_unstack(data: Any, rng: random.Random) -> Any:
    if "token" not in data.dims:
        return data
    unstacked = data.drop_vars(["text", "name", "label"], errors="ignore").compute().unstack("token")
    # In which order pandas lists prompts and positions depends on the history of its index; ours are sorted.
    return unstacked.sortby([dim for dim in ("prompt", "p", "position", "q") if dim in unstacked.dims])


def do_rename(data: Any, rng: random.Random) -> Any:
    if "position" not in data.coords or "token" not in data.dims:
        return data
    renamed = data.rename_vars(prompt="p", position="q").isel(token=slice(None, None, -1))
    assert_index_is_fresh(renamed)
    return renamed.rename_vars(p="prompt", q="position")


def do_swap(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    return data.swap_dims({dim: "text"}).isel(text=slice(None, None, -1)) if dim else data


def do_assign(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    return data.assign_coords(number=(dim, np.arange(data.sizes[dim]))) if dim else data


def do_reset(data: Any, rng: random.Random) -> Any:
    return data.reset_index(["prompt", "position"]) if "token" in data.dims else data.reset_index("prompt")


def do_chunk(data: Any, rng: random.Random) -> Any:
    chunked = data.chunk(dict.fromkeys(dims_of(data), 2))
    return chunked.compute(scheduler="threads") if rng.random() < 0.5 else chunked


def do_copy(data: Any, rng: random.Random) -> Any:
    how: Callable[[Any], Any] = rng.choice([copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d)), lambda d: d.compute()])  # noqa: S301
    return how(data)


def do_expand(data: Any, rng: random.Random) -> Any:
    return data.expand_dims("z").squeeze("z") if "z" not in data.dims else data


def do_head(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    return getattr(data, rng.choice(["head", "tail", "thin"]))({dim: 2}) if dim else data


def do_difference(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    return data.diff(dim, label=rng.choice(["upper", "lower"])) if dim else data


def do_dropna(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    return data.dropna(dim, how=rng.choice(["any", "all"])) if dim else data


def do_rolling(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    return data.rolling({dim: 2}, min_periods=1).max() if dim and data.sizes[dim] > 1 else data


def do_select_prompts(data: Any, rng: random.Random) -> Any:
    if "prompt" not in data.dims or not data.sizes["prompt"]:
        return data
    labels = [str(h) for h in data.prompt.values]
    some = [rng.choice(labels) for _ in range(rng.randrange(4))]
    if rng.random() < 0.2:
        some.append("absent")
    return data.sel(prompt=rng.choice([some, labels[0], xr.DataArray(some, dims="z"), data.prompt > labels[0], slice(labels[0], None)]))


def do_reindex_prompts(data: Any, rng: random.Random) -> Any:
    if "prompt" not in data.dims or not data.sizes["prompt"]:
        return data
    return data.reindex(prompt=["absent", *(str(h) for h in data.prompt.values[::-2])], fill_value={"text": "", "name": "", "label": -1})


def do_drop_duplicates(data: Any, rng: random.Random) -> Any:
    return data.drop_duplicates("prompt") if "prompt" in data.dims else data


OPERATIONS: list[Operation] = [op for name, op in sorted(globals().items()) if name.startswith("do_")]


def attempt(data: Any, operation: Operation, seed: int) -> tuple[Any, Exception | None]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        try:
            result = operation(data, random.Random(seed))
            return result, None
        except Exception as error:  # noqa: BLE001 — whatever the oracle raises
            return None, error


@pytest.mark.few(1)
@pytest.mark.parametrize("level", LEVELS)
@given(
    specs=st.lists(part_specs(), min_size=1, max_size=4),
    chain=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**16)), min_size=1, max_size=4),
)
@settings(max_examples=examples(10, 300), deadline=None)
def test_chains_of_operations_give_what_plain_xarray_gives(level: str, specs: list[PartSpec], chain: list[tuple[Operation, int]]) -> None:
    assume(level == "prompts" or any(spec.sites for spec in specs))  # without tokens there is no such view
    url = f"memory://{uuid.uuid4().hex}"
    try:
        views = Views(store := lz.open_store(url), write(store, specs))
        ours, oracle = views.pair(level)
        assert_same(ours, oracle)
        for operation, seed in chain:
            got, our_error = attempt(ours, operation, seed)
            expected, their_error = attempt(oracle, operation, seed)
            if their_error is not None and our_error is None:
                our_error = attempt(got, lambda data, _: data.compute(), 0)[1]  # an index beyond the end shows when it is read
            assert (our_error is None) == (their_error is None), (operation.__name__, our_error, their_error)
            if our_error is not None:
                return
            ours, oracle = got, expected
            assert_same(ours, oracle)
    finally:
        fsspec.filesystem("memory").rm(url, recursive=True)


# ------------------------------------------------------------------------------------- single promises, by hand


def hashes(*texts: str) -> list[str]:
    return [lz.prompt_hash(text) for text in texts]


def test_prompts_and_layers_come_in_the_requested_order(views: Views) -> None:
    truth = views.truth
    requested = ["kiwi", "zebra", "kiwi", "apple"]
    data, tokens = views.store.dataset(prompts=requested, layers=[0, 3]), views.store.tokens(prompts=requested, layers=[0, 3])
    assert data.layer.values.tolist() == tokens.layer.values.tolist() == [0, 3]
    for i, layer in enumerate([0, 3]):
        np.testing.assert_array_equal(data.resid_mean.values[i], [truth.pooled_of(layer, p) for p in requested])
        np.testing.assert_array_equal(tokens.resid.values[i], np.concatenate([truth.tokens_of("resid", layer, p) for p in requested]))
    assert tokens.prompt.values.tolist() == [h for p in requested for h in hashes(p) * truth.count(p)]
    twice = tokens.sel(prompt=hashes("kiwi"))
    assert twice.text.values.tolist() == ["kiwi", "kiwi"]


@pytest.mark.parametrize("how", [1, slice(None), [2, 0], slice(None, None, -1)])
def test_a_prompt_selected_after_any_other_selection_is_that_prompt(views: Views, how: Any) -> None:
    tokens = views.store.tokens().isel(token=slice(None, None, -1), hidden=how).sel(layer=[1, 0])
    for text in ("zebra", "apple", "mango"):
        got = tokens.resid.sel(prompt=lz.prompt_hash(text)).values
        expected = np.stack([views.truth.tokens_of("resid", layer, text)[::-1, how] for layer in (1, 0)])
        np.testing.assert_array_equal(got, expected)


def test_text_of_one_prompt_stays_an_object(views: Views) -> None:
    for data in (views.store.dataset().isel(prompt=0), views.store.tokens().isel(token=0)):
        assert data.text.dtype == data.text.values.dtype == object
        assert data.text.item() == "zebra"


@pytest.mark.parametrize("beyond", [HIDDEN, -HIDDEN - 1, [0, HIDDEN], [-HIDDEN - 1]])
def test_an_index_beyond_an_axis_without_labels_is_an_error(views: Views, beyond: Any) -> None:
    with pytest.raises(IndexError, match=r"out of (bounds|range)"):
        views.store.tokens().resid.isel(hidden=beyond).load()


def test_an_index_beyond_an_axis_whose_index_was_dropped_is_an_error(views: Views) -> None:
    plain = views.store.tokens().drop_indexes(["prompt", "position"]).drop_vars(["prompt", "position"])
    n = plain.sizes["token"]
    assert plain.text[-n].item() == "zebra"
    for beyond in (-n - 1, n, [-n - 1], [n]):
        for name in ("text", "resid"):
            with pytest.raises(IndexError, match=r"out of (bounds|range)"):
                plain[name].isel(token=beyond).load()


@pytest.mark.few(1)
@pytest.mark.parametrize("level", LEVELS)
def test_dask_gives_the_same_values_for_all_chunks(views: Views, level: str) -> None:
    _, oracle = views.pair(level)
    open_ = views.store.dataset if level == "prompts" else views.store.tokens
    url = views.store.url
    opened = [open_(chunks={}), open_(chunks={"hidden": 2}), xr.open_dataset(url, engine="lmprobe_zarr", level=level, chunks={})]
    opened.append(xr.open_dataset(url, engine="lmprobe_zarr", level=level))
    for data in opened:
        for name in oracle.data_vars:
            for scheduler in ("threads", "synchronous"):
                got = data[name].isel(layer=slice(None, None, -1)).compute(scheduler=scheduler)
                np.testing.assert_array_equal(got.values, oracle[name].values[::-1])


def test_the_same_selection_of_different_views_is_different_to_dask(views: Views) -> None:
    before = views.store.dataset(chunks={})
    refreshed = PartSpec(("apple",), (2,), (0, 1), ("resid",), True, "float16", True, True)
    values = np.full((1, HIDDEN), 7, np.float16)
    lz.write_activations(views.store, model="toy", prompts=refreshed.prompts, pooled={"resid_mean": {0: values, 1: values}})
    after = views.store.dataset(chunks={})
    both = xr.concat([before.resid_mean, after.resid_mean], "when").sel(prompt=lz.prompt_hash("apple"), layer=0).compute()
    np.testing.assert_array_equal(both.values, [views.truth.pooled_of(0, "apple"), values[0]])


def test_unstacking_dask_arrays_is_an_error_and_never_wrong(views: Views) -> None:
    tokens = views.store.tokens(chunks={}).resid
    with pytest.raises(ValueError, match="unmatched keys"):  # xarray does this with a pandas index only
        tokens.unstack("token")
    got = tokens.compute().unstack("token").sel(prompt=lz.prompt_hash("apple"), layer=0)
    np.testing.assert_array_equal(got.values[:, :2].T, views.truth.tokens_of("resid", 0, "apple"))


def test_tokens_minus_their_prompts_mean_needs_a_selection_along_tokens(views: Views) -> None:
    data, tokens = views.store.dataset(), views.store.tokens()
    with pytest.raises(ValueError, match="conflicting indexes"):
        tokens.resid - data.resid_mean
    centred = tokens.resid - data.resid_mean.sel(prompt=tokens.prompt)
    expected = views.truth.tokens_of("resid", 0, "mango").astype(np.float32) - views.truth.pooled_of(0, "mango")
    np.testing.assert_array_equal(centred.sel(layer=0, prompt=lz.prompt_hash("mango")).values, expected)


# -------------------------------------------------------------------------------------------------- what is not read


def test_opening_selecting_and_printing_read_nothing(views: Views, chunk_reads: list[tuple[str, int, int]]) -> None:
    for data in (views.store.dataset(), views.store.tokens(), xr.open_dataset(views.store.url, engine="lmprobe_zarr", level="tokens")):
        for shown in (data, *data.data_vars.values(), data.text):
            assert repr(shown)
            assert shown._repr_html_()
        some = data.isel({sample_dim(data): [1, 0], "layer": 0}).sel(prompt=hashes("zebra")).transpose()
        assert repr(some)
    tokens = views.store.tokens()
    tokens.sel(prompt=hashes("mango", "zebra"), layer=0).sel(position=[1, 0])
    xr.align(tokens.resid, tokens.resid)
    assert chunk_reads == []


def test_a_selection_reads_only_its_chunks(
    tmp_path: Path, chunk_reads: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.CHUNK_BYTES", 4 * HIDDEN * 4)
    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.REMOTE_CHUNK_BYTES", 4 * HIDDEN * 4)
    monkeypatch.setattr("lmprobe_zarr.store.parts.writer.MIN_CHUNK_BYTES", 4 * HIDDEN * 4)
    store = lz.open_store(tmp_path / "acts", durable=False)
    values = {i: [np.full((n, HIDDEN), 10 * i + n, np.float32) for n in (4, 6, 2)] for i in (0, 1)}
    lz.write_activations(store, model="toy", prompts=TEXTS[:3], activations={"resid": values})
    tokens = store.tokens()
    rows = tokens.resid.encoding["preferred_chunks"]["token"]
    if rows != 4:
        pytest.fail(f"chunks of {rows} tokens: this test no longer controls their size")

    def blocks(data: xr.DataArray) -> list[tuple[int, int]]:
        chunk_reads.clear()
        data.load()
        return sorted((layer, block) for path, layer, block in chunk_reads if path.endswith("/resid"))

    assert blocks(tokens.resid.sel(layer=1, prompt=lz.prompt_hash("zebra"))) == [(1, 0)]
    assert blocks(tokens.resid.sel(layer=0, prompt=lz.prompt_hash("apple"))) == [(0, 1), (0, 2)]
    assert blocks(tokens.resid.isel(token=-1)) == [(0, 2), (1, 2)]
    assert blocks(tokens.resid.isel(token=[11, 0, 10], layer=[0])) == [(0, 0), (0, 2)], "each chunk once"
    assert blocks(tokens.resid.isel(token=slice(None, None, -11), layer=1)) == [(1, 0), (1, 2)]
    assert blocks(tokens.resid.sel(position=5, layer=0)) == [(0, 2)]
    assert blocks(tokens.resid.isel(token=[])) == []
    points = xr.DataArray([0, 11], dims="z")
    assert blocks(tokens.resid.isel(token=points, layer=0)) == [(0, 0), (0, 2)]
