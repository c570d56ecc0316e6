"""The check of several GPUs refuses a host that cannot answer, and tells PASS from FAIL from REFUSED."""

import json
from typing import Any

import pytest
import torch

from benchmarks import multigpu
from exfm.data.errors import UserError

GOOD = [0.5, 0.4, 0.3]


def test_a_host_with_fewer_than_two_gpus_is_refused(monkeypatch):
    for found in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=found: n)
        with pytest.raises(UserError, match=rf"this host has {found} CUDA device\(s\)"):
            multigpu.main([])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert multigpu.ranks_of("cuda", 0) == 4 and multigpu.ranks_of("cuda", 2) == 2


def test_every_engine_precision_pipeline_and_2d_is_a_case():
    names = [case.name for case in multigpu.cases(4)]
    for part in ("ddp", "fsdp", *multigpu.PRECISIONS, "base", "sparse_dist", "row_wise", "2D"):
        assert any(part in name for name in names), part
    assert len(set(names)) == len(names) and not any("2D" in case.name for case in multigpu.cases(3))


@pytest.mark.parametrize(
    "code, losses, bits, word",
    [
        (0, GOOD, 32, "PASS"),
        (0, [0.5, 0.4, 0.303], 32, "FAIL"),
        (0, [0.5, 0.4, 0.303], 16, "PASS"),
        (0, [0.5, 0.4, float("nan")], 16, "FAIL"),
        (0, GOOD[:2], 32, "FAIL"),
        (1, GOOD, 32, "FAIL"),
        (2, [], 32, "REFUSED"),
    ],
)
def test_a_verdict(code, losses, bits, word):
    assert multigpu.verdict(multigpu.Case("c", {}, bits), code, "said", losses, GOOD)[0] == word


def test_a_planted_difference_fails_the_run(monkeypatch, tmp_path, capsys):
    def train(settings: dict[str, Any], ranks: int, *_: Any) -> tuple[int, str, list[float]]:
        bad = ranks > 1 and settings.get("run.pipeline") == "sparse_dist"
        return 0, "", [0.6, 0.4, 0.3] if bad else GOOD

    monkeypatch.setattr(multigpu, "train", train)
    arguments = ["--device", "cpu", "--rows", "256", "--out", str(tmp_path)]
    assert multigpu.main([*arguments, "--only", "ddp, fp32, base"]) == 0
    assert multigpu.main([*arguments, "--only", "ddp, fp32"]) == 1
    assert "| ddp, fp32, sparse_dist | FAIL |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "multigpu.json").read_text())["rows"]
    assert {r["verdict"] for r in rows} == {"PASS", "FAIL"}
    with pytest.raises(UserError, match="no case has 'tpu' in its name"):
        multigpu.main([*arguments, "--only", "tpu"])
