"""`exfm bench topology`: what it writes is what the planner reads, and what it could not measure it says."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import topology as bench
from exfm.data.errors import UserError
from exfm.sharding.topology import cpu_topology, gpu_topology, read_topology

QUICK = ["--quick", "--seconds", "0.01"]


def test_a_tiny_run_writes_a_file_of_this_machine_that_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "t.yaml"
    assert bench.main([*QUICK, "--device", "cpu", "--ranks", "2", "--out", str(path)]) == 0
    found, said = read_topology(path), capfd.readouterr()
    assert (found.device, found.world_size, found.ranks_per_node, found.hbm_bytes) == ("cpu", 2, 2, 0)
    assert found.network_bytes_per_s == cpu_topology(1, 1).network_bytes_per_s
    assert found.hbm_bytes_per_s == found.pcie_bytes_per_s == found.host_bytes_per_s
    # a machine that trains at all is between these
    assert 1e8 < found.host_bytes_per_s < 1e12 and 1e6 < found.nvlink_bytes_per_s < 1e12
    assert 1e8 < found.fp32_flops < 1e14
    assert f"| host memory | {found.host_bytes_per_s / 1e9:.3g} GB/s | measured |" in said.out
    assert "| network across nodes | 1.25 GB/s | not measurable on one machine" in said.out
    assert "host memory" in said.err and str(path) in said.err.replace("\n", "")


def test_one_rank_keeps_the_default_between_ranks_and_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    measured = {"host_bytes_per_s": 2e9, "fp32_flops": 3e9}
    monkeypatch.setattr(bench, "_measure", lambda setup: measured)
    path = str(tmp_path / "t.yaml")
    assert bench.main([*QUICK, "--device", "cpu", "--ranks", "1", "--network", "2.5", "--json", "--out", path]) == 0
    found = read_topology(path)
    assert found.model_dump() == json.loads(capsys.readouterr().out)
    assert found.nvlink_bytes_per_s == cpu_topology(1, 1).nvlink_bytes_per_s
    assert (found.network_bytes_per_s, found.bf16_flops, found.pcie_bytes_per_s) == (2.5e9, 3e9, 2e9)
    bench.main([*QUICK, "--device", "cpu", "--ranks", "1", "--out", path])
    assert "not measurable with one rank, default kept" in capsys.readouterr().out


MEASURED = {
    "host_bytes_per_s": 5e9,
    "hbm_bytes_per_s": 3.35e12 / 2,
    "pcie_bytes_per_s": 5e10,
    "fp32_flops": 3e14,
    "bf16_flops": 6e14,
}


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    def show(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for module in ("benchmarks.topology", "exfm.sharding.topology"):
            monkeypatch.setattr(f"{module}.gpu_here", lambda: (name, 85 * 10**9))
        monkeypatch.setattr(bench, "_measure", lambda setup: MEASURED)

    return show


def test_a_known_gpu_keeps_the_data_sheet_where_nothing_was_measured(tmp_path: Path, one_gpu, capsys) -> None:
    one_gpu("NVIDIA H100 80GB HBM3")
    path = str(tmp_path / "t.yaml")
    assert bench.main([*QUICK, "--out", path]) == 0
    found, sheet, said = read_topology(path), gpu_topology("h100", 1), capsys.readouterr().out
    assert (found.hbm_bytes, found.hbm_bytes_per_s) == (85 * 10**9, MEASURED["hbm_bytes_per_s"])
    assert (found.nvlink_bytes_per_s, found.network_bytes_per_s) == (450e9, sheet.network_bytes_per_s)
    assert "| device memory | 1.68e+03 GB/s | measured, 50% of the data sheet |" in said
    assert "not measurable on one machine, data sheet's value kept" in said
    assert "not measurable with one rank, data sheet's value kept" in said


def test_an_unknown_gpu_needs_its_network_and_then_is_all_measured(tmp_path: Path, one_gpu, capsys) -> None:
    one_gpu("NVIDIA X900")
    path = str(tmp_path / "t.yaml")
    with pytest.raises(UserError, match="GPU 'NVIDIA X900' has no data sheet here.*give --network GB_PER_S"):
        bench.main([*QUICK, "--out", path])
    assert bench.main([*QUICK, "--network", "50", "--out", path]) == 0
    found = read_topology(path)
    assert (found.network_bytes_per_s, found.nvlink_bytes_per_s) == (50e9, MEASURED["pcie_bytes_per_s"])
    assert "not measurable with one GPU, that between device and host taken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seconds", "0"], "--seconds is 0 and --ranks 2; both must be above 0"),
        (["--ranks", "-1"], "--ranks -1; both must be above 0"),
        (["--network", "0"], "--network is 0 GB/s; it must be above 0"),
        (["--ranks", "100000"], "100000 ranks need .* GiB of host memory, .* free"),
        (["--device", "cuda", "--ranks", "99"], r"--ranks is 99, but this machine shows \d+ CUDA device"),
    ],
)
def test_arguments_that_cannot_be_are_refused(args: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        bench.main(["--device", "cpu", *args, "--out", str(tmp_path / "t.yaml")])


def test_ranks_that_do_not_end_are_killed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "START_S", -1e9)
    with pytest.raises(RuntimeError, match="the ranks have not ended after"):
        bench._measure(bench.Setup("cpu", 1, 0.01, 2**20, 2**20, 16))


@pytest.mark.gpu
def test_a_tiny_run_on_gpus_measures_all_but_the_network(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    assert bench.main([*QUICK, "--device", "cuda", "--network", "50", "--out", str(path)]) == 0
    found = read_topology(path)
    assert (found.device, found.world_size) == ("cuda", torch.cuda.device_count())
    assert found.hbm_bytes_per_s > found.pcie_bytes_per_s > 1e8
    assert found.bf16_flops > found.fp32_flops > 1e11
