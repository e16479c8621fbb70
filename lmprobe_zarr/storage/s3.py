"""`S3Storage`, a prefix of a bucket: single requests where s3fs sends several."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final

from fsspec.asyn import sync

from lmprobe_zarr.errors import AccessDeniedError, NoSpaceError, ReadOnlyError, StoreNotFoundError
from lmprobe_zarr.storage.base import FileInfo, media_type
from lmprobe_zarr.storage.client_errors import CutShortError, is_passing, response_code
from lmprobe_zarr.storage.pieces import PieceWriter, StrayUpload
from lmprobe_zarr.storage.ranges import Answer, Run, answered
from lmprobe_zarr.storage.remote import FsspecStorage, modified_at
from lmprobe_zarr.storage.s3_uploads import S3Pieces
from lmprobe_zarr.storage.threads import run_all, submit

__all__ = ["S3Storage"]

_DELETED_AT_ONCE: Final = 1000  # objects in one request, the most that S3 takes
_NOT_THERE: Final = {"NoSuchKey", "NoSuchVersion"}


class S3Storage(FsspecStorage):
    """A prefix of a bucket, with one request where fsspec's own methods send several.

    Those request a file's size before they read it, list a folder to find that a file is missing, list the folder above to find that one
    is empty, and do not report which objects could not be deleted.
    """

    # Set where the server refused to delete several objects in one request.
    _deletes_singly = False

    @property
    def server(self) -> str:
        # As the client has found it, which also looks at variables and profiles.
        with suppress(Exception):
            self.filesystem.connect()
            return str(self.filesystem.s3.meta.endpoint_url)
        return super().server

    def object_of(self, key: str) -> dict[str, str]:
        bucket, name, _ = self.filesystem.split_path(self._path(key))
        return {"Bucket": bucket, "Key": name}

    def send(self, verb: str, **request: Any) -> Any:
        """The answer to one request, as botocore gives it."""
        sent = time.monotonic()
        # Not every s3fs says of every request by itself that the reader pays.
        answer = self.filesystem.call_s3(verb, **self.filesystem.req_kw, **request)
        if answer.get("ResponseMetadata", {}).get("RetryAttempts"):
            # botocore repeats what a server refuses, without a word.
            self.pace.refused(sent)
        return answer

    def read(self, key: str) -> bytes:
        data: bytes = self.call(lambda: self._get(self.object_of(key))[1], key=key)
        return data

    def _request(self, key: str, run: Run) -> Answer | None:
        found, data = self.call(self._get, self.object_of(key), key=key, Range=run.header)
        is_partial = found.get("ResponseMetadata", {}).get("HTTPStatusCode", 206) == 206
        return answered(run, data, is_partial=is_partial, content_range=found.get("ContentRange"))

    def _get(self, where: dict[str, str], **request: str) -> tuple[Any, bytes]:
        answer = self.send("get_object", **where, **request)

        async def read() -> bytes:
            async with answer["Body"] as body:
                data: bytes = await body.read()
            return data

        try:
            return answer, sync(self.filesystem.loop, read)
        except Exception as error:
            # The client repeats requests that fail, but not one whose body ends early.
            raise CutShortError(str(error)) from error

    def _about(self, key: str) -> dict[str, Any]:
        return {"ContentType": kind} if (kind := media_type(key)) else {}

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        return S3Pieces(self, key, self.object_of(key), self.send)

    def stray_uploads(self, key: str) -> list[StrayUpload]:
        bucket, prefix = self._folder(key)
        root = self._folder("")[1]
        found: list[StrayUpload] = []
        request = {"Bucket": bucket, "Prefix": prefix}
        # Some servers list no uploads, and some accounts may not list them.
        with suppress(OSError, NotImplementedError, ValueError):
            while True:
                page = self.call(partial(self.send, "list_multipart_uploads", **request), key=key, listing=True)
                for entry in page.get("Uploads") or ():
                    if entry["Key"].startswith(prefix):  # not every server looks at the prefix
                        began = {"LastModified": entry.get("Initiated")}
                        found.append(StrayUpload(entry["Key"].removeprefix(root), entry["UploadId"], modified_at(began)))
                markers = {"KeyMarker": page.get("NextKeyMarker") or "", "UploadIdMarker": page.get("NextUploadIdMarker") or ""}
                if not page.get("IsTruncated") or request.items() >= markers.items():
                    break
                request |= markers
        return found

    def abort_uploads(self, uploads: Iterable[StrayUpload]) -> None:
        run_all([partial(self._abort_upload, upload) for upload in uploads], self.pace)

    def _abort_upload(self, upload: StrayUpload) -> None:
        request = {**self.object_of(upload.key), "UploadId": upload.name}
        with suppress(FileNotFoundError):
            self.call(partial(self.send, "abort_multipart_upload", **request), key=upload.key, writing=True)

    def _was_repeated(self, error: BaseException | None, seconds: float) -> bool:
        if isinstance(error, CutShortError):
            return super()._was_repeated(error, seconds)
        # botocore and s3fs repeat these, up to 15 times together.
        code, status = response_code(error)
        return status in (500, 502, 503, 504) or "SlowDown" in code or not status

    def is_file(self, key: str) -> bool:
        where = self.object_of(key)
        if not where["Key"]:
            return False
        try:
            self.call(partial(self.send, "head_object", **where), key=key)
        except StoreNotFoundError:
            raise
        except FileNotFoundError:
            return False
        return True

    def scan(self, key: str) -> dict[str, FileInfo]:
        bucket, prefix = self._folder(key)
        found = {}
        for page in self._pages(key, Bucket=bucket, Prefix=prefix, Delimiter="/"):
            for folder in page.get("CommonPrefixes", ()):
                found[folder["Prefix"].rstrip("/").rsplit("/", 1)[-1]] = FileInfo(False, 0, None)
            for entry in page.get("Contents", ()):
                # Some servers, and consoles in which one makes folders, store an empty object under the folder's own name.
                if name := entry["Key"].removeprefix(prefix):
                    found[name] = FileInfo(True, int(entry["Size"]), modified_at(entry))
        return dict(sorted(found.items()))

    def start_listing(self) -> Future[list[str]] | None:
        try:
            self.filesystem.connect()  # here: two threads that do it at once would make two clients
        except Exception:  # noqa: BLE001 — the caller's next request says what is wrong
            return None
        bucket, prefix = self._folder("")

        def first_keys() -> list[str]:
            page = self.send("list_objects_v2", Bucket=bucket, Prefix=prefix)
            return [entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ())]

        return submit(first_keys, self.pace)

    def sizes(self, key: str, names: Iterable[str]) -> dict[str, int]:
        wanted = set(names)
        bucket, prefix = self._folder(key)
        pages = self._pages(key, Bucket=bucket, Prefix=prefix)  # everything below, in all folders
        found = {entry["Key"].removeprefix(prefix): int(entry["Size"]) for page in pages for entry in page.get("Contents", ())}
        return {name: size for name, size in found.items() if name in wanted}

    def _folder(self, key: str) -> tuple[str, str]:
        where = self.object_of(key)
        return where["Bucket"], f"{where['Key']}/" if where["Key"] else ""

    def _pages(self, key: str, **request: str) -> Iterator[dict[str, Any]]:
        while True:
            page = self.call(partial(self.send, "list_objects_v2", **request), key=key, listing=True)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def remove(self, keys: Iterable[str]) -> None:
        self._delete([self.object_of(key) for key in keys])

    def remove_folders(self, keys: Iterable[str]) -> None:
        # Some servers keep folders and list empty ones; they remove a folder when its name, with a slash at the end, is deleted. On other
        # servers no object has that name, and nothing happens.
        folders = [self._folder(key) for key in sorted(keys, key=len, reverse=True)]
        self._delete([{"Bucket": bucket, "Key": name} for bucket, name in folders if name])

    def remove_tree(self, key: str) -> None:
        bucket, prefix = self._folder(key)
        pages = self._pages(key, Bucket=bucket, Prefix=prefix)
        self._delete([{"Bucket": bucket, "Key": entry["Key"]} for page in pages for entry in page.get("Contents", ())])

    def _delete(self, objects: list[dict[str, str]]) -> None:
        for start in range(0, len(objects), _DELETED_AT_ONCE):
            some = objects[start : start + _DELETED_AT_ONCE]
            request = {"Objects": [{"Key": item["Key"]} for item in some], "Quiet": True}
            answer = {} if self._deletes_singly else self._delete_many(some[0]["Bucket"], request)
            if self._deletes_singly:
                run_all([partial(self._delete_object, item) for item in some], self.pace)
            # The request succeeds even where no deletion was allowed.
            for failed in answer.get("Errors", ()):
                if failed.get("Code") not in _NOT_THERE:
                    what = f"{self.url} cannot be cleared of {failed.get('Key')!r} ({failed.get('Code')})"
                    raise ReadOnlyError(f"{what}: check that these credentials may delete")

    def _delete_many(self, bucket: str, request: dict[str, Any]) -> dict[str, Any]:
        """The server's answer; empty, with a note for all later calls, where it takes no such request."""
        try:
            answer = self.call(partial(self.send, "delete_objects", Bucket=bucket, Delete=request), writing=True)
            return dict(answer)
        except (AccessDeniedError, NoSpaceError, ReadOnlyError, StoreNotFoundError):
            raise
        except OSError as error:
            # Some servers have no such verb, and some want a checksum that current clients no longer send.
            if is_passing(error.__cause__) or response_code(error)[1] not in (400, 403, 405, 411, 501):
                raise
            self._deletes_singly = True
            return {}

    def _delete_object(self, item: dict[str, str]) -> None:
        with suppress(FileNotFoundError):
            self.call(partial(self.send, "delete_object", **item), key=item["Key"], writing=True)
