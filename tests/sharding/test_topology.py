"""Topologies: presets as printed on the data sheets, units as TorchRec has them, and refusals that say what to do."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from exfm.data.errors import UserError
from exfm.data.host import host_bytes_here
from exfm.sharding.topology import (
    Topology,
    cpu_topology,
    gpu_topology,
    read_topology,
    this_topology,
    with_size,
    write_topology,
)

GPUS = ["a100-80g", "h100", "h200", "b200"]


@pytest.mark.parametrize("gpu", GPUS)
def test_a_topology_that_was_written_reads_back_as_the_same_value(gpu, tmp_path):
    topology = gpu_topology(gpu, 64, replicas=4, hbm_bytes_per_s=1e12 / 3, name="of a test")
    write_topology(tmp_path / "new" / "t.yaml", topology)
    assert read_topology(tmp_path / "new" / "t.yaml") == topology


def test_numbers_may_be_written_as_yaml_takes_for_text(tmp_path):
    raw = gpu_topology("h100", 8).model_dump() | {"hbm_bytes": "80e9", "hbm_bytes_per_s": "3.35e12"}
    (tmp_path / "t.yaml").write_text("\n".join(f"{k}: {v}" for k, v in raw.items()))
    assert isinstance(yaml.safe_load((tmp_path / "t.yaml").read_text())["hbm_bytes"], str)
    assert read_topology(tmp_path / "t.yaml") == gpu_topology("h100", 8)


def test_torchrec_has_a_sharding_groups_figures_in_bytes_per_millisecond():
    ours = gpu_topology("H100", 64, replicas=4)
    assert (ours.group_size, ours.nodes) == (16, 8)
    t = ours.torchrec()
    assert (t.world_size, t.local_world_size, t.compute_device) == (16, 8, "cuda")
    assert {(d.storage.hbm, d.storage.ddr) for d in t.devices} == {(80 * 10**9, 250 * 10**9)}
    # 3.35 TB/s, PCIe gen5 64 GB/s each way, NVLink 900 GB/s both ways, 400 Gb/s, 16 channels of 35.2 GB/s for 8 ranks
    assert (t.hbm_mem_bw, t.hbm_to_ddr_mem_bw) == (3.35e9, 6.4e7)
    assert (t.intra_host_bw, t.inter_host_bw, t.ddr_mem_bw) == (4.5e8, 5e7, 7.04e7)


def test_torchrec_sees_a_group_inside_a_node_as_a_node_and_no_device_memory_on_cpu():
    inside = gpu_topology("b200", 16, replicas=4).torchrec()
    assert (inside.world_size, inside.local_world_size) == (4, 4)
    cpu = cpu_topology(4, 2, host_bytes=123).torchrec()
    assert (cpu.compute_device, cpu.local_world_size) == ("cpu", 2)
    assert {(d.storage.hbm, d.storage.ddr) for d in cpu.devices} == {(0, 123)}


def test_nothing_of_torchrecs_defaults_is_left_but_disks(monkeypatch):
    """Every rate that its constructor would fill in from the age of the V100 is given."""
    from torchrec.distributed import planner

    given: dict[str, Any] = {}
    monkeypatch.setattr(planner, "Topology", lambda **kwargs: given.update(kwargs))
    gpu_topology("h200", 8).torchrec()
    assert set(given) == {
        *("world_size", "compute_device", "local_world_size", "hbm_cap", "ddr_cap"),
        *("hbm_mem_bw", "ddr_mem_bw", "hbm_to_ddr_mem_bw", "intra_host_bw", "inter_host_bw"),
    }


def test_torchrec_is_made_without_a_warning(caplog):
    logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.NOTSET)
    cpu_topology(2, 2).torchrec()
    assert caplog.records == []


@pytest.mark.parametrize(
    ("gpu", "hbm_gb", "hbm_tb_per_s", "nvlink", "pcie", "network", "bf16", "tf32"),
    [
        ("a100-80g", 80, 2.039, 600, 64, 200, 312, 156),
        ("h100", 80, 3.35, 900, 128, 400, 1979 / 2, 989 / 2),
        ("h200", 141, 4.8, 900, 128, 400, 1979 / 2, 989 / 2),
        ("b200", 180, 7.7, 1800, 128, 400, 4500 / 2, 2200 / 2),
    ],
)
def test_presets_are_the_data_sheets_halved_where_both_directions_or_sparsity_are_printed(
    gpu, hbm_gb, hbm_tb_per_s, nvlink, pcie, network, bf16, tf32
):
    t = gpu_topology(gpu.upper(), 8)
    assert (t.name, t.device, t.hbm_bytes) == (gpu, "cuda", hbm_gb * 10**9)
    assert t.hbm_bytes_per_s == pytest.approx(hbm_tb_per_s * 1e12)
    assert (t.nvlink_bytes_per_s, t.pcie_bytes_per_s) == (nvlink / 2 * 1e9, pcie / 2 * 1e9)
    assert t.network_bytes_per_s == network / 8 * 1e9
    assert (t.bf16_flops, t.fp32_flops) == (bf16 * 1e12, tf32 * 1e12)
    assert t.host_bytes * 8 == 2 * 10**12


def test_ranks_per_node_is_clipped_to_the_world_and_with_size_changes_only_the_size():
    small = gpu_topology("h100", 4)
    assert (small.ranks_per_node, small.nodes) == (4, 1)
    large = with_size(small, 32, 8, 2)
    assert large == gpu_topology("h100", 32, replicas=2)
    assert with_size(large, 4, 8, 1) == small


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gpu_topology("h100", 12), "world_size is 12, no multiple of ranks_per_node 8; use 8 or 16 ranks"),
        (
            lambda: gpu_topology("h100", 16, replicas=3),
            "replicas is 3, which does not divide world_size 16; use 2 or 4",
        ),
        (
            lambda: gpu_topology("h100", 48, replicas=4),
            "replicas is 4, which makes groups of 12, neither whole nodes of 8 ranks nor a divisor of one; use 3 or 6",
        ),
        (lambda: with_size(gpu_topology("h100", 8), 16, 8, 32), "replicas is 32, which .* world_size 16; use 16$"),
        (lambda: gpu_topology("v100", 8), "GPU 'v100' is not known; give one of a100-80g, h100, h200, b200, or"),
        (lambda: gpu_topology("h100", 8, hbm_byte=1), "unknown key 'hbm_byte'; did you mean 'hbm_bytes'?"),
        (lambda: gpu_topology("h100", 0), "'world_size' is 0: Input should be greater than 0"),
        (lambda: gpu_topology("h100", 8, hbm_bytes=0), "hbm_bytes is 0 on cuda; give 0 on cpu and more than 0 on cuda"),
        (lambda: this_topology("tpu", 8, 8), "device is 'tpu'; a topology is of cuda or cpu"),
    ],
)
def test_refusals_name_the_thing_its_value_the_limit_and_the_remedy(make, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networkbytes_per_s": 1.0}, "unknown key 'networkbytes_per_s'; did you mean 'network_bytes_per_s'"),
        ({"colour": 1}, "unknown key 'colour'; allowed: name, device, world_size"),
        ({"fp32_flops": "fast"}, "'fp32_flops' is 'fast': Input should be a valid number"),
        ({"host_bytes": "much"}, "'host_bytes' is 'much': could not convert"),
        ({"device": "tpu"}, "'device' is 'tpu': Input should be 'cuda' or 'cpu'"),
        ({"hbm_bytes_per_s": float("inf")}, "'hbm_bytes_per_s' is inf: Input should be a finite number"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_the_key_and_the_value(change, message, tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(gpu_topology("h100", 8).model_dump() | change))
    with pytest.raises(UserError, match=f"topology {path}: {message}"):
        read_topology(path)


def test_a_file_that_is_missing_broken_or_lacks_keys_is_refused(tmp_path):
    path = tmp_path / "t.yaml"
    with pytest.raises(UserError, match=f"topology {path} cannot be read: .*No such file.*exfm bench topology"):
        read_topology(path)
    path.write_text("name: [")
    with pytest.raises(UserError, match=f"topology {path} cannot be read"):
        read_topology(path)
    path.write_text("- h100")
    with pytest.raises(UserError, match=f"topology {path} is no mapping of name, device"):
        read_topology(path)
    path.write_text("name: h100")
    with pytest.raises(UserError, match="key 'device' is missing; key 'world_size' is missing"):
        read_topology(path)


def test_a_topology_is_a_value():
    a, b = gpu_topology("h100", 8), gpu_topology("h100", 8)
    assert a == b and hash(a) == hash(b)
    with pytest.raises(ValueError, match="frozen"):
        a.world_size = 16  # type: ignore[misc]


def test_free_memory_is_what_the_kernel_says_but_at_most_the_containers_limit(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:    3000 kB\nHugePages_Total:  0\n")
    assert host_bytes_here(tmp_path) == 3000 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for limit, expected in (("max\n", 3000 * 1024), ("2048\n", 2048), ("999999999\n", 3000 * 1024)):
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit)
        assert host_bytes_here(tmp_path) == expected


@pytest.fixture
def gpus(monkeypatch) -> Any:
    def show(*names: str) -> None:
        found = [SimpleNamespace(name=name, total_memory=10**9 * (90 - i)) for i, name in enumerate(names)]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: found[i])
        monkeypatch.setattr("exfm.sharding.topology.host_bytes_here", lambda: 800)

    return show


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_this_machine_is_its_gpus_preset_with_the_memory_that_it_shows(name, preset, gpus):
    gpus(name, name)
    found = this_topology("cuda", 16, 2)
    assert found == gpu_topology(preset, 16, 2, hbm_bytes=89 * 10**9, host_bytes=400)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_a_gpu_that_only_looks_like_a_preset_is_refused_and_the_benchmark_named(name, gpus):
    gpus(name)
    with pytest.raises(UserError, match=f"GPU '{name}' is none of .*exfm bench topology"):
        this_topology("cuda", 1, 1)


def test_no_gpu_or_gpus_of_several_kinds_are_refused(gpus):
    gpus()
    with pytest.raises(UserError, match="no CUDA device; use device cpu"):
        this_topology("cuda", 1, 1)
    gpus("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    with pytest.raises(UserError, match=r"GPUs differ \(NVIDIA H100 80GB HBM3, NVIDIA H200\)"):
        this_topology("cuda", 2, 2)


def test_this_machine_without_gpus_shares_its_free_memory_among_the_ranks_of_a_node(monkeypatch):
    monkeypatch.setattr("exfm.sharding.topology.host_bytes_here", lambda: 1000)
    assert this_topology("cpu", 8, 4) == cpu_topology(8, 4, host_bytes=250)
    assert this_topology("cpu", 2, 4) == cpu_topology(2, 2, host_bytes=500)
    assert isinstance(this_topology("cpu", 2, 4), Topology)
