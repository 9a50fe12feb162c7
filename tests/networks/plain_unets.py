"""NCSN++, ADM and EDM2 written out from the published formulas, on a state dict: what the tests hold the
networks against. No fused operations, no modules, any dtype."""

import math

import torch
import torch.nn.functional as F


def resampled(x, taps, mode):
    """The resolution doubled or halved with a separable filter (Karras et al. 2022, appendix C)."""
    if mode is None:
        return x
    f = torch.tensor(taps, dtype=x.dtype)
    kernel = torch.outer(f, f) / f.sum() ** 2
    kernel = (kernel * (4 if mode == "up" else 1)).expand(x.shape[1], 1, -1, -1)
    convolve = F.conv_transpose2d if mode == "up" else F.conv2d
    return convolve(x, kernel, stride=2, padding=(len(taps) - 1) // 2, groups=x.shape[1])


def attention(qkv, heads, normalize=False):
    n, c3, height, width = qkv.shape
    q, k, v = qkv.reshape(n, heads, c3 // 3 // heads, 3, height * width).unbind(3)
    if normalize:
        q, k, v = (x / (1e-4 + x.square().mean(2, keepdim=True).sqrt()) for x in (q, k, v))
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(-1)
    return torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, -1, height, width)


class PlainEdm:
    """DDPM++'s relatives NCSN++ and ADM (Karras et al. 2022, table 7 and appendix C)."""

    def __init__(self, state, *, adm, resolution, levels, blocks, attn, taps=(1, 1)):
        self.state, self.adm, self.taps = state, adm, taps
        self.resolution, self.levels, self.blocks, self.attn = resolution, levels, blocks, attn

    def conv(self, x, name, mode=None, fused=False):
        weight, bias = (self.state[f"{name}.{part}"] for part in ("weight", "bias"))
        half = weight.shape[-1] // 2
        if fused:
            f = torch.tensor(self.taps, dtype=x.dtype)
            kernel = (torch.outer(f, f) / f.sum() ** 2).expand(len(weight), 1, -1, -1)
            x = F.conv2d(x, weight, padding=half + (len(self.taps) - 1) // 2)
            return F.conv2d(x, kernel, stride=2, groups=len(weight)) + bias[:, None, None]
        return F.conv2d(resampled(x, self.taps, mode), weight, bias, padding=half)

    def linear(self, x, name):
        y = x @ self.state[f"{name}.weight"].T
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def norm(self, x, name):
        groups, eps = min(32, x.shape[1] // 4), 1e-5 if self.adm else 1e-6
        grouped = x.reshape(len(x), groups, -1)
        mean = grouped.mean(2, keepdim=True)
        variance = (grouped - mean).square().mean(2, keepdim=True)
        x = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
        weight, bias = (self.state[f"{name}.{part}"] for part in ("weight", "bias"))
        return x * weight[:, None, None] + bias[:, None, None]

    def block(self, x, emb, name, mode=None, attend=False):
        scale = 1.0 if self.adm else math.sqrt(0.5)
        skip = x
        if f"{name}.skip.weight" in self.state:
            skip = self.conv(x, f"{name}.skip", mode)
        elif mode:
            skip = resampled(x, self.taps, mode)
        h = self.conv(F.silu(self.norm(x, f"{name}.norm0")), f"{name}.conv0", mode)
        params = self.linear(emb, f"{name}.affine")[:, :, None, None]
        if self.adm:
            gain, shift = params.chunk(2, 1)
            h = F.silu(self.norm(h, f"{name}.norm1") * (1 + gain) + shift)
        else:
            h = F.silu(self.norm(h + params, f"{name}.norm1"))
        x = (self.conv(h, f"{name}.conv1") + skip) * scale
        if attend:
            heads = x.shape[1] // 64 if self.adm else 1
            a = attention(self.conv(self.norm(x, f"{name}.norm2"), f"{name}.qkv"), heads)
            x = (self.conv(a, f"{name}.proj") + x) * scale
        return x

    def embed(self, c_noise, labels):
        width = self.state["map_layer0.weight"].shape[1]
        if self.adm:
            freqs = 10_000 ** -(torch.arange(width // 2, dtype=c_noise.dtype) / (width // 2))
            angle = c_noise[:, None] * freqs
            emb = torch.cat([angle.cos(), angle.sin()], 1)
        else:
            angle = c_noise[:, None] * 2 * math.pi * self.state["map_noise.freqs"]
            emb = torch.cat([angle.sin(), angle.cos()], 1)
            if labels is not None:
                emb = emb + self.linear(labels * math.sqrt(labels.shape[1]), "map_label")
        emb = self.linear(F.silu(self.linear(emb, "map_layer0")), "map_layer1")
        if self.adm and labels is not None:
            emb = emb + self.linear(labels, "map_label")
        return F.silu(emb)

    def __call__(self, x, c_noise, labels=None):
        emb = self.embed(c_noise, labels)
        sizes = [self.resolution >> level for level in range(self.levels)]
        aux = x
        skips = [x := self.conv(x, f"enc.{sizes[0]}x{sizes[0]}_conv")]
        for res in sizes:
            if res != sizes[0]:
                x = self.block(x, emb, f"enc.{res}x{res}_down", "down")
                if not self.adm:
                    aux = self.conv(aux, f"enc.{res}x{res}_aux_residual", fused=True)
                    x = aux = (x + aux) / math.sqrt(2)
                skips.append(x)
            for i in range(self.blocks):
                x = self.block(x, emb, f"enc.{res}x{res}_block{i}", attend=res in self.attn)
                skips.append(x)
        for res in reversed(sizes):
            if res == sizes[-1]:
                x = self.block(x, emb, f"dec.{res}x{res}_in0", attend=True)
                x = self.block(x, emb, f"dec.{res}x{res}_in1")
            else:
                x = self.block(x, emb, f"dec.{res}x{res}_up", "up")
            for i in range(self.blocks + 1):
                attend = res in self.attn and (self.adm or i == self.blocks)
                x = torch.cat([x, skips.pop()], 1)
                x = self.block(x, emb, f"dec.{res}x{res}_block{i}", attend=attend)
        norm, conv = ("out_norm", "out_conv")
        if not self.adm:
            norm, conv = (f"dec.{sizes[0]}x{sizes[0]}_aux_{part}" for part in ("norm", "conv"))
        return self.conv(F.silu(self.norm(x, norm)), conv)


class PlainEdm2:
    """EDM2, configuration G (Karras et al. 2024, figures 21 and 22, appendix B.4)."""

    def __init__(self, state, *, resolution, levels, blocks, attn, head):
        self.state, self.head = state, head
        self.resolution, self.levels, self.blocks, self.attn = resolution, levels, blocks, attn

    def conv(self, x, name):
        w = self.state[f"{name}.weight"]
        rms = w.square().flatten(1).mean(1).sqrt().reshape(-1, *[1] * (w.ndim - 1))
        w = w / (1e-4 + rms) / math.sqrt(w[0].numel())
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)

    @staticmethod
    def silu(x):
        return F.silu(x) / 0.596

    @staticmethod
    def sum(a, b, t):
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    @staticmethod
    def cat(a, b, t=0.5):
        na, nb = a.shape[1], b.shape[1]
        c = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
        return torch.cat([a * c * (1 - t) / math.sqrt(na), b * c * t / math.sqrt(nb)], 1)

    def block(self, x, emb, name, mode=None, attend=False):
        is_encoder = name.startswith("enc")
        x = resampled(x, (1, 1), mode)
        has_skip = f"{name}.conv_skip.weight" in self.state
        if is_encoder:
            x = self.conv(x, f"{name}.conv_skip") if has_skip else x
            x = x / (1e-4 + x.square().mean(1, keepdim=True).sqrt())
        y = self.conv(self.silu(x), f"{name}.conv_res0")
        c = self.conv(emb, f"{name}.emb_linear") * self.state[f"{name}.emb_gain"] + 1
        y = self.conv(self.silu(y * c[:, :, None, None]), f"{name}.conv_res1")
        if not is_encoder and has_skip:
            x = self.conv(x, f"{name}.conv_skip")
        x = self.sum(x, y, 0.3)
        if attend:
            heads = x.shape[1] // self.head
            y = attention(self.conv(x, f"{name}.attn_qkv"), heads, normalize=True)
            x = self.sum(x, self.conv(y, f"{name}.attn_proj"), 0.3)
        return x.clamp(-256, 256)

    def __call__(self, x, c_noise, labels=None):
        fourier = [self.state[f"emb_fourier.{part}"] for part in ("freqs", "phases")]
        emb = self.conv(
            math.sqrt(2) * torch.cos(c_noise[:, None] * fourier[0] + fourier[1]), "emb_noise"
        )
        if labels is not None:
            emb = self.sum(emb, self.conv(labels * math.sqrt(labels.shape[1]), "emb_label"), 0.5)
        emb = self.silu(emb)
        sizes = [self.resolution >> level for level in range(self.levels)]
        x = self.conv(
            torch.cat([x, torch.ones_like(x[:, :1])], 1), f"enc.{sizes[0]}x{sizes[0]}_conv"
        )
        skips = [x]
        for res in sizes:
            if res != sizes[0]:
                skips.append(x := self.block(x, emb, f"enc.{res}x{res}_down", "down"))
            for i in range(self.blocks):
                name = f"enc.{res}x{res}_block{i}"
                skips.append(x := self.block(x, emb, name, attend=res in self.attn))
        for res in reversed(sizes):
            if res == sizes[-1]:
                x = self.block(x, emb, f"dec.{res}x{res}_in0", attend=True)
                x = self.block(x, emb, f"dec.{res}x{res}_in1")
            else:
                x = self.block(x, emb, f"dec.{res}x{res}_up", "up")
            for i in range(self.blocks + 1):
                x = self.cat(x, skips.pop())
                x = self.block(x, emb, f"dec.{res}x{res}_block{i}", attend=res in self.attn)
        return self.conv(x, "out_conv") * self.state["out_gain"]
