"""Means and standard deviations over sets of samples, and what they tell apart."""

from types import SimpleNamespace

import numpy as np
import pytest

from tcm_fast.evaluation.repeats import Repeats, mean_and_deviation


def repeats(*values):
    return Repeats(tuple(SimpleNamespace(metrics={"d": v}, nearest=2 * v) for v in values))


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
