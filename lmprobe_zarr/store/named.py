"""`NamedModel`: which stored groups a caller's ``model=`` names, be it a name, a hub id or a folder. The only place that decides this.

Looks at the records of groups, and at the model's folder where one is named. Never opens a view.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Final

from lmprobe_zarr import config
from lmprobe_zarr.errors import InvalidTypeError
from lmprobe_zarr.model_files import folder_name, weights_digest
from lmprobe_zarr.store.format import GroupInfo

__all__ = ["Model", "NamedModel"]

Model = str | os.PathLike[str]
WEIGHTS: Final = "weights"


class NamedModel:
    """The model that a call names, in any form that `lmprobe_zarr.extract` takes.

    A name or a hub id names all groups that are stored under it. A folder is the model that is in it: its groups are those with the
    digest of its weights, whatever their name. Of several models that are stored under a name, a folder of that name chooses the one in it.

    Parameters
    ----------
    model : str or path
        A name in the store, a hub id, or the path of a model's folder: absolute, relative, with ``~`` or a slash at its end.

    Raises
    ------
    InvalidTypeError
        Something else, such as a loaded model.
    """

    def __init__(self, model: Model) -> None:
        given = os.fspath(model) if isinstance(model, (str, os.PathLike)) else model
        if not isinstance(given, str):
            raise InvalidTypeError(
                f"model is a {type(model).__name__}: give the name that it is stored under, the hub id or the folder it was loaded from"
            )
        self.given = given
        self.is_path = isinstance(model, os.PathLike) or _must_be_path(given)

    @cached_property
    def path(self) -> Path | None:
        """The whole path, with links followed; None where a text is no path."""
        return _resolved(self.given)

    @cached_property
    def folder(self) -> Path | None:
        """The folder with the model, if there is one on this machine."""
        with suppress(OSError, ValueError):
            return self.path if self.path is not None and (self.path / "config.json").is_file() else None
        return None

    @cached_property
    def name(self) -> str:
        """The name that `lmprobe_zarr.extract` stores the model under, unless it is given another."""
        if self.folder is not None:
            return folder_name(self.folder)
        return (self.path.name if self.is_path and self.path is not None else "") or self.given

    @cached_property
    def digest(self) -> str | None:
        """The digest of the weights in the folder; None where there are none."""
        return None if self.folder is None else weights_digest(self.folder, config.weights_memory())

    def choose(self, groups: Iterable[GroupInfo], *, unknown: bool = False) -> list[GroupInfo]:
        """The groups of this model.

        Parameters
        ----------
        groups : iterable of GroupInfo
        unknown : bool
            Whether the caller says that groups of the folder's name are of this model even if they do not record their weights. Otherwise
            they are only if they are stored under the path itself, as lmprobe's entries are.

        Returns
        -------
        list of GroupInfo
            In the order of `groups`.
        """
        infos = list(groups)
        if not self.is_path and (named := [info for info in infos if info.model == self.given]):
            return self._of_folder(named)
        if self.folder is None:
            return self._under_path(infos) or [
                info for info in infos if info.model == self.name or (unknown and self._ends_in_name(info.model))
            ]
        silent = [info for info in infos if WEIGHTS not in info.provenance]
        found = self._under_path(silent)
        if self.digest is None:
            found = self._under_path(infos) or [info for info in infos if info.model == self.name]
        elif unknown:
            found += [info for info in silent if self._ends_in_name(info.model) and info not in found]
        equal = [info for info in infos if self._is_in_folder(info)]
        equal = [info for info in equal if info.model == self.name] or equal
        wanted = {info.name for info in ([*equal, *found] if unknown or not equal else equal)}
        return [info for info in infos if info.name in wanted]

    def is_named(self, info: GroupInfo) -> bool:
        """Whether a group could be of this model by its name alone, whatever its weights."""
        return info.model in (self.given, self.name) or bool(self._under_path([info]))

    def is_path_of(self, name: str) -> bool:
        """Whether a name, as lmprobe's caches have it, is this path, perhaps written in another way."""
        if name == self.given:
            return True
        return (self.folder is not None or (self.is_path and _names_path(name))) and _resolved(name) == self.path

    def _is_in_folder(self, info: GroupInfo) -> bool:
        """Whether a group is of the model in the folder: by its weights, or by its commit where the folder is a snapshot of a hub model."""
        if self.digest is not None and info.provenance.get(WEIGHTS) == self.digest:
            return True
        is_snapshot = self.folder is not None and self.folder.parent.name == "snapshots"
        return is_snapshot and self.folder is not None and (info.model, info.provenance.get("revision")) == (self.name, self.folder.name)

    def _ends_in_name(self, name: str) -> bool:
        """Whether a name is the folder's, or a path that ends in it, such as that of the folder before it was moved."""
        return name == self.name or (_must_be_path(name) and name.rstrip("/").rpartition("/")[2] == self.name)

    def _under_path(self, groups: Iterable[GroupInfo]) -> list[GroupInfo]:
        return [info for info in groups if self.is_path_of(info.model)]

    def _of_folder(self, named: list[GroupInfo]) -> list[GroupInfo]:
        """Of groups with one name, those that may be of the folder with that name, if there is one and it is one of several models."""
        if len({info.provenance.get(WEIGHTS, "") for info in named}) < 2 or self.digest is None:
            return named
        if not any(info.provenance.get(WEIGHTS) == self.digest for info in named):
            return named
        return [info for info in named if info.provenance.get(WEIGHTS, self.digest) == self.digest]


def _must_be_path(text: str) -> bool:
    """Whether a text can be no hub id (``owner/name``) and no plain name."""
    begins = text.startswith(("/", "~", "./", "../", ".\\", "..\\")) or text in (".", "..")
    return begins or text.endswith(("/", os.sep)) or text.count("/") > 1 or (os.sep != "/" and os.sep in text)


def _names_path(name: str) -> bool:
    return "/" in name or os.sep in name or name.startswith("~")


def _resolved(text: str) -> Path | None:
    with suppress(OSError, ValueError, RuntimeError):
        return Path(text).expanduser().resolve()
    return None
