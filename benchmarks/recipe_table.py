"""What hours of a card hold, computed: python -m tcm_fast.benchmarks.recipe_table rtx4090 h200

The CIFAR-10 recipe scaled by rule to 10 minutes, 1, 8 and 24 hours, as a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tcm_fast.cli.plan import duration
from tcm_fast.config import load_preset
from tcm_fast.planning.cards import find_card
from tcm_fast.planning.memory_estimate import ImageShape
from tcm_fast.planning.memory_planner import Plan
from tcm_fast.training.time_budget import fit_time_budget

HOURS = (1 / 6, 1.0, 8.0, 24.0)
CIFAR10 = ImageShape(32, 3, 0, 50_000)


def table(cards: Sequence[str], hours: Sequence[float] = HOURS, preset: str = "cifar10") -> str:
    """A row for each card and time."""
    names = load_preset(preset).phases
    lines = [
        "| card | time | width | precision | images of "
        + ", ".join(names)
        + " | images/s | batch | "
        "doubling | limit of r/t | t′ |",
        "|" + "---|" * 10,
    ]
    for card in cards:
        for some in hours:
            plan = fit_time_budget(load_preset(preset), CIFAR10, find_card(card), some, auto=True)
            lines.append(f"| {card} | {duration(some * 3600)} | {_cells(plan)} |")
    return "\n".join(lines)


def _cells(plan: Plan) -> str:
    config = plan.config
    stage1, stage2 = config.phase("ect"), config.phase("tcm")
    cells = [
        str(config.network.model_channels),
        config.precision,
        ", ".join(_short(p.images) for p in plan.phases),
        ", ".join(f"{p.rate:,.0f}" for p in plan.phases),
        ", ".join(str(p.batch_size) for p in plan.phases),
        str(getattr(stage1, "stage_iterations", "")),
        f"{getattr(stage1, 'limit', 0.0):.4f}",
        f"{getattr(stage2, 't_prime', 0.0):g}",
    ]
    return " | ".join(cells)


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 10_000_000 else f"{count / 1e6:.0f} M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cards", nargs="*", default=["rtx4060", "rtx4090", "h200"])
    args = parser.parse_args()
    print(table(args.cards))


if __name__ == "__main__":
    main()
