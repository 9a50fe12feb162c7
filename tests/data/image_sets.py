"""Sets of images in every form, written by hand."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tcm_fast.data.dataset import ImageData, load_images


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


def numbered(count: int, labelled: bool = True, resolution: int = 2) -> ImageData:
    """Image i has the pixel (i//256, i%256, 255) at its upper left and is black elsewhere."""
    images = np.zeros((count, resolution, resolution, 3), np.uint8)
    number = np.arange(count)
    images[:, 0, 0, 0], images[:, 0, 0, 1], images[:, 0, 0, 2] = number // 256, number % 256, 255
    labels = number % 3 if labelled else None
    return ImageData(images, labels, "numbered", ("a", "b", "c") if labelled else ())


def corrupt_folder(root: Path, good: int = 3, bad: int = 5) -> Path:
    png = encode(random_images(1, 16)[0])
    jpeg = encode(random_images(1, 16)[0], "jpeg")
    damaged = [b"", b"not an image", png[: len(png) // 2], jpeg[: len(jpeg) // 2], png[:-40]][:bad]
    files = {f"c{i % 2}/bad{i}.png": content for i, content in enumerate(damaged)}
    files |= {f"c{i % 2}/ok{i}.png": png for i in range(good)}
    return write_folder(root, files)
