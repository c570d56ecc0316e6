"""The benchmarks whose targets are of one H100 or H200: each runs there and gives the numbers that its targets name. Times are not judged."""

import json

import pytest
import torch

from benchmarks import card, dense, lookup, peers
from exfm.data.host import host_bytes_here

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def test_lookup_gives_shares_of_copy_bandwidth_at_the_shape_of_the_targets(tmp_path):
    assert lookup.main(["--turns", "5", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "lookup.json").read_text())
    shape = result["shape"]
    assert (shape["width"], shape["batch"], shape["pooling"]) == (128, 16384, 20)
    for row in result["rows"]:
        assert all(0 < row["of_copy"][name]["ratio"] < 3 for name in lookup.TARGETS)
    text = (tmp_path / "lookup.md").read_text()
    assert all(f"{target:.2f}: " in text for target in lookup.TARGETS.values())


def test_tables_of_16_bits_are_looked_up_too(tmp_path):
    assert lookup.main(["--turns", "3", "--dtype", "fp16", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "lookup.json").read_text())["shape"]["dtype"] == "fp16"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dense_gives_gemm_efficiency_and_mfu_of_the_large_sizes(compiled, tmp_path):
    options = ["--sizes", "l8n96,l8n32", "--repeats", "3", *["--compile"] * compiled]
    assert dense.main([*options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "dense.json").read_text())
    assert result["dtype"] == "bf16" and result["data_sheet_flops"] > 0
    for row in result["rows"]:
        assert 0 < row["flops_per_s"] < result["data_sheet_flops"] and row["products_s"] > 0
    assert [row["size"] for row in result["rows"]] == ["l8n96", "l8n32"]


@pytest.mark.parametrize("model", ["small", "l8n32"])
def test_a_whole_step_is_compared_with_torchrecs_pipeline_around_the_eager_stack(model, tmp_path):
    options = [
        "--device",
        "cuda",
        "--data",
        "criteo",
        "--model",
        model,
        "--batch",
        "16384",
        "--precision",
        "bf16",
        "--compile",
    ]
    assert peers.main([*options, "--rounds", "2", "--out", str(tmp_path)]) == 0
    ratios = json.loads((tmp_path / "ratios.json").read_text())
    assert set(ratios) == {"criteo, exfm / torchrec"}


def test_a_model_larger_than_the_card_trains_through_a_split_plan(tmp_path):
    """100 billion parameters of 16 bits where the machine has room, else as many as fill 1.2 times the card."""
    device = torch.cuda.get_device_properties(0).total_memory
    parameters = min(1e11, 0.6 * device) if device + host_bytes_here() < 2.6e11 else 1e11
    assert card.main(["--parameters", str(parameters), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "card.json").read_text())
    assert set(result["placed"]) == {"fused", "fused_uvm_caching"} and result["examples_per_s"] > 0
