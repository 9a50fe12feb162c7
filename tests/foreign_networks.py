"""Stand-ins for other people's networks: the names and parts of the published classes, and their
formulas (Karras et al. 2022, 2024; Dhariwal & Nichol 2021), written for these tests."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def resampled(x, up, down):
    if up:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(x, 2) if down else x


# ---- EDM, ECT, TCM --------------------------------------------------------------------------------


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Conv2d(nn.Conv2d):
    def __init__(self, c_in, c_out, kernel, up=False, down=False):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.up, self.down = up, down

    def forward(self, x):
        x = resampled(x, self.up, self.down)
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


class GroupNorm(nn.Module):
    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), eps
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x.contiguous(), self.num_groups, weight, bias, self.eps)


def attend(qkv, num_heads):
    n, c, h, w = qkv.shape
    q, k, v = qkv.reshape(n * num_heads, c // 3 // num_heads, 3, h * w).unbind(2)
    weights = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)
    return (v @ weights.mT).reshape(n, c // 3, h, w)


class UNetBlock(nn.Module):
    def __init__(
        self, c_in, c_out, emb, *, up=False, down=False, heads=0, adaptive=False, dropout=0.0
    ):
        super().__init__()
        self.num_heads, self.dropout, self.adaptive_scale = heads, dropout, adaptive
        self.skip_scale = 1.0 if adaptive else math.sqrt(0.5)
        self.norm0, self.norm1 = GroupNorm(c_in), GroupNorm(c_out, 1e-6)
        self.conv0 = Conv2d(c_in, c_out, 3, up, down)
        self.affine = Linear(emb, c_out * (1 + adaptive))
        self.conv1 = Conv2d(c_out, c_out, 3)
        self.skip = Conv2d(c_in, c_out, 1, up, down) if c_in != c_out or up or down else None
        if heads:
            self.norm2 = GroupNorm(c_out)
            self.qkv, self.proj = Conv2d(c_out, 3 * c_out, 1), Conv2d(c_out, c_out, 1)

    def forward(self, x, emb, emb_norm=False):
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if emb_norm:
            params = params / params.norm()
        if self.adaptive_scale:
            scale, shift = params.chunk(2, 1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + params))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            h = self.proj(attend(self.qkv(self.norm2(x)), self.num_heads))
            x = (h + x) * self.skip_scale
        return x


class SongUNet(nn.Module):
    """A few blocks of it, called with an image and an embedding."""

    def __init__(self, adaptive=False, dropout=0.0):
        super().__init__()
        options = {"adaptive": adaptive, "dropout": dropout}
        self.first = Conv2d(3, 16, 3)
        self.enc = nn.ModuleDict({
            "8x8_block0": UNetBlock(16, 24, 8, **options),
            "4x4_down": UNetBlock(24, 24, 8, down=True, **options),
            "4x4_block0": UNetBlock(24, 32, 8, heads=2, **options),
            "8x8_up": UNetBlock(32, 32, 8, up=True, **options),
        })  # fmt: skip
        self.out_norm, self.out_conv = GroupNorm(32), Conv2d(32, 3, 3)

    def forward(self, x, emb):
        x = self.first(x)
        for block in self.enc.values():
            assert isinstance(block, UNetBlock)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


# ---- PhysicsNeMo ------------------------------------------------------------------------------------


class PhysicsNeMo:
    """Holds classes of the same names as EDM's."""

    class GroupNorm(GroupNorm):
        def __init__(self, channels, act=None):
            super().__init__(channels)
            self.act, self.amp_mode = act, False
            self.act_fn = F.silu if act else None

        def forward(self, x):
            if self.training:
                x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            else:
                groups = x.unflatten(1, (self.num_groups, -1))
                mean, var = groups.mean((2, 3, 4), True), groups.var((2, 3, 4), keepdim=True)
                x = ((groups - mean) * (var + self.eps).rsqrt()).flatten(1, 2)
                x = x * self.weight[:, None, None] + self.bias[:, None, None]
            return x if self.act_fn is None else self.act_fn(x)

    class Attention(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.num_heads = 1
            self.norm = PhysicsNeMo.GroupNorm(channels)
            self.qkv, self.proj = Conv2d(channels, 3 * channels, 1), Conv2d(channels, channels, 1)

        def forward(self, x):
            return self.proj(attend(self.qkv(self.norm(x)), 1)) + x

    class UNetBlock(nn.Module):
        def __init__(self, c_in, c_out, emb, *, attention=False, adaptive=False):
            super().__init__()
            self.num_heads, self.dropout, self.adaptive_scale = int(attention), 0.0, adaptive
            self.skip_scale = math.sqrt(0.5)
            self.norm0 = PhysicsNeMo.GroupNorm(c_in, act="silu")
            self.norm1 = PhysicsNeMo.GroupNorm(c_out, act=None if adaptive else "silu")
            self.conv0, self.conv1 = Conv2d(c_in, c_out, 3), Conv2d(c_out, c_out, 3)
            self.affine = Linear(emb, c_out * (1 + adaptive))
            self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else None
            self.attn = PhysicsNeMo.Attention(c_out) if attention else None

        def forward(self, x, emb):
            h = self.conv0(self.norm0(x))
            params = self.affine(emb)[:, :, None, None]
            if self.adaptive_scale:
                scale, shift = params.chunk(2, 1)
                h = F.silu(self.norm1(h) * (1 + scale) + shift)
            else:
                h = self.norm1(h + params)
            h = self.conv1(F.dropout(h, self.dropout, self.training))
            x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
            return x if self.attn is None else self.attn(x) * self.skip_scale

    class SongUNet(nn.Module):
        def __init__(self, adaptive):
            super().__init__()
            self.a = PhysicsNeMo.UNetBlock(8, 16, 8, attention=True, adaptive=adaptive)
            self.b = PhysicsNeMo.UNetBlock(16, 16, 8, adaptive=adaptive)
            self.norm = PhysicsNeMo.GroupNorm(16, act="silu")

        def forward(self, x, emb):
            return self.norm(self.b(self.a(x, emb), emb))


# ---- EDM2 -------------------------------------------------------------------------------------------


def unit(x, dim):
    rms = x.square().mean(dim, keepdim=True).sqrt()
    return x / (1e-4 + rms)


class MPConv(nn.Module):
    def __init__(self, c_in, c_out, kernel=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, *[kernel] * 2 * bool(kernel)))

    def forward(self, x, gain=1):
        w = (
            unit(self.weight, tuple(range(1, self.weight.ndim)))
            * gain
            / math.sqrt(self.weight[0].numel())
        )
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


def mp_silu(x):
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


class Block(nn.Module):
    def __init__(self, c_in, c_out, emb, flavor, mode="keep", heads=0, dropout=0.0):
        super().__init__()
        self.flavor, self.resample_mode, self.resample_filter = flavor, mode, [1, 1]
        self.num_heads, self.dropout, self.clip_act = heads, dropout, 2.0
        self.res_balance = self.attn_balance = 0.3
        self.emb_gain = nn.Parameter(torch.ones(()))
        self.conv_res0 = MPConv(c_out if flavor == "enc" else c_in, c_out, 3)
        self.emb_linear = MPConv(emb, c_out)
        self.conv_res1 = MPConv(c_out, c_out, 3)
        self.conv_skip = MPConv(c_in, c_out, 1) if c_in != c_out else None
        self.attn_qkv = MPConv(c_out, 3 * c_out, 1) if heads else None
        self.attn_proj = MPConv(c_out, c_out, 1) if heads else None

    def forward(self, x, emb):
        x = resampled(x, self.resample_mode == "up", self.resample_mode == "down")
        skip = (lambda x: x) if self.conv_skip is None else self.conv_skip
        if self.flavor == "enc":
            x = unit(skip(x), 1)
        h = self.conv_res0(mp_silu(x))
        h = mp_silu(h * (1 + self.emb_linear(emb, gain=self.emb_gain))[:, :, None, None])
        h = self.conv_res1(F.dropout(h, self.dropout, self.training))
        x = mp_sum(skip(x) if self.flavor == "dec" else x, h, self.res_balance)
        if self.num_heads:
            n, c, height, width = x.shape
            qkv = self.attn_qkv(x).reshape(n, self.num_heads, -1, 3, height * width)
            q, k, v = unit(qkv, 2).unbind(3)
            weights = (q.mT @ k / math.sqrt(q.shape[2])).softmax(-1)
            x = mp_sum(
                x, self.attn_proj((v @ weights.mT).reshape(n, c, height, width)), self.attn_balance
            )
        return x.clip(-self.clip_act, self.clip_act)


class EDM2UNet(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.first = MPConv(3, 16, 3)
        self.blocks = nn.ModuleList([
            Block(16, 32, 8, "enc", dropout=dropout),
            Block(32, 32, 8, "enc", "down", heads=2, dropout=dropout),
            Block(32, 24, 8, "dec", "up", dropout=dropout),
            Block(24, 24, 8, "dec", dropout=dropout),
        ])  # fmt: skip

    def forward(self, x, emb):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, emb)
        return x


# ---- diffusers ----------------------------------------------------------------------------------------


class ResnetBlock2D(nn.Module):
    def __init__(self, c_in, c_out, emb=8, *, norm="default", up=False, down=False, dropout=0.0,
                 act=nn.SiLU):  # fmt: skip
        super().__init__()
        self.time_embedding_norm, self.skip_time_act, self.output_scale_factor = norm, False, 1.5
        self.norm1, self.norm2 = nn.GroupNorm(4, c_in, 1e-6), nn.GroupNorm(4, c_out, 1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        wide = c_out * (2 if norm == "scale_shift" else 1)
        self.time_emb_proj = nn.Linear(emb, wide) if emb else None
        self.dropout, self.nonlinearity = nn.Dropout(dropout), act()
        self.upsample = nn.Upsample(scale_factor=2) if up else None
        self.downsample = nn.AvgPool2d(2) if down else None
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, input_tensor, temb):
        h = self.nonlinearity(self.norm1(input_tensor))
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                input_tensor, h = resample(input_tensor), resample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h if temb is None else h + temb)
        h = self.conv2(self.dropout(self.nonlinearity(h)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + h) / self.output_scale_factor


class AttnProcessor2_0:
    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        x = hidden_states
        tokens = x.flatten(2).mT if x.ndim == 4 else x
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.mT).mT
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            projection(source).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projection, source in (
                (attn.to_q, tokens),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        h = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = attn.to_out[1](attn.to_out[0](h))
        h = h.mT.reshape(x.shape) if x.ndim == 4 else h
        return (h + x if attn.residual_connection else h) / attn.rescale_output_factor


class Attention(nn.Module):
    def __init__(self, channels, heads, *, tokens=False, context=None):
        super().__init__()
        self.heads, self.spatial_norm = heads, None
        self.group_norm = None if tokens else nn.GroupNorm(4, channels)
        self.residual_connection, self.rescale_output_factor = not tokens, 1.25
        self.to_q = nn.Linear(channels, channels)
        self.to_k, self.to_v = (nn.Linear(context or channels, channels) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.processor = AttnProcessor2_0()

    def forward(self, hidden_states, encoder_hidden_states=None, **kwargs):
        return self.processor(self, hidden_states, encoder_hidden_states, **kwargs)


class UNet2DModel(nn.Module):
    def __init__(self, norm="default", dropout=0.0):
        super().__init__()
        options = {"norm": norm, "dropout": dropout}
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.down = ResnetBlock2D(16, 32, down=True, **options)
        self.attention = Attention(32, 2)
        self.mid = ResnetBlock2D(32, 32, **options)
        self.up = ResnetBlock2D(32, 16, up=True, **options)
        self.conv_norm_out, self.conv_act = nn.GroupNorm(4, 16), nn.SiLU()
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, temb):
        x = self.down(self.conv_in(x), temb)
        x = self.up(self.mid(self.attention(x, temb=None), temb), temb)
        x = self.conv_norm_out(x)
        x = self.conv_act(x)
        return self.conv_out(x)


# ---- OpenAI's guided diffusion --------------------------------------------------------------------------


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).type(x.dtype)


class ResBlock(nn.Module):
    def __init__(self, channels, emb, dropout):
        super().__init__()
        conv = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.in_layers = nn.Sequential(GroupNorm32(4, channels), nn.SiLU(), conv[0])
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(4, channels), nn.SiLU(), nn.Dropout(dropout), conv[1]
        )

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return x + self.out_layers(h)


class GuidedUNet(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = ResBlock(16, 8, dropout), ResBlock(16, 8, dropout)

    def forward(self, x, emb):
        return self.b(self.a(self.first(x), emb), emb)


# Name -> a network called with an image [n,3 or 8,8,8] and an embedding [n,8], and its image channels.
FAMILIES = {
    "EDM, embedding added": (SongUNet, 3),
    "EDM, scale and shift": (lambda **options: SongUNet(adaptive=True, **options), 3),
    "EDM2": (EDM2UNet, 3),
    "diffusers": (UNet2DModel, 3),
    "diffusers, scale and shift": (lambda **options: UNet2DModel("scale_shift", **options), 3),
    "PhysicsNeMo": (lambda **options: PhysicsNeMo.SongUNet(False), 8),
    "PhysicsNeMo, scale and shift": (lambda **options: PhysicsNeMo.SongUNet(True), 8),
    "guided diffusion": (GuidedUNet, 3),
}
