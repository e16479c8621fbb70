"""`GcsStorage`, a prefix of a bucket of Google Cloud Storage: its JSON requests through gcsfs, which alone knows the credentials."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final
from urllib.parse import quote
from uuid import uuid4

import google_crc32c

from lmprobe_zarr.errors import StoreNotFoundError
from lmprobe_zarr.storage.base import FileInfo, media_type
from lmprobe_zarr.storage.objects import ObjectStorage
from lmprobe_zarr.storage.pieces import PieceWriter
from lmprobe_zarr.storage.ranges import Answer, Run, answered
from lmprobe_zarr.storage.remote import modified_at
from lmprobe_zarr.typing import Buffer

__all__ = ["PIECE_BYTES", "GcsStorage"]

PIECE_BYTES: Final = 2**24  # Google takes multiples of 256 KiB, but for the last one
_BINARY: Final = {"Content-Type": "application/octet-stream"}


class GcsStorage(ObjectStorage):
    """A prefix of a bucket of Google Cloud Storage.

    gcsfs's own verbs ask over gRPC what kind of bucket it is, each time where that is not allowed, look for a folder beside every file, and
    put data between marks that the data might hold. Zonal buckets, which only gRPC writes to, are not supported.
    """

    def _ask(self, method: str, path: str, *names: str, key: str = "", writing: bool = False, listing: bool = False, **request: Any) -> Any:
        return self.call(partial(self.filesystem.call, method, path, *names, **request), key=key, writing=writing, listing=listing)

    def _upload_path(self, key: str) -> str:
        return f"{self.filesystem._location}/upload/storage/v1/b/{quote(self.object_of(key)[0], safe='')}/o"

    def read(self, key: str) -> bytes:
        data: bytes = self._ask("GET", self.filesystem.url(self._path(key)), key=key)[1]
        return data

    read_current = read

    def _request(self, key: str, run: Run) -> Answer | None:
        answer: Answer | None = self.call(self._get, key, run, key=key)
        return answer

    def _get(self, key: str, run: Run) -> Answer | None:
        headers, data = self.filesystem.call("GET", self.filesystem.url(self._path(key)), headers={"Range": run.header})
        content_range = headers.get("Content-Range")
        return answered(run, data, is_partial=content_range is not None, content_range=content_range)

    def _length(self, key: str) -> int | None:
        size = self._ask("GET", "b/{}/o/{}", *self.object_of(key), key=key, fields="size", json_out=True).get("size")
        return None if size is None else int(size)

    def is_file(self, key: str) -> bool:
        if not self.object_of(key)[1]:
            return False
        try:
            self._ask("GET", "b/{}/o/{}", *self.object_of(key), key=key, fields="name", json_out=True)
        except FileNotFoundError:
            return False
        return True

    def _entries(self, key: str, *, deep: bool) -> Iterator[tuple[str, FileInfo]]:
        bucket, prefix = self._folder(key)
        request: dict[str, Any] = {"prefix": prefix or None, "delimiter": None if deep else "/", "maxResults": 1000}
        request |= {"fields": "items(name,size,updated),prefixes,nextPageToken"}
        while True:
            try:
                page = self._ask("GET", "b/{}/o", bucket, key=key, listing=True, json_out=True, **request)
            except FileNotFoundError as error:  # nothing but a bucket is missing in a listing
                raise StoreNotFoundError(f"{self.url} names a bucket that is not there: check its name, and the endpoint") from error
            for folder in page.get("prefixes") or ():
                yield folder.removeprefix(prefix).rstrip("/"), FileInfo(False, 0, None)
            for entry in page.get("items") or ():
                yield entry["name"].removeprefix(prefix), FileInfo(True, int(entry.get("size") or 0), modified_at(entry))
            if not page.get("nextPageToken"):
                return
            request["pageToken"] = page["nextPageToken"]

    def _put(self, key: str, data: Buffer, *, if_absent: bool) -> None:
        view = memoryview(data).cast("B")
        condition: dict[str, Any] = {"ifGenerationMatch": "0"} if if_absent else {}
        mark = uuid4().hex
        about = json.dumps({"name": self.object_of(key)[1], "crc32c": _as_google_writes(google_crc32c.value(bytes(view)))})
        parts = (f"--{mark}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{about}\r\n--{mark}\r\n"
                 f"Content-Type: {media_type(key) or _BINARY['Content-Type']}\r\n\r\n").encode()  # fmt: skip
        self._ask(
            "POST",
            self._upload_path(key),
            key=key,
            writing=True,
            uploadType="multipart",
            headers={"Content-Type": f'multipart/related; boundary="{mark}"'},
            data=b"".join((parts, view, f"\r\n--{mark}--".encode())),
            **condition,
        )

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        return _GcsPieces(self, key)

    def _delete(self, key: str) -> None:
        self._ask("DELETE", "b/{}/o/{}", *self.object_of(key), key=key, writing=True)


class _GcsPieces(PieceWriter):
    """An object that is uploaded in pieces, one behind the other, and appears with the last; one put where it is smaller than a piece."""

    def __init__(self, storage: GcsStorage, key: str) -> None:
        super().__init__(f"{storage.url}/{key}")
        self._storage, self._key = storage, key
        self._waiting = bytearray()
        self._sent = 0
        self._crc = 0
        self._upload: str | None = None

    def _append(self, view: memoryview) -> None:
        self._waiting += view
        self._crc = google_crc32c.extend(self._crc, bytes(view))
        while len(self._waiting) > PIECE_BYTES:  # the last piece says that it is the last
            self._send(PIECE_BYTES, last=False)

    def _send(self, nbytes: int, *, last: bool) -> dict[str, Any]:
        storage = self._storage
        if self._upload is None:
            request: dict[str, Any] = {"uploadType": "resumable", "name": storage.object_of(self._key)[1], "json": {}}
            headers = {"X-Upload-Content-Type": "application/octet-stream"}
            answer, _ = storage._ask("POST", storage._upload_path(self._key), key=self._key, writing=True, headers=headers, **request)
            self._upload = str(answer["Location"])
        stop = self._sent + nbytes
        with memoryview(self._waiting) as waiting:
            body = bytes(waiting[:nbytes])
        headers = {**_BINARY, "Content-Range": f"bytes {self._sent}-{stop - 1}/{stop if last else '*'}"}
        answer, text = storage._ask("PUT", self._upload, key=self._key, writing=True, headers=headers, data=body)
        if not last and (kept := answer.get("Range")):
            stop = int(kept.rpartition("-")[2]) + 1  # fewer than were sent, where the server could not take them all
        del self._waiting[: stop - self._sent]
        self._sent = stop
        return dict(json.loads(text)) if last else {}

    def _close(self) -> None:
        if self._upload is None:
            self._storage.write(self._key, bytes(self._waiting), durable=True)
            return
        while len(self._waiting) > PIECE_BYTES:
            self._send(PIECE_BYTES, last=False)
        stored = self._send(len(self._waiting), last=True)
        expected = _as_google_writes(self._crc)
        if stored.get("crc32c", expected) != expected:
            self._upload = None  # whole, and wrong
            self._storage.remove([self._key])
            raise OSError(
                f"{self.name} was changed on the way to the server, which has another checksum of it: nothing was kept; write again"
            )

    def _abort(self) -> None:
        self._waiting = bytearray()
        if self._upload is not None:
            # An upload that is not given up costs nothing, and Google forgets it after a week.
            with suppress(OSError):
                self._storage._ask("DELETE", self._upload, key=self._key, writing=True)
            self._storage.remove([self._key])


def _as_google_writes(crc32c: int) -> str:
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()
