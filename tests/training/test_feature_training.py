"""The feature network's training: it learns strengths of distortions, repeats itself, refuses mistakes."""

import math

import numpy as np
import pytest
import torch

from tcm_fast.data.augment import STRENGTHS
from tcm_fast.data.dataset import ImageData
from tcm_fast.objectives.manifold import read_features
from tcm_fast.training.feature_training import train_features


def blobs(count, channels=1, size=8):
    """Smooth spots at random places on a dark ground."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] + 0.5
    places = rng.uniform(0.3 * size, 0.7 * size, (2, count, 1, 1))
    spots = np.exp(-((x - places[0]) ** 2 + (y - places[1]) ** 2) / (size / 4) ** 2)
    colours = rng.uniform(0.9, 1, (count, 1, 1, channels))
    images = (255 * (0.1 + 0.8 * spots[..., None] * colours)).astype(np.uint8)
    return ImageData(images, None, "blobs")


def test_it_learns_brightness_and_noise(tmp_path):
    file = tmp_path / "features.safetensors"
    data = blobs(400)
    explained = train_features(data, file, images=12_800, batch_size=32, width=16, lr=5e-3)
    assert tuple(explained) == STRENGTHS[:-2]
    assert explained["brightness"] > 0.5
    assert explained["noise"] > 0.5
    assert max(explained.values()) < 1
    net, about = read_features(file, "features")
    assert about["explained"] == explained
    assert (about["seed"], about["images"], about["data"]) == (0, 12_800, "blobs")
    images = torch.from_numpy(data.images[:50]).permute(0, 3, 1, 2) / 127.5 - 1
    for layer in net.features(images):
        assert 0.3 < layer.square().sum((1, 2, 3)).mean() < 3


def test_a_seed_gives_a_file(tmp_path):
    data, saved = blobs(30, channels=3), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        with torch.random.fork_rng():
            torch.manual_seed(len(saved))
            before = torch.get_rng_state()
            train_features(data, tmp_path / name, images=320, batch_size=32, width=2, seed=seed)
            assert torch.equal(torch.get_rng_state(), before)
        saved.append((tmp_path / name).read_bytes())
    assert saved[0] == saved[1] != saved[2]
    about = read_features(tmp_path / "a", "features")[1]
    assert tuple(about["explained"]) == STRENGTHS
    assert all(math.isfinite(value) for value in about["explained"].values())


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (blobs(19), {}, "needs 20 images or more, got 19"),
        (blobs(20, size=3), {}, "images must have 4 pixels or more, got 3"),
        (blobs(20), {"images": 0}, "images must be at least 1, got 0"),
        (blobs(20), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (blobs(20), {"width": 0}, "width must be at least 1, got 0"),
        (blobs(20), {"lr": 0.0}, r"lr must be positive, got 0\.0"),
        (blobs(20), {"seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
    ],
)
def test_mistakes(data, changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^features: {message}"):
        train_features(data, tmp_path / "features.safetensors", **changes)
    assert not list(tmp_path.iterdir())
