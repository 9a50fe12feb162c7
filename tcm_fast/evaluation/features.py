"""Feature spaces: what a Fréchet distance compares images by.

A small classifier for the built-in digits, trained on the spot; a network that the user brings as a
file; EfficientNet, whose weights a package brings; torch-fidelity's, Inception among them for numbers that
compare with published ones; random weights where there is nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from torch import nn

from tcm_fast.data.dataset import ImageData, load_images, split_halves
from tcm_fast.evaluation import pretrained

BATCH_PIXELS = 1 << 20  # pixels that go through a feature network at once

Images = np.ndarray | torch.Tensor


class FeatureSpace:
    """Images to feature vectors, and to confidences where there is a classifier.

    Args:
        name: what to call it in reports.
        network: uint8 [N,C,H,W] on `device` -> features [N,D], independent of the other images.
        channels: C that the network takes; grey images are repeated for a network that takes 3.
        resolution: H = W that it takes, None for any.
        classifier: features float64 [N,D] -> calibrated probabilities [N,K], if there is one.
        metrics: by name, besides those of `metrics.METRICS`.
    """

    def __init__(
        self,
        name: str,
        network: Callable[[torch.Tensor], torch.Tensor],
        *,
        channels: int = 3,
        resolution: int | None = None,
        classifier: Callable[[np.ndarray], np.ndarray] | None = None,
        device: str | torch.device = "cpu",
        metrics: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = MappingProxyType({}),
    ) -> None:
        self.name, self.network, self.classifier = name, network, classifier
        self.metrics = metrics
        self.channels, self.resolution = channels, resolution
        self.device = torch.device(device)

    def features(self, images: Images) -> np.ndarray:
        """Features float64 [N,D] of images uint8 [N,H,W,C].

        Raises:
            ValueError: images that the space does not take, or a network that gives no [N,D].
        """
        pixels = self._check(images)
        size = max(1, BATCH_PIXELS // pixels[0].numel())
        with torch.no_grad():
            return np.concatenate([self._features(batch) for batch in pixels.split(size)])

    def confidence(self, images: Images) -> np.ndarray | None:
        """Probability [N] of the most probable class; None for a space without a classifier."""
        if self.classifier is None:
            return None
        return self.classifier(self.features(images)).max(axis=1)

    def _check(self, images: Images) -> torch.Tensor:
        images = as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"features: images must be uint8 [N,H,W,C], got {str(images.dtype)[6:]} "
                f"{list(images.shape)}"
            )
        height, width, channels = images.shape[1:]
        fits = self.resolution is None or (height, width) == (self.resolution,) * 2
        if not fits or channels not in {1, self.channels}:
            size = "" if self.resolution is None else f"{self.resolution}x{self.resolution} "
            raise ValueError(
                f"features: {self.name} takes {size}images of {self.channels} channels, got "
                f"{width}x{height} with {channels}"
            )
        return images.permute(0, 3, 1, 2).expand(-1, self.channels, -1, -1)

    def _features(self, batch: torch.Tensor) -> np.ndarray:
        features = self.network(batch.contiguous().to(self.device))
        if (
            not isinstance(features, torch.Tensor)
            or features.ndim != 2
            or len(features) != len(batch)
        ):
            got = (
                list(features.shape)
                if isinstance(features, torch.Tensor)
                else type(features).__name__
            )
            raise ValueError(f"features: {self.name} must give [{len(batch)},D], got {got}")
        return features.double().cpu().numpy()


def feature_space(name: str, *, device: str | torch.device = "cpu") -> FeatureSpace:
    """The space that a configuration names.

    Args:
        name: `digits`, `random`, `efficientnet`, `inception:WEIGHTS` or another of `FEATURE_SPACES`; or a
            TorchScript file.

    Raises:
        ValueError, FileNotFoundError: there is no such space here; the message says why.
    """
    kind, colon, argument = name.partition(":")
    make = FEATURE_SPACES.get(kind + colon)
    return feature_space_from_file(name, device=device) if make is None else make(argument, device)


def feature_space_from_file(
    path: str | Path, *, device: str | torch.device = "cpu"
) -> FeatureSpace:
    """The space of a TorchScript module (`torch.jit.save`) that maps uint8 [N,3,H,W] to [N,D].

    TorchScript, since its loader runs no Python from the file; that of `torch.export` unpickles
    parts of it, which can run anything.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TorchScript module.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"features: {path} does not exist, expected digits, random, efficientnet, "
            "inception:WEIGHTS, dinov2:WEIGHTS or a TorchScript file"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"features: {path} must be a TorchScript module (torch.jit.save), got something else"
        ) from error

    def features(images: torch.Tensor) -> torch.Tensor:
        try:
            return network(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # TorchScript's traceback; its last line says what happened
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"features: {path} must take uint8 images {list(images.shape)}, got {reason}"
            ) from error

    network.eval()
    return FeatureSpace(path.name, features, device=device)


def efficientnet_feature_space(*, device: str | torch.device = "cpu") -> FeatureSpace:
    """1,280 features of a network trained on ImageNet, without a download (`pretrained.efficientnet`): they
    see compression, blur, noise and missing classes, which random weights do not. Its distances compare
    runs with each other, not with published ones.

    Raises:
        ValueError: its packages are not installed.
    """
    return FeatureSpace("efficientnet", pretrained.efficientnet(device), device=device)


def fidelity_feature_space(
    name: str, weights: str | Path, *, device: str | torch.device = "cpu"
) -> FeatureSpace:
    """Features of torch-fidelity (`pretrained.FIDELITY`): Inception's 2,048 of published Fréchet distances,
    CLIP's, VGG16's, DINOv2's; with its precision and recall.

    Args:
        name: inception, clip, vgg16 or dinov2.
        weights: their file, as `pretrained.fidelity` says.

    Raises:
        FileNotFoundError, ValueError: as of `pretrained.fidelity`.
    """
    network = pretrained.fidelity(name, weights, device)
    return FeatureSpace(name, network, device=device, metrics=pretrained.PRECISION_AND_RECALL)


def random_feature_space(seed: int = 0, *, device: str | torch.device = "cpu") -> FeatureSpace:
    """64 features of a fixed network with random weights: no download, any images of 8 pixels or
    more.

    Only for comparing runs with each other: it sees colours, textures and their coarse arrangement
    but no objects, and its distances compare with nothing that is published.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = (3, 32, 64, 64)
    convolutions = nn.Sequential(
        *(nn.utils.skip_init(nn.Conv2d, a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
    )
    mix = nn.utils.skip_init(nn.Linear, 4 * widths[-1], 64)
    _initialise([*convolutions, mix], generator)
    convolutions.to(device)
    mix.to(device)

    def network(images: torch.Tensor) -> torch.Tensor:
        if min(images.shape[2:]) < 8:
            raise ValueError(
                f"features: random needs images of 8 pixels or more, got {list(images.shape[2:])}"
            )
        x = to_float(images)
        for convolution in convolutions:
            x = F.avg_pool2d(F.relu(convolution(x)), 2)
        return mix(F.adaptive_avg_pool2d(x, 2).flatten(1))

    return FeatureSpace("random (compares runs only)", network, device=device)


def _initialise(layers: Iterable[nn.Module], generator: torch.Generator) -> None:
    """He initialisation from a generator, so that torch's global one does not move."""
    for layer in layers:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def as_tensor(images: Images) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        return images
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> fp32 in [-1,1]."""
    return images.to(torch.float32) / 127.5 - 1


# ---- the digits classifier ----------------------------------------------------------------------


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers for grey images of 8×8 pixels in [-1,1].

    `features` are the 48 activations before the last layer: few against the 898 images of a half,
    so that their covariance is well determined.
    """

    def __init__(
        self, generator: torch.Generator, *, width: int = 32, num_features: int = 48
    ) -> None:
        super().__init__()
        bare = functools.partial(nn.utils.skip_init, dtype=torch.float32)
        self.conv0 = bare(nn.Conv2d, 1, width, 3, padding=1)
        self.conv1 = bare(nn.Conv2d, width, width, 3, padding=1)
        self.conv2 = bare(nn.Conv2d, width, 2 * width, 3, padding=1)
        self.linear0 = bare(nn.Linear, 2 * width * 4, num_features)
        self.linear1 = bare(nn.Linear, num_features, 10)
        _initialise(list(self.children()), generator)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[N,1,8,8] -> [N,D]."""
        x = F.silu(self.conv1(F.silu(self.conv0(x))))
        x = F.silu(self.conv2(F.avg_pool2d(x, 2)))
        return F.silu(self.linear0(F.avg_pool2d(x, 2).flatten(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N,1,8,8] -> logits [N,10]."""
        return self.linear1(self.features(x))


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, so that sums have one order, and no autocast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


@_reproducible()
@torch.inference_mode(False)
@torch.enable_grad()
def train_digits_classifier(
    train: ImageData, *, epochs: int = 40, batch_size: int = 64, lr: float = 3e-3, seed: int = 0
) -> DigitsClassifier:
    """Train on digits [N,8,8,1], the same bit for bit whatever the threads and the global
    generators.

    Digits are slightly turned, sized, sheared and shifted. Every batch has half as many images that
    are no digits besides, whose target is "any class alike" (outlier exposure, Hendrycks et al.
    2019): a plain classifier is sure of its answer for noise too.
    """
    generator = torch.Generator().manual_seed(seed)
    net = DigitsClassifier(generator)
    images = to_float(torch.from_numpy(train.images).permute(0, 3, 1, 2).contiguous())
    labels = torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    batches = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / 50) * (1 + math.cos(math.pi * i / (epochs * batches))) / 2,
    )
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: batches * batch_size].split(batch_size):
            digits = _jitter(images[chosen], generator)
            others = _no_digits(images, batch_size // 2, generator)
            logits = net(torch.cat([digits, others]))
            loss = F.cross_entropy(logits[:batch_size], labels[chosen])
            loss = loss - 0.5 * F.log_softmax(logits[batch_size:], 1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def _jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn (±0.2 rad), size (±15 %), shear (±0.2) and shift (±1 pixel) each image at random."""
    uniform = torch.rand(5, len(images), generator=generator, dtype=torch.float32) * 2 - 1
    angle, size, shear = 0.2 * uniform[0], 1 + 0.15 * uniform[1], 0.2 * uniform[2]
    dx, dy = 0.25 * uniform[3:]
    cos, sin = size * torch.cos(angle), size * torch.sin(angle)
    rows = [torch.stack([cos, shear - sin, dx], -1), torch.stack([sin, cos, dy], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # black, -1, surrounds them


def _no_digits(images: torch.Tensor, num: int, generator: torch.Generator) -> torch.Tensor:
    """Half digits with their pixels shuffled, half Gaussian noise of any mean and a std up to
    1.2."""
    chosen = torch.randint(len(images), (num // 2,), generator=generator)
    pixels = images[chosen].flatten(1)
    keys = torch.rand(pixels.shape, generator=generator, dtype=torch.float32)
    shuffled = pixels.gather(1, keys.argsort(1)).view(-1, *images.shape[1:])
    rest = num - num // 2
    level = torch.rand(2, rest, 1, 1, 1, generator=generator, dtype=torch.float32)
    noise = torch.randn(rest, *images.shape[1:], generator=generator, dtype=torch.float32)
    return torch.cat([shuffled, (2 * level[0] - 1 + 1.2 * level[1] * noise).clamp(-1, 1)])


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Temperature whose softmax(logits / T) has the least cross-entropy (Guo et al. 2017).

    Args:
        logits: [N,K] of images that the classifier was not trained on.
        labels: int [N].
    """
    scores, targets = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(labels)

    def loss(log_t: float) -> float:
        return F.cross_entropy(scores / math.exp(log_t), targets).item()

    return math.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x)


@functools.cache
def digits_feature_space() -> FeatureSpace:
    """The space of the built-in digits; the first call trains its classifier, a few seconds.

    Trained on `digits:train`, its temperature fitted on `digits:test`. Features have a variance of
    1 on average over the 48 dimensions and `digits:train`.
    """
    train, test = split_halves(load_images("digits"))
    net = train_digits_classifier(train)

    def features(images: torch.Tensor) -> torch.Tensor:
        with _reproducible():
            return net.features(to_float(images))

    plain = FeatureSpace("digits", features, channels=1, resolution=8)
    scale = 1 / math.sqrt(plain.features(train.images).var(axis=0).mean())
    weight, bias = net.linear1.weight.double().numpy() / scale, net.linear1.bias.double().numpy()

    def logits(scaled: np.ndarray) -> np.ndarray:
        return scaled @ weight.T + bias

    assert test.labels is not None
    temperature = fit_temperature(logits(scale * plain.features(test.images)), test.labels)
    return FeatureSpace(
        "digits",
        lambda images: features(images).double() * scale,
        channels=1,
        resolution=8,
        classifier=lambda scaled: softmax(logits(scaled) / temperature, axis=1),
    )


def _fidelity(name: str, weights: str, device: str | torch.device) -> FeatureSpace:
    return fidelity_feature_space(name, weights, device=device)


FEATURE_SPACES: dict[str, Callable[[str, str | torch.device], FeatureSpace]] = {
    "digits": lambda _, device: digits_feature_space(),
    "random": lambda _, device: random_feature_space(device=device),
    "efficientnet": lambda _, device: efficientnet_feature_space(device=device),
    **{f"{name}:": functools.partial(_fidelity, name) for name in pretrained.FIDELITY},
}
"""By name, with a colon where an argument follows: that argument and a device -> a space."""
