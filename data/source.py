"""Decoding a slice: row-aligned files (features, labels, sidecars) read together, one row group at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm.data.commit import Filesystem, open_parquet
from exfm.data.errors import UserError
from exfm.data.manifest import SliceManifest, digest_ids
from exfm.data.schema import check_types


@dataclass(frozen=True)
class AlignedFiles:
    """One kind of files of a slice: the folder, its manifest and the columns wanted of them.

    types: all columns that the files must have; None when the kind has no fixed schema. renamed: columns that have another
    name in the joined table.
    """

    fs: Filesystem
    folder: str
    manifest: SliceManifest
    columns: tuple[str, ...]
    types: dict[str, pa.DataType] | None = None
    renamed: dict[str, str] = field(default_factory=dict)


class SliceSource:
    """Row groups of one slice as Arrow tables, features, labels and sidecars side by side.

    Kinds are joined by position: their manifests must list the same row groups with the same id digests.
    """

    def __init__(self, files: Sequence[AlignedFiles], id_column: str) -> None:
        self.files, self.id_column = files, id_column
        features = files[0].manifest
        sizes = [group.rows for group in features.row_groups]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.num_rows = int(self.starts[-1])
        self._where = [(p, g) for p, part in enumerate(features.parts) for g in range(len(part.row_groups))]
        self._open: dict[tuple[int, int], pq.ParquetFile] = {}
        self._held: tuple[int, pa.Table | None] = (0, None)
        for other in files[1:]:
            if other.manifest.row_groups != features.row_groups:
                raise UserError(self._differing(other.folder, other.manifest))

    def _differing(self, folder: str, other: SliceManifest) -> str:
        """What to say of files whose row groups are not those of the features: the first that differs, by its example ids."""
        features = self.files[0].manifest
        own, theirs = features.row_groups, other.row_groups
        number = next((n for n, pair in enumerate(zip(own, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
        number = min(number, len(own) - 1)
        ids = self.read(self.files[0], number, [self.id_column]).column(self.id_column).to_pylist()
        there = (
            f"{theirs[number].rows} rows of digest {theirs[number].id_digest}" if number < len(theirs) else "nothing"
        )
        return (
            f"{folder} does not belong to {self.files[0].folder}: their example ids or row groups differ. Row group {number} of "
            f"stream '{features.stream}' has {len(ids)} rows of digest {own[number].id_digest}, first ids {', '.join(map(str, ids[:3]))}; "
            f"that of '{other.stream}' {there}; write it again from this slice"
        )

    @property
    def num_groups(self) -> int:
        return len(self._where)

    def _group(self, number: int) -> pa.Table:
        """All wanted columns of one row group."""
        tables = [self.read(files, number, files.columns) for files in self.files]
        ids = tables[0].column(self.id_column).to_numpy()
        if digest_ids(ids) != self.files[0].manifest.row_groups[number].id_digest:
            raise UserError(
                f"{self.name(self.files[0], number)}: example ids are not those of the manifest; the file was changed"
            )
        joined = tables[0]
        for files, table in zip(self.files[1:], tables[1:], strict=True):
            for column in table.column_names:
                joined = joined.append_column(files.renamed.get(column, column), table.column(column))
        return joined

    def read(self, files: AlignedFiles, number: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of one row group of one kind. UserError names the file and the row group."""
        part, group = self._where[number]
        kind = self.files.index(files)
        try:
            if (kind, part) not in self._open:
                self._open[kind, part] = self._checked(files, part, self.name(files, number))
            table = self._open[kind, part].read_row_group(group, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.name(files, number)} is corrupt or truncated ({error}); prepare the slice again"
            ) from None
        if table.num_rows != files.manifest.row_groups[number].rows:
            raise UserError(
                f"{self.name(files, number)} has {table.num_rows} rows, its manifest says otherwise; prepare it again"
            )
        return table

    def _checked(self, files: AlignedFiles, part: int, where: str) -> pq.ParquetFile:
        path = f"{files.folder}/{files.manifest.parts[part].path}"
        wanted_bytes = files.manifest.parts[part].bytes
        if files.fs.exists(path) and (num_bytes := files.fs.size(path)) != wanted_bytes:
            raise UserError(
                f"{where}: the file has {num_bytes} bytes, its manifest says {wanted_bytes}: it is truncated or was "
                "replaced; prepare the slice again"
            )
        opened = open_parquet(files.fs, path)
        if files.types is not None:
            check_types(opened.schema_arrow, files.types, path)
        if opened.metadata.num_row_groups != len(files.manifest.parts[part].row_groups):
            raise UserError(
                f"{path} has {opened.metadata.num_row_groups} row groups, its manifest says otherwise; prepare it again"
            )
        return opened

    def name(self, files: AlignedFiles, number: int) -> str:
        part, group = self._where[number]
        return f"{files.folder}/{files.manifest.parts[part].path} row group {group}"

    def column(self, name: str) -> np.ndarray:
        """One column of the features over the whole slice."""
        return np.concatenate(
            [self.read(self.files[0], g, [name]).column(name).to_numpy() for g in range(self.num_groups)]
        )

    def empty(self) -> pa.Table:
        """A table without rows that has all wanted columns."""
        return self._span(0, 0).slice(0, 0)

    def groups(self, rows: np.ndarray) -> range:
        """The row groups from that of the first row to that of the last."""
        if not len(rows):
            return range(0)
        first, last = (int(np.searchsorted(self.starts, row, side="right")) - 1 for row in (rows.min(), rows.max()))
        return range(first, last + 1)

    def take(self, rows: np.ndarray) -> pa.Table:
        """The given rows (some, in any order) as one table; contiguous rows of one row group are not copied."""
        groups = self.groups(rows)
        table = self._span(groups.start, groups.stop - 1)
        local = rows - self.starts[self._held[0]]
        if (np.diff(local) == 1).all():
            return table.slice(int(local[0]), len(local))
        return table.take(pa.array(local))

    def _span(self, first: int, last: int) -> pa.Table:
        """Row groups first..last, at least, as one table beginning at row group self._held[0].

        What is held is kept while it suffices, so that a shuffle window is decoded and joined once, not for every batch.
        """
        begin, held = self._held
        end = begin if held is None else int(np.searchsorted(self.starts, self.starts[begin] + held.num_rows))
        if held is None or first < begin or last >= end:
            tables = []
            for number in range(first, last + 1):
                if held is not None and begin <= number < end:
                    offset = int(self.starts[number] - self.starts[begin])
                    tables.append(held.slice(offset, int(self.starts[number + 1] - self.starts[number])))
                else:
                    tables.append(self._group(number))
            held = tables[0] if len(tables) == 1 else pa.concat_tables(tables).combine_chunks()
            self._held = (first, held)
        return held
