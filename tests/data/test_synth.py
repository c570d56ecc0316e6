"""The synthetic stream: its best reachable NE is right, it is repeatable, and it changes over time."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.data.synth import World, bayes_ne, entropy, generate, synth

SMALL = {"num_slices": 6, "rows_per_slice": 4_000, "num_users": 300, "num_items": 100, "num_tasks": 2}


@pytest.fixture(scope="module")
def slices():
    return list(generate(World(**SMALL)))


def log_loss(labels: np.ndarray, p: np.ndarray) -> np.ndarray:
    return -(labels * np.log(p) + (1 - labels) * np.log1p(-p))


@pytest.mark.parametrize("task", [0, 1])
def test_the_true_probability_reaches_the_stored_ne_within_sampling_error(slices, task):
    p = np.concatenate([s.probability[:, task] for s in slices])
    labels = np.concatenate([s.table.column(("click", "convert")[task]).to_numpy() for s in slices])
    losses, base = log_loss(labels, p), entropy(p.mean())
    error = (losses - entropy(p)).std() / len(p) ** 0.5 / base
    assert abs(losses.mean() / base - bayes_ne(p)) < 4 * error < 0.03
    assert abs(labels.mean() - p.mean()) < 4 * (p * (1 - p)).mean() ** 0.5 / len(p) ** 0.5


def test_a_constant_prediction_has_ne_one_and_the_truth_is_much_better(slices):
    p = np.concatenate([s.probability[:, 0] for s in slices])
    labels = np.concatenate([s.table.column("click").to_numpy() for s in slices])
    constant = log_loss(labels, np.full(len(p), labels.mean())).mean() / entropy(p.mean())
    assert abs(constant - 1) < 0.01 and bayes_ne(p) < 0.8
    assert bayes_ne(np.full(9, 0.3)) == pytest.approx(1) and bayes_ne(np.array([0.0, 1.0])) == pytest.approx(
        0, abs=1e-9
    )


def test_manifests_and_stream_hold_the_best_ne_of_slice_stream_and_domain(tmp_path, slices):
    seen = []
    synth(str(tmp_path / "s"), progress=lambda *step: seen.append(step), **SMALL)
    stream = open_stream(str(tmp_path / "s"))
    assert seen[-1] == ("writing slices", 6, 6)
    for index, one in enumerate(slices):
        manifest = stream.wait(index, "labels", 0)
        assert manifest.extra["convert"]["bayes_ne"] == bayes_ne(one.probability[:, 1])
        assert manifest.t1 == stream.wait(min(index + 1, 5), "features", 0).t0 or index == 5
    p = np.concatenate([s.probability[:, 0] for s in slices])
    domain = np.concatenate([s.table.column("domain").to_numpy() for s in slices])
    click = stream.info.extra["tasks"]["click"]
    assert click["bayes_ne"] == bayes_ne(p)
    assert click["bayes_ne_by_domain"] == {str(d): bayes_ne(p[domain == d]) for d in range(4)}
    assert stream.info.extra["settings"]["rows_per_slice"] == 4_000


def test_the_same_seed_gives_the_same_files_and_a_slice_does_not_depend_on_how_many_follow(tmp_path):
    digests = {}
    for name, settings in {"a": {}, "b": {}, "longer": {"num_slices": 3}, "other": {"seed": 1}}.items():
        stream = synth(str(tmp_path / name), **{**SMALL, "num_slices": 2, "rows_per_slice": 500, **settings})
        digests[name] = [stream.wait(i, k, 0).digest() for i in range(2) for k in ("features", "labels")]
    assert digests["a"] == digests["b"] == digests["longer"]
    assert not set(digests["a"]) & set(digests["other"])


def test_new_ids_arrive_in_every_slice_and_some_are_popular(slices):
    world = World(**SMALL)
    for index, one in enumerate(slices):
        for kind, name in (("user", "user_id"), ("item", "item_id")):
            ids = one.table.column(name).to_numpy()
            assert ids.max() < world.num_ids(kind, index)
            assert index == 0 or ids.max() >= world.num_ids(kind, index - 1)
    counts = np.sort(np.bincount(slices[-1].table.column("item_id").to_numpy()))[::-1]
    assert counts[:10].sum() > 0.2 * counts.sum()


def test_preferences_drift_further_with_time_and_not_at_all_when_told_so():
    def change(world: World, index: int) -> float:
        rng = np.random.default_rng(0)
        user, item = rng.integers(0, 300, 5_000), rng.integers(0, 100, 5_000)
        zero = np.zeros(5_000)
        first, later = (world.logit(t, user, item, zero.astype(int), zero, zero) for t in (0, index))
        return float(np.abs(later - first).mean())

    world = World(**SMALL, drift=0.1)
    assert 0.05 < change(world, 2) < change(world, 5)
    assert change(replace(world, drift=0.0), 5) == 0


def test_recent_items_are_the_users_last_positives_of_earlier_slices(slices):
    past: dict[int, list[int]] = {}
    seen: dict[int, int] = {}
    for one in slices[:3]:
        rows = one.table.to_pylist()
        for row in rows:
            assert row["recent_items"] == past.get(row["user_id"], [])[::-1][:10]
            assert row["user_count"] == seen.get(row["user_id"], 0)
        for row in rows:
            seen[row["user_id"]] = seen.get(row["user_id"], 0) + 1
            if row["click"]:
                past.setdefault(row["user_id"], []).append(row["item_id"])


def test_domains_differ_in_size_and_in_click_rate(slices):
    domain = np.concatenate([s.table.column("domain").to_numpy() for s in slices])
    p = np.concatenate([s.probability[:, 0] for s in slices])
    shares = np.bincount(domain) / len(domain)
    assert shares == pytest.approx(np.array([12, 6, 4, 3]) / 25, abs=0.02)
    assert np.ptp([p[domain == d].mean() for d in range(4)]) > 0.05


def test_wrong_settings_are_refused(tmp_path):
    for settings, message in (
        ({"num_slice": 3}, "unknown setting num_slice; there are num_slices"),
        ({"num_tasks": 3}, "num_tasks is 3"),
        ({"width": 3}, "an even number"),
        ({"growth": -1.0}, "0 to 1 are allowed"),
        ({"num_users": 0}, "num_users is 0"),
    ):
        with pytest.raises(UserError, match=message):
            synth(str(tmp_path / "s"), **settings)
    assert not (tmp_path / "s").exists()


def test_one_task_has_one_label_column(tmp_path):
    stream = synth(str(tmp_path / "s"), num_slices=1, rows_per_slice=50)
    assert pq.read_schema(f"{stream.root}/slice=000000/labels/part-00000.parquet").names == ["click"]
