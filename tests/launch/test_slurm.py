"""The sbatch script is run by bash; srun, scontrol and python are stubs that record their arguments. On a real SLURM: test_cluster.py."""

import os
import subprocess
from pathlib import Path

import pytest

from exfm.data.errors import UserError
from exfm.launch.slurm.cluster import submit
from exfm.launch.slurm.job import Member, SlurmJob, seconds_of
from exfm.launch.slurm.script import write_sbatch, write_script

HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` ; touch pwned & #x *'
RECORD = 'printf "%s\\0" "$(basename "$0")" "$@" >> "$RECORDS"; printf "\\n\\0" >> "$RECORDS"\n'
STUBS = {
    # srun runs what follows its own options, once: a cluster of one node.
    "srun": RECORD + 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"; exit $?\n',
    "scontrol": RECORD
    + 'case "$1 $2" in "show hostnames") echo node-a; echo node-b ;; "show job") echo "JobState=$JOB_STATE" ;; requeue*) kill -KILL $PPID ;; esac\n',
    "python": RECORD
    + 'echo "$OMP_NUM_THREADS $TORCH_ELASTIC_SHUTDOWN_TIMEOUT ${NCCL_DEBUG-unset}" > "$RECORDS.env"\n'
    + 'if [ -n "$EXIT_JSON" ]; then printf "%s" "$EXIT_JSON" > "$RUN/exit.json"; fi; exit "$TORCHRUN_CODE"\n',
    "sleep": "exit 0\n",
    "sbatch": RECORD + 'if [ -n "$REFUSAL" ]; then echo "$REFUSAL" >&2; exit 1; fi; echo "4711;cluster"\n',
}


class Cluster:
    """Stub executables on PATH and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.records = folder, folder / "bin", folder / "records"
        self.bin.mkdir(parents=True)
        for name, body in STUBS.items():
            (self.bin / name).write_text(f"#!/bin/bash\n{body}")
            (self.bin / name).chmod(0o755)

    def environment(self, run_folder: Path, **extra: str) -> dict[str, str]:
        job = {
            "SLURM_JOB_ID": "123456",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_CPUS_PER_TASK": "8",
        }
        stubs = {
            "RECORDS": str(self.records),
            "RUN": str(run_folder),
            "EXIT_JSON": "",
            "TORCHRUN_CODE": "0",
            "JOB_STATE": "RUNNING",
            "REFUSAL": "",
        }
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", **job, **stubs, **extra}

    def run(self, script: Path, run_folder: Path, **extra: str) -> int:
        work = self.folder / "submitted from here"
        work.mkdir(exist_ok=True)
        done = subprocess.run(["bash", str(script)], cwd=work, env=self.environment(run_folder, **extra))
        assert list(work.iterdir()) == []  # nothing was created by a name that was taken for a command
        return done.returncode

    def calls(self, name: str) -> list[list[str]]:
        records = self.records.read_text().split("\n\0") if self.records.exists() else []
        return [call.split("\0")[1:-1] for call in records if call.split("\0")[0] == name]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


def make_job(folder: Path, **options) -> SlurmJob:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "job.yaml"
    config.touch()
    sets = options.pop("sets", ())
    member = Member(options.pop("config", config), options.pop("run_folder", folder / "run"), sets)
    return SlurmJob(**{"members": (member,), "nodes": 2, "python": "python", **options})


@pytest.mark.parametrize("name", ["plain", HOSTILE], ids=["plain", "hostile"])
def test_each_node_gets_exactly_one_torchrun_with_exactly_these_arguments(cluster, tmp_path, name):
    """Also when every name and path holds shell code: it arrives as text and is not run."""
    texts = {"name": name, "partition": name, "account": name, "qos": name, "container": name, "mounts": name}
    job = make_job(tmp_path / name, nproc_per_node=4, cpus_per_rank=2, sets=(f"run.name={name}",), **texts)
    script = write_script(job, tmp_path / name / "job.sbatch")
    (member,) = job.members
    assert cluster.run(script, member.run_folder) == 0

    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "4", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "node-a:23456", "--rdzv-id", "123456.0.0"]
    torchrun += ["--max-restarts", "0", "-m", "exfm.trainer", str(member.config), "--set", f"run.name={name}"]
    srun = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--kill-on-bad-exit=0", "--wait=300"]
    srun += [f"--container-image={name}", f"--container-mounts={name}", "--open-mode=append"]
    srun += [f"--output={member.run_folder}/logs/slurm-123456-node%n.log", "python"]
    assert cluster.calls("python") == [torchrun]
    assert cluster.calls("srun") == [srun + torchrun]
    assert cluster.calls("scontrol") == [["show", "hostnames", "node-[a-b]"]]


def test_a_task_of_an_array_runs_its_own_job(cluster, tmp_path):
    first, second = (make_job(tmp_path / n).members[0] for n in ("a b", "c"))
    job = SlurmJob(members=(first, second), python="python")
    assert "#SBATCH --array=0-1" in write_sbatch(job)
    script = write_script(job, tmp_path / "job.sbatch")
    assert cluster.run(script, second.run_folder, SLURM_ARRAY_TASK_ID="1") == 0
    (call,) = cluster.calls("python")
    assert call[-1] == str(second.config)


def test_a_file_of_variables_is_read_before_the_ranks_start(cluster, tmp_path):
    (tmp_path / "my vars").write_text("OMP_NUM_THREADS=77\nTORCH_ELASTIC_SHUTDOWN_TIMEOUT=1\nNCCL_DEBUG=INFO\n")
    job = make_job(tmp_path / "a", env_file=tmp_path / "my vars")
    cluster.run(write_script(job, tmp_path / "job.sbatch"), job.members[0].run_folder)
    assert (cluster.folder / "records.env").read_text().split() == ["4", "300", "INFO"]


@pytest.mark.parametrize(("gpus", "nccl_debug"), [(0, "unset"), (4, "WARN")])
def test_ranks_share_the_cores_of_their_node_and_nccl_is_set_only_with_gpus(cluster, tmp_path, gpus, nccl_debug):
    job = make_job(tmp_path / "a", gpus_per_node=gpus, nproc_per_node=4, cpus_per_rank=2, stop_s=120)
    cluster.run(write_script(job, tmp_path / "job.sbatch"), job.members[0].run_folder)
    assert (cluster.folder / "records.env").read_text().split() == ["2", "120", nccl_debug]


@pytest.mark.parametrize(
    ("torchrun_code", "exit_json", "restarts", "state", "exit_code", "requeued", "tries"),
    [
        (0, '{"exit_code": 0}', 0, "RUNNING", 0, False, 1),
        (1, '{"exit_code": 75, "reason": "SIGTERM"}', 0, "RUNNING", -9, True, 1),
        (1, '{\n  "reason": "SIGTERM",\n  "exit_code": 75\n}\n', 2, "PREEMPTED", -9, True, 1),
        (1, '{"exit_code": 75}', 0, "CANCELLED", 75, False, 1),
        (1, '{"exit_code": 75}', 3, "RUNNING", 75, False, 1),
        (1, '{"exit_code": 2}', 0, "RUNNING", 2, False, 1),
        (1, '{"exit_code": 1, "final": true}', 0, "RUNNING", 1, False, 1),
        (1, '{"exit_code": 1, "final": false}', 0, "RUNNING", 1, False, 3),
        (1, "", 0, "RUNNING", 1, False, 3),
        (137, "{half writ", 0, "RUNNING", 137, False, 3),
    ],
    ids=["done", "stopped early", "again", "cancelled", "too often", "bad input", "no use", "failed", "silent", "torn exit.json"],
)  # fmt: skip
def test_only_a_run_that_says_75_goes_back_into_the_queue_and_only_what_may_go_better_is_tried_again(
    cluster, tmp_path, torchrun_code, exit_json, restarts, state, exit_code, requeued, tries
):
    job = make_job(tmp_path / "a", max_requeues=3, max_restarts=2)
    given = {
        "TORCHRUN_CODE": str(torchrun_code),
        "EXIT_JSON": exit_json,
        "SLURM_RESTART_COUNT": str(restarts),
        "JOB_STATE": state,
    }
    assert cluster.run(write_script(job, tmp_path / "job.sbatch"), job.members[0].run_folder, **given) == exit_code
    requeues = [call for call in cluster.calls("scontrol") if call[0] == "requeue"]
    assert requeues == ([["requeue", "123456"]] if requeued else []) and len(cluster.calls("python")) == tries


def test_the_exit_code_of_an_earlier_attempt_is_not_taken_for_this_ones(cluster, tmp_path):
    job = make_job(tmp_path / "a")
    script = write_script(job, tmp_path / "job.sbatch")
    (job.members[0].run_folder / "exit.json").write_text('{"exit_code": 75}')
    job.members[0].run_folder.mkdir(exist_ok=True)
    assert cluster.run(script, job.members[0].run_folder, TORCHRUN_CODE="1") == 1
    assert all(call[0] != "requeue" for call in cluster.calls("scontrol"))


def test_sbatch_reads_the_options_back_as_given(tmp_path):
    """The oracle is sbatch's own reading rule, checked by hand on SLURM 22.05 with this very name."""
    job = make_job(
        tmp_path / "a",
        gpus_per_node=8,
        nproc_per_node=8,
        name='a\'b "c" $(x) \\ #d',
        time="2-00:00:00",
        min_nodes=1,
        extra=("--exclusive",),
    )
    directives = [line for line in write_sbatch(job).splitlines() if line.startswith("#SBATCH ")]
    assert directives == [
        '#SBATCH --job-name="a\'b \\"c\\" $(x) \\\\ #d"',
        "#SBATCH --nodes=1-2",
        "#SBATCH --cpus-per-task=32",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --signal=B:TERM@300",
        f"#SBATCH --output={job.members[0].run_folder}/logs/slurm-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes": 1.5}, "nodes is 1.5"),
        ({"gpus_per_node": 2, "nproc_per_node": 4}, "4 ranks per node but 2 GPUs"),
        ({"stop_s": 0}, "stop_s is 0"),
        ({"min_nodes": 3}, "min_nodes is 3; use 1 to 2"),
        ({"mounts": "/a:/b"}, "mounts '/a:/b' are of a container"),
        ({"env_file": Path("/no/such")}, "env_file '/no/such' is not a file"),
        ({"sets": ("a=b\nc",)}, "line break"),
        ({"time": "tomorrow"}, "time 'tomorrow'"),
        ({"time": "1:00\n#SBATCH --uid=0"}, "is not a SLURM time"),
        ({"name": "a\n#SBATCH --account=theirs"}, "line break"),
        ({"partition": ""}, "partition is empty"),
        ({"run_folder": Path("/runs/100%")}, "rename it"),
        ({"config": Path("/no/such.yaml")}, "'/no/such.yaml' is not a file"),
        ({"extra": ("rm -rf",)}, "extra option 'rm -rf'"),
        ({"extra": ("--qos=a\nrm x",)}, "line break"),
    ],
)
def test_what_slurm_would_misread_is_refused_by_name(tmp_path, options, named):
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        make_job(tmp_path / "a", **options)


def test_submitting_returns_the_job_id_and_a_refusal_carries_sbatchs_words(cluster, tmp_path, monkeypatch):
    job = make_job(tmp_path / "a")
    script = write_script(job, tmp_path / "job.sbatch")
    for name, value in cluster.environment(job.members[0].run_folder).items():
        monkeypatch.setenv(name, value)
    assert submit(script) == "4711"
    assert cluster.calls("sbatch") == [["--parsable", str(script)]]
    monkeypatch.setenv("REFUSAL", "invalid account")
    with pytest.raises(UserError, match="invalid account"):
        submit(script)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="not on PATH"):
        submit(script)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-12:30", 131400), ("1-00:00:05", 86405)],
)
def test_a_time_is_read_as_sbatch_reads_it(time, seconds):
    assert seconds_of(time) == seconds
