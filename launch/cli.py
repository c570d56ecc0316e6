"""The `exfm` command. Reads the user's environment; every command takes --json for machines.

Exit codes: 0 done, 2 the user's input is wrong, 1 anything else, 75 stopped early with everything committed.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from exfm.data.commit import null_for_nan
from exfm.data.errors import UserError
from exfm.launch.cli_checkpoint import checkpoint_app
from exfm.launch.cli_launch import cancel, launch_app, logs, resume, status

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train huge sparse teachers and distil them into small students.",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare, make, look at and audit streams.")
app.add_typer(data_app, name="data")
app.add_typer(launch_app, name="launch")
for command in (status, logs, cancel, resume):
    app.command()(command)
app.add_typer(checkpoint_app, name="checkpoint")

Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
PreflightOnly = Annotated[
    bool, typer.Option("--preflight-only", help="start the ranks, see whether the job could go on, and train nothing")
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the config")]
console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
CHECKOUT = Path(__file__).resolve().parents[1]


def _print(value: Any) -> None:
    print(json.dumps(null_for_nan(value), indent=1, default=str))


class Bars:
    """Progress of preparation: a Rich bar on a terminal, a line per five seconds elsewhere."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, message: str, done: int, total: int) -> None:
        end = "\n" if done >= total else "\r"
        if console.is_terminal:
            width = 30
            filled = width * done // max(total, 1)
            console.print(
                f"{message} [{'=' * filled}{' ' * (width - filled)}] {done:,}/{total:,}", end=end, markup=False
            )
        elif time.monotonic() - self.said > 5 or done >= total:
            self.said = time.monotonic()
            console.print(f"{message}: {done:,}/{total:,}", highlight=False)


@app.command()
def demo(
    data: Annotated[str | None, typer.Option(help="ml1m, synth, or a folder with MovieLens-1M's files")] = None,
    out: Annotated[Path, typer.Option(help="folder for everything")] = Path("runs/demo"),
    nproc: Annotated[int, typer.Option(help="ranks of the teacher; default: one per GPU, else 2")] = 0,
    as_json: Json = False,
) -> None:
    """The whole loop, small: teacher, supervision, students, report."""
    from exfm.launch.demo import run_demo

    ranks = nproc or _default_ranks()
    comparison, report = run_demo(data, out, ranks, os.environ, os.environ.get("EXFM_DATA_DIR"), console, Bars())
    if as_json:
        _print({"report": str(report.resolve()), **comparison.as_dict()})


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() or 2


@app.command()
def train(
    config: Path,
    nproc: Annotated[int, typer.Option(help="ranks on this machine")] = 1,
    max_restarts: Annotated[int, typer.Option(help="restarts from the last commit after a rank has failed")] = 3,
    preflight_only: PreflightOnly = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Run one job, teacher or student; resumes by itself from its last commit."""
    from exfm.launch.local import LocalJob, run_jobs
    from exfm.launch.preflighting import run_preflight
    from exfm.launch.progress import JobView

    job = LocalJob(config, nproc, tuple(sets or ()), max_restarts)
    if preflight_only:
        raise typer.Exit(run_preflight(job, os.environ, as_json))
    with JobView(console, job.job.run.log_every_s) as view:
        code = run_jobs([job], os.environ, view)
    if as_json and code == 0:
        _print(json.loads((job.folder / "summary.json").read_text()))
    raise typer.Exit(code)


@app.command()
def score(
    config: Path,
    nproc: Annotated[int, typer.Option(help="ranks on this machine")] = 1,
    follow: Annotated[
        bool, typer.Option("--follow", help="wait for slices and snapshots that are not there yet")
    ] = False,
    max_restarts: Annotated[int, typer.Option(help="restarts after a rank has failed")] = 3,
    preflight_only: PreflightOnly = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Log a teacher's predictions of slices whose labels need not exist yet; goes on where it stopped."""
    from exfm.launch.local import LocalJob, run_jobs
    from exfm.launch.preflighting import run_preflight
    from exfm.launch.progress import JobView
    from exfm.trainer.score_config import ScoreConfig

    job = LocalJob(config, nproc, tuple(sets or ()), max_restarts, follow)
    if not isinstance(job.job, ScoreConfig):
        raise UserError(f"{config} has no section 'score'; it is a job for `exfm train`")
    if preflight_only:
        raise typer.Exit(run_preflight(job, os.environ, as_json))
    with JobView(console, job.job.run.log_every_s) as view:
        code = run_jobs([job], os.environ, view)
    if as_json and code == 0:
        _print(json.loads((job.folder / "summary.json").read_text()))
    raise typer.Exit(code)


@app.command()
def stream(
    config: Annotated[Path, typer.Argument(help="YAML: jobs: [{config: FILE, nproc: N, set: [k=v]}]")],
    nproc: Annotated[int, typer.Option(help="ranks of the first job, if the file does not say")] = 1,
    as_json: Json = False,
) -> None:
    """Run a teacher and its students together on this machine."""
    from exfm.launch.local import run_jobs
    from exfm.launch.pipeline import load_pipeline
    from exfm.launch.progress import JobView

    jobs = load_pipeline(config, nproc)
    with JobView(console) as view:
        code = run_jobs(jobs, os.environ, view)
    if as_json and code == 0:
        _print({j.name: json.loads((j.folder / "summary.json").read_text()) for j in jobs})
    raise typer.Exit(code)


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="a job's config; not with --compare")] = None,
    world_size: Annotated[int, typer.Option(help="ranks")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="ranks per node")] = 8,
    gpu: Annotated[str, typer.Option(help="a100-80g, h100, h200, b200, or a YAML of `exfm bench topology`")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda",
    replicas: Annotated[int | None, typer.Option(help="copies of all tables (2D parallelism)")] = None,
    local_batch: Annotated[
        int | None, typer.Option(help="examples of a rank and step; default: the config's global batch over the ranks")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the plan, for sharding.plan of a job, and a page beside it")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="two plans side by side: writes --out, default plan.html"),
    ] = None,
    dry_run_rank: Annotated[
        str, typer.Option(help="a rank, or worst: build it here and step it among loopback peers")
    ] = "",
    steps: Annotated[int, typer.Option(help="of the dry run")] = 5,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Plan where tables go, whether they fit and what a step costs; needs no GPU and no process group."""
    from exfm.launch.planning import plan_config, render, summary
    from exfm.launch.report.planned import write_plan_page
    from exfm.sharding.plan import read_plan

    if compare is not None:
        page = write_plan_page(out or Path("plan.html"), [(p.stem, read_plan(p)) for p in compare])
        return _print({"report": str(page)}) if as_json else print(page)
    if config is None:
        raise UserError("exfm plan needs a job's config, or --compare A.json B.json")
    if dry_run_rank:
        from exfm.launch import dryrun

        dryrun.check(dry_run_rank, steps, max(1, world_size // (replicas or 1)))
    planned = plan_config(config, sets or [], world_size, gpus_per_node, gpu, device, replicas, local_batch)
    if out is not None:
        planned.plan.write(out)
        write_plan_page(out.with_suffix(".html"), [(config.stem, planned.plan)])
    if not as_json:
        Console(width=None if sys.stdout.isatty() else 140).print(render(planned), highlight=False)
    if not dry_run_rank:
        if as_json:
            _print(summary(planned))
        return
    found = dryrun.dry_run_rank(planned, dry_run_rank, steps)
    if as_json:
        _print(summary(planned) | {"dry_run": found})
    else:
        print("\n".join(dryrun.lines(planned, found)))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run's folder")], as_json: Json = False) -> None:
    """Write RUN/report.html, a self-contained page."""
    from exfm.launch.report import write_report

    if not (run / "summary.json").exists():
        raise UserError(f"{run} has no summary.json; give the folder of a finished run")
    path = write_report(run / "report.html", [run], None, f"exfm run {run.name}")
    _print({"report": str(path)}) if as_json else print(path)


@app.command()
def export(
    where: Annotated[
        str, typer.Argument(metavar="RUN|CONFIG", help="a run's folder, one of its commits, or its config")
    ],
    out: Annotated[Path, typer.Option(help="a new folder")],
    rows: Annotated[str, typer.Option(help="how tables are stored: fp32, fp16 or int8")] = "fp32",
    as_json: Json = False,
) -> None:
    """Write a run's newest commit for serving, without distillation heads, and check that its logits are the trained model's."""
    from exfm.launch.exporting import export_model, lines

    spec = export_model(where, out, rows, Bars())
    _print(spec) if as_json else print("\n".join(lines(out, spec)))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is wrong with this machine's installation, and the fix."""
    from exfm.launch.doctor import run

    raise typer.Exit(run(json=as_json))


# --help after a name is the benchmark's own
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    no_args_is_help=True,
)
def bench(
    context: typer.Context, name: Annotated[str, typer.Argument(help="a file of benchmarks/, for instance distill")]
) -> None:
    """Run a measurement of benchmarks/; further options are its own (NAME --help)."""
    names = sorted(p.stem for p in (CHECKOUT / "benchmarks").glob("*.py") if not p.stem.startswith("_"))
    if name == "--help":
        print(f"{context.get_help()}\nThere are: {', '.join(names)}")
        return
    if not names:
        raise UserError("benchmarks/ is not here; run `exfm bench` from a checkout of exfm")
    if name not in names:
        raise UserError(f"there is no benchmark '{name}'; there are: {', '.join(names)}")
    sys.path.insert(0, str(CHECKOUT))
    module = importlib.import_module(f"benchmarks.{name}")
    raise typer.Exit(module.main(context.args, data_dir=os.environ.get("EXFM_DATA_DIR")))


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="ml1m, criteo, frappe or parquet")],
    out: Annotated[Path, typer.Option(help="folder of the new stream")],
    source: Annotated[
        Path | None, typer.Option(help="publisher's folder or Parquet file(s); ml1m without it is downloaded")
    ] = None,
    schema: Annotated[Path | None, typer.Option(help="schema YAML (parquet)")] = None,
    slices: Annotated[int, typer.Option(help="number of slices of about equal size; frappe: of training")] = 50,
    rows: Annotated[int, typer.Option(help="examples per slice (criteo)")] = 1_000_000,
    epochs: Annotated[int, typer.Option(help="how many times the training examples are written (frappe)")] = 1,
    window_s: Annotated[int | None, typer.Option(help="seconds per slice instead of --slices (parquet)")] = None,
    drop_extra: Annotated[bool, typer.Option(help="ignore columns that the schema does not name (parquet)")] = False,
    as_json: Json = False,
) -> None:
    """Turn a data set into a stream of slices."""
    from exfm.data import criteo, frappe, movielens, parquet
    from exfm.data.inspect import inspect

    if name == "ml1m":
        found = source or movielens.download(out.parent / "download", Bars())
        movielens.prepare(str(found), str(out), num_slices=slices, progress=Bars())
    elif name in ("criteo", "frappe"):
        if source is None:
            raise UserError(
                f"data prepare {name} needs --source; it cannot be downloaded without its publisher's consent"
            )
        if name == "criteo":
            criteo.prepare_criteo(source, str(out), rows, Bars())
        else:
            frappe.prepare_frappe(source, str(out), slices, Bars(), epochs)
    elif name == "parquet":
        if source is None or schema is None:
            raise UserError("data prepare parquet needs --source FILE|FOLDER and --schema FILE")
        cut: dict[str, int] = {"window_s": window_s} if window_s is not None else {"num_slices": slices}
        parquet.prepare_parquet(source, schema, str(out), drop_extra=drop_extra, progress=Bars(), **cut)
    else:
        raise UserError(
            f"there is no data set '{name}'; use ml1m, criteo, frappe, or parquet with a schema of your own"
        )
    if as_json:
        _print(inspect(str(out)))


@data_app.command("synth")
def data_synth(
    out: Annotated[Path, typer.Option(help="folder of the new stream")],
    slices: int = 20,
    rows: Annotated[int, typer.Option(help="examples per slice")] = 20_000,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Make a seeded stream whose Bayes-optimal NE is known."""
    from exfm.data.inspect import inspect
    from exfm.data.synth import synth

    synth(str(out), num_slices=slices, rows_per_slice=rows, seed=seed, progress=Bars())
    if as_json:
        _print(inspect(str(out)))


@data_app.command("join")
def data_join(
    config: Annotated[Path, typer.Argument(help="YAML: inbox, out, schema_file, slice_s, label_windows, ...")],
    follow: Annotated[bool, typer.Option(help="wait for more, until all slices are labelled")] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Turn feature rows, and labels that arrive later, into a stream: labels are committed when their window closes."""
    from exfm.launch.joining import run_join

    code, counted = run_join(config, sets or [], follow, console)
    if as_json:
        _print(counted)
    raise typer.Exit(code)


@data_app.command("replay")
def data_replay(
    stream: Path,
    inbox: Annotated[Path, typer.Option(help="folder for the files that `data join` reads")],
    delay: Annotated[
        list[str] | None, typer.Option(metavar="TASK=SECONDS", help="how late a task's labels come")
    ] = None,
) -> None:
    """Turn a finished stream into an inbox of feature rows and label events, to try `data join` with."""
    from exfm.launch.joining import run_replay

    run_replay(stream, inbox, delay or [])


@data_app.command("inspect")
def data_inspect(folder: Path, as_json: Json = False) -> None:
    """Describe a stream: schema, slices, features."""
    from exfm.data.inspect import inspect, render

    found = inspect(str(folder))
    _print(found) if as_json else Console().print(render(found))


@data_app.command("stats")
def data_stats(
    folder: Annotated[Path, typer.Argument(metavar="STREAM")],
    out: Annotated[Path, typer.Option(help="YAML file to write")],
    batch: Annotated[int, typer.Option(help="examples of one batch, in which ids are looked up once")] = 4096,
    slices: Annotated[str | None, typer.Option(metavar="A:B", help="slices A to B - 1; default: all")] = None,
    max_examples: Annotated[int, typer.Option(help="read no more; memory grows with the distinct ids")] = 2_000_000,
    as_json: Json = False,
) -> None:
    """Measure how a stream looks up its tables, for the planner."""
    from exfm.data.manifest import open_stream
    from exfm.data.stats import measure, render, slices_given, write_stats

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it, for instance {out / 'stats.yaml'}")
    stream = open_stream(str(folder))
    found = measure(stream, None, *slices_given(stream, slices), batch, max_examples, Bars())
    write_stats(out, found)
    _print(found.model_dump(mode="json")) if as_json else Console().print(render(found))


@data_app.command("audit")
def data_audit(run: Annotated[Path, typer.Argument(help="a run's folder")], as_json: Json = False) -> None:
    """Prove from the ledger that the run repeated no example, and skipped none but those it says it left out."""
    from exfm.launch.auditing import audit_run

    result = audit_run(run)
    if as_json:
        _print(result)
    else:
        skipped = f"{result['skipped']:,} left out after a bad loss" if result["skipped"] else "none skipped"
        print(f"{run}: {result['examples']:,} examples in {result['slices']} slices, {skipped}, none repeated")


def main() -> None:
    """Entry point: turns errors into one message and an exit code."""
    try:
        app()
    except UserError as error:
        console.print(f"[bold red]exfm:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(75)
    except Exception as error:
        if os.environ.get("EXFM_TRACEBACK"):
            raise
        console.print(f"[bold red]exfm:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error) or type(error).__name__)


if __name__ == "__main__":
    main()
