"""Corners of the loop: empty domains, weightless batches, finished jobs, renamed logs, domains that cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from exfm.checkpoints.commits import committed
from exfm.data.cut import Cut, write_stream
from exfm.data.errors import UserError
from exfm.launch.auditing import audit_run
from exfm.trainer import objective
from exfm.trainer.waiting import wait_together
from tests.trainer.jobs import ROWS, SCHEMA, make_stream, run, student, summary, tables_of, teacher


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_stream(tmp_path_factory.mktemp("edges") / "stream").root


def stream_without_user_3_in_slice_1(folder: Path) -> str:
    tables = tables_of()
    column = SCHEMA.sparse[0].name
    users = tables[1].column(column).to_numpy().copy()
    users[users == 3] = 4
    tables[1] = tables[1].set_column(tables[1].column_names.index(column), column, pa.array(users))
    rows = [0, *(sum(ROWS[: i + 1]) for i in range(len(ROWS)))]
    cuts = [Cut(rows[i], rows[i + 1], 1_000 + 100_000 * i, 1_000 + 100_000 * (i + 1)) for i in range(len(ROWS))]
    return write_stream(str(folder), SCHEMA, pa.concat_tables(tables), cuts).root


def test_a_slice_without_an_example_of_the_domain_is_passed_over_and_the_audit_stays_clean(tmp_path: Path) -> None:
    root = stream_without_user_3_in_slice_1(tmp_path / "stream")
    domain = [{"name": "three", "column": "user", "values": [3]}]
    raw = teacher(tmp_path / "run", root, stream__domains=domain, stream__domain="three", checkpoint__every_slices=1)
    run(raw)
    table = pa.concat_tables(tables_of())
    with_3 = sum((t.column("user").to_numpy() == 3).sum() for i, t in enumerate(tables_of()) if i != 1)
    assert summary(raw)["examples"] == with_3 < table.num_rows
    assert audit_run(tmp_path / "run")["examples"] == with_3
    folders = [c.folder for c in committed(tmp_path / "run" / "checkpoints")]
    assert len(set(folders)) == len(folders) == len(ROWS), "no commit is written over another"


@pytest.mark.parametrize("world_size", [1, 4, 1024])
def test_a_step_whose_examples_all_weigh_nothing_has_loss_0_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    class Served(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3, 1))

        def forward(self, dense: torch.Tensor, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return dense @ self.w, dense

    class Weightless:
        dense = torch.ones(4, 3)
        labels = torch.ones(4, 1)
        weights = torch.zeros(4)

    monkeypatch.setattr(objective.dist, "all_reduce", lambda *_: None)
    monkeypatch.setattr(objective.dist, "get_world_size", lambda: world_size)
    served = Served()
    batch: Any = Weightless()
    loss, _ = objective.Objective(served, None, None, None, (0.0,))(batch, torch.empty(4, 0))
    loss.backward()
    assert served.w.grad is not None
    assert loss.item() == 0.0 and served.w.grad.abs().max().item() == 0.0


def test_a_finished_job_that_is_started_again_stays_as_it_is(stream: str, tmp_path: Path) -> None:
    raw = teacher(tmp_path / "run", stream)
    run(raw)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.name in ("summary.json", "bootstrap.npz")}
    checkpoints = [c.folder for c in committed(tmp_path / "run" / "checkpoints")]
    run(raw)
    assert before == {p: p.read_bytes() for p in before}
    assert checkpoints == [c.folder for c in committed(tmp_path / "run" / "checkpoints")]
    raw["stream"]["last"] = 2
    with pytest.raises(UserError, match="has trained slices up to 4; stream.last 2 is before that"):
        run(raw)


def test_a_log_in_a_folder_of_another_name_is_read_all_the_same(stream: str, tmp_path: Path) -> None:
    run(teacher(tmp_path / "teacher", stream))
    shutil.copytree(tmp_path / "teacher" / "supervision" / "fm", tmp_path / "copied-log")
    raw = student(tmp_path / "run", stream, tmp_path / "copied-log", "auxiliary_head")
    run(raw)
    assert summary(raw)["covered"] == summary(raw)["examples"] == sum(ROWS)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([{"name": "all", "column": "user", "values": [1]}], "other than 'all'"),
        ([{"name": "a", "column": "user", "values": [1]}] * 2, "its own name"),
        ([{"name": "a", "column": "user", "values": []}], "stream.domains.0.values"),
        ([{"name": "a", "column": "user", "modulo": 0, "values": [1]}], "stream.domains.0.modulo"),
    ],
)
def test_domains_that_cannot_be_are_refused(stream: str, tmp_path: Path, domains: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(teacher(tmp_path, stream, stream__domains=domains))


def test_overlapping_domains_credit_a_job_of_one_to_that_one(stream: str, tmp_path: Path) -> None:
    domains = [{"name": "wide", "column": "user", "values": [1, 2]}, {"name": "own", "column": "user", "values": [2]}]
    raw = teacher(tmp_path, stream, stream__domains=domains, stream__domain="own", evaluation__skip=0)
    run(raw)
    groups = summary(raw)["groups"]
    assert groups["own"]["click"]["examples"] == groups["all"]["click"]["examples"] > 0
    assert groups["wide"]["click"]["examples"] == 0


def test_what_json_cannot_say_is_null(stream: str, tmp_path: Path) -> None:
    domains = [{"name": "nobody", "column": "user", "values": [10_000]}]
    raw = teacher(tmp_path, stream, stream__domains=domains)
    run(raw)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["groups"]["nobody"]["click"]["ne"] is None
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def wait_on_a_rank(ready_after: int, stop_on: int) -> tuple[str, int]:
    asked = 0

    def ready() -> bool:
        nonlocal asked
        asked += 1
        return asked > ready_after

    return wait_together(ready, 2.5, lambda: dist.get_rank() == stop_on), asked


def test_all_ranks_hear_the_same_verdict_and_only_rank_0_looks(on_ranks: Any) -> None:
    assert [v for v, _ in on_ranks(3, wait_on_a_rank, 0, -1)] == ["ready"] * 3
    late = on_ranks(3, wait_on_a_rank, 10**9, -1)
    assert [v for v, _ in late] == ["late"] * 3 and [asked > 0 for _, asked in late] == [True, False, False]
    assert [v for v, _ in on_ranks(3, wait_on_a_rank, 10**9, 2)] == ["stop"] * 3
