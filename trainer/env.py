"""What torchrun tells a rank, the device it gets and the process group. The one place here that reads os.environ."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

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


def deepspeed_env(device: torch.device, local_rank: int, scratch: str) -> None:
    """Set what DeepSpeed reads as it is imported. scratch: where it compiles, if at all; a killed build leaves a lock there."""
    e = os.environ
    e["LOCAL_RANK"] = str(local_rank)
    if device.type == "cpu":
        e["DS_ACCELERATOR"] = "cpu"
    e.setdefault("TORCH_EXTENSIONS_DIR", scratch)


@contextmanager
def process_group(env: RankEnv, device: torch.device, timeout_s: float) -> Iterator[None]:
    """The default process group: gloo for CPU tensors and, on a GPU, NCCL for CUDA tensors. Left as it is where one exists."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if env.launched:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = fresh_part(store, rank, world_size, timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fresh_part(store: Any, rank: int, world_size: int, timeout_s: float) -> Any:
    """The part of a store that belongs to this start of the ranks; all ranks call. TimeoutError names the ranks that never came.

    torchrun keeps one store over its restarts, with the addresses that dead ranks left in it (torch 2.13), and its restart
    count may differ between nodes. So rank 0 answers every greeting that it finds until all living ranks have confirmed.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank != 0:
        store.set(f"greeting/{rank}", me)
        start = store.get(f"answer/{me}").decode()
        store.set(f"confirmed/{start}/{rank}", "")
        return dist.PrefixStore(start, store)
    answered: dict[int, str] = {}
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"confirmed/{me}/{other}"]):
                missing.remove(other)
            elif store.check([f"greeting/{other}"]):
                greeting = store.get(f"greeting/{other}").decode()
                if answered.get(other) != greeting:
                    store.set(f"answer/{greeting}", me)
                    answered[other] = greeting
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank(s) {', '.join(map(str, sorted(missing)))} did not join within {timeout_s:g} s")
        time.sleep(0.01)
    return dist.PrefixStore(me, store)
