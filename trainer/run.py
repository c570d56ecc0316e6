"""Running one job in this process: the entry point of a rank and of in-process runs."""

import fcntl
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from exfm.checkpoints.saver import SaveError
from exfm.checkpoints.storage import Storage
from exfm.data.commit import commit, open_folder
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.sharding.plan import Plan
from exfm.trainer.config import JobConfig, RunConfig, check_against_stream, check_ranks
from exfm.trainer.ending import DONE, FAILED, STOPPED, WRONG_INPUT, decided, exit_folder, write_exit
from exfm.trainer.env import RankEnv, pick_device, process_group
from exfm.trainer.fits import Needs, check_batch
from exfm.trainer.guard import BadLoss, Position, recover
from exfm.trainer.loop import Job
from exfm.trainer.planning import plan_here
from exfm.trainer.preflight import preflight
from exfm.trainer.score_config import ScoreConfig
from exfm.trainer.scorer import run_score
from exfm.trainer.steps import check_pipeline
from exfm.trainer.watch import JOINING, RESTORING, Doing, RankLost, Watch


def run_job(
    config: JobConfig, env: RankEnv, should_stop: Callable[[], bool] = lambda: False, watch: Watch | None = None
) -> int:
    """Train to the end or a stop; DONE or STOPPED. UserError, SaveError, BadLoss or RankLost where it cannot go on."""
    planned, needs = _planned(config, env)
    with joined(config.run, env, watch) as (device, doing):
        preflight(config, env, device, needs)
        with _commits_lock(config, env):
            return _attempts(config, env, device, should_stop, doing, planned)


def run_preflight(config: JobConfig | ScoreConfig, env: RankEnv, watch: Watch | None = None) -> int:
    """Only what comes before the model is built: DONE, or UserError as run_job. Leaves a page in <run>/logs."""
    needs = None if isinstance(config, ScoreConfig) else _planned(config, env)[1]
    with joined(config.run, env, watch) as (device, _):
        preflight(config, env, device, needs, whole_page=True)
    return DONE


def _planned(config: JobConfig, env: RankEnv) -> tuple[tuple[Plan, str], Needs]:
    """The plan of a job and what it takes. UserError for all that a rank can know to be wrong alone."""
    check_ranks(config, env.world_size)
    check_against_stream(config, open_stream(config.stream.path, config.stream.labels))
    chosen = pick_device(config.run.device, env)
    config.dense_engine.check_machine(chosen.type)
    config.precision.check(chosen, config.dense_engine.kind)
    config.precision.set_products()
    check_pipeline(config.run.pipeline, chosen)
    planned = plan_here(config, chosen.type, env.world_size, env.local_world_size, Path(config.run.folder))
    return planned, check_batch(config, planned[0], env.world_size)


def _attempts(
    config: JobConfig,
    env: RankEnv,
    device: torch.device,
    should_stop: Callable[[], bool],
    doing: Doing,
    planned: tuple[Plan, str],
) -> int:
    """Train, from the last commit again after a bad loss."""
    failure: tuple[str, Position] | None = None
    for left in reversed(range(config.run.max_restores + 1)):
        try:
            return _attempt(config, env, device, should_stop, doing, failure, planned)
        except BadLoss as error:
            if left == 0 or config.run.on_bad_loss == "fail":
                raise
            failure = str(error), error.position
        # the failed attempt's model is gone before the next one is built: two may not fit
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def run_scorer(
    config: ScoreConfig,
    env: RankEnv,
    follow: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Watch | None = None,
) -> int:
    """Score to the end or a stop; DONE or STOPPED. follow: wait for slices and snapshots that are not there yet."""
    with joined(config.run, env, watch) as (device, doing):
        preflight(config, env, device, None)
        if env.rank == 0:
            _save_config(config)
        return DONE if run_score(config, env, device, follow, should_stop, doing) else STOPPED


@contextmanager
def joined(run: RunConfig, env: RankEnv, watch: Watch | None) -> Iterator[tuple[torch.device, Doing]]:
    """This rank among the others, in a run folder that is theirs alone; its device and what it tells the watch."""
    device = pick_device(run.device, env)
    torch.set_num_threads(run.threads_per_rank)
    doing = watch.doing if watch else Doing()
    doing.phase = JOINING
    with (
        process_group(env, device, run.timeout_s),
        watch.joined() if watch else nullcontext(),
        run_lock(run, env),
    ):
        yield device, doing


def _attempt(
    config: JobConfig,
    env: RankEnv,
    device: torch.device,
    should_stop: Callable[[], bool],
    doing: Doing,
    failure: tuple[str, Position] | None,
    planned: tuple[Plan, str],
) -> int:
    """failure: the bad loss, and where it was noticed, that ended the attempt before."""
    job = Job(config, env, device, should_stop, doing, planned)
    try:
        doing.phase = RESTORING
        resumed = job.commits.restore()
        if failure:
            recover(job, *failure, resumed)
        if env.rank == 0:
            _save_config(config)
        return DONE if job.train() else STOPPED
    finally:
        job.close()


@contextmanager
def run_lock(run: RunConfig, env: RankEnv) -> Iterator[None]:
    """Rank 0 holds <run>/lock while it runs. UserError where another job writes there."""
    if env.rank != 0:
        yield
        return
    folder = Path(run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        f = open(folder / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"run.folder {folder} cannot be written by rank 0 (host {socket.gethostname()}): {error.strerror}; make it writable "
            "there, or set another run.folder"
        ) from None
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another job is running in {folder}; wait for it, stop it, or set another run.folder"
            ) from None
        yield


def _commits_lock(config: JobConfig, env: RankEnv) -> AbstractContextManager[Any]:
    """Jobs of several run folders may name one checkpoint.folder: rank 0 locks it. UserError where another is in it."""
    if env.rank != 0 or not config.checkpoint.folder:
        return nullcontext()

    def lost() -> None:
        word = f"another job has taken the lock of {config.checkpoint.folder} while this one did not answer"
        write_exit(Path(config.run.folder), FAILED, word, env)
        print(f"exfm: {word}", file=sys.stderr, flush=True)
        os._exit(FAILED)  # at once: whatever it wrote now would fall into the other's commits

    owner = f"{config.run.name} of {Path(config.run.folder).absolute()} on {socket.gethostname()}"
    return Storage(config.checkpoint.folder, config.checkpoint.retries).lock(owner, lost)


def _save_config(config: JobConfig | ScoreConfig) -> None:
    fs, root = open_folder(config.run.folder)
    commit(fs, f"{root}/config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def rank_main(config: JobConfig | ScoreConfig, env: RankEnv, follow: bool = False, preflight_only: bool = False) -> int:
    """Run as one rank of a launched job: signals ask for a commit and exit code 75, exit.json says how it ended.

    follow: of a scorer, see run_scorer. preflight_only: see run_preflight; its exit.json is not that of the run.
    """
    folder = exit_folder(Path(config.run.folder), preflight_only)
    if (code := decided(folder, env)) is not None:
        return code
    if env.rank == 0 and env.attempt == 0:
        with suppress(OSError):  # where it cannot be removed, run_lock says why
            (folder / "exit.json").unlink()  # of an earlier launch
    asked: list[bool] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    watch = Watch(config.run, env, lambda word: write_exit(folder, FAILED, word, env, where=watch.doing.where()))
    final = False
    with watch.running():
        try:
            if preflight_only:
                code, message = run_preflight(config, env, watch), ""
            elif isinstance(config, ScoreConfig):
                code, message = run_scorer(config, env, follow, lambda: bool(asked), watch), ""
            else:
                code, message = run_job(config, env, lambda: bool(asked), watch), ""
        except UserError as error:
            code, message = WRONG_INPUT, str(error)
        except (SaveError, BadLoss, RankLost) as error:
            code, message = FAILED, str(error)
            final = isinstance(error, BadLoss)
        except Exception as error:
            traceback.print_exc()
            code, message = FAILED, f"{type(error).__name__}: {error}"
    write_exit(folder, code, message, env, final or code in (WRONG_INPUT, STOPPED), watch.doing.where())
    if message and code != DONE:
        print(f"exfm: {message}", file=sys.stderr, flush=True)
    return code
