"""What is wrong with an installation, judged from what was seen of it, and the commands that mend it.

Pure functions over an `Installation`: `exfm.launch.doctor` looks at this machine, tests make installations up.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from exfm.data.finding import Finding


@dataclass(frozen=True)
class Installation:
    """What a machine has.

    versions: distribution name -> version, of torch, torchrec and the fbgemm wheels that are installed.
    torch_has_cuda: torch's folder holds libtorch_cuda.so.
    fbgemm_variant: what the files in fbgemm_gpu/ say they are ("cpu", "cuda"), empty if they do not say.
    gpu: the kernel offers an NVIDIA device. driver_library: libnvidia-ml.so.1 can be loaded.
    import_error: the end of what importing fbgemm_gpu and torchrec printed, empty if it worked.
    shm_bytes: size of /dev/shm, None where there is none.
    """

    python: str
    python_version: tuple[int, int]
    versions: Mapping[str, str]
    torch_has_cuda: bool = False
    fbgemm_variant: str = ""
    gpu: bool = False
    driver_library: bool = False
    import_error: str = ""
    shm_bytes: int | None = None
    stale_locks: tuple[Path, ...] = ()


class Match(NamedTuple):
    """Releases built for each other."""

    torch: str
    torchrec: str
    fbgemm: str


# exfm is tested with the first and the last. The rule behind them: torch 2.n goes with torchrec and fbgemm 1.(n - 5).
MATCHES = (Match("2.11.0", "1.6.1", "1.6.0"), Match("2.12.0", "1.7.0", "1.7.0"), Match("2.13.0", "1.8.0", "1.8.0"))
BEST = MATCHES[-1]
CUDA_WHEEL, CPU_WHEEL = "fbgemm-gpu", "fbgemm-gpu-cpu"
MIN_PYTHON = (3, 11)
MIN_SHM_BYTES = 2**30


def diagnose(inst: Installation) -> list[Finding]:
    """Everything there is to say about an installation; it works if no finding is an error."""
    checks = (_check_python, _check_present, _check_match, _check_flavour, _check_import, _check_shm, _check_locks)
    return [finding for check in checks for finding in check(inst)]


# ---- the fixes


def _minor(version: str) -> str:
    """'2.13.0+cpu' -> '2.13'."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _match_of(torch_version: str) -> Match | None:
    return next((m for m in MATCHES if _minor(m.torch) == _minor(torch_version)), None)


def _wheels(inst: Installation) -> list[str]:
    return [name for name in (CUDA_WHEEL, CPU_WHEEL) if name in inst.versions]


def _pip(inst: Installation, *arguments: str) -> str:
    return shlex.join([inst.python, "-m", "pip", *arguments])


def _libraries_fix(inst: Installation, wheel: str = "", match: Match | None = None) -> str:
    """Put the torchrec and the one fbgemm wheel in place that go with this torch, or with `match`."""
    wheel = wheel or (CUDA_WHEEL if inst.gpu and inst.torch_has_cuda else CPU_WHEEL)
    match = match or _match_of(inst.versions.get("torch", "")) or BEST
    pins = (f"torchrec=={match.torchrec}", f"{wheel}=={match.fbgemm}")
    install = _pip(inst, "install", "--no-deps", "--force-reinstall", *pins)
    # Uninstalling either wheel removes the shared folder, so all go before one comes.
    unwanted = _wheels(inst) if set(_wheels(inst)) - {wheel} else []
    return f"{_pip(inst, 'uninstall', '-y', *unwanted)} && {install}" if unwanted else install


def _everything_fix(inst: Installation) -> str:
    """Put the newest tested torch in place, and what goes with it."""
    needs = ("torchmetrics==1.0.3", "tensordict", "tqdm", "pyre-extensions")
    wheel = CUDA_WHEEL if inst.gpu else CPU_WHEEL
    return f"{_pip(inst, 'install', f'torch=={BEST.torch}', *needs)} && {_libraries_fix(inst, wheel, BEST)}"


def _cuda_torch_fix(inst: Installation) -> str:
    match = _match_of(inst.versions.get("torch", "")) or BEST
    torch = f"{_pip(inst, 'uninstall', '-y', 'torch')} && {_pip(inst, 'install', f'torch=={match.torch}')}"
    return torch if _wheels(inst) == [CUDA_WHEEL] else f"{torch} && {_libraries_fix(inst, CUDA_WHEEL, match)}"


def _driver_path_fix(inst: Installation) -> str:
    return (
        'export LD_LIBRARY_PATH="$(dirname "$(find / -name libnvidia-ml.so.1 -print -quit 2>/dev/null)")'
        '${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"'
    )


def _driver_fix(inst: Installation) -> str:
    return _driver_path_fix(inst) if inst.gpu else _libraries_fix(inst, CPU_WHEEL)


# ---- the checks


def _check_python(inst: Installation) -> list[Finding]:
    version = ".".join(map(str, inst.python_version))
    if inst.python_version >= MIN_PYTHON:
        return [Finding("ok", f"Python {version}")]
    least = ".".join(map(str, MIN_PYTHON))
    what = f"Python {version} at {inst.python} is too old: exfm needs {least} or newer"
    return [Finding("error", what, f"rm -rf .venv && make setup PYTHON=python{least}")]


def _check_present(inst: Installation) -> list[Finding]:
    """torch, torchrec and an fbgemm wheel are there at all."""
    if "torch" not in inst.versions:
        return [Finding("error", "torch is not installed", _everything_fix(inst))]
    missing = [] if "torchrec" in inst.versions else ["torchrec"]
    missing += [] if _wheels(inst) else [f"{CPU_WHEEL} (or {CUDA_WHEEL} with a GPU)"]
    return [Finding("error", f"{name} is not installed", _libraries_fix(inst)) for name in missing]


def _check_match(inst: Installation) -> list[Finding]:
    """torch, torchrec and fbgemm are releases built for each other."""
    libraries = {name: inst.versions[name] for name in ("torchrec", *_wheels(inst)) if name in inst.versions}
    if "torch" not in inst.versions or not libraries:
        return []
    torch, match = inst.versions["torch"], _match_of(inst.versions["torch"])
    minors = {_minor(version) for version in libraries.values()}
    triple = " with ".join([f"torch {torch}", " and ".join(f"{name} {v}" for name, v in libraries.items())])
    if match:
        if minors == {_minor(match.fbgemm)}:
            return [Finding("ok", triple)]
        what = f"{triple}: torch {_minor(torch)} goes with torchrec and fbgemm {_minor(match.fbgemm)}"
        return [Finding("error", what, _libraries_fix(inst))]
    known = minors & {_minor(m.fbgemm) for m in MATCHES}
    if known or len(minors) > 1:
        built_for = next((m.torch for m in MATCHES if _minor(m.fbgemm) in known), "another torch")
        why = f"{min(known)} is built for torch {_minor(built_for)}" if known else "these are not of one release"
        what = f"{triple}: {why}"
        return [Finding("error", what, _everything_fix(inst))]
    follows = _follows_rule(torch, minors.pop())
    rule = "follows" if follows else "breaks"
    what = f"{triple}: unknown to exfm, {rule} the rule torch 2.n with 1.(n - 5); tested: torch {BEST.torch}"
    return [Finding("warn", what, _everything_fix(inst))]


def _follows_rule(torch_version: str, library_minor: str) -> bool:
    torch = re.fullmatch(r"2\.(\d+)", _minor(torch_version))
    library = re.fullmatch(r"1\.(\d+)", library_minor)
    return bool(torch and library and int(torch[1]) - int(library[1]) == 5)


def _check_flavour(inst: Installation) -> list[Finding]:
    """CPU and CUDA builds of torch and fbgemm go together, and with what the machine has."""
    if "torch" not in inst.versions or not (wheels := _wheels(inst)):
        return []
    if len(wheels) > 1:
        on_disk = f"; the files there are the {inst.fbgemm_variant} build" if inst.fbgemm_variant else ""
        what = f"{' and '.join(wheels)} are both installed and own the same folder fbgemm_gpu/{on_disk}"
        return [Finding("error", what, _libraries_fix(inst))]
    if wheels == [CUDA_WHEEL]:
        return _check_cuda_wheel(inst)
    if inst.gpu and inst.torch_has_cuda:
        what = f"{CPU_WHEEL} cannot use this machine's GPU, though torch can"
        return [Finding("error", what, _libraries_fix(inst, CUDA_WHEEL))]
    if inst.gpu:
        what = "an NVIDIA GPU is here, and this is a CPU installation: it works, without the GPU"
        return [Finding("warn", what, _cuda_torch_fix(inst))]
    return [Finding("ok", "CPU builds, no GPU" + (" (torch's CUDA part is unused)" if inst.torch_has_cuda else ""))]


def _check_cuda_wheel(inst: Installation) -> list[Finding]:
    findings = []
    if not inst.torch_has_cuda:
        what = f"{CUDA_WHEEL} is the CUDA build and torch {inst.versions['torch']} a CPU build: no libtorch_cuda.so"
        fix = _cuda_torch_fix(inst) if inst.gpu else _libraries_fix(inst, CPU_WHEEL)
        findings.append(Finding("error", what, fix))
    if not inst.driver_library:
        why = "the driver's folder is not searched" if inst.gpu else "this machine has no NVIDIA driver"
        what = f"{CUDA_WHEEL} needs libnvidia-ml.so.1, and {why}"
        findings.append(Finding("error", what, _driver_fix(inst)))
    return findings or [Finding("ok", "CUDA builds, NVIDIA driver found")]


class ImportCause(NamedTuple):
    """An import error's text, what it comes from and what mends it."""

    pattern: str
    cause: str
    fix: Callable[[Installation], str]


IMPORT_CAUSES = (
    ImportCause(
        r"libtorch_cuda\.so",
        "fbgemm's files are the CUDA build, torch is a CPU build",
        lambda inst: _cuda_torch_fix(inst) if inst.gpu else _libraries_fix(inst, CPU_WHEEL),
    ),
    ImportCause(
        r"libnvidia-ml\.so|libcuda\.so",
        "the CUDA build of fbgemm finds no NVIDIA driver",
        lambda inst: _driver_fix(inst),
    ),
    ImportCause(r"undefined symbol", "fbgemm was built for another torch", _libraries_fix),
    ImportCause(
        r"operator \S+ does not exist|'_OpNamespace' 'fbgemm' object has no attribute",
        "fbgemm's operators did not load: its files are of another release or incomplete",
        _libraries_fix,
    ),
    ImportCause(
        r"No module named '?(fbgemm_gpu|torchrec)\b",
        "its files are gone (uninstalling one fbgemm wheel takes the other's files along)",
        _libraries_fix,
    ),
    ImportCause(r"No module named '?torch\b", "torch is missing", _everything_fix),
    ImportCause(r"No module named", "a package that torchrec needs is missing", _everything_fix),
    ImportCause(r"killed by signal", "libraries of different releases, or for another processor", _everything_fix),
)


def _check_import(inst: Installation) -> list[Finding]:
    """fbgemm_gpu and torchrec can be imported; if not, say why."""
    if not inst.import_error:
        return [Finding("ok", "fbgemm_gpu and torchrec import")]
    last_line = inst.import_error.strip().splitlines()[-1].strip()
    for cause in IMPORT_CAUSES:
        if re.search(cause.pattern, inst.import_error):
            what = f"importing fbgemm_gpu or torchrec fails, {cause.cause}: {last_line}"
            return [Finding("error", what, cause.fix(inst))]
    return [Finding("error", f"importing fbgemm_gpu or torchrec fails: {last_line}", _everything_fix(inst))]


def _check_shm(inst: Installation) -> list[Finding]:
    if inst.shm_bytes is None:
        return []
    size = f"/dev/shm has {inst.shm_bytes / 2**30:.2g} GiB"
    if inst.shm_bytes >= MIN_SHM_BYTES:
        return [Finding("ok", size)]
    what = f"{size}; NCCL and loader processes want 1 GiB or more (for a container: docker run --shm-size=8g)"
    return [Finding("warn", what, "sudo mount -o remount,size=8G /dev/shm")]


def _check_locks(inst: Installation) -> list[Finding]:
    """A build that was killed leaves a lock for which every later run waits, silently and for ever."""
    return [
        Finding(
            "warn", f"stale lock {lock} of a DeepSpeed build: runs that need it hang", f"rm {shlex.quote(str(lock))}"
        )
        for lock in inst.stale_locks
    ]
