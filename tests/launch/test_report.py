"""The page is opened in headless Chromium, and what was drawn is counted in its DOM."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from exfm.data.errors import UserError
from exfm.launch.comparison import StudentPair, compare
from exfm.launch.report import write_report
from exfm.launch.report.plan import MAX_PIECES, pieces, plan_figure
from exfm.launch.report.runs import read_run
from exfm.trainer.anatomy import LOST, STAGES

HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">&amp;%{x}"
RNG = np.random.default_rng(3)
NOISE = RNG.normal(0, 0.01, 200)
NUM_SLICES = 20
MARK = re.compile(r'<path class="(?:js-line|point)[^"]*"[^>]* d="M|<g class="point[^"]*"><path[^>]* d="M')


def values(ne: float) -> dict[str, float]:
    return {"examples": 100.0, "ne": ne, "log_loss": ne * np.log(2), "calibration": 1.02, "base_rate": 0.5, "auc": 0.7}


def slice_line(number: int, ne: dict[str, float], **changes: object) -> dict[str, object]:
    done = number + 1
    return {
        "kind": "slice",
        "slice": number,
        "slices": NUM_SLICES,
        "share": done / NUM_SLICES,
        "examples": 100 * done,
        "examples_per_s": 50.0,
        "ne_so_far": 0.9,
        "metrics": {group: {"liked": values(own + 0.01 * np.sin(number))} for group, own in ne.items()},
        **changes,
    }


def write_run(folder: Path, name: str, ne: dict[str, float], own: str | None, shift: float = 0.0) -> Path:
    """A finished run: own is a student's domain; shift moves its replicates."""
    folder.mkdir()
    tables = {"movie": {"rows": 4000, "width": 16, "dtype": "fp32"}, name: {"rows": 9, "width": 8, "dtype": "fp16"}}
    config = {
        "run": {"name": name},
        "stream": {"domain": own, "domains": [{"name": g} for g in ne if g != "all"]},
        "heads": {"tasks": ["liked"]},
        "tables": tables,
        "distillation": {"learn": {"method": "single_head"} if own else None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    halves = [{"rank": r, "offsets": [2000 * r, 0], "sizes": [2000, 16]} for r in range(2)]
    plan = [
        {"table": "movie", "sharding_type": "row_wise", "ranks": [0, 1], "shards": halves},
        {"table": name, "sharding_type": "data_parallel", "ranks": [0, 1], "shards": []},
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    lines = [json.dumps(slice_line(i, ne)) for i in range(NUM_SLICES)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = {
        "name": name,
        "slices": [0, NUM_SLICES],
        "evaluated_from": 4,
        "examples": 2000,
        "covered": 2000 if own else 0,
        "seconds": 40.0,
        "examples_per_s": 50.0,
        "world_size": 2,
        "device": "cpu",
        "dense_parameters": 1234,
        "flops_per_example": 5_678_000,
        "table_parameters": 3_200_000_000_000,
        "stages": dict.fromkeys(STAGES, 0.0) | {"forward": 10.0, "backward": 20.0, "reading": 9.99, LOST: 0.01},
        "flops_per_s": 4.56e9,
        "goodput": 0.75,
        "bottleneck": "bottleneck: backward (words), 50% of the time; a remedy",
        "groups": {group: {"liked": values(own_ne)} for group, own_ne in ne.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    drawn = {f"{group}/liked": own_ne + NOISE + shift * RNG.normal(size=200) for group, own_ne in ne.items()}
    np.savez(folder / "bootstrap.npz", **drawn)  # type: ignore[arg-type]
    return folder


def rendered(page: Path, tmp_path: Path) -> str:
    """The DOM after the page's scripts have run, without the text of the scripts."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        missing = "Chromium is not on PATH, so no figure of the report can be looked at; install chromium"
        if os.environ.get("EXFM_REQUIRE_DATA"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    options += [f"--user-data-dir={tmp_path / 'chromium'}", "--window-size=1300,2400", "--virtual-time-budget=8000"]
    done = subprocess.run(
        [chromium, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return without_scripts(done.stdout)


def without_scripts(html: str) -> str:
    return re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", html, flags=re.DOTALL)


def drawn_marks(dom: str) -> dict[str, int]:
    """By figure: how many lines, dots and bars it shows."""
    found = {}
    for figure in dom.split("<figure>")[1:]:
        key = re.search(r'class="plot[^"]*" id="([^"]*)"', figure)
        assert key and 'class="main-svg"' in figure
        found[key[1]] = len(MARK.findall(figure.split('class="infolayer"')[0]))  # before the legend
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The page of a teacher and two students (one of a hostile domain, its gain not resolved), and its DOM."""
    root = tmp_path_factory.mktemp("demo")
    teacher = write_run(root / "teacher", "teacher", {"all": 0.78, "d3": 0.8, HOSTILE: 0.8}, None)
    pairs = []
    for i, (domain, ne, shift) in enumerate((("d3", 0.88, 0.001), (HOSTILE, 0.899, 0.01))):
        before = write_run(root / f"u{i}", f"undistilled {domain}", {domain: 0.9}, domain)
        after = write_run(root / f"d{i}", f"distilled {domain}", {domain: ne}, domain, shift)
        pairs.append(StudentPair(domain, before, after))
    comparison = compare(teacher, pairs)
    runs = [teacher, *(p for pair in pairs for p in (pair.undistilled, pair.distilled) if p)]
    page = write_report(root / "out" / "report.html", runs, comparison, f"demo {HOSTILE}", {"d3": 0.75})
    return page, rendered(page, root)


def test_every_figure_of_a_comparison_is_drawn(demo):
    marks = drawn_marks(demo[1])
    smooth_and_dots = 3 * (1 + NUM_SLICES)
    assert marks["ne-0"] == smooth_and_dots + 1  # and the best reachable NE
    assert marks["ne-1"] == smooth_and_dots
    assert marks["calibration-0"] == marks["calibration-1"] == 3
    assert marks["gains"] == 2
    # each of the 5 runs names its second table after itself, so no two plans are alike; 2 ranks x 2 tables
    assert [marks[f"plan-{i}"] for i in range(5)] == [4] * 5
    assert marks["throughput"] == 5
    assert marks["stages"] == 5 * 3  # what took less than a thousandth is left out
    assert len(marks) == 12


def test_the_words_say_what_was_measured_and_what_was_not_resolved(demo):
    dom = demo[1]
    lead = dom.split('<ul class="lead">')[1].split("</ul>")[0]
    first, second = lead.split("</li><li>")
    assert re.search(r"The student of domain d3 gained 2\.22% NE \[\d\.\d\d, \d\.\d\d\] from the teacher", first)
    assert "transfer ratio 0.20 [" in first
    assert "the gain from the teacher is not resolved, +0.11% NE [-" in second
    assert (
        "4.56 G" in dom
        and "75%" in dom
        and "3.20 T" in dom
        and "5.68 M" in dom
        and "100.0%" in dom
        and "none used" in dom
    )
    assert dom.count("<details>") == 5


def test_the_page_loads_nothing_from_anywhere(demo):
    page, dom = demo
    source = without_scripts(page.read_text())
    for html in (source, dom):
        assert not re.search(r"<[^>]*\s(src|href|srcset|xlink:href)\s*=\s*[\"']?(?!#)", html)
        assert not re.search(r"@import|url\(\s*[\"']?(https?:|//)", html)
    assert "default-src 'none'" in source  # and the browser refuses what might have been missed


def test_names_are_shown_as_they_are_and_never_run(demo):
    page, dom = demo
    assert "<title>demo &lt;/script&gt;" in dom and "<title>pwned" not in dom
    assert "<img" not in dom
    tick = next(t for t in re.findall(r"<text[^>]*>(.*?)</text>", dom) if "script" in t)
    assert tick.startswith("&lt;/script&gt;&lt;script&gt;") and tick.endswith("…")  # shortened, its tags as text
    assert page.read_text().count("</script>") == len(re.findall(r"<script[ >]", without_scripts(page.read_text())))


def test_a_report_on_one_run_draws_its_groups(tmp_path):
    run = write_run(tmp_path / "run", "teacher", {"all": 0.78, "d3": 0.8}, None)
    dom = rendered(write_report(tmp_path / "report.html", [run], None, "exfm run"), tmp_path)
    marks = drawn_marks(dom)
    assert marks == {"ne-0": 2 * (1 + NUM_SLICES), "calibration-0": 2, "plan-0": 4, "throughput": 1, "stages": 3}
    assert "teacher reached NE 0.7800 [0.7" in dom and "domain d3" in dom


def test_an_unfinished_run_has_a_report_too_and_a_line_cut_off_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", "teacher", {"all": 0.78}, None)
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5], lines[5][:40]]))
    text = write_report(tmp_path / "report.html", [run], None, "exfm run").read_text()
    assert "teacher is not finished: 25% of 20 slices, 500 examples, NE so far 0.9000." in text
    (run / "metrics.jsonl").unlink()
    text = write_report(tmp_path / "report.html", [run], None, "exfm run").read_text()
    assert "teacher has not finished its first slice." in text and 'data-plot="ne-0"' not in text


def test_what_was_trained_again_after_a_restart_is_counted_once(tmp_path):
    run = write_run(tmp_path / "run", "teacher", {"all": 0.78}, None)
    progress = {"kind": "progress", "slice": 3, "share": 0.19, "examples": 380, "examples_per_s": 50.0}
    again = [json.dumps(slice_line(i, {"all": 0.5})) for i in (3, 4)]
    old = (run / "metrics.jsonl").read_text().splitlines()[:8]
    (run / "metrics.jsonl").write_text("\n".join([*old, json.dumps(progress), *again]) + "\n")
    read = read_run(run)
    assert [line["slice"] for line in read.slices] == [0, 1, 2, 3, 4]
    assert read.slices[3]["metrics"]["all"]["liked"]["ne"] < 0.6
    assert [examples for *_, examples in read.ticks] == [100, 200, 300, 380, 400, 500]


def test_the_plan_shows_the_bytes_of_every_shard_also_of_a_thousand_ranks(tmp_path):
    run = write_run(tmp_path / "run", "tiny", {"all": 0.78}, None)
    by_rank = {(p.rank, p.label): p.size_bytes for p in pieces(read_run(run))}
    assert by_rank == {(r, t): b for r in (0, 1) for t, b in (("movie", 2000 * 16 * 4), ("tiny", 9 * 8 * 2))}
    shards = [{"rank": r, "offsets": [4 * r, 0], "sizes": [4, 16]} for r in range(1000)]
    rows = [{"table": t, "sharding_type": "row_wise", "ranks": [], "shards": shards} for t in ("movie", "tiny") * 4]
    (run / "plan.json").write_text(json.dumps(rows))
    large = read_run(run)
    assert len(pieces(large)) == 1000 <= MAX_PIECES  # one bar per rank and sharding type
    assert sum(p.size_bytes for p in pieces(large)) == 4 * 1000 * 4 * 16 * (4 + 2)
    assert plan_figure(large).data[0].orientation == "v"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run: it has no config.yaml"):
        write_report(tmp_path / "report.html", [tmp_path], None, "nothing")
