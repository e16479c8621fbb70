"""Errors of S3 and web clients as errors of this package, and URLs without their secrets. Never sends a request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from lmprobe_zarr.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    ReadOnlyError,
    StoreNotFoundError,
    UnreachableError,
)

__all__ = ["as_our_error", "response_code", "without_secrets"]

_EXPIRED: Final = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
_UNKNOWN_KEY: Final = {"InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch"}
_ELSEWHERE: Final = {"301", "307", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_NO_CREDENTIALS: Final = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "ConfigNotFound", "TokenRetrievalError",
    "UnauthorizedSSOTokenError", "SSOTokenLoadError", "InvalidConfigError",
}  # fmt: skip
_NETWORK: Final = {"ConnectionError", "TimeoutError", "ClientConnectionError", "HTTPClientError", "FSTimeoutError"}
_CUT_SHORT: Final = {"ClientPayloadError", "IncompleteRead", "ResponseParserError", "ResponseStreamingError"}


def response_code(error: BaseException) -> tuple[str, int]:
    """Error code and HTTP status of the response behind a client's error; ``("", 0)`` where there is none."""
    for cause in (error, error.__cause__):
        if cause is not None and "ClientResponseError" in {kind.__name__ for kind in type(cause).__mro__}:
            return "", int(getattr(cause, "status", 0))
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", "")), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return "", 0


def as_our_error(error: Exception, url: str, key: str, *, writing: bool, listing: bool) -> Exception | None:
    """The package's own error for an error of a file system's client; None where the client's own error should be raised."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code, status = response_code(error)
    where = f"{url}/{key}" if key else url
    if code == "NoSuchBucket":
        return StoreNotFoundError(f"{url} names a bucket that is not there: check its name, and the endpoint")
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return None
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
    if isinstance(error, PermissionError):
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
    if code == "SlowDown" or (status >= 500 and status != 501):
        return UnreachableError(
            f"{where} is overloaded or broken, again and again (status {status}{code and f', {code}'}): wait, and try again"
        )
    if names & _CUT_SHORT:
        return UnreachableError(f"{where} came cut short, again and again ({type(error).__name__}): check the network, and try again")
    if names & _NETWORK:
        return UnreachableError(f"{url} does not answer ({type(error).__name__}): check the URL, the endpoint and the network")
    return None


def without_secrets(url: str) -> str:
    """A URL without user and password, and a web address without its query, which may hold a signature."""
    shown = re.sub(r"(://)[^/@\s]+@", r"\1…@", url)
    return re.sub(r"(https?://[^?\s]*)\?.*", r"\1?…", shown)
