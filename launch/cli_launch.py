"""`exfm launch slurm|torchrun`, `exfm status|logs|cancel|resume`: jobs on a cluster."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from exfm.data.errors import UserError

launch_app = typer.Typer(
    no_args_is_help=True, help="Start jobs on a cluster: sbatch scripts, torchrun on several hosts."
)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the config")]
Where = Annotated[Path, typer.Argument(metavar="FOLDER", help="the folder of a launch, or a run's folder")]
Names = Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="names of jobs; default: all")]


def _output() -> Any:
    from exfm.launch import cli  # which imports this file

    return cli


@launch_app.command("slurm")
def launch_slurm(
    config: Annotated[Path, typer.Argument(help="a job's YAML, or a pipeline's: jobs: [{config: FILE, after: [...], slurm: {nodes: 4}}]")],
    nodes: Annotated[int, typer.Option()] = 1,
    min_nodes: Annotated[int | None, typer.Option(help="go on with so few where nodes are lost; default: --nodes")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="0 trains on CPU")] = 8,
    nproc_per_node: Annotated[int, typer.Option(help="ranks per node; default: one per GPU")] = 0,
    cpus_per_rank: Annotated[int, typer.Option(help="cores")] = 4,
    max_restarts: Annotated[int, typer.Option(help="restarts inside one attempt after a rank has failed")] = 3,
    name: Annotated[str, typer.Option(help="default: run.name, or the pipeline file's")] = "",
    out: Annotated[Path | None, typer.Option(help="script to write (of a pipeline: folder); default: in the run's folder, runs/NAME")] = None,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    dependency: Annotated[str | None, typer.Option(help="as sbatch reads it: afterok:4711")] = None,
    time_limit: Annotated[str, typer.Option("--time", help="limit of one attempt")] = "24:00:00",
    stop_s: Annotated[int, typer.Option(help="seconds before that limit at which ranks commit and stop")] = 300,
    container: Annotated[str | None, typer.Option(help="image for srun's pyxis plugin (--container-image)")] = None,
    container_mounts: Annotated[str | None, typer.Option(help="for pyxis: HERE:THERE,...")] = None,
    env_file: Annotated[Path | None, typer.Option(help="shell assignments, read before the ranks start")] = None,
    extra: Annotated[list[str] | None, typer.Option("--sbatch", metavar="--OPTION=VALUE", help="a further option of sbatch")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="of a scorer: wait for what is not there yet")] = False,
    assume_shared: Annotated[bool, typer.Option("--assume-shared", help="all nodes see the run folder, whatever its file system is called")] = False,
    submit_it: Annotated[bool, typer.Option("--submit", help="send it to SLURM")] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write sbatch scripts that run, stop, requeue and resume by themselves; one for a job, one for each job of a pipeline."""
    from exfm.launch.fleet import submit_fleet, write_fleet
    from exfm.launch.pipeline import Script, is_pipeline, scripts_of
    from exfm.launch.slurm.cluster import check_cluster, check_shared, has_slurm
    from exfm.launch.slurm.job import Member, SlurmJob
    from exfm.trainer.config import read_raw
    from exfm.trainer.score_config import load_any

    pipeline = is_pipeline(read_raw(config, []))
    if pipeline and (sets or follow):
        raise UserError(f"{config} is a pipeline: write overrides into it (set: of a job); its scorers follow anyway")
    if pipeline:
        own = name or config.stem
        member, folder = Member(config, out or Path("runs") / own), out or Path("runs") / own
    else:
        run = load_any(config, sets or []).run
        own, folder = name or run.name, out.parent if out is not None else Path(run.folder)
        member = Member(config, Path(run.folder), tuple(sets or ()), follow)
    common = SlurmJob(
        members=(member,), nodes=nodes, min_nodes=min_nodes, gpus_per_node=gpus_per_node,
        nproc_per_node=nproc_per_node or max(gpus_per_node, 1), cpus_per_rank=cpus_per_rank, max_restarts=max_restarts, name=own,
        partition=partition, account=account, qos=qos, constraint=constraint, dependency=dependency, time=time_limit, stop_s=stop_s,
        container=container, mounts=container_mounts, env_file=env_file, extra=tuple(extra or ()),
        logs=folder / "logs" if pipeline else None, python=sys.executable,
    )  # fmt: skip
    scripts = scripts_of(config, common) if pipeline else [Script(common, (run.name,))]
    for script in scripts:
        _check_jobs(script)
        if has_slurm():
            check_cluster(script.job)
        for one in script.job.members:
            if not assume_shared:
                check_shared(one.run_folder)
    fleet = write_fleet(own, scripts, folder, out if out is not None and not pipeline else None)
    paths = list(dict.fromkeys(j.script for j in fleet.jobs))
    if submit_it and has_slurm():
        submit_fleet(folder, again=True)
        fleet = _read(folder)
    result = {"folder": str(folder), "scripts": paths, "jobs": {j.name: j.job_id for j in fleet.jobs}}
    if as_json:
        return _output()._print(result)  # type: ignore[no-any-return]
    print(*paths, sep="\n")
    for line in _next_steps(folder, fleet, submit_it):
        print(line)
    if submit_it and not has_slurm():
        raise typer.Exit(1)


def _check_jobs(script: Any) -> None:
    """What can be known to be wrong with a job before it waits in a queue."""
    from exfm.launch.local import LocalJob
    from exfm.trainer.score_config import ScoreConfig

    job = script.job
    for member in job.members:
        found = LocalJob(member.config, job.nproc_per_node * job.nodes, member.sets, follow=member.follow)
        # a scorer's or student's teacher may not have made anything yet
        if len(script.after) or isinstance(found.job, ScoreConfig) or found.job.distillation.learn is not None:
            continue
        found.check()


def _read(folder: Path) -> Any:
    from exfm.launch.fleet import read_fleet

    return read_fleet(folder)


def _next_steps(folder: Path, fleet: Any, submitted: bool) -> list[str]:
    if submitted and all(j.job_id for j in fleet.jobs):
        return [
            f"submitted: {', '.join(f'{j.name} as {j.job_id}' for j in fleet.jobs)}",
            f"look on: exfm status {folder}",
        ]
    if shutil.which("sbatch") is None:
        return [f"there is no sbatch on this machine; on a login node: exfm resume {folder}, or sbatch the script"]
    return [f"submit with: exfm resume {folder}, or sbatch the script"]


@launch_app.command("torchrun")
def launch_torchrun(
    config: Path,
    hosts: Annotated[str, typer.Option(help="host names, with commas; the first one keeps the rendezvous")],
    nproc_per_node: Annotated[int, typer.Option(help="ranks of each host")] = 8,
    port: Annotated[int, typer.Option(help="of the rendezvous on the first host")] = 29400,
    max_restarts: Annotated[int, typer.Option(help="restarts after a rank has failed")] = 3,
    follow: Annotated[bool, typer.Option("--follow", help="of a scorer")] = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Print the command for each host. Start them in any order, within ten minutes."""
    from exfm.launch.hosts import commands
    from exfm.launch.local import LocalJob

    job = LocalJob(config, nproc_per_node, tuple(sets or ()), max_restarts, follow)
    lines = commands(job, hosts.split(","), sys.executable, port)
    if as_json:
        return _output()._print(dict(lines))  # type: ignore[no-any-return]
    for host, line in lines:
        print(f"# on {host}\n{line}")


def status(
    folder: Where,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until all jobs have ended")] = False,
    every_s: Annotated[float, typer.Option("--every", help="seconds between two looks")] = 5.0,
    as_json: Json = False,
) -> None:
    """How the jobs of a launch, or a run, are: state, nodes, step, slice, examples/s, NE, lag, restarts, time left."""
    from rich.console import Console

    from exfm.launch import status as look

    if as_json:
        return _output()._print({"jobs": look.status(folder)})  # type: ignore[no-any-return]
    console = Console(width=None if sys.stdout.isatty() else 200)
    if follow and console.is_terminal:
        look.watch(folder, console, every_s)
        return
    while True:
        rows = look.status(folder)
        console.print(look.render(rows))
        if not follow or all(r["state"] in look.OVER for r in rows):
            return
        time.sleep(every_s)


def logs(
    folder: Where,
    names: Names = None,
    rank: Annotated[int | None, typer.Option(help="the log of this rank")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="of each file")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on as they grow")] = False,
) -> None:
    """The ends of what jobs have written: their scripts and nodes, or one rank."""
    from exfm.launch.status import log_files

    files = log_files(folder, names or [], rank)
    if follow:
        sys.stdout.flush()
        os.execvp("tail", ["tail", "-n", str(lines), "-F", *map(str, files)])
    for path in files:
        print(f"==> {path} <==")
        print("\n".join(path.read_text(errors="replace").splitlines()[-lines:]))


def cancel(folder: Where, names: Names = None, as_json: Json = False) -> None:
    """Take jobs out of the queue or end them; what they have committed stays, `exfm resume` goes on from there."""
    from exfm.launch.fleet import cancel_fleet

    found = cancel_fleet(folder, names or [])
    _output()._print({"cancelled": found}) if as_json else print(f"cancelled: {', '.join(found) or 'nothing was live'}")


def resume(folder: Where, names: Names = None, as_json: Json = False) -> None:
    """Send to SLURM what of a launch is not in its queue and has not ended well."""
    from exfm.launch.fleet import submit_fleet

    sent = {j.name: j.job_id for j in submit_fleet(folder, names or [])}
    if as_json:
        _output()._print({"submitted": sent})
    else:
        print(f"submitted: {', '.join(f'{n} as {i}' for n, i in sent.items()) or 'nothing was left to submit'}")
