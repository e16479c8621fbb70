"""Every operation that writes, with what it must have done when it is through, for the tests that stop it anywhere.

What a store must show is kept as plain dicts of arrays, made by hand from the batches: never read from the store.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from block_stores import small_chunks
from foreign_caches import add_model, add_prompt, prompt_tensors
from stores import GROUP, Stops, kept_tokens, make_batch
from versions import old_format

import lmprobe_zarr as lz
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import NotAStoreError, StoreNotFoundError
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.ingest import Ingest
from lmprobe_zarr.store.store import Store

Array = npt.NDArray[Any]
Truth = dict[str, dict[str, Any]]  # text to name to values: (layer, hidden), (layer, token, hidden), or a column's value

MODEL = GROUP.model
LAYERS = (0, 1, 3)


# ------------------------------------------------------------------------------------------------------------- the oracle


def written(truth: Truth, batch: TokenBatch) -> Truth:
    """What a store shows once a batch has been written to it."""
    after = {text: dict(held) for text, held in truth.items()}
    ends = np.cumsum(np.asarray(batch.n_tokens)) if batch.n_tokens is not None else None
    for i, text in enumerate(batch.text or ()):
        held = after.setdefault(text, {})
        for name, values in batch.prompts.items():
            held[name] = values[:, i]
        for name, values in batch.tokens.items():
            assert ends is not None
            assert batch.n_tokens is not None
            held[name] = values[:, ends[i] - batch.n_tokens[i] : ends[i]]
        for name, column in batch.prompt_columns.items():
            held[name] = column[i]
    return after


def annotated(truth: Truth, column: str, values: Mapping[str, Any]) -> Truth:
    return {text: {**held, **({column: values[text]} if text in values else {})} for text, held in truth.items()}


def without(truth: Truth, texts: tuple[str, ...] = (), variable: str = "") -> Truth:
    return {text: {name: v for name, v in held.items() if name != variable} for text, held in truth.items() if text not in texts}


def shown(root: Path | str) -> Truth:
    """What a store shows, opened anew."""
    try:
        store = lz.open_store(root, "r")
    except StoreNotFoundError:
        return {}
    except NotAStoreError:
        assert not (Path(root) / "zarr.json").exists()
        return {}
    if not store.models():
        return {}
    data = store.dataset().load()
    texts = data.text.values.tolist()
    assert len(set(texts)) == len(texts), "a prompt is shown twice"
    assert data.prompt.values.tolist() == [lz.prompt_hash(text) for text in texts], "another prompt's label"
    variables = {str(name): np.moveaxis(data[name].values, data[name].dims.index("prompt"), 0) for name in data.data_vars}
    columns = {name: data[name].values.tolist() for name in ("label", "split") if name in data.coords}
    truth: Truth = {}
    for i, text in enumerate(texts):
        truth[text] = {name: values[i] for name, values in variables.items() if not np.isnan(values[i]).all()}
        truth[text] |= {name: values[i] for name, values in columns.items() if values[i] not in ("", None) and values[i] == values[i]}
    tokens = kept_tokens(store)
    for name in tokens.data_vars:
        values, labels = tokens[name].values, tokens.prompt.values
        for text in truth:
            mine = values[:, labels == lz.prompt_hash(text)]
            if mine.size and not np.isnan(mine).all():
                truth[text][str(name)] = mine[~np.isnan(mine).all(axis=(1, 2))]  # layers that it has
    return truth


def same(a: Any, b: Any) -> bool:
    left, other = np.asarray(a), np.asarray(b)
    return bool(np.array_equal(left, other, equal_nan=left.dtype.kind == other.dtype.kind == "f"))


def check_between(found: Truth, before: Truth, after: Truth) -> None:
    """Each value is the one before or the one after; nothing is missing that was there before and is to be there after."""
    for text, held in found.items():
        assert text in before or text in after, f"{text!r} was never written"
        for name, value in held.items():
            wanted = [state[text][name] for state in (before, after) if name in state.get(text, {})]
            assert any(same(value, candidate) for candidate in wanted), f"{name} of {text!r} is neither what it was nor what it is to be"
    for text in before.keys() & after.keys():
        assert text in found, f"{text!r} was committed, and is missing"
        for name in before[text].keys() & after[text].keys():
            assert name in found[text], f"{name} of {text!r} was committed, and is missing"


def check_equal(found: Truth, truth: Truth) -> None:
    assert found.keys() == truth.keys()
    for text, held in truth.items():
        assert found[text].keys() == held.keys(), f"{text!r} has {sorted(found[text])}, and is to have {sorted(held)}"
        for name, value in held.items():
            assert same(found[text][name], value), f"{name} of {text!r}"


# --------------------------------------------------------------------------------------------------------- the operations


FIRST = make_batch(["a", "bb", "ccc"], seed=1, columns={"label": [1, 2, 3]})
SECOND = make_batch(["bb", "dddd"], seed=2, columns={"label": [4, 5]})
NEW = make_batch(["bb", "new"], seed=3, columns={"label": [6, 7]})
THIRD = make_batch(["ccc", "e"], seed=4, columns={"label": [8, 9]})
SPLIT = {"a": "train", "dddd": "test"}
BEFORE = annotated(written(written({}, FIRST), SECOND), "split", SPLIT)


@dataclass(frozen=True)
class Operation:
    """Something that writes.

    Parameters
    ----------
    run : callable
        Does it: given the folder of everything, and the store that may stop.
    after : dict
        What the store shows then.
    before : dict
        What it shows before.
    prepare : callable
        Makes the place, given the folder of everything.
    place : str
        Folder of the store that may stop.
    again : callable, optional
        What completes it, where that is not the same call.
    kept : tuple of str
        Folders that are not to change whatever happens.
    between, done : callable, optional
        What else must hold after a stop, and when it is through, given the folder of everything.
    """

    run: Callable[[Path, Store], object]
    after: Truth
    before: Truth
    prepare: Callable[[Path], object]
    place: str = "s"
    again: Callable[[Path, Store], object] | None = None
    kept: tuple[str, ...] = ()
    between: Callable[[Path], object] = lambda base: None
    done: Callable[[Path], object] = lambda base: None


def fill(base: Path) -> Store:
    store = lz.open_store(base / "s", durable=False)
    store.write(GROUP, FIRST)
    store.write(GROUP, SECOND)
    store.annotate(MODEL, {"split": SPLIT})
    shutil.copytree(base / "s", base / "was")
    return store


_made: dict[int, tuple[xr.Dataset, xr.Dataset]] = {}


def as_made(base: Path) -> tuple[xr.Dataset, xr.Dataset]:
    """What the copy shows that was made of the store before anything happened, read once for all copies of the same bytes."""
    key = hash(frozenset((str(Path(name).relative_to(base)), content) for name, content in state_of(base / "was").items()))
    if key not in _made:
        store = lz.open_store(base / "was")
        _made[key] = (store.dataset().load(), store.tokens().load())
    return _made[key]


def check_identical(base: Path) -> None:
    """The store shows to the last attribute, and in the same order, what it was made to show."""
    prompts, tokens = as_made(base)
    xr.testing.assert_identical(lz.open_store(base / "s").dataset().load(), prompts)
    xr.testing.assert_identical(lz.open_store(base / "s").tokens().load(), tokens)


def check_merged(base: Path) -> None:
    check_identical(base)
    store = lz.open_store(base / "s")
    store.gc(max_age=0)
    store.compact(progress=False)
    left = store.listing(GROUP)
    assert [len([p for p in parts if p.info.name not in left.replaced]) for parts in (left.parts, left.annotations)] == [1, 1]
    check_identical(base)


def compact_into_shards(base: Path, store: Store) -> None:
    """Two rows of each layer in a chunk, and three chunks in a file: the 14 rows of the tokens take three files of each layer."""
    with small_chunks(64, 192):
        store.compact(progress=False)


def check_sharded(base: Path) -> None:
    check_merged(base)
    (part,) = lz.open_store(base / "s").view(GROUP).parts
    tokens = part.info.arrays["tokens/resid"]
    assert (tokens.shard_blocks, tokens.n_files) == (3, 3)
    assert not {name for name in part.info.file_names() if not (base / "s" / part.path / name).is_file()}


def fill_old(base: Path) -> Store:
    with old_format():
        return fill(base)


def upgrade(base: Path, store: Store) -> None:
    """Every part by itself."""
    store.compact(progress=False, upgrade=True, min_parts=1000)


def check_upgraded(base: Path) -> None:
    check_identical(base)
    store = lz.open_store(base / "s")
    store.gc(max_age=0)
    listing = store.listing(GROUP)
    assert (len(listing.parts), len(listing.annotations), listing.unfinished) == (2, 1, ())
    assert {part.info.version for part in (*listing.parts, *listing.annotations)} == {2}
    assert store.compact(progress=False, upgrade=True, min_parts=1000).runs == ()
    check_identical(base)


def check_collected(base: Path) -> None:
    check_identical(base)
    store = lz.open_store(base / "s")
    listing = store.listing(GROUP)
    assert (len(listing.parts), len(listing.annotations), listing.unfinished) == (1, 1, ())
    assert {path.name for path in (base / "s").rglob("*") if path.name.endswith(".partial")} == set()


def check_empty(base: Path) -> None:
    """Nothing is left that would become visible again with the next part."""
    store = lz.open_store(base / "s")
    assert not store.listing(GROUP).parts
    assert not store.listing(GROUP).annotations


def check_evicted(base: Path) -> None:
    """Parts are gone, and nothing is left of what only hides; columns are there again with their prompts."""
    store = lz.open_store(base / "s", durable=False)
    listing = store.listing(GROUP)
    assert not listing.parts
    assert not any(note.info.is_tombstone for note in listing.annotations)
    store.write(GROUP, make_batch(["bb", "a"], seed=5))
    check_equal(shown(base / "s"), {t: {**held, **COLUMNS[t]} for t, held in written({}, make_batch(["bb", "a"], seed=5)).items()})


def check_hidden(base: Path) -> None:
    """What was replaced stays hidden whatever comes next, and is shown once it was written again."""
    root = base / "s"
    after = shown(root)
    store = lz.open_store(root, durable=False)
    for step in (lambda: store.compact(progress=False), lambda: store.gc(max_age=0), lambda: store.copy_to(base / "c", progress=False)):
        step()
        check_equal(shown(root), after)
    check_equal(shown(base / "c"), {text: {n: v for n, v in held.items() if n != "split"} | split_of(text) for text, held in after.items()})
    store.write(GROUP, SECOND)
    check_equal(shown(root), BEFORE)


def split_of(text: str) -> dict[str, Any]:
    return {"split": SPLIT[text]} if text in SPLIT else {}


def fill_used(base: Path) -> None:
    """The earlier part is in use, the one that replaced some of it is not."""
    store = fill(base)
    view = store.view(GROUP)
    store.mark_used(view.parts_with(view.select(["a", "ccc"])))


def evict_newer(base: Path, store: Store) -> None:
    """Evict the part that was not used; again where the first call had come that far."""
    total = sum(entry.nbytes for entry in lz.open_store(base / "was").entries(GROUP))
    lz.evict(store, max_gb=(total - 1) / 2**30, min_age=0)


def check_published(base: Path) -> None:
    """The copy is what the store shows, and nothing else lies there."""
    xr.testing.assert_identical(lz.open_store(base / "t").dataset().load(), lz.open_store(base / "s").dataset().load())
    group = base / "t" / GROUP.name
    assert sorted(path.name for path in group.iterdir()) == lz.open_store(base / "t").storage.list(GROUP.name)


def fill_for_gc(base: Path) -> None:
    """Replaced parts, and what writers leave that are killed before their commit and within it."""
    store = fill(base)
    store.compact(progress=False)
    for n, moment in ((3, "half"), (10**9, "before")):
        writer = Store(Stops(store.storage, n, moment=moment), durable=False).new_part(GROUP)
        with contextlib.suppress(OSError):
            writer.append(NEW)
            writer.storage.stop = lambda: None  # type: ignore[attr-defined]
            writer._write_columns()
    (base / "s" / GROUP.name / f".zarr.json.{'0' * 12}.partial").write_bytes(b"{")


def fill_two(base: Path) -> None:
    """A store, and another one that already has a part of it."""
    fill(base)
    lz.open_store(base / "t", durable=False).write(GROUP, make_batch(["ccc"], seed=9))


def fill_published(base: Path) -> None:
    store = fill(base)
    store.publish(base / "t", progress=False)
    store.write(GROUP, THIRD)


def fill_cache(base: Path) -> None:
    folder = add_model(base / "cache", MODEL)
    for i, text in enumerate(("a", "bb", "ccc")):
        add_prompt(folder, text, prompt_tensors(i, pad=(1, 2), pooled=("mean",)))


def of_cache() -> Truth:
    tensors = {text: prompt_tensors(i, pad=(1, 2), pooled=("mean",)) for i, text in enumerate(("a", "bb", "ccc"))}
    layers = (0, 1)
    return {
        text: {
            "resid": np.stack([held[f"layer_{i}"][0, 1:-2] for i in layers]),
            "resid_mean": np.stack([held[f"pooled_mean_layer_{i}"][0] for i in layers]),
        }
        for text, held in tensors.items()
    }


def ingest(base: Path, store: Store) -> None:
    """As an extraction writes: many parts of a few prompts, on a thread of their own."""
    with Ingest(store, GROUP, part_bytes=1500, part_seconds=0) as writing:
        for batch in (NEW, THIRD):
            for i in range(len(batch.sha256)):
                writing.put(batch.take(i, i + 1))


def own(base: Path, store: Store) -> None:
    pooled = {"resid_mean": dict(zip(LAYERS, NEW.prompts["resid_mean"], strict=True))}
    lz.write_activations(
        store, model=MODEL, prompts=list(NEW.text or ()), pooled=pooled, provenance=GROUP.provenance, num_layers=GROUP.num_layers,
        coords={"label": np.asarray(NEW.prompt_columns["label"])},
    )  # fmt: skip


def delete(base: Path, store: Store) -> None:
    with contextlib.suppress(lz.errors.MissingPromptsError):  # where the first call had come that far
        store.delete(MODEL, ["bb"])


def drop(base: Path, store: Store) -> None:
    with contextlib.suppress(lz.errors.InvalidArgumentError):  # likewise
        store.drop(MODEL, ["resid"])


def drop_layer(base: Path, store: Store) -> None:
    store.drop(MODEL, ["resid"], layers=[1])


def publish(base: Path, store: Store, *, overwrite: bool = False) -> None:
    lz.open_store(base / "s", durable=False).publish(store.storage, progress=False, overwrite=overwrite)  # type: ignore[arg-type]


def publish_again(base: Path, store: Store) -> None:
    publish(base, store, overwrite=(base / "t" / "zarr.json").exists())


POOLED = TokenBatch(sha256=NEW.sha256, text=NEW.text, layers=NEW.layers, prompts=NEW.prompts, prompt_columns=NEW.prompt_columns)
COPIED = {**BEFORE, "ccc": {**BEFORE["ccc"], **written({}, make_batch(["ccc"], seed=9))["ccc"]}}
# A column of a prompt that is there already is left as it is: and there it has none.
COPIED["ccc"] = {name: value for name, value in COPIED["ccc"].items() if name != "label"}

COLUMNS: Truth = {text: {name: held[name] for name in ("label", "split") if name in held} for text, held in BEFORE.items()}
ONLY_FIRST = without(BEFORE, ("bb", "dddd"))  # the earlier part has an earlier version of "bb", which must not show
NO_LAYER_1 = {text: {**held, "resid": held["resid"][[0, 2]]} for text, held in BEFORE.items()}

OPERATIONS: dict[str, Operation] = {
    "the first part": Operation(lambda base, s: s.write(GROUP, FIRST), written({}, FIRST), {}, lambda base: None),
    "a part": Operation(lambda base, s: s.write(GROUP, NEW), written(BEFORE, NEW), BEFORE, fill),
    "own activations": Operation(own, written(BEFORE, POOLED), BEFORE, fill),
    "an extraction": Operation(ingest, written(written(BEFORE, NEW), THIRD), BEFORE, fill),
    "annotate": Operation(
        lambda base, s: s.annotate(MODEL, {"split": {"bb": "dev", "a": "test"}}),
        annotated(BEFORE, "split", {"bb": "dev", "a": "test"}), BEFORE, fill,
    ),
    "compact": Operation(lambda base, s: s.compact(progress=False), BEFORE, BEFORE, fill, between=check_identical, done=check_merged),
    "compact into shards": Operation(compact_into_shards, BEFORE, BEFORE, fill, between=check_identical, done=check_sharded),
    "upgrade": Operation(upgrade, BEFORE, BEFORE, fill_old, between=check_identical, done=check_upgraded),
    "gc": Operation(lambda base, s: s.gc(max_age=0), BEFORE, BEFORE, fill_for_gc, between=check_identical, done=check_collected),
    "evict": Operation(lambda base, s: lz.evict(s, max_gb=0, min_age=0), {}, BEFORE, fill_for_gc, done=check_evicted),
    "evict columns too": Operation(
        lambda base, s: lz.evict(s, max_gb=0, min_age=0, annotations=True), {}, BEFORE, fill_for_gc, done=check_empty,
    ),
    "evict what replaced something": Operation(evict_newer, ONLY_FIRST, BEFORE, fill_used, done=check_hidden),
    "clear": Operation(lambda base, s: lz.clear_cache(url=s), {}, BEFORE, fill_for_gc, done=check_empty),
    "delete": Operation(delete, without(BEFORE, ("bb",)), BEFORE, fill),
    "delete what was merged": Operation(delete, without(BEFORE, ("bb",)), BEFORE, fill_for_gc),
    "drop": Operation(drop, without(BEFORE, variable="resid"), BEFORE, fill),
    "drop a layer": Operation(drop_layer, NO_LAYER_1, BEFORE, fill),
    "publish": Operation(publish, BEFORE, {}, fill, place="t", again=publish_again, kept=("s",), done=check_published),
    "publish over a copy": Operation(
        lambda base, s: publish(base, s, overwrite=True), written(BEFORE, THIRD), BEFORE, fill_published, place="t", kept=("s",),
        done=check_published,
    ),
    "copy": Operation(
        lambda base, s: lz.open_store(base / "s", durable=False).copy_to(s, progress=False),
        COPIED, written({}, make_batch(["ccc"], seed=9)), fill_two, place="t", kept=("s",),
    ),
    "import": Operation(
        lambda base, s: lz.import_safetensors(base / "cache", s, progress=False, part_bytes=200),
        of_cache(), {}, fill_cache, kept=("cache",),
    ),
}  # fmt: skip


def state_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the marks of use, which reading makes."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != ".used"}


# More calls than any operation makes.
_NEVER = 10**6


def stop_at(operation: Operation, base: Path, n: int, moment: str, stop: Callable[[], object]) -> bool:
    """Do an operation with a storage that stops at its n-th call; returns whether it came to its end."""
    storage = Stops(LocalStorage(base / operation.place), n, moment=moment, stop=stop)
    try:
        operation.run(base, Store(storage, durable=False))
    except OSError as error:
        if "plug" not in str(error):
            raise
        return False
    return storage.after >= 0  # some take an error for no matter: a mark of use that cannot be made


def places_of(operation: Operation, template: Path, most: int | None) -> list[int]:
    """Calls of an operation at which to stop it, evenly spread over all that it makes, and the place behind the last of them.

    Parameters
    ----------
    operation : Operation
    template : Path
        What it begins with; it is left as it is.
    most : int, optional
        How many calls at most; by default every one. Threads may make a few more or fewer the next time.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "counted")
        shutil.copytree(template, base)
        storage = Stops(LocalStorage(base / operation.place), _NEVER)
        operation.run(base, Store(storage, durable=False))
    calls = _NEVER - storage.after
    if most is None or most >= calls:
        chosen = list(range(calls))
    else:  # the first and the last too, or the middle alone
        chosen = [round(k * (calls - 1) / (most - 1)) for k in range(most)] if most > 1 else [calls // 2]
    return [*chosen, _NEVER]


def check_stopped(operation: Operation, base: Path) -> None:
    """What must hold after a stop, and that the same call once more completes it."""
    root = base / operation.place
    check_between(shown(root), operation.before, operation.after)
    operation.between(base)
    (operation.again or operation.run)(base, lz.open_store(root, durable=False) if operation.place == "s" else _as_it_is(root))
    check_equal(shown(root), operation.after)
    operation.done(base)


def _as_it_is(root: Path) -> Store:
    """A store of a place that may be a published copy, which cannot be opened for writing."""
    return Store(LocalStorage(root), durable=False)


# ---------------------------------------------------------------------------------------- children that die, and who checks


def in_child(work: Callable[[], object]) -> int:
    """Do something in a child of this process, and give its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 — it must not come to the parent's code
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


DEAD = 77


def kill_everywhere(name: str, base: Path, *, most: int, moments: tuple[str, ...]) -> int:
    """Let a child end at each of at most `most` storage calls of an operation, and another one check; returns how many died."""
    operation, dead = OPERATIONS[name], 0
    template = base / "template"
    template.mkdir(parents=True)
    assert in_child(lambda: operation.prepare(template)) == 0
    # A child counts, because a parent must have no threads when it forks.
    counted = base / "places"
    assert in_child(lambda: counted.write_text(" ".join(map(str, places_of(operation, template, most))))) == 0
    places = [int(n) for n in counted.read_text().split()]
    for moment in moments:
        for n in places:
            work = base / f"{moment}-{n}"
            shutil.copytree(template, work)

            status = in_child(partial(stop_at, operation, work, n, moment, partial(os._exit, DEAD)))
            assert status in (0, DEAD), f"{name}, call {n}, {moment}: {status}"
            assert in_child(partial(check_stopped, operation, work)) == 0, f"{name}, stopped {moment} call {n}"
            shutil.rmtree(work)
            dead += status == DEAD
        assert status == 0, f"{name} never came to its end"
    return dead


# ------------------------------------------------------------------------------------------------------ at random moments


TEXTS = ("a", "bb", "ccc", "dddd", "eeeee", "f")


def random_step(rng: random.Random, truth: Truth) -> tuple[str, Truth, Callable[[Store], object]]:
    """Something to do, what the store shows then, and how it is done."""
    kinds = ["write", "write", "pooled", "old", "compact", "upgrade", "gc", *(["annotate", "delete", "drop", "evict"] if truth else [])]
    kind = rng.choice(kinds)
    texts = rng.sample(TEXTS, rng.randint(1, 4))
    seed = rng.randrange(10**6)
    if kind in ("write", "pooled", "old"):
        batch = make_batch(texts, seed=seed, tokens=kind != "pooled", columns={"label": [seed] * len(texts)})
        return kind, written(truth, batch), partial(write_old if kind == "old" else write_new, batch)
    if kind == "annotate":
        values = {text: str(seed) for text in rng.sample(sorted(truth), rng.randint(1, len(truth)))}
        return kind, annotated(truth, "split", values), lambda s: s.annotate(MODEL, {"split": values})
    if kind == "delete":
        gone = tuple(rng.sample(sorted(truth), 1))
        return kind, without(truth, gone), lambda s: s.delete(MODEL, gone)
    if kind == "drop":
        return kind, without(truth, variable="resid"), drop_if_there
    if kind == "evict" and rng.random() < 0.3:
        # Annotations too: otherwise they show again with the next activations of their prompts, which `Truth` does not know.
        return kind, {}, lambda s: lz.evict(s, max_gb=0, min_age=0, annotations=True)
    if kind == "gc":
        return kind, truth, lambda s: s.gc(max_age=0)
    if kind == "upgrade":
        return kind, truth, lambda s: s.compact(progress=False, upgrade=True, min_parts=1000)
    return "compact", truth, lambda s: s.compact(progress=False)


def write_new(batch: TokenBatch, store: Store) -> None:
    store.write(GROUP, batch)


def write_old(batch: TokenBatch, store: Store) -> None:
    with old_format():
        store.write(GROUP, batch)


def drop_if_there(store: Store) -> None:
    with contextlib.suppress(lz.errors.InvalidArgumentError, lz.errors.ModelNotStoredError):
        store.drop(MODEL, ["resid"])


def repeated(do: Callable[[Store], object], store: Store) -> None:
    """Do again what was interrupted, where there is anything left to do."""
    with contextlib.suppress(lz.errors.MissingPromptsError, lz.errors.ModelNotStoredError):
        do(store)


def check_killed(root: Path, before: Truth, after: Truth, do: Callable[[Store], object]) -> None:
    check_between(shown(root), before, after)
    repeated(do, lz.open_store(root, durable=False))
    check_equal(shown(root), after)


def kill_at_random(base: Path, rounds: int, seed: int) -> int:
    """Kill children at random moments in the middle of random operations; returns how many were in the middle of one."""
    root, truth, rng, kills = base / "s", Truth(), random.Random(seed), 0
    for number in range(rounds):
        todo: list[tuple[str, Truth, Callable[[Store], object]]] = []
        state = truth
        for _ in range(30):
            step = random_step(rng, state)
            todo.append(step)
            state = step[1]
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            try:
                store = lz.open_store(root, durable=number % 4 == 0)
                os.write(send, b"r")
                with small_chunks(64, 192):
                    for _, _, do in todo:
                        repeated(do, store)
                        os.write(send, b"d")
            except BaseException:  # noqa: BLE001 — it must not come to the parent's code
                import traceback

                traceback.print_exc()
                os.write(send, b"!")
            finally:
                os._exit(0)
        os.close(send)
        assert os.read(receive, 1) == b"r"
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, 9)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        answered = b""
        while some := os.read(receive, 1000):
            answered += some
        os.close(receive)
        assert b"!" not in answered, f"round {number}: {[kind for kind, _, _ in todo][: len(answered)]}"
        done = len(answered)
        before = todo[done - 1][1] if done else truth
        kills += killed and done < len(todo)
        kind, truth, do = todo[done] if done < len(todo) else ("nothing", before, lambda store: None)
        checked = in_child(partial(check_killed, root, before, truth, do))
        assert checked == 0, f"round {number} of seed {seed}: killed in {kind}, number {done} of {[one for one, _, _ in todo][:done]}"
        if number % 20 == 19:
            assert in_child(lambda: lz.open_store(root).gc(max_age=0)) == 0
            left = [p for p in root.rglob("*") if p.name.endswith(".partial")]
            assert not left, f"gc left {left}"
    return kills


if __name__ == "__main__":
    warnings.simplefilter("error")
    # Python 3.12 warns of any fork beside threads, as those of BLAS are; the parent has none of its own.
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1] == "everywhere":
            names = sys.argv[4].split(",") if len(sys.argv) > 4 else list(OPERATIONS)
            for place, each in enumerate(names):
                count = kill_everywhere(each, Path(folder, str(place)), most=int(sys.argv[2]), moments=tuple(sys.argv[3].split(",")))
                sys.stdout.write(f"{each}: {count}\n")
        else:
            sys.stdout.write(f"kills {kill_at_random(Path(folder), int(sys.argv[2]), int(sys.argv[3]))}\n")
