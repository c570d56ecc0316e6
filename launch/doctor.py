"""`exfm doctor`: recognises a broken installation, and a machine that others could not reach, and prints the command that mends it.

Nothing here imports what a broken installation could break: versions come from the packages' metadata, and fbgemm_gpu
and torchrec are imported in another process.
"""

from __future__ import annotations

import argparse
import ctypes
import json as json_module
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from exfm.data.finding import Finding
from exfm.data.host import installed
from exfm.launch.diagnosis import CPU_WHEEL, CUDA_WHEEL, Installation, diagnose
from exfm.launch.machine import diagnose_machine, look

STALE_LOCK_S = 3600.0
IMPORT_LIMIT_S = 300.0

# '' is the current folder, which may be a checkout whose data/ or models/ would be imported by their bare names.
PROBE = """
import sys
sys.path[:] = [p for p in sys.path if p]
import torch
import fbgemm_gpu
torch.ops.fbgemm.asynchronous_complete_cumsum
import torchrec
"""


# ---- looking


def inspect_machine() -> Installation:
    """This machine as it is; takes the seconds that importing torchrec takes."""
    torch, shm = _folder_of("torch", "torch"), Path("/dev/shm")
    return Installation(
        python=sys.executable,
        python_version=sys.version_info[:2],
        versions=installed(("torch", "torchrec", CUDA_WHEEL, CPU_WHEEL)),
        torch_has_cuda=torch is not None and (torch / "lib" / "libtorch_cuda.so").exists(),
        fbgemm_variant=_fbgemm_variant(),
        gpu=Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists(),
        driver_library=_loads("libnvidia-ml.so.1"),
        import_error=probe_import(sys.executable),
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        stale_locks=find_stale_locks(Path.home() / ".cache" / "torch_extensions", time.time()),
    )


def _folder_of(distribution: str, package: str) -> Path | None:
    """Folder of an installed package, found without importing it."""
    try:
        return Path(str(metadata.distribution(distribution).locate_file(package)))
    except metadata.PackageNotFoundError:
        return None


def _fbgemm_variant() -> str:
    """'cpu' or 'cuda', as the build itself noted it beside its files."""
    folder = _folder_of(CPU_WHEEL, "fbgemm_gpu") or _folder_of(CUDA_WHEEL, "fbgemm_gpu")
    try:
        return json_module.loads((folder / "docs" / "target.default.json.py").read_text())["variant"] if folder else ""
    except (OSError, ValueError, KeyError):
        return ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def probe_import(python: str, code: str = PROBE) -> str:
    """The end of what a failing import prints, empty if it works."""
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=IMPORT_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"the import did not end in {IMPORT_LIMIT_S:.0f} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    return (done.stderr.strip()[-4000:] or f"exit status {done.returncode}") if done.returncode else ""


def find_stale_locks(root: Path, now_s: float) -> tuple[Path, ...]:
    """Locks under torch's folder of compiled extensions that no living build is likely to hold."""
    if not root.is_dir():
        return ()
    return tuple(sorted(p for p in root.rglob("lock") if p.is_file() and now_s - p.stat().st_mtime > STALE_LOCK_S))


# ---- telling


def run(json: bool = False) -> int:
    """Print what is wrong with this machine's installation and the fixes; 1 if it cannot work, else 0."""
    findings = [*diagnose(inspect_machine()), *diagnose_machine(look())]
    broken = any(finding.level == "error" for finding in findings)
    if json:
        print(json_module.dumps({"ok": not broken, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print_findings(findings)
    return int(broken)


def _print_findings(findings: list[Finding]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # rich is missing in the very installations that need the doctor most
        for finding in findings:
            print(f"{finding.level:5}  {finding.what}")
    else:
        table = Table("", "", show_header=False, box=None)
        table.columns[1].overflow = "fold"  # a path that is cut off helps nobody
        for finding in findings:
            style = {"ok": "green", "warn": "yellow", "error": "red"}[finding.level]
            table.add_row(f"[{style}]{finding.level}", finding.what.replace("[", r"\["))
        Console().print(table)
    # Outside the table and unwrapped, to be copied into a shell; one command often mends several findings.
    for fix in dict.fromkeys(f.fix for f in findings if f.fix):
        print(f"\nto fix: {fix}" if not fix.startswith("export") else f"\nto fix, in this shell: {fix}")


def main() -> None:
    parser = argparse.ArgumentParser(description="what is wrong with this machine's installation, and the fix")
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    sys.exit(run(json=parser.parse_args().json))


if __name__ == "__main__":
    main()
