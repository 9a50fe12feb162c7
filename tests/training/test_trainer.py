"""The loop: phases in turn, equal runs for equal seeds, interruption, accumulation, bad numbers."""

import dataclasses
import errno
import gc
import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from replays import OnHost
from tiny_runs import (
    WorkClock,
    assert_equal,
    assert_same_run,
    change_losses,
    events,
    tiny,
    train,
    weights,
    write_images,
)

from tcm_fast.checkpoint import async_writer
from tcm_fast.checkpoint.format import load_checkpoint, load_network
from tcm_fast.checkpoint.run_folder import find_checkpoints, newest_checkpoint
from tcm_fast.config import Config, from_dict, load_config
from tcm_fast.data.dataset import load_images
from tcm_fast.data.stream import ImageStream
from tcm_fast.evaluation import metrics
from tcm_fast.kernels._backend import extension, fast_layout
from tcm_fast.optim import fused
from tcm_fast.runtime.cuda_graphs import CaptureError, GraphCache
from tcm_fast.sampling.sampler import sample
from tcm_fast.training import batch_loader, logger, phase_builder, sample_monitor, step_runner
from tcm_fast.training import trainer as trainer_module
from tcm_fast.training.phase import TrainingError
from tcm_fast.training.sample_monitor import SampleMonitor
from tcm_fast.training.step_reports import StepReports
from tcm_fast.training.step_runner import StepRunner
from tcm_fast.training.summary import summary
from tcm_fast.training.trainer import Interrupted, Trainer


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
    """They would take most of the time."""
    monkeypatch.setattr(SampleMonitor, "draw", lambda *_: None)


def test_three_phases_leave_everything_behind(images, tmp_path):
    out = tmp_path / "run"
    config = tiny(images)
    results = train(config, out)
    assert [(r.phase, r.images) for r in results] == [("edm", 96), ("ect", 96), ("tcm", 96)]
    assert load_config(out / "config.json") == config
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = {e["phase"]: e["loss"] for e in events if e["event"] == "train"}
    assert losses.keys() == {"edm", "ect", "tcm"}
    assert np.isfinite(list(losses.values())).all()
    last = [e for e in events if e["event"] == "train"][-1]
    assert last["loss"] == pytest.approx(last["consistency"] + 0.1 * last["boundary"])
    assert last["ratio"] == 0.875  # iterations count on: stage 2 of the schedule, not 1
    grids = sorted(p.name for p in (out / "grids").glob("*.png"))
    assert grids == [f"{p}-{n:09d}.png" for p in ("ect", "edm", "tcm") for n in (64, 96)]
    assert all(found.ok for found in find_checkpoints(out))


def test_each_phase_starts_from_the_previous_average(images, tmp_path):
    out = tmp_path / "run"
    train(tiny(images, keep_checkpoints=9), out)
    folder = out / "checkpoints"
    ect, tcm = (load_checkpoint(folder / f"{name}-000000096") for name in ("ect", "tcm"))
    assert_equal(tcm.network_tensors("stage1"), ect.network_tensors("ema-0"))
    assert (ect.state["iterations"], tcm.state["iterations"]) == (6, 12)
    assert tcm.state["t_prime"] == 1.0
    start = tmp_path / "start"
    config = tiny(images, phases=["ect"], ect={"lr": 1e-12})
    train(config, start, init=folder / "edm-000000096")
    edm = load_checkpoint(folder / "edm-000000096").network_tensors("ema-0")
    for name, value in weights(start).items():
        torch.testing.assert_close(value, edm[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("phase", ["ict", "cd"])
def test_the_baselines_train(phase, images, tmp_path):
    train(tiny(images, phases=["edm", phase]), tmp_path / "run")
    info = load_network(tmp_path / "run").info
    assert (info["phase"], info["images"]) == (phase, 96)


def test_networks_train_in_the_layout_that_is_fast(images, tmp_path, no_pictures, monkeypatch):
    layouts = []

    def noted(self, batch, losses):
        layouts.extend(net.model.memory_format for net in (self.student, self.frozen) if net)
        return losses()

    change_losses(noted, monkeypatch.setattr)
    for backend in ("", "reference"):
        monkeypatch.setenv("TCM_FAST_BACKEND", backend)
        train(tiny(images, phases=["edm", "cd"], max_steps=1), tmp_path / f"run{backend}")
        assert layouts == [fast_layout(torch.device("cpu"))] * 3
        layouts.clear()


def test_a_loop_of_ones_own(images, tmp_path, monkeypatch):
    """Takes the steps that `run` takes."""
    config = tiny(images, phases=["edm", "ect"], max_steps=4)
    train(config, tmp_path / "run")
    trainer, losses = Trainer(config, tmp_path / "own"), []
    with trainer.settings():
        phase = trainer.begin("edm")
        for name in config.phases:
            phase = phase if name == "edm" else trainer.begin(name, phase.ema_network())
            phase.metrics.size = 3
            for _ in range(3):
                trainer.step(phase)
            with pytest.raises(ValueError, match=r"step: phase.metrics must be read every 3 steps"):
                trainer.step(phase)
            losses.append(phase.metrics.read(trainer.workers.sum))
            trainer.step(phase)
            with pytest.raises(ValueError, match=f"step: {name} has 4 steps, all taken"):
                trainer.step(phase)
    trainer.checkpoints.close()
    assert [found.shape for found in losses] == [(3, 3)] * 2
    ours = dict(phase.student.named_parameters())
    for name, value in weights(tmp_path / "run").items():
        if name in ours:
            assert torch.equal(value, ours[name])


def test_the_same_seed_gives_the_same_weights(images, tmp_path):
    for name in ("a", "b"):
        train(tiny(images, max_steps=50, edm={"images": 800}, phases=["edm"]), tmp_path / name)
    train(tiny(images, seed=1, phases=["edm"]), tmp_path / "c")
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert load_network(tmp_path / "a").info["images"] == 800
    other = weights(tmp_path / "c")
    assert any(not torch.equal(v, other[k]) for k, v in weights(tmp_path / "a").items())


@pytest.mark.parametrize("stop_at", [("edm", 2), ("ect", 5), ("tcm", 1), ("tcm", 4)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(stop_at, images, tmp_path, monkeypatch):
    config = tiny(images)
    train(config, tmp_path / "whole")
    step = StepRunner.step

    def stopping(self, phase, batches):
        if (phase.name, phase.step) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, phase, batches)

    with monkeypatch.context() as patch:
        patch.setattr(StepRunner, "step", stopping)
        with pytest.raises(Interrupted, match=f"{stop_at[0]}: stopped after"):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    for file in ("model", "ema-0", "stage1"):
        assert_equal(weights(tmp_path / "whole", file), weights(tmp_path / "cut", file))


needs_extension = pytest.mark.skipif(extension() is None, reason="needs the extension: not built")


@needs_extension
def test_without_the_extension_torchs_optimizer_trains_alike(images, tmp_path, monkeypatch, capsys):
    """Clipping and averages included; it says so, and goes on from the other one's checkpoint."""
    phase = {"grad_clip": 0.5, "ema": ["constant:0.9", "power:6.94"]}
    config = tiny(images, phases=["edm"], edm=phase)
    train(config, tmp_path / "fused")
    assert "optimizer:" not in capsys.readouterr().err
    train(dataclasses.replace(config, max_steps=3), tmp_path / "both")
    for module in (trainer_module, phase_builder):
        monkeypatch.setattr(module, "extension_gap", lambda device: "not here")
    monkeypatch.setattr("tcm_fast.optim.extension_for", lambda name, device: None)
    train(config, tmp_path / "torch")
    train(config, tmp_path / "both", resume=True)
    assert "optimizer: torch's, in many passes" in capsys.readouterr().err
    for file in ("model", "ema-0", "ema-1"):
        fused = weights(tmp_path / "fused", file)
        for other in ("torch", "both"):
            for name, value in weights(tmp_path / other, file).items():
                torch.testing.assert_close(value, fused[name], rtol=1e-4, atol=1e-6)


@needs_extension
def test_gradients_that_never_are_finite_stop_the_run(images, tmp_path, monkeypatch):
    step = fused.FusedOptimizer.step

    def spoilt(self):
        self.param_groups[0]["params"][0].grad.fill_(np.inf)
        step(self)

    monkeypatch.setattr(fused.FusedOptimizer, "step", spoilt)
    with pytest.raises(
        TrainingError,
        match=r"edm: the last 6 steps, from image 0 on, were not finite .* after 3 roll-",
    ):
        train(tiny(images, phases=["edm"]), tmp_path / "run")


def test_phases_trained_singly_in_one_folder(images, tmp_path):
    """As if they had been one command."""
    train(tiny(images), tmp_path / "whole")
    for phase in ("edm", "ect", "tcm"):
        train(tiny(images, phases=[phase]), tmp_path / "single", resume=True)
    for file in ("model", "ema-0", "stage1"):
        assert_equal(weights(tmp_path / "whole", file), weights(tmp_path / "single", file))


def test_a_phase_does_not_begin_from_an_unfinished_one(images, tmp_path):
    train(tiny(images, phases=["edm"], max_steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match=r"edm in .* has 2 of 6 steps, finish it first"):
        train(tiny(images, phases=["ect"]), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "resume: seed must stay 0 .*, got 1"),
        ({"edm": {"batch_size": 8}}, "resume: batch_size must stay 16 .*, got 8"),
    ],
)
def test_what_orders_the_images_cannot_change_on_resuming(changes, message, images, tmp_path):
    train(tiny(images, phases=["edm"], max_steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train(tiny(images, phases=["edm"], **changes), tmp_path / "run", resume=True)


def test_resume_auto_begins_where_there_is_nothing(images, tmp_path):
    results = train(tiny(images, phases=["edm"]), tmp_path / "run", resume=True)
    assert results[0].images == 96


def test_a_finished_run_resumes_to_its_results(images, tmp_path):
    config = tiny(images)
    train(config, tmp_path / "run")
    before = weights(tmp_path / "run")
    results = train(config, tmp_path / "run", resume=True)
    assert [r.phase for r in results] == ["tcm"]
    assert_equal(before, weights(tmp_path / "run"))


@pytest.mark.parametrize("phase", ["edm", "ect", "tcm"])
def test_accumulation_divides_properly(phase, images, tmp_path):
    """Weights after a few steps do not depend on the number of micro-batches."""
    start = tmp_path / "start"
    train(tiny(images, phases=["edm", "ect"], max_steps=2), start)
    for micro in (1, 4):
        config = tiny(images, phases=[phase], max_steps=3, micro_batches=micro)
        train(config, tmp_path / str(micro), init=start)
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    difference = sum((one[k] - four[k]).square().sum() for k in one).sqrt()
    norm = sum(one[k].square().sum() for k in one).sqrt()
    assert difference / norm < 1e-5


def test_several_averages_are_kept(images, tmp_path):
    config = tiny(images, phases=["edm"], edm={"ema": ["power:6.94", "constant:0.5"]})
    train(config, tmp_path / "run")
    averages = [weights(tmp_path / "run", f"ema-{i}") for i in (0, 1)]
    assert any(not torch.equal(averages[0][k], averages[1][k]) for k in averages[0])


def test_class_labels_reach_the_network(images, tmp_path):
    config = tiny(images, network={"class_conditional": True}, max_steps=2)
    train(config, tmp_path / "run")
    net = load_network(tmp_path / "run")
    assert net.label_dim == 3
    assert net.info["class_names"]


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16", "bf16x3"])
def test_other_precisions_train(precision, images, tmp_path):
    results = train(tiny(images, precision=precision, max_steps=2), tmp_path / "run")
    assert len(results) == 3
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values())
    assert all(v.dtype == torch.float32 for v in weights(tmp_path / "run").values())


def capture_on_host(monkeypatch, **options):
    """Steps are captured as on a GPU, by a stand-in, which is returned."""
    place, build = OnHost(**options), phase_builder.build_optimizer

    def plain(parameters, config, *, capturable, **rest):
        return build(parameters, config, **rest)

    monkeypatch.setattr(phase_builder, "build_optimizer", plain)
    monkeypatch.setattr(phase_builder.PhaseBuilder, "captures", lambda self: True)
    monkeypatch.setattr(
        phase_builder.PhaseBuilder, "graphs", lambda self, optimizer: GraphCache(place)
    )
    monkeypatch.setattr(batch_loader, "row_multiple_for", lambda *_: 8)
    return place


def test_replayed_steps_are_the_steps(images, tmp_path, monkeypatch):
    """Every step of a run from a captured place in memory: its times, noise, images and labels."""
    config = tiny(images, network={"class_conditional": True}, data={"source": str(images)})
    train(config, tmp_path / "eager")
    place = capture_on_host(monkeypatch)
    train(config, tmp_path / "replayed")
    assert place.replays >= 9
    eager, replayed = weights(tmp_path / "eager"), weights(tmp_path / "replayed")
    for name, value in eager.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ([torch.OutOfMemoryError("full")] * 2, "out of memory where steps are captured"),
        ([CaptureError("not permitted")], "not permitted where steps are captured"),
    ],
)
def test_a_run_goes_on_without_graphs_where_a_capture_fails(
    failures, said, images, no_pictures, tmp_path, monkeypatch
):
    config = tiny(images, phases=["ect"])
    train(config, tmp_path / "eager")
    place = capture_on_host(monkeypatch, failures=failures)
    train(config, tmp_path / "run")
    (warning,) = [e for e in events(tmp_path / "run") if e["event"] == "no_graphs"]
    assert said in warning["message"]
    assert place.replays == 0
    assert_equal(weights(tmp_path / "eager"), weights(tmp_path / "run"))


def test_unused_memory_is_freed_before_graphs_are_given_up(
    images, no_pictures, tmp_path, monkeypatch
):
    config = tiny(images, phases=["ect"])
    train(config, tmp_path / "eager")
    place = capture_on_host(monkeypatch, failures=[torch.OutOfMemoryError("full")])
    train(config, tmp_path / "run")
    assert not [e for e in events(tmp_path / "run") if e["event"] == "no_graphs"]
    assert place.replays > 0
    eager, replayed = weights(tmp_path / "eager"), weights(tmp_path / "run")
    for name, value in eager.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-5, atol=1e-6)


def test_looking_for_bad_numbers_keeps_no_weights(images, no_pictures, tmp_path, monkeypatch):
    """A graph captured next would read those that were derived for it."""
    report, kept = StepReports._report_skipped, []

    def watched(self, phase, *args):
        report(self, phase, *args)
        kept.append(phase.inner._cast)

    def broken(self, batch, losses):
        values = losses()
        return values * torch.nan if int(batch.key.step) == 1 else values

    monkeypatch.setattr(StepReports, "_report_skipped", watched)
    change_losses(broken, monkeypatch.setattr)
    train(tiny(images, phases=["ect"], precision="bf16", max_steps=3), tmp_path / "run")
    assert kept == [None]


def test_a_capture_that_fails_ends_a_run_that_insists(images, no_pictures, tmp_path, monkeypatch):
    capture_on_host(monkeypatch, failures=[CaptureError("not permitted")])
    config = tiny(images, phases=["ect"], cuda_graph="on")
    with pytest.raises(
        TrainingError, match=r"not be captured .*\(not permitted\).*--cuda-graph auto"
    ):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_leaves_no_autograd_graph(precision, images, no_pictures, tmp_path, monkeypatch):
    """One that outlives its step holds memory, and ties the capture of the next step to another stream."""
    step, alive = StepRunner.step, []

    def counted(self, *args):
        step(self, *args)
        gc.collect()
        alive.extend(t for t in gc.get_objects() if type(t) is torch.Tensor and t.grad_fn)

    monkeypatch.setattr(StepRunner, "step", counted)
    train(tiny(images, phases=["edm", "ect"], precision=precision, max_steps=2), tmp_path / "run")
    assert not alive


def test_warming_up_leaves_weights_and_gradients_alone(images, no_pictures, tmp_path, monkeypatch):
    """Gradients that arrive at the weights are exchanged between ranks: nothing but a step may do that."""
    monkeypatch.setattr(step_runner, "runs_triton", lambda *_: True)
    monkeypatch.setattr(step_runner, "compiling_together", lambda: nullcontext([]))
    gradients, compile_kernels = [], StepRunner.compile_kernels

    def watched(self, phase, batches):
        for parameter in phase.student.parameters():
            parameter.register_post_accumulate_grad_hook(gradients.append)
        compile_kernels(self, phase, batches)
        assert not gradients
        assert phase.inner._cast is None
        raise InterruptedError

    monkeypatch.setattr(StepRunner, "compile_kernels", watched)
    with pytest.raises(InterruptedError):
        train(tiny(images, phases=["ect"], precision="bf16"), tmp_path / "run")


def test_a_graph_where_there_can_be_none_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="cuda_graph: a graph needs a GPU; use auto or off"):
        Trainer(tiny(images, cuda_graph="on"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_networks_train_alike(images, tmp_path):
    phases = ("edm", "ect", "tcm")
    train(tiny(images, phases=phases), tmp_path / "eager")
    torch.compiler.reset()  # other tests' sizes would make ours symbols, with which Inductor fails
    train(tiny(images, phases=phases, compile=True), tmp_path / "compiled")
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)


def test_numbers_that_are_not_finite_stop_the_run(images, tmp_path):
    config = tiny(images, phases=["edm"], edm={"lr": 1e30, "images": 320})
    with pytest.raises(
        TrainingError, match=r"edm: .* not finite .* after 3 roll-backs; go on .* --edm.lr"
    ):
        train(config, tmp_path / "run")


def test_collapse_is_noticed(images, tmp_path):
    run = Trainer(tiny(images), tmp_path / "run")
    phase = run.builder.begin("edm", None)
    data = metrics.spread(run.data.images)
    log = tmp_path / "run" / "log.jsonl"

    def warnings():
        return sum(json.loads(line)["event"] == "collapse" for line in log.open())

    for share in (0.1, 1.0, 0.5):  # samples differ little at first: that is no collapse
        run.samples.watch_spread(phase, share * data)
    assert warnings() == 0
    run.samples.watch_spread(phase, 0.2 * data)
    assert warnings() == 1
    run.samples.watch_spread(phase, 1.2 * data)
    assert warnings() == 2


@pytest.mark.slow
def test_without_the_boundary_loss_stage_2_collapses(tmp_path):
    """The paper's central claim at toy size: 4x4 digits, noise levels drawn well above t', so that
    nothing but the boundary loss ties the student to the data. Small steps (r/t = 0.97) and a high
    learning rate stand in for the length of a real run."""
    phase = {"batch_size": 64, "dropout": 0.0, "ema": ["power:6.94"], "images": 64 * 400}
    pairs = phase | {"huber_c": 0.03, "stage_iterations": 50, "max_ratio": 0.95, "lr": 1e-3}
    loose = {
        "t_mean": 2.0,
        "t_std": 1.0,
        "student_t_df": 100.0,
        "max_ratio": 0.97,
        "stage_iterations": 1,
        "lr": 3e-3,
    }
    values = {
        "data": {"source": "digits", "resolution": 4},
        "network": {
            "model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
        },
        "edm": phase | {"lr": 3e-3},
        "ect": pairs,
        "grid_every": 100,
    }  # fmt: skip
    config = from_dict(Config, values | {"phases": ["edm", "ect"]})
    train(config, tmp_path / "stage1")
    data = load_images("digits", resolution=4).images

    def error(out):
        """Mean difference of the average sample from the average image, in grey levels."""
        samples = sample(load_network(out), 512).numpy()
        return np.abs(samples.mean(0) - data.mean(0)).mean()

    errors, events = {}, {}
    for weight in (0.0, 0.1):
        stage2 = pairs | loose | {"images": 64 * 800, "boundary_weight": weight}
        out = tmp_path / str(weight)
        train(
            from_dict(Config, values | {"phases": ["tcm"], "tcm": stage2}),
            out,
            init=tmp_path / "stage1",
        )
        errors[weight] = error(out)
        events[weight] = [json.loads(line)["event"] for line in (out / "log.jsonl").open()]
    before = error(tmp_path / "stage1")
    assert errors[0.1] < 1.5 * before + 1
    assert errors[0.0] > 2.5 * errors[0.1]
    assert "collapse" in events[0.0]
    assert "collapse" not in events[0.1]


def test_the_summary_names_the_next_commands(images, tmp_path, capsys):
    run = Trainer(tiny(images, phases=["edm"]), tmp_path / "run")
    summary(run.out, run.run())
    shown = capsys.readouterr().out
    assert f"tcm-fast sample {tmp_path / 'run'}" in shown
    assert "96" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"micro_batches": 3},
            r"edm.batch_size: must be divisible by ranks x micro-batches = 1 x 3",
        ),
        ({"tcm": {"batch_size": 2}}, "at least one boundary sample"),
        ({"network": {"channel_mult": [1, 1, 1, 1, 1]}}, "resolution"),
        ({"network": {"name": "edm2"}}, "channels_per_head: must divide"),
        ({"device": "tpu"}, "device: must be cpu, cuda"),
        ({"data": {"source": "nowhere"}}, "nowhere does not exist"),
        ({"edm": {"ema": ["mean:1"]}}, "ema: must be"),
    ],
)
def test_mistakes_end_before_anything_is_written(changes, message, images, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Trainer(tiny(images, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_that_are_missing(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=r"network.class_conditional: needs labels"):
        Trainer(tiny(path, network={"class_conditional": True}), tmp_path / "run")


def test_a_folder_with_another_run_is_left_alone(images, tmp_path):
    config = tiny(images, phases=["edm"])
    train(config, tmp_path / "run")
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(
        FileExistsError, match="already holds a run; continue it with --resume auto"
    ):
        Trainer(config, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before


def test_stage_2_needs_stage_1(images, tmp_path):
    with pytest.raises(ValueError, match=r"needs a stage-1 network: train ect first.*--init"):
        train(tiny(images, phases=["tcm"]), tmp_path / "run")


def test_an_initial_network_of_another_shape_is_refused(images, tmp_path):
    train(tiny(images, phases=["edm"], max_steps=1), tmp_path / "small")
    config = tiny(images, phases=["ect"], network={"model_channels": 32})
    with pytest.raises(ValueError, match="init: the network does not fit phase ect"):
        train(config, tmp_path / "run", init=tmp_path / "small")


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(
    images, no_pictures, tmp_path, monkeypatch, capsys
):
    config = tiny(images, phases=["edm"], edm={"images": 16 * 12})
    train(config, tmp_path / "whole")
    write, calls = async_writer.write_checkpoint, []

    def failing(*args, **kwargs):
        calls.append(1)
        with monkeypatch.context() as patch:
            if len(calls) == 2:
                patch.setattr(os, "fsync", full)
            return write(*args, **kwargs)

    monkeypatch.setattr(async_writer, "write_checkpoint", failing)
    train(config, tmp_path / "run")
    assert "No space left on device; the previous one at" in capsys.readouterr().err
    assert "save_failed" in [event["event"] for event in events(tmp_path / "run")]
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("fails", ["in a row", "at the end"])
def test_a_disk_that_stays_full_ends_the_run(fails, images, no_pictures, tmp_path, monkeypatch):
    """The last good checkpoint is there, and the run goes on from it."""
    config = tiny(images, phases=["edm"], edm={"images": 16 * 18}, save_every=3)
    write, calls = async_writer.write_checkpoint, []

    def failing(*args, **kwargs):
        calls.append(1)
        with monkeypatch.context() as patch:
            if len(calls) > 2 if fails == "in a row" else len(calls) == 6:
                patch.setattr(os, "fsync", full)
            return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(async_writer, "write_checkpoint", failing)
        with pytest.raises(OSError, match=r"could not be saved.*No space left.*is intact"):
            train(config, tmp_path / "run")
    good = 96 if fails == "in a row" else 240
    assert load_checkpoint(newest_checkpoint(tmp_path / "run")).state["images"] == good
    assert train(config, tmp_path / "run", resume=True)[0].images == 288


def test_a_folder_that_is_read_only_for_a_while(images, no_pictures, tmp_path, monkeypatch, capsys):
    """Any write into the run fails: training goes on, and the last save is a good one."""
    config = tiny(images, phases=["edm"], edm={"images": 16 * 9})
    train(config, tmp_path / "whole")
    step, mkdir = StepRunner.step, Path.mkdir
    read_only = []

    def during(self, phase, batches):
        read_only[:] = [1] if 4 <= phase.step < 8 else []
        step(self, phase, batches)

    def refused(self, *args, **kwargs):
        if read_only and tmp_path / "run" in self.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(StepRunner, "step", during)
    monkeypatch.setattr(Path, "mkdir", refused)
    train(config, tmp_path / "run")
    said = capsys.readouterr().err
    assert "Read-only file system; the previous one at" in said
    assert "training goes on" in said
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_folder_that_vanishes_is_made_anew(images, no_pictures, tmp_path, monkeypatch):
    config = tiny(images, phases=["edm", "ect"], edm={"images": 16 * 9})
    train(config, tmp_path / "whole")
    step = Trainer.step

    def vanishing(self, phase):
        if (phase.name, phase.step) == ("edm", 4):
            self.checkpoints.check_last_save(wait=True)
            shutil.rmtree(tmp_path / "run")
        step(self, phase)

    monkeypatch.setattr(Trainer, "step", vanishing)
    train(config, tmp_path / "run")
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert load_config(tmp_path / "run" / "config.json") == config
    images_seen = [e["images"] for e in events(tmp_path / "run") if e["event"] == "train"]
    assert images_seen[-1] == 96
    assert images_seen[0] > 64  # what was logged before is gone


def test_images_that_vanish_do_not_stop_a_run(images, no_pictures, tmp_path, monkeypatch):
    """They are in memory; a run that is resumed without them says what is missing."""
    config = tiny(images, phases=["edm"])
    step = StepRunner.step

    def vanishing(self, phase, batches):
        images.unlink(missing_ok=True)
        step(self, phase, batches)

    monkeypatch.setattr(StepRunner, "step", vanishing)
    train(dataclasses.replace(config, max_steps=3), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"data: .*images.npz does not exist"):
        train(config, tmp_path / "run", resume=True)


def test_milestones_are_kept(images, no_pictures, tmp_path):
    config = tiny(
        images,
        phases=["edm"],
        save_every=1,
        keep_checkpoints=1,
        milestone_every=4,
        edm={"images": 16 * 10},
    )
    train(config, tmp_path / "run")
    found = [load_checkpoint(f.path).state for f in find_checkpoints(tmp_path / "run")]
    assert [state["images"] // 16 for state in found] == [4, 8, 9, 10]
    with pytest.raises(ValueError, match="best: frechet needs a feature space"):
        Trainer(tiny(images, keep_best="frechet"), tmp_path / "other")


def test_the_best_is_kept(images, no_pictures, tmp_path):
    changes = {
        "keep_best": "frechet",
        "eval": {"features": "random", "num": 64},
        "keep_checkpoints": 1,
    }
    train(tiny(images, phases=["edm"], save_every=2, **changes), tmp_path / "run")
    kept = {
        state["images"]: state["metrics"]["frechet"]
        for state in (load_checkpoint(f.path).state for f in find_checkpoints(tmp_path / "run"))
    }
    measured = {
        e["images"]: e["frechet"]["heun"] for e in events(tmp_path / "run") if e["event"] == "eval"
    }
    assert measured.keys() >= {32, 64, 96}
    best = min(measured, key=measured.__getitem__)
    assert kept[best] == measured[best] > 0


@pytest.mark.parametrize(
    ("precision", "backend"),
    [
        ("fp16", "fused"),
        pytest.param("fp16", "torch", marks=pytest.mark.slow),
        pytest.param("fp32", "fused", marks=pytest.mark.slow),
        pytest.param("fp32", "torch", marks=pytest.mark.slow),
    ],
)
def test_exact_resume_of_all_state(precision, backend, images, no_pictures, tmp_path, monkeypatch):
    """Both optimizers, short moments, loss scale, several averages, snapshots, labels, counters."""
    if backend == "fused" and extension() is None:
        pytest.skip("needs the extension: not built")
    if backend == "torch":
        for module in (trainer_module, phase_builder):
            monkeypatch.setattr(module, "extension_gap", lambda device: "not here")
        monkeypatch.setattr("tcm_fast.optim.extension_for", lambda name, device: None)
    short = {"fp16": "bf16", "fp32": "8bit"}[precision]
    moments = {"moments": short} if backend == "fused" else {}
    phase = {
        "ema": ["power:16.97", "halflife:1000", "power:6.94"], "grad_clip": 0.5, "decay_start": 2,
    }  # fmt: skip
    config = tiny(
        images, ect=phase, tcm=phase, phases=["ect", "tcm"], precision=precision,
        network={"class_conditional": True}, data={"source": str(images), "flip": True},
        snapshot_every=2, grid_every=1000, **moments,
    )  # fmt: skip
    train(config, tmp_path / "whole")
    for steps in (2, 4):
        train(
            dataclasses.replace(config, max_steps=steps, phases=("ect",)),
            tmp_path / "cut",
            resume=True,
        )
    train(dataclasses.replace(config, phases=("ect",)), tmp_path / "cut", resume=True)
    for steps in (2, 4, None):
        train(dataclasses.replace(config, max_steps=steps), tmp_path / "cut", resume=True)
    files = ("model", "ema-0", "ema-1", "ema-2", "stage1", "optimizer")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", files)
    states = [load_checkpoint(newest_checkpoint(tmp_path / n)).state for n in ("whole", "cut")]
    for key in (
        "step",
        "first_iteration",
        "skips",
        "scaler",
        "rate_factor",
        "images",
        "iterations",
    ):
        assert states[0][key] == states[1][key], key
    snapshots = [sorted((tmp_path / n / "snapshots").iterdir()) for n in ("whole", "cut")]
    assert [p.name for p in snapshots[0]] == [p.name for p in snapshots[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*snapshots, strict=True))


def test_deterministic_training(images, no_pictures, tmp_path, monkeypatch):
    config = tiny(images, deterministic=True)
    seen = []
    step = StepRunner.step
    monkeypatch.setattr(
        StepRunner,
        "step",
        lambda *a: (seen.append(torch.are_deterministic_algorithms_enabled()), step(*a)),
    )
    train(config, tmp_path / "run")
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()  # as the caller had it
    seen.clear()
    train(dataclasses.replace(config, deterministic=False), tmp_path / "plain")
    assert not any(seen)
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "plain"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exact_resume_on_a_gpu(precision, images, tmp_path):
    """With --deterministic; graphs included."""
    config = tiny(images, deterministic=True, device="cuda", precision=precision)
    train(config, tmp_path / "whole")
    train(dataclasses.replace(config, max_steps=3, phases=("edm",)), tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resuming_needs_no_more_memory_than_running(images, no_pictures, tmp_path, monkeypatch):
    """Networks that are alive when a phase is put together: those of the phase, and nothing else."""
    config = tiny(images, phases=["ect", "tcm"], max_steps=2)
    counts = []
    assemble = phase_builder.PhaseBuilder.assemble

    def counting(self, *args):
        phase = assemble(self, *args)
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter) and t.ndim and not t.is_meta
        }
        counts.append((phase.name, sum(storages.values())))
        return phase

    monkeypatch.setattr(phase_builder.PhaseBuilder, "assemble", counting)
    train(dataclasses.replace(config, phases=("ect",)), tmp_path / "run")
    train(dataclasses.replace(config, phases=("tcm",)), tmp_path / "run", resume=True)
    counts.clear()
    train(dataclasses.replace(config, max_steps=4), tmp_path / "run", resume=True)
    resumed = dict(counts)
    counts.clear()
    train(dataclasses.replace(config, max_steps=4), tmp_path / "whole")
    assert resumed["tcm"] <= dict(counts)["tcm"] + 4096


def test_the_share_of_time_that_images_take(images, no_pictures, tmp_path, monkeypatch):
    """By a clock on which fetching a batch takes 0.2 s and a step 0.3 s."""
    clock = WorkClock()
    for module in (trainer_module, logger):
        monkeypatch.setattr(module, "time", clock)
    batch, step = ImageStream.batch, StepRunner.step
    monkeypatch.setattr(ImageStream, "batch", clock.costs(lambda *_: 0.2, batch))
    monkeypatch.setattr(StepRunner, "step", clock.costs(lambda *_: 0.3, step))
    train(tiny(images, phases=["edm"]), tmp_path / "run")
    shares = [e["data_share"] for e in events(tmp_path / "run") if e["event"] == "train"]
    # The first batch is fetched before the first step, none is in the last.
    assert shares == pytest.approx([0.6 / 1.2, 0.4 / 1.0, 0.2 / 0.8])
    (spent,) = [e for e in events(tmp_path / "run") if e["event"] == "spent"]
    assert spent["data"] == pytest.approx(0.2 * 6)
    assert spent["training"] == pytest.approx(3.0)


def test_a_picture_that_memory_is_short_for_ends_no_run(images, tmp_path, monkeypatch):
    def short(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(sample_monitor, "sample", short)
    train(tiny(images, phases=["ect"]), tmp_path / "run")
    found = [e["message"] for e in events(tmp_path / "run") if e["event"] == "grid_failed"]
    assert set(found) == {"out of memory for a grid of samples; training goes on"}


def test_a_refused_resume_leaves_the_runs_settings(images, tmp_path):
    config = tiny(images, max_steps=2, phases=["edm"])
    train(config, tmp_path / "run")
    kept = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(ValueError, match="resume: seed must stay"):
        train(dataclasses.replace(config, seed=5), tmp_path / "run", resume=True)
    assert (tmp_path / "run/config.json").read_bytes() == kept
