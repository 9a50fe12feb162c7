"""`tcm-fast edit`: files in, files out, and a sentence where something does not fit."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tcm_fast.checkpoint.format import collect, save_network, write_checkpoint
from tcm_fast.cli.main import main
from tcm_fast.data.dataset import load_images
from tcm_fast.networks import build_network
from tcm_fast.sampling import editing
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


def test_a_mask_for_each_image(place, capsys):
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1), np.uint8)
    masks = np.stack([read("mask.png"), read("mask.png").T])[..., None]
    np.savez("set.npz", images=images)
    np.savez("masks.npz", images=masks)
    command = ["edit", "grey.safetensors", "--task", "inpaint", "--mask", "masks.npz"]
    assert run(*command, "--input", "set.npz", "--out", "out.npz") == 0
    edited = np.load("out.npz")["images"]
    assert (edited == images)[masks == 0].all()
    assert all((a != b)[mask > 0].any() for a, b, mask in zip(edited, images, masks, strict=True))
    assert run(*command, "--input", "grey.png", "--out", "one.npz") == 2
    assert "mask: must be [8, 8], or [1,8,8]" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["vary", "interpolate"])
def test_files_in_the_way_are_seen_before_any_edit(place, task, capsys, monkeypatch):
    def no_edit(*arguments, **options):
        raise AssertionError

    (place / "out").mkdir()
    (place / "out" / "000006.png").touch()
    monkeypatch.setattr(editing, "edit", no_edit)
    command = ["edit", "grey.safetensors", "--task", task, "--input", "grey.png", "grey.png"]
    assert run(*command, "--num", "4", "--start", "3", "--out", "out") == 2
    assert "000006.png exists" in capsys.readouterr().err


def save_set(name, labels, names=()):
    """An npz with images of these labels, or a folder of folders with these names."""
    images = np.random.default_rng(1).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    if not names:
        np.savez(f"{name}.npz", images=images, labels=labels)
        return f"{name}.npz"
    for i, label in enumerate(labels):
        os.makedirs(f"{name}/{names[label]}", exist_ok=True)
        Image.fromarray(images[i]).save(f"{name}/{names[label]}/{i}.png")
    return name


@pytest.mark.parametrize(
    ("labels", "names", "options", "expected"),
    [
        ([2, 0], (), ["--num", "2"], [2, 2, 0, 0]),
        ([0, 1], ("cat", "owl"), [], [0, 2]),  # by name
        ([2, 0], (), ["--classes", "1"], [1, 1]),
        ([2, 0], (), ["--classes", "1", "2", "--num", "2"], [1, 1, 2, 2]),
    ],
)
def test_labels_of_the_input_are_its_classes(place, labels, names, options, expected):
    net = build(label_dim=3)
    save_network(
        "named.safetensors", net, metadata={"phase": "ect", "class_names": ["cat", "dog", "owl"]}
    )
    source = save_set("set", labels, names)
    command = ["edit", "named.safetensors", "--task", "vary", "--input", source, *options]
    assert run(*command, "--out", "out.npz") == 0
    found = np.load("out.npz")
    assert found["labels"].tolist() == expected
    images = load_images(source).images
    num = len(expected) // 2
    edited = edit(net, images, "vary", num=num, labels=expected[::num])
    assert (found["images"] == edited.numpy()).all()


def test_labels_of_an_interpolation(place):
    command = ["edit", "run", "--task", "interpolate", "--num", "3"]
    assert run(*command, "--input", save_set("set", [2, 0]), "--out", "path.npz") == 0
    assert "labels" not in np.load("path.npz")
    assert run(*command, "--classes", "1", "--out", "one.npz") == 0
    assert np.load("one.npz")["labels"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("names", [("cat", "wolf"), None])
def test_classes_that_the_network_does_not_name_are_asked_for(place, names, capsys):
    source = save_set("set", [0, 1], names) if names else "a.png"
    assert run("edit", "run", "--task", "vary", "--input", source, "--out", "out.npz") == 2
    assert "give the class of each image, 0 to 2 (--classes)" in capsys.readouterr().err


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
