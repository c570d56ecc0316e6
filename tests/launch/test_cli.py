"""The command line as a user runs it: exit codes, messages, and the whole loop through torchrun."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from exfm.data.errors import UserError
from exfm.data.synth import synth
from exfm.launch import cli
from exfm.launch.demo import find_source

CONFIGS = Path(cli.__file__).resolve().parents[1] / "configs"
SLICES, ROWS = 4, 1500
Exfm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def exfm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Exfm]:
    """Run `exfm ARGS` in this process; (exit code, stdout, stderr on one line)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["exfm", *map(str, args)])
        monkeypatch.setattr(cli, "console", Console(stderr=True, width=10_000))
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    yield run


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "stream"
    synth(str(out), num_slices=SLICES, rows_per_slice=ROWS, seed=1)
    return out


def config_file(folder: Path, name: str, stream: Path, **sections: dict[str, Any]) -> Path:
    """A copy of configs/<name>.yaml on a small stream, sections updated."""
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    raw["stream"] |= {"path": str(stream)}
    raw["run"] |= {"folder": str(folder / name), "device": "cpu"}
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_teacher_a_scorer_and_students_run_together_and_every_example_is_learned_once(
    exfm: Exfm, warm: None, stream: Path, tmp_path: Path
) -> None:
    teacher = config_file(tmp_path, "synth_teacher", stream, checkpoint={"snapshots": {"keep": 100}})
    student = config_file(tmp_path, "synth_student", stream)
    scorer = tmp_path / "scorer.yaml"
    own = {"name": "scorer", "folder": str(tmp_path / "scorer"), "device": "cpu"}
    scorer.write_text(yaml.safe_dump({"run": own, "score": {"teacher": str(tmp_path / "synth_teacher")}}))
    logs = [str(tmp_path / run / "supervision" / "teacher") for run in ("synth_teacher", "scorer")]
    late = {"run.name": "late", "run.folder": str(tmp_path / "late"), "stream.first": 1}
    jobs = [
        {"config": teacher.name, "nproc": 2},
        {"config": scorer.name},
        {"config": student.name, "set": {"run.name": "with", "distillation.learn.supervision": logs[0]}},
        {"config": student.name, "set": {**late, "distillation.learn.supervision": logs[1]}},
    ]
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump({"jobs": jobs}))
    code, out, err = exfm("stream", pipeline, "--json")
    assert code == 0, err
    summaries = json.loads(out)
    in_domain = [
        int((pq.read_table(p, columns=["domain"]).column("domain").to_numpy() == 1).sum())
        for p in sorted(stream.glob("slice=*/features/*.parquet"))
    ]
    assert summaries["teacher"]["examples"] == SLICES * ROWS
    assert summaries["scorer"]["examples"] == (SLICES - 1) * ROWS  # slice 0 has no snapshot before it
    assert summaries["with"]["examples"] == summaries["with"]["covered"] == sum(in_domain)
    assert summaries["late"]["examples"] == summaries["late"]["covered"] == sum(in_domain[1:])
    for run in ("synth_teacher", "synth_student", "late"):
        code, out, err = exfm("data", "audit", tmp_path / run, "--json")
        assert code == 0 and json.loads(out)["skipped"] == 0, err
    code, out, err = exfm("report", tmp_path / "synth_teacher")
    assert code == 0 and Path(out.strip()).stat().st_size > 1_000_000
    code, _, err = exfm("score", student)
    assert code == 2 and "has no section 'score'" in err


def test_train_continues_and_refuses_a_checkpoint_of_another_config(
    exfm: Exfm, warm: None, stream: Path, tmp_path: Path
) -> None:
    teacher = config_file(tmp_path, "synth_teacher", stream)
    assert exfm("train", teacher, "--set", "stream.last=1")[0] == 0
    code, _, err = exfm("train", teacher, "--set", "model.layers=3", "--set", "optim.tables.lr=0.2")
    assert code == 2 and "model.layers (checkpoint 2, config 3)" in err and "optim.tables.lr" in err
    code, out, err = exfm("train", teacher, "--nproc", "2", "--set", "stream.last=2", "--json")
    assert code == 0 and json.loads(out)["examples"] == 2 * ROWS, err


def test_an_id_outside_an_identity_table_ends_a_launched_job_with_code_2(
    exfm: Exfm, stream: Path, tmp_path: Path
) -> None:
    teacher = config_file(tmp_path, "synth_teacher", stream, tables={"segment": {"rows": 5, "width": 16}})
    code, _, err = exfm("train", teacher, "--nproc", "2", "--set", "features.sparse=" + json.dumps(_identity(teacher)))
    assert code == 2
    assert "feature 'segment'" in err and "identity table 'segment' of 5 rows" in err and "example" in err


def _identity(config: Path) -> list[dict[str, Any]]:
    features = yaml.safe_load(config.read_text())["features"]["sparse"]
    return [f | {"ids": "identity"} if f["name"] == "segment" else f for f in features]


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        (["model.num_fbm=3"], ["unknown key 'model.num_fbm'", "did you mean 'num_fmb'"]),
        (["optim.dense.lr=fast"], ["optim.dense.lr", "'fast'"]),
        (["stream.last=99"], ["0..99", f"slices 0..{SLICES}"]),
        (["heads.tasks=[buy]"], ["no label(s) buy", "it has click"]),
        (["stream.shuffle_window=64"], ["stream.shuffle_window is 64", "set stream.shuffle_window: 0"]),
        (["stream.path=/nowhere"], ["/nowhere is not a prepared stream", "exfm data prepare"]),
        (["tables.user.rows"], ["not of the form section.key=value"]),
        (["stream.domain=d9"], ["stream.domain 'd9'"]),
    ],
)
def test_a_wrong_setting_is_named_before_any_rank_starts(
    exfm: Exfm, stream: Path, tmp_path: Path, sets: list[str], wanted: list[str]
) -> None:
    teacher = config_file(tmp_path, "synth_teacher", stream)
    code, _, err = exfm("train", teacher, *(x for s in sets for x in ("--set", s)))
    assert code == 2
    for text in wanted:
        assert text in err
    assert not (tmp_path / "synth_teacher").exists()


def test_more_ranks_than_a_batch_has_examples_are_refused(exfm: Exfm, stream: Path, tmp_path: Path) -> None:
    code, _, err = exfm("train", config_file(tmp_path, "synth_teacher", stream), "--nproc", "2000")
    assert code == 2 and "2000 ranks share a global batch of 1024 examples; use at most 1024 ranks" in err


@pytest.mark.parametrize("damage", ["truncated", "unlabelled", "removed"])
def test_a_damaged_slice_ends_a_job_with_code_2_and_names_the_place(
    exfm: Exfm, warm: None, tmp_path: Path, damage: str
) -> None:
    stream = tmp_path / "stream"
    synth(str(stream), num_slices=2, rows_per_slice=ROWS, seed=1)
    part = stream / "slice=000001" / "features" / "part-00000.parquet"
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:2000])
    else:
        kind = "labels" if damage == "unlabelled" else "features"
        (stream / "slice=000001" / kind / "manifest.json").unlink()
    code, _, err = exfm("train", config_file(tmp_path, "synth_teacher", stream))
    assert code == 2
    wanted = {
        "truncated": [str(part)],
        "unlabelled": ["slice 1", "no committed labels"],
        "removed": ["slice 1", "no committed features"],
    }
    for text in wanted[damage]:
        assert text in err


def test_synthetic_data_can_be_made_inspected_and_planned(exfm: Exfm, tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert exfm("data", "synth", "--out", out, "--slices", 2, "--rows", 300)[0] == 0
    code, text, _ = exfm("data", "inspect", out, "--json")
    assert code == 0 and len(json.loads(text)["slices"]) == 2
    code, text, _ = exfm("plan", CONFIGS / "movielens_teacher.yaml", "--world-size", 16, "--json")
    plan = json.loads(text)
    assert code == 0 and {r["table"] for r in plan["tables"]} >= {"user", "movie"}
    assert all(0 <= place < 16 for row in plan["tables"] for place in row["where"])
    assert plan["ms"]["worst"] >= plan["ms"]["bound"] * (1 - 1e-9) > 0 and plan["hbm_gib"]["worst"] > 0


def test_one_rank_of_a_plan_is_built_and_stepped_here(exfm: Exfm, tmp_path: Path) -> None:
    args = "plan", CONFIGS / "synth_teacher.yaml", "--world-size", 16, "--device", "cpu", "--dry-run-rank"
    code, text, _ = exfm(*args, "worst", "--steps", 1, "--json", "--out", tmp_path / "plan.json")
    found = json.loads(text)["dry_run"]
    assert code == 0 and 0 <= found["rank"] < 16 and found["steps"] == 1
    assert found["measured_bytes"] > found["weights_bytes"] > 0 and found["estimated_bytes"] > 0
    assert json.loads((tmp_path / "plan.json").read_text())["topology"]["world_size"] == 16
    assert "fit on 16 ranks" in (tmp_path / "plan.html").read_text()
    assert exfm(*args[:3], 8, *args[4:6], "--out", tmp_path / "other.json")[0] == 0
    both = tmp_path / "both.html"
    assert exfm("plan", "--compare", tmp_path / "plan.json", tmp_path / "other.json", "--out", both)[0] == 0
    assert (
        "plan: embedding time of a step" in both.read_text() and "other: embedding time of a step" in both.read_text()
    )
    code, _, err = exfm(*args, "16")
    assert code == 2 and "--dry-run-rank is 16; give a rank from 0 to 15, or worst" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--world-size", 12], "not a whole number of nodes of 8"),
        (["--gpu", "h900"], "GPU 'h900' is not known; give one of a100-80g, h100, h200, b200"),
        (["--local-batch", 0], "--local-batch is 0; use 1 or more"),
        (["--set", "sharding.plan=none.json"], "plan none.json cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_refused(args: list[Any], message: str, exfm: Exfm) -> None:
    code, _, err = exfm("plan", CONFIGS / "movielens_teacher.yaml", *args)
    assert code == 2 and message in err


def test_a_table_that_cannot_use_so_many_ranks_is_refused_with_the_remedy(exfm: Exfm) -> None:
    config = CONFIGS / "movielens_teacher.yaml"
    code, _, err = exfm("plan", config, "--world-size", 16, "--set", "sharding.allowed=[row_wise]")
    assert code == 2 and "table 'gender' has 2 rows" in err and "sharding.tables.gender" in err


def test_the_demo_takes_data_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def refuse(*_: object) -> Path:
        raise OSError("no network")

    monkeypatch.setattr("exfm.launch.demo.download", refuse)
    (tmp_path / "ml1m").mkdir()
    args = (tmp_path, said.append, lambda *_: None)
    assert find_source("synth", str(tmp_path), *args) == "synth"
    assert find_source(None, str(tmp_path), *args) == str(tmp_path / "ml1m")
    assert find_source(None, None, *args) == "synth" and "no network" in said[0] and "synthetic" in said[0]
    for data, folder in (("ml1m", None), (str(tmp_path / "none"), None), (None, str(tmp_path / "none"))):
        with pytest.raises(UserError):
            find_source(data, folder, *args)


@pytest.mark.data
@pytest.mark.timeout(600)
def test_the_demo_on_movielens_ends_with_gains_and_a_report(
    exfm: Exfm, warm: None, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the ratings of three tenths of the users, a third of them in the students' domains."""
    ratings = pq.read_table(data_dir / "ml1m" / "events.parquet")
    ratings = ratings.filter(np.isin(ratings.column("user_id").to_numpy() % 20, [1, 5, 11, 15, 3, 7]))
    (tmp_path / "ml1m").mkdir()
    pq.write_table(ratings, tmp_path / "ml1m" / "events.parquet")
    monkeypatch.setenv("EXFM_DATA_DIR", str(tmp_path))
    code, out, err = exfm("demo", "--out", tmp_path / "demo", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert Path(result["report"]).exists()
    teacher = json.loads((tmp_path / "demo" / "teacher" / "summary.json").read_text())
    assert teacher["examples"] == len(ratings)
    assert [student["domain"] for student in result["students"]] == ["d3", "d7"]
    for student in result["students"]:
        low = student["gain"]["low"]
        assert np.isfinite(low) and low > 0, "distillation must help beyond its interval"
