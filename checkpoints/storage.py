"""Where checkpoints go: one folder on a local disk, or at any fsspec URL (s3://bucket/run; gs:// and others alike).

S3 needs `pip install 'exfm[s3]'`. Credentials, region and endpoint are botocore's own settings: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role; AWS_ENDPOINT_URL_S3=http://host:port, or endpoint_url in
~/.aws/config, for a server that is not Amazon's. An upload that could not even be aborted stays invisible but takes
space: give the bucket a lifecycle rule that ends incomplete multipart uploads.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import PurePath, PurePosixPath
from typing import Any, TypeAlias, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from exfm.checkpoints import disk
from exfm.checkpoints.faults import explained, is_fault, retried
from exfm.checkpoints.lease import Held, leased
from exfm.checkpoints.remote import OBJECT_STORES, download, open_url, upload
from exfm.data.commit import Filesystem, commit, sync_folder
from exfm.data.errors import UserError

T = TypeVar("T")
Bytes: TypeAlias = bytes | bytearray | memoryview


class Storage:
    """A folder. Paths are relative to it; UserError for one that leads out of it, by `..` or a symbolic link.

    retries: of one operation after transient errors of a server. lease_s: how long a silent holder keeps a remote lock.
    What fails raises the OSError of its kind, which names the URL, the cause and the remedy.
    """

    def __init__(self, url: str | os.PathLike[str], retries: int = 5, lease_s: float = 30.0) -> None:
        self.url = str(url) if str(url).endswith("://") else str(url).rstrip("/") or "/"
        self.local = fsspec.utils.get_protocol(self.url) in ("file", "local")
        self.retries = retries
        self.lease_s = lease_s
        self.moved_bytes = 0  # read and written so far: whoever waits can see that something moves

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, int, float]]:
        return Storage, (self.url, self.retries, self.lease_s)  # connections stay here

    @cached_property
    def _opened(self) -> tuple[Filesystem, str]:
        if self.local:
            return LocalFileSystem(), str(LocalFileSystem._strip_protocol(self.url))
        return open_url(self.url, request_retries=0)

    def path(self, path: str | PurePath) -> str:
        """Where it lies on its filesystem. UserError for one that leads out of the folder."""
        return self._full(path)

    def names(self, folder: str | PurePath = "") -> list[str]:
        """Entries directly inside, sorted; none where it does not exist."""

        def act() -> list[str]:
            full, fs = self._full(folder), self._opened[0]
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if self.local:
                    return sorted(os.listdir(full))
                fs.invalidate_cache()
                found = [str(path).rstrip("/").removeprefix(full).strip("/") for path in fs.ls(full, detail=False)]
                return sorted(name for name in found if name and "/" not in name)
            return []

        return self._do("list", folder, act)

    def exists(self, path: str | PurePath) -> bool:
        full = self._full(path)
        if self.local:
            return os.path.lexists(full)
        try:
            self._info(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str | PurePath) -> int:
        """Bytes. FileNotFoundError; UserError for what is no regular file."""
        if self.local:
            return self._do("read", path, lambda: disk.size(self._full(path, link=True)))
        found = self._info(path)
        if found["type"] != "file":
            raise UserError(f"{self._where(path)} is a folder; a file is wanted")
        return int(found["size"])

    def _info(self, path: str | PurePath) -> dict[str, Any]:
        def act() -> dict[str, Any]:
            self._opened[0].invalidate_cache()
            return dict(self._opened[0].info(self._full(path)))

        return self._do("look at", path, act)

    def read(self, path: str | PurePath, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from start to stop, or to the file's end if that comes first."""
        if self.local:
            return self._do("read", path, lambda: disk.read(self._full(path), start, stop))
        if start == 0 and stop is None:
            return self._do("read", path, lambda: bytes(self._opened[0].cat_file(self._full(path))))
        end = self.size(path)
        found = bytearray(max(0, (end if stop is None else min(stop, end)) - start))
        self.read_into(path, start, memoryview(found))
        return bytes(found)

    def read_into(self, path: str | PurePath, start: int, buffer: memoryview) -> None:
        """Fill the whole buffer from byte `start` on. OSError where the file is too short."""
        flat = buffer.cast("B")
        full = self._full(path)
        self.moved_bytes += len(flat)
        if self.local:
            return self._do("read", path, lambda: disk.read_into(full, start, flat))
        fs = self._opened[0]
        return self._do("read", path, lambda: download(fs, full, start, flat, self.retries), retries=0)

    def write(self, path: str | PurePath, parts: Iterable[Bytes]) -> None:
        """Stream the parts into one file, durable when this returns; no file where it fails.

        The parts are seen once, so it is the single request (a part of a multipart upload) that s3fs tries again.
        """
        full, flat = self._full(path), self._counted(parts)
        if self.local:
            return self._do("write", path, lambda: disk.write(full, flat))
        return self._do("write", path, lambda: upload(self._uploading, full, flat), retries=0)

    def _counted(self, parts: Iterable[Bytes]) -> Iterator[memoryview]:
        for part in parts:
            self.moved_bytes += len(part)
            yield memoryview(part).cast("B")

    @cached_property
    def _uploading(self) -> Filesystem:
        return open_url(self.url, request_retries=self.retries)[0]

    def commit(self, path: str | PurePath, payload: bytes) -> None:
        """Make the payload appear whole or not at all, durably: `exfm.data.commit.commit`."""
        self._do("write", path, lambda: commit(self._opened[0], self._full(path), payload))

    def sync(self, folder: str | PurePath = "") -> None:
        """Make the names in a local folder durable. An object store's are."""
        if self.local:
            self._do("sync", folder, lambda: sync_folder(self._full(folder)))

    def make(self, folder: str | PurePath = "") -> None:
        """Make a folder and those above it; nothing on an object store, which has none."""
        full = self._full(folder)
        if fsspec.utils.get_protocol(self.url) not in OBJECT_STORES:
            self._do("make", folder, lambda: self._opened[0].makedirs(full, exist_ok=True))

    def remove(self, path: str | PurePath) -> None:
        """Remove a file, or a folder with all in it, or a link itself; nothing where it is missing."""

        def act() -> None:
            full, fs = self._full(path, link=True), self._opened[0]
            with contextlib.suppress(FileNotFoundError):
                if self.local and os.path.isdir(full) and not os.path.islink(full):
                    shutil.rmtree(full)
                elif self.local:
                    os.unlink(full)
                else:
                    fs.invalidate_cache()
                    fs.rm(full, recursive=True)

        self._do("remove", path, act)

    def check(self) -> None:
        """UserError names the URL, the cause and the remedy where a job could not keep its checkpoints here."""
        try:
            if self.local:
                self._do("write", "", lambda: disk.check_writable(self._full("")))
            else:
                Storage(self.url, retries=0)._probe(f".check-{uuid.uuid4().hex}")
        except OSError as error:
            raise UserError(str(error)) from None

    def _probe(self, name: str) -> None:
        full, payload = self._full(name), name.encode()
        self.names()  # a missing bucket is told from a missing folder by the write only
        self._do("write", "", lambda: self._opened[0].pipe_file(full, payload))
        try:
            if self._do("read", "", lambda: self._opened[0].cat_file(full)) != payload:
                raise UserError(f"{self.url} gives back other bytes than were written; use another folder")
        finally:
            self._do("remove from", "", lambda: self._opened[0].rm_file(full))

    @contextlib.contextmanager
    def lock(self, owner: str, on_lost: Callable[[], None] | None = None) -> Iterator[Held]:
        """Keep other jobs out of this folder; UserError names the one that is in it. A dead one holds it lease_s at most.

        The object's `lost` turns true, and on_lost is called from a thread, once another has taken a remote lock.
        """
        held = Held(on_lost)
        if not self.local:
            with leased(Storage(self.url, retries=1), owner, self.lease_s, held):
                yield held
            return
        self.make()
        with self._locked(owner):
            yield held

    @contextlib.contextmanager
    def _locked(self, owner: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            # what the job raises under the lock is its own
            self._do("lock", "lock", lambda: stack.enter_context(disk.flocked(self._full("lock"), owner, self.url)))
            yield

    def _do(self, verb: str, path: str | PurePath, act: Callable[[], T], retries: int | None = None) -> T:
        """act() with retries where a server answers, its errors explained."""
        try:
            return act() if self.local else retried(act, self.retries if retries is None else retries)
        except Exception as error:
            if isinstance(error, UserError) or not is_fault(error):
                raise
            raise explained(error, verb, self._where(path)) from error

    def _where(self, path: str | PurePath) -> str:
        return "/".join([self.url.rstrip("/"), *PurePosixPath(path).parts])

    def _full(self, path: str | PurePath, link: bool = False) -> str:
        """The path on the filesystem. link: its last name may be a symbolic link, which is not followed."""
        parts = PurePosixPath(path).parts
        if ".." in parts or str(path).startswith("/") or "\0" in str(path):
            raise UserError(f"path {str(path)!r} leads out of {self.url}; use one below it, without '..'")
        root = self._opened[1]
        full = "/".join([root.rstrip("/"), *parts]) or "/"
        if self.local and parts:
            above = len(parts) - 1 if link else len(parts)
            real = os.path.join(os.path.realpath(root), *parts[:above])
            if os.path.realpath(os.path.join(root, *parts[:above])) != real:
                raise UserError(f"{self._where(path)} leads through a symbolic link; replace it with the file itself")
        return full
