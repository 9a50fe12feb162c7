"""The operations: plain PyTorch references and, where they can run, kernels of the same numbers."""

from tcm_fast.kernels.consistency_loss import consistency_loss
from tcm_fast.kernels.conv_bf16x3 import conv_bf16x3
from tcm_fast.kernels.dropout import PhiloxKey, dropout, dropout_mask
from tcm_fast.kernels.fused_step import StepControl, StepOptions, StepTable, StepTensors, fused_step
from tcm_fast.kernels.group_norm_silu import group_norm_silu
from tcm_fast.kernels.modulate_mp_silu import modulate_mp_silu
from tcm_fast.kernels.mp_cat_mp_silu import mp_cat_mp_silu
from tcm_fast.kernels.mp_sum import mp_sum
from tcm_fast.kernels.noise_pair import noise_pair
from tcm_fast.kernels.normalized_copy import normalized_copy
from tcm_fast.kernels.philox import philox_bits, philox_normal
from tcm_fast.kernels.pixel_norm_mp_silu import pixel_norm_mp_silu
from tcm_fast.kernels.posterior_mean import posterior_mean
from tcm_fast.kernels.precondition import preconditioning
from tcm_fast.kernels.qkv_attention import qkv_attention
from tcm_fast.kernels.resample import resample
from tcm_fast.kernels.residual import residual
from tcm_fast.kernels.residual_conv1x1 import residual_conv1x1

__all__ = [
    "PhiloxKey",
    "StepControl",
    "StepOptions",
    "StepTable",
    "StepTensors",
    "consistency_loss",
    "conv_bf16x3",
    "dropout",
    "dropout_mask",
    "fused_step",
    "group_norm_silu",
    "modulate_mp_silu",
    "mp_cat_mp_silu",
    "mp_sum",
    "noise_pair",
    "normalized_copy",
    "philox_bits",
    "philox_normal",
    "pixel_norm_mp_silu",
    "posterior_mean",
    "preconditioning",
    "qkv_attention",
    "resample",
    "residual",
    "residual_conv1x1",
]
