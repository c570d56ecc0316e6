"""Timing what is compared in turns, in one process: whatever else the machine does meets all of it alike."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]


def clock_of(device: torch.device) -> tuple[Callable[[], float], str]:
    """Seconds on a device, and their name. Of a CPU the process's CPU seconds: on one thread, and where nothing waits, they are those
    of an idle machine; on a GPU the wall's, after everything asked for is done.
    """
    if device.type == "cpu":
        return time.process_time, "CPU seconds"

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now, "seconds"


def in_turns(works: Sequence[Work], turns: int, device: torch.device, repeats: int = 1) -> list[list[float]]:
    """Seconds of each work in each turn, `repeats` calls at a time; one turn before is not counted."""
    now, _ = clock_of(device)
    times: list[list[float]] = [[] for _ in works]
    for turn in range(turns + 1):
        for own, work in zip(times, works, strict=True):
            begun = now()
            for _ in range(repeats):
                work()
            if turn:
                own.append((now() - begun) / repeats)
    return times


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median over turns of one by the other, with the quartiles: what is kept as the ratio's spread."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    n = len(ratios)
    return {"ratio": statistics.median(ratios), "low": ratios[n // 4], "high": ratios[(3 * n) // 4], "turns": n}


def machine() -> dict[str, Any]:
    """What numbers depend on: device, cores, who else is there."""
    cuda = torch.cuda.is_available()
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'a CPU'}"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 1),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
