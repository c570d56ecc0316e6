"""Running one job in this process: the entry point of a rank and of in-process runs."""

import fcntl
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from exfm.checkpoints.store import SaveError
from exfm.data.commit import commit, open_folder
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.trainer.config import JobConfig, check_against_stream, check_ranks
from exfm.trainer.env import RankEnv, pick_device, process_group
from exfm.trainer.loop import Job, NonFiniteLoss

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75


def run_job(config: JobConfig, env: RankEnv, should_stop: Callable[[], bool] = lambda: False) -> int:
    """Train to the end or a stop; DONE or STOPPED. UserError, SaveError or NonFiniteLoss where it cannot go on."""
    check_ranks(config, env.world_size)
    check_against_stream(config, open_stream(config.stream.path))
    device = pick_device(config.run.device, env)
    torch.set_num_threads(config.run.threads_per_rank)
    with process_group(env, device, config.run.timeout_s), run_lock(config, env):
        for attempt in range(config.run.max_restores + 1):
            try:
                return _attempt(config, env, device, should_stop)
            except NonFiniteLoss as error:
                if attempt == config.run.max_restores:
                    raise
                failure = str(error)
            # the failed attempt's model is gone before the next one is built: two may not fit
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"[{config.run.name}] {failure}; restoring the last commit", file=sys.stderr, flush=True)
    raise AssertionError("unreachable")


def _attempt(config: JobConfig, env: RankEnv, device: torch.device, should_stop: Callable[[], bool]) -> int:
    job = Job(config, env, device, should_stop)
    try:
        job.restore()
        if env.rank == 0:
            _save_config(config)
        return DONE if job.train() else STOPPED
    finally:
        job.log.close()


@contextmanager
def run_lock(config: JobConfig, env: RankEnv) -> Iterator[None]:
    """Rank 0 holds <run>/lock while it runs. UserError where another job is writing to the same folder."""
    if env.rank != 0:
        yield
        return
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another job is running in {folder}; wait for it, stop it, or set another run.folder"
            ) from None
        yield


def _save_config(config: JobConfig) -> None:
    fs, root = open_folder(config.run.folder)
    commit(fs, f"{root}/config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def rank_main(config: JobConfig, env: RankEnv) -> int:
    """Run as one rank of a launched job: signals ask for a commit and exit code 75, exit.json says how it ended."""
    asked: list[bool] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    try:
        code, message = run_job(config, env, lambda: bool(asked)), ""
    except UserError as error:
        code, message = WRONG_INPUT, str(error)
    except (SaveError, NonFiniteLoss) as error:
        code, message = FAILED, str(error)
    except Exception as error:
        traceback.print_exc()
        code, message = FAILED, f"{type(error).__name__}: {error}"
    _write_exit(Path(config.run.folder), code, message, env)
    if message and code != DONE:
        print(f"exfm: {message}", file=sys.stderr, flush=True)
    return code


def _write_exit(folder: Path, code: int, message: str, env: RankEnv) -> None:
    """exit.json of this launch, whole or not at all. The first rank that fails has its word; later ones fail because of it."""
    if code in (DONE, STOPPED) and env.rank != 0:
        return
    path, temporary = folder / "exit.json", folder / f"exit.json.{env.rank}"
    word = {"exit_code": code, "message": message, "rank": env.rank, "run_id": env.run_id}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if code == FAILED and _spoken(path, env.run_id):
            return
        temporary.write_text(json.dumps(word))
        os.replace(temporary, path)
    except OSError:  # a full disk must not hide the message, which is printed too
        temporary.unlink(missing_ok=True)


def _spoken(path: Path, run_id: str) -> bool:
    """Whether a rank of this launch has said already why it failed."""
    try:
        word = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return word["run_id"] == run_id and word["exit_code"] not in (DONE, STOPPED)
