"""The step's anatomy from a Chrome trace: against timelines whose answer is known."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import step
from benchmarks._step_trace import (
    COLLECTIVES,
    COPIES,
    ELEMENTWISE,
    HOST,
    PRODUCTS,
    TABLES,
    Span,
    analyse,
    common,
    length,
    merged,
    without,
)
from exfm.data.errors import UserError

MAIN, OTHER = 1, 2
spans = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda s: (float(s[0]), float(s[0] + s[1]))), max_size=8
)


def cells(own: list[Span]) -> set[int]:
    return {i for begin, end in own for i in range(int(begin), int(end))}


@settings(deadline=None)
@given(a=spans, b=spans)
def test_unions_intersections_and_differences_are_those_of_sets(a: list[Span], b: list[Span]) -> None:
    assert cells(common(a, b)) == cells(a) & cells(b)
    assert cells(without(a, b)) == cells(a) - cells(b)
    assert cells(merged(a)) == cells(a)
    assert length(a) == len(cells(a))


def event(name: str, begin: float, end: float, cat: str = "cpu_op", tid: int = MAIN) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "tid": tid, "ts": begin, "dur": end - begin}


def note(name: str, begin: float, end: float) -> dict[str, Any]:
    return event(f"exfm:{name}", begin, end, "user_annotation")


STEP = [
    note("step", 0, 100),
    note("pipeline", 0, 10),
    note("reading", 10, 30),
    note("lookup", 30, 50),
    note("forward", 50, 90),
    note("bookkeeping", 90, 100),
]


def kinds(events: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of a step; they add up to it."""
    found = analyse(events)
    assert sum(found["kinds"].values()) == pytest.approx(found["step_s"])
    assert sum(found["stages"].values()) == pytest.approx(found["step_s"])
    return {kind: s * 1e6 for kind, s in found["kinds"].items() if s > 0}


def test_on_a_cpu_an_operators_own_time_counts_and_gaps_are_the_hosts_or_a_collectives() -> None:
    events = [
        *STEP,
        event("fbgemm::split_embedding_codegen_lookup", 30, 38),
        event("gloo:all_to_all", 36, 45, "user_annotation", OTHER),  # 38 to 45 is waited for
        event("autograd::engine::evaluate_function: AddmmBackward0", 50, 80),
        event("AddmmBackward0", 51, 79),
        event("aten::mm", 52, 72),
        event("aten::sum", 72, 78),
        event("aten::mm", 92, 99),  # in bookkeeping: not the step's own work
    ]
    assert kinds(events) == pytest.approx(
        # 10 of pipeline, 45 to 50, 80 to 90, and four of autograd around its operators
        {"reading": 20, "bookkeeping": 10, TABLES: 8, COLLECTIVES: 7, PRODUCTS: 20, ELEMENTWISE: 6, HOST: 29}
    )


def test_on_a_gpu_what_runs_beside_a_kernel_costs_nothing() -> None:
    events = [
        *STEP,
        event("nvjet_tst_128x256", 50, 70, "kernel", 7),
        event("ncclDevKernel_AllReduce", 60, 80, "kernel", 8),  # 70 to 80 is exposed
        event("Memcpy HtoD (Pinned -> Device)", 75, 85, "gpu_memcpy", 9),  # 80 to 85
        event("split_embedding_codegen_forward", 30, 40, "kernel", 7),
    ]
    assert kinds(events) == pytest.approx(
        {"reading": 20, "bookkeeping": 10, PRODUCTS: 20, COLLECTIVES: 10, COPIES: 5, TABLES: 10, HOST: 25}
    )


def test_the_sentence_names_what_takes_most_and_a_remedy_for_every_kind(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run/logs").mkdir(parents=True)
    with gzip.open(tmp_path / "run/logs/trace-rank0.json.gz", "wt") as f:
        json.dump({"traceEvents": [*STEP, event("aten::mm", 50, 88)]}, f)
    assert step.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "Bottleneck: matrix products, 38% of the step;" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/step.json").read_text())
    assert {*step.REMEDIES} >= {PRODUCTS, TABLES, COLLECTIVES, COPIES, ELEMENTWISE, HOST, "reading", "bookkeeping"}


def test_a_run_without_a_trace_is_told_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(UserError, match=r"run\.trace\.first"):
        step.main(["--run", str(tmp_path), "--out", str(tmp_path / "out")])
