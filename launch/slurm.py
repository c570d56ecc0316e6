"""Write an sbatch script for one job: srun starts one torchrun per node, torchrun starts the ranks of that node."""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from exfm.data.errors import UserError

TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")
BARE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class SlurmJob:
    """What to ask of SLURM. Every mistake is a UserError, before anything is submitted.

    config, run_folder: the job's YAML file and the folder it writes to; both on a file system that all nodes share.
    gpus_per_node: 0 trains on CPU. nproc_per_node: ranks per node, at most one per GPU.
    partition, account: None leaves the choice to the cluster.
    time: limit of one attempt as sbatch reads it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.
    stop_s: seconds before that limit at which the ranks are told to commit and stop.
    max_requeues: attempts after the first one.
    max_restarts: restarts of the ranks inside one attempt, after one of them has failed.
    extra: further sbatch options, such as "--qos=long" or "--exclusive".
    torchrun: the executable; give the path of the right environment's, because a job may start without its PATH.
    """

    config: Path
    run_folder: Path
    nodes: int = 1
    gpus_per_node: int = 0
    nproc_per_node: int = 1
    cpus_per_rank: int = 4
    name: str = "exfm"
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    stop_s: int = 300
    max_requeues: int = 100
    max_restarts: int = 3
    extra: tuple[str, ...] = ()
    torchrun: str = "torchrun"

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_texts()
        if not self.config.is_file():
            raise UserError(f"config {str(self.config)!r} is not a file; give the job's YAML file")
        if not TIME.fullmatch(self.time):
            raise UserError(f"time {self.time!r} is not a SLURM time; write for instance 90, 12:00:00 or 2-00:00:00")
        for option in self.extra:
            if not re.match(r"--[a-z][a-z-]*(=|$)", option):
                raise UserError(f"extra option {option!r} is not of the form --name or --name=value")
        # SLURM expands % and reads \ as "expand nothing" in the names of log files.
        if "%" in str(self.run_folder) or "\\" in str(self.run_folder):
            raise UserError(f"run folder {str(self.run_folder)!r} contains % or \\, which SLURM expands; rename it")

    def _check_numbers(self) -> None:
        least = {
            "nodes": 1,
            "gpus_per_node": 0,
            "nproc_per_node": 1,
            "cpus_per_rank": 1,
            "stop_s": 30,
            "max_requeues": 0,
            "max_restarts": 0,
        }
        for field, limit in least.items():
            value = getattr(self, field)
            if not isinstance(value, int) or value < limit:
                raise UserError(f"{field} is {value!r}; it must be a whole number of at least {limit}")
        if 0 < self.gpus_per_node < self.nproc_per_node:
            raise UserError(
                f"{self.nproc_per_node} ranks per node but {self.gpus_per_node} GPUs: a rank needs a GPU of its own; "
                f"use nproc_per_node {self.gpus_per_node} or gpus_per_node {self.nproc_per_node}"
            )

    def _check_texts(self) -> None:
        texts = {
            name: getattr(self, name) for name in ("config", "run_folder", "name", "partition", "account", "torchrun")
        }
        texts |= {f"extra option {i}": option for i, option in enumerate(self.extra)}
        for field, value in texts.items():
            if value is None:
                continue
            if not (text := str(value)).strip():
                raise UserError(f"{field} is empty")
            if any(ord(c) < 32 or ord(c) == 127 for c in text):
                raise UserError(f"{field} {text!r} contains a line break or another control character; remove it")


def write_sbatch(job: SlurmJob) -> str:
    """The script's text; every value in it is quoted, so that no name or path is read as shell code."""
    run_folder = job.run_folder.absolute()
    values = {
        "CONFIG": str(job.config.absolute()),
        "RUN_FOLDER": str(run_folder),
        "TORCHRUN": job.torchrun,
        "RANKS_PER_NODE": str(job.nproc_per_node),
        "STOP_S": str(job.stop_s),
        "MAX_REQUEUES": str(job.max_requeues),
        "MAX_RESTARTS": str(job.max_restarts),
    }
    assignments = "\n".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
    settings = ENVIRONMENT + (NCCL_ENVIRONMENT if job.gpus_per_node else "")
    return "\n".join(["#!/bin/bash", *_directives(job, run_folder), PREFACE + assignments, settings + COMMANDS])


def write_script(job: SlurmJob, path: Path) -> Path:
    """Write the script, and the folder of its logs, without which SLURM drops the job silently."""
    (job.run_folder / "logs").mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_sbatch(job))
    path.chmod(0o755)
    return path


def submit(script: Path) -> str:
    """Send a script with sbatch; the job's id. UserError with sbatch's own words if it refuses."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"sbatch is not on PATH; run this on a login node of the cluster: sbatch {script}") from None
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def _directives(job: SlurmJob, run_folder: Path) -> list[str]:
    options: list[tuple[str, str | int | None]] = [
        ("job-name", job.name),
        ("partition", job.partition),
        ("account", job.account),
        ("nodes", job.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", job.nproc_per_node * job.cpus_per_rank),
        ("gpus-per-node", job.gpus_per_node or None),
        ("time", job.time),
        ("signal", f"TERM@{job.stop_s}"),
        ("output", f"{run_folder}/logs/slurm-%j.log"),
        ("open-mode", "append"),
    ]
    lines = [f"#SBATCH --{name}={_for_sbatch(str(value))}" for name, value in options if value is not None]
    for option in job.extra:
        name, equals, value = option.partition("=")
        lines.append(f"#SBATCH {name}{equals}{_for_sbatch(value) if equals else ''}")
    return [*lines, "#SBATCH --requeue"]


def _for_sbatch(value: str) -> str:
    """Quote for the #SBATCH reader, which is no shell: inside double quotes only \\ and " are special."""
    if BARE.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


PREFACE = """
# Written by `exfm launch slurm`; edit it freely. A job stopped early by its time limit or by preemption has committed
# everything; it is put back into the queue and goes on from there.
set -u

"""

ENVIRONMENT = """

# The ranks of a node share its cores; more threads than cores would only wait for each other.
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / RANKS_PER_NODE))
# torchrun would kill its ranks 30 s after SIGTERM, too soon for a large commit.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$STOP_S"
# The last lines before a crash reach the log.
export PYTHONUNBUFFERED=1
"""

NCCL_ENVIRONMENT = """\
# Ranks that lost a peer end, instead of waiting for the time limit.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# NCCL says why it failed; INFO says too much.
export NCCL_DEBUG=WARN
"""

COMMANDS = """
# The first node hosts the rendezvous. The port follows the job id, so that two jobs on one node do not meet; it stays
# below the range (from 32768) from which the kernel gives ports to others.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rdzv_port=$((20000 + SLURM_JOB_ID % 10000))

mkdir -p "$RUN_FOLDER/logs"
rm -f "$RUN_FOLDER/exit.json"  # an earlier attempt's

# srun does not inherit --cpus-per-task from the job. When one node's torchrun has ended, the others get STOP_S seconds
# to end too: none would cut off a commit, no limit would leave the job hanging.
srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
  --kill-on-bad-exit=0 --wait="$STOP_S" \\
  --open-mode=append --output="$RUN_FOLDER/logs/slurm-%j-node%n.log" \\
  "$TORCHRUN" --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE" \\
  --rdzv-backend c10d --rdzv-endpoint "$head_node:$rdzv_port" --rdzv-id "$SLURM_JOB_ID" \\
  --max-restarts "$MAX_RESTARTS" -m exfm.trainer "$CONFIG"
status=$?
[ "$status" -eq 0 ] && exit 0

# torchrun turns every failure into 1; the ranks' own code is in exit.json. 75: stopped early, start me again.
code=$(sed -nE 's/.*"exit_code" *: *([0-9]+).*/\\1/p' "$RUN_FOLDER/exit.json" 2>/dev/null | head -n 1)
code=${code:-$status}
if [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUES" ]; then
  echo "stopped early with everything committed: back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
