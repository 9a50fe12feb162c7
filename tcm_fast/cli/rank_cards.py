"""`tcm-fast plan --prices FILE`: words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tcm_fast.config import Config

if TYPE_CHECKING:
    from tcm_fast.planning.memory_estimate import ImageShape


def print_ranking(
    settings: Config, shape: ImageShape, prices_file: Path, *, gpus: int, title: str
) -> None:
    """Print the cards of a file of prices, ranked. ValueError for a file that is none."""
    from rich.console import Console

    from tcm_fast.cli.plan import duration, new_table
    from tcm_fast.planning.cards import BANDWIDTH_SHARE, EFFICIENCY
    from tcm_fast.planning.prices import load_prices, rank_cards

    prices = load_prices(prices_file)
    unit = prices.currency or "unit"
    offers = rank_cards(settings, shape, prices, gpus=gpus)
    table = new_table(f"{title}, {settings.precision}: images for a price (computed, not run)")
    for column in ("card", f"{unit}/h", "images/s", "time", f"cost, {unit}", f"images per {unit}"):
        table.add_column(column, justify="left" if column == "card" else "right")
    for offer in offers:
        name, price = (
            f"{gpus} x {offer.card.name}" if gpus > 1 else offer.card.name,
            offer.price * gpus,
        )
        if offer.plan is None:
            table.add_row(name, f"{price:,.2f}", "does not fit")
            continue
        images = sum(phase.images for phase in offer.plan.phases)
        table.add_row(
            name, f"{price:,.2f}", f"{images / offer.plan.seconds:,.0f}", duration(offer.plan.seconds),
            f"{offer.cost:,.2f}", f"{offer.images_per_unit:,.0f}",
        )  # fmt: skip
    share = 100 * EFFICIENCY[settings.precision]
    console = Console()
    console.print(table)
    console.print(
        f"Speeds computed from data sheets: {share:.0f} % of a card's {settings.precision} rate, "
        f"{100 * BANDWIDTH_SHARE:.0f} % of its bandwidth, with the memory optimizations it needs. Prices "
        f"from {prices_file}. Another --precision ranks anew.",
        soft_wrap=True,
        highlight=False,
    )
