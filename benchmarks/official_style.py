"""The baseline of every benchmark: a training step written plainly, the way the published code does it.

NCHW, one PyTorch operation after another, both networks on the whole batch, images in float64 where
the noise levels are, the generator's state saved and restored to share dropout masks, `.item()` and
boolean indexing where they stand there. The network is DDPM++ with the same parameter names, so that
weights load from ours with `strict=True`; a test shows equal loss and gradients.

Written from the formulas and from a description of the steps, not from the code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

SIGMA_DATA = 0.5

Dropout = Callable[[torch.Tensor, float, int], torch.Tensor]


def torch_dropout(x: torch.Tensor, p: float, layer: int) -> torch.Tensor:
    """Dropout from the global generator."""
    return F.dropout(x, p)


# ---- the network --------------------------------------------------------------------------------


class Dense(nn.Module):
    """A linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.weight.to(x.dtype).t()
        return x.add_(self.bias.to(x.dtype))


class Convolution(nn.Module):
    """A convolution with its bias as a pass of its own, and 2x resampling before or after it."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, up: bool = False, down: bool = False
    ) -> None:
        super().__init__()
        self.inputs, self.padding, self.up, self.down = inputs, kernel // 2, up, down
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if up or down:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up or self.down:
            taps = self.resample_filter.to(x.dtype)
            taps = taps.mul(4 if self.up else 1).tile([self.inputs, 1, 1, 1])
            resample = F.conv_transpose2d if self.up else F.conv2d
            x = resample(x, taps, groups=self.inputs, stride=2)
        x = F.conv2d(x, self.weight.to(x.dtype), padding=self.padding)
        return x.add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


class Normalisation(nn.Module):
    """Group normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = min(32, channels // 4)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-6)


class Block(nn.Module):
    """A residual block with optional resampling and single-head attention."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, p: float, layer: int,
        up: bool = False, down: bool = False, attention: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.p, self.layer = p, layer
        self.norm0 = Normalisation(inputs)
        self.conv0 = Convolution(inputs, outputs, 3, up, down)
        self.affine = Dense(embedding, outputs)
        self.norm1 = Normalisation(outputs)
        self.conv1 = Convolution(outputs, outputs, 3)
        self.skip = None
        if inputs != outputs or up or down:
            self.skip = Convolution(inputs, outputs, 1, up, down)
        self.norm2 = None
        if attention:
            self.norm2 = Normalisation(outputs)
            self.qkv = Convolution(outputs, 3 * outputs, 1)
            self.proj = Convolution(outputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, dropout: Dropout) -> torch.Tensor:
        original = x
        x = self.conv0(F.silu(self.norm0(x)))
        shift = self.affine(embedding).unsqueeze(2).unsqueeze(3)
        x = F.silu(self.norm1(x.add(shift)))
        if self.training and self.p > 0:
            x = dropout(x, self.p, self.layer)
        x = self.conv1(x)
        x = x.add_(original if self.skip is None else self.skip(original))
        x = x * math.sqrt(0.5)
        if self.norm2 is not None:
            n, c, h, w = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(n, c, 3, h * w).unbind(2)
            scores = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(c)).float())
            attended = torch.einsum("nqk,nck->ncq", scores.softmax(2).to(v.dtype), v)
            x = self.proj(attended.reshape(n, c, h, w)).add_(x)
            x = x * math.sqrt(0.5)
        return x


class OfficialStyleUNet(nn.Module):
    """DDPM++ with EDM's parameter names. Arguments and shapes as `tcm_fast.build_network`'s."""

    def __init__(
        self, img_resolution: int, img_channels: int, model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2), num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,), dropout: float = 0.13,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model_channels = model_channels
        embedding = 4 * model_channels
        layers = iter(range(10_000))
        self.map_layer0 = Dense(model_channels, embedding)
        self.map_layer1 = Dense(embedding, embedding)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()

        def block(inputs: int, outputs: int, **kind: bool) -> Block:
            return Block(inputs, outputs, embedding, dropout, next(layers), **kind)

        channels, skips = img_channels, []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Convolution(channels, model_channels, 3)
                channels = model_channels
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, down=True)
            skips.append(channels)
            for index in range(num_blocks):
                attention = res in attn_resolutions
                outputs = mult * model_channels
                self.enc[f"{res}x{res}_block{index}"] = block(
                    channels, outputs, attention=attention
                )
                channels = outputs
                skips.append(channels)
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                attention = index == num_blocks and res in attn_resolutions
                outputs = mult * model_channels
                self.dec[f"{res}x{res}_block{index}"] = block(
                    channels + skips.pop(), outputs, attention=attention
                )
                channels = outputs
        res = img_resolution
        self.dec[f"{res}x{res}_aux_norm"] = Normalisation(channels)
        self.dec[f"{res}x{res}_aux_conv"] = Convolution(channels, img_channels, 3)

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor, dropout: Dropout = torch_dropout
    ) -> torch.Tensor:
        half = self.model_channels // 2
        frequencies = torch.arange(half, dtype=torch.float32, device=x.device) / (half - 1)
        angles = noise.outer((1 / 10_000) ** frequencies)
        embedding = torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype)
        embedding = F.silu(self.map_layer0(embedding))
        embedding = F.silu(self.map_layer1(embedding))
        skips = []
        for module in self.enc.values():
            x = module(x, embedding, dropout) if isinstance(module, Block) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            if not isinstance(module, Block):
                x = module(x) if name.endswith("norm") else module(F.silu(x))
                continue
            if "block" in name:
                x = torch.cat([x, skips.pop()], 1)
            x = module(x, embedding, dropout)
        return x


def denoise(net: nn.Module, x: torch.Tensor, t: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """EDM's preconditioning around the network, in fp32."""
    x, t = x.to(torch.float32), t.to(torch.float32).reshape(-1, 1, 1, 1)
    c_skip = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
    c_out = t * SIGMA_DATA / (t**2 + SIGMA_DATA**2).sqrt()
    c_in = 1 / (SIGMA_DATA**2 + t**2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.log().flatten() / 4, dropout).to(torch.float32)


# ---- the step -----------------------------------------------------------------------------------


def draw(
    images: torch.Tensor, t_prime: float, ratio: float, rho: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """t, r (float64 [N,1,1,1]), the boundary mask (bool [N]) and the noise, drawn as published."""
    n, device = len(images), images.device
    law = stats.t(0.01, 0.0, 0.2)
    low, high = law.cdf(math.log(t_prime)), law.cdf(math.log(80.0))
    log_t = law.ppf(low + (high - low) * stats.uniform.rvs(size=n))
    t = torch.tensor(log_t, device=device).exp()
    boundary = torch.zeros(n, dtype=torch.bool, device=device)
    boundary[torch.randperm(n)[: int(n * rho)]] = True
    t = boundary * (t_prime + 1e-8) + ~boundary * t
    r = inner(t, ratio)
    shape = (-1, 1, 1, 1)
    return t.reshape(shape), r.reshape(shape), boundary, torch.randn_like(images)


def inner(t: torch.Tensor, ratio: float) -> torch.Tensor:
    """r at t, as published."""
    r = t - t * (1 - ratio) * (1 + 8 * torch.sigmoid(-t))
    r[r < 1e-6] = 1e-6
    return r


def truncated(
    student: nn.Module, stage1: nn.Module, x: torch.Tensor, t: torch.Tensor, t_prime: float,
    dropout: Dropout,
) -> torch.Tensor:  # fmt: skip
    """Both networks on the whole batch, blended by t >= t'."""
    mask = t.to(torch.float32) >= t_prime
    state = torch.get_rng_state()
    out_stage1 = torch.zeros_like(x, dtype=torch.float32)
    if (~mask).any():
        with torch.no_grad():
            out_stage1 = denoise(stage1, x, t, dropout)
        torch.set_rng_state(state)
    out_student = torch.zeros_like(out_stage1)
    if mask.any():
        out_student = denoise(student, x, t, dropout)
    return mask * out_student + ~mask * out_stage1


def consistency_losses(
    student: nn.Module, stage1: nn.Module, images: torch.Tensor, t: torch.Tensor, r: torch.Tensor,
    boundary: torch.Tensor, noise: torch.Tensor, *, t_prime: float, c: float, weighting: str,
    boundary_weight: float, dropout: Dropout = torch_dropout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss of one batch and its two means. images fp32 in [-1,1]; t, r float64 [N,1,1,1]."""
    y_t, y_r = images + noise * t, images + noise * r
    state = torch.get_rng_state()
    out_t = truncated(student, stage1, y_t, t, t_prime, dropout)
    if r.max() > 0:
        torch.set_rng_state(state)
        with torch.no_grad():
            out_r = truncated(student, stage1, y_r, r, t_prime, dropout)
        out_r = torch.nan_to_num(out_r)
        mask = r > 0
        out_r = mask * out_r + ~mask * images
    else:
        out_r = images
    difference = out_t - out_r
    norm = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    distance = (norm.double() ** 2 + c**2).sqrt() - c
    weight = (
        1 / (t - r) if weighting == "inv_dt" else (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2
    )
    loss = weight.flatten() * distance
    consistency = loss[~boundary].mean()
    on_boundary = loss[boundary].mean() if torch.any(boundary) else torch.zeros_like(consistency)
    return consistency + boundary_weight * on_boundary, consistency, on_boundary


def stage1_losses(
    student: nn.Module, images: torch.Tensor, t: torch.Tensor, r: torch.Tensor, noise: torch.Tensor,
    *, c: float, weighting: str, dropout: Dropout = torch_dropout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Stage 1's loss (ECT): one network at both noise levels, no boundary. Shapes as above."""
    state = torch.get_rng_state()
    out_t = denoise(student, images + noise * t, t, dropout)
    torch.set_rng_state(state)
    with torch.no_grad():
        out_r = torch.nan_to_num(denoise(student, images + noise * r, r, dropout))
    norm = torch.linalg.vector_norm((out_t - out_r).flatten(1), dim=1)
    distance = (norm.double() ** 2 + c**2).sqrt() - c
    weight = (
        1 / (t - r) if weighting == "inv_dt" else (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2
    )
    loss = (weight.flatten() * distance).mean()
    return loss, loss.detach(), torch.zeros_like(loss)


def denoising_losses(
    student: nn.Module, images: torch.Tensor, t: torch.Tensor, noise: torch.Tensor,
    dropout: Dropout = torch_dropout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Pre-training's loss (EDM): weighted squared error, summed over an image, its mean over images.
    images fp32 in [-1,1]; t fp32 [N,1,1,1]."""
    weight = (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2
    loss = weight * (denoise(student, images + noise * t, t, dropout) - images) ** 2
    total = loss.sum() / len(images)
    return total, total.detach(), torch.zeros_like(total)


class OfficialStyleStep:
    """One optimizer step after another, with RAdam (pre-training: Adam), a gradient norm that never clips
    and an EMA updated tensor by tensor.

    Args:
        student, stage1: networks of the same shape; the EMA starts from the student.
        phase: tcm, or ect and edm, for which `stage1` is None.
        t_prime, ratio, rho, boundary_weight, c, weighting, lr, beta: the recipe.
        log_normal: mean and deviation of ln t in edm and ect.
    """

    def __init__(
        self, student: nn.Module, stage1: nn.Module | None, *, phase: str = "tcm",
        t_prime: float = 1.0, ratio: float = 0.999, rho: float = 0.25, boundary_weight: float = 0.1,
        c: float = 1e-8, weighting: str = "inv_dt", lr: float = 5e-5, beta: float = 0.9999,
        log_normal: tuple[float, float] = (-1.1, 2.0),
    ) -> None:  # fmt: skip
        self.student, self.stage1, self.phase, self.log_normal = student, stage1, phase, log_normal
        self.t_prime, self.ratio, self.rho, self.beta = t_prime, ratio, rho, beta
        self.loss: dict[str, Any] = dict(
            t_prime=t_prime, c=c, weighting=weighting, boundary_weight=boundary_weight
        )
        self.average = copy.deepcopy(student).requires_grad_(False)
        kind = torch.optim.Adam if phase == "edm" else torch.optim.RAdam
        self.optimizer = kind(student.parameters(), lr=lr)

    def losses(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise levels and noise drawn, then the phase's loss and its two means. images fp32 [N,C,H,W]."""
        if self.phase == "tcm":
            assert self.stage1 is not None
            t, r, boundary, noise = draw(images, self.t_prime, self.ratio, self.rho)
            return consistency_losses(
                self.student, self.stage1, images, t, r, boundary, noise, **self.loss
            )
        mean, std = self.log_normal
        if self.phase == "edm":
            t = (torch.randn(len(images), 1, 1, 1, device=images.device) * std + mean).exp()
            return denoising_losses(self.student, images, t, torch.randn_like(images))
        low, high = ((math.log(v) - mean) / std for v in (0.002, 80.0))
        log_t = stats.truncnorm.rvs(low, high, loc=mean, scale=std, size=len(images))
        t = torch.tensor(log_t, device=images.device).exp().reshape(-1, 1, 1, 1)
        r = inner(t, self.ratio)
        c, weighting = float(self.loss["c"]), str(self.loss["weighting"])
        return stage1_losses(
            self.student, images, t, r, torch.randn_like(images), c=c, weighting=weighting
        )

    def __call__(self, images: torch.Tensor) -> tuple[float, float, float]:
        """Train on uint8 images [N,C,H,W]; returns the three losses, read from the device."""
        images = images.to(torch.float32) / 127.5 - 1
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(images)
        losses[0].backward()
        values = tuple(loss.item() for loss in losses)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1e6).item()
        self.optimizer.step()
        with torch.no_grad():
            for average, value in zip(
                self.average.parameters(), self.student.parameters(), strict=True
            ):
                average.copy_(value.detach().lerp(average, self.beta))
        return values
