"""The README's quick start, whole: three phases on the built-in digits, and what comes out of them."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import tcm_fast
from tcm_fast.checkpoint.format import load_checkpoint, load_network
from tcm_fast.checkpoint.run_folder import newest_checkpoint
from tcm_fast.data.dataset import load_images
from tcm_fast.evaluation.features import digits_feature_space
from tcm_fast.evaluation.metrics import evaluate_network, kernel_distance


@pytest.mark.slow
def test_the_quick_start_makes_digits(tmp_path):
    out = tmp_path / "digits"
    command = [sys.executable, "-m", "tcm_fast", "train", "--preset", "digits", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]

    assert load_checkpoint(newest_checkpoint(out)).state["phase"] == "tcm"
    for phase in ("edm", "ect", "tcm"):
        grid = Image.open(out / "grids" / f"{phase}-000128000.png")
        assert min(grid.size) > 300
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").open()]
    assert "collapse" not in events
    assert events.count("eval") == 3

    data, space, net = load_images("digits:train"), digits_feature_space(), load_network(out)
    one = evaluate_network(net, data, space, steps=1)
    assert one.confident >= 0.9 * one.confident_real
    assert one.confident_noise <= 0.1
    assert one.copied == 0
    assert one.memorised <= 0.03  # 0.01 is what chance gives
    assert one.frechet < 1.5

    test = load_images("digits:test")
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    filled = tcm_fast.edit(net, test.images, "inpaint", mask=mask, labels=test.labels.tolist())
    assert (filled[:, :, :4].numpy() == test.images[:, :, :4]).all()
    edge = test.images[
        :, :, [0, 1, 2, 3, 3, 3, 3, 3]
    ]  # the known half and copies of its last column
    real = space.features(test.images)
    by_network, by_copying = (kernel_distance(space.features(x), real) for x in (filled, edge))
    assert by_network < by_copying / 10
    for line in ("Fréchet", "real data", f"tcm-fast sample {out}", f"tcm-fast eval {out}"):
        assert line in done.stdout
