"""The Wukong presets beside the paper's Table 5; `python -m exfm.models.presets` prints the table of docs/models.md."""

from dataclasses import dataclass

import torch

from exfm.models.config import WUKONG_PRESETS
from exfm.models.interface import InputSpec, ModelSize
from exfm.models.wukong import Wukong

# The paper names 720 features and d = 160; that each of them is one embedding is our reading.
PAPER_INPUTS = InputSpec(num_dense=0, features=tuple((f"feature_{i}", 160) for i in range(720)))


@dataclass(frozen=True)
class PaperRow:
    """What Table 5 prints: training GFLOP per example, and parameters in 1e9 including the same tables in every row."""

    gflop: float
    params_g: float


PAPER_ROWS = {
    "wukong-0.53g": PaperRow(0.53, 627.74),
    "wukong-1.25g": PaperRow(1.25, 627.82),
    "wukong-2.12g": PaperRow(2.12, 627.95),
    "wukong-5.6g": PaperRow(5.6, 628.46),
    "wukong-22g": PaperRow(22.23, 630.96),
    "wukong-61g": PaperRow(61, 636.99),
    "wukong-108g": PaperRow(108, 644),
}


def preset_size(name: str) -> ModelSize:
    """Size of a preset on the paper's inputs; allocates nothing."""
    with torch.device("meta"):
        return Wukong(WUKONG_PRESETS[name], PAPER_INPUTS).size()


def markdown_table() -> str:
    """One line per preset: computed against published, parameters as the difference from the row above."""
    lines = [
        "| preset | parameters (1e9) | more than above (1e9) | paper | ratio | 3 x forward GFLOP | paper | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    above: tuple[float, float] | None = None
    for name, paper in PAPER_ROWS.items():
        size = preset_size(name)
        params_g, gflop = size.num_parameters / 1e9, 3 * size.flops_per_example / 1e9
        if above is None:
            difference = " | | "
        else:
            more, paper_more = params_g - above[0], paper.params_g - above[1]
            difference = f"{more:.3f} | {paper_more:.2f} | {more / paper_more:.2f}"
        lines.append(
            f"| {name} | {params_g:.3f} | {difference} | {gflop:.2f} | {paper.gflop:g} | {gflop / paper.gflop:.2f} |"
        )
        above = (params_g, paper.params_g)
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
