"""Averages made after training: their profiles, from simulated and from real runs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcm_fast.checkpoint.format import load_network
from tcm_fast.checkpoint.posthoc_ema import (
    combination,
    find_snapshots,
    gamma_of_width,
    reconstruct,
    save_snapshot,
)
from tcm_fast.cli.main import main
from tcm_fast.config import Config, from_dict
from tcm_fast.networks import build_network
from tcm_fast.optim.ema import EmaRule
from tcm_fast.training.trainer import Trainer

GAMMAS = (16.97, 6.94)  # widths 0.05 and 0.10


@given(st.floats(0.01, 0.288))
def test_gamma_has_the_width(width):
    gamma = gamma_of_width(width)
    assert gamma > -0.01
    got = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
    assert got == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.3, math.nan])
def test_widths_that_no_average_has_are_refused(width):
    with pytest.raises(ValueError, match=r"ema: width must be in \(0, 0.289\], got"):
        gamma_of_width(width)


def test_published_gammas():
    assert gamma_of_width(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of_width(0.10) == pytest.approx(6.94, abs=0.01)


def averages_of_a_walk(gammas, steps, every, start=0):
    """A random walk's averages at every `every` steps: (iterations, gammas, values)."""
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.standard_normal((steps + 1, 50)), 0)
    averages = {gamma: values[0].copy() for gamma in gammas}
    kept = []
    for i in range(1, steps + 1):
        for gamma, average in averages.items():
            beta = EmaRule("power", gamma).beta(start + i, 0, 0)
            average *= beta
            average += (1 - beta) * values[i]
        if i % every == 0:
            kept += [(start + i, gamma, averages[gamma].copy()) for gamma in gammas]
    return kept


@pytest.mark.parametrize("width", [0.05, 0.07, 0.10, 0.15, 0.2])
@pytest.mark.parametrize("start", [0, 3000])
def test_the_combination_is_the_average_that_was_not_tracked(width, start):
    """Also where the averages began with the weights of an earlier phase."""
    gamma = gamma_of_width(width)
    kept = averages_of_a_walk(GAMMAS, 4000, 250, start)
    wanted = averages_of_a_walk([gamma], 4000, 4000, start)[-1][2]
    iterations, gammas, values = zip(*kept, strict=True)
    shares, error = combination(list(iterations), list(gammas), start + 4000, gamma)
    got = sum(share * value for share, value in zip(shares, values, strict=True))
    spread = np.abs(wanted - kept[-1][2]).mean() + np.abs(wanted).mean()
    # Of a wide average a good part lies before the first snapshot there is.
    hard = start > 0 and width >= 0.2
    assert np.abs(got - wanted).mean() < (0.1 if hard else 0.02) * spread
    assert error < (0.15 if hard else 0.05)
    assert shares.sum() == pytest.approx(1)


def test_a_profile_that_was_kept_is_itself():
    kept = averages_of_a_walk(GAMMAS, 2000, 500)
    iterations, gammas, _ = zip(*kept, strict=True)
    shares, error = combination(list(iterations), list(gammas), 2000, GAMMAS[1])
    np.testing.assert_allclose(shares, [0] * 7 + [1], atol=1e-6)
    assert error < 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with snapshots of two averages, one of them kept to compare with."""
    folder = tmp_path_factory.mktemp("snapshots")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (40, 8, 8, 1), np.uint8))
    phase = {"batch_size": 8, "images": 8 * 24, "lr": 1e-3}
    phase["ema"] = ["power:6.94", "constant:0.9", "power:16.97", "power:10.0"]
    values = {
        "data": {"source": str(folder / "images.npz")},
        "network": {
            "model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
        },
        "phases": ["edm", "ect"], "edm": phase, "ect": phase | {"images": 8 * 10},
        "snapshot_every": 4,
    }  # fmt: skip
    Trainer(from_dict(Config, values), folder / "run").run()
    return folder / "run"


def test_a_run_leaves_snapshots(run):
    found = find_snapshots(run)
    assert {s.gamma for s in found} == {6.94, 16.97, 10.0}
    assert sorted({s.iterations for s in found if s.phase == "edm"}) == [4, 8, 12, 16, 20, 24]
    assert sorted({s.iterations for s in found if s.phase == "ect"}) == [4, 8, 10]
    kept = load_network(run / "snapshots" / "edm-000000192-ema-0.safetensors")
    assert kept.info["gamma"] == 6.94
    assert next(kept.parameters()).dtype == torch.float32


def test_a_width_that_was_tracked_comes_back(run, capsys):
    """Through the command and the file that it writes."""
    width = math.sqrt(11) / (12 * math.sqrt(13))  # gamma 10
    with pytest.raises(SystemExit) as stop:
        main(["ema", str(run), "--width", str(width), "--phase", "edm"])
    assert stop.value.code == 0
    assert "its profile is off by" in capsys.readouterr().out
    got = load_network(next(run.glob("ema-edm-*.safetensors")))
    assert got.info["gamma"] == pytest.approx(10)
    assert got.info["images"] == 192
    wanted = load_network(run / "snapshots" / "edm-000000192-ema-3.safetensors")
    for a, b in zip(got.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)
    with pytest.raises(SystemExit) as stop:
        main(["ema", str(run), "--width", str(width), "--phase", "edm"])
    assert stop.value.code == 2
    assert "is there already; add --overwrite" in capsys.readouterr().err


def test_an_earlier_stand(run):
    net, error = reconstruct(run, 0.1, phase="ect", images=64)
    assert (net.info["images"], net.info["iterations"]) == (64, 8)
    assert error < 0.01


def test_what_there_are_no_snapshots_for(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ema: no snapshots in .* train with --snapshot"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(ValueError, match=r"ema: --phase must say which, got none .*ect, edm"):
        reconstruct(run, 0.1)
    with pytest.raises(ValueError, match="ema: phase must be one of ect, edm, got tcm"):
        reconstruct(run, 0.1, phase="tcm")
    with pytest.raises(ValueError, match="ema: images must be one of 32, 64, 80, where"):
        reconstruct(run, 0.1, phase="ect", images=65)


def test_snapshots_need_an_average_that_can_be_combined(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (40, 8, 8, 1), np.uint8))
    values = {"data": {"source": str(tmp_path / "images.npz")}, "snapshot_every": 2}
    with pytest.raises(ValueError, match=r"snapshot_every: edm.ema must have a power:GAMMA"):
        Trainer(from_dict(Config, {**values, "edm": {"ema": ["constant:0.9"]}}), tmp_path / "run")
    with pytest.raises(ValueError, match="snapshot_every: must not be negative, got -1"):
        from_dict(Config, {"snapshot_every": -1})


def test_what_a_killed_process_left_goes_with_the_next_snapshot(tmp_path):
    """Ours, and those that safetensors writes to."""
    net = build_network("ddpmpp", img_resolution=4, img_channels=1, model_channels=8, channel_mult=[1],
                        num_blocks=1, attn_resolutions=[])  # fmt: skip
    net.info = {"phase": "ect", "images": 160, "iterations": 10}
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for name in (".tmpNW0XRv", ".tmp-12-ect-000000160-ema-0.safetensors"):
        (folder / name).write_bytes(b"half")
    made = save_snapshot(tmp_path, net, net.state_dict(), 0, 16.97)
    assert list(folder.iterdir()) == [made]
