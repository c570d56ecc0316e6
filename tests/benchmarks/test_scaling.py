"""`exfm bench scaling`: sizes of equal FLOPs, the law's fit, a bench that goes on, and what it refuses."""

import json

import numpy as np
import pytest

from benchmarks import scaling
from benchmarks._scaling_fit import fit, predict
from benchmarks._scaling_report import figure, markdown
from benchmarks._scaling_runs import Rates, Runner, bayes, given, synthetic
from benchmarks._scaling_sizes import CONFIGS, SHAPES, dcnv2, ladder, solve, training_flops
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.data.synth import World, entropy, generate, synth
from exfm.models.interface import InputSpec

SYNTH = InputSpec(3, (("user", 32), ("item", 32), ("recent", 32), ("segment", 8), ("category", 8), ("domain", 8)))
CRITEO = InputSpec(13, tuple((f"C{i}", 32) for i in range(26)))
TINY = {"num_slices": 4, "rows_per_slice": 300, "num_users": 20, "num_items": 10}


@pytest.mark.parametrize(("inputs", "width"), [(SYNTH, 8), (CRITEO, 32)])
@pytest.mark.parametrize("num", [4, 7])
def test_sizes_rise_over_two_decades_and_are_equal_between_architectures(inputs, width, num):
    ladders = {a: ladder(a, inputs, width, num) for a in CONFIGS}
    for sizes in ladders.values():
        assert [s.rung for s in sizes] == list(range(num))
        assert 90 < sizes[-1].flops / sizes[0].flops < 110
    for rung in zip(*ladders.values(), strict=True):
        assert max(s.flops for s in rung) / min(s.flops for s in rung) < 1.1
    # the FLOPs are those of the models, three times forward
    assert all(s.flops == training_flops(s.model, inputs) for sizes in ladders.values() for s in sizes)
    first, last = ladders["wukong"][0].model, ladders["wukong"][-1].model
    assert (first["layers"], first["num_fmb"], first["rank"]) == SHAPES[0]
    assert (last["layers"], last["num_lcb"], last["rank"]) == SHAPES[-1]


def test_a_target_that_no_width_comes_near_is_refused():
    wide = InputSpec(0, tuple((f"f{i}", 64) for i in range(200)))
    with pytest.raises(UserError, match="dcnv2 comes no nearer than .* leave it out with --architectures"):
        solve(lambda h: dcnv2(wide, h), wide, 1000.0)


@pytest.mark.parametrize(("offset", "scale", "exponent"), [(0.60, 0.08, 0.3), (0.70, 0.05, 0.7)])
def test_the_fit_recovers_a_known_law_from_noisy_points_and_predicts_the_largest(offset, scale, exponent):
    rng = np.random.default_rng(3)
    flops = np.repeat(5e4 * 10 ** (np.arange(7) / 3), 3)
    noise = 0.0005
    true = offset + scale * (flops / 5e5) ** -exponent
    ne = true + rng.normal(0, noise, len(flops))
    p = predict(flops[:-3].tolist(), ne[:-3].tolist(), float(flops[-1]), "offset", floor=0.5)
    law = fit(flops.tolist(), ne.tolist())
    assert law.exponent == pytest.approx(exponent, rel=0.15) and law.offset == pytest.approx(offset, abs=0.005)
    assert law.rms == pytest.approx(noise, rel=0.5)
    assert abs(p["predicted"] - true[-1]) < 4 * noise
    assert p["interval"][0] < true[-1] < p["interval"][1] and p["interval"][1] - p["interval"][0] < 20 * noise


def test_the_paper_s_form_finds_the_paper_s_law_in_the_paper_s_table():
    gflop = [0.53, 1.25, 2.12, 5.6, 22.23, 61.0, 108.0]  # Wukong's table 5; log loss relative to a DLRM's, in per cent
    relative = [-0.35, -0.45, -0.53, -0.60, -0.67, -0.70, -0.76]
    law = fit(gflop, [1 + r / 100 for r in relative], "paper")
    assert law.exponent == pytest.approx(0.00071, rel=0.1) and law.offset == 0
    assert law.at(1.0) == pytest.approx(0.9956, abs=0.0002)


def test_a_law_is_no_lower_than_the_floor_and_no_better_for_worse_models():
    flops = [1.0, 10.0, 100.0, 1000.0]
    falling = fit(flops, [0.9, 0.8, 0.7, 0.6], floor=0.55)
    assert falling.offset >= 0.55
    rising = fit(flops, [0.6, 0.7, 0.8, 0.9])
    assert rising.scale == 0 and rising.at(1e9) == pytest.approx(0.75)


def test_the_dense_rate_follows_the_line_between_the_tuned_sizes_and_is_level_outside():
    falling = {"rungs": [1, 3], "dense": [0.008, 0.002], "tables": 0.2}
    found = [scaling.rates_of(falling, rung).dense for rung in range(7)]
    assert found == pytest.approx([0.008, 0.008, 0.004, 0.002, 0.002, 0.002, 0.002])
    rising = falling | {"dense": [0.002, 0.004]}
    assert scaling.rates_of(rising, 6) == Rates(0.004, 0.2) and scaling.rates_of(rising, 0).dense == 0.002


def small(out, monkeypatch):
    """A bench of two architectures and few trials, on a tiny stream."""
    monkeypatch.setattr(scaling, "QUICK", TINY)
    monkeypatch.setattr(scaling, "DENSE_LOW", (0.004,))
    monkeypatch.setattr(scaling, "DENSE_HIGH", (0.002,))
    monkeypatch.setattr(scaling, "TABLES", (0.1, 0.2))
    return ["--quick", "--architectures", "dlrm,dcnv2", "--out", str(out)]


def test_an_interrupted_bench_goes_on_without_repeating_what_is_finished(tmp_path, monkeypatch):
    args = small(tmp_path, monkeypatch)
    run, jobs = scaling.Runner.run, []

    def counted(self, *a):
        found = run(self, *a)
        jobs.append((self.done, self.reused))
        if len(jobs) == 8:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(scaling.Runner, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        scaling.main(args)
    before = {p.name: p.read_bytes() for p in (tmp_path / "runs").glob("*.json")}
    assert not (tmp_path / "scaling.json").exists() and jobs[-1][0] == len(before)
    (tmp_path / "job").mkdir()  # what a killed run leaves
    (tmp_path / "job" / "summary.json").write_text("of another run")

    assert scaling.main(args) == 0
    done, reused = jobs[-1]
    after = {p.name: p.read_bytes() for p in (tmp_path / "runs").glob("*.json")}
    assert before.items() <= after.items() and done == len(after) - len(before) and reused >= len(before)
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert len(result["rows"]) == 8 and {r["architecture"] for r in result["rows"]} == {"dlrm", "dcnv2"}
    assert all(0.5 < r["ne"] < 2 and r["evaluated"] == 600 for r in result["rows"])
    assert (
        result["laws"]["dlrm"]["offset"]["measured"]
        == max((r for r in result["rows"] if r["architecture"] == "dlrm"), key=lambda r: r["flops"])["ne"]
    )
    assert "Bayes" in (tmp_path / "scaling.svg").read_text()

    assert scaling.main(args) == 0
    assert jobs[-1][0] == 0  # all of it is there


def test_the_lowest_reachable_ne_is_that_of_the_evaluated_slices(tmp_path):
    study = synthetic(tmp_path, 0.5, **TINY)
    p = np.concatenate([s.probability[:, 0] for s in generate(World(**synthetic_settings(study)))])[600:]
    assert bayes(study, 2) == pytest.approx(entropy(p).mean() / entropy(p.mean()))


def synthetic_settings(study):
    return open_stream(study.stream).info.extra["settings"]


CONFIG = """
run: {name: own, folder: unused}
stream: {path: elsewhere, global_batch: 64}
features:
  dense: [context_a, context_b]
  sparse: [{name: user_id, table: user, ids: hash}, {name: item_id, table: item, ids: hash}]
tables: {user: {rows: 50, width: 8}, item: {rows: 30, width: 16}}
model: {kind: dcnv2}
heads: {tasks: [click], hidden: [32]}
"""


def test_a_stream_of_the_user_is_taken_without_a_known_optimum(tmp_path):
    stream = synth(str(tmp_path / "stream"), **TINY)
    for path in (tmp_path / "stream").rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["extra"].pop("click", None)
        path.write_text(json.dumps(manifest))
    (tmp_path / "own.yaml").write_text(CONFIG)
    study = given(stream.root, tmp_path / "own.yaml", 0.5)
    assert study.width == 8 and study.inputs == InputSpec(2, (("user_id", 8), ("item_id", 16)))
    assert bayes(study, 2) is None
    runner = Runner(tmp_path / "out", study)
    row = runner.run(ladder("wukong", study.inputs, study.width, 4)[0], Rates(0.004, 0.1), 0)
    assert row["examples"] == 1200 and row["evaluated"] == 600 and 0.5 < row["ne"] < 2

    law = {"form": "offset", "offset": 0.6, "scale": 0.1, "exponent": 0.3, "reference": 1e6, "rms": 0.001}
    rows = [row | {"rung": r, "flops": 10 ** (5 + r), "ne": 0.7 - 0.01 * r} for r in range(4)]
    found = {"law": law, "predicted": 0.66, "interval": [0.65, 0.67], "at": 1e8, "measured": 0.67}
    tuned = {"tables": 0.1, "trials": [[0, 0.004, 0.1, 0.7]]}
    result = {
        "stream": study.title, "task": "click", "date": "2026-11-25", "threads": 1, "torch": "2", "bayes_ne": None, "rows": rows,
        "tuned": {"wukong": tuned}, "laws": {"wukong": {"offset": found}}, "cpu_seconds": 60,
    }  # fmt: skip
    figure(result, tmp_path / "scaling.svg")
    drawn = (tmp_path / "scaling.svg").read_text()
    assert "Bayes" not in drawn and "Wukong, held out" in drawn
    text = markdown(result)
    assert "the stream does not say the lowest reachable NE" in text and "0.6600 [0.6500, 0.6700]" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sizes", "3"], "--sizes is 3; the largest is held out and a law needs 3 others: at least 4"),
        (["--architectures", "wukong,dln"], "--architectures names dln; there are: wukong, dlrm, dcnv2"),
        (["--architectures", ","], "--architectures is empty"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--stream", "some"], "--stream and --config go together"),
        (["--quick", "--stream", "some", "--config", "c.yaml"], "set stream.last in the config"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        scaling.main([*args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_too_few_sizes_an_unknown_form_and_an_unknown_architecture_are_refused():
    with pytest.raises(UserError, match="a law is fitted to 2 sizes; at least 3 are needed"):
        fit([1.0, 1.0, 2.0], [0.9, 0.8, 0.7])
    with pytest.raises(UserError, match="there is no form 'line'"):
        fit([1.0, 2.0, 3.0], [0.9, 0.8, 0.7], "line")
    with pytest.raises(UserError, match="there is no architecture 'dln'"):
        ladder("dln", SYNTH, 8, 4)


def test_a_config_that_does_not_fit_the_stream_is_refused_before_anything_runs(tmp_path):
    stream = synth(str(tmp_path / "stream"), **TINY)
    (tmp_path / "own.yaml").write_text(CONFIG.replace("context_a", "price"))
    with pytest.raises(UserError, match="no dense column.* price"):
        given(stream.root, tmp_path / "own.yaml", 0.5)
