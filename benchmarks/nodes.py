"""How long a job stands still that loses a node: `exfm bench nodes [--rounds N] [--nodes 3]`, on a real SLURM of this machine.

A job of one CPU rank a node, `exfm launch slurm --nodes N --min-nodes N-1`, runs on all nodes; one is killed with all its processes in the middle of a slice,
none is spare, and the job goes on with one fewer. Reported: seconds from the last step that was recorded before the loss to the first one after it, whether the
script's host was lost or another, and whether every example was learned once. The cluster (benchmarks/slurm_cluster.sh) takes a node for lost after
SlurmdTimeout 10 s; a site's own is often 300. Needs root. Writes nodes.json and nodes.md under --out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._slurm import SlurmCluster, look, nodes_of, records, wait_until
from benchmarks._turns import machine
from benchmarks.plan import say
from exfm.data.errors import UserError
from exfm.data.synth import synth
from exfm.launch.auditing import audit_run

ROOT = Path(__file__).resolve().parents[1]
SLICES, ROWS, BATCH = 3, 8192, 64
LIMIT_S = 600.0


def lose(cluster: SlurmCluster, stream: Path, run: Path, nodes: int, which: int) -> dict[str, Any]:
    """One job that loses its node number `which`, 0 for the one that runs the script."""
    sets = {
        "run.folder": run,
        "run.device": "cpu",
        "run.log_every_s": 0.1,
        "stream.path": stream,
        "stream.global_batch": BATCH,
    }
    sets |= {"stream.domains": [], "checkpoint.every_examples": 2048, "evaluation.bootstrap": 0}
    options = [part for k, v in sets.items() for part in ("--set", f"{k}={json.dumps(v, default=str)}")]
    command = [sys.executable, "-m", "exfm.launch.cli", "launch", "slurm", str(ROOT / "configs/synth_teacher.yaml")]
    command += ["--nodes", str(nodes), "--min-nodes", str(nodes - 1), "--gpus-per-node", "0", "--cpus-per-rank", "1"]
    done = subprocess.run([*command, "--assume-shared", "--submit", "--json", *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    job = str(json.loads(done.stdout)["jobs"]["teacher"])
    first = ROWS // BATCH
    wait_until(lambda: records(run) and records(run)[-1]["step"] > first + first // 4, LIMIT_S, 0.01)
    cluster.crash(nodes_of(job)[which])
    wait_until(lambda: not look(job).live, LIMIT_S)
    audit = audit_run(run)
    (gap,) = [r["gap_s"] for r in records(run) if "gap_s" in r]
    return {
        "lost": "the script's node" if which == 0 else "another node",
        "seconds": gap,
        "state": look(job).state,
        "clean": audit["examples"] == SLICES * ROWS and audit["repeated"] == 0,
    }


def markdown(rows: list[dict[str, Any]], nodes: int) -> str:
    m = machine()
    lines = [
        f"{nodes} nodes of one rank, then {nodes - 1}; all on {m['device']} (torch {m['torch']}, {m['date']}, load {m['load']})",
        "",
        "| lost | seconds to the next step | SLURM says | every example learned once |",
        "|---|---|---|---|",
        *(f"| {r['lost']} | {r['seconds']:.1f} | {r['state']} | {'yes' if r['clean'] else 'NO'} |" for r in rows),
    ]
    return "\n".join([*lines, ""])


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="exfm bench nodes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=2, help="the first loses another node, the second the script's, and so on"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/nodes"))
    o = parser.parse_args(args)
    if o.nodes < 2:
        raise UserError(f"--nodes is {o.nodes}; to lose one takes 2 or more")
    if os.geteuid() != 0:
        raise UserError("exfm bench nodes starts a SLURM whose nodes are namespaces of this machine: run it as root")
    out = o.out.absolute()
    if not (out / "stream/stream.json").exists():
        synth(str(out / "stream"), num_slices=SLICES, rows_per_slice=ROWS, seed=0)
    cluster, rows = SlurmCluster(Path(tempfile.mkdtemp(prefix="sl-")), o.nodes), []
    try:
        for number in range(o.rounds):
            run = Path(tempfile.mkdtemp(prefix="run-", dir=out))
            rows.append(lose(cluster, out / "stream", run, o.nodes, 0 if number % 2 else o.nodes - 1))
            say(f"{rows[-1]['lost']} lost: {rows[-1]['seconds']:.1f} s")
            cluster.revive()
    finally:
        cluster.close()
    (out / "nodes.json").write_text(json.dumps({"nodes": o.nodes, "rows": rows}, indent=1))
    (out / "nodes.md").write_text(text := markdown(rows, o.nodes))
    print(text)
    return 0 if all(r["clean"] and r["state"] == "COMPLETED" for r in rows) else 1
