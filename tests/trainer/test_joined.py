"""Training on a joined stream is, bitwise, training on the same data written at once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from exfm.data.clock import ManualClock
from exfm.data.cut import Cut, write_stream
from exfm.data.errors import UserError
from exfm.data.inbox import replay
from exfm.data.join import Joiner
from exfm.data.join_config import JoinConfig
from exfm.data.manifest import Stream, open_stream
from exfm.distillation.version import Identity, Versions
from tests.trainer.jobs import ROWS, SCHEMA, assert_same_outcome, job, run, tables_of, teacher

SPAN_S, START = 100_000, 1_000
SETTINGS = {"late_labels": "amend", "amend_s": 600, "slice_s": SPAN_S, "start": START, "slices": len(ROWS)}


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[Stream, Joiner, ManualClock]:
    """A stream of two label windows, and a joiner that makes it of its rows and events."""
    folder = tmp_path_factory.mktemp("joined")
    schema = SCHEMA.model_copy(update={"label_windows": {"click": 60, "buy": 86_400}})
    edges = np.concatenate([[0], np.cumsum(ROWS)]).tolist()
    starts = [START + SPAN_S * i for i in range(len(ROWS) + 1)]
    cuts = [Cut(edges[i], edges[i + 1], starts[i], starts[i + 1]) for i in range(len(ROWS))]
    written = write_stream(str(folder / "written"), schema, pa.concat_tables(tables_of()), cuts)
    replay(written, str(folder / "inbox"), {"click": 30, "buy": 50_000})
    paths = {
        "inbox": str(folder / "inbox"),
        "out": str(folder / "out"),
        "schema_file": str(folder / "inbox/schema.yaml"),
    }
    assert yaml.safe_load(Path(paths["schema_file"]).read_text())["label_windows"] == {"click": 60, "buy": 86_400}
    clock = ManualClock(START)
    return written, Joiner(JoinConfig.model_validate(paths | SETTINGS), clock), clock


def test_a_click_job_trains_minutes_after_the_fact_and_all_jobs_as_on_the_data_written_at_once(streams, tmp_path):
    written, joiner, clock = streams
    clock.at = START + SPAN_S * len(ROWS) + 60
    joiner.step()
    joined = joiner.root
    jobs = [
        teacher(tmp_path / name, where, heads__tasks=["click"]) for name, where in (("a", written.root), ("b", joined))
    ]
    assert [run(raw)[0] for raw in jobs] == [0, 0]
    assert_same_outcome(*jobs)
    with pytest.raises(UserError, match=r"slice 3 of .* has no committed labels.86400s"):
        run(job(tmp_path / "too-early", joined, stream__first=3))
    clock.advance(86_400)
    joiner.step()
    jobs = [job(tmp_path / name, where) for name, where in (("c", written.root), ("d", joined))]
    assert [run(raw)[0] for raw in jobs] == [0, 0]
    assert_same_outcome(*jobs)


def test_a_teacher_of_amended_labels_is_another_teacher(streams):
    written, joiner, clock = streams
    clock.at = START + 2 * SPAN_S * len(ROWS)
    joiner.step()
    who = Identity("fm", "config", ("click",), 0)
    first, amended = (open_stream(joiner.root, g) for g in ("first", "amended"))
    version = Versions(first, who).after(3)
    assert version == Versions(written, who).after(3) != Versions(first, replace(who, labels="amended")).after(3)
    for task, kinds in (
        (("click",), ("labels.60s.amended",)),
        (("buy", "click"), ("labels.60s.amended", "labels.86400s.amended")),
    ):
        assert amended.label_kinds(task) == kinds
    with pytest.raises(UserError, match="stream 'tiny' has no label.s. like; it has click, buy"):
        first.label_kinds(("like",))
