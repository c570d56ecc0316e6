"""What `exfm doctor` says of the machine itself: memory, the disk of the current folder, and the network that ranks would use.

Pure functions over a `Machine`, and what looks at this one; standard library alone, as launch/doctor.py.
"""

from __future__ import annotations

import fcntl
import shutil
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from exfm.data.finding import Finding
from exfm.data.host import host_bytes_here

GIB = 2**30
LEAST_MEMORY_BYTES, LEAST_DISK_BYTES = 2 * GIB, 5 * GIB
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
IFF_UP, IFF_LOOPBACK = 0x1, 0x8
CONTAINERS = ("docker", "veth", "br-", "virbr", "cni", "podman")


@dataclass(frozen=True)
class Interface:
    """One that is up and no loopback. address: IPv4, empty where it has none."""

    name: str
    address: str


@dataclass(frozen=True)
class Machine:
    """addresses: what the host's name resolves to, none where it does not."""

    host: str
    memory_bytes: int
    disk_bytes: int
    folder: str
    interfaces: tuple[Interface, ...]
    addresses: tuple[str, ...]


# ---- looking


def look() -> Machine:
    host, folder = socket.gethostname(), Path.cwd()
    return Machine(
        host=host,
        memory_bytes=host_bytes_here(),
        disk_bytes=shutil.disk_usage(folder).free,
        folder=str(folder),
        interfaces=interfaces(),
        addresses=resolved(host),
    )


def interfaces(root: Path = Path("/sys/class/net")) -> tuple[Interface, ...]:
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            flags = int((path / "flags").read_text(), 16)
        except (OSError, ValueError):  # a file that is no interface, or one that has just gone
            continue
        if flags & IFF_UP and not flags & IFF_LOOPBACK:
            found.append(Interface(path.name, _address(path.name)))
    return tuple(found)


def _address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            answer = fcntl.ioctl(s.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def resolved(host: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None, socket.AF_INET)))
    except OSError:
        return ()


# ---- judging


def diagnose_machine(m: Machine) -> list[Finding]:
    """Nothing here keeps exfm from working on this machine alone, so nothing is an error."""
    return [_memory(m), _disk(m), *_network(m)]


def _memory(m: Machine) -> Finding:
    what = f"{m.memory_bytes / GIB:.1f} GiB of memory free"
    if m.memory_bytes >= LEAST_MEMORY_BYTES:
        return Finding("ok", what)
    return Finding("warn", f"{what}: little for several ranks, whose libraries alone take some of it")


def _disk(m: Machine) -> Finding:
    what = f"{m.disk_bytes / GIB:.1f} GiB free on the disk of {m.folder}"
    if m.disk_bytes >= LEAST_DISK_BYTES:
        return Finding("ok", what)
    return Finding(
        "warn", f"{what}; runs and checkpoints go to run.folder: choose one with {LEAST_DISK_BYTES / GIB:g} GiB or more"
    )


def _network(m: Machine) -> list[Finding]:
    """gloo listens on the address that the host's name resolves to, NCCL prefers InfiniBand to other interfaces."""
    usable = [i for i in m.interfaces if i.address and not i.name.startswith(CONTAINERS)]
    if not usable:
        return [
            Finding("warn", "no network interface but loopback is up with an address: jobs of this machine alone only")
        ]
    names = ", ".join(f"{i.name} ({i.address})" for i in usable)
    used = next((i for i in usable if i.address in m.addresses), None)
    if used is not None:
        nccl = next((i for i in usable if i.name.startswith("ib")), used)
        return [
            Finding("ok", f"host name {m.host} is interface {used.name} ({used.address}); NCCL would use {nccl.name}")
        ]
    leads = f"resolves to {', '.join(m.addresses)}" if m.addresses else "does not resolve"
    what = f"host name {m.host} {leads}, none of {names}: ranks on other hosts could not reach this one"
    best = next((i for i in usable if i.name.startswith("ib")), usable[0]).name
    return [Finding("warn", what, f"export GLOO_SOCKET_IFNAME={best} NCCL_SOCKET_IFNAME={best}")]
