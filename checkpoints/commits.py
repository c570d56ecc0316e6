"""What was committed in a folder, checkpoints or snapshots, and the chains of deltas in it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from exfm.checkpoints.layout import NONSENSE, Damaged, read_manifest
from exfm.checkpoints.reader import Folder
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError

NAME = re.compile(r"(?:step=(?=[0-9]{8})|slice=(?=[0-9]{6}))(?P<number>[0-9]{6,15})(?:-(?P<again>[0-9]{1,9}))?")


@dataclass(frozen=True)
class Committed:
    """A committed folder. manifest: {} where it cannot be read, and `problem` says why."""

    storage: Storage
    name: str
    manifest: dict[str, Any]
    problem: str = ""

    @property
    def folder(self) -> str:
        return f"{self.storage.url}/{self.name}"

    @property
    def step(self) -> int:
        return order(self.name)[0]

    @property
    def kind(self) -> str:
        return str(self.manifest.get("kind", "?"))

    @property
    def base(self) -> str | None:
        """Name of the commit that a delta is relative to."""
        return str(self.manifest["base"]["name"]) if self.manifest.get("base") else None

    def open(self) -> Folder:
        return Folder(self.storage, self.name, self.manifest)


def order(name: str) -> tuple[int, int]:
    """Sorts step=00000007, step=00000007-1 (committed later at the same step), step=00000012."""
    found = NAME.fullmatch(name)
    assert found is not None, name
    return int(found["number"]), int(found["again"] or 0)


def listing(storage: Storage) -> list[Committed]:
    """Everything that was committed, oldest first, unreadable manifests included."""
    found = []
    for name in sorted((n for n in storage.names() if NAME.fullmatch(n)), key=order):
        try:
            found.append(Committed(storage, name, read_manifest(storage, name)))
        except FileNotFoundError:  # never committed, or removed just now
            continue
        except Damaged as error:
            found.append(Committed(storage, name, {}, str(error)))
    return found


def committed(root: Any) -> list[Committed]:
    """Committed checkpoints with a good manifest, oldest first. root: a folder or URL."""
    return [c for c in listing(root if isinstance(root, Storage) else Storage(root)) if not c.problem]


def chain(found: Committed, everything: Sequence[Committed]) -> list[Committed]:
    """The full commit that `found` rests on, the deltas after it, `found` last. Damaged where one is missing or exchanged."""
    if found.problem:
        raise Damaged(found.problem)
    by_name = {c.name: c for c in everything}
    links = [found]
    while (base := links[0].base) is not None:
        before = by_name.get(base)
        if before is None or before.problem or len(links) > len(by_name):
            raise Damaged(f"{links[0].folder} holds rows changed since {base}, which is missing or damaged")
        if before.manifest["sum"] != links[0].manifest["base"]["sum"]:
            raise Damaged(f"{before.folder} is not the commit that {links[0].folder} was made from")
        links.insert(0, before)
    return links


@contextmanager
def nonsense(found: Committed) -> Iterator[None]:
    """Damaged names the commit where reading it finds what no save writes. Not around anything that talks to other ranks."""
    try:
        yield
    except UserError:
        raise
    except (*NONSENSE, RuntimeError) as error:
        raise Damaged(f"{found.folder} holds what no job saves: {type(error).__name__}: {error}") from None
