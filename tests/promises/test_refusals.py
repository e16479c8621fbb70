"""Errors of a server by kind: what passes is tried again, and nothing that a server refuses is taken for damage or for nothing stored."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from s3_server import S3, Fault, Request
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import AccessDeniedError, CorruptPartError, LmprobeZarrError, NoSpaceError, ReadOnlyError, UnreachableError
from lmprobe_zarr.storage import open_storage, remote
from lmprobe_zarr.storage.client_errors import as_our_error, is_passing
from lmprobe_zarr.store import Store

# One try of botocore's, so that what is tested is what comes after it.
QUICK: dict[str, Any] = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
PASSING = [
    (429, "TooManyRequests"),
    (429, ""),
    (408, "RequestTimeout"),
    (400, "RequestTimeout"),
    (503, "SlowDownRead"),
    (400, "ThrottlingException"),
]
REPEATED = [(status, code, UnreachableError, "wait, and try again") for status, code in PASSING[:3]]
LASTING = [
    (400, "KMS.DisabledException", AccessDeniedError, "the key that encrypts it"),
    (400, "KMS.InvalidStateException", AccessDeniedError, "the key that encrypts it"),
    (403, "InvalidObjectState", AccessDeniedError, "archive"),
    (400, "InvalidRequest", UnreachableError, "InvalidRequest"),
    (418, "Teapot", UnreachableError, "Teapot"),
    (451, "UnavailableForLegalReasons", UnreachableError, "Legal"),
    (402, "PaymentRequired", UnreachableError, "PaymentRequired"),
    (400, "NobodyKnowsThisCode", UnreachableError, "NobodyKnowsThisCode"),
]


@pytest.fixture
def url(s3: S3) -> str:
    return f"s3://pub/{uuid.uuid4().hex}/acts"


@pytest.fixture
def few_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short waits of ours and none of s3fs, so that a refusal for ever is soon found out."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))


def opened(s3: S3, url: str, mode: Any = "a") -> Store:
    return lz.open_store(url, mode, storage_options=s3.options(counted=True, **QUICK))


def only(method: str, fault: Fault, times: int = 10**9, where: str = "") -> Callable[[Request], Fault | None]:
    left = [times]

    def decide(request: Request) -> Fault | None:
        if request.kind != method or where not in request.path or not left[0]:
            return None
        left[0] -= 1
        return fault

    return decide


@pytest.mark.parametrize(("status", "code"), PASSING)
@pytest.mark.few(1)
def test_a_refusal_that_passes_is_tried_again_in_every_verb(s3: S3, url: str, status: int, code: str) -> None:
    lz.open_store(url).write(GROUP, make_batch(["a", "b"]))
    for method in ("GET", "LIST"):
        s3.proxy.fault = only(method, Fault(status=status, code=code), 2)
        data = opened(s3, url, "r").dataset()
        np.testing.assert_array_equal(data.resid_mean.values, make_batch(["a", "b"]).prompts["resid_mean"])
    s3.proxy.fault = only("PUT", Fault(status=status, code=code), 2)
    opened(s3, url).write(GROUP, make_batch(["c"]))
    s3.proxy.fault = only("POST", Fault(status=status, code=code), 2)
    opened(s3, url).delete(GROUP.model, ["a"])
    s3.proxy.fault = lambda request: None
    assert sorted(lz.open_store(url).dataset().text.values) == ["b", "c"]


@pytest.mark.usefixtures("few_waits")
@pytest.mark.parametrize(("status", "code", "kind", "says"), [*REPEATED, *LASTING])
@pytest.mark.few(1)
def test_no_refusal_is_taken_for_damage_or_for_nothing_stored(
    s3: S3, url: str, status: int, code: str, kind: type[Exception], says: str
) -> None:
    lz.open_store(url).write(GROUP, make_batch(["a", "b"]))
    before = lz.open_store(url, "r").verify(progress=False)
    s3.proxy.fault = only("GET", Fault(status=status, code=code), where="resid_mean/c.")
    calls: list[Callable[[], Any]] = [
        lambda: opened(s3, url, "r").dataset().resid_mean.values,
        lambda: opened(s3, url).repair(progress=False),
        lambda: opened(s3, url, "r").verify(full=True, progress=False),
    ]
    for call in calls:
        with pytest.raises(kind, match=says) as caught:
            call()
        assert isinstance(caught.value, LmprobeZarrError)
        assert not isinstance(caught.value, CorruptPartError)
        assert url in str(caught.value)
    s3.proxy.fault = only("GET", Fault(status=status, code=code), where="/zarr.json")
    with pytest.raises(kind, match=says):
        lz.discover_cached(GROUP.model, "a", store=opened(s3, url))
    s3.proxy.fault = lambda request: None
    assert not before.problems
    assert not lz.open_store(url, "r").verify(full=True, progress=False).problems


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "QuotaExceeded"),
        (507, "XMinioStorageFull"),
        (400, "XMinioAdminBucketQuotaExceeded"),
        (507, ""),
        (400, "InsufficientStorageSpace"),
    ],
)
def test_a_quota_is_no_space_as_on_a_disk(s3: S3, url: str, status: int, code: str) -> None:
    s3.proxy.fault = only("PUT", Fault(status=status, code=code))
    with pytest.raises(NoSpaceError, match="raise the quota"):
        opened(s3, url).write(GROUP, make_batch(["a"]))
    s3.proxy.fault = lambda request: None
    assert lz.open_store(url).models() == []


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("status", "code"), [(400, "MissingContentMD5"), (501, "NotImplemented"), (405, "MethodNotAllowed"), (411, "MissingContentLength")]
)
def test_where_many_cannot_be_deleted_in_one_request_they_are_deleted_singly(s3: S3, url: str, status: int, code: str) -> None:
    store = opened(s3, url)
    store.write(GROUP, make_batch(["a", "b"]))
    s3.proxy.fault = only("POST", Fault(status=status, code=code))
    s3.proxy.reset()
    s3.proxy.fault = only("POST", Fault(status=status, code=code))
    assert store.delete(GROUP.model, ["a"]) == 1
    assert s3.proxy.kinds()["POST"] == 1, "asked for once"
    assert s3.proxy.kinds()["DELETE"] > 5
    assert lz.open_store(url).dataset().text.values.tolist() == ["b"]
    assert not lz.open_store(url).verify(progress=False).problems


def test_who_may_not_delete_is_told_so_and_not_asked_singly(s3: S3, url: str) -> None:
    store = opened(s3, url)
    store.write(GROUP, make_batch(["a", "b"]))
    s3.proxy.fault = only("POST", Fault(status=403, code="AccessDenied"))
    with pytest.raises(ReadOnlyError, match="cannot be written"):
        store.storage.remove(["zarr.json"])
    assert s3.proxy.kinds()["DELETE"] == 0


class StatusError(OSError):
    """As of clients that put the status into an attribute."""

    def __init__(self, **fields: Any) -> None:
        super().__init__("refused")
        self.__dict__.update(fields)


class HttpResponseError(Exception):
    """As of azure: no OSError at all."""

    status_code, error_code = 503, "ServerBusy"


class GcsHttpError(OSError):
    code = "429"


@pytest.mark.parametrize(
    "error", [StatusError(status=429), StatusError(status_code=503), GcsHttpError("slow"), HttpResponseError()], ids=repr
)
def test_errors_of_other_clients_are_of_the_same_kinds(error: Exception) -> None:
    assert is_passing(error)
    translated = as_our_error(error, "gs://team/acts", "f", writing=False, listing=False)
    assert isinstance(translated, UnreachableError)
    assert "gs://team/acts/f" in str(translated)


def test_an_error_of_a_client_that_nobody_knows_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    store = Store(storage)
    store.write(GROUP, make_batch(["a"]))
    data = store.dataset()

    def refuse(*args: Any, **kwargs: Any) -> bytes:
        raise OSError("the moon is in the wrong place")

    monkeypatch.setattr(type(storage.filesystem), "cat_file", refuse)  # type: ignore[attr-defined]
    with pytest.raises(UnreachableError, match="the moon"):
        _ = data.resid_mean.values
