"""What is kept of prompts whose rows come in pieces: a pass of an engine has rows of many prompts, and a long prompt comes in many passes.

Rows are pooled on their device and the result is held on the host. They are counted: what is handed over is complete, or says what is not.
Never runs a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from lmprobe_zarr.batch import concat_ranges, offsets_of, pooled_name
from lmprobe_zarr.typing import Ints

__all__ = ["POOL_PACKED", "Gathered", "Piece", "Wish"]

Tap = tuple[str, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is kept of a batch of prompts.

    Parameters
    ----------
    lengths : ndarray of int64, shape (prompt,)
        Tokens of every prompt.
    layers_of : mapping of str to tuple of int or None
        Of every site the layers that are kept; ``(None,)`` of one that has none.
    poolings : tuple of str
    parts : mapping of str to ndarray of bool or None
        The parts of the tokens that are pooled, each as a mask of all tokens; None for all of them.
    keep_tokens : bool
    """

    lengths: Ints
    layers_of: Mapping[str, tuple[int | None, ...]]
    poolings: tuple[str, ...]
    parts: Mapping[str, npt.NDArray[np.bool_] | None]
    keep_tokens: bool

    @property
    def taps(self) -> set[Tap]:
        """Every site with every layer that is kept of it."""
        return {(site, layer) for site, layers in self.layers_of.items() for layer in layers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows of one prompt in one pass: how many, and the position of the first of them."""

    prompt: int
    first: int
    count: int


# ------------------------------------------------------------------------------------------------------------------ pooling


def _last_token(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return rows.index_select(0, lengths.cumsum(0) - 1)


def _first_token(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return rows.index_select(0, lengths.cumsum(0) - lengths)


def _mean(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _reduced(rows, lengths, "mean")


def _max(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _reduced(rows, lengths, "max")


def _min(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return _reduced(rows, lengths, "min")


def _reduced(rows: torch.Tensor, lengths: torch.Tensor, how: str) -> torch.Tensor:
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return torch.segment_reduce(rows.to(wide), how, lengths=lengths, axis=0, unsafe=True).to(rows.dtype)


# Each takes rows of prompts end to end, (token, width), and their lengths, all at least 1, and gives (prompt, width). The keys are those
# of `lmprobe_zarr.batch.POOLINGS`; a test compares them.
POOL_PACKED: Final[Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "last_token": _last_token,
    "first_token": _first_token,
    "mean": _mean,
    "max": _max,
    "min": _min,
}


@dataclass(slots=True)
class _Pooled:
    """Rows of whole prompts, end to end, as they are pooled over one part of the tokens: made once for every pass."""

    prompts: torch.Tensor  # on the host: which prompts have a token in the part
    rows: torch.Tensor | None  # on the device: which rows are in the part; None for all
    lengths: torch.Tensor  # on the device: how many of each of these prompts


# ---------------------------------------------------------------------------------------------------------------- gathering


@dataclass(frozen=True, slots=True)
class _Target:
    """A row of the buffer of a variable: how many layers the variable has, and which of them this is."""

    name: str
    layers: int
    at: int


@dataclass(slots=True)
class _Pass:
    """One pass: the pieces that its rows are of, and indices that are made once."""

    pieces: tuple[Piece, ...]
    places: torch.Tensor  # of every row among all tokens of the batch
    whole: tuple[int, ...]  # prompts all of whose rows are in this pass
    split: tuple[tuple[Piece, int], ...]  # pieces of longer prompts, and the row at which each begins
    rows_of_whole: torch.Tensor | None  # on the host; None where all rows are
    called: set[Tap] = field(default_factory=set)
    pooled: dict[torch.device, dict[str, _Pooled]] = field(default_factory=dict)
    on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    waiting: list[tuple[_Target, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many rows it has."""
        return len(self.places)


class Gathered:
    """Takes the rows of a batch of prompts, pass by pass, at every site.

    Parameters
    ----------
    wish : Wish
        What is kept.

    Attributes
    ----------
    problem : str
        What went wrong first; empty where nothing did.
    token_ids : ndarray of int64, shape (token,)
        The tokens of the rows that came, prompts end to end; −1 where none came.
    """

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.starts = offsets_of(wish.lengths)
        self.seen = np.zeros(len(wish.lengths), np.int64)
        self.token_ids = np.full(int(self.starts[-1]), -1, np.int64)
        self.problem = ""
        self._pass: _Pass | None = None
        self._tokens: dict[str, torch.Tensor] = {}
        self._prompts: dict[str, torch.Tensor] = {}
        self._partial: dict[tuple[_Target, int], list[torch.Tensor]] = {}

    # ------------------------------------------------------------------------------------------------------------- a pass

    def begin_pass(self, pieces: Iterable[Piece], token_ids: Ints) -> None:
        """Say whose rows a pass has, in their order; `token_ids` are the tokens of the rows."""
        listed = tuple(pieces)
        counts = np.array([piece.count for piece in listed], np.int64)
        places = concat_ranges(np.array([self.starts[p.prompt] + p.first for p in listed], np.int64), counts)
        for piece in listed:
            expected = 0 if piece.first == 0 else int(self.seen[piece.prompt])  # a prompt that was pushed out of memory begins again
            if piece.first != expected or piece.first + piece.count > self.wish.lengths[piece.prompt]:
                self._fail(
                    f"rows of positions {piece.first} to {piece.first + piece.count - 1} of a prompt of "
                    f"{self.wish.lengths[piece.prompt]} tokens came, of which {self.seen[piece.prompt]} had come before"
                )
                return
            self.seen[piece.prompt] = piece.first + piece.count
        self.token_ids[places] = token_ids
        begins = offsets_of(counts)[:-1].tolist()
        is_whole = [piece.count == self.wish.lengths[piece.prompt] for piece in listed]
        rows = None if all(is_whole) else concat_ranges(np.array(begins, np.int64)[is_whole], counts[is_whole])
        self._pass = _Pass(
            pieces=listed,
            places=torch.from_numpy(places),
            whole=tuple(piece.prompt for piece, whole in zip(listed, is_whole, strict=True) if whole),
            split=tuple((piece, at) for piece, at, whole in zip(listed, begins, is_whole, strict=True) if not whole),
            rows_of_whole=None if rows is None else torch.from_numpy(rows),
        )

    def take(self, site: str, layer: int | None, values: torch.Tensor | None) -> None:
        """Keep the rows of a site: all tokens, what is pooled of them, or both. Without a pass, nothing.

        `values` has a row for every token of the pass, and perhaps padding after them; None where a module gave no numbers.
        """
        now = self._pass
        if now is None:
            return
        if values is None or values.ndim < 2 or len(values) < now.count:
            got = "nothing with a fraction" if values is None else str(tuple(values.shape))
            self._fail(f"site {site!r}{_of(layer)} gives {got} for {now.count} tokens")
            return
        if (site, layer) in now.called:
            self._fail(f"the module at site {site!r}{_of(layer)} is called more than once in one pass")
            return
        now.called.add((site, layer))
        rows = values[: now.count].flatten(1)
        layers = self.wish.layers_of[site]
        target = _Target(site, len(layers), layers.index(layer))
        if self.wish.keep_tokens:
            self._put(self._tokens, target, now.places, rows, len(self.token_ids))
        if self.wish.poolings:
            self._pool_whole(now, target, rows)
            for piece, begin in now.split:
                self._pool_split(piece, target, rows[begin : begin + piece.count].to("cpu", copy=True))

    def end_pass(self) -> None:
        """Everything of a pass has come: see that no site is missing."""
        now, self._pass = self._pass, None
        if now is None:
            return
        if missing := self.wish.taps - now.called:
            site, layer = min(missing, key=str)
            self._fail(f"{len(missing)} of {len(self.wish.taps)} modules were not called in a pass, such as that of {site!r}{_of(layer)}")
            return
        for target, prompts, pooled in now.waiting:
            self._put(self._prompts, target, prompts, pooled, len(self.wish.lengths))

    # -------------------------------------------------------------------------------------------------------------- pooling

    def _pool_whole(self, now: _Pass, target: _Target, rows: torch.Tensor) -> None:
        if not now.whole:
            return
        if now.rows_of_whole is not None:
            if rows.device not in now.on_device:
                now.on_device[rows.device] = now.rows_of_whole.to(rows.device)
            rows = rows.index_select(0, now.on_device[rows.device])
        if rows.device not in now.pooled:
            now.pooled[rows.device] = {part: self._part_of(part, now.whole, rows.device) for part in self.wish.parts}
        for name, prompts, values in self._pooled(target.name, rows, now.pooled[rows.device]):
            now.waiting.append((replace(target, name=name), prompts, values))

    def _pool_split(self, piece: Piece, target: _Target, rows: torch.Tensor) -> None:
        """Hold the rows of a prompt that comes in several passes, and pool them once the last have come."""
        key = (target, piece.prompt)
        held = self._partial[key] = [] if piece.first == 0 else self._partial.get(key, [])
        held.append(rows)
        if piece.first + piece.count < self.wish.lengths[piece.prompt]:
            return
        complete = torch.cat(self._partial.pop(key))
        parts = {part: self._part_of(part, (piece.prompt,), complete.device) for part in self.wish.parts}
        for name, prompts, values in self._pooled(target.name, complete, parts):
            self._put(self._prompts, replace(target, name=name), prompts, values, len(self.wish.lengths))

    def _pooled(self, site: str, rows: torch.Tensor, parts: Mapping[str, _Pooled]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Every pooling of whole prompts, with its name and the prompts that have a token in its part."""
        for part, pooled in parts.items():
            chosen = rows if pooled.rows is None else rows.index_select(0, pooled.rows)
            for pooling in self.wish.poolings:
                values = POOL_PACKED[pooling](chosen, pooled.lengths) if len(pooled.prompts) else chosen
                yield pooled_name(site, pooling, part), pooled.prompts, values

    def _part_of(self, part: str, prompts: Sequence[int], device: torch.device) -> _Pooled:
        chosen = np.array(prompts, np.int64)
        lengths, mask, rows = self.wish.lengths[chosen], self.wish.parts[part], None
        if mask is not None:
            inside = mask[concat_ranges(self.starts[chosen], lengths)]
            lengths = np.add.reduceat(inside.astype(np.int64), offsets_of(lengths)[:-1])
            chosen, lengths = chosen[lengths > 0], lengths[lengths > 0]
            rows = torch.from_numpy(np.flatnonzero(inside)).to(device)
        return _Pooled(prompts=torch.from_numpy(chosen), rows=rows, lengths=torch.from_numpy(lengths).to(device))

    # ---------------------------------------------------------------------------------------------------------------- result

    def _put(self, buffers: dict[str, torch.Tensor], target: _Target, places: torch.Tensor, rows: torch.Tensor, length: int) -> None:
        """Copy rows to their places in the buffer of a variable, which is NaN where nothing came."""
        if target.name not in buffers:
            buffers[target.name] = torch.full((target.layers, length, rows.shape[1]), torch.nan, dtype=rows.dtype)
        buffer = buffers[target.name]
        if buffer.dtype != rows.dtype:  # a model may compute some layers in a higher precision than the others
            buffer = buffers[target.name] = buffer.to(torch.promote_types(buffer.dtype, rows.dtype))
        buffer[target.at].index_copy_(0, places, rows.to("cpu", buffer.dtype))

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem
        self._pass = None

    def arrays(self) -> dict[str, dict[str, torch.Tensor]]:
        """What was kept, by level and variable: (layer, token or prompt, width), without the axis of layers where a site has none."""
        flat = {site for site, layers in self.wish.layers_of.items() if layers == (None,)}
        tokens = {site: values[0] if site in flat else values for site, values in self._tokens.items()}
        names = {pooled_name(site, pooling, part) for site in flat for pooling in self.wish.poolings for part in self.wish.parts}
        return {"tokens": tokens, "prompts": {name: values[0] if name in names else values for name, values in self._prompts.items()}}


def _of(layer: int | None) -> str:
    return "" if layer is None else f" of layer {layer}"
