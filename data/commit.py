"""The one commit point of every manifest in the system, and reading what was committed."""

import contextlib
import hashlib
import json
import math
import os
from typing import Any, TypeAlias

import fsspec
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from exfm.data.errors import UserError

Filesystem: TypeAlias = fsspec.AbstractFileSystem


def open_folder(url: str | os.PathLike[str]) -> tuple[Filesystem, str]:
    """The filesystem of a path or fsspec URL and the path on it."""
    fs, path = fsspec.core.url_to_fs(str(url))
    return fs, path.rstrip("/")


def commit(fs: Filesystem, path: str, payload: bytes) -> None:
    """Make `payload` appear at `path` whole or not at all: rename on a local disk, one PUT on an object store."""
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, payload)
        return
    temporary = f"{path}.tmp.{os.getpid()}"
    try:
        with open(temporary, "wb", opener=_without_links) as f:
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.rsplit("/", 1)[0])


def _without_links(path: str, flags: int) -> int:
    """Open, but not what a link planted under that name points to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync_folder(path: str) -> None:
    """fsync a local folder so that the names in it survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit_json(fs: Filesystem, path: str, value: Any) -> None:
    commit(fs, path, json.dumps(null_for_nan(value), indent=1, sort_keys=True, allow_nan=False).encode())


def null_for_nan(value: Any) -> Any:
    """The value with null for every number that JSON cannot say."""
    if isinstance(value, dict):
        return {k: null_for_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nan_for_null(value: Any) -> Any:
    """The inverse, for numbers that were written as null."""
    if isinstance(value, dict):
        return {k: nan_for_null(v) for k, v in value.items()}
    return float("nan") if value is None else value


def read_json(fs: Filesystem, path: str) -> Any:
    """A committed JSON file. UserError if it is not JSON; FileNotFoundError if it is not there."""
    try:
        return json.loads(fs.cat_file(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or prepare it again") from None


def open_parquet(fs: Filesystem, path: str) -> pq.ParquetFile:
    """Open a Parquet file. UserError names a file that is missing, truncated or no Parquet at all."""
    try:
        source = path if isinstance(fs, LocalFileSystem) else fs.open(path, "rb")
        return pq.ParquetFile(source, page_checksum_verification=True)
    except FileNotFoundError:
        raise UserError(f"{path} is named by its manifest but does not exist; prepare the slice again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is corrupt or truncated ({error}); prepare the slice again") from None


def sha256_of(fs: Filesystem, path: str) -> str:
    with fs.open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
