"""Generated scripts, unedited, on a real SLURM: jobs end by themselves, whatever happens to them, as the undisturbed run did."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks._slurm import SlurmCluster, look, nodes_of, records, wait_until
from exfm.checkpoints.commits import committed
from exfm.data.errors import UserError
from exfm.launch.auditing import audit_run
from exfm.launch.cli import app
from exfm.launch.slurm import cluster as queue
from tests.trainer.jobs import Raw, assert_same_outcome, make_stream, replaced, run, student, teacher

pytestmark = pytest.mark.timeout(900)
ROWS = (640, 1280, 1280, 1280, 960)


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Three nodes. A socket's path must be short."""
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="sl-")), 3)
    yield cluster
    cluster.close()


@pytest.fixture(autouse=True)
def nothing_left(slurm: SlurmCluster) -> Iterator[None]:
    slurm.revive()
    yield
    queue.ask("scancel", "--user=root", "--full")


def exfm(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, args)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def submit(folder: Path, raw: Raw, *options: object) -> str:
    """The job's id."""
    path = folder / f"{raw['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(raw))
    fixed = ("--gpus-per-node", 0, "--cpus-per-rank", 1, "--stop-s", 30, "--assume-shared", "--submit", "--json")
    return str(json.loads(exfm("launch", "slurm", path, *fixed, *options))["jobs"][raw["run"]["name"]])


def manifests(stream: str, index: int) -> list[Path]:
    return [Path(stream, f"slice={index:06d}", kind, "manifest.json") for kind in ("features", "labels")]


def hold(stream: str, *slices: int) -> None:
    """Jobs wait for these slices."""
    for path in (p for index in slices for p in manifests(stream, index)):
        path.rename(path.with_name("held"))


def release(stream: str, *slices: int) -> None:
    for path in (p for index in slices for p in manifests(stream, index)):
        path.with_name("held").rename(path)


def steps(raw: Raw) -> list[dict[str, Any]]:
    return records(Path(raw["run"]["folder"]))


def step(raw: Raw) -> int:
    return steps(raw)[-1]["step"] if steps(raw) else 0


def ended(raw: Raw, index: int) -> bool:
    """Whether the commit after a slice is there."""
    commits = committed(Path(raw["run"]["folder"]) / "checkpoints")
    return bool(commits) and commits[-1].manifest["position"]["slice"] > index


def make(folder: Path, stream: str, name: str = "job") -> Raw:
    raw = teacher(folder, stream, checkpoint={"every_slices": 1, "every_examples": 320, "keep": 3})
    return replaced(raw, stream__on_missing="wait", run__log_every_s=0.05, run__name=name)


@pytest.mark.slow
def test_a_job_that_is_signalled_preempted_and_loses_nodes_ends_completed_with_the_undisturbed_weights(
    slurm: SlurmCluster, tmp_path: Path, rank_pool: Any
) -> None:
    stream = make_stream(tmp_path / "stream", ROWS).root
    whole = make(tmp_path / "whole", stream)
    rank_pool(2, run, whole)
    hold(stream, 1, 2, 3, 4)
    raw = make(tmp_path / "run", stream)
    job = submit(tmp_path, raw, "--nodes", 2, "--partition", "low", "--time", 20)

    wait_until(lambda: ended(raw, 0))
    queue.ask("scancel", "--signal=TERM", job)  # to the ranks
    wait_until(lambda: look(job).restarts == 1 and look(job).state == "RUNNING")
    release(stream, 1)
    wait_until(lambda: ended(raw, 1))

    slurm.restart_controller()
    high = queue.ask(
        "sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "true"
    )
    wait_until(lambda: look(high.strip()).state == "COMPLETED")
    wait_until(lambda: look(job).restarts == 2 and look(job).state == "RUNNING")
    release(stream, 2)
    done = step(raw)
    wait_until(lambda: step(raw) > done + 5, every_s=0.01)
    slurm.crash(nodes_of(job)[1])  # in the middle of a slice
    wait_until(lambda: look(job).restarts == 3 and look(job).state == "RUNNING")
    wait_until(lambda: ended(raw, 2))
    slurm.revive()

    release(stream, 3)
    checkpoints = Path(raw["run"]["folder"]) / "checkpoints"

    def saving() -> bool:
        return any(not (folder / "manifest.json").exists() for folder in checkpoints.glob("step=*"))

    wait_until(lambda: saving() or ended(raw, 3), every_s=0.0)
    slurm.crash(nodes_of(job)[0])  # in the middle of a save; with it dies the script
    wait_until(lambda: look(job).restarts == 4 and look(job).state == "RUNNING")
    release(stream, 4)
    wait_until(lambda: not look(job).live)
    assert look(job).state == "COMPLETED", (tmp_path / f"run/logs/slurm-{job}.log").read_text()
    assert_same_outcome(whole, raw)
    found = audit_run(tmp_path / "run")
    assert found["examples"] == sum(ROWS) and found["repeated"] == 0


@pytest.mark.slow
def test_of_three_nodes_one_is_lost_none_is_spare_and_the_job_goes_on_with_two(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    stream = make_stream(tmp_path / "stream", ROWS[:3]).root
    hold(stream, 2)
    raw = make(tmp_path / "run", stream)
    job = submit(tmp_path, raw, "--nodes", 3, "--min-nodes", 2)
    wait_until(lambda: step(raw) > 25, every_s=0.01)
    nodes = nodes_of(job)
    assert len(nodes) == 3
    slurm.crash(nodes[2])
    wait_until(lambda: ended(raw, 1))
    (again,) = [s for s in steps(raw) if "gap_s" in s]
    print(f"{again['gap_s']:.1f} s from the last step before the loss to the next one")
    (row,) = json.loads(exfm("status", tmp_path / "run", "--json"))["jobs"]
    assert (row["state"], row["restarts"], len(nodes_of(job))) == ("running", 1, 2) and row["id"] == job
    release(stream, 2)
    wait_until(lambda: not look(job).live)
    assert look(job).state == "COMPLETED"
    assert audit_run(tmp_path / "run")["examples"] == sum(ROWS[:3])
    assert {c.manifest["world_size"] for c in committed(tmp_path / "run/checkpoints")[-1:]} == {2}


@pytest.mark.slow
def test_a_job_whose_time_is_over_goes_on_in_another_attempt(slurm: SlurmCluster, tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "stream", ROWS[:2]).root
    hold(stream, 1)
    raw = make(tmp_path / "run", stream)
    job = submit(tmp_path, raw, "--time", 1)
    wait_until(lambda: look(job).restarts == 1)  # SIGTERM came 30 s before the limit
    release(stream, 1)
    wait_until(lambda: not look(job).live)
    assert look(job).state == "COMPLETED" and audit_run(tmp_path / "run")["examples"] == sum(ROWS[:2])


def test_a_pipeline_of_a_teacher_on_two_nodes_of_two_and_a_student_runs_and_is_followed(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    stream = make_stream(tmp_path / "stream", ROWS[:2]).root
    hold(stream, 1)
    fm = make(tmp_path / "fm", stream, "fm")
    pupil = student(tmp_path / "pupil", stream, tmp_path / "fm/supervision/fm", "auxiliary_head")
    pupil = replaced(pupil, run__name="pupil", stream__on_missing="wait", distillation__learn__wait_s=600.0)
    pupil["checkpoint"] = {"every_slices": 1}
    for raw in (fm, pupil):
        (tmp_path / f"{raw['run']['name']}.yaml").write_text(yaml.safe_dump(raw))
    jobs = [{"config": "fm.yaml", "slurm": {"nodes": 2, "nproc_per_node": 2}}, {"config": "pupil.yaml"}]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    options = ("--gpus-per-node", 0, "--cpus-per-rank", 1, "--assume-shared", "--out", tmp_path / "both")
    assert "submit with: exfm resume" in exfm("launch", "slurm", tmp_path / "both.yaml", *options)
    rows = json.loads(exfm("status", tmp_path / "both", "--json"))["jobs"]
    assert [(r["job"], r["state"]) for r in rows] == [("fm", "not submitted"), ("pupil", "not submitted")]
    assert exfm("resume", tmp_path / "both").startswith("submitted: fm as ")
    wait_until(lambda: ended(pupil, 0))
    rows = json.loads(exfm("status", tmp_path / "both", "--json"))["jobs"]
    assert [(r["job"], r["state"], r["slice"], r["slices"]) for r in rows] == [
        ("fm", "running", 0, 2),
        ("pupil", "running", 0, 2),
    ]
    assert rows[0]["examples_per_s"] > 0 and rows[0]["time_left_s"] > 80_000 and rows[0]["nodes"] == "n[1-2]"
    assert "nothing was left to submit" in exfm("resume", tmp_path / "both")
    release(stream, 1)
    wait_until(
        lambda: all(r["state"] == "done" for r in json.loads(exfm("status", tmp_path / "both", "--json"))["jobs"])
    )
    assert "fm" in exfm("status", tmp_path / "both", "--follow")
    assert "done" in exfm("logs", tmp_path / "both", "fm")
    assert audit_run(tmp_path / "pupil")["examples"] == audit_run(tmp_path / "fm")["examples"] == sum(ROWS[:2])
    assert committed(tmp_path / "fm/checkpoints")[-1].manifest["world_size"] == 4


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled_and_is_resumed_when_asked(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Though its ranks end as those of a preempted one do."""
    stream = make_stream(tmp_path / "stream", ROWS[:2]).root
    hold(stream, 1)
    raw = make(tmp_path / "run", stream)
    job = submit(tmp_path, raw)
    wait_until(lambda: ended(raw, 0))
    assert "cancelled: job" in exfm("cancel", tmp_path / "run")
    wait_until(lambda: not look(job).live)
    time.sleep(6)  # as long as a requeued job would wait
    (row,) = json.loads(exfm("status", tmp_path / "run", "--json"))["jobs"]
    assert row["state"] == "cancelled" and look(job).restarts == 0
    release(stream, 1)
    assert exfm("resume", tmp_path / "run").startswith("submitted: job as ")
    wait_until(lambda: json.loads(exfm("status", tmp_path / "run", "--json"))["jobs"][0]["state"] == "done")
    assert audit_run(tmp_path / "run")["examples"] == sum(ROWS[:2])


@pytest.mark.parametrize("name", ['it\'s "a" $(touch pwned) `touch pwned`; touch pwned & #x *', "-x --y"])
def test_shell_code_in_names_and_paths_is_text(
    name: str, slurm: SlurmCluster, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    stream = make_stream(folder / "stream", (64,)).root
    raw = make(folder / "run", stream)
    job = submit(folder, raw, "--name", name.lstrip("-"))
    wait_until(lambda: not look(job).live)
    assert look(job).state == "COMPLETED" and audit_run(folder / "run")["examples"] == 64
    assert list(work.iterdir()) == [] and not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--partition", "nope"), r"partition 'nope' does not exist; there are: high, low, main, short"),
        (("--gpus-per-node", 8), "8 GPUs per node asked for; nodes of partition 'main' have at most 4"),
        (("--nodes", 4), "4 nodes asked for; partition 'main' has 3"),
        (
            ("--partition", "short", "--time", "1:00:00"),
            "time 1:00:00 is over the limit of partition 'short', 10 minutes",
        ),
        (
            ("--cpus-per-rank", 99),
            "want 99 cores of a node; nodes of partition 'main' have at most 16: use --cpus-per-rank 16",
        ),
        (("--dependency", "afterok:x"), "dependency 'afterok:x' is none of SLURM's"),
    ],
)
def test_what_the_cluster_has_not_is_refused_before_anything_is_queued(
    options: tuple[object, ...], message: str, slurm: SlurmCluster, tmp_path: Path
) -> None:
    raw = make(tmp_path / "run", make_stream(tmp_path / "stream", (64,)).root)
    before = queue.ask("squeue", "-h")
    with pytest.raises(UserError, match=message):
        submit(tmp_path, raw, *options)
    assert queue.ask("squeue", "-h") == before and not (tmp_path / "run").exists()


def test_without_sbatch_the_script_is_written_and_the_command_shown(tmp_path: Path, monkeypatch: Any) -> None:
    raw = make(tmp_path / "run", make_stream(tmp_path / "stream", (64,)).root)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setenv("PATH", str(tmp_path))
    said = exfm("launch", "slurm", tmp_path / "job.yaml", "--gpus-per-node", 0, "--assume-shared", "--submit", code=1)
    assert "there is no sbatch on this machine" in said and (tmp_path / "run/job.sbatch").exists()


def test_a_run_folder_that_only_this_machine_sees_is_refused(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path}/shared\\040runs nfs4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n"
    )
    queue.check_shared(tmp_path / "shared runs/a", mounts)
    with pytest.raises(UserError, match=r"is on /, a file system of this machine alone \(ext4\)"):
        queue.check_shared(Path("/home/a/run"), mounts)


def test_a_script_is_valid_bash(tmp_path: Path) -> None:
    raw = make(tmp_path / "run", make_stream(tmp_path / "stream", (64,)).root)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    exfm("launch", "slurm", tmp_path / "job.yaml", "--gpus-per-node", 0, "--assume-shared", "--json")
    assert subprocess.run(["bash", "-n", tmp_path / "run/job.sbatch"]).returncode == 0
    assert os.access(tmp_path / "run/job.sbatch", os.X_OK)
