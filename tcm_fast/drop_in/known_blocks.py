"""The blocks of other people's U-Nets on the fused operations, known by class name and structure.

Each `Block` describes one published class: how to see that a module is one, what stands in for its
forward method, and inputs with which both can be compared. None of the packages is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.kernels._triton import runs_triton
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.group_norm_silu import group_norm_silu
from tcm_fast.kernels.modulate_mp_silu import modulate_mp_silu
from tcm_fast.kernels.mp_sum import MP_SILU, mp_sum
from tcm_fast.kernels.pixel_norm_mp_silu import pixel_norm_mp_silu
from tcm_fast.kernels.qkv_attention import qkv_attention
from tcm_fast.kernels.resample import resample
from tcm_fast.kernels.residual import residual
from tcm_fast.networks.layers import has_hooks


@dataclass(frozen=True)
class Block:
    """A class of other people's.

    label: what the report calls it. class_name: what they call it. parts: attributes it has.
    obstacle: module -> why this one is not supported, "" where it is.
    forward: (module, *arguments of their forward) -> their result.
    example: module -> arguments of a small trial.
    inside: names of the sub-modules that are no longer called, whose hooks would no longer run.
    """

    label: str
    class_name: str
    parts: tuple[str, ...]
    obstacle: Callable[[nn.Module], str]
    forward: Callable[..., Any]
    example: Callable[[nn.Module], tuple[torch.Tensor | None, ...]]
    inside: tuple[str, ...]


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module computes as its authors wrote it."""
    return type(module)._tcm_fast_original.forward(module, *args, **kwargs)  # type: ignore[attr-defined]


def has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


# ---- normalisations -----------------------------------------------------------------------------

NORM_NAMES = ("GroupNorm", "GroupNorm32")
NORM_PARTS = ("num_groups", "eps", "weight", "bias")


def norm_obstacle(module: nn.Module) -> str:
    """Why a module called GroupNorm is not one that `normalise` can stand in for."""
    if not has(module, *NORM_PARTS):
        return f"{type(module).__name__} is not a group normalisation that is known"
    if module.weight is None or module.bias is None:
        return "has no weight and bias"
    if module.weight.ndim != 1:
        return "has weights of another shape"
    if getattr(module, "act", None) not in (None, "", "silu"):
        return f"its activation is {module.act}, not silu"
    return ""


def activates(norm: Any) -> bool:
    """Whether a GroupNorm contains its SiLU, as PhysicsNeMo's may."""
    return getattr(norm, "act_fn", None) is not None


def normalise(x: torch.Tensor, norm: Any, *, silu: bool, **fused: Any) -> Any:
    """A GroupNorm module by the fused operation, whatever the dtype that its weights are kept in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias, eps = norm.weight.to(wide), norm.bias.to(wide), norm.eps
    if hasattr(norm, "amp_mode") and not norm.training:
        # In eval mode PhysicsNeMo's divides the sum of squares by one less.
        count = x[0].numel() // norm.num_groups
        share = (count - 1) / count
        weight, eps = weight * share**0.5, eps * share
    return group_norm_silu(x, norm.num_groups, weight, bias, eps, silu=silu, **fused)


def _norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    if x.ndim != 4:
        return original_forward(self, x)
    return normalise(x, self, silu=activates(self))


def _norm_example(module: Any) -> tuple[torch.Tensor | None, ...]:
    return (_image(len(module.weight)),)


def _image(channels: int, size: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


# ---- convolutions and sums ------------------------------------------------------------------------


def without_bias(conv: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's output and the bias that it has left to who reads the output; None where it has added
    its bias itself. Only torch's own convolution and EDM's, where it does not resample, leave it."""
    if has_hooks(conv) or not isinstance(getattr(conv, "bias", None), torch.Tensor):
        return conv(x), None
    if type(conv) is nn.Conv2d:
        return conv._conv_forward(x, conv.weight, None), conv.bias
    if type(conv).__name__ == "Conv2d" and has(conv, "up", "down") and not (conv.up or conv.down):
        return F.conv2d(x, conv.weight.to(x.dtype), padding=conv.weight.shape[-1] // 2), conv.bias
    return conv(x), None


def modulation(
    n: int, bias: torch.Tensor | None, params: torch.Tensor | None, is_scale_shift: bool
) -> dict[str, torch.Tensor]:
    """What the embedding's layer has computed for n samples, and the bias that the convolution before has
    left, as arguments of `group_norm_silu`."""
    fused: dict[str, torch.Tensor] = {}
    if params is not None and is_scale_shift:
        fused["scale"], fused["shift"] = params.chunk(2, 1)
    elif params is not None:
        fused["add"] = params
    if bias is not None:
        fused["add"] = fused["add"] + bias if "add" in fused else bias.expand(n, -1)
    return fused


def residual_sum(
    conv: nn.Module, h: torch.Tensor, skip: nn.Module | None, x: torch.Tensor, scale: float
) -> torch.Tensor:
    """(conv(h) + skip(x)) scale; where the sum is a kernel, it adds the biases of the two as well."""
    if not runs_triton("residual", h.device.type):  # a convolution adds its bias for nothing
        return (conv(h) + (x if skip is None else skip(x))) * scale
    h, bias = without_bias(conv, h)
    x, skip_bias = (x, None) if skip is None else without_bias(skip, x)
    dtype = torch.promote_types(h.dtype, x.dtype)
    return residual(h.to(dtype), x.to(dtype), scale, bias, skip_bias)


# ---- dropout ------------------------------------------------------------------------------------


def dropped(module: Any, x: torch.Tensor, p: float) -> dict[str, Any]:
    """Arguments that make `group_norm_silu` drop as torch would: at random by the default generator of
    x's device, without the host waiting for it."""
    if not module.training or p == 0:
        return {}
    bits = torch.randint(2**31, (2,), device=x.device)
    sample = torch.arange(len(x), device=x.device)
    key = PhiloxKey(seed=bits[0], step=bits[1], sample=sample)
    return {"dropout_p": p, "dropout_key": key}


# ---- UNetBlock of EDM, ECT, TCM, FastGen, PhysicsNeMo ---------------------------------------------


EDM_PARTS: tuple[str, ...] = (
    "norm0", "conv0", "affine", "norm1", "conv1",
    "skip", "num_heads", "dropout", "skip_scale", "adaptive_scale",
)  # fmt: skip


def _edm_obstacle(module: Any) -> str:
    attention = _attention(module) if module.num_heads else None
    if module.num_heads and attention is None:
        return "its attention has other parts"
    norms = [module.norm0, module.norm1]
    norms += [attention[0]] if attention else []
    return next(filter(None, map(norm_obstacle, norms)), "")


def _attention(block: Any) -> tuple[Any, Any, Any] | None:
    """norm2, qkv and proj; PhysicsNeMo has a module for them, whose norm had two names."""
    owner = block.attn if hasattr(block, "attn") else block
    for norm in ("norm2", "norm"):
        if has(owner, norm, "qkv", "proj"):
            return getattr(owner, norm), owner.qkv, owner.proj
    return None


def _edm_forward(self: Any, x: torch.Tensor, emb: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or any(kwargs.values()) or not 0 <= self.dropout < 1:  # TCM's emb_norm
        return original_forward(self, x, emb, *args, **kwargs)
    # Where x also goes past a normalisation, its two gradients meet in that one's kernel.
    h, x = normalise(x, self.norm0, silu=True, with_x=True)
    h, bias = without_bias(self.conv0, h)
    fused = modulation(len(h), bias, self.affine(emb), self.adaptive_scale)
    h = normalise(h, self.norm1, silu=True, **fused, **dropped(self, h, self.dropout))
    x = residual_sum(self.conv1, h, self.skip, x, self.skip_scale)
    if self.num_heads:
        norm, qkv, proj = _attention(self)  # type: ignore[misc]
        h, x = normalise(x, norm, silu=False, with_x=True)
        x = residual_sum(proj, qkv_attention(qkv(h), self.num_heads), None, x, self.skip_scale)
    return x


def _edm_example(module: Any) -> tuple[torch.Tensor | None, ...]:
    return _image(len(module.norm0.weight)), torch.randn(2, module.affine.weight.shape[1])


# ---- Block of EDM2, TCM, FastGen ------------------------------------------------------------------


EDM2_PARTS: tuple[str, ...] = (
    "conv_res0", "emb_linear", "conv_res1", "conv_skip", "attn_qkv",
    "attn_proj", "flavor", "resample_mode", "resample_filter", "num_heads",
    "dropout", "emb_gain", "res_balance", "attn_balance", "clip_act",
)  # fmt: skip


def _edm2_obstacle(module: Any) -> str:
    if module.resample_mode != "keep" and list(module.resample_filter) != [1, 1]:
        return f"its resampling filter is {list(module.resample_filter)}, not [1, 1]"
    return ""


def _edm2_forward(self: Any, x: torch.Tensor, emb: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or any(kwargs.values()) or not 0 <= self.dropout < 1:  # TCM's emb_norm
        return original_forward(self, x, emb, *args, **kwargs)
    mode = self.resample_mode
    if self.flavor == "enc":
        if mode != "keep":
            x, _ = resample(x, mode)
        x, h = pixel_norm_mp_silu(x if self.conv_skip is None else self.conv_skip(x))
    elif mode != "keep":
        x, h = resample(x, mode, with_silu=True)
    else:
        h = F.silu(x) * (1 / MP_SILU)
    h = self.conv_res0(h)
    gain = self.emb_gain.to(torch.promote_types(h.dtype, torch.float32)).reshape(())  # FastGen: [1]
    drops = h.shape[-1] in getattr(self, "dout_resolutions", h.shape[-1:])  # TCM's drop at some
    drop = dropped(self, h, self.dropout if drops else 0.0)
    h = modulate_mp_silu(h, self.emb_linear(emb), gain, **drop)
    h = self.conv_res1(h)
    if self.flavor == "dec" and self.conv_skip is not None:
        x = self.conv_skip(x)
    if not self.num_heads:
        return mp_sum(x, h, self.res_balance, clip=self.clip_act)[0]
    x, _ = mp_sum(x, h, self.res_balance)
    h = qkv_attention(self.attn_qkv(x), self.num_heads, normalize=True)
    return mp_sum(x, self.attn_proj(h), self.attn_balance, clip=self.clip_act)[0]


def _edm2_example(module: Any) -> tuple[torch.Tensor | None, ...]:
    skip = module.conv_skip
    first = module.conv_res0 if skip is None else skip
    return _image(first.weight.shape[1]), torch.randn(2, module.emb_linear.weight.shape[1])


# ---- ResnetBlock2D of diffusers -------------------------------------------------------------------


RESNET_PARTS: tuple[str, ...] = (
    "norm1", "conv1", "norm2", "dropout", "conv2",
    "nonlinearity", "time_emb_proj", "upsample", "downsample", "conv_shortcut",
    "time_embedding_norm", "skip_time_act", "output_scale_factor",
)  # fmt: skip


def _resnet_obstacle(module: Any) -> str:
    if type(module.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
    is_known = module.time_embedding_norm in ("default", "scale_shift")
    if not is_known and module.time_emb_proj is not None:
        return f"time_embedding_norm is {module.time_embedding_norm}"
    return norm_obstacle(module.norm1) or norm_obstacle(module.norm2)


def _resnet_forward(
    self: Any,
    input_tensor: torch.Tensor,
    temb: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    unknown = args or any(value is not None for value in kwargs.values())
    embeds = self.time_emb_proj is not None and temb is not None
    says_why = self.time_embedding_norm == "scale_shift" and not embeds  # what is missing
    if unknown or says_why or (temb is not None) != embeds or not 0 <= self.dropout.p < 1:
        return original_forward(self, input_tensor, temb, *args, **kwargs)
    h, x = normalise(input_tensor, self.norm1, silu=True, with_x=True)
    resample = self.upsample or self.downsample
    if resample is not None:
        x, h = resample(x), resample(h)
    h, bias = without_bias(self.conv1, h)
    params = None
    if embeds:
        params = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    fused = modulation(len(h), bias, params, self.time_embedding_norm == "scale_shift")
    drops = dropped(self.dropout, h, self.dropout.p)
    h = normalise(h, self.norm2, silu=True, **fused, **drops)
    return residual_sum(self.conv2, h, self.conv_shortcut, x, 1 / self.output_scale_factor)


def _resnet_example(module: Any) -> tuple[torch.Tensor | None, ...]:
    projection = module.time_emb_proj
    temb = None if projection is None else torch.randn(2, projection.weight.shape[1])
    return _image(len(module.norm1.weight)), temb


BLOCKS = (
    Block("EDM UNetBlock", "UNetBlock", EDM_PARTS, _edm_obstacle, _edm_forward, _edm_example,
          ("norm0", "norm1", "norm2", "attn", "attn.norm2", "attn.norm")),
    Block("EDM2 Block", "Block", EDM2_PARTS, _edm2_obstacle, _edm2_forward, _edm2_example, ()),
    Block("diffusers ResnetBlock2D", "ResnetBlock2D", RESNET_PARTS, _resnet_obstacle,
          _resnet_forward, _resnet_example, ("norm1", "norm2", "dropout")),
    *(
        Block("GroupNorm", name, NORM_PARTS, norm_obstacle, _norm_forward, _norm_example, ())
        for name in NORM_NAMES
    ),
)  # fmt: skip


def known_block(module: nn.Module) -> Block | None:
    """The class of whose name, parts and forward method a module is, or None."""
    author = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return next(
        (b for b in BLOCKS if b.class_name == author.__name__ and has(module, *b.parts)), None
    )


# ---- attention of diffusers -----------------------------------------------------------------------

ATTENTION_PARTS: tuple[str, ...] = (
    "processor", "to_q", "to_k", "to_v", "to_out",
    "heads", "group_norm", "spatial_norm", "residual_connection", "rescale_output_factor",
)  # fmt: skip
TORCH_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")  # that compute softmax(q·kᵀ/√d) v


class AttentionProcessor:
    """In place of the processor of a diffusers `Attention` over the pixels of an image: one product for
    q, k and v, then the fused attention. What it does not support goes to `original`."""

    def __init__(self, original: Any):
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        x = hidden_states
        is_plain = encoder_hidden_states is None and attention_mask is None and not args
        if x.ndim != 4 or not is_plain or any(kwargs.values()) or attention_obstacle(attn):
            return self.original(
                attn, x, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        h = x
        if attn.group_norm is not None:
            h, x = normalise(x, attn.group_norm, silu=False, with_x=True)
        projections = [attn.to_q, attn.to_k, attn.to_v]
        weight = torch.stack([p.weight for p in projections], 1).flatten(0, 1)
        bias = None
        if attn.to_q.bias is not None:
            bias = torch.stack([p.bias for p in projections], 1).flatten()
        h = F.conv2d(h, weight[:, :, None, None], bias)
        h = qkv_attention(h, attn.heads)
        linear, dropout = attn.to_out[0], attn.to_out[1]
        h = dropout(F.conv2d(h, linear.weight[:, :, None, None], linear.bias))
        if attn.residual_connection:
            h = h + x
        return h / attn.rescale_output_factor


def attention_obstacle(attn: Any) -> str:
    """Why the attention of a diffusers module is not supported, "" where it is."""
    if attn.spatial_norm is not None:
        return "has a spatial normalisation"
    if getattr(attn, "norm_q", None) is not None or getattr(attn, "norm_k", None) is not None:
        return "normalises q or k"
    linears = [attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]]
    if any(type(linear) is not nn.Linear for linear in linears):
        return "its projections are not plain linear layers"
    if len({linear.weight.shape for linear in linears[:3]}) > 1:
        return "q, k and v differ in width"
    if len({linear.bias is None for linear in linears[:3]}) > 1:
        return "only some of q, k and v have a bias"
    return "" if attn.group_norm is None else norm_obstacle(attn.group_norm)


def known_attention(module: Any) -> bool:
    """Whether a module is diffusers' `Attention`, by name and parts."""
    names = [kind.__name__ for kind in type(module).__mro__]
    return "Attention" in names and has(module, *ATTENTION_PARTS)


def attends_to_tokens(attn: Any) -> bool:
    """Whether an attention is one of a transformer's, over tokens instead of pixels."""
    return attn.group_norm is None and not attn.residual_connection


def sub_modules(module: nn.Module, paths: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Those of the sub-modules at `paths` that there are."""
    found = dict(module.named_modules())
    return ((path, found[path]) for path in paths if path in found)
