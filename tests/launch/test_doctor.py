"""The doctor recognises each known way an installation breaks, and its fixes, carried out, mend it."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exfm.launch.diagnosis import CPU_WHEEL, CUDA_WHEEL, MATCHES, Installation, diagnose
from exfm.launch.doctor import find_stale_locks, probe_import

PIP = ["/venv/bin/python", "-m", "pip"]
CPU = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", CPU_WHEEL: "1.8.0"}
CUDA = {"torch": "2.11.0+cu130", "torchrec": "1.6.1", CUDA_WHEEL: "1.6.0"}


def make(versions: dict[str, str], **seen) -> Installation:
    return Installation(python=PIP[0], python_version=(3, 11), versions=versions, **seen)


def errors(inst: Installation) -> list[str]:
    return [finding.what for finding in diagnose(inst) if finding.level == "error"]


def first_fix(inst: Installation) -> str:
    return next(finding.fix for finding in diagnose(inst) if finding.level == "error")


def carry_out(fix: str, inst: Installation) -> Installation:
    """What a fix does to an installation: an interpreter for the few commands that the doctor may print."""
    if fix.startswith("export LD_LIBRARY_PATH="):
        return reimported(replace(inst, driver_library=True))
    for command in fix.split(" && "):
        words = shlex.split(command)
        assert words[:3] == PIP, f"not a pip command: {command}"
        versions, cuda = dict(inst.versions), inst.torch_has_cuda
        names = [word for word in words[4:] if not word.startswith("-")]
        for name in names:
            package, _, version = name.partition("==")
            if words[3] == "uninstall":
                versions.pop(package)
            elif package != "torch" or versions.get("torch", "").split("+")[0] != version:
                versions[package] = version
                cuda = inst.gpu if package == "torch" else cuda
        inst = replace(inst, versions=versions, torch_has_cuda=cuda)
    return reimported(inst)


def reimported(inst: Installation) -> Installation:
    """What importing would print, for the causes that lie in what is installed."""
    wheels = [name for name in (CUDA_WHEEL, CPU_WHEEL) if name in inst.versions]
    release = {m.torch: m.fbgemm[:3] for m in MATCHES}.get(inst.versions.get("torch", "").split("+")[0])
    if "torch" not in inst.versions or "torchrec" not in inst.versions or not wheels:
        text = "ModuleNotFoundError: No module named 'torch'"
    elif CUDA_WHEEL in wheels and not inst.torch_has_cuda:
        text = "OSError: libtorch_cuda.so: cannot open shared object file"
    elif CUDA_WHEEL in wheels and not inst.driver_library:
        text = "OSError: libnvidia-ml.so.1: cannot open shared object file"
    elif any(inst.versions[name][:3] != release for name in wheels):
        text = "OSError: fbgemm_gpu_py.so: undefined symbol: _ZN3c10"
    else:
        text = ""
    return replace(inst, import_error=text)


releases = st.sampled_from(["1.5.0", "1.6.0", "1.7.0", "1.8.0", "1.9.0"])
libraries = st.fixed_dictionaries({}, optional={"torchrec": releases, CUDA_WHEEL: releases, CPU_WHEEL: releases})
torches = st.sampled_from([None, "2.10.0", "2.11.0", "2.12.0+cpu", "2.13.0+cpu", "2.13.0", "2.15.0+cu130"])


@given(torches, libraries, st.booleans(), st.booleans())
def test_doing_what_the_doctor_says_mends_every_broken_installation(torch, others, gpu, driver_library):
    """Carry out the first fix and ask again, as a user would: three rounds are enough from anywhere."""
    versions = ({"torch": torch} if torch else {}) | others
    has_cuda = torch is not None and "cpu" not in torch
    inst = reimported(make(versions, gpu=gpu, driver_library=gpu and driver_library, torch_has_cuda=has_cuda))
    for _ in range(3):
        if not errors(inst):
            break
        inst = carry_out(first_fix(inst), inst)
    assert errors(inst) == []
    assert reimported(inst).import_error == ""


@pytest.mark.parametrize(
    "inst",
    [
        make(CPU),
        make({**CPU, "torch": "2.13.0"}, torch_has_cuda=True),
        make(CUDA, torch_has_cuda=True, gpu=True, driver_library=True),
    ],
    ids=["cpu", "cuda torch used on a cpu", "gpu"],
)
def test_a_working_installation_has_nothing_to_fix(inst):
    assert [(f.level, f.fix) for f in diagnose(inst) if f.level != "ok"] == []


SWAP = "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {0} -m pip install --no-deps --force-reinstall"


@pytest.mark.parametrize(
    ("inst", "says", "fix"),
    [
        (
            make({**CPU, "torchrec": "1.9.2"}),
            "torch 2.13 goes with torchrec and fbgemm 1.8",
            "pip install --no-deps --force-reinstall torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0",
        ),
        (
            make({**CPU, "torch": "2.15.0+cpu"}),
            "1.8 is built for torch 2.13",
            "pip install torch==2.13.0 torchmetrics==1.0.3",
        ),
        (
            make({**CPU, CUDA_WHEEL: "1.9.0"}, fbgemm_variant="cuda"),
            "own the same folder fbgemm_gpu/; the files there are the cuda build",
            SWAP.format(PIP[0]) + " torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0",
        ),
        (
            make({**CUDA, "torch": "2.11.0+cpu"}),
            "no libtorch_cuda.so",
            "fbgemm-gpu-cpu==1.6.0",
        ),
        (
            make(CUDA, torch_has_cuda=True),
            "libnvidia-ml.so.1, and this machine has no NVIDIA driver",
            "fbgemm-gpu-cpu==1.6.0",
        ),
        (
            make(CUDA, torch_has_cuda=True, gpu=True),
            "the driver's folder is not searched",
            "export LD_LIBRARY_PATH=",
        ),
        (
            make({"torch": "2.11.0", "torchrec": "1.6.1", CPU_WHEEL: "1.6.0"}, torch_has_cuda=True, gpu=True),
            "cannot use this machine's GPU",
            "fbgemm-gpu==1.6.0",
        ),
        (make({"torch": "2.13.0+cpu", CPU_WHEEL: "1.8.0"}), "torchrec is not installed", "torchrec==1.8.0"),
        (replace(make(CPU), python_version=(3, 9)), "Python 3.9", "PYTHON=python3.11"),
    ],
    ids=[
        "other torchrec",
        "other torch",
        "both",
        "cpu torch",
        "no driver",
        "hidden driver",
        "vice versa",
        "none",
        "old",
    ],
)
def test_each_known_defect_is_named_with_its_fix(inst, says, fix):
    fixes = [f.fix for f in diagnose(inst) if f.level == "error" and says in f.what]
    assert len(fixes) == 1 and fix in fixes[0]


@pytest.mark.parametrize(
    ("text", "cause", "fix"),
    [
        ("OSError: libtorch_cuda.so: cannot open shared object file", "CUDA build, torch is a CPU build", CPU_WHEEL),
        ("OSError: libnvidia-ml.so.1: cannot open shared object file", "finds no NVIDIA driver", CPU_WHEEL),
        ("OSError: fbgemm_gpu_py.so: undefined symbol: _ZN3c105ErrorC2E", "built for another torch", CPU_WHEEL),
        ("RuntimeError: operator fbgemm::jagged_2d_to_dense does not exist", "operators did not load", CPU_WHEEL),
        ("AttributeError: '_OpNamespace' 'fbgemm' object has no attribute 'x'", "operators did not load", CPU_WHEEL),
        ("ModuleNotFoundError: No module named 'fbgemm_gpu'", "its files are gone", CPU_WHEEL),
        ("ModuleNotFoundError: No module named 'tensordict'", "a package that torchrec needs", "tensordict"),
        ("killed by signal 11", "libraries of different releases", "torch==2.13.0"),
        ("Traceback:\n  something else", "something else", "torch==2.13.0"),
    ],
)
def test_an_import_error_is_translated_into_its_cause(text, cause, fix):
    """Though the versions match: then only the text tells."""
    (found,) = [f for f in diagnose(make(CPU, import_error=text)) if f.level == "error"]
    assert cause in found.what and text.splitlines()[-1].strip() in found.what
    assert fix in found.fix


@pytest.mark.parametrize(("torch", "release", "rule"), [("2.14.0", "1.9.0", "follows"), ("2.15.0", "1.9.0", "breaks")])
def test_releases_newer_than_the_table_are_judged_by_the_rule_and_only_warned_about(torch, release, rule):
    inst = make({"torch": torch, "torchrec": release, CPU_WHEEL: release})
    assert errors(inst) == []
    (warning,) = [f for f in diagnose(inst) if f.level == "warn"]
    assert f"{rule} the rule" in warning.what


def test_small_shared_memory_and_a_stale_lock_are_warnings_that_say_what_to_type(tmp_path):
    lock = tmp_path / "py311 cpu" / "deepspeed_shm_comm" / "lock"
    inst = make(CPU, shm_bytes=64 * 2**20, stale_locks=(lock,))
    warnings = [f for f in diagnose(inst) if f.level == "warn"]
    assert ["0.062 GiB" in warnings[0].what, shlex.split(warnings[1].fix)] == [True, ["rm", str(lock)]]
    assert errors(inst) == []


def test_only_locks_older_than_an_hour_are_stale(tmp_path):
    now_s = 1_000_000.0
    for name, age_s in {"old": 3601, "young": 3599}.items():
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (now_s - age_s, now_s - age_s))
    assert find_stale_locks(tmp_path, now_s) == (tmp_path / "py311_cpu" / "old" / "lock",)
    assert find_stale_locks(tmp_path / "absent", now_s) == ()


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("raise OSError('libtorch_cuda.so: gone')", "OSError: libtorch_cuda.so: gone"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import sys; print('a warning', file=sys.stderr)", ""),
    ],
)
def test_the_probe_reports_how_an_import_fails(code, printed):
    assert probe_import(sys.executable, code).endswith(printed)
    assert bool(probe_import(sys.executable, code)) == bool(printed)


def fake_site(folder: Path, fbgemm_source: str) -> Path:
    """A site folder whose torch, torchrec and two fbgemm wheels hide the real ones."""
    for name, version in {**CPU, CUDA_WHEEL: "1.9.0"}.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for package, source in {"torch": "", "torchrec": "", "fbgemm_gpu": fbgemm_source}.items():
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(source)
    note = folder / "fbgemm_gpu" / "docs" / "target.default.json.py"
    note.parent.mkdir()
    note.write_text('{"variant": "cuda"}')
    return folder


def test_the_command_reports_a_broken_installation_and_fails(tmp_path):
    """As `make setup` calls it: on a machine where pip let torchrec pull the CUDA wheel over the CPU one."""
    site = fake_site(tmp_path, "raise OSError('libtorch_cuda.so: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "exfm.launch.doctor"]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    report = json.loads(done.stdout)
    whats = " ".join(f["what"] for f in report["findings"] if f["level"] == "error")
    assert (done.returncode, report["ok"]) == (1, False)
    assert (
        "are both installed" in whats and "the files there are the cuda build" in whats and "libtorch_cuda.so" in whats
    )

    shown = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    fixes = [line.removeprefix("to fix: ") for line in shown.stdout.splitlines() if line.startswith("to fix: ")]
    assert shown.returncode == 1
    # Unwrapped, so that it can be copied.
    assert any(fix.endswith("fbgemm-gpu-cpu==1.8.0") and "uninstall -y" in fix for fix in fixes)


def test_this_installation_is_found_to_work():
    done = subprocess.run([sys.executable, "-m", "exfm.launch.doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
