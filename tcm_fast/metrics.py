"""How good samples are: Fréchet distances, recognisable samples, memorised samples.

A Fréchet distance compares two sets of images by the mean and covariance of their features. Which
features is a `FeatureSpace`'s business: a small classifier for the built-in digits, trained on the
spot; a network that the user brings as a file; Inception for numbers that compare with published
ones. Every number comes beside a yardstick, the same number for real images, since its absolute
value says little: a Fréchet distance of finite sets is biased upwards by an amount that grows as
the sets shrink (Chong & Forsyth 2020), so both sides always have equally many images.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from torch import nn

from tcm_fast.data import ImageData, load_images, split_halves
from tcm_fast.networks.precond import Precond
from tcm_fast.sampler import sample

CONFIDENT = 0.9  # calibrated probability from which a sample counts as recognised
COPY_RATIO = 1 / 3  # nearest over second-nearest distance below which a sample counts as a copy
NEAREST_NUM = 2048  # images whose nearest neighbours are looked for: enough for a 1st percentile
SPREAD_NUM = 4096  # images that `spread` looks at
PAIRS_AT_ONCE = 1 << 25  # distances in memory, 128 MiB of them
BATCH_PIXELS = 1 << 20  # pixels that go through a feature network at once

Images = np.ndarray | torch.Tensor


# ---- Fréchet distance ---------------------------------------------------------------------------


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians that fit two sets of features (Dowson & Landau 1982; as a
    measure of samples Heusel et al. 2017), in float64:

        |mu_a - mu_b|² + tr(S_a) + tr(S_b) - 2 tr((S_a^½ S_b S_a^½)^½)

    The last trace is taken as the sum of the singular values of S_a^½ S_b^½, which is the same and
    does not square the condition number; singular covariances (N <= D) are no difficulty.

    Args:
        features_a, features_b: [N,D] and [M,D], N and M at least 2.

    Raises:
        ValueError: shapes that do not fit, or features that are not finite.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments(features_a), _moments(features_b)
    if len(mean_a) != len(mean_b):
        raise ValueError(
            "frechet_distance: both sets need features of one dimension, got "
            f"D={len(mean_a)} and D={len(mean_b)}"
        )
    overlap = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return max(float(distance), 0.0)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D,D]."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
        raise ValueError(
            "frechet_distance: features must be [N,D] with N of at least 2, got "
            f"{list(features.shape)}"
        )
    if not np.isfinite(features).all():
        bad = (~np.isfinite(features)).any(axis=1).sum()
        raise ValueError(
            f"frechet_distance: features must be finite, got {bad} of "
            f"{len(features)} rows that are not"
        )
    return features.mean(0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:])


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


# ---- feature spaces -----------------------------------------------------------------------------


class FeatureSpace:
    """Images to feature vectors, and to confidences where there is a classifier.

    Args:
        name: what to call it in reports.
        network: uint8 [N,C,H,W] on `device` -> features [N,D], independent of the other images.
        channels: C that the network takes; grey images are repeated for a network that takes 3.
        resolution: H = W that it takes, None for any.
        classifier: features float64 [N,D] -> calibrated probabilities [N,K], if there is one.
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
    ) -> None:
        self.name, self.network, self.classifier = name, network, classifier
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
        images = _as_tensor(images)
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
        name: `digits`; `random`; `inception:WEIGHTS`; or a TorchScript file.

    Raises:
        ValueError, FileNotFoundError: there is no such space here; the message says why.
    """
    kind, _, path = name.partition(":")
    if name == "digits":
        return digits_feature_space()
    if name == "random":
        return random_feature_space(device=device)
    if kind == "inception":
        if not path:
            raise ValueError(
                "features: inception needs a file of weights, inception:FILE, got none "
                "(torch-fidelity's is weights-inception-2015-12-05-6726825d.pth)"
            )
        return inception_feature_space(path, device=device)
    return feature_space_from_file(name, device=device)


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
            f"features: {path} does not exist, expected digits, random, inception:WEIGHTS or a "
            "TorchScript file"
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


def inception_feature_space(
    weights: str | Path, *, device: str | torch.device = "cpu"
) -> FeatureSpace:
    """Inception's 2048 pooled features, those of published Fréchet distances, by torch-fidelity.

    Args:
        weights: torch-fidelity's weights as `.pth` (read without unpickling objects) or
            safetensors.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the file holds other weights, or torch-fidelity is not installed.
    """
    weights = Path(weights)
    if not weights.is_file():
        raise FileNotFoundError(f"features: the weights of inception are missing, got {weights}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(
            "features: inception needs torch-fidelity, install it with pip install 'tcm-fast[eval]'"
        ) from None
    try:
        if weights.suffix == ".safetensors":
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity unpickles what it is given, so it is given only what has passed above.
        checked = io.BytesIO()
        torch.save(state, checked)
        checked.seek(0)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=checked
        ).to(device)
    except Exception as error:  # the unpickler and load_state_dict raise nearly anything
        raise ValueError(
            f"features: {weights} must hold the weights of inception, got others"
        ) from error
    return FeatureSpace("inception", lambda images: network(images)[0], device=device)


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
        x = _to_float(images)
        for convolution in convolutions:
            x = F.avg_pool2d(F.relu(convolution(x)), 2)
        return mix(F.adaptive_avg_pool2d(x, 2).flatten(1))

    return FeatureSpace("random (compares runs only)", network, device=device)


def _initialise(layers: Iterable[nn.Module], generator: torch.Generator) -> None:
    """He initialisation from a generator of one's own: the global one is nobody's to draw from."""
    for layer in layers:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def _as_tensor(images: Images) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        return images
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def _to_float(images: torch.Tensor) -> torch.Tensor:
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
    images = _to_float(torch.from_numpy(train.images).permute(0, 3, 1, 2).contiguous())
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
            return net.features(_to_float(images))

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


# ---- memorising ---------------------------------------------------------------------------------


def nearest_distances(
    images: Images, train: Images, *, num: int = 2, device: str | torch.device = "cpu"
) -> np.ndarray:
    """Distances float64 [N,num] from each image to its nearest training images, nearest first.

    Euclidean, over the pixels in [-1,1]. A few more candidates than asked for are looked up with
    matrix products; their distances are then taken from the pixels, so that a copy is at exactly 0.

    Args:
        images, train: uint8 [N,H,W,C] and [M,H,W,C], M at least `num`.
    """
    queries, keys = (_as_tensor(x).flatten(1) for x in (images, train))
    if queries.shape[1] != keys.shape[1] or len(keys) < num:
        raise ValueError(
            f"nearest_distances: needs at least {num} training images of the same size, got "
            f"{list(train.shape)} for {list(images.shape)}"
        )
    candidates = min(num + 6, len(keys))
    rows = max(1, min(len(queries), PAIRS_AT_ONCE // keys.shape[1]))
    columns = max(candidates, PAIRS_AT_ONCE // max(rows, keys.shape[1]))
    found = []
    for block in queries.split(rows):
        index = _nearest(block, keys, candidates, columns, device).cpu()
        offsets = [(keys[column].float() - block.float()).double() for column in index.T]
        exact = torch.stack([x.norm(dim=1) for x in offsets], 1) / 127.5
        found.append(exact.sort(dim=1).values[:, :num])
    return torch.cat(found).numpy()


def _nearest(
    queries: torch.Tensor, keys: torch.Tensor, num: int, columns: int, device: str | torch.device
) -> torch.Tensor:
    """Numbers [n,num] of the training images nearest to some rows; `columns` are compared at once."""
    x = _to_float(queries.to(device))
    best = torch.empty(len(x), 0, device=device)
    index = torch.empty(len(x), 0, dtype=torch.int64, device=device)
    for start in range(0, len(keys), columns):
        y = _to_float(keys[start : start + columns].to(device))
        squared = y.square().sum(1) - 2 * (x @ y.T)  # less |x|², the same for a whole row
        number = torch.arange(start, start + len(y), device=device).expand(len(x), -1)
        best, index = torch.cat([best, squared], 1), torch.cat([index, number], 1)
        best, place = best.topk(num, dim=1, largest=False)
        index = index.gather(1, place)
    return index


# ---- reports ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `evaluate` finds; `_real` is the same number for real images, the yardstick.

    Confidences are None in a space without a classifier.
    """

    space: str
    num: int
    """Samples, and images they are compared with."""
    frechet: float
    num_real: int
    """Images on either side of `frechet_real`."""
    frechet_real: float
    """Half of the real images against the other half."""
    confident: float | None
    """Share of samples whose class has a probability of at least 0.9."""
    confident_real: float | None
    confident_noise: float | None
    """The same for images of uniform noise."""
    nearest: float
    """Median distance to the nearest training image, over pixels in [-1,1]."""
    nearest_real: float
    nearest_1st: float
    """First percentile of that distance."""
    nearest_1st_real: float
    memorised: float
    """Share of samples nearer to a training image than `nearest_1st_real`; 0.01 is what chance
    gives."""
    copied: float
    """Share of samples three times nearer to one training image than to any other: copies of it,
    however smooth the samples are (Yoon et al. 2023)."""
    copied_real: float


def evaluate(
    samples: Images,
    train: ImageData,
    space: FeatureSpace,
    *,
    held_out: ImageData | None = None,
) -> Report:
    """Judge samples against the images that their network was trained on, and images held out from
    it.

    With held-out images (those of `digits:train` are `digits:test`, and need not be given) samples
    are compared with these, and so is the training set, which is the yardstick of every number.
    Without, they are compared with the training set itself, as for published numbers;
    `frechet_real` is then that of its two halves, and a real image's nearest training image the
    nearest other one.

    Args:
        samples: uint8 [N,H,W,C], N at least 2.
        train: the training set.
        space: where Fréchet distance and confidence come from.
        held_out: images of the same kind that were not trained on.

    Raises:
        ValueError: images that do not fit together or that the space does not take, too few of
            them.
    """
    samples = _as_tensor(samples).cpu().numpy()
    held_out = held_out or _held_out_digits(train)
    sets = {"samples": samples} | ({} if held_out is None else {"held-out images": held_out.images})
    for name, images in sets.items():
        if images.shape[1:] != train.images.shape[1:] or len(images) < 2:
            raise ValueError(
                f"evaluate: {name} must be two or more of the shape of the training images, "
                f"{list(train.images.shape[1:])}, got {list(images.shape)}"
            )
    real = _judge_real(train, held_out, space, min(len(samples), len((held_out or train).images)))
    distances = nearest_distances(samples[:NEAREST_NUM], train.images, device=space.device)
    threshold = float(np.quantile(real.distances[:, 0], 0.01))
    return Report(
        space=space.name,
        num=len(real.features),
        frechet=frechet_distance(space.features(samples[: len(real.features)]), real.features),
        num_real=real.num,
        frechet_real=real.frechet,
        confident=_share_confident(space, samples),
        confident_real=real.confident,
        confident_noise=real.confident_noise,
        nearest=float(np.median(distances[:, 0])),
        nearest_real=float(np.median(real.distances[:, 0])),
        nearest_1st=float(np.quantile(distances[:, 0], 0.01)),
        nearest_1st_real=threshold,
        memorised=float((distances[:, 0] < threshold).mean()),
        copied=_share_copied(distances),
        copied_real=_share_copied(real.distances),
    )


def evaluate_network(
    net: Precond,
    train: ImageData,
    space: FeatureSpace,
    *,
    steps: int | None = 1,
    num: int = 0,
    seed: int = 0,
    held_out: ImageData | None = None,
) -> Report:
    """`evaluate` of `num` samples of a network in `steps` steps; 0 is as many as there are images
    to compare them with."""
    num = num or len((held_out or _held_out_digits(train) or train).images)
    return evaluate(sample(net, num, steps=steps, seed=seed), train, space, held_out=held_out)


def spread(images: Images) -> float:
    """How much images differ from each other: root mean square over pixels (in [-1,1]) of the
    standard deviation over the batch. Of samples that collapse onto one image it goes to 0.

    Args:
        images: uint8 [N,H,W,C] or [N,C,H,W]; of more than 4096, that many evenly spaced ones count.
    """
    images = _as_tensor(images)
    chosen = images[:: math.ceil(len(images) / SPREAD_NUM)].float() / 127.5
    return chosen.var(dim=0, correction=0).mean().sqrt().item()


@dataclass(frozen=True)
class _Real:
    """The side of a report that the samples have no part in."""

    features: np.ndarray
    num: int
    frechet: float
    confident: float | None
    confident_noise: float | None
    distances: np.ndarray


@functools.lru_cache(maxsize=1)
def _judge_real(
    train: ImageData, held_out: ImageData | None, space: FeatureSpace, num: int
) -> _Real:
    """Judge real images, kept for the next evaluation of the same run."""
    generator = np.random.default_rng(0)
    reference = held_out or train
    chosen = generator.permutation(len(reference.images))[:num]
    features = space.features(reference.images[chosen])
    halves = (train, held_out) if held_out else split_halves(train)
    count = min(num, *(len(half.images) for half in halves))
    sides = [generator.permutation(len(half.images))[:count] for half in halves]
    sides = [space.features(h.images[i]) for h, i in zip(halves, sides, strict=True)]
    queries = reference.images[generator.permutation(len(reference.images))[:NEAREST_NUM]]
    if held_out:
        distances = nearest_distances(queries, train.images, device=space.device)
    else:  # a training image's nearest is itself
        distances = nearest_distances(queries, train.images, num=3, device=space.device)[:, 1:]
    noise = generator.integers(0, 256, features.shape[:1] + train.images.shape[1:], dtype=np.uint8)
    return _Real(
        features=features,
        num=count,
        frechet=frechet_distance(*sides),
        confident=_share_confident(space, reference.images),
        confident_noise=_share_confident(space, noise),
        distances=distances,
    )


def _held_out_digits(train: ImageData) -> ImageData | None:
    return load_images("digits:test") if train.name == "digits:train" else None


def _share_confident(space: FeatureSpace, images: np.ndarray) -> float | None:
    confidence = space.confidence(images)
    return None if confidence is None else float(np.mean(confidence >= CONFIDENT))


def _share_copied(distances: np.ndarray) -> float:
    return float((distances[:, 0] <= COPY_RATIO * distances[:, 1]).mean())
