"""Does training on several GPUs of this host do what one rank on gloo does? `exfm bench multigpu`, `make test-multigpu`.

One small teacher on the synthetic stream, which logs its predictions, is trained on the CPU by one rank; then by one rank per GPU under
every dense engine, precision and pipeline that the config knows, and once as 2D parallelism (two copies of all tables). Every slice's log
loss must be near the reference's: within 0.2% in 32 bits, 2% in 16. Each row is PASS, FAIL, or REFUSED where exfm names the combination as
one that it does not do. Exit codes: 0 without a FAIL, 1 with one, 2 on a host with fewer than two GPUs. Writes multigpu.json and
multigpu.md under --out. --device cpu tries the script itself with ranks on gloo; it says nothing about GPUs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks._turns import machine
from benchmarks.plan import say
from exfm.data.errors import UserError
from exfm.data.synth import synth
from exfm.trainer.config import RunConfig
from exfm.trainer.engines import DenseEngineConfig

ROOT = Path(__file__).parents[1]
NEAR = {32: 0.002, 16: 0.02}  # of a slice's log loss
LEAST_GPUS = 2
TABLES = ("user", "item", "segment", "category", "domain")
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 products": {"precision.dense": "bf16"},
    "bf16 gradients": {"precision.gradients": "bf16"},
    "fp16 embeddings sent": {"precision.embeddings_forward": "fp16", "precision.embeddings_backward": "fp16"},
    "fp16 forward, bf16 backward sent": {"precision.embeddings_forward": "fp16", "precision.embeddings_backward": "bf16"},
    "fp16 rows": {f"tables.{name}.dtype": "fp16" for name in TABLES},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    bits: int = 32


def cases(ranks: int) -> Iterator[Case]:
    """Every engine with every precision and pipeline, every sharding type, and 2D."""
    for engine in get_args(DenseEngineConfig.model_fields["kind"].annotation):
        for precision, own in PRECISIONS.items():
            for pipeline in get_args(RunConfig.model_fields["pipeline"].annotation):
                settings = {"dense_engine.kind": engine, "run.pipeline": pipeline, **own}
                yield Case(f"{engine}, {precision}, {pipeline}", settings, 16 if own else 32)
    for kind in ("table_wise", "row_wise", "column_wise", "data_parallel"):
        yield Case(f"ddp, fp32, {kind}", {"sharding.allowed": [kind]})
    if ranks % 2 == 0:
        yield Case("2D: two copies of all tables", {"sharding.replicas": 2})


def train(
    settings: dict[str, Any], ranks: int, device: str, stream: Path, folder: Path
) -> tuple[int, str, list[float]]:
    """Exit code, the last line said, and the log loss of every slice."""
    sets = {
        "stream.path": stream,
        "stream.domains": [],
        "run.folder": folder,
        "run.device": device,
        "run.timeout_s": 120,
        "run.hang_s": 60,
        "evaluation.bootstrap": 0,
        **settings,
    }
    options = [part for k, v in sets.items() for part in ("--set", f"{k}={json.dumps(v, default=str)}")]
    config = str(ROOT / "configs/synth_teacher.yaml")
    command = [sys.executable, "-m", "exfm.launch.cli", "train", config, "--nproc", str(ranks), "--max-restarts", "0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    words = done.stderr.strip().splitlines() or [""]
    said = next((word for word in words if word.startswith("exfm:")), words[-1])
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    losses = [line["metrics"]["all"]["click"]["log_loss"] for line in lines if line["kind"] == "slice"]
    return done.returncode, said, losses


def verdict(case: Case, code: int, said: str, found: list[float], expected: list[float]) -> tuple[str, str]:
    """PASS, FAIL or REFUSED, and why."""
    if code == 2:
        return "REFUSED", said
    if code:
        return "FAIL", f"exit code {code}: {said}"
    if len(found) != len(expected):
        return "FAIL", f"{len(found)} slices trained of {len(expected)}"
    off, near = [abs(a - b) / b for a, b in zip(found, expected, strict=True)], NEAR[case.bits]
    # a NaN is near nothing, and no maximum
    word = "PASS" if all(share <= near for share in off) else "FAIL"
    return word, f"log loss off by {', '.join(f'{share:.5f}' for share in off)} of it (allowed {near})"


def markdown(rows: list[dict[str, Any]], ranks: int, device: str) -> str:
    count = {word: sum(r["verdict"] == word for r in rows) for word in ("PASS", "FAIL", "REFUSED")}
    m = machine()
    lines = [
        f"{ranks} ranks on {device} ({m['device']}, torch {m['torch']}, {m['date']}) beside one rank on the CPU: "
        + ", ".join(f"{n} {word}" for word, n in count.items()),
        "",
        "| case | verdict | why | s |",
        "|---|---|---|---|",
        *(f"| {r['case']} | {r['verdict']} | {r['why'].replace('|', '/')} | {r['seconds']:.0f} |" for r in rows),
    ]
    return "\n".join([*lines, ""])


def ranks_of(device: str, asked: int) -> int:
    """UserError on a host that cannot answer the question."""
    if device == "cpu":
        return asked or LEAST_GPUS
    found = torch.cuda.device_count()
    if found < max(LEAST_GPUS, asked):
        raise UserError(
            f"this host has {found} CUDA device(s); bench multigpu compares at least {max(LEAST_GPUS, asked)} with one rank; run it on a "
            "host with more, or try the script itself with --device cpu"
        )
    return asked or found


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="exfm bench multigpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=0, help="default: all GPUs of this host")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--rows", type=int, default=8192, help="examples of each of three slices")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/multigpu"))
    o = parser.parse_args(args)
    ranks = ranks_of(o.device, o.ranks)
    wanted = [case for case in cases(ranks) if o.only in case.name]
    if not wanted:
        raise UserError(f"no case has '{o.only}' in its name; there are: {'; '.join(c.name for c in cases(ranks))}")
    stream, jobs = o.out / f"stream-{o.rows}", o.out / time.strftime("jobs-%Y%m%d-%H%M%S")
    if not (stream / "stream.json").exists():
        synth(str(stream), num_slices=3, rows_per_slice=o.rows, seed=0)
    code, said, expected = train({}, 1, "cpu", stream, jobs / "reference")
    if code:
        raise RuntimeError(f"the reference, one rank on the CPU, ended with {code}: {said}")
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(wanted):
        begun = time.monotonic()
        word, why = verdict(case, *train(case.settings, ranks, o.device, stream, jobs / str(number)), expected)
        rows.append({"case": case.name, "verdict": word, "why": why, "seconds": time.monotonic() - begun})
        say(f"{word} {case.name}: {why}")
    (o.out / "multigpu.json").write_text(json.dumps({"ranks": ranks, "device": o.device, "rows": rows}, indent=1))
    (o.out / "multigpu.md").write_text(text := markdown(rows, ranks, o.device))
    print(text)
    return 1 if any(r["verdict"] == "FAIL" for r in rows) else 0
