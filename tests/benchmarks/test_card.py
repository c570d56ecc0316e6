"""`exfm bench card`: a model larger than a card's memory is planned over card and host, and a small one trains here."""

import json

import pytest

from benchmarks import card
from exfm.data.errors import UserError
from exfm.sharding.topology import gpu_topology
from exfm.trainer.config import JobConfig
from exfm.trainer.planning import plan_on


def config(tmp_path, **options) -> JobConfig:
    args = {"out": tmp_path, "steps": 3, "batch": 64, "parameters": 1e11, "width": 128, "device": "cuda"}
    return card.config_of(card.argparse.Namespace(**args | {"reserved": 0.15} | options))


def test_100_billion_parameters_are_split_over_an_h200_and_its_host(tmp_path):
    topology = gpu_topology("h200", 1, 1, host_bytes=120 * 2**30)
    own = config(tmp_path)
    found = card.placed(plan_on(own, topology), 128)
    assert set(found) == {"fused", "fused_uvm_caching"}
    assert sum(f["gib"] for f in found.values()) == pytest.approx(2e11 / 2**30, rel=1e-4)
    on_card = found["fused"]["gib"] + found["fused_uvm_caching"]["cached_gib"]
    assert on_card * 2**30 < 0.85 * topology.hbm_bytes and found["fused_uvm_caching"]["gib"] * 2**30 < 120 * 2**30


def test_what_fits_nowhere_is_refused_before_it_is_allocated(tmp_path):
    topology = gpu_topology("h100", 1, 1, host_bytes=20 * 2**30)
    with pytest.raises(UserError, match="GiB"):
        plan_on(config(tmp_path), topology)


def test_a_small_model_trains_and_its_bytes_are_told(tmp_path):
    options = ["--device", "cpu", "--parameters", "1e5", "--width", "16", "--batch", "64", "--steps", "3"]
    assert card.main([*options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "card.json").read_text())
    assert result["parameters"] == pytest.approx(1e5, rel=0.02) and result["examples_per_s"] > 0
    assert result["placed"]["fused"]["gib"] * 2**30 == pytest.approx(2 * result["parameters"])
    assert f"{result['parameters']:,} parameters" in (tmp_path / "card.md").read_text()


def test_too_few_steps_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 3"):
        card.main(["--steps", "2", "--out", str(tmp_path)])
