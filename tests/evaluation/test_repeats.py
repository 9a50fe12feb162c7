"""Means and standard deviations over sets of samples, and what they tell apart."""

from types import SimpleNamespace

import numpy as np
import pytest

from tcm_fast.evaluation.repeats import Repeats, difference, mean_and_deviation


def repeats(*values, real=0.0):
    return Repeats(
        tuple(
            SimpleNamespace(metrics={"d": v}, metrics_real={"d": real}, nearest=2 * v)
            for v in values
        )
    )


def test_values_by_name():
    three = repeats(1.0, 2.0, 6.0)
    np.testing.assert_array_equal(three.values("nearest"), [2, 4, 12])
    assert three.mean("d") == 3
    assert three.deviation("d") == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert np.isnan(repeats(1.0).deviation("d"))
    assert np.isnan(repeats(1.0).least_difference("d"))


def test_the_least_difference_is_seldom_exceeded_by_chance():
    """Of two networks that are equally good, in 5 % of the cases."""
    draws = np.random.default_rng(0).standard_normal((4000, 2, 3))
    exceeded = []
    for pair in draws:
        a, b = (repeats(*x) for x in pair)
        scale = np.sqrt((a.deviation("d") ** 2 + b.deviation("d") ** 2) / 2)
        least = a.least_difference("d") / a.deviation("d") * scale
        exceeded.append(abs(pair[0].mean() - pair[1].mean()) > least)
    assert np.mean(exceeded) == pytest.approx(0.05, abs=0.01)


def test_rough_where_the_error_is_a_tenth_of_the_distance_or_unknown():
    assert not repeats(10.0, 10.1, 9.9).is_rough("d")
    assert repeats(10.0, 14.0, 6.0).is_rough("d")
    assert repeats(10.0).is_rough("d")
    assert repeats(0.0, 0.1, -0.1).is_rough("d")


def test_mean_and_deviation_of_what_a_space_does_not_have():
    assert mean_and_deviation([None, None]) == (None, None)
    assert mean_and_deviation([0.5]) == (0.5, None)
    assert mean_and_deviation([0.5, 0.7]) == pytest.approx((0.6, np.sqrt(0.02)))


# ---- two networks -------------------------------------------------------------------------------


def test_paired_seeds_leave_out_what_both_have():
    """Sets that vary much, alike in both, tell a small difference apart that unpaired ones would not."""
    common = 10 + 3 * np.random.default_rng(0).standard_normal(4)
    good, bad = repeats(*common), repeats(*(common + np.array([0.4, 0.5, 0.6, 0.5])))
    found = difference(bad, good, "d", spread=0)
    assert found.value == pytest.approx(0.5)
    assert found.of_samples < 0.2 < good.least_difference("d")
    assert found.is_of_networks
    assert found.is_of_recipes
    assert difference(good, bad, "d", spread=0).value == -found.value
    # 0.5 of 10 is what another seed of the training makes.
    spread = difference(bad, good, "d", spread=0.1)
    assert spread.is_of_networks
    assert not spread.is_of_recipes
    assert spread.of_training == pytest.approx(
        1.96 * 2**0.5 * 0.1 * (common.mean() + 0.25), rel=0.01
    )


def test_what_real_images_have_too_is_no_part_of_a_trainings_spread():
    good, bad = repeats(10.0, 10.1, real=9.0), repeats(12.0, 12.2, real=9.0)
    expected = 1.96 * 2**0.5 * 0.2 * (11.075 - 9)
    assert difference(bad, good, "d").of_training == pytest.approx(expected, rel=0.01)
    assert difference(good, good, "d").value == 0


def test_equal_networks_seldom_differ():
    """In 5 % of the cases, by samples alone; never, where the seeds of a training count too."""
    draws = np.random.default_rng(1).standard_normal((2000, 2, 5)) + 50
    found = [difference(repeats(*a), repeats(*b), "d") for a, b in draws]
    assert np.mean([d.is_of_networks for d in found]) == pytest.approx(0.05, abs=0.015)
    assert not any(d.is_of_recipes for d in found)


def test_difference_refuses():
    with pytest.raises(ValueError, match="as many sets of samples, got 2 and 3"):
        difference(repeats(1.0, 2.0), repeats(1.0, 2.0, 3.0), "d")
    with pytest.raises(ValueError, match="spread must not be negative, got -1"):
        difference(repeats(1.0, 2.0), repeats(1.0, 2.0), "d", spread=-1)
