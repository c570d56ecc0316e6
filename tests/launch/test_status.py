"""`exfm status` of a run without SLURM, and what a pipeline file makes of scripts."""

import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from exfm.data.errors import UserError
from exfm.launch.cli import app
from exfm.launch.hosts import commands
from exfm.launch.local import LocalJob
from exfm.launch.pipeline import scripts_of
from exfm.launch.slurm.job import Member, SlurmJob
from exfm.launch.status import status
from exfm.trainer.env import RankEnv
from exfm.trainer.run import run_lock
from tests.trainer.jobs import make_stream, parsed, replaced, run, student, teacher


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("status") / "stream").root


def test_a_run_without_slurm_says_how_it_is_and_how_far(stream, tmp_path):
    raw = teacher(tmp_path / "run", stream)
    run(raw)
    (row,) = status(tmp_path / "run")
    assert (row["state"], row["slice"], row["slices"], row["share"]) == ("not running", 3, 4, 1.0)
    assert row["step"] == 20 and row["examples_per_s"] > 0 and 0 < row["ne"] < 2
    with run_lock(parsed(raw).run, RankEnv()):
        assert status(tmp_path / "run")[0]["state"] == "running"
    shown = CliRunner().invoke(app, ["status", str(tmp_path / "run")]).output
    assert "not running" in shown and "4/4" in shown
    with pytest.raises(UserError, match="neither the folder of a launch nor of a run"):
        status(tmp_path)


def pipeline(folder: Path, stream: str, *jobs: dict) -> list:
    """Scripts of a teacher and two students, `jobs` over them."""
    log = folder / "fm/supervision/fm"
    raws = [
        teacher(folder / "fm", stream),
        *(replaced(student(folder / n, stream, log, "single_head"), run__name=n) for n in "ab"),
    ]
    for name, raw in zip(("fm", "a", "b"), raws, strict=True):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    own = [{"config": f"{n}.yaml"} | more for n, more in zip(("fm", "a", "b"), jobs or ({},) * 3, strict=True)]
    path = folder / "all.yaml"
    path.write_text(yaml.safe_dump({"jobs": own}))
    return scripts_of(path, SlurmJob(members=(Member(path, folder),), name="all", nodes=4, gpus_per_node=8))


def test_students_that_ask_for_the_same_are_one_array_and_others_are_not(stream, tmp_path):
    fm, students = pipeline(tmp_path, stream)
    assert fm.names == ("teacher",) and fm.job.nodes == 4 and fm.job.name == "all-teacher"
    assert students.names == ("a", "b") and [m.run_folder.name for m in students.job.members] == ["a", "b"]
    fm, a, b = pipeline(tmp_path, stream, {"slurm": {"nodes": 2, "min_nodes": 1}}, {}, {"slurm": {"gpus_per_node": 2}})
    assert (fm.job.nodes, fm.job.least_nodes) == (2, 1) and a.job.gpus_per_node == 8
    assert (b.job.gpus_per_node, b.job.nproc_per_node) == (2, 2)


def test_a_job_comes_behind_those_that_it_waits_for(stream, tmp_path):
    scripts = pipeline(tmp_path, stream, {"after": ["a"]}, {}, {})
    assert [s.names for s in scripts] == [("a", "b"), ("teacher",)]
    with pytest.raises(UserError, match=r"teacher, a wait for each other"):
        pipeline(tmp_path, stream, {"after": ["a"]}, {"after": ["teacher"]}, {})
    with pytest.raises(UserError, match=r"teacher comes after nobody; there are: teacher, a, b"):
        pipeline(tmp_path, stream, {"after": ["nobody"]}, {}, {})


def test_every_host_gets_a_command_that_differs_in_nothing_and_is_read_back_by_a_shell(stream, tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / "job.yaml").write_text(yaml.safe_dump(teacher(tmp_path / "run", stream)))
    job = LocalJob(folder / "job.yaml", 4, ("run.name=a b",))
    (a, first), (b, second) = commands(job, ["a", "b"], "/usr/bin/python3", 29400)
    assert (a, b) == ("a", "b") and first == second
    echoed = subprocess.run(
        ["bash", "-c", first.replace("/usr/bin/python3", "printf '%s\\n'")], capture_output=True, text=True
    )
    words = echoed.stdout.splitlines()
    assert words[:6] == ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "4"]
    assert words[6:10] == ["--rdzv-backend", "c10d", "--rdzv-endpoint", "a:29400"]
    assert words[-3:] == [str(folder / "job.yaml"), "--set", "run.name=a b"]


@pytest.mark.parametrize(
    ("hosts", "port", "message"),
    [(["a", "a"], 29400, "names a more than once"), ([""], 29400, "give host names"), (["a"], 80, "--port is 80")],
)
def test_hosts_that_cannot_be_are_refused(hosts, port, message, stream, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(teacher(tmp_path / "run", stream)))
    with pytest.raises(UserError, match=message):
        commands(LocalJob(tmp_path / "job.yaml", 1), hosts, "python3", port)
