"""Every source round trips, every bad source ends in one sentence, the order is a function."""

from __future__ import annotations

import errno
import io
import json
import struct
import tarfile
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tcm_fast.data import dataset as data_module
from tcm_fast.data import formats
from tcm_fast.data.dataset import ImageData, ImageStream, describe, load_images, pack, split_halves
from tcm_fast.data.formats import decode


def random_images(count: int = 6, resolution: int = 4, channels: int = 3, seed: int = 0):
    """uint8 [N,R,R,C]"""
    shape = (count, resolution, resolution, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, images: np.ndarray, labels=None, names=None) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": encode(x), "path": f"{i}.png"} for i, x in enumerate(images)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(rows, kind)}
    if labels is not None:
        columns["label"] = pa.array(map(int, labels), pa.int64())
    table = pa.table(columns)
    if names is not None:
        feature = {"names": names, "_type": "ClassLabel"}
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def cifar_rows(images: np.ndarray, labels: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tobytes()


def error_of(source: Path | str, kind: type[Exception] = ValueError, **options) -> str:
    """What load_images says: always one line that begins with where it comes from."""
    with pytest.raises(kind) as caught:
        load_images(source, **options)
    message = str(caught.value)
    assert message.startswith("data: ")
    assert "\n" not in message
    return message


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
    fitted = formats.fit(Image.new(mode, (width, height), "white"), resolution)
    assert fitted.size == (resolution, resolution)
    assert fitted.mode == mode
    assert (np.asarray(fitted) == 255).all()


def test_fit_averages_boxes_and_crops_the_centre():
    image = random_images(1, 8)[0]
    wide = np.concatenate([np.zeros((8, 4, 3), np.uint8), image, np.zeros((8, 4, 3), np.uint8)], 1)
    np.testing.assert_array_equal(np.asarray(formats.fit(Image.fromarray(wide), 8)), image)
    boxes = image.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    halved = np.asarray(formats.fit(Image.fromarray(image), 4))
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


def corrupt_folder(root: Path, good: int = 3, bad: int = 5) -> Path:
    png = encode(random_images(1, 16)[0])
    jpeg = encode(random_images(1, 16)[0], "jpeg")
    damaged = [b"", b"not an image", png[: len(png) // 2], jpeg[: len(jpeg) // 2], png[:-40]][:bad]
    files = {f"c{i % 2}/bad{i}.png": content for i, content in enumerate(damaged)}
    files |= {f"c{i % 2}/ok{i}.png": png for i in range(good)}
    return write_folder(root, files)


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
    monkeypatch.setattr(data_module.np, "empty", refuse)
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


# ---- the order of a run -------------------------------------------------------------------------


def numbered(count: int, labelled: bool = True, resolution: int = 2) -> ImageData:
    """Image i has the pixel (i//256, i%256, 255) at its upper left and is black elsewhere."""
    images = np.zeros((count, resolution, resolution, 3), np.uint8)
    number = np.arange(count)
    images[:, 0, 0, 0], images[:, 0, 0, 1], images[:, 0, 0, 2] = number // 256, number % 256, 255
    labels = number % 3 if labelled else None
    return ImageData(images, labels, "numbered", ("a", "b", "c") if labelled else ())


@given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_every_epoch_is_a_permutation(count, seed, epoch):
    stream = ImageStream(numbered(count), seed=seed, device="cpu")
    order = stream.indices(epoch * count, count)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


@given(st.integers(1, 20), st.integers(0, 100), st.lists(st.integers(0, 30), max_size=8))
@settings(deadline=None, max_examples=60)
def test_the_order_does_not_depend_on_how_it_is_cut(count, start, cuts):
    stream = ImageStream(numbered(count), seed=3, device="cpu", flip=True)
    total = sum(cuts)
    whole = stream.indices(start, total)
    positions = np.arange(start, start + total)
    images, labels = stream.batch(positions)
    other = ImageStream(numbered(count), seed=3, device="cpu", flip=True)
    at = 0
    for size in cuts:
        part = slice(at, at + size)
        np.testing.assert_array_equal(other.indices(start + at, size), whole[part])
        some_images, some_labels = other.batch(positions[part])
        assert torch.equal(some_images, images[part])
        assert torch.equal(some_labels, labels[part])
        at += size


def test_epochs_and_seeds_differ():
    first = ImageStream(numbered(500), seed=0, device="cpu")
    second = ImageStream(numbered(500), seed=1, device="cpu")
    orders = [first.indices(0, 500), first.indices(500, 500), second.indices(0, 500)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (order == other).mean() < 0.02


def test_the_order_is_frozen():
    """A change here would break every resumed run."""
    stream = ImageStream(numbered(8), seed=7, device="cpu", flip=True)
    epochs = [[4, 3, 6, 2, 1, 0, 5, 7], [7, 6, 1, 4, 3, 2, 5, 0]]
    assert stream.indices(0, 16).tolist() == epochs[0] + epochs[1]
    flips = [0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert stream.flipped(np.arange(16)).astype(int).tolist() == flips


def test_a_batch_larger_than_the_set():
    stream = ImageStream(numbered(3), seed=0, device="cpu")
    order = stream.indices(1, 1000)
    assert np.bincount(order).tolist() in ([333, 333, 334], [333, 334, 333], [334, 333, 333])
    images, labels = stream.batch(np.arange(1, 1001))
    assert images.shape == (1000, 3, 2, 2)
    np.testing.assert_array_equal(images[:, 1, 0, 0].numpy(), order)
    np.testing.assert_array_equal(labels.argmax(1).numpy(), order % 3)


def test_batch_has_what_the_positions_say():
    stream = ImageStream(numbered(700), seed=0, device="cpu")
    positions = np.array([1399, 0, 700, 699, 5, 5])
    images, labels = stream.batch(positions)
    index = stream.index_of(positions)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(256 * images[:, 0, 0, 0].int() + images[:, 1, 0, 0], index)
    assert labels.dtype == torch.float32
    assert torch.equal(labels, torch.eye(3)[index % 3])


def test_batch_without_labels_or_images():
    stream = ImageStream(numbered(5, labelled=False), seed=0, device="cpu", flip=True)
    assert stream.batch(np.arange(4))[1] is None
    assert stream.batch(np.arange(0))[0].shape == (0, 3, 2, 2)


def test_flips_mirror_half_of_the_positions():
    data = numbered(100)
    positions = np.arange(4000)
    plain, _ = ImageStream(data, seed=1, device="cpu").batch(positions)
    stream = ImageStream(data, seed=1, device="cpu", flip=True)
    images, _ = stream.batch(positions)
    flipped = torch.from_numpy(stream.flipped(positions))
    assert torch.equal(images[flipped], plain[flipped].flip(3))
    assert torch.equal(images[~flipped], plain[~flipped])
    assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    # neither the same image in every epoch, nor every other position
    epochs = flipped.view(40, 100).float()
    assert 0.1 < epochs.mean(0).std() / (0.5 / 40**0.5) < 1.5
    assert abs(((2 * epochs - 1)[:, 1:] * (2 * epochs - 1)[:, :-1]).mean()) < 4 / 4000**0.5


def test_seed_must_not_be_negative():
    with pytest.raises(ValueError, match="got -1"):
        ImageStream(numbered(2), seed=-1, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fits", [True, False])
def test_cuda_batches_equal_those_of_the_cpu(monkeypatch, fits):
    monkeypatch.setattr(data_module, "_fits", lambda *_: fits)
    positions = np.arange(30, 600)
    expected = ImageStream(numbered(100), seed=2, device="cpu", flip=True).batch(positions)
    stream = ImageStream(numbered(100), seed=2, device="cuda", flip=True)
    assert stream.resident == fits
    for found, wanted in zip(stream.batch(positions), expected, strict=True):
        assert found.is_cuda
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("flip", [False, True])
def test_what_is_read_ahead_is_what_is_asked_for(flip):
    expected = ImageStream(numbered(100), seed=2, device="cpu", flip=flip)
    stream = ImageStream(numbered(100), seed=2, device="cpu", flip=flip)
    stream.prefetch(np.arange(4))  # of a resident set: nothing
    stream.resident, stream._reader = False, ThreadPoolExecutor(1)
    first, second = np.arange(30, 60), np.arange(60, 90)
    stream.prefetch(first)
    stream.prefetch(second)
    for positions in (second, first, np.arange(90, 95)):
        for found, wanted in zip(stream.batch(positions), expected.batch(positions), strict=True):
            assert torch.equal(found, wanted)
    assert not stream._ahead
    for start in range(300):  # asked for and never fetched: not kept for ever
        stream.prefetch(np.arange(start, start + 3))
    assert len(stream._ahead) == data_module.MOST_AHEAD


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


# ---- pack and describe --------------------------------------------------------------------------


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
    monkeypatch.setattr(data_module.time, "sleep", slept.append)
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
    assert slept == list(data_module.PAUSES)


def test_a_disk_that_is_gone_is_not_waited_for_image_by_image(tmp_path, monkeypatch):
    slept = failing_reads(monkeypatch, 1000)
    patience = data_module._Patience()
    for _ in range(100):
        with pytest.raises(OSError, match="Input/output error"):
            patience.read("dog.png", (tmp_path / "dog.png").read_bytes)
    assert len(slept) == data_module.RETRIES


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
    monkeypatch.setattr(data_module.time, "monotonic", lambda: next(clock))
    with pytest.warns(UserWarning, match=r"data: reading (cat|dog).png took \d+ s"):
        load_images(folder)
