"""Errors of clients of object stores and the web as errors of this package, and URLs without their secrets. Never sends a request."""

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

__all__ = ["CutShortError", "as_our_error", "is_passing", "is_throttling", "response_code", "without_secrets"]

_EXPIRED: Final = {
    "ExpiredToken", "ExpiredTokenException", "InvalidAuthenticationInfo", "InvalidToken", "RequestExpired", "TokenRefreshRequired"
}  # fmt: skip
_UNKNOWN_KEY: Final = {"InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch"}
_ELSEWHERE: Final = {"301", "307", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_NO_CREDENTIALS: Final = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "ConfigNotFound", "TokenRetrievalError",
    "UnauthorizedSSOTokenError", "SSOTokenLoadError", "InvalidConfigError", "DefaultCredentialsError", "CredentialUnavailableError",
    "LocalTokenNotFoundError",
}  # fmt: skip
_NETWORK: Final = {
    "ConnectionError", "TimeoutError", "ClientConnectionError", "HTTPClientError", "FSTimeoutError", "ServiceRequestError",
    "ServiceResponseError", "TransportError",
}  # fmt: skip
# Of clients that do not try again on their own: Azure's, which is told not to, and the Hub's in some of its requests.
_TRIED_ONCE: Final = {"NetworkError", "RemoteProtocolError", "ServiceRequestError", "ServiceResponseError", "TimeoutException"}
_NO_BUCKET: Final = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"}
# How Azure answers a nobody who may not see that something is there.
_NOT_FOR_ALL: Final = {"NoAuthenticationInformation", "PublicAccessNotPermitted", "ResourceNotFound"}
_NO_POSSIBLE_NAME: Final = {"InvalidBucketName", "InvalidResourceName", "OutOfRangeInput"}
_ALSO_DENIED: Final = (
    "\nS3 answers so, too, for what is not there, to those who may not list, and where the reader pays: {'requester_pays': True}"
)
_CAUSES: Final = 5  # that are looked at behind an error
_QUOTA: Final = re.compile(r"quota|storage.?full|insufficient.?storage|no.?space|disk.?full|storage.?limit", re.IGNORECASE)
_THROTTLING: Final = re.compile(r"slow.?down|throttl|too.?many.?req|limit.?exceeded|busy", re.IGNORECASE)
_NO_SPACE_NUMBERS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PASSING: Final = {
    "BandwidthLimitExceeded", "InternalError", "OperationAborted", "PriorRequestNotComplete", "RequestLimitExceeded", "RequestTimeout",
    "RequestTimeoutException", "ServiceUnavailable", "rateLimitExceeded", "userRateLimitExceeded",
}  # fmt: skip
_CUT_SHORT: Final = {
    "ClientPayloadError", "CutShortError", "IncompleteRead", "IncompleteReadError", "ResponseParserError", "ResponseStreamingError"
}  # fmt: skip
# Where each kind of place takes credentials from, and how it is opened without any.
_CREDENTIALS: Final = {
    "s3": ("give storage_options=, or set the AWS_* variables or a profile", "'anon': True"),
    "gs": ("give storage_options={'token': …}, or run: gcloud auth application-default login", "'token': 'anon'"),
    "az": (
        "give storage_options= with account_name and account_key, sas_token or credential, or AZURE_STORAGE_* variables",
        "'anon': True",
    ),
    "hf": ("run: hf auth login, or set HF_TOKEN, or give storage_options={'token': …}", "'token': False"),
}
_OF_THE_HUB: Final = {
    "BucketNotFoundError", "DisabledRepoError", "HFValidationError", "HfUriError", "OfflineModeIsEnabled", "RepositoryNotFoundError",
    "RevisionNotFoundError",
}  # fmt: skip
_SAME_AS: Final = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}


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
                code = getattr(error, "error_code", "") or ""
                return str(getattr(code, "value", code)), status
        if found := _code_of_gcsfs(error):
            return found
        error, seen = error.__cause__, seen + 1
    return "", 0


def _code_of_gcsfs(error: BaseException) -> tuple[str, int] | None:
    """Code and status of the errors that gcsfs makes of a response without keeping its status; None for all others."""
    said = str(error)
    if type(error) is OSError and said.startswith("Forbidden: "):
        return "", 403
    if type(error) is ValueError and "requester_pays=True" in said:
        return "UserProjectMissing", 400
    return ("", 400) if type(error) is ValueError and said.startswith("Bad Request: ") else None


def is_passing(error: BaseException | None) -> bool:
    """Whether a refusal is one that passes by itself, so that the same request may succeed a little later."""
    if error is None:
        return False
    code, status = response_code(error)
    if _QUOTA.search(code):
        return False
    if code in _PASSING or _THROTTLING.search(code) or re.search(r"try.?again", code, re.IGNORECASE):
        return True
    if status in (408, 425, 429) or (status >= 500 and status not in (501, 505, 507)):
        return True
    return _is_cut_short(error) or bool({kind.__name__ for kind in type(error).__mro__} & _TRIED_ONCE)


def is_throttling(error: BaseException | None) -> bool:
    """Whether a request was refused because the server has too many: fewer at a time are answered."""
    code, status = response_code(error)
    return not _QUOTA.search(code) and (status in (429, 503) or bool(_THROTTLING.search(code)))


def _is_cut_short(error: BaseException | None) -> bool:
    """Whether the body of an answer ended early; some clients raise an error of their own from the one that says so."""
    for _ in range(_CAUSES):
        if error is None:
            return False
        if {kind.__name__ for kind in type(error).__mro__} & _CUT_SHORT:
            return True
        error = error.__cause__ or error.__context__
    return False


def as_our_error(error: Exception, url: str, key: str, *, writing: bool, listing: bool) -> Exception | None:
    """The package's own error for an error of a file system's client; None where the client's own error should be raised."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code, status = response_code(error)
    where = f"{url}/{key}" if key else url
    scheme = _scheme(url)
    how, anyone = _CREDENTIALS.get(scheme, _CREDENTIALS["s3"])
    if names & _OF_THE_HUB:
        return _hub_error(names, url, how)
    if code in _NO_BUCKET:
        return StoreNotFoundError(f"{url} names a bucket that is not there: check its name, and the endpoint")
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)) or status in (412, 416):
        return None
    if code in _NOT_FOR_ALL:
        return AccessDeniedError(f"{where} is not there, or not for everyone ({code}): check its name, or {how}")
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
    if is_passing(error) and not names & _TRIED_ONCE:
        reason = f"status {status}{code and f', {code}'}" if status or code else type(error).__name__
        if _is_cut_short(error):
            return UnreachableError(f"{where} came cut short, again and again ({type(error).__name__}): check the network, and try again")
        return UnreachableError(f"{where} is overloaded or broken, again and again ({reason}): wait, and try again")
    if code.lower().startswith("kms"):
        return AccessDeniedError(f"{where} was refused ({code}): the key that encrypts it cannot be used; enable it, or allow its use")
    if code == "UserProjectMissing":
        return AccessDeniedError(f"{where} was refused: who reads this bucket pays for it; give storage_options={{'requester_pays': True}}")
    if code == "AuthenticationFailed":
        return AccessDeniedError(
            f"{where} was refused ({code}): check account_key or sas_token, when the token ends, and this machine's clock"
        )
    if code in _EXPIRED or "RefreshError" in names:
        code = code or "RefreshError"
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
            f"{url} needs credentials ({type(error).__name__}): {how}\n"
            f"a place that is open to everyone is opened with storage_options={{{anyone}}}"
        )
    if status in (401, 403) and "ClientResponseError" in names:
        return AccessDeniedError(
            f"{where} cannot be read (status {status}): check the address, or give credentials, as in "
            "storage_options={'client_kwargs': {'headers': {'Authorization': …}}}"
        )
    if (isinstance(error, PermissionError) and status == 0) or status in (401, 403):
        if writing and scheme == "hf":
            return ReadOnlyError(f"{where} cannot be written: that needs a token with the right to write; {how}")
        if writing:
            return ReadOnlyError(f"{where} cannot be written: check permissions, or open with mode='r'")
        if listing:
            return AccessDeniedError(
                f"{where} cannot be listed: ask for the permission to list it, or for a published copy, which needs none"
            )
        return AccessDeniedError(
            f"{where} cannot be read: check the credentials, and what they allow (storage_options= gives others)"
            + (_ALSO_DENIED if status == 403 and scheme == "s3" else "")
        )
    if code in _NO_POSSIBLE_NAME or "ParamValidationError" in names:
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


def _hub_error(names: set[str], url: str, how: str) -> Exception:
    """The error for what the Hub says of a whole repository."""
    if "GatedRepoError" in names:
        return AccessDeniedError(
            f"{url} is gated: ask for access on its page of the Hub, with the account whose token is used here; then {how}"
        )
    if "RevisionNotFoundError" in names:
        return StoreNotFoundError(f"{url} has no such revision, or has it no more: give a branch, tag or commit behind @, or none for main")
    if "DisabledRepoError" in names:
        return AccessDeniedError(f"{url} was disabled by the Hub: ask its owners, or the Hub")
    if "OfflineModeIsEnabled" in names:
        return UnreachableError(f"{url} is not asked for, because HF_HUB_OFFLINE is set: unset it, and start Python again")
    if names & {"HFValidationError", "HfUriError"}:
        return InvalidArgumentError(f"{url} is no possible name of the Hub: give it as 'hf://datasets/ORGANISATION/NAME'")
    return AccessDeniedError(f"{url} is not there, or is private: check its name, and that it is a dataset; or {how}")


def _scheme(url: str) -> str:
    """The protocol of a place, that of the last link of a chain, by one of its names."""
    protocol = url.rpartition("::")[2].partition("://")[0]
    return _SAME_AS.get(protocol, protocol)


def without_secrets(url: str) -> str:
    """A URL without user and password, and a web address without its query, which may hold a signature."""
    shown = re.sub(r"(://)[^/@\s]+@", r"\1…@", url)
    return re.sub(r"(https?://[^?\s]*)\?.*", r"\1?…", shown)
