"""The steps of an import in any format: find what the store does not hold, read it in batches of bounded size, write it.

All checks need only headers, and are made before anything is written. Knows no format.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import pandas as pd

from lmprobe_zarr.batch import (
    HASH_DIGITS,
    INNER_DIMS,
    LAYERED_SITES,
    SCALARS,
    SITES,
    UNKNOWN_DIGITS,
    TokenBatch,
    given_prompts,
    has_utf8,
    is_top_k,
    pooled_name_problem,
    split_variable,
)
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped, Source
from lmprobe_zarr.bridges.same_model import check_fits, width_of
from lmprobe_zarr.bridges.summaries import ImportSummary, Tally
from lmprobe_zarr.display import progress_bar
from lmprobe_zarr.errors import (
    CorruptFileError,
    InvalidArgumentError,
    InvalidTypeError,
)
from lmprobe_zarr.store import Ingest, Place, Store, open_store
from lmprobe_zarr.store.format import LEVELS, GroupInfo, Level, Provenance, unrecorded_fields
from lmprobe_zarr.store.parts import View
from lmprobe_zarr.typing import Ints

__all__ = [
    "BATCH_PROMPTS",
    "ImportOptions",
    "ImportPlan",
    "check_variables",
    "of_one_width",
    "plan_import",
    "prompt_list",
    "run_import",
    "write_columns",
]

# One batch is read while two wait and one is written: with the writer's buffers, well below a gigabyte in all.
BATCH_BYTES: Final = 2**26
BATCH_PROMPTS: Final = 4096
# What is no site, and so has a name of the format itself.
_OUTPUTS: Final = frozenset({*INNER_DIMS, *SCALARS, "token_id", "generated"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """Options that all imports share; see `import_safetensors`.

    Parameters
    ----------
    dry_run : bool
        Only report what would be done.
    strict : bool
        Raise before anything is written if anything would be skipped.
    provenance : mapping
        What is known about how the activations were computed.
    progress : bool
        Show a progress bar.
    part_bytes : int
        Bytes of activations after which a part is committed.
    group : GroupInfo, optional
        The group to write to; None for one that records `provenance` only.
    before : mapping, optional
        The provenance that an earlier version recorded of the same import: what it brought over from the same place is continued.
    """

    dry_run: bool
    strict: bool
    provenance: Provenance
    progress: bool
    part_bytes: int
    group: GroupInfo | None = None
    before: Provenance | None = None


@dataclass
class ImportPlan:
    """What is to be imported of one model.

    Parameters
    ----------
    model : str
    source : Source
    group : GroupInfo
        The group to write to.
    entries : list of Entry
        Entries that the store lacks, wholly or in part.
    found, stored : int
        Prompts that the source holds, and how many of them the store already holds in full.
    named : list of Entry
        Prompts that are stored without their text, which the source has.
    part_names : list of str
        Parts that the import committed.
    """

    model: str
    source: Source
    group: GroupInfo
    entries: list[Entry]
    found: int
    stored: int
    named: list[Entry]
    part_names: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def run_import(
    sources: Sequence[tuple[str, Source]],
    store: Place,
    origin: str,
    skipped: Tally,
    options: ImportOptions,
) -> ImportSummary:
    """Import from some sources, each with the name of its model; see `import_safetensors` for the errors."""
    began = time.monotonic()
    target = store if isinstance(store, Store) else open_store(store)
    if not options.dry_run:
        target.check_writable()
    if options.part_bytes < 1:
        raise InvalidArgumentError(f"part_bytes={options.part_bytes!r} is not a number of bytes: give at least 1")
    notes = Tally()
    plans = [plan_import(name, source, target, options, skipped, notes) for name, source in sources]
    if options.strict and len(skipped):
        reasons = "; ".join(f"{r.count} × {r.text} ({', '.join(r.names)})" for r in skipped.reasons())
        raise CorruptFileError(f"strict=True, and this would be skipped of {origin}: {reasons}\nnothing was written")
    tokens = nbytes = imported = parts = 0
    with progress_bar(
        sum(plan.nbytes for plan in plans),
        description=f"importing into {target.url}",
        unit="B",
        enabled=options.progress and not options.dry_run,
    ) as advance:
        for plan in plans:
            done = plan.entries if options.dry_run else _import_missing(plan, target, skipped, options.part_bytes, advance, origin)
            imported += len(done)
            tokens += sum(entry.n_tokens or 0 for entry in done if any(held.level == "tokens" for held in entry.holds))
            nbytes += sum(entry.nbytes for entry in done)
            parts += len(plan.part_names)
    return ImportSummary(
        source=origin,
        url=target.url,
        models=tuple(plan.model for plan in plans),
        groups=tuple(plan.group.name for plan in plans),
        found=sum(plan.found for plan in plans),
        stored=sum(plan.stored for plan in plans),
        imported=imported,
        tokens=tokens,
        nbytes=nbytes,
        parts=parts,
        skipped=skipped.reasons(),
        notes=notes.reasons(),
        unknown=tuple(dict.fromkeys(name for plan in plans for name in unrecorded_fields(plan.group.provenance))),
        as_model="" if options.group is None else f"{options.group.model}, computed in {options.group.provenance['compute_dtype']}",
        dry_run=options.dry_run,
        seconds=time.monotonic() - began,
    )


def plan_import(model: str, source: Source, store: Store, options: ImportOptions, skipped: Tally, notes: Tally) -> ImportPlan:
    """What a source holds that the store does not. All checks are made here, before anything is written."""
    entries: dict[str, Entry] = {}
    with progress_bar(0, description=f"scanning {model}", unit="prompt", enabled=options.progress) as advance:
        for found in source.entries():
            advance(1)
            if isinstance(found, Skipped):
                skipped.add(found.reason, found.name, found.detail)
            elif found.text is not None and not has_utf8(found.text):
                skipped.add("prompts whose text no UTF-8 can hold, because it has a lone surrogate", found.name, ascii(found.text[:40]))
            elif found.hash in entries:
                skipped.add("prompts that the source holds twice: the first is imported", found.name)
            else:
                entries[found.hash] = found
    check_variables(held for entry in entries.values() for held in entry.holds)
    if options.group is not None:
        check_fits(options.group, entries.values())
    group = options.group or _group(store, model, options, entries.values(), source.url)
    view = store.view(group) if group.name in store.groups() else None
    _check_columns(entries.values(), view)
    fitting = of_one_width(entries.values(), view, skipped)
    fitting = fitting if view is None else _with_stored_digests(fitting, view, skipped)
    for entry in fitting:
        for note in entry.notes:
            notes.add(note, entry.name)
        if entry.text is None:
            notes.add("prompts of unknown text, which can be found by their hash only", entry.name)
    _note_layers(fitting, notes)
    missing = fitting if view is None else _missing(fitting, view)
    named = [] if view is None else _with_new_text(fitting, missing, view)
    for entry in named:
        notes.add("prompts that are stored already, and whose text is known only now", entry.name)
    return ImportPlan(model, source, group, missing, len(entries), len(fitting) - len(missing), named)


def check_variables(holds: Iterable[Held]) -> None:
    """Raise where something has a name that no variable can have, has layers where its name says that it has none, or two widths."""
    widths: dict[str, tuple[str, tuple[int, ...]]] = {}
    lower: dict[str, str] = {}
    for held in dict.fromkeys(holds):
        name, site = held.variable, split_variable(held.variable)[0]
        if lower.setdefault(name.lower(), name) != name:
            raise InvalidArgumentError(
                f"{lower[name.lower()]!r} and {name!r} differ by case alone, and some file systems ignore case: choose another name"
            )
        if name in _OUTPUTS:
            continue
        if problem := pooled_name_problem(name, pooled=held.level == "prompts"):
            raise InvalidArgumentError(f"{name!r:.80} is no name of a variable with one row per {held.level.rstrip('s')}: {problem}")
        if site in SITES and (held.layers is not None) != (site in LAYERED_SITES):
            wanted = "give {layer: …}, or a name with {layer}" if site in LAYERED_SITES else "give it without layers"
            raise InvalidArgumentError(
                f"{name!r} {'has' if site in LAYERED_SITES else 'has no'} layers: {wanted}, or choose another name for the site"
            )
        # Prompts of another width than most are skipped and named, so that only those of one site are compared.
        first, shape = widths.setdefault(site, (name, held.row_shape))
        if first != name and shape != held.row_shape and site not in SITES:
            raise InvalidArgumentError(f"{first!r} has rows of shape {shape} and {name!r} of {held.row_shape}: a site has one width")


def _check_columns(entries: Iterable[Entry], view: View | None) -> None:
    """Raise where a variable would have the name of a column that the store holds."""
    names = {held.variable for entry in entries for held in entry.holds if held.variable not in _OUTPUTS}
    if view is not None and (same := sorted(names & {*view.columns("prompts"), *view.columns("tokens")})):
        raise InvalidArgumentError(f"{same[0]!r} is a column of {view.where}: choose another name for the variable")


def _with_new_text(entries: Sequence[Entry], missing: Sequence[Entry], view: View) -> list[Entry]:
    """The entries that are stored in full, but without their text."""
    again = {entry.hash for entry in missing}
    listed = [entry for entry in entries if entry.text is not None and entry.hash not in again]
    rows = _rows_of(listed, view)
    return [entry for entry, row in zip(listed, rows, strict=True) if not view.digests[row, HASH_DIGITS // 2 :].any()]


def _group(store: Store, model: str, options: ImportOptions, entries: Iterable[Entry], origin: str) -> GroupInfo:
    """The group to import into: an existing one with the same provenance, even if the store or the source does not know the hidden size."""
    hidden = width_of(entries)
    wanted = GroupInfo(model=model, provenance=options.provenance, num_layers=None, hidden_size=hidden)
    groups = store.groups()
    if wanted.name in groups:
        return wanted
    for info in groups.values():
        alike = (info.model, info.provenance, info.num_layers) == (model, wanted.provenance, None)
        if alike and None in (info.hidden_size, hidden):
            return info
    if options.before is not None:
        older = GroupInfo(model=model, provenance=options.before)
        for info in groups.values():
            alike = (info.model, info.provenance, info.num_layers) == (model, older.provenance, None)
            if alike and info.hidden_size in (None, hidden) and _came_from(store.view(info), origin):
                return info
    return wanted


def _came_from(view: View, origin: str) -> bool:
    """Whether anything of a group was imported from this place, or from one of these."""
    return any(part.info.recorded.get("imported_from") in {origin, *origin.split(", ")} for part in view.parts)


def of_one_width(entries: Iterable[Entry], view: View | None, skipped: Tally) -> list[Entry]:
    """The entries whose rows have the usual width: that of the stored rows, else that of most entries. Others are counted as skipped."""
    listed = list(entries)
    count: dict[tuple[Level, str], Counter[tuple[int, ...]]] = {}
    for holds, number in Counter(entry.holds for entry in listed).items():
        for held in holds:
            count.setdefault((held.level, held.variable), Counter())[held.row_shape] += number
    usual = {name: shapes.most_common(1)[0][0] for name, shapes in count.items()}
    for level in LEVELS if view is not None else ():
        assert view is not None  # noqa: S101 — see above
        usual |= {(level, name): info.row_shape for name, info in view.variables(level).items()}
    fitting = []
    for entry in listed:
        odd = [h for h in entry.holds if h.row_shape != usual[h.level, h.variable] and not is_top_k(h.variable)]
        if odd:
            detail = f"{odd[0].variable} has rows of shape {odd[0].row_shape}, others have {usual[odd[0].level, odd[0].variable]}"
            skipped.add("prompts whose activations have another width than the others", entry.name, detail)
        else:
            fitting.append(entry)
    return fitting


def _with_stored_digests(entries: Sequence[Entry], view: View, skipped: Tally) -> list[Entry]:
    """The entries, with whole digests where the store knows them; an entry of another prompt with the same hash is skipped.

    A digest of which only 16 digits are known (see `lmprobe_zarr.batch.digest_of_hash`) is taken for the same prompt as a whole digest
    that begins with them.
    """
    rows = _rows_of(entries, view)
    fitting = []
    for entry, row in zip(entries, rows, strict=True):
        stored = None if row < 0 else view.digests[row].tobytes().hex()
        if stored is None or stored == entry.sha256 or stored.endswith(UNKNOWN_DIGITS):
            fitting.append(entry)
        elif entry.sha256.endswith(UNKNOWN_DIGITS):
            fitting.append(replace(entry, sha256=stored))
        else:
            skipped.add("prompts that share their hash with another prompt in the store", entry.name)
    return fitting


def _rows_of(entries: Sequence[Entry], view: View) -> Ints:
    return np.asarray(pd.Index(view.hashes).get_indexer(pd.Index([entry.hash for entry in entries])), np.int64)


def _missing(entries: Sequence[Entry], view: View) -> list[Entry]:
    """The entries of which the view lacks anything."""
    rows = _rows_of(entries, view)
    there = rows >= 0
    alike: dict[tuple[Held, ...], list[int]] = {}
    for i in np.flatnonzero(there).tolist():
        alike.setdefault(entries[i].holds, []).append(i)
    for holds, members in alike.items():
        for held in holds:
            covered = view.covers(held.level, held.variable, rows[members], held.layers or ())
            there[members] &= covered.all(axis=0)
    return [entry for entry, known in zip(entries, there, strict=True) if not known]


def _note_layers(entries: Sequence[Entry], notes: Tally) -> None:
    """Note prompts that hold fewer layers of a variable than the others."""
    every: dict[str, set[int]] = {}
    for holds in {entry.holds for entry in entries}:
        for held in holds:
            every.setdefault(held.variable, set()).update(held.layers or ())
    for entry in entries:
        held_layers: dict[str, set[int]] = {}
        for held in entry.holds:
            held_layers.setdefault(held.variable, set()).update(held.layers or ())
        if any(every[variable] - layers for variable, layers in held_layers.items()):
            notes.add("prompts that hold fewer layers than others", entry.name)


# ------------------------------------------------------------------------------------------------------- reading, writing


def _import_missing(
    plan: ImportPlan, store: Store, skipped: Tally, part_bytes: int, advance: Callable[[int], object], origin: str
) -> list[Entry]:
    """Read and write what is missing; returns the entries that were imported in full."""
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in plan.entries:
        alike.setdefault((entry.holds, entry.text is None, _n_layer_runs(entry)), []).append(entry)
    failed: set[str] = set()
    with Ingest(store, plan.group, part_bytes=part_bytes, recorded={"imported_from": origin}) as ingest:
        # Each batch of entries is finished before the next, so that an interruption leaves few entries imported in part.
        for (holds, _, n_runs), entries in alike.items():
            units = _units(holds, n_runs)
            for some in _batches(entries, max(units, key=lambda unit: sum(held.row_nbytes for held in unit))):
                for unit in units:
                    for batch in _read(plan.source, [entry for entry in some if entry.hash not in failed], unit, skipped, failed):
                        ingest.put(batch)
                    advance(sum(_rows_nbytes(entry, unit) for entry in some))
        for start in range(0, len(plan.named), BATCH_PROMPTS):
            some = plan.named[start : start + BATCH_PROMPTS]
            ingest.put(TokenBatch(sha256=[entry.sha256 for entry in some], text=[entry.text or "" for entry in some]))
    plan.part_names += ingest.parts
    return [entry for entry in plan.entries if entry.hash not in failed]


def _layered_nbytes(entry: Entry) -> int:
    return sum(_rows_nbytes(entry, [held]) for held in entry.holds if held.layers is not None)


def _rows_nbytes(entry: Entry, holds: Iterable[Held]) -> int:
    return sum(held.row_nbytes * (1 if held.level == "prompts" else entry.n_tokens or 0) for held in holds)


def _n_layer_runs(entry: Entry) -> int:
    """Into how many runs of layers a prompt is cut so that no run is larger than a batch. A power of two, so that few prompts differ."""
    return int(2 ** max(0, np.ceil(np.log2(max(1, _layered_nbytes(entry)) / BATCH_BYTES))))


def _units(holds: Sequence[Held], n_runs: int) -> list[list[Held]]:
    """The variables that are read and written together: those with the same layers, cut into runs of layers, and those without layers."""
    by_layers: dict[tuple[int, ...], list[Held]] = {}
    for held in holds:
        if held.layers is not None:
            by_layers.setdefault(held.layers, []).append(held)
    units: list[list[Held]] = []
    for layers, members in by_layers.items():
        for run in np.array_split(np.array(layers), min(n_runs, len(layers))):
            units += _split_by_dtype([replace(held, layers=tuple(run.tolist())) for held in members])
    apart: list[Held] = []
    for held in (held for held in holds if held.layers is None):
        # Only with others of its level: a part records for each level that it holds whether it has layers.
        beside = next((unit for unit in units if any(other.level == held.level for other in unit)), apart)
        beside.append(held)
    return [*units, apart] if apart else units


def _split_by_dtype(holds: Sequence[Held]) -> list[list[Held]]:
    """The variables in as few lists as possible, so that none occurs twice in a list: some occur in two dtypes."""
    apart: list[list[Held]] = []
    for held in holds:
        free = next((unit for unit in apart if held.variable not in {other.variable for other in unit}), None)
        if free is None:
            apart.append([held])
        else:
            free.append(held)
    return apart


def _batches(entries: Sequence[Entry], unit: Sequence[Held]) -> Iterator[list[Entry]]:
    some: list[Entry] = []
    nbytes = 0
    for entry in entries:
        size = _rows_nbytes(entry, unit)
        if some and (nbytes + size > BATCH_BYTES or len(some) == BATCH_PROMPTS):
            yield some
            some, nbytes = [], 0
        some.append(entry)
        nbytes += size
    if some:
        yield some


def _read(source: Source, entries: list[Entry], unit: Sequence[Held], skipped: Tally, failed: set[str]) -> Iterator[TokenBatch]:
    """One batch of all entries. If a file turns out to be damaged, a batch of each entry instead, without the damaged ones."""
    if not entries:
        return
    try:
        yield source.read(entries, unit)
        return
    except CorruptFileError as error:
        if len(entries) == 1:
            skipped.add("files that were changed or damaged during the import", entries[0].name, str(error))
            failed.add(entries[0].hash)
            return
    for entry in entries:
        yield from _read(source, [entry], unit, skipped, failed)


def prompt_list(prompts: Iterable[str]) -> list[str]:
    """Texts or hashes as a list.

    Raises
    ------
    InvalidTypeError
        A single text, or something that is not a text.
    """
    listed = given_prompts(prompts)
    for prompt in listed:
        if not isinstance(prompt, str):
            raise InvalidTypeError(f"lmprobe identifies prompts by their text, not by {type(prompt).__name__}: give texts or hashes")
    return listed


def write_columns(store: Store, summary: ImportSummary, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Add columns for the prompts that are stored, where the store does not hold these values already.

    Parameters
    ----------
    store : Store
        Where `summary` imported to.
    summary : ImportSummary
        Of one model.
    columns : mapping of str to mapping
        Column to ``{hash: value}``; may name more prompts than are stored.
    """
    (group,) = summary.groups
    if not columns or group not in store.groups():
        return
    stored = store.dataset(group=group)
    hashes = [str(name) for name in stored.prompt.values]
    missing: dict[str, dict[str, Any]] = {}
    for name, values in columns.items():
        held = dict(zip(hashes, stored[name].values.tolist(), strict=True)) if name in stored.coords else {}
        new = {key: values[key] for key in hashes if key in values and not (key in held and _is_same(held[key], values[key]))}
        if new:
            missing[name] = new
    if missing:
        store.annotate(None, missing, group=group)


def _is_same(stored: Any, given: Any) -> bool:
    """Whether a column holds a value already; what is missing is NaN in the store and None in the dataset."""
    is_missing = stored is None or stored != stored
    return is_missing if given is None or given != given else bool(stored == given)
