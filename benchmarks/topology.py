"""What a rank of this machine can do, as the planner needs to know it: `exfm bench topology [--quick] [--out FILE]`.

As many ranks as the machine has GPUs, or --ranks on CPU, measure at the same time, so that what they share in a job is shared
here too. A figure is the median after a warm-up, of the slowest rank. A copy inside a memory counts what it reads and
what it writes. Writes a YAML file of one node, which the planner reads; what cannot be measured here is said, and keeps the
value of the data sheet.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from exfm.data.errors import UserError
from exfm.data.host import host_bytes_here
from exfm.sharding.topology import Topology, gpu_here, preset_of, this_topology, write_topology

CPU_RANKS = 2
WARM_UP, MIN_REPEATS = 2, 3
START_S = 180.0  # until all ranks have imported torch on a loaded machine
WORKS = 8
console = Console(stderr=True)
LABELS = {
    "hbm_bytes_per_s": "device memory",
    "host_bytes_per_s": "host memory",
    "pcie_bytes_per_s": "device to host and back, the slower",
    "nvlink_bytes_per_s": "all-to-all inside the node",
    "network_bytes_per_s": "network across nodes",
    "fp32_flops": "matrix product, fp32 (tf32 on a GPU)",
    "bf16_flops": "matrix product, bf16",
}


@dataclass(frozen=True)
class Setup:
    """What every rank does. copy_bytes: far beyond all caches; exchange_bytes: that a rank has for all ranks."""

    device: str
    ranks: int
    seconds: float
    copy_bytes: int
    exchange_bytes: int
    matrix: int

    @property
    def timeout_s(self) -> float:
        """Of all measurements: one may take as long as its least repeats do."""
        return START_S + WORKS * (10 * self.seconds + 20)


@dataclass(frozen=True)
class Work:
    """run moves `amount` bytes or does so many operations, which tells the topology's field."""

    field: str
    amount: float
    run: Callable[[], object]


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench topology", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/topology.yaml"), help="YAML file to write")
    parser.add_argument("--seconds", type=float, help="of each measurement, default 2, with --quick 0.1")
    parser.add_argument("--quick", action="store_true", help="smaller buffers and matrices")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument("--ranks", type=int, help=f"default: all GPUs, or {CPU_RANKS} on CPU")
    parser.add_argument("--network", type=float, metavar="GB_PER_S", help="of a rank's network card, each way")
    parser.add_argument("--json", action="store_true", help="print the topology as JSON instead of the table")
    options = parser.parse_args(args)
    setup = _setup(options)
    before, notes = _known(setup, options.network)
    measured = _measure(setup)
    topology, rows = _merge(setup, before, notes, measured)
    write_topology(options.out, topology)
    print(json.dumps(topology.model_dump(), indent=1) if options.json else _markdown(topology, rows))
    console.print(f"written to {options.out}", highlight=False, soft_wrap=True)
    return 0


def _setup(options: argparse.Namespace) -> Setup:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = torch.cuda.device_count()
    ranks = options.ranks or (gpus if device == "cuda" else CPU_RANKS)
    seconds = options.seconds if options.seconds is not None else (0.1 if options.quick else 2.0)
    if seconds <= 0 or ranks < 1:
        raise UserError(f"--seconds is {seconds:g} and --ranks {ranks}; both must be above 0")
    if options.network is not None and options.network <= 0:
        raise UserError(f"--network is {options.network:g} GB/s; it must be above 0")
    if device == "cuda" and ranks > gpus:
        raise UserError(f"--ranks is {ranks}, but this machine shows {gpus} CUDA device(s); use at most as many")
    on_gpu, mib = device == "cuda", 2**20
    sizes = (
        (64, 4, 2048 if on_gpu else 256) if options.quick else (512, 256 if on_gpu else 64, 8192 if on_gpu else 2048)
    )
    copy, exchange, matrix = sizes
    if (needed := ranks * 2 * copy * mib) > (free := host_bytes_here()):
        raise UserError(
            f"{ranks} ranks need {needed / 2**30:.1f} GiB of host memory, {free / 2**30:.1f} free; use --quick"
        )
    return Setup(device, ranks, seconds, copy * mib, exchange * mib, matrix)


def _known(setup: Setup, network: float | None) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields known before measuring, by field what else than a measurement they are)."""
    size = {"world_size": setup.ranks, "ranks_per_node": setup.ranks}
    name, hbm_bytes = gpu_here() if setup.device == "cuda" else ("cpu", 0)
    if setup.device == "cpu" or preset_of(name):
        fields = this_topology(setup.device, **size).model_dump()
        source = "data sheet's value" if setup.device == "cuda" else "default of 10 Gb/s"
    elif network is None:
        raise UserError(
            f"GPU '{name}' has no data sheet here, and its network across nodes cannot be measured on one machine; "
            "give --network GB_PER_S, for instance 50 for 400 Gb/s"
        )
    else:
        host_bytes = host_bytes_here() // setup.ranks
        fields = {**size, "device": "cuda", "hbm_bytes": hbm_bytes, "host_bytes": host_bytes}
        source = ""
    notes = {"network_bytes_per_s": f"not measurable on one machine, {source} kept"}
    if network is not None:
        fields["network_bytes_per_s"] = network * 1e9
        notes["network_bytes_per_s"] = "as given by --network"
    return {**fields, "name": f"{name}, measured"}, notes


def _measure(setup: Setup) -> dict[str, float]:
    """By field, the figure of the slowest rank. Raises what a rank raised, and RuntimeError where time runs out."""
    console.print(f"starting {setup.ranks} rank(s) on {setup.device}", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        context: Any = mp.spawn(_rank, (setup, folder), setup.ranks, join=False)
        deadline = time.monotonic() + setup.timeout_s
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the ranks have not ended after {setup.timeout_s:.0f} s; is the machine busy?")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        found: dict[str, float] = json.loads((Path(folder) / "found.json").read_text())
        return found


def _rank(rank: int, setup: Setup, folder: str) -> None:
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // setup.ranks))
    if setup.device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_float32_matmul_precision("high")  # tf32
    store = dist.FileStore(f"{folder}/store", setup.ranks)
    timeout = timedelta(seconds=setup.timeout_s)
    dist.init_process_group("gloo", timeout=timeout, store=store, rank=rank, world_size=setup.ranks)
    found: dict[str, float] = {}
    for work in _works(setup, rank):
        rate = _rate(work, setup)
        found[work.field] = min(rate, found.get(work.field, math.inf))
        if rank == 0:
            console.print(f"{LABELS[work.field]}: {_shown(work.field, rate)}", highlight=False)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _works(setup: Setup, rank: int) -> Iterator[Work]:
    on_gpu = setup.device == "cuda"
    place = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    host = torch.ones(setup.copy_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    yield _copy("host_bytes_per_s", host, torch.ones_like(host), 2)
    if on_gpu:
        here, there = torch.ones_like(host, device=place), torch.ones_like(host, device=place)
        yield _copy("hbm_bytes_per_s", here, there, 2)
        yield _copy("pcie_bytes_per_s", host, here, 1)
        yield _copy("pcie_bytes_per_s", here, host, 1)
        del here, there
    if setup.ranks > 1:
        timeout = timedelta(seconds=setup.timeout_s)
        group = dist.new_group(backend="nccl", timeout=timeout) if on_gpu else None
        sent = torch.ones(setup.exchange_bytes // setup.ranks * setup.ranks, dtype=torch.uint8, device=place)
        got = torch.empty_like(sent)
        leaving = sent.nbytes * (setup.ranks - 1) / setup.ranks
        yield Work("nvlink_bytes_per_s", leaving, lambda: dist.all_to_all_single(got, sent, group=group))
    yield _product("fp32_flops", setup.matrix, torch.float32, place)
    if on_gpu:
        yield _product("bf16_flops", setup.matrix, torch.bfloat16, place)


def _copy(field: str, source: torch.Tensor, target: torch.Tensor, times: int) -> Work:
    return Work(field, float(times * source.nbytes), lambda: target.copy_(source, non_blocking=True))


def _product(field: str, size: int, dtype: torch.dtype, place: torch.device) -> Work:
    a, b = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Work(field, 2.0 * size**3, lambda: torch.mm(a, b, out=out))


def _rate(work: Work, setup: Setup) -> float:
    """Amount per second of the slowest rank, all at it at the same time and for the same number of repeats."""
    for _ in range(WARM_UP - 1):
        _timed(work, setup)
    once = _slowest(_timed(work, setup))
    times = [_timed(work, setup) for _ in range(max(MIN_REPEATS, int(setup.seconds / once)))]
    return work.amount / _slowest(statistics.median(times))


def _timed(work: Work, setup: Setup) -> float:
    begun = time.perf_counter()
    work.run()
    if setup.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _slowest(seconds: float) -> float:
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _merge(
    setup: Setup, before: dict[str, Any], notes: dict[str, str], measured: dict[str, float]
) -> tuple[Topology, dict[str, str]]:
    """(the topology, by field where its value is from)."""
    fields, rows = before | measured, dict(notes)
    for field, value in measured.items():
        sheet = before.get(field) if setup.device == "cuda" else None
        rows[field] = "measured" + (f", {value / sheet:.0%} of the data sheet" if sheet else "")
    if setup.ranks == 1 and "nvlink_bytes_per_s" in before:
        kept = "data sheet's value" if setup.device == "cuda" else "default"
        rows["nvlink_bytes_per_s"] = f"not measurable with one rank, {kept} kept"
    elif setup.ranks == 1:
        fields["nvlink_bytes_per_s"] = measured["pcie_bytes_per_s"]
        rows["nvlink_bytes_per_s"] = "not measurable with one GPU, that between device and host taken"
    if setup.device == "cpu":
        fields |= dict.fromkeys(("hbm_bytes_per_s", "pcie_bytes_per_s"), measured["host_bytes_per_s"])
        fields["bf16_flops"] = measured["fp32_flops"]
    return Topology(**fields), rows


def _shown(field: str, value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if field.endswith("flops") else f"{value / 1e9:.3g} GB/s"


def _markdown(topology: Topology, rows: dict[str, str]) -> str:
    values = topology.model_dump()
    free = f"{topology.host_bytes / 1e9:.4g} GB of host memory"
    memory = f"{topology.hbm_bytes / 1e9:.4g} GB of device and {free}" if topology.hbm_bytes else free
    lines = [
        f"{topology.name}: {topology.world_size} rank(s), each with {memory}",
        "",
        "| | of a rank | |",
        "|---|---|---|",
    ]
    lines += [f"| {LABELS[f]} | {_shown(f, values[f])} | {rows[f]} |" for f in LABELS if f in rows]
    return "\n".join(lines) + "\n"
