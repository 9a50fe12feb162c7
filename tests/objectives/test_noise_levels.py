"""Noise levels: distributions against scipy's, pairs, and the plan of a batch."""

import dataclasses
import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tcm_fast.config import Config, EctConfig, IctConfig, TcmConfig, load_preset
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.ect import Ect
from tcm_fast.objectives.ict import Ict
from tcm_fast.objectives.noise_levels import (
    IMAGE,
    STAGE1,
    STUDENT,
    draw_t,
    ict_levels,
    inner_level,
    karras_grid,
    ratio,
)
from tcm_fast.objectives.tcm import Tcm

LEVELS = {
    "ect cifar10": dict(mean=-1.1, std=2.0, low=0.002, high=80.0),
    "ect imagenet64": dict(mean=-0.8, std=1.6, low=0.002, high=80.0),
    "tcm": dict(mean=0.0, std=0.2, df=0.01, low=1.0, high=80.0),
    "tcm t'=0.8": dict(mean=0.0, std=0.2, df=0.01, low=0.8, high=80.0),
    "tcm df=2": dict(mean=0.0, std=0.2, df=2.0, low=1.0, high=80.0),
    "edm": dict(mean=-1.2, std=1.2),
}


def truncated_cdf(mean, std, df=None, low=0.0, high=math.inf):
    law = stats.norm(mean, std) if df is None else stats.t(df, mean, std)
    first = law.cdf(math.log(low)) if low else 0.0
    last = law.cdf(math.log(high)) if high < math.inf else 1.0
    return lambda t: (law.cdf(np.log(t)) - first) / (last - first)


@pytest.mark.parametrize("name", LEVELS)
def test_draw_t_is_scipys_truncated_distribution(name):
    levels, cdf = LEVELS[name], truncated_cdf(**LEVELS[name])
    u = np.concatenate([np.linspace(1e-4, 1 - 1e-4, 9999), [1e-9, 1 - 1e-9]])
    np.testing.assert_allclose(cdf(draw_t(u, **levels)), u, atol=1e-6)
    t = draw_t(np.random.default_rng(0).random(50_000), **levels)
    assert stats.kstest(t, cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", [n for n in LEVELS if n != "edm"])
def test_draw_t_at_the_edges(name):
    levels = LEVELS[name]
    low, high = draw_t(np.array([0.0, np.nextafter(1, 0)]), **levels)
    assert levels["low"] <= low < levels["low"] * (1 + 1e-12)
    assert levels["high"] * (1 - 1e-6) < high <= levels["high"]


def test_stage_2_quantiles():
    t = draw_t(np.array([0.1, 0.5, 0.9, 0.99]), **LEVELS["tcm"])
    np.testing.assert_allclose(t, [1.01, 1.22, 10.4, 61], rtol=0.01)


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="no mass"):
        draw_t(np.array([0.5]), mean=-40.0, std=0.1, low=1.0, high=80.0)


def test_ratio_schedule():
    cifar, imagenet = load_preset("cifar10").ect, load_preset("imagenet64-s").ect
    assert [ratio(cifar, i) for i in (0, 24_999, 25_000, 75_000)] == [0.5, 0.5, 0.75, 0.9375]
    assert ratio(cifar, 9 * 25_000 - 1) < 0.999 == ratio(cifar, 9 * 25_000)
    assert [ratio(imagenet, i) for i in (0, 10_000, 30_000)] == [0.75, 0.9375, 0.99609375]
    assert ratio(imagenet, 10**7) == 0.9961


@given(st.floats(0.002, 80), st.floats(0.5, 0.9999))
def test_inner_level_lies_below(t, share):
    r, delta = inner_level(np.array([t]), share)
    expected = t * (1 - share) * (1 + 8 / (1 + math.exp(t)))
    assert 1e-6 <= r[0] < t
    assert delta[0] == t - r[0]
    assert r[0] == 1e-6 or delta[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bad", [0.0, 1.0, 1.5])
def test_inner_level_refuses_a_ratio_that_is_none(bad):
    with pytest.raises(ValueError, match="ratio"):
        inner_level(np.array([1.0]), bad)


def test_karras_grid_and_ict_levels():
    grid = karras_grid(18)
    assert len(grid) == 19
    np.testing.assert_allclose(grid[[0, -1]], [0.002, 80])
    assert (np.diff(grid) > 0).all()
    config = IctConfig(s0=10, s1=1280)
    assert ict_levels(config, 0, 8000) == 10
    assert ict_levels(config, 1000, 8000) == 20
    assert ict_levels(config, 7999, 8000) == 1280


def test_ict_draws_neighbouring_levels():
    plan = Ict.plan(IctConfig(batch_size=4096), seed=0, images_seen=0, iterations=100)
    grid = karras_grid(10)
    index = np.searchsorted(grid, plan.r)
    np.testing.assert_array_equal(grid[index], plan.r)
    np.testing.assert_array_equal(grid[index + 1], plan.t)
    cdf = stats.norm(-1.1, 2.0).cdf(np.log(grid))
    expected = np.diff(cdf) / (cdf[-1] - cdf[0])
    np.testing.assert_allclose(np.bincount(index, minlength=10) / 4096, expected, atol=0.03)
    assert (plan.source == STUDENT).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_plan_depends_on_seed_and_images_alone(name):
    kind, config = OBJECTIVES[name], dataclasses.replace(Config().phase(name), batch_size=64)
    if name == "cmt":  # with all points there is none to draw
        config = dataclasses.replace(config, points=4)

    def plan(seed, images):
        return kind.plan(config, seed=seed, images_seen=images, iteration=3, iterations=10).t

    np.testing.assert_array_equal(plan(1, 640), plan(1, 640))
    assert (plan(1, 640) != plan(1, 704)).any()
    assert (plan(1, 640) != plan(2, 640)).any()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 32),
    st.sampled_from([0, 30_000, 10**6]),
    st.sampled_from(["ect", "tcm"]),
)
def test_parts_cover_the_batch_with_balanced_work(parts, size, iteration, phase):
    config = dataclasses.replace(Config().phase(phase), batch_size=parts * max(size, 4))
    plan = OBJECTIVES[phase].plan(config, seed=0, images_seen=0, iteration=iteration)
    cut = plan.parts(parts)
    assert sorted(np.concatenate(cut)) == list(range(config.batch_size))
    for kind in (STUDENT, STAGE1, IMAGE):
        counts = [(plan.source[part] == kind).sum() for part in cut]
        assert max(counts) - min(counts) <= 1
    assert all((np.diff(plan.source[part]) >= 0).all() for part in cut)


def test_a_batch_that_cannot_be_cut_is_refused():
    plan = Ect.plan(EctConfig(batch_size=10), seed=0, images_seen=0)
    with pytest.raises(ValueError, match="divisible by ranks x micro-batches = 4, got 10"):
        plan.parts(4)


@pytest.mark.parametrize("size", [4, 7, 64, 1023])
def test_the_boundary_quota_is_global_and_exact(size):
    plan = Tcm.plan(TcmConfig(batch_size=size), seed=3, images_seen=size, iteration=10**6)
    assert plan.boundary.sum() == size // 4
    assert (plan.t[plan.boundary] == 1.0).all()
    assert (plan.source[plan.boundary] == STAGE1).all()
    assert plan.share[plan.boundary].sum() == pytest.approx(1)
    assert plan.share[~plan.boundary].sum() == pytest.approx(1)
    assert (plan.t >= 1.0).all()
    np.testing.assert_array_equal(plan.source == STAGE1, plan.r < 1.0)


def test_a_batch_without_a_boundary_sample_is_refused():
    with pytest.raises(ValueError, match="at least one boundary sample"):
        Tcm.plan(TcmConfig(batch_size=3), seed=0, images_seen=0)


@pytest.mark.parametrize(("max_ratio", "share"), [(0.999, 0.270), (0.9961, 0.323)])
def test_share_of_targets_that_need_stage_1(max_ratio, share):
    config = TcmConfig(batch_size=100_000, max_ratio=max_ratio)
    plan = Tcm.plan(config, seed=0, images_seen=0, iteration=10**6)
    assert (plan.source == STAGE1).mean() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(("iteration", "share"), [(0, 0.81), (25_000, 0.58)])
def test_share_of_stage_1_targets_that_are_images(iteration, share):
    plan = Ect.plan(EctConfig(batch_size=100_000), seed=0, images_seen=0, iteration=iteration)
    assert (plan.source == IMAGE).mean() == pytest.approx(share, abs=0.01)


def test_the_original_ect_is_an_option():
    config = EctConfig(batch_size=50_000, truncate=False)
    plan = Ect.plan(config, seed=0, images_seen=0)
    assert (plan.r[plan.source == IMAGE] == 0).all()
    assert plan.t.max() > 80


def test_a_plan_is_cheap():
    """Arrays at a time: as many calls for 1,024 samples as for 64, 0.15 ms where it was measured."""
    assert calls_of_a_plan(1024) == calls_of_a_plan(64) < 200


def calls_of_a_plan(size):
    """Functions called, Python's and C's."""
    config, calls = TcmConfig(batch_size=size), Counter()
    Tcm.plan(config, seed=0, images_seen=0)  # the table
    sys.setprofile(lambda frame, event, _: calls.update([event]))
    try:
        Tcm.plan(config, seed=0, images_seen=1)
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"]


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TcmConfig().boundary_fraction = 0.5
