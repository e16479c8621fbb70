"""`PieceWriter`, a file that is written piece by piece, and `StrayUpload`, what an interrupted writer of one leaves on an object store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Buffer

__all__ = ["PieceWriter", "StrayUpload"]


class PieceWriter(ABC):
    """A file that is written piece by piece, by one thread at a time. Not picklable.

    The block of a ``with`` statement closes it at its end, and aborts it where an exception leaves the block, be it a KeyboardInterrupt.
    An error in `append` or `close` aborts it too.

    Attributes
    ----------
    name : str
        Place and key, for messages.
    nbytes : int
        How many bytes were appended.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self._is_open = True
        self._is_whole = False

    def append(self, data: Buffer | tuple[Buffer, ...]) -> None:
        """Append bytes, given in one or several buffers, which may be used for other things afterwards.

        Raises
        ------
        InvalidArgumentError
            The file was closed or aborted.
        """
        if not self._is_open:
            raise InvalidArgumentError(f"{self.name} is {'whole' if self._is_whole else 'given up'}: nothing can be appended to it")
        try:
            for piece in data if isinstance(data, tuple) else (data,):
                view = memoryview(piece).cast("B")
                if view:
                    self._append(view)
                    self.nbytes += len(view)
        except BaseException:
            self._give_up()
            raise

    def close(self) -> None:
        """Make the file whole. Does nothing to one that is whole.

        Raises
        ------
        InvalidArgumentError
            It was aborted.
        """
        if self._is_whole:
            return
        if not self._is_open:
            raise InvalidArgumentError(f"{self.name} is given up: it cannot become whole")
        try:
            self._close()
        except BaseException:
            self._give_up()
            raise
        self._is_open, self._is_whole = False, True

    def abort(self) -> None:
        """Remove what was written. Does nothing to a file that is whole, or was aborted."""
        if self._is_open:
            self._is_open = False
            self._abort()

    def _give_up(self) -> None:
        with suppress(Exception):  # the error that led here is the one to raise
            self.abort()

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._give_up()

    @abstractmethod
    def _append(self, view: memoryview) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StrayUpload:
    """An upload in parts that was begun and neither completed nor aborted. Its parts take space, and no listing of files shows them.

    Parameters
    ----------
    key : str
        Of the file that it was to become.
    name : str
        The server's name of the upload.
    began : float, optional
        When, in seconds since 1970; None where the server does not say.
    """

    key: str
    name: str
    began: float | None
