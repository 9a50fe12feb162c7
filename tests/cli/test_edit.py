"""`tcm-fast edit`: files in, files out, and a sentence where something does not fit."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tcm_fast.checkpoint.format import collect, save_network, write_checkpoint
from tcm_fast.cli.main import main
from tcm_fast.networks import build_network
from tcm_fast.sampling.editing import edit

SMALL = {"model_channels": 16, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}


def run(*argv):
    """Exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return stop.value.code


def build(channels=3, label_dim=0, seed=0):
    torch.manual_seed(seed)
    return build_network(
        "ddpmpp", img_resolution=8, img_channels=channels, label_dim=label_dim, **SMALL
    )


@pytest.fixture
def place(tmp_path, seed, monkeypatch):
    """A folder with a stage-2 checkpoint, networks of grey images, and pictures."""
    monkeypatch.chdir(tmp_path)
    net = build(label_dim=3)
    info = {"phase": "tcm", "t_prime": 1.0, "images": 1}
    networks = {"model": net, "stage1": build(label_dim=3, seed=1)}
    optimizer = torch.optim.Adam(net.parameters())
    write_checkpoint(tmp_path / "run", collect(networks, optimizer, info, {}))
    grey = build(channels=1)
    for phase, name in (("ect", "grey"), ("edm", "edm")):
        save_network(tmp_path / f"{name}.safetensors", grey, metadata={"phase": phase})
    rng = np.random.default_rng(0)
    for name, shape in [
        ("a", (8, 8, 3)), ("b", (8, 8, 3)), ("grey", (8, 8)), ("small", (4, 4, 3)), ("wide", (8, 12, 3)),
    ]:  # fmt: skip
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no image")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 3:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def read(path):
    return np.asarray(Image.open(path))


def test_a_picture_with_a_hole(place, capsys):
    command = ["edit", "run", "--task", "inpaint", "--input", "a.png", "--classes", "1"]
    assert run(*command, "--mask", "mask.png", "--out", "filled.png") == 0
    assert capsys.readouterr().out == "1 image of inpaint in filled.png\n"
    filled, given, hole = read("filled.png"), read("a.png"), read("mask.png") > 0
    assert filled.shape == (8, 8, 3)
    assert (filled == given)[~hole].all()
    assert (filled != given)[hole].any()
    assert run(*command, "--mask", "mask.png", "--out", "filled.png") == 2
    assert "filled.png exists" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_masks_of_every_mode(place, mode):
    mask = Image.open("mask.png")
    if mode == "I;16":
        converted = Image.fromarray(read("mask.png").astype(np.uint16) * 257)
    else:
        converted = mask.convert(mode)
    converted.save("other.png")
    command = ["edit", "run", "--task", "inpaint", "--input", "a.png", "--classes", "1"]
    for name in ("mask", "other"):
        assert run(*command, "--mask", f"{name}.png", "--out", f"{name}_filled.png") == 0
    assert (read("mask_filled.png") == read("other_filled.png")).all()


def test_an_erased_part_of_a_picture_is_its_mask(place):
    """White is what decoding makes of transparency."""
    pixels = np.dstack([np.zeros((8, 8, 3), np.uint8), 255 - read("mask.png")])
    Image.fromarray(pixels).save("erased.png")
    command = ["edit", "run", "--task", "inpaint", "--input", "a.png", "--classes", "1"]
    for name in ("mask", "erased"):
        assert run(*command, "--mask", f"{name}.png", "--out", f"{name}_filled.png") == 0
    assert (read("mask_filled.png") == read("erased_filled.png")).all()


@pytest.mark.parametrize(
    ("task", "options", "results", "shape"),
    [
        ("colorize", ["--input", "grey.png", "a.png", "--num", "3"], 6, (2, 3)),
        ("upscale", ["--input", "small.png", "--num", "4"], 4, (1, 4)),
        ("stroke", ["--input", "a.png", "--mask", "mask.png", "--level", "2", "--num", "2"], 2, (1, 2)),
        ("vary", ["--input", "a.png", "b.png"], 2, (1, 2)),
        ("denoise", ["--input", "a.png", "--level", "0.3", "--num", "2"], 2, (1, 2)),
        ("interpolate", ["--input", "a.png", "b.png", "--num", "5"], 5, (1, 5)),
        ("interpolate", ["--seeds", "4", "7", "--steps", "2"], 8, (1, 8)),
    ],
)  # fmt: skip
def test_every_task(place, task, options, results, shape):
    command = ["edit", "run", "--task", task, "--classes", "2", *options]
    assert run(*command, "--out", "out.png") == 0
    assert run(*command, "--out", "out.npz") == 0
    assert np.load("out.npz")["images"].shape == (results, 8, 8, 3)
    high, wide = read("out.png").shape[:2]
    assert (high // 64, wide // 64) == shape


def test_the_command_is_the_function(place):
    assert run("edit", "grey.safetensors", "--task", "vary", "--input", "grey.png", "--num", "3",
               "--level", "0.7", "--seed", "5", "--start", "2", "--out", "out") == 0  # fmt: skip
    assert sorted(os.listdir("out")) == ["000002.png", "000003.png", "000004.png"]
    y = torch.from_numpy(read("grey.png").copy())[None, ..., None]
    expected = edit(build(channels=1), y, "vary", num=3, level=0.7, seed=5, start=2)
    assert (read("out/000003.png") == expected[1, ..., 0].numpy()).all()


def test_a_set_of_images(place):
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)
    np.savez("set.npz", images=images)
    command = ["edit", "grey.safetensors", "--task", "inpaint", "--mask", "mask.png"]
    assert run(*command, "--input", "set.npz", "--out", "out.npz") == 0
    hole = read("mask.png") > 0
    assert (np.load("out.npz")["images"] == images)[:, ~hole].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("run --task inpaint --input a.png", "mask: inpaint needs one"),
        ("run --task inpaint --input a.png --mask small.png", r"mask: must be [8, 8]"),
        ("run --task inpaint --input a.png --mask run", "data: "),
        ("run --task inpaint --input a.png --mask none.png", "mask: none.png does not exist"),
        ("run --task vary --input small.png", "images: must be the network's 8x8, got 4x4"),
        ("run --task vary --input wide.png", "got 12x8"),
        ("run --task vary --input a.png small.png", "a.png is 8x8 and small.png is 4x4"),
        ("run --task vary --input none.png", "input: none.png does not exist"),
        ("run --task vary --input text.png", "cannot be read: not an image"),
        ("run --task vary", "images: vary needs some"),
        ("run --task vary --input a.png --level 90", "level: must lie in"),
        ("run --task vary --input a.png --out a.jpg", "out: must end in .png or .npz"),
        ("run --task vary --input a.png --classes 3", "labels: must lie in [0, 3), got 3"),
        ("grey.safetensors --task vary --input a.png", "images: the network takes grey images"),
        ("grey.safetensors --task vary --input grey.png --classes 1", "the network is unconditional"),
        ("grey.safetensors --task colorize --input grey.png", "colorize needs a network of 3 channels"),
        ("edm.safetensors --task vary --input grey.png", "pre-trained only (phase edm)"),
        ("none.safetensors --task vary --input a.png", "none.safetensors"),
    ],
)  # fmt: skip
def test_refused_in_a_sentence(place, options, message, capsys):
    classes = ["--classes", "1"] if options.startswith("run") and "--classes" not in options else []
    assert run("edit", *options.split(), *classes) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("tcm-fast: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not os.path.exists("edited.png")


def test_a_class_is_needed(place, capsys):
    assert run("edit", "run", "--task", "vary", "--input", "a.png") == 2
    assert "give the class of each image, 0 to 2 (--classes)" in capsys.readouterr().err
