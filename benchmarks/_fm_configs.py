"""Writes configs/fm_1t.yaml, fm_3t.yaml and fm_stats.yaml: `python -m benchmarks._fm_configs`. What is not published is assumed, and said so there."""

from pathlib import Path
from statistics import NormalDist

import numpy as np

from exfm.data.stats import ColumnStats, StreamStats, write_stats

CONFIGS = Path(__file__).parents[1] / "configs"
FEATURES, WIDTH, FEWEST = (
    720,
    160,
    1_000,
)  # Wukong's internal setting (arXiv 2403.02545, section 5.2): 720 features, d = 160
SIZES = {"fm_1t": 10**12, "fm_3t": 32 * 10**11}
BATCH, ZIPF = 4096, 1.05
HEAD = """# A foundation model to plan, {title} of embedding parameters exactly; there is no stream to train it on here.
#   exfm plan configs/{name}.yaml --world-size 1024 --gpu h100 --local-batch 512
# 720 features, a table each, d = 160: Wukong's internal setting (arXiv 2403.02545, Table 5), fp16 rows. Assumed, because it is not published:
# - rows fall by a power law: table i has C / (i + 1), at least 1,000; the largest takes what is left to the exact sum
# - ids per example (fm_stats.yaml): lognormal (mu 1, sigma 1.2), 1 to 100, not ordered as the sizes are; mean 5.0
# - ids are Zipf distributed with exponent 1.05
# - 512 examples a rank and step
run: {{name: {name}, folder: runs/{name}, pipeline: sparse_dist}}
stream: {{path: runs/{name}/stream, global_batch: 524288}}
model: {{kind: wukong, preset: wukong-2.12g, final_mlp: [512]}}
heads: {{tasks: [engagement, conversion], hidden: []}}
optim: {{dense: {{lr: 0.0004}}, tables: {{lr: 0.04}}}}
sharding:
  allowed: [data_parallel, table_wise, column_wise, row_wise, table_row_wise, table_column_wise, grid_shard]
  min_column_shard: 20                    # column shards of 20, 32, 40 or 80: TorchRec's own floor of 128 splits none
  stats: configs/fm_stats.yaml
  reserved: {reserved}
"""


def rows_of(parameters: int) -> list[int]:
    """Rows of every table, largest first; times WIDTH they add up to `parameters`."""
    share = 1 / np.arange(1, FEATURES + 1)
    rows = np.maximum((share / share.sum() * parameters / WIDTH).astype(np.int64), FEWEST)
    rows[0] += parameters // WIDTH - int(rows.sum())
    return [int(n) for n in rows]


def pooling() -> list[float]:
    """Ids per example of every feature: quantiles of the lognormal, in a fixed order that has nothing to do with sizes."""
    golden = (np.arange(FEATURES) * 0.6180339887 + 0.5) % 1
    normal = np.array([NormalDist().inv_cdf(float(q)) for q in golden])
    return [round(float(x), 2) for x in np.clip(np.exp(1 + 1.2 * normal), 1, 100)]


def column(ids: float, rows: int) -> ColumnStats:
    """What a Zipf law says of a column, unmeasured."""
    ranks = np.unique(np.geomspace(1, rows, 2000).astype(np.int64))
    mass = np.concatenate([[0.0], np.cumsum(np.diff(np.concatenate([[0], ranks])) * ranks.astype(float) ** -ZIPF)])
    share = np.interp(np.array([0.001, 0.01, 0.1]) * rows, np.concatenate([[0], ranks]), mass / mass[-1])
    cached = np.interp(np.arange(1, 21) / 20 * rows, np.concatenate([[0], ranks]), mass / mass[-1])
    lookups, p = ids * BATCH, ranks.astype(float) ** -ZIPF / mass[-1]
    seen = float(np.sum(np.diff(np.concatenate([[0], ranks])) * (1 - np.exp(-lookups * p))))
    return ColumnStats(
        pooling=ids,
        presence=1.0,
        unique_rate=round(min(1.0, seen / lookups), 6),
        distinct=rows,
        zipf=ZIPF,
        hot=dict(zip(("0.001", "0.01", "0.1"), (round(float(s), 6) for s in share), strict=True)),
        reuse=tuple(round(float(1 - c), 6) for c in cached),
    )


def main() -> None:
    ids = pooling()
    names = [f"feature_{i:03d}" for i in range(FEATURES)]
    for name, parameters in SIZES.items():
        rows = rows_of(parameters)
        title = "1.0e12" if name == "fm_1t" else "3.2e12"
        text = HEAD.format(name=name, title=title, reserved=0.05)
        text += "features:\n  sparse:\n"
        text += "".join(f"    - {{name: {n}, table: table_{n[-3:]}, ids: hash}}\n" for n in names)
        text += "tables:\n"
        text += "".join(
            f"  table_{n[-3:]}: {{rows: {r}, width: {WIDTH}, dtype: fp16}}\n" for n, r in zip(names, rows, strict=True)
        )
        (CONFIGS / f"{name}.yaml").write_text(text)
    columns = {n: column(i, r) for n, i, r in zip(names, ids, rows_of(SIZES["fm_1t"]), strict=True)}
    stats = StreamStats(
        stream="assumed, see fm_1t.yaml",
        examples=BATCH,
        batch=BATCH,
        slices=(0, 1),
        bytes_per_example=0.0,
        columns=columns,
    )
    write_stats(CONFIGS / "fm_stats.yaml", stats)


if __name__ == "__main__":
    main()
