"""Errors of S3 and web clients as errors of this package, and URLs without their secrets. Never sends a request."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from typing import Final

from lmprobe_zarr.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    NoSpaceError,
    ReadOnlyError,
    StoreNotFoundError,
    UnreachableError,
)

__all__ = ["CutShortError", "as_our_error", "is_passing", "response_code", "without_secrets"]

_EXPIRED: Final = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
_UNKNOWN_KEY: Final = {"InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch"}
_ELSEWHERE: Final = {"301", "307", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_NO_CREDENTIALS: Final = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "ConfigNotFound", "TokenRetrievalError",
    "UnauthorizedSSOTokenError", "SSOTokenLoadError", "InvalidConfigError",
}  # fmt: skip
_NETWORK: Final = {"ConnectionError", "TimeoutError", "ClientConnectionError", "HTTPClientError", "FSTimeoutError"}
_CAUSES: Final = 5  # that are looked at behind an error
_QUOTA: Final = re.compile(r"quota|storage.?full|insufficient.?storage|no.?space|disk.?full|storage.?limit", re.IGNORECASE)
_NO_SPACE_NUMBERS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PASSING: Final = {
    "BandwidthLimitExceeded", "InternalError", "OperationAborted", "PriorRequestNotComplete", "RequestLimitExceeded", "RequestTimeout",
    "RequestTimeoutException", "ServiceUnavailable", "rateLimitExceeded", "userRateLimitExceeded",
}  # fmt: skip
_CUT_SHORT: Final = {"ClientPayloadError", "CutShortError", "IncompleteRead", "ResponseParserError", "ResponseStreamingError"}


class CutShortError(OSError):
    """The answer to a request has fewer bytes than it should have, so that the same request may succeed a little later."""


def response_code(error: BaseException | None) -> tuple[str, int]:
    """Error code and HTTP status of the response behind a client's error; ``("", 0)`` where there is none."""
    seen = 0
    while error is not None and seen < _CAUSES:
        names = {kind.__name__ for kind in type(error).__mro__}
        response = getattr(error, "response", None)
        if isinstance(response, Mapping):  # botocore
            return str(response.get("Error", {}).get("Code") or ""), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        # aiohttp, gcsfs, azure, requests and httpx in this order.
        for holder, name in ((error, "status"), (error, "code"), (error, "status_code"), (response, "status_code")):
            status = getattr(holder, name, None)
            if isinstance(status, str) and status.isdigit():
                status = int(status)
            if isinstance(status, int) and 400 <= status < 600 and ("Error" in type(error).__name__ or names & {"OSError"}):
                return str(getattr(error, "error_code", "") or ""), status
        error, seen = error.__cause__, seen + 1
    return "", 0


def is_passing(error: BaseException | None) -> bool:
    """Whether a refusal is one that passes by itself, so that the same request may succeed a little later."""
    if error is None:
        return False
    code, status = response_code(error)
    if _QUOTA.search(code):
        return False
    if code in _PASSING or re.search(r"slow.?down|throttl|too.?many.?req|limit.?exceeded|busy|try.?again", code, re.IGNORECASE):
        return True
    if status in (408, 425, 429) or (status >= 500 and status not in (501, 505, 507)):
        return True
    return bool({kind.__name__ for kind in type(error).__mro__} & _CUT_SHORT)


def as_our_error(error: Exception, url: str, key: str, *, writing: bool, listing: bool) -> Exception | None:
    """The package's own error for an error of a file system's client; None where the client's own error should be raised."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code, status = response_code(error)
    where = f"{url}/{key}" if key else url
    if code == "NoSuchBucket":
        return StoreNotFoundError(f"{url} names a bucket that is not there: check its name, and the endpoint")
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)) or status in (412, 416):
        return None
    if status in (404, 410):
        return FileNotFoundError(where)
    full = isinstance(error, OSError) and error.errno in _NO_SPACE_NUMBERS
    if full or (writing and (status == 507 or _QUOTA.search(code))):
        detail = code or getattr(error, "strerror", None) or f"status {status}"
        return NoSpaceError(f"no space left for {where} ({detail}): what was committed is whole; free some space or raise the quota")
    if code == "InvalidObjectState" or "archiv" in code.lower():
        return AccessDeniedError(
            f"{where} was moved to an archive ({code}) and cannot be read from there: restore the object, or copy it to a class of storage "
            "that is read at once"
        )
    if is_passing(error):
        reason = f"status {status}{code and f', {code}'}" if status or code else type(error).__name__
        if {kind.__name__ for kind in type(error).__mro__} & _CUT_SHORT:
            return UnreachableError(f"{where} came cut short, again and again ({type(error).__name__}): check the network, and try again")
        return UnreachableError(f"{where} is overloaded or broken, again and again ({reason}): wait, and try again")
    if code.lower().startswith("kms"):
        return AccessDeniedError(f"{where} was refused ({code}): the key that encrypts it cannot be used; enable it, or allow its use")
    if code in _EXPIRED:
        return AccessDeniedError(f"{where} was refused ({code}): the token has expired or is not valid; fetch new credentials, open again")
    if code in _UNKNOWN_KEY:
        return AccessDeniedError(
            f"{where} was refused ({code}): check key and secret, in storage_options= or, without it, the AWS_* variables and profile"
        )
    if code == "RequestTimeTooSkewed":
        return AccessDeniedError(f"{where} was refused ({code}): set this machine's clock")
    if code in _ELSEWHERE:
        return UnreachableError(f"{where} was refused ({code}): check the bucket's region, storage_options={{'client_kwargs': …}}")
    if names & _NO_CREDENTIALS:
        return AccessDeniedError(
            f"{url} needs credentials ({type(error).__name__}): give storage_options=, or set the AWS_* variables or a profile\n"
            "a place that is open to everyone is opened with storage_options={'anon': True}"
        )
    if isinstance(error, PermissionError) and status in (0, 401, 403):
        if writing:
            return ReadOnlyError(f"{where} cannot be written: check permissions, or open with mode='r'")
        if listing:
            return AccessDeniedError(
                f"{where} cannot be listed: ask for the permission to list it, or for a published copy, which needs none"
            )
        return AccessDeniedError(
            f"{where} cannot be read: check the credentials, and what they allow (storage_options= gives others)"
            + ("\nS3 answers so, too, for what is not there, to those who may not list" if status == 403 else "")
        )
    if status in (401, 403) and "ClientResponseError" in names:
        return AccessDeniedError(
            f"{where} cannot be read (status {status}): check the address, or give credentials, as in "
            "storage_options={'client_kwargs': {'headers': {'Authorization': …}}}"
        )
    if code == "InvalidBucketName" or "ParamValidationError" in names:
        return InvalidArgumentError(f"{url} is no possible place: check the name of the bucket")
    if names & _NETWORK:
        return UnreachableError(f"{url} does not answer ({type(error).__name__}): check the URL, the endpoint and the network")
    if not isinstance(error, OSError) and not status:
        return None  # an error in a program, or a verb that this file system does not have
    # What is not known is never taken for damage: a server that refuses says nothing of the bytes.
    reason = ", ".join(each for each in (code, f"status {status}" if status else "") if each)
    what = "written" if writing else "listed" if listing else "read"
    return UnreachableError(
        f"{where} cannot be {what} ({reason or without_secrets(str(error))[:200] or type(error).__name__}): check the place, and what its "
        "server takes"
    )


def without_secrets(url: str) -> str:
    """A URL without user and password, and a web address without its query, which may hold a signature."""
    shown = re.sub(r"(://)[^/@\s]+@", r"\1…@", url)
    return re.sub(r"(https?://[^?\s]*)\?.*", r"\1?…", shown)
