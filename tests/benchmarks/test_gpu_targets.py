"""The benchmarks whose targets are of one H100 or H200: each runs there and gives the numbers that its targets name. Times are not judged."""

import json

import pytest

from benchmarks import dense, lookup

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
