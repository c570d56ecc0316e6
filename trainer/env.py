"""What torchrun tells a rank, the device it gets and the process group. The one place here that reads os.environ."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from exfm.data.errors import UserError

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class RankEnv:
    """This process among the ranks of a job. One rank of one without torchrun. run_id: torchrun's name of this launch."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    attempt: int = 0
    launched: bool = False
    run_id: str = ""


def rank_env() -> RankEnv:
    """Read torchrun's environment variables."""
    e = os.environ
    if "WORLD_SIZE" not in e:
        return RankEnv()
    return RankEnv(
        rank=int(e["RANK"]),
        world_size=int(e["WORLD_SIZE"]),
        local_rank=int(e.get("LOCAL_RANK", "0")),
        local_world_size=int(e.get("LOCAL_WORLD_SIZE", e["WORLD_SIZE"])),
        attempt=int(e.get("TORCHELASTIC_RESTART_COUNT", "0")),
        launched=True,
        run_id=e.get("TORCHELASTIC_RUN_ID", ""),
    )


def pick_device(choice: DeviceChoice, env: RankEnv) -> torch.device:
    """cuda:<local rank> or cpu. UserError where cuda is asked for and there are too few devices."""
    count = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise UserError("run.device is cuda, but no CUDA device is found; set run.device: cpu or see `exfm doctor`")
    if env.local_rank >= count:
        raise UserError(
            f"local rank {env.local_rank} has no CUDA device of its own ({count} found); start at most {count} rank(s) per node "
            "or set run.device: cpu"
        )
    torch.cuda.set_device(env.local_rank)
    return torch.device("cuda", env.local_rank)


@contextmanager
def process_group(env: RankEnv, device: torch.device, timeout_s: float) -> Iterator[None]:
    """The default process group: gloo for CPU tensors and, on a GPU, NCCL for CUDA tensors. Left as it is where one exists."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if env.launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
