"""EDM2 written plainly, the way published and other eager code does it: the baseline of its benchmarks.

One PyTorch operation after another in the compute dtype; every layer normalises its weight twice in each
training forward, once in place and once in the graph; a mask for every dropout. Parameter names are ours
and EDM2's, so that weights load both ways with `strict=True`; a test shows equal outputs and gradients.

Written from the formulas and from a description of the steps, not from the code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.benchmarks.official_style import Dropout, torch_dropout


def normalised(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    norm = 1e-4 + norm * math.sqrt(norm.numel() / max(x.numel(), 1))
    return x / norm.to(x.dtype)


def silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x) / 0.596


def weighted_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def weighted_cat(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale / math.sqrt(na) * (1 - t) * a, scale / math.sqrt(nb) * t * b], 1)


class Layer(nn.Module):
    """A convolution or linear layer; `writes` is whether training forces its weight in place."""

    def __init__(self, inputs: int, outputs: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *kernel))
        self.writes = True

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        w = self.weight.to(torch.float32)
        dims = list(range(1, w.ndim))
        if self.training and self.writes and torch.is_grad_enabled():
            with torch.no_grad():
                self.weight.copy_(normalised(w, dims))
        w = normalised(w, dims) * (gain / math.sqrt(w[0].numel()))
        w = w.to(x.dtype)
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Features(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return math.sqrt(2) * (v.outer(self.freqs) + self.phases).cos()


class PlainBlock(nn.Module):
    """A block of the encoder or decoder."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, *, encoder: bool, layer: int, p: float,
        mode: str = "", attention: bool = False, head: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.layer, self.p, self.mode = encoder, layer, p, mode
        self.heads = outputs // head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = Layer(outputs if encoder else inputs, outputs, 3, 3)
        self.emb_linear = Layer(embedding, outputs)
        self.conv_res1 = Layer(outputs, outputs, 3, 3)
        self.conv_skip = Layer(inputs, outputs, 1, 1) if inputs != outputs else None
        if attention:
            self.attn_qkv = Layer(outputs, 3 * outputs, 1, 1)
            self.attn_proj = Layer(outputs, outputs, 1, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, dropout: Dropout) -> torch.Tensor:
        if self.mode:
            taps = torch.full((1, 1, 2, 2), 0.25 if self.mode == "down" else 1.0)
            taps = taps.to(x.device, x.dtype).tile([x.shape[1], 1, 1, 1])
            resample = F.conv2d if self.mode == "down" else F.conv_transpose2d
            x = resample(x, taps, groups=x.shape[1], stride=2)
        if self.encoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalised(x, [1])
        y = self.conv_res0(silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = silu(y * c.unsqueeze(2).unsqueeze(3).to(y.dtype))
        if self.training and self.p > 0:
            y = dropout(y, self.p, self.layer)
        y = self.conv_res1(y)
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = weighted_sum(x, y, 0.3)
        if self.heads:
            n, c, height, width = x.shape
            y = self.attn_qkv(x).reshape(n, self.heads, c // self.heads, 3, height * width)
            q, k, v = normalised(y, [2]).unbind(3)
            weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(3)
            y = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, height, width)
            x = weighted_sum(x, self.attn_proj(y), 0.3)
        return x.clip_(-256, 256)


class OfficialStyleEdm2(nn.Module):
    """EDM2 with its parameter names, computing in `dtype`. `labels`, one-hot [N,K], go with the batches
    to come."""

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4), num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (16, 8), channels_per_head: int = 64,
        dropout: float = 0.0, dropout_resolutions: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype, self.label_dim = dtype, label_dim
        self.labels: torch.Tensor | None = None
        widths = [model_channels * mult for mult in channel_mult]
        embedding = max(widths)
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier = Features(widths[0])
        self.emb_noise = Layer(widths[0], embedding)
        self.emb_label = Layer(label_dim, embedding) if label_dim else None
        layers = iter(range(10_000))

        def block(res: int, inputs: int, outputs: int, side: str, **kind) -> PlainBlock:
            drops = dropout_resolutions is None or res in dropout_resolutions
            return PlainBlock(
                inputs, outputs, embedding, encoder=side == "enc", layer=next(layers),
                p=dropout if drops else 0.0, head=channels_per_head, **kind,
            )  # fmt: skip

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width = widths[0]
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = Layer(img_channels + 1, width, 3, 3)
        skips = [width]
        sizes = [img_resolution >> level for level in range(len(widths))]
        for res, outputs in zip(sizes, widths, strict=True):
            if res != img_resolution:
                self.enc[f"{res}x{res}_down"] = block(res, width, width, "enc", mode="down")
                skips.append(width)
            for i in range(num_blocks):
                attention = res in attn_resolutions
                name = f"{res}x{res}_block{i}"
                self.enc[name] = block(res, width, outputs, "enc", attention=attention)
                skips.append(width := outputs)
        for res, outputs in zip(reversed(sizes), reversed(widths), strict=True):
            if res == sizes[-1]:
                self.dec[f"{res}x{res}_in0"] = block(res, width, width, "dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = block(res, width, width, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = block(res, width, width, "dec", mode="up")
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions
                name = f"{res}x{res}_block{i}"
                inputs = width + skips.pop()
                self.dec[name] = block(res, inputs, outputs, "dec", attention=attention)
                width = outputs
        self.out_conv = Layer(width, img_channels, 3, 3)

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor, dropout: Dropout = torch_dropout
    ) -> torch.Tensor:
        x = x.to(self.dtype)
        emb = self.emb_noise(self.emb_fourier(noise))
        if self.emb_label is not None:
            assert self.labels is not None
            label = self.emb_label(self.labels * math.sqrt(self.label_dim))
            emb = weighted_sum(emb, label, 0.5)
        emb = silu(emb).to(x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        skips = []
        for name, module in self.enc.items():
            x = module(x) if name.endswith("conv") else module(x, emb, dropout)
            skips.append(x)
        for name, module in self.dec.items():
            if "block" in name:
                x = weighted_cat(x, skips.pop())
            x = module(x, emb, dropout)
        return self.out_conv(x, gain=self.out_gain)
