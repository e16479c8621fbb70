"""The command ``demo``."""

from __future__ import annotations

import argparse
from typing import Any

from lmprobe_zarr.cli.arguments import add_command
from lmprobe_zarr.cli.printing import as_json, print_json

__all__ = ["add_demo"]


def add_demo(commands: Any) -> None:
    command = add_command(commands, "demo", _demo, "run a small pretrained model on 400 sentences, sweep all layers, plot the scores")
    command.add_argument("--store", default="demo-output/activations", help="folder or URL of the store (default: %(default)s)")
    command.add_argument("--output", default="demo-output", help="folder for the plot (default: %(default)s)")
    command.add_argument("--model", help="another model: a folder or a hub id")


def _demo(options: argparse.Namespace) -> None:
    from lmprobe_zarr.demo import run_demo

    result = run_demo(options.store, model=options.model, output=options.output, progress=not options.json)
    name, layer, accuracy = result.best
    if options.json:
        best = {"variable": name, "layer": layer, "accuracy": accuracy, "chosen_by": "the accuracy that is shown"}
        document = {"stats": as_json(result.stats), "table": result.table, "bag_of_words": result.bag_of_words, "best": best}
        print_json(document | {"plot": str(result.plot)})
        return
    print(result.plan, end="\n\n")
    print(result.stats)
    if not result.stats.model_loaded:
        print("Every prompt was found in the store; no model was loaded.")
    print("\nAccuracy of a logistic regression: is the sentence positive or negative? (mean ± std over folds):\n")
    print("layer   " + "".join(f"{v:<22}" for v in result.scores) + "bag of words")
    for row in result.table:
        cells = "".join(f"{row[v]:.3f} ± {row[v + '_std']:.3f}".ljust(22) for v in result.scores)
        print(f"{row['layer']:>5}   {cells}{result.bag_of_words:.3f}")
    print(f"\nbest: {name}, layer {layer}, {accuracy:.3f}, compared with {result.bag_of_words:.3f} for word counts")
    print(f"(the best of {len(result.table) * len(result.scores)} by the accuracy that is shown, which is therefore somewhat too high)")
    print(f"plot: {result.plot}\n\nContinue in Python:\n")
    print(f"    import lmprobe_zarr as lz; store = lz.open_store({options.store!r})")
    print(f"    store.dataset({result.stats.model!r}).{name}.sel(layer={layer})")
