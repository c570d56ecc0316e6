"""Labels are committed when their task's window closes, late ones by the policy; against the rule, computed plainly."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from exfm.data.columns import BatchColumns
from exfm.data.errors import UserError
from exfm.data.inbox import replay
from exfm.data.inspect import inspect
from exfm.data.join import Joiner
from exfm.data.manifest import open_stream
from exfm.data.reader import StreamConfig, open_slice, slices_of
from exfm.data.schema import Schema
from tests.data.joining import (
    JOINED,
    START,
    WINDOWS,
    Event,
    column,
    config,
    drop_events,
    drop_rows,
    files,
    joiner,
    kinds,
    rows,
    stream,
)
from tests.data.small import COLUMNS, SCHEMA, write_small


def counts(joined: Joiner, what: str) -> dict[str, int]:
    return joined.counts[what]


def test_every_kind_of_files_is_committed_in_the_second_that_its_window_closes(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(100))
    joined, clock = joiner(tmp_path, features_delay_s=5)
    seen: dict[str, float] = {}
    for at in (1_054, 1_055, 1_109, 1_110, 2_049, 2_050):
        clock.at = at
        joined.step()
        seen |= {kind: clock.at for kind in kinds(tmp_path, 0) if kind not in seen}
    assert seen == {"features": 1_055, "labels.60s": 1_110, "labels.1000s": 2_050}
    for kind, at in seen.items():
        manifest = stream(tmp_path).wait(0, kind, 0)
        assert (manifest.extra["at"], manifest.t0, manifest.t1, manifest.rows) == (at, 1_000, 1_050, 100)
    assert inspect(str(tmp_path / "out"))["slices"][0]["lag_s"] == {k: at - 1_050 for k, at in seen.items()}


def test_a_job_of_early_tasks_reads_a_slice_whose_late_labels_are_not_there_yet(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(100))
    drop_events(tmp_path, "a.parquet", [(70, "click", 1, 1_020)])
    joined, clock = joiner(tmp_path)
    clock.advance(200)
    joined.step()
    early = BatchColumns(JOINED, (("price", False),), (), ("click",))
    both = BatchColumns(JOINED, (("price", False),), (), ("buy", "click"))
    settings = StreamConfig(path=str(tmp_path / "out"), global_batch=100)
    batch = next(iter(open_slice(stream(tmp_path), settings, early, 0, 0).batches()))
    assert [int(i) for i in batch.ids[batch.labels[:, 0] == 1]] == [70]
    with pytest.raises(UserError, match="slice 0 of .* has no committed labels.1000s"):
        open_slice(stream(tmp_path), settings, both, 0, 0)
    assert inspect(str(tmp_path / "out"))["slices"][0]["state"] == "part labelled"
    clock.advance(1_000)
    joined.step()
    batch = next(iter(open_slice(stream(tmp_path), settings, both, 0, 0).batches()))
    assert batch.labels[:, 0].sum() == 0 and batch.labels[7].tolist() == [0, 1]


def some_events(n: int, seed: int) -> list[Event]:
    """Events of some examples before, in and after their windows; some examples have several, some values are 0 or null."""
    rng = np.random.default_rng(seed)
    found: list[Event] = []
    for _ in range(n):
        row, task = int(rng.integers(400)), ("click", "buy")[rng.integers(2)]
        delay = int(rng.choice([0, WINDOWS[task] // 2, WINDOWS[task], WINDOWS[task] + 1, WINDOWS[task] + 80]))
        value = (1.0, 1.0, 0.0, None)[rng.integers(4)]
        found.append((10 * row, task, value, START + row // 2 + delay))
    return sorted(found, key=lambda e: e[3])


def wanted(events: list[Event], task: str, within_s: int) -> list[float | None]:
    """The rule, example by example."""
    labels: list[float | None] = []
    for row in range(400):
        mine = [v for i, t, v, at in events if i == 10 * row and t == task and at <= START + row // 2 + within_s]
        labels.append(1.0 if 1.0 in mine else None if None in mine else 0.0)
    return labels


def feed(folder: Path, joined: Joiner, clock, events: list[Event], until: int) -> None:
    """Events arrive in the second after they happen, in a file of their own."""
    sent = 0
    while clock.at < until:
        clock.advance(25)
        ready = [e for e in events[sent:] if e[3] < clock.at]
        if ready:
            drop_events(folder, f"{clock.at:08.0f}.parquet", ready)
            sent += len(ready)
        joined.step()


def test_labels_are_what_the_rule_says_of_events_in_their_windows(tmp_path):
    for name, start in (("a.parquet", 0), ("b.parquet", 130)):
        drop_rows(tmp_path, name, rows().slice(start, (130, 270)[start > 0]))
    joined, clock = joiner(tmp_path, late_labels="amend", amend_s=200)
    events = some_events(600, 0)
    feed(tmp_path, joined, clock, events, 3_000)
    for task, kind in (("click", "labels.60s"), ("buy", "labels.1000s")):
        for suffix, more in (("", 0), (".amended", 200)):
            got = [x for i in range(4) for x in column(tmp_path, i, kind + suffix, task)]
            assert got == wanted(events, task, WINDOWS[task] + more), kind + suffix
        late = [e for e in events if e[1] == task and e[3] > START + e[0] // 20 + WINDOWS[task]]
        assert counts(joined, "late")[task] == counts(joined, "amended")[task] == len(late) > 50
    assert not any(counts(joined, "dropped").values()) and not any(counts(joined, "unknown").values())


def test_files_are_moved_away_once_nothing_of_them_is_open(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(150))
    drop_events(tmp_path, "a.parquet", [(0, "click", 1, 1_001)])
    drop_events(tmp_path, "b.parquet", [(0, "buy", 1, 1_001)])
    joined, clock = joiner(tmp_path)

    def left() -> list[str]:
        inbox = tmp_path / "inbox"
        return sorted(str(p.relative_to(inbox)) for p in inbox.glob("*/*.parquet"))

    for at, wanted_left in (
        (1_050, ["features/a.parquet", "labels/a.parquet", "labels/b.parquet"]),
        (1_110, ["labels/b.parquet"]),
        (2_100, []),
    ):
        clock.at = at
        joined.step()
        assert left() == wanted_left
    assert sorted(p.name for p in (tmp_path / "inbox/labels/done").iterdir()) == ["a.parquet", "b.parquet"]


def test_a_late_label_is_dropped_and_counted(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(100))
    joined, clock = joiner(tmp_path)
    clock.advance(110)
    joined.step()
    before = files(tmp_path)
    # in its window, but seen after the commit; and a task whose window is still open
    drop_events(tmp_path, "late.parquet", [(0, "click", 1, 1_020), (0, "buy", 1, 1_020)])
    clock.advance(2_000)
    joined.step()
    assert {name: data for name, data in files(tmp_path).items() if name in before} == before
    assert counts(joined, "late") == counts(joined, "dropped") == {"click": 1, "buy": 0}
    assert column(tmp_path, 0, "labels.1000s", "buy")[0] == 1
    with pytest.raises(UserError, match=r"has first labels only: its joiner does not amend"):
        stream(tmp_path, "amended")


def test_a_late_label_amends_a_second_generation_within_the_bound_and_never_the_first(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(100))
    joined, clock = joiner(tmp_path, late_labels="amend", amend_s=300)
    clock.advance(110)
    joined.step()
    before = files(tmp_path)
    drop_events(tmp_path, "1.parquet", [(0, "click", 1, 1_020), (10, "click", 1, 1_361), (20, "click", 1, 1_361)])
    clock.advance(299)
    joined.step()
    assert "labels.60s.amended" not in kinds(tmp_path, 0)
    clock.advance(1)
    joined.step()
    drop_events(tmp_path, "2.parquet", [(30, "click", 1, 1_020)])
    joined.step()
    now = files(tmp_path)
    assert {name: now[name] for name in before} == before
    assert column(tmp_path, 0, "labels.60s", "click")[:4] == [0, 0, 0, 0]
    # example 10 was at 1,000, example 20 at 1,001: its event is 360 s later, the other's 361
    assert column(tmp_path, 0, "labels.60s.amended", "click")[:4] == [1, 0, 1, 0]
    assert [counts(joined, what)["click"] for what in ("late", "amended", "dropped")] == [4, 2, 2]
    columns = BatchColumns(JOINED, (("price", False),), (), ("click",))
    sums = {}
    for generation in ("first", "amended"):
        settings = StreamConfig(path=str(tmp_path / "out"), global_batch=100, labels=generation)
        opened = open_slice(stream(tmp_path, generation), settings, columns, 0, 0)
        sums[generation] = float(next(iter(opened.batches())).labels.sum())
    assert sums == {"first": 0, "amended": 2}


def test_labels_of_unknown_examples_and_rows_that_come_too_late_are_counted(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(200).slice(0, 150))
    drop_events(tmp_path, "a.parquet", [(5, "click", 1, 1_020), (1_990, "click", 1, 1_099), (7, "buy", 1, 1_500)])
    joined, clock = joiner(tmp_path, at=1_050)
    joined.step()
    assert counts(joined, "unknown") == {"click": 0, "buy": 0}  # their rows may still come
    drop_rows(tmp_path, "b.parquet", pa.concat_tables([rows(200).slice(150), rows(5).slice(4)]).slice(0, 51))
    with pytest.raises(UserError, match=r"b.parquet: example id 40 has been there before"):
        joined.step()
    drop_rows(tmp_path, "b.parquet", rows(200).slice(150))
    drop_rows(tmp_path, "c.parquet", rows(1_000).slice(0, 3).set_column(0, "example_id", pa.array([1, 2, 3])))
    joined = Joiner(config(tmp_path), clock)
    for _ in range(3):
        clock.advance(60)
        joined.step()
    assert counts(joined, "unknown") == {"click": 1, "buy": 0} and joined.late_features == 3
    assert column(tmp_path, 1, "labels.60s", "click")[99] == 1
    last = json.loads((tmp_path / "out/join_metrics.jsonl").read_text().splitlines()[-1])
    assert (last["stage"], last["slice"], last["late_features"], last["unknown"]["click"]) == ("labels.60s", 1, 3, 1)
    assert (last["at"], last["lag_s"], last["positives"]) == (1_170, 10, {"click": 1})


def test_a_window_without_examples_is_part_of_the_next_slice(tmp_path):
    early, late = rows(40), rows(400).slice(300, 100)  # [1000, 1020) and [1150, 1200)
    drop_rows(tmp_path, "a.parquet", early)
    joined, clock = joiner(tmp_path)
    clock.advance(120)
    joined.step()
    drop_rows(tmp_path, "b.parquet", late)
    clock.advance(80)
    joined.step()
    spans = [(m.t0, m.t1, m.rows) for m in (stream(tmp_path).wait(i, "features", 0) for i in range(2))]
    assert spans == [(1_000, 1_050, 40), (1_050, 1_200, 100)]


def test_a_replayed_stream_is_joined_into_the_same_files(tmp_path):
    written = write_small(tmp_path / "one", (100, 100), schema=JOINED)
    replay(written, str(tmp_path / "inbox"), {"click": 60, "buy": 7})
    joined, clock = joiner(tmp_path, slice_s=100_000, slices=2)
    clock.advance(300_000)
    lags = {(line["stage"], line["slice"]): (line["lag_s"], line["lag_slices"]) for line in joined.step()}
    assert lags["features", 0] == (200_000, 2) and lags["labels.1000s", 1] == (99_000, 0)
    assert joined.finished and stream(tmp_path).info.num_slices == 2
    for index in range(2):
        for kind in ("features", "labels.60s", "labels.1000s"):
            a, b = (s.wait(index, kind, 0) for s in (written, stream(tmp_path)))
            assert a.digest() == b.digest() and (a.t0, a.t1) == (b.t0, b.t1)
    # the files name their own start where the config does not
    clock.at = START + 7
    replay(written, str(tmp_path / "again/inbox"))
    other = Joiner(config(tmp_path / "again", start=None), clock)
    other.step()
    assert other.t0 == 1_000 and not other.finished


def test_tasks_of_one_window_share_the_files_that_streams_always_had():
    assert SCHEMA.label_files() == {"labels": ("click", "buy")}
    same = SCHEMA.model_copy(update={"label_windows": {"click": 60, "buy": 60}})
    assert same.label_files() == {"labels": ("click", "buy")}
    assert JOINED.label_files() == {"labels.60s": ("click",), "labels.1000s": ("buy",)}
    # as it was before there were windows
    assert SCHEMA.digest() == "80aff36a54331356" and JOINED.digest() != SCHEMA.digest()
    for wrong in ({"nothing": 60}, {"click": -1}):
        with pytest.raises(ValueError, match="is no label's window of at least 0 seconds"):
            Schema(name="s", labels=("click",), label_windows=wrong)


def test_prepared_streams_of_several_windows_are_written_and_read_whole(tmp_path):
    written = write_small(tmp_path / "s", (30,), schema=JOINED)
    plain = write_small(tmp_path / "p", (30,))
    batches = []
    for opened in (open_stream(written.root), open_stream(plain.root)):
        settings = StreamConfig(path=opened.root, global_batch=30)
        assert slices_of(opened, settings) == range(1)
        batches.append(next(iter(open_slice(opened, settings, COLUMNS, 0, 0).batches())))
        assert opened.wait(0, "features", 0).extra["at"] > 1.7e9
    assert batches[0].labels.nan_to_num(-1).tolist() == batches[1].labels.nan_to_num(-1).tolist()
    assert inspect(written.root)["slices"][0]["labels"] == inspect(plain.root)["slices"][0]["labels"]
