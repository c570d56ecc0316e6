"""The jobs of the kill campaign's loop, and what must hold when all of them have ended, whatever was killed on the way.

A teacher publishes its forward pass and snapshots, some of them deltas; a scorer follows it; three students learn from the two
logs, each by another method and from another part of the traffic.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks._kill_campaign import unfinished
from benchmarks._kill_jobs import MODEL, differences, differing_logs, verify
from exfm.checkpoints.commits import committed
from exfm.data.errors import UserError
from exfm.data.manifest import MANIFEST, SliceManifest, Stream, digest_ids, open_stream, slice_folder
from exfm.distillation.supervision import SupervisionLog, logit_column
from exfm.launch.auditing import audit_run

Raw = dict[str, Any]
TEACHER, SCORER = "teacher", "scorer"
# student -> the values of column `domain` that it serves (none: everything) and its first slice
STUDENTS: dict[str, tuple[tuple[int, ...], int]] = {"single": ((0,), 0), "auxiliary": ((1, 2), 1), "adapter": ((), 0)}
# log -> where it lies in a loop's folder and its first slice: the scorer has no snapshot for the first one
LOGS = {"forward": ("teacher/supervision/fm", 0), "scored": ("scorer/supervision/fm-scored", 1)}
# full commits, deltas and compaction, under every staging
CHECKPOINTS: dict[str, Raw] = {
    "teacher": {
        "every_slices": 1,
        "every_examples": 160,
        "staging": "copy_on_write",
        "full_every": 4,
        "snapshots": {"keep": 1000, "full_every": 3},
    },
    "single": {"every_slices": 1, "every_examples": 64},
    "auxiliary": {"every_slices": 1, "staging": "bounded", "buffer_mib": 1, "full_every": 3},
    "adapter": {"every_slices": 2, "every_examples": 128, "staging": "copy_on_write", "full_every": 8, "compact_after": 3},
}  # fmt: skip


@dataclass(frozen=True)
class LoopSize:
    """How large a loop's stream is, and on how many ranks its scorer runs."""

    slices: int
    rows: int
    scorers: int

    def ranks(self, name: str) -> int:
        return {TEACHER: 2, SCORER: self.scorers}.get(name, 1)


def loop_configs(folder: Path, stream: str) -> dict[str, Raw]:
    """The configuration of every job of a loop that runs in `folder`."""
    own = {name: _run(name, folder / name) for name in (TEACHER, SCORER, *STUDENTS)}
    forward, scored = (str(folder / path) for path, _ in LOGS.values())
    both = [
        {"name": "forward", "logs": [{"path": forward}]},
        {"name": "scored", "logs": [{"path": scored, "first": LOGS["scored"][1]}]},
    ]
    distillation: dict[str, Raw] = {
        TEACHER: {"publish": {"teacher": "fm"}},
        "single": {"learn": {"supervision": forward, "method": "single_head"}},
        "auxiliary": {"learn": {"supervision": scored, "method": "auxiliary_head"}},
        "adapter": {"learn": {"teachers": both, "method": "student_adapter"}},
    }
    section = {"teacher": str(folder / TEACHER), "log": "fm-scored", "global_batch": 64, "prefetch": 2}
    configs: dict[str, Raw] = {SCORER: {"run": own[SCORER], "score": section}}
    for name, distilled in distillation.items():
        jobs_stream = {"path": stream, "global_batch": 32, "prefetch": 2} | _part(name)
        sharding = {"allowed": ["row_wise" if name == TEACHER else "table_wise"], "min_column_shard": 4}
        configs[name] = MODEL | {
            "run": own[name], "stream": jobs_stream, "distillation": distilled, "sharding": sharding,
            "checkpoint": CHECKPOINTS[name],
        }  # fmt: skip
    return json.loads(json.dumps(configs))


def _run(name: str, folder: Path) -> Raw:
    # a line in metrics.jsonl for every step costs little, and restarts can be read from it
    return {"name": name, "folder": str(folder), "device": "cpu", "log_every_s": 1e-6, "nan_check_steps": 4}


def _part(name: str) -> Raw:
    values, first = STUDENTS.get(name, ((), 0))
    domains = [{"name": "own", "column": "domain", "values": values}] if values else []
    return {"first": first, "domains": domains} | ({"domain": "own"} if values else {})


def writing_roots(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Where a job makes folders that count once they have a manifest, and how their names begin."""
    if name != SCORER:
        yield folder / name / "checkpoints", "step="
    if name == TEACHER:
        yield folder / name / "snapshots", "slice="
    for path, _ in LOGS.values():
        if path.startswith(f"{name}/"):
            yield folder / path, "slice="


# ------------------------------------------------------------------------------------------------ what must hold


@dataclass
class Checked:
    """What the checks of a finished loop counted, and what was wrong by kind."""

    predictions: int
    learned: dict[str, int]
    problems: dict[str, list[str]]


def check_loop(folder: Path, reference: Path, stream_path: str) -> Checked:
    """A finished loop against the data and the undisturbed loop."""
    stream = open_stream(stream_path)
    checked = Checked(0, {}, {})

    def blame(kind: str, found: list[str]) -> None:
        if found:
            checked.problems.setdefault(kind, []).extend(found)

    for name, (path, first) in LOGS.items():
        good, wrong = _check_log(folder / path, stream, first)
        checked.predictions += good
        blame("predictions", [f"log {name}: {w}" for w in wrong])
    blame("logits", differing_logs(folder / SCORER, reference / SCORER))
    for name in (TEACHER, *STUDENTS):
        found = committed(folder / name / "checkpoints")
        corrupt = [problem for problem in map(verify, found) if problem]
        blame("corrupt", corrupt)
        checked.learned[name], wrong = _check_learned(folder / name, stream, *STUDENTS.get(name, ((), 0)))
        blame("learned", [f"{name}: {w}" for w in wrong])
        if not found:
            blame("weights", [f"{name} has no commit"])
        elif not corrupt:
            differing = differences(folder / name, reference / name)
            logs = [d for d in differing if d.startswith("supervision/")]
            blame("logits", logs)
            blame("weights", [f"{name}: {d}" for d in differing if d not in logs])
    blame("leftover", [f"{root}/{n}" for m in (TEACHER, SCORER, *STUDENTS) for root, prefix in writing_roots(folder, m) for n, _ in unfinished(root, prefix)])  # fmt: skip
    return checked


def _check_log(root: Path, stream: Stream, first: int) -> tuple[int, list[str]]:
    """(examples with one committed prediction, what is wrong) of a log that begins with slice `first`."""
    assert stream.info.num_slices is not None
    log, good, wrong = SupervisionLog(str(root)), 0, []
    wanted = list(range(first, stream.info.num_slices))
    folders = sorted(int(p.name.removeprefix("slice=")) for p in root.glob("slice=*"))
    if folders != wanted:
        wrong.append(f"slices {folders}, wanted are {wanted}")
    for index in (i for i in wanted if i in folders):
        try:
            manifest = log.manifest(index)
            if manifest is None:
                raise UserError(f"{root} has no committed slice {index}")
            log.check(stream, manifest)
        except UserError as error:
            wrong.append(str(error))
            continue
        if found := _check_slice(Path(log.folder(index)), stream, manifest):
            wrong.append(found)
        else:
            good += manifest.rows
    return good, wrong


def _check_slice(folder: Path, stream: Stream, manifest: SliceManifest) -> str:
    """What is wrong with a committed slice: its ids are not the data's, or a row has no prediction or more than one."""
    features = stream.manifest(manifest.slice, "features")
    assert features is not None
    parts = {part.path for part in manifest.parts}
    if extra := {p.name for p in folder.glob("*.parquet")} ^ parts:
        return f"{folder} does not have exactly the parts of its manifest: {', '.join(sorted(extra))}"
    data = Path(slice_folder(stream.root, manifest.slice)) / "features"
    for part, own in zip(features.parts, manifest.parts, strict=True):
        file = pq.ParquetFile(data / part.path)
        digests = [
            digest_ids(file.read_row_group(n, [stream.schema.id])[stream.schema.id].to_numpy())
            for n in range(file.num_row_groups)
        ]
        if digests != [g.id_digest for g in own.row_groups]:
            return f"{folder}/{own.path} is not of the examples of {data / part.path}"
        table = pq.ParquetFile(folder / own.path).read()
        for task in manifest.extra["tasks"]:
            column = table[logit_column(task)]
            if len(column) != part.rows:
                return f"{folder}/{own.path} has {len(column)} predictions for {part.rows} examples"
            if missing := part.rows - int(np.isfinite(column.to_numpy()).sum()):
                return f"{folder}/{own.path}: {missing} examples have no prediction of {task}"
    return ""


def _check_learned(run: Path, stream: Stream, values: tuple[int, ...], first: int) -> tuple[int, list[str]]:
    """(examples learned, what is wrong) of a job that should have learned a part of the traffic once."""
    slices = [int(p.name.removeprefix("slice=")) for p in Path(stream.root).glob("slice=*")]
    files = [p for i in slices if i >= first for p in Path(slice_folder(stream.root, i)).glob("features/*.parquet")]
    domains = np.concatenate([pq.ParquetFile(p).read(["domain"])["domain"].to_numpy() for p in files])
    whole = int(np.isin(domains, values).sum()) if values else len(domains)
    try:
        audit = audit_run(run)
    except UserError as error:
        return 0, [str(error)]
    counts = audit["examples"], audit["skipped"], audit["repeated"]
    return counts[0], [] if counts == (whole, 0, 0) else [
        f"of {whole} examples {counts[0]} were learned, {counts[1]} skipped, {counts[2]} repeated"
    ]


class Manifests:
    """Sees from outside whether a log's slice is committed a second time."""

    def __init__(self, folder: Path) -> None:
        self.roots = [folder / path for path, _ in LOGS.values()]
        self.seen: dict[str, tuple[int, int]] = {}
        self.twice: list[str] = []

    def look(self) -> None:
        for path in (p for root in self.roots for p in root.glob(f"slice=*/{MANIFEST}")):
            stat = path.stat()
            now = stat.st_ino, stat.st_mtime_ns
            if self.seen.setdefault(str(path), now) != now:
                self.twice.append(f"{path} was committed again")
                self.seen[str(path)] = now
