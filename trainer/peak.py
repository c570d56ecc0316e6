"""The memory that this process can have, has, and had at most. On CPU: of what it allocated, without its libraries' code."""

import ctypes
from pathlib import Path

import torch

LARGE = 1 << 16  # bytes
USUAL = 1 << 25, 1 << 26  # the thresholds up to which glibc raises its own


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def reset_peak(device: torch.device) -> int:
    """Forget the peak; bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("RssAnon")


def peak_bytes(device: torch.device) -> int:
    """Since `reset_peak`. Pages of libraries, which are read as their code is first used, do not count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") - _status("RssFile")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def give_back(mmap_threshold: int = LARGE, trim_threshold: int = LARGE) -> None:
    """Have glibc return blocks from this size on as they are freed, and the heap's end where so much of it is free.

    By itself it raises both thresholds step by step, up to USUAL: that is faster, but what it then keeps hides the peak.
    """
    malloc = ctypes.CDLL(None)
    if hasattr(malloc, "mallopt"):
        malloc.mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD
        malloc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD
