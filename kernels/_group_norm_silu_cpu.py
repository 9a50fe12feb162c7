"""`group_norm_silu` by the C++ extension: fp32 on a CPU, in channels_last."""

import torch

from tcm_fast.kernels._backend import extension_for, extension_gap
from tcm_fast.kernels._common import of_channels
from tcm_fast.kernels._triton import calls_directly


def affine_of(weight, bias):
    return [of_channels(v).contiguous() for v in (weight, bias)]


def on_cpu(x, *operands):
    """Whether the extension serves these tensors: fp32 on a CPU, x in channels_last."""
    return (
        x.device.type == "cpu"
        and all(v is None or v.dtype == torch.float32 for v in (x, *operands))
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and calls_directly(x)
        and not extension_gap(x.device)
    )


def _dense(*tensors):
    return [None if v is None else v.contiguous() for v in tensors]


def _addresses(*tensors):
    return [0 if v is None else v.data_ptr() for v in tensors]


def fwd_cpu(
    x, weight, bias, add, scale, shift, sample, seed, step, num_groups, eps, silu, layer, threshold
):
    n, c, h, w = x.shape
    y, (mean, rstd) = torch.empty_like(x), statistics(x, num_groups)
    operands, key = _dense(*affine_of(weight, bias), add, scale, shift), _dense(sample, seed, step)
    extension_for("group_norm_silu", x.device).group_norm_silu_fwd_cpu(
        *_addresses(y, x, *operands, mean, rstd), n, c, h * w, num_groups, eps, silu,
        *_addresses(*key), layer, threshold, torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, rstd


def bwd_cpu(
    grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, num_groups, silu,
    layer, threshold, wants_affine, *_,
):  # fmt: skip
    n, c, h, w = x.shape
    grad_y, grad_past = (
        None if v is None else v.contiguous(memory_format=torch.channels_last)
        for v in (grad_y, grad_past)
    )
    grad_x = torch.empty_like(x)
    by_sample = x.new_empty((2, n, c)) if wants_affine else None
    grads = [None if v is None else x.new_empty((n, c)) for v in (add, scale, shift)]
    operands, key = _dense(*affine_of(weight, bias), add, scale, shift), _dense(sample, seed, step)
    extension_for("group_norm_silu", x.device).group_norm_silu_bwd_cpu(
        *_addresses(grad_y, grad_past, grad_x, by_sample, *grads, x, *operands, mean, rstd),
        n, c, h * w, num_groups, silu, *_addresses(*key), layer, threshold, torch.get_num_threads(),
    )  # fmt: skip
    if by_sample is None:
        affine = x.new_zeros((2, *weight.shape))
    else:
        affine = by_sample.sum(1) if weight.ndim == 1 else by_sample
    return [grad_x, affine, *(v for v in grads if v is not None)]


def statistics(x, num_groups):
    shape = (x.shape[0], num_groups)
    return tuple(torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
