"""Decoding a slice: row-aligned files (features, labels, sidecars) read together, one row group at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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

    types: all columns that the files must have; None when the kind has no fixed schema.
    """

    fs: Filesystem
    folder: str
    manifest: SliceManifest
    columns: tuple[str, ...]
    types: dict[str, pa.DataType] | None = None


class SliceSource:
    """Row groups of one slice as Arrow tables, features, labels and sidecars side by side.

    Kinds are joined by position: their manifests must list the same row groups with the same id digests.
    """

    def __init__(self, files: Sequence[AlignedFiles], id_column: str) -> None:
        self.files, self.id_column = files, id_column
        features = files[0].manifest
        for other in files[1:]:
            if other.manifest.row_groups != features.row_groups:
                raise UserError(
                    f"{other.folder} does not belong to {files[0].folder}: their example ids or row groups differ; write "
                    "it again from this slice"
                )
        sizes = [group.rows for group in features.row_groups]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.num_rows = int(self.starts[-1])
        self._where = [(p, g) for p, part in enumerate(features.parts) for g in range(len(part.row_groups))]
        self._open: dict[tuple[int, int], pq.ParquetFile] = {}
        self.group = lru_cache(maxsize=2)(self._group)

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
        for table in tables[1:]:
            for column in table.column_names:
                joined = joined.append_column(column, table.column(column))
        return joined

    def read(self, files: AlignedFiles, number: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of one row group of one kind. UserError names the file and the row group."""
        part, group = self._where[number]
        kind = self.files.index(files)
        try:
            if (kind, part) not in self._open:
                self._open[kind, part] = self._checked(files, part)
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

    def _checked(self, files: AlignedFiles, part: int) -> pq.ParquetFile:
        path = f"{files.folder}/{files.manifest.parts[part].path}"
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

    def take(self, rows: np.ndarray) -> pa.Table:
        """The given rows (any order) as one table; contiguous rows of one row group are not copied."""
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        needed = np.unique(groups)
        if len(needed) == 1:
            local = rows - self.starts[needed[0]]
            table = self.group(int(needed[0]))
            if (np.diff(local) == 1).all():
                return table.slice(int(local[0]), len(local))
            return table.take(pa.array(local))
        joined = pa.concat_tables([self.group(int(g)) for g in needed]).combine_chunks()
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.starts)[needed])])
        local = rows - self.starts[groups] + offsets[np.searchsorted(needed, groups)]
        if (np.diff(local) == 1).all():
            return joined.slice(int(local[0]), len(local))
        return joined.take(pa.array(local))
