"""exfm's job beside what a team would otherwise use: `exfm bench peers [--data frappe,criteo] [--peers ...] [--rounds N] [--compile]`.

On CPU by default: Wukong l=2, n_F = n_L = 16, k = 8, d = 32, batch 4,096, fp32. frappe: real, needs EXFM_DATA_DIR with frappe; all peers train the
same two epochs and are scored on the test split with frozen weights. criteo: Criteo-shaped, 13 dense columns, 26 tables with --rows rows.

Every run is a process of its own, peers take turns, medians over the rounds, each with its own seed. Speed is counted from the end of the first step to
the end of the last: without start-up and without evaluation. exfm's includes its reader, metrics, log and commits; the plain PyTorch peers
have their batches in memory. Examples per CPU second is what a busy machine still measures: give it --threads 1.
Writes peers.json, ratios.json and peers.md under --out. Where exfm's step goes: `exfm bench step`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import _peers_fuxictr
from benchmarks._peers_data import BATCH, MODELS
from benchmarks._peers_torch import KINDS
from benchmarks.plan import say
from exfm.data.errors import UserError

ROOT = Path(__file__).parents[1]
PEERS = ("exfm", "fuxictr", "torchrec", *KINDS)
DEFAULT = {"frappe": "exfm,fuxictr,dense,adagrad,joined,torchrec", "criteo": "exfm,dense,adagrad,sparse_adam,joined,torchrec"}  # fmt: skip
ON_CUDA = ("exfm", "torchrec")
LEARNING = {"frappe": (0.001, 0.1), "criteo": (0.001, 0.05)}  # of the dense part, of the tables


def run_once(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    path = out / "spec.json"
    path.write_text(json.dumps(spec))
    (result := path.with_suffix(".result.json")).unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks._peers_run", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not result.exists():
        raise RuntimeError(f"peer {spec['peer']} failed on {spec['data']}:\n{ended.stderr[-3000:]}")
    return json.loads(result.read_text())  # type: ignore[no-any-return]


def measure(data: str, o: argparse.Namespace, data_dir: str | None) -> dict[str, Any]:
    """Every peer's runs: speeds and, of Frappe, test AUC."""
    lr, tables_lr = LEARNING[data]
    spec = {
        "data": data, "folder": str((o.out / data).absolute()), "source": str(Path(data_dir or "") / "frappe"), "rows": o.rows,
        "threads": o.threads, "fuxictr": str(o.fuxictr), "lr": lr, "tables_lr": tables_lr,
        "device": o.device, "precision": o.precision, "model": o.model, "batch": o.batch,
    }  # fmt: skip
    peers = (o.peers or (",".join(ON_CUDA) if o.device == "cuda" else DEFAULT[data])).split(",")
    peers = [p for p in peers if data == "frappe" or p != "fuxictr"]
    rows: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    (o.out / data).mkdir(parents=True, exist_ok=True)
    for number in range(o.rounds):
        for peer in peers:
            compiled = o.compile and peer not in ("fuxictr", "dense", "torchrec")
            own = {
                "peer": peer,
                "seed": number,
                "examples": o.examples or (0 if data == "frappe" else 50 * o.batch),
                "compiled": compiled,
            }
            rows[peer].append(found := run_once(spec | own, o.out / data))
            say(f"{data}, round {number + 1}, {peer}: {found['examples_per_s']:,.0f} examples/s")
    return {"data": data, "rows": rows}


def medians_of(rows: dict[str, list[dict[str, Any]]]) -> dict[tuple[str, str], float]:
    """Of every (peer, speed)."""
    return {
        (peer, key): statistics.median(r[key] for r in found)
        for peer, found in rows.items()
        for key in ("examples_per_s", "examples_per_cpu_s")
    }


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """exfm by every other peer, in examples per CPU second, for `exfm bench guard`."""
    found = {}
    for result in results:
        medians = medians_of(result["rows"])
        ours = medians.get(("exfm", "examples_per_cpu_s"))
        for peer in result["rows"]:
            if ours is not None and peer != "exfm":
                found[f"{result['data']}, exfm / {peer}"] = ours / medians[peer, "examples_per_cpu_s"]
    return found


def table(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    medians = medians_of(rows)
    lines = [
        "| peer | parameters | examples/s (lowest, highest) | examples per CPU second | exfm by it, wall | exfm by it, CPU | test AUC |",
        "|---|---|---|---|---|---|---|",
    ]
    for peer, found in rows.items():
        speed, cpu = medians[peer, "examples_per_s"], medians[peer, "examples_per_cpu_s"]
        all_speeds = [r["examples_per_s"] for r in found]
        ours = [medians.get(("exfm", k), float("nan")) for k in ("examples_per_s", "examples_per_cpu_s")]
        scores = [r["auc"] for r in found if "auc" in r]
        score = f"{statistics.median(scores):.4f} ({min(scores):.4f}, {max(scores):.4f})" if scores else "not scored"
        lines.append(
            f"| {peer} | {found[0]['parameters']:,} | {speed:,.0f} ({min(all_speeds):,.0f}, {max(all_speeds):,.0f}) | {cpu:,.0f} | "
            f"{ours[0] / speed:.2f} | {ours[1] / cpu:.2f} | {score} |"
        )
    return lines


def markdown(results: list[dict[str, Any]], o: argparse.Namespace) -> str:
    where = f"{o.threads} threads" if o.device == "cpu" else torch.cuda.get_device_name()
    compiled = ", torch.compile (but for torchrec and fuxictr)" if o.compile else ""
    lines = [f"{where}, model {o.model}, batch {o.batch:,}, {o.precision}{compiled}, {o.rounds} rounds.", ""]
    for result in results:
        lines += [f"**{result['data']}**", "", *table(result), ""]
    return "\n".join(lines)


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench peers", description=__doc__)
    parser.add_argument("--data", default="frappe,criteo", help="of frappe, criteo")
    parser.add_argument("--peers", default="", help="of " + ", ".join(PEERS))
    parser.add_argument("--fuxictr", type=Path, help="a checkout of FuxiCTR's repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--examples", type=int, default=0, help="trained at most; 0: all of Frappe, 50 batches of criteo"
    )
    parser.add_argument(
        "--rows", type=int, default=10_000_000, help="of all criteo tables; `dense` holds them four times, in fp32"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help=f"cuda: of {', '.join(ON_CUDA)}, on criteo"
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="small", help="of criteo; as in `exfm bench dense`")
    parser.add_argument("--batch", type=int, default=BATCH, help="of criteo")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="of products; exfm and torchrec"
    )
    parser.add_argument(
        "--compile", action="store_true", help="exfm with dense_engine.compile, plain PyTorch with torch.compile"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/peers"))
    o = parser.parse_args(args)
    data, named = o.data.split(","), o.peers.split(",") if o.peers else []
    if wrong := [d for d in data if d not in DEFAULT]:
        raise UserError(f"--data names {', '.join(wrong)}; there are: {', '.join(DEFAULT)}")
    if wrong := [p for p in named if p not in PEERS]:
        raise UserError(f"--peers names {', '.join(wrong)}; there are: {', '.join(PEERS)}")
    if o.device == "cuda" and (data != ["criteo"] or any(p not in ON_CUDA for p in named)):
        raise UserError(
            f"--device cuda compares {' and '.join(ON_CUDA)} on criteo: give --data criteo and none but these peers"
        )
    if o.precision != "fp32" and any(p not in ON_CUDA for p in named or PEERS) and o.device == "cpu":
        raise UserError(f"--precision {o.precision} is for exfm and torchrec: give --peers {','.join(ON_CUDA)}")
    if "frappe" in data and "fuxictr" in (named or PEERS):
        _peers_fuxictr.check(o.fuxictr)
    if "frappe" in data and data_dir is None:
        raise UserError(
            "exfm bench peers needs Frappe: set EXFM_DATA_DIR to a folder that has frappe, or give --data criteo"
        )
    results = [measure(d, o, data_dir) for d in data]
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "peers.json").write_text(
        json.dumps({"threads": o.threads, "compiled": o.compile, "results": results}, indent=1)
    )
    (o.out / "ratios.json").write_text(json.dumps(ratios(results), indent=1))
    (o.out / "peers.md").write_text(text := markdown(results, o))
    print(text)
    return 0
