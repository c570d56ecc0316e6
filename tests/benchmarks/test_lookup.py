"""The lookup benchmark counts the bytes that it says it counts, on ids that are what they are called."""

import json

import pytest
import torch

from benchmarks import lookup
from exfm.data.errors import UserError

CPU = torch.device("cpu")
SMALL = lookup.Shape(tables=2, rows=500, width=8, batch=16, pooling=3, dtype="fp16")


def test_bytes_are_counted_by_hand_for_a_small_shape():
    n, row, different = 2 * 16 * 3, 8 * 2, 70
    found = lookup.counted(SMALL, different)
    pooled = 4 * 2 * 16 * 8
    assert found["forward"] == n * row + 8 * n + 8 * (2 * 16 + 1) + pooled == found["bag"]
    assert found["both"] - found["forward"] == pooled + 8 * n + 2 * different * row + 2 * different * 4
    assert found["gather"] == 2 * n * row + 8 * n
    assert SMALL.table_bytes == 2 * 500 * (8 * 2 + 4)


def test_every_work_looks_up_the_same_rows():
    tables = lookup.make_tables(SMALL, CPU)
    rows = lookup.weights_of(tables).view(-1, 8)
    rows.copy_(torch.randn(rows.shape))
    ids = lookup.make_ids(SMALL, "uniform", 0, CPU)
    own = rows[ids.flat].float().view(2, 16, 3, 8).sum(2).permute(1, 0, 2).reshape(16, 16)
    assert torch.allclose(tables(ids.rows, ids.offsets), own, atol=1e-2)
    assert ids.different == len(set(ids.flat.tolist())) and int(ids.flat.max()) < len(rows)


def test_zipf_ids_repeat_and_stay_in_their_table():
    shape = lookup.Shape(tables=2, rows=100_000, width=8, batch=512, pooling=10, dtype="fp32")
    uniform, zipf = (lookup.make_ids(shape, kind, 0, CPU) for kind in ("uniform", "zipf"))
    assert zipf.different < 0.6 * uniform.different
    assert int(zipf.rows.min()) >= 0 and int(zipf.rows.max()) < shape.rows
    assert torch.equal(zipf.flat.view(2, -1)[1], zipf.rows.view(2, -1)[1] + shape.rows)


def test_a_run_writes_what_it_found(tmp_path):
    args = ["--tables", "2", "--rows", "2000", "--width", "8", "--batch", "32", "--pooling", "2", "--turns", "2"]
    assert lookup.main([*args, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "lookup.json").read_text())
    assert [r["ids"] for r in result["rows"]] == ["uniform", "zipf"]
    for row in result["rows"]:
        assert all(rate > 0 for rate in row["bytes_per_s"].values())
        assert row["of_copy"]["both"]["low"] <= row["of_copy"]["both"]["ratio"] <= row["of_copy"]["both"]["high"]
    assert "TBE forward + backward" in (tmp_path / "lookup.md").read_text()


def test_targets_are_judged_on_a_gpu_at_its_own_shape_alone():
    row = {"ids": "uniform", "of_copy": {"forward": {"ratio": 0.71}, "both": {"ratio": 0.55}}}
    at = {"shape": vars(lookup.SHAPES["cuda"])}
    assert lookup._target(at, row, "forward") == "0.70: met" and lookup._target(at, row, "both") == "0.60: missed"
    assert lookup._target({"shape": vars(SMALL)}, row, "forward") == ""


@pytest.mark.parametrize(
    "args, message",
    [
        (["--ids", "all"], "--ids names all; there are: uniform, zipf"),
        (["--batch", "0"], "--batch is 0; use 1 or more"),
        (["--width", "6"], "--width is 6; FBGEMM wants a multiple of 4"),
        (["--rows", "1000000000000"], "GiB are available"),
    ],
)
def test_what_cannot_be_measured_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        lookup.main(args)
