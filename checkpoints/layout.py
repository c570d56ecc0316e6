"""What lies in a checkpoint's folder: safetensors files, an index of who holds which part of which tensor, one manifest.

    step=00001234/rank-00000.safetensors   raw tensor bytes of one rank, readable by any safetensors library
    step=00001234/index.json                 {"tensors": {name: {"dtype", "shape", "chunks": [[offsets, sizes, file, start]]}}}
    step=00001234/manifest.json              everything else; sizes and checksums of the files above, and its own

No file is a pickle and no name in them is trusted: `read_manifest` and `parse_index` refuse what is not exactly this. Checksums
(XXH3, 64 bit) are of blocks of BLOCK_BYTES, so that a rank that reads a part of a file checks what it reads and no more.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from exfm.checkpoints.storage import Storage
from exfm.checkpoints.strict import (
    MAX_TEXT_BYTES,
    check_apart,
    check_cover,
    check_depth,
    check_fields,
    check_name,
    count,
    shown,
)
from exfm.data.commit import null_for_nan
from exfm.data.errors import UserError

FORMAT = 2
MANIFEST, INDEX, PINNED = "manifest.json", "index.json", "PINNED"
BLOCK_BYTES = 2**24
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
SUM_DIGITS = 16
# what reading something else than was written raises, UserError among it: a ValueError
NONSENSE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


class Damaged(UserError):
    """A committed checkpoint is not what was committed; the message names the file."""


@dataclass(frozen=True)
class FileRecord:
    """A data file as the manifest lists it. sums: hexadecimal checksums of its blocks, one after the other."""

    path: str
    bytes: int
    sums: str

    def as_dict(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, "sums": self.sums}


class BlockSums:
    """Checksums of a stream's blocks."""

    def __init__(self) -> None:
        self.bytes = 0
        self.sums: list[str] = []
        self._hash = xxhash.xxh3_64()

    def update(self, part: memoryview) -> None:
        start = 0
        while start < len(part):
            stop = min(len(part), start + BLOCK_BYTES - self.bytes % BLOCK_BYTES)
            self._hash.update(part[start:stop])
            self.bytes += stop - start
            start = stop
            if self.bytes % BLOCK_BYTES == 0:
                self._end()

    def _end(self) -> None:
        self.sums.append(self._hash.hexdigest())
        self._hash.reset()

    def record(self, path: str) -> FileRecord:
        if self.bytes % BLOCK_BYTES:
            self._end()
        return FileRecord(path, self.bytes, "".join(self.sums))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def block_sum(block: memoryview | bytes) -> str:
    return xxhash.xxh3_64_hexdigest(block)


def header(entries: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> tuple[bytes, list[int]]:
    """Header of a safetensors file of these (name, dtype, shape), and the byte at which each tensor starts in the file."""
    described: dict[str, Any] = {}
    starts, position = [], 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        described[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        starts.append(position)
        position += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + s for s in starts]


# ------------------------------------------------------------------------------------------------ index


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor at `offsets`, `sizes` large, whose bytes start at byte `start` of file number `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int
    start: int


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def columns(self) -> list[int]:
        """First columns of a table's column shards, ascending."""
        return sorted({c.offsets[1] for c in self.chunks})


Index = dict[str, Entry]


def index_bytes(index: Index) -> bytes:
    tensors = {
        name: {
            "dtype": DTYPE_NAMES[e.dtype],
            "shape": list(e.shape),
            "chunks": [[list(c.offsets), list(c.sizes), c.file, c.start] for c in e.chunks],
        }
        for name, e in sorted(index.items())
    }
    return _within_limit(json.dumps({"tensors": tensors}, separators=(",", ":")).encode(), INDEX)


def _within_limit(text: bytes, name: str) -> bytes:
    """UserError for what no reader would take."""
    if len(text) > MAX_TEXT_BYTES:
        raise UserError(
            f"{name} would have {len(text)} bytes, {MAX_TEXT_BYTES} are allowed; shard the tables less finely"
        )
    return text


def parse_index(text: bytes, files: Sequence[FileRecord], where: str) -> Index:
    """The index of a checkpoint with these data files. Damaged for anything that does not lie inside them."""
    try:
        tensors = json.loads(text)["tensors"]
        index = {check_name(name): _entry(name, value, files) for name, value in tensors.items()}
        check_apart(
            [(c.file, c.start, math.prod(c.sizes) * e.dtype.itemsize) for e in index.values() for c in e.chunks]
        )
    except NONSENSE as error:
        raise Damaged(f"{where} is damaged or hostile: {_said(error)}") from None
    return index


def _entry(name: str, value: Any, files: Sequence[FileRecord]) -> Entry:
    dtype, shape = DTYPES[value["dtype"]], _extent(value["shape"])
    chunks = []
    for raw_offsets, raw_sizes, file, start in value["chunks"]:
        offsets, sizes = _extent(raw_offsets), _extent(raw_sizes)
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"{name}: a chunk has another number of dimensions")
        if any(o + s > limit for o, s, limit in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{name}: a chunk lies outside its tensor of {shape}")
        size = math.prod(sizes) * dtype.itemsize
        if count(file) >= len(files):
            raise ValueError(f"{name}: a chunk is of file {file} of {len(files)}")
        if count(start) + size > files[file].bytes:
            raise ValueError(f"{name}: bytes {start} to {start + size} of {files[file].path} of {files[file].bytes}")
        chunks.append(Chunk(offsets, sizes, file, start))
    try:
        check_cover(shape, [(c.offsets, c.sizes) for c in chunks])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Entry(dtype, shape, tuple(chunks))


def _extent(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 8:
        raise ValueError(f"{shown(values)} is no shape")
    return tuple(count(v) for v in values)


# ------------------------------------------------------------------------------------------------ manifest


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The manifest with its own checksum in it."""
    content = json.loads(json.dumps(null_for_nan(manifest), allow_nan=False))
    return _within_limit(json.dumps(content | {"sum": _own_sum(content)}, indent=1, sort_keys=True).encode(), MANIFEST)


def _own_sum(content: dict[str, Any]) -> str:
    rest = {k: v for k, v in content.items() if k != "sum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(storage: Storage, folder: str) -> dict[str, Any]:
    """A folder's manifest, checked. Damaged where it is not what was committed."""
    path = f"{folder}/{MANIFEST}"
    size = storage.size(path)
    if size > MAX_TEXT_BYTES:
        raise Damaged(f"{storage.url}/{path} has {size} bytes, at most {MAX_TEXT_BYTES} are read")
    text = storage.read(path)
    try:
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or _own_sum(manifest) != manifest.get("sum"):
            raise ValueError("it differs from its checksum")
        check_depth(manifest)
        version = count(manifest["format"])
        if version == FORMAT:
            records(manifest)
            check_fields(manifest)
    except NONSENSE as error:
        raise Damaged(f"{storage.url}/{path} is damaged: {_said(error)}") from None
    if version != FORMAT:  # not damaged: nobody may set it aside
        raise UserError(
            f"{storage.url}/{path} is of format {version}, this exfm reads {FORMAT}; use the exfm that wrote it"
        )
    return manifest


def _said(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else shown(str(error)) or type(error).__name__


def records(manifest: dict[str, Any]) -> list[FileRecord]:
    """The data files that a manifest lists; ValueError for names, sizes or checksums that no save writes."""
    found = [FileRecord(f["path"], f["bytes"], f["sums"]) for f in manifest["files"]]
    for record in found:
        if not isinstance(record.path, str) or not FILE_NAME.fullmatch(record.path):
            raise ValueError(f"'{shown(record.path)}' is no name of a data file")
        if type(record.bytes) is not int or not 0 <= record.bytes < 2**56:
            raise ValueError(f"{record.path} cannot have {shown(record.bytes)} bytes")
        if not isinstance(record.sums, str) or len(record.sums) != SUM_DIGITS * -(-record.bytes // BLOCK_BYTES):
            raise ValueError(f"{record.path} has not one checksum per {BLOCK_BYTES} bytes")
    if not found or found[-1].path != INDEX or found[-1].bytes > MAX_TEXT_BYTES:
        raise ValueError(f"its last file is no {INDEX} of at most {MAX_TEXT_BYTES} bytes")
    if len({record.path for record in found}) < len(found):
        raise ValueError("it lists a file twice")
    return found


def sums_of(parts: Iterable[memoryview], path: str) -> FileRecord:
    sums = BlockSums()
    for part in parts:
        sums.update(part)
    return sums.record(path)
