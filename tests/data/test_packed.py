"""Packed folders: the images of the source, mapped; resumed where they stood; complete or not there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tcm_fast.cli.main import main
from tcm_fast.data import decode as decode_module
from tcm_fast.data import packed
from tcm_fast.data.dataset import describe, load_images
from tcm_fast.data.pack import pack
from tcm_fast.data.stream import ImageStream


def tree(root, count=23, grey=False, size=(40, 31), classes=3):
    """A folder tree of classes with JPEGs larger than wanted, as ImageNet's."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / f"n{i % classes:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (5, 5) if grey else (5, 5, 3), np.uint8)
        Image.fromarray(coarse).resize(size).save(folder / f"{i:05d}.JPEG")
    return root


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(packed, "SLICE", 4)
    monkeypatch.setattr(packed, "MOVED", 3)
    monkeypatch.setattr(decode_module, "SLICE", 2)


@pytest.mark.parametrize("grey", [False, True])
def test_a_folder_tree_becomes_the_images_that_loading_it_gives(tmp_path, grey, small_slices):
    source = tree(tmp_path / "train", grey=grey)
    assert pack(source, tmp_path / "small", resolution=16) == 23
    found, expected = load_images(tmp_path / "small"), load_images(source, resolution=16)
    assert found.images.shape == expected.images.shape == (23, 16, 16, 1 if grey else 3)
    assert np.array_equal(found.images, expected.images)
    assert np.array_equal(found.labels, expected.labels)
    assert found.class_names == expected.class_names
    assert isinstance(found.images, np.memmap)
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names == {"images.bin", "labels.npy", "packed.json"}
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert describe(tmp_path / "small")["classes"] == describe(source, resolution=16)["classes"]


def test_mapped_images_are_not_read_when_they_are_dealt_out(tmp_path):
    pack(tree(tmp_path / "train"), tmp_path / "small", resolution=16)
    data = load_images(tmp_path / "small")
    stream = ImageStream(data, seed=1, device="cpu")
    assert stream._images.data_ptr() == data.images.ctypes.data  # the file's pages, no copy
    images, labels = stream.batch(np.arange(5))
    index = stream.indices(0, 5)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), data.images[index])
    assert torch.equal(labels.argmax(1), torch.from_numpy(data.labels[index]))


@pytest.mark.parametrize("stop", [1, 9, 22])
def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, small_slices, stop):
    source = tree(tmp_path / "train")
    seen = []
    decode = decode_module.decode

    def failing(*args):
        seen.append(1)
        if len(seen) > stop:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(decode_module, "decode", failing)
    monkeypatch.setattr(decode_module.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "small", resolution=16)
    assert not (tmp_path / "small").exists()
    assert (tmp_path / "small.partial").is_dir()
    monkeypatch.setattr(decode_module, "decode", lambda *a: seen.append(1) or decode(*a))
    done = np.load(tmp_path / "small.partial" / "journal.npy").astype(bool).sum()
    seen.clear()
    pack(source, tmp_path / "small", resolution=16)
    assert len(seen) == 23 - 4 * done
    expected = load_images(source, resolution=16)
    assert np.array_equal(load_images(tmp_path / "small").images, expected.images)
    assert not (tmp_path / "small.partial").exists()


def test_another_set_does_not_go_on_with_what_was_begun(tmp_path, monkeypatch, small_slices):
    first, second = tree(tmp_path / "a"), tree(tmp_path / "b", count=12)
    monkeypatch.setattr(packed, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(first, tmp_path / "small", resolution=16)
    monkeypatch.undo()
    assert pack(second, tmp_path / "small", resolution=8) == 12
    expected = load_images(second, resolution=8)
    assert np.array_equal(load_images(tmp_path / "small").images, expected.images)


def test_images_that_cannot_be_read(tmp_path, small_slices):
    """Counted and named; the second try has only to close the gaps."""
    source = tree(tmp_path / "train")
    broken = sorted(source.rglob("*.JPEG"))[5]
    kept = [i for i in range(23) if i != 5]
    expected = load_images(source, resolution=16).select(np.array(kept), "expected")
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 23 images .* cannot be read: .*--skip-corrupt"):
        pack(source, tmp_path / "small", resolution=16)
    assert not (tmp_path / "small").exists()
    with pytest.warns(UserWarning, match="left out, 1 of 23"):
        assert pack(source, tmp_path / "small", resolution=16, skip_corrupt=True) == 22
    found = load_images(tmp_path / "small")
    assert np.array_equal(found.images, expected.images)
    assert np.array_equal(found.labels, expected.labels)


def test_arrays_are_packed_too(tmp_path):
    assert pack("digits:train", tmp_path / "digits") == 899
    found, expected = load_images(tmp_path / "digits"), load_images("digits:train")
    assert np.array_equal(found.images, expected.images)
    again = tmp_path / "again"
    assert pack(tmp_path / "digits", again, resolution=4) == 899
    assert load_images(again).images.shape == (899, 4, 4, 1)


def test_overwriting_and_bad_destinations(tmp_path):
    source = tree(tmp_path / "train", count=3)
    pack(source, tmp_path / "small", resolution=8)
    with pytest.raises(FileExistsError, match="--overwrite"):
        pack(source, tmp_path / "small", resolution=16)
    pack(source, tmp_path / "small", resolution=16, overwrite=True)
    assert load_images(tmp_path / "small").resolution == 16
    with pytest.raises(ValueError, match="needs a size for its images, add --resolution"):
        pack(source, tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "nowhere", tmp_path / "other", resolution=8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "images.bin").write_bytes(b"123"), "must have the bytes of"),
        (lambda d: (d / "packed.json").write_text("{"), "is not a packed set"),
        (lambda d: (d / "packed.json").write_text('{"shape": [1]}'), "is not a packed set"),
        (lambda d: (d / "labels.npy").unlink(), "is not a packed set"),
        (lambda d: (d / "images.bin").unlink(), "is not a packed set"),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    folder = tmp_path / "small"
    pack(tree(tmp_path / "train", count=3), folder, resolution=8)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_images(folder)


def test_the_command(tmp_path, capsys):
    source = tree(tmp_path / "train", count=5)
    with pytest.raises(SystemExit) as ended:
        main(["data", "pack", str(source), str(tmp_path / "small"), "--size", "8"])
    assert ended.value.code == 0
    assert "5 images in" in capsys.readouterr().out
    about = json.loads((tmp_path / "small" / "packed.json").read_text())
    assert about["shape"] == [5, 8, 8, 3]
