"""Memory and packages of this machine, without a library that a broken installation could break."""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


def host_bytes_here(root: Path = Path("/")) -> int:
    """Host memory that is free, at most what this container may have."""
    lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    free, limit = int(lines["MemAvailable"].split()[0]) * 1024, root / "sys/fs/cgroup/memory.max"
    most = limit.read_text().strip() if limit.exists() else "max"
    return free if most == "max" else min(free, int(most))


def installed(names: Iterable[str]) -> dict[str, str]:
    """Distribution name -> version, of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
