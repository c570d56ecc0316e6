"""What was launched on a cluster: <folder>/launch.json says which jobs, their scripts and SLURM's ids."""

import fcntl
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from exfm.data.commit import commit_json, open_folder
from exfm.data.errors import UserError
from exfm.launch.pipeline import Script
from exfm.launch.slurm import cluster
from exfm.launch.slurm.script import write_script
from exfm.trainer.ending import DONE, read_exit

FILE = "launch.json"
UNSAFE = re.compile(r"[^\w.-]+")


class Launched(BaseModel):
    """One job. script, task: the sbatch script that it is in and its place in an array (None: alone); after: names of jobs that must have
    ended well before; job_id: SLURM's, "4711" or "4711_0", None where it was not submitted. logs: folder of the script's output.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    config: str
    run_folder: str
    script: str
    task: int | None = None
    after: tuple[str, ...] = ()
    job_id: str | None = None
    logs: str
    ranks_per_node: int = 1


class Fleet(BaseModel):
    """The jobs of one `exfm launch slurm`, in an order in which each comes after those that it waits for."""

    model_config = ConfigDict(extra="forbid")
    name: str
    jobs: list[Launched]


def path_of(folder: Path) -> Path:
    return folder / FILE


def write_fleet(name: str, scripts: Sequence[Script], folder: Path, out: Path | None = None) -> Fleet:
    """Write the scripts, and launch.json into `folder`. out: of a single script. UserError where jobs of an earlier launch in this folder still wait or run."""
    with _locked(folder):
        if path_of(folder).exists() and cluster.has_slurm():
            old = read_fleet(folder)
            if live := [j.name for j in old.jobs if j.job_id and j.job_id in _live(old)]:
                raise UserError(
                    f"{folder}: {', '.join(live)} of an earlier launch still wait or run; `exfm cancel {folder}` first"
                )
        jobs = []
        for number, script in enumerate(scripts):
            file = (
                "job.sbatch"
                if len(scripts) == 1 and len(script.names) == 1
                else f"{number:02d}-{UNSAFE.sub('_', script.names[0])}.sbatch"
            )
            path = write_script(script.job, out or folder / file)
            for task, (own, member) in enumerate(zip(script.names, script.job.members, strict=True)):
                jobs.append(
                    Launched(
                        name=own,
                        config=str(member.config.absolute()),
                        run_folder=str(member.run_folder.absolute()),
                        script=str(path.absolute()),
                        task=task if len(script.names) > 1 else None,
                        after=script.after,
                        logs=str(script.job.log_folder),
                        ranks_per_node=script.job.nproc_per_node,
                    )
                )
        fleet = Fleet(name=name, jobs=jobs)
        _save(fleet, folder)
    return fleet


def submit_fleet(folder: Path, names: Sequence[str] = (), again: bool = False) -> list[Launched]:
    """Send what is not in the queue, or of it the jobs of these names; those that were sent, with their ids.

    again: also what has ended well, which goes on where there is more to do by now.
    """
    with _locked(folder):
        fleet = read_fleet(folder)
        live = _live(fleet)
        wanted = [j for j in chosen(fleet, names) if j.job_id not in live and (again or not ended_well(j))]
        for script in dict.fromkeys(j.script for j in wanted):
            own = [j for j in wanted if j.script == script]
            waits = [j for j in fleet.jobs if j.name in own[0].after and (j in wanted or not ended_well(j))]
            if lost := [j.name for j in waits if j.job_id is None]:
                raise UserError(f"{own[0].name} comes after {', '.join(lost)}, which was not submitted: submit it too")
            dependency = ",".join(f"afterok:{j.job_id}" for j in waits)
            tasks = None if own[0].task is None else [j.task for j in own]
            sent = cluster.submit(Path(script), dependency, tasks)
            for job in own:
                job.job_id = sent if job.task is None else f"{sent}_{job.task}"
            _save(fleet, folder)
    return wanted


def cancel_fleet(folder: Path, names: Sequence[str] = ()) -> list[str]:
    """Take jobs from the queue or end them; what they committed stays. The names of those that were live."""
    fleet = read_fleet(folder)
    live = _live(fleet)
    found = [j for j in chosen(fleet, names) if j.job_id in live]
    cluster.cancel([j.job_id for j in found if j.job_id is not None])
    return [j.name for j in found]


def chosen(fleet: Fleet, names: Sequence[str]) -> list[Launched]:
    """UserError for a name that no job has."""
    known = [j.name for j in fleet.jobs]
    if unknown := [n for n in names if n not in known]:
        raise UserError(f"there is no job {', '.join(unknown)}; there are: {', '.join(known)}")
    return [j for j in fleet.jobs if not names or j.name in names]


def read_fleet(folder: Path) -> Fleet:
    """UserError where nothing was launched into this folder."""
    try:
        return Fleet.model_validate_json(path_of(folder).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {FILE}; give the folder that `exfm launch slurm` named") from None
    except (OSError, ValidationError) as error:
        raise UserError(f"{path_of(folder)} cannot be read: {error}") from None


def ended_well(job: Launched) -> bool:
    word = read_exit(Path(job.run_folder))
    return word is not None and word["exit_code"] == DONE


def _live(fleet: Fleet) -> set[str]:
    found = cluster.jobs([j.job_id for j in fleet.jobs if j.job_id is not None])
    return {job_id for job_id, job in found.items() if job.live}


def _save(fleet: Fleet, folder: Path) -> None:
    fs, root = open_folder(str(folder))
    commit_json(fs, f"{root}/{FILE}", fleet.model_dump(mode="json"))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two commands at once would submit a job twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".launch.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
