"""What saving and restoring cost beside the disk: `exfm bench checkpoint [--gib N --ranks N] [--big-gib 20]`.

Row-wise tables of width 128 and their row-wise Adagrad sums, no model: what is measured is checkpoints/ alone. Every round does,
one after the other on the same disk, a plain parallel write + fsync and a plain parallel read of the same bytes (one file and
one process per rank, 16 MiB calls, page cache dropped before reading) and ours; ratios are medians over rounds. Training
during a save is a loop that updates random rows. Writes checkpoint_speed.md and .json.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from exfm.checkpoints import layout, reader
from exfm.checkpoints.canonical import table_state
from exfm.checkpoints.commits import chain, committed
from exfm.checkpoints.config import CheckpointConfig
from exfm.checkpoints.saver import Request, Saver
from exfm.checkpoints.sources import host_memory
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import load
from exfm.data.commit import commit_json, open_folder
from exfm.data.errors import UserError
from exfm.sharding.shards import Kernel, Shard

GIB, WIDTH, TABLES, CALL_BYTES = 2**30, 128, 4, 2**24
STEP_ROWS = 2048
CPU = torch.device("cpu")
console = Console(stderr=True)


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench checkpoint")
    parser.add_argument("--gib", type=float, default=4.0, help="tables of all ranks together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--big-gib", type=float, default=0.0, help="also one rank of so much, bounded staging")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="folder of checkpoint_speed.md and .json; default: print")
    a = parser.parse_args(args)
    folder = Path(tempfile.mkdtemp(prefix="exfm-checkpoint-", dir=a.folder))
    try:
        _check_space(folder, max(3 * a.gib, 1.5 * a.big_gib), max(2 * a.gib, a.big_gib))
        result = {"gib": a.gib, "ranks": a.ranks, "rounds": a.rounds, "cpus": os.cpu_count()}
        result |= launch(a.ranks, measure, str(folder / "all"), a.gib / a.ranks, a.rounds)
        if a.big_gib:
            result["big"] = launch(1, measure_big, str(folder / "big"), a.big_gib)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = markdown(result)
    if a.out:
        (a.out / "checkpoint_speed.md").write_text(text)
        fs, path = open_folder(a.out)
        commit_json(fs, f"{path}/checkpoint_speed.json", result)
    print(text)
    return 0


def _check_space(folder: Path, disk_gib: float, memory_gib: float) -> None:
    free = shutil.disk_usage(folder).free / GIB
    if free < disk_gib:
        raise UserError(f"{folder} has {free:.1f} GiB free, {disk_gib:.1f} are needed; lower --gib or give --folder")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    if available < memory_gib:
        console.print(f"only {available:.1f} GiB of memory are free, {memory_gib:.1f} would be good", highlight=False)


# ------------------------------------------------------------------------------------------------ ranks


def launch(ranks: int, act: Callable[..., Any], *args: Any) -> Any:
    """act(*args) on so many gloo ranks; rank 0's result."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, f"{folder}/store", answers, act, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(p.exitcode for p in processes):
        raise RuntimeError("a rank of the benchmark failed; its traceback is above")
    return json.loads(answers.get())


def _rank(rank: int, ranks: int, store: str, answers: Any, act: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    hour = timedelta(hours=1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=hour)
    result = act(*args)
    if rank == 0:
        answers.put(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


class Model:
    """Tables of this rank's share, as the trainer would hand them to a Saver."""

    def __init__(self, gib: float) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.rows = int(gib * GIB / TABLES / (WIDTH * 4))
        pattern = torch.randn(4096, WIDTH)
        self.shards, self.plan, shapes = [], [], {}
        for t in range(TABLES):
            weight = host_memory(self.rows * WIDTH * 4, False).view(torch.float32).view(self.rows, WIDTH)
            for start in range(0, self.rows, 4096):
                weight[start : start + 4096] = pattern[: min(4096, self.rows - start)]
            sums = torch.ones(self.rows)
            self.shards.append(Shard(f"t{t}", weight, sums, rank * self.rows, 0))
            places = [{"rank": r, "offsets": [r * self.rows, 0], "sizes": [self.rows, WIDTH]} for r in range(world)]
            self.plan.append({"table": f"t{t}", "sharding_type": "row_wise", "shards": places})
            shapes[f"t{t}"] = (self.rows * world, WIDTH)
        self.kernel = Kernel(nn.Identity(), tuple(self.shards), (1,) * TABLES)
        self.state = table_state(self.shards, self.plan, shapes, lambda p: torch.empty(0), "cpu")
        self.state |= {"dense.served.w": torch.randn(1_000_000)}
        self.bytes = sum(t.numel() * 4 for t in tensors(self))
        self.step = 0

    def saver(self, folder: str, **settings: Any) -> Saver:
        config = CheckpointConfig(keep=1, **settings)
        return Saver(Storage(folder), config, CPU, [self.kernel], self.plan)

    def save(self, saver: Saver, during: Callable[[], None] = lambda: None) -> dict[str, float]:
        """One whole save: seconds from the call to the commit, seconds that training stood still, bytes of all ranks."""
        self.step += 1
        dist.barrier()
        saver.save(Request(self.step, self.state, {}, {}))
        during()
        saver.wait()
        dist.barrier()
        assert saver.last is not None
        return {"seconds": saver.last.seconds, "stall_s": saver.last.stall_s, "bytes": saver.last.bytes}

    def load(self, folder: str) -> float:
        everything = committed(folder)
        links = chain(everything[-1], everything)
        return timed(lambda: load(links, self.state))

    def train_step(self) -> None:
        """Update random rows of every table, seen by the hooks as a lookup would be."""
        values = torch.randint(self.rows, (TABLES * STEP_ROWS,))
        lengths = torch.full((TABLES * STEP_ROWS,), 1)
        self.kernel.module(KeyedJaggedTensor([s.table for s in self.shards], values, lengths=lengths))
        for shard, rows in zip(self.shards, values.view(TABLES, -1), strict=True):
            shard.weight[rows] += 0.001
            assert shard.accumulator is not None
            shard.accumulator[rows] += 1.0

    def train(self, seconds: float) -> float:
        """Steps per second."""
        begun, steps = time.monotonic(), 0
        while time.monotonic() - begun < seconds:
            self.train_step()
            steps += 1
        return steps / (time.monotonic() - begun)


def timed(act: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    begun = time.monotonic()
    act()
    dist.barrier()
    return time.monotonic() - begun


def plain_write(model: Model, path: Path) -> None:
    with open(path, "wb", buffering=0) as f:
        for piece in pieces(model):
            f.write(piece)
        os.fsync(f.fileno())


def plain_read(model: Model, path: Path) -> None:
    with open(path, "rb", buffering=0) as f:
        for piece in pieces(model):
            f.readinto(piece)


def pieces(model: Model) -> Iterator[memoryview]:
    """The memory of all tensors, one call's worth at a time."""
    for tensor in tensors(model):
        data = layout.bytes_of(tensor)
        yield from (data[start : start + CALL_BYTES] for start in range(0, len(data), CALL_BYTES))


def tensors(model: Model) -> list[Tensor]:
    return [t for s in model.shards for t in (s.weight, s.accumulator) if t is not None]


def forget(path: Path) -> None:
    """Take files out of the page cache."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


# ------------------------------------------------------------------------------------------------ measurements


def measure(folder: str, gib: float, rounds: int) -> dict[str, Any]:
    """All ranks call."""
    root = Path(folder)
    root.mkdir(exist_ok=True)
    model = Model(gib)
    plain = root / f"plain-{dist.get_rank()}"
    saver = model.saver(f"{root}/full", staging="full")
    first = model.save(saver)
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    others = {s: model.saver(f"{root}/{s}", staging=s) for s in ("bounded", "copy_on_write")}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        note("plain write", timed(lambda: plain_write(model, plain)))
        for staging, own in {"full": saver, **others}.items():
            cost = model.save(own)
            note(f"save {staging}", cost["seconds"])
            note(f"stall {staging}", cost["stall_s"])
        with unsummed():
            note("save without checksums", model.save(saver)["seconds"])
        note("save with checksums", model.save(saver)["seconds"])
        forget(plain)
        note("plain read", timed(lambda: plain_read(model, plain)))
        plain.unlink()
        for name, how in (("load", nullcontext()), ("load without checksums", unchecked())):
            forget(root / "full")
            with how:
                note(name, model.load(f"{root}/full"))
    size = model.save(saver)["bytes"]
    total = torch.tensor(float(model.bytes))
    dist.all_reduce(total)
    for staging in others:
        shutil.rmtree(root / staging, ignore_errors=True)
    result = {
        "bytes": float(total),
        "saved_bytes": size,
        "first_full": first,
        "seconds": {k: median(v) for k, v in times.items()},
        "all_seconds": times,
        "ratios": ratios(times),
        "training": during_training(model, root),
    }
    saver.close()
    for own in others.values():
        own.close()
    return result | {"delta": deltas(model, root, rounds)}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of what a round's own measurements say."""

    def ratio(a: str, b: str) -> float:
        return median(x / y for x, y in zip(times[a], times[b], strict=True))

    stagings = ("full", "bounded", "copy_on_write")
    return {
        **{f"save bandwidth, {s} / plain": ratio("plain write", f"save {s}") for s in stagings},
        **{f"stall / save, {s}": ratio(f"stall {s}", f"save {s}") for s in stagings},
        "restore bandwidth / plain": ratio("plain read", "load"),
        "checksums, save": ratio("save with checksums", "save without checksums") - 1,
        "checksums, restore": ratio("load", "load without checksums") - 1,
    }


def unsummed() -> AbstractContextManager[Any]:
    """Saves without checksums: sums of the right number, of nothing."""

    def update(self: Any, part: memoryview) -> None:
        self.bytes += len(part)
        self.sums = ["0" * layout.SUM_DIGITS] * (self.bytes // layout.BLOCK_BYTES)

    return patch.object(layout.BlockSums, "update", update)


def unchecked() -> AbstractContextManager[Any]:
    return patch.object(reader.CheckedFile, "_check", lambda *_: None)


def during_training(model: Model, root: Path) -> dict[str, Any]:
    """How much slower steps are while a save runs, and how long training stood still, for every staging."""
    alone = model.train(3.0)
    found: dict[str, Any] = {"steps_per_s_alone": alone}
    for staging in ("full", "bounded", "copy_on_write"):
        saver = model.saver(f"{root}/train", staging=staging)
        model.save(saver)
        speed: list[float] = []

        def train(saver: Saver = saver, speed: list[float] = speed) -> None:
            while saver.busy():
                speed.append(model.train(0.1))

        cost = model.save(saver, train)
        assert saver.last is not None
        slower = median(alone / s for s in speed) if speed else 1.0
        found[staging] = cost | {"slowdown_while_saving": slower, "copied_bytes": saver.last.copied_bytes}
        saver.close()
        shutil.rmtree(root / "train", ignore_errors=True)
        dist.barrier()
    return found


def deltas(model: Model, root: Path, rounds: int) -> dict[str, float]:
    """A delta after touching 1% of the rows, against a full save of the same round."""
    shutil.rmtree(root / "full", ignore_errors=True)
    dist.barrier()
    sizes, speeds = [], []
    for number in range(rounds):
        saver = model.saver(f"{root}/delta{number}", full_every=100)
        model.save(saver)
        touch(saver)
        model.save(saver)  # both kinds have taken their staging memory
        saver.base = None
        full = model.save(saver)
        touch(saver)
        delta = model.save(saver)
        sizes.append(delta["bytes"] / full["bytes"])
        speeds.append(full["seconds"] / delta["seconds"])
        saver.close()
        dist.barrier()
        shutil.rmtree(root / f"delta{number}", ignore_errors=True)
    return {"size": median(sizes), "faster": median(speeds)}


def touch(saver: Saver) -> None:
    """Mark 1% of the rows."""
    assert saver.touched is not None
    for marks in saver.touched.marks:
        marks[torch.randperm(len(marks))[: len(marks) // 100]] = True


def measure_big(folder: str, gib: float) -> dict[str, Any]:
    """One rank's share of a trillion-parameter job: bounded staging, peak memory beside the state itself."""
    root = Path(folder)
    root.mkdir(exist_ok=True)
    model = Model(gib)
    before = peak_bytes()
    saver = model.saver(f"{root}/big", staging="bounded")
    cost = model.save(saver)
    after_save = peak_bytes()
    expected = [s.weight[:: 1 << 16].clone() for s in model.shards]
    for shard in model.shards:
        shard.weight[:: 1 << 16] = 0
    seconds = model.load(f"{root}/big")
    assert all(torch.equal(e, s.weight[:: 1 << 16]) for e, s in zip(expected, model.shards, strict=True))
    saver.close()
    return {
        **cost,
        "restore_seconds": seconds,
        "peak_extra_save_bytes": after_save - before,
        "peak_extra_restore_bytes": peak_bytes() - after_save,
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(text: str) -> None:
    if dist.get_rank() == 0:
        console.print(text, highlight=False)


def markdown(r: dict[str, Any]) -> str:
    s, q, d, t = r["seconds"], r["ratios"], r["delta"], r["training"]
    gib = r["bytes"] / GIB
    lines = [
        f"{gib:.2f} GiB on {r['ranks']} ranks and {r['cpus']} CPUs, medians of {r['rounds']} rounds; ratios are within a round.",
        "",
        "| | seconds | GiB/s | against the plain one | training stood still | share of the save |",
        "|---|---|---|---|---|---|",
        f"| plain write + fsync | {s['plain write']:.2f} | {gib / s['plain write']:.2f} | | | |",
    ]
    for staging in ("full", "bounded", "copy_on_write"):
        seconds, stall = s[f"save {staging}"], s[f"stall {staging}"]
        lines.append(
            f"| save, staging {staging} | {seconds:.2f} | {gib / seconds:.2f} | {q[f'save bandwidth, {staging} / plain']:.0%} | "
            f"{stall:.2f} s | {q[f'stall / save, {staging}']:.1%} |"
        )
    lines += [
        f"| plain read | {s['plain read']:.2f} | {gib / s['plain read']:.2f} | | | |",
        f"| restore | {s['load']:.2f} | {gib / s['load']:.2f} | {q['restore bandwidth / plain']:.0%} | | |",
        "",
        f"Checksums cost {q['checksums, save']:+.1%} of a save and {q['checksums, restore']:+.1%} of a restore. The first save with "
        f"full staging takes its memory: {r['first_full']['stall_s']:.2f} s. A delta after touching 1% of the rows has "
        f"{d['size']:.2%} of the full size and is {d['faster']:.0f} times faster.",
        "",
        "| while training goes on | training stood still | a step takes, while saving | rows copied |",
        "|---|---|---|---|",
    ]
    for staging in ("full", "bounded", "copy_on_write"):
        c = t[staging]
        lines.append(
            f"| {staging} | {c['stall_s']:.2f} s | {c['slowdown_while_saving']:.2f} x | {c['copied_bytes'] / 2**20:,.0f} MiB |"
        )
    if big := r.get("big"):
        size = big["bytes"] / GIB
        lines += [
            "",
            f"One rank with {size:.1f} GiB, bounded staging: saved in {big['seconds']:.1f} s ({size / big['seconds']:.2f} GiB/s), training "
            f"stood still for {big['stall_s']:.1f} s, restored in {big['restore_seconds']:.1f} s "
            f"({size / big['restore_seconds']:.2f} GiB/s); peak memory beside the state {big['peak_extra_save_bytes'] / 2**20:.0f} MiB while "
            f"saving, {big['peak_extra_restore_bytes'] / 2**20:.0f} MiB more while restoring.",
        ]
    return "\n".join(lines) + "\n"
