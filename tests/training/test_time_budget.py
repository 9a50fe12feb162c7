"""A recipe within so many hours."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import WorkClock

from tcm_fast.checkpoint.format import load_checkpoint
from tcm_fast.checkpoint.run_folder import newest_checkpoint
from tcm_fast.config import Config, from_dict, load_config, load_preset
from tcm_fast.objectives.noise_levels import IMAGE
from tcm_fast.planning.cards import CARDS, Card
from tcm_fast.planning.memory_estimate import ImageShape
from tcm_fast.training import time_budget, trainer
from tcm_fast.training.step_runner import StepRunner

SHAPE = ImageShape(32, 3, 10, 50_000)


@pytest.mark.parametrize("name", ["rtx4090", pytest.param("h200", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "hours",
    [1 / 6, 8, pytest.param(1, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.slow)],
)
def test_the_schedule_fills_the_hours(hours, name):
    plan = time_budget.fit_time_budget(load_preset("cifar10"), SHAPE, CARDS[name], hours, auto=True)
    assert 0.9 * hours * 3600 <= plan.seconds <= hours * 3600
    assert plan.peak <= CARDS[name].usable


def test_tf32_where_it_is_faster_and_pairs_are_far_apart():
    config = load_preset("cifar10")
    found = {
        name: time_budget.fit_time_budget(config, SHAPE, CARDS[name], 0.5).config
        for name in ("h200", "rtx4090")
    }
    assert found["h200"].precision == "tf32"
    assert found["h200"].ect.max_ratio <= 0.996
    assert found["rtx4090"].precision == "fp32"  # as fast there, by its data sheet
    given = time_budget.fit_time_budget(config, SHAPE, CARDS["h200"], 0.5, precision="fp32")
    assert given.config.precision == "fp32"


def test_more_time_is_a_longer_schedule_on_a_network_as_wide():
    plans = [
        time_budget.fit_time_budget(load_preset("cifar10"), SHAPE, CARDS["h200"], hours)
        for hours in (1 / 6, 1, 8)
    ]
    images = [sum(p.images for p in plan.phases) for plan in plans]
    widths = [plan.config.network.model_channels for plan in plans]
    limits = [plan.config.ect.max_ratio for plan in plans]
    for values in (images, widths, limits):
        assert values == sorted(values)


def test_more_hours_than_the_recipe_takes_leave_it_alone():
    config = load_preset("cifar10")
    plan = time_budget.fit_time_budget(config, SHAPE, CARDS["h200"], 10_000)
    assert plan.config.ect == config.ect


@pytest.mark.parametrize(
    ("hours", "message"),
    [
        (0, "time_budget: must be positive, got 0"),
        (-1, "time_budget: must be positive, got -1"),
        (1e-3, "time_budget: 0.001 h fit .* steps of phase .*, at least 100 are needed: "),
    ],
)
def test_too_little_time(hours, message):
    with pytest.raises(ValueError, match=message):
        time_budget.fit_time_budget(load_preset("cifar10"), SHAPE, CARDS["rtx3060"], hours)


def test_samples_are_judged_within_a_share_of_the_time():
    """As many as three hundredths of it hold; none, and a sentence, where that is too few."""
    config = load_preset("digits")
    rates = {"edm": 1000.0, "ect": 500.0, "tcm": 500.0}
    each = 35 / 3000 + 2 * 3 / 1500
    judged, said = time_budget.evaluate_within(config, rates, 3600.0)
    assert judged.eval.num == int(0.03 * 3600 / each)
    assert said == f"eval: {judged.eval.num:,} samples at each phase's end"
    fewer = replace(config, eval=replace(config.eval, num=300))
    assert time_budget.evaluate_within(fewer, rates, 3600.0)[0].eval.num == 300
    none, said = time_budget.evaluate_within(config, rates, 60.0)
    assert none.eval.features == ""
    assert "tcm-fast eval measures them afterwards" in said
    silent = replace(config, eval=replace(config.eval, features=""))
    assert time_budget.evaluate_within(silent, rates, 60.0) == (silent, "")


@pytest.fixture
def recipe(tmp_path):
    """A small network for 8x8 images, with a recipe much longer than the time there is."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (64, 8, 8, 1), np.uint8))
    phase = {"batch_size": 64, "images": 10_000_000, "ema": ["power:6.94"], "dropout": 0.0}
    pairs = phase | {"stage_iterations": 1000, "max_ratio": 0.99}
    network = {
        "model_channels": 32,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [4],
    }
    return from_dict(
        Config,
        {
            "network": network, "data": {"source": str(tmp_path / "images.npz")}, "edm": phase,
            "ect": pairs, "tcm": pairs, "device": "cpu", "eval": {"features": "random"},
            "phases": ["edm", "ect", "tcm"],
        },
    )  # fmt: skip


@pytest.mark.parametrize("slower", [1.0, 1.3], ids=["as measured", "stage 1 slower than measured"])
def test_a_run_ends_when_it_was_asked_to(slower, recipe, tmp_path, monkeypatch):
    """Within a tenth, by a clock: steps that do nothing take half a second for 64 images of pre-training
    and what their network passes are worth for those of the other phases."""
    clock = WorkClock()
    for module in (time_budget, trainer):
        monkeypatch.setattr(module, "time", clock)

    def run(runner, phase, loader):
        cost = 0.5 * phase.config.batch_size / 64
        if phase.name != "edm":
            plan, _ = loader.plan(phase, phase.step)
            cost *= (3 + (plan.source != IMAGE).mean()) / 4
        is_measuring = runner.log._path.parent != tmp_path / "run"
        clock.now += cost if is_measuring or phase.name != "ect" else slower * cost
        phase.metrics.steps += 1

    monkeypatch.setattr(StepRunner, "run", run)
    torch.manual_seed(0)
    said = []
    minutes = 5.0
    shape = ImageShape(8, 1, 0, 64)
    card = Card("CPU", 2**33, 1e11, 1e11, 1e11, 1e10, on_gpu=False)
    results = time_budget.train_within(
        recipe, tmp_path / "run", minutes / 60, shape, card, say=said.append
    )
    assert [r.phase for r in results] == ["edm", "ect", "tcm"]
    taken = float(said[-1].split()[0])
    assert taken == pytest.approx(minutes, rel=0.1)
    done = load_config(tmp_path / "run" / "config.json")
    assert done.ect.max_ratio == done.tcm.max_ratio
    assert done.ect.stage_iterations == done.tcm.stage_iterations
    state = load_checkpoint(newest_checkpoint(tmp_path / "run")).state
    assert state["images"] == done.tcm.images
