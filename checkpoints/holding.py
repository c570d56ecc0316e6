"""Who is reading a commit: readers share a lock on its manifest, whoever removes it wants that lock alone.

Local folders only. The system drops the lock when its holder ends, however it ends. On an object store nobody knows who
is reading: keep enough commits there (`checkpoint.keep`) that what a slow reader needs outlives its reading.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from exfm.checkpoints.layout import MANIFEST
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError

# file systems that know no locks: nothing is known there, as on an object store
_WITHOUT_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def reading(storage: Storage, name: str) -> Iterator[None]:
    """Keep a commit, and all it rests on, from being removed. UserError where it is gone or going."""
    gone = f"{storage.url}/{name} was removed just now; start again with a newer one, or keep more of them"
    try:
        handle = _locked(storage, name, fcntl.LOCK_SH) if storage.local else None
    except (FileNotFoundError, BlockingIOError):
        raise UserError(gone) from None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def removing(storage: Storage, name: str) -> Iterator[bool]:
    """Whether nobody reads a commit; nobody begins to while this lasts."""
    handle, free = None, True
    try:
        handle = _locked(storage, name, fcntl.LOCK_EX) if storage.local else None
    except FileNotFoundError:
        pass
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        if handle is not None:
            os.close(handle)


def _locked(storage: Storage, name: str, kind: int) -> int | None:
    """A handle that holds the lock; None where there are no locks. FileNotFoundError, BlockingIOError."""
    path = f"{name}/{MANIFEST}"
    handle = os.open(storage.path(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        if not os.fstat(handle).st_nlink:  # removed between the two calls
            raise FileNotFoundError(path)
    except OSError as error:
        os.close(handle)
        if error.errno in _WITHOUT_LOCKS:
            return None
        raise
    return handle
