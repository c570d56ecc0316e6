"""A commit of any number of ranks and sharding type is restored by any other: weights bitwise, sums by the documented rule.

Sums have one column per column shard: as many on both sides stay bitwise; several become one by their mean, one several by
repeating it. Four ranks are two nodes of two.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exfm.checkpoints.canonical import boxes
from exfm.checkpoints.commits import chain, committed, listing
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import load
from exfm.data.errors import UserError
from exfm.trainer.env import process_group
from exfm.trainer.loop import Job
from exfm.trainer.run import DONE
from tests.sharding.reference import Reference
from tests.trainer.jobs import (
    Raw,
    copied,
    here,
    job,
    last_state,
    make_stream,
    on,
    parsed,
    read_checkpoint,
    replaced,
    run,
    same,
    tables_of,
)
from tests.trainer.starts import CPU, initial_state

KINDS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
Place = tuple[int, str]
PLACES = [
    (1, "table_wise"), (1, "data_parallel"), *((2, kind) for kind in KINDS), (3, "row_wise"), (3, "column_wise"), (3, "data_parallel"),
    (4, "table_wise"), (4, "table_row_wise"),
]  # fmt: skip
ROWS = (7 * 32, 5 * 32)  # a source stops after slice 0: 7 steps, and 5 to go
WIDE = {"rows": 20, "width": 16, "init": 0.1}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("reshard") / "stream", ROWS).root


def make(folder: Path, stream: str, place: Place, **over: Any) -> Raw:
    """Column shards of `user` are 4 wide, as those of the other tables must be."""
    cut = {"sharding__tables": {"user": {"column_shard": 4}}} | over
    return job(folder, stream, sharding__allowed=[place[1]], tables__user=dict(WIDE), **cut)


@pytest.fixture(scope="module")
def sources(stream, tmp_path_factory, rank_pool) -> dict[Place, Raw]:
    """For every place a job that committed after 7 steps."""
    root = tmp_path_factory.mktemp("sources")
    raws = {p: make(root / f"{p[0]}-{p[1]}", stream, p, stream__last=1) for p in PLACES}
    for ranks in (1, 2, 3, 4):
        own = [raw for place, raw in raws.items() if place[0] == ranks]
        assert rank_pool(ranks, run_all, own, timeout_s=200) == [[DONE] * len(own)] * ranks
    return raws


def run_all(raws: list[Raw]) -> list[int]:
    return [run(raw)[0] for raw in raws]


def held(tensor: Tensor, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(what this rank holds of a tensor, the same box of `whole`)."""
    return [
        (box, whole[tuple(slice(o, o + s) for o, s in zip(offsets, box.shape, strict=True))])
        for offsets, box in boxes(tensor)
    ]


def converted(sums: Tensor, segments: int) -> Tensor:
    """The documented rule in other words."""
    if sums.shape[1] == segments:
        return sums
    one = sum(sums[:, k] for k in range(sums.shape[1])) / sums.shape[1]  # type: ignore[union-attr]
    return torch.stack([torch.as_tensor(one)] * segments, 1)


def restore_all(raw: Raw, commits: list[tuple[str, str]]) -> tuple[list[str], int]:
    """Load each chain (checkpoints folder, folder that holds its state in full) into one live model whose every value was set
    to 7 before. What differs from the state read by the safetensors library, and the table cells that were compared."""
    wrong, cells = [], 0
    with process_group(here(), CPU, 60):
        live = Job(parsed(raw), here(), CPU, lambda: False)
        state = live.commits.state
        for folder, oracle in commits:
            for tensor in state.values():
                for _, box in boxes(tensor):
                    box.fill_(7)
            everything = listing(Storage(folder))
            exact = load(chain(everything[-1], everything), state)
            saved = tensors(oracle)
            assert saved.keys() == state.keys()
            alike = {n for n, t in state.items() if tuple(t.shape) == tuple(saved[n].shape)}
            assert exact == (len(alike) == len(saved))
            for name, tensor in state.items():
                tolerance = 0.0 if name in alike or saved[name].shape[1] == 1 else 1e-7
                want = saved[name] if name in alike else converted(saved[name], tensor.shape[1])
                for box, part in held(tensor, want):
                    cells += box.numel() * name.endswith(".weight") * name.startswith("tables.")
                    if not torch.equal(box, part) and not (
                        torch.allclose(box, part, rtol=tolerance, atol=0) and tolerance
                    ):
                        wrong.append(f"{folder}: {name} at {list(box.shape)}")
        live.close()
    return wrong, cells


def tensors(folder: str) -> dict[str, Tensor]:
    """What of a full commit is of the model, not of a rank."""
    return {k: v for k, v in read_checkpoint(folder).items() if not k.startswith("rank.")}


def newest(raw: Raw) -> str:
    return committed(Path(raw["run"]["folder"]) / "checkpoints")[-1].folder


QUICK = [(1, "table_wise"), (2, "column_wise"), (3, "row_wise"), (3, "column_wise"), (4, "table_row_wise")]


@pytest.mark.parametrize(
    "target",
    [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PLACES],
    ids=[f"{p[0]}-{p[1]}" for p in PLACES],
)
def test_every_source_is_restored(target, sources, stream, tmp_path, on_ranks):
    commits = [(raw["run"]["folder"] + "/checkpoints", newest(raw)) for raw in sources.values()]
    found = on_ranks(target[0], restore_all, make(tmp_path / "run", stream, target), commits)
    assert [text for wrong, _ in found for text in wrong] == []
    cells = sum(t["rows"] * t["width"] for t in sources[1, "table_wise"]["tables"].values())
    copies = target[0] if target[1] == "data_parallel" else 1
    assert sum(n for _, n in found) == len(commits) * cells * copies  # every cell of every source


def test_sums_of_four_column_shards_become_those_of_two(sources, stream, tmp_path, on_ranks):
    raw = sources[2, "column_wise"]
    assert read_checkpoint(newest(raw))["tables.user.adagrad_sum"].shape[1] == 4
    two = {"user": {"column_shard": 8}}
    then = make(tmp_path / "run", stream, (3, "column_wise"), sharding__tables=two)
    found = on_ranks(3, restore_all, then, [(raw["run"]["folder"] + "/checkpoints", newest(raw))])
    assert [text for wrong, _ in found for text in wrong] == []


@pytest.mark.parametrize(
    "place", [(1, "data_parallel"), (2, "row_wise"), (3, "column_wise"), (4, "table_row_wise"), (2, "table_wise")]
)
def test_at_the_same_place_the_next_five_steps_are_bitwise_those_of_a_job_that_never_stopped(
    place, sources, stream, tmp_path, on_ranks
):
    whole, halves = make(tmp_path / "whole", stream, place), copied(sources[place], tmp_path / "halves")
    on_ranks(place[0], run_all, [whole, replaced(halves, stream__last=None)])
    assert committed(tmp_path / "halves/checkpoints")[-1].step == 12
    assert same(last_state(whole), last_state(halves)) == []


@cache
def references(before: str, after: str, stream: str, folder: str) -> dict[torch.dtype, dict[str, Tensor]]:
    """Plain torch, which never stops: 7 steps as `before`, then sums as `after` has them, 5 steps more."""
    starts = {k: initial_state(make(Path(folder) / f"start-{k}", stream, (1, k))) for k in (before, after)}
    batches = [t.slice(start, 32) for t in tables_of(ROWS) for start in range(0, t.num_rows, 32)]
    out = {}
    for dtype in (torch.float32, torch.float64):
        reference = Reference(make(Path(folder), stream, (1, before)), starts[before], dtype)
        for rows in batches[:7]:
            reference.step(rows)
        for name, sums in reference.sums.items():
            segments = starts[after][f"tables.{name}.adagrad_sum"].shape[1]
            reference.sums[name] = converted(sums, segments).clone()
        for rows in batches[7:]:
            reference.step(rows)
        out[dtype] = reference.state()
    return out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, "table_wise"), (4, "row_wise")),
        ((2, "row_wise"), (3, "column_wise")),
        ((3, "column_wise"), (2, "data_parallel")),
        ((4, "table_wise"), (4, "table_row_wise")),
        ((4, "table_row_wise"), (1, "column_wise")),
        ((2, "column_wise"), (3, "table_wise")),
    ],
)
def test_elsewhere_the_next_five_steps_equal_a_plain_reference_that_never_stopped(
    before, after, sources, stream, tmp_path, tmp_path_factory, on_ranks
):
    """Within 4 times the reference's own float32 error plus 4 ulps, as in tests/sharding/test_equality.py."""
    moved = replaced(copied(sources[before], tmp_path / "run"), stream__last=None, sharding__allowed=[after[1]])
    on(on_ranks, after[0], moved)
    assert committed(tmp_path / "run/checkpoints")[-1].step == 12
    got = last_state(moved)
    both = references(before[1], after[1], stream, str(tmp_path_factory.getbasetemp() / "reference"))
    single, double = both[torch.float32], both[torch.float64]
    for group in ("weight", "adagrad_sum", "dense"):
        names = [n for n in single if n.endswith(group) == n.startswith("tables.") or n.startswith(group)]
        names = [n for n in names if n.startswith("dense.") == (group == "dense")]
        error = max((single[n] - double[n]).abs().max() for n in names)
        ulp = torch.finfo(torch.float32).eps * max(double[n].abs().max() for n in names)
        assert max((got[n] - single[n]).abs().max() for n in names) <= 4 * error + 4 * ulp < 1e-4, group


# ------------------------------------------------------------------------------------- other rows


CHAINED = [(2, "column_wise"), (3, "data_parallel"), (2, "row_wise")]


@pytest.fixture(scope="module")
def chained(stream, tmp_path_factory, rank_pool) -> dict[Place, tuple[str, str]]:
    """By place: the folder of a full commit with three deltas, and the last state in full."""
    found, often = {}, {"every_slices": 1, "every_examples": 64, "keep": 100, "full_every": 100}
    for place in CHAINED:
        root = tmp_path_factory.mktemp("chained")
        deltas = make(root / "deltas", stream, place, checkpoint=often, stream__last=1)
        full = replaced(deltas, checkpoint={"every_slices": 1}, run__folder=str(root / "full"))
        rank_pool(place[0], run_all, [deltas, full])
        assert [c.kind for c in committed(root / "deltas/checkpoints")] == ["full", "delta", "delta", "delta"]
        found[place] = str(root / "deltas/checkpoints"), newest(full)
    return found


@pytest.mark.parametrize("target", [(1, "data_parallel"), (3, "column_wise"), (4, "table_row_wise")])
@pytest.mark.parametrize("source", CHAINED)
def test_deltas_of_one_plan_are_restored_under_another(source, target, chained, stream, tmp_path, on_ranks):
    found = on_ranks(target[0], restore_all, make(tmp_path / "run", stream, target), [chained[source]])
    assert [text for wrong, _ in found for text in wrong] == []


def resaved(raw: Raw, source: str, device: str = "cpu") -> str:
    """Restore another job's newest commit into this job's model, and commit what that holds; the new folder."""
    where = torch.device(device)
    with process_group(here(), where, 60):
        live = Job(parsed(raw), here(), where, lambda: False)
        everything = listing(Storage(f"{source}/checkpoints"))
        load(chain(everything[-1], everything), live.commits.state)
        live.commits.begin()
        live.commits.wait()
        live.close()
    return newest(raw)


@pytest.mark.parametrize("target", [(1, "column_wise"), (2, "data_parallel"), (3, "row_wise")])
def test_fp16_rows_and_back_are_exactly_the_rounded_values(target, sources, stream, tmp_path, on_ranks):
    source = sources[2, "table_wise"]
    saved = tensors(newest(source))
    half = {f"tables__{t}__dtype": "fp16" for t in source["tables"]}
    there = make(tmp_path / "half", stream, target, **half)
    in_half = read_checkpoint(on_ranks(target[0], resaved, there, source["run"]["folder"])[0])
    back = make(tmp_path / "back", stream, (2, "table_wise"))
    again = tensors(on_ranks(2, resaved, back, str(tmp_path / "half"))[0])
    rows = {n for n in saved if n.startswith("tables.") and n.endswith(".weight")}
    for name in rows:
        assert torch.equal(in_half[name], saved[name].half()) and torch.equal(again[name], saved[name].half().float())
        assert not torch.equal(again[name], saved[name])
    assert set(same(saved, again)) == rows


@pytest.mark.parametrize("target", [(1, "column_wise"), (2, "row_wise"), (3, "data_parallel"), (4, "table_row_wise")])
def test_a_table_grown_in_rows_keeps_the_old_ones_and_starts_the_new_ones(target, sources, stream, tmp_path, on_ranks):
    source = sources[2, "row_wise"]
    grown = {"tables__viewed__rows": 45}
    raw = make(tmp_path / "run", stream, target, **grown)
    state = read_checkpoint(on_ranks(target[0], resaved, raw, source["run"]["folder"])[0])
    saved = read_checkpoint(newest(source))
    start = initial_state(make(tmp_path / "start", stream, (1, target[1]), **grown))
    assert torch.equal(
        state["tables.viewed.weight"], torch.cat([saved["tables.viewed.weight"], start["tables.viewed.weight"][30:]])
    )
    sums = state["tables.viewed.adagrad_sum"]
    assert torch.equal(sums[:30], saved["tables.viewed.adagrad_sum"]) and not sums[30:].any() and len(sums) == 45
    tables = {n for n in start if n.startswith("tables.") and n.endswith(".weight") and "viewed" not in n}
    dense = {n for n in start if n.startswith(("dense.", "adam."))}
    assert tables and dense and [n for n in tables | dense if not torch.equal(state[n], saved[n])] == []
    moved = copied(source, tmp_path / "job")
    on(on_ranks, target[0], replaced(moved, stream__last=None, sharding__allowed=[target[1]], **grown))


@pytest.mark.parametrize(("table", "rows"), [("viewed", 29), ("item", 12), ("item", 14)])
def test_a_shrunk_table_and_another_number_of_hashed_rows_are_refused_by_name(table, rows, sources, tmp_path):
    raw = replaced(copied(sources[1, "table_wise"], tmp_path / "run"), **{f"tables__{table}__rows": rows})
    with pytest.raises(UserError, match=rf"of another config; differing keys: tables.{table}.rows .*, config {rows}\)"):
        run(raw)


@pytest.mark.gpu
def test_cpu_to_gpu_and_back_is_bitwise(sources, stream, tmp_path):
    source = sources[1, "table_wise"]
    saved = tensors(newest(source))
    for kind in ("table_wise", "data_parallel"):
        there = make(tmp_path / f"gpu-{kind}", stream, (1, kind), run__device="cuda")
        assert same(saved, tensors(resaved(there, source["run"]["folder"], "cuda:0"))) == []
        back = make(tmp_path / f"cpu-{kind}", stream, (1, "row_wise"))
        assert same(saved, tensors(resaved(back, there["run"]["folder"]))) == []
