"""What tables of a stream are asked for, measured for a sharding planner: how many ids, how skewed, how often again.

One column is counted at a time. Memory: 24 bytes for every distinct id of that column, and one row group; it grows with
the data, so the number of examples is bounded.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from rich.box import SIMPLE
from rich.table import Table

from exfm.data.commit import commit, open_folder
from exfm.data.counts import Counter, zipf_exponent
from exfm.data.cut import Progress
from exfm.data.errors import UserError
from exfm.data.manifest import SliceManifest, Stream, column_array, slice_folder
from exfm.data.source import AlignedFiles, SliceSource
from exfm.data.yamls import parse_yaml

HotShare = Literal["0.001", "0.01", "0.1"]
HOT: dict[HotShare, int] = {"0.001": 1000, "0.01": 100, "0.1": 10}  # share of the distinct ids: one in
STEPS = 20
LEGEND = """\
# Written by `exfm data stats`. pooling: ids per example. presence: share of examples with an id. unique_rate: distinct
# ids / ids of a batch. zipf: exponent of frequency by rank. hot: share of lookups that go to this share of the ids.
# reuse: share of a batch's distinct ids that miss a cache of the hottest 1/20, 2/20, ... of all ids (LFU, in hindsight).
"""

# six digits, so that a person can read the line
Rounded = Annotated[float, AfterValidator(lambda value: float(f"{value:.6g}"))]
Share = Annotated[Rounded, Field(ge=0, le=1)]


class ColumnStats(BaseModel):
    """Lookups of one sparse column. All of an empty column is 0.

    pooling: mean ids per example. presence: share of examples with at least one. unique_rate: distinct ids / ids of one
    batch, mean over batches that have ids. zipf: exponent of frequency by rank, 0 is uniform. hot: share of the lookups
    that go to the most frequent 0.1%, 1% and 10% of the distinct ids (rounded up to whole ids).

    reuse: with the hottest 1/20, 2/20, ... 20/20 of the distinct ids in a cache, the share of lookups (an id counts once
    a batch) that miss. It approximates an LFU cache, in hindsight: hottest are the ids of most batches of all that was
    measured, the first lookup of an id may hit, and nothing is evicted. A cache that does not know the future misses more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    pooling: Annotated[Rounded, Field(ge=0)]
    presence: Share
    unique_rate: Share
    distinct: int = Field(ge=0)
    zipf: Annotated[Rounded, Field(ge=0)]
    hot: dict[HotShare, Share] = Field(min_length=len(HOT))
    reuse: tuple[Share, ...] = Field(min_length=STEPS, max_length=STEPS)

    def miss_ratio(self, cached: float) -> float:
        """Share of lookups that miss with this share of the distinct ids cached: `reuse`, linear between its points."""
        return float(np.interp(cached, np.arange(STEPS + 1) / STEPS, (1.0, *self.reuse)))


class StreamStats(BaseModel):
    """Statistics of a stream. slices: [first, last) that were read, the last one perhaps in part. batch: consecutive
    examples, across slices. bytes_per_example: of the whole feature and label files, compressed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    stream: str
    examples: int = Field(gt=0)
    batch: int = Field(gt=0)
    slices: tuple[int, int]
    bytes_per_example: Annotated[Rounded, Field(ge=0)]
    columns: dict[str, ColumnStats]


def column_stats(counter: Counter) -> ColumnStats:
    """The statistics of a finished counter."""
    distinct, total, examples = len(counter.ids), int(counter.lookups.sum()), max(counter.examples, 1)
    lookups = np.sort(counter.lookups)[::-1]
    hits = np.concatenate([[0], np.cumsum(np.sort(counter.batches)[::-1])])
    cached = [distinct * step // STEPS for step in range(1, STEPS + 1)]
    return ColumnStats(
        pooling=total / examples,
        presence=counter.present / examples,
        unique_rate=float(np.mean(counter.rates)) if counter.rates else 0.0,
        distinct=distinct,
        zipf=zipf_exponent(lookups),
        hot={share: lookups[: -(-distinct // one_in)].sum() / max(total, 1) for share, one_in in HOT.items()},
        reuse=tuple((hits[-1] - hits[rows]) / max(hits[-1], 1) for rows in cached),
    )


def slices_given(stream: Stream, text: str | None) -> tuple[int, int]:
    """(first, last) of `A:B`, or of all slices that the stream has so far. UserError for what it does not have."""
    last = stream.info.num_slices
    if last is None:
        last = stream.newest("features", -1) + 1
    if last == 0:
        raise UserError(f"{stream.root} has no slice yet; measure it when its first one is committed")
    if text is None:
        return 0, last
    first_text, _, last_text = text.partition(":")
    try:
        given = int(first_text), int(last_text)
    except ValueError:
        raise UserError(f"--slices {text} is not of the form A:B, for instance 0:{last}") from None
    if not 0 <= given[0] < given[1] <= last:
        raise UserError(f"--slices {text} is not a part of 0:{last}, the slices of {stream.root}; give A < B inside it")
    return given


def measure(
    stream: Stream,
    columns: Sequence[str] | None,
    first: int,
    last: int,
    batch: int,
    max_examples: int,
    progress: Progress | None = None,
) -> StreamStats:
    """Read slices [first, last), at most max_examples, in the order of time. columns: None for all sparse ones.

    UserError for a column, slice or size that cannot be, and for damaged files.
    """
    for name, value in (("--batch", batch), ("--max-examples", max_examples)):
        if value < 1:
            raise UserError(f"{name} is {value}; at least 1 is needed")
    if not 0 <= first < last:
        raise UserError(f"slices {first}:{last} of {stream.root} are none; give 0 <= first < last")
    sparse = stream.schema.sparse if columns is None else [stream.schema.sparse_column(name) for name in columns]
    names = [column.name for column in sparse]
    manifests = _manifests(stream, first, last, max_examples)
    examples = min(sum(m.rows for m in manifests), max_examples)
    found = {}
    for number, name in enumerate(names):
        counter = Counter(batch)
        for column in _column(stream, manifests, name, examples):
            counter.add(column)
            if progress:
                progress("counted", number * examples + counter.examples, len(names) * examples)
        counter.finish()
        found[name] = column_stats(counter)
    return StreamStats(
        stream=stream.schema.name,
        examples=examples,
        batch=batch,
        slices=(first, first + len(manifests)),
        bytes_per_example=_bytes_per_example(stream, manifests),
        columns=found,
    )


def _manifests(stream: Stream, first: int, last: int, max_examples: int) -> list[SliceManifest]:
    """Of the features of as many slices as hold max_examples."""
    found: list[SliceManifest] = []
    rows = 0
    for index in range(first, last):
        if rows >= max_examples:
            break
        manifest = stream.manifest(index, "features")
        if manifest is None:
            raise UserError(
                f"{slice_folder(stream.root, index)} has no committed features; give --slices A:B without it"
            )
        found.append(manifest)
        rows += manifest.rows
    return found


def _column(stream: Stream, manifests: Sequence[SliceManifest], name: str, examples: int) -> Iterator[pa.Array]:
    """The column's first `examples` rows, a row group at a time."""
    for manifest in manifests:
        folder = f"{slice_folder(stream.root, manifest.slice)}/features"
        files = AlignedFiles(stream.fs, folder, manifest, (name,), stream.types("features"))
        source = SliceSource([files], stream.schema.id)
        for group in range(source.num_groups):
            if not examples:
                return
            column = column_array(source.read(files, group, [name]), name).slice(0, examples)
            examples -= len(column)
            yield column


def _bytes_per_example(stream: Stream, manifests: Sequence[SliceManifest]) -> float:
    """Of features, and of every kind of labels where it is committed."""
    kinds = stream.label_kinds(stream.schema.labels)
    of_kinds = [manifests] + [[m for i in manifests if (m := stream.manifest(i.slice, kind))] for kind in kinds]
    return sum(sum(p.bytes for m in ms for p in m.parts) / max(sum(m.rows for m in ms), 1) for ms in of_kinds)


class _Line(dict[str, Any]):
    """A mapping that YAML writes in one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Line, lambda d, v: d.represent_mapping("tag:yaml.org,2002:map", v, flow_style=True))


def write_stats(path: str | Path, stats: StreamStats) -> None:
    """Write a YAML file, one line for every column."""
    value = stats.model_dump(mode="json")
    value["columns"] = {name: _Line(column) for name, column in value["columns"].items()}
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=float("inf"))
    fs, target = open_folder(path)
    try:
        commit(fs, target, (LEGEND + text).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); name a file in a folder of yours with --out") from None


def read_stats(path: str | Path) -> StreamStats:
    """Read what write_stats wrote. UserError names the file, the key and the value that is wrong."""
    fs, source = open_folder(path)
    try:
        return StreamStats.model_validate(parse_yaml(fs.cat_file(source)))
    except ValidationError as error:
        lines = "; ".join(_explain(".".join(map(str, e["loc"])) or "(all)", e) for e in error.errors())
        raise UserError(f"{path}: {lines}; measure it again with `exfm data stats`") from None
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}); write it with `exfm data stats`") from None


def _explain(key: str, error: Any) -> str:
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    return f"'{key}' is {error['input']!r}: {error['msg']}"


def render(stats: StreamStats) -> Table:
    """The columns as a table for a rich console."""
    first, last = stats.slices
    sizes = f"{stats.bytes_per_example:.3g} bytes each, batches of {stats.batch:,}"
    title = f"{stats.stream}: {stats.examples:,} examples of slices {first}:{last}, {sizes}"
    table = Table(title=title, box=SIMPLE, title_justify="left")
    table.add_column("column", no_wrap=True)
    for name in ("ids/example", "distinct", "unique in batch", "zipf", "lookups of top 1%"):
        table.add_column(name, justify="right")
    for name, c in stats.columns.items():
        shares = f"{100 * c.unique_rate:.3g}%", f"{c.zipf:.2f}", f"{c.hot['0.01']:.1%}"
        table.add_row(name, f"{c.pooling:.3g}", f"{c.distinct:,}", *shares)
    return table
