"""The guard finds a planted loss, lets noise pass, and keeps what it is compared with."""

import json
from pathlib import Path

import pytest

from benchmarks import guard
from exfm.data.errors import UserError


@pytest.fixture
def planted(monkeypatch, tmp_path) -> tuple[list[float], list[str]]:
    """Ratios that a measure gives one after the other (the last one for ever), and arguments for a guard of that alone."""
    values = [0.80, 0.82, 0.78, 0.80]

    def measure(out: Path) -> dict[str, float]:
        return {"ours / peer": values.pop(0) if len(values) > 1 else values[0]}

    monkeypatch.setattr(guard, "MEASURES", {"planted": measure})
    arguments = ["--kept", str(tmp_path / "guard.json"), "--out", str(tmp_path / "out")]
    assert guard.main([*arguments, "--update", "--turns", "3"]) == 0
    return values, arguments


def test_noise_passes_and_a_planted_loss_is_found(planted, tmp_path, capsys):
    values, arguments = planted
    kept = json.loads((tmp_path / "guard.json").read_text())["ratios"]["ours / peer"]
    assert kept["ratio"] == 0.80 and kept["noise"] == pytest.approx(0.02)
    assert {"date", "device", "load", "command", "torch"} < set(kept)
    values[:] = [0.75]
    assert guard.main(arguments) == 0 and "holds" in capsys.readouterr().out
    values[:] = [0.80 * 0.85]
    assert guard.main(arguments) == 1 and "LOST" in capsys.readouterr().out


def test_one_slow_moment_is_no_loss_and_a_gain_is_none(planted):
    values, arguments = planted
    values[:] = [0.3, 0.4, 0.81]
    assert guard.main(arguments) == 0
    values[:] = [1.5]
    assert guard.main(arguments) == 0


def test_a_ratio_without_noise_may_lose_a_little():
    assert guard.judge({"ratio": 1.0, "noise": 0.0}, 0.98) and not guard.judge({"ratio": 1.0, "noise": 0.0}, 0.96)
    assert guard.judge({"ratio": 1.0, "noise": 0.0}, 0.9, noise=0.05)


def test_ratios_that_others_wrote_are_kept_and_compared(planted, tmp_path, monkeypatch):
    _, arguments = planted
    path = tmp_path / "ratios.json"
    monkeypatch.setattr(guard, "WRITTEN", {"peers": path})
    with pytest.raises(UserError, match="run `exfm bench peers` first"):
        guard.main([*arguments, "--update", "--ratios", "peers"])
    path.write_text(json.dumps({"frappe": 2.1}))
    assert guard.main([*arguments, "--update", "--ratios", "peers", "--turns", "1"]) == 0
    assert set(json.loads((tmp_path / "guard.json").read_text())["ratios"]) == {"ours / peer", "peers: frappe"}
    path.write_text(json.dumps({"frappe": 1.5}))
    assert guard.main([*arguments, "--ratios", "peers"]) == 1
    path.write_text(json.dumps({"criteo": 1.5}))
    with pytest.raises(UserError, match="no longer measures peers: frappe"):
        guard.main([*arguments, "--ratios", "peers"])


def test_what_cannot_be_compared_is_refused(planted, tmp_path):
    _, arguments = planted
    with pytest.raises(UserError, match="--ratios names speed; there are: planted, peers, step"):
        guard.main([*arguments, "--ratios", "speed"])
    with pytest.raises(UserError, match="is not there; write it with"):
        guard.main(["--kept", str(tmp_path / "none.json"), "--out", str(tmp_path)])
    with pytest.raises(UserError, match="keeps nothing of peers"):
        guard.main([*arguments, "--ratios", "peers"])


def test_the_committed_ratios_are_of_measures_that_exist():
    kept = json.loads(guard.KEPT.read_text())["ratios"]
    assert {r["measure"] for r in kept.values()} <= {*guard.MEASURES, *guard.WRITTEN}
    assert set(guard.MEASURES) <= {r["measure"] for r in kept.values()}
