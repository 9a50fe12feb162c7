"""The manifold feature distance (AYT: Kim, Cha, Ye, "Align Your Tangent", 2025, arXiv 2510.00658): what the
consistency phases and `cmt` take for the pixels' distance with `distance = "manifold"`.

A small network that was trained to tell how strongly an image was turned, shifted, blurred and so on
(`tcm-fast features train`) has features that change along with the images, and little with what leads off
them. The gradient at D(x_t,t) is the direction in which those of the target are nearer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.config import DistanceConfig
from tcm_fast.kernels.precondition import denoise
from tcm_fast.networks import Precond
from tcm_fast.objectives.base import Objective
from tcm_fast.runtime.arithmetic import tf32
from tcm_fast.runtime.atomic import FORMAT, Tensors, check_fit, read_tensors, reason

D = TypeVar("D", bound=DistanceConfig)

SMALLEST = 4  # pixels of the smallest features, and of the smallest images

# ---- the network --------------------------------------------------------------------------------


class FeatureNetwork(nn.Module):
    """Pairs of 3x3 convolutions with ReLU, an average pool between pairs down to 4 to 7 pixels (VGG's
    layout), and one linear layer that gives the strengths of distortions.

    Args:
        resolution, channels: of the images.
        width: channels of the first pair; doubled at every pool, up to four times.
        strengths: their number.

    Raises:
        ValueError: a resolution below 4, or another number that is not positive.
    """

    def __init__(self, *, resolution: int, channels: int, width: int, strengths: int) -> None:
        super().__init__()
        self.spec = dict(resolution=resolution, channels=channels, width=width, strengths=strengths)
        for name, value in self.spec.items():
            least = SMALLEST if name == "resolution" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"features: {name} must be at least {least}, got {value}")
        self.blocks, size, inputs = nn.ModuleList(), resolution, channels
        while True:
            outputs = width * min(2 ** len(self.blocks), 4)
            self.blocks.append(
                nn.ModuleList(nn.Conv2d(n, outputs, 3, padding=1) for n in (inputs, outputs))
            )
            inputs = outputs
            if size < 2 * SMALLEST:
                break
            size //= 2
        self.head = nn.Linear(outputs * size**2, strengths)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images [N,C,R,R] in [-1,1] -> what each convolution's ReLU gives, [N,c,h,w] each."""
        found = []
        for number, block in enumerate(self.blocks):
            x = F.avg_pool2d(x, 2) if number else x
            for convolution in block:  # type: ignore[attr-defined]
                x = F.relu_(convolution(x))
                found.append(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N,C,R,R] in [-1,1] -> strengths [N,S]."""
        return self.head(self.features(x)[-1].flatten(1))

    @torch.no_grad()
    def balance(self, images: torch.Tensor) -> None:
        """Scale every layer's features so that the mean of their squared norm over the images is 1, and
        the layer after it by the inverse: what the network says is the same (ReLU(k x) = k ReLU(x)), and
        in a sum over layers none outweighs the others."""
        norms = [f.square().sum((1, 2, 3)).mean().sqrt() for f in self.features(images)]
        norms = [torch.where(norm > 0, norm, 1.0) for norm in norms]  # 0 where nothing is above it
        before = torch.ones_like(norms[0])
        convolutions = [c for block in self.blocks for c in block]  # type: ignore[attr-defined]
        for convolution, norm in zip(convolutions, norms, strict=True):
            convolution.weight.mul_(before / norm)
            convolution.bias.div_(norm)
            before = norm
        self.head.weight.mul_(before)


# ---- its file -----------------------------------------------------------------------------------


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors [n, ...] and their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(
            name.encode() + tensors[name].cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def contents_of(net: FeatureNetwork, about: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and header of a feature network's file; `about` says how it was trained."""
    tensors = net.state_dict()
    header = {"format": FORMAT, "features": net.spec, "sha256": digest(tensors), **about}
    return tensors, header


def read_features(
    path: str | Path, what: str, device: torch.device | str = "cpu"
) -> tuple[FeatureNetwork, dict[str, Any]]:
    """A feature network in eval mode without gradients of its own, channels_last, and what its file says of
    it: features (how to build it), sha256 (of its tensors), and how it was trained.

    Args:
        path: a file of `tcm-fast features train`.
        what: what messages call it, "ect.features".
        device: where it is to be; of one on the meta device only the file's header is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or something else.
    """
    is_meta = torch.device(device).type == "meta"
    header, tensors = read_tensors(Path(path), header_only=is_meta, what=what)
    if not isinstance(header.get("features"), dict):
        raise ValueError(
            f"{what}: {path} holds something else (not a tcm-fast features train file)"
        )
    try:
        with torch.device("meta"):
            net = FeatureNetwork(**header["features"])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{what}: {path} describes a network that cannot be built, {reason(error)}"
        ) from error
    if not is_meta:
        check_fit(f"{what}: {path}", net.state_dict(), tensors)
        if digest(tensors) != header.get("sha256"):
            raise ValueError(f"{what}: {path} is damaged, its SHA-256 is not that of its header")
        net.load_state_dict(tensors, assign=True)
    net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.eval().requires_grad_(False), header


def check_features(path: str, what: str, *, resolution: int, channels: int) -> None:
    """ValueError unless a file holds a feature network for images of a kind; as `read_features`."""
    net, _ = read_features(path, what, "meta")
    for name, value in {"resolution": resolution, "channels": channels}.items():
        if net.spec[name] != value:
            raise ValueError(
                f"{what}: {path} must be of images of {name} {value}, got {net.spec[name]}"
            )


# ---- the distance -------------------------------------------------------------------------------


def manifold_loss(
    output: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    target_output: torch.Tensor,
    x_r: torch.Tensor,
    r: torch.Tensor,
    *,
    features: FeatureNetwork,
    weighting: torch.Tensor,
    sigma_data: float = 0.5,
    is_clean: torch.Tensor | None = None,
) -> torch.Tensor:
    """w(t,r) · √(Σ_l ‖φ_l(D(x_t,t)) - φ_l(D(x_r,r))‖²) for each sample, φ_l the features of layer l, with
    another gradient: with respect to D(x_t,t) it is w(t,r) · g/‖g‖, g the gradient of the sum of squares,
    and 0 where g is 0. (The pseudo-Huber distance's, for c → 0, is w(t,r) · d/‖d‖ with
    d = D(x_t,t) - D(x_r,r).)

    Args:
        output: raw output F of the student at (x_t, t), [N,C,H,W]; the only input with a gradient.
        x_t, x_r, t, r, target_output, is_clean, sigma_data: as of `consistency_loss`.
        features: φ; it computes in fp32 whatever the networks' precision (`feature_distance`).
        weighting: w(t,r) [N].

    Returns:
        fp32 [N] (x_t's dtype). Source: Kim, Cha, Ye 2025.
    """
    target = denoise(target_output, x_r, r, sigma_data)
    if is_clean is not None:
        target = torch.where(is_clean.reshape(-1, 1, 1, 1), target_output.to(x_r.dtype), target)
    denoised = denoise(output, x_t, t, sigma_data)
    distance, direction = feature_distance(features, denoised.detach(), target.detach())
    along = (denoised * direction).sum((1, 2, 3))  # has the gradient; its value is taken off again
    return weighting.to(x_t.dtype) * (distance + (along - along.detach()))


def feature_distance(
    features: FeatureNetwork, images: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """√(Σ_l ‖φ_l(images) - φ_l(targets)‖²) [N], and the gradient of its square with respect to the images
    [N,C,H,W], scaled to norm 1 for each image; 0 where it is 0. Neither has a gradient.

    In the features' own dtype and without TF32: of images that differ by a hundredth, half-precision
    features give a direction whose cosine to the right one is 0.996 (fp16) or 0.82 (bf16), of a thousandth
    0.77 or 0.12."""
    images, targets = (x.to(features.head.weight.dtype) for x in (images, targets))
    with tf32(False):
        with torch.no_grad():
            theirs = features.features(targets)
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            own = features.features(images)
        differences = [a.detach() - b for a, b in zip(own, theirs, strict=True)]
        (gradient,) = torch.autograd.grad(own, images, differences)
    norms = torch.stack([torch.linalg.vector_norm(d, dim=(1, 2, 3)) for d in differences])
    length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
    least = torch.finfo(gradient.dtype).tiny
    return torch.linalg.vector_norm(norms, dim=0), gradient / length.clamp_min(least)


# ---- the phases that can take it ----------------------------------------------------------------


class DistanceObjective(Objective[D]):
    """A phase whose configuration may name a feature network: it is checked, read once, kept out of the
    module tree, counted as held memory, and a resumed run has to read the same."""

    def __init__(
        self, config: D, student: Precond, frozen: Precond | None = None, **options: Any
    ) -> None:
        super().__init__(config, student, frozen, **options)
        self._features: tuple[FeatureNetwork, dict[str, Any]] | None = None
        if config.features:
            device = next(student.parameters()).device
            self._features = read_features(config.features, f"{self.name}.features", device)

    @classmethod
    def check(cls, config: D, student: Precond) -> None:
        if config.features:
            check_features(
                config.features, f"{cls.name}.features", resolution=student.img_resolution,
                channels=student.img_channels,
            )  # fmt: skip

    def held(self) -> list[torch.Tensor]:
        own = [] if self._features is None else self._features[0].parameters()
        return [*super().held(), *own]

    def reads(self) -> dict[str, str]:
        return {} if self._features is None else {"features": self._features[1]["sha256"]}
