"""EDM's preconditioning: what turns the raw network F into the denoiser D (Karras et al. 2022, table 1)."""

import torch


def preconditioning(
    t: torch.Tensor, sigma_data: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """c_skip, c_out, c_in of D(x,t) = c_skip x + c_out F(c_in x, ln(t)/4).

    Args:
        t: noise levels (standard deviations) [N], any floating dtype.
        sigma_data: standard deviation of the data.

    Returns:
        Three tensors [N,1,1,1] of t's dtype: sd²/(t²+sd²), t·sd/√(t²+sd²), 1/√(t²+sd²).
    """
    t = t.reshape(-1, 1, 1, 1)
    variance = t.square() + sigma_data**2
    return sigma_data**2 / variance, t * sigma_data * variance.rsqrt(), variance.rsqrt()


def denoise(
    output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, sigma_data: float = 0.5
) -> torch.Tensor:
    """D = c_skip(t) x + c_out(t) F from the raw output F [N,C,H,W], x [N,C,H,W] and t [N]."""
    c_skip, c_out, _ = preconditioning(t.to(x.dtype), sigma_data)
    return c_skip * x + c_out * output.to(x.dtype)
