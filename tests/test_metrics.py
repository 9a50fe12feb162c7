"""Fréchet distances against closed forms; the digits classifier against what reports rely on."""

import dataclasses
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from tcm_fast import metrics
from tcm_fast.data import load_images
from tcm_fast.metrics import FeatureSpace, evaluate, frechet_distance, nearest_distances
from tcm_fast.networks import build_network

SHAPE = (898, 8, 8, 1)


def to_uint8(x: np.ndarray) -> np.ndarray:
    return np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def train():
    return load_images("digits:train")


@pytest.fixture(scope="module")
def test():
    return load_images("digits:test")


@pytest.fixture(scope="module")
def space():
    return metrics.digits_feature_space()


# ---- Fréchet distance ---------------------------------------------------------------------------

sets = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 12), st.floats(1e-3, 1e3)
)


def draw(seed: int, num: int, dim: int, size: float) -> np.ndarray:
    """Features with strongly unequal variances; of fewer rows than columns the covariance is
    singular."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((dim, dim)) * np.logspace(-4, 0, dim)
    return size * (generator.standard_normal((num, dim)) @ mixing + generator.standard_normal(dim))


@given(sets)
def test_a_set_is_at_distance_zero_from_itself(drawn):
    a = draw(*drawn)
    assert frechet_distance(a, a[::-1]) <= 1e-11 * (np.square(a).sum() + 1)


@given(sets, st.integers(2, 40), st.floats(-10, 10))
def test_frechet_is_symmetric_and_ignores_rotations(drawn, num_b, shift):
    seed, num, dim, size = drawn
    a, b = draw(seed, num, dim, size), draw(seed + 1, num_b, dim, size) + shift
    distance = frechet_distance(a, b)
    assert distance >= 0
    scale = np.square(a).mean(0).sum() + np.square(b).mean(0).sum() + 1
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9, abs=1e-11 * scale)
    turn = ortho_group.rvs(dim, random_state=seed % 1000) if dim > 1 else -np.eye(1)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(
        distance, rel=1e-7, abs=1e-7 * scale
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 10), st.floats(0.01, 100), st.floats(-50, 50))
def test_frechet_of_scaled_and_shifted_sets_has_a_closed_form(seed, dim, factor, shift):
    """S_b = factor² S_a commutes with S_a: the distance is |shift of the mean|² + (factor-1)² tr
    S."""
    a = draw(seed, 40, dim, 1.0)
    centred = a - a.mean(0)
    expected = dim * shift**2 + (factor - 1) ** 2 * centred.var(0, ddof=1).sum()
    got = frechet_distance(centred, factor * centred + shift)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9 * (1 + factor**2))


def test_frechet_agrees_with_the_general_formula():
    a, b = draw(1, 500, 6, 1.0), draw(2, 400, 6, 1.0)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((1, 3)), np.ones((5, 3)), r"N of at least 2, got \[1, 3\]"),
        (np.ones(4), np.ones((5, 3)), r"must be \[N,D\]"),
        (np.ones((5, 3)), np.ones((5, 4)), "D=3 and D=4"),
        (np.ones((5, 3)), np.full((5, 3), np.nan), "must be finite, got 5 of 5"),
        (np.array([[1.0], [np.inf]]), np.ones((5, 1)), "must be finite, got 1 of 2"),
    ],
)
def test_frechet_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


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
    temperature = metrics.fit_temperature(logits[::2], test.labels[::2])
    powered = probabilities[1::2] ** (1 / temperature)
    confidence = (powered / powered.sum(1, keepdims=True)).max(1)
    assert calibration_error(confidence, correct[1::2]) < 0.05


def test_fit_temperature_finds_the_temperature_of_the_labels():
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((20_000, 5)) * 2
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(1)  # drawn from softmax(logits)
    assert metrics.fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)


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
    real = (space.confidence(test.images) >= metrics.CONFIDENT).mean()
    assert real >= 0.95
    for name, images in noises(test.images).items():
        assert (space.confidence(images) >= metrics.CONFIDENT).mean() <= 0.02, name


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
    return list(metrics.train_digits_classifier(train, epochs=1, **options).state_dict().values())


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
    monkeypatch.setattr(metrics, "BATCH_PIXELS", 3 * 4 * 4 * 3)  # three images at a time
    torch.jit.script(Halves()).save(tmp_path / "halves.pt")
    space = metrics.feature_space(str(tmp_path / "halves.pt"))
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
        metrics.feature_space_from_file(tmp_path / "narrow.pt").features(images)
    assert "\n" not in str(caught.value)


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran')",))


def test_files_that_are_no_feature_space(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist, expected digits, random"):
        metrics.feature_space(str(tmp_path / "missing.pt"))
    bad = tmp_path / "bad.pt"
    torch.save(Payload(), bad)
    with pytest.raises(ValueError, match="must be a TorchScript module"):
        metrics.feature_space(str(bad))
    with pytest.raises(ValueError, match="inception needs a file of weights"):
        metrics.feature_space("inception")
    with pytest.raises(FileNotFoundError, match="weights of inception are missing"):
        metrics.feature_space(f"inception:{tmp_path / 'missing.pth'}")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(ValueError, match=r"tcm-fast\[eval\]"):
        metrics.feature_space(f"inception:{bad}")


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
    space = metrics.feature_space(f"inception:{tmp_path / 'good.pth'}")
    np.testing.assert_allclose(space.features(np.zeros((2, 4, 4, 1), np.uint8)), [[1, 2, 3]] * 2)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="must hold the weights of inception"):
        metrics.feature_space(f"inception:{tmp_path / 'bad.pth'}")


def test_images_that_a_space_does_not_take(space):
    for images, message in [
        (np.zeros((2, 8, 8, 3), np.uint8), "digits takes 8x8 images of 1 channels, got 8x8 with 3"),
        (np.zeros((2, 16, 16, 1), np.uint8), "got 16x16 with 1"),
        (np.zeros((2, 8, 8, 1), np.float32), r"must be uint8 \[N,H,W,C\], got float32"),
        (np.zeros((0, 8, 8, 1), np.uint8), r"got uint8 \[0, 8, 8, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            space.features(images)
    flat = FeatureSpace("flat", lambda x: x.float().mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"flat must give \[2,D\], got \[2\]"):
        flat.features(np.zeros((2, 8, 8, 3), np.uint8))


def test_random_space_ranks_damage_and_repeats_itself(train, test):
    space, again = metrics.random_feature_space(), metrics.random_feature_space()
    features = space.features(test.images)
    assert features.shape == (898, 64)
    np.testing.assert_array_equal(features, again.features(test.images))
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    damaged = [to_uint8(test.images / 127.5 - 1 + size * noise) for size in (0.2, 0.5, 1)]
    sides = [train.images, *damaged]
    distances = [frechet_distance(space.features(x), features) for x in sides]
    assert distances == sorted(distances)


# ---- memorising ---------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(3, 30), st.integers(0, 400))
def test_nearest_distances_are_those_of_all_pairs(seed, num, num_train, pairs):
    generator = np.random.default_rng(seed)
    train = generator.integers(0, 256, (num_train, 3, 3, 1), dtype=np.uint8)
    images = generator.integers(0, 256, (num, 3, 3, 1), dtype=np.uint8)
    images[0] = train[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PAIRS_AT_ONCE", pairs)  # cuts both sides into blocks
        got = nearest_distances(images, train, num=3)
    y, x = (a.reshape(len(a), -1) / 127.5 for a in (train, images))
    expected = np.sort(np.linalg.norm(x[:, None] - y[None], axis=2), axis=1)[:, :3]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got[0, 0] == 0


def test_nearest_distances_refuse_other_shapes(train):
    with pytest.raises(ValueError, match="at least 2 training images of the same size"):
        nearest_distances(np.zeros((2, 4, 4, 1), np.uint8), train.images)
    with pytest.raises(ValueError, match="at least 2"):
        nearest_distances(train.images, train.images[:1])


# ---- reports ------------------------------------------------------------------------------------


def noisy(images: np.ndarray, size: float) -> np.ndarray:
    return to_uint8(images / 127.5 - 1 + size * np.random.default_rng(0).standard_normal(SHAPE))


def test_report_of_real_images(space, train, test):
    report = evaluate(test.images, train, space)
    assert report.space == "digits"
    assert report.num == report.num_real == 898
    assert report.frechet < 1e-9  # the very images it compares with
    assert report.frechet_real == pytest.approx(
        frechet_distance(space.features(train.images[:898]), space.features(test.images)), rel=0.1
    )
    assert report.confident == report.confident_real >= 0.95
    assert report.confident_noise <= 0.1 * report.confident_real
    assert report.memorised == pytest.approx(0.01, abs=0.002)
    assert report.copied == report.copied_real == 0
    assert report.nearest == report.nearest_real > report.nearest_1st == report.nearest_1st_real > 0
    assert evaluate(torch.from_numpy(test.images), train, space, held_out=test) == report
    assert all(isinstance(v, (str, int, float)) for v in dataclasses.asdict(report).values())


def test_report_flags_copies(space, train, test):
    """The Fréchet distance is blind to copies, even pleased with them; the distances are not."""
    report = evaluate(noisy(train.images[:898], 0.02), train, space)
    assert report.frechet < report.frechet_real
    assert report.memorised > 0.99
    assert report.copied > 0.99
    mixture = np.concatenate([noisy(train.images[:898], 0.02)[:90], test.images[90:]])
    report = evaluate(mixture, train, space)
    assert report.memorised == pytest.approx(0.11, abs=0.01)
    assert report.copied == pytest.approx(0.1, abs=0.005)


def test_report_of_noise(space, train):
    noise = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    report = evaluate(noise, train, space)
    assert report.frechet > 100 * report.frechet_real
    assert report.confident <= 0.1 * report.confident_real
    assert report.memorised == report.copied == 0


def test_report_without_held_out_images(train, test):
    """Samples against the training set; its own images' nearest neighbours leave themselves out."""
    train = dataclasses.replace(train, name="mine")
    report = evaluate(test.images[:200], train, metrics.random_feature_space())
    assert (report.num, report.num_real) == (200, 200)
    assert 0.3 < report.frechet / report.frechet_real < 3
    assert report.confident is report.confident_real is report.confident_noise is None
    assert report.nearest == pytest.approx(report.nearest_real, rel=0.1)
    assert report.memorised < 0.05
    assert report.copied_real == 0


def test_evaluate_refuses(space, train):
    for samples in (np.zeros((5, 4, 4, 1), np.uint8), np.zeros((1, 8, 8, 1), np.uint8)):
        with pytest.raises(ValueError, match="samples must be two or more of the shape"):
            evaluate(samples, train, space)
    other = dataclasses.replace(train, images=np.zeros((899, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="held-out images must be"):
        evaluate(train.images, train, space, held_out=other)


def test_evaluate_network(space, train):
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    report = metrics.evaluate_network(net, train, space, steps=1, num=40)
    assert report.num == report.num_real == 40
    assert report == metrics.evaluate_network(net, train, space, steps=1, num=40)
    assert report.confident < 0.5


def test_spread_sees_a_collapse(train):
    spread = metrics.spread(train.images)
    expected = np.sqrt((train.images / 127.5).var(0).mean())
    assert spread == pytest.approx(expected, rel=1e-5)
    collapsed = noisy(np.repeat(train.images[:1], 898, 0), 0.02)
    assert metrics.spread(torch.from_numpy(collapsed)) < 0.1 * spread
