"""Snapshots hold the weights of their commit and nothing else; a gate keeps bad ones back, and the last good one stays."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exfm.checkpoints.canonical import boxes
from exfm.checkpoints.commits import committed
from exfm.checkpoints.saver import Saver
from exfm.checkpoints.snapshots import load_snapshot
from exfm.checkpoints.storage import Storage
from exfm.sharding.plan import read_plan
from exfm.sharding.planner import describe
from exfm.trainer.run import DONE
from tests.trainer.jobs import Raw, job, make_stream, on, read_checkpoint, replaced, run, same, student, teacher

PLAN = {"user": ["row_wise"], "item": ["column_wise"], "viewed": ["data_parallel"], "tags": ["table_wise"]}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("snapshots") / "stream", (64,) * 4).root


def make(folder: Path, stream: str, snapshots: dict[str, Any], **checkpoint: Any) -> Raw:
    """A commit after each of four slices; one user row more than there are users."""
    tables = {"user": {"rows": 21, "width": 8}, "item": {"rows": 500, "width": 16}}
    tables |= {"viewed": {"rows": 30, "width": 4, "pooling": "mean"}, "tags": {"rows": 900, "width": 8}}
    checkpoint = {"every_slices": 1, "keep": 100, "snapshots": {"keep": 100} | snapshots} | checkpoint
    return job(folder, stream, tables=tables, sharding__tables=PLAN, checkpoint=checkpoint)


def weights_of(raw: Raw, step: int) -> dict[str, Tensor]:
    """Served weights of a full commit, read by the safetensors library."""
    state = read_checkpoint(Path(raw["run"]["folder"]) / f"checkpoints/step={step:08d}")
    return {
        n: t
        for n, t in state.items()
        if n.startswith("dense.served.") or (n.endswith(".weight") and n.startswith("tables."))
    }


def loaded(raw: Raw, index: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name: torch.full_like(t, 7) for name, t in like.items()}
    load_snapshot(Storage(Path(raw["run"]["folder"]) / "snapshots"), f"slice={index:06d}", state)
    return state


def published(raw: Raw) -> list[str]:
    return [c.name for c in committed(Path(raw["run"]["folder"]) / "snapshots")]


def heard(raw: Raw) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert run(raw)[0] == DONE
    return said.getvalue()


@pytest.mark.parametrize(
    ("ranks", "every", "deltas", "full_every", "kinds"),
    [
        (1, 1, 1, 1, ["snapshot"] * 4),
        (2, 1, 1, 1, ["snapshot"] * 4),
        (2, 1, 100, 3, ["snapshot", "snapshot delta", "snapshot delta", "snapshot"]),
        (2, 2, 100, 3, ["snapshot", "snapshot delta"]),  # over two commits
        (1, 1, 2, 100, ["snapshot", "snapshot delta"] * 2),  # a full commit has no rows to name
    ],
)
def test_a_snapshot_holds_the_weights_of_its_commit(
    ranks, every, deltas, full_every, kinds, stream, tmp_path, on_ranks
):
    raw = make(tmp_path / "run", stream, {"every_slices": every, "full_every": full_every}, full_every=deltas)
    full = make(tmp_path / "full", stream, {})
    for r in (raw, full):
        assert {code for code, _ in on(on_ranks, ranks, r)} == {DONE}
    found = committed(tmp_path / "run/snapshots")
    assert [c.kind for c in found] == kinds
    for snapshot in found:
        step = 2 * (snapshot.manifest["slice"] + 1)
        want = weights_of(full, step)
        assert same(loaded(raw, snapshot.manifest["slice"], want), want) == []
        of = next(c for c in committed(tmp_path / "run/checkpoints") if c.step == step)
        assert snapshot.manifest["of"] == {"folder": of.folder, "name": of.name, "sum": of.manifest["sum"]}
        assert snapshot.manifest["version"] == of.manifest["version"]


def from_codes(weights: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(8-bit values, half a step) of rows: 255 steps between a row's least and largest value, in every column shard."""
    shards = weights.numpy().astype(np.float64).reshape(len(weights), columns, -1)
    low, high = shards.min(2, keepdims=True), shards.max(2, keepdims=True)
    scale = (high - low) / 255
    codes = np.rint((shards - low) / np.where(scale == 0, 1, scale))
    shape = weights.shape
    half = np.broadcast_to(scale / 2, shards.shape)
    return torch.from_numpy((low + codes * scale).reshape(shape)), torch.from_numpy(half.reshape(shape).copy())


@pytest.mark.parametrize(("ranks", "deltas"), [(1, 1), (2, 1), (2, 100)])
def test_int8_rows_are_within_half_a_step_of_the_weights(ranks, deltas, stream, tmp_path, on_ranks):
    raw = make(tmp_path / "run", stream, {"rows": "int8", "full_every": deltas}, full_every=deltas)
    full = make(tmp_path / "full", stream, {})
    for r in (raw, full):
        on(on_ranks, ranks, r)
    want = weights_of(full, 8)
    got = loaded(raw, 3, want)
    plan = describe(read_plan(tmp_path / "run/plan.json"))
    columns = {row["table"]: len({s["offsets"][1] for s in row["shards"]}) or 1 for row in plan}
    assert columns["item"] > 1
    for name, weights in want.items():
        if name.startswith("dense."):
            assert torch.equal(got[name], weights)
            continue
        nearest, half = from_codes(weights, columns[name.split(".")[1]])
        rounding = 4 * np.finfo(np.float32).eps * weights.abs().max()
        assert ((got[name].double() - weights.double()).abs() <= half + rounding).all(), name
        assert (got[name] != weights).any() and (got[name] - nearest).abs().median() <= rounding, name


def test_int8_snapshots_take_about_a_quarter(tmp_path, stream):
    sizes = {}
    for rows in ("as_trained", "int8"):
        raw = make(tmp_path / rows, stream, {"rows": rows})
        raw["tables"]["item"]["width"] = 128
        raw["sharding"]["tables"]["item"] = {"types": ["column_wise"], "column_shard": 4}
        run(raw)
        index = json.loads((tmp_path / rows / "snapshots/slice=000003/index.json").read_text())["tensors"]
        entry = index["tables.item.weight" if rows == "as_trained" else "tables.item.int8"]
        sizes[rows] = np.prod(entry["shape"]) * (4 if rows == "as_trained" else 1)
    shards = 128 // 4
    assert sizes["as_trained"] == 500 * 128 * 4 and sizes["int8"] == 500 * (128 + 8 * shards)


def test_nothing_but_served_weights_is_inside(stream, tmp_path):
    """Of a student with an adapter: no optimiser state, no distillation heads, no arrays of a rank."""
    run(teacher(tmp_path / "teacher", stream))
    over = {"checkpoint": {"every_slices": 1, "snapshots": {}}}
    raw = student(tmp_path / "run", stream, tmp_path / "teacher/supervision/fm", "student_adapter", **over)
    run(raw)
    saved = read_checkpoint(committed(tmp_path / "run/checkpoints")[-1].folder)
    assert any(n.startswith("dense.heads.") for n in saved) and any(n.startswith("dense.adapter.") for n in saved)
    inside = read_checkpoint(tmp_path / "run/snapshots/slice=000003")
    served = {n for n in saved if n.startswith("dense.served.") or (n.startswith("tables.") and n.endswith(".weight"))}
    assert set(inside) == served and same(inside, {n: saved[n] for n in served}) == []


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"ne": [0, 0.01], "calibration": [0, 100]}, r"ne of 'click' is \d"),
        ({"ne": [0, 100], "calibration": [0.9999, 1.0001]}, r"calibration of 'click' is \d"),
    ],
)
def test_a_snapshot_outside_a_band_is_held_back_and_the_last_good_one_stays(gate, said, stream, tmp_path):
    raw = make(tmp_path / "run", stream, {"keep": 1})
    run(replaced(raw, stream__last=2))
    assert published(raw) == ["slice=000001"]
    raw["checkpoint"]["snapshots"]["gate"] = gate
    log = heard(raw)
    for index in (2, 3):
        assert re.search(
            rf"snapshot of slice {index} is not published: {said}.*outside .*; the last good one stays", log
        )
    assert published(raw) == ["slice=000001"]
    wide = replaced(
        make(tmp_path / "wide", stream, {"gate": {"ne": [0, 100], "calibration": [0, 100]}}), stream__last=2
    )
    run(wide)
    assert published(wide) == ["slice=000000", "slice=000001"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", ["as_trained", "int8"])
def test_a_weight_that_is_not_finite_holds_a_snapshot_back(rows, bad, stream, tmp_path, monkeypatch):
    """The row of a user whom nobody looks up: no loss shows it."""
    raw = make(tmp_path / "run", stream, {"rows": rows})
    save = Saver.save

    def poisoned(self: Saver, request: Any) -> None:
        if request.step == 4:
            for (row, *_), box in boxes(request.state["tables.user.weight"]):
                box[20 - row, 3] = bad
        save(self, request)

    monkeypatch.setattr(Saver, "save", poisoned)
    log = heard(raw)
    for index in (1, 2, 3):
        said = f"snapshot of slice {index} is not published: tables.user.weight has values that are not finite"
        assert f"{said}; the last good one stays" in log
    assert published(raw) == ["slice=000000"]
    left = {p.name for p in (tmp_path / "run/snapshots").iterdir()}
    # and word for those who would wait
    assert left == {"slice=000000", *(f"slice={index:06d}.refused.json" for index in (1, 2, 3))}
    assert [c.step for c in committed(tmp_path / "run/checkpoints")] == [2, 4, 6, 8]  # the job goes on
