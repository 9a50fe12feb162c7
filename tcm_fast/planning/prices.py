"""Which card trains the most images for its price: computed speeds and memory (`memory_planner`), and prices
from a file of the user's.

    currency = "EUR"
    [per_hour]        # of one GPU
    rtx4090 = 0.40
    h200 = 3.10
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tcm_fast.config import Config, require, suggest
from tcm_fast.planning.cards import CARDS, Card, find_card
from tcm_fast.planning.memory_estimate import ImageShape
from tcm_fast.planning.memory_planner import (
    DoesNotFitError,
    Plan,
    check_smallest,
    choose_optimizations,
    plan_run,
)


@dataclass(frozen=True)
class Prices:
    """Of one GPU for an hour, by the card's name."""

    currency: str
    per_hour: Mapping[str, float]


@dataclass(frozen=True)
class Offer:
    """A card at its price. plan: the recipe on it, with the memory optimizations that it needs there; None
    where it does not fit."""

    card: Card
    price: float
    plan: Plan | None

    @property
    def cost(self) -> float:
        """Of the whole recipe; infinite where it does not fit."""
        if self.plan is None:
            return math.inf
        return self.plan.seconds / 3600 * self.price * self.plan.gpus

    @property
    def images_per_unit(self) -> float:
        """Training images of the whole recipe over its cost."""
        if self.plan is None:
            return 0.0
        return sum(phase.images for phase in self.plan.phases) / self.cost


def load_prices(path: str | Path) -> Prices:
    """Read a file of prices.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no TOML, a card is not known, or a price is not positive.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prices: no such file: {path}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"prices: {path} cannot be read: {error}") from None
    for key in table:
        require(
            key in ("currency", "per_hour"),
            f"prices: {key}: {suggest(key, ['currency', 'per_hour'])}",
        )
    currency, given = table.get("currency", ""), table.get("per_hour")
    require(isinstance(currency, str), f"prices: currency must be a name, got {currency!r}")
    if not isinstance(given, dict) or not given:
        raise ValueError(f"prices: {path} needs a table [per_hour] of cards, got {given!r}")
    found: dict[str, float] = {}
    for name, price in given.items():
        is_price = isinstance(price, (int, float)) and not isinstance(price, bool)
        require(
            is_price and 0 < price < math.inf, f"prices: {name} must be positive, got {price!r}"
        )
        try:
            found[find_card(name).name] = float(price)
        except ValueError:
            known = suggest(name, list(CARDS))
            raise ValueError(f"prices: {name}: {known}") from None
    return Prices(currency, found)


def rank_cards(config: Config, shape: ImageShape, prices: Prices, *, gpus: int = 1) -> list[Offer]:
    """The cards of the prices, the one with the most images for its price first; those that the recipe
    does not fit come last.

    Args:
        config: the recipe.
        shape: of its images.
        prices: of the cards.
        gpus: how many of a card.
    """
    offers = []
    for name, price in prices.per_hour.items():
        card = find_card(name)
        plan = None
        with suppress(DoesNotFitError):
            check_smallest(config, shape, card)  # soon says no, where that is the answer
            plan = plan_run(
                choose_optimizations(config, shape, card, gpus=gpus), shape, card, gpus=gpus
            )
        offers.append(Offer(card, price, plan))
    return sorted(offers, key=lambda offer: (offer.cost, offer.price))
