"""Reads the folders of activault: one per hook, with files of ``torch.save`` that hold many packed rows of tokens each.

Layout (Tilde Research's activault, ``pipeline/vault/hook_uploader.py`` and ``pipeline/generate.py``, July 2025): ``<run>/cfg.json`` names
the model and the hooks. ``<run>/<hook>/metadata.json`` has the dtype and the width, and ``<run>/<hook>/<uuid>--<n>_<job>.saved.pt`` a
dictionary of ``states`` (row, position, hidden) and ``input_ids`` (row, position). Files of one uuid have the same rows in every hook.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import prompt_sha256
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped
from lmprobe_zarr.bridges.files import Files, Listed, map_files
from lmprobe_zarr.bridges.lmprobe_folders import DAMAGED, FLOATS, INTEGERS, OUTSIDE, SHAPES
from lmprobe_zarr.bridges.raw_arrays import RawArray, read_json
from lmprobe_zarr.bridges.row_source import RowSource
from lmprobe_zarr.bridges.torch_archive import read_archive
from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, NotAStoreError
from lmprobe_zarr.typing import Array

__all__ = ["ActivaultRun"]

METADATA: Final = "metadata.json"
_FILE: Final = re.compile(r"([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})--[\w.-]{1,80}\.pt")
_HOOK: Final = re.compile(r"(?:blocks\.(\d{1,5})|models\.layers\.(\d{1,5}))\.([a-z_.]+)")
#: What the modules were given or returned; whether that is what is added to the residual stream depends on the architecture.
_VARIABLES: Final = {"mlp.pre": "mlp_input", "mlp.post": "mlp_output", "self_attn.post": "attn_output"}
_UNKNOWN: Final = "hooks of which it is not known what they hold: say it with mapping="
_WHY: Final = {
    "self_attn.pre": "what the attention was given, or the output of the block before, by how the model calls it",
    "hook_resid_post": "the highest layer: activault cuts the model off after it, so its states have gone through the final norm",
}
OTHER_IDS: Final = "files whose tokens are not those of the same uuid in another hook"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an entry is found again: the states and ids of its file in each hook, and its row."""

    arrays: Mapping[tuple[str, int | None], RawArray]
    ids: RawArray
    row: int


class ActivaultRun(RowSource):
    """A run of activault, or the folder of one of its hooks.

    Parameters
    ----------
    files : Files
        The folder or prefix of the run, with ``cfg.json`` and a folder for each hook; or one hook's, with ``metadata.json``.
    mapping : mapping of str to (str or mapping of int to str), optional
        Instead of what hooks are called by themselves: variable to the name of its hooks with ``{layer}``, or to ``{layer: hook}``. Only
        these hooks are read.

    Raises
    ------
    NotAStoreError
        It is no such folder.
    InvalidArgumentError
        A hook of `mapping` is not there, or without `mapping` it is known of no hook what it holds.
    CorruptFileError
        ``cfg.json`` or a ``metadata.json`` is damaged.
    """

    def __init__(self, files: Files, mapping: Mapping[str, str | Mapping[int, str]] | None = None) -> None:
        self.files, self.is_local = files, files.is_local
        listed = files.list("")
        try:
            self.config: dict[str, Any] = read_json(files, "cfg.json") if any(item.name == "cfg.json" for item in listed) else {}
        except FileNotFoundError:
            self.config = {}
        if any(item.name == METADATA for item in listed):
            self._folders = {files.url.rstrip("/").rpartition("/")[2]: ""}
        else:
            self._folders = {
                item.name: f"{item.name}/"
                for item in listed
                if item.is_folder and any(each.name == METADATA for each in files.list(item.name))
            }
        if not self._folders:
            raise NotAStoreError(f"{files.url} is no run of activault: neither it nor a folder in it has a {METADATA}")
        self._skipped: list[Skipped] = [Skipped(name=item.name, reason=OUTSIDE) for item in listed if item.outside]
        self._hooks = self._mapped(mapping) if mapping is not None else self._known()
        self._holds: dict[tuple[Held, ...], tuple[Held, ...]] = {}

    @property
    def url(self) -> str:
        """The folder of the run."""
        return self.files.url

    @property
    def model(self) -> str | None:
        """The model that ``cfg.json`` names."""
        found = self.config.get("transformer_config")
        name = found.get("model_name") if isinstance(found, dict) else None
        return name if isinstance(name, str) else None

    def _mapped(self, mapping: Mapping[str, str | Mapping[int, str]]) -> dict[str, tuple[str, int | None]]:
        found: dict[str, tuple[str, int | None]] = {}
        for variable, names in mapping.items():
            if isinstance(names, Mapping):
                some = {str(hook): int(layer) for layer, hook in names.items()}
                absent = sorted(set(some) - set(self._folders))
            elif "{layer}" in names:
                match = re.compile(re.escape(names).replace(re.escape("{layer}"), r"(\d{1,5})"))
                some = {hook: int(each[1]) for hook in self._folders if (each := match.fullmatch(hook))}
                absent = [] if some else [names]
            else:
                found |= {names: (variable, None)} if names in self._folders else {}
                some, absent = {}, [] if names in self._folders else [names]
            if absent:
                raise InvalidArgumentError(f"{self.url} has no hook {absent[0]!r}: it has {', '.join(sorted(self._folders)[:5])}")
            found |= {hook: (variable, layer) for hook, layer in some.items()}
        return found

    def _known(self) -> dict[str, tuple[str, int | None]]:
        """Variable and layer of the hooks whose names say what they hold; the others are counted as skipped."""
        found: dict[str, tuple[str, int | None]] = {}
        upload = self.config.get("upload_config")
        hooks = upload.get("hooks") if isinstance(upload, dict) else None
        run = [str(hook) for hook in hooks] if isinstance(hooks, list) else []
        highest = max((_parts(hook)[0] for hook in (*run, *self._folders)), default=-1)
        for hook in sorted(self._folders):
            layer, name = _parts(hook)
            if name == "hook_resid_post" and run and layer < highest:
                found[hook] = "resid", layer
            elif name in _VARIABLES and hook.startswith("models."):
                found[hook] = _VARIABLES[name], layer
            else:
                why = (
                    _WHY.get(name, "")
                    if run or name != "hook_resid_post"
                    else "without cfg.json it is unknown whether it is the highest layer"
                )
                self._skipped.append(Skipped(name=hook, reason=_UNKNOWN, detail=why))
        if not found:
            why = next((f" ({each.detail})" for each in self._skipped if each.detail), "")
            raise InvalidArgumentError(
                f"{self.url}: it is not known what {min(self._folders)!r} holds{why}: "
                'give mapping={"resid": "blocks.{layer}.hook_resid_post"}'
            )
        return found

    def entries(self) -> Iterator[Entry | Skipped]:
        """One entry for each row of tokens; the token ids of a file are read, and no states."""
        yield from self._skipped
        by_uuid: dict[str, dict[str, list[Listed]]] = {}
        wanted = {hook: self._width_of(hook) for hook in self._hooks}
        for hook in self._hooks:
            for item in self.files.list(self._folders[hook].rstrip("/")):
                match = _FILE.fullmatch(item.name)
                if item.outside:
                    yield Skipped(name=f"{hook}/{item.name}", reason=OUTSIDE)
                elif match:
                    by_uuid.setdefault(match[1], {}).setdefault(hook, []).append(item)
                elif item.name.endswith(".pt"):
                    yield Skipped(name=f"{hook}/{item.name}", reason="files whose names are not activault's")
        for found in map_files(lambda uuid: self._of_uuid(uuid, by_uuid[uuid], wanted), sorted(by_uuid), local=self.is_local):
            yield from found

    def _of_uuid(self, uuid: str, items: Mapping[str, Sequence[Listed]], wanted: Mapping[str, tuple[str, int]]) -> list[Entry | Skipped]:
        """The rows of the files of one uuid, which are the same in every hook."""
        arrays: dict[tuple[str, int | None], RawArray] = {}
        first: tuple[RawArray, Array] | None = None
        rows: list[Entry | Skipped] = []
        for hook, (item, *more) in sorted(items.items()):
            name = f"{hook}/{item.name}"
            rows += [
                Skipped(name=f"{hook}/{other.name}", reason="files of a uuid that the hook has twice: the first is imported")
                for other in more
            ]
            opened = self._open(hook, item, wanted[hook])
            if isinstance(opened, Skipped):
                rows.append(opened)
                continue
            states, ids = opened
            try:
                numbers = ids.read()
            except CorruptFileError as error:
                rows.append(Skipped(name=name, reason=DAMAGED, detail=str(error)))
                continue
            if first is not None and not np.array_equal(numbers, first[1]):
                rows.append(Skipped(name=name, reason=OTHER_IDS, detail=f"they differ from {first[0].key}"))
                continue
            first = first or (ids, numbers)
            arrays[self._hooks[hook]] = states
        if first is not None:
            holds = self._described(arrays)
            rows += [
                Entry(
                    name=f"{uuid} row {row}",
                    sha256=prompt_sha256(np.asarray(numbers, np.int64)),
                    text=None,
                    n_tokens=len(numbers),
                    holds=holds,
                    place=_Place(arrays, first[0], row),
                )
                for row, numbers in enumerate(first[1])
            ]
        return rows

    def _described(self, arrays: Mapping[tuple[str, int | None], RawArray]) -> tuple[Held, ...]:
        found: dict[tuple[str, bool, str, tuple[int, ...]], list[int]] = {}
        for (variable, layer), states in arrays.items():
            layers = found.setdefault((variable, layer is not None, states.dtype, states.shape[2:]), [])
            layers += [] if layer is None else [layer]
        holds = [
            Held(level="tokens", variable=variable, layers=tuple(sorted(layers)) if layered else None, dtype=dtype, row_shape=row)
            for (variable, layered, dtype, row), layers in sorted(found.items())
        ]
        holds.append(Held(level="tokens", variable="token_id", layers=None, dtype="int64", row_shape=()))
        return self._holds.setdefault(tuple(holds), tuple(holds))

    def _width_of(self, hook: str) -> tuple[str, int]:
        """The dtype and the width that a hook's ``metadata.json`` says."""
        key = f"{self._folders[hook]}{METADATA}"
        try:
            found = read_json(self.files, key)
            dtype, width = str(found["dtype"]).removeprefix("torch."), int(found["d_in"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{self.url}/{key} is damaged: it has no dtype and no d_in") from error
        if dtype not in FLOATS or width < 1:
            raise CorruptFileError(f"{self.url}/{key} has the dtype {dtype!r:.40} and the width {width}")
        return dtype, width

    def _open(self, hook: str, item: Listed, wanted: tuple[str, int]) -> tuple[RawArray, RawArray] | Skipped:
        name = item.name
        try:
            found = read_archive(self.files, f"{self._folders[hook]}{name}", size=item.size)
        except (CorruptFileError, FileNotFoundError) as error:
            return Skipped(name=f"{hook}/{name}", reason=DAMAGED, detail=str(error))
        states, ids = found.get("states"), found.get("input_ids")
        if not isinstance(states, RawArray) or not isinstance(ids, RawArray) or ids.dtype not in INTEGERS:
            return Skipped(name=f"{hook}/{name}", reason=SHAPES, detail="it has no states and input_ids")
        if len(states.shape) != 3 or states.shape[:2] != ids.shape or (states.dtype, states.shape[2]) != wanted or 0 in states.shape:
            detail = f"states {states.dtype} {states.shape}, input_ids {ids.shape}, and {METADATA} says {wanted[0]} of width {wanted[1]}"
            return Skipped(name=f"{hook}/{name}", reason=SHAPES, detail=detail)
        return states, ids

    def rows(self, entry: Entry, held: Held, layer: int | None, start: int, stop: int) -> Array:
        """Some rows of one variable and layer; see `RowSource`."""
        place: _Place = entry.place
        array = place.ids if held.variable == "token_id" else place.arrays[held.variable, layer]
        return array.rows((place.row,), start, stop)


def _parts(hook: str) -> tuple[int, str]:
    """The layer and the rest of a hook's name; −1 for another name."""
    found = _HOOK.fullmatch(hook)
    return (-1, hook) if found is None else (int(found[1] or found[2]), found[3])
