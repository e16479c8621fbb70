"""`HubStorage`, a repository of the Hugging Face Hub at one commit, for reading; and `HubDraft`, a folder that becomes its next commits.

A repository is git: it is written by commits of many files, and every file of a commit is there for ever under the commit's number. So a
repository is read at one commit, and published to as a whole. Buckets of the Hub are no repositories, and go the way of any other place.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn
from urllib.parse import quote, unquote

from lmprobe_zarr.errors import InvalidArgumentError, LmprobeZarrError, ReadOnlyError, UnreachableError
from lmprobe_zarr.storage.base import FileInfo
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.storage.objects import ObjectStorage
from lmprobe_zarr.storage.pieces import PieceWriter
from lmprobe_zarr.storage.ranges import Answer, Run, answered
from lmprobe_zarr.storage.remote import FsspecStorage
from lmprobe_zarr.typing import Buffer

__all__ = ["HubBucketStorage", "HubDraft", "HubRepo", "HubStorage", "check_hub_url", "is_bucket", "parse_repo"]

_REPO: Final = re.compile(r"(?:(datasets|spaces|models)/)?([^/@\s]+/[^/@\s]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?", re.DOTALL)
_SECONDS: Final = 60.0  # without a byte of an answer
_FILES_AT_ONCE: Final = 100  # that are uploaded before the next are looked at
_FILES_IN_COMMIT: Final = 1000
# One entry for each block without progress bars, behind True where they are shown again after the last.
_bars: Final[list[bool]] = []
_bars_lock: Final = threading.Lock()
# The Hub's own file, in every repository.
_ATTRIBUTES: Final = ".gitattributes"


class HubRepo(NamedTuple):
    """What a URL of the Hub names: kind ("dataset", "model" or "space"), owner and name, revision, and a folder in the repository."""

    kind: str
    name: str
    revision: str | None
    folder: str


def is_bucket(url: str) -> bool:
    """Whether a URL names a bucket of the Hub, and no repository."""
    return url.rpartition("::")[2].removeprefix("hf://").startswith("buckets/")


def parse_repo(url: str) -> HubRepo:
    """The repository of a URL such as ``hf://datasets/org/name@revision/folder``.

    Raises
    ------
    InvalidArgumentError
        It names none.
    """
    text = url.rpartition("::")[2].removeprefix("hf://").strip("/")
    found = _REPO.fullmatch(text)
    if found is None or found[2].startswith(("datasets/", "spaces/", "models/")):
        raise InvalidArgumentError(f"{url!r} names no repository of the Hub: give it as 'hf://datasets/ORGANISATION/NAME'")
    kind = (found[1] or "models").removesuffix("s")
    return HubRepo(kind, found[2], None if found[3] is None else unquote(found[3]), (found[4] or "").strip("/"))


def check_hub_url(url: str) -> None:
    """Raise `InvalidArgumentError` for a URL of the Hub that names neither a repository nor a bucket."""
    if not is_bucket(url):
        parse_repo(url)
    elif len([part for part in url.partition("buckets/")[2].split("/") if part]) < 2:
        raise InvalidArgumentError(f"{url!r} names no bucket of the Hub: give it as 'hf://buckets/ORGANISATION/NAME'")


class HubStorage(FsspecStorage):
    """A folder of a repository at one commit, which is looked up at the first request and stays: never two revisions in one reading.

    Parameters
    ----------
    filesystem : huggingface_hub.HfFileSystem
        It alone knows the token.
    root, url : str
        As of any storage.
    commit : str, optional
        The commit to read; None finds the one that the revision names now.
    """

    def __init__(self, filesystem: Any, root: str, url: str, commit: str | None = None) -> None:
        super().__init__(filesystem, root, url)
        self.repo = parse_repo(url)
        self._found = commit
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.filesystem, self.root, self.url, self._found)

    @property
    def commit_id(self) -> str:
        """The number of the commit that is read."""
        with self._lock:
            if self._found is None:
                self._found = str(self.ask("repo_info", revision=self.repo.revision).sha)
            return self._found

    def forget(self) -> None:
        """Look the revision up again at the next request, after a commit of one's own."""
        with self._lock:
            self._found = None

    def ask(self, verb: str, *args: Any, key: str = "", writing: bool = False, listing: bool = False, **given: Any) -> Any:
        """What a method of `huggingface_hub.HfApi` returns for this repository, with errors of this package."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.filesystem.endpoint, token=self.filesystem.token)
        method = partial(getattr(api, verb), self.repo.name, *args, repo_type=self.repo.kind, **given)
        try:
            return self.call(_whole, method, key=key, writing=writing, listing=listing)
        except LmprobeZarrError:
            raise
        except ValueError as error:  # of a card that the Hub does not take, or of an answer that is none of the Hub's
            if type(error).__name__ == "JSONDecodeError":
                raise UnreachableError(f"{self.url} was answered with something else than JSON: check the endpoint, try again") from error
            raise InvalidArgumentError(f"{self.url} was refused by the Hub's client: {error}") from error

    def _in_repo(self, key: str) -> str:
        return "/".join(part for part in (self.repo.folder, key) if part)

    def _get(self, key: str, headers: dict[str, str]) -> Any:
        above = "" if self.repo.kind == "model" else f"{self.repo.kind}s/"
        return _fetched(self, f"{above}{self.repo.name}/resolve/{self.commit_id}/{quote(self._in_repo(key))}", headers)

    def read(self, key: str) -> bytes:
        data: bytes = self.call(self._get, key, {}, key=key).content
        return data

    read_current = read

    def _request(self, key: str, run: Run) -> Answer | None:
        return _range_of(run, self.call(self._get, key, {"Range": run.header}, key=key))

    def _file(self, key: str) -> Any:
        """The Hub's entry of a file; None where there is none."""
        found = self.ask("get_paths_info", [self._in_repo(key)], revision=self.commit_id, key=key) if self._in_repo(key) else []
        return next((entry for entry in found if hasattr(entry, "size")), None)

    def _length(self, key: str) -> int | None:
        entry = self._file(key)
        return None if entry is None else int(entry.size)

    def is_file(self, key: str) -> bool:
        return self._file(key) is not None

    def scan(self, key: str) -> dict[str, FileInfo]:
        folder = self._in_repo(key)
        try:
            entries = self.ask("list_repo_tree", folder or None, revision=self.commit_id, key=key, listing=True)
        except FileNotFoundError as error:
            if type(error) is not FileNotFoundError:
                raise
            return {}
        names = ((entry.path.removeprefix(f"{folder}/" if folder else ""), entry) for entry in entries)
        found = {name: FileInfo(hasattr(entry, "size"), int(getattr(entry, "size", 0)), None) for name, entry in names}
        return dict(sorted((name, info) for name, info in found.items() if name != _ATTRIBUTES))

    def may_write(self) -> bool:
        return False

    def _refuse(self, *args: Any, **given: Any) -> NoReturn:
        raise ReadOnlyError(
            f"{self.url} is a repository of the Hub, which no single file is written to: store.publish({self.url!r}) writes a whole copy\n"
            "a bucket, hf://buckets/…, or a local folder is written to part by part"
        )

    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        self._refuse()

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        self._refuse()

    def commit(self, key: str, data: Buffer, *, durable: bool, replace: bool = True) -> None:
        self._refuse()

    def touch(self, key: str) -> None:
        self._refuse()

    remove = remove_folders = remove_tree = _refuse

    def make_repo(self, private: bool | None) -> None:
        """Make the repository unless it is there.

        Raises
        ------
        InvalidArgumentError
            It is there, open to everyone, and was to be private.
        """
        self.ask("create_repo", private=private, exist_ok=True, writing=True)
        if private and not self.ask("repo_info").private:
            raise InvalidArgumentError(
                f"{self.url} is open to everyone already, and nothing was published: make it private in its settings, or give another name"
            )


class HubBucketStorage(ObjectStorage):
    """A folder of a bucket of the Hub, which has no revisions: files are written one by one, and replaced.

    `HfFileSystem` keeps listings for ever, and looks for a file in them before it reads it: a file of another writer would be missing.
    """

    def object_of(self, key: str) -> tuple[str, str]:
        owner, name, *folders = self._path(key).removeprefix("buckets/").split("/")
        return f"{owner}/{name}", "/".join(folders)

    def _ask(self, verb: str, *args: Any, key: str = "", writing: bool = False, listing: bool = False, **given: Any) -> Any:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.filesystem.endpoint, token=self.filesystem.token)
        method = partial(getattr(api, verb), self.object_of("")[0], *args, **given)
        with _without_bars():
            return self.call(_whole, method, key=key, writing=writing, listing=listing)

    def _get(self, key: str, headers: dict[str, str]) -> Any:
        bucket, path = self.object_of(key)
        return _fetched(self, f"buckets/{bucket}/resolve/{quote(path, safe='')}", headers)

    def read(self, key: str) -> bytes:
        data: bytes = self.call(self._get, key, {}, key=key).content
        return data

    read_current = read

    def _request(self, key: str, run: Run) -> Answer | None:
        return _range_of(run, self.call(self._get, key, {"Range": run.header}, key=key))

    def _length(self, key: str) -> int | None:
        found = self._ask("get_bucket_paths_info", [self.object_of(key)[1]], key=key)
        return next((int(entry.size) for entry in found), None)

    def is_file(self, key: str) -> bool:
        return bool(self.object_of(key)[1]) and self._length(key) is not None

    def _entries(self, key: str, *, deep: bool) -> Iterator[tuple[str, FileInfo]]:
        folder = self._folder(key)[1]
        try:
            found = self._ask("list_bucket_tree", folder.rstrip("/") or None, recursive=deep, key=key, listing=True)
        except FileNotFoundError as error:
            if type(error) is not FileNotFoundError:
                raise
            return
        for entry in found:
            if entry.path.startswith(folder) and entry.path != folder:
                is_file = hasattr(entry, "size")
                changed = entry.uploaded_at.timestamp() if is_file and entry.uploaded_at else None
                yield entry.path.removeprefix(folder).rstrip("/"), FileInfo(is_file, int(entry.size) if is_file else 0, changed)

    def _put(self, key: str, data: Buffer, *, if_absent: bool) -> None:
        # A bucket has no condition for a put: the file is looked for first.
        if if_absent and self.is_file(key):
            raise FileExistsError(key)
        self._ask("batch_bucket_files", add=[(bytes(data), self.object_of(key)[1])], key=key, writing=True)

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        return _BucketPieces(self, key)

    def _delete(self, key: str) -> None:
        self._ask("batch_bucket_files", delete=[self.object_of(key)[1]], key=key, writing=True)


class _BucketPieces(PieceWriter):
    """A file that is written to a temporary one, and uploaded when that is whole."""

    def __init__(self, storage: HubBucketStorage, key: str) -> None:
        super().__init__(f"{storage.url}/{key}")
        self._storage, self._key = storage, key
        self._draft: str | None = None

    def _append(self, view: memoryview) -> None:
        with self._storage.translating_errors(self._key, writing=True):
            if self._draft is None:
                number, self._draft = tempfile.mkstemp(prefix="lmprobe-zarr-piece-")
                os.close(number)
            with open(self._draft, "ab") as file:  # none stays open: hundreds may be written at the same time
                file.write(view)

    def _close(self) -> None:
        if self._draft is None:
            self._storage.write(self._key, b"", durable=True)
            return
        path = self._storage.object_of(self._key)[1]
        self._storage._ask("batch_bucket_files", add=[(self._draft, path)], key=self._key, writing=True)
        self._abort()

    def _abort(self) -> None:
        if self._draft is not None:
            os.unlink(self._draft)
            self._draft = None


def _fetched(storage: FsspecStorage, path: str, headers: dict[str, str]) -> Any:
    """The Hub's answer to the request for a file, behind its redirections; the client drops the token where they lead to another host."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

    filesystem = storage.filesystem
    sent = {**build_hf_headers(token=filesystem.token), "Accept-Encoding": "identity", **headers}
    answer = http_backoff("GET", f"{filesystem.endpoint}/{path}", headers=sent, timeout=_SECONDS)
    hf_raise_for_status(answer)
    return answer


def _range_of(run: Run, answer: Any) -> Answer | None:
    return answered(run, answer.content, is_partial=answer.status_code == 206, content_range=answer.headers.get("Content-Range"))


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of the Hub's client, which go into files and pipes too."""
    from huggingface_hub import utils

    with _bars_lock:
        if not _bars and not utils.are_progress_bars_disabled():  # type: ignore[attr-defined]
            utils.disable_progress_bars()  # type: ignore[attr-defined]
            _bars.append(True)  # to be shown again by the last one
        _bars.append(False)
    try:
        yield
    finally:
        with _bars_lock:
            _bars.pop()
            if _bars == [True]:
                _bars.clear()
                utils.enable_progress_bars()  # type: ignore[attr-defined]


class HubDraft(LocalStorage):
    """A temporary folder whose files become files of a repository: the context removes the folder in the end.

    Parameters
    ----------
    storage : HubStorage
        The repository, which `make_repo` has made.
    """

    def __init__(self, storage: HubStorage) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="lmprobe-zarr-publish-")
        super().__init__(self._temporary.name)
        self.target = storage
        self.url = storage.url

    def __enter__(self) -> HubDraft:
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    @_without_bars()
    def upload(self, last: Sequence[str], is_old: Callable[[str], bool], advance: Callable[[int], None]) -> int:
        """Upload all files in as few commits as the Hub takes; returns how many commits.

        The content of large files goes up first, and none that the Hub has already. What is there and is not in the draft any more is
        removed by the last commit, which brings the files that make the rest visible.

        Parameters
        ----------
        last : sequence of str
            Keys of the files that the last commit brings.
        is_old : callable
            Whether a file of the repository, by its key, is removed where the draft has none of that key.
        advance : callable
            Called with the number of bytes that were uploaded, or were there.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        target = self.target
        revision = target.repo.revision
        keys = sorted(os.path.relpath(os.path.join(folder, name), self.root) for folder, _, names in os.walk(self.root) for name in names)
        first = [key for key in keys if key not in last]
        new = {target._in_repo(key): os.path.join(self.root, key) for key in (*first, *(key for key in last if key in keys))}
        additions = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in new.items()]
        for start in range(0, len(first), _FILES_AT_ONCE):
            some = additions[start : min(start + _FILES_AT_ONCE, len(first))]
            target.ask("preupload_lfs_files", some, revision=revision, free_memory=False, writing=True)
            advance(sum(os.path.getsize(new[addition.path_in_repo]) for addition in some))
        head = target.repo.folder
        there = target.ask("list_repo_tree", head or None, recursive=True, revision=revision, listing=True) if self._is_there(head) else []
        gone = [entry.path for entry in there if hasattr(entry, "size") and entry.path not in new]
        deletions = [CommitOperationDelete(path_in_repo=path) for path in gone if is_old(path.removeprefix(f"{head}/" if head else ""))]
        whole = max(0, len(additions) - _FILES_IN_COMMIT)
        batches: list[list[Any]] = [additions[start : min(start + _FILES_IN_COMMIT, whole)] for start in range(0, whole, _FILES_IN_COMMIT)]
        batches.append([*additions[whole:], *deletions])
        for number, batch in enumerate(batches, 1):
            message = "Publish activations" + (f" ({number} of {len(batches)})" if len(batches) > 1 else "")
            target.ask("create_commit", batch, commit_message=message, revision=revision, writing=True)
        target.forget()
        return len(batches)

    def _is_there(self, folder: str) -> bool:
        return not folder or bool(self.target.scan(""))


def _whole(method: Callable[[], Any]) -> Any:
    """What a method of the Hub's client returns; a listing whole, since its later pages are requests too."""
    try:
        answer = method()
        return list(answer) if hasattr(answer, "__next__") else answer
    except RuntimeError as error:
        # Of a thread that uploads a file; what went wrong is its cause.
        raise error.__cause__ or error from None
