"""Repair: removes what is broken, keeps what is whole, and lists what to extract again. Plans on what a verification found, then acts.

The commit rule holds: the new part is complete before its commit replaces the old one, whose bytes are removed afterwards. Whenever it is
stopped, the store shows nothing wrong, and a second call completes it.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from lmprobe_zarr.batch import HASH_DIGITS, hashes_of, offsets_of, prompt_sha256
from lmprobe_zarr.display import progress_bar
from lmprobe_zarr.errors import CorruptPartError, PartGoneError
from lmprobe_zarr.storage import FileInfo, Storage
from lmprobe_zarr.store.format import (
    BLOCK_TABLE,
    CHUNK_TABLE,
    FORMAT,
    MADE_BY_WRITER,
    STAMPS,
    GroupInfo,
    Level,
    PartInfo,
    file_entry,
    level_document,
    replacement_name,
    root_document,
)
from lmprobe_zarr.store.parts import NO_LAYER, Catalog, Cell, Part, Salvaged, commit_key, salvage
from lmprobe_zarr.store.upkeep.compact import shape_key
from lmprobe_zarr.store.upkeep.gc import find_leftover
from lmprobe_zarr.store.upkeep.losses import LostColumn, LostValues, RepairSummary
from lmprobe_zarr.store.upkeep.removal import remove_part
from lmprobe_zarr.store.upkeep.rewrite import NewPart, split_part, write_again
from lmprobe_zarr.store.upkeep.tombstones import rows_over, write_tombstone
from lmprobe_zarr.store.upkeep.verify import FoundGroup, FoundPart, StoreScan, check_files, problems_of
from lmprobe_zarr.typing import Ints

__all__ = ["repair_root", "repair_store"]
# What a repair may act on; a file that cannot be read now may be whole.
BROKEN: Final = frozenset({"missing", "size", "content", "document"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _PartRepair:
    """What a repair does with one part.

    Parameters
    ----------
    found : FoundPart
    documents : mapping of str to bytes
        Files that are written again as they were.
    replacement : NewPart, optional
        The new part that replaces it. Without this and without documents, the part is removed.
    others : tuple of NewPart
        New parts for what `replacement` leaves out and is still readable.
    lost : mapping of Cell to ndarray of int
        Prompts of the part whose values are lost.
    columns : tuple of str
        Columns that are lost, with their level.
    salvaged : Salvaged, optional
        What is known of a part whose document is damaged.
    covered : bool
        Whether the parts that it was merged from are all there, and show again what it held.
    """

    found: FoundPart
    documents: Mapping[str, bytes] = field(default_factory=dict)
    salvaged: Salvaged | None = None
    covered: bool = False
    replacement: NewPart | None = None
    others: tuple[NewPart, ...] = ()
    lost: Mapping[Cell, Ints] = field(default_factory=dict)
    columns: tuple[str, ...] = ()

    @property
    def stays(self) -> bool:
        return bool(self.documents) or self.replacement is not None

    @property
    def own_columns(self) -> tuple[str, ...]:
        """The user's own columns of the part, by their keys."""
        if self.salvaged is not None:
            return self.salvaged.columns
        return () if self.found.part is None else tuple(self.found.part.info.own_columns)

    @property
    def info(self) -> PartInfo | None:
        """The part's record, or as much of it as is known."""
        if self.found.part is not None:
            return self.found.part.info
        return None if self.salvaged is None else self.salvaged.info

    @property
    def gone(self) -> Mapping[Cell, Ints]:
        """Prompts of the part whose values the part itself no longer has, whether or not another part has them."""
        info = self.info
        if info is None or self.documents or self.covered:
            return {}
        if self.replacement is None and not self.lost:
            return _all_cells(info) if self.salvaged is None else self.salvaged.cells
        return self.lost


def repair_store(scan: StoreScan, *, durable: bool, dry_run: bool) -> RepairSummary:
    """Remove what is broken from a store.

    Parameters
    ----------
    scan : StoreScan
        With the faults of its files, as `verify.check_files` finds them.
    durable : bool
        Flush what is written again before it is committed.
    dry_run : bool
        Only say what would be done.
    """
    storage = scan.storage
    documents: dict[str, bytes] = {}
    if scan.fault is not None and scan.fault.kind in BROKEN and _is_own_root(storage):
        documents["zarr.json"] = root_document()
    lost: list[LostValues] = []
    columns: list[LostColumn] = []
    unknown: list[str] = []
    planned: list[tuple[FoundGroup, GroupInfo, list[_PartRepair]]] = []
    for group in scan.groups:
        if group.info is None:
            continue
        if group.fault is not None and group.fault.kind in BROKEN:
            documents[f"{group.name}/zarr.json"] = group.info.to_document()
        repairs = _plan_group(storage, group)
        values, forgotten = _plan_lost(group, group.info, repairs)
        lost += values
        unknown += forgotten
        columns += [column for repair in repairs for column in _lost_columns(repair)]
        planned.append((group, group.info, repairs))
    every = [repair for _, _, repairs in planned for repair in repairs]
    parts = {repair.found.path for repair in every}
    summary = RepairSummary(
        url=storage.url,
        restored=(*documents, *(f"{repair.found.path}/{name}" for repair in every for name in repair.documents)),
        rewritten=tuple(repair.found.path for repair in every if repair.replacement is not None),
        dropped=tuple(repair.found.path for repair in every if not repair.stays),
        lost=tuple(lost),
        columns=tuple(columns),
        unknown=tuple(unknown),
        left=tuple(found for found in problems_of(scan) if found.file not in documents and found.part not in parts),
        dry_run=dry_run,
    )
    if not dry_run:
        for key, data in documents.items():
            storage.commit(key, data, durable=durable)
        for group, info, repairs in planned:
            _carry_out(storage, group, info, repairs, durable=durable)
    return summary


def _is_own_root(storage: Storage) -> bool:
    """Whether the root's document is damaged but ours, or missing: one of somebody else's is never overwritten."""
    try:
        data = storage.read_current("zarr.json")
        document = json.loads(data)
    except (FileNotFoundError, ValueError):
        return True
    except OSError:
        return False
    attributes = document.get("attributes") if isinstance(document, dict) else None
    ours = isinstance(attributes, dict) and attributes.get("format") == FORMAT
    return ours or len(data) == len(root_document())


def _lost_columns(repair: _PartRepair) -> Iterator[LostColumn]:
    if repair.info is not None:
        hashes = tuple(hashes_of(repair.info.digests).tolist())
        for column in repair.columns if repair.salvaged is None else repair.salvaged.columns:
            yield LostColumn(part=repair.found.path, column=column.partition("/")[2], hashes=hashes)


# ---------------------------------------------------------------------------------------------------------------- deciding


def _plan_group(storage: Storage, group: FoundGroup) -> list[_PartRepair]:
    """What is done with every part that has a fault."""
    repairs = []
    kept = {found.path: found.part for found in group.parts if found.part is not None}
    # The last first: what replaces a part sorts behind it, and decides whether it becomes visible again.
    for found in reversed(group.parts):
        kinds = {fault.kind for fault in (*found.faults.values(), *([] if found.fault is None else [found.fault]))}
        if not kinds or not kinds <= BROKEN or (found.part is None and not found.is_ours):
            continue
        if found.part is None:
            repairs.append(_PartRepair(found=found, salvaged=salvage(storage, found.path)))
            continue
        replaced = {name for path, part in kept.items() if path != found.path for name in part.info.replaces}
        is_replaced = found.part.info.name in replaced
        if is_replaced or _covered_by_replaced(found.part.info, group):
            repairs.append(_PartRepair(found=found, covered=not is_replaced))
        else:
            repairs.append(_plan_part(found, found.part))
        if not repairs[-1].stays:
            del kept[found.path]
    return repairs


def _covered_by_replaced(info: PartInfo, group: FoundGroup) -> bool:
    """Whether the parts that a broken one was merged from are still there, whole, and hold exactly what it holds.

    A part that was written to leave something out, by `delete` or `drop`, holds less than they do, and must go on replacing them.
    """
    old = [found for found in group.parts if found.path.rpartition("/")[2] in info.replaces]
    infos = [found.part.info for found in old if found.part is not None]
    if not old or len(infos) < len(old) or any(found.faults for found in old) or any(shape_key(each) != shape_key(info) for each in infos):
        return False
    return {row.tobytes() for each in infos for row in each.digests} == {row.tobytes() for row in info.digests}


def _plan_part(found: FoundPart, part: Part) -> _PartRepair:
    """What is kept of a part: everything but the broken chunks, to the prompt and the layer."""
    info = part.info
    broken = [name for name in found.faults if not name.endswith(("zarr.json", CHUNK_TABLE, BLOCK_TABLE))]
    if info.is_tombstone:
        # Its document says everything; the files beside it are written anew.
        return _PartRepair(found=found, replacement=NewPart(rows=np.arange(len(info.digests)), without=frozenset(), layers=None))
    if not broken:
        documents = {name: _document(part, name) for name in found.faults}
        made = {name: data for name, data in documents.items() if data is not None}
        if len(made) == len(found.faults) and all(file_entry(data, chunk=False) == tuple(info.files[name]) for name, data in made.items()):
            return _PartRepair(found=found, documents=made)
    arrays = {name.rpartition("/")[0] for name in broken}
    variables = set(info.activations)
    columns = arrays - variables - MADE_BY_WRITER
    own = set(info.own_columns)
    again: set[str] = set()
    if "tokens/position" in columns:
        if not info.arrays["tokens/position"].attributes.get("whole_prompts"):
            # It is unknown which tokens of its prompts the part holds.
            return _PartRepair(found=found, lost=_all_cells(info), columns=tuple(sorted(own)))
        again = {"tokens/position"}
    columns -= again
    lost: dict[Cell, Ints] = {}
    tables = {name.rpartition("/")[0] for name in found.faults if name.endswith((CHUNK_TABLE, BLOCK_TABLE))}
    for key in sorted((arrays | tables) & variables):
        lost |= {cell: gone for cell, gone in _broken_rows(part, key, broken, found.faults).items() if len(gone)}
    replacement, others = split_part(info, lost, columns=columns, made=again)
    return _PartRepair(found=found, replacement=replacement, others=others, lost=lost, columns=tuple(sorted(columns)))


def _broken_rows(part: Part, key: str, broken: Iterable[str], faults: Mapping[str, object]) -> dict[Cell, Ints]:
    """For every layer of a variable the prompts of which a value is lost."""
    info, array = part.info, part.info.arrays[key]
    stored = part.array("tokens" if key.startswith("tokens/") else "prompts", key.partition("/")[2])
    chunks = {name.rpartition("/")[2] for name in broken if name.rpartition("/")[0] == key}
    # Then a chunk may be whole, and nothing be left to find it by.
    is_table_damaged = bool({f"{key}/{CHUNK_TABLE}", f"{key}/{BLOCK_TABLE}"} & faults.keys())
    bounds = np.arange(len(info.digests) + 1) if info.n_tokens is None or key.startswith("prompts/") else offsets_of(info.n_tokens)
    found: dict[Cell, Ints] = {}
    for place, layer in enumerate(info.layers if array.layered else [NO_LAYER]):
        gone = np.zeros(len(info.digests), bool)
        for block in range(array.n_blocks):
            if not is_table_damaged and array.file_of(place, block) not in chunks:
                continue
            for rows in stored.damaged_rows(place, block):
                start, stop = block * array.rows_per_chunk + rows.start, block * array.rows_per_chunk + rows.stop
                gone |= (bounds[:-1] < stop) & (bounds[1:] > start)
        found[key, layer] = np.flatnonzero(gone)
    return found


def _all_cells(info: PartInfo) -> dict[Cell, Ints]:
    """All values of a part, in the form of lost ones."""
    every = np.arange(len(info.digests))
    return {(key, layer): every for key, array in info.activations.items() for layer in (info.layers if array.layered else (NO_LAYER,))}


def _document(part: Part, name: str) -> bytes | None:
    """A ``zarr.json`` or a table below a part, as the writer makes it; None for a table that cannot be made again."""
    folder, _, file = name.rpartition("/")
    if file in (CHUNK_TABLE, BLOCK_TABLE):
        return part.files_of(folder).remade_table(file)
    info = part.info
    level: Level = "tokens" if folder == "tokens" else "prompts"
    document = info.arrays[folder].to_document() if "/" in folder else level_document(info.variables(level), level)
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------------------ what is lost


def _plan_lost(group: FoundGroup, info: GroupInfo, repairs: Sequence[_PartRepair]) -> tuple[list[LostValues], list[str]]:
    """Values that were visible and are not any more, and the parts whose contents are unknown.

    What an earlier part still holds is lost too: somebody has replaced it, so it stays hidden.
    """
    by_path = {repair.found.path: repair for repair in repairs}
    staying = [kept.part for kept in group.parts if kept.part is not None and (kept.path not in by_path or by_path[kept.path].stays)]
    replaced = {name for part in staying for name in part.info.replaces}
    unknown = [repair.found.path for repair in reversed(repairs) if repair.info is None]
    digests: dict[bytes, bytes] = {}  # of each prompt by its hash, in the order of first appearance
    texts: dict[bytes, str] = {}
    losing: list[tuple[PartInfo, Mapping[Cell, Ints]]] = []
    for repair in reversed(repairs):
        held = repair.info
        if held is None or held.is_tombstone or held.name in replaced:
            continue
        texts |= {} if repair.salvaged is None else repair.salvaged.texts
        for row in held.digests:
            digests.setdefault(row.tobytes()[:_HASH_BYTES], row.tobytes())
        losing.append((held, repair.gone))
    columns = sorted({cell for _, cells in losing for cell in cells})
    noted = {
        key.partition("/")[2]: {name: array.attributes[name] for name in ("site_path", "over") if name in array.attributes}
        for held, _ in losing
        for key, array in held.arrays.items()
    }
    if not columns:
        return [], unknown
    place = {cell: j for j, cell in enumerate(columns)}
    row_of = {key: i for i, key in enumerate(digests)}
    missing = np.zeros((len(digests), len(columns)), bool)
    tokens = np.full(len(digests), -1, np.int64)
    keeping = [(part.info, by_path[part.path].lost if part.path in by_path else {}) for part in staying if part.info.kind == "part"]
    # From the first to the last, since the last wins: with what it holds, and with what is lost of it.
    timeline = [(held.name, held, cells, True) for held, cells in losing]
    timeline += [(held.name, held, gone, False) for held, gone in keeping if held.name not in replaced]
    for _, held, cells, is_lost in sorted(timeline, key=lambda step: (step[0], step[3])):
        at = np.array([row_of.get(row.tobytes()[:_HASH_BYTES], -1) for row in held.digests], np.int64)
        if is_lost:
            tokens[at] = -1 if held.n_tokens is None else held.n_tokens
            for cell, rows in cells.items():
                missing[at[rows], place[cell]] = True
            continue
        for cell in set(_all_cells(held)) & set(place):
            there = at >= 0
            there[cells.get(cell, np.zeros(0, np.int64))] = False
            if cell[0].startswith("tokens/") and held.n_tokens is not None:
                # Another number of tokens comes from another tokenisation, and those values are out of date.
                there &= (tokens[at] < 0) | (tokens[at] == held.n_tokens)
            missing[at[there], place[cell]] = False
    keys, whole = list(digests), list(digests.values())
    texts |= _read_texts(group, {keys[i] for i in np.flatnonzero(missing.any(axis=1))})
    found: dict[tuple[tuple[str, ...], tuple[int, ...]], list[int]] = {}
    kinds, codes = np.unique(missing, axis=0, return_inverse=True)
    for k, kind in enumerate(kinds):
        layers: dict[str, list[int]] = {}
        for j in np.flatnonzero(kind):
            name, layer = columns[j]
            layers.setdefault(name.partition("/")[2], []).extend([layer] if layer != NO_LAYER else [])
        alike = np.flatnonzero(codes.reshape(-1) == k).tolist()
        for some in sorted(set(map(tuple, layers.values()))):
            variables = tuple(sorted(name for name, numbers in layers.items() if tuple(numbers) == some))
            found.setdefault((variables, some), []).extend(alike)
    return [
        LostValues(
            model=info.model,
            group=group.name,
            variables=variables,
            layers=numbers,
            hashes=tuple(keys[i].hex() for i in sorted(which)),
            texts=tuple(_checked(texts.get(keys[i]), whole[i]) for i in sorted(which)),
            noted={name: noted[name] for name in variables if name in noted},
        )
        for (variables, numbers), which in found.items()
    ], unknown


_HASH_BYTES: Final = HASH_DIGITS // 2


def _read_texts(group: FoundGroup, wanted: set[bytes]) -> dict[bytes, str]:
    """Texts of prompts by their hashes, from any part that holds them, broken and replaced ones too."""
    found: dict[bytes, str] = {}
    for holder in group.parts:
        if holder.part is None or "prompts/text" not in holder.part.info.arrays:
            continue
        array = holder.part.array("prompts", "text")
        mine = [row.tobytes()[:_HASH_BYTES] for row in holder.part.info.digests]
        for block in range(array.info.n_blocks):
            start = block * array.info.rows_per_chunk
            some = [
                (row, key) for row, key in enumerate(mine[start : start + array.info.rows_per_chunk]) if key in wanted and key not in found
            ]
            if some:
                with suppress(CorruptPartError, PartGoneError):
                    texts = array.read_chunk(0, block)
                    found |= {key: texts[row] for row, key in some if texts[row]}
    return found


def _checked(text: str | None, digest: bytes) -> str | None:
    """The text, if its digest is that of the prompt; the stored text of a prompt that is no valid UTF-8 is not."""
    if text is None:
        return None
    whole = bytes.fromhex(prompt_sha256(text))
    unknown = not any(digest[_HASH_BYTES:])
    return text if whole == digest or (unknown and whole[:_HASH_BYTES] == digest[:_HASH_BYTES]) else None


# -------------------------------------------------------------------------------------------------------------- carrying out


def _carry_out(storage: Storage, group: FoundGroup, info: GroupInfo, repairs: Sequence[_PartRepair], *, durable: bool) -> None:
    # Replaced parts first: they must not become visible again when the part that replaces them is removed.
    gone: set[str] = set()
    # Then the earlier before the later: what is removed anyway need not be hidden.
    for repair in sorted(repairs, key=lambda repair: (not repair.found.replaced, repair.found.path.rpartition("/")[2])):
        part = repair.found.part
        for name, data in repair.documents.items():
            storage.commit(f"{repair.found.path}/{name}", data, durable=durable)
        if not repair.found.replaced:
            _hide(storage, group, info, repair, gone, durable=durable)
        if part is None:
            _remove_loose(storage, repair.found.path)
        else:
            if repair.replacement is not None:
                _rewrite(storage, info, part, repair.replacement, repair.others, durable=durable)
            if not repair.documents:
                remove_part(storage, part)
        if not repair.stays:
            gone.add(repair.found.path)


def _hide(storage: Storage, group: FoundGroup, info: GroupInfo, repair: _PartRepair, gone: Container[str], *, durable: bool) -> None:
    """Write tombstones over what a part had replaced and has lost, before the part itself is removed."""
    held = repair.info
    if held is None or repair.documents or repair.covered:
        return
    every = np.arange(len(held.digests))
    if held.is_tombstone:
        if repair.salvaged is not None:
            write_tombstone(storage, info, held, every, held.removed, durable=durable, replaces=False)
        return
    lower = [each.part for each in group.parts if each.part is not None and each.path not in gone and not each.replaced]
    lower = [part for part in lower if part.info.name < held.name and not part.info.is_tombstone]
    alike: dict[bytes, dict[str, set[int]]] = {}
    for (key, layer), rows in repair.gone.items():
        alike.setdefault(np.asarray(rows, np.int64).tobytes(), {}).setdefault(key, set()).add(layer)
    for column in (*repair.columns, *(() if repair.stays else repair.own_columns)):
        if column in held.own_columns or repair.salvaged is not None:
            alike.setdefault(every.tobytes(), {}).setdefault(column, set()).add(NO_LAYER)
    for data, cells in alike.items():
        rows = np.frombuffer(data, np.int64)
        removed = {key: None if NO_LAYER in layers else tuple(sorted(layers)) for key, layers in sorted(cells.items())}
        # Only a part that goes as a whole takes its number of tokens with it.
        counts = None if held.n_tokens is None or repair.stays else held.n_tokens[rows]
        some = replace(held, digests=held.digests[rows], n_tokens=counts)
        over = rows_over(some, removed, lower)
        if len(over):
            write_tombstone(storage, info, some, over, removed, durable=durable, replaces=False)


def _rewrite(storage: Storage, group: GroupInfo, part: Part, replacement: NewPart, others: Sequence[NewPart], *, durable: bool) -> None:
    """Write a part as several. The one that replaces it is committed last, with the first name: it holds all prompts in their order."""
    name = replacement_name(part.info.name)
    for other in others:
        write_again(
            storage, group, part, other.rows, durable=durable, without=other.without, layers=other.layers,
            name=replacement_name(name), replaces=False,
        )  # fmt: skip
    write_again(storage, group, part, replacement.rows, durable=durable, without=replacement.without, name=name)


def _remove_loose(storage: Storage, path: str) -> None:
    """Remove a part whose document is damaged: the signs of its commit, the document, then all files with names that our writer gives."""
    group, name = path.partition("/")[0], path.rpartition("/")[2]
    storage.remove([commit_key(group, name), f"{group}/{STAMPS}/{name}"])
    storage.remove([f"{path}/zarr.json"])
    left, _ = find_leftover(storage, path, FileInfo(is_file=False, nbytes=0, modified=None))
    storage.remove(left.files)
    storage.remove_folders(left.folders)


def repair_root(catalog: Catalog, scan: StoreScan, *, dry_run: bool, progress: bool) -> RepairSummary:
    """Check all files of one root, and remove what is broken; with `dry_run` only plan it.

    Parameters
    ----------
    catalog : Catalog
    scan : StoreScan
        Of this root, as `scan_store` gives it.
    dry_run : bool
        Only say what would be done.
    progress : bool
        Show a bar on terminals.
    """
    with progress_bar(scan.nbytes, description="verify", unit="B", enabled=progress) as advance:
        scan = check_files(scan, full=True, advance=advance)
    summary = repair_store(scan, durable=catalog.durable, dry_run=dry_run)
    if not dry_run:
        catalog.forget_all(damaged=True)
    return summary
