"""`tcm-fast features`: a network from images, a run with it, mistakes."""

import pytest
from tiny_runs import events, write_images

from tcm_fast.cli.main import main


def run(*argv):
    with pytest.raises(SystemExit) as end:
        main([*map(str, argv)])
    return end.value.code or 0


def test_a_network_and_a_run_with_it(tmp_path, capsys):
    images, file = write_images(tmp_path), tmp_path / "features.safetensors"
    short = ("--images", 640, "--batch-size", 64, "--width", 2, "--device", "cpu")
    command = ["features", "train", "--data", images, "--out", file, *short]
    assert run(*command) == 0
    shown = capsys.readouterr().out
    assert f"{file}: 8x8x1, width 2, trained on 640 distorted images of images.npz, seed 0" in shown
    assert "pixelate" in shown
    assert "hue" not in shown  # grey images
    assert "of 13 have an R² above 0.5" in shown
    assert run("features", "info", file) == 0
    assert capsys.readouterr().out == shown
    assert run(*command) == 2
    assert f"out: {file} exists, give --overwrite or another --out" in capsys.readouterr().err
    assert run(*command, "--overwrite", "--seed", 1) == 0
    own = ("--ect.distance", "manifold", "--ect.features", file, "--ect.batch-size", 8)
    network = [
        ("model-channels", 16),
        ("channel-mult", 1),
        ("num-blocks", 1),
        ("attn-resolutions", 8),
    ]
    own += tuple(word for name, value in network for word in (f"--network.{name}", value))
    out = ("--out", tmp_path / "run", "--device", "cpu", "--log-every", 1)
    command = ["train", "--data", images, "--phases", "ect", "--max-steps", 2, *own, *out]
    assert run(*command) == 0
    assert sum("loss" in line for line in events(tmp_path / "run")) == 2


def test_mistakes(tmp_path, capsys):
    images, file = write_images(tmp_path), tmp_path / "features.safetensors"
    for argv, message in [
        (
            ("features", "train", "--data", images, "--out", tmp_path / "f.pt"),
            "out: must end in .safe",
        ),
        (("features", "train", "--data", tmp_path / "no", "--out", file), "no does not exist"),
        (("features", "info", file), f"features: no such file: {file}"),
        (("features", "info", images), f"features: {images} is truncated, damaged or not a safet"),
        (("train", "--data", images, "--ect.distance", "manifold"), "ect.features: the manifold"),
        (("train", "--data", images, "--ect.features", file), "ect.features: only the manifold"),
    ]:
        assert run(*argv) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not file.exists()
