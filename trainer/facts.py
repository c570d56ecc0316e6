"""What every rank sees of its machine, its code and its folders in the first second of a job, put together on all ranks."""

import hashlib
import json
import os
import shutil
import socket
import statistics
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exfm.checkpoints.storage import Storage
from exfm.data.host import host_bytes_here, installed
from exfm.trainer.config import JobConfig
from exfm.trainer.env import RankEnv
from exfm.trainer.score_config import ScoreConfig

DISTRIBUTIONS = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "numpy", "pyarrow", "exfm")
PACKAGE = Path(__file__).resolve().parents[1]
LAYERS = ("data", "embeddings", "models", "distillation", "sharding", "checkpoints", "trainer", "launch")
CLOCK_ROUNDS = 4
LONG = 60  # characters of a value that are shown
MOST_KEYS = 50  # of what differs between ranks
APPEARS_S = 3.0  # within which a file that was written is seen by other hosts


@dataclass(frozen=True)
class Facts:
    """Of one rank. own: the values of what differs between ranks; clock_s: ahead of rank 0's; bytes: free ones; trouble: of folders
    that all ranks must see and write; disk_bytes, commits: where checkpoints go, None and 0 where that is no local disk.
    """

    rank: int
    host: str
    pid: int
    digest: str
    host_bytes: int
    device_bytes: int | None = None
    own: dict[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    trouble: tuple[str, ...] = ()
    disk_bytes: int | None = None
    commits: int = 0

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.host})"


def collect(config: JobConfig | ScoreConfig, env: RankEnv, device: torch.device) -> list[Facts]:
    """The facts of all ranks, on every rank; all ranks call. Needs a process group with CPU tensors."""
    own = identity(config)
    digest = _digest(json.dumps(own, sort_keys=True).encode())
    folders = folders_of(config)
    probe = Probe(folders, env)
    first = gather((host_name(), os.getpid(), digest, free_host(), free_device(device), probe.word))
    differing: list[dict[str, str]] = [{} for _ in first]
    if len({digest for _, _, digest, *_ in first}) > 1:
        differing = gather_differences(own)
    clocks = clock_offsets(env.world_size)
    trains = isinstance(config, JobConfig) and len(folders) > 1
    disk = (free_disk(folders[-1]), commits_in(folders[-1])) if trains else (None, 0)
    seen = gather((probe.look(first[0][-1]), *disk))
    probe.close()
    return [
        Facts(
            rank=rank,
            host=host,
            pid=pid,
            digest=digest,
            host_bytes=host_bytes,
            device_bytes=device_bytes,
            own=differing[rank],
            clock_s=clocks[rank],
            trouble=seen[rank][0],
            disk_bytes=seen[rank][1],
            commits=seen[rank][2],
        )
        for rank, (host, pid, digest, host_bytes, device_bytes, _) in enumerate(first)
    ]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, on every rank; all ranks call."""
    values: list[Any] = [None] * dist.get_world_size()
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


# ---- who runs what


def host_name() -> str:
    return socket.gethostname()


@cache
def versions() -> dict[str, str]:
    """Of the libraries that a job's result depends on, as their packages say."""
    return {"python": ".".join(map(str, sys.version_info[:3]))} | installed(DISTRIBUTIONS)


@cache
def sources() -> dict[str, str]:
    """A digest of every source file of exfm that is running."""
    files = sorted(p for layer in LAYERS for p in (PACKAGE / layer).rglob("*.py"))
    return {p.relative_to(PACKAGE).as_posix(): _digest(p.read_bytes()) for p in files}


def identity(config: JobConfig | ScoreConfig) -> dict[str, str]:
    """What must be the same on all ranks, flat."""
    keys = _flat(config.model_dump(mode="json"))
    return (
        {f"version of {name}": version for name, version in versions().items()}
        | {f"code in {name}": digest for name, digest in sources().items()}
        | {f"config key {key}": value for key, value in keys.items()}
    )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping) or not value:
        word = json.dumps(value)
        # of a long list the rest is in the digest
        return {prefix: word if len(word) <= LONG else f"{word[:LONG]}... (sha256 {_digest(word.encode())})"}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def gather_differences(own: Mapping[str, str]) -> list[dict[str, str]]:
    """By rank, the values of keys in which any rank differs from rank 0; all ranks call."""
    word: list[Any] = [own]
    dist.broadcast_object_list(word, src=0)
    mine = [key for key in {**word[0], **own} if word[0].get(key) != own.get(key)]
    keys = list(dict.fromkeys(key for rank in gather(mine[:MOST_KEYS]) for key in rank))[:MOST_KEYS]
    return gather({key: own.get(key, "none") for key in keys})


# ---- memory, clocks


def free_host() -> int:
    return host_bytes_here()


def free_device(device: torch.device) -> int | None:
    """Bytes of this rank's GPU that it can have, with those that torch keeps for it already."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


def wall_clock() -> float:
    return time.time()


def clock_offsets(world_size: int) -> list[float]:
    """Seconds by which the clock of every rank is ahead of rank 0's: the smallest found, because a rank that is late looks ahead or
    behind; all ranks call.
    """
    if world_size == 1:
        return [0.0]
    best = [float("inf")] * world_size
    for number in range(CLOCK_ROUNDS):  # each gives the next its common start
        clocks = [torch.zeros(1, dtype=torch.float64) for _ in range(world_size)]
        dist.all_gather(clocks, torch.tensor([wall_clock()], dtype=torch.float64))
        if number:
            best = [min(b, float(c - clocks[0]), key=abs) for b, c in zip(best, clocks, strict=True)]
    return best


def from_median(facts: Sequence[Facts]) -> list[float]:
    """How far every rank's clock is from most."""
    middle = statistics.median_low([f.clock_s for f in facts])
    return [f.clock_s - middle for f in facts]


# ---- folders


def folders_of(config: JobConfig | ScoreConfig) -> list[str]:
    """Local folders that all ranks write into, that of checkpoints last; of a scorer its run's."""
    run = config.run.folder
    if isinstance(config, ScoreConfig):
        return [run]
    storage = Storage(config.checkpoint_folder)
    if not storage.local:
        return [run]
    return [run, storage.path("")]


def existing(folder: str) -> Path:
    """The folder, or the first above it that exists."""
    path = Path(folder).absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


class Probe:
    """Rank 0 writes a file into every folder that the others must see, and every rank one of its own; none stays."""

    def __init__(self, folders: Sequence[str], env: RankEnv) -> None:
        self.env, self.name, self.written = env, f".exfm-preflight-{uuid.uuid4().hex}", list[tuple[str, str]]()
        if env.rank == 0:
            paths = dict.fromkeys(str(existing(f)) for f in folders)
            self.written = [(path, _write(Path(path, self.name))) for path in paths]

    @property
    def word(self) -> tuple[str, list[tuple[str, str]]]:
        """Of rank 0, for the others: the file's name, and by folder why it could not be written."""
        return self.name, self.written

    def look(self, word: tuple[str, list[tuple[str, str]]]) -> tuple[str, ...]:
        """What is wrong with the folders on this rank."""
        name, written = word
        trouble = []
        for path, why in written:
            if self.env.rank != 0 and not why and not _appears(Path(path, name)):
                trouble.append(f"does not see what rank 0 writes in {path}")
                continue
            if self.env.rank != 0:
                own = Path(path, f"{name}-{self.env.rank}")
                why = _write(own)
                _remove(own)
            if why:
                trouble.append(f"cannot write in {path}: {why}")
        return tuple(trouble)

    def close(self) -> None:
        """Once all ranks have looked."""
        for path, _ in self.written:
            _remove(Path(path, self.name))


def _write(path: Path) -> str:
    """Why not, or an empty string."""
    try:
        path.write_bytes(bytes(4096))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _remove(path: Path) -> None:
    with suppress(OSError):  # also of a file that could not be written
        path.unlink()


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + APPEARS_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_disk(folder: str) -> int | None:
    try:
        return shutil.disk_usage(existing(folder)).free
    except OSError:
        return None


def commits_in(folder: str) -> int:
    return sum(1 for _ in Path(folder).glob("*/manifest.json"))
