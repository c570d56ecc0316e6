"""Running one job in this process: the entry point of a rank and of in-process runs."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from exfm.checkpoints.store import SaveError
from exfm.data.commit import commit, commit_json, open_folder
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
    with process_group(env, device, config.run.timeout_s):
        for attempt in range(config.run.max_restores + 1):
            job = Job(config, env, device, should_stop)
            try:
                job.restore()
                if env.rank == 0:
                    _save_config(config)
                return DONE if job.train() else STOPPED
            except NonFiniteLoss as error:
                if attempt == config.run.max_restores:
                    raise
                job.log.say(f"{error}; restoring the last commit")
            finally:
                job.log.close()
    raise AssertionError("unreachable")


def _save_config(config: JobConfig) -> None:
    fs, root = open_folder(config.run.folder)
    commit(fs, f"{root}/config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def rank_main(config: JobConfig, env: RankEnv) -> int:
    """Run as one rank of a launched job: signals ask for a commit and exit code 75, exit.json says how it ended."""
    asked: list[bool] = []
    if env.rank == 0:  # an earlier attempt's word
        (Path(config.run.folder) / "exit.json").unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGUSR1):
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
    _write_exit(Path(config.run.folder), code, message, env.rank)
    if message and code != DONE:
        print(f"exfm: {message}", file=sys.stderr, flush=True)
    return code


def _write_exit(folder: Path, code: int, message: str, rank: int) -> None:
    """exit.json of the job: a failing rank's word counts before that of the ranks which fail because of it."""
    path = folder / "exit.json"
    if code in (DONE, STOPPED):
        if rank == 0:
            fs, root = open_folder(path)
            commit_json(fs, root, {"exit_code": code, "message": message, "rank": rank})
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the first cause wins: created once, never replaced
        with open(path, "x" if code == FAILED else "w") as f:
            try:
                json.dump({"exit_code": code, "message": message, "rank": rank}, f)
                f.flush()
                os.fsync(f.fileno())
            except OSError:
                path.unlink()  # an empty word is worse than none
                raise
    except OSError:
        return
