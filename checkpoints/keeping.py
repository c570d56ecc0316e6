"""What is kept of a folder of commits or snapshots, and removing the rest."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from exfm.checkpoints.commits import NAME, Committed, chain, listing, order
from exfm.checkpoints.holding import removing
from exfm.checkpoints.layout import MANIFEST, PINNED, Damaged
from exfm.checkpoints.storage import Storage


def clean(
    storage: Storage,
    keep: int,
    keep_every: int,
    current: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    uncommitted: bool = True,
) -> list[str]:
    """Remove what is not to be kept; the names removed.

    Kept: the newest `keep` commits, the first of every `keep_every` slices, pinned ones, those that another process reads
    (local folders only), and all that these rest on. uncommitted: also remove what was never committed, which may be a save
    that a job is writing. Any number of processes may clean at once.
    """
    everything = listing(storage)
    wanted = kept(everything, keep, keep_every, current)
    with ExitStack() as stack:
        for c in reversed(everything):  # a delta comes before what it rests on
            if c.name in wanted:
                continue
            if not stack.enter_context(removing(storage, c.name)):
                say(f"{c.folder} is being read or removed by another process: it stays, with what it rests on")
                wanted |= {c.name} | rested_on([c.name], everything)
        seen = {c.name for c in everything}
        removed = [n for n in storage.names() if NAME.fullmatch(n) and n not in wanted and (uncommitted or n in seen)]
        # whoever dies in between must leave no delta without what it rests on
        for name in sorted(removed, key=order, reverse=True):
            storage.remove(f"{name}/{MANIFEST}")
            storage.remove(name)
    return removed


def kept(everything: Sequence[Committed], keep: int, keep_every: int, current: str | None = None) -> set[str]:
    """Names of the commits that retention keeps; those that cannot be restored do not count."""
    good = [c for c in everything if is_whole(c, everything)]
    wanted = {c.name for c in good[-keep:]} | {c.name for c in everything if is_pinned(c)}
    if current is not None:
        wanted.add(current)
    if keep_every:
        firsts: dict[int, str] = {}
        for c in good:
            position = c.manifest.get("position")
            if position and position["slice"] >= keep_every:
                firsts.setdefault(position["slice"] // keep_every, c.name)
        wanted |= set(firsts.values())
    return wanted | rested_on(wanted, everything)


def rested_on(names: Iterable[str], everything: Sequence[Committed]) -> set[str]:
    """All that commits rest on, directly or not."""
    base = {c.name: c.base for c in everything}
    found: set[str] = set()
    for name in names:
        before = base.get(name)
        while before is not None and before not in found:
            found.add(before)
            before = base.get(before)
    return found


def is_whole(found: Committed, everything: Sequence[Committed]) -> bool:
    """Whether its manifest and those of all it rests on are there."""
    try:
        return bool(chain(found, everything))
    except Damaged:
        return False


def is_pinned(found: Committed) -> bool:
    return found.storage.exists(f"{found.name}/{PINNED}")
