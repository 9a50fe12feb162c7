"""The recipes that come with the library, and the small EDM2 through all its phases."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tcm_fast.checkpoint.format import load_checkpoint, load_network
from tcm_fast.checkpoint.run_folder import newest_checkpoint
from tcm_fast.cli.main import main
from tcm_fast.config import load_preset, preset_names
from tcm_fast.data.dataset import load_images
from tcm_fast.kernels._backend import extension
from tcm_fast.networks import build_network
from tcm_fast.optim.schedules import learning_rate
from tcm_fast.sampling.sampler import sample
from tcm_fast.training import phase_builder, sample_monitor
from tcm_fast.training.trainer import Trainer, TrainingError

SIZES = {  # width, pre-training lr, stage 1, stage 2, dropout, millions of parameters
    "s": (192, 0.010, 1e-3, 5e-4, 0.4, 280.2),
    "m": (256, 0.009, 1e-3, 5e-4, 0.4, 497.8),
    "l": (320, 0.008, 1e-3, 5e-4, 0.4, 777.5),
    "xl": (384, 0.007, 7e-4, 1e-4, 0.5, 1119.3),
}


@pytest.mark.parametrize("size", SIZES)
def test_imagenet64_recipes(size):
    width, pretraining, stage1, stage2, dropout, millions = SIZES[size]
    config = load_preset(f"imagenet64-{size}")
    assert config.phases == ("edm", "ect", "tcm")
    assert config.precision == "fp16"
    assert config.data.resolution == 64
    assert config.network.class_conditional
    assert config.network.model_channels == width
    assert config.network.dropout_resolutions == (16, 8)
    edm, ect, tcm = config.edm, config.ect, config.tcm
    assert (edm.lr, ect.lr, tcm.lr) == (pretraining, stage1, stage2)
    assert (edm.dropout, ect.dropout, tcm.dropout) == (0, dropout, dropout)
    assert {p.optimizer for p in (edm, ect, tcm)} == {"adam"}
    assert {p.betas for p in (edm, ect, tcm)} == {(0.9, 0.99)}
    assert (edm.batch_size, ect.batch_size, tcm.batch_size) == (2048, 2048, 1024)
    assert edm.images == 1_024_000_000
    assert (ect.images // 2048, tcm.images // 1024) == (150_000, 400_000)
    assert (edm.t_mean, edm.t_std, edm.learned_variance) == (-0.8, 1.6, True)
    assert (ect.t_mean, ect.t_std) == (-0.8, 1.6)
    assert edm.ema == ("power:16.97", "power:6.94")
    assert ect.ema == tcm.ema == ("power:16.97",)
    for stage in (ect, tcm):
        assert (stage.q, stage.stage_iterations, stage.max_ratio, stage.huber_c) == (
            4,
            10_000,
            0.9961,
            0.06,
        )
        assert stage.weighting == "inv_cout_sq"
    assert (
        tcm.t_prime,
        tcm.boundary_fraction,
        tcm.boundary_weight,
        tcm.student_t_df,
        tcm.t_std,
    ) == (
        1,
        0.25,
        0.1,
        0.01,
        0.2,
    )
    assert learning_rate(edm, 5_000_000, 1) == pytest.approx(pretraining / 2)
    assert learning_rate(edm, 10**9, 140_000) == pytest.approx(pretraining / 2)
    assert learning_rate(ect, 10**9, 8_000) == pytest.approx(stage1 / 2)
    assert learning_rate(tcm, 10**9, 32_000) == pytest.approx(stage2 / 2)
    with torch.device("meta"):
        net = build_network(f"imagenet64-{size}", img_resolution=64, img_channels=3, label_dim=1000)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_its_network(name):
    config = load_preset(name)
    resolution = config.data.resolution or {"digits": 8}.get(name, 32)
    with torch.device("meta"):
        net = build_network(name, img_resolution=resolution, img_channels=3, label_dim=2)
    assert sum(p.numel() for p in net.parameters()) > 10_000


# ---- the small EDM2 -----------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small_grids():
    """Sample grids of six images: drawing them takes longer than the steps between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_monitor, "GRID", 6)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Digits of three classes as colour images of 20x24, which the preset cuts and resizes to 16x16."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load_images("digits:train")
    for digit in range(3):
        (folder / str(digit)).mkdir()
        for i, index in enumerate(np.flatnonzero(digits.labels == digit)[:24]):
            picture = Image.fromarray(digits.images[index, ..., 0]).resize((24, 20))
            picture.convert("RGB").save(folder / str(digit) / f"{i}.png")
    return folder


def tiny(pictures, **changes):
    """The preset for a few steps."""
    config = load_preset("cifar10-tiny")
    data = dataclasses.replace(config.data, source=str(pictures))
    phases = {
        name: dataclasses.replace(getattr(config, name), batch_size=16, warmup_images=32)
        for name in config.phases
    }
    return dataclasses.replace(
        config, **{"data": data, "max_steps": 4, "log_every": 2, **phases, **changes}
    )


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    results = Trainer(tiny(pictures), out).run()
    return out, results


def test_the_tiny_preset_has_a_few_hundred_thousand_parameters():
    with torch.device("meta"):
        net = build_network("cifar10-tiny", img_resolution=16, img_channels=3, label_dim=10)
    assert 2e5 < sum(p.numel() for p in net.parameters()) < 8e5


def test_it_trains_through_all_phases(trained):
    out, results = trained
    assert [(r.phase, r.images) for r in results] == [("edm", 64), ("ect", 64), ("tcm", 64)]
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if e["event"] == "train"]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    edm = load_network(out / "checkpoints" / "edm-000000064")
    assert edm.spec["logvar_channels"] == 128
    assert edm.state_dict()["logvar_linear.weight"].any()
    tcm = load_network(out)
    assert not [name for name in tcm.state_dict() if "logvar" in name]  # pre-training's alone
    state = load_checkpoint(newest_checkpoint(out)).network_tensors("model")
    rms = state["model.enc.16x16_block0.conv_res0.weight"].square().flatten(1).mean(1).sqrt()
    assert (rms - 1).abs().max() < 0.2  # forced before the last step


def test_it_samples_by_class(trained, tmp_path):
    net = load_network(trained[0])
    images = sample(net, 6, labels=[2, 0], seed=1)
    assert images.shape == (6, 16, 16, 3)
    one_class = sample(net, 6, labels=2, seed=1)
    assert torch.equal(images[::2], one_class[::2])
    assert not torch.equal(images[1::2], one_class[1::2])
    two_steps = sample(net, 2, steps=2, labels=1)
    assert two_steps.shape == (2, 16, 16, 3)


def test_classes_on_the_command_line(trained, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["sample", str(trained[0]), *arguments])
        return ended.value.code

    grid = tmp_path / "grid.png"
    assert run("--num", "6", "--classes", "2", "0", "--out", str(grid)) == 0
    width, height = Image.open(grid).size
    assert (width, height) == (
        2 * 66 + 2,
        3 * 66 + 2,
    )  # a column for each class, 64 pixels and a gap
    assert "columns: 2, 0" in capsys.readouterr().out  # the classes' names
    assert run("--num", "4", "--classes", "2", "0", "--start", "1", "--out", str(grid)) == 2
    again = run(
        "--num", "4", "--classes", "2", "0", "--start", "1", "--out", str(grid), "--overwrite"
    )
    assert again == 0
    assert "columns: 0, 2" in capsys.readouterr().out
    folder = tmp_path / "all.npz"
    assert run("--num", "4", "--classes", "1", "2", "--out", str(folder)) == 0
    assert np.load(folder)["labels"].tolist() == [1, 2, 1, 2]
    assert run("--num", "4", "--classes", "3", "--out", str(tmp_path / "x.png")) == 2
    assert "labels: must lie in [0, 3), got 3" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_train(pictures, tmp_path, precision):
    config = tiny(pictures, precision=precision, phases=("edm",))
    results = Trainer(config, tmp_path / "run").run()
    assert results[0].images == 64
    assert all(p.isfinite().all() for p in load_network(tmp_path / "run").parameters())


def test_a_resumed_run_repeats_an_unbroken_one(pictures, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Trainer(tiny(pictures, phases=("edm",)), whole).run()
    half = dataclasses.replace(tiny(pictures, phases=("edm",)), max_steps=2)
    Trainer(half, broken).run()
    Trainer(tiny(pictures, phases=("edm",)), broken, resume=True).run()
    for file in ("model", "ema-0"):
        a, b = (
            load_checkpoint(newest_checkpoint(run)).network_tensors(file) for run in (whole, broken)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(extension() is None, reason="counts its skipped steps in tcm_fast._C")
def test_overflow_in_fp16_lowers_the_loss_scale_and_skips_the_step(pictures, tmp_path, monkeypatch):
    """A loss scale above what fp16 holds: it backs off step by step, the steps are counted, and the
    weights stay finite."""
    monkeypatch.setattr(phase_builder, "LOSS_SCALE", 2.0**20)
    config = dataclasses.replace(
        tiny(pictures, precision="fp16", phases=("edm",)), max_steps=20, log_every=10
    )
    Trainer(config, tmp_path / "run").run()
    checkpoint = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    events = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    skipped = sum(e.get("skipped", 0) for e in events if e["event"] == "train")
    assert 0 < skipped < 20
    assert checkpoint.state["scaler"]["scale"] == 2.0 ** (20 - skipped)  # halved in each
    assert all(v.isfinite().all() for v in checkpoint.network_tensors("model").values())


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("network", {"attn_resolutions": (32,)}, r"attn_resolutions: .* 16, 8, got 32"),
        ("network", {"dropout_resolutions": (4,)}, r"dropout_resolutions: .* 16, 8, got 4"),
        (
            "network",
            {"channel_mult": (1, 1, 1, 1, 1, 1)},
            "img_resolution: must be divisible by 32",
        ),
        ("network", {"channels_per_head": 7}, "channels_per_head: must divide .* got 7"),
        ("edm", {"augment": 0.12}, "edm.augment: needs network.augment_dim 9 .* got 0"),
        ("network", {"augment_dim": 9}, "augment_dim: unknown"),
    ],
)
def test_mistakes_end_before_anything_is_written(pictures, tmp_path, section, changes, message):
    config = tiny(pictures)
    changed = dataclasses.replace(getattr(config, section), **changes)
    config = dataclasses.replace(config, **{section: changed})
    with pytest.raises(ValueError, match=message):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_that_are_not_there(tmp_path, pictures):
    flat = tmp_path / "flat"
    flat.mkdir()
    for picture in (pictures / "0").glob("*.png"):
        (flat / picture.name).write_bytes(picture.read_bytes())
    with pytest.raises(ValueError, match=r"network.class_conditional: needs labels"):
        Trainer(tiny(flat), tmp_path / "run")


def test_a_run_that_cannot_go_on_says_so(pictures, tmp_path, monkeypatch):
    config = tiny(pictures, phases=("edm",))
    config = dataclasses.replace(config, edm=dataclasses.replace(config.edm, lr=1e30), max_steps=20)
    with pytest.raises(TrainingError, match="not finite"):
        Trainer(config, tmp_path / "run").run()
