"""The study of editing: its picture, its table, and what it compares with."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tcm_fast.benchmarks import editing_study
from tcm_fast.checkpoint.format import save_network
from tcm_fast.networks import build_network


def test_masks_and_copies():
    assert editing_study.half(4).sum() == 8
    middle = editing_study.centre(8)
    assert middle.sum() == 16
    assert middle[2:6, 2:6].all()
    images = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4, 1)
    copied = editing_study.nearest_known(images, editing_study.half(4))
    assert copied[0, :, :, 0].tolist() == [[i, i + 1, i + 1, i + 1] for i in (0, 4, 8, 12)]


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_and_table(channels, tmp_path, monkeypatch, capsys, seed):
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=channels, label_dim=4, model_channels=16,
        channel_mult=[1], num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    save_network(tmp_path / "net.safetensors", net, metadata={"phase": "ect"})
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, channels), np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(20) % 4)
    out = tmp_path / "editing.png"
    options = ["--data", str(tmp_path / "images.npz"), "--num", "6", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["editing_study", str(tmp_path / "net.safetensors"), *options])
    monkeypatch.setattr(editing_study, "STEPS", (1, 2))
    editing_study.main()
    rows = 18 if channels == 3 else 14
    assert Image.open(out).height == rows // 2 * (editing_study.HEIGHT + 2)
    written = out.with_suffix(".md").read_text()
    assert written == capsys.readouterr().out
    for by in ("nearest known pixels", "network, 1 call |", "network, 2 calls |", "bicubic"):
        assert by in written
    assert ("| colorize |" in written) == (channels == 3)
