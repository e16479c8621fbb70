"""Compares what is stored with what was committed. Reads everything afresh, and never writes.

Two steps: `scan_store` reads the documents and lists what there is; `check_files` compares the files of every part with the table that the
part was committed with. `problems_of` turns what they found into records, and `repair` acts on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import SCALARS, count_odd
from lmprobe_zarr.display import progress_bar
from lmprobe_zarr.errors import CorruptPartError, LmprobeZarrError, PartGoneError, UnsupportedVersionError
from lmprobe_zarr.storage import Storage, run_all
from lmprobe_zarr.store.format import (
    ANNOTATIONS,
    BLOCK_TABLE,
    CHUNK_TABLE,
    COMMITS,
    GROUP_NAME,
    LEVELS,
    MADE_BY_WRITER,
    PART_NAME,
    STAMPS,
    GroupInfo,
    PartInfo,
    Published,
    check_table,
    is_intact,
    is_variable,
    parse_group,
    parse_part,
    parse_part_group,
    parse_root,
    published_document,
    root_document,
)
from lmprobe_zarr.store.parts import FrozenStorage, Part, find_lost
from lmprobe_zarr.store.upkeep.problems import OddValues, Problem, ProblemKind, VerifySummary
from lmprobe_zarr.typing import Buffer

__all__ = [
    "Fault",
    "FoundGroup",
    "FoundPart",
    "StoreScan",
    "check_files",
    "problems_of",
    "scan_store",
    "verify_scans",
    "verify_stores",
]
_SHARDS_AT_A_TIME: Final = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one file."""

    kind: ProblemKind
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPart:
    """A folder that holds a part's commit, or should.

    Parameters
    ----------
    path : str
        Its key below the root.
    part : Part, optional
        What the commit says; None where the commit is damaged.
    fault : Fault, optional
        In that case: what is wrong with the commit.
    faults : mapping of str to Fault
        What is wrong with the other files, by their keys below the part.
    replaced : bool
        Whether another part replaces it.
    """

    path: str
    part: Part | None
    fault: Fault | None = None
    faults: Mapping[str, Fault] = field(default_factory=dict)
    replaced: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether the folder has a name that only we give."""
        return PART_NAME.fullmatch(self.path.rpartition("/")[2]) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundGroup:
    """A group's folder.

    Parameters
    ----------
    name : str
    info : GroupInfo, optional
        What its document says, or, where that is damaged or gone, what its parts say of it; None where neither says anything.
    fault : Fault, optional
        What is wrong with its document.
    parts : tuple of FoundPart
        Parts and annotations in the order of their names.
    unfinished : tuple of str
        Keys of folders with a part's name but without a commit.
    """

    name: str
    info: GroupInfo | None
    fault: Fault | None
    parts: tuple[FoundPart, ...]
    unfinished: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreScan:
    """What is stored below one root.

    Parameters
    ----------
    storage : Storage
    fault : Fault, optional
        What is wrong with the root's document.
    groups : tuple of FoundGroup
    """

    storage: Storage
    fault: Fault | None
    groups: tuple[FoundGroup, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files, by the tables of the commits."""
        return sum(_part_bytes(found.part.info) for group in self.groups for found in group.parts if found.part is not None)


def _part_bytes(info: PartInfo) -> int:
    return info.files_nbytes


# --------------------------------------------------------------------------------------------------------------- documents


def scan_store(storage: Storage, choose: Callable[[GroupInfo], bool] = lambda _: True) -> StoreScan:
    """Read all documents of a store. One list per group, one more where it has annotations, and one read per document.

    Parameters
    ----------
    storage : Storage
    choose : callable
        Which groups; a group whose model is unknown is always scanned.

    Raises
    ------
    AccessDeniedError, UnreachableError
        The place refuses or does not answer, which says nothing about what is stored there.
    """
    frozen = isinstance(storage, FrozenStorage)
    groups = []
    documents: dict[str, bytes] = {}
    for name in storage.list(""):
        if GROUP_NAME.fullmatch(name):
            group = _scan_group(storage, name, choose, frozen, documents)
            if group is not None:
                groups.append(group)
    return StoreScan(storage=storage, fault=_root_fault(storage, groups), groups=tuple(groups))


def _read(storage: Storage, key: str, *, current: bool = False) -> tuple[bytes | None, Fault | None]:
    """A document, or what keeps it from being read; `current` as in `Storage.read_current`."""
    try:
        return (storage.read_current(key) if current else storage.read(key)), None
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, LmprobeZarrError):
            raise
        return None, Fault("missing", "is missing")
    except IsADirectoryError:
        return None, Fault("document", "is a folder")
    except OSError as error:
        if isinstance(error, LmprobeZarrError):
            raise
        return None, Fault("unreadable", f"cannot be read ({error.strerror or error})")


def _scan_group(
    storage: Storage, name: str, choose: Callable[[GroupInfo], bool], frozen: bool, documents: dict[str, bytes]
) -> FoundGroup | None:
    data, fault = _read(storage, f"{name}/zarr.json")
    info = None
    if data is not None:
        info, fault = _parse_group(data, name)
    if info is not None and not choose(info):
        return None
    names = storage.list(name)
    folders = [name, *([f"{name}/{ANNOTATIONS}"] if ANNOTATIONS in names else [])]
    paths = [
        f"{folder}/{entry}"
        for folder in folders
        for entry in (names if folder == name else storage.list(folder))
        if entry not in ("zarr.json", ANNOTATIONS) and not entry.startswith(".")
    ]
    found: dict[str, FoundPart | None] = {}

    def scan(path: str) -> None:
        found[path] = _scan_part(storage, path, frozen, documents)

    run_all([partial(scan, path) for path in paths], storage.pace)
    if not frozen and {COMMITS, STAMPS} & set(names):
        _find_lost(storage, name, found)
    parts = sorted((each for each in found.values() if each is not None), key=lambda each: each.path.rpartition("/")[2])
    if fault is not None and fault.kind == "missing" and not parts:
        return None  # cleared, or about to be made
    replaced = {old for each in parts if each.part is not None for old in each.part.info.replaces}
    parts = [replace(each, replaced=each.path.rpartition("/")[2] in replaced) for each in parts]
    unfinished = tuple(path for path in paths if found[path] is None and PART_NAME.fullmatch(path.rpartition("/")[2]))
    if info is None:
        info = _group_from_parts(name, [documents[each.path] for each in parts if each.part is not None])
        if info is not None and not choose(info):
            return None
    return FoundGroup(name=name, info=info, fault=fault, parts=tuple(parts), unfinished=unfinished)


def _find_lost(storage: Storage, group: str, found: dict[str, FoundPart | None]) -> None:
    """Add the parts without a commit that had one. A stamp of use is a sign of that too: only what is committed is read."""
    without = [path for path, each in found.items() if each is None and PART_NAME.fullmatch(path.rpartition("/")[2])]
    stamps = set(storage.list(f"{group}/{STAMPS}")) if without else set()
    read = {path for path in without if path.rpartition("/")[2] in stamps and storage.list(path)}
    for path in {*read, *find_lost(storage, without)}:
        fault = Fault("missing", "is missing, although the part was committed: something else than this package deleted it")
        found[path] = FoundPart(path=path, part=None, fault=fault)


def _parse_group(data: bytes, name: str) -> tuple[GroupInfo | None, Fault | None]:
    try:
        info = parse_group(data, name)
    except UnsupportedVersionError as error:
        return None, Fault("version", _shorter(error, name))
    except CorruptPartError as error:
        return None, Fault("document", _shorter(error, name))
    if info.name != name:
        return None, Fault("document", f"is that of {info.name}: it was changed, or the folder renamed or copied")
    if json.loads(data) != json.loads(info.to_document()):
        return info, Fault("document", "is not as it was written")
    return info, None


def _group_from_parts(name: str, documents: Sequence[bytes]) -> GroupInfo | None:
    for data in documents:
        info = parse_part_group(data)
        if info is not None and info.name == name:
            return info
    return None


def _scan_part(storage: Storage, path: str, frozen: bool, documents: dict[str, bytes]) -> FoundPart | None:
    """A part by its document; None where there is none."""
    data, fault = _read(storage, f"{path}/zarr.json")
    if data is None:
        # A published copy lists its parts: one that is missing there is damage.
        missing = fault is not None and fault.kind == "missing"
        return None if missing and not frozen else FoundPart(path=path, part=None, fault=fault)
    try:
        info = parse_part(data, path)
        check_table(info.files)
        folder = f"{info.group}/{ANNOTATIONS}" if info.kind == "annotation" else info.group
        if path != f"{folder}/{info.name}":
            what = f"is that of {folder}/{info.name}: it was exchanged, or the folder renamed, moved or copied"
            return FoundPart(path=path, part=None, fault=Fault("document", what))
    except UnsupportedVersionError as error:
        return FoundPart(path=path, part=None, fault=Fault("version", _shorter(error, path)))
    except CorruptPartError as error:
        return FoundPart(path=path, part=None, fault=Fault("document", _shorter(error, path)))
    documents[path] = data
    return FoundPart(path=path, part=Part(storage, path, info, len(data)))


def _shorter(error: Exception, path: str) -> str:
    """An error's first line without the place that it names, and without its own advice."""
    line = str(error).splitlines()[0].removeprefix(f"{path}/zarr.json ").removeprefix(f"{path} ")
    return line.partition("): none of")[0] + (")" if "): none of" in line else "")


def _root_fault(storage: Storage, groups: Sequence[FoundGroup]) -> Fault | None:
    data, fault = _read(storage, "zarr.json", current=True)
    if data is None:
        # A place where nothing has been written yet has no root either.
        return fault if groups or (fault is not None and fault.kind != "missing") else None
    published: Published | None = storage.published if isinstance(storage, FrozenStorage) else None
    try:
        if parse_root(data, storage.url) != published:
            return Fault("document", "says something else than when the store was opened")
    except UnsupportedVersionError as error:
        return Fault("version", _shorter(error, storage.url))
    except (LmprobeZarrError, ValueError) as error:
        return Fault("document", f"is not that of a store ({type(error).__name__})")
    expected: bytes | None = root_document()
    if published is not None:
        expected = _published_root(published, groups)
    if expected is not None and json.loads(data) != json.loads(expected):
        return Fault("document", "does not agree with the parts below it" if published is not None else "is not as it was written")
    return None


def _published_root(published: Published, groups: Sequence[FoundGroup]) -> bytes | None:
    """What the root of a published copy must say; None where not all that it names can be read."""
    infos = {group.name: group.info for group in groups if group.info is not None and group.fault is None}
    parts = {each.path: each.part.info for group in groups for each in group.parts if each.part is not None}
    order = [f"{name}/{key}" for name, keys in published.groups.items() for key in keys]
    if set(infos) != set(published.groups) or set(order) != set(parts):
        return None
    return published_document(published, {name: infos[name] for name in published.groups}, {key: parts[key] for key in order})


# ------------------------------------------------------------------------------------------------------------------- files


def check_files(scan: StoreScan, *, full: bool, advance: Callable[[int], None] = lambda _: None) -> StoreScan:
    """The same scan with the faults of the files of its parts. Goes part by part, with one file per thread in memory.

    Parameters
    ----------
    scan : StoreScan
    full : bool
        Read every file and compare its checksum; otherwise compare only sizes, with one list request per part where the storage can do
        that.
    advance : callable
        Called with the number of bytes that were dealt with.
    """
    check = _checksums if full else _sizes
    groups = []
    for group in scan.groups:
        parts = []
        for found in group.parts:
            if found.part is not None:
                # A part that was removed meanwhile, by eviction or a compaction, is no damage.
                try:
                    faults = check(scan.storage, found.part)
                except PartGoneError:
                    continue
                if any(f.kind == "missing" for f in faults.values()) and not scan.storage.is_file(f"{found.path}/zarr.json"):
                    continue
                found = replace(found, faults=faults)
                advance(_part_bytes(found.part.info) if found.part is not None else 0)
            parts.append(found)
        groups.append(replace(group, parts=tuple(parts)))
    return replace(scan, groups=tuple(groups))


def _sizes(storage: Storage, part: Part) -> dict[str, Fault]:
    faults: dict[str, Fault | None] = {}
    wanted: dict[str, int | None] = {name: int(entry[0]) for name, entry in part.info.files.items()}
    for key in part.info.tables or ():
        array = part.files_of(key)
        try:
            wanted |= {f"{key}/{name}": nbytes for name, nbytes in array.file_sizes().items()}
        except CorruptPartError as error:
            # Nobody knows the lengths of the chunks now, only which there should be.
            wanted |= dict.fromkeys((f"{key}/{name}" for name in array.info.file_names()), None)
            faults[f"{key}/{CHUNK_TABLE}"] = Fault("content", _shorter(error, part.path))
    there = storage.sizes(part.path, wanted)
    for name, nbytes in wanted.items():
        fault = _size_fault(there.get(name), nbytes)
        faults[name] = fault or faults.get(name)
    return {name: fault for name, fault in sorted(faults.items()) if fault is not None}


def _size_fault(there: int | None, wanted: int | None) -> Fault | None:
    if there is None:
        return Fault("missing", "is missing")
    return None if wanted is None or there == wanted else Fault("size", f"has {there} bytes instead of {wanted}")


def _checksums(storage: Storage, part: Part) -> dict[str, Fault]:
    faults: dict[str, Fault] = {}

    def check(name: str, is_whole: Callable[[Buffer], bool], nbytes: int | None) -> None:
        fault = _file_fault(storage, f"{part.path}/{name}", is_whole, nbytes)
        if fault is not None:
            faults[name] = fault

    jobs = [partial(check, name, partial(is_intact, name, entry=entry), int(entry[0])) for name, entry in part.info.files.items()]
    shards: list[Callable[[], None]] = []
    for key in part.info.tables or ():
        array = part.files_of(key)
        sizes: dict[str, int] = {}
        with suppress(CorruptPartError):
            sizes = array.file_sizes()
        found = [partial(check, f"{key}/{file}", partial(array.is_intact, file), sizes.get(file)) for file in array.info.file_names()]
        (shards if array.info.shard_blocks else jobs).extend(found)
    run_all(jobs, storage.pace)
    # Each is held in memory, and may have hundreds of MiB.
    for each in range(0, len(shards), _SHARDS_AT_A_TIME):
        run_all(shards[each : each + _SHARDS_AT_A_TIME], storage.pace)
    return dict(sorted(faults.items()))


def _file_fault(storage: Storage, key: str, is_whole: Callable[[Buffer], bool], nbytes: int | None) -> Fault | None:
    try:
        data: Buffer = storage.read_view(key)
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, LmprobeZarrError):
            raise
        return Fault("missing", "is missing")
    except IsADirectoryError:
        return Fault("missing", "is a folder")
    except OSError as error:
        if isinstance(error, LmprobeZarrError):
            raise
        return Fault("unreadable", f"cannot be read ({error.strerror or error})")
    if nbytes is not None and len(data) != nbytes:
        return _size_fault(len(data), nbytes)
    return None if is_whole(data) else Fault("content", "does not hold the checksum that it was committed with")


# ------------------------------------------------------------------------------------------------------------------ summary


def problems_of(scan: StoreScan) -> Iterator[Problem]:
    """Everything that is wrong, with what to do.

    Where later parts hold every value of a damaged one, nothing is lost, and the advice says so: as after an extraction with `refresh`.
    """
    url, frozen = scan.storage.url, isinstance(scan.storage, FrozenStorage)

    def problem(part: str, variable: str, file: str, fault: Fault, advice: str) -> Problem:
        if fault.kind == "unreadable":
            advice = "check permissions and the disk; where it is lost, delete it"
        elif fault.kind == "version":
            advice = "upgrade lmprobe-zarr; where no newer release has written here, it is damaged"
        elif frozen:
            advice = "a published copy is not repaired: fetch or publish it again"
        return Problem(url=url, part=part, variable=variable, file=file, kind=fault.kind, what=fault.what, advice=advice)

    if scan.fault is not None:
        yield problem("", "", "zarr.json", scan.fault, "repair() writes it again")
    for group in scan.groups:
        if group.fault is not None:
            known = (
                "repair() writes it again" if group.info is not None else "extract any prompt of that model after repair(), or restore it"
            )
            yield problem(group.name, "", f"{group.name}/zarr.json", group.fault, known)
        for found in group.parts:
            if found.fault is not None:
                advice = (
                    "repair() removes the part and lists what to extract again" if found.is_ours else "it is none of ours: move it away"
                )
                yield problem(found.path, "", f"{found.path}/zarr.json", found.fault, advice)
            for name, fault in found.faults.items():
                variable = name.rpartition("/")[0] if "/" in name.rpartition("/")[0] else ""
                advice = _advice(found, name, variable, is_held_later=_held_later(group, found, variable))
                yield problem(found.path, variable, f"{found.path}/{name}", fault, advice)


def _held_later(group: FoundGroup, found: FoundPart, key: str) -> bool:
    """Whether later parts hold a variable of all prompts of a part, in all its layers, so that nobody reads the part's own."""
    if found.part is None or found.replaced or key not in found.part.info.activations:
        return False
    info = found.part.info
    layered = info.arrays[key].layered
    left = {layer: {row.tobytes() for row in info.digests} for layer in (info.layers if layered else (-1,))}
    for each in group.parts:
        later = None if each.part is None or each.replaced else each.part.info
        if later is None or later.name <= info.name or key not in later.activations or later.arrays[key].layered != layered:
            continue
        if any(name == key or name.startswith(f"{key}/") for name in each.faults):
            continue
        position = later.arrays.get("tokens/position")
        if key.startswith("tokens/") and (position is None or not position.attributes.get("whole_prompts")):
            continue
        digests = {row.tobytes() for row in later.digests}
        for layer in later.layers if layered else (-1,):
            if layer in left:
                left[layer] -= digests
    return not any(left.values())


def _advice(found: FoundPart, name: str, variable: str, *, is_held_later: bool) -> str:
    if found.replaced:
        return "another part stands for it: repair() removes it"
    if is_held_later:
        return "nothing is lost, a later part holds these values: repair() removes it"
    if name.endswith(("zarr.json", CHUNK_TABLE, BLOCK_TABLE)) or variable in MADE_BY_WRITER:
        return "repair() writes it again"
    info = found.part.info.arrays.get(variable) if found.part is not None else None
    if info is not None and not is_variable(variable.partition("/")[2], info):
        return "repair() drops the column: annotate again, or extract again with refresh=True"
    return "repair() drops it and lists the prompts to extract again"


def counted_variables(info: PartInfo) -> list[str]:
    """Variables whose values may be finite or not, and whose rows blank or not."""
    return [
        f"{level}/{name}"
        for level in LEVELS
        for name, array in info.variables(level).items()
        if is_variable(name, array) and name not in SCALARS and np.dtype(array.dtype).kind == "f"
    ]


def _odd_values(scan: StoreScan, *, full: bool) -> tuple[list[OddValues], int]:
    """Values that are not finite and blank rows of visible parts; and how many parts have no such counts."""
    odd_values, uncounted = [], 0
    for found in (each for group in scan.groups for each in group.parts if each.part is not None and not each.replaced):
        part: Any = found.part
        odd = part.info.odd
        if odd is None and full:
            odd = _count(part, found.faults)
        if odd is None:
            uncounted += bool(counted_variables(part.info))
            continue
        odd_values += [OddValues(part=found.path, variable=key, not_finite=int(n[0]), blank=int(n[1])) for key, n in odd.items() if any(n)]
    return odd_values, uncounted


def _count(part: Part, faults: Mapping[str, Fault]) -> dict[str, tuple[int, int]]:
    """The counts of a part that was written without them, from the chunks that are whole."""
    totals: dict[str, list[tuple[int, int]]] = {}

    def count(key: str, layer: int, block: int) -> None:
        level, _, name = key.partition("/")
        array = part.array(level, name)  # type: ignore[arg-type]
        if f"{key}/{array.info.file_of(layer, block)}" in faults:
            return
        rows = array.info.shape[array.info.sample_axis] - block * array.info.rows_per_chunk
        totals[key].append(count_odd(array.read_chunk(layer, block)[:rows], array.info.row_shape))

    jobs = []
    for key in counted_variables(part.info):
        info = part.info.arrays[key]
        totals[key] = []
        jobs += [
            partial(count, key, layer, block) for layer in range(info.shape[0] if info.layered else 1) for block in range(info.n_blocks)
        ]
    run_all(jobs, part.storage.pace)
    return {key: (sum(n for n, _ in counts), sum(n for _, n in counts)) for key, counts in totals.items()}


def verify_stores(
    url: str, scans: Sequence[StoreScan], *, full: bool, began: float, advance: Callable[[int], None] = lambda _: None
) -> VerifySummary:
    """Compare the files of one or several roots with what was committed.

    Parameters
    ----------
    url : str
        How the roots are named together.
    scans : sequence of StoreScan
        As `scan_store` gives them.
    full : bool
        See `check_files`.
    began : float
        When the verification began, by `time.perf_counter`.
    advance : callable
        Called with the number of bytes that were dealt with.
    """
    checked = [check_files(scan, full=full, advance=advance) for scan in scans]
    odd, uncounted = [], 0
    for scan in checked:
        some, count = _odd_values(scan, full=full)
        odd += some
        uncounted += count
    every = [found for scan in checked for group in scan.groups for found in group.parts]
    infos = [found.part.info for found in every if found.part is not None]
    notes = sum(f"/{ANNOTATIONS}/" in found.path for found in every)
    return VerifySummary(
        url=url,
        full=full,
        groups=sum(len(scan.groups) for scan in checked),
        parts=len(every) - notes,
        annotations=notes,
        files=sum(info.n_files for info in infos),
        nbytes=sum(map(_part_bytes, infos)),
        problems=tuple(problem for scan in checked for problem in problems_of(scan)),
        odd=tuple(odd),
        uncounted=uncounted,
        unfinished=sum(len(group.unfinished) for scan in checked for group in scan.groups),
        seconds=time.perf_counter() - began,
    )


def verify_scans(url: str, scans: Sequence[StoreScan], *, full: bool, began: float, progress: bool) -> VerifySummary:
    """`verify_stores` with a progress bar on terminals."""
    total = sum(scan.nbytes for scan in scans)
    with progress_bar(total, description="verify", unit="B", enabled=progress) as advance:
        return verify_stores(url, scans, full=full, began=began, advance=advance)
