"""A long recipe scaled to a short budget: what the rule gives, and where it leaves the recipe alone."""

from dataclasses import replace

import pytest

from tcm_fast.config import load_preset
from tcm_fast.objectives.edm import Edm
from tcm_fast.planning.recipes import (
    images_for,
    leaves_signal_to_tf32,
    scale_recipe,
    scale_width,
)

CIFAR10 = load_preset("cifar10")
WHOLE = {name: CIFAR10.phase(name).images for name in CIFAR10.phases}


def scaled(share, **options):
    return scale_recipe(CIFAR10, {n: int(k * share) for n, k in WHOLE.items()}, **options)


def test_at_its_own_length_a_recipe_stays_what_it_is():
    found = scaled(1)
    for name in CIFAR10.phases:
        assert found.phase(name) == CIFAR10.phase(name)
    assert found.network == CIFAR10.network
    assert found.precision == CIFAR10.precision


@pytest.mark.parametrize("share", [1 / 8, 1 / 100, 1 / 2000])
def test_what_becomes_of_less(share):
    """Smaller batches, fewer steps, no wider gap than a quarter, the same share of the phase to get
    there, one schedule over both stages."""
    found = scaled(share)
    for name in found.phases:
        own, whole = found.phase(name), CIFAR10.phase(name)
        assert own.images <= whole.images * share
        assert own.images % own.batch_size == 0
        assert 64 <= own.batch_size <= whole.batch_size
        assert own.batch_size.bit_count() == 1
        assert own.images // own.batch_size < whole.images // whole.batch_size
        assert own.dropout <= whole.dropout
    first, second = found.ect, found.tcm
    assert (first.stage_iterations, first.max_ratio, first.q) == (
        second.stage_iterations,
        second.max_ratio,
        second.q,
    )
    assert 0.75 <= first.max_ratio < CIFAR10.ect.max_ratio
    assert first.lr <= 2e-3
    assert second.t_prime == CIFAR10.tcm.t_prime
    steps = first.images // first.batch_size
    assert found.save_every <= max(steps // 4, 50)


def test_shorter_is_never_closer_pairs_nor_larger_batches():
    found = [scaled(share) for share in (1, 1 / 4, 1 / 30, 1 / 300, 1 / 3000)]
    for key in ("max_ratio", "batch_size"):
        values = [getattr(config.ect, key) for config in found]
        assert values == sorted(values, reverse=True)


def test_tf32_where_the_schedule_leaves_it_enough_signal():
    assert leaves_signal_to_tf32(scaled(1 / 2000))
    assert not leaves_signal_to_tf32(scaled(1 / 2))
    assert scaled(1 / 2000).precision == CIFAR10.precision == "fp32"
    found = scaled(1 / 2, tf32=True)
    assert found.precision == "tf32"
    assert found.ect.max_ratio == found.tcm.max_ratio == 1 - 0.004


def test_width():
    assert scale_width(128, 2.0) == 128
    assert scale_width(128, 1 / 16) == 96
    assert scale_width(128, 1e-9) == 32
    assert scale_width(24, 1e-3) == 24  # never wider than the recipe's
    assert scaled(1 / 100, width=64).network.model_channels == 64
    narrow, wide = scaled(1 / 100, width=64), scaled(1 / 100)
    assert narrow.edm.lr == pytest.approx(2 * wide.edm.lr)


def test_averages_remember_a_tenth_of_the_phase():
    config = replace(CIFAR10, ect=replace(CIFAR10.ect, ema=("constant:0.9999", "halflife:500000")))
    images = {name: count // 1000 for name, count in WHOLE.items()}
    assert scale_recipe(config, images).ect.ema == ("power:6.94", "halflife:500000")
    assert scale_recipe(config, WHOLE).ect.ema == ("constant:0.9999", "halflife:500000")


def test_images_of_a_span_of_time():
    rates = {"edm": 100.0, "ect": 50.0, "tcm": 40.0}
    found = images_for(1000.0, rates, ("edm", "ect", "tcm"))
    assert sum(found[n] / rates[n] for n in found) == pytest.approx(1000, rel=1e-3)
    assert found["edm"] / rates["edm"] == pytest.approx(1000 * Edm.time_share, rel=1e-3)
    assert images_for(1000.0, rates, ("tcm",)) == {"tcm": 40_000}
