"""The command ``sweep``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lmprobe_zarr.cli.arguments import add_choice, add_command, add_store, parse_layers, split_names
from lmprobe_zarr.cli.printing import print_json
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import open_store

__all__ = ["add_sweep"]


def add_sweep(commands: Any) -> None:
    command = add_command(commands, "sweep", _sweep, "fit probes on every layer and fold, and print their scores")
    add_store(command, positional=True)
    add_choice(command)
    command.add_argument("--variable", help="what to fit on (default: resid_last_token, or the only one that is stored)")
    command.add_argument("--labels", default="label", help="column with the labels (default: %(default)s)")
    command.add_argument("--groups", help="column whose equal values stay in one fold")
    command.add_argument("--probes", default="logistic_regression", help="names, separated by commas (default: %(default)s)")
    command.add_argument("--layers", default="all", help="all, middle, last, numbers (0,4,-1) or a slice (8:24) (default: %(default)s)")
    command.add_argument("--cv", type=int, default=5, help="number of folds (default: %(default)s)")
    command.add_argument("--random-state", type=int, default=0, help="seed of folds and fits (default: %(default)s)")
    command.add_argument("--plot", metavar="FILE", help="draw accuracy by layer into this file (.png, .pdf, .svg)")


def _sweep(options: argparse.Namespace) -> None:
    from lmprobe_zarr.plots import plot_scores, save_plot
    from lmprobe_zarr.sweep import sweep

    store = open_store(options.store, mode="r")
    data = store.dataset(options.model, layers=parse_layers(options.layers), group=options.group)
    names = list(map(str, data.data_vars))
    variable = options.variable or (names[0] if len(names) == 1 else "resid_last_token")
    if variable not in names:
        raise InvalidArgumentError(
            f"{variable!r} is not stored per prompt: there is {', '.join(names) or 'nothing'}; choose with --variable"
        )
    if options.plot and not Path(options.plot).absolute().parent.is_dir():
        raise InvalidArgumentError(f"--plot {options.plot!r}: there is no folder {str(Path(options.plot).parent)!r}")
    scores = sweep(
        data[variable], labels=options.labels, probes=split_names(options.probes), cv=options.cv, groups=options.groups,
        random_state=options.random_state, progress=not options.json,
    )  # fmt: skip
    means, spread = scores[["accuracy", "auroc"]].mean("fold"), scores[["accuracy", "auroc"]].std("fold")
    rows = [
        {"layer": int(layer), "probe": str(probe), **{m: float(means[m].sel(layer=layer, probe=probe)) for m in means},
         **{f"{m}_std": float(spread[m].sel(layer=layer, probe=probe)) for m in spread}}
        for layer in scores.layer.values for probe in scores.probe.values
    ]  # fmt: skip
    if options.json:
        print_json({"model": str(data.model.values), "variable": variable, "labels": options.labels, "scores": rows})
        if options.plot:
            save_plot(plot_scores(scores), options.plot)
        return
    width = max(len(row["probe"]) for row in rows) + 2
    print(f"layer  {'probe':<{width}}{'accuracy':<17}auroc")
    for row in rows:
        cells = [f"{row[m]:.3f} ± {row[f'{m}_std']:.3f}" for m in ("accuracy", "auroc")]
        print(f"{row['layer']:>5}  {row['probe']:<{width}}{cells[0]:<17}{cells[1]}")
    if options.plot:
        save_plot(plot_scores(scores), options.plot)
        print(f"picture: {Path(options.plot)}")
