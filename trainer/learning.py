"""What can be known to be wrong with a student's teachers, and with a teacher's beginning, before a rank starts."""

from exfm.checkpoints.commits import Committed
from exfm.data.errors import UserError
from exfm.data.manifest import SliceManifest, Stream, slice_folder
from exfm.data.source import AlignedFiles, SliceSource
from exfm.distillation.config import LearnConfig, TeacherConfig
from exfm.distillation.supervision import SupervisionLog
from exfm.distillation.version import Origin, leaks


def check_rows(stream: Stream, features: SliceManifest, log: SupervisionLog) -> None:
    """UserError, with the first example ids, where a log's slice is not of these examples."""
    manifest = log.manifest(features.slice)
    if manifest is None or manifest.slice != features.slice:  # the check that follows names what is wrong with it
        return
    if manifest.row_groups != features.row_groups:
        own = AlignedFiles(stream.fs, f"{slice_folder(stream.root, features.slice)}/features", features, (), None)
        SliceSource([own, AlignedFiles(log.fs, log.folder(features.slice), manifest, ())], stream.schema.id)


def check_learning(learn: LearnConfig, tasks: tuple[str, ...], stream: Stream, slices: range) -> None:
    """UserError for tasks that the student or a teacher lacks, and for a log of another stream, as far as logs exist already."""
    for teacher in learn.all_teachers:
        if unknown := [t for t in teacher.tasks if t not in tasks]:
            raise UserError(
                f"distillation.learn.teachers: '{teacher.name}' maps task(s) {', '.join(unknown)}, which the student does not learn; "
                f"heads.tasks has {', '.join(tasks)}"
            )
        wanted = [theirs for t in tasks if (theirs := teacher.task(t))]
        if not wanted:
            raise UserError(
                f"distillation.learn.teachers: '{teacher.name}' teaches no task; map one of {', '.join(tasks)}"
            )
        for config in teacher.logs:
            _check_log(teacher, SupervisionLog(config.path), config.path, wanted, stream, slices)


def _check_log(
    teacher: TeacherConfig, log: SupervisionLog, path: str, wanted: list[str], stream: Stream, slices: range
) -> None:
    """The first slice that will be read of it and is there; a log that is still empty passes."""
    index = next((i for i in log.slices() if i in slices and teacher.log(i) == path), None)
    manifest = None if index is None else log.manifest(index)
    features = None if index is None else stream.manifest(index, "features")
    if manifest is None or features is None:
        return
    check_rows(stream, features, log)
    has = manifest.extra.get("tasks")
    # what is not even a list is named when the slice is read
    if isinstance(has, list) and (missing := [t for t in wanted if t not in has]):
        raise UserError(
            f"{log.root} has no predictions for task(s) {', '.join(missing)} of teacher '{teacher.name}'; it has "
            f"{', '.join(map(str, has))}; name one of them, or null, in distillation.learn.teachers.tasks"
        )


def origin_of(source: Committed) -> Origin:
    """What a job that begins with the weights of this commit has learned already."""
    until = source.manifest.get("learned_until")
    return Origin(str(source.manifest.get("version")), until if isinstance(until, int) else None)


def check_beginning(stream: Stream, first: int, source: Committed) -> None:
    """UserError where a teacher that logs its predictions would begin with weights that have learned what it is to score."""
    why = leaks(origin_of(source), stream, first)
    if why:
        raise UserError(
            f"checkpoint.warm_start: {why}: its predictions would leak labels to students; {_remedy(stream, first, source)}"
        )


def _remedy(stream: Stream, first: int, source: Committed) -> str:
    until, index = origin_of(source).until, first
    while until is not None and (later := stream.manifest(index, "features")) is not None:
        if later.t0 >= until:
            return f"set stream.first: {index}, or begin with an earlier commit than {source.folder}"
        index += 1
    return f"begin with an earlier commit than {source.folder}, or publish neither predictions nor snapshots"
