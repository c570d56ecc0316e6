"""What is wrong with a configuration is named: the key, its value, the nearest right spelling."""

import pytest
import yaml

from exfm.data.errors import UserError
from exfm.trainer.config import JobConfig, load_config
from tests.trainer.jobs import Raw, job, make_stream, on, parsed, replaced, run, student


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("config") / "stream", (40, 40)).root


@pytest.fixture
def raw(tmp_path) -> Raw:
    return job(tmp_path / "run", "stream")


@pytest.mark.parametrize(
    ("change", "key", "near"),
    [
        ({"chekpoint": {}}, "chekpoint", "checkpoint"),
        ({"run__sede": 1}, "run.sede", "seed"),
        ({"optim__dense__warmup": 1}, "optim.dense.warmup", "warmup_steps"),
        ({"model__cross_layer": 3}, "model.cross_layer", "cross_layers"),
        ({"tables__user__width_": 3}, "tables.user.width_", "width"),
        ({"stream__domains": [{"name": "a", "colum": "user", "values": [1]}]}, "stream.domains.0.colum", "column"),
    ],
)
def test_an_unknown_key_gets_the_nearest_right_one(change, key, near, raw):
    with pytest.raises(UserError, match=rf"unknown key '{key}'; did you mean '{near}'\?"):
        parsed(replaced(raw, **change))


def test_an_unknown_key_of_a_feature_gets_the_nearest_right_one(raw):
    raw["features"]["sparse"][1]["tabel"] = "item"
    with pytest.raises(UserError, match=r"unknown key 'features.sparse.1.tabel'; did you mean 'table'\?"):
        parsed(raw)
    del raw["features"]["sparse"][1]["tabel"]
    raw["features"]["dense"][1]["log1"] = True
    with pytest.raises(UserError, match=r"unknown key 'features.dense.1.log1'; did you mean 'log1p'\?"):
        parsed(raw)


def test_an_unknown_key_like_no_other_gets_all_that_are_allowed(raw):
    with pytest.raises(UserError, match=r"unknown key 'heads.zzz'; allowed: hidden, tasks"):
        parsed(replaced(raw, heads__zzz=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run__seed": "seven"}, "'run.seed' is 'seven'"),
        ({"optim__tables__lr": -1}, "'optim.tables.lr' is -1: Input should be greater than 0"),
        ({"run__pipeline": "fast"}, "'run.pipeline' is 'fast': Input should be 'base', 'sparse_dist' or 'prefetch'"),
        ({"tables__user__rows": 0}, "'tables.user.rows' is 0"),
        ({"model__rank": "many"}, "'model.rank' is 'many'"),
        ({"sharding__allowed": ["rowwise"]}, "'sharding.allowed.0' is 'rowwise'.*'row_wise'"),
        ({"heads__tasks": []}, "'heads.tasks'"),
        ({"run__name": None}, "key 'run.name' is missing"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(change, message, raw):
    with pytest.raises(UserError, match=message):
        parsed(replaced(raw, **change))


def test_all_mistakes_are_named_at_once(raw):
    with pytest.raises(UserError, match=r"run.seed.*optim.tables.lr"):
        parsed(replaced(raw, run__seed="x", optim__tables__lr=-1))


def write(folder, raw: Raw) -> str:
    (folder / "job.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "job.yaml")


def test_set_overrides_what_the_file_says(tmp_path, raw):
    sets = [
        "run.seed=7",
        "optim.dense.lr=1e-1",
        "evaluation.skip=0.5",
        "heads.hidden=[3, 4]",
        "run.pipeline=sparse_dist",
    ]
    config = load_config(write(tmp_path, raw), sets, JobConfig)
    assert (config.run.seed, config.optim.dense.lr, config.evaluation.skip) == (7, 0.1, 0.5)
    assert (config.heads.hidden, config.run.pipeline) == ((3, 4), "sparse_dist")
    wanted = replaced(raw, run__seed=7, optim__dense__lr=0.1, evaluation__skip=0.5, heads__hidden=[3, 4])
    assert config == parsed(replaced(wanted, run__pipeline="sparse_dist"))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("run.seed", "not of the form section.key=value"),
        ("run.name.x=1", "'name' is not a section"),
        ("run.sede=1", r"unknown key 'run.sede'; did you mean 'seed'\?"),
        ("heads.hidden=[3", "--set heads.hidden=\\[3"),
    ],
)
def test_a_wrong_set_is_named(item, message, tmp_path, raw):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, raw), [item], JobConfig)


@pytest.mark.parametrize("text", ["[1, 2]", "run: [", ""])
def test_a_file_that_is_no_config_is_refused_by_name(text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad.yaml"):
        load_config(tmp_path / "bad.yaml", [], JobConfig)
    with pytest.raises(UserError, match=r"gone.yaml does not exist"):
        load_config(tmp_path / "gone.yaml", [], JobConfig)


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize(
    "change",
    [
        {"run__folder": "elsewhere"},
        {"run__name": "other"},
        {"run__pipeline": "sparse_dist"},
        {"run__device": "auto"},
        {"stream__path": "elsewhere"},
        {"stream__last": 3},
        {"stream__prefetch": 2},
        {"sharding__allowed": ["row_wise"]},
        {"checkpoint__every_slices": 3},
        {"distillation__learn__supervision": "elsewhere/fm"},
        {"distillation__learn__wait_s": 3.0},
    ],
)
def test_where_and_how_fast_is_no_part_of_a_jobs_identity(change, tmp_path):
    raw = student(tmp_path, "stream", "log/fm", "auxiliary_head")
    assert parsed(raw).identity() == parsed(replaced(raw, **change)).identity()


@pytest.mark.parametrize(
    "change",
    [
        {"run__seed": 1},
        {"optim__dense__lr": 0.5},
        {"stream__global_batch": 64},
        {"stream__shuffle_window": 64},
        {"stream__first": 1},
        {"tables__user__width": 16},
        {"heads__hidden": []},
        {"distillation__learn__method": "single_head"},
        {"distillation__learn__loss_weight": 2.0},
        {"distillation__learn__adapter": {"lr": 0.5}},
    ],
)
def test_what_decides_weights_is_part_of_a_jobs_identity(change, tmp_path):
    raw = student(tmp_path, "stream", "log/fm", "auxiliary_head")
    assert parsed(raw).digest() != parsed(replaced(raw, **change)).digest()


def test_a_checkpoint_of_another_config_is_refused_with_the_differing_keys(stream, tmp_path):
    raw = job(tmp_path / "run", stream)
    run(raw, 1)
    other = replaced(raw, run__seed=3, optim__tables__lr=0.7, run__pipeline="sparse_dist")
    with pytest.raises(UserError) as refused:
        run(other)
    text = str(refused.value)
    assert "run.seed (checkpoint 0, config 3)" in text and "optim.tables.lr (checkpoint 0.1, config 0.7)" in text
    assert "pipeline" not in text and "dense" not in text


def test_a_job_resumed_with_other_bootstrap_replicates_is_refused(stream, tmp_path):
    raw = job(tmp_path / "run", stream)
    run(raw, 1)
    with pytest.raises(UserError, match=r"evaluation.bootstrap"):
        run(replaced(raw, evaluation__bootstrap=7))


# ---------------------------------------------------------------- ranks


def refused(on_ranks, n: int, raw: Raw) -> str:
    with pytest.raises(AssertionError) as failed:
        on(on_ranks, n, raw)
    errors = failed.value.errors
    assert len(errors) == n and all(isinstance(e, UserError) for e in errors.values())
    return str(errors[0])


def test_more_ranks_than_a_global_batch_are_refused(stream, tmp_path, on_ranks):
    text = refused(on_ranks, 3, job(tmp_path, stream, stream__global_batch=2))
    assert "3 ranks share a global batch of 2 examples" in text


def test_more_ranks_than_rows_of_a_row_wise_table_are_refused(stream, tmp_path, on_ranks):
    raw = job(tmp_path, stream, tables__item__rows=2, sharding__allowed=["row_wise"])
    text = refused(on_ranks, 3, raw)
    assert "table 'item' has 2 rows, too few for row_wise over 3 ranks" in text


def test_sharding_of_an_unknown_table_is_refused(stream, tmp_path):
    with pytest.raises(UserError, match=r"sharding.tables names itme, but the tables are"):
        run(job(tmp_path, stream, sharding__tables={"itme": ["row_wise"]}))
