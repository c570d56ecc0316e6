"""Deltas hold the rows that training looked up and no others; a chain of them is restored bitwise; what it rests on is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from exfm.checkpoints.commits import Committed, committed
from exfm.checkpoints.keeping import clean, is_whole
from exfm.checkpoints.storage import Storage
from exfm.embeddings.config import SparseFeature, TableConfig
from exfm.embeddings.ids import IdMap
from exfm.trainer.run import DONE
from tests.checkpoints.test_reshard import resaved, tensors
from tests.trainer.jobs import Raw, job, last_state, make_stream, on, replaced, run, same, tables_of

ROWS = (192, 192)  # 12 steps
TABLES = {
    "user": {"rows": 20, "width": 8},
    "item": {"rows": 5_000, "width": 16},
    "viewed": {"rows": 30, "width": 4, "pooling": "mean"},
    "tags": {"rows": 8_000, "width": 8},
}
PLANS = {
    "table_wise": {name: ["table_wise"] for name in TABLES},
    "row_wise": {name: ["row_wise"] for name in TABLES},
    "mixed": {"user": ["row_wise"], "item": ["column_wise"], "viewed": ["data_parallel"], "tags": ["data_parallel"]},
}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("deltas") / "stream", ROWS).root


def make(folder: Path, stream: str, plan: str = "table_wise", **checkpoint: Any) -> Raw:
    """A commit every three steps."""
    checkpoint = {"every_slices": 1, "every_examples": 96, "keep": 100} | checkpoint
    return job(folder, stream, tables=TABLES, sharding__tables=PLANS[plan], checkpoint=checkpoint)


def commits(raw: Raw) -> list[Committed]:
    return committed(Path(raw["run"]["folder"]) / "checkpoints")


def end_of(raw: Raw, folder: Path, ranks: int, on_ranks: Any) -> dict[str, Tensor]:
    """The state of a job's newest commit, whatever it rests on."""
    then = replaced(raw, run__folder=str(folder), checkpoint={})
    if ranks == 1:
        return tensors(resaved(then, raw["run"]["folder"]))
    return tensors(on_ranks(ranks, resaved, then, raw["run"]["folder"])[0])


def touched(raw: Raw, first: int, last: int) -> dict[str, set[int]]:
    """Rows that the batches of steps [first, last) look up, by table."""
    rows = {name: set() for name in TABLES}
    batches = [t.slice(start, 32) for t in tables_of(ROWS) for start in range(0, t.num_rows, 32)]
    for batch in batches[first:last]:
        for feature in raw["features"]["sparse"]:
            cells = batch.column(feature["name"]).to_pylist()
            ids = [cell if isinstance(cell, list) else [] if cell is None else [cell] for cell in cells]
            flat = np.array([i for cell in ids for i in cell], np.int64)
            lengths = np.array([len(cell) for cell in ids])
            to_rows = IdMap(SparseFeature(**feature), TableConfig(**TABLES[feature["table"]]))
            rows[feature["table"]] |= set(to_rows(flat, lengths, np.arange(len(ids))).tolist())
    return rows


def stored(commit: Committed) -> tuple[dict[str, list[int]], int, int]:
    """(rows in a delta by table and column shard, bytes of them, bytes of everything else), by the safetensors library."""
    rows: dict[str, list[int]] = {}
    size = other = 0
    for path in Path(commit.folder).glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if not name.startswith("delta."):
                    assert not name.startswith("tables.")
                    other += tensor.numel() * tensor.element_size()
                    continue
                size += tensor.numel() * tensor.element_size()
                own = name.split("@", 2)
                if own[1].endswith(".rows"):
                    table, (_, column, _) = own[0].removeprefix("delta."), own[1].removesuffix(".rows").split(",")
                    rows.setdefault(f"{table}:{column}", []).extend(tensor.tolist())
    return rows, size, other


@pytest.mark.parametrize(
    ("ranks", "plan", "staging"),
    [
        (1, "table_wise", "full"),
        (2, "row_wise", "bounded"),
        (2, "row_wise", "copy_on_write"),
        (2, "mixed", "full"),
        (2, "mixed", "bounded"),
    ],
)
def test_a_chain_holds_the_rows_that_were_looked_up_and_is_restored_bitwise(
    ranks, plan, staging, stream, tmp_path, on_ranks
):
    raw = make(tmp_path / "run", stream, plan, full_every=100, staging=staging)
    full = make(tmp_path / "full", stream, plan)
    for r in (raw, full):
        assert {code for code, _ in on(on_ranks, ranks, r)} == {DONE}
    found = commits(raw)
    assert [c.kind for c in found] == ["full", "delta", "delta", "delta"]
    assert [c.base for c in found] == [None, *(c.name for c in found[:-1])]
    for number, commit in enumerate(found[1:], 1):
        want = touched(raw, 3 * number, 3 * number + 3)
        rows, size, _ = stored(commit)
        for place, got in rows.items():
            assert len(got) == len(set(got)) and set(got) == want[place.split(":")[0]]
        assert {place.split(":")[0] for place in rows} == {name for name in want if want[name]}
        # a row: its number and its sum once per column shard, its weights once
        shards = {name: [p for p in rows if p.startswith(f"{name}:")] for name in TABLES}
        assert size == sum(len(want[n]) * (4 * TABLES[n]["width"] + 12 * len(shards[n])) for n in TABLES)
        assert 0 < len(want["tags"]) < 400  # of 8,000
    assert same(end_of(raw, tmp_path / "end", ranks, on_ranks), last_state(full)) == []


def test_a_delta_is_as_large_as_what_was_touched(stream, tmp_path):
    raw = make(tmp_path / "run", stream, full_every=2)
    run(raw)
    full, delta = (sum(f["bytes"] for f in c.manifest["files"]) for c in commits(raw)[:2])
    _, size, other = stored(commits(raw)[1])
    names = (Path(commits(raw)[1].folder) / "index.json").stat().st_size  # and the file's header names them once more
    overhead = 3 * names
    assert size + other < delta < size + other + overhead and size < 0.15 * (full - other)


def test_after_a_restart_the_chain_goes_on_from_the_commit_that_was_restored(stream, tmp_path, on_ranks):
    raw, whole = (make(tmp_path / name, stream, "mixed", full_every=100) for name in ("run", "whole"))
    on(on_ranks, 2, whole)
    on(on_ranks, 2, replaced(raw, stream__last=1))
    on(on_ranks, 2, raw)
    found = commits(raw)
    assert [(c.step, c.kind, c.base and int(c.base[-8:])) for c in found] == [
        (3, "full", None), (6, "delta", 3), (9, "delta", 6), (12, "delta", 9)
    ]  # fmt: skip
    want = touched(raw, 6, 9)
    assert all(set(got) == want[place.split(":")[0]] for place, got in stored(found[2])[0].items())
    assert same(end_of(raw, tmp_path / "a", 2, on_ranks), end_of(whole, tmp_path / "b", 2, on_ranks)) == []


def test_a_restore_that_converts_starts_a_new_chain(stream, tmp_path):
    """What was saved is no base of rows of another type."""
    raw = make(tmp_path / "run", stream, full_every=100)
    run(replaced(raw, stream__last=1))
    half = {name: table | {"dtype": "fp16"} for name, table in TABLES.items()}
    run(replaced(raw, tables=half))
    assert [c.kind for c in commits(raw)] == ["full", "delta", "full", "delta"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_compaction_gives_the_same_state_and_prunes(ranks, stream, tmp_path, on_ranks):
    raw = make(tmp_path / "run", stream, "mixed", full_every=100, compact_after=2, keep=1)
    full = make(tmp_path / "full", stream, "mixed")
    for r in (raw, full):
        on(on_ranks, ranks, r)
    # 3 full, 6 and 9 deltas, merged; 12 rests on the merged one
    assert [(c.name, c.kind, c.base) for c in commits(raw)] == [
        ("step=00000009-1", "full", None), ("step=00000012", "delta", "step=00000009-1")
    ]  # fmt: skip
    merged, plain = tensors(commits(raw)[0].folder), tensors(commits(full)[2].folder)
    assert same(merged, plain) == []
    assert commits(raw)[0].manifest["compacted"] == ["step=00000003", "step=00000006", "step=00000009"]
    assert commits(raw)[0].manifest["position"] == commits(full)[2].manifest["position"]
    assert same(end_of(raw, tmp_path / "end", ranks, on_ranks), last_state(full)) == []


def test_retention_never_removes_what_a_kept_delta_rests_on(stream, tmp_path):
    raw = make(tmp_path / "run", stream, full_every=3, keep=1)
    run(replaced(raw, stream__last=1))
    assert [(c.step, c.kind) for c in commits(raw)] == [(3, "full"), (6, "delta")]
    run(raw)
    assert [(c.step, c.kind) for c in commits(raw)] == [(12, "full")]  # 9 was the last delta of the first chain


def test_every_kth_slice_and_pinned_commits_stay(tmp_path):
    stream = make_stream(tmp_path / "stream", (32,) * 7).root
    raw = job(tmp_path / "run", stream, checkpoint={"every_slices": 1, "keep": 1, "keep_every": 3})
    run(replaced(raw, stream__last=2))
    assert [c.step for c in commits(raw)] == [2]
    (tmp_path / "run/checkpoints/step=00000002/PINNED").touch()
    run(raw)
    assert [c.step for c in commits(raw)] == [2, 3, 6, 7]
    position = json.loads((tmp_path / "run/checkpoints/step=00000003/manifest.json").read_text())["position"]
    assert position == {"slice": 3, "consumed": 0}


def test_a_pinned_delta_keeps_its_base(stream, tmp_path):
    raw = make(tmp_path / "run", stream, full_every=2, keep=1)
    run(replaced(raw, stream__last=1))
    (tmp_path / "run/checkpoints/step=00000006/PINNED").touch()
    run(raw)
    assert [c.step for c in commits(raw)] == [3, 6, 9, 12]
    assert torch.equal(
        last_state(full_of(raw, tmp_path))["tables.user.weight"],
        end_of(raw, tmp_path / "e", 1, None)["tables.user.weight"],
    )


def full_of(raw: Raw, folder: Path) -> Raw:
    """The same job with full commits alone, run to its end."""
    whole = replaced(raw, run__folder=str(folder / "whole"), checkpoint={})
    run(whole)
    return whole


@pytest.mark.parametrize("removals", [1, 2, 3])
def test_a_death_while_old_commits_are_removed_leaves_none_without_what_it_rests_on(
    removals, stream, tmp_path, monkeypatch
):
    """Chains of a full commit and a delta; the newest chain is kept, the process dies after so many removals."""
    raw = make(tmp_path / "run", stream, full_every=2)
    run(raw)
    assert [c.kind for c in commits(raw)] == ["full", "delta"] * 2
    storage, removed, remove = Storage(tmp_path / "run/checkpoints"), [], Storage.remove

    def dies(self: Storage, path: str) -> None:
        if len(removed) == removals:
            raise KeyboardInterrupt
        removed.append(path)
        remove(self, path)

    monkeypatch.setattr(Storage, "remove", dies)
    with pytest.raises(KeyboardInterrupt):
        clean(storage, 1, 0)
    assert len(removed) == removals
    assert all(is_whole(c, commits(raw)) for c in commits(raw))
