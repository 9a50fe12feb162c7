"""Whatever form images and labels come in, image i has label i, or an error names it."""

from __future__ import annotations

import io
import json
import sys
import types
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import write_folder
from PIL import Image

from tcm_fast.cli.main import main
from tcm_fast.data import formats
from tcm_fast.data.dataset import class_mapping, describe, load_images
from tcm_fast.data.labels import SPLITS, clean_name
from tcm_fast.data.pack import pack


def png(number: int, size: int = 2) -> bytes:
    """A grey image that says which it is."""
    buffer = io.BytesIO()
    Image.new("L", (size, size), number).save(buffer, "png")
    return buffer.getvalue()


class Unflagged(zipfile.ZipInfo):
    """An entry whose name is UTF-8 without saying so, as macOS writes it."""

    def _encodeFilenameFlags(self):
        return self.filename.encode("utf-8"), self.flag_bits


def write_zip(path: Path, files, entry=zipfile.ZipInfo) -> Path:
    """A zip of (name, content) pairs or a dict."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # that a name is there twice
        for name, content in dict(files).items() if isinstance(files, dict) else files:
            archive.writestr(entry(name), content)
    return path


def loaded(source, **options):
    """What load_images gives, and what it warned of, as one text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_images(source, **options)
    return data, "\n".join(str(w.message) for w in caught)


def error_of(source, **options) -> str:
    with pytest.raises(ValueError, match=r"\Adata: [^\n]*\Z") as caught:
        load_images(source, **options)
    return str(caught.value)


def classes_by_number(data) -> dict[int, str | None]:
    """The name of the class of each image, by the number that it shows."""
    numbers = data.images[:, 0, 0, 0].tolist()
    assert len(set(numbers)) == len(numbers)
    if data.labels is None:
        return dict.fromkeys(numbers)
    return dict(zip(numbers, (data.class_names[k] for k in data.labels), strict=True))


# ---- names --------------------------------------------------------------------------------------

CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/\\")
PARTS = st.text(CHARACTERS, min_size=1, max_size=6).filter(
    lambda s: (
        not s.startswith(".")
        and s.lower() not in SPLITS
        and s != "__MACOSX"
        and len(s.encode()) < 60
        and unicodedata.normalize("NFC", s).strip("/\\.") != ""
    )
)
CLASSES = st.one_of(
    st.integers(0, 20).map(str), st.sampled_from(["é", "e\u0301", "Ω x", "a.b"]), PARTS
)
SUFFIX = st.sampled_from([".png", ".PNG", ".jfif", ".jpe", ".JPEG", ".tiff"])
NAMES = st.lists(
    st.tuples(CLASSES, st.tuples(PARTS, SUFFIX).map("".join)), min_size=1, max_size=7, unique=True
)


def check(source: Path, expected: dict[int, str | None], names: dict[int, str]) -> None:
    """Image i has class i, unless two files are one by their names: then the error names them."""
    cleaned = [clean_name(name) for name in names.values()]
    twice = {name for name in cleaned if cleaned.count(name) > 1}
    if twice:
        message = error_of(source)
        assert any(name in message for name in twice)
        return
    assert classes_by_number(loaded(source)[0]) == expected


@given(NAMES, st.sampled_from(["folder", "zip", "windows", "unflagged"]), st.booleans())
@settings(deadline=None, max_examples=150)
def test_folders_of_any_name_are_the_classes(tmp_path_factory, names, kind, has_root):
    root = tmp_path_factory.mktemp("set")
    separator = "\\" if kind == "windows" else "/"
    paths = {
        i: separator.join(["all", *parts] if has_root else parts) for i, parts in enumerate(names)
    }
    files = {path: png(i) for i, path in paths.items()}
    if kind == "folder":
        source = write_folder(root / "set", files)
    else:
        source = write_zip(
            root / "set.zip", files, Unflagged if kind == "unflagged" else zipfile.ZipInfo
        )
    expected = {i: unicodedata.normalize("NFC", parts[0]) for i, parts in enumerate(names)}
    if len(set(expected.values())) == 1:  # a folder that holds every image is no class
        expected = dict.fromkeys(expected)
    check(source, expected, paths)


@given(NAMES, st.data())
@settings(deadline=None, max_examples=100)
def test_dataset_json_goes_by_names_however_they_are_written(tmp_path_factory, names, draw):
    root = tmp_path_factory.mktemp("set")
    labels = draw.draw(st.lists(st.integers(0, 30), min_size=len(names), max_size=len(names)))
    paths = {i: "/".join(parts) for i, parts in enumerate(names)}
    form = draw.draw(st.sampled_from(["NFC", "NFD"]))
    windows = draw.draw(st.booleans())
    pairs = [[unicodedata.normalize(form, paths[i]), labels[i]] for i in paths]
    pairs = draw.draw(st.permutations(pairs))
    if windows:
        paths = {i: path.replace("/", "\\") for i, path in paths.items()}
    else:
        pairs = [[name.replace("/", "\\"), label] for name, label in pairs]
    files = {path: png(i) for i, path in paths.items()}
    files["dataset.json"] = json.dumps({"labels": pairs}).encode()
    source = write_zip(root / "set.zip", files)
    check(source, {i: str(label) for i, label in enumerate(labels)}, paths)


def test_a_windows_zip_with_its_folders_entries(tmp_path):
    files = {"cat\\": b"", "cat\\1.png": png(1), "dog\\": b"", "dog\\2.png": png(2)}
    data, said = loaded(write_zip(tmp_path / "a.zip", files))
    assert classes_by_number(data) == {1: "cat", 2: "dog"}
    assert said == ""


def test_a_name_that_is_no_text(tmp_path):
    folder = b"caf\xe9"
    for name, number in ((folder, 1), (b"bar", 2)):
        path = bytes(tmp_path / "set") + b"/" + name
        Path(path.decode("utf-8", "surrogateescape")).mkdir(parents=True)
        (Path(path.decode("utf-8", "surrogateescape")) / "a.png").write_bytes(png(number))
    data, _ = loaded(tmp_path / "set")
    assert classes_by_number(data) == {1: "caf\\xe9", 2: "bar"}
    assert pack(tmp_path / "set", tmp_path / "a.zip") == 2
    assert classes_by_number(loaded(tmp_path / "a.zip")[0]) == {1: "caf\\xe9", 2: "bar"}


def test_numeric_folders_are_in_numeric_order(tmp_path, capsys):
    files = {f"{k}/a.png": png(k) for k in range(12)} | {"other/a.png": png(99)}
    source = write_folder(tmp_path / "set", files)
    data, _ = loaded(source)
    assert data.class_names == (*map(str, range(12)), "other")
    assert data.labels[data.images[:, 0, 0, 0].argsort()].tolist() == list(range(13))
    assert list(describe(source)["classes"]) == list(data.class_names)


def test_class_mapping():
    assert class_mapping(("cat", "dog")) == "0 cat, 1 dog"
    assert class_mapping(("0", "1", "2")) == "0 to 2"
    assert class_mapping(tuple("abcde"), most=3) == "0 a, 1 b, ..., 4 e"


def test_classes_of_one_name_are_counted_apart(tmp_path):
    files = {f"{i}.png": png(i) for i in range(3)}
    pairs = [[f"{i}.png", k] for i, k in enumerate((0, 1, 1))]
    content = {"labels": pairs, "class_names": ["crane", "crane"]}
    source = write_zip(tmp_path / "a.zip", files | {"dataset.json": json.dumps(content).encode()})
    assert describe(source)["classes"] == {"crane (0)": 1, "crane (1)": 2}


# ---- files that are no images, images without a class --------------------------------------------


def test_files_that_are_not_read_are_counted_by_kind(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats._heif.cache_clear()
    files = {
        "a.jfif": png(1),
        "b.JPE": png(2),
        "c.HEIC": b"",
        "d.heic": b"",
        "e.tga": b"",
        "x": b"",
    }
    files |= {".hidden.png": b"", "._a.jfif": b"", ".DS_Store": b"", "__MACOSX/._a.jfif": b""}
    for source in (write_folder(tmp_path / "set", files), write_zip(tmp_path / "set.zip", files)):
        data, said = loaded(source)
        assert len(data) == 2
        assert "2 images" in said
        assert "2 .heic, 1 .tga, 1 hidden, 1 without a suffix (pip install pillow-heif" in said
    formats._heif.cache_clear()


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    calls = []
    plugin = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    formats._heif.cache_clear()
    data, said = loaded(write_folder(tmp_path, {"a.HEIC": png(1), "b.png": png(2)}))
    assert (len(data), said, calls) == (2, "", [1])
    formats._heif.cache_clear()


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_a_stray_image_beside_class_folders(tmp_path, write):
    files = {"cat/1.png": png(1), "dog/2.png": png(2), "stray.png": png(3)}
    source = write(tmp_path / "set.zip", files)
    data, said = loaded(source)
    assert (len(data), data.labels) == (3, None)
    assert "1 of 3 images" in said
    assert "(stray.png)" in said
    assert "--skip-unlabelled" in said
    data, said = loaded(source, skip_unlabelled=True)
    assert classes_by_number(data) == {1: "cat", 2: "dog"}
    assert "left out, 1 of 3 images" in said


def test_strays_at_two_depths(tmp_path):
    files = {"set/cat/1.png": png(1), "set/dog/2.png": png(2), "set/a.png": png(3), "b.png": png(4)}
    data, said = loaded(write_folder(tmp_path, files), skip_unlabelled=True)
    assert classes_by_number(data) == {1: "cat", 2: "dog"}
    assert "b.png" in said
    assert "set/a.png" in said


def test_images_that_dataset_json_does_not_label(tmp_path):
    metadata = json.dumps({"labels": [["a.png", 0], ["b.png", 1], ["gone.png", 1]]}).encode()
    files = {"a.png": png(1), "b.png": png(2), "c.png": png(3), "dataset.json": metadata}
    source = write_zip(tmp_path / "a.zip", files)
    assert "first is c.png; --skip-unlabelled" in error_of(source)
    data, said = loaded(source, skip_unlabelled=True)
    assert classes_by_number(data) == {1: "0", 2: "1"}
    assert "labels 1 files that are not among the images (gone.png)" in said


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_splits_are_no_classes(tmp_path, write):
    files = {f"{s}/{c}/{i}.png": png(10 * i + len(c) + len(s))
             for s in ("train", "test") for c in ("ox", "cat") for i in range(2)}  # fmt: skip
    source = write(tmp_path / "set.zip", {f"photos/{name}": c for name, c in files.items()})
    message = error_of(source)
    assert "train (4 images), test (4 images)" in message or "test (4 images), train (4" in message
    assert f"take one of them: {source}:" in message
    assert loaded(f"{source}:test")[0].class_names == ("cat", "ox")
    assert sorted(classes_by_number(loaded(f"{source}:test")[0])) == [6, 7, 16, 17]
    assert sorted(classes_by_number(loaded(f"{source}:train")[0])) == [7, 8, 17, 18]
    assert "no split 'val', there are" in error_of(f"{source}:val")
    assert pack(f"{source}:train", tmp_path / "packed", resolution=2) == 4


def test_one_folder_called_train_is_a_class(tmp_path):
    files = {"train/1.png": png(1), "car/2.png": png(2)}
    data, _ = loaded(write_folder(tmp_path, files))
    assert classes_by_number(data) == {1: "train", 2: "car"}


def test_dataset_json_in_the_folder_that_holds_all(tmp_path):
    metadata = json.dumps({"labels": [["x/a.png", 1], ["y/b.png", 0]]}).encode()
    files = {"set/x/a.png": png(1), "set/y/b.png": png(2), "set/dataset.json": metadata}
    data, _ = loaded(write_zip(tmp_path / "a.zip", files))
    assert classes_by_number(data) == {1: "1", 2: "0"}
    message = error_of(write_zip(tmp_path / "b.zip", files | {"c.png": png(3)}))
    assert "set/dataset.json" in message
    assert "c.png" in message


# ---- contradictions ------------------------------------------------------------------------------


def test_a_file_with_two_labels(tmp_path):
    files = {"a.png": png(1), "b.png": png(2)}
    pairs = [["a.png", 0], ["b.png", 1], ["a.png", 1]]
    files["dataset.json"] = json.dumps({"labels": pairs}).encode()
    assert "labels a.png twice, 0 and 1" in error_of(write_zip(tmp_path / "a.zip", files))
    pairs[2][1] = 0
    files["dataset.json"] = json.dumps({"labels": pairs}).encode()
    assert len(load_images(write_zip(tmp_path / "a.zip", files))) == 2


@pytest.mark.parametrize("second", ["x/a.png", "x\\a.png", "x//a.png", "./x/a.png"])
def test_two_entries_of_one_name(tmp_path, second):
    source = write_zip(
        tmp_path / "a.zip", [("x/a.png", png(1)), ("y/b.png", png(2)), (second, png(3))]
    )
    assert "two files of the name x/a.png" in error_of(source)


def test_two_arrays_of_one_name(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 2, 2), np.uint8))
    source = write_zip(tmp_path / "a.npz", [("images.npy", buffer.getvalue())] * 2)
    assert "two arrays of one name" in error_of(source)


def write_labels(path: Path, labels) -> Path:
    """A zip of one image per label."""
    files = {f"{i}.png": png(i) for i in range(len(labels))}
    pairs = [[f"{i}.png", label] for i, label in enumerate(labels)]
    return write_zip(path, files | {"dataset.json": json.dumps({"labels": pairs}).encode()})


@pytest.mark.parametrize("labels", [[0, 10**12], [0, 1, 10**7], [0, 10**30], [5000, 1]])
def test_far_too_many_classes_end_at_once(tmp_path, labels):
    message = error_of(write_labels(tmp_path / "a.zip", labels))
    if labels[1] < 2**63:
        assert "--renumber" in message
        assert f"{labels.index(max(labels))}.png" in message
        assert pack(tmp_path / "a.zip", tmp_path / "b.zip", renumber=True) == len(labels)
        found = classes_by_number(loaded(tmp_path / "b.zip")[0])
        assert found == {i: str(label) for i, label in enumerate(labels)}


def test_a_few_images_of_many_classes_are_no_mistake(tmp_path):
    data, said = loaded(write_labels(tmp_path / "a.zip", [999, 3]))
    assert data.num_classes == 1000
    assert "998 of the 1000 classes" in said


@pytest.mark.parametrize("packed", ["new.zip", "new"])
def test_labels_from_one(tmp_path, packed):
    source = write_labels(tmp_path / "a.zip", [1, 3, 1])
    data, said = loaded(source)
    assert data.labels.tolist() == [1, 3, 1]
    assert "2 of the 4 classes" in said
    assert "(0, 2)" in said
    assert "--renumber" in said
    pack(source, tmp_path / packed, renumber=True, resolution=2)
    data, said = loaded(tmp_path / packed)
    assert (data.labels.tolist(), data.class_names, said) == ([0, 1, 0], ("1", "3"), "")


# ---- arrays -------------------------------------------------------------------------------------


def one_hot(labels, kind):
    return np.eye(max(labels) + 1, dtype=kind)[labels]


FORMS = {
    "int": lambda k: np.array(k, np.int32), "uint64": lambda k: np.array(k, np.uint64),
    "column": lambda k: np.array(k)[:, None], "float": lambda k: np.array(k, np.float32),
    "text": lambda k: np.array([str(x) for x in k]),
    "bytes": lambda k: np.array([str(x).encode() for x in k]),
    "whole floats as text": lambda k: np.array([f"{x}.0" for x in k]),
    "one-hot": lambda k: one_hot(k, np.float32), "one-hot bool": lambda k: one_hot(k, bool),
    "names": lambda k: np.array([f"class {x:03d}" for x in k]),
}  # fmt: skip


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.sampled_from(sorted(FORMS)))
@settings(deadline=None, max_examples=100)
def test_labels_in_any_form(tmp_path_factory, labels, form):
    source = tmp_path_factory.mktemp("set") / "a.npz"
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] + np.zeros((2, 2), np.uint8)
    np.savez(source, images=images, labels=FORMS[form](labels))
    found = classes_by_number(loaded(source)[0])
    assert [int(found[i].removeprefix("class ")) for i in range(len(labels))] == labels


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([0, 1, 0.5]), "first is 0.5 of image 2"),
        (np.array([0, np.nan, 1]), "first is nan of image 1"),
        (np.array([0, np.inf, 1]), "first is inf of image 1"),
        (np.array([0, 1, -1]), "first is -1 of image 2"),
        (np.array([[1, 0], [1, 1], [0, 1]]), "not one-hot, the first is [1 1] of image 1"),
        (np.array([[1, 0], [0, 1], [0, 0.5]]), "not one-hot"),
        (np.array(["1", "cat", "2"]), "<U3 [3]"),
        (np.array([1, 2]), "int64 [2]"),
        (np.zeros((3, 1, 1), int), "int64 [3, 1, 1]"),
    ],
)
def test_labels_that_mean_nothing(tmp_path, labels, words):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 2, 2), np.uint8), labels=labels)
    assert words in error_of(tmp_path / "a.npz")


VALUES = {
    "uint8": lambda x: x, "int64": lambda x: x.astype(np.int64),
    "float 0..255": lambda x: x.astype(np.float64),
    "0..1": lambda x: x.astype(np.float32) / 255, "0..1 fp64": lambda x: x / 255,
    "0..1 fp16": lambda x: (x / 255).astype(np.float16),
    "-1..1": lambda x: x.astype(np.float32) / np.float32(127.5) - 1,
    "0..1 widened": lambda x: (x.astype(np.float32) / 255).astype(np.float64),
    "16 bits": lambda x: x.astype(np.uint16) * 257,
}  # fmt: skip


@given(
    st.sampled_from(sorted(VALUES)), st.sampled_from([1, 3, 4]), st.booleans(), st.integers(5, 9),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_images_in_any_exact_form_are_those_bytes(
    tmp_path_factory, form, channels, first, size, seed
):
    source = tmp_path_factory.mktemp("set") / "a.npz"
    images = np.random.default_rng(seed).integers(0, 256, (3, size, size, channels), np.uint8)
    images.flat[:2] = 0, 255  # the whole range: a set that is dark all over says less about itself
    if channels == 4:
        images[..., 3] = 255
    given = VALUES[form](images)
    np.savez(source, images=given.transpose(0, 3, 1, 2) if first else given)
    data, said = loaded(source)
    np.testing.assert_array_equal(data.images, images[..., : 3 if channels == 4 else channels])
    assert ("are taken as" in said) == (form != "uint8" or first or channels == 4)


@pytest.mark.parametrize(
    ("array", "expected", "words"),
    [
        (
            np.linspace(0, 1, 12, dtype=np.float32),
            np.rint(np.linspace(0, 255, 12)),
            "0..1, rounded",
        ),
        (np.linspace(-1, 1, 12), np.rint(np.linspace(0, 255, 12)), "-1..1, rounded"),
        (np.linspace(0, 65535, 12).astype(np.uint16), None, "0..65535, rounded"),
    ],
)
def test_what_bytes_do_not_hold_is_rounded_by_pack_alone(tmp_path, array, expected, words):
    array = array.reshape(3, 2, 2)
    expected = np.rint(array / 257) if expected is None else expected.reshape(3, 2, 2)
    np.savez(tmp_path / "a.npz", images=array)
    assert "tcm-fast data pack SRC DST" in error_of(tmp_path / "a.npz")
    with pytest.warns(UserWarning, match=words):
        pack(tmp_path / "a.npz", tmp_path / "a.zip")
    np.testing.assert_array_equal(load_images(tmp_path / "a.zip").images[..., 0], expected)


@given(st.integers(0, 255), st.integers(0, 254))
@settings(deadline=None, max_examples=30)
def test_transparent_arrays_are_put_on_white_by_pack_alone(tmp_path_factory, value, alpha):
    root = tmp_path_factory.mktemp("set")
    images = np.full((1, 5, 5, 4), value, np.uint8)
    images[..., 3] = alpha
    np.savez(root / "a.npz", images=images)
    assert "transparency" in error_of(root / "a.npz")
    with pytest.warns(UserWarning, match="on white"):
        pack(root / "a.npz", root / "a.zip")
    expected = (value * alpha + 255 * (255 - alpha)) / 255
    assert np.abs(load_images(root / "a.zip").images - expected).max() <= 0.5


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
def test_splits_of_an_npz(tmp_path, names):
    arrays = {}
    for split, number in (("train", 1), ("test", 2)):
        arrays[names[0].format(split)] = np.full((2, 3, 3), number, np.uint8)
        arrays[names[1].format(split)] = np.array([[1], [0]])
    np.savez(tmp_path / "a.npz", **arrays)
    data, said = loaded(tmp_path / "a.npz")
    assert (data.images == 1).all()
    assert data.labels.tolist() == [1, 0]
    assert f"{tmp_path / 'a.npz'}:test is another split" in said
    assert (loaded(f"{tmp_path / 'a.npz'}:test")[0].images == 2).all()
    assert "no split 'val'" in error_of(f"{tmp_path / 'a.npz'}:val")


def test_arrays_that_are_not_read_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 3), np.uint8), targets=np.zeros(2, int))
    data, said = loaded(tmp_path / "a.npz")
    assert data.labels is None
    assert "not targets" in said


def test_lone_arrays_and_latents_are_told_what_to_do(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 3), np.uint8))
    assert "numpy.savez('set.npz', images=" in error_of(tmp_path / "a.npy")
    (tmp_path / "set").mkdir()
    (tmp_path / "a.npy").rename(tmp_path / "set/a.npy")
    assert "1 arrays (a.npy): put them together" in error_of(tmp_path / "set")
    files = {"00000/img-mean-std-00000000.npy": b"", "dataset.json": b'{"labels": null}'}
    assert "latents of EDM2's autoencoder" in error_of(write_zip(tmp_path / "a.zip", files))


# ---- parquet ------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([None, -1, 0, 1, 2]), min_size=1, max_size=9), st.integers(1, 3),
    st.sampled_from([int, str, float]), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_parquet_rows_keep_their_labels(tmp_path_factory, labels, parts, kind, skip):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path_factory.mktemp("set")
    if kind is not int:
        labels = [None if k == -1 else k for k in labels]
    unlabelled = [i for i, k in enumerate(labels) if k in (None, -1)]
    types_ = {int: pa.int64(), str: pa.string(), float: pa.float32()}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    where = {}
    for part, rows in enumerate(np.array_split(np.arange(len(labels)), parts)):
        values = [None if labels[i] is None else kind(labels[i]) for i in rows]
        images = pa.array([{"bytes": png(int(i)), "path": None} for i in rows], image)
        table = pa.table({"image": images, "label": pa.array(values, types_[kind])})
        pq.write_table(table, root / f"{part}.parquet")
        where |= {int(i): f"{part}.parquet row {row}" for row, i in enumerate(rows)}
    if unlabelled and len(unlabelled) < len(labels) and not skip:
        message = error_of(root)
        assert where[unlabelled[0]] in message
        assert "--skip-unlabelled" in message
        return
    expected = {i: str(k) for i, k in enumerate(labels) if i not in unlabelled}
    if not expected:
        expected = dict.fromkeys(range(len(labels)))
    assert classes_by_number(loaded(root, skip_unlabelled=skip)[0]) == expected


# ---- the commands --------------------------------------------------------------------------------


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return stop.value.code


def test_pack_prints_the_mapping(tmp_path, capsys):
    files = {f"{name}/a.png": png(i) for i, name in enumerate(("10", "9", "x"))}
    source = write_folder(tmp_path / "set", files | {"stray.png": png(7)})
    assert run("data", "pack", source, tmp_path / "a.zip", "--skip-unlabelled") == 0
    assert "3 classes: 0 9, 1 10, 2 x" in capsys.readouterr().out
    assert run("data", "info", tmp_path / "a.zip") == 0
    assert "0 9 (1), 1 10 (1), 2 x (1)" in capsys.readouterr().out
    assert run("data", "info", source, "--skip-unlabelled") == 0
    assert run("data", "pack", tmp_path / "a.zip", tmp_path / "b", "--renumber") == 2
    assert "--resolution" in capsys.readouterr().err


def test_an_interrupted_pack_does_not_go_on_with_other_files(tmp_path, monkeypatch):
    from tcm_fast.data import packed

    source = write_folder(
        tmp_path / "set", {f"{c}/{i}.png": png(i) for i in range(4) for c in "ab"[i % 2]}
    )
    monkeypatch.setattr(packed, "SLICE", 2)
    monkeypatch.setattr(packed, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "small", resolution=2)
    monkeypatch.undo()
    (source / "a/0.png").rename(source / "a/3.png")
    expected = classes_by_number(load_images(source))
    pack(source, tmp_path / "small", resolution=2)
    data = load_images(tmp_path / "small")
    np.testing.assert_array_equal(data.images, load_images(source).images)
    assert classes_by_number(data) == expected
