"""The supervision log: a teacher's raw logits, one slice at a time, mirroring the data's parts and row order.

    supervision/<teacher>/slice=000017/{part-00000.parquet, manifest.json}

Every manifest carries the teacher's version: version(t) = sha256(version(t-1), config, digest of slice t). Predictions
for slice t must come from version t-1, advanced at most by earlier batches of slice t. A student recomputes the chain
from its own view of the data. That makes mix-ups and edits evident; it is no protection against a forger.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from exfm.data.commit import Filesystem, commit_json, open_folder, sha256_of
from exfm.data.errors import UserError
from exfm.data.manifest import MANIFEST, Part, SliceManifest, Stream, load_manifest, slice_folder
from exfm.data.source import AlignedFiles
from exfm.data.writer import write_part


def genesis(config_digest: str) -> str:
    """Version of a teacher that has trained on nothing."""
    return _hash("genesis", config_digest)


def next_version(parent: str, config_digest: str, slice_digest: str) -> str:
    return _hash(parent, config_digest, slice_digest)


def slice_digest(stream: Stream, index: int) -> str:
    """Digest of a slice's features and labels. UserError where it is not labelled."""
    features = stream.manifest(index, "features")
    labels = stream.manifest(index, "labels")
    if features is None or labels is None:
        raise UserError(f"slice {index} of {stream.root} is not labelled yet; a teacher's version needs its labels")
    return _hash(features.digest(), labels.digest())


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def logit_column(task: str) -> str:
    return f"logit/{task}"


def write_supervision_part(fs: Filesystem, folder: str, like: Part, tasks: tuple[str, ...], logits: np.ndarray) -> Part:
    """Write the logits [rows, tasks] of one part (NaN: not scored), mirroring the row groups of the data's part."""
    fs.makedirs(folder, exist_ok=True)
    columns = {logit_column(t): pa.array(logits[:, i], from_pandas=True) for i, t in enumerate(tasks)}
    return write_part(fs, folder, like.path, pa.table(columns), like.row_groups)


@dataclass
class SupervisionLog:
    """A teacher's log, for writing (teacher) and checked reading (student)."""

    url: str
    _versions: dict[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.fs, self.root = open_folder(self.url)

    def folder(self, index: int) -> str:
        return slice_folder(self.root, index)

    def manifest(self, index: int) -> SliceManifest | None:
        return load_manifest(self.fs, self.folder(index))

    def commit(
        self, features: SliceManifest, parts: tuple[Part, ...], teacher: str, tasks: tuple[str, ...], parent: str, version: str,
        config_digest: str,
    ) -> None:  # fmt: skip
        """Commit one slice. parent: the teacher's version that scored it; version: after training on it."""
        extra = {
            "teacher": teacher, "tasks": list(tasks), "mode": "forward", "scored_by": parent, "parent": parent,
            "version": version, "config": config_digest, "watermark": features.slice - 1,
        }  # fmt: skip
        manifest = features.model_copy(update={"kind": "supervision", "parts": parts, "extra": extra})
        commit_json(self.fs, f"{self.folder(features.slice)}/{MANIFEST}", manifest.model_dump())

    def open_checked(self, stream: Stream, features: SliceManifest, tasks: tuple[str, ...]) -> AlignedFiles:
        """The committed supervision of a slice, after checking its version, its watermark and its files.

        UserError says what does not fit: another teacher or stream, an edited file, a teacher that had seen the slice.
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
        missing = [t for t in tasks if t not in manifest.extra["tasks"]]
        if missing:
            raise UserError(
                f"{self.root} has no predictions for task(s) {', '.join(missing)}, only {manifest.extra['tasks']}"
            )
        types = {logit_column(t): pa.float32() for t in manifest.extra["tasks"]}
        return AlignedFiles(self.fs, self.folder(index), manifest, tuple(logit_column(t) for t in tasks), types)

    def check(self, stream: Stream, manifest: SliceManifest) -> None:
        """Leak check. UserError where the manifest breaks the version chain or a file differs from its checksum."""
        index, extra = manifest.slice, manifest.extra
        where = f"{self.folder(index)}/{MANIFEST}"
        if manifest.kind != "supervision" or manifest.schema_digest != stream.schema_digest:
            raise UserError(
                f"{where} is not supervision of stream '{stream.schema.name}'; point distillation.learn at its log"
            )
        if lacking := sorted(
            {"teacher", "tasks", "scored_by", "parent", "version", "config", "watermark"} - set(extra)
        ):
            raise UserError(f"{where} lacks {', '.join(lacking)}; it was edited or damaged; score the slice again")
        if extra["watermark"] >= index or extra["scored_by"] != extra["parent"]:
            raise UserError(
                f"{where}: the teacher that scored slice {index} had already trained on slice {extra['watermark']}; such "
                "predictions leak labels and are refused; score the slice with an earlier version"
            )
        parent = self._parent(stream, index, extra["config"])
        if extra["parent"] != parent:
            if (gap := self._gap(index)) is not None:
                raise UserError(
                    f"{where} cannot be checked: the log has no slice {gap}, which its version follows from"
                )
            raise UserError(
                f"{where}: its teacher version does not follow from slice {index - 1} (parent {extra['parent'][:12]}, expected "
                f"{parent[:12]}): the log mixes teachers or was edited; score the stream again with one teacher"
            )
        if extra["version"] != next_version(parent, extra["config"], slice_digest(stream, index)):
            raise UserError(
                f"{where}: its version does not follow from its parent: its teacher was trained on other data than slice "
                f"{index} of {stream.root}, or the manifest was edited; score it again"
            )
        for part in manifest.parts:
            path = f"{self.folder(index)}/{part.path}"
            if sha256_of(self.fs, path) != part.sha256:
                raise UserError(
                    f"{path} differs from the checksum in its manifest; it was edited or damaged; score it again"
                )
        self._versions[index] = extra["version"]

    def _gap(self, index: int) -> int | None:
        """The newest slice before `index` that the log lacks although it has an earlier one."""
        held = [int(path.rsplit("=", 1)[1]) for path in self.fs.glob(f"{self.root}/slice=*")]
        missing = set(range(min(held, default=index), index)) - {i for i in held if self.manifest(i) is not None}
        return max(missing, default=None)

    def _parent(self, stream: Stream, index: int, config_digest: str) -> str:
        """The version before slice `index`, recomputed over all earlier slices that the log holds.

        UserError where one of them has another version: then another teacher scored it, or it was edited.
        """
        first = index
        while first - 1 not in self._versions and self.manifest(first - 1) is not None:
            first -= 1
        version = self._versions.get(first - 1, genesis(config_digest))
        for earlier in range(first, index):
            version = next_version(version, config_digest, slice_digest(stream, earlier))
            found = self.manifest(earlier)
            assert found is not None
            if found.extra["version"] != version:
                raise UserError(
                    f"{self.folder(index)}/{MANIFEST}: its teacher version does not follow from slice {earlier} (version "
                    f"{found.extra['version'][:12]}, expected {version[:12]}): the log mixes teachers, or it or the data was "
                    "edited; score the stream again with one teacher"
                )
            self._versions[earlier] = version
        return version
