"""How good samples are: Fréchet and kernel distances, recognisable samples, memorised samples.

A Fréchet distance compares two sets of images by the mean and covariance of their features. Which
features, the `FeatureSpace` says. Every number comes beside the same number for real images, since its
absolute value says little: a Fréchet distance of finite sets is biased upwards by an amount that grows as
the sets shrink (Chong & Forsyth 2020), so both sides have equally many images unless more samples are
asked for. The kernel distance has no such bias: below 5,000 images it is the one to go by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from tcm_fast.data.dataset import ImageData, load_images, split_halves
from tcm_fast.evaluation.features import FeatureSpace, Images, as_tensor, to_float
from tcm_fast.networks.precond import Precond
from tcm_fast.runtime.distributed import Workers
from tcm_fast.sampling.sampler import sample, sample_shared

CONFIDENT = 0.9  # calibrated probability from which a sample counts as recognised
COPY_RATIO = 1 / 3  # nearest over second-nearest distance below which a sample counts as a copy
NEAREST_NUM = 2048  # images whose nearest neighbours are looked for: enough for a 1st percentile
SPREAD_NUM = 4096  # images that `spread` looks at
MANY = 5000  # images from which the bias of a Fréchet distance is small
PAIRS_AT_ONCE = 1 << 25  # distances in memory, 128 MiB of them


FEWEST = 4  # images of which halves can be compared


def check_enough(images: ImageData) -> None:
    """ValueError for a set too small to measure distances by."""
    if len(images) < FEWEST:
        raise ValueError(
            f"eval: needs at least {FEWEST} images to compare with, got {len(images)} in {images.name}"
        )


# ---- Fréchet distance ---------------------------------------------------------------------------


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians that fit two sets of features (Dowson & Landau 1982; as a
    measure of samples Heusel et al. 2017), in float64:

        |mu_a - mu_b|² + tr(S_a) + tr(S_b) - 2 tr((S_a^½ S_b S_a^½)^½)

    The last trace is taken as the sum of the singular values of S_a^½ S_b^½, which is the same and
    does not square the condition number; singular covariances (N <= D) are no difficulty. Of few images
    those of the centred features, A Bᵀ, are the same again and soon computed.

    Args:
        features_a, features_b: [N,D] and [M,D], N and M at least 2.

    Raises:
        ValueError: shapes that do not fit, or features that are not finite.
    """
    a, b = _checked(features_a, features_b, "frechet_distance")
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    few = len(a) + len(b) < 2 * a.shape[1]
    product = a @ b.T if few else _root(a.T @ a) @ _root(b.T @ b)
    overlap = np.linalg.svd(product, compute_uv=False).sum()
    return max(float(shift + np.square(a).sum() + np.square(b).sum() - 2 * overlap), 0.0)


def _checked(a: np.ndarray, b: np.ndarray, function: str) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features as float64 [N,D] and [M,D], finite, N and M at least 2."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    for features in (a, b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
            raise ValueError(
                f"{function}: features must be [N,D] with N of at least 2, got {list(features.shape)}"
            )
        if not np.isfinite(features).all():
            bad = (~np.isfinite(features)).any(axis=1).sum()
            raise ValueError(
                f"{function}: features must be finite, got {bad} of {len(features)} rows that are not"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{function}: both sets need features of one dimension, got "
            f"D={a.shape[1]} and D={b.shape[1]}"
        )
    return a, b


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def kernel_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Kernel distance of two sets of features, in Inception's known as KID (Bińkowski et al. 2018): the
    unbiased estimate of the squared maximum mean discrepancy for k(a, b) = (a·b / D + 1)³, in float64:

        mean of k(a_i, a_j) over i ≠ j + the same of b - 2 mean of k(a_i, b_j)

    Unlike a Fréchet distance it is right on average for small sets as well; between sets of one distribution
    it is around 0 and may be negative.

    Args:
        features_a, features_b: [N,D] and [M,D], N and M at least 2.

    Raises:
        ValueError: shapes that do not fit, or features that are not finite.
    """
    a, b = _checked(features_a, features_b, "kernel_distance")

    def total(x: np.ndarray, y: np.ndarray) -> float:
        rows = max(1, PAIRS_AT_ONCE // 4 // len(y))
        parts = (x[i : i + rows] @ y.T / x.shape[1] + 1 for i in range(0, len(x), rows))
        return float(sum((part**3).sum() for part in parts))

    def within(x: np.ndarray) -> float:
        diagonal = ((np.square(x).sum(1) / x.shape[1] + 1) ** 3).sum()
        return (total(x, x) - float(diagonal)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


def kernel_distance_in_parts(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """`kernel_distance`, of more than 5,000 features on either side the mean over parts of at most so many:
    as unbiased, in a time that grows with their number instead of its square."""
    num = max(1, min(math.ceil(len(features_a) / MANY), math.ceil(len(features_b) / MANY)))
    parts = (np.array_split(x, num) for x in (features_a, features_b))
    return float(np.mean([kernel_distance(a, b) for a, b in zip(*parts, strict=True)]))


FRECHET, KERNEL = "Fréchet distance", "KID"
Metric = Callable[[np.ndarray, np.ndarray], float]
METRICS: dict[str, Metric] = {FRECHET: frechet_distance, KERNEL: kernel_distance_in_parts}
"""Metrics by name: features [N,D] of samples and [M,D] of real images -> a number. `evaluate` and `tcm-fast
eval` apply all of them."""


def decisive(num: int) -> str:
    """The name of the metric to go by with so many images: the kernel distance below 5,000."""
    return KERNEL if num < MANY else FRECHET


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
    queries, keys = (as_tensor(x).flatten(1) for x in (images, train))
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
    x = to_float(queries.to(device))
    best = torch.empty(len(x), 0, device=device)
    index = torch.empty(len(x), 0, dtype=torch.int64, device=device)
    for start in range(0, len(keys), columns):
        y = to_float(keys[start : start + columns].to(device))
        squared = y.square().sum(1) - 2 * (x @ y.T)  # less |x|², the same for a whole row
        number = torch.arange(start, start + len(y), device=device).expand(len(x), -1)
        best, index = torch.cat([best, squared], 1), torch.cat([index, number], 1)
        best, place = best.topk(num, dim=1, largest=False)
        index = index.gather(1, place)
    return index


# ---- reports ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `evaluate` finds; `_real` is the same number for real images.

    Confidences are None in a space without a classifier.
    """

    space: str
    num: int
    """Samples."""
    num_reference: int
    """Images they are compared with: as many, or all where there are fewer."""
    num_real: int
    """Images on either side of `metrics_real`."""
    metrics: dict[str, float]
    """Samples against real images, by the names of `METRICS` and of the space's own."""
    metrics_real: dict[str, float]
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

    @property
    def frechet(self) -> float:
        return self.metrics[FRECHET]

    @property
    def frechet_real(self) -> float:
        return self.metrics_real[FRECHET]


def evaluate(
    samples: Images,
    train: ImageData,
    space: FeatureSpace,
    *,
    held_out: ImageData | None = None,
    names: Collection[str] | None = None,
) -> Report:
    """Evaluate samples against the images that their network was trained on, and images held out from
    it.

    With held-out images (those of `digits:train` are `digits:test`, and need not be given) samples
    are compared with these, and so is the training set: the `_real` of every number.
    Without, they are compared with the training set itself, as for published numbers;
    `frechet_real` is then that of its two halves, and a real image's nearest training image the
    nearest other one.

    Args:
        samples: uint8 [N,H,W,C], N at least 2; all of them count, also where there are fewer images to
            compare with.
        train: the training set.
        space: where Fréchet distance and confidence come from.
        held_out: images of the same kind that were not trained on.
        names: the metrics to take; by default those of `METRICS` and of the space.

    Raises:
        ValueError: images that do not fit together or that the space does not take, too few of
            them.
    """
    samples = as_tensor(samples).cpu().numpy()
    held_out = held_out or _held_out_digits(train)
    sets = {"samples": samples} | ({} if held_out is None else {"held-out images": held_out.images})
    for name, images in sets.items():
        if images.shape[1:] != train.images.shape[1:] or len(images) < 2:
            raise ValueError(
                f"evaluate: {name} must be two or more of the shape of the training images, "
                f"{list(train.images.shape[1:])}, got {list(images.shape)}"
            )
    num = min(len(samples), len((held_out or train).images))  # of real images
    metrics = {**METRICS, **space.metrics}
    metrics = {k: metric for k, metric in metrics.items() if names is None or k in names}
    real = _evaluate_real(train, held_out, space, num, tuple(metrics.items()))
    distances = nearest_distances(samples[:NEAREST_NUM], train.images, device=space.device)
    features = space.features(samples)
    threshold = float(np.quantile(real.distances[:, 0], 0.01))
    return Report(
        space=space.name,
        num=len(samples),
        num_reference=num,
        num_real=real.num,
        metrics={name: metric(features, real.features) for name, metric in metrics.items()},
        metrics_real=real.metrics,
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
    names: Collection[str] | None = None,
    workers: Workers | None = None,
    precision: str | None = None,
) -> Report:
    """`evaluate` of `num` samples of a network in `steps` steps, drawn in a `precision` as `sample` takes it;
    0 is as many as there are images to compare them with. Several processes (`workers`) draw, the
    main one evaluates, and all get its report, which does not depend on their number."""
    num = num or len((held_out or _held_out_digits(train) or train).images)
    if workers is None:
        samples = sample(net, num, steps=steps, seed=seed, precision=precision)
        return evaluate(samples, train, space, held_out=held_out, names=names)
    samples = sample_shared(net, num, workers, steps=steps, seed=seed, precision=precision)
    return workers.on_main(lambda: evaluate(samples, train, space, held_out=held_out, names=names))


def spread(images: Images) -> float:
    """How much images differ from each other: root mean square over pixels (in [-1,1]) of the
    standard deviation over the batch. Of samples that collapse onto one image it goes to 0.

    Args:
        images: uint8 [N,H,W,C] or [N,C,H,W]; of more than 4096, that many evenly spaced ones count.
    """
    images = as_tensor(images)
    chosen = images[:: math.ceil(len(images) / SPREAD_NUM)].float() / 127.5
    return chosen.var(dim=0, correction=0).mean().sqrt().item()


@dataclass(frozen=True)
class _Real:
    """The side of a report that the samples have no part in."""

    features: np.ndarray
    num: int
    metrics: dict[str, float]
    confident: float | None
    confident_noise: float | None
    distances: np.ndarray


@functools.lru_cache(maxsize=1)
def _evaluate_real(
    train: ImageData, held_out: ImageData | None, space: FeatureSpace, num: int,
    metrics: tuple[tuple[str, Metric], ...],
) -> _Real:  # fmt: skip
    """The same numbers of real images, kept for the next evaluation of the same run."""
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
        metrics={name: metric(*sides) for name, metric in metrics},
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
