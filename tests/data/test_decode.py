"""Modes, sizes and orientation of one image; disks that fail."""

from __future__ import annotations

import errno
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import (
    encode,
    error_of,
    random_images,
    write_folder,
)
from PIL import Image

from tcm_fast.data import decode as decode_module
from tcm_fast.data import formats
from tcm_fast.data.dataset import load_images
from tcm_fast.data.decode import decode, fit

# ---- image modes --------------------------------------------------------------------------------


def raw_png(width: int, depth: int, colour: int, row: bytes, transparency: bytes = b"") -> bytes:
    """A PNG of one row, written by hand: Pillow does not write every kind that it reads."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    middle = chunk(b"tRNS", transparency) if transparency else b""
    content = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + middle + content + chunk(b"IEND", b"")


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=64))
@settings(deadline=None, max_examples=50)
def test_16_bit_grey_is_scaled_not_clipped(values):
    row = np.array(values, ">u2")
    found = decode(raw_png(len(row), 16, 0, row.tobytes()))
    np.testing.assert_array_equal(found[0], np.rint(row / 257))


def test_16_bit_grey_transparency_becomes_white():
    row = np.array([0, 1000, 65535], ">u2")
    found = decode(raw_png(3, 16, 0, row.tobytes(), transparency=struct.pack(">H", 1000)))
    assert found.tolist() == [[0, 255, 255]]


def test_16_bit_tiff_and_pgm():
    values = np.array([[0, 256, 257, 65535]], np.uint16)
    pgm = b"P5 4 1 65535 " + values.astype(">u2").tobytes()
    for encoded in (encode(Image.fromarray(values), "tiff"), pgm):
        assert decode(encoded).tolist() == [[0, 1, 1, 255]]


@given(
    st.tuples(*[st.integers(0, 255)] * 3),
    st.integers(0, 255),
    st.sampled_from(["RGBA", "LA", "P"]),
)
@settings(deadline=None, max_examples=100)
def test_alpha_is_composited_on_white(colour, alpha, mode):
    if mode == "P":  # one transparent entry
        alpha = 255 * (alpha % 2)
        image = Image.new("P", (2, 2), 0)
        image.putpalette([*colour, 1, 2, 3])
        encoded = encode(image, **({"transparency": 0} if alpha == 0 else {}))
    else:
        pixel = (colour[0], alpha) if mode == "LA" else (*colour, alpha)
        encoded = encode(Image.new(mode, (2, 2), pixel))
    found = decode(encoded)
    assert found.shape == ((2, 2) if mode == "LA" else (2, 2, 3))
    colour = np.array(colour[0] if mode == "LA" else colour)
    expected = np.broadcast_to((colour * alpha + 255 * (255 - alpha)) / 255, found.shape)
    assert np.abs(found - expected).max() <= 1
    if alpha == 255:
        np.testing.assert_array_equal(found, np.broadcast_to(colour, found.shape))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_a_grey_set_keeps_one_channel(tmp_path, mode):
    grey = Image.fromarray(np.full((3, 3), 65535, np.uint16))
    image = grey if mode == "I;16" else Image.new(mode, (3, 3), "white")
    write_folder(tmp_path, {"a.png": encode(image), "b.png": encode(Image.new("L", (3, 3), 9))})
    loaded = load_images(tmp_path)
    assert loaded.images.shape == (2, 3, 3, 1)
    assert loaded.images[:, 0, 0, 0].tolist() == [255, 9]


@given(
    st.lists(st.sampled_from(["L", "LA", "1", "RGB", "RGBA", "P", "CMYK"]), min_size=1, max_size=5)
)
@settings(deadline=None, max_examples=30)
def test_one_colour_image_makes_the_set_rgb(tmp_path_factory, modes):
    folder = tmp_path_factory.mktemp("modes")
    for i, mode in enumerate(modes):
        Image.new("RGB", (2, 2), (255, 255, 255)).convert(mode).save(folder / f"{i}.tif")
    loaded = load_images(folder)
    assert loaded.channels == (1 if set(modes) <= {"L", "LA", "1"} else 3)
    assert loaded.images.shape[0] == len(modes)
    assert (loaded.images == 255).all()


def test_grey_pixels_survive_a_late_colour_image(tmp_path):
    grey, colour = random_images(3, channels=1), random_images(1)
    files = {f"{i}.png": encode(x) for i, x in enumerate([*grey, *colour])}
    loaded = load_images(write_folder(tmp_path, files))
    np.testing.assert_array_equal(loaded.images[:3], grey.repeat(3, axis=3))
    np.testing.assert_array_equal(loaded.images[3:], colour)


def test_exif_orientation_is_applied():
    image = random_images(1, 8)[0]
    image[:, :4], image[:, 4:] = 0, 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to look at it
    found = decode(encode(Image.fromarray(image), "jpeg", quality=100, exif=exif))
    assert found[:4].max() < 20
    assert found[4:].min() > 235


# ---- sizes --------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 24), st.sampled_from(["L", "RGB"]))
@settings(deadline=None, max_examples=60)
def test_fit_gives_the_resolution_and_keeps_constants(width, height, resolution, mode):
    fitted = fit(Image.new(mode, (width, height), "white"), resolution)
    assert fitted.size == (resolution, resolution)
    assert fitted.mode == mode
    assert (np.asarray(fitted) == 255).all()


def test_fit_averages_boxes_and_crops_the_centre():
    image = random_images(1, 8)[0]
    wide = np.concatenate([np.zeros((8, 4, 3), np.uint8), image, np.zeros((8, 4, 3), np.uint8)], 1)
    np.testing.assert_array_equal(np.asarray(fit(Image.fromarray(wide), 8)), image)
    boxes = image.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    halved = np.asarray(fit(Image.fromarray(image), 4))
    assert np.abs(halved - boxes).max() <= 1  # rounded twice, along each axis


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resolution_resizes_any_source(tmp_path, kind, channels):
    images = random_images(3, 8, channels)[:, :, :6]
    if kind == "folder":
        files = {f"{i}.png": encode(x) for i, x in enumerate(images)}
        source = write_folder(tmp_path, files)
    else:
        source = tmp_path / "a.npz"
        np.savez(source, images=images)
    assert "6x8" in error_of(source)
    loaded = load_images(source, resolution=3)
    assert loaded.images.shape == (3, 3, 3, channels)
    boxes = images[:, :6].reshape(3, 3, 2, 3, 2, channels).mean(axis=(2, 4))
    assert np.abs(loaded.images - boxes).max() <= 1  # 4 rows of boxes, cropped to the upper 3


def test_mixed_sizes_name_two_files(tmp_path):
    sizes = {"a.png": 4, "b.png": 4, "c.png": 5}
    write_folder(tmp_path, {n: encode(Image.new("L", (s, s))) for n, s in sizes.items()})
    message = error_of(tmp_path)
    assert "a.png is 4x4" in message
    assert "c.png is 5x5" in message
    assert "tcm-fast data pack SRC DST --resolution R" in message
    assert load_images(tmp_path, resolution=4).images.shape == (3, 4, 4, 1)


def test_not_square(tmp_path):
    write_folder(tmp_path, {"a.png": encode(Image.new("L", (4, 6)))})
    message = error_of(tmp_path)
    assert "a.png" in message
    assert "4x6" in message
    assert "tcm-fast data pack SRC DST --resolution R" in message


@pytest.mark.parametrize("resolution", [0, -3])
def test_resolution_must_be_positive(resolution):
    assert f"got {resolution}" in error_of("digits", resolution=resolution)


# ---- disks that fail ------------------------------------------------------------------------------


def failing_reads(monkeypatch, failures):
    """Reads of `dog.png` fail so many times. Returns the times slept."""
    read, left, slept = Path.read_bytes, [failures], []

    def reading(self):
        if self.name == "dog.png" and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", reading)
    monkeypatch.setattr(decode_module.time, "sleep", slept.append)
    return slept


def picture_folder(folder):
    (folder / "set").mkdir()
    for name in ("cat", "dog"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "set" / f"{name}.png")
    return folder / "set"


def test_a_read_that_fails_for_a_while_is_tried_again(tmp_path, monkeypatch):
    slept = failing_reads(monkeypatch, 2)
    assert len(load_images(picture_folder(tmp_path))) == 2
    assert slept == [0.1, 1.0]


def test_a_read_that_fails_for_good_is_reported_by_name(tmp_path, monkeypatch):
    slept = failing_reads(monkeypatch, 1000)
    with pytest.raises(ValueError, match=r"1 of 2 images .*: dog.png \(.*Input/output error\)"):
        load_images(picture_folder(tmp_path))
    assert slept == list(decode_module.PAUSES)


def test_a_disk_that_is_gone_is_not_waited_for_image_by_image(tmp_path, monkeypatch):
    slept = failing_reads(monkeypatch, 1000)
    patience = decode_module.FileReader()
    for _ in range(100):
        with pytest.raises(OSError, match="Input/output error"):
            patience.read("dog.png", (tmp_path / "dog.png").read_bytes)
    assert len(slept) == decode_module.RETRIES


def test_a_file_that_vanishes_is_reported_at_once(tmp_path, monkeypatch):
    slept = failing_reads(monkeypatch, 0)
    folder = picture_folder(tmp_path)
    walk = formats._walk

    def vanishing(root):
        names = walk(root)
        (folder / "dog.png").unlink()
        return names

    monkeypatch.setattr(formats, "_walk", vanishing)
    with pytest.raises(ValueError, match=r"dog.png \(.*No such file or directory"):
        load_images(folder)
    assert slept == []


def test_a_slow_read_is_named(tmp_path, monkeypatch):
    folder = picture_folder(tmp_path)
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(decode_module.time, "monotonic", lambda: next(clock))
    with pytest.warns(UserWarning, match=r"data: reading (cat|dog).png took \d+ s"):
        load_images(folder)
