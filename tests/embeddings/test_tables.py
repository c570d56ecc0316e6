"""Ids to rows, and initial rows that no plan can change."""

import numpy as np
import pytest
import torch

from exfm.data.errors import UserError
from exfm.data.hashing import hash64, salt_of
from exfm.embeddings.config import FeaturesConfig, SparseFeature, TableConfig, check_features
from exfm.embeddings.ids import IdMap
from exfm.embeddings.tables import fill_initial
from exfm.trainer.run import DONE
from tests.trainer.jobs import job, last_state, make_stream, on, parsed, replaced, run, same
from tests.trainer.starts import initial_state

GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix(x: int) -> int:
    """SplitMix64 of Steele et al. on Python's integers."""
    x = (x + GOLDEN) % 2**64
    x = (x ^ (x >> 30)) * MIX1 % 2**64
    x = (x ^ (x >> 27)) * MIX2 % 2**64
    return x ^ (x >> 31)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("embeddings") / "stream").root


def rows_of(ids: list[int], feature: str = "item", table: str = "item", rows: int = 1000) -> list[int]:
    to_rows = IdMap(SparseFeature(name=feature, table=table, ids="hash"), TableConfig(rows=rows, width=4))
    n = len(ids)
    return to_rows(np.array(ids, np.int64), np.ones(n, np.int64), np.arange(n)).tolist()


def test_the_hash_is_splitmix64_and_never_changes():
    ids = [0, 1, -1, 2**62]
    assert hash64(np.array(ids)).tolist() == [splitmix(i % 2**64) for i in ids]
    assert splitmix(0) == 16294208416658607535
    # written into every checkpoint's meaning: these may not move
    assert salt_of("ids", "item") == 162105942753284674
    assert rows_of([0, 1, 2, -5, 2**40]) == [200, 193, 30, 21, 831]
    assert rows_of([2**40]) == [splitmix((2**40 + salt_of("ids", "item") * GOLDEN) % 2**64) % 1000]


def test_features_of_one_table_share_its_rows_and_other_tables_do_not():
    ids = list(range(50))
    assert rows_of(ids, "item") == rows_of(ids, "recent")
    assert rows_of(ids, table="item") != rows_of(ids, table="other")


def test_hashed_rows_are_spread_evenly():
    counts = np.bincount(rows_of(list(range(100_000)), rows=100), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi squared of 99 degrees


@pytest.mark.parametrize("bad", [7, -1])
def test_an_id_outside_an_identity_table_is_named_with_its_first_example(bad):
    to_rows = IdMap(SparseFeature(name="recent", table="item", ids="identity"), TableConfig(rows=7, width=4))
    ids, lengths = np.array([3, 6, 0, bad, 99]), np.array([2, 0, 1, 2])
    with pytest.raises(UserError, match=rf"feature 'recent': id {bad} of example 103 .* table 'item' of 7 rows"):
        to_rows(ids, lengths, np.array([100, 101, 102, 103]))
    assert to_rows(ids[:3], lengths[:3], np.arange(3)).tolist() == [3, 6, 0]


def test_an_id_outside_an_identity_table_ends_a_job(stream, tmp_path):
    with pytest.raises(UserError, match=r"feature 'user': id 1\d of example \d+ .* 'user' of 10 rows"):
        run(job(tmp_path, stream, tables__user__rows=10))


# ---------------------------------------------------------------- initial rows


def test_initial_rows_are_a_function_of_seed_table_row_and_column_alone(stream, tmp_path, on_ranks):
    """Before any step: commit what 1, 2 and 3 ranks start with under every sharding type."""
    reference = initial_state(job(tmp_path / "one", stream))
    for kind in ("table_wise", "row_wise", "data_parallel", "column_wise"):
        for ranks in (1, 2, 3):
            # learning rates this small leave fp32 rows as they were
            raw = job(tmp_path / f"{kind}{ranks}", stream, sharding__allowed=[kind], stream__last=1)
            raw = replaced(raw, optim__tables__lr=1e-30, optim__dense__lr=1e-30)
            on(on_ranks, ranks, raw)
            state = last_state(raw)
            wanted = {
                k: v
                for k, v in reference.items()
                if k.startswith("dense.") or (k.endswith("weight") and "adam" not in k)
            }
            assert same(wanted, {k: state[k] for k in wanted}) == [], (kind, ranks)


def test_initial_rows_are_uniform_and_of_the_tables_range():
    shard = torch.empty(20_000, 16)
    table = TableConfig(rows=20_000, width=16, init=0.25)
    fill_initial(shard, "t", table, 0, 0, 0)
    assert shard.abs().max() < 0.25 and shard.abs().max() > 0.2499
    counts = torch.histc(shard, 50, -0.25, 0.25)
    assert ((counts - 6400) ** 2 / 6400).sum() < 90  # chi squared of 49 degrees
    assert torch.corrcoef(shard.T).fill_diagonal_(0).abs().max() < 0.03  # columns
    assert abs(torch.corrcoef(torch.stack([shard[:-1].flatten(), shard[1:].flatten()]))[0, 1]) < 0.01  # rows
    other = torch.empty_like(shard)
    for name, seed in (("t", 1), ("u", 0)):
        fill_initial(other, name, table, seed, 0, 0)
        assert abs(torch.corrcoef(torch.stack([shard.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_initial_rows_are_the_published_hash():
    shard = torch.empty(3, 4)
    fill_initial(shard, "t", TableConfig(rows=9, width=8, init=0.5), 7, 4, 2)
    salt = salt_of("init", 7, "t")
    for r in range(3):
        for c in range(4):
            bits = splitmix(splitmix((4 + r + salt) % 2**64) ^ (2 + c + 1))
            unit = ((bits >> 40) + 0.5) / 2**24
            assert shard[r, c].item() == pytest.approx((2 * unit - 1) * 0.5, abs=1e-7)


def test_fp16_tables_train(stream, tmp_path):
    raw = job(tmp_path / "run", stream, tables__item__dtype="fp16", tables__tags__dtype="fp16")
    assert run(raw)[0] == DONE
    before, after = initial_state(raw), last_state(raw)
    for name in ("item", "tags"):
        weight = after[f"tables.{name}.weight"]
        assert weight.dtype == torch.float16 and weight.isfinite().all()
        assert (weight != before[f"tables.{name}.weight"]).any(dim=1).all()


# ---------------------------------------------------------------- wrong configurations


def features(*sparse: dict, dense: tuple = ()) -> FeaturesConfig:
    return FeaturesConfig.model_validate({"dense": list(dense), "sparse": list(sparse)})


ONE = {"name": "item", "table": "item", "ids": "hash"}
T = TableConfig(rows=10, width=4)


@pytest.mark.parametrize(
    ("given", "tables", "message"),
    [
        (
            features(ONE | {"table": "itme"}),
            {"item": T},
            r"'item' looks up table 'itme', which is not among tables \(item\)",
        ),
        (features(ONE), {"item": T, "spare": T}, "table 'spare' is looked up by no feature"),
        (features(ONE, ONE), {"item": T}, r"feature\(s\) item are named twice"),
        (features(ONE, dense=("item",)), {"item": T}, r"feature\(s\) item are named twice"),
        (
            features(ONE, {"name": "tags", "table": "item", "ids": "hash", "weighted": True}),
            {"item": T},
            "table 'item' has weighted and unweighted features",
        ),
    ],
)
def test_features_and_tables_that_do_not_fit_are_refused(given, tables, message):
    with pytest.raises(UserError, match=message):
        check_features(given, tables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "nope", "table": "user", "ids": "hash"}, "no sparse column 'nope'; it has user, item"),
        (
            {"name": "item", "table": "user", "ids": "hash", "weighted": True},
            "'item' is weighted, but column 'item' has no weights",
        ),
    ],
)
def test_columns_that_the_stream_lacks_are_refused(change, message, stream, tmp_path):
    raw = job(tmp_path, stream, features={"dense": [], "sparse": [change]}, tables={"user": {"rows": 20, "width": 8}})
    with pytest.raises(UserError, match=message):
        run(raw)


def test_a_width_that_fbgemm_cannot_hold_is_refused_by_the_config(stream, tmp_path):
    with pytest.raises(UserError, match=r"'tables.user.width' is 6: Input should be a multiple of 4"):
        parsed(job(tmp_path, stream, tables__user__width=6))
