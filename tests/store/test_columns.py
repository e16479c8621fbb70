"""Columns: what goes in comes back, with its kind, or is refused with its row. pandas is the oracle."""

from __future__ import annotations

import enum
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmprobe_zarr as lz
from lmprobe_zarr.batch.columns import Column, ColumnKind
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store import Store

PROMPTS = ["a", "bb", "ccc", "dd", "e"]
ROWS = len(PROMPTS)
# Before its version 3, pandas makes nanoseconds of a list of datetimes.
IS_PANDAS_3 = int(pd.__version__.split(".")[0]) >= 3
LONG = timedelta(10**6 if IS_PANDAS_3 else 10**5)
EARLY, LATE = (datetime(1, 1, 1), datetime(9999, 1, 1)) if IS_PANDAS_3 else (datetime(1700, 1, 1), datetime(2260, 1, 1))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts")


def write(store: Store, coords: Any = None, prompts: Any = PROMPTS, **given: Any) -> None:
    values = {"resid_mean": {0: np.ones((len(prompts), 4), np.float32)}}
    lz.write_activations(store, model="m", prompts=prompts, pooled=values, coords=coords, **given)


class Letter(str, enum.Enum):  # noqa: UP042 - its str() is not its value
    A = "a"
    B = "b"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Share(float):
    def __float__(self) -> float:
        return -1.0


BERLIN = pd.Series(np.array(["2026-01-01", "NaT", "2026-07-01", "1970-01-01", "2026-10-25T01:30"], "M8[us]")).dt
FRAME = {
    "int64": np.array([1, -2, 3, 2**62, 5]),
    "int8": np.array([1, 2, 3, 4, -128], np.int8),
    "uint16": np.array([1, 2, 3, 4, 65535], np.uint16),
    "float32": np.array([0.1, np.nan, np.inf, -0.0, 3], np.float32),
    "bool": np.array([True, False, True, True, False]),
    "Int64": pd.array([1, None, 2**62 + 1, 4, 5], dtype="Int64"),
    "Int64 small": pd.array([1, None, 0, -1, 5], dtype="Int64"),
    "UInt8": pd.array([1, None, 0, 255, 5], dtype="UInt8"),
    "boolean": pd.array([True, None, False, True, False], dtype="boolean"),
    "Float32": pd.array([0.1, None, 3, 4, 5], dtype="Float32"),
    "string": pd.array(["x", None, "", "<missing>", "ä\0\u2028"], dtype="string"),
    "str": pd.array(["x", None, "", "y", "z"], dtype="str"),
    "object": pd.Series(["x", None, "", "y", "z"], dtype=object).array,
    "category": pd.Categorical(["lo", None, "hi", "lo", "hi"], categories=["lo", "mid", "hi"], ordered=True),
    "category of int": pd.Categorical([3, 1, None, 3, 1], categories=[3, 2, 1]),
    "category of datetime": pd.Series(np.array(["2026-01-01", "NaT", "2025-01-01", "2026-01-01", "2026-01-01"], "M8[s]"))
    .astype("category")
    .array,
    "string of nothing": pd.array([None] * ROWS, dtype="string"),
    "str of nothing": pd.array([None] * ROWS, dtype="str"),
    "empty category": pd.Categorical([None] * ROWS, categories=[]),
    "datetime s": np.array(["2026-01-01", "NaT", "9999-12-31", "0001-01-01", "1969-12-31T23:59:59"], "M8[s]"),
    "datetime ns": np.array(["2026-01-01T00:00:00.123456789", "NaT", "1700-01-01", "2200-01-01", "1970-01-01"], "M8[ns]"),
    "datetime zone": BERLIN.tz_localize("Europe/Berlin", ambiguous=np.array([True] * ROWS)).array,
    "datetime offset": BERLIN.tz_localize(timezone(timedelta(hours=-3, minutes=-30))).array,
    "timedelta": np.array([1, -2, 0, 2**60, 5], "m8[us]"),
    "timedelta gaps": pd.to_timedelta(pd.Series([1, None, 0, -3, 5]), unit="h").array,
    "date": pd.Series([date(2026, 1, 1), None, date(1, 1, 1), date(9999, 12, 31), date(2000, 2, 29)], dtype=object).array,
    "missing": np.full(ROWS, np.nan),
}


@pytest.mark.parametrize("kind", FRAME)
def test_a_column_comes_back_as_it_went_in(store: Store, kind: str) -> None:
    frame = pd.DataFrame({"col": FRAME[kind]}, index=PROMPTS)
    write(store, frame)
    got = store.dataset("m", prompts=PROMPTS)
    expected = frame.reset_index(drop=True)
    pd.testing.assert_frame_equal(got.lz.to_dataframe().reset_index(drop=True), expected)
    pd.testing.assert_series_equal(got.col.lz.to_series().reset_index(drop=True), expected.col)
    # xarray's own way to pandas: the same values, missing where they were missing, in a dtype of numpy.
    plain = got["col"].to_series().reset_index(drop=True)
    assert plain.isna().tolist() == expected.col.isna().tolist()
    there = expected.col.notna()
    if "zone" not in kind and "offset" not in kind and kind != "date":
        assert plain[there].tolist() == expected.col[there].tolist()
    # And again through every way of writing a column, and over a compaction.
    store.annotate("m", frame)
    write(store, frame, prompts=PROMPTS)
    store.compact("m", progress=False)
    pd.testing.assert_frame_equal(store.dataset("m", prompts=PROMPTS).lz.to_dataframe().reset_index(drop=True), expected)
    pd.testing.assert_frame_equal(
        store.dataset("m", prompts=["e", "a", "e"]).lz.to_dataframe().reset_index(drop=True),
        expected.iloc[[4, 0, 4]].reset_index(drop=True),
    )
    assert len(store.dataset("m", prompts=[]).lz.to_dataframe()) == 0
    # And after an eviction, which keeps columns, once the prompts are stored again.
    lz.evict(store, max_gb=0, min_age=0)
    assert not store.models()
    write(store)
    pd.testing.assert_frame_equal(store.dataset("m", prompts=PROMPTS).lz.to_dataframe().reset_index(drop=True), expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([Letter.A, Letter.B, np.str_("c"), "d", Letter.A], ["a", "b", "c", "d", "a"]),
        ([Level.LOW, Level.HIGH, np.int8(4), 5, np.uint64(6)], [1, 3, 4, 5, 6]),
        ([Share(0.5), np.float32(0.25), 1, np.float64(2.5), -0.0], [0.5, 0.25, 1.0, 2.5, -0.0]),
        (np.array(["a", "b", "c", "d", "e"], np.dtypes.StringDType()), ["a", "b", "c", "d", "e"]),
        ([True, np.True_, False, np.False_, True], [True, True, False, False, True]),
    ],
)
def test_subclasses_are_the_value_that_they_are_equal_to(store: Store, given: Any, expected: list[Any]) -> None:
    write(store, {"col": given})
    got = store.dataset("m").col.values.tolist()
    assert got == expected
    assert set(map(type, got)) == set(map(type, expected))


@pytest.mark.few(6)
@pytest.mark.parametrize(
    "given",
    [
        ["x", None, "z", "", "y"], ["x", float("nan"), "z", "", "y"], ["x", pd.NA, "z", "", "y"], ["x", pd.NaT, "z", "", "y"],
        [1, None, 3, 4, 5], [1, np.nan, 3, 4, 5], [1, pd.NA, 2**60 + 1, 4, 5], [True, None, False, True, True],
        [datetime(2026, 1, 1), None, datetime(2025, 1, 1, 1, 1, 1, 7), EARLY, LATE],
        [timedelta(1), pd.NaT, timedelta(microseconds=1), timedelta(0), timedelta(-1)],
        np.ma.masked_array([1, 2, 3, 4, 5], [False, True, False, False, False]),
        np.array(["x", None, "z", "", "y"], np.dtypes.StringDType(na_object=None)),
    ],
)  # fmt: skip
def test_missing_stays_missing_and_everything_else_stays_exact(store: Store, given: Any) -> None:
    write(store, {"col": given})
    got = store.dataset("m").col.lz.to_series()
    assert got.isna().tolist() == [False, True, False, False, False]
    assert got[got.notna()].tolist() == [value for i, value in enumerate(given) if i != 1]
    assert store.dataset("m").col.isnull().values.tolist() == got.isna().tolist()


BAD: dict[str, tuple[Any, str]] = {
    "a text among integers": ("x", "several kinds, the integer 0 in row 0 and the text 'x' in row 7777"),
    "a truth value among integers": (True, "the truth value True in row 7777"),
    "a lone surrogate": ("\ud83d", "the text '.ud83d' in row 7777"),
    "bytes": (b"x", "a bytes in row 7777, .*: decode it"),
    "a decimal": (Decimal("0.1"), "a Decimal in row 7777"),
    "a complex number": (1j, "a complex in row 7777"),
    "a list": ([1], "a list in row 7777"),
    "a period": (pd.Period("2026-01"), "a Period in row 7777"),
    "an interval": (pd.Interval(0, 1), "a Interval in row 7777"),
    "an integer beyond 64 bits": (2**63, "9223372036854775808 in row 7777, too large"),
    "a datetime among integers": (datetime(2026, 1, 1), "the datetime 2026-01-01 00:00:00 in row 7777"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_among_ten_thousand_is_named(store: Store, case: str) -> None:
    value, message = BAD[case]
    listed: list[Any] = list(range(10_000))
    listed[7777] = value
    prompts = [f"p{i}" for i in range(10_000)]
    with pytest.raises(InvalidArgumentError, match=f"column 'col' holds .*{message}"):
        write(store, {"col": listed}, prompts)
    assert store.storage.list("") == []


def test_a_text_that_no_utf8_can_hold_is_refused_wherever_it_is_given(store: Store) -> None:
    texts = ["x"] * 10_000
    texts[7777] = "half \ud83d"
    prompts = [f"p{i}" for i in range(10_000)]
    with pytest.raises(InvalidArgumentError, match=r"column 'col' holds 'half \\ud83d' in row 7777, .*encode"):
        write(store, {"col": texts}, prompts)
    with pytest.raises(InvalidArgumentError, match=r"column 'col' holds .* in row 7777"):
        write(store, {"col": np.array(texts)}, prompts)
    with pytest.raises(InvalidArgumentError, match=r"its categories.* holds 'half .ud83d' in row 0"):
        # As objects: strings of pyarrow cannot hold it.
        categories = pd.Index(["half \ud83d", "x"], dtype=object)
        write(store, {"col": pd.Categorical.from_codes([int(text == "x") for text in texts], categories)}, prompts)
    prompts[7777] = "half \udc00"
    with pytest.raises(InvalidArgumentError, match=r"prompts\[7777\] 'half \\udc00' holds a lone surrogate at character 5"):
        write(store, None, prompts)
    with pytest.raises(InvalidArgumentError, match="cannot be shown"):
        lz.write_activations(store, model="m\ud83d", prompts=["a"], pooled={"resid_mean": {0: np.ones((1, 4), "f4")}})
    with pytest.raises(InvalidArgumentError, match=r"provenance field 'half'='\\ud83d' .*UTF-8"):
        write(store, None, provenance={"half": "\ud83d"})
    write(store)
    with pytest.raises(InvalidArgumentError, match="in row 1, which no UTF-8 can hold"):
        store.annotate("m", {"note": {"a": "fine", "bb": "\ud83d"}})
    assert "note" not in store.dataset("m").coords


KINDS: dict[str, Any] = {
    "truth values": [True, False, True, None, False],
    "integers": [1, 2, 3, None, 5],
    "floating-point numbers": [0.5, 1.0, 2.0, None, 3.0],
    "texts": ["x", "y", "1", None, ""],
    "datetimes without": np.array(["2026-01-01"] * ROWS, "M8[ns]"),
    "datetimes in the time zone UTC": [datetime(2026, 1, 1, tzinfo=UTC)] * ROWS,
    "timedeltas": [timedelta(1)] * ROWS,
    "dates": [date(2026, 1, 1)] * ROWS,
    "categories": pd.Categorical(["x", "y", "z", None, "x"]),
    "ordered categories": pd.Categorical(["x", "y", "z", None, "x"], ordered=True),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("first", KINDS)
def test_a_second_write_of_another_kind_is_refused_and_both_kinds_are_named(store: Store, first: str) -> None:
    write(store, {"col": KINDS[first]})
    before = store.dataset("m").col.lz.to_series()
    for second, values in KINDS.items():
        if second == first or (first.endswith("categories") and second == "texts"):
            continue
        ways: list[Callable[[], None]] = [
            partial(write, store, {"col": values}, ["new", "newer", "newest", "other", "last"]),
            partial(store.annotate, "m", {"col": pd.Series(values, index=PROMPTS, dtype="Int64" if second == "integers" else None)}),
        ]
        if not second.endswith("categories"):  # which a dict's values are not
            ways.append(partial(store.annotate, "m", {"col": dict(zip(PROMPTS, values, strict=True))}))
        for write_again in ways:
            with pytest.raises(InvalidArgumentError, match=f"column 'col' holds .*{first}.*, and these are "):
                write_again()
    # Missing values alone are of every kind.
    store.annotate("m", {"col": {"a": None}})
    write(store, {"col": [None] * 2}, ["new", "newer"])
    after = store.dataset("m", prompts=[*PROMPTS, "new"]).col.lz.to_series()
    assert after.isna().tolist() == [True, False, False, before.isna().iloc[3], False, True]
    assert after[1:3].tolist() == before[1:3].tolist()


def test_series_and_frames_are_put_into_the_order_of_the_prompts(store: Store) -> None:
    frame = pd.DataFrame({"text": PROMPTS, "label": range(ROWS), "split": list("vwxyz")}).sample(frac=1, random_state=3)
    by_text = frame.set_index("text")
    by_hash = by_text.rename(index=lz.prompt_hash)
    by_prompt = {name: by_text[name].to_xarray().rename(text="prompt") for name in by_text}
    given: list[Any] = [by_text, by_hash, {"label": by_text.label, "split": by_hash["split"]}, by_prompt]
    for number, coords in enumerate([*given, {"label": list(range(ROWS)), "split": pd.Series(list("vwxyz"))}]):
        write(store, coords, PROMPTS, provenance={"n": number})
        got = store.dataset("m", provenance={"n": number}, prompts=PROMPTS)
        assert (got.label.values.tolist(), got["split"].values.tolist()) == (list(range(ROWS)), list("vwxyz"))
    # Prompts that are a column of the same frame, filtered and shuffled.
    part = frame[frame.label > 0]
    write(store, {"label": part.sort_values("split").label}, part.text, provenance={"n": 9})
    assert store.dataset("m", provenance={"n": 9}, prompts=PROMPTS[1:]).label.values.tolist() == [1, 2, 3, 4]
    # A Series in another order whose index is not the prompts cannot be matched.
    with pytest.raises(InvalidTypeError, match="column 'label' is a Series whose index"):
        write(store, {"label": frame.label}, PROMPTS)
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\], 'bb', is not in it: .*reindex"):
        write(store, {"label": by_text.label.drop("bb")}, PROMPTS)
    with pytest.raises(InvalidArgumentError, match=r"holds prompts\[0\] twice"):
        write(store, {"label": pd.concat([by_text.label, by_text.label[["a"]]])}, PROMPTS)
    with pytest.raises(InvalidArgumentError, match="the column 'x' twice"):
        write(store, pd.DataFrame([[1, 2]] * ROWS, columns=["x", "x"]), PROMPTS)


def test_annotations_take_frames_and_series(store: Store) -> None:
    write(store)
    frame = pd.DataFrame(
        {"n": pd.array([1, None], dtype="Int8"), "c": pd.Categorical(["x", "y"], categories=["y", "x"])}, index=["ccc", "a"]
    )
    store.annotate("m", frame)
    store.annotate("m", {"s": frame.n.rename(index=lz.prompt_hash)})
    got = store.dataset("m", prompts=["ccc", "a"]).lz.to_dataframe()
    pd.testing.assert_frame_equal(got.reset_index(drop=True)[["n", "c"]], frame.reset_index(drop=True))
    assert got.s.tolist() == [1, pd.NA]
    with pytest.raises(InvalidTypeError, match="set_index"):
        store.annotate("m", {"n": pd.Series([1, 2])})
    with pytest.raises(InvalidArgumentError, match="'a' twice"):
        store.annotate("m", {"n": pd.Series([1, 2], index=["a", "a"])})


def test_categories_of_several_parts_are_joined_and_an_order_is_never_changed(store: Store) -> None:
    write(store, {"c": pd.Categorical(["x", "y"]), "o": pd.Categorical(["lo", "hi"], categories=["lo", "hi"], ordered=True)}, ["a", "bb"])
    write(store, None, ["none"])
    write(store, {"c": pd.Categorical(["w", "x"], categories=["w", "x", "unused"]), "o": ["hi", None]}, ["c", "d"])
    got = store.dataset("m", prompts=["a", "bb", "none", "c", "d"]).lz.to_dataframe()
    expected = pd.Categorical(["x", "y", None, "w", "x"], categories=["x", "y", "w", "unused"])
    pd.testing.assert_series_equal(got.c.reset_index(drop=True), pd.Series(expected, name="c"))
    assert got.o.cat.ordered
    assert got.o.cat.categories.tolist() == ["lo", "hi"]
    with pytest.raises(InvalidArgumentError, match="ordered categories"):
        write(store, {"o": pd.Categorical(["lo"], categories=["hi", "lo"], ordered=True)}, ["f"])
    with pytest.raises(InvalidArgumentError, match="'other' is none of them"):
        store.annotate("m", {"o": {"a": "other"}})
    with pytest.raises(InvalidArgumentError, match="16385 categories"):
        write(store, {"many": pd.Categorical(list(map(str, range(16385))))}, list(map(str, range(16385))))


def test_categories_of_texts_stay_categories_whatever_dtype_they_have(store: Store) -> None:
    prompts = ["a", "bb", "c"]
    for number, categories in enumerate((pd.Index(["y", "x"], dtype=object), pd.Index(["y", "x"]), pd.Index(["y", "x"], dtype="string"))):
        given = pd.Series(pd.Categorical(["x", None, "y"], categories=categories, ordered=True), name=f"c{number}")
        write(store, {given.name: given}, prompts)
        data = store.dataset("m", prompts=prompts)
        pd.testing.assert_series_equal(data[given.name].lz.to_series().reset_index(drop=True), given, check_index_type=False)
        pd.testing.assert_series_equal(data.lz.to_dataframe()[given.name].reset_index(drop=True), given, check_index_type=False)


def test_names_that_differ_by_case_alone_are_refused_where_they_would_fall_together(store: Store) -> None:
    for names in (["label", "Label"], ["Text"], ["PROMPT"], ["n_Tokens"], ["Resid_Mean"], ["Perplexity"]):
        with pytest.raises(InvalidArgumentError, match="by case alone"):
            write(store, dict.fromkeys(names, [1] * ROWS))
    for name in ("a/b", "a.b", "a\0b", "é", "e\u0301", "", " x", "_x", "x" * 65, "zarr.json", "\ud83d", "ſ"):
        with pytest.raises(InvalidArgumentError, match="no column name"):
            write(store, {name: [1] * ROWS})
    write(store)
    with pytest.raises(InvalidArgumentError, match="by case alone"):
        store.annotate("m", {"label": {"a": 1}, "LABEL": {"a": 1}})


def test_columns_of_tokens_are_those_of_their_prompts(store: Store) -> None:
    frame = pd.DataFrame({f"c{number}": values for number, values in enumerate(FRAME.values())}, index=PROMPTS)
    tokens = [np.ones((n + 1, 4), "f4") for n in range(ROWS)]
    lz.write_activations(store, model="m", prompts=PROMPTS, activations={"resid": {0: tokens}}, coords=frame)
    got = store.tokens("m").lz.to_dataframe().reset_index(drop=True)
    expected = frame.iloc[np.repeat(np.arange(ROWS), np.arange(ROWS) + 1)].reset_index(drop=True)
    pd.testing.assert_frame_equal(got[list(frame)], expected)


def test_texts_of_pandas_3_are_missing_where_they_were_with_every_pandas() -> None:
    """A store of another machine may say ``str``: before pandas 3 that is a dtype of numpy, where what is missing reads "nan"."""
    column = Column(np.array(["a", ""], object), ColumnKind(name="text", dtype="str"), np.array([False, True]))
    shown = pd.Series(column.to_pandas())
    assert shown.isna().tolist() == [False, True]
    assert shown[0] == "a"


def test_columns_survive_netcdf_copy_and_publication(store: Store, tmp_path: Path) -> None:
    frame = pd.DataFrame({f"c{number}": values for number, values in enumerate(FRAME.values())}, index=PROMPTS)
    write(store, frame)
    expected = frame.reset_index(drop=True)
    store.copy_to(tmp_path / "copy", progress=False)
    pd.testing.assert_frame_equal(
        lz.open_store(tmp_path / "copy").dataset("m").lz.to_dataframe().reset_index(drop=True)[list(frame)], expected
    )
    xr.testing.assert_identical(lz.open_store(tmp_path / "copy").dataset("m").load(), store.dataset("m").load())


UTF8 = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
MAKE: dict[str, Any] = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "int16": st.integers(-(2**15), 2**15 - 1),
    "uint8": st.integers(0, 255),
    "float64": st.floats(),
    "float32": st.floats(width=32),
    "bool": st.booleans(),
    "Int64": st.integers(-(2**63), 2**63 - 1),
    "UInt32": st.integers(0, 2**32 - 1),
    "boolean": st.booleans(),
    "Float64": st.floats(allow_nan=False),
    "string": UTF8,
    "str": UTF8,
    "category": st.sampled_from(["a", "b", "", "<missing>"]),
    "datetime64[ns]": st.datetimes(datetime(1700, 1, 1), datetime(2260, 1, 1)),
    "datetime64[s]": st.datetimes(EARLY, LATE).map(lambda t: t.replace(microsecond=0)),
    "datetime64[us, Asia/Tokyo]": st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1)),
    "timedelta64[us]": st.timedeltas(-LONG, LONG),
}
WHOLE = ("int64", "int16", "uint8", "bool", "float64", "float32")


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    rows = draw(st.integers(1, 8))
    columns = {}
    for number, dtype in enumerate(draw(st.lists(st.sampled_from(sorted(MAKE)), min_size=1, max_size=5))):
        value = MAKE[dtype] if dtype in WHOLE else MAKE[dtype] | st.none()
        listed = draw(st.lists(value, min_size=rows, max_size=rows))
        column = pd.Series(listed, dtype="datetime64[us]" if "Tokyo" in dtype else dtype)
        if dtype == "category" and not len(column.cat.categories):
            column = column.cat.set_categories(pd.Index([], dtype=object))  # without any, their dtype depends on the version of pandas
        columns[f"c{number}"] = column.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo") if "Tokyo" in dtype else column
    return pd.DataFrame(columns).set_axis([f"p{i}" for i in range(rows)])


@settings(max_examples=examples(15, 300), deadline=None, suppress_health_check=list(HealthCheck))
@given(frame=frames(), seed=st.integers(0, 2**32 - 1))
def test_random_frames_come_back_the_same(tmp_path_factory: pytest.TempPathFactory, frame: pd.DataFrame, seed: int) -> None:
    store = lz.open_store(tmp_path_factory.mktemp("frames"), durable=False)
    shuffled = frame.sample(frac=1, random_state=seed)
    prompts = list(frame.index)
    cut = len(prompts) // 2
    write(store, shuffled, prompts)
    write(store, None, ["none"])
    write(store, shuffled, prompts[cut:])
    store.annotate("m", shuffled)
    store.compact("m", progress=False)
    order = [*prompts, prompts[0]]
    got = store.dataset("m", prompts=order).lz.to_dataframe().reset_index(drop=True)
    pd.testing.assert_frame_equal(got, frame.loc[order].reset_index(drop=True), check_categorical=True)
    missing = store.dataset("m", prompts=["none"]).lz.to_dataframe()
    assert missing.isna().all(axis=None)


COMPUTED: dict[str, Any] = {
    "halves of nullable integers": lambda ds: ds.age / 2,
    "a comparison of integers": lambda ds: ds.age > 3,
    "integers as texts": lambda ds: ds.age.fillna(0).astype(int).astype(str),
    "integers beyond their dtype": lambda ds: ds.small + 300,
    "negative ones of an unsigned dtype": lambda ds: ds.small.astype(int) - 5,
    "sums of truth values": lambda ds: ds.flag + ds.flag,
    "gaps filled by a half": lambda ds: ds.flag.fillna(0.5),
    "differences of times in a zone": lambda ds: ds.when - ds.when[0],
    "years of times in a zone": lambda ds: ds.when.dt.year,
    "noon of dates": lambda ds: ds.day + np.timedelta64(12, "h"),
    "differences of dates": lambda ds: ds.day - ds.day[0],
    "categories compared": lambda ds: ds.kind == "a",
    "categories in capitals": lambda ds: ds.kind.str.upper(),
    "doubled categories of truth values": lambda ds: ds.yes * 2,
    "lengths of texts": lambda ds: ds.word.fillna("").str.len(),
    "floats beyond their dtype": lambda ds: ds.half.astype(float) * 1e300,
    "floats finer than their dtype": lambda ds: ds.half.astype(float) + 1e-9,
    "a function of each value": lambda ds: xr.apply_ufunc(lambda x: x * 1.5, ds.age, keep_attrs=True),
    "where and otherwise": lambda ds: xr.where(ds.small > 3, ds.small * 0.5, ds.small),  # type: ignore[no-untyped-call]
}


@pytest.fixture(scope="module")
def columns_of_every_kind(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    columns = {
        "age": pd.array([1, 2, None, 4, 5, 6], dtype="Int64"),
        "small": pd.array([1, 2, 3, 4, 5, 6], dtype="UInt8"),
        "flag": pd.array([True, None, False, True, True, False], dtype="boolean"),
        "when": pd.date_range("2020-01-01", periods=6, freq="h").tz_localize("Europe/Berlin"),
        "day": [date(2020, 1, 1 + i) for i in range(6)],
        "kind": pd.Categorical(["a", "b"] * 3),
        "yes": pd.Categorical([True, False] * 3),
        "word": pd.array(["x", "y", None, "x", "y", "z"], dtype="string"),
        "half": pd.array([1.5, None, 2.5, 1, 1, 1], dtype="Float32"),
    }
    store = lz.open_store(tmp_path_factory.mktemp("kinds"), durable=False)
    pooled = {"resid_mean": {0: np.zeros((6, 2), np.float32)}}
    lz.write_activations(store, model="m", prompts=[f"t{i}" for i in range(6)], pooled=pooled, coords=columns)
    return store.dataset()


@pytest.mark.few(11)
@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_from_a_column_has_its_own_values_and_not_the_dtype_of_the_column(
    columns_of_every_kind: xr.Dataset, name: str
) -> None:
    with xr.set_options(keep_attrs=True):  # type: ignore[no-untyped-call]
        computed = COMPUTED[name](columns_of_every_kind)
    expected = pd.Series(computed.values)
    for series in (computed.lz.to_series(), columns_of_every_kind.assign_coords(new=computed).lz.to_dataframe()["new"]):
        got = series.reset_index(drop=True)
        assert [None if pd.isna(a) else a for a in got] == [None if pd.isna(b) else b for b in expected]
        assert pd.api.types.is_bool_dtype(got.dtype) == pd.api.types.is_bool_dtype(expected.dtype)


# -- columns of pyarrow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "read"),
    [
        ("int64[pyarrow]", [1, 2, None], [1.0, 2.0, np.nan]),
        ("int32[pyarrow]", [1, 2, 3], [1, 2, 3]),
        ("float32[pyarrow]", [1.5, None, 2.0], [1.5, np.nan, 2.0]),
        ("bool[pyarrow]", [True, None, False], [1.0, np.nan, 0.0]),
        ("string[pyarrow]", ["a", None, "ü"], ["a", np.nan, "ü"]),
        ("large_string[pyarrow]", ["a", "", "ü"], ["a", "", "ü"]),
        ("timestamp[us][pyarrow]", ["2026-01-02", None, "2026-03-04"], np.array(["2026-01-02", "NaT", "2026-03-04"], "M8[us]")),
    ],
)
def test_columns_of_pyarrow_are_read_back(kind: str, given: list[Any], read: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    values: Any = pd.to_datetime(pd.Series(given)) if kind.startswith("timestamp") else pd.Series(given)
    store = lz.open_store(tmp_path)
    lz.write_activations(
        store, model="m", prompts=["a", "b", "c"], pooled={"resid_mean": {0: np.ones((3, 2), "f4")}}, coords={"column": values.astype(kind)}
    )
    pd.testing.assert_series_equal(pd.Series(store.dataset("m").column.values), pd.Series(read), check_dtype=False)


def test_a_column_of_arrow_decimals_is_refused_with_what_to_give(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    with pytest.raises(InvalidArgumentError, match=r"holds a Decimal in row 0.*give float\(value\)"):
        lz.write_activations(
            lz.open_store(tmp_path), model="m", prompts=["a"], pooled={"resid_mean": {0: np.ones((1, 2), "f4")}},
            coords={"column": pd.Series([1], dtype=pd.ArrowDtype(arrow.decimal128(5, 2)))},
        )  # fmt: skip
