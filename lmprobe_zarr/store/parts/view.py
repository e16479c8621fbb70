"""`View`: the union of a group's committed parts at one moment. Says which part holds what; reads no activations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lmprobe_zarr.batch import HASH_DIGITS, given_prompts, hashes_of, is_hash, is_top_k, keys_of, offsets_of, prompt_sha256, rows_differ
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, MissingPromptsError, PromptCollisionError
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import LEVELS, PROMPT_COLUMNS, SAE, SAMPLE_DIM, ArrayInfo, GroupInfo, Level, is_variable
from lmprobe_zarr.store.parts.call_order import places_in_one_call
from lmprobe_zarr.store.parts.part import Part
from lmprobe_zarr.store.parts.variable import NOWHERE, VirtualArray
from lmprobe_zarr.typing import Ints, Mask

__all__ = ["View", "open_view"]


@dataclass(frozen=True, eq=False)
class View:
    """The union of a group's parts at one moment. A view that is opened later includes what was committed since.

    Parameters
    ----------
    storage : Storage
        The place that messages name, with those of the parts.
    group : GroupInfo
        Whose parts these are.
    parts, annotations : tuple of Part
        In their order, replaced ones left out. Tombstones are among the annotations.
    digests : ndarray of uint8, shape (prompt, 32)
        sha256 of every prompt: in the order of the call that wrote them, or in that of first appearance.
    members : tuple of ndarray of int64
        For each part and then each annotation: which prompt of the view each of its prompts is, −1 for none. Of a part it is −1 only where
        tombstones hide all of a prompt.
    keys : pandas.Index of uint64
        The first 16 digits of every digest, as a number, for looking prompts up.
    one_call : bool
        Whether all prompts were written by one call, or by calls with the same prompts in the same order, so that they are in the order in
        which these were given.
    """

    storage: Storage
    group: GroupInfo
    parts: tuple[Part, ...]
    annotations: tuple[Part, ...]
    digests: npt.NDArray[np.uint8]
    members: tuple[Ints, ...]
    keys: pd.Index[Any]
    one_call: bool = False

    def __len__(self) -> int:
        """Prompts in the view."""
        return len(self.digests)

    @property
    def where(self) -> str:
        """The group, as it is named in messages."""
        places = dict.fromkeys((*(part.storage.url for part in self.parts), self.storage.url))
        return " and ".join(f"{place}/{self.group.name}" for place in places)

    @property
    def hashes(self) -> npt.NDArray[np.str_]:
        """The 16-digit label of every prompt."""
        return hashes_of(self.digests)

    def layers(self, level: Level) -> tuple[int, ...]:
        """All layers that any part holds at a level."""
        return tuple(sorted({i for part in self.parts if f"{level}/layer" in part.info.arrays for i in part.info.layers}))

    def all_layers(self) -> tuple[int, ...]:
        """All layers that any part holds at any level."""
        return tuple(sorted({layer for level in LEVELS for layer in self.layers(level)}))

    def variables(self, level: Level) -> dict[str, ArrayInfo]:
        """Activation variables of a level, as the last part has them; without columns."""
        found: dict[str, ArrayInfo] = {}
        for part in self.parts:
            found |= {name: a for name, a in part.info.variables(level).items() if is_variable(name, a)}
        return dict(sorted(found.items()))

    def stored_dtypes(self, level: Level, name: str) -> list[str]:
        """The dtypes with which its parts hold an activation variable, sorted."""
        held = [part.info.variables(level).get(name) for part in self.parts]
        return sorted({str(a.attributes.get("stored_dtype", a.dtype)) for a in held if a is not None})

    def columns(self, level: Level) -> dict[str, ArrayInfo]:
        """Columns of a level, the format's own and the user's."""
        found: dict[str, ArrayInfo] = {}
        for part in (*self.parts, *(self.annotations if level == "prompts" else ())):
            held = part.info.variables(level).items()
            found |= {name: a for name, a in held if a.dims == (SAMPLE_DIM[level],) and not is_variable(name, a)}
        return dict(sorted(found.items()))

    def pooled_by(self, column: str) -> dict[str, ArrayInfo]:
        """The variables that are pooled over the characters that a column names for each prompt."""
        span = json.dumps({"span": {"column": column}})[1:-1]
        return {name: info for name, info in self.variables("prompts").items() if span in str(info.attributes.get("over", ""))}

    def column_parts(self, name: str) -> list[ArrayInfo]:
        """What each part and annotation holds of a column of prompts, in their order; empty where there is no such column."""
        owners = sorted((*self.parts, *self.annotations), key=lambda owner: owner.order)
        return [owner.info.arrays[f"prompts/{name}"] for owner in owners if f"prompts/{name}" in owner.info.arrays]

    def find(self, digests: Sequence[str]) -> Ints:
        """Which prompt of the view each whole digest is; −1 for none.

        Raises
        ------
        PromptCollisionError
            A stored prompt has the same 16 digits but another digest.
        """
        wanted = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
        rows = self._find_keys(keys_of(wanted))
        found = rows >= 0
        differ = rows_differ(self.digests[rows[found]], wanted[found])
        if differ.any():
            shared = hashes_of(wanted[found][differ][:1])[0]
            raise PromptCollisionError(
                f"a stored prompt and a given one share the hash {shared} but differ, so they cannot be in one group: "
                "change one of them by a blank, or write it with another provenance"
            )
        return rows

    def _find_keys(self, keys: npt.NDArray[np.uint64]) -> Ints:
        return np.asarray(self.keys.get_indexer(pd.Index(keys)), np.int64)

    def select(self, prompts: Iterable[Any]) -> Ints:
        """The numbers of prompts in the view, in the given order, repeats included.

        Parameters
        ----------
        prompts : iterable of str or sequence of int
            Texts, hashes of 16 digits, or token ids. A text that looks like a hash is one only where no prompt has that text.

        Raises
        ------
        MissingPromptsError
            Some are not in the view; the first few are named.
        """
        if isinstance(prompts, str):
            raise InvalidArgumentError("prompts is one text: give a list of texts, hashes or token ids")
        listed = given_prompts(prompts)
        rows = self.find([prompt_sha256(p) for p in listed]) if listed else np.zeros(0, np.int64)
        absent = np.flatnonzero(rows < 0)
        labels = [str(listed[i]) for i in absent]
        as_hash = [j for j, label in enumerate(labels) if is_hash(label)]
        if as_hash:
            rows[absent[as_hash]] = self._find_keys(np.array([int(labels[j], 16) for j in as_hash], np.uint64))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            shown = ", ".join(f"number {i} ({str(listed[i])[:40]!r})" for i in missing[:3])
            raise MissingPromptsError(f"{len(missing)} of {len(listed)} prompts are not in {self.where}: {shown}; extract them first")
        return rows

    def source(
        self, level: Level, name: str, rows: Ints, layers: tuple[int, ...], lengths: Ints | None = None, *, widened: bool = False
    ) -> VirtualArray:
        """One variable or column of the view, over some of its prompts.

        Parameters
        ----------
        level : {"prompts", "tokens"}
            The level that holds it.
        name : str
            Its name.
        rows : ndarray of int
            Prompts of the view, in the wanted order.
        layers : tuple of int
            Wanted layers.
        lengths : ndarray of int, shape (len(rows),), optional
            For tokens: rows of each prompt. Where a later part has another number of them, earlier parts are out of date for that prompt.
        widened : bool
            Whether float16 is read as float32; by default values are read as they are stored.
        """
        key = f"{level}/{name}"
        owners = self.owners
        order = [part.order for part in owners]
        # The last wins, whether it is a part or an annotation; a tombstone wins with nothing.
        holding = sorted((i for i, part in enumerate(owners) if key in part.info.arrays or key in part.info.removed), key=order.__getitem__)
        real = [i for i in holding if key in owners[i].info.arrays]
        arrays = tuple(owners[i].array(level, name) for i in real)
        layered = arrays[0].info.layered
        shapes = sorted({a.info.row_shape for a in arrays})
        if len({a.info.layered for a in arrays}) > 1 or (len(shapes) > 1 and not is_top_k(name)):
            raise CorruptPartError(f"the parts of {self.where} disagree on the shape of {name!r}: {shapes}")
        if len({a.info.attributes.get(SAE) for a in arrays}) > 1:
            raise InvalidArgumentError(
                f"the parts of {self.where} hold {name!r} of different autoencoders, as two calls at the same time leave it: remove it, "
                f"store.drop(…, [{name!r}]), and encode it again"
            )
        if len(named := sorted({str([a.info.attributes.get(key, "") for key in ("site_path", "over")]) for a in arrays})) > 1:
            raise InvalidArgumentError(
                f"the parts of {self.where} hold {name!r} of different modules or tokens ({', '.join(named)}), as two calls at the same "
                f"time leave it: remove it, store.drop(…, [{name!r}]), and extract it again"
            )
        if layered and not layers:
            raise CorruptPartError(f"the parts of {self.where} hold {name!r} by layer, which it never is")
        places = np.zeros((len(holding), 1), np.int32)
        if layered:
            places = np.array([[_place(_layers_of(owners[i], key), layer) for layer in layers] for i in holding], np.int32).reshape(
                -1, len(layers)
            )
        held, classes = np.unique(places >= 0, axis=1, return_inverse=True)
        source = np.full((held.shape[1], len(self)), NOWHERE, np.int32)
        start = np.zeros((held.shape[1], len(self)), np.int64)
        since, ranks = (self._tokens_since(), self._ranks()) if level == "tokens" else (None, {})
        number = {i: j for j, i in enumerate(real)}
        for c in range(held.shape[1]):
            for j in np.flatnonzero(held[:, c]):
                owner, member = owners[holding[j]], self.members[holding[j]]
                valid, first = member >= 0, np.arange(len(member))
                if since is not None and owner.info.n_tokens is not None and not owner.info.is_tombstone:
                    valid[valid] = ranks[holding[j]] >= since[member[valid]]
                    first = offsets_of(owner.info.n_tokens)[:-1]
                source[c, member[valid]] = number.get(holding[j], NOWHERE)
                start[c, member[valid]] = first[valid]
        offsets = None if lengths is None else offsets_of(lengths)
        return VirtualArray(
            arrays=arrays,
            layers=layers if layered else None,
            layer_rows=places[[j for j, i in enumerate(holding) if i in number]],
            classes=np.asarray(classes, np.int64).reshape(-1),
            source=source[:, rows],
            start=start[:, rows],
            offsets=offsets,
            absent_as_nan=level == "prompts" and name not in PROMPT_COLUMNS and not is_variable(name, arrays[0].info),
            widened=widened,
        )

    def layers_with(self, level: Level, name: str) -> tuple[int, ...]:
        """The layers that a variable is stored in for some prompt, of those of its level; empty for a variable without layers."""
        return self.source(level, name, np.zeros(0, np.int64), self.layers(level)).held_layers

    def locate(self, prompt: Any) -> int | None:
        """The number of the prompt with this text, hash or token ids; None where there is none."""
        try:
            return int(self.select([prompt])[0])
        except MissingPromptsError:
            return None

    def row_lengths(self, level: Level, name: str, rows: Ints) -> Ints:
        """How many values each prompt has in a variable without layers, since parts may keep different numbers of the largest logits.

        All these prompts must have the variable.
        """
        array = self.source(level, name, rows, ())
        widths: Ints = np.array([stored.info.row_shape[-1] for stored in array.arrays], np.int64)
        return np.asarray(widths[array.source[0]])

    @property
    def holds_whole_prompts(self) -> bool:
        """Whether every part that keeps tokens keeps all tokens of its prompts, so that they can be pooled."""
        positions = [part.info.arrays["tokens/position"] for part in self.parts if part.info.n_tokens is not None]
        return all(info.attributes.get("whole_prompts") for info in positions)

    def parts_with(self, rows: Ints) -> list[Part]:
        """Parts and annotations that hold any of these prompts."""
        wanted = np.zeros(len(self) + 1, bool)  # the last place stands for −1, no prompt of the view
        wanted[rows] = True
        wanted[-1] = False
        return [part for part, member in zip((*self.parts, *self.annotations), self.members, strict=True) if wanted[member].any()]

    def token_counts(self) -> Ints:
        """Token rows of each prompt, 0 where none are kept: those of the last part that keeps any."""
        counts = np.zeros(len(self), np.int64)
        since, ranks = self._tokens_since(), self._ranks()
        for place, (part, member) in enumerate(zip(self.parts, self.members, strict=False)):
            if part.info.n_tokens is not None:
                there = member >= 0
                there[there] = ranks[place] >= since[member[there]]  # not where a later tombstone had another number
                counts[member[there]] = part.info.n_tokens[there]
        return counts

    def _tokens_since(self) -> Ints:
        """For each prompt the first part or tombstone, by its place in their order, from which on all agree on its number of tokens.

        Earlier parts split the prompt into other tokens, and are out of date for it.
        """
        counts, since = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
        owners = self.owners
        for i, place in self._ranks().items():
            held, member = owners[i].info.n_tokens, self.members[i]
            if held is not None:
                there = member >= 0
                rows, now = member[there], held[there]
                since[rows[counts[rows] != now]] = place
                counts[rows] = now
        return since

    @property
    def owners(self) -> tuple[Part, ...]:
        """Parts and then annotations, as `members` has them."""
        return (*self.parts, *self.annotations)

    def _ranks(self) -> dict[int, int]:
        """The place of each part and annotation, by its number, in the order in which they win; ascending."""
        order = [part.order for part in self.owners]
        return {i: place for place, i in enumerate(sorted(range(len(order)), key=order.__getitem__))}

    def covers(self, level: Level, name: str, rows: Ints, layers: tuple[int, ...]) -> Mask:
        """Whether a variable is stored, shape (layer, prompt); one row for a variable without layers."""
        if name not in (*self.variables(level), *self.columns(level)):
            return np.zeros((max(1, len(layers)), len(rows)), bool)
        array = self.source(level, name, rows, layers)
        there: Mask = (array.source != NOWHERE)[array.classes]
        return there if array.layers is not None else there[:1]


def _place(layers: tuple[int, ...], layer: int) -> int:
    return layers.index(layer) if layer in layers else NOWHERE


def _layers_of(part: Part, key: str) -> tuple[int, ...]:
    return part.info.removed.get(key) or () if part.info.is_tombstone else part.info.layers


def open_view(
    storage: Storage, group: GroupInfo, parts: Sequence[Part], annotations: Sequence[Part], *, in_call_order: bool = False
) -> View:
    """The union of parts and annotations, given in their order.

    With `in_call_order`, the prompts of one call are in its order, whatever order its parts have. Otherwise they are in the order of first
    appearance, so that those of a single part are numbered as in the part.

    Raises
    ------
    PromptCollisionError
        Two different prompts of the group share a hash.
    """
    # A root replaces only its own parts: what another root copied from it, and has replaced since, is still stored here.
    replaced = {(part.rank, name) for part in (*parts, *annotations) for name in part.info.replaces}
    shown = tuple(part for part in parts if part.order not in replaced)
    noted = tuple(part for part in annotations if part.order not in replaced)
    # Parts and annotations in their order decide together which column is the last; see `View.source`.
    bounds = offsets_of([len(part.info.digests) for part in shown])
    hashes = np.concatenate([np.zeros(0, np.uint64), *(keys_of(part.info.digests) for part in shown)])
    # Mostly no prompt is in two parts. Sorting shows that in less time than a hash table takes, and then each prompt is its own first.
    codes, first = (np.arange(len(hashes), dtype=np.int64), None) if _all_differ(hashes) else _first_appearance(hashes)
    del hashes  # of ten million prompts, each of these arrays is 80 MB
    places = places_in_one_call([part.info for part in shown])
    one_call = places is not None
    if in_call_order and places is not None and len(codes):
        # The place of every prompt, which is the same in each part that holds it.
        codes, first = _reordered(np.concatenate(places), codes, first)
    del places
    members = [codes[a:b] for a, b in itertools.pairwise(bounds)]
    if first is None:
        digests = np.empty((len(codes), 32), np.uint8)
        # As one value each: rows of bytes are set one by one.
        slots = digests.view("V32").reshape(-1)
        for part, member in zip(shown, members, strict=True):
            slots[member] = np.ascontiguousarray(part.info.digests).view("V32").reshape(-1)
    else:
        digests = _merged_digests(shown, codes, first, f"{storage.url}/{group.name}")
    keys: pd.Index[Any] = pd.Index(keys_of(digests))
    for note in noted:
        rows = np.asarray(keys.get_indexer(pd.Index(keys_of(note.info.digests))), np.int64)
        if rows_differ(digests[rows[rows >= 0]], note.info.digests[rows >= 0]).any():
            raise PromptCollisionError(
                f"the annotation {note.info.name} of {storage.url}/{group.name} is of another prompt with the same hash"
            )
        members.append(rows)
    view = View(storage, group, shown, noted, digests, tuple(members), keys, one_call=one_call)
    return _without_removed(view) if any(note.info.is_tombstone for note in noted) else view


def _without_removed(view: View) -> View:
    """The view without prompts of which tombstones hide every value."""
    here = [member for note, member in zip(view.annotations, view.members[len(view.parts) :], strict=True) if note.info.is_tombstone]
    rows = np.unique(np.concatenate(here))
    rows = rows[rows >= 0]
    left = np.zeros(len(rows), bool)
    for level in LEVELS:
        layers = view.layers(level)
        for name in view.variables(level):
            left |= view.covers(level, name, rows, layers).any(axis=0)
    if left.all():
        return view
    stays = np.ones(len(view), bool)
    stays[rows[~left]] = False
    new = np.where(stays, np.cumsum(stays) - 1, -1)
    members = tuple(np.where(member >= 0, new[member], -1) for member in view.members)
    return replace(view, digests=view.digests[stays], members=members, keys=view.keys[stays])


def _all_differ(keys: npt.NDArray[np.uint64]) -> bool:
    """Whether no key is there twice."""
    ascending = np.sort(keys)
    return not bool((ascending[1:] == ascending[:-1]).any())


def _merged_digests(shown: Sequence[Part], codes: Ints, first: Ints, where: str) -> npt.NDArray[np.uint8]:
    """The digest of each prompt, the whole one where any part has it; `PromptCollisionError` where two prompts share a hash."""
    every = np.concatenate([part.info.digests for part in shown])
    out = every[first]
    whole = every[:, HASH_DIGITS // 2 :].any(axis=1)
    out[codes[whole]] = every[whole]
    differ = rows_differ(out[codes], every)
    if differ.any():
        shared = hashes_of(every[differ][:1])[0]
        raise PromptCollisionError(
            f"two different prompts in {where} share the hash {shared}: delete it there, and write one of them again"
        )
    return out


def _reordered(places: Ints, codes: Ints, first: Ints | None) -> tuple[Ints, Ints | None]:
    """Codes and first appearances of prompts in the order of their places; without first appearances where each prompt is there once."""
    if first is None and (places[1:] > places[:-1]).all():
        return codes, None
    order = np.argsort(places if first is None else places[first], kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return (number, None) if first is None else (number[codes], first[order])


def _first_appearance(keys: npt.NDArray[np.uint64]) -> tuple[Ints, Ints]:
    codes, uniques = pd.factorize(keys)
    first = np.full(len(uniques), len(keys), np.int64)
    np.minimum.at(first, codes, np.arange(len(keys)))
    return codes.astype(np.int64), first
