"""Weights of which only each output row's direction counts (Karras et al. 2024, "Analyzing and improving the
training dynamics of diffusion models", section 2.3): what a network computes with, and the way back.

In training `fused_step` does all this in its pass over the weights; these functions serve frozen
networks, and state what it does.
"""

import math

import torch

from tcm_fast.kernels._common import NORM_EPS

# -- reference ------------------------------------------------------------------------------------


def rms_of_rows(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, ...]: [out, 1, ...]"""
    dims = list(range(1, weight.ndim))
    norm = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    return norm / math.sqrt(row_size(weight))


def row_size(weight: torch.Tensor) -> int:
    """Elements of an output row: its fan-in."""
    return math.prod(weight.shape[1:])


def normalized_rows(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, ...] in fp32 or wider: each row over its rms + 1e-4."""
    return weight / (NORM_EPS + rms_of_rows(weight))


def projected_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient at `weight` of its `normalized_copy`: what is along a row does not count.

    grad, weight: [out, ...]. With d = rms + 1e-4 and n elements of a row:
    (grad/d - weight (grad·weight) / (n rms d²)) / √n; the second term is 0 for a row of zeros.
    """
    dims, n = list(range(1, weight.ndim)), row_size(weight)
    rms = rms_of_rows(weight)
    d = rms + NORM_EPS
    along = (grad * weight).sum(dims, keepdim=True) / (n * rms * d).where(rms > 0, 1)
    return (grad - weight * along) / (d * math.sqrt(n))


# -- public function ------------------------------------------------------------------------------


def normalized_copy(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight that a layer multiplies by: rows over their rms + 1e-4 and over √fan_in, so that each
    has norm 1.

    Args:
        weight: [out, in, kh, kw] or [out, in].
        dtype: of the result; None is the weight's. Computed in fp32 at least.

    Returns:
        a tensor of the weight's shape and layout, part of the graph.

    Raises:
        ValueError: a weight without rows.
    """
    if weight.ndim < 2 or row_size(weight) == 0:
        raise ValueError(f"normalized_copy: weight must have rows, got {list(weight.shape)}")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scaled = normalized_rows(wide) / math.sqrt(row_size(weight))
    return scaled.to(weight.dtype if dtype is None else dtype)
