"""What a look at a machine or a job found: `exfm doctor` and the preflight of a job speak in the same words."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` is what to do, of the doctor's a command line; empty where there is nothing."""

    level: Level
    what: str
    fix: str = ""
