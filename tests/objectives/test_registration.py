"""An objective, a weighting and a noise distribution of one's own: a class, two functions, three lines."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from tiny_runs import PHASE, TINY, events, train, weights, write_images

from tcm_fast.checkpoint.format import load_network
from tcm_fast.checkpoint.run_folder import newest_checkpoint, read_state
from tcm_fast.config import T_MAX, T_MIN, Config, ConsistencyConfig, from_dict
from tcm_fast.kernels.consistency_loss import WEIGHTINGS
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.consistency import Consistency
from tcm_fast.objectives.noise_levels import DISTRIBUTIONS, STAGE1
from tcm_fast.planning.memory_estimate import ImageShape, memory
from tcm_fast.sampling.sampler import sample


@dataclass(frozen=True)
class ToyConfig(ConsistencyConfig):
    """What the toy needs to know."""

    gap: float = 0.5
    """1 - r/t of every pair."""


@dataclass(frozen=True)
class ToyRun(Config):
    """A run with a section for it."""

    toy: ToyConfig = field(default_factory=ToyConfig)


class Toy(Consistency[ToyConfig]):
    """Pairs with one ratio, whose targets a frozen network in train mode computes."""

    name = "toy"
    frozen_file = "elder"
    frozen_trains = True
    needs = "an elder: train edm first"
    time_share = 1.0

    @classmethod
    def distribution(cls, config):
        return "log_uniform"

    @classmethod
    def complete(cls, plan, config, rng, iteration, iterations):
        r = plan.t * (1 - config.gap)
        source = np.full(len(r), STAGE1, np.int8)
        return replace(plan, r=r, delta=plan.t - r, source=source)

    def report(self, losses, iteration):
        return super().report(losses, iteration) | {"gap": self.config.gap}


def log_uniform(u, config, iteration, iterations):
    return T_MIN * (T_MAX / T_MIN) ** u


def inv_t(t, r, delta, sigma_data):
    return 1 / t


@pytest.fixture
def toy(monkeypatch):
    """The configuration of a run, with the toy's names registered."""
    monkeypatch.setitem(OBJECTIVES, "toy", Toy)
    monkeypatch.setitem(DISTRIBUTIONS, "log_uniform", log_uniform)
    monkeypatch.setitem(WEIGHTINGS, "inv_t", inv_t)
    own = PHASE | {"images": 16 * 4, "ema": tuple(PHASE["ema"])}
    run = from_dict(ToyRun, TINY | {"edm": PHASE | {"images": 16 * 2}, "grid_every": 100})
    return replace(
        run, toy=ToyConfig(**own, huber_c=0.06, weighting="inv_t"), phases=("edm", "toy")
    )


def test_it_is_planned_by_its_functions(toy):
    plan = Toy.plan(toy.toy, seed=1, images_seen=0)
    assert plan.t.min() >= 0.002
    assert plan.t.max() <= 80
    np.testing.assert_array_equal(plan.r, plan.t / 2)
    np.testing.assert_array_equal(plan.weighting, 1 / plan.t.astype(np.float32))
    batch = make_batch(plan, plan.parts(2)[1], torch.zeros(8, 1, 8, 8).byte(), None, seed=0, step=0)
    np.testing.assert_array_equal(batch.weighting.numpy(), plan.weighting[1::2])
    assert batch.at(batch.packed, batch.images, None).weighting.tolist() == batch.weighting.tolist()


def test_it_is_trained_resumed_and_sampled(toy, tmp_path):
    config = replace(toy, data=replace(toy.data, source=str(write_images(tmp_path))))
    with pytest.raises(ValueError, match="phase toy: needs an elder: train edm first, or give one"):
        train(replace(config, phases=("toy",)), tmp_path / "alone")
    train(config, tmp_path / "run")
    newest = newest_checkpoint(tmp_path / "run")
    assert (newest / "elder.safetensors").is_file()
    state = read_state(newest)
    assert (state["phase"], state["config"]["toy"]["gap"]) == ("toy", 0.5)
    lines = [e for e in events(tmp_path / "run") if e.get("phase") == "toy" and "loss" in e]
    assert {line["gap"] for line in lines} == {0.5}
    train(replace(config, max_steps=2), tmp_path / "again")
    train(config, tmp_path / "again", resume=True)
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(weights(tmp_path / "again")[name], value)
    images = sample(load_network(tmp_path / "run"), 2, steps=2)
    assert images.shape == (2, 8, 8, 1)


def test_its_memory_is_counted(toy):
    shape = ImageShape(8, 1)
    held = memory(toy, "toy", shape, on_gpu=False)
    assert held.frozen == memory(toy, "tcm", shape, on_gpu=False).frozen > 0
