"""Packing gives the images back, complete or not at all."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from image_sets import (
    corrupt_folder,
    encode,
    random_images,
    write_folder,
)
from PIL import Image

from tcm_fast.data import formats
from tcm_fast.data.dataset import describe, load_images
from tcm_fast.data.pack import pack


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_pack_round_trip(tmp_path, channels, labelled):
    images = random_images(1100, 4, channels)
    files = {
        f"{'xy'[i % 2] if labelled else '.'}/{i:04d}.png": encode(x) for i, x in enumerate(images)
    }
    source = load_images(write_folder(tmp_path / "source", files))
    assert pack(tmp_path / "source", tmp_path / "new/set.zip") == 1100
    packed = load_images(tmp_path / "new/set.zip")
    np.testing.assert_array_equal(packed.images, source.images)
    assert packed.class_names == source.class_names == (("x", "y") if labelled else ())
    if labelled:
        np.testing.assert_array_equal(packed.labels, source.labels)


def test_pack_is_read_by_edms_convention(tmp_path):
    """A plain reader: sorted names, labels from dataset.json by name, pixels as HWC."""
    digits = load_images("digits:test")
    pack("digits:test", tmp_path / "digits.zip")
    with zipfile.ZipFile(tmp_path / "digits.zip") as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
        assert names[0] == "00000/img00000000.png"
        assert len(names) == len(digits)
        for i in (0, 1, 500, len(names) - 1):
            with archive.open(names[i]) as file:
                pixels = np.array(Image.open(file))
            np.testing.assert_array_equal(pixels[:, :, None], digits.images[i])
        assert [labels[n] for n in names] == digits.labels.tolist()


def test_pack_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        pack("digits:test", tmp_path / f"{name}.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_pack_resizes_and_skips(tmp_path):
    corrupt_folder(tmp_path / "source")
    with pytest.warns(UserWarning, match="5 of 8"):
        count = pack(tmp_path / "source", tmp_path / "a.zip", resolution=8, skip_corrupt=True)
    assert count == 3
    assert load_images(tmp_path / "a.zip").images.shape == (3, 8, 8, 3)


def test_pack_refuses_to_overwrite(tmp_path):
    target = tmp_path / "a.zip"
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        pack("digits:test", target)
    assert target.read_bytes() == b"mine"
    pack("digits:test", target, overwrite=True)
    assert load_images(target).resolution == 8


def test_pack_wants_a_zip(tmp_path):
    with pytest.raises(ValueError, match=r"called \.zip or a folder"):
        pack("digits", tmp_path / "a.tar")
    (tmp_path / "a.zip").mkdir()
    with pytest.raises(ValueError, match=r"called \.zip or a folder"):
        pack("digits", tmp_path / "a.zip", overwrite=True)


def test_pack_leaves_nothing_behind_when_the_disk_is_full(tmp_path, monkeypatch):
    target = tmp_path / "a.zip"
    target.write_bytes(b"mine")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.os, "fsync", full)
    with pytest.raises(OSError, match=r"^pack: cannot write .*No space left on device"):
        pack("digits:test", target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]
    assert target.read_bytes() == b"mine"


def test_describe(tmp_path):
    images = random_images(3)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 2, 2]))
    found = describe(tmp_path / "a.npz")
    assert found["images"] == 3
    assert found["resolution"] == 4
    assert found["channels"] == 3
    assert found["classes"] == {"0": 1, "1": 0, "2": 2}
    assert found["value_range"] == (images.min(), images.max())
    np.testing.assert_allclose(found["mean"], images.mean(axis=(0, 1, 2)), atol=0.005)
    assert found["bytes"] == images.nbytes
    json.dumps(found)  # plain numbers, for a script as much as for a person
    assert describe("digits:test", resolution=4)["bytes"] == 898 * 16
