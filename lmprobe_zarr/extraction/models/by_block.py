"""All batches through one block before any goes through the next, for a model whose blocks are read when it is their turn.

Every pass is the model's own forward, in which blocks that came before give rows that are known already. What is kept of each pass, and the
rows that go on to the next, lie in a scratch folder; when the last pass is through, batches are put together and handed over as if each had
run through the whole model. So a run that is stopped goes on with the block at which it was, and weights are read once for each window.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import torch

from lmprobe_zarr.batch import NO_OUTPUTS, TokenBatch, split_variable
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.models.batching import free_memory
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected
from lmprobe_zarr.extraction.models.continuing import BlockForms, StoredRows, forms_by_block
from lmprobe_zarr.extraction.models.copying import Copying, batches_of
from lmprobe_zarr.extraction.models.finite import FiniteWeights
from lmprobe_zarr.extraction.models.forward import KnownRows, ModelCall, as_run
from lmprobe_zarr.extraction.models.passes import Job, Known
from lmprobe_zarr.extraction.models.scratch import PassValues, Scratch, ScratchPlace, WindowPlan
from lmprobe_zarr.extraction.models.streamed import StreamedBlocks
from lmprobe_zarr.log import cache_logger
from lmprobe_zarr.typing import Ints

__all__ = ["run_by_block"]

KEY_DIGITS: Final = 16
# Rows before and after a block lie beside each other until the pass is through.
ROWS_AT_ONCE: Final = 2


class _TooLargeError(Exception):
    """A batch does not fit on the device; `batch_tokens` is what to try next."""

    def __init__(self, batch_tokens: int) -> None:
        super().__init__(batch_tokens)
        self.batch_tokens = batch_tokens


class _NotKnownError(Exception):
    """The stored rows of a batch cannot be gone on from."""


@contextmanager
def _noting_passes(scratch: Scratch, passes: int) -> Iterator[None]:
    """Note on Ctrl-C how many passes are done: they are kept, although no prompt may be stored yet."""
    try:
        yield
    except KeyboardInterrupt as error:
        if scratch.passes:
            error.add_note(f"{scratch.passes} of {passes} passes are done and kept in {scratch.folder}: the same call goes on after them")
        raise


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over all batches: a block, or what comes after all blocks. Without a request, rows are taken from a store."""

    request: CaptureRequest | None
    block: int | None
    call: ModelCall | None = None


def run_by_block(
    job: Job, streamed: StreamedBlocks, place: ScratchPlace | None, nbytes: Ints, start: StoredRows | None
) -> Iterator[TokenBatch]:
    """The batches of a job, with the values that `run` gives.

    Parameters
    ----------
    job : Job
    streamed : StreamedBlocks
    place : ScratchPlace
    nbytes : ndarray of int, shape (prompt,)
        Bytes that are kept of each prompt.
    start : StoredRows, optional
        What is stored of a layer before all that are asked for.

    Raises
    ------
    InvalidArgumentError, UnknownArchitectureError
        There is no place for scratch files, or the model cannot be run block by block; by the call itself.
    """
    if place is None:
        raise InvalidArgumentError("a model whose weights are streamed needs a place for scratch files: give scratch=")
    forms = forms_by_block(job.loaded, job.conduct, head=job.request.outputs.needs_head) if len(job.tokenized) else None
    return iter(()) if forms is None else _Run(job, streamed, place, nbytes, start, forms).batches()


@dataclass(slots=True)
class _Run:
    """A run of a job; the fields are those of `run_by_block`."""

    job: Job
    streamed: StreamedBlocks
    place: ScratchPlace
    nbytes: Ints
    start: StoredRows | None
    forms: BlockForms
    _places: dict[str, int] = field(default_factory=dict)
    _batch_tokens: int = 0

    def batches(self) -> Iterator[TokenBatch]:
        """The batches, window by window; what an earlier process left comes first."""
        tokenized, left = self.job.tokenized, np.arange(len(self.job.tokenized))
        self._places = {digest: row for row, digest in enumerate(tokenized.sha256)}
        self._batch_tokens = self.job.batch_tokens
        for scratch in Scratch.find(self.place, self._key()):
            rows = np.array([self._places.get(digest, -1) for digest in scratch.plan.digests], np.int64)
            if not self._may_go_on(scratch, rows, left):
                scratch.discard()
                continue
            cache_logger().info("[cache] %r goes on after %d passes, from %s", self.job.loaded.name, scratch.passes, scratch.folder)
            left = np.setdiff1d(left, rows)
            yield from self._through(scratch, rows)
        for windows in self._windows(left):
            yield from self._through(*self._begun(windows))
        cache_logger().info(
            "[cache] %r: %d bytes of weights were read, of %d", self.job.loaded.name, self.streamed.checkpoint.nbytes_read,
            self.streamed.checkpoint.nbytes,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ what is run

    def _passes(self, first: int) -> list[_Pass]:
        """The passes of a window whose first computed block is `first`, in order."""
        job, request, blocks = self.job, self.job.request, len(self.job.loaded.located.blocks)
        outside = {site: place for site, place in request.places.items() if not place.layered and site != "embed"}
        outputs = replace(request.outputs, router=False)
        after = bool(outside) or outputs.needs_head
        last = blocks - 1 if after else request.deepest or 0
        found = [_Pass(None, None)] if first else []
        for block in range(first, last + 1):
            places = {
                site: place for site, place in request.places.items()
                if (block in place.modules and block in request.layers) or (site == "embed" and not block)
            }  # fmt: skip
            routers = tuple(layer for layer in request.routers if layer == block)
            found.append(
                _Pass(replace(request, layers=(block,), places=places, routers=routers, outputs=NO_OUTPUTS, ends=block), block)
            )  # fmt: skip
        if after:
            found.append(_Pass(replace(request, layers=(), places=outside, routers=(), outputs=outputs), None, job.call))
        return found

    def _windows(self, left: Ints) -> Iterator[list[Ints]]:
        """Windows of prompts, as many at a time as may lie in the scratch folder together."""
        sizes = self.nbytes + ROWS_AT_ONCE * self.forms.row_nbytes * self.job.tokenized.lengths
        together: list[Ints] = []
        size = 0
        for window in self.job.cut(left):
            own = int(sizes[window].sum())
            if together and size + own > self.place.nbytes:
                yield together
                together, size = [], 0
            together.append(window)
            size += own
        if together:
            yield together

    def _begun(self, windows: Sequence[Ints], *, continued: bool = True) -> tuple[Scratch, Ints]:
        """A new folder for some windows, and the prompts in it."""
        tokenized, rows = self.job.tokenized, np.concatenate(windows)
        local = {row: number for number, row in enumerate(rows.tolist())}
        plan = WindowPlan(
            digests=[tokenized.sha256[row] for row in rows],
            lengths=tokenized.lengths[rows].tolist(),
            content=[self._content(row) for row in rows],
            first=0 if self.start is None or not continued else self.start.layer + 1,
            windows=[[[local[row] for row in batch.tolist()] for batch in self._cut(window)] for window in windows],
        )
        return Scratch.create(self.place, self._key(), plan), rows

    def _cut(self, window: Ints) -> Iterator[Ints]:
        left = self.job.in_order(window)
        while len(left):
            batch = self.job.next_batch(left, self._batch_tokens)
            yield batch
            left = left[len(batch) :]

    # ----------------------------------------------------------------------------------------- what was run before

    def _key(self) -> str:
        """What tells this run from others: the same key means the same numbers."""
        loaded, request = self.job.loaded, self.job.request
        described = {
            "place": dict(self.place.key),
            "provenance": dict(loaded.provenance),
            "recorded": {name: loaded.recorded.get(name) for name in ("attention", "device", "torch", "transformers", "padding")},
            "layers": list(request.layers),
            "routers": list(request.routers),
            "places": {site: [each.path, each.given, list(map(str, each.modules))] for site, each in request.places.items()},
            "poolings": list(request.poolings),
            "parts": dict(request.parts),
            "keep_tokens": request.keep_tokens,
            "outputs": repr(request.outputs),
            "start": None if self.start is None else self.start.layer,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:KEY_DIGITS]

    def _may_go_on(self, scratch: Scratch, rows: Ints, left: Ints) -> bool:
        """Whether a folder is of prompts that are still to be run: all of them, or, where all passes are through, any of them."""
        plan, wanted = scratch.plan, np.isin(rows, left)
        if not wanted.all() and (not wanted.any() or scratch.passes < len(self._passes(plan.first))):
            return False
        same = all(self._content(row) == plan.content[place] for place, row in enumerate(rows.tolist()) if row >= 0)
        # Rows of a batch are in the order of the call.
        return same and all((np.diff(held[held >= 0]) > 0).all() for held in (rows[batch] for batch in plan.batches))

    def _content(self, row: int) -> str:
        """A digest of what is run of a prompt: its tokens, and which of these are pooled."""
        tokenized = self.job.tokenized
        part = slice(self.job.starts[row], self.job.starts[row + 1])
        digest = hashlib.sha256(np.ascontiguousarray(tokenized.token_ids[part], np.int64).tobytes())
        for name in sorted(tokenized.parts):
            digest.update(name.encode() + np.packbits(tokenized.parts[name][part]).tobytes())
        return digest.hexdigest()[:KEY_DIGITS]

    # ------------------------------------------------------------------------------------------------------ running

    def _through(self, scratch: Scratch, rows: Ints) -> Iterator[TokenBatch]:
        """Run what is left of a window, hand its values over, and remove its folder once they are stored."""
        try:
            while True:
                windows = [rows[np.unique(np.concatenate(window))] for window in scratch.plan.windows]
                try:
                    self._run_passes(scratch, rows)
                    break
                except _TooLargeError as error:
                    self._batch_tokens, continued = error.batch_tokens, True
                except _NotKnownError:
                    continued = False
                scratch.discard()
                free_memory(self.job.loaded.device)
                scratch, rows = self._begun(windows, continued=continued)
            yield from self._handed_over(scratch, rows)
            self.place.committed()
            scratch.discard()
        finally:
            scratch.release()

    def _run_passes(self, scratch: Scratch, rows: Ints) -> None:
        passes, batches = self._passes(scratch.plan.first), [rows[batch] for batch in scratch.plan.batches]
        weights = FiniteWeights(self.job.loaded)
        for number in range(scratch.passes):
            self._advance(number, len(passes), np.concatenate(batches))
        with self.streamed.reading(), _noting_passes(scratch, len(passes)):
            for number in range(scratch.passes, len(passes)):
                now, following = passes[number].block, next((each.block for each in passes[number + 1 : number + 2]), None)
                if now is not None:
                    self.streamed.bring(now)
                if following is not None:
                    self.streamed.read_ahead(following)
                with scratch.writing() as writer, as_run(self.job.loaded):
                    for place, batch in enumerate(batches):
                        if passes[number].request is None:
                            writer.add(self._stored(batch), {}, {})
                        else:
                            known = None if not number else self._known(passes, number, scratch.rows(number - 1, place))
                            collected = self._collect(passes[number], batch, known)
                            weights.check(_values(collected), len(batch), now)
                            writer.add(collected.handed_on, collected.tokens, collected.prompts)
                        self._advance(number, len(passes), batch)

    def _known(self, passes: Sequence[_Pass], number: int, rows: torch.Tensor) -> KnownRows:
        block = passes[number].block
        before = len(self.job.loaded.located.blocks) - 1 if block is None else block - 1
        return KnownRows(layer=before, rows=rows, forms=self.forms.forms)

    def _stored(self, batch: Ints) -> torch.Tensor:
        """The stored rows of a batch."""
        assert self.start is not None  # noqa: S101 - as `_begun` decided
        tokenized = self.job.tokenized
        known = Known(self.start, self.forms.forms, self.job.loaded).of([tokenized.sha256[i] for i in batch], tokenized.lengths[batch])
        if known is None:
            raise _NotKnownError
        return known.rows

    def _collect(self, each: _Pass, batch: Ints, known: KnownRows | None) -> Collected:
        job = self.job
        assert each.request is not None  # noqa: S101 - otherwise there is nothing to collect
        call = each.call or ModelCall.of(job.loaded, each.request, job.conduct)
        collected = job.collect(call, each.request, batch, known)
        if collected is None:
            raise _TooLargeError(job.halved(batch))
        return collected

    def _advance(self, number: int, passes: int, batch: Ints) -> None:
        """Report a pass as its share of the tokens."""
        if self.job.progress is not None:
            tokens = self.job.tokenized.lengths[batch[batch >= 0]]
            share = int((tokens * (number + 1) // passes - tokens * number // passes).sum())
            self.job.progress(len(batch) if number + 1 == passes else 0, share)

    # ------------------------------------------------------------------------------------------------- handing over

    def _handed_over(self, scratch: Scratch, rows: Ints) -> Iterator[TokenBatch]:
        """The batches of a window, each with the values of all passes. Prompts that are stored meanwhile are left out."""
        job, number = self.job, 0
        for window in scratch.plan.windows:
            for batch in window:
                wanted = rows[batch] >= 0
                if wanted.any():
                    tokens = np.repeat(wanted, np.array(scratch.plan.lengths)[batch])
                    kept = [scratch.kept(each, number) for each in range(scratch.passes)]
                    levels = {
                        "tokens": self._joined("tokens", kept, None if tokens.all() else torch.from_numpy(tokens)),
                        "prompts": self._joined("prompts", kept, None if wanted.all() else torch.from_numpy(wanted)),
                    }
                    copying = Copying(rows[batch][wanted], levels["tokens"], levels["prompts"], None)
                    yield from batches_of(copying, job.tokenized, job.request.kept(job.loaded.num_layers))
                number += 1
            if job.after_window is not None:
                job.after_window()

    def _joined(self, level: str, kept: Sequence[PassValues], wanted: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The variables of one batch, those with layers from one pass for each layer."""
        found: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(name for each in kept for name in getattr(each, level)):
            pieces = [each for each in kept if name in getattr(each, level)]
            if self._is_layered(name):
                entries = [getattr(each, level)[name] for each in pieces]
                dtype = functools.reduce(torch.promote_types, (getattr(torch, entry.dtype) for entry in entries))
                values = torch.empty((len(entries), *entries[0].shape[1:]), dtype=dtype)
                for layer, each in enumerate(pieces):
                    values[layer].copy_(each.read(level, name)[0])
                found[name] = values if wanted is None else values[:, wanted]
            else:
                values = pieces[0].read(level, name)
                found[name] = values if wanted is None else values[wanted]
        return found

    def _is_layered(self, name: str) -> bool:
        site = split_variable(name)[0]
        return site == "router" or (site in self.job.request.places and self.job.request.places[site].layered)


def _values(collected: Collected) -> list[tuple[str, torch.Tensor]]:
    rows = [] if collected.handed_on is None else [("resid", collected.handed_on)]
    return [*rows, *collected.tokens.items(), *collected.prompts.items()]
