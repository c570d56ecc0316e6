"""`torchrun ... -m exfm.trainer CONFIG [--set k=v ...]`: one rank of a job."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from exfm.data.errors import UserError
from exfm.trainer.env import rank_env
from exfm.trainer.ranklog import keep_log
from exfm.trainer.run import WRONG_INPUT, rank_main
from exfm.trainer.score_config import load_any


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exfm.trainer", description="one rank of a job; start it with torchrun"
    )
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--follow", action="store_true", help="of a scorer: wait for what is not there yet")
    parser.add_argument("--preflight-only", action="store_true", help="only look whether the job could start")
    arguments = parser.parse_args()
    try:
        config = load_any(arguments.config, arguments.sets)
    except UserError as error:
        print(f"exfm: {error}", file=sys.stderr)
        return WRONG_INPUT
    env = rank_env()
    if env.launched:
        keep_log(Path(config.run.folder), env)
    return rank_main(config, env, arguments.follow, arguments.preflight_only)


def leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # everything is committed: native threads of the libraries now and then abort a rank while the interpreter is torn down
    # (seen on gloo as "terminate called without an active exception"), which would make torchrun call a good job failed
    os._exit(code)


if __name__ == "__main__":
    leave(main())
