"""The fairness of `exfm bench distill`: equal budgets, no tuning on what is reported, gains as means over paired seeds."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import distill


def run_of(ne: float, shift: float = 0.0) -> distill.Run:
    return distill.Run(ne, 0.7, 0.6, 1.0, 1.0, np.linspace(ne - 0.01, ne + 0.01, 101) + shift)


def test_every_arm_is_tuned_with_the_same_number_of_trials_on_the_other_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str, int, tuple[Any, ...]]] = []

    def student(self: Any, arm: str, domain: str, seed: int, settings: dict[str, Any], teacher: Path) -> distill.Run:
        tried.append((arm, domain, seed, tuple(settings.values())))
        return run_of(0.9 + settings["optim.dense.lr"])

    monkeypatch.setattr(distill.Bench, "student", student)
    bench = distill.Bench(Path("unused"), Path("unused"))
    best = {arm: bench.tune(arm, 12, Path("unused")) for arm in distill.ARMS}
    assert Counter(arm for arm, *_ in tried) == dict.fromkeys(distill.ARMS, 12)
    assert len(set(tried)) == len(tried), "no setting is tried twice by one arm"
    assert {domain for _, domain, *_ in tried} == {distill.TUNED_ON} != {distill.REPORTED}
    assert distill.TUNING_SEED not in range(100), "the tuning seed is none of the reported ones"
    assert all(settings["optim.dense.lr"] == min(distill.GRID["optim.dense.lr"]) for settings in best.values())


def test_a_gain_is_the_mean_over_paired_seeds_and_its_interval_comes_from_paired_replicates() -> None:
    noise = [0.01, -0.02, 0.03]
    runs = {
        "undistilled": [run_of(0.90 + n) for n in noise],
        "single head": [run_of(0.88 + n) for n in noise],
    }
    teachers = [run_of(0.80 + n) for n in noise]
    settings: dict[str, Any] = {arm: {} for arm in runs}
    result = distill.summarise(runs, teachers, settings, 1, 3, 0, 0.0)
    arm = result["arms"][1]
    assert arm["gain"] == pytest.approx(0.02) and arm["gain_interval"] == pytest.approx([0.02, 0.02])
    assert arm["transfer_ratio"] == pytest.approx(0.2) and arm["transfer_interval"] == pytest.approx([0.2, 0.2])
    assert arm["ne_sd"] == pytest.approx(np.std(noise, ddof=1))
