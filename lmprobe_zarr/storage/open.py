"""Which storage a path or URL names, and how its client is set up. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.storage.address import parse_address, unfilled, unfilled_name
from lmprobe_zarr.storage.azure import AzureStorage, azure_root
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.storage.client_errors import as_our_error, without_secrets
from lmprobe_zarr.storage.gcs import GcsStorage
from lmprobe_zarr.storage.http import HttpStorage
from lmprobe_zarr.storage.hub import HubBucketStorage, HubStorage, check_hub_url, is_bucket
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.storage.memory import MemoryStorage
from lmprobe_zarr.storage.pace import REMOTE_REQUESTS
from lmprobe_zarr.storage.remote import FsspecStorage
from lmprobe_zarr.storage.s3 import S3Storage
from lmprobe_zarr.storage.s3_obstore import ObstoreS3Storage

__all__ = ["open_storage"]

_S3: Final = ("s3", "s3a")
_OBJECT_STORES: Final = (*_S3, "gs", "gcs", "az", "abfs", "abfss")


def open_storage(url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None) -> Storage:
    """The place behind a path or URL. Writes nothing, and sends nothing unless the URL holds a name like ``$HOME`` or ``{run}``.

    Parameters
    ----------
    url : str or path
        A folder, or any URL that fsspec knows (``memory://…``, ``s3://…``, ``https://…``, chained ones too).
    storage_options : mapping, optional
        Passed to the fsspec file system.

    Raises
    ------
    InvalidTypeError
        `url` is neither text nor path.
    InvalidArgumentError
        fsspec does not know the protocol, a text looks like a URL and is none, or a path is not possible.
    """
    if isinstance(url, Storage):
        return url
    place, is_local = parse_address(url)
    if is_local:
        if storage_options:
            raise InvalidArgumentError(f"storage_options are for URLs, and {place!r} is a local path: leave them out")
        return LocalStorage(place)
    if place.startswith("hf://"):
        check_hub_url(place)
    options = dict(storage_options or {})
    client = options.pop("client", "s3fs")
    if client not in ("s3fs", "obstore") or (client == "obstore" and not place.startswith(("s3://", "s3a://"))):
        raise InvalidArgumentError(
            f"storage_options={{'client': {client!r:.40}}} for {place.split('://')[0]}://: 'obstore' is for s3:// only"
        )
    try:
        filesystem, root = fsspec.core.url_to_fs(place, **_with_defaults(place, options))
    except (ValueError, ImportError, TypeError, OSError) as error:
        raise InvalidArgumentError(f"{place.split('://')[0]}:// cannot be opened: {without_secrets(str(error))}") from error
    except Exception as error:
        # Of clients that look for credentials at once, and have errors of their own for what they do not find.
        if translated := as_our_error(error, without_secrets(place), "", writing=False, listing=False):
            raise translated from error
        raise
    # Look at the class: a caching file system passes on every attribute of the one that it wraps.
    kind = type(filesystem)
    if hasattr(kind, "call_s3"):
        storage: Storage = (ObstoreS3Storage if client == "obstore" else S3Storage)(filesystem, root, place)
    elif _is_a(kind, "GCSFileSystem", "gcsfs"):
        storage = GcsStorage(filesystem, root, place)
    elif _is_a(kind, "AzureBlobFileSystem", "adlfs"):
        storage = AzureStorage(filesystem, azure_root(place), place)
    elif _is_a(kind, "HfFileSystem", "huggingface_hub"):
        storage = (HubBucketStorage if is_bucket(place) else HubStorage)(filesystem, root, place)
    elif _is_a(kind, "HTTPFileSystem", "fsspec.implementations.http"):
        storage = HttpStorage(filesystem, root, place)
    else:
        storage = (MemoryStorage if issubclass(kind, MemoryFileSystem) else FsspecStorage)(filesystem, root, place)
    if (name := unfilled_name(place)) and not storage.list(""):
        raise unfilled(place, name)
    return storage


def _is_a(kind: type, name: str, module: str) -> bool:
    """Whether a class of file systems is one of a package, which need not be installed."""
    return any(base.__name__ == name and base.__module__.startswith(module) for base in kind.__mro__)


def _with_defaults(place: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's options and, for S3, Google and Azure, defaults with which reading takes few requests, many at a time."""
    before, _, last = place.rpartition("::")
    protocol = last.split("://")[0]
    if protocol not in _OBJECT_STORES:
        return dict(options)
    given = dict(options.get(protocol, {})) if before else dict(options)
    # Other writers make cached listings untrue.
    filled: dict[str, Any] = {"use_listings_cache": False, **given}
    if protocol in _S3:
        # s3fs requests the size of a file before it reads it, unless max_concurrency is 1. Its own retries multiply with botocore's.
        filled.setdefault("max_concurrency", 1)
        filled["config_kwargs"] = {
            "max_pool_connections": REMOTE_REQUESTS,
            "retries": {"mode": "standard", "total_max_attempts": 3},
            **(given.get("config_kwargs") or {}),
        }
    return {**options, protocol: filled} if before else filled
