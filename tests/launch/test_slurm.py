"""The sbatch script is run for real; srun, scontrol, torchrun and sbatch are stubs that record their arguments."""

import os
import subprocess
from pathlib import Path

import pytest

from exfm.data.errors import UserError
from exfm.launch.slurm import SlurmJob, submit, write_sbatch, write_script

HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` ; touch pwned & #x *'
RECORD = 'printf "%s\\0" "$(basename "$0")" "$@" >> "$RECORDS"; printf "\\n\\0" >> "$RECORDS"\n'
STUBS = {
    # srun runs what follows its own options, once: a cluster of one node.
    "srun": RECORD + 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"; exit $?\n',
    "scontrol": RECORD + 'if [ "$1" = show ]; then echo node-a; echo node-b; fi\n',
    "torchrun": RECORD
    + 'echo "$OMP_NUM_THREADS $TORCH_ELASTIC_SHUTDOWN_TIMEOUT ${NCCL_DEBUG-unset}" > "$RECORDS.env"\n'
    + 'if [ -n "$EXIT_JSON" ]; then printf "%s" "$EXIT_JSON" > "$RUN/exit.json"; fi; exit "$TORCHRUN_CODE"\n',
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
    return SlurmJob(**{"config": config, "run_folder": folder / "run", "nodes": 2, **options})


@pytest.mark.parametrize("name", ["plain", HOSTILE], ids=["plain", "hostile"])
def test_each_node_gets_exactly_one_torchrun_with_exactly_these_arguments(cluster, tmp_path, name):
    """Also when every name and path holds shell code: it arrives as text and is not run."""
    job = make_job(tmp_path / name, nproc_per_node=4, cpus_per_rank=2, name=name, partition=name, account=name)
    script = write_script(job, tmp_path / name / "job.sbatch")
    assert cluster.run(script, job.run_folder) == 0

    torchrun = ["--nnodes", "2", "--nproc-per-node", "4", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "node-a:23456", "--rdzv-id", "123456"]
    torchrun += ["--max-restarts", "3", "-m", "exfm.trainer", str(job.config)]
    srun = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--kill-on-bad-exit=0", "--wait=300"]
    srun += ["--open-mode=append", f"--output={job.run_folder}/logs/slurm-%j-node%n.log", "torchrun"]
    assert cluster.calls("torchrun") == [torchrun]
    assert cluster.calls("srun") == [srun + torchrun]
    assert cluster.calls("scontrol") == [["show", "hostnames", "node-[a-b]"]]


@pytest.mark.parametrize(("gpus", "nccl_debug"), [(0, "unset"), (4, "WARN")])
def test_ranks_share_the_cores_of_their_node_and_nccl_is_set_only_with_gpus(cluster, tmp_path, gpus, nccl_debug):
    job = make_job(tmp_path / "a", gpus_per_node=gpus, nproc_per_node=4, stop_s=120)
    cluster.run(write_script(job, tmp_path / "job.sbatch"), job.run_folder)
    assert (cluster.folder / "records.env").read_text().split() == ["2", "120", nccl_debug]


@pytest.mark.parametrize(
    ("torchrun_code", "exit_json", "restarts", "exit_code", "requeued"),
    [
        (0, '{"exit_code": 0}', 0, 0, False),
        (1, '{"exit_code": 75, "reason": "SIGTERM"}', 0, 75, True),
        (1, '{\n  "reason": "SIGTERM",\n  "exit_code": 75\n}\n', 2, 75, True),
        (1, '{"exit_code": 75}', 3, 75, False),
        (1, '{"exit_code": 2}', 0, 2, False),
        (1, "", 0, 1, False),
        (137, "{half writ", 0, 137, False),
    ],
    ids=["done", "stopped early", "stopped early again", "too often", "bad input", "no exit.json", "torn exit.json"],
)
def test_only_a_run_that_says_75_goes_back_into_the_queue(
    cluster, tmp_path, torchrun_code, exit_json, restarts, exit_code, requeued
):
    job = make_job(tmp_path / "a", max_requeues=3)
    given = {"TORCHRUN_CODE": str(torchrun_code), "EXIT_JSON": exit_json, "SLURM_RESTART_COUNT": str(restarts)}
    assert cluster.run(write_script(job, tmp_path / "job.sbatch"), job.run_folder, **given) == exit_code
    requeues = [call for call in cluster.calls("scontrol") if call[0] == "requeue"]
    assert requeues == ([["requeue", "123456"]] if requeued else [])


def test_the_exit_code_of_an_earlier_attempt_is_not_taken_for_this_ones(cluster, tmp_path):
    job = make_job(tmp_path / "a")
    script = write_script(job, tmp_path / "job.sbatch")
    (job.run_folder / "exit.json").write_text('{"exit_code": 75}')
    assert cluster.run(script, job.run_folder, TORCHRUN_CODE="1") == 1
    assert all(call[0] != "requeue" for call in cluster.calls("scontrol"))


def test_sbatch_reads_the_options_back_as_given(tmp_path):
    """The oracle is sbatch's own reading rule, checked by hand on SLURM 22.05 with this very name."""
    job = make_job(
        tmp_path / "a",
        gpus_per_node=8,
        nproc_per_node=8,
        name='a\'b "c" $(x) \\ #d',
        time="2-00:00:00",
        extra=("--exclusive",),
    )
    directives = [line for line in write_sbatch(job).splitlines() if line.startswith("#SBATCH ")]
    assert directives == [
        '#SBATCH --job-name="a\'b \\"c\\" $(x) \\\\ #d"',
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=32",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --signal=TERM@300",
        f"#SBATCH --output={job.run_folder}/logs/slurm-%j.log",
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
    for name, value in cluster.environment(job.run_folder).items():
        monkeypatch.setenv(name, value)
    assert submit(script) == "4711"
    assert cluster.calls("sbatch") == [["--parsable", str(script)]]
    monkeypatch.setenv("REFUSAL", "invalid account")
    with pytest.raises(UserError, match="invalid account"):
        submit(script)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="not on PATH"):
        submit(script)
