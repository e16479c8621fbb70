"""The command ``extract``."""

from __future__ import annotations

import argparse
from typing import Any, Final

from lmprobe_zarr.batch import BUILT_IN_SITES, LOGITS_POSITIONS, POOLINGS, Generate
from lmprobe_zarr.cli.arguments import add_command, add_store, parse_layers, parse_object, split_names
from lmprobe_zarr.cli.printing import as_json, print_json, print_text
from lmprobe_zarr.cli.prompt_files import FORMATS, read_prompts
from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import InvalidArgumentError, ModelNotFoundError
from lmprobe_zarr.extraction import ENGINES, WEIGHTS, extract, plan_extract
from lmprobe_zarr.store import PART_SECONDS, open_store
from lmprobe_zarr.tasks import own_client

__all__ = ["add_extract"]

_PART_SECONDS: Final = "store what is finished at least every S seconds, which is what a crash may cost (default: %(default)g)"


def add_extract(commands: Any) -> None:
    command = add_command(commands, "extract", _extract, "run a model on prompts that are not stored yet, and store their activations")
    command.add_argument("model", help="folder or hub id of the model")
    command.add_argument("prompts", help=".txt (a prompt per line, without surrounding blanks), .jsonl or .csv; - is standard input")
    add_store(command, positional=False)
    command.add_argument("--format", choices=FORMATS, help="of the prompts; by default the file's ending, txt for standard input")
    command.add_argument("--text-column", default="text", help="column of the prompts (default: %(default)s)")
    command.add_argument("--coords", default="", metavar="NAMES", help="columns to store with the prompts, separated by commas")
    command.add_argument("--layers", default="all", help="all, middle, last, numbers (0,4,-1) or a slice (8:24) (default: %(default)s)")
    command.add_argument("--sites", default="resid", help=f"any of {','.join(BUILT_IN_SITES)}, or NAME=PATH (default: %(default)s)")
    command.add_argument("--pooling", default="last_token", help=f"any of {','.join(POOLINGS)}, or none (default: %(default)s)")
    command.add_argument("--over", default="all", metavar="PARTS", help="tokens to pool over: all, generated, roles, or a JSON object")
    command.add_argument("--keep-tokens", action="store_true", help="also store every token")
    command.add_argument("--perplexity", action="store_true", help="also store perplexities, per prompt and per token")
    command.add_argument("--logits", choices=LOGITS_POSITIONS, help="also store the logits at these tokens")
    command.add_argument("--logits-top-k", type=int, metavar="K", help="store only the K largest logits")
    command.add_argument("--router", action="store_true", help="also store the router's scores of all experts")
    command.add_argument("--generate", action="store_true", help="have the model answer the prompts, and store prompts with answers")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer at most (default: as the model has it)")
    command.add_argument("--temperature", type=float, metavar="T", help="0 for the likeliest tokens (default: as the model has it)")
    command.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of this probability")
    command.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens, 0 for all")
    command.add_argument("--seed", type=int, metavar="S", help="what sampling starts from (default: drawn, and recorded)")
    command.add_argument("-n", "--samples", type=int, metavar="N", help="answers per prompt (default: 1)")
    command.add_argument("--generation-settings", metavar="JSON", help="an object of further settings, such as repetition_penalty")
    command.add_argument("--name", help="name of the model in the store")
    command.add_argument("--revision", help="branch, tag or commit of a hub model")
    command.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 (default: %(default)s)")
    command.add_argument("--storage-dtype", help="store as float16, bfloat16 or float32 (default: as computed)")
    command.add_argument("--keep-bits", type=int, metavar="N", help="round to N bits after the leading bit")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)")
    command.add_argument(
        "--weights", choices=WEIGHTS, default="auto", help="streamed: one block in memory at a time (default: %(default)s)"
    )
    command.add_argument("--batch-tokens", type=int, help="padded tokens per batch")
    command.add_argument("--max-length", type=int, help="largest number of tokens per prompt")
    command.add_argument("--truncation", action="store_true", help="truncate longer prompts instead of raising an error")
    command.add_argument("--no-special-tokens", action="store_true", help="for texts that have their special tokens already")
    command.add_argument("--generation-prompt", choices=("yes", "no"), help="begin an answer after each chat (default: unless it has one)")
    command.add_argument("--continue-final-message", action="store_true", help="leave the last message of each chat open")
    command.add_argument("--chat-template-kwargs", metavar="JSON", help="an object of arguments for the chat template, tools included")
    command.add_argument("--group", help="name of a stored group that is of this model, such as that of an import")
    command.add_argument("--any-provenance", action="store_true", help="stored groups of this name, such as imports, are of this model")
    command.add_argument("--refresh", action="store_true", help="run the model on all prompts, even if they are stored")
    command.add_argument("--part-seconds", type=float, default=PART_SECONDS, metavar="S", help=_PART_SECONDS)
    command.add_argument("--no-text", action="store_true", help="do not store the texts")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    command.add_argument("--engine", choices=ENGINES, help="run the model with this engine instead of transformers")
    command.add_argument("--engine-options", metavar="JSON", help="an object of the engine's settings, such as tensor_parallel_size")
    command.add_argument("--workers", type=int, metavar="N", help="run in N processes on this machine, each with its own copy of the model")
    command.add_argument("--scheduler", metavar="ADDRESS", help="run on the workers of a Dask scheduler, such as tcp://host:8786")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def _parse_sites(names: list[str]) -> dict[str, str]:
    """``resid,z=self_attn.o_proj:input`` as `extract` takes it."""
    return {name: path if equals else name for name, equals, path in (each.partition("=") for each in names)}


def _extract(options: argparse.Namespace) -> None:
    names = split_names(options.coords)
    prompts, columns = read_prompts(options.prompts, file_format=options.format, text_column=options.text_column, columns=names)
    store = open_store(options.store)
    request: dict[str, Any] = {
        "store": store,
        "layers": parse_layers(options.layers),
        "sites": _parse_sites(split_names(options.sites)),
        "pooling": [] if options.pooling == "none" else split_names(options.pooling),
        "over": parse_object(options.over, "--over") if options.over.lstrip().startswith("{") else split_names(options.over),
        "keep_tokens": options.keep_tokens,
        "perplexity": options.perplexity,
        "logits": options.logits,
        "logits_top_k": options.logits_top_k,
        "router": options.router,
        "generate": _generate(options),
        "name": options.name,
        "revision": options.revision,
        "dtype": options.dtype,
        "storage_dtype": options.storage_dtype,
        "keep_bits": options.keep_bits,
        "max_length": options.max_length,
        "truncation": options.truncation,
        "add_special_tokens": not options.no_special_tokens,
        "add_generation_prompt": None if options.generation_prompt is None else options.generation_prompt == "yes",
        "continue_final_message": options.continue_final_message or None,
        "chat_template_kwargs": parse_object(options.chat_template_kwargs, "--chat-template-kwargs"),
        "refresh": options.refresh,
        "group": options.group,
        "provenance": "any" if options.any_provenance else None,
        "trust_remote_code": options.trust_remote_code,
        "device": options.device,
        "weights": options.weights,
        "engine": options.engine,
        "engine_options": parse_object(options.engine_options, "--engine-options"),
    }
    try:
        _run(options, prompts, columns, request)
    except ModelNotFoundError as error:
        near = nearest(options.model, store.models()).strip(" ()?")
        raise ModelNotFoundError(f"{error}; {near}, which {store.url} holds?" if near else str(error)) from error


def _run(options: argparse.Namespace, prompts: list[Any], columns: dict[str, list[Any]], request: dict[str, Any]) -> None:
    if options.dry_run:
        plan = plan_extract(options.model, prompts, **request)
        print_json(as_json(plan) | {"missing": plan.missing, "fits": plan.fits}) if options.json else print_text(plan, options)
        return
    with own_client(workers=options.workers, address=options.scheduler) as client:
        stats = extract(
            options.model,
            prompts,
            coords=columns,
            batch_tokens=options.batch_tokens,
            store_text=not options.no_text,
            part_seconds=options.part_seconds,
            client=client,
            progress=not options.json,
            **request,
        )
    print_json(as_json(stats)) if options.json else print_text(stats, options)


def _generate(options: argparse.Namespace) -> Generate | None:
    """How the prompts are answered; None where they are run as they are."""
    given = {
        "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k,
        "seed": options.seed, "n": options.samples, "settings": parse_object(options.generation_settings, "--generation-settings"),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if options.generate:
        return Generate(**given)
    if given:
        option = {"n": "samples", "settings": "generation-settings"}.get(name := next(iter(given)), name.replace("_", "-"))
        raise InvalidArgumentError(f"--{option} is for answers: add --generate, or leave it out")
    return None
