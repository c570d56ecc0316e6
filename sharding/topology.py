"""The machines that a plan is made for: sizes and speeds of one rank, how many ranks, and how they are grouped.

A job of R replicas (TorchRec's 2D parallelism) has R sharding groups that hold all tables each. A group is of consecutive
ranks, as DMPCollection makes them with use_inter_host_allreduce=True; by default it strides groups over the nodes.
"""

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pydantic
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from exfm.data.errors import UserError
from exfm.data.host import host_bytes_here

if TYPE_CHECKING:
    from torchrec.distributed import planner

# NVIDIA's data sheets; GB and TB are 1e9 and 1e12, what is printed for both directions or with sparsity is halved, and
# a node's host memory and bandwidth are shared by its 8 GPUs
_PRESETS: dict[str, dict[str, float]] = {
    "a100-80g": {  # A100 Tensor Core GPU data sheet, column A100 80GB SXM; DGX A100 640GB data sheet
        "hbm_bytes": 80_000_000_000,  # "80GB HBM2e"
        "hbm_bytes_per_s": 2.039e12,  # "2,039GB/s"
        "host_bytes": 250_000_000_000,  # DGX: "System Memory 2TB"
        "host_bytes_per_s": 51.2e9,  # 2 EPYC 7742 (AMD: "Per Socket Mem BW 204.8 GB/s")
        "pcie_bytes_per_s": 32e9,  # "PCIe Gen4: 64GB/s", both ways
        "nvlink_bytes_per_s": 300e9,  # "NVLink: 600GB/s", both ways
        "network_bytes_per_s": 25e9,  # DGX: 8 ConnectX-6 of "200Gb/s"
        "bf16_flops": 312e12,  # "BFLOAT16 Tensor Core 312 TFLOPS", dense
        "fp32_flops": 156e12,  # "Tensor Float 32 (TF32) 156 TFLOPS", dense
    },
    "h100": {  # H100 Tensor Core GPU data sheet, column H100 SXM; DGX H100/H200 user guide
        "hbm_bytes": 80_000_000_000,  # "80GB"
        "hbm_bytes_per_s": 3.35e12,  # "3.35TB/s"
        "host_bytes": 250_000_000_000,  # DGX: "2 TB", 32 DIMMs
        "host_bytes_per_s": 70.4e9,  # 2 Xeon 8480C of 8 DDR5 channels, 4,400 MT/s of 8 bytes with two DIMMs in each
        "pcie_bytes_per_s": 64e9,  # "PCIe Gen5: 128GB/s", both ways
        "nvlink_bytes_per_s": 450e9,  # "NVLink: 900GB/s", both ways
        "network_bytes_per_s": 50e9,  # DGX: 8 ConnectX-7 of "400Gb/s"
        "bf16_flops": 989.5e12,  # "BFLOAT16 Tensor Core 1,979 teraFLOPS", with sparsity
        "fp32_flops": 494.5e12,  # "TF32 Tensor Core 989 teraFLOPS", with sparsity
    },
}
_PRESETS["h200"] = _PRESETS["h100"] | {  # H200 Tensor Core GPU data sheet, column H200 SXM: else as the H100
    "hbm_bytes": 141_000_000_000,  # "141GB"
    "hbm_bytes_per_s": 4.8e12,  # "4.8TB/s"
}
_PRESETS["b200"] = _PRESETS["h100"] | {  # Blackwell data sheet, column HGX B200; DGX B200 user guide
    "hbm_bytes": 180_000_000_000,  # "180GB HBM3E"
    "hbm_bytes_per_s": 7.7e12,  # "7.7TB/s"
    "nvlink_bytes_per_s": 900e9,  # "5th Generation NVLink: 1.8TB/s", both ways
    "bf16_flops": 2.25e15,  # "FP16/BF16 Tensor Core 4.5 PFLOPS", with sparsity
    "fp32_flops": 1.1e15,  # "TF32 Tensor Core 2.2 PFLOPS", with sparsity
    # as the H100: "PCIe Gen5: 128GB/s"; DGX: "2 TB using 32 x DIMMs" of unstated speed, 8 ConnectX-7 of "400Gbps"
}
# what CUDA calls these SXM modules; the PCIe, NVL, 40 GB and Grace variants have other speeds
_DEVICE_NAMES = {"A100-SXM4-80GB": "a100-80g", "H100 80GB HBM3": "h100", "H200": "h200", "B200": "b200"}

# `exfm bench topology --seconds 1`, 2 ranks on 2 cores of an EPYC (Milan) that had other work too: 10.5, 0.49 and 29 e9,
# rounded; without a device its memory is the host's
_CPU_RATES = {
    **dict.fromkeys(("hbm_bytes_per_s", "host_bytes_per_s", "pcie_bytes_per_s"), 10e9),
    "nvlink_bytes_per_s": 0.5e9,  # gloo between ranks of the machine
    "network_bytes_per_s": 1.25e9,  # an assumption: 10 Gb/s Ethernet
    **dict.fromkeys(("bf16_flops", "fp32_flops"), 30e9),
}
_MEASURE = "write a YAML file with `exfm bench topology` on such a machine and use that"


class Topology(BaseModel):
    """Ranks that are all alike: sizes in bytes, speeds in bytes or operations per second, all of one rank.

    hbm_bytes: device memory, 0 on cpu. pcie: between device and host, nvlink: inside a node, network: across nodes; each way.
    flops: dense peak of matrix products. fp32_flops of a GPU is that of tf32, because tensor cores have no fp32: without
    torch.set_float32_matmul_precision("high") such a product runs outside them, 7 to 15 times slower.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str
    device: Literal["cuda", "cpu"]
    world_size: PositiveInt
    ranks_per_node: PositiveInt = Field(description="clipped to world_size")
    hbm_bytes: int = Field(ge=0)
    hbm_bytes_per_s: PositiveFloat
    host_bytes: PositiveInt
    host_bytes_per_s: PositiveFloat
    pcie_bytes_per_s: PositiveFloat
    nvlink_bytes_per_s: PositiveFloat
    network_bytes_per_s: PositiveFloat
    bf16_flops: PositiveFloat
    fp32_flops: PositiveFloat
    replicas: PositiveInt = Field(1, description="sharding groups that hold all tables each")

    @pydantic.field_validator("hbm_bytes", "host_bytes", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """YAML takes 80e9 for text, of which pydantic makes no int."""
        return float(value) if isinstance(value, str) else value

    @pydantic.field_validator("ranks_per_node")
    @classmethod
    def _clip(cls, value: int, info: pydantic.ValidationInfo) -> int:
        return min(value, info.data.get("world_size", value))

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if (self.hbm_bytes > 0) != (self.device == "cuda"):
            raise ValueError(f"hbm_bytes is {self.hbm_bytes} on {self.device}; give 0 on cpu and more than 0 on cuda")
        world, node = self.world_size, self.ranks_per_node
        if rest := world % node:
            near = f"{world - rest} or {world - rest + node}"
            raise ValueError(f"world_size is {world}, no multiple of ranks_per_node {node}; use {near} ranks")
        sizes = {r: world // r for r in range(1, world + 1) if world % r == 0}
        fit = [r for r, size in sizes.items() if size % node == 0 or node % size == 0]
        if (given := self.replicas) not in fit:
            near = " or ".join(map(str, [max(r for r in fit if r < given), *[r for r in fit if r > given][:1]]))
            groups = f"makes groups of {sizes.get(given)}, neither whole nodes of {node} ranks nor a divisor of one"
            why = groups if given in sizes else f"does not divide world_size {world}"
            raise ValueError(f"replicas is {given}, which {why}; use {near}")
        return self

    @property
    def group_size(self) -> int:
        """Ranks that share one copy of all tables."""
        return self.world_size // self.replicas

    @property
    def nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    def torchrec(self) -> "planner.Topology":
        """One sharding group as TorchRec's planner wants it: in bytes per millisecond."""
        from torchrec.distributed import planner  # takes seconds, and the ranks of the benchmark do without

        # it advises a factory for fleets whose hardware it looks up
        logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
        return planner.Topology(
            world_size=self.group_size,
            compute_device=self.device,
            hbm_cap=self.hbm_bytes,
            ddr_cap=self.host_bytes,
            local_world_size=min(self.ranks_per_node, self.group_size),
            hbm_mem_bw=self.hbm_bytes_per_s / 1000,
            ddr_mem_bw=self.host_bytes_per_s / 1000,
            hbm_to_ddr_mem_bw=self.pcie_bytes_per_s / 1000,
            intra_host_bw=self.nvlink_bytes_per_s / 1000,
            inter_host_bw=self.network_bytes_per_s / 1000,
        )


def gpu_topology(gpu: str, world_size: int, ranks_per_node: int = 8, replicas: int = 1, **overrides: Any) -> Topology:
    """DGX nodes by their data sheets. gpu: a100-80g, h100, h200 or b200; overrides: fields that differ from them."""
    if (name := gpu.lower()) not in _PRESETS:
        raise UserError(f"GPU '{gpu}' is not known; give one of {', '.join(_PRESETS)}, or {_MEASURE}")
    size = {"world_size": world_size, "ranks_per_node": ranks_per_node, "replicas": replicas}
    return _checked(name, {"name": name, "device": "cuda", **_PRESETS[name], **size, **overrides})


def cpu_topology(world_size: int, ranks_per_node: int, host_bytes: int = 16 * 2**30) -> Topology:
    """Ranks without devices. host_bytes: of a rank; speeds are those of a small machine."""
    size = {"world_size": world_size, "ranks_per_node": ranks_per_node, "hbm_bytes": 0, "host_bytes": host_bytes}
    return _checked("cpu", {"name": "cpu", "device": "cpu", **_CPU_RATES, **size})


def this_topology(device: str, world_size: int, ranks_per_node: int) -> Topology:
    """Nodes like this machine: its memory, and the speeds of its GPU's preset. UserError for a GPU that has none."""
    if device not in ("cuda", "cpu"):
        raise UserError(f"device is '{device}'; a topology is of cuda or cpu")
    host_bytes = host_bytes_here() // max(1, min(world_size, ranks_per_node))
    if device == "cpu":
        return cpu_topology(world_size, ranks_per_node, host_bytes)
    name, hbm_bytes = gpu_here()
    if (preset := preset_of(name)) is None:
        raise UserError(f"GPU '{name}' is none of {', '.join(_DEVICE_NAMES)}, whose speeds are known; {_MEASURE}")
    return gpu_topology(preset, world_size, ranks_per_node, hbm_bytes=hbm_bytes, host_bytes=host_bytes)


def preset_of(device_name: str) -> str | None:
    """The preset of a GPU by the name that CUDA has for it."""
    return _DEVICE_NAMES.get(device_name.removeprefix("NVIDIA "))


def gpu_here() -> tuple[str, int]:
    """Name and bytes of this machine's GPUs. UserError where there are none, or several kinds."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not found:
        raise UserError("this machine shows no CUDA device; use device cpu, or give a topology (YAML) or a GPU's name")
    if len(names := sorted({gpu.name for gpu in found})) > 1:
        raise UserError(f"this machine's GPUs differ ({', '.join(names)}); choose some with CUDA_VISIBLE_DEVICES")
    return found[0].name, min(gpu.total_memory for gpu in found)


def with_size(topology: Topology, world_size: int, ranks_per_node: int, replicas: int) -> Topology:
    """The same ranks in another number; what a rank has stays."""
    size = {"world_size": world_size, "ranks_per_node": ranks_per_node, "replicas": replicas}
    return _checked(topology.name, topology.model_dump() | size)


def read_topology(path: str | Path) -> Topology:
    """From YAML. UserError names the file, the key and its value."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"topology {path} cannot be read: {error}; {_MEASURE}") from None
    if not isinstance(raw, dict):
        raise UserError(f"topology {path} is no mapping of {', '.join(Topology.model_fields)}; {_MEASURE}")
    return _checked(str(path), raw)


def write_topology(path: str | Path, topology: Topology) -> None:
    head = "# sizes in bytes, speeds per second, all of one rank: see sharding/topology.py\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(head + yaml.safe_dump(topology.model_dump(), sort_keys=False))
    except OSError as error:
        raise UserError(f"topology {path} cannot be written: {error}") from None


def _checked(where: str, fields: Mapping[str, Any]) -> Topology:
    try:
        return Topology.model_validate(fields)
    except pydantic.ValidationError as error:
        raise UserError(f"topology {where}: " + "; ".join(map(_explain, error.errors()))) from None


def _explain(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    key, allowed = str(error["loc"][0]), list(Topology.model_fields)
    if error["type"] == "extra_forbidden":
        near = get_close_matches(key, allowed, n=1)
        return f"unknown key '{key}'; " + (f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(allowed)}")
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    return f"'{key}' is {error['input']!r}: {message}"
