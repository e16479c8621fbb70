"""The command line ``lmprobe-zarr``: arguments in, calls of the package, text or JSON out. No rules of its own."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr
from lmprobe_zarr import config
from lmprobe_zarr.build import extract, plan_extract
from lmprobe_zarr.errors import InvalidArgumentError, LmprobeZarrError
from lmprobe_zarr.layers import LayerSpec, describe_layers
from lmprobe_zarr.plan import format_bytes
from lmprobe_zarr.pooling import POOLINGS
from lmprobe_zarr.prompt_files import FORMATS, read_prompts
from lmprobe_zarr.schema import LEVELS
from lmprobe_zarr.sites import SITES
from lmprobe_zarr.store import Store, open_store

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        0; 1 after an expected error, said in one line on standard error; 130 after Ctrl-C. Wrong arguments exit with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
        sys.stdout.flush()
    except LmprobeZarrError as error:
        print(f"lmprobe-zarr: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of a pipe has left, as head does; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"lmprobe-zarr: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lmprobe-zarr: interrupted; what was committed is kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmprobe-zarr", description="Language-model activations in Zarr: extract once, slice, probe every layer."
    )
    parser.add_argument("--version", action="version", version=f"lmprobe-zarr {lmprobe_zarr.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_extract(commands)
    _add_info(commands)
    _add_show(commands)
    _add_sweep(commands)
    return parser


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return command


def _add_store(command: argparse.ArgumentParser, *, positional: bool) -> None:
    default = str(config.default_root())
    place = f"folder or URL of the store (default: {default})".replace("%", "%%")
    if positional:
        command.add_argument("store", nargs="?", default=None, help=place)
    else:
        command.add_argument("--store", default=None, help=place)


def _add_choice(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="name of the model, where the store holds several")
    command.add_argument("--group", help="name of the group, where a model has several")


# ------------------------------------------------------------------------------------------------------------------ demo


def _add_demo(commands: Any) -> None:
    command = _add_command(
        commands, "demo", _demo, "extract a small pretrained model over 400 sentences, sweep all layers, draw the scores"
    )
    command.add_argument("--store", default="demo-output/activations", help="folder or URL of the store (default: %(default)s)")
    command.add_argument("--output", default="demo-output", help="folder for the picture (default: %(default)s)")
    command.add_argument("--model", help="another model: a folder or a hub id")


def _demo(options: argparse.Namespace) -> None:
    from lmprobe_zarr.demo import run_demo

    result = run_demo(options.store, model=options.model, output=options.output, progress=not options.json)
    name, layer, accuracy = result.best
    if options.json:
        best = {"variable": name, "layer": layer, "accuracy": accuracy}
        document = {"stats": _as_json(result.stats), "table": result.table, "bag_of_words": result.bag_of_words, "best": best}
        _print_json(document | {"plot": str(result.plot)})
        return
    print(result.plan, end="\n\n")
    print(result.stats)
    if not result.stats.model_loaded:
        print("Every prompt was found in the store; no model was loaded.")
    print("\nAccuracy of a logistic regression, is the sentence positive or negative (mean ± std over folds):\n")
    print("layer   " + "".join(f"{v:<22}" for v in result.scores) + "bag of words")
    for row in result.table:
        cells = "".join(f"{row[v]:.3f} ± {row[v + '_std']:.3f}".ljust(22) for v in result.scores)
        print(f"{row['layer']:>5}   {cells}{result.bag_of_words:.3f}")
    print(f"\nbest: {name}, layer {layer}, {accuracy:.3f}, against {result.bag_of_words:.3f} for the words alone")
    print(f"picture: {result.plot}\n\nGo on in Python:\n")
    print(f"    import lmprobe_zarr as lz; store = lz.open_store({options.store!r})")
    print(f"    store.dataset({result.stats.model!r}).{name}.sel(layer={layer})")


# --------------------------------------------------------------------------------------------------------------- extract


def _add_extract(commands: Any) -> None:
    command = _add_command(commands, "extract", _extract, "run a model over prompts that are not stored yet, and store their activations")
    command.add_argument("model", help="folder or hub id of the model")
    command.add_argument("prompts", help=".txt (a prompt per line, blanks around it left out), .jsonl or .csv; - is standard input")
    _add_store(command, positional=False)
    command.add_argument("--format", choices=FORMATS, help="of the prompts; by default the file's ending, txt for standard input")
    command.add_argument("--text-column", default="text", help="column of the prompts (default: %(default)s)")
    command.add_argument("--coords", default="", metavar="NAMES", help="columns to store beside the prompts, separated by commas")
    command.add_argument("--layers", default="all", help="all, middle, last, numbers (0,4,-1) or a slice (8:24) (default: %(default)s)")
    command.add_argument("--sites", default="resid", help=f"any of {','.join(SITES)} (default: %(default)s)")
    command.add_argument("--pooling", default="last_token", help=f"any of {','.join(POOLINGS)}, or none (default: %(default)s)")
    command.add_argument("--keep-tokens", action="store_true", help="store every token too")
    command.add_argument("--name", help="name of the model in the store")
    command.add_argument("--revision", help="branch, tag or commit of a hub model")
    command.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 (default: %(default)s)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)")
    command.add_argument("--batch-tokens", type=int, help="padded tokens per batch")
    command.add_argument("--max-length", type=int, help="longest prompt in tokens")
    command.add_argument("--truncation", action="store_true", help="cut longer prompts instead of refusing them")
    command.add_argument("--refresh", action="store_true", help="run the model on all prompts, stored or not")
    command.add_argument("--no-text", action="store_true", help="leave the texts out of the store")
    command.add_argument("--trust-remote-code", action="store_true", help="let code that comes with the model run")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def _extract(options: argparse.Namespace) -> None:
    names = _split(options.coords)
    prompts, columns = read_prompts(options.prompts, file_format=options.format, text_column=options.text_column, columns=names)
    store = open_store(options.store)
    request: dict[str, Any] = {
        "store": store,
        "layers": parse_layers(options.layers),
        "sites": _split(options.sites),
        "pooling": [] if options.pooling == "none" else _split(options.pooling),
        "keep_tokens": options.keep_tokens,
        "name": options.name,
        "revision": options.revision,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "truncation": options.truncation,
        "refresh": options.refresh,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.dry_run:
        plan = plan_extract(options.model, prompts, **request)
        _print_json(_as_json(plan) | {"missing": plan.missing, "fits": plan.fits}) if options.json else print(plan)
        return
    stats = extract(
        options.model,
        prompts,
        coords=columns,
        device=options.device,
        batch_tokens=options.batch_tokens,
        store_text=not options.no_text,
        progress=not options.json,
        **request,
    )
    _print_json(_as_json(stats)) if options.json else print(stats)


def parse_layers(text: str) -> LayerSpec:
    """Layers as the command line writes them: a word, numbers with commas, or a slice with colons.

    Raises
    ------
    InvalidArgumentError
        Something else.
    """
    if text in {"all", "middle", "last"}:
        return text
    try:
        if ":" in text:
            return slice(*(int(piece) if piece.strip() else None for piece in text.split(":")))
        return [int(piece) for piece in text.split(",")]
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"--layers {text!r} names no layers: use all, middle, last, 0,4,-1 or 8:24") from error


# ------------------------------------------------------------------------------------------------------- info and show


def _add_info(commands: Any) -> None:
    command = _add_command(commands, "info", _info, "say what a store holds: models, prompts, layers, variables, bytes")
    _add_store(command, positional=True)


def _info(options: argparse.Namespace) -> None:
    store = open_store(options.store, mode="r")
    groups = [_describe_group(store, name) for name in store.groups()]
    if options.json:
        _print_json({"store": store.url, "groups": groups})
        return
    print(f"{store.url}: {len(groups)} group{'' if len(groups) == 1 else 's'}")
    for group in groups:
        print(f"\n{group['model']}  [{group['group']}]")
        rows = {
            "prompts": f"{group['prompts']} in {group['parts']} part{'' if group['parts'] == 1 else 's'}",
            "tokens": str(group["tokens"]),
            "layers": describe_layers(group["layers"]) + (f" of {group['num_layers']}" if group["num_layers"] else ""),
            "hidden": str(group["hidden_size"] or "unknown"),
            "variables": ", ".join(f"{name} ({dtype})" for name, dtype in group["variables"].items()) or "none",
            "columns": ", ".join(group["columns"]) or "none",
            "size": format_bytes(group["nbytes"]),
            "provenance": ", ".join(f"{k}={v}" for k, v in group["provenance"].items() if v is not None) or "unknown",
        }
        for name, value in rows.items():
            print(f"  {name:<11}{value}")


def _describe_group(store: Store, name: str) -> dict[str, Any]:
    info = store.groups()[name]
    view = store.view(info)
    variables = {key: array.attributes.get("stored_dtype", array.dtype) for level in LEVELS for key, array in view.variables(level).items()}
    return {
        "model": info.model,
        "group": name,
        "prompts": len(view),
        "tokens": int(view.token_counts().sum()),
        "parts": len(view.parts),
        "layers": sorted({*view.layers("prompts"), *view.layers("tokens")}),
        "num_layers": info.num_layers,
        "hidden_size": info.hidden_size,
        "variables": variables,
        "columns": [column for column in view.columns("prompts") if column not in ("prompt", "prompt_sha256")],
        "nbytes": sum(int(entry[0]) for part in (*view.parts, *view.annotations) for entry in part.info.files.values()),
        "provenance": dict(info.provenance),
    }


def _add_show(commands: Any) -> None:
    command = _add_command(commands, "show", _show, "show a model's activations as xarray does, or some of its prompts")
    _add_store(command, positional=True)
    _add_choice(command)
    command.add_argument("--level", choices=LEVELS, default="prompts", help="one row per prompt, or per token (default: %(default)s)")
    command.add_argument("--prompt", action="append", help="only this prompt, by text or hash; may be repeated")
    command.add_argument("--list", type=int, metavar="N", help="list the first N prompts with their columns instead")


def _show(options: argparse.Namespace) -> None:
    store = open_store(options.store, mode="r")
    opened = store.tokens if options.level == "tokens" else store.dataset
    data = opened(options.model, options.prompt, group=options.group)
    if options.list is not None or options.json:
        dim = "token" if options.level == "tokens" else "prompt"
        table = data.drop_vars(list(data.data_vars)).reset_coords(drop=False).isel({dim: slice(0, options.list)})
        kept = [name for name, v in table.variables.items() if v.dims == (dim,) and name != "prompt_sha256"]
        rows = [{name: _plain(table[name].values[i]) for name in kept} for i in range(table.sizes[dim])]
        if options.json:
            variables = {
                str(name): {"dims": list(v.dims), "shape": list(v.shape), "dtype": str(v.dtype)} for name, v in data.data_vars.items()
            }
            _print_json({"model": str(data.model.values), "variables": variables, "rows": rows})
            return
        for row in rows:
            print("  ".join(f"{name}={value!r}" for name, value in row.items()))
        return
    print(data)


# ----------------------------------------------------------------------------------------------------------------- sweep


def _add_sweep(commands: Any) -> None:
    command = _add_command(commands, "sweep", _sweep, "fit probes on every layer and fold, and print their scores")
    _add_store(command, positional=True)
    _add_choice(command)
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
        data[variable], labels=options.labels, probes=_split(options.probes), cv=options.cv, groups=options.groups,
        random_state=options.random_state, progress=not options.json,
    )  # fmt: skip
    means, spread = scores[["accuracy", "auroc"]].mean("fold"), scores[["accuracy", "auroc"]].std("fold")
    rows = [
        {"layer": int(layer), "probe": str(probe), **{m: float(means[m].sel(layer=layer, probe=probe)) for m in means},
         **{f"{m}_std": float(spread[m].sel(layer=layer, probe=probe)) for m in spread}}
        for layer in scores.layer.values for probe in scores.probe.values
    ]  # fmt: skip
    if options.json:
        _print_json({"model": str(data.model.values), "variable": variable, "labels": options.labels, "scores": rows})
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


# --------------------------------------------------------------------------------------------------------------- printing


def _split(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _as_json(record: Any) -> dict[str, Any]:
    return dataclasses.asdict(record)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _print_json(document: Any) -> None:
    # NaN is no JSON; a score that is undefined is null.
    print(json.dumps(_without_nan(document), indent=2, ensure_ascii=False, allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
