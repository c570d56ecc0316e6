"""What went wrong with a file, local or remote: whether to try again, and words that name the place, cause and remedy."""

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from exfm.data.errors import UserError

T = TypeVar("T")
_STATUS = {408, 429, 500, 502, 503, 504}
_ERRNO = {errno.EAGAIN, errno.EBUSY, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EREMOTEIO, errno.ETIMEDOUT}
# of botocore, aiohttp, requests and urllib3, which need not be installed; the built-in ones have the same names
_BROKEN = {
    "ConnectionError",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
    "TimeoutError",
    "Timeout",
}
_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_CREDENTIALS |= {"TokenRetrievalError", "UnauthorizedSSOTokenError", "DefaultCredentialsError"}
_REMOTE = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3"}
# a generator of its own: the job's random state is part of a checkpoint
_JITTER = random.Random()
BACK_OFF_S = 0.5


def retried(act: Callable[[], T], retries: int) -> T:
    """act(), again after a transient error: the n-th time after about BACK_OFF_S * 2^n seconds, at most 30."""
    for attempt in range(retries):
        try:
            return act()
        except Exception as error:
            if not transient(error):
                raise
        time.sleep(min(30, BACK_OFF_S * 2**attempt) * _JITTER.uniform(0.5, 1))
    return act()


def transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: a broken connection, a time-out, a busy or failing server."""
    for e in _chain(error):
        if (status := _status(e)) is not None:
            return status in _STATUS
        if _names(e) & _BROKEN or (isinstance(e, OSError) and e.errno in _ERRNO):
            return True
    return False


def is_fault(error: Exception) -> bool:
    """Whether the error is the disk's or the server's; others are the caller's or ours."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _REMOTE


def explained(error: Exception, verb: str, where: str) -> Exception:
    """The same kind of OSError, saying what could not be done where, why and what to do. UserError for a symlink."""
    kind, cause, remedy = _diagnosis(error, "://" in where)
    text = f"cannot {verb} {where}: {cause}; {remedy}"
    if kind is UserError:
        return UserError(text)
    made = kind(text)
    made.errno = getattr(error, "errno", None)  # type: ignore[attr-defined]
    return made


def _diagnosis(error: Exception, remote: bool) -> tuple[type[Exception], str, str]:
    """(kind, cause, remedy)"""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    number = getattr(error, "errno", None)
    if any(_names(e) & _CREDENTIALS for e in _chain(error)):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
        return PermissionError, f"no credentials ({said})", remedy
    if any(_code(e) == "NoSuchBucket" for e in _chain(error)):
        return FileNotFoundError, "there is no such bucket", "create it or correct the URL"
    if number == errno.ELOOP:
        return UserError, "it is a symbolic link", "replace it with the file itself"
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError, "it does not exist", "look whether the path is right"
    if isinstance(error, PermissionError):
        allowed = "use credentials that may list, read, write and delete there, or change the bucket's policy"
        return PermissionError, said, allowed if remote else "change its permissions or choose another folder"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError, said, "free some space, raise the limit or choose another folder"
    if remote and transient(error):
        status = next(filter(None, map(_status, _chain(error))), None)
        cause = f"the server is failing (HTTP {status}: {said})" if status else f"the server does not answer ({said})"
        return ConnectionError, cause, "look whether it runs, and at the network and AWS_ENDPOINT_URL_S3"
    kind = type(error) if type(error) in (IsADirectoryError, NotADirectoryError, FileExistsError) else OSError
    return kind, said, "look at the server's log" if remote else "look at the disk and its mount options"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _names(error: BaseException) -> set[str]:
    return {c.__name__ for c in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """The HTTP status that botocore, aiohttp or gcsfs keeps."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", getattr(error, "code", None))
    return status if isinstance(status, int) else None


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None
