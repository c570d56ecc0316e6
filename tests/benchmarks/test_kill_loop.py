"""The short form of `exfm bench kill --loop`, and proof that its checks notice what must never happen."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import kill
from benchmarks._kill_loop import MEMBERS, LoopKill, LoopOutcome, Loops, draw_aims
from benchmarks._kill_loop_jobs import LOGS, LoopSize, Manifests, check_loop
from exfm.checkpoints.commits import committed
from exfm.data.commit import commit_json
from exfm.distillation.supervision import SupervisionLog, write_supervision_part

pytestmark = pytest.mark.timeout(600)  # on a loaded machine; seconds on an idle one


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Loops:
    """A small loop that nobody has disturbed, and what plays it again with kills."""
    kill.warm_up()
    return Loops(tmp_path_factory.mktemp("loop") / "loops", LoopSize(3, 250, 1), 1)


def test_a_killed_loop_predicts_and_learns_everything_once_and_ends_bitwise_like_the_undisturbed_one(
    loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill, "Loops", lambda *_: loops)
    assert kill.main(["--loop", "--quick", "--kills", "6", "--seed", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "loop_kills.json").read_text())
    assert result["kills"] == sum(result["kills_by_job"].values()) == 6 and result["wrong"] == 0
    assert not any(result["violations"].values())
    # two logs: 3 slices of the forward pass, 2 of the scorer
    assert result["predictions"] == result["loops"] * 250 * (3 + 2)
    assert result["learned"]["teacher"] == result["learned"]["adapter"] == result["loops"] * 750
    assert 0 < result["learned"]["auxiliary"] < result["learned"]["single"] < result["loops"] * 750
    assert "| log slices in which an example has not exactly one" in (tmp_path / "loop_kills.md").read_text()


def rewritten(log: Path, index: int, change: Callable[[np.ndarray], None]) -> None:
    """Commit a slice of a log again with changed logits: all its checksums are right."""
    supervision = SupervisionLog(str(log))
    manifest = supervision.manifest(index)
    assert manifest is not None
    folder, (part,), tasks = supervision.folder(index), manifest.parts, tuple(manifest.extra["tasks"])
    logits = np.stack([c.to_numpy() for c in pq.ParquetFile(f"{folder}/{part.path}").read().columns], 1).copy()
    change(logits)
    own = write_supervision_part(supervision.fs, folder, part, tasks, logits)
    commit_json(supervision.fs, f"{folder}/manifest.json", manifest.model_copy(update={"parts": (own,)}).model_dump())


def leave_a_row_out(loop: Path) -> None:
    def change(logits: np.ndarray) -> None:
        logits[17] = np.nan

    rewritten(loop / LOGS["scored"][0], 2, change)


def exchange_with_another_run(loop: Path) -> None:
    """Another run's predictions: one is another float."""

    def change(logits: np.ndarray) -> None:
        logits[17] = np.nextafter(logits[17], np.float32(9))

    rewritten(loop / LOGS["forward"][0], 1, change)


def copy_a_part_of_another_slice(loop: Path) -> None:
    log = loop / LOGS["scored"][0]
    shutil.copy(log / "slice=000001/part-00000.parquet", log / "slice=000002/part-00000.parquet")


def uncommit_a_slice(loop: Path) -> None:
    (loop / LOGS["scored"][0] / "slice=000002/manifest.json").unlink()


def forget_a_piece_of_the_ledger(loop: Path) -> None:
    path = loop / "single/ledger.parquet"
    table = pq.ParquetFile(path).read()
    pq.write_table(table.slice(1), path)


def go_back_a_commit(loop: Path) -> None:
    shutil.rmtree(committed(loop / "auxiliary/checkpoints")[-1].folder)


def damage_a_commit(loop: Path) -> None:
    folder = Path(committed(loop / "adapter/checkpoints")[-1].folder)
    largest = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    payload = bytearray(largest.read_bytes())
    payload[-5] ^= 1
    largest.write_bytes(payload)


@pytest.mark.parametrize(
    ("break_it", "kinds", "said"),
    [
        (leave_a_row_out, {"predictions", "logits"}, "1 examples have no prediction of click"),
        (exchange_with_another_run, {"logits"}, "slice=000001/part-00000.parquet"),
        (copy_a_part_of_another_slice, {"predictions", "logits"}, "differs from the checksum"),
        (uncommit_a_slice, {"predictions", "logits", "leftover"}, "has no committed slice 2"),
        (forget_a_piece_of_the_ledger, {"learned"}, "single: slice 0: positions 0..64 were skipped"),
        (go_back_a_commit, {"learned", "weights"}, "auxiliary: of "),
        (damage_a_commit, {"corrupt"}, "differs"),
    ],
)
def test_what_must_never_happen_is_reported_as_what_it_is(
    loops: Loops, tmp_path: Path, break_it: Callable[[Path], None], kinds: set[str], said: str
) -> None:
    loop = Path(shutil.copytree(loops.reference, tmp_path / "loop"))
    break_it(loop)
    problems = check_loop(loop, loops.reference, loops.stream).problems
    assert set(problems) == kinds
    assert any(said in message for messages in problems.values() for message in messages)


def test_a_slice_that_is_committed_twice_is_noticed(loops: Loops, tmp_path: Path) -> None:
    loop = Path(shutil.copytree(loops.reference, tmp_path / "loop"))
    manifests = Manifests(loop)
    manifests.look()
    manifests.look()
    assert manifests.twice == [] and len(manifests.seen) == 5
    path = loop / LOGS["scored"][0] / "slice=000001/manifest.json"
    (loop / "again").write_bytes(path.read_bytes())
    os.replace(loop / "again", path)
    manifests.look()
    assert manifests.twice == [f"{path} was committed again"]


def test_a_loop_with_a_violation_says_so_and_exits_with_1(
    loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = LoopOutcome(0, "forked", [LoopKill("scorer", "one", "save", "fm-scored")])
    outcome.blame("predictions", "log scored: 3 examples have no prediction")
    monkeypatch.setattr(kill, "Loops", lambda *_: loops)
    monkeypatch.setattr(kill, "play_all", lambda *_: iter([outcome]))
    assert kill.main(["--loop", "--kills", "1", "--out", str(tmp_path)]) == 1
    assert "loop 0 (forked): predictions: log scored: 3 examples have no prediction" in capsys.readouterr().out


def test_a_third_of_the_kills_is_aimed_at_writes_and_a_loop_is_drawn_by_its_number() -> None:
    aims = [draw_aims(number, 0, 9) for number in range(20)]
    assert all(sum(aim.when == "save" for aim in loop) == 3 for loop in aims)
    assert {aim.who for loop in aims for aim in loop} == {"one", "all"} and len(MEMBERS) == 5
    assert aims[7] == draw_aims(7, 0, 9) != draw_aims(7, 1, 9)
