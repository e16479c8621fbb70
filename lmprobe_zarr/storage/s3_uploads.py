"""`S3Pieces`, an object that is uploaded part by part and appears when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from lmprobe_zarr.errors import StoreNotFoundError
from lmprobe_zarr.storage.pieces import PieceWriter
from lmprobe_zarr.storage.remote import FsspecStorage

__all__ = ["PART_BYTES", "S3Pieces"]

# At least 5 MiB, at most 10,000 parts in one object; and all but the last of one size, which some servers require.
PART_BYTES: Final = 2**24
# What a server answers of a part, and wants to hear again when the upload is completed.
_OF_A_PART: Final = ("ETag", "ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256")


class S3Pieces(PieceWriter):
    """An object that is uploaded part by part; one put where it is smaller than a part.

    Parameters
    ----------
    storage : FsspecStorage
        With a file system of s3fs.
    key : str
    where : mapping of str to str
        The bucket and the name of the object, as arguments of a request.
    send : callable
        Sends one request: its name, and its arguments by name.
    """

    def __init__(self, storage: FsspecStorage, key: str, where: Mapping[str, str], send: Callable[..., Any]) -> None:
        super().__init__(f"{storage.url}/{key}")
        self._storage, self._key, self._where, self._request = storage, key, where, send
        self._waiting = bytearray()
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._may_be_whole = False

    def _call(self, verb: str, **request: Any) -> Any:
        return self._storage.call(partial(self._request, verb, **self._where, **request), key=self._key, writing=True)

    def _append(self, view: memoryview) -> None:
        self._waiting += view
        while len(self._waiting) >= PART_BYTES:
            self._send(PART_BYTES)

    def _send(self, nbytes: int) -> None:
        if self._upload is None:
            self._upload = self._call("create_multipart_upload")["UploadId"]
        number = len(self._parts) + 1
        with memoryview(self._waiting) as waiting:
            body = bytes(waiting[:nbytes])
        answer = self._call("upload_part", UploadId=self._upload, PartNumber=number, Body=body)
        self._parts.append({"PartNumber": number, **{name: answer[name] for name in _OF_A_PART if answer.get(name)}})
        del self._waiting[:nbytes]

    def _close(self) -> None:
        if self._upload is None:
            self._storage.write(self._key, bytes(self._waiting), durable=True)
            return
        if self._waiting:
            self._send(len(self._waiting))
        self._may_be_whole = True
        try:
            self._call("complete_multipart_upload", UploadId=self._upload, MultipartUpload={"Parts": self._parts})
        except StoreNotFoundError:
            raise
        except FileNotFoundError:
            # No such upload: the answer to a first try may have been lost, and the try repeated.
            if self._call("head_object").get("ContentLength") != self.nbytes:
                raise

    def _abort(self) -> None:
        # What cannot be aborted now stays until `gc` finds it.
        self._waiting = bytearray()
        if self._upload is not None:
            with suppress(OSError):
                self._call("abort_multipart_upload", UploadId=self._upload)
        if self._may_be_whole:
            self._storage.remove([self._key])
