"""An extraction cut into shares for many workers, each a request of its own. Runs and sends nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmprobe_zarr.errors import InvalidTypeError
from lmprobe_zarr.extraction.request import Request
from lmprobe_zarr.extraction.work import Work
from lmprobe_zarr.store.parts import CallOrder
from lmprobe_zarr.typing import Ints

__all__ = ["Share", "cut", "cut_shares", "sendable"]

# A worker that dies loses at most what it has not committed of one share.
PER_WORKER: Final = 4
# A larger task slows the scheduler down, which warns about it.
SHARE_BYTES: Final = 2**20
# Bytes to send with each prompt besides its text: columns and framing.
PROMPT_BYTES: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Some of the prompts of an extraction.

    Parameters
    ----------
    request : Request
        The same request for these prompts only.
    tokens : int
        Tokens to run the model on.
    """

    request: Request
    tokens: int


def sendable(request: Request) -> Request:
    """The request in a form that means the same on other machines.

    Raises
    ------
    InvalidTypeError
        The model or the tokenizer is an object.
    """
    choice = request.choice
    if not choice.by_name:
        raise InvalidTypeError("a loaded model cannot be sent to workers: give its folder or hub id, or leave client= out")
    if choice.tokenizer is not None and not isinstance(choice.tokenizer, (str, os.PathLike)):
        raise InvalidTypeError("a tokenizer object cannot be sent to workers: give its folder or hub id, or leave client= out")
    tokenizer = None if choice.tokenizer is None else _absolute(choice.tokenizer)
    return replace(request, choice=replace(choice, model=_absolute(choice.model), tokenizer=tokenizer))


def _absolute(source: str | os.PathLike[str]) -> str:
    """The whole path of a folder, since workers have another working directory; a hub id unchanged."""
    folder = Path(source).expanduser()
    return str(folder.absolute()) if folder.is_dir() else os.fspath(source)


def cut_shares(work: Work, *, workers: int) -> list[Share]:
    """The work, cut for this number of workers into shares that take about equally long."""
    lookup, request, prompts = work.lookup, work.lookup.request, work.lookup.prompts
    lengths = np.zeros(len(prompts), np.int64)
    if work.tokenized is not None:
        lengths[lookup.missing] = work.tokenized.lengths
    todo = np.unique(np.concatenate([lookup.missing, *lookup.derived.values()]))
    # All workers run the commit that was found here, even if its branch moves meanwhile.
    commit = None if lookup.identity is None else lookup.identity.provenance.get("revision")
    choice = replace(request.choice, revision=str(commit) if commit else request.choice.revision)
    # And all take the group that was found here, although for some shares another one lacks less.
    group = lookup.group.name if lookup.group is not None and lookup.unknown else request.group
    given: list[Any] = list(prompts.token_ids or ()) if prompts.kind == "ids" else [request.given[i] for i in prompts.first]
    order = request.order or CallOrder.of(prompts.sha256)
    weights = np.array([_bytes_of(given[i]) for i in todo], np.int64)
    return [
        Share(
            request=replace(
                request,
                order=order.take(places),
                choice=choice,
                group=group,
                given=[given[i] for i in places],
                columns={name: values[places] for name, values in work.columns.items()},
            ),
            tokens=int(lengths[places].sum()),
        )
        for places in (np.sort(todo[share]) for share in cut(lengths[todo], weights, count=workers * PER_WORKER, most=SHARE_BYTES))
    ]


def _bytes_of(prompt: Any) -> int:
    """Approximate bytes to send for a prompt, with one byte for each character."""
    return PROMPT_BYTES + (
        prompt.nbytes if isinstance(prompt, np.ndarray) else len(prompt) if isinstance(prompt, str) else len(repr(prompt))
    )


def cut(lengths: Ints, weights: Ints, *, count: int, most: int) -> list[Ints]:
    """Items divided into shares that take about equally long.

    Parameters
    ----------
    lengths : ndarray of int, shape (item,)
        The work of each item, such as its number of tokens.
    weights : ndarray of int, shape (item,)
        Bytes to send for each item.
    count : int
        At least this many shares, if there are as many items.
    most : int
        At most this many bytes in one share; a larger item is a share of its own.

    Returns
    -------
    list of ndarray of int
        Indices of the items of each share, the longest item first; every item is in one share.
    """
    order = np.argsort(-lengths, kind="stable")
    count = min(len(order), max(count, -(-2 * int(weights.sum()) // most)))
    shares: list[Ints] = []
    # Items are dealt like cards, from the longest to the shortest, so that each share gets long and short ones.
    for start in range(count):
        share: list[int] = []
        size = 0
        for item in order[start::count].tolist():
            if share and size + int(weights[item]) > most:
                shares.append(np.array(share, np.int64))
                share, size = [], 0
            share.append(item)
            size += int(weights[item])
        shares.append(np.array(share, np.int64))
    return shares
