"""The consistency loss: from raw network outputs to a weighted distance per sample."""

from collections.abc import Callable

import torch

from tcm_fast.kernels._triton import Variant, launch, or_reference, runs_triton, tl, triton
from tcm_fast.kernels.precondition import denoise, preconditioning

Weighting = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

# -- reference ------------------------------------------------------------------------------------


def _c_out(t: torch.Tensor, sigma_data: float) -> torch.Tensor:
    return preconditioning(t, sigma_data)[1].flatten()


WEIGHTINGS: dict[str, Weighting] = {
    "inv_dt": lambda t, r, delta, sigma_data: 1 / delta,
    "inv_cout_sq": lambda t, r, delta, sigma_data: 1 / _c_out(t, sigma_data).square(),
    "inv_cout": lambda t, r, delta, sigma_data: 1 / _c_out(t, sigma_data),
    "inv_sqrt_dt": lambda t, r, delta, sigma_data: delta.rsqrt(),
    "one": lambda t, r, delta, sigma_data: torch.ones_like(t),
}
"""The weighting functions w(t, r) by name: t, r, delta = t - r [N] and sigma_data -> weights [N] in t's
dtype (Lee et al. 2025, section 4; ECT, table 1)."""


def _weight(weighting, t, r, delta, sigma_data):
    """The weights [N] that are given, or named."""
    if isinstance(weighting, torch.Tensor):
        return weighting
    return WEIGHTINGS[weighting](t, r, delta, sigma_data)


def consistency_loss_reference(
    output, x_t, t, target_output, x_r, r, *, delta, c, weighting, sigma_data=0.5, is_clean=None
):
    dtype = x_t.dtype
    t, r, delta = t.to(dtype), r.to(dtype), delta.to(dtype)
    target = denoise(target_output, x_r, r, sigma_data)
    if is_clean is not None:
        target = torch.where(is_clean.reshape(-1, 1, 1, 1), target_output.to(dtype), target)
    difference = denoise(output, x_t, t, sigma_data) - target.detach()
    # sqrt(|d|² + c²) - c, without the difference of nearly equal numbers where |d| is far below c;
    # the gradient d/sqrt(|d|² + c²) is 0, not NaN, where d = 0 and c > 0.
    square = difference.square().sum((1, 2, 3))
    distance = square / ((square + c**2).sqrt() + c)
    return _weight(weighting, t, r, delta, sigma_data).to(dtype) * distance


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def _coefficients(level, sigma_data):
    """c_skip, c_out at a noise level (scalars)."""
    sd = tl.full([], sigma_data, tl.float32)
    variance = level * level + sd * sd
    return tl.div_rn(sd * sd, variance), tl.div_rn(level * sd, tl.sqrt_rn(variance))


@triton.jit
def _difference(output, x_t, target, x_r, base, e, size, skip_t, out_t, skip_r, out_r):
    """D(x_t,t) - D(x_r,r) of the elements e of a sample."""
    at = base + e
    inside = e < size
    # A target that is given as an image has skip_r = 0, and its x_r is not read.
    noisy = e < tl.where(skip_r != 0, size, 0)
    f_t = tl.load(output + at, mask=inside, other=0).to(tl.float32)
    f_r = tl.load(target + at, mask=inside, other=0).to(tl.float32)
    d_t = skip_t * tl.load(x_t + at, mask=inside, other=0) + out_t * f_t
    d_r = skip_r * tl.load(x_r + at, mask=noisy, other=0) + out_r * f_r
    return d_t - d_r


@triton.jit
def _levels(t, r, is_clean, n, sigma_data, HAS_CLEAN: tl.constexpr):
    skip_t, out_t = _coefficients(tl.load(t + n), sigma_data)
    skip_r, out_r = _coefficients(tl.load(r + n), sigma_data)
    if HAS_CLEAN:
        clean = tl.load(is_clean + n) != 0
        skip_r = tl.where(clean, 0.0, skip_r)
        out_r = tl.where(clean, 1.0, out_r)
    return skip_t, out_t, skip_r, out_r


# One program per sample: an image is 3 to 48 KB, read once each way.
@triton.jit
def _consistency_loss_fwd_kernel(
    output, x_t, t, target, x_r, r, weight, is_clean, loss, coefficient, size, c, sigma_data,
    HAS_CLEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    base = n.to(tl.int64) * size
    skip_t, out_t, skip_r, out_r = _levels(t, r, is_clean, n, sigma_data, HAS_CLEAN)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        e = first + tl.arange(0, BLOCK)
        d = _difference(output, x_t, target, x_r, base, e, size, skip_t, out_t, skip_r, out_r)
        squares += d * d
    square = tl.sum(squares, 0)
    one = tl.full([], 1.0, tl.float32)
    root = tl.sqrt_rn(square + one * c * c)
    w = tl.load(weight + n)
    tl.store(loss + n, w * tl.div_rn(square, root + c))
    tl.store(coefficient + n, tl.div_rn(w * out_t, root))


# grad_output = grad_loss · w · d / sqrt(|d|² + c²) · c_out(t), d recomputed.
@triton.jit
def _consistency_loss_bwd_kernel(
    grad_loss, output, x_t, t, target, x_r, r, is_clean, coefficient, grad_output, size, sigma_data,
    HAS_CLEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    base = n.to(tl.int64) * size
    skip_t, out_t, skip_r, out_r = _levels(t, r, is_clean, n, sigma_data, HAS_CLEAN)
    factor = tl.load(grad_loss + n) * tl.load(coefficient + n)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = _difference(output, x_t, target, x_r, base, e, size, skip_t, out_t, skip_r, out_r)
    tl.store(grad_output + base + e, (factor * d).to(grad_output.dtype.element_ty), mask=e < size)


# -- launchers ------------------------------------------------------------------------------------

BLOCK = 1024  # four elements a thread: 16-byte accesses in fp32


def _same_layout(reference: torch.Tensor, *images: torch.Tensor) -> list[torch.Tensor]:
    """Dense images in one memory format, so that a position is one number in all of them."""
    is_channels_last = reference.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return [image.contiguous(memory_format=layout) for image in images]


def _fwd(output, x_t, t, target, x_r, r, weight, is_clean, c, sigma_data):
    output, x_t, target, x_r = _same_layout(output, output, x_t, target, x_r)
    n = len(x_t)
    loss, coefficient = (torch.empty(n, dtype=torch.float32, device=x_t.device) for _ in range(2))
    launch(
        _consistency_loss_fwd_kernel, (n,), output, x_t, t, target, x_r, r, weight,
        t if is_clean is None else is_clean, loss, coefficient, x_t[:1].numel(), c, sigma_data,
        HAS_CLEAN=is_clean is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return loss, coefficient


def _bwd(grad_loss, output, x_t, t, target, x_r, r, is_clean, coefficient, sigma_data):
    output, x_t, target, x_r = _same_layout(output, output, x_t, target, x_r)
    grad_output = torch.empty_like(output)
    n, size = len(x_t), x_t[:1].numel()
    launch(
        _consistency_loss_bwd_kernel, (n, -(-size // BLOCK)), grad_loss.contiguous(), output, x_t, t,
        target, x_r, r, t if is_clean is None else is_clean, coefficient, grad_output, size,
        sigma_data, HAS_CLEAN=is_clean is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return grad_output


def specialisations(capability: int) -> list[Variant]:
    """The forms in which CIFAR-10 and ImageNet-64 use the kernels."""
    variants = []
    for site, size in (("3x32x32", 3072), ("3x64x64", 12288)):
        for dtype in ("fp32", "fp16", "bf16"):
            images = {"output": f"*{dtype}", "x_t": "*fp32", "t": "*fp32"}
            images |= {"target": "*fp32", "x_r": "*fp32", "r": "*fp32"}
            flags = {"HAS_CLEAN": True, "BLOCK": BLOCK}
            fwd = images | {"weight": "*fp32", "is_clean": "*i1"}
            fwd |= {"loss": "*fp32", "coefficient": "*fp32", "size": "i32"}
            fwd |= {"c": "fp32", "sigma_data": "fp32"}
            bwd = {"grad_loss": "*fp32"} | images | {"is_clean": "*i1", "coefficient": "*fp32"}
            bwd |= {"grad_output": f"*{dtype}", "size": "i32", "sigma_data": "fp32"}
            for kernel, signature, programs in (
                (_consistency_loss_fwd_kernel, fwd, 128),
                (_consistency_loss_bwd_kernel, bwd, 128 * size // BLOCK),
            ):
                variants.append(
                    Variant(f"{site} {dtype}", kernel, signature, flags, num_warps=8,
                            aligned=frozenset({"size"}), programs=programs)
                )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(output, x_t, t, target, x_r, r, weight, is_clean, c, sigma_data):
    settings = dict(delta=t - r, c=c, sigma_data=sigma_data, is_clean=is_clean)
    loss = consistency_loss_reference(output, x_t, t, target, x_r, r, weighting=weight, **settings)
    d, c_out = _difference_by_reference(output, x_t, t, target, x_r, r, is_clean, sigma_data)
    return loss, weight * c_out.flatten() / (d.square().sum((1, 2, 3)) + c**2).sqrt()


def _difference_by_reference(output, x_t, t, target, x_r, r, is_clean, sigma_data):
    """D(x_t,t) - D(x_r,r), and c_out(t) [N,1,1,1]."""
    d_r = denoise(target, x_r, r, sigma_data)
    if is_clean is not None:
        d_r = torch.where(is_clean.reshape(-1, 1, 1, 1), target.to(d_r.dtype), d_r)
    return denoise(output, x_t, t, sigma_data) - d_r, preconditioning(t, sigma_data)[1]


def _bwd_by_reference(grad_loss, output, x_t, t, target, x_r, r, is_clean, coefficient, sigma_data):
    d, _ = _difference_by_reference(output, x_t, t, target, x_r, r, is_clean, sigma_data)
    grad_output = (grad_loss * coefficient).reshape(-1, 1, 1, 1) * d
    (output,) = _same_layout(output, output)
    return torch.empty_like(output).copy_(grad_output)


_fwd = or_reference(_fwd, _fwd_by_reference)
_bwd = or_reference(_bwd, _bwd_by_reference)


torch.library.define(
    "tcm_fast::consistency_loss_fwd",
    "(Tensor output, Tensor x_t, Tensor t, Tensor target, Tensor x_r, Tensor r, Tensor weight, "
    "Tensor? is_clean, float c, float sigma_data) -> (Tensor, Tensor)",
)
torch.library.define(
    "tcm_fast::consistency_loss_bwd",
    "(Tensor grad_loss, Tensor output, Tensor x_t, Tensor t, Tensor target, Tensor x_r, Tensor r, "
    "Tensor? is_clean, Tensor coefficient, float sigma_data) -> Tensor",
)
torch.library.impl("tcm_fast::consistency_loss_fwd", ("cpu", "cuda"), _fwd)
torch.library.impl("tcm_fast::consistency_loss_bwd", ("cpu", "cuda"), _bwd)


@torch.library.register_fake("tcm_fast::consistency_loss_fwd")
def _(output, x_t, t, target, x_r, r, weight, is_clean, c, sigma_data):
    return torch.empty_like(t), torch.empty_like(t)


@torch.library.register_fake("tcm_fast::consistency_loss_bwd")
def _(grad_loss, output, x_t, t, target, x_r, r, is_clean, coefficient, sigma_data):
    return torch.empty_like(_same_layout(output, output)[0])


def _save(ctx, inputs, output):
    images_and_levels, is_clean, ctx.sigma_data = inputs[:6], inputs[7], inputs[9]
    ctx.save_for_backward(*images_and_levels, is_clean, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _):
    *images_and_levels, is_clean, coefficient = ctx.saved_tensors
    grad_output = torch.ops.tcm_fast.consistency_loss_bwd(
        grad_loss, *images_and_levels, is_clean, coefficient, ctx.sigma_data
    )
    return grad_output, *[None] * 9


torch.library.register_autograd("tcm_fast::consistency_loss_fwd", _backward, setup_context=_save)


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
    weighting: str | torch.Tensor,
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
        weighting: weights [N], or a name in WEIGHTINGS: inv_dt 1/Δ, inv_sqrt_dt 1/√Δ, inv_cout 1/c_out(t),
            inv_cout_sq 1/c_out(t)², one.
        sigma_data: standard deviation of the data.
        is_clean: bool [N], rows whose target is given as an image.

    Returns:
        fp32 [N] (x_t's dtype). Source: Lee et al. 2025, eq. 8-10; Song & Dhariwal 2023, section 3.3.

    Raises:
        ValueError: shapes that differ, an unknown weighting, a c that is not positive, an x_t that
            asks for a gradient.
    """
    n = x_t.shape[:1]
    for name, image in (("output", output), ("target_output", target_output), ("x_r", x_r)):
        if image.shape != x_t.shape:
            raise ValueError(
                f"consistency_loss: {name} must be {list(x_t.shape)}, got {list(image.shape)}"
            )
    given = weighting if isinstance(weighting, torch.Tensor) else None
    vectors = {"t": t, "r": r, "delta": delta, "is_clean": is_clean, "weighting": given}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != n:
            raise ValueError(
                f"consistency_loss: {name} must be {list(n)}, got {list(vector.shape)}"
            )
    if not c > 0:
        raise ValueError(f"consistency_loss: c must be positive, got {c}")
    if given is None and weighting not in WEIGHTINGS:
        raise ValueError(
            f"consistency_loss: weighting must be one of {', '.join(WEIGHTINGS)} or a tensor, got "
            f"{weighting!r}"
        )
    if x_t.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "consistency_loss: output alone has a gradient, got x_t with requires_grad"
        )
    if x_t.dtype == torch.float64 or not runs_triton("consistency_loss", x_t.device.type):
        return consistency_loss_reference(
            output, x_t, t, target_output, x_r, r,
            delta=delta, c=c, weighting=weighting, sigma_data=sigma_data, is_clean=is_clean,
        )  # fmt: skip
    t, r, delta = t.to(torch.float32), r.to(torch.float32), delta.to(torch.float32)
    weight = _weight(weighting, t, r, delta, sigma_data).to(torch.float32)
    loss, _ = torch.ops.tcm_fast.consistency_loss_fwd(
        output, x_t.to(torch.float32), t, target_output, x_r.to(torch.float32), r, weight, is_clean,
        c, sigma_data,
    )  # fmt: skip
    return loss
