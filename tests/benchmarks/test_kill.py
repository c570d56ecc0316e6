"""The short form of `exfm bench kill`, and proof that a campaign finds a restore or a commit that is broken."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill
from benchmarks._kill_campaign import Draw, Saves, unfinished
from benchmarks._kill_jobs import DRAW, GLOBAL_BATCH, KillJob, draw_jobs, gaps, steps_done
from exfm.checkpoints.commits import committed
from exfm.trainer.commits import Commits


@pytest.mark.timeout(600)
@pytest.mark.parametrize("runs", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_bitwise_like_the_undisturbed_ones(runs: int, tmp_path: Path) -> None:
    """Forked ranks alone: tests/checkpoints/test_resume.py kills one under torchrun."""
    assert kill.main(["--quick", "--runs", str(runs), "--seed", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["runs"] == runs <= result["kills"] and result["runs_without_kill"] == 0
    assert set(result["kills_by_victims"]) <= {"one", "all"}
    assert result["aimed_at_saves"] >= runs // 3 and result["aimed_and_inside"] >= runs // 6
    assert sum(result["problems"].values()) == result["corrupt_states"] == result["wrong"] == 0
    assert "| corrupt states" in (tmp_path / "kills.md").read_text()


def skip_a_batch_after_a_restore() -> None:
    restore = Commits.restore

    def broken(self: Commits) -> bool:
        found = restore(self)
        self.job.progress.consumed += GLOBAL_BATCH if found else 0
        return found

    Commits.restore = broken  # type: ignore[method-assign]


def change_a_byte_of_every_commit() -> None:
    begin = Commits.begin

    def broken(self: Commits, publish_too: bool = False) -> None:
        begin(self, publish_too)
        self.wait()
        if self.job.env.rank == 0:
            folder = Path(committed(self.job.folder / "checkpoints")[-1].folder)
            files = [p for p in folder.iterdir() if p.name != "manifest.json"]
            largest = max(files, key=lambda p: p.stat().st_size)
            payload = bytearray(largest.read_bytes())
            payload[len(payload) // 2] ^= 1
            largest.write_bytes(payload)

    Commits.begin = broken  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_restore_that_skips_a_batch_is_reported_as_a_difference_and_by_the_audit(tmp_path: Path) -> None:
    result = kill.campaign(tmp_path, 2, True, 1, prepare=skip_a_batch_after_a_restore)
    assert result["problems"]["differing"] > 0 and result["problems"]["audit"] > 0
    assert result["corrupt_states"] == 0 and result["wrong"] > 0
    assert "were skipped" in kill.markdown(result)


@pytest.mark.timeout(600)
def test_a_commit_whose_data_are_not_what_its_manifest_says_is_reported_as_corrupt(tmp_path: Path) -> None:
    result = kill.campaign(tmp_path, 2, True, 1, prepare=change_a_byte_of_every_commit)
    assert result["corrupt_states"] > 0 and result["problems"]["failed"] > 0


def test_a_campaign_in_which_anything_was_wrong_says_so_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = kill.Outcome(0, "job", "forked")
    wrong.blame("audit", "3 of 4 examples were learned")

    def campaign(*_: Any) -> dict[str, Any]:
        return kill.summarise([wrong], 0, True, 1.0)

    monkeypatch.setattr(kill, "campaign", campaign)
    assert kill.main([]) == 1
    assert "run 0 (job, forked): audit: 3 of 4 examples were learned" in capsys.readouterr().out


def test_a_campaign_of_100_aims_a_third_at_saves_and_draws_every_setting_equally_often() -> None:
    jobs = draw_jobs(12, 0)
    for key, values in DRAW.items():
        counts = Counter(json.dumps(getattr(job, key)) for job in jobs)
        assert set(counts) == {json.dumps(value) for value in values}
        assert max(counts.values()) - min(counts.values()) <= (12 % len(values) > 0)
    draws = [Draw(number, 0, jobs, True) for number in range(100)]
    assert sum(d.aims[0].when == "save" for d in draws) == 33 and sum(d.torchrun for d in draws) == 10
    assert [d.aims for d in draws] == [Draw(n, 0, jobs, True).aims for n in range(100)], "a run is drawn by its number"
    assert {d.job.number for d in draws} == set(range(12))


@pytest.mark.parametrize(
    ("checkpoint", "longest"),
    [
        ({"every_slices": 1}, 11),
        ({"every_slices": 2}, 22),
        ({"every_slices": 1, "every_examples": 160}, 5),  # 5, 10, 11, 16, ...
        ({"every_slices": 2, "every_examples": 224}, 11),  # 7, 18, 22, 29, ...: no commit at the end of slice 0
    ],
)
def test_the_steps_between_commits_are_counted_over_slice_ends_without_one(checkpoint: Any, longest: int) -> None:
    assert KillJob(0, 2, "teacher", "row_wise", checkpoint).commit_every(4, 330) == longest


def test_a_torn_line_is_left_out_and_a_step_left_out_is_a_gap(tmp_path: Path) -> None:
    lines = [{"kind": "progress", "step": 1}, {"kind": "slice", "step": 1}, {"kind": "progress", "step": 3}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "prog')
    assert steps_done(metrics) == [1, 3] and gaps(steps_done(metrics)) == [(1, 3)] and gaps([4, 5, 6]) == []


def test_a_save_is_a_new_folder_without_manifest_and_not_one_that_is_being_removed(tmp_path: Path) -> None:
    for name in ("step=00000001", "step=00000002"):
        (tmp_path / name).mkdir()
    (tmp_path / "step=00000001" / "manifest.json").touch()
    saves = Saves(tmp_path)
    assert saves.running() == set() and {name for name, _ in unfinished(tmp_path)} == {"step=00000002"}
    (tmp_path / "step=00000001" / "manifest.json").unlink()
    assert saves.running() == set()
    (tmp_path / "step=00000003").mkdir()
    assert {name for name, _ in saves.running()} == {"step=00000003"}
