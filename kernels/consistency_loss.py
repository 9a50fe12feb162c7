"""The consistency loss: from raw network outputs to a weighted distance per sample."""

from collections.abc import Callable

import torch

from tcm_fast.kernels.precondition import denoise, preconditioning

Weight = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

WEIGHTINGS = ("inv_dt", "inv_cout_sq", "inv_cout", "inv_sqrt_dt", "one")

# -- reference ------------------------------------------------------------------------------------


def loss_weight(
    weighting: str | torch.Tensor | Weight,
    t: torch.Tensor,
    r: torch.Tensor,
    delta: torch.Tensor,
    sigma_data: float = 0.5,
) -> torch.Tensor:
    """The weighting function at (t, r), [N], in t's dtype (Lee et al. 2025, section 4; ECT, table 1)."""
    if isinstance(weighting, torch.Tensor):
        return weighting
    if callable(weighting):
        return weighting(t, r)
    c_out = preconditioning(t, sigma_data)[1].flatten()
    return {
        "inv_dt": lambda: 1 / delta,
        "inv_sqrt_dt": lambda: delta.rsqrt(),
        "inv_cout": lambda: 1 / c_out,
        "inv_cout_sq": lambda: 1 / c_out.square(),
        "one": lambda: torch.ones_like(t),
    }[weighting]()


def consistency_loss_reference(
    output, x_t, t, target_output, x_r, r, *, delta, c, weighting, sigma_data=0.5, is_clean=None
):
    dtype = x_t.dtype
    t, r, delta = t.to(dtype), r.to(dtype), delta.to(dtype)
    target = denoise(target_output, x_r, r, sigma_data)
    if is_clean is not None:
        target = torch.where(is_clean.reshape(-1, 1, 1, 1), target_output.to(dtype), target)
    difference = denoise(output, x_t, t, sigma_data) - target.detach()
    # sqrt(|d|² + c²) - c; its gradient d/sqrt(|d|² + c²) is 0, not NaN, where d = 0 and c > 0.
    distance = (difference.square().sum((1, 2, 3)) + c**2).sqrt() - c
    return loss_weight(weighting, t, r, delta, sigma_data).to(dtype) * distance


# -- public function ------------------------------------------------------------------------------


def consistency_loss(
    output: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    target_output: torch.Tensor,
    x_r: torch.Tensor,
    r: torch.Tensor,
    *,
    delta: torch.Tensor,
    c: float,
    weighting: str | torch.Tensor | Weight,
    sigma_data: float = 0.5,
    is_clean: torch.Tensor | None = None,
) -> torch.Tensor:
    """w(t,r) · (√(‖D(x_t,t) - sg D(x_r,r)‖² + c²) - c) for each sample, the norm over the whole image.

    Args:
        output: raw output F of the student at (x_t, t), [N,C,H,W]; the only input with a gradient.
        x_t, x_r: noisy images [N,C,H,W], fp32 (float64 for an oracle).
        t, r: noise levels [N], r < t.
        target_output: raw output F of the target's network at (x_r, r), [N,C,H,W]; rows flagged by
            `is_clean` hold the target itself.
        delta: t - r, formed in float64 (in fp32 the difference loses digits), [N].
        c: constant of the pseudo-Huber distance, positive.
        weighting: inv_dt 1/Δ, inv_sqrt_dt 1/√Δ, inv_cout 1/c_out(t), inv_cout_sq 1/c_out(t)², one;
            or weights [N]; or a function of (t, r).
        sigma_data: standard deviation of the data.
        is_clean: bool [N], rows whose target is given as an image.

    Returns:
        fp32 [N] (x_t's dtype). Source: Lee et al. 2025, eq. 8-10; Song & Dhariwal 2023, section 3.3.

    Raises:
        ValueError: shapes that differ, an unknown weighting, a c that is not positive.
    """
    n = x_t.shape[:1]
    for name, image in (("output", output), ("target_output", target_output), ("x_r", x_r)):
        if image.shape != x_t.shape:
            raise ValueError(
                f"consistency_loss: {name} must be {list(x_t.shape)}, got {list(image.shape)}"
            )
    for name, vector in (("t", t), ("r", r), ("delta", delta), ("is_clean", is_clean)):
        if vector is not None and vector.shape != n:
            raise ValueError(
                f"consistency_loss: {name} must be {list(n)}, got {list(vector.shape)}"
            )
    if not c > 0:
        raise ValueError(f"consistency_loss: c must be positive, got {c}")
    if isinstance(weighting, str) and weighting not in WEIGHTINGS:
        raise ValueError(
            f"consistency_loss: weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}"
        )
    return consistency_loss_reference(
        output, x_t, t, target_output, x_r, r,
        delta=delta, c=c, weighting=weighting, sigma_data=sigma_data, is_clean=is_clean,
    )  # fmt: skip
