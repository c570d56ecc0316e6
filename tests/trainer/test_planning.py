"""The plan of a job: from its config alone, kept beside the run, taken from a file, refused where it is of something else."""

import json
import re
from pathlib import Path

import pytest

from exfm.data.errors import UserError
from exfm.data.stats import ColumnStats, StreamStats, write_stats
from exfm.sharding.plan import read_plan
from exfm.sharding.topology import gpu_topology
from exfm.trainer.fits import check_batch
from exfm.trainer.planning import plan_here, plan_on
from tests.trainer.jobs import Raw, job, make_stream, parsed, replaced, run


@pytest.fixture
def raw(tmp_path) -> Raw:
    return job(tmp_path / "run", "no stream", sharding__allowed=["table_wise", "row_wise"])


def test_a_run_keeps_its_plan_and_takes_it_again_only_while_it_is_made_from_the_same(tmp_path, raw):
    stream = make_stream(tmp_path / "stream", (40,)).root
    trained = replaced(raw, stream__path=stream)
    run(trained)
    folder = Path(raw["run"]["folder"])
    plan, word = plan_here(parsed(trained), "cpu", 1, 1, folder)
    assert plan == read_plan(folder / "plan.json") and word == f"plan of {folder}/plan.json"
    other, word = plan_here(parsed(trained), "cpu", 2, 2, folder)
    assert other != plan and "was made from other ranks, topology, batch" in word
    wider = replaced(trained, tables__item__width=16)
    assert "was made from other tables, batch" in plan_here(parsed(wider), "cpu", 1, 1, folder)[1]


def test_a_plan_file_is_used_as_it_is_and_refused_for_other_tables_or_ranks(tmp_path, raw):
    path = tmp_path / "given.json"
    plan_here(parsed(raw), "cpu", 2, 2, None)[0].write(path)
    given = replaced(raw, sharding__plan=str(path), sharding__allowed=["data_parallel"])
    assert plan_here(parsed(given), "cpu", 2, 2, None)[0] == read_plan(path)
    with pytest.raises(UserError, match=r"was made for other ranks; make it anew"):
        plan_here(parsed(given), "cpu", 3, 3, None)
    with pytest.raises(UserError, match=r"was made for other tables; make it anew"):
        plan_here(parsed(replaced(given, tables__item__rows=14)), "cpu", 2, 2, None)


def test_measured_ids_per_example_decide_what_a_table_costs(tmp_path, raw):
    def cost(pooling: float) -> dict[str, float]:
        own = ColumnStats(
            pooling=pooling, presence=1.0, unique_rate=1.0, distinct=9, zipf=1.0, hot=dict.fromkeys(("0.001", "0.01", "0.1"), 1.0), reuse=(0.0,) * 20
        )  # fmt: skip
        stats = StreamStats(
            stream="s", examples=9, batch=9, slices=(0, 1), bytes_per_example=1.0, columns={"user": own}
        )
        write_stats(tmp_path / "stats.yaml", stats)
        config = parsed(replaced(raw, sharding__stats=str(tmp_path / "stats.yaml"), sharding__allowed=["table_wise"]))
        return {t.table: t.total("ms") for t in plan_on(config, gpu_topology("h100", 8)).tables}

    one, many = cost(1.0), cost(50.0)
    assert many["user"] > 2 * one["user"] and many["item"] == one["item"]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"tables": {"user": {"ranks": [0, 9]}}}, r"sharding.tables.user.ranks names rank 9; there are 0 to 1"),
        (
            {"tables": {"user": {"types": ["column_wise"], "column_shard": 12}}},
            r"'user' is 8 wide and column_shard is 12: its column shards can be 4 wide",
        ),
        ({"topology": "h100"}, "sharding.topology h100 is of cuda, the job runs on cpu"),
        ({"plan": "/nowhere.json"}, "plan /nowhere.json cannot be read"),
        ({"host_gib": 0.000001}, "table 'item' does not fit|table 'user' does not fit|short"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(over, message, raw):
    with pytest.raises(UserError, match=message):
        plan_here(parsed(replaced(raw, **{f"sharding__{k}": v for k, v in over.items()})), "cpu", 2, 2, None)


def test_a_plan_of_another_version_beside_a_run_is_made_anew(tmp_path, raw):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/plan.json").write_text(json.dumps([{"table": "user"}]))
    assert plan_here(parsed(raw), "cpu", 1, 1, tmp_path / "run")[1].startswith("planned in")


@pytest.mark.parametrize(
    ("own", "both"),
    [
        ({"types": ["row_wise"], "ranks": [0, 1]}, r"ranks \[0, 1\] and sharding.tables.user.types \[row_wise\] contradict"),
        ({"types": ["table_row_wise"], "ranks": [3, 4, 5]}, r"ranks \[3, 4, 5\] and .*types \[table_row_wise\] contradict"),
        ({"types": ["table_wise"], "column_shard": 8}, r"column_shard 8 and .*types \[table_wise\] contradict"),
        ({"types": ["data_parallel"], "kernels": ["fused_uvm"]}, r"kernels \[fused_uvm\] and .*types \[data_parallel\] contradict"),
        ({"ranks": [8]}, r"ranks names rank 8; there are 0 to 7"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_named_both(own, both, raw):
    config = parsed(replaced(raw, sharding__tables={"user": own}))
    with pytest.raises(UserError, match=both):
        plan_on(config, gpu_topology("h100", 8, 4))


def test_a_table_is_row_wise_in_a_node_that_it_may_use(raw):
    own = {"user": {"types": ["table_row_wise"], "ranks": [3, 4, 5, 6, 7]}}
    plan = plan_on(parsed(replaced(raw, sharding__tables=own)), gpu_topology("h100", 8, 4))
    assert next(t for t in plan.tables if t.table == "user").where == (1,)


def test_a_batch_that_cannot_fit_is_refused_with_its_bytes_and_one_that_does(tmp_path, raw):
    """The advice is followed: with the batch that the message names, the job is let in."""
    wide = replaced(
        raw,
        model={"kind": "dcnv2", "cross_layers": 1, "rank": 4, "deep_mlp": [4096]},
        sharding__host_gib=0.25,
        stream__global_batch=65536,
    )
    plan, _ = plan_here(parsed(wide), "cpu", 1, 1, None)
    with pytest.raises(UserError, match=r"65536 examples a rank does not fit: \d\.\d GiB of activations") as error:
        check_batch(parsed(wide), plan, 1)
    advised = int(re.search(r"stream.global_batch to (\d+) or less", str(error.value))[1])
    assert 0 < advised < 65536
    check_batch(parsed(replaced(wide, stream__global_batch=advised)), plan, 1)
    with pytest.raises(UserError, match="does not fit"):
        check_batch(parsed(replaced(wide, stream__global_batch=2 * advised)), plan, 1)
