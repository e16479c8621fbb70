"""Tables of scores: their cells against plain numpy and decimal arithmetic, and their formats against parsers."""

from __future__ import annotations

import csv
import io
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.sweeps.table import _decimals, _rounded

NASTY = ["ridge", "a_b & 50% #1 $x$ {y} ~z^2 \\end", "[x] *y* | `z` <b>", "two\nlines"]


def scores_of(values: Any, probes: list[str] | None = None, metric: str = "accuracy", **more: Any) -> xr.Dataset:
    """Scores as sweep gives them, from values of shape (layer, probe, fold)."""
    values = np.asarray(values, float)
    dims = ("layer", "probe", "fold")
    names = probes or [f"p{i}" for i in range(values.shape[1])]
    seconds = np.where(np.isnan(values).all(axis=2, keepdims=True), np.nan, np.ones(values.shape))
    coords = {"layer": np.arange(len(values)), "probe": names, "fold": np.arange(values.shape[2])}
    return xr.Dataset(
        {metric: (dims, values), "fit_seconds": (dims, seconds), "n_test": ("fold", np.ones(values.shape[2]))}, coords, **more
    )


def test_a_cell_is_the_mean_and_the_standard_deviation_over_the_folds() -> None:
    values = np.random.default_rng(0).uniform(0.4, 1, (6, 3, 5))
    table = scores_of(values).lz.table()
    assert isinstance(table, pd.DataFrame)
    assert (table.index.name, table.columns.name) == ("layer", "probe")
    assert (table.index.tolist(), table.columns.tolist()) == ([0, 1, 2, 3, 4, 5], ["p0", "p1", "p2"])
    for layer, probe in np.ndindex(6, 3):
        mean, spread = map(Decimal, str(table.iloc[layer, probe]).split(" ± "))
        exact = values[layer, probe]
        step = Decimal(1).scaleb(mean.as_tuple().exponent)  # type: ignore[arg-type]
        assert mean.as_tuple().exponent == spread.as_tuple().exponent
        assert abs(mean - Decimal(exact.mean())) <= step / 2
        assert abs(spread - Decimal(exact.std())) <= step / 2
        assert 10 <= int(spread / step) < 100, "two digits of the interval"
    assert table.attrs["caption"] == "Mean ± standard deviation over 5 folds."


@pytest.mark.parametrize(
    ("mean", "spread", "shown"),
    [
        (0.8333, 0.0412, "0.833 ± 0.041"),
        (0.8333, 0.0996, "0.83 ± 0.10"),
        (0.8333, 0.00996, "0.833 ± 0.010"),
        (0.8333, 0.9951, "0.8 ± 1.0"),
        (12.34, 3.21, "12.3 ± 3.2"),
        (1234.5, 321.0, "1234 ± 321"),
        (0.5, 0.0, "0.500 ± 0.000"),
        (0.5, 1e-17, "0.500 ± 0.000"),
        (-0.0001, 0.05, "0.000 ± 0.050"),
        (0.83333333, 0.00000312, "0.833333 ± 0.000003"),
    ],
)
def test_the_interval_decides_the_digits(mean: float, spread: float, shown: str) -> None:
    places = _decimals(spread)
    assert f"{_rounded(mean, places)} ± {_rounded(spread, places)}" == shown


def test_bounds_are_shown_where_there_are_intervals() -> None:
    scores = scores_of([[[0.7, 0.9]], [[0.5, 0.6]]])
    bounds = xr.Dataset(
        {"accuracy": (("layer", "probe", "bound"), [[[0.4123, 0.55, 0.6789]], [[0.70123, 0.8, 0.90987]]])},
        {"layer": [1, 0], "probe": ["p0"], "bound": ["lower", "estimate", "upper"]},
        {"level": 0.9},
    )
    table = scores.lz.table("accuracy", intervals=bounds)
    assert table["p0"].tolist() == ["0.80 [0.70, 0.91]", "0.55 [0.41, 0.68]"], "matched by layer, whatever the order"
    assert table.attrs["caption"] == "Mean [lower, upper bound of the 90 % interval] over 2 folds."
    assert bounds.sortby("layer").lz.table()["p0"].tolist() == table["p0"].tolist(), "intervals are a table by themselves"
    rows = list(csv.DictReader(io.StringIO(scores.lz.table("accuracy", intervals=bounds, format="csv"))))
    assert rows[0] == {"layer": "0", "p0": "0.80", "p0 lower": "0.70", "p0 upper": "0.91"}
    with pytest.raises(InvalidArgumentError, match="intervals have no 'accuracy'"):
        scores.lz.table("accuracy", intervals=bounds.rename(accuracy="auroc"))


def test_what_was_never_fitted_is_told_from_what_is_not_finite() -> None:
    scores = scores_of([[[0.5, 0.7]], [[np.nan, np.nan]], [[1, 1]], [[1, 1]], [[1, 1]]])
    scores["accuracy"][2] = np.nan
    scores["accuracy"][3] = np.inf
    scores["accuracy"][4, 0, 1] = np.nan
    assert scores.lz.table()["p0"].tolist() == ["0.60 ± 0.10", "not stored", "not finite", "not finite", "1.000 (1 of 2)"]
    assert scores.accuracy.lz.table()["p0"].tolist()[1:3] == ["NaN", "NaN"], "the score alone does not say"
    rows = list(csv.DictReader(io.StringIO(scores.lz.table(format="csv"))))
    assert [row["p0"] for row in rows] == ["0.60", "not stored", "not finite", "not finite", "1.000"]
    assert [row["p0 ±"] for row in rows] == ["0.10", "", "", "", ""]
    assert [row["p0 folds"] for row in rows] == ["", "", "", "", "1 of 2"]


def test_a_single_fold_has_no_interval() -> None:
    table = scores_of([[[0.8]], [[0.75]]]).lz.table()
    assert table["p0"].tolist() == ["0.800", "0.750"]
    assert table.attrs["caption"] == "Scores."


def test_several_metrics_and_further_dims_have_levels_of_their_own() -> None:
    scores = (
        scores_of(np.full((2, 2, 3), 0.5)).expand_dims(variable=["resid_mean", "attn_mean"]).assign(auroc=lambda data: data.accuracy + 0.25)
    )
    table = scores.lz.table()
    assert table.columns.names == ["metric", "probe"]
    assert table.index.names == ["variable", "layer"]
    assert table.loc[("attn_mean", 1), ("auroc", "p1")] == "0.750 ± 0.000"
    assert scores.lz.table("auroc").columns.tolist() == ["p0", "p1"]
    assert scores.sel(layer=1, variable="attn_mean").lz.table("auroc").iloc[0].tolist() == ["0.750 ± 0.000"] * 2
    with pytest.raises(InvalidArgumentError, match=r"no score 'f1': use one of accuracy, auroc"):
        scores.lz.table("f1")
    with pytest.raises(InvalidArgumentError, match="no scores by layer and probe"):
        scores[["n_test"]].lz.table()


def test_seeds_are_repetitions_as_folds_are() -> None:
    values = np.random.default_rng(1).uniform(size=(2, 3))
    scores = scores_of(values[None, None, 0]).drop_vars("fit_seconds").expand_dims(seed=[0, 1], axis=-1).copy(deep=True)
    scores["accuracy"][0, 0] = values.T
    table = scores.lz.table()
    assert table.iloc[0, 0] == f"{values.mean():.2f} ± {values.std():.2f}"
    assert table.attrs["caption"] == "Mean ± standard deviation over 3 folds and 2 seeds."


def test_transfer_has_rows_for_both_datasets_and_says_what_was_not_tested() -> None:
    dims = ("layer", "probe", "train", "test")
    scores = xr.Dataset(
        {"accuracy": (dims, [[[[0.9, 0.8], [np.nan, 0.7]]]]), "auroc": (dims, [[[[0.95, np.nan], [np.nan, 0.6]]]])},
        {"layer": [3], "probe": ["mass_mean"], "train": ["a", "b"], "test": ["a", "b"]},
    )
    table = scores.lz.table()
    assert table.index.tolist() == [(3, "a", "a"), (3, "a", "b"), (3, "b", "a"), (3, "b", "b")]
    assert table["accuracy", "mass_mean"].tolist() == ["0.900", "0.800", "not tested", "0.700"]
    assert table["auroc", "mass_mean"].tolist() == ["0.950", "not finite", "not tested", "0.600"]


def test_scores_of_tokens_have_a_row_for_each_token() -> None:
    coords = {
        "layer": [0, 4],
        "prompt": ("token", ["ab", "ab", "cd"]),
        "position": ("token", [0, 1, 0]),
        "token_text": ("token", ["a", "b", "_"]),
    }
    scores = xr.DataArray([[0.5, -1.25, 3], [1, 2, np.nan]], coords, ("layer", "token"), "score")
    table = scores.lz.table()
    assert table.index.tolist() == [("ab", 0, "a"), ("ab", 1, "b"), ("cd", 0, "_")]
    assert table[0].tolist() == ["0.500", "-1.250", "3.000"]
    assert table[4].tolist() == ["1.000", "2.000", "NaN"]
    assert scores.lz.table(format="latex").splitlines()[6] == r"ab & 1 & b & $-1.250$ & $2.000$ \\"


# -- shuffles ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shuffled() -> xr.Dataset:
    """Three layers, two probes, and twenty shuffles of the labels."""
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.normal(size=(3, 40, 6)).astype("f4")
    x[1, :, 0] += 1.2 * y
    coords = {"layer": range(3), "prompt": [f"p{i}" for i in range(40)], "label": ("prompt", y)}
    array = xr.DataArray(x, dims=("layer", "prompt", "hidden"), coords=coords)
    return lz.sweep(array, "label", ["ridge", "mass_mean"], controls={"shuffled_labels": 20, "majority": None}, scheduler="synchronous")


SHUFFLED = "shuffled_labels: ± over its 20 shuffles, of which each counts by its mean over the folds."


def test_a_mean_over_many_shuffles_has_the_spread_of_the_shuffles(shuffled: xr.Dataset) -> None:
    table = shuffled.lz.table("accuracy")
    for number, probe in enumerate(("ridge", "mass_mean")):
        drawn = shuffled.accuracy_shuffled.values[:, number]
        for cell, row in zip(table[f"shuffled_labels:{probe}"], drawn, strict=True):
            mean, spread = cell.split(" ± ")
            # A mean in the middle of two decimals is rounded either way.
            assert float(mean) == pytest.approx(np.mean(row), abs=0.5001 * 10.0 ** -_decimals(float(np.std(row))))
            assert spread == _rounded(float(np.std(row)), _decimals(float(np.std(row))))
        folds = shuffled.accuracy.values[:, number]
        spreads = [float(np.std(row)) for row in folds]
        assert [cell.split(" ± ")[1] for cell in table[probe]] == [_rounded(spread, _decimals(spread)) for spread in spreads]
    assert table.attrs["caption"].splitlines()[:2] == ["Mean ± standard deviation over 5 folds.", SHUFFLED]
    escaped = SHUFFLED.replace("_", r"\_")
    assert f"* {escaped}\n" in shuffled.lz.table("accuracy", format="markdown")
    assert f"% {SHUFFLED}\n" in shuffled.lz.table("accuracy", format="latex")
    (first, *_) = csv.DictReader(io.StringIO(shuffled.lz.table("accuracy", format="csv")))
    assert first["shuffled_labels:ridge ± over 20 shuffles"] == table["shuffled_labels:ridge"][0].split(" ± ")[1]
    # A control whose probe was selected away has no spread that is known.
    alone = shuffled.sel(probe=["shuffled_labels:ridge", "majority"]).lz.table("accuracy")
    assert alone["shuffled_labels:ridge"].tolist() == [f"{value:.3f}" for value in shuffled.accuracy.values[:, 2].mean(axis=1)]
    assert alone.attrs["caption"] == "Mean ± standard deviation over 5 folds."


def test_p_values_are_a_column_and_that_of_the_best_layer_a_remark(shuffled: xr.Dataset) -> None:
    table = shuffled.lz.table("accuracy")
    assert table.columns.tolist()[:4] == ["ridge", "ridge p", "mass_mean", "mass_mean p"]
    best = []
    any_layer = {}
    for number, probe in enumerate(("ridge", "mass_mean")):
        real, drawn = shuffled.accuracy.values[:, number].mean(axis=1), shuffled.accuracy_shuffled.values[:, number]
        p = [(1 + sum(drawn[layer] >= real[layer] - 1e-12)) / 21 for layer in range(3)]
        any_layer[probe] = [(1 + sum(drawn.max(axis=0) >= real[layer] - 1e-12)) / 21 for layer in range(3)]
        assert table[f"{probe} p"].tolist() == [f"{value:.2g}" for value in p]
        best.append(f"{probe}: accuracy at layer {real.argmax()} has p = {any_layer[probe][real.argmax()]:.2g}")
    remarks = [
        "p: the permutation p-value of each layer by itself; of 20 shuffles it is at least 1/21 = 0.048.",
        f"p of the best of 3 layers, where a shuffle counts that is as good in any layer: {'; '.join(best)}.",
    ]
    assert table.attrs["caption"].splitlines()[2:] == remarks
    latex = shuffled.lz.table("accuracy", format="latex")
    assert [f"% {remark}" for remark in remarks] == latex.splitlines()[3:5]
    assert f"& ${table['ridge p'][0]}$ &" in latex
    assert "* p: the permutation" in shuffled.lz.table("accuracy", format="markdown")
    rows = list(csv.DictReader(io.StringIO(shuffled.lz.table("accuracy", format="csv"))))
    assert [row["ridge p"] for row in rows] == table["ridge p"].tolist()
    assert [row["mass_mean p any layer"] for row in rows] == [f"{value:.2g}" for value in any_layer["mass_mean"]]
    one = shuffled.isel(layer=[1]).lz.table("accuracy")
    assert one["ridge p"].tolist() == table["ridge p"].tolist()[1:2]
    assert "p of the best" not in one.attrs["caption"], "of a single layer nothing was chosen"


# -- formats ---------------------------------------------------------------------------------------------------------------


def parse_latex(text: str) -> list[list[str]]:
    """The rows of a plain tabular; every special character outside of math is an escape, and braces are balanced."""
    found = re.fullmatch(r"(?:% [^\n]*\n)+\\begin\{tabular\}\{(l*r*)\}\n(.*)\\end\{tabular\}\n", text, re.DOTALL)
    assert found
    rows = []
    for line in found[2].splitlines():
        if line == r"\hline":
            continue
        assert line.endswith(r" \\")
        row = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
        spanned = sum(int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
        assert len(row) - len(re.findall(r"\\multicolumn", line)) + spanned == len(found[1])
        for cell in row:
            bare = re.sub(r"\\(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}", "", cell)
            bare = re.sub(r"\\[&%$#_{}]", "", bare)
            bare = re.sub(r"\$-?[\d.]+(?: \\pm [\d.]+|\\ \[-?[\d.]+, -?[\d.]+\])?\$", "", bare)
            bare = re.sub(r"\\multicolumn", "", bare)
            assert not re.search(r"[\\%$#_^~<>|]", bare), cell
            assert bare.count("{") == bare.count("}")
        assert not re.match(r"\s*[\[*]", row[0]), "a bracket after a line break would be its argument"
        rows.append([cell.strip() for cell in row])
    return rows


def test_latex_has_no_character_that_is_not_escaped() -> None:
    scores = scores_of(np.random.default_rng(0).uniform(size=(2, 4, 3)), NASTY).assign(recall_at_50=lambda data: data.accuracy)
    scores = scores.assign_coords(layer=["[0]", "*1_*"])
    rows = parse_latex(scores.lz.table(format="latex"))
    assert rows[0] == ["", r"\multicolumn{4}{c}{accuracy}", r"\multicolumn{4}{c}{recall\_at\_50}"]
    assert rows[1][2] == r"a\_b \& 50\% \#1 \$x\$ \{y\} \textasciitilde{}z\textasciicircum{}2 \textbackslash{}end"
    assert rows[1][4] == "two lines"
    assert [row[0] for row in rows[2:]] == ["{[}0{]}", r"{*}1\_{*}"]
    mean, spread = str(scores.lz.table().iloc[1, 6]).split(" ± ")
    assert rows[3][7] == rf"${mean} \pm {spread}$"


def test_latex_says_what_was_scored_and_shortens_controls_of_a_single_probe() -> None:
    names = ["ridge", "shuffled_labels:ridge", "majority"]
    attrs = {"labels": "truth", "variable": "resid_mean", "model": "acme/toy", "n_prompts": 1198, "n_dropped": 2, "groups": "pair"}
    scores = scores_of(np.full((2, 3, 5), 0.5), names, attrs=attrs)
    scores = scores.assign_coords(kind=("probe", ["probe", "control", "control"]))
    lines = scores.lz.table(format="latex").splitlines()
    assert lines[1] == "% truth from resid_mean; model acme/toy; 1198 prompts, 2 without label left out; folds by pair."
    assert parse_latex("\n".join([*lines, ""]))[0] == ["layer", "ridge", r"shuffled\_labels", "majority"]
    few = scores.assign_attrs(model="", n_prompts=1, n_dropped=0, groups="").lz.table(format="latex").splitlines()
    assert few[1] == "% truth from resid_mean; 1 prompt."
    assert scores.drop_attrs().lz.table(format="latex").splitlines()[1].startswith(r"\begin{tabular}")
    several = scores.assign_coords(kind=("probe", ["probe", "control", "probe"]))
    assert r"shuffled\_labels:ridge" in several.lz.table(format="latex")
    assert r"shuffled\_labels:ridge" in scores.lz.table(format="markdown"), "as elsewhere"


def test_markdown_is_the_same_table_after_it_was_rendered() -> None:
    markdown = pytest.importorskip("markdown")
    scores = scores_of(np.random.default_rng(0).uniform(size=(3, 4, 3)), NASTY).assign_coords(layer=["a|b", "*c*", "d_e_f"])
    html = markdown.markdown(scores.lz.table(format="markdown"), extensions=["tables"])
    read = _parse_table(html)
    shown = scores.lz.table()
    assert read.columns.tolist() == ["layer", *(" ".join(name.split()) for name in NASTY)]
    assert read["layer"].tolist() == ["a|b", "*c*", "d_e_f"]
    assert read.iloc[:, 1:].to_numpy().tolist() == shown.to_numpy().tolist()
    assert "<p>Mean ± standard deviation over 3 folds.</p>" in html


def _parse_table(html: str) -> pd.DataFrame:
    from xml.etree import ElementTree

    rows = [["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(f"<x>{html}</x>").iter("tr")]  # noqa: S314 (our own)
    return pd.DataFrame(rows[1:], columns=rows[0])


def test_csv_has_numbers_in_cells_of_their_own() -> None:
    scores = scores_of(np.random.default_rng(0).uniform(size=(2, 2, 3)), ['with "quotes", and commas', "=1+1"])
    read = pd.read_csv(io.StringIO(scores.lz.table(format="csv")))
    assert read.columns.tolist() == ["layer", 'with "quotes", and commas', 'with "quotes", and commas ±', "=1+1", "=1+1 ±"]
    assert all(kind.kind in "if" for kind in read.dtypes)
    np.testing.assert_allclose(read["=1+1"], scores.accuracy.mean("fold")[:, 1], atol=0.05)


@pytest.mark.parametrize(("name", "kind"), [("t.md", "markdown"), ("t.TEX", "latex"), ("t.csv", "csv")])
def test_a_file_is_written_in_the_format_of_its_ending(name: str, kind: str, tmp_path: Path) -> None:
    scores = scores_of([[[0.5, 0.7]]])
    text = scores.lz.table(path=tmp_path / name)
    assert (tmp_path / name).read_bytes().decode() == text == scores.lz.table(format=kind)


@pytest.mark.parametrize(("name", "why"), [("t.xlsx", r"the ending \.xlsx"), ("t", "no ending"), ("no folder/t.md", "does not exist")])
def test_another_ending_is_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=why):
        scores_of([[[0.5, 0.7]]]).lz.table(path=tmp_path / name)
    with pytest.raises(InvalidArgumentError, match="format='html' is unknown"):
        scores_of([[[0.5, 0.7]]]).lz.table(format="html")
