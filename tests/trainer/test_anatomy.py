"""Where a job's time went: stages that leave no gap, kept over restarts, and a timeline of the steps that were asked for."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from exfm.trainer import anatomy, build
from exfm.trainer.anatomy import (
    BACKWARD,
    BOOKKEEPING,
    FORWARD,
    IN_STEP,
    LOOKUP,
    LOST,
    OPTIMIZER,
    PIPELINE,
    READING,
    STAGES,
    STARTING,
    Anatomy,
    Pace,
    verdict,
)
from exfm.trainer.steps import Feed, Pipeline
from tests.trainer.jobs import assert_same_outcome, make_stream, run, student, summary, teacher


class Clock:
    """Moves only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(anatomy, "perf_counter", lambda: self.now)
        monkeypatch.setattr(anatomy, "time", lambda: 1_000_000 + self.now)

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Spends(nn.Module):
    def __init__(self, clock: Clock, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, inner
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: torch.Tensor) -> Any:
        self.clock.spend(self.seconds)
        if self.inner is not None:
            return self.inner(batch)
        loss = self.weight * batch.sum()
        loss.register_hook(lambda g: self.clock.spend(40.0))
        return loss, loss.detach()


def test_every_second_of_a_step_is_counted_once_in_the_stage_that_spent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    own = Anatomy(torch.device("cpu"))
    objective = Spends(clock, 10.0)
    model = Spends(clock, 7.0, objective)
    own.watch(model, objective)
    clock.spend(3.0)

    class Optimizers:
        zero_grad = staticmethod(lambda *_: clock.spend(0.5))
        step = staticmethod(lambda: clock.spend(5.0))

    class Replicas:
        after_step = staticmethod(lambda: clock.spend(1.0))

    class Built:
        optimizers, replicas = Optimizers(), Replicas()

    Built.model = model  # type: ignore[attr-defined]

    def batches() -> Any:
        for _ in range(2):
            clock.spend(2.0)
            yield torch.ones(3)
        clock.spend(2.0)

    built: Any = Built()
    for _ in Pipeline("base", built, torch.device("cpu"), own).run(Feed(batches(), None, own)):
        clock.spend(0.25)
    seconds = own.seconds()
    # the end of the feed is waited for too
    expected = {STARTING: 3.0, READING: 6.0, LOOKUP: 14.0, FORWARD: 20.0, BACKWARD: 80.0, OPTIMIZER: 12.0}
    assert {s: seconds[s] for s in expected} == pytest.approx(expected)
    assert sum(seconds.values()) == pytest.approx(clock.now - 100.0)
    assert seconds[BOOKKEEPING] == 0.5
    whole = Pace(own, 6.0, 100.0, 1).whole(50)
    assert whole["goodput"] == pytest.approx(sum(seconds[s] for s in IN_STEP) / (clock.now - 100.0))
    assert whole["mfu"] == pytest.approx(6.0 * 50 / (clock.now - 100.0) / 100.0)


def test_what_a_restart_loses_is_lost_and_what_was_kept_is_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    first = Anatomy(torch.device("cpu"))
    first.mark(FORWARD)
    clock.spend(30.0)
    saved = json.loads(json.dumps(first.state()))
    clock.spend(50.0)  # not in a commit; the rank dies
    second = Anatomy(torch.device("cpu"))
    second.load(saved)
    second.mark(FORWARD)
    clock.spend(20.0)
    stages = Pace(second, 1.0, None, 1).whole(1)["stages"]
    assert (stages[FORWARD], stages[LOST]) == (50.0, 50.0)
    assert second.goodput(second.seconds()) == 0.5
    assert verdict({FORWARD: 1.0, READING: 3.0}).startswith(
        f"bottleneck: {READING} ({STAGES[READING]}), 75% of the time"
    )


def test_an_interval_has_its_own_shares_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    own = Anatomy(torch.device("cpu"))
    pace = Pace(own, 12.0, 60.0, 2)
    own.mark(BACKWARD)
    clock.spend(8.0)
    pace.since(100)
    own.mark(PIPELINE)
    clock.spend(4.0)
    line = pace.since(180)
    assert line["stages"] == dict.fromkeys(STAGES, 0.0) | {PIPELINE: 4.0}
    assert line["flops_per_s"] == 12.0 * 80 / 2 / 4.0
    assert line["mfu"] == line["flops_per_s"] / 60.0


def test_the_first_interval_after_a_restart_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    own = Anatomy(torch.device("cpu"))
    own.load({"begun_at": 0.0, "seconds": dict.fromkeys(STAGES, 1000.0)})
    own.mark(FORWARD)
    pace = Pace(own, 12.0, None, 1, 5_000)
    clock.spend(2.0)
    line = pace.since(5_100)
    assert line["stages"] == dict.fromkeys(STAGES, 0.0) | {FORWARD: 2.0} and line["flops_per_s"] == 12.0 * 100 / 2.0


def ranges(path: Path) -> Counter[str]:
    with gzip.open(path) as f:
        events = json.load(f)["traceEvents"]
    return Counter(e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("exfm:"))


@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
def test_a_trace_has_the_steps_asked_for_with_their_stages_and_changes_nothing(pipeline: str, tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "stream").root
    plain, traced = (teacher(tmp_path / name, stream, run__pipeline=pipeline) for name in ("plain", "traced"))
    run(plain)
    traced["run"]["trace"] = {"first": 3, "steps": 4}
    run(traced)
    found = ranges(tmp_path / "traced/logs/trace-rank0.json.gz")
    assert found["exfm:step"] == 4
    assert found[f"exfm:{OPTIMIZER}"] == found[f"exfm:{FORWARD}"] == 4
    assert_same_outcome(plain, traced)
    stages = summary(traced)["stages"]
    assert set(stages) == {*STAGES, LOST} and all(stages[s] > 0 for s in (*IN_STEP, STARTING, READING))


def test_a_stopped_job_goes_on_with_the_time_that_it_had_kept(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "stream").root
    raw = teacher(tmp_path / "run", stream)
    assert run(raw, stop_after=7)[0] == 75
    manifest = json.loads(next((tmp_path / "run/checkpoints").glob("*/manifest.json")).read_text())
    kept = manifest["anatomy"]
    assert run(raw)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    after = summary(raw)
    assert all(after["stages"][s] > kept["seconds"][s] for s in IN_STEP)
    assert 0 < after["goodput"] < 1 and after["anatomy"].startswith("time: ")
    assert all("stages" in line and line["goodput"] > 0 for line in lines if line["kind"] == "slice")


class Waits(TorchDispatchMode):
    """Operators whose answer the host must wait for on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select", "is_nonzero"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["", "single_head", "auxiliary_head", "student_adapter"])
def test_no_step_of_the_dense_part_waits_for_a_value(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_stream(tmp_path / "stream").root
    raw = teacher(tmp_path / "fm", stream)
    run(raw)
    if method:
        raw = student(tmp_path / "vm", stream, tmp_path / "fm/supervision/fm", method)
    seen: list[str] = []
    forward = build.Objective.forward

    def watched(self: Any, *args: Any) -> Any:
        with Waits() as waits:
            loss, output = forward(self, *args)
            torch.autograd.grad(
                loss, [p for p in self.parameters() if p.requires_grad], retain_graph=True, allow_unused=True
            )
        seen.extend(["step", *waits.seen])
        return loss, output

    monkeypatch.setattr(build.Objective, "forward", watched)
    again = dict(raw) | {"run": raw["run"] | {"folder": str(tmp_path / "again")}}
    run(again)
    assert set(seen) == {"step"}
