"""Every source round trips, every bad source ends in one sentence."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import (
    cifar_rows,
    corrupt_folder,
    encode,
    error_of,
    numbered,
    random_images,
    write_folder,
    write_parquet,
    write_tar,
    write_zip,
)
from PIL import Image

from tcm_fast.data import formats
from tcm_fast.data.dataset import ImageData, load_images, split_halves
from tcm_fast.data.decode import decode

# ---- sources ------------------------------------------------------------------------------------


def test_digits():
    digits = load_images("digits")
    assert digits.images.shape == (1797, 8, 8, 1)
    assert (digits.num_classes, digits.resolution, digits.channels) == (10, 8, 1)
    assert digits.class_names == tuple("0123456789")
    assert digits.images.min() == 0
    assert digits.images.max() == 255
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_are_those_of_scikit_learn():
    original = pytest.importorskip("sklearn.datasets").load_digits()
    digits = load_images("digits")
    np.testing.assert_array_equal(digits.labels, original.target)
    np.testing.assert_allclose(
        digits.images[..., 0] * (16 / 255), original.images, atol=16 / 255 / 2
    )


def test_digits_halves_are_sources():
    train, test = split_halves(load_images("digits"))
    for name, half in (("digits:train", train), ("digits:test", test)):
        loaded = load_images(name)
        assert loaded.name == half.name == name
        np.testing.assert_array_equal(loaded.images, half.images)


def test_folder_of_classes_in_sorted_order(tmp_path):
    images = random_images(4)
    names = ["dog/1.png", "cat/10.png", "cat/2.PNG", "dog/deep/0.png"]
    write_folder(tmp_path, {n: encode(x) for n, x in zip(names, images, strict=True)})
    write_folder(tmp_path, {"dog/notes.txt": b"no image", "cat/.hidden.png": b"", "README.md": b""})
    loaded = load_images(tmp_path)
    np.testing.assert_array_equal(loaded.images, images[[1, 2, 0, 3]])
    assert loaded.labels.tolist() == [0, 0, 1, 1]
    assert loaded.class_names == ("cat", "dog")


@pytest.mark.parametrize("names", [("a.png", "b/c.png"), ("x/y/a.png", "x/y/b.png")])
def test_folder_without_classes(tmp_path, names):
    images = random_images(2)
    write_folder(tmp_path, {n: encode(x) for n, x in zip(names, images, strict=True)})
    loaded = load_images(tmp_path)
    np.testing.assert_array_equal(loaded.images, images)
    assert loaded.labels is None
    assert loaded.num_classes == 0
    assert loaded.class_names == ()


def test_a_folder_around_the_classes_is_no_class(tmp_path):
    files = {f"set/{c}/{i}.png": encode(random_images(1)[0]) for c in "ab" for i in range(2)}
    loaded = load_images(write_zip(tmp_path / "set.zip", files))
    assert loaded.class_names == ("a", "b")
    assert loaded.labels.tolist() == [0, 0, 1, 1]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "elsewhere", {"a.png": encode(random_images(1)[0])})
    root = write_folder(tmp_path / "root", {"b/b.png": encode(random_images(1)[0])})
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b/again").symlink_to(root)
    assert load_images(root).class_names == ("a", "b")
    assert len(load_images(root)) == 2


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_dataset_json(tmp_path, unpacked, labelled):
    images = random_images(3)
    names = [f"00000/img0000000{i}.png" for i in range(3)]
    labels = [[names[i], k] for i, k in ((2, 4), (0, 1), (1, 0))]  # in any order
    files = {n: encode(x) for n, x in zip(names, images, strict=True)}
    files["dataset.json"] = json.dumps({"labels": labels if labelled else None}).encode()
    write = write_folder if unpacked else write_zip
    loaded = load_images(write(tmp_path / "set.zip", files))
    np.testing.assert_array_equal(loaded.images, images)
    if labelled:
        assert loaded.labels.tolist() == [1, 0, 4]
        assert loaded.class_names == ("0", "1", "2", "3", "4")
    else:
        assert loaded.labels is None


@pytest.mark.parametrize("keys", [("images", "labels"), ("arr_0", "arr_1"), ("images", None)])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz(tmp_path, keys, channels):
    images, labels = random_images(5, channels=channels), np.array([0, 2, 1, 1, 0])
    arrays = {keys[0]: images[..., 0] if channels == 1 else images}
    if keys[1]:
        arrays[keys[1]] = labels.astype(np.int32)
    np.savez(tmp_path / "set.npz", **arrays)
    loaded = load_images(tmp_path / "set.npz")
    np.testing.assert_array_equal(loaded.images, images)
    if keys[1]:
        np.testing.assert_array_equal(loaded.labels, labels)
        assert loaded.labels.dtype == np.int64
    else:
        assert loaded.labels is None


def write_cifar(tmp_path: Path, images: np.ndarray, labels: np.ndarray, **changes: bytes) -> Path:
    parts = zip(np.array_split(images, 5), np.array_split(labels, 5), strict=True)
    files = {f"data_batch_{i}.bin": cifar_rows(*part) for i, part in enumerate(parts, 1)}
    files["test_batch.bin"] = cifar_rows(images[:1], labels[:1])
    files["batches.meta.txt"] = b"plane\ncar\nbird\n\n"
    files |= {name.replace("__", "."): content for name, content in changes.items()}
    files = {f"cifar-10-batches-bin/{n}": c for n, c in reversed(files.items()) if c}
    return write_tar(tmp_path / "cifar-10-binary.tar.gz", files)


def test_cifar10_binary(tmp_path):
    images, labels = random_images(10, 32), np.arange(10) % 3
    loaded = load_images(write_cifar(tmp_path, images, labels))
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert loaded.class_names == ("plane", "car", "bird")


def test_parquet(tmp_path):
    images, labels = random_images(7), np.array([0, 1, 1, 0, 2, 1, 0])
    path = write_parquet(tmp_path / "set.parquet", images, labels, ["ant", "bee", "cow"])
    loaded = load_images(path)
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert loaded.class_names == ("ant", "bee", "cow")


def test_parquet_folder_takes_the_training_split(tmp_path):
    images = random_images(6)
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", images[:2], [0, 1])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", images[2:4], [1, 0])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[4:], [0, 0])
    loaded = load_images(tmp_path)
    np.testing.assert_array_equal(loaded.images, images[:4])
    assert loaded.labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("labels", [None, [-1, -1]])
def test_parquet_without_labels(tmp_path, labels):
    write_parquet(tmp_path / "a.parquet", random_images(2), labels)
    assert load_images(tmp_path / "a.parquet").labels is None


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", random_images(2))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install 'tcm-fast[hf]'" in error_of(path)


# ---- bad sources --------------------------------------------------------------------------------


def test_missing_source(tmp_path):
    message = error_of(tmp_path / "nowhere", FileNotFoundError)
    assert "nowhere does not exist" in message
    assert "image folder" in message


def test_unknown_kind(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"x")
    assert ".parquet" in error_of(tmp_path / "a.h5")


def test_empty_sources(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("no image")
    write_zip(tmp_path / "empty.zip", {"dataset.json": b'{"labels": null}'})
    np.savez(tmp_path / "empty.npz", images=np.zeros((0, 4, 4, 3), np.uint8))
    for name in ("folder", "empty.zip"):
        message = error_of(tmp_path / name)
        assert "holds no images" in message
        assert ".png" in message
    assert "holds no images" in error_of(tmp_path / "empty.npz")
    assert "no rows" in error_of(write_parquet(tmp_path / "a.parquet", random_images(1)[:0], []))


def test_corrupt_images_are_counted_and_three_are_named(tmp_path):
    message = error_of(corrupt_folder(tmp_path))
    assert "5 of 8 images" in message
    assert sum(f"bad{i}.png" in message for i in range(5)) == 3
    assert "--skip-corrupt" in message


def test_skip_corrupt_goes_on_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="5 of 8 images"):
        loaded = load_images(corrupt_folder(tmp_path), skip_corrupt=True)
    assert len(loaded) == 3
    assert loaded.labels.tolist() == [0, 0, 1]


def test_skip_corrupt_is_silent_where_nothing_is_corrupt(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_images(corrupt_folder(tmp_path, bad=0), skip_corrupt=True)) == 3


def test_nothing_left_is_an_error(tmp_path):
    assert "none is left" in error_of(corrupt_folder(tmp_path, good=0), skip_corrupt=True)


@given(st.data())
@settings(deadline=None, max_examples=60)
@pytest.mark.filterwarnings("ignore")
def test_damage_ends_in_an_image_or_in_our_own_error(tmp_path_factory, draw):
    kind = draw.draw(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp"]))
    encoded = bytearray(encode(random_images(1, 8)[0], kind))
    encoded[draw.draw(st.integers(0, len(encoded) - 1))] ^= draw.draw(st.integers(0, 255))
    encoded = encoded[: draw.draw(st.integers(0, len(encoded)))]
    source = write_folder(tmp_path_factory.mktemp("damage"), {f"a.{kind}": bytes(encoded)})
    try:
        image = decode(bytes(encoded))
    except Exception:
        assert "1 of 1 images" in error_of(source)
        return
    if image.shape[0] == image.shape[1]:
        np.testing.assert_array_equal(load_images(source).images[0].squeeze(), image.squeeze())
    else:
        assert "square" in error_of(source)


def test_too_many_pixels(tmp_path, monkeypatch):
    write_folder(tmp_path, {"huge.png": encode(random_images(1, 32)[0])})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = error_of(tmp_path)
    assert "huge.png" in message
    assert "more pixels than are safe" in message


def test_zip_bomb(tmp_path, monkeypatch):
    write_zip(tmp_path / "bomb.zip", {"a.png": bytes(100_000)})
    monkeypatch.setattr(formats, "MAX_ENTRY_BYTES", 50_000)
    assert "a.png (unpacks to 100000 bytes)" in error_of(tmp_path / "bomb.zip")


def test_zip_entry_with_a_wrong_checksum(tmp_path):
    path = tmp_path / "a.zip"
    png = encode(random_images(1)[0])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.png", png)
        archive.writestr("b.png", png)
    content = path.read_bytes()
    at = content.index(png) + len(png) - 20
    path.write_bytes(content[:at] + b"\0\0\0\0" + content[at + 4 :])
    assert "1 of 2 images" in error_of(path)


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "cifar.tar.gz", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"neither here nor there" * 10])
def test_files_that_are_not_what_they_are_called(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in error_of(tmp_path / name)


def test_truncated_archives(tmp_path):
    images, labels = random_images(10, 32), np.arange(10) % 3
    np.savez(tmp_path / "a.npz", images=images)
    write_zip(tmp_path / "a.zip", {"a.png": encode(images[0])})
    write_cifar(tmp_path, images, labels)
    write_parquet(tmp_path / "a.parquet", images)
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        assert path.name in error_of(path)


def test_cifar10_rows_and_labels_are_checked(tmp_path):
    images, labels = random_images(10, 32), np.arange(10) % 3
    assert "rows of 3073 bytes" in error_of(
        write_cifar(tmp_path, images, labels, data_batch_3__bin=bytes(3000))
    )
    assert "no data_batch_2.bin" in error_of(
        write_cifar(tmp_path, images, labels, data_batch_2__bin=b"")
    )
    assert "labels up to 200" in error_of(write_cifar(tmp_path, images, labels + 198))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros(3)}, "'images' or 'arr_0', only ['pictures']"),
        ({"images": np.full((2, 4, 4, 3), 300, np.float32)}, "300.0 to 300.0"),
        ({"images": np.full((2, 4, 4, 3), np.nan, np.float32)}, "nan"),
        ({"images": np.full((2, 4, 4), 0.3, np.float32)}, "float32 [2, 4, 4], have values between"),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, "uint8 [2, 4, 4, 4], have transparency"),
        ({"images": np.zeros((2, 5, 4, 9), np.uint8)}, "uint8 [2, 5, 4, 9]"),
        ({"images": np.zeros((2, 4, 4), complex)}, "complex128"),
        ({"images": np.zeros((2, 4, 6, 3), np.uint8)}, "6x4"),
        ({"images": np.array([{}], object)}, "pickle"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "int64 [3]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.full(2, 0.5)}, "float64 [2]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -2])}, "from -2"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array(["a", "3"])}, "<U1 [2]"),
    ],
)
def test_npz_contents_are_checked(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    assert words in error_of(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "dataset.json"),
        (b"[]", "dataset.json"),
        (b'{"classes": 3}', "dataset.json"),
        (b'{"labels": 3}', "dataset.json"),
        (b'{"labels": [["a.png", 0]]}', "no label for 1 of 2 images, the first is b.png"),
        (b'{"labels": [["a.png", 0], ["b.png", "x"]]}', "class numbers"),
        (b'{"labels": [["a.png", 0], ["b.png", 0.5]]}', "float64"),
        (b'{"labels": [["a.png", 0], ["b.png", [0, 1]]]}', "class numbers"),
        (b'{"labels": [["a.png", 0], ["b.png", -1]]}', "from -1"),
        (b'{"labels": [["a.png", 0], ["b.png", 2]], "class_names": ["x"]}', "names 1 classes"),
    ],
)
def test_dataset_json_is_checked(tmp_path, content, words):
    png = encode(random_images(1)[0])
    path = write_zip(tmp_path / "a.zip", {"a.png": png, "b.png": png, "dataset.json": content})
    assert words in error_of(path)


def test_parquet_columns_are_checked(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "a.parquet")
    assert "its columns are x, y" in error_of(tmp_path / "a.parquet")
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": encode(random_images(1)[0]), "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "b.parquet")
    assert "b.parquet row 0 (the row holds no bytes)" in error_of(tmp_path / "b.parquet")
    (tmp_path / "a.parquet").rename(tmp_path / "c.parquet")
    assert "c.parquet has no column 'image'" in error_of(tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied", "secret")

    monkeypatch.setattr(formats, "_walk", refuse)
    assert "Permission denied" in error_of(tmp_path, OSError)


def test_too_much_for_the_memory(tmp_path, monkeypatch):
    def refuse(*_args):
        raise MemoryError

    write_folder(tmp_path, {"a.png": encode(random_images(1)[0])})
    monkeypatch.setattr(np, "empty", refuse)
    assert "do not fit in memory" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "class_names"),
    [
        (np.zeros((2, 4, 4, 3)), None, ()),
        (np.zeros((2, 4, 5, 3), np.uint8), None, ()),
        (np.zeros((2, 4, 4, 2), np.uint8), None, ()),
        (np.zeros((0, 4, 4, 3), np.uint8), None, ()),
        (np.zeros((2, 4, 4, 3), np.uint8), None, ("a",)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64), ("a",)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.ones(2, np.int64), ("a",)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int32), ("a",)),
    ],
)
def test_image_data_checks_itself(images, labels, class_names):
    with pytest.raises(ValueError, match=r"^data: .* got "):
        ImageData(images, labels, "set", class_names)


# ---- halves -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.booleans(), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_halves_are_balanced_disjoint_and_complete(labels, labelled, seed):
    count = len(labels)
    labels = np.array(labels, np.int64)
    numbers = numbered(count, labelled=False)
    data = ImageData(numbers.images, labels, "set", tuple("abcd")) if labelled else numbers
    halves = split_halves(data, seed)
    index = [half.images[:, 0, 0, 1].astype(int) for half in halves]
    assert sorted([*index[0], *index[1]]) == list(range(count))
    assert abs(len(index[0]) - len(index[1])) <= 1
    assert all((np.diff(half) > 0).all() for half in index)
    if labelled:
        counts = [np.bincount(half.labels, minlength=4) for half in halves]
        assert np.abs(counts[0] - counts[1]).max() <= 1
        np.testing.assert_array_equal(halves[0].labels, labels[index[0]])
    again = split_halves(data, seed)
    np.testing.assert_array_equal(again[1].images, halves[1].images)


def test_halves_need_two_images():
    with pytest.raises(ValueError, match="cannot be split"):
        split_halves(numbered(1))
