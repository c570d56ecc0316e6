"""The text of an sbatch script: srun starts one torchrun per node, torchrun starts the ranks of that node."""

import re
import shlex
from pathlib import Path

from exfm.launch.slurm.job import Member, SlurmJob

BARE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


def write_sbatch(job: SlurmJob) -> str:
    """The script's text; every value in it is quoted, so that no name or path is read as shell code."""
    values = {
        "PYTHON": job.python,
        "RANKS_PER_NODE": str(job.nproc_per_node),
        "CPUS_PER_NODE": str(job.nproc_per_node * job.cpus_per_rank),
        "STOP_S": str(job.stop_s),
        "MAX_REQUEUES": str(job.max_requeues),
        "MAX_RESTARTS": str(job.max_restarts),
    }
    parts = [
        "#!/bin/bash",
        *_directives(job),
        PREFACE,
        *(f"{name}={shlex.quote(value)}" for name, value in values.items()),
        *_members(job.members),
        f"STEP={_array(_step_options(job))}  # options of srun for the job's container",
    ]
    if job.env_file is not None:
        parts += ["", f"set -a; . {shlex.quote(str(job.env_file.absolute()))}; set +a"]
    parts += [ENVIRONMENT + (NCCL_ENVIRONMENT if job.gpus_per_node else ""), COMMANDS]
    return "\n".join(parts)


def write_script(job: SlurmJob, path: Path) -> Path:
    """Write the script, and the folder of its logs, without which SLURM drops the job silently."""
    job.log_folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_sbatch(job))
    path.chmod(0o755)
    return path


def _directives(job: SlurmJob) -> list[str]:
    nodes = str(job.nodes) if job.least_nodes == job.nodes else f"{job.least_nodes}-{job.nodes}"
    options: list[tuple[str, str | int | None]] = [
        ("job-name", job.name),
        ("array", f"0-{len(job.members) - 1}" if len(job.members) > 1 else None),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("constraint", job.constraint),
        ("dependency", job.dependency),
        ("nodes", nodes),
        # not --ntasks-per-node: with it SLURM takes the fewest nodes of a range
        ("cpus-per-task", job.nproc_per_node * job.cpus_per_rank),
        ("gpus-per-node", job.gpus_per_node or None),
        ("time", job.time),
        ("signal", f"B:TERM@{job.stop_s}"),
        ("output", f"{job.log_folder}/slurm-{'%A_%a' if len(job.members) > 1 else '%j'}.log"),
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


def _members(members: tuple[Member, ...]) -> list[str]:
    if len(members) == 1:
        return _assignments(members[0])
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for number, member in enumerate(members):
        lines.append(f"  {number}) " + "; ".join(_assignments(member)) + " ;;")
    return [*lines, "esac"]


def _assignments(member: Member) -> list[str]:
    sets = [part for item in member.sets for part in ("--set", item)]
    return [
        f"CONFIG={shlex.quote(str(member.config.absolute()))}",
        f"RUN_FOLDER={shlex.quote(str(member.run_folder.absolute()))}",
        f"OPTIONS={_array([*sets, *['--follow'] * member.follow])}",
    ]


def _step_options(job: SlurmJob) -> list[str]:
    if job.container is None:
        return []
    return [f"--container-image={job.container}", *([f"--container-mounts={job.mounts}"] if job.mounts else [])]


def _array(items: list[str]) -> str:
    return f"({' '.join(map(shlex.quote, items))})"


PREFACE = """
# Written by `exfm launch slurm`; edit it freely. Whatever ends an attempt (its time limit, preemption, a lost node), the
# job goes back into the queue and on from its last commit, on as many nodes as it gets.
set -u
"""

ENVIRONMENT = """
# The ranks of a node share its cores; more threads than cores would only wait for each other.
export OMP_NUM_THREADS=$((CPUS_PER_NODE / RANKS_PER_NODE))
# torchrun would kill its ranks 30 s after SIGTERM, too soon for a large commit.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$STOP_S"
# The last lines before a crash reach the log.
export PYTHONUNBUFFERED=1
"""

NCCL_ENVIRONMENT = """\
# Ranks that lost a peer end, instead of waiting for the time limit.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# What every rank was doing when a collective hung; dumped to the run's folder.
export TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$RUN_FOLDER/logs/nccl-trace-rank-"
# NCCL says why it failed; INFO says too much. Where nodes have several networks, name NCCL's: NCCL_SOCKET_IFNAME=ib0.
export NCCL_DEBUG=WARN
"""

COMMANDS = """\
mkdir -p "$RUN_FOLDER/logs"
say() { echo "$(date +%FT%T) $*"; }
say "attempt ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID: $SLURM_NNODES node(s), $SLURM_JOB_NODELIST"

# The first node of this attempt hosts the rendezvous. The port follows the job id, so that two jobs on one node do not
# meet; it stays below the range (from 32768) from which the kernel gives ports to others.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rdzv_port=$((20000 + SLURM_JOB_ID % 10000))

# SIGTERM comes STOP_S before the time limit and on preemption, USR1 from an operator (scancel --batch --signal=USR1): the
# ranks commit and stop. bash runs a trap only while it waits, so srun is in the background.
asked=0 srun_pid=
ask() { asked=1; [ -n "$srun_pid" ] && kill -TERM "$srun_pid" 2>/dev/null; }
trap ask TERM USR1

# What the ranks say when they end; torchrun turns every failure into 1, their own code is here.
word() { sed -nE 's/.*"'"$1"'" *: *([a-z0-9]+).*/\\1/p' "$RUN_FOLDER/exit.json" 2>/dev/null | head -n 1; }

# One torchrun per node. srun does not inherit --cpus-per-task from the job. When one node's torchrun has ended, the others
# get STOP_S seconds to end too: none would cut off a commit. After a failure they get 20 s, since a lost node never ends.
# torchrun itself restarts nothing: the store of its rendezvous may be gone with a node, so the script starts the next try.
start_ranks() {
  rm -f "$RUN_FOLDER/exit.json"
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$CPUS_PER_NODE" \\
    --kill-on-bad-exit=0 --wait="$STOP_S" ${STEP[@]+"${STEP[@]}"} \\
    --open-mode=append --output="$RUN_FOLDER/logs/slurm-$SLURM_JOB_ID-node%n.log" \\
    "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE" \\
    --rdzv-backend c10d --rdzv-endpoint "$head_node:$rdzv_port" --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$1" \\
    --max-restarts 0 -m exfm.trainer "$CONFIG" ${OPTIONS[@]+"${OPTIONS[@]}"} &
  srun_pid=$! failed_s=0
  [ "$asked" -eq 1 ] && kill -TERM "$srun_pid"
  while kill -0 "$srun_pid" 2>/dev/null; do
    sleep 1 & wait $!
    case "$(word exit_code)" in 1 | 2) failed_s=$((failed_s + 1)) ;; esac
    [ "$failed_s" -eq 20 ] && kill -TERM "$srun_pid" 2>/dev/null
    [ "$failed_s" -ge 25 ] && kill -KILL "$srun_pid" 2>/dev/null
  done
  wait "$srun_pid"
  status=$?
  srun_pid= code=$(word exit_code)
}

# Whether every node starts a process.
all_answer() {
  timeout 20 srun --overlap --mem=0 --nodes="$SLURM_NNODES" --ntasks-per-node=1 true 2>/dev/null
}

# Back into the queue, unless somebody has cancelled the job: then SLURM no longer calls it running. slurmctld may be away
# for a while; what it has accepted ends this script.
requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
    say "$1; the job was requeued $MAX_REQUEUES times, which is enough"
    return
  fi
  for _ in $(seq 60); do
    state=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -nE 's/.*JobState=([A-Z_]+).*/\\1/p')
    case "$state" in
      RUNNING | PREEMPTED | SUSPENDED)
        say "$1: back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60
        ;;
      ?*)
        say "$1; SLURM calls the job $state: it stays out of the queue"
        return
        ;;
    esac
    sleep 10
  done
}

restarts=0
while :; do
  start_ranks "$restarts"
  if [ "$status" -eq 0 ] && [ "${code:-0}" -eq 0 ]; then
    say "done"
    exit 0
  elif [ "${code:-1}" -eq 75 ] || [ "$asked" -eq 1 ]; then
    requeue "stopped early with everything committed"
    exit 75
  elif [ "${code:-1}" -eq 2 ] || [ "$(word final)" = true ]; then
    break  # another try would end the same way
  elif ! all_answer; then
    requeue "a node does not answer"
    break
  elif [ "$restarts" -ge "$MAX_RESTARTS" ]; then
    break
  fi
  restarts=$((restarts + 1))
  say "try $restarts of $MAX_RESTARTS after a failure: $(cat "$RUN_FOLDER/exit.json" 2>/dev/null || echo "srun ended with $status")"
  sleep 2 & wait $!
done
say "failed: $(cat "$RUN_FOLDER/exit.json" 2>/dev/null || echo "srun ended with $status, see $RUN_FOLDER/logs")"
exit "${code:-$status}"
"""
