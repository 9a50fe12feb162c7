"""NaN and Inf, and running out of memory: noticed, named in the log, undone."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    assert_equal,
    assert_same_run,
    change_losses,
    events,
    tiny,
    train,
    weights,
    write_images,
)

from tcm_fast.checkpoint.format import load_checkpoint
from tcm_fast.checkpoint.run_folder import newest_checkpoint
from tcm_fast.config import GuardConfig
from tcm_fast.data.stream import ImageStream
from tcm_fast.kernels._backend import extension
from tcm_fast.training import phase_builder
from tcm_fast.training import trainer as trainer_module
from tcm_fast.training.phase import Phase, TrainingError
from tcm_fast.training.sample_monitor import SampleMonitor
from tcm_fast.training.step_runner import StepRunner


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They would take most of the time."""
    monkeypatch.setattr(SampleMonitor, "draw", lambda *_: None)


@pytest.fixture(params=["fused", "torch"])
def optimizer(request, monkeypatch):
    """Either optimizer: the extension's, or torch's."""
    if request.param == "fused" and extension() is None:
        pytest.skip("needs the extension: not built")
    if request.param == "torch":
        for module in (trainer_module, phase_builder):
            monkeypatch.setattr(module, "extension_gap", lambda device: "not here")
        monkeypatch.setattr("tcm_fast.optim.extension_for", lambda name, device: None)
    return request.param


def spoil_gradient(monkeypatch, steps, phase="edm", value=np.nan):
    """Gradients of these steps get a value that is not finite."""
    take = Phase.take_step

    def spoilt(self):
        if self.name == phase and self.step in steps:
            next(self.student.parameters()).grad.view(-1)[0] = value
        return take(self)

    monkeypatch.setattr(Phase, "take_step", spoilt)


def logged(out, event):
    return [e for e in events(out) if e["event"] == event]


def test_a_gradient_that_is_not_finite_skips_the_step(optimizer, images, tmp_path, monkeypatch):
    """The step changes nothing: neither weights nor moments nor averages; it is counted and logged."""
    config = tiny(images, phases=["edm"], save_every=1, keep_checkpoints=9)
    spoil_gradient(monkeypatch, {2}, value=np.inf)
    train(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    before, at, after = (load_checkpoint(folder / f"edm-{16 * n:09d}") for n in (2, 4, 5))
    assert not (folder / f"edm-{16 * 3:09d}").exists()  # not amid bad numbers
    for file in ("model", "ema-0"):
        tensors = [c.network_tensors(file) for c in (before, at, after)]
        assert any(not torch.equal(tensors[1][k], tensors[2][k]) for k in tensors[0])
    steps = torch.stack(list(moments(at, "step").values()))
    assert (steps == 3).all()
    (event,) = logged(tmp_path / "run", "bad_numbers")
    assert event["steps"] == [2]
    assert "skipped 1 of 1 steps" in event["message"]
    assert "images 32 to 48: finite when run again" in event["message"]
    lines = {e["images"]: e for e in logged(tmp_path / "run", "train")}
    assert (lines[64]["skipped"], lines[64]["skipped_total"]) == (1, 1)
    assert "skipped" not in lines[96]
    assert np.isfinite([line["loss"] for line in lines.values()]).all()
    assert all(line["grad_norm_max"] >= line["grad_norm"] > 0 for line in lines.values())
    assert load_checkpoint(newest_checkpoint(tmp_path / "run")).state["skips"] == 1


def moments(saved, key):
    tensors = load_file(saved.path / "optimizer.safetensors")
    return {name: value for name, value in tensors.items() if name.endswith(f"/{key}")}


def test_a_skipped_step_leaves_all_bits(optimizer, images, tmp_path, monkeypatch):
    config = tiny(images, phases=["edm"], max_steps=3)
    short = dataclasses.replace(config, max_steps=2)
    train(short, tmp_path / "two")
    spoil_gradient(monkeypatch, {2})
    train(config, tmp_path / "three")
    assert_same_run(tmp_path / "two", tmp_path / "three", ("model", "ema-0", "optimizer"))


def test_an_image_that_is_not_finite_is_named(images, tmp_path, monkeypatch):
    batch = ImageStream.batch

    def spoilt(self, positions):
        pictures, labels = batch(self, positions)
        if 37 in positions:
            pictures = pictures.float() / 127.5 - 1
            pictures[list(positions).index(37)] = np.nan
        return pictures, labels

    monkeypatch.setattr(ImageStream, "batch", spoilt)
    train(tiny(images, phases=["edm", "ect"]), tmp_path / "run")
    found = logged(tmp_path / "run", "bad_numbers")
    assert [e["steps"] for e in found] == [[2], [2]]
    for event in found:
        assert "images are not finite, sample 5 at t = " in event["message"]
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values())


def test_a_module_that_overflows_is_named(images, tmp_path, monkeypatch):
    """Its path, its type, the samples and their noise levels."""
    name = "dec.8x8_block0.conv1"

    def spoilt(self, batch, losses):
        module = self.student.model.get_submodule(name)
        forward = module.forward

        def overflowing(x, **rest):
            y = forward(x, **rest)
            return torch.where(torch.arange(len(x)).reshape(-1, 1, 1, 1) == 3, torch.inf, y)

        if int(batch.key.step) == 1:
            module.forward = overflowing
        try:
            return losses()
        finally:
            module.__dict__.pop("forward", None)

    change_losses(spoilt, monkeypatch.setattr)
    train(tiny(images, phases=["edm"]), tmp_path / "run")
    (event,) = logged(tmp_path / "run", "bad_numbers")
    assert (
        f"first in the forward pass: model.{name} of the student (Conv2d), sample "
        in (event["message"])
    )
    assert "at t = " in event["message"]


def test_a_loss_that_is_not_finite_skips_the_step_even_with_a_finite_gradient(
    images, tmp_path, monkeypatch
):
    def spoilt(self, batch, losses):
        values = losses()
        if int(batch.key.step) == 1:
            values = values + torch.full_like(values, np.inf).detach()
        return values

    change_losses(spoilt, monkeypatch.setattr)
    train(tiny(images, phases=["edm"]), tmp_path / "run")
    (event,) = logged(tmp_path / "run", "bad_numbers")
    assert event["steps"] == [1]
    assert "the loss itself, sample" in event["message"]


def test_a_weight_that_is_not_finite_is_undone(images, tmp_path, monkeypatch):
    """A bit that flips in memory: the run goes back to the last good checkpoint and to its end."""
    config = tiny(
        images, phases=["edm"], edm={"images": 16 * 20}, guard={"bad_steps": 4, "rollbacks": 1}
    )
    step = StepRunner.step
    hits = []

    def hit(self, phase, batches):
        if phase.step == 7 and not hits:
            hits.append(1)
            with torch.no_grad():
                list(phase.student.parameters())[5].view(-1)[0] = np.nan
        step(self, phase, batches)

    monkeypatch.setattr(StepRunner, "step", hit)
    train(config, tmp_path / "run")
    (bad,) = logged(tmp_path / "run", "bad_numbers")
    assert "weights of the student are not finite: model." in bad["message"]
    (back,) = logged(tmp_path / "run", "roll_back")
    assert back["images"] == 96
    assert "going on from image 96 with the learning rate at 0.5 of its schedule" in back["message"]
    state = load_checkpoint(newest_checkpoint(tmp_path / "run")).state
    assert (state["images"], state["rollbacks"], state["rate_factor"]) == (320, 1, 0.5)
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run", "ema-0").values())
    rates = {e["images"]: e["lr"] for e in logged(tmp_path / "run", "train")}
    assert rates[320] == pytest.approx(rates[32] / 2)


def test_the_loss_scale_can_be_lowered_instead(images, tmp_path, monkeypatch):
    config = tiny(
        images, phases=["edm"], edm={"images": 16 * 12}, precision="fp16",
        guard={"bad_steps": 2, "lower": "scale"},
    )  # fmt: skip
    steps = {4, 5}
    take = Phase.take_step

    def spoilt(self):
        if self.step in steps and not self.rollbacks:
            next(self.student.parameters()).grad.fill_(np.inf)
        return take(self)

    monkeypatch.setattr(Phase, "take_step", spoilt)
    train(config, tmp_path / "run")
    (back,) = logged(tmp_path / "run", "roll_back")
    assert "from image 48 with the loss scale at 8 " in back["message"]
    state = load_checkpoint(newest_checkpoint(tmp_path / "run")).state
    assert state["scaler"]["scale"] == 8


def test_a_resumed_run_knows_of_its_roll_backs(images, tmp_path, monkeypatch):
    config = tiny(
        images, phases=["edm"], edm={"images": 16 * 12}, guard={"bad_steps": 2, "rollbacks": 1}
    )
    with monkeypatch.context() as patch:
        spoil_gradient(patch, {6, 7})
        with pytest.raises(TrainingError, match="after 1 roll-backs; go on from"):
            train(config, tmp_path / "run")
    state = load_checkpoint(newest_checkpoint(tmp_path / "run")).state
    assert (state["rollbacks"], state["rate_factor"], state["images"]) == (1, 0.5, 96)
    train(config, tmp_path / "run", resume=True)
    state = load_checkpoint(newest_checkpoint(tmp_path / "run")).state
    assert (state["rollbacks"], state["images"]) == (1, 192)


def test_a_bad_streak_before_the_first_checkpoint_begins_the_phase_again(
    images, tmp_path, monkeypatch
):
    config = tiny(images, phases=["edm", "ect"], guard={"bad_steps": 2})
    take, spoilt_steps = Phase.take_step, []

    def spoilt(self):
        if self.name == "ect" and self.step < 2 and not self.rollbacks:
            spoilt_steps.append(self.step)
            next(self.student.parameters()).grad.fill_(np.nan)
        return take(self)

    monkeypatch.setattr(Phase, "take_step", spoilt)
    train(config, tmp_path / "run")
    assert spoilt_steps == [0, 1]
    (back,) = logged(tmp_path / "run", "roll_back")
    assert back["images"] == 0
    edm, ect = (weights_of(tmp_path / "run", name) for name in ("edm-000000096", "ect-000000000"))
    assert_equal(edm.network_tensors("ema-0"), ect.network_tensors("model"))


def weights_of(out, name):
    return load_checkpoint(out / "checkpoints" / name)


def test_spikes_of_the_gradient_are_reported(images, tmp_path, monkeypatch):
    config = tiny(images, phases=["edm"], edm={"images": 16 * 30}, save_every=30)
    take = Phase.take_step

    def spiky(self):
        if self.step == 26:
            for parameter in self.student.parameters():
                parameter.grad.mul_(1000)
        return take(self)

    monkeypatch.setattr(Phase, "take_step", spiky)
    train(config, tmp_path / "run")
    (event,) = logged(tmp_path / "run", "spike")
    assert event["steps"] == [26]
    assert "at image 416, usually" in event["message"]
    assert "--edm.grad-clip" in event["message"]
    line = next(e for e in logged(tmp_path / "run", "train") if e["images"] == 16 * 28)
    assert line["grad_norm_max"] == pytest.approx(event["norm"])


def test_guard_settings_are_checked():
    for field, value in {"bad_steps": 0, "rollbacks": -1}.items():
        with pytest.raises(ValueError, match=rf"guard.{field}: .* got"):
            GuardConfig(**{field: value})


# ---- memory -------------------------------------------------------------------------------------


@pytest.fixture
def small_memory(monkeypatch):
    """Memory in which 4 images can be differentiated at a time. Counts the attempts that failed."""
    failures = []

    def limited(self, batch, losses):
        if len(batch.t) > 4 and torch.is_grad_enabled():
            failures.append(len(batch.t))
            losses().sum().backward()  # gradients of a failed attempt lie about
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return losses()

    change_losses(limited, monkeypatch.setattr)
    return failures


def test_out_of_memory_halves_the_micro_batch(images, tmp_path, small_memory, monkeypatch, capsys):
    """With the bits of a run that was told so from the start; learnt once, in the run and beyond."""
    config = tiny(images, phases=["edm", "ect"])
    train(config, tmp_path / "run")
    assert small_memory == [16, 8]
    found = logged(tmp_path / "run", "out_of_memory")
    assert [e["micro_batches"] for e in found] == [2, 4]
    assert "4 from here on, with the same result" in capsys.readouterr().err
    assert not logged(tmp_path / "run", "bad_numbers")
    told = dataclasses.replace(config, micro_batches=4)
    train(told, tmp_path / "told")
    assert_same_run(tmp_path / "run", tmp_path / "told", ("model", "ema-0", "optimizer"))
    train(dataclasses.replace(config, phases=("tcm",)), tmp_path / "run", resume=True)
    assert small_memory == [16, 8]
    assert "memory: 4 micro-batches, as this run has found out" in capsys.readouterr().err


def test_memory_for_not_even_one_image_is_an_error(images, tmp_path, monkeypatch):
    def never(self, batch, losses):
        raise torch.OutOfMemoryError("injected")

    change_losses(never, monkeypatch.setattr)
    with pytest.raises(TrainingError, match="out of memory with a single image"):
        train(tiny(images, phases=["edm"]), tmp_path / "run")


def test_an_optimizer_that_runs_out_of_memory_half_way_ends_the_run(images, tmp_path, monkeypatch):
    """torch's may have changed some of the weights, so no smaller micro-batch repeats the step."""
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")

    def short(self):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.optim.Adam, "step", short)
    message = (
        r"edm: out of memory in the optimizer's step, .*: go on with --resume auto and more --mi"
    )
    with pytest.raises(TrainingError, match=message):
        train(tiny(images, phases=["edm"]), tmp_path / "run")
