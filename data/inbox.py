"""A joiner's inbox: files of feature rows and of label events, as producers drop them.

    inbox/features/*.parquet    the schema's feature columns, files named in order of time, cut anywhere
    inbox/labels/*.parquet      example id, task, value (1, 0, or null: not observed), timestamp of the event

A producer writes under a name that begins with . or _ and renames; what is no longer needed is moved to done/ beside the files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from exfm.data.commit import Filesystem, commit, open_folder, open_parquet
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, slice_folder
from exfm.data.schema import Schema, check_types
from exfm.data.writer import check_features

FEATURES, LABELS = "features", "labels"
TASK, VALUE = "task", "value"


def event_types(schema: Schema) -> dict[str, pa.DataType]:
    """Arrow type of every column of the label files."""
    return {schema.id: pa.int64(), TASK: pa.string(), VALUE: pa.float32(), schema.timestamp: pa.int64()}


@dataclass(frozen=True)
class Inbox:
    fs: Filesystem
    root: str
    schema: Schema

    @classmethod
    def open(cls, url: str, schema: Schema) -> "Inbox":
        """The inbox, with its folders. UserError where they cannot be made."""
        inbox = cls(*open_folder(url), schema)
        for kind in (FEATURES, LABELS):
            try:
                inbox.fs.makedirs(f"{inbox.root}/{kind}/done", exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"inbox {inbox.root}/{kind} is not writable ({error}); the joiner moves files there that it has used up"
                ) from None
        return inbox

    def names(self, kind: str) -> list[str]:
        """The complete files, in order of their names. UserError where the folder cannot be read."""
        folder = f"{self.root}/{kind}"
        try:
            self.fs.invalidate_cache()
            paths = self.fs.ls(folder, detail=False)
        except OSError as error:
            raise UserError(f"inbox {folder} is not readable ({error}); mend its permissions") from None
        names = sorted(path.rsplit("/", 1)[-1] for path in paths)
        return [name for name in names if name.endswith(".parquet") and not name.startswith((".", "_"))]

    def read(self, kind: str, name: str) -> pa.Table:
        """A file's rows, checked. UserError names the file and what is wrong."""
        path = f"{self.root}/{kind}/{name}"
        types = self.schema.feature_types() if kind == FEATURES else event_types(self.schema)
        try:
            with open_parquet(self.fs, path) as file:
                check_types(file.schema_arrow, types, path)
                table = file.read(columns=list(types), use_threads=False)
        except PermissionError as error:
            raise UserError(f"{path} is not readable ({error}); mend its permissions") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is corrupt or truncated ({error}); write the file again") from None
        if kind == FEATURES:
            check_features(table, self.schema, path)
        else:
            self._check_events(table, path)
        # nullability and metadata of the producer's files do not matter
        return pa.table({n: table.column(n).cast(t) for n, t in types.items()})

    def _check_events(self, table: pa.Table, path: str) -> None:
        for name in (self.schema.id, TASK, self.schema.timestamp):
            if table.column(name).null_count:
                raise UserError(f"{path}: column '{name}' has {table.column(name).null_count} nulls, none are allowed")
        if unknown := sorted(set(pc.unique(table.column(TASK)).to_pylist()) - set(self.schema.labels)):
            raise UserError(
                f"{path} has labels of task '{unknown[0]}'; stream '{self.schema.name}' has {', '.join(self.schema.labels)}"
            )
        values = table.column(VALUE).to_numpy()
        bad = ~((values == 0) | (values == 1) | table.column(VALUE).is_null().to_numpy())
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(
                f"{path}: the label '{table.column(TASK)[row]}' of example {table.column(self.schema.id)[row]} is "
                f"{values[row]:g}; labels are 0, 1 or null (not observed)"
            )

    def retire(self, kind: str, name: str) -> None:
        """Move a file that is not needed any more out of the way. UserError where that is not allowed."""
        folder = f"{self.root}/{kind}"
        try:
            self.fs.mv(f"{folder}/{name}", f"{folder}/done/{name}")
        except OSError as error:
            raise UserError(
                f"inbox {folder} is not writable ({error}); the joiner moves files to {folder}/done that it has used up"
            ) from None

    def is_retired(self, kind: str, name: str) -> bool:
        """Whether a file that was taken has been moved away. UserError where it is gone altogether."""
        if self.fs.exists(f"{self.root}/{kind}/{name}"):
            return False
        if not self.fs.exists(f"{self.root}/{kind}/done/{name}"):
            raise UserError(
                f"{self.root}/{kind}/{name} is gone, but rows of it are not in the stream yet; put it back (the joiner moves what "
                "it has used up itself)"
            )
        return True


def replay(stream: Stream, url: str, delays_s: Mapping[str, int] | None = None) -> None:
    """Turn a finished stream into an inbox: per slice a features file and a labels file; and <inbox>/schema.yaml.

    delays_s: of each task, the seconds from an example to the event of its label (default 0).
    """
    schema, delays_s = stream.schema, delays_s or {}
    inbox = Inbox.open(url, schema)
    if stream.info.num_slices is None:
        raise UserError(f"{stream.root} is still growing; replay a finished stream")
    for index in range(stream.info.num_slices):
        name = f"slice-{index:06d}.parquet"
        features = _whole(stream, index, "features")
        labels = [_whole(stream, index, kind) for kind in stream.label_kinds(schema.labels)]
        columns = {task: table.column(task) for table in labels for task in table.column_names}
        events = [_events(features, schema, task, columns[task], delays_s.get(task, 0)) for task in schema.labels]
        _drop(inbox, LABELS, name, pa.concat_tables(events))
        _drop(inbox, FEATURES, name, features)
    text = yaml.safe_dump(schema.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    commit(inbox.fs, f"{inbox.root}/schema.yaml", text.encode())


def _whole(stream: Stream, index: int, kind: str) -> pa.Table:
    manifest, folder = stream.wait(index, kind, 0), f"{slice_folder(stream.root, index)}/{kind}"
    return pa.concat_tables([open_parquet(stream.fs, f"{folder}/{part.path}").read() for part in manifest.parts])


def _events(features: pa.Table, schema: Schema, task: str, labels: pa.ChunkedArray, delay_s: int) -> pa.Table:
    """An event for every label that is not 0, as no event means."""
    told = pc.fill_null(pc.not_equal(labels, 0), True)
    table = pa.table(
        {
            schema.id: features.column(schema.id),
            TASK: pa.array([task] * len(labels), pa.string()),
            VALUE: labels,
            schema.timestamp: pc.add(features.column(schema.timestamp), delay_s),
        }
    )
    return table.filter(told)


def _drop(inbox: Inbox, kind: str, name: str, table: pa.Table) -> None:
    """What a producer does: write under another name, rename."""
    folder = f"{inbox.root}/{kind}"
    with inbox.fs.open(f"{folder}/_{name}", "wb") as file:
        pq.write_table(table, file)
    inbox.fs.mv(f"{folder}/_{name}", f"{folder}/{name}")
