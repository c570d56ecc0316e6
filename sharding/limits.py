"""Why a model does not fit a cluster, with the arithmetic, and what would help, the most effective first."""

import math
from collections.abc import Sequence

import numpy as np

from exfm.sharding.candidates import Candidate
from exfm.sharding.topology import Topology

GIB = 2**30


def gib(value: float) -> str:
    """Bytes for people, of which the first two digits are seen."""
    if value >= GIB / 2:
        return f"{value / GIB:,.1f} GiB"
    return f"{value / 2**20:,.1f} MiB" if value >= 2**20 / 2 else f"{value / 2**10:,.1f} KiB"


def smallest(tables: Sequence[Sequence[Candidate]]) -> float:
    """Bytes of device memory that all tables need together at least, as their candidates are; host memory on a CPU."""
    return sum(min(c.total("hbm") + c.total("host") for c in own) for own in tables)


def table_too_large(own: Sequence[Candidate], free: tuple[float, float], topology: Topology) -> str:
    """What to say of a table no candidate of which fits a rank. free: bytes (device, host) of a rank."""
    where, number = ("device", 0) if topology.device == "cuda" else ("host", 1)
    best = min(own, key=lambda c: (c.most("hbm"), c.most("host"))[number])
    need, table = (best.most("hbm"), best.most("host"))[number], best.table
    rows, width = table.shape
    size = rows * width * table.parameter.element_size()
    allowed = sorted({c.sharding_type for c in own})
    remedy = ["use fp16 rows" if table.parameter.element_size() > 2 else ""]
    if "row_wise" not in allowed:
        remedy.insert(0, f"allow row_wise for it (sharding.tables.{table.name})")
    else:
        split = math.ceil(need * topology.group_size / max(free[number], 1.0))
        remedy.insert(0, f"use at least {split} ranks")
    return (
        f"table '{table.name}' does not fit: {rows:,} rows x {width} x {table.parameter.element_size()} bytes = {gib(size)}; as "
        f"{best.sharding_type}, the smallest of {', '.join(allowed)}, a rank needs {gib(need)} of {where} memory and has {gib(free[number])}; "
        + " or ".join(r for r in remedy if r)
    )


def shortfall(tables: Sequence[Sequence[Candidate]], hbm: np.ndarray, host: np.ndarray, topology: Topology) -> str:
    """What to say of a model that does not fit as a whole. hbm, host: bytes that each rank may use."""
    cuda = topology.device == "cuda"
    there = float((hbm if cuda else host).sum())
    need = sum(min(c.total("hbm" if cuda else "host") for c in own) for own in tables)
    ranks, rank = len(hbm), there / len(hbm)
    what = "device" if cuda else "host"
    if need <= there:
        head = (
            f"the tables need {gib(need)} of {what} memory and the {ranks} ranks have {gib(there)}, but no arrangement of the shards was "
            "found in which every rank's fit"
        )
    else:
        head = f"the tables need {gib(need)} of {what} memory at least, the {ranks} ranks have {gib(there)} for them: {gib(need - there)} short"
    return f"{head}. Remedies, the most effective first: " + "; ".join(remedies(tables, need, rank, topology))


def remedies(tables: Sequence[Sequence[Candidate]], need: float, rank: float, topology: Topology) -> list[str]:
    """need: bytes of all tables; rank: bytes that a rank has for them."""
    node = topology.ranks_per_node
    wanted = (
        math.ceil(1.03 * need / max(rank, 1.0) / node) * node * topology.replicas
    )  # shards never fill a rank to the brim
    found = [(need, f"use {max(wanted, topology.world_size + node)} ranks instead of {topology.world_size}")]
    if topology.replicas > 1:
        found.append((need * (1 - 1 / topology.replicas), f"use fewer replicas than {topology.replicas}"))
    by_bytes = {n: [own[0].table for own in tables if own[0].table.parameter.element_size() == n] for n in (4, 2)}
    weights = {n: sum(n * t.shape[0] * t.shape[1] for t in own) for n, own in by_bytes.items()}
    if weights[4]:
        found.append((weights[4] / 2, f"store fp16 rows (tables.NAME.dtype): saves {gib(weights[4] / 2)}"))
    if weights[2]:
        found.append(
            (weights[2] / 2, f"store int8 rows, where the trainer knows them: would save {gib(weights[2] / 2)}")
        )
    kernels = {c.kernel for own in tables for c in own}
    if topology.device == "cuda" and not kernels & {"fused_uvm", "fused_uvm_caching"}:
        host = topology.host_bytes * topology.group_size
        found.append(
            (
                min(need, host),
                f"allow the host tier (sharding.kernels: [fused, fused_uvm_caching]): up to {gib(host)} more",
            )
        )
    pinned = [
        own[0].table.name for own in tables if all(c.sharding_type not in ("row_wise", "table_row_wise") for c in own)
    ]
    if pinned:
        sizes = {own[0].table.name: own[0].table.shape[0] * own[0].table.shape[1] for own in tables}
        largest = max(pinned, key=lambda name: sizes[name])
        found.append((rank, f"allow row_wise for table '{largest}' (sharding.tables.{largest})"))
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]
