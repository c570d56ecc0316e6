"""Versions of a teacher: version(t) = sha256(version(t-1), config, digest of slice t), from the first slice that it trained on.

Anyone who has the stream can compute them again, which makes mix-ups and edits evident; it is no protection against a forger.
"""

import hashlib
from dataclasses import dataclass, field, replace

from exfm.data.errors import UserError
from exfm.data.manifest import Generation, Stream


@dataclass(frozen=True)
class Origin:
    """What a teacher knew before its first slice. parent: the version whose weights it began with, "" for none; until: the end
    (Unix seconds) of what these had learned, None where nobody knows.
    """

    parent: str = ""
    until: int | None = None


def genesis(config_digest: str, origin: Origin) -> str:
    """Version of a teacher that has trained on nothing yet."""
    return _hash("genesis", config_digest, origin.parent)


def leaks(origin: Origin, stream: Stream, first: int) -> str:
    """Why a teacher of this origin may not score a stream that it trains on from slice `first`; "" where it may."""
    if not origin.parent:
        return ""
    own = stream.manifest(first, "features")
    if origin.until is None or own is None:
        what = (
            "it is not known until when"
            if origin.until is None
            else f"slice {first} is not there, so nobody can say whether"
        )
        return f"{what} the teacher's warm start {origin.parent[:12]} had learned"
    if origin.until <= own.t0:
        return ""
    return f"the teacher's warm start {origin.parent[:12]} had learned up to time {origin.until}, but its first slice {first} begins at {own.t0}"


def next_version(parent: str, config_digest: str, slice_digest: str) -> str:
    return _hash(parent, config_digest, slice_digest)


def slice_digest(stream: Stream, index: int, tasks: tuple[str, ...]) -> str:
    """Digest of a slice's features and of the labels of `tasks`. UserError where these are not committed."""
    manifests = [stream.manifest(index, kind) for kind in ("features", *stream.label_kinds(tasks))]
    if any(m is None for m in manifests):
        raise UserError(f"slice {index} of {stream.root} is not labelled yet; a teacher's version needs its labels")
    return _hash(*(m.digest() for m in manifests if m is not None))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """What a teacher is, apart from how far it has trained. first: the slice that it began with; labels: the generation of
    labels that it learns; origin: what it had learned before."""

    teacher: str
    config: str
    tasks: tuple[str, ...]
    first: int
    labels: Generation = "first"
    origin: Origin = Origin()


@dataclass
class Versions:
    """The versions that a teacher had on a stream, each computed once."""

    stream: Stream
    identity: Identity
    _after: dict[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # a student may learn labels of another generation than its teacher
        self.stream = replace(self.stream, generation=self.identity.labels)

    def after(self, index: int) -> str:
        """Version after training on slices first..index; the genesis where index is first - 1."""
        who = self.identity
        if index < who.first - 1:
            raise UserError(
                f"teacher '{who.teacher}' began with slice {who.first}; it has no version after slice {index}"
            )
        done = max((i for i in self._after if i <= index), default=who.first - 1)
        version = self._after.get(done, genesis(who.config, who.origin))
        for i in range(done + 1, index + 1):
            version = next_version(version, who.config, slice_digest(self.stream, i, who.tasks))
            self._after[i] = version
        return version
