"""Feature spaces: the digits classifier's accuracy and calibration, spaces from files."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch

from tcm_fast.evaluation import features
from tcm_fast.evaluation.metrics import CONFIDENT, frechet_distance

SHAPE = (898, 8, 8, 1)


def to_uint8(x: np.ndarray) -> np.ndarray:
    return np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)


# ---- the digits classifier ----------------------------------------------------------------------


def test_digits_classifier_is_accurate_on_the_other_half(space, test):
    probabilities = space.classifier(space.features(test.images))
    assert probabilities.shape == (898, 10)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (probabilities.argmax(1) == test.labels).mean() >= 0.98  # required: 0.96


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015) over bins of equal width."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(
        (place == i).mean() * abs(confidence[place == i].mean() - correct[place == i].mean())
        for i in np.unique(place)
    )


def test_digits_confidences_are_calibrated(space, test):
    probabilities = space.classifier(space.features(test.images))
    correct = probabilities.argmax(1) == test.labels
    assert calibration_error(probabilities.max(1), correct) < 0.05
    # A temperature from one half of the test images serves the other half as well.
    logits = np.log(probabilities)
    temperature = features.fit_temperature(logits[::2], test.labels[::2])
    powered = probabilities[1::2] ** (1 / temperature)
    confidence = (powered / powered.sum(1, keepdims=True)).max(1)
    assert calibration_error(confidence, correct[1::2]) < 0.05


def test_fit_temperature_finds_the_temperature_of_the_labels():
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((20_000, 5)) * 2
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(1)  # drawn from softmax(logits)
    assert features.fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)


def noises(real: np.ndarray) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    normal = generator.standard_normal(SHAPE)
    return {
        "uniform": generator.integers(0, 256, SHAPE, dtype=np.uint8),
        "gaussian 0.5": to_uint8(0.5 * normal),
        "gaussian 1": to_uint8(normal),
        "binary": to_uint8(np.sign(normal)),
        "shuffled": generator.permuted(real.reshape(898, 64), axis=1).reshape(SHAPE),
        "flat": np.broadcast_to(
            np.arange(256, dtype=np.uint8)[:, None, None, None], (256, 8, 8, 1)
        ),
    }


def test_digits_are_recognised_and_noise_is_not(space, test):
    real = (space.confidence(test.images) >= CONFIDENT).mean()
    assert real >= 0.95
    for name, images in noises(test.images).items():
        assert (space.confidence(images) >= CONFIDENT).mean() <= 0.02, name


def test_digits_features_tell_damage_apart(space, train, test):
    """Distances rise with damage, from the real yardstick up; nothing is above noise by much."""
    features = space.features(test.images)
    assert features.shape == (898, 48)
    assert features.dtype == np.float64
    assert space.features(train.images).var(0).mean() == pytest.approx(1, rel=1e-3)
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    y = test.images / 127.5 - 1
    damaged = [to_uint8(y + size * noise) for size in (0.1, 0.2, 0.4, 0.8)]
    distances = [frechet_distance(space.features(x), features) for x in damaged]
    assert distances == sorted(distances)
    yardstick = frechet_distance(space.features(train.images), features)
    assert 0.1 < yardstick < 1 < distances[2]
    one_class = frechet_distance(space.features(test.images[test.labels == 3]), features)
    assert one_class > 20 * yardstick


def weights_of(train, **options) -> list[torch.Tensor]:
    return list(features.train_digits_classifier(train, epochs=1, **options).state_dict().values())


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_the_classifier_depends_on_nothing_but_its_seed(train):
    first = weights_of(train)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            second = weights_of(train)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(first, weights_of(train, seed=1))


# ---- feature spaces -----------------------------------------------------------------------------


class Halves(torch.nn.Module):
    """A feature network as users bring them: mean brightness of each channel, twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.float().mean((2, 3))
        return torch.cat([mean, mean], 1)


class Narrow(torch.nn.Module):
    """A network for images 7 pixels wide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ torch.zeros(7, 2)).mean((1, 2))


# feature_space_from_file says why TorchScript, though deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_space_from_a_torchscript_file(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH_PIXELS", 3 * 4 * 4 * 3)  # three images at a time
    torch.jit.script(Halves()).save(tmp_path / "halves.pt")
    space = features.feature_space(str(tmp_path / "halves.pt"))
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    expected = images.mean((1, 2))
    np.testing.assert_allclose(space.features(images), np.tile(expected, 2), rtol=1e-6)
    flipped = torch.from_numpy(images).flip(2).numpy()[:, ::-1]  # negative strides
    np.testing.assert_allclose(space.features(flipped), np.tile(expected, 2), rtol=1e-6)
    np.testing.assert_allclose(space.features(images[..., :1])[:, 2], expected[:, 0], rtol=1e-6)
    assert space.confidence(images) is None
    torch.jit.script(Narrow()).save(tmp_path / "narrow.pt")
    with pytest.raises(
        ValueError, match=r"take uint8 images \[3, 3, 4, 4\], got .*shape"
    ) as caught:
        features.feature_space_from_file(tmp_path / "narrow.pt").features(images)
    assert "\n" not in str(caught.value)


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran')",))


def test_files_that_are_no_feature_space(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist, expected digits, random"):
        features.feature_space(str(tmp_path / "missing.pt"))
    bad = tmp_path / "bad.pt"
    torch.save(Payload(), bad)
    with pytest.raises(ValueError, match="must be a TorchScript module"):
        features.feature_space(str(bad))
    for name in ("inception", "digits:test"):
        with pytest.raises(
            FileNotFoundError, match=f"{name} does not exist, expected digits, .* inception:"
        ):
            features.feature_space(name)
    with pytest.raises(FileNotFoundError, match="weights of inception are missing"):
        features.feature_space(f"inception:{tmp_path / 'missing.pth'}")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(ValueError, match=r"tcm-fast\[eval\]"):
        features.feature_space(f"inception:{bad}")


def test_inception_weights_are_read_without_running_them(tmp_path, monkeypatch):
    """With a stand-in of torch-fidelity, which unpickles whatever it is given."""

    class Extractor(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__()
            state = torch.load(feature_extractor_weights_path, weights_only=False)
            self.offset = torch.nn.Parameter(state["offset"])

        def forward(self, x):
            return (x.float().mean((2, 3)) + self.offset,)

    stub = types.SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", stub)
    torch.save({"offset": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "good.pth")
    space = features.feature_space(f"inception:{tmp_path / 'good.pth'}")
    np.testing.assert_allclose(space.features(np.zeros((2, 4, 4, 1), np.uint8)), [[1, 2, 3]] * 2)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="must hold the weights of inception"):
        features.feature_space(f"inception:{tmp_path / 'bad.pth'}")


def test_images_that_a_space_does_not_take(space):
    for images, message in [
        (np.zeros((2, 8, 8, 3), np.uint8), "digits takes 8x8 images of 1 channels, got 8x8 with 3"),
        (np.zeros((2, 16, 16, 1), np.uint8), "got 16x16 with 1"),
        (np.zeros((2, 8, 8, 1), np.float32), r"must be uint8 \[N,H,W,C\], got float32"),
        (np.zeros((0, 8, 8, 1), np.uint8), r"got uint8 \[0, 8, 8, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            space.features(images)
    flat = features.FeatureSpace("flat", lambda x: x.float().mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"flat must give \[2,D\], got \[2\]"):
        flat.features(np.zeros((2, 8, 8, 3), np.uint8))


def test_random_space_ranks_damage_and_repeats_itself(train, test):
    space, again = features.random_feature_space(), features.random_feature_space()
    found = space.features(test.images)
    assert found.shape == (898, 64)
    np.testing.assert_array_equal(found, again.features(test.images))
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    damaged = [to_uint8(test.images / 127.5 - 1 + size * noise) for size in (0.2, 0.5, 1)]
    sides = [train.images, *damaged]
    distances = [frechet_distance(space.features(x), found) for x in sides]
    assert distances == sorted(distances)


def test_the_random_space_needs_eight_pixels():
    with pytest.raises(ValueError, match=r"features: random needs images of 8 pixels or more, got"):
        features.random_feature_space().features(np.zeros((2, 4, 4, 1), np.uint8))
