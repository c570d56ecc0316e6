"""The Wukong stack against its own matrix products: `exfm bench dense [--sizes frappe,criteo,...] [--compile]`.

A step is forward and backward of backbone and head on pooled embeddings. Every matrix product that it makes is seen as it is called,
and timed again alone at its shape. Three numbers, never mixed:

  products / step   of the step's time, what its own products take at their shapes; the rest is everything else
  GEMM efficiency   FLOP/s of the step by those of one large square product measured here
  MFU               FLOP/s of the step by the peak of the data sheet, where this device has one (sharding/topology.py)

Medians after warm-up. Writes dense.json and dense.md under --out.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plan import say
from exfm.data.errors import UserError
from exfm.models.build import build_backbone
from exfm.models.config import WukongConfig
from exfm.models.heads import Head
from exfm.models.interface import InputSpec
from exfm.sharding.topology import gpu_here, gpu_topology, preset_of

# (features, dense features, batch, config): the first two as in the measurements of docs/throughput.md, the others for one GPU
SMALL = {"layers": 2, "num_fmb": 16, "num_lcb": 16, "rank": 8, "width": 32, "fmb_mlp": [256, 256], "final_mlp": [256, 128], "dense_mlp": [256]}  # fmt: skip
LARGE = {"layers": 8, "width": 160, "final_mlp": [8192, 8192], "fmb_mlp": [8192, 8192, 8192]}
SIZES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "frappe": (10, 0, 4096, SMALL),
    "criteo": (26, 13, 4096, SMALL),
    "l8n32": (192, 0, 4096, LARGE | {"num_fmb": 32, "num_lcb": 32, "rank": 24, "fmb_mlp": [2048, 2048]}),
    "l8n96": (192, 0, 4096, LARGE | {"num_fmb": 96, "num_lcb": 96, "rank": 96}),
}
ON_CPU = ("frappe", "criteo")
SQUARE = {"cpu": 2048, "cuda": 8192}
Shape = tuple[
    str, tuple[int, ...], tuple[int, ...], bool, bool
]  # operation, both operands' sizes, whether each is transposed


class Products(TorchDispatchMode):
    """Counts matrix products by shape and layout."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:]
            self.seen[name[-3:].lstrip("d"), tuple(a.shape), tuple(b.shape), _turned(a), _turned(b)] += 1
        return func(*args, **(kwargs or {}))


def _turned(x: Tensor) -> bool:
    return x.stride(-1) != 1 and x.stride(-2) == 1


def flops(shape: Shape) -> int:
    _, a, b, *_ = shape
    return 2 * torch.Size(a).numel() * b[-1]


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    _, *sizes, turned_a, turned_b = shape
    made = []
    for size, turned in zip(sizes, (turned_a, turned_b), strict=True):
        x = torch.randn(*size[:-2], *(size[:-3:-1] if turned else size[-2:]), dtype=dtype, device=device)
        made.append(x.mT if turned else x)
    return made[0], made[1]


def median_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for i in range(repeats + 2):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        if i >= 2:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(name: str, device: torch.device, dtype: torch.dtype, compiled: bool, repeats: int) -> dict[str, Any]:
    features, dense, batch, fields = SIZES[name]
    config = WukongConfig.model_validate(fields)
    inputs = InputSpec(dense, tuple((f"f{i}", config.width) for i in range(features)))
    backbone = build_backbone(config, inputs).to(device)
    head = Head(backbone.out_width, (), 1).to(device)
    model: Callable[..., Tensor] = lambda x, p: head(backbone(x, p))  # noqa: E731
    numbers = torch.randn(batch, dense, device=device)
    pooled = torch.randn(batch, inputs.pooled_width, device=device, requires_grad=True)
    parameters = [*nn.ModuleList([backbone, head]).parameters(), pooled]

    def step(run: Callable[..., Tensor]) -> None:
        for p in parameters:
            p.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = run(numbers, pooled).float().sum()
        loss.backward()

    with Products() as products:
        step(model)
    if compiled:
        model = torch.compile(model)
    step_s = median_s(lambda: step(model), device, repeats)
    parts = []
    for shape, count in products.seen.items():
        a, b = operands(shape, dtype, device)
        parts.append((shape, count, count * median_s(lambda a=a, b=b: a @ b, device, repeats)))  # type: ignore[misc]
    total = sum(count * flops(shape) for shape, count, _ in parts)
    return {
        "size": name,
        "batch": batch,
        "parameters": sum(p.numel() for p in parameters[:-1]),
        "gflop_per_example": total / batch / 1e9,
        "step_s": step_s,
        "examples_per_s": batch / step_s,
        "products_s": sum(s for *_, s in parts),
        "flops_per_s": total / step_s,
        "slowest": [[str(shape), count, s] for shape, count, s in sorted(parts, key=lambda p: -p[2])[:6]],
    }


def markdown(result: dict[str, Any]) -> str:
    peak = result["data_sheet_flops"]
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['dtype']}{', torch.compile' if result['compiled'] else ''}; one square product of "
        f"{result['square']}: {result['square_flops'] / 1e9:,.0f} GFLOP/s" + (f"; data sheet: {peak / 1e12:,.0f} TFLOP/s" if peak else ""),
        "",
        "| size | batch | parameters | MFLOP per example | step, ms | thousand examples/s | products / step | GEMM efficiency | MFU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in result["rows"]:
        mfu = f"{r['flops_per_s'] / peak:.2f}" if peak else "no data sheet"
        lines.append(
            f"| {r['size']} | {r['batch']} | {r['parameters']:,} | {1000 * r['gflop_per_example']:.1f} | {1000 * r['step_s']:.1f} | "
            f"{r['examples_per_s'] / 1000:.1f} | {r['products_s'] / r['step_s']:.2f} | {r['flops_per_s'] / result['square_flops']:.2f} | {mfu} |"
        )
    return "\n".join([*lines, ""])


def main(args: list[str], data_dir: str | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="exfm bench dense", description=__doc__)
    parser.add_argument("--sizes", default=",".join(SIZES if cuda else ON_CPU), help="of " + ", ".join(SIZES))
    parser.add_argument("--dtype", default="bf16" if cuda else "fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/dense"))
    o = parser.parse_args(args)
    if wrong := [s for s in o.sizes.split(",") if s not in SIZES]:
        raise UserError(f"--sizes names {', '.join(wrong)}; there are: {', '.join(SIZES)}")
    torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision("high")  # tf32 on a GPU, whose fp32 has no tensor cores
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32
    a, b = (torch.randn(SQUARE[device.type], SQUARE[device.type], dtype=dtype, device=device) for _ in range(2))
    square_flops = 2 * len(a) ** 3 / median_s(lambda: a @ b, device, o.repeats)
    preset = preset_of(gpu_here()[0]) if cuda else None
    rates = gpu_topology(preset, 1) if preset else None
    result = {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "threads": o.threads,
        "dtype": o.dtype,
        "compiled": o.compile,
        "square": len(a),
        "square_flops": square_flops,
        "data_sheet_flops": (rates.bf16_flops if dtype == torch.bfloat16 else rates.fp32_flops) if rates else 0.0,
        "rows": [],
    }
    for name in o.sizes.split(","):
        result["rows"].append(row := measure(name, device, dtype, o.compile, o.repeats))
        say(
            f"{name}: {row['examples_per_s']:,.0f} examples/s, products {row['products_s'] / row['step_s']:.2f} of the step"
        )
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "dense.json").write_text(json.dumps(result, indent=1))
    (o.out / "dense.md").write_text(text := markdown(result))
    print(text)
    return 0
