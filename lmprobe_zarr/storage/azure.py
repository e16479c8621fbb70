"""`AzureStorage`, a prefix of a container of Azure Blob Storage: requests of Azure's client, whose credentials adlfs has found."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final
from uuid import uuid4

from fsspec.asyn import sync

from lmprobe_zarr.storage.base import FileInfo, media_type
from lmprobe_zarr.storage.client_errors import response_code
from lmprobe_zarr.storage.objects import ObjectStorage
from lmprobe_zarr.storage.pieces import PieceWriter
from lmprobe_zarr.storage.ranges import Answer, Run
from lmprobe_zarr.storage.remote import modified_at
from lmprobe_zarr.typing import Buffer

__all__ = ["PIECE_BYTES", "AzureStorage", "azure_root"]

PIECE_BYTES: Final = 2**24  # at most 50,000 blocks in one blob
# Azure's client waits 15 seconds before its second try, and longer before the next; `call` tries again sooner.
_ONCE: Final = {"retry_total": 0}


class AzureStorage(ObjectStorage):
    """A prefix of a container of Azure Blob Storage.

    adlfs's own verbs list a folder by all that begins with its name, look for a folder beside every missing file, and read names as parts
    of a URL.
    """

    def _blob(self, key: str) -> Any:
        return self.filesystem.service_client.get_blob_client(*self.object_of(key))

    def _ask(self, verb: Callable[[], Coroutine[Any, Any, Any]], key: str, *, writing: bool = False, listing: bool = False) -> Any:
        return self.call(partial(sync, self.filesystem.loop, verb), key=key, writing=writing, listing=listing)

    def read(self, key: str) -> bytes:
        data: bytes = self._ask(partial(self._get, key), key)
        return data

    read_current = read

    def _request(self, key: str, run: Run) -> Answer | None:
        data = self._ask(partial(self._get, key, offset=run.start, length=run.nbytes), key)
        return Answer(0, data, is_whole=True) if len(data) > run.nbytes else Answer(run.start, data)

    async def _get(self, key: str, **span: int) -> bytes:
        options = {"max_concurrency": self.filesystem.max_concurrency or 1, **self.filesystem._timeout_kwargs}
        stream = await self._blob(key).download_blob(**span, **options, **_ONCE)
        data: bytes = await stream.readall()
        return data

    def _length(self, key: str) -> int | None:
        size: int = self._ask(partial(self._blob(key).get_blob_properties, **_ONCE), key).size
        return size

    def is_file(self, key: str) -> bool:
        if not self.object_of(key)[1]:
            return False
        try:
            found = self._ask(partial(self._blob(key).get_blob_properties, **_ONCE), key)
        except FileNotFoundError as error:
            if type(error) is not FileNotFoundError:
                raise
            return False
        return not _is_folder(found)

    def _entries(self, key: str, *, deep: bool) -> Iterator[tuple[str, FileInfo]]:
        container, prefix = self._folder(key)
        client = self.filesystem.service_client.get_container_client(container)
        request: dict[str, Any] = {"name_starts_with": prefix or None, "include": ["metadata"], **_ONCE}
        pages = (client.list_blobs(**request) if deep else client.walk_blobs(**request, delimiter="/")).by_page()
        while True:
            page = self._ask(partial(_page, pages), key, listing=True)
            if page is None:
                return
            for entry in page:
                name = entry.name.removeprefix(prefix)
                if not hasattr(entry, "size") or entry.name.endswith("/") or _is_folder(entry):
                    yield name.rstrip("/"), FileInfo(False, 0, None)
                else:
                    yield name, FileInfo(True, int(entry.size or 0), modified_at(entry))
            if not pages.continuation_token:
                return

    def _put(self, key: str, data: Buffer, *, if_absent: bool) -> None:
        self._ask(partial(self._upload, key, bytes(data), if_absent), key, writing=True)

    async def _upload(self, key: str, data: bytes, if_absent: bool) -> None:
        from azure.storage.blob import ContentSettings

        about = {"content_settings": ContentSettings(content_type=kind)} if (kind := media_type(key)) else {}
        try:
            await self._blob(key).upload_blob(data, overwrite=not if_absent, **about, **self.filesystem._timeout_kwargs, **_ONCE)
        except Exception as error:
            if response_code(error)[0] == "BlobAlreadyExists":
                raise FileExistsError(key) from error
            raise

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        return _AzurePieces(self, key)

    def _delete(self, key: str) -> None:
        self._ask(partial(self._blob(key).delete_blob, **_ONCE), key, writing=True)


async def _page(pages: Any) -> list[Any] | None:
    """The next page of a listing; None after the last."""
    try:
        return [entry async for entry in await anext(pages)]
    except StopAsyncIteration:
        return None


def _is_folder(entry: Any) -> bool:
    """Whether a blob stands for a folder, as accounts with a hierarchy have them."""
    return {name.lower(): value for name, value in (entry.metadata or {}).items()}.get("hdi_isfolder") == "true"


def azure_root(place: str) -> str:
    """Container and prefix of a URL, with every character of its path; adlfs drops line breaks, and what follows some others."""
    host, _, path = place.rpartition("::")[2].partition("://")[2].partition("/")
    container, at, _ = host.partition("@")
    if not at and ".core.windows.net" in host:
        return path
    return f"{container}/{path}" if path else container


class _AzurePieces(PieceWriter):
    """A blob whose blocks are uploaded one by one, and which appears when their list is; one put where it is smaller than a block."""

    def __init__(self, storage: AzureStorage, key: str) -> None:
        super().__init__(f"{storage.url}/{key}")
        self._storage, self._key = storage, key
        self._waiting = bytearray()
        self._blocks: list[Any] = []
        self._may_be_whole = False

    def _append(self, view: memoryview) -> None:
        self._waiting += view
        while len(self._waiting) >= PIECE_BYTES:
            self._send(PIECE_BYTES)

    def _send(self, nbytes: int) -> None:
        from azure.storage.blob import BlobBlock

        name = uuid4().hex
        with memoryview(self._waiting) as waiting:
            body = bytes(waiting[:nbytes])
        self._storage._ask(partial(self._storage._blob(self._key).stage_block, name, body, **_ONCE), self._key, writing=True)
        self._blocks.append(BlobBlock(name))
        del self._waiting[:nbytes]

    def _close(self) -> None:
        if not self._blocks:
            self._storage.write(self._key, bytes(self._waiting), durable=True)
            return
        if self._waiting:
            self._send(len(self._waiting))
        self._may_be_whole = True
        blob = self._storage._blob(self._key)
        try:
            self._storage._ask(partial(blob.commit_block_list, self._blocks, **_ONCE), self._key, writing=True)
        except OSError:
            # The answer to a first try may have been lost, and the blocks of a blob that is whole cannot be listed again.
            with suppress(OSError):
                if self._storage._length(self._key) == self.nbytes:
                    return
            raise

    def _abort(self) -> None:
        # Blocks that no list names are seen by nobody, and Azure forgets them after a week.
        self._waiting = bytearray()
        if self._may_be_whole:
            self._storage.remove([self._key])
