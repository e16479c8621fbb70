"""`ObstoreS3Storage`, a prefix of a bucket that is read by obstore, a client in Rust that takes less of the processor for each request.

Everything that writes or removes, credentials, regions and endpoints stay those of s3fs; so options, profiles and errors are the same.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

from fsspec.asyn import sync

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.storage.base import FileInfo
from lmprobe_zarr.storage.client_errors import CutShortError
from lmprobe_zarr.storage.ranges import Answer, Run
from lmprobe_zarr.storage.remote import FsspecStorage, modified_at
from lmprobe_zarr.storage.s3 import S3Storage
from lmprobe_zarr.storage.threads import submit

__all__ = ["ObstoreS3Storage"]

T = TypeVar("T")

_STATUS: Final = re.compile(r"\b([345]\d\d) [A-Z][a-z]|status(?: code)?:? ([345]\d\d)\b")
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
_CUT: Final = re.compile(
    r"decoding response body|response body error|body from connection|IncompleteBody|IncompleteMessage|end of file", re.IGNORECASE
)
_BUCKET: Final = re.compile(r"[A-Za-z0-9._-]{1,255}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_SETTINGS: Final = ("s3_additional_kwargs", "version_aware", "cache_regions")  # of s3fs, which change requests
_TRIES: Final[Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=60)}


class ObstoreError(OSError):
    """An error of obstore, with code and status of the server's answer as botocore's errors have them, and without its text."""

    def __init__(self, what: str, code: str, status: int) -> None:
        super().__init__(what)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class ObstorePermissionError(ObstoreError, PermissionError):
    """The server refuses."""


class ObstoreConnectionError(ObstoreError, ConnectionError):
    """The server does not answer."""


class ObstoreS3Storage(S3Storage):
    """As `S3Storage`, with requests that read sent by obstore.

    Parameters
    ----------
    filesystem : s3fs.S3FileSystem
    root, url : str
        As for `FsspecStorage`.

    Raises
    ------
    InvalidArgumentError
        obstore is not installed, or a setting of s3fs has no counterpart in it.
    """

    most_requests = 64

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        super().__init__(filesystem, root, url)
        try:
            import obstore  # noqa: F401
        except ImportError as error:
            raise InvalidArgumentError(
                "storage_options={'client': 'obstore'} needs obstore: pip install lmprobe-zarr[obstore], or leave 'client' out"
            ) from error
        strange = [name for name in _SETTINGS if getattr(filesystem, name, None)]
        if not isinstance((filesystem.client_kwargs or {}).get("verify", True), bool):
            strange.append("verify")
        if strange:
            raise InvalidArgumentError(f"obstore has no {strange[0]!r} as s3fs has: leave it out of storage_options, or leave out 'client'")

    def _store(self) -> Any:
        return _opened(os.getpid(), self)

    def __hash__(self) -> int:
        return hash((id(self.filesystem), self.root))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObstoreS3Storage) and other.filesystem is self.filesystem and other.root == self.root

    def _ask(self, request: Callable[[Any], T]) -> T:
        """The result of requests that are sent with the client."""
        import obstore

        if not _BUCKET.fullmatch(self.object_of("")["Bucket"]):
            raise ObstoreError("no name of a bucket", "InvalidBucketName", 0)
        try:
            return request(self._store())
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            if isinstance(error, (ObstoreError, CutShortError)):
                raise
            raise _as_client_error(error) from None  # its text has addresses, and what the server answered

    def _name(self, key: str) -> str:
        return self.object_of(key)["Key"]

    def read(self, key: str) -> bytes:
        if not _is_taken(self._name(key)):
            return super().read(key)

        import obstore

        data: bytes = self.call(self._ask, lambda store: bytes(obstore.get(store, self._name(key)).bytes()), key=key)
        return data

    def _request(self, key: str, run: Run) -> Answer | None:
        if not _is_taken(self._name(key)):
            return super()._request(key, run)

        import obstore

        def ranged(store: Any) -> Answer | None:
            found = obstore.get(store, self._name(key), options={"range": (run.start, run.stop)})
            data, first = memoryview(found.bytes()), found.range[0]
            if len(data) < min(run.stop, int(found.meta["size"])) - first:
                raise CutShortError(f"{len(data)} bytes came of {run.header}")
            return Answer(first, data) if first <= run.start else None

        answer: Answer | None = self.call(self._ask, ranged, key=key)
        return answer

    def _was_repeated(self, error: BaseException | None, seconds: float) -> bool:
        return FsspecStorage._was_repeated(self, error, seconds)

    def scan(self, key: str) -> dict[str, FileInfo]:
        prefix = self._folder(key)[1]
        if not _is_taken(prefix.rstrip("/")):
            return super().scan(key)
        import obstore

        page = self.call(self._ask, lambda store: obstore.list_with_delimiter(store, prefix or None), key=key, listing=True)
        found = {str(folder).rstrip("/").rsplit("/", 1)[-1]: FileInfo(False, 0, None) for folder in page["common_prefixes"]}
        for entry in page["objects"]:
            # An empty object under the folder's own name, as some servers have it, comes without its slash.
            if (path := str(entry["path"])) != prefix.rstrip("/"):
                name = path.removeprefix(prefix)
                found[name] = FileInfo(True, int(entry["size"]), modified_at(entry))
        return dict(sorted(found.items()))

    def start_listing(self) -> Future[list[str]] | None:
        try:
            self._store()
        except Exception:  # noqa: BLE001 — the caller's next request says what is wrong
            return None
        prefix = self._folder("")[1]

        def first_keys(store: Any) -> list[str]:
            import obstore

            found = obstore.list(store, prefix or None, chunk_size=1000)
            return [str(entry["path"]).removeprefix(prefix) for entry in next(iter(found), [])]

        return submit(partial(self._ask, first_keys), self.pace)


def _is_taken(name: str) -> bool:
    """Whether obstore takes the name of an object; of others s3fs reads."""
    return not _CONTROL.search(name) and not {"", ".", ".."} & set(name.split("/"))


@functools.lru_cache(maxsize=64)
def _opened(pid: int, storage: ObstoreS3Storage) -> Any:  # noqa: ARG001 — a client does not survive a fork: one per process
    """The client for the bucket of a storage, as that of s3fs is set up."""
    from botocore.exceptions import NoCredentialsError
    from obstore.store import S3Store

    filesystem = storage.filesystem
    filesystem.connect()
    meta, options = filesystem.s3.meta, filesystem.client_kwargs or {}
    endpoint = str(meta.endpoint_url)
    config: Any = {
        "endpoint": endpoint,
        "region": meta.region_name or "us-east-1",
        "skip_signature": bool(filesystem.anon),
        "virtual_hosted_style_request": False,
        "request_payer": bool(filesystem.req_kw),
    }
    client: Any = {"timeout": "300s", "connect_timeout": "20s", "allow_http": endpoint.startswith("http://")}
    client |= {"allow_invalid_certificates": not options.get("verify", True)}

    held: Any = None if filesystem.anon else filesystem.s3._request_signer._credentials
    if held is None and not filesystem.anon:
        raise NoCredentialsError

    def credentials() -> Any:
        frozen = sync(filesystem.loop, held.get_frozen_credentials)
        return {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "token": frozen.token, "expires_at": None}

    provider = None if held is None else credentials
    return S3Store(storage.object_of("")["Bucket"], config=config, client_options=client, retry_config=_TRIES, credential_provider=provider)


def _as_client_error(error: Exception) -> Exception:
    """An error of obstore as one that `as_our_error` knows, without the text of the server's answer."""
    kind, text = type(error).__name__, str(error)
    status_found, code_found = _STATUS.search(text), _CODE.search(text)
    status = int(next(filter(None, status_found.groups()))) if status_found else 0
    code = code_found[1] if code_found else ""
    what = f"{kind}{f', status {status}' if status else ''}"
    if code == "NoSuchBucket":
        return ObstoreError(what, code, status)
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError":
        return FileNotFoundError(what)
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        return ObstorePermissionError(what, code, status or 403)
    if status:
        return ObstoreError(what, code, status)
    if _CUT.search(text):
        return CutShortError(what)
    return ObstoreConnectionError(what, code, status)
