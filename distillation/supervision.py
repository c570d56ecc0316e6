"""The supervision log: a teacher's raw logits, one slice at a time, mirroring the data's parts and row order.

    supervision/<teacher>/slice=000017/{part-00000.parquet, manifest.json}

Logits are of the true world: where negatives are kept at a rate below 1, the correction is a reader's. A manifest's `extra` says who
scored the slice: `teacher`, its `config`, its `tasks`, the `first` slice that it trained on, the generation of its `labels`, and of a warm-started one `parent` and
`learned_until`, the version that it began with and the end of what that had learned; `scored_by`, its version when
the slice began, and `watermark`, the last slice that this version had trained on; `mode`: forward (the teacher's own forward
pass, advanced by earlier batches of the slice) or snapshot (a scorer with frozen weights); `at`, when it was committed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from exfm.data.commit import Filesystem, commit_json, open_folder, sha256_of
from exfm.data.errors import UserError
from exfm.data.manifest import MANIFEST, Generation, Part, SliceManifest, Stream, load_manifest, slice_folder
from exfm.data.source import AlignedFiles
from exfm.data.writer import write_part
from exfm.distillation.version import Identity, Origin, Versions, leaks

MODES = ("forward", "snapshot")
EXTRA: dict[str, Any] = {"teacher": str, "config": str, "tasks": list, "first": int, "labels": str, "scored_by": str, "watermark": int, "mode": str, "at": float, "parent": str, "learned_until": (int, type(None))}  # fmt: skip


def logit_column(task: str) -> str:
    return f"logit/{task}"


def write_supervision_part(fs: Filesystem, folder: str, like: Part, tasks: tuple[str, ...], logits: np.ndarray) -> Part:
    """Write the logits [rows, tasks] of one part (NaN: not scored), mirroring the row groups of the data's part.

    UserError for an infinite one.
    """
    if np.isinf(logits).any():
        row, task = (int(i) for i in np.argwhere(np.isinf(logits))[0])
        raise UserError(
            f"{folder}/{like.path}: the logit of task '{tasks[task]}' in row {row} is {logits[row, task]}; the teacher has "
            "diverged; restore an earlier commit of it"
        )
    fs.makedirs(folder, exist_ok=True)
    columns = {logit_column(t): pa.array(logits[:, i], from_pandas=True) for i, t in enumerate(tasks)}
    return write_part(fs, folder, like.path, pa.table(columns), like.row_groups, dense=True)


def identity_of(manifest: SliceManifest) -> Identity:
    e = manifest.extra
    origin = Origin(e["parent"], e["learned_until"])
    return Identity(e["teacher"], e["config"], tuple(e["tasks"]), e["first"], e["labels"], origin)


@dataclass
class SupervisionLog:
    """A teacher's log, for writing (teacher, scorer) and checked reading (student)."""

    url: str
    _versions: Versions | None = field(default=None, repr=False)
    _manifests: dict[int, SliceManifest] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.fs, self.root = open_folder(self.url)

    def folder(self, index: int) -> str:
        return slice_folder(self.root, index)

    def manifest(self, index: int) -> SliceManifest | None:
        """What is committed never changes, so that it is read once."""
        if (known := self._manifests.get(index)) is None and (known := load_manifest(self.fs, self.folder(index))):
            # a student asks for a slice and the one before
            before = self._manifests.get(index - 1)
            self._manifests = ({} if before is None else {index - 1: before}) | {index: known}
        return known

    def slices(self) -> list[int]:
        """Committed slices, ascending."""
        found = (path.rsplit("=", 1)[1] for path in self.fs.glob(f"{self.root}/slice=*/{MANIFEST}"))
        return sorted(int(number.split("/", 1)[0]) for number in found)

    def expire(self, before: float) -> list[int]:
        """Remove slices that were committed before that time, but never the newest; those removed."""
        removed = []
        for index in self.slices()[:-1]:
            manifest = self.manifest(index)
            if manifest is None or manifest.extra.get("at", before) >= before:
                break
            # without a manifest a slice does not exist
            self.fs.rm_file(f"{self.folder(index)}/{MANIFEST}")
            self.fs.rm(self.folder(index), recursive=True)
            removed.append(index)
        return removed

    def commit(
        self, features: SliceManifest, parts: tuple[Part, ...], who: Identity, mode: str, scored_by: str, watermark: int, at: float
    ) -> None:  # fmt: skip
        """Commit one slice. scored_by: the version that scored it; watermark: the last slice that it had trained on."""
        extra = {
            "teacher": who.teacher, "config": who.config, "tasks": list(who.tasks), "first": who.first, "labels": who.labels, "mode": mode,
            "scored_by": scored_by, "watermark": watermark, "at": at, "parent": who.origin.parent, "learned_until": who.origin.until,
        }  # fmt: skip
        manifest = features.model_copy(update={"kind": "supervision", "parts": parts, "extra": extra})
        commit_json(self.fs, f"{self.folder(features.slice)}/{MANIFEST}", manifest.model_dump())

    def open_checked(self, stream: Stream, features: SliceManifest, columns: Mapping[str, str]) -> AlignedFiles:
        """The committed supervision of a slice, after checking its version, its watermark and its files.

        columns: the teacher's tasks wanted -> the name that their column gets. UserError says what does not fit: another
        teacher or stream, an edited file, a teacher that had seen the slice.
        """
        index = features.slice
        manifest = self.manifest(index)
        if manifest is None:
            raise UserError(
                f"{self.root} has no supervision for slice {index}; run the teacher or set on_missing: label_only"
            )
        if manifest.slice != index:
            raise UserError(f"{self.folder(index)} holds the manifest of slice {manifest.slice}; score it again")
        self.check(stream, manifest)
        tasks = manifest.extra["tasks"]
        if missing := [t for t in columns if t not in tasks]:
            raise UserError(
                f"{self.root} has no predictions for task(s) {', '.join(missing)}; its teacher has {', '.join(tasks)}; name "
                "one of them in distillation.learn.teachers.tasks"
            )
        types = {logit_column(t): pa.float32() for t in tasks}
        renamed = {logit_column(t): name for t, name in columns.items()}
        return AlignedFiles(self.fs, self.folder(index), manifest, tuple(renamed), types, renamed)

    def check(self, stream: Stream, manifest: SliceManifest) -> None:
        """Leak check. UserError where the manifest does not follow from the data or a file differs from its checksum."""
        index, extra = manifest.slice, manifest.extra
        where = f"{self.folder(index)}/{MANIFEST}"
        if manifest.kind != "supervision" or manifest.schema_digest != stream.schema_digest:
            raise UserError(
                f"{where} is not supervision of stream '{stream.schema.name}'; point distillation.learn at its log"
            )
        wrong = {k for k, kind in EXTRA.items() if not isinstance(extra.get(k), kind)}
        wrong |= {
            k for k, allowed in (("mode", MODES), ("labels", get_args(Generation))) if extra.get(k) not in allowed
        }
        if wrong:
            raise UserError(
                f"{where} has no proper {', '.join(sorted(wrong))}; it was edited or damaged; score the slice again"
            )
        watermark = extra["watermark"]
        if watermark >= index or (extra["mode"] == "forward" and watermark != index - 1):
            raise UserError(
                f"{where}: the teacher that scored slice {index} had already trained on slice {watermark}; such predictions "
                "leak labels and are refused; score the slice with an earlier version"
            )
        self._check_identity(where, manifest)
        self._check_version(where, stream, manifest)
        for part in manifest.parts:
            path = f"{self.folder(index)}/{part.path}"
            if sha256_of(self.fs, path) != part.sha256:
                raise UserError(
                    f"{path} differs from the checksum in its manifest; it was edited or damaged; score it again"
                )

    def _check_identity(self, where: str, manifest: SliceManifest) -> None:
        """One log is of one teacher. UserError where its neighbour before it, or what was read so far, says otherwise."""
        who = identity_of(manifest)
        before = self.manifest(manifest.slice - 1)
        others = [] if before is None else [(f"slice {before.slice}", identity_of(before))]
        if self._versions is not None:
            others.append(("what was read before", self._versions.identity))
        for what, other in others:
            if who != other:
                raise UserError(
                    f"{where}: its teacher '{who.teacher}' (config {who.config[:12]}) is not that of {what} ('{other.teacher}', "
                    f"config {other.config[:12]}): the log mixes teachers or was edited; score the stream again with one teacher"
                )

    def _check_version(self, where: str, stream: Stream, manifest: SliceManifest) -> None:
        who, watermark, scored_by = identity_of(manifest), manifest.extra["watermark"], manifest.extra["scored_by"]
        if self._versions is None and (why := leaks(who.origin, stream, who.first)):
            raise UserError(f"{where}: {why}; such predictions leak labels and are refused")
        versions = self._versions or Versions(stream, who)
        expected = versions.after(watermark)
        if scored_by != expected:
            raise UserError(
                f"{where}: its teacher version {scored_by[:12]} does not follow from slices {who.first} to {watermark} of "
                f"{stream.root} (expected {expected[:12]}): it was trained on other data, or the log or the data was edited; "
                "score the stream again"
            )
        self._versions = versions
