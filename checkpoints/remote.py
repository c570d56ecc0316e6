"""Files at an fsspec URL other than a local one: the filesystem, streaming uploads, ranged downloads."""

import contextlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import fsspec

from exfm.checkpoints.faults import retried, transient
from exfm.data.commit import Filesystem
from exfm.data.errors import UserError

# one part of a multipart upload; S3 allows 10,000 of them: files up to 625 GiB
PART_BYTES = 64 << 20
RANGE_BYTES = 8 << 20
RANGES = 8
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}  # without folders to make


def open_url(url: str, request_retries: int) -> tuple[Filesystem, str]:
    """The filesystem of the URL and the path on it. UserError where its package is missing or nobody knows its kind.

    request_retries: how often s3fs repeats one request beyond botocore's own attempts.
    """
    scheme = fsspec.utils.get_protocol(url)
    try:
        fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        extra = "pip install 'exfm[s3]'" if scheme in ("s3", "s3a") else "install it"
        raise UserError(f"{url} needs a package that is missing ({error}); {extra}") from None
    except ValueError as error:
        raise UserError(f"{url} is no place for files ({error}); use a folder or a URL like s3://bucket/run") from None
    if scheme in ("s3", "s3a"):
        import s3fs

        s3fs.core.set_custom_error_handler(transient)
        fs.retries = 1 + request_retries
    return fs, root.rstrip("/")


def upload(fs: Filesystem, path: str, parts: Iterable[memoryview]) -> None:
    """Stream the parts into one file that appears whole at the end; what fails is aborted and removed."""
    file: Any = fs.open(path, "wb", block_size=PART_BYTES, autocommit=False)
    try:
        for part in parts:
            for start in range(0, len(part), PART_BYTES):
                file.write(part[start : start + PART_BYTES])
        file.close()
        if hasattr(file, "commit"):  # others are whole once they are closed
            file.commit()
    except BaseException:
        with contextlib.suppress(Exception):
            file.discard()
        with contextlib.suppress(AttributeError):
            file.closed = True  # else it tries to go on when it is collected
        # some filesystems show a file from its first byte on
        with contextlib.suppress(Exception):
            fs.rm_file(path)
        raise


def download(fs: Filesystem, path: str, start: int, buffer: memoryview, retries: int) -> None:
    """Fill the buffer, several ranges at a time. OSError where the file ends before."""
    step = RANGE_BYTES * RANGES
    for done in range(0, len(buffer), step):
        block = buffer[done : done + step]
        at = 0
        for data in retried(partial(_ranges, fs, path, start + done, len(block)), retries):
            block[at : at + len(data)] = data
            at += len(data)


def _ranges(fs: Filesystem, path: str, start: int, length: int) -> list[bytes]:
    starts = list(range(start, start + length, RANGE_BYTES))
    stops = [min(at + RANGE_BYTES, start + length) for at in starts]
    found: list[bytes] = fs.cat_ranges([path] * len(starts), starts, stops, on_error="raise")
    if (count := sum(map(len, found))) != length:
        raise OSError(f"the file is too short: {length} bytes wanted from {start}, {count} found")
    return found
