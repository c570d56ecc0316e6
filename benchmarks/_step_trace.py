"""What a Chrome trace of trainer/trace.py says: the time of a step by stage, and by what was exposed in it.

On CPU the main thread's time is counted: an operator's own, without those that it calls. Where no operator runs while a collective is
on its way, the collective is exposed; else it is the host: Python, autograd, dispatch. On CUDA kernels are counted; collectives and copies
where no other kernel runs; where none runs, the device is idle, which is the host's doing.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

from exfm.trainer.anatomy import IN_STEP

Span = tuple[float, float]
PRODUCTS, TABLES, COLLECTIVES, COPIES = "matrix products", "tables", "exposed collectives", "exposed copies"
OPTIMIZER, ELEMENTWISE, HOST = "dense optimizer", "norms, activations, concatenation, losses", "host overhead"
# the first that matches an operator's or a kernel's name (fbgemm is no gemm); `None`: the time is the host's
KINDS: tuple[tuple[str, str | None], ...] = (
    (r"nccl|c10d::|gloo|distributed::reducer", COLLECTIVES),
    (r"split_embedding|SplitLookup|fbgemm|embedding|bounds_check|lxu_cache|permute_|block_bucketize", TABLES),
    (r"^aten::(mm|addmm|bmm|baddbmm|_addmm_activation)$|gemm|cutlass|nvjet|xmma|mkl_linear", PRODUCTS),
    (r"_fused_adam|multi_tensor|_foreach|FusedAdam", OPTIMIZER),
    (r"^Memcpy|^Memset", COPIES),
    (r"autograd::|Backward\d*$|^Optimizer\.", None),
)


def kind_of(name: str) -> str | None:
    for pattern, kind in KINDS:
        if re.search(pattern, name):
            return kind
    return ELEMENTWISE


def merged(spans: list[Span]) -> list[Span]:
    """Their union as spans in order."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif end > begin:
            out.append((begin, end))
    return out


def length(spans: list[Span]) -> float:
    return sum(end - begin for begin, end in merged(spans))


def common(a: list[Span], b: list[Span]) -> list[Span]:
    """Intersection of two unions."""
    a, b, out, i, j = merged(a), merged(b), [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            out.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def without(a: list[Span], b: list[Span]) -> list[Span]:
    """Union a less union b."""
    out = []
    holes = merged(b)
    for begin, end in merged(a):
        for hole in holes:
            if hole[1] <= begin or hole[0] >= end:
                continue
            if hole[0] > begin:
                out.append((begin, hole[0]))
            begin = hole[1]
            if begin >= end:
                break
        if begin < end:
            out.append((begin, end))
    return out


def span(event: dict[str, Any]) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def read_trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as f:
        return [e for e in json.load(f)["traceEvents"] if e.get("ph") == "X" and "dur" in e]


def analyse(events: list[dict[str, Any]]) -> dict[str, Any]:
    """steps, step_s (their mean), stages and kinds in seconds of a step; the sum of either is a step's."""
    steps = [e for e in events if e["name"] == "exfm:step" and e["cat"] == "user_annotation"]
    window, main = merged([span(e) for e in steps]), steps[0]["tid"]
    stages: dict[str, list[Span]] = {}
    for e in events:
        if e["cat"] == "user_annotation" and e["name"].startswith("exfm:") and e["name"] != "exfm:step":
            stages.setdefault(e["name"].removeprefix("exfm:"), []).append(span(e))
    inside = {stage: common(own, window) for stage, own in stages.items()}
    outer = {stage: own for stage, own in inside.items() if stage not in IN_STEP}
    working = without(window, [s for own in outer.values() for s in own])
    kernels = [e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    kinds = _device(kernels, working) if kernels else _host(events, main, working)
    scale = 1e-6 / len(steps)
    return {
        "steps": len(steps),
        "step_s": length(window) * scale,
        "device": bool(kernels),
        "stages": {stage: length(own) * scale for stage, own in inside.items()},
        "kinds": {kind: s * scale for kind, s in kinds.items()}
        | {stage: length(own) * scale for stage, own in outer.items()},
    }


def _host(events: list[dict[str, Any]], main: int, window: list[Span]) -> dict[str, float]:
    ops = sorted((span(e), e["name"]) for e in events if e["cat"] == "cpu_op" and e["tid"] == main)
    ops.sort(key=lambda op: (op[0][0], -op[0][1]))
    found: dict[str, float] = {}
    host: list[Span] = []
    busy: list[Span] = []
    stack: list[tuple[Span, str, list[Span]]] = []

    def close() -> None:
        whole, name, children = stack.pop()
        own = without(common([whole], window), children)
        kind = kind_of(name)
        if kind is None:
            host.extend(own)
        else:
            found[kind] = found.get(kind, 0.0) + length(own)

    for whole, name in ops:
        while stack and stack[-1][0][1] <= whole[0]:
            close()
        (stack[-1][2] if stack else busy).append(whole)
        stack.append((whole, name, []))
    while stack:
        close()
    idle = without(window, busy) + host
    away = [span(e) for e in events if e["name"].startswith("gloo:") and e["tid"] != main]
    found[COLLECTIVES] = found.get(COLLECTIVES, 0.0) + length(common(idle, away))
    found[HOST] = length(without(idle, away))
    return found


def _device(kernels: list[dict[str, Any]], window: list[Span]) -> dict[str, float]:
    by_kind: dict[str, list[Span]] = {}
    for e in kernels:
        by_kind.setdefault(kind_of(e["name"]) or ELEMENTWISE, []).extend(common([span(e)], window))
    hidden = [by_kind.pop(kind, []) for kind in (COLLECTIVES, COPIES)]
    taken: list[Span] = []
    found = {}
    for kind in (PRODUCTS, TABLES, ELEMENTWISE, OPTIMIZER):  # what runs beside a product costs nothing
        own = without(by_kind.get(kind, []), taken)
        found[kind], taken = length(own), taken + own
    for kind, spans in zip((COLLECTIVES, COPIES), hidden, strict=True):
        own = without(spans, taken)
        found[kind], taken = length(own), taken + own
    found[HOST] = length(without(window, taken))
    return found
