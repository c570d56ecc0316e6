"""A job without a commit of its own begins from chosen tensors of another's, under other names if need be."""

from pathlib import Path

import pytest
from torch import Tensor

from exfm.checkpoints.commits import committed
from exfm.data.errors import UserError
from exfm.trainer.env import process_group
from exfm.trainer.loop import Job
from exfm.trainer.run import DONE
from tests.trainer.jobs import Raw, here, job, last_state, make_stream, on, parsed, replaced, run
from tests.trainer.starts import CPU, initial_state, whole


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("warm") / "stream", (96, 96)).root


@pytest.fixture(scope="module")
def source(stream, tmp_path_factory) -> Raw:
    raw = job(tmp_path_factory.mktemp("warm") / "source", stream, stream__last=1)
    run(raw)
    return raw


def warm(folder: Path, source: Raw, **over: object) -> Raw:
    """The same job in another folder, begun from `source`."""
    path = source["run"]["folder"] + "/checkpoints"
    return replaced(source, run__folder=str(folder), checkpoint={"warm_start": {"path": path, **over}})


def begun(raw: Raw) -> dict[str, Tensor]:
    """What a job on this rank holds before its first step."""
    with process_group(here(), CPU, 60):
        live = Job(parsed(raw), here(), CPU, lambda: False)
        assert not live.commits.restore()
        assert (live.progress.slice, live.progress.consumed, live.progress.step) == (0, 0, 0)
        state = {name: whole(tensor) for name, tensor in live.commits.state.items()}
        live.close()
    return state


def from_source(state: dict[str, Tensor], source: Raw) -> set[str]:
    """Names of tensors that are the source's; every other one must be as a fresh job starts it."""
    saved, fresh = last_state(source), initial_state(source)
    taken = {n for n in state if state[n].equal(saved[n]) and not saved[n].equal(fresh[n])}
    assert [n for n in state if n not in taken and not state[n].equal(fresh[n])] == []
    return taken


def of_tables(names: set[str]) -> set[str]:
    return {n for n in names if n.startswith("tables.")}


def test_everything_is_taken_by_default_but_not_the_position(source, tmp_path):
    state = begun(warm(tmp_path / "run", source))
    assert from_source(state, source) >= {n for n in state if n.startswith("tables.") or n.endswith("exp_avg")}


def test_tables_alone_come_with_their_sums(source, tmp_path):
    state = begun(warm(tmp_path / "run", source, include=[r"tables\..*"]))
    assert from_source(state, source) == of_tables(set(state))


def test_the_dense_part_alone_comes_with_its_adam_state(source, tmp_path):
    state = begun(warm(tmp_path / "run", source, include=[r"dense\..*"]))
    taken = from_source(state, source)
    assert not of_tables(taken) and {n.split(".")[0] for n in taken} == {"dense", "adam"}
    weights = {n.removeprefix("dense.") for n in state if n.startswith("dense.")}
    assert {f"adam.{n}.exp_avg" for n in weights} <= taken


def test_one_table_by_name(source, tmp_path):
    state = begun(warm(tmp_path / "run", source, include=[r"tables\.user\.weight"]))
    assert from_source(state, source) == {"tables.user.weight", "tables.user.adagrad_sum"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_tables_of_other_names_are_taken_into_another_model(ranks, source, stream, tmp_path, on_ranks):
    """Two small tables, a deeper dense part, another plan: one table comes under its new name, the rest starts anew."""
    over = {
        "features": {"dense": ["price"], "sparse": [{"name": "user", "table": "people", "ids": "identity"}]},
        "tables": {"people": dict(source["tables"]["user"])},
        "sharding": {"allowed": ["row_wise"]},
    }
    raw = replaced(
        warm(tmp_path / "run", source, include=[r"tables\..*"], rename={r"^tables\.people\.": "tables.user."}), **over
    )
    if ranks == 1:
        state, fresh, saved = begun(raw), initial_state(raw), last_state(source)
        for kind in ("weight", "adagrad_sum"):
            assert state[f"tables.people.{kind}"].equal(saved[f"tables.user.{kind}"])
        assert [n for n in state if "people" not in n and not state[n].equal(fresh[n])] == []
    assert {code for code, _ in on(on_ranks, ranks, raw)} == {DONE}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"rename": {"tables.user": "tables.users"}}, r"lacks tables.users.weight; it is of another model"),
        ({"include": [r"tables\.nobody.*"]}, r"checkpoint.warm_start.include \[.*nobody.*\] chooses none of "),
        ({"path": "/nowhere/at/all"}, r"checkpoint.warm_start.path /nowhere/at/all holds no commit"),
    ],
)
def test_what_is_not_there_is_refused_by_name(over, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        run(warm(tmp_path / "run", source, **over))


def test_a_tensor_of_another_shape_is_refused_by_name(source, tmp_path):
    raw = replaced(warm(tmp_path / "run", source), tables__user__width=4)
    with pytest.raises(UserError, match=r"has tables.user.weight of shape \(20, 8\), the model wants \(20, 4\)"):
        run(raw)


def test_commits_of_its_own_win(source, tmp_path):
    """Stopped after its first slice and started again, it is what it would have been without the stop."""
    whole_job = warm(tmp_path / "whole", source)
    raw = replaced(whole_job, run__folder=str(tmp_path / "run"))
    whole_job, raw = (replaced(r, stream__last=None) for r in (whole_job, raw))
    run(whole_job)
    run(replaced(raw, stream__last=1))
    own = last_state(raw)
    assert not own["tables.user.weight"].equal(last_state(source)["tables.user.weight"])
    run(raw)
    assert committed(tmp_path / "run/checkpoints")[-1].step == committed(tmp_path / "whole/checkpoints")[-1].step == 6
    assert [n for n, t in last_state(raw).items() if not t.equal(last_state(whole_job)[n])] == []


def test_two_tensors_of_one_name_are_refused(source, tmp_path):
    raw = warm(tmp_path / "run", source, rename={r"tables\.viewed": "tables.user"})
    with pytest.raises(UserError, match=r"rename gives two tensors tables.user.weight"):
        run(raw, 1)


def test_a_hashed_table_of_another_number_of_rows_is_refused(source, tmp_path):
    raw = replaced(warm(tmp_path / "run", source), tables__item={"rows": 26, "width": 8})
    with pytest.raises(UserError, match=r"table 'item' has 26 rows, in .* 13: under ids: hash every id would move"):
        run(raw, 1)
