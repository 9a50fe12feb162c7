"""Two noisy versions of each image from one draw of noise: the inputs of a consistency step."""

from typing import NamedTuple

import torch

from tcm_fast.kernels.dropout import DropoutKey
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.kernels.precondition import preconditioning

# Layer numbers from here on key noise; the networks' dropout layers count up from 0.
NOISE_LAYER = 0x80000000


class NoisePair(NamedTuple):
    """y, x_t, x_r: fp32 [N,C,H,W]; input_t, input_r: c_in(t) x_t, c_in(r) x_r in the compute dtype,
    [N,C(+1),H,W]. x_r and input_r are None where no r was given."""

    y: torch.Tensor
    x_t: torch.Tensor
    x_r: torch.Tensor | None
    input_t: torch.Tensor
    input_r: torch.Tensor | None


# -- reference ------------------------------------------------------------------------------------


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 [..] -> fp32 in [-1, 1] (x/127.5 - 1); floating images pass unchanged, as fp32."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 127.5 - 1
    return images.to(torch.float32)


def network_input(
    x: torch.Tensor,
    t: torch.Tensor,
    sigma_data: float,
    dtype: torch.dtype,
    append_ones: bool = False,
) -> torch.Tensor:
    """c_in(t) x in the compute dtype, with EDM2's constant channel where asked for."""
    scaled = (preconditioning(t.to(x.dtype), sigma_data)[2] * x).to(dtype)
    return torch.cat([scaled, torch.ones_like(scaled[:, :1])], 1) if append_ones else scaled


def noise_pair_reference(y, t, r, noise, *, sigma_data=0.5, dtype=torch.float32, append_ones=False):
    y = to_unit_range(y)
    levels = [None if level is None else level.to(torch.float32) for level in (t, r)]
    noisy = [None if s is None else y + s.reshape(-1, 1, 1, 1) * noise for s in levels]
    inputs = [
        None if x is None else network_input(x, s, sigma_data, dtype, append_ones)
        for x, s in zip(noisy, levels, strict=True)
    ]
    return NoisePair(y, noisy[0], noisy[1], inputs[0], inputs[1])


# -- public function ------------------------------------------------------------------------------


def noise_pair(
    y: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor | None,
    key: DropoutKey,
    *,
    sigma_data: float = 0.5,
    dtype: torch.dtype = torch.float32,
    append_ones: bool = False,
) -> NoisePair:
    """x_t = y + t·eps and x_r = y + r·eps with the same unit Gaussian eps, and the networks' inputs.

    The noise of a sample depends on (seed, step, sample) of the key alone: not on the batch it is
    computed in, the layout or the device.

    Args:
        y: images [N,C,H,W], uint8 (mapped to [-1,1]) or floating in [-1,1].
        t: outer noise levels [N].
        r: inner noise levels [N], or None where only x_t is wanted.
        key: seed, step and the samples' numbers [N]; its layer is not used.
        sigma_data: standard deviation of the data.
        dtype: compute dtype of the networks' inputs.
        append_ones: add EDM2's constant channel to the inputs.

    Raises:
        ValueError: shapes that do not fit.
    """
    if y.ndim != 4:
        raise ValueError(f"noise_pair: y must be [N,C,H,W], got {list(y.shape)}")
    for name, level in (("t", t), ("r", r)):
        if level is not None and level.shape != y.shape[:1]:
            raise ValueError(f"noise_pair: {name} must be [{len(y)}], got {list(level.shape)}")
    noise = philox_normal(key.seed, key.step, NOISE_LAYER, key.sample, tuple(y.shape[1:]))
    return noise_pair_reference(
        y, t, r, noise, sigma_data=sigma_data, dtype=dtype, append_ones=append_ones
    )
