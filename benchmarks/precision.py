"""What 16 bits cost in NE: `exfm bench precision [--seeds N] [--slices N]`, the MovieLens teacher on 2 ranks.

Every setting of docs/engines.md that this device has, each with the same seeds, against fp32 with them. The difference is paired by
seed; beside it what another seed alone makes. Writes precision.json and precision.md under --out.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks._movielens import movielens
from benchmarks.plan import say

ROOT = Path(__file__).parents[1]
SENT = {"precision.embeddings_forward": "fp16", "precision.embeddings_backward": "fp16"}
FSDP = {"dense_engine.kind": "fsdp"}
SETTINGS: dict[str, dict[str, str]] = {
    "fp32": {},
    "fp32, fsdp": FSDP,
    "bf16 products": {"precision.dense": "bf16"},
    "bf16 gradients, fsdp": {**FSDP, "precision.gradients": "bf16"},
    "fp16 embeddings sent": SENT,
    "fp16 rows": {},
    "all of these": {**FSDP, **SENT, "precision.dense": "bf16", "precision.gradients": "bf16"},
}
TABLES = ("user", "movie", "gender", "age", "occupation", "zip3", "year", "genres", "history", "disliked")
ROWS = {f"tables.{name}.dtype": "fp16" for name in TABLES}
for name in ("fp16 rows", "all of these"):
    SETTINGS[name] = SETTINGS[name] | ROWS


def train(setting: str, seed: int, stream: Path, folder: Path, slices: int) -> dict[str, Any]:
    """NE and examples per second of one run; one that is there already is not run again."""
    summary = folder / "summary.json"
    if not summary.exists():
        sets = SETTINGS[setting] | {
            "stream.path": str(stream),
            "stream.last": str(slices),
            "run.folder": str(folder),
            "run.seed": str(seed),
            "distillation": "{}",
            "sharding.allowed": "[table_wise, row_wise]",
        }
        options = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        config = str(ROOT / "configs/movielens_teacher.yaml")
        command = [sys.executable, "-m", "exfm.launch.cli", "train", config, "--nproc", "2", *options]
        subprocess.run(command, check=True, capture_output=True)
    found = json.loads(summary.read_text())
    return {"ne": found["groups"]["all"]["liked"]["ne"], "examples_per_s": found["examples"] / found["seconds"]}


def markdown(rows: dict[str, list[dict[str, Any]]], slices: int) -> str:
    base = [r["ne"] for r in rows["fp32"]]
    spread = statistics.stdev(base) if len(base) > 1 else float("nan")
    lines = [
        f"MovieLens-1M teacher, first {slices} of 50 slices, 2 ranks, {len(base)} seeds. Another seed alone moves NE by {spread:.5f} (standard deviation).",
        "",
        "| setting | NE | difference to fp32, paired by seed | examples/s, by fp32's |",
        "|---|---|---|---|",
    ]
    speed = statistics.median(r["examples_per_s"] for r in rows["fp32"])
    for setting, runs in rows.items():
        differences = [r["ne"] - b for r, b in zip(runs, base, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
        own = statistics.median(r["examples_per_s"] for r in runs) / speed
        lines.append(
            f"| {setting} | {statistics.mean(r['ne'] for r in runs):.5f} | {statistics.mean(differences):+.5f} ± {error:.5f} | {own:.2f} |"
        )
    return "\n".join([*lines, ""])


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench precision", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slices", type=int, default=20, help="of 50")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/precision"))
    o = parser.parse_args(args)
    stream = movielens(o.out, data_dir, "precision")
    rows: dict[str, list[dict[str, Any]]] = {}
    for setting in SETTINGS:
        for seed in range(o.seeds):
            folder = o.out / f"{setting.replace(', ', '-').replace(' ', '-')}-{seed}"
            rows.setdefault(setting, []).append(train(setting, seed, stream, folder, o.slices))
            say(f"{setting}, seed {seed}: NE {rows[setting][-1]['ne']:.5f}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    (o.out / "precision.json").write_text(json.dumps({"device": device, "slices": o.slices, "rows": rows}, indent=1))
    (o.out / "precision.md").write_text(text := markdown(rows, o.slices))
    print(text)
    return 0
