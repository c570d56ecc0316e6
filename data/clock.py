"""What time it is: real, simulated (real time, scaled) or advanced by hand; Unix seconds everywhere."""

import os
import time
from dataclasses import dataclass
from typing import Literal, Protocol

from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field

from exfm.data.commit import Filesystem, commit_json, open_folder, read_json
from exfm.data.errors import UserError


class Clock(Protocol):
    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None:
        """Let so many seconds of this clock pass."""
        ...


class RealClock:
    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(max(seconds, 0.0))


@dataclass(frozen=True)
class SimulatedClock:
    """`start` at the real time `anchor`, and `speed` seconds for every real one since."""

    start: float
    speed: float
    anchor: float

    def now(self) -> float:
        return self.start + (time.time() - self.anchor) * self.speed

    def sleep(self, seconds: float) -> None:
        time.sleep(max(seconds, 0.0) / self.speed)


@dataclass
class ManualClock:
    """Stands still but for `advance` and `sleep`."""

    at: float

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self.at += max(seconds, 0.0)


class Simulation(BaseModel):
    """start: Unix seconds when the first process opens the clock. speed: its seconds per real second."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    start: float
    speed: float = Field(1.0, gt=0)


class SimulatedConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    simulated: Simulation


ClockConfig = Literal["real"] | SimulatedConfig


def open_clock(config: ClockConfig, folder: str) -> Clock:
    """The configured clock. All processes that share `folder` agree on the simulated time, also after a restart.

    The real time at which a simulated clock began is in <folder>/clock.json, written by whoever comes first. UserError where
    that is of another simulation.
    """
    if config == "real":
        return RealClock()
    wanted = config.simulated.model_dump()
    fs, root = open_folder(folder)
    path = f"{root}/clock.json"
    if not fs.exists(path):
        _create(fs, path, wanted | {"anchor": time.time()})
    found = read_json(fs, path)
    if {key: found.get(key) for key in wanted} != wanted or not isinstance(found.get("anchor"), float):
        raise UserError(
            f"{path} is of a clock that starts at {found.get('start')} with speed {found.get('speed')}; the config says "
            f"{wanted['start']} and {wanted['speed']}; set these, or use another folder"
        )
    return SimulatedClock(found["start"], found["speed"], found["anchor"])


def clock_of(folder: str) -> Clock:
    """The clock that the processes sharing `folder` agreed on: the simulated one that one of them opened, else the real one."""
    fs, root = open_folder(folder)
    if not fs.exists(f"{root}/clock.json"):
        return RealClock()
    found = read_json(fs, f"{root}/clock.json")
    return SimulatedClock(found["start"], found["speed"], found["anchor"])


def _create(fs: Filesystem, path: str, value: dict[str, float]) -> None:
    """Commit the file unless another process has."""
    if not isinstance(fs, LocalFileSystem):
        return commit_json(fs, path, value)
    own = f"{path}.{os.getpid()}"
    commit_json(fs, own, value)
    try:
        os.link(own, path)  # fails where the file exists, unlike a rename
    except FileExistsError:
        pass
    finally:
        os.unlink(own)
