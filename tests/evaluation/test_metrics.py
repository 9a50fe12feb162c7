"""Fréchet distances against closed forms; the digits classifier against what reports rely on."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from tcm_fast.checkpoint.format import save_network
from tcm_fast.cli.main import main
from tcm_fast.evaluation import features, metrics
from tcm_fast.evaluation.features import FeatureSpace
from tcm_fast.evaluation.metrics import (
    evaluate,
    frechet_distance,
    kernel_distance,
    nearest_distances,
)
from tcm_fast.networks import build_network

SHAPE = (898, 8, 8, 1)


def to_uint8(x: np.ndarray) -> np.ndarray:
    return np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)


# ---- kernel distance ----------------------------------------------------------------------------


def test_kernel_distance_is_the_formula(monkeypatch):
    monkeypatch.setattr(metrics, "PAIRS_AT_ONCE", 64)  # in several blocks
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((9, 4)), generator.standard_normal((7, 4)) + 0.5

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    within = [
        np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
        for x in (a, b)
    ]
    expected = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected)
    assert kernel_distance(b, a) == pytest.approx(expected)


def test_kernel_distance_is_right_on_average_for_small_sets():
    """For N(0, 1) and N(1, 1) in one dimension: E (ab+1)³ over independent pairs, by its moments."""
    generator = np.random.default_rng(1)
    draws = generator.standard_normal((4000, 2, 5, 1)) + np.array([0, 1]).reshape(1, 2, 1, 1)
    # E[a³]E[b³] + 3 E[a²]E[b²] + 3 E[a]E[b] + 1 with moments 0, 1, 0 of one and 1, 2, 4 of the other
    expected = (3 + 1) + (16 + 12 + 3 + 1) - 2 * (0 + 6 + 0 + 1)
    found = [kernel_distance(a, b) for a, b in draws]
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / np.sqrt(len(found))
    same = [kernel_distance(a, b) for a, b in draws[:, :1].reshape(2000, 2, 5, 1)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0


def test_kernel_distance_in_parts(monkeypatch):
    """As unbiased as whole; the parts only leave out pairs."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((60, 4)), generator.standard_normal((41, 4)) + 0.5
    assert metrics.kernel_distance_in_parts(a, b) == kernel_distance(a, b)
    monkeypatch.setattr(metrics, "MANY", 25)
    expected = (kernel_distance(a[:30], b[:21]) + kernel_distance(a[30:], b[21:])) / 2
    assert metrics.kernel_distance_in_parts(a, b) == pytest.approx(expected)
    assert metrics.kernel_distance_in_parts(a, b[:9]) == kernel_distance(a, b[:9])


def test_the_kernel_distance_decides_below_5000_images():
    assert metrics.decisive(4999) == metrics.KERNEL
    assert metrics.decisive(5000) == metrics.FRECHET


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((4, 3)), r"\[N,D\] with N of at least 2, got \[1, 3\]"),
        (np.zeros((4, 3)), np.zeros((4, 2)), "of one dimension, got D=3 and D=2"),
        (np.zeros((4, 3)), np.full((4, 3), np.nan), "must be finite, got 4 of 4 rows"),
    ],
)
def test_kernel_distance_refuses(a, b, message):
    with pytest.raises(ValueError, match=f"kernel_distance: .*{message}"):
        kernel_distance(a, b)


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


@pytest.mark.parametrize("num", [(500, 400), (9, 400), (5, 4)])
def test_frechet_agrees_with_the_general_formula(num):
    a, b = draw(1, num[0], 6, 1.0), draw(2, num[1], 6, 1.0)
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


def test_more_samples_than_images_all_count(space, train, test):
    doubled = np.concatenate([test.images, noisy(test.images, 1.0)])
    report = evaluate(doubled, train, space)
    assert (report.num, report.num_reference, report.num_real) == (1796, 898, 898)
    found = space.features(doubled)
    assert report.frechet == pytest.approx(frechet_distance(found, space.features(test.images)))
    assert report.metrics_real == evaluate(test.images, train, space).metrics_real


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
    report = evaluate(test.images[:200], train, features.random_feature_space())
    assert (report.num, report.num_real) == (200, 200)
    assert 0.3 < report.frechet / report.frechet_real < 3
    assert report.confident is report.confident_real is report.confident_noise is None
    assert report.nearest == pytest.approx(report.nearest_real, rel=0.1)
    assert report.memorised < 0.05
    assert report.copied_real == 0


def test_a_metric_and_a_feature_space_from_outside(train, test, tmp_path, monkeypatch, capsys):
    """Two lines: evaluated for samples and real images, a row of `tcm-fast eval`."""

    def brightness(argument, device):
        def features(images):
            return images.float().flatten(1).mean(1, keepdim=True) * float(argument)

        return FeatureSpace("brightness", features, channels=1, device=device)

    def shift(samples, real):
        return float(samples.mean() - real.mean())

    monkeypatch.setitem(features.FEATURE_SPACES, "brightness:", brightness)
    monkeypatch.setitem(metrics.METRICS, "shift", shift)
    space = features.feature_space("brightness:2")
    report = evaluate(test.images // 2, train, space)
    halved, whole = (2 * x.mean() for x in (test.images // 2, test.images))
    assert report.metrics["shift"] == pytest.approx(halved - whole, rel=1e-5)
    assert set(report.metrics) == {metrics.FRECHET, metrics.KERNEL, "shift"}
    assert set(report.metrics_real) == {*report.metrics}
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    save_network(tmp_path / "net.safetensors", net, metadata={"phase": "ect", "t_prime": None})
    arguments = ["--data", "digits:train", "--features", "brightness:2", "--num", "8"]
    with pytest.raises(SystemExit) as end:
        main(["eval", str(tmp_path / "net.safetensors"), *arguments, "--device", "cpu"])
    assert end.value.code == 0
    assert re.search(r"shift .*\d", capsys.readouterr().out)


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
    assert report.num == report.num_reference == report.num_real == 40
    assert report == metrics.evaluate_network(net, train, space, steps=1, num=40)
    assert report.confident < 0.5
    with pytest.raises(ValueError, match="precision"):  # which is handed on
        metrics.evaluate_network(net, train, space, num=40, precision="fp8")


def test_spread_sees_a_collapse(train):
    spread = metrics.spread(train.images)
    expected = np.sqrt((train.images / 127.5).var(0).mean())
    assert spread == pytest.approx(expected, rel=1e-5)
    collapsed = noisy(np.repeat(train.images[:1], 898, 0), 0.02)
    assert metrics.spread(torch.from_numpy(collapsed)) < 0.1 * spread
