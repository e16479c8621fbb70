"""The command ``sweep``."""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.cli.arguments import add_choice, add_command, add_store, parse_layers, split_names
from lmprobe_zarr.cli.printing import print_json, print_text
from lmprobe_zarr.display import count_of, nearest, shorten, visible
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.interchange import read_list
from lmprobe_zarr.probes.controls import BAGS_OF_TOKENS
from lmprobe_zarr.store import open_to_read

__all__ = ["add_sweep"]

#: Endings of files that `--out` does not write.
_FILES = frozenset(
    (".csv", ".h5", ".html", ".jpg", ".json", ".md", ".nc", ".npz", ".parquet", ".pdf", ".pkl", ".png", ".svg", ".tex", ".tsv", ".txt")
)


def add_sweep(commands: Any) -> None:
    command = add_command(commands, "sweep", _sweep, "fit probes on every layer and fold, and print their scores")
    add_store(command, positional=True)
    add_choice(command)
    command.add_argument("--variable", help="variable to fit on (default: resid_last_token, or the only variable that is stored)")
    command.add_argument("--labels", default="label", help="column with the labels (default: %(default)s)")
    command.add_argument("--task", default="classification", choices=("classification", "regression"), help="(default: %(default)s)")
    command.add_argument("--groups", help="column of groups: prompts with equal values are in the same fold")
    command.add_argument("--split", help="column with train or test for each prompt, instead of folds")
    command.add_argument("--probes", default="logistic_regression", help="names, separated by commas (default: %(default)s)")
    command.add_argument(
        "--controls",
        default="",
        help="names of controls, separated by commas, such as bag_of_words,shuffled_labels; shuffled_labels=100 gives p-values, "
        "sentence_embedding=FOLDER names an encoder",
    )
    command.add_argument("--metrics", help="names, separated by commas (default: accuracy,auroc; of a regression r2,mae)")
    command.add_argument("--layers", default="all", help="all, middle, last, numbers (0,4,-1) or a slice (8:24) (default: %(default)s)")
    command.add_argument("--cv", type=int, help="number of folds (default: 5)")
    command.add_argument(
        "--choose", default="", metavar="NAMES", help="choose the layer, the probe, or both (layer,probe) within each training fold"
    )
    command.add_argument(
        "--strengths", metavar="NUMBERS", help="strengths of the penalty to try, separated by commas (see sweep(strengths=…))"
    )
    command.add_argument(
        "--solver", default="scikit-learn", choices=("scikit-learn", "batched"), help="batched: all fits of a layer at once in torch"
    )
    command.add_argument("--device", help="where solver batched runs: cpu, cuda, cuda:1 (default: cpu)")
    command.add_argument("--repeats", type=int, default=1, help="how many times folds are drawn (default: %(default)s)")
    command.add_argument("--missing", default="raise", choices=("raise", "drop"), help="what to do about prompts without a label")
    command.add_argument("--random-state", type=int, default=0, help="seed of folds and fits (default: %(default)s)")
    command.add_argument(
        "--out", metavar="PLACE", help="write the scores of each layer to this place, and continue from scores that are stored there"
    )
    command.add_argument("--dry-run", action="store_true", help="print what would be fitted and read, and stop")
    command.add_argument("--plot", metavar="FILE", help="plot the first metric by layer into this file (.png, .pdf, .svg)")
    command.add_argument("--table", metavar="FILE", help="write the scores as a table into this file (.md, .tex, .csv)")


def _sweep(options: argparse.Namespace) -> None:
    from lmprobe_zarr.plots import plot_scores, save_plot
    from lmprobe_zarr.sweeps import plan_sweep, sweep, table_of_scores
    from lmprobe_zarr.sweeps.shuffles import describe_p_values, describe_spread

    _check_places(options)
    data, variable, controls = _chosen(options)
    arguments: dict[str, Any] = {
        "labels": options.labels, "probes": split_names(options.probes), "cv": options.cv, "groups": options.groups,
        "split": options.split, "task": options.task, "metrics": split_names(options.metrics) if options.metrics else None,
        "controls": controls or None, "repeats": options.repeats, "missing": options.missing,
        "choose": split_names(options.choose) or None, "random_state": options.random_state,
        "strengths": None if options.strengths is None else _numbers(options.strengths), "solver": options.solver, "device": options.device,
    }  # fmt: skip
    if options.dry_run:
        plan = plan_sweep(data[variable], **arguments)
        if options.json:
            document = {"fits": plan.n_fits, "tasks": plan.n_tasks, "nbytes": plan.nbytes, "layers": list(plan.layers)}
            print_json({**document, **({"chosen": plan.choice} if plan.choice else {})})
        else:
            print_text(plan, options)
        return
    scores = sweep(data[variable], **arguments, out=options.out, progress=not options.json)
    metrics = [
        str(name) for name, held in scores.data_vars.items() if "fold" in held.dims and "probe" in held.dims and "units" in held.attrs
    ]
    metrics.remove("fit_seconds")
    rows = _rows(scores, metrics)
    if options.json:
        document = {"model": str(data.model.values), "variable": variable, "labels": options.labels, **_design(scores), "scores": rows}
        print_json({**document, **({"chosen": scores.attrs["chosen"]} if "chosen" in scores.attrs else {})})
    else:
        print(_heading(scores, variable, options))
        _print_table(rows, metrics)
        for note in (*describe_spread(scores, metrics), *describe_p_values(scores, metrics)):
            print(note)
        if "chosen" in scores.attrs:
            print(f"chosen: {scores.attrs['chosen']}")
    if options.plot:
        save_plot(plot_scores(scores, metrics[0]), options.plot)
        if not options.json:
            print(f"plot: {Path(options.plot)}")
    if options.table:
        table_of_scores(scores, metrics, path=options.table)
        if not options.json:
            print(f"table: {Path(options.table)}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in split_names(text)]
    except ValueError as error:
        raise InvalidArgumentError(f"--strengths {text!r} is no list of numbers: write it as 0.01,1,100") from error


def _controls(text: str) -> dict[str, Any]:
    """Names of controls, of which shuffled_labels may have a number, and sentence_embedding has a folder."""
    found: dict[str, Any] = {}
    for item in split_names(text):
        name, given, number = (part.strip() for part in item.partition("="))
        if given and number and name == "sentence_embedding":
            found[name] = number
            continue
        if given and (name != "shuffled_labels" or not number.isdecimal()):
            raise InvalidArgumentError(
                f"--controls {item!r} is no control: shuffled_labels takes a number, as shuffled_labels=100, sentence_embedding a folder"
            )
        found[name] = int(number) if given else None
    return found


def _check_places(options: argparse.Namespace) -> None:
    """Whether everything that is to be written can be, before anything is read or fitted."""
    from lmprobe_zarr.plots.files import parse_plot_path
    from lmprobe_zarr.sweeps import parse_table_path

    if options.table:
        parse_table_path(options.table)
    if options.plot:
        parse_plot_path(options.plot)
        if "layer" in split_names(options.choose):
            choose = f"--choose {options.choose}"
            raise InvalidArgumentError(
                f"--plot draws scores by layer, and {choose} leaves none. Run two commands: sweep … {choose}, "
                f"and sweep … --plot {options.plot}"
            )
    ending = Path(options.out or "").suffix.lower()
    if ending in _FILES:
        raise InvalidArgumentError(
            f"--out {options.out!r} has the ending {ending} of a file, and scores are written as a folder of Zarr: "
            "give a name such as scores or scores.zarr (--table writes .md, .tex and .csv, --plot pictures)"
        )


def _chosen(options: argparse.Namespace) -> tuple[xr.Dataset, str, dict[str, Any]]:
    controls = _controls(options.controls)
    store = open_to_read(options.store)
    data = store.dataset(options.model, layers=parse_layers(options.layers), group=options.group)
    names = list(map(str, data.data_vars))
    variable = options.variable or (names[0] if len(names) == 1 else "resid_last_token")
    if variable not in names:
        near = nearest(variable, names)
        raise InvalidArgumentError(
            f"{variable!r} is not stored per prompt{near}: stored are {', '.join(names) or 'no variables'}; choose with --variable"
        )
    bags = [name for name in BAGS_OF_TOKENS if name in controls]
    if bags:
        controls |= dict.fromkeys(bags, store.tokens(options.model, group=options.group))
    # The control needs the perplexity as a coordinate of the activations.
    if "perplexity" in controls and "perplexity" in data:
        data = data.assign_coords(perplexity=data.perplexity.sel(statistic="mean", drop=True))
    return data, str(variable), controls


def _rows(scores: xr.Dataset, metrics: list[str]) -> list[dict[str, Any]]:
    from lmprobe_zarr.sweeps.shuffles import is_of_many_shuffles, spread_of_shuffles

    means, counts = scores[metrics].mean("fold"), scores[metrics].count("fold")
    # The spread of a single score is unknown, and not 0.
    spread = scores[metrics].std("fold").where(counts > 1)
    # That of a mean over many shuffles is over the shuffles.
    of_shuffles = {metric: held for metric in metrics if (held := spread_of_shuffles(scores, metric)) is not None}
    by_layer = "layer" in scores.dims
    rows = []
    strengths = scores.strength.values.tolist() if "strength" in scores.dims else [None]
    kinds = zip(scores.probe.values.tolist(), scores.kind.values.tolist(), strict=True)
    for layer, (probe, kind), strength in product(scores.layer.values if by_layer else (None,), kinds, strengths):
        at = {"probe": probe} | ({"layer": layer} if by_layer else {}) | ({} if strength is None else {"strength": strength})
        row: dict[str, Any] = {} if layer is None else {"layer": int(layer)}
        row |= {"probe": probe, "kind": kind} | ({} if strength is None else {"strength": strength})
        row |= {metric: float(means[metric].sel(at)) for metric in metrics}
        for metric in metrics:
            shuffled = is_of_many_shuffles(scores, metric, probe)
            row[f"{metric}_std"] = float((of_shuffles if shuffled else spread)[metric].sel(at))
        tested = [f"{metric}_{which}" for metric in metrics for which in ("p_value", "p_any_layer")]
        p_values = {name: scores[name].sel(at).item() for name in tested if name in scores}
        row |= {name: value for name, value in p_values.items() if value == value}
        for dim in ("layer", "probe"):
            if f"chosen_{dim}" in scores:
                row[f"chosen_{dim}s"] = _unique(scores[f"chosen_{dim}"].sel(probe=probe).values)
        rows.append(row)
    return rows


def _unique(values: Any) -> list[Any]:
    """What was chosen in some fold, sorted; empty for a control that has nothing to choose from."""
    known = [value for value in np.unique(values[values == values]).tolist() if value != ""]  # NaN differs from itself
    return [int(value) if isinstance(value, float) and value.is_integer() else value for value in known]


def _class_counts(scores: xr.Dataset) -> list[tuple[Any, int]]:
    """The classes with how many scored prompts each has; empty for a regression."""
    classes, counts = (read_list(scores.attrs, name) or [] for name in ("classes", "class_counts"))
    return list(zip(classes, map(int, counts), strict=True))


def _design(scores: xr.Dataset) -> dict[str, Any]:
    """What was fitted on which prompts, for ``--json``."""
    return {
        "prompts": int(scores.attrs["n_prompts"]),
        "left_out": int(scores.attrs["n_dropped"]),
        "classes": [{"label": label, "prompts": count} for label, count in _class_counts(scores)],
        "folds": scores.sizes["fold"],
        "groups": scores.attrs["groups"] or None,
        "cv": scores.attrs["cv"],
    }


#: As many classes are named with their counts.
_NAMED_CLASSES: Final = 6


def _heading(scores: xr.Dataset, variable: str, options: argparse.Namespace) -> str:
    """What was fitted on which prompts, as a line above the table."""
    design, classes, n_folds = _design(scores), _class_counts(scores), scores.sizes["fold"]
    what = count_of(design["prompts"], "prompt")
    if len(classes) > _NAMED_CLASSES:
        fewest, most = min(count for _, count in classes), max(count for _, count in classes)
        what = f"{len(classes)} classes of {fewest if fewest == most else f'{fewest} to {most}'} prompts"
    elif classes:
        what = ", ".join(f"{shorten(str(label), 40)}: {count}" for label, count in classes)
    what += " tested" if classes and options.split else ""
    if design["left_out"]:
        what += f"; {count_of(design['left_out'], 'prompt')} without label left out"
    folds = f"split by {options.split}" if options.split else count_of(n_folds // options.repeats, "fold")
    folds += f" by {options.groups}" if options.groups else ""
    folds += f", drawn {options.repeats} times" if options.repeats > 1 else ""
    return visible(f"{options.labels} ({what}) from {variable}, {folds}")


def _print_table(rows: list[dict[str, Any]], metrics: list[str]) -> None:
    names = [row["probe"] + (f" {row['strength']:g}" if "strength" in row else "") for row in rows]
    width = max(map(len, names)) + 2
    wide = 17 + 9 * any(f"{metric}_p_value" in row for row in rows for metric in metrics)
    columns = [max(wide, len(metric) + 2) for metric in metrics]
    by_layer = "layer" in rows[0]
    chosen = [name for name in ("chosen_layers", "chosen_probes") if name in rows[0]]
    heads = "".join(f"{metric:<{column}}" for metric, column in zip(metrics, columns, strict=True))
    print(f"{'layer  ' * by_layer}{'probe':<{width}}{heads}{'  '.join(name.replace('_', ' ') for name in chosen)}".rstrip())
    for row, probe in zip(rows, names, strict=True):
        p_values = [f" p={row[name]:.2g}" if (name := f"{metric}_p_value") in row else "" for metric in metrics]
        cells = [_cell(row[metric], row[f"{metric}_std"]) + p for metric, p in zip(metrics, p_values, strict=True)]
        line = f"{row['layer']:>5}  " if by_layer else ""
        line += f"{probe:<{width}}" + "".join(f"{c:<{w}}" for c, w in zip(cells, columns, strict=True))
        print((line + "  ".join(", ".join(map(str, row[name])) or "-" for name in chosen)).rstrip())


def _cell(mean: float, spread: float) -> str:
    return f"{mean:.3f}" if math.isnan(spread) else f"{mean:.3f} ± {spread:.3f}"
