"""Opening a store: the short way where no prompt is in two parts, what is kept in memory, and tables of files found false later."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import keys_of
from lmprobe_zarr.errors import CacheWarning, CorruptPartError, PromptCollisionError
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.format.call_order import CALL_ORDER, CallPlaces
from lmprobe_zarr.store.format.part import PartInfo, parse_part, part_document
from lmprobe_zarr.store.format.part_names import new_part_name
from lmprobe_zarr.store.parts import view as views
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.parts.part import Part

NOWHERE = LocalStorage("/nowhere")


def part_of(number: int, digests: list[bytes], places: list[int] | None = None, **fields: Any) -> Part:
    recorded = {} if places is None else {CALL_ORDER: CallPlaces("a call", np.array(places, np.int64)).to_record()}
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    info = PartInfo(group=GROUP.name, name=f"{number:03}", digests=rows, arrays={}, files={}, recorded=recorded, **fields)
    return Part(NOWHERE, f"{GROUP.name}/{number:03}", info)


def digest_of(number: int) -> bytes:
    """Digests of which many begin alike, and one of which only the hash is known."""
    return bytes([number % 5, 0, 0, 0, 0, 0, 0, number // 5]) + (bytes(24) if number == 3 else bytes([7, number]) * 12)


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[Part], list[Part]]:
    """Parts of a few prompts, with and without repeats, of one call or of several; and annotations."""
    repeats, known = draw(st.booleans()), draw(st.sampled_from(["none", "all", "some"]))
    numbers = draw(st.lists(st.integers(0, 25), min_size=1, max_size=20, unique=not repeats))
    places = draw(st.permutations(range(26)))
    made: list[Part] = []
    first = 0
    while first < len(numbers):
        mine = list(dict.fromkeys(numbers[first : first + draw(st.integers(1, 6))]))
        first += len(mine)
        of_call = known == "all" or (known == "some" and draw(st.booleans()))
        replaces = (f"{len(made) - 1:03}",) if made and draw(st.integers(0, 9)) == 0 else ()
        made.append(part_of(len(made), [digest_of(n) for n in mine], [places[n] for n in mine] if of_call else None, replaces=replaces))
    noted = draw(st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=4, unique=True), max_size=2))
    return made, [part_of(900 + i, [digest_of(n) for n in mine], kind="annotation") for i, mine in enumerate(noted)]


def expected(made: list[Part], noted: list[Part], *, in_call_order: bool) -> tuple[list[bytes], list[list[int]]]:
    """Digests and members of a view, prompt by prompt."""
    replaced = {name for part in (*made, *noted) for name in part.info.replaces}
    shown = [part for part in made if part.info.name not in replaced]
    rows = [[row.tobytes() for row in part.info.digests] for part in shown]
    order = list(dict.fromkeys(row[:8] for mine in rows for row in mine))
    if in_call_order and all(CALL_ORDER in part.info.recorded for part in shown):
        place: dict[bytes, int] = {}
        for part, mine in zip(shown, rows, strict=True):
            runs = [range(first, first + n) for first, n in part.info.recorded[CALL_ORDER]["runs"]]
            for row, at in zip(mine, (at for run in runs for at in run), strict=True):
                place.setdefault(row[:8], at)
        order.sort(key=place.__getitem__)
    found = {row[:8]: row for mine in rows for row in mine}
    number = {key: i for i, key in enumerate(order)}
    members = [[number.get(row.tobytes()[:8], -1) for row in part.info.digests] for part in (*shown, *noted)]
    return [found[key] for key in order], members


@given(parts(), st.booleans())
def test_the_short_way_to_a_view_gives_what_the_long_way_gives(made: tuple[list[Part], list[Part]], in_call_order: bool) -> None:
    digests, members = expected(*made, in_call_order=in_call_order)
    with pytest.MonkeyPatch.context() as patch:
        short = views.open_view(NOWHERE, GROUP, *made, in_call_order=in_call_order)
        patch.setattr(views, "_all_differ", lambda _: False)
        long = views.open_view(NOWHERE, GROUP, *made, in_call_order=in_call_order)
    for view in (short, long):
        assert [row.tobytes() for row in view.digests] == digests
        assert [member.tolist() for member in view.members] == members
        assert view.keys.tolist() == keys_of(view.digests).tolist()
        assert [member.dtype for member in view.members] == [np.int64] * len(members)
        assert view.digests.dtype == np.uint8
    assert short.one_call == long.one_call
    assert (short.find([row.hex() for row in digests]) == np.arange(len(digests))).all()


def test_a_view_of_no_parts_is_empty() -> None:
    view = views.open_view(NOWHERE, GROUP, [], [], in_call_order=True)
    assert len(view) == 0
    assert view.digests.shape == (0, 32)
    assert view.find(["ab" * 32]).tolist() == [-1]


def test_two_prompts_with_one_hash_are_found_within_a_part_and_across_parts() -> None:
    first, second = bytes(8) + b"a" * 24, bytes(8) + b"b" * 24
    for made in ([part_of(0, [first, second])], [part_of(0, [first, b"c" * 32]), part_of(1, [second])]):
        with pytest.raises(PromptCollisionError, match="share the hash 0000000000000000"):
            views.open_view(NOWHERE, GROUP, made, [])


# ------------------------------------------------------------------------------------------------- what is kept in memory


def many_parts(root: Path, n_parts: int, n_files: int) -> lz.Store:
    """A store of parts whose documents have that many entries more, for files that nothing reads."""
    store = lz.open_store(root, durable=False)
    store.write(GROUP, make_batch(["a", "b", "c"], tokens=False))
    (first,) = store.view(GROUP).parts
    more = {f"prompts/resid_mean/c.{i}.7.0": (i, 2**31 + i) for i in range(n_files)}
    name, rng = first.info.name, np.random.default_rng(0)
    for _ in range(n_parts - 1):
        name = new_part_name(name)
        digests = rng.integers(0, 256, first.info.digests.shape, np.uint8)
        (root / GROUP.name / name).mkdir()
        info = replace(first.info, name=name, digests=digests, files={**first.info.files, **more})
        (root / GROUP.name / name / "zarr.json").write_bytes(part_document(info, GROUP))
    return lz.open_store(root, mode="r", durable=False)


def objects_of(act: Callable[[], Any]) -> int:
    """How many more objects the garbage collector watches while the result of a call lives."""
    gc.collect()
    before = len(gc.get_objects())
    result = act()
    gc.collect()
    found = len(gc.get_objects()) - before
    del result
    return found


def test_an_opened_part_is_a_bounded_number_of_objects_however_many_files_it_has(tmp_path: Path) -> None:
    for shape in ((40, 0), (40, 500), (80, 500)):
        many_parts(tmp_path / str(shape), *shape)

    gc.freeze()  # the millions of objects that tests before this one left, which would be looked at each time

    def opened(shape: tuple[int, int]) -> int:
        # The most of three: what tests before this one left behind may go meanwhile, and is counted as fewer.
        found = []
        for _ in range(3):
            store = lz.open_store(tmp_path / str(shape), mode="r", durable=False)
            store.groups()
            found.append(objects_of(lambda store=store: store.view(GROUP)))  # type: ignore[misc]
        return max(found)

    few, many, twice = opened((40, 0)), opened((40, 500)), opened((80, 500))
    assert abs(many - few) < 40, "entries are no objects"
    assert 0 < (twice - many) / 40 < 25, (few, many, twice)
    view = lz.open_store(tmp_path / str((80, 500)), mode="r").view(GROUP)
    assert objects_of(lambda: [len(part.info.files) for part in view.parts]) < 80 * 4, "nor are they once they have been used"


# ----------------------------------------------------------------------------------------- tables that are found false later


def falsify(document: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a table of files; the document's digest holds, as of one who knows the format."""
    content = json.loads(document.read_bytes())
    change(content["attributes"]["files"])
    content["attributes"]["digest"] = "crc32c:00000000"
    data = json.dumps(content, separators=(",", ":")).encode()
    document.write_bytes(data.replace(b"crc32c:00000000", b"crc32c:%08x" % google_crc32c.value(data), 1))


FALSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a key that climbs": lambda files: files.update({"prompts/../../x": [1, 2]}),
    "a length that is no number": lambda files: files.update({"prompts/zarr.json": ["1", 2]}),
    "a negative length": lambda files: files.update({"prompts/zarr.json": [-1, 2]}),
    "one number": lambda files: files.update({"prompts/zarr.json": [1]}),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", FALSE)
def test_a_false_table_is_an_error_when_a_chunk_is_read_and_is_found_by_verify(
    tmp_path: Path, name: str, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PART_VERSION", version)
    store = lz.open_store(tmp_path / "s", durable=False)
    for text in ("a", "b"):
        store.write(GROUP, make_batch([text]))
    bad = store.view(GROUP).parts[0].path
    falsify(tmp_path / "s" / bad / "zarr.json", FALSE[name])
    opened = lz.open_store(tmp_path / "s", durable=False)
    data = opened.dataset(dtype="stored")
    if version == 2:  # chunks of variables have tables of their own, and are not in this one
        np.testing.assert_array_equal(data.resid_mean.sel(prompt=lz.prompt_hash("a")).values, make_batch(["a"]).prompts["resid_mean"][:, 0])
    with pytest.raises(CorruptPartError, match=f"{bad}/zarr.json is damaged") as caught:
        (data.resid_mean if version == 1 else data.text).values  # noqa: B018
    assert (caught.value.root, caught.value.part) == (opened.url, bad)
    assert np.isfinite(data.resid_mean.sel(prompt=lz.prompt_hash("b")).values).all(), "the other part still reads"
    found = lz.open_store(tmp_path / "s").verify(progress=False)
    assert [(problem.part, problem.kind) for problem in found.problems] == [(bad, "document")]
    # Upkeep goes on without the part, as with any other that is damaged, and removes nothing of it.
    before = {path: path.read_bytes() for path in (tmp_path / "s" / bad).rglob("*") if path.is_file()}
    fresh = lz.open_store(tmp_path / "s", durable=False)
    with pytest.warns(CacheWarning, match="going on without it"):
        assert len(fresh.listing(GROUP, whole=False).parts) == 1
    with pytest.raises(CorruptPartError):
        fresh.listing(GROUP)
    lz.evict(fresh, max_gb=0, min_age=0)
    assert {path: path.read_bytes() for path in before} == before


def test_what_an_array_requires_of_its_part_is_checked_for_every_part(tmp_path: Path) -> None:
    """Parts with equal metadata share its records, but not the verdict."""
    part = many_parts(tmp_path, 2, 0).view(GROUP).parts[1].info
    whole = part_document(part, GROUP)
    assert parse_part(whole, "p").arrays is parse_part(whole, "p").arrays
    fewer = replace(part, digests=part.digests[:2])
    for _ in range(2):
        with pytest.raises(CorruptPartError, match="prompt has 3 rows in an array but 2 in the index"):
            parse_part(part_document(fewer, GROUP), "p")
    rng = random.Random(0)
    with pytest.raises(CorruptPartError, match="layer has"):
        parse_part(part_document(replace(part, layers=tuple(sorted(rng.sample(range(99), 2)))), GROUP), "p")
