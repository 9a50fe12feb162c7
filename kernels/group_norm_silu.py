"""Group normalisation with what surrounds it in a diffusion U-Net's block: the embedding added
before, scale, shift, SiLU and dropout after (Wu & He 2018; Karras et al. 2022, appendix C)."""

import torch
import torch.nn.functional as F

from tcm_fast.kernels.dropout import DropoutKey, dropout

# -- reference ------------------------------------------------------------------------------------


def group_norm_silu_reference(
    x,
    num_groups,
    weight,
    bias,
    eps=1e-5,
    *,
    silu=True,
    add=None,
    scale=None,
    shift=None,
    dropout_p=0.0,
    dropout_key=None,
):
    dtype = torch.promote_types(x.dtype, torch.float32)
    is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    y = x.to(dtype)
    if add is not None:
        y = y + add.to(dtype)[:, :, None, None]
    if y.is_cpu:
        # The channels_last path of torch 2.13 on a CPU takes the variance as E[x²] - E[x]², and its
        # backward pass crashes where the gradient of the weight is asked for and not that of x.
        y = y.contiguous()
    y = torch.group_norm(y, num_groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None:
        y = y * (1 + scale.to(dtype)[:, :, None, None])
    if shift is not None:
        y = y + shift.to(dtype)[:, :, None, None]
    if silu:
        y = F.silu(y)
    y = y.to(x.dtype).contiguous(memory_format=layout)
    if dropout_p > 0:
        y = dropout(y, dropout_p, dropout_key)
    return y


# -- public function ------------------------------------------------------------------------------


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_key: DropoutKey | None = None,
) -> torch.Tensor:
    """dropout(silu((1 + scale) · GN(x + add) + shift)).

    Args:
        x: activations [N,C,H,W] of a floating dtype, contiguous or channels_last.
        num_groups: number of groups, a divisor of C.
        weight, bias: affine parameters [C], fp32 as a rule.
        eps: added to the variance.
        silu: False leaves the SiLU out.
        add, scale, shift: per sample and channel, [N,C], each optional.
        dropout_p: share of the elements that is dropped, in [0, 1).
        dropout_key: keys the mask; required where dropout_p > 0.

    Returns:
        [N,C,H,W] in x's dtype and memory format; all in between is fp32 (float64 for float64).

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: shapes that do not fit, a dropout_p out of range or without a key.
    """
    if not x.is_floating_point():
        raise TypeError(f"group_norm_silu: x must be floating, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"group_norm_silu: x must be [N,C,H,W], got {list(x.shape)}")
    n, c = x.shape[:2]
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"group_norm_silu: num_groups must divide C={c}, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != (c,):
            raise ValueError(f"group_norm_silu: {name} must be [{c}], got {list(parameter.shape)}")
    for name, modulation in (("add", add), ("scale", scale), ("shift", shift)):
        if modulation is not None and modulation.shape != (n, c):
            raise ValueError(
                f"group_norm_silu: {name} must be [{n},{c}], got {list(modulation.shape)}"
            )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"group_norm_silu: dropout_p must be in [0,1), got {dropout_p}")
    if dropout_p > 0 and dropout_key is None:
        raise ValueError("group_norm_silu: dropout_key is required where dropout_p > 0, got None")
    return group_norm_silu_reference(
        x, num_groups, weight, bias, eps,
        silu=silu, add=add, scale=scale, shift=shift, dropout_p=dropout_p, dropout_key=dropout_key,
    )  # fmt: skip
