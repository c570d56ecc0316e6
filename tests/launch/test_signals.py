"""Stopping real jobs: nothing is lost, nothing is left behind, and two jobs never write to one folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from exfm.checkpoints.commits import committed
from exfm.data.synth import synth
from exfm.launch import cli
from exfm.launch.auditing import audit_run
from tests.warm import forked

CONFIGS = Path(cli.__file__).resolve().parents[1] / "configs"
SLICES, ROWS = 3, 6_000


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signals") / "stream"
    synth(str(out), num_slices=SLICES, rows_per_slice=ROWS, seed=1)
    return out


def start(
    folder: Path, name: str, stream: Path, options: tuple[str, ...] = (), **changes: Any
) -> subprocess.Popen[str]:
    """`exfm train` in a process group of its own, as a shell starts it."""
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    raw["run"] |= {"folder": str(folder / "run"), "device": "cpu", "log_every_s": 0.1, "nan_check_steps": 2}
    raw["stream"] |= {"path": str(stream), "global_batch": 64}
    raw["checkpoint"] = {"every_slices": 100}
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "exfm.launch.cli", "train", str(config), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(condition: Any, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def trainers(folder: Path) -> list[int]:
    """Processes that still run a job of this folder, forked or not."""
    found = [f["pid"] for f in forked(folder)]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in text and "exfm.trainer" in text:
            found.append(int(entry.parent.name))
    return found


def test_a_stopped_job_commits_ends_with_75_leaves_no_process_and_finishes_when_started_again(
    warm: None, stream: Path, tmp_path: Path
) -> None:
    metrics, done = tmp_path / "run" / "metrics.jsonl", 0
    for number in (signal.SIGTERM, signal.SIGINT):
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        process = start(tmp_path, "synth_teacher", stream)
        wait_until(lambda lines=lines: metrics.exists() and metrics.read_text().count("\n") > lines + 1)
        os.killpg(process.pid, number)
        assert process.wait(60) == 75, process.stderr.read() if process.stderr else ""
        assert not trainers(tmp_path)
        position = committed(tmp_path / "run" / "checkpoints")[-1].manifest["position"]
        assert done < position["slice"] * ROWS + position["consumed"] < SLICES * ROWS
        done = position["slice"] * ROWS + position["consumed"]
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["exit_code"] == 75
    again = start(tmp_path, "synth_teacher", stream)
    assert again.wait(120) == 0, again.stderr.read() if again.stderr else ""
    result = audit_run(tmp_path / "run")
    assert result["examples"] == SLICES * ROWS


def test_a_student_that_waits_for_supervision_stops_at_once_and_a_second_job_is_kept_out(
    warm: None, stream: Path, tmp_path: Path
) -> None:
    learn = {"learn": {"supervision": str(tmp_path / "nobody" / "supervision" / "teacher"), "wait_s": 600}}
    process = start(tmp_path, "synth_student", stream, distillation=learn)
    wait_until(lambda: (tmp_path / "run" / "plan.json").exists())
    second = start(tmp_path, "synth_student", stream, distillation=learn)
    assert second.wait(60) == 2
    assert second.stderr is not None and "another job is running in" in second.stderr.read()
    time.sleep(1)
    assert process.poll() is None, "the word of the one that was kept out is not taken for this one's"
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert time.monotonic() - begun < 20
    assert not trainers(tmp_path)
