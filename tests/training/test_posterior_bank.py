"""Runs with target = posterior: the bank of each step, micro-batches, ranks, resuming, captured steps."""

import os
import signal
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from replays import OnHost
from tiny_runs import assert_equal, run_ranks, tiny, train, weights, write_images

from tcm_fast.data.dataset import load_images
from tcm_fast.objectives import OBJECTIVES
from tcm_fast.runtime.cuda_graphs import GraphCache
from tcm_fast.training import batch_loader, phase_builder
from tcm_fast.training.batch_loader import BatchLoader
from tcm_fast.training.sample_monitor import SampleMonitor
from tcm_fast.training.step_runner import StepRunner
from tcm_fast.training.trainer import Interrupted, Trainer

PHASE = {"batch_size": 16, "images": 16 * 4, "dropout": 0.2, "lr": 1e-3, "ema": ["power:6.94"]}
PHASE |= {"stage_iterations": 4, "max_ratio": 0.9, "huber_c": 0.06}
POSTERIOR = PHASE | {"target": "posterior", "bank_size": 12}


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(SampleMonitor, "draw", lambda *_: None)  # would take most of the time
    return write_images(tmp_path)


def posterior(images, **changes):
    changes = {"ect": POSTERIOR, "tcm": POSTERIOR, "phases": ["ect", "tcm"]} | changes
    return tiny(images, **{"network": {"class_conditional": True}} | changes)


def loader_of(images, *, micro=1, rank=0, ranks=1, bank_size=12, **changes):
    """The loader of a rank, and a phase to load for."""
    config = posterior(images, ect=POSTERIOR | {"bank_size": bank_size}, **changes)
    workers = SimpleNamespace(rank=rank, world=ranks, device=torch.device("cpu"))
    cut = SimpleNamespace(of=lambda _: micro)
    phase = SimpleNamespace(
        name="ect", config=config.ect, seed=5, steps=9, first_iteration=0, inner=OBJECTIVES["ect"],
        student=SimpleNamespace(sigma_data=0.5),
    )  # fmt: skip
    return BatchLoader(config, load_images(images), workers, cut, 5, Counter()), phase


def banks(images, steps, *, ranks=1, **options):
    """The banks of some steps, of every micro-batch of every rank."""
    found = []
    for rank in range(ranks):
        loader, phase = loader_of(images, rank=rank, ranks=ranks, **options)
        found += [(b.bank, b.bank_classes) for step in steps for b in loader.load(phase, step)]
    return found


def test_a_bank_depends_on_the_step_alone(images):
    ((bank, classes),) = banks(images, [3])
    assert bank.shape == (12, 1, 8, 8)
    cut = banks(images, [3], micro=2, ranks=2)
    assert len(cut) == 4
    for images_, classes_ in cut:
        assert torch.equal(images_, bank)
        assert torch.equal(classes_, classes)
    data = load_images(images)
    places = {image.tobytes(): n for n, image in enumerate(data.images)}
    index = [places[image.permute(1, 2, 0).contiguous().numpy().tobytes()] for image in bank]
    assert len({*index}) == 12
    assert data.labels[index].tolist() == classes.tolist()
    ((other, _),) = banks(images, [4])
    assert not torch.equal(other, bank)
    ((unlabelled, none),) = banks(images, [3], network={"class_conditional": False})
    assert torch.equal(unlabelled, bank)
    assert none is None


def test_the_banks_of_an_epoch_are_the_set_and_a_large_one_is_the_whole(images):
    data = load_images(images)

    def rows(found):
        return sorted(image.numpy().tobytes() for image in torch.cat([bank for bank, _ in found]))

    everything = sorted(image.transpose(2, 0, 1).tobytes() for image in data.images)
    assert rows(banks(images, range(4), bank_size=10)) == everything
    for step in (0, 3):
        assert rows(banks(images, [step], bank_size=1000)) == everything
    flipped = banks(images, [0], bank_size=40, data={"source": str(images), "flip": True})
    assert rows(flipped) != everything


def test_a_set_that_is_not_resident_has_the_same_banks_read_ahead(images):
    expected = banks(images, [0, 1])
    loader, phase = loader_of(images)
    loader.stream.resident, loader.stream._reader = False, ThreadPoolExecutor(1)
    for step in (0, 1):
        (batch,) = loader.load(phase, step)
        assert torch.equal(batch.bank, expected[step][0])
        assert len(loader.stream._ahead) == 2  # the next step's batch and its bank


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(images, tmp_path, monkeypatch):
    config = posterior(images)
    train(config, tmp_path / "whole")
    step = StepRunner.step

    def stopping(self, phase, batches):
        if (phase.name, phase.step) == ("tcm", 2):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, phase, batches)

    with monkeypatch.context() as patch:
        patch.setattr(StepRunner, "step", stopping)
        with pytest.raises(Interrupted, match="tcm: stopped after"):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    for file in ("model", "ema-0", "stage1"):
        assert_equal(weights(tmp_path / "whole", file), weights(tmp_path / "cut", file))


def test_it_trains_otherwise_than_with_the_image(images, tmp_path):
    train(posterior(images, phases=["ect"], max_steps=2), tmp_path / "posterior")
    train(posterior(images, phases=["ect"], max_steps=2, ect=PHASE), tmp_path / "image")
    other = weights(tmp_path / "image")
    assert any(not torch.equal(v, other[k]) for k, v in weights(tmp_path / "posterior").items())


def test_replayed_steps_are_the_steps(images, tmp_path, monkeypatch):
    """Every step from a captured place in memory: its bank, too."""
    config = posterior(images)
    train(config, tmp_path / "eager")
    place, build = OnHost(), phase_builder.build_optimizer
    monkeypatch.setattr(
        phase_builder, "build_optimizer", lambda *a, capturable, **rest: build(*a, **rest)
    )
    monkeypatch.setattr(phase_builder.PhaseBuilder, "captures", lambda self: True)
    monkeypatch.setattr(phase_builder.PhaseBuilder, "graphs", lambda *_: GraphCache(place))
    monkeypatch.setattr(batch_loader, "row_multiple_for", lambda *_: 8)
    train(config, tmp_path / "replayed")
    assert place.replays >= 4
    eager, replayed = weights(tmp_path / "eager"), weights(tmp_path / "replayed")
    for name, value in eager.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-5, atol=1e-6)


def test_a_small_bank_for_many_classes_is_said_once(images, tmp_path):
    def begin(name, size, **changes):
        config = posterior(images, ect=POSTERIOR | {"bank_size": size}, **changes)
        Trainer(config, tmp_path / name).checkpoints.close()

    said = r"ect\.bank_size: 2 images have none of the class of 4[45]% of the samples, whose x_r"
    with pytest.warns(UserWarning, match=said):
        begin("few", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin("all", 40)
        begin("plain", 2, network={"class_conditional": False})


@pytest.mark.slow
def test_ranks_and_micro_batches_do_not_change_the_run(images, tmp_path):
    settings = {"grid_every": 1000, "device": "cpu", "save_every": 100, "log_every": 1}
    train(posterior(images, **settings), tmp_path / "one")
    run_ranks(2, posterior(images, micro_batches=2, **settings), tmp_path / "two")
    for file in ("model", "ema-0"):
        one, two = (weights(tmp_path / name, file) for name in ("one", "two"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert np.isfinite([v.abs().max().item() for v in one.values()]).all()
