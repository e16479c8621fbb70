"""Work done in this process: the model is run, stored tokens are pooled, and both are written through `Ingest`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmprobe_zarr.batch import Answer, Column, TokenBatch, pool_ragged, round_bits, split_variable
from lmprobe_zarr.display import progress_bar
from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.columns import with_columns
from lmprobe_zarr.extraction.continued import stored_rows_of
from lmprobe_zarr.extraction.in_order import InOrder
from lmprobe_zarr.extraction.interruption import note_stored
from lmprobe_zarr.extraction.lookup import Lookup
from lmprobe_zarr.extraction.models import TokenizedPrompts
from lmprobe_zarr.extraction.options import Options
from lmprobe_zarr.extraction.over import with_parts
from lmprobe_zarr.extraction.work import Work
from lmprobe_zarr.store import Ingest, Store
from lmprobe_zarr.store.format import SITE_ATTRIBUTES
from lmprobe_zarr.store.parts import CallOrder, blocks_of, read_values
from lmprobe_zarr.typing import Ints

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import ScratchPlace

__all__ = ["Written", "fill_here"]

# Prompts are sorted by length within windows of this many batches, which costs at most 3 percent of padding more than sorting all prompts
# (docs/design/decisions.md). Of a killed process the rows of two windows are lost.
WINDOW_BATCHES: Final = 64
# The caller's part_seconds shortens windows, as if each batch took this long: at 0 a window is one batch.
BATCH_SECONDS: Final = 60 / 64
# How much is collected for one window, beside what makes up 32 batches. It does not depend on the machine, so that the same prompts
# make the same batches everywhere.
WINDOW_BYTES: Final = 64 << 20
# What is held of one window in memory, by what is free, and beyond that in a scratch file. There are two windows: one fills while one is
# written. Of all scratch files together there must be this many times as much free space.
MEMORY_SHARE: Final = 64
MEMORY_BYTES: Final = 256 << 20
SCRATCH_BYTES: Final = 4 << 30
SCRATCH_SHARE: Final = 8
# What a streamed run may take of the free space.
STREAMED_SHARE: Final = 4
# Answers that are generated before the model is run over them. Of a killed process these are lost; part_seconds shortens them likewise.
WINDOW_ANSWERS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written; the fields are those of `ExtractStats`."""

    nbytes: int = 0
    parts: int = 0
    not_finite: int = 0
    blank: int = 0
    generated: int = 0
    generated_tokens: int = 0


def fill_here(work: Work, options: Options) -> Written:
    """Run the loaded model on the missing prompts, pool what stored tokens suffice for, and store both."""
    lookup, tokens = work.lookup, work.plan.tokens
    target = options.sink or lookup.request.store
    recorded = _recorded(lookup)
    ingest = Ingest(
        target, lookup.makes_group, part_bytes=options.keeping.part_bytes,
        part_seconds=options.part_seconds, precision=options.keeping.precision,
        recorded=recorded, shards=options.keeping.shards,
        order=lookup.request.order or CallOrder.of(lookup.prompts.sha256),
    )  # fmt: skip
    rows = {digest: row for row, digest in enumerate(lookup.prompts.sha256)}
    written = _Answered(work, options, recorded)

    def put(window: Iterator[TokenBatch]) -> None:
        ingest.put_all(_with_columns(window, rows, work, written.columns_of_window(), store_text=options.store_text))

    scratch, folder = _scratch(target)
    in_order = InOrder(put, rows, memory=_window_memory(), folder=folder)
    bar = progress_bar(tokens, description="extract", unit="tok", enabled=options.progress and tokens > 0)
    try:
        with bar as advance, closing(in_order), ingest:
            for batch in _pooled_from_tokens(lookup):
                ingest.put(batch)
            place = _streamed_scratch(target, folder, ingest.flush)
            with in_order:
                for tokenized in written.pieces(advance):
                    for batch in _run_model(work, tokenized, options, advance, in_order.flush, scratch, place):
                        in_order.take(batch)
    except KeyboardInterrupt as error:
        if options.sink is None:
            note_stored(error, work, ingest.prompts)  # leaving the context has committed what the model had finished
        raise
    return Written(
        nbytes=ingest.nbytes, parts=len(ingest.parts), not_finite=ingest.not_finite, blank=ingest.blank, generated=written.count,
        generated_tokens=written.tokens,
    )  # fmt: skip


@dataclass(slots=True)
class _Answered:
    """The missing prompts as the model is run over them: as they are, or with their answers, which are generated a window at a time."""

    work: Work
    options: Options
    recorded: Mapping[str, Any]
    count: int = 0
    tokens: int = 0
    _answers: dict[int, Answer] = field(default_factory=dict)

    def pieces(self, advance: Callable[[int], None]) -> Iterator[TokenizedPrompts]:
        """The tokens of the missing prompts, if there are any."""
        tokenized, lookup, answers = self.work.tokenized, self.work.lookup, self.work.lookup.answers
        if tokenized is None or lookup.loaded is None:
            return
        if answers is None:
            yield tokenized
            return
        size = max(1, min(WINDOW_ANSWERS, int(WINDOW_ANSWERS * self.options.part_seconds / (WINDOW_BATCHES * BATCH_SECONDS))))
        for start in range(0, len(lookup.missing), size):
            places = lookup.missing[start : start + size]
            prompts = tokenized.take(np.arange(start, start + len(places)))
            self._answers = {i: answers.known[i] for i in places.tolist() if i in answers.known}
            self._generate(places, prompts, advance)
            complete = answers.complete(prompts, places, [self._answers[i] for i in places.tolist()], lookup.loaded.tokenizer)
            yield with_parts(complete, lookup.request, self.work.columns, places, every=False)

    def _generate(self, places: Ints, prompts: TokenizedPrompts, advance: Callable[[int], None]) -> None:
        """Generate those answers of a window that are not known."""
        loaded, answers, options = self.work.lookup.loaded, self.work.lookup.answers, self.options
        assert isinstance(loaded, models.LoadedModel) and answers is not None  # noqa: S101, PT018 - as in `pieces`; no engine generates
        unknown = answers.unknown(places)
        if not len(unknown):
            return

        def after_batch(count: int, tokens: int) -> None:
            advance(count * answers.settings.max_new_tokens - tokens)  # these will not be run
            if options.watch is not None:
                options.watch()

        made = models.generate_answers(
            loaded, prompts.take(np.searchsorted(places, unknown)), answers.settings, of=answers.digests_of(unknown),
            samples=answers.sample[unknown].tolist(), seed=answers.seed, batch_tokens=options.batch_tokens,
            batch_prompts=options.batch_prompts, progress=after_batch,
        )  # fmt: skip
        self.recorded["generation"]["batches"] = loaded.checked["generation_batches"]  # before the first part is committed
        self._answers |= dict(zip(unknown.tolist(), made, strict=True))
        self.count, self.tokens = self.count + len(made), self.tokens + sum(len(answer.token_ids) for answer in made)

    def columns_of_window(self) -> Callable[[Iterable[int]], dict[str, Column]]:
        """Gives the columns of answers of the window at hand, also after it; none where no answers were asked for."""
        answers, known = self.work.lookup.answers, self._answers
        return lambda rows: {} if answers is None else answers.columns({row: known[row] for row in rows})


def _with_columns(
    batches: Iterator[TokenBatch],
    rows: Mapping[str, int],
    work: Work,
    columns: Callable[[Iterable[int]], dict[str, Column]],
    *,
    store_text: bool,
) -> Iterator[TokenBatch]:
    for batch in batches:
        more = columns(rows[digest] for digest in batch.sha256)
        yield with_columns(batch, rows, work.columns, store_text=store_text, more=more)


def _window_memory() -> int:
    """Bytes of one window that are held in memory."""
    free = models.free_on("cpu")
    return max(WINDOW_BYTES, min(MEMORY_BYTES, (0 if free is None else free) // MEMORY_SHARE))


def _scratch(target: Store) -> tuple[int, str | None]:
    """How large a scratch file may become, and its folder; None for the system's folder of temporary files."""
    folder = target.storage.scratch_folder()
    with suppress(OSError):
        return min(SCRATCH_BYTES, shutil.disk_usage(folder or tempfile.gettempdir()).free // SCRATCH_SHARE), folder
    return 0, folder


def _streamed_scratch(target: Store, folder: str | None, committed: Callable[[], None]) -> ScratchPlace:
    """Where a model whose weights are streamed keeps what it has computed: beside a local store, otherwise among temporary files."""
    place = Path(tempfile.gettempdir() if folder is None else folder)
    if str(place) == target.url:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        place = Path(tempfile.gettempdir())
    nbytes = 0
    with suppress(OSError):
        nbytes = shutil.disk_usage(place).free // STREAMED_SHARE
    return models.ScratchPlace(folder=str(place), nbytes=nbytes, key={"store": target.url}, committed=committed)


def _recorded(lookup: Lookup) -> Mapping[str, Any]:
    """What is noted in the parts; with the whole provenance of the model where their group does not record it."""
    if lookup.loaded is None:
        return {}
    whole: dict[str, Any] = {"provenance": dict(lookup.loaded.provenance)} if lookup.unknown else {}
    if lookup.answers is not None:
        settings = lookup.answers.settings
        seed = "drawn" if lookup.request.generate is not None and lookup.request.generate.seed is None else "given"
        whole["generation"] = {
            "settings": dict(settings.values), "deviations": list(settings.deviations), **({"seed": seed} if settings.samples else {}),
        }  # fmt: skip
    return ChainMap(whole, lookup.loaded.recorded)  # the check of the model adds to it before the first part is committed


def _run_model(
    work: Work,
    tokenized: TokenizedPrompts,
    options: Options,
    advance: Callable[[int], None],
    after_window: Callable[[], None],
    scratch: int,
    place: ScratchPlace,
) -> Iterator[TokenBatch]:
    """The model's batches for some of the missing prompts."""
    lookup, request = work.lookup, work.lookup.request
    assert lookup.loaded is not None  # noqa: S101 - prompts are missing

    def after_batch(_prompts: int, tokens: int) -> None:
        advance(tokens)
        if options.watch is not None:
            options.watch()

    return models.run_ready(
        lookup.loaded,
        tokenized,
        layers=request.kept_layers(lookup.layers) or "all",
        sites=request.sites,
        poolings=request.poolings,
        parts=request.part_names,
        keep_tokens=request.keep_tokens,
        outputs=request.outputs,
        batch_tokens=options.batch_tokens,
        batch_prompts=options.batch_prompts,
        progress=after_batch,
        windows=models.Windows(
            nbytes=WINDOW_BYTES, scratch_nbytes=scratch // 2, batches=max(1, min(WINDOW_BATCHES, int(options.part_seconds / BATCH_SECONDS)))
        ),
        after_window=after_window,
        start=None if work.plan.continued_from is None else stored_rows_of(lookup, work.plan.continued_from),
        scratch=place,
    )


def _pooled_from_tokens(lookup: Lookup) -> Iterator[TokenBatch]:
    """Batches of missing poolings, computed from the stored tokens of their prompts."""
    layers_of = {variable.name: variable.layers for variable in lookup.wanted}
    for names, places in lookup.derived.items():
        for layers in dict.fromkeys(layers_of[name] for name in names):
            yield from _pooled(lookup, [name for name in names if layers_of[name] == layers], layers, places)


def _pooled(lookup: Lookup, names: Sequence[str], layers: tuple[int, ...], places: Ints) -> Iterator[TokenBatch]:
    """As `_pooled_from_tokens`, for variables of the same layers."""
    view = lookup.view
    assert view is not None  # noqa: S101 - nothing is derived without one
    stored = view.variables("tokens")
    rows = view.find([lookup.prompts.sha256[i] for i in places])
    counts = view.token_counts()[rows]
    sites = dict.fromkeys(split_variable(name)[0] for name in names)
    token_bytes = sum(int(np.prod(stored[site].row_shape)) * 4 * max(1, len(layers)) for site in sites)
    noted = {site: {key: stored[site].attributes[key] for key in SITE_ATTRIBUTES if key in stored[site].attributes} for site in sites}
    for block in blocks_of(counts * token_bytes):
        tokens = {site: read_values(view, "tokens", site, rows[block], layers) for site in sites}
        arrays, dtypes = {}, {}
        for name in names:
            site, pooling, _ = split_variable(name)
            held = view.stored_dtypes("tokens", site)
            # Where only some are bfloat16, the others' mean has more digits.
            dtype = held[0] if len(held) == 1 else "float32"
            pooled = pool_ragged(tokens[site], counts[block], str(pooling))
            # Rounded as the model's own result would be: the mean of bfloat16 numbers is a bfloat16 number again.
            arrays[name], dtypes[name] = (round_bits(pooled, 7) if dtype == "bfloat16" else pooled), dtype
        yield TokenBatch(
            sha256=[lookup.prompts.sha256[i] for i in places[block]],
            layers=layers,
            prompts=arrays,
            unlayered=frozenset(name for name in names if not stored[split_variable(name)[0]].layered),
            stored_dtype=dtypes,
            site_attributes={site: values for site, values in noted.items() if values},
        )
