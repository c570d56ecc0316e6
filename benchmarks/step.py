"""The anatomy of a training step: `exfm bench step [--config FILE] [--set KEY=VALUE] [--nproc N] [--pipelines base,sparse_dist]`.

Runs the job as `exfm train` would, once for each pipeline, and follows some of its steps with torch.profiler: a Chrome trace of every rank (open it in
Perfetto), a table of where a step's time is exposed, and one sentence that names the bottleneck and what to change. --run FOLDER
reads the traces of a job that was run with `run.trace`. Without --config the MovieLens teacher's. The step's time is that of the steps that were
not traced. Writes step.json, ratios.json and step.md under --out.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks._movielens import movielens
from benchmarks._step_trace import (
    COLLECTIVES,
    COPIES,
    ELEMENTWISE,
    HOST,
    OPTIMIZER,
    PRODUCTS,
    TABLES,
    analyse,
    read_trace,
)
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.trainer.anatomy import IN_STEP, STAGES
from exfm.trainer.anatomy import REMEDIES as STAGE_REMEDIES
from exfm.trainer.config import JobConfig, load_config
from exfm.trainer.trace import trace_path

ROOT = Path(__file__).parents[1]
REMEDIES = {
    PRODUCTS: "it is bound by its own dense products: precision.dense: bf16 on hardware that has it, a smaller model, or more ranks",
    ELEMENTWISE: "dense_engine.compile: true fuses norms and activations",
    TABLES: "fewer or narrower tables, fp16 rows, fewer ids per example (`exfm data stats`), a plan that spreads them (`exfm plan`)",
    COLLECTIVES: "run.pipeline: sparse_dist hides the exchange of ids, precision.embeddings_* and gradients in 16 bits halve what is sent",
    COPIES: "run.pipeline: sparse_dist copies the next batch while this one is computed",
    OPTIMIZER: "a larger stream.global_batch takes fewer steps; dense_engine.kind: fsdp cuts it over ranks",
    HOST: "a larger stream.global_batch, or dense_engine.compile: true, which calls fewer operators",
    **{stage: word for stage, word in STAGE_REMEDIES.items() if stage not in IN_STEP},
}


def sentence(kinds: dict[str, float]) -> str:
    total = sum(kinds.values())
    kind, seconds = max(kinds.items(), key=lambda item: item[1])
    return f"Bottleneck: {kind}, {seconds / total:.0%} of the step; {REMEDIES[kind]}."


def follow(config: JobConfig, sets: list[str], path: Path, folder: Path, pipeline: str, o: argparse.Namespace) -> None:
    """Run the job until its traced steps are done."""
    stream = open_stream(config.stream.path, config.stream.labels)
    # half of the steps after the first ones are traced, half give the time of a step
    wanted, steps, last = o.first + 2 * o.steps, 0, config.stream.first
    while steps < wanted and last < (stream.info.num_slices or 0):
        manifest = stream.manifest(last, "features")
        assert manifest is not None
        steps += -(-manifest.rows // config.stream.global_batch)
        last += 1
    if steps < wanted:
        raise UserError(f"{stream.root} has {steps} steps of {config.stream.global_batch} examples; {wanted} are needed: lower --first or --steps")  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    own = [
        f"run.folder={folder}",
        f"run.pipeline={pipeline}",
        f"run.trace.first={o.first + o.steps}",
        f"run.trace.steps={o.steps}",
    ]
    own += [f"stream.last={last}", "checkpoint.every_slices=1000000", "run.log_every_s=0.01"]
    command = [sys.executable, "-m", "exfm.launch.cli", "train", str(path), "--nproc", str(o.nproc)]
    for item in [*sets, *own]:
        command += ["--set", item]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"the job of {path} failed; its words are above and in {folder}/logs")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untraced(folder: Path, first: int, steps: int) -> float:
    """Seconds of a step by the marks of rank 0, over the steps before the traced ones."""
    seconds, counted, before = 0.0, 0, 0
    for line in lines_of(folder):
        if line["kind"] not in ("progress", "slice"):
            continue
        if first < line["step"] <= first + steps:
            seconds += sum(line["stages"][s] for s in (*IN_STEP, "reading", "bookkeeping"))
            counted += line["step"] - before
        before = line["step"]
    return seconds / counted if counted else float("nan")


def measure(folder: Path) -> dict[str, Any]:
    """Of all ranks that left a trace; the slowest in compute decides, so every rank is shown."""
    traces = sorted((folder / "logs").glob("trace-rank*.json.gz"))
    if not traces:
        raise UserError(
            f"{folder}/logs has no trace; run the job with --set run.trace.first=20 --set run.trace.steps=10"
        )
    return {"ranks": [analyse(read_trace(trace_path(folder, rank))) for rank in range(len(traces))]}


def markdown(runs: dict[str, dict[str, Any]]) -> str:
    out: list[str] = []
    for name, run in runs.items():
        ranks = run["ranks"]
        out += [f"### {name}", ""]
        out.append(
            "| exposed, ms of a step | " + " | ".join(f"rank {r}" for r in range(len(ranks))) + " | share of rank 0 |"
        )
        out.append("|---|" + "---|" * (len(ranks) + 1))
        total = ranks[0]["step_s"]
        for kind in sorted(ranks[0]["kinds"], key=lambda k: -ranks[0]["kinds"][k]):
            cells = " | ".join(f"{1000 * r['kinds'].get(kind, 0.0):.1f}" for r in ranks)
            out.append(f"| {kind} | {cells} | {ranks[0]['kinds'][kind] / total:.1%} |")
        out.append("| a step, traced | " + " | ".join(f"{1000 * r['step_s']:.1f}" for r in ranks) + " | |")
        if "untraced_s" in run:
            out.append(f"| a step, not traced | {1000 * run['untraced_s']:.1f} |" + " |" * len(ranks))
        out += ["", "| stage of rank 0 | ms of a step | |", "|---|---|---|"]
        out += [
            f"| {s} | {1000 * ranks[0]['stages'].get(s, 0.0):.1f} | {word} |"
            for s, word in STAGES.items()
            if s in ranks[0]["stages"]
        ]
        out += ["", sentence(ranks[0]["kinds"]), ""]
    return "\n".join(out)


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench step", description=__doc__)
    parser.add_argument("--config", type=Path, help="a job's; default: the MovieLens teacher's")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="override a key of the config")
    parser.add_argument("--run", type=Path, help="a job's folder that has traces; nothing is run")
    parser.add_argument("--nproc", type=int, default=1, help="ranks")
    parser.add_argument("--pipelines", default="base,sparse_dist", help="one run for each")
    parser.add_argument("--first", type=int, default=20, help="steps before the first one that counts")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed, and as many that are traced")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/step"))
    o = parser.parse_args(args)
    runs: dict[str, dict[str, Any]] = {}
    o.out.mkdir(parents=True, exist_ok=True)
    if o.run is not None:
        runs[str(o.run)] = measure(o.run)
    else:
        path, sets = o.config, list(o.sets)
        if path is None:
            path = ROOT / "configs/movielens_teacher.yaml"
            sets.append(f"stream.path={movielens(o.out, data_dir, 'step', '--config, or ')}")
        config = load_config(path, sets, JobConfig)
        for pipeline in o.pipelines.split(","):
            folder = o.out / pipeline
            follow(config, sets, path, folder, pipeline, o)
            word = (
                f"{config.run.name}, {o.nproc} rank(s), global batch {config.stream.global_batch}, pipeline {pipeline}"
            )
            runs[word] = measure(folder) | {"untraced_s": untraced(folder, o.first, o.steps)}
    (o.out / "step.json").write_text(json.dumps(runs, indent=1))
    first = {name: run["ranks"][0] for name, run in runs.items()}
    ratios = {f"{PRODUCTS} / step, {name}": r["kinds"].get(PRODUCTS, 0.0) / r["step_s"] for name, r in first.items()}
    (o.out / "ratios.json").write_text(json.dumps(ratios, indent=1))  # for `exfm bench guard`
    (o.out / "step.md").write_text(text := markdown(runs))
    print(text)
    return 0
