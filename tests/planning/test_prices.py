"""Which card trains the most images for its price."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcm_fast.cli.main import main
from tcm_fast.config import load_preset
from tcm_fast.planning import cards
from tcm_fast.planning.memory_estimate import ImageShape
from tcm_fast.planning.prices import Prices, load_prices, rank_cards

SHAPE = ImageShape(8, 1, 10, 1797)


def test_the_file(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text('currency = "EUR"\n[per_hour]\n"NVIDIA GeForce RTX4090" = 0.5\nh200 = 3\n')
    prices = load_prices(path)
    assert prices == Prices("EUR", {"rtx4090": 0.5, "h200": 3.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[per_hour\n", "cannot be read"),
        ("currency = 3\n[per_hour]\nh200 = 1\n", "currency must be a name, got 3"),
        ('currency = "EUR"\n', r"needs a table \[per_hour\] of cards, got None"),
        ("[per_hours]\nh200 = 1\n", "per_hours: unknown, did you mean 'per_hour'"),
        ("[per_hour]\nh20 = 1\n", "h20: unknown, did you mean 'h200'"),
        ("[per_hour]\nh200 = 0\n", "h200 must be positive, got 0"),
        ("[per_hour]\nh200 = inf\n", "h200 must be positive, got inf"),
        ('[per_hour]\nh200 = "3 EUR"\n', "h200 must be positive, got '3 EUR'"),
        ("[per_hour]\nh200 = true\n", "h200 must be positive, got True"),
    ],
)
def test_mistakes_in_the_file(text, message, tmp_path):
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(ValueError, match=f"prices: .*{message}"):
        load_prices(tmp_path / "prices.toml")
    with pytest.raises(FileNotFoundError, match="prices: no such file"):
        load_prices(tmp_path / "none.toml")


CARDS = ("rtx3060", "rtx4090", "h200")


@given(st.fixed_dictionaries(dict.fromkeys(CARDS, st.floats(0.01, 100))))
@settings(deadline=None, max_examples=25)
def test_the_order_is_that_of_images_for_a_price(per_hour):
    offers = rank_cards(load_preset("digits"), SHAPE, Prices("", per_hour))
    assert sorted(offer.card.name for offer in offers) == sorted(per_hour)
    values = [offer.images_per_unit for offer in offers]
    assert values == sorted(values, reverse=True)
    for offer in offers:
        images = sum(phase.images for phase in offer.plan.phases)
        hours = sum(phase.images / phase.rate for phase in offer.plan.phases) / 3600
        assert offer.cost == pytest.approx(hours * per_hour[offer.card.name])
        assert offer.images_per_unit == pytest.approx(images / offer.cost)


def test_a_card_that_is_too_small_comes_last(monkeypatch):
    config = load_preset("digits")
    wide = replace(config.network, model_channels=4096)  # 40 GiB of weights alone
    prices = Prices("", {"rtx4060": 0.01, "h200": 3.0})
    monkeypatch.setitem(cards.CARDS, "h200", replace(cards.CARDS["h200"], memory=2**50))
    h200, small = rank_cards(replace(config, network=wide), SHAPE, prices)
    assert (h200.card.name, small.card.name) == ("h200", "rtx4060")
    assert small.plan is None
    assert (small.cost, small.images_per_unit) == (math.inf, 0.0)
    assert h200.images_per_unit > 0


def test_the_command(tmp_path, capsys):
    (tmp_path / "prices.toml").write_text(
        'currency = "EUR"\n[per_hour]\nrtx4090 = 0.4\nh200 = 40\n'
    )
    with pytest.raises(SystemExit) as end:
        main(
            ["plan", "--preset", "digits", "--prices", str(tmp_path / "prices.toml"), "--gpus", "2"]
        )
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "computed, not run" in said
    assert "images per EUR" in said
    assert said.index("2 x rtx4090") < said.index("2 x h200")
    assert "0.80" in said
