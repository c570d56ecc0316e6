"""One job per folder where there are no locks: an object that its holder changes again and again while it lives.

    lock.json  {"owner": ..., "id": one random id per holder, "beat": 0, 1, 2, ...}

Clocks of different machines are never compared. A newcomer watches the object by its own monotonic clock: whoever has
not changed it for `lease_s` is dead.
"""

import contextlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from exfm.checkpoints.disk import held_by
from exfm.data.errors import UserError

LEASE = "lock.json"
BEATS_PER_LEASE = 6


class Files(Protocol):
    """What a lease needs of a Storage."""

    url: str

    def read(self, path: str) -> bytes: ...
    def commit(self, path: str, payload: bytes) -> None: ...
    def remove(self, path: str) -> None: ...


class Held:
    """A lock that is held. `lost` turns true, and on_lost is called once, when another job has taken it."""

    def __init__(self, on_lost: Callable[[], None] | None = None) -> None:
        self.lost = False
        self._on_lost = on_lost

    def lose(self) -> None:
        self.lost = True
        if self._on_lost:
            self._on_lost()


@contextlib.contextmanager
def leased(files: Files, owner: str, lease_s: float, held: Held) -> Iterator[Held]:
    """Hold the folder's lease; UserError names the job that holds it. Waits for a beat, or lease_s where one is found."""
    beat_s = lease_s / BEATS_PER_LEASE
    found = _watch(files, lease_s, beat_s)
    mine = {"owner": owner, "id": uuid.uuid4().hex, "beat": 0}
    if _read(files) != found:  # another newcomer was quicker
        raise UserError(held_by(_owner(_read(files)), files.url))
    _put(files, mine)
    time.sleep(beat_s)
    if not _is(_read(files), mine):
        raise UserError(held_by(_owner(_read(files)), files.url))
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(files, mine, beat_s, held, done), name="lease", daemon=True)
    beating.start()
    try:
        yield held
    finally:
        done.set()
        beating.join()
        with contextlib.suppress(OSError):  # what is left is dead for the next one after lease_s
            if not held.lost and _is(_read(files), mine):
                files.remove(LEASE)


def _watch(files: Files, lease_s: float, poll_s: float) -> bytes | None:
    """None, or the lease of a dead holder. UserError where it beats."""
    first = _read(files)
    if first is None:
        return None
    print(
        f"exfm: {files.url} was locked by {_owner(first)}; seeing for {lease_s:g} s whether it lives",
        file=sys.stderr,
        flush=True,
    )
    end = time.monotonic() + lease_s
    while time.monotonic() < end:
        time.sleep(min(poll_s / 2, max(0.0, end - time.monotonic())))
        now = _read(files)
        if now is None:
            return None
        if now != first:
            raise UserError(held_by(_owner(now), files.url))
    return first


def _beat(files: Files, mine: dict[str, Any], beat_s: float, held: Held, done: threading.Event) -> None:
    """Renew until done. A failing server is no loss: what counts is whose lease is there when it answers again."""
    while not done.wait(beat_s):
        with contextlib.suppress(OSError):
            if not _is(_read(files), mine):
                held.lose()
                return
            mine["beat"] += 1
            _put(files, mine)


def _read(files: Files) -> bytes | None:
    try:
        return files.read(LEASE)
    except FileNotFoundError:
        return None


def _put(files: Files, lease: dict[str, Any]) -> None:
    files.commit(LEASE, json.dumps(lease).encode())


def _parsed(payload: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        lease = json.loads(payload or b"{}")
        if isinstance(lease, dict):
            return lease
    return {}


def _owner(payload: bytes | None) -> str:
    return str(_parsed(payload).get("owner", "unknown"))[:1000]


def _is(payload: bytes | None, mine: dict[str, Any]) -> bool:
    return _parsed(payload).get("id") == mine["id"]
