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
from lmprobe_zarr.typing import Ints

__all__ = ["Share", "cut", "cut_shares", "sendable"]

# A worker that dies loses at most one share, and of that what it had not committed.
PER_WORKER: Final = 4
# More than this in one task clogs the scheduler, which warns of it.
SHARE_BYTES: Final = 2**20
# What a prompt takes to send beside its text: columns and framing.
PROMPT_BYTES: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Some of the prompts of an extraction.

    Parameters
    ----------
    request : Request
        The same request for these prompts alone.
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
    """A folder by its whole path, since workers have another working directory; a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder.absolute()) if folder.is_dir() else os.fspath(source)


def cut_shares(work: Work, *, workers: int) -> list[Share]:
    """What is to be done, in shares that take about equally long, for so many workers."""
    lookup, request, prompts = work.lookup, work.lookup.request, work.lookup.prompts
    lengths = np.zeros(len(prompts), np.int64)
    if work.tokenized is not None:
        lengths[lookup.missing] = work.tokenized.lengths
    todo = np.unique(np.concatenate([lookup.missing, *lookup.derived.values()]))
    # All workers run the commit that was found here, even if its branch moves on meanwhile.
    commit = None if lookup.identity is None else lookup.identity.provenance.get("revision")
    choice = replace(request.choice, revision=str(commit) if commit else request.choice.revision)
    given: list[Any] = list(prompts.token_ids) if prompts.token_ids is not None else [request.given[i] for i in prompts.first]
    weights = np.array([_bytes_of(given[i]) for i in todo], np.int64)
    return [
        Share(
            request=replace(
                request,
                choice=choice,
                given=[given[i] for i in places],
                columns={name: values[places] for name, values in work.columns.items()},
            ),
            tokens=int(lengths[places].sum()),
        )
        for places in (todo[share] for share in cut(lengths[todo], weights, count=workers * PER_WORKER, most=SHARE_BYTES))
    ]


def _bytes_of(prompt: Any) -> int:
    """About what a prompt takes to send: characters are about a byte each, and it need not be exact."""
    return PROMPT_BYTES + (
        prompt.nbytes if isinstance(prompt, np.ndarray) else len(prompt) if isinstance(prompt, str) else len(repr(prompt))
    )


def cut(lengths: Ints, weights: Ints, *, count: int, most: int) -> list[Ints]:
    """Items dealt into shares that take about equally long; pure.

    Parameters
    ----------
    lengths : ndarray of int, shape (item,)
        What each takes to work on.
    weights : ndarray of int, shape (item,)
        What each takes to send, in bytes.
    count : int
        How many shares there are to be, at least, where there are as many items.
    most : int
        Bytes of one share, at most; an item that alone is more is a share of its own.

    Returns
    -------
    list of ndarray of int
        The places of the items of each share, the longest item first; every item once.
    """
    order = np.argsort(-lengths, kind="stable")
    count = min(len(order), max(count, -(-2 * int(weights.sum()) // most)))
    shares: list[Ints] = []
    # From the longest to the shortest, as cards are dealt: each share gets some of all kinds.
    for start in range(count):
        held: list[int] = []
        size = 0
        for item in order[start::count].tolist():
            if held and size + int(weights[item]) > most:
                shares.append(np.array(held, np.int64))
                held, size = [], 0
            held.append(item)
            size += int(weights[item])
        shares.append(np.array(held, np.int64))
    return shares
