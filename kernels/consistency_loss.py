"""The consistency loss: from raw network outputs to a weighted distance per sample."""

from collections.abc import Callable

import torch

from tcm_fast.kernels._common import given, power_of_2, register, rows
from tcm_fast.kernels._triton import Variant, launch, runs_triton, tl, triton
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


def _with_bias(output, bias, dtype):
    """F in a wide dtype, with the bias [N,C] that it comes without."""
    output = output.to(dtype)
    return output if bias is None else output + bias.to(dtype)[:, :, None, None]


def consistency_loss_reference(
    output, x_t, t, target_output, x_r, r, *, delta, c, weighting, sigma_data=0.5, is_clean=None,
    output_bias=None, target_bias=None,
):  # fmt: skip
    dtype = x_t.dtype
    t, r, delta = t.to(dtype), r.to(dtype), delta.to(dtype)
    output = _with_bias(output, output_bias, dtype)
    target = denoise(_with_bias(target_output, target_bias, dtype), x_r, r, sigma_data)
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
def _difference(
    output, x_t, target, x_r, bias, target_bias, base, e, channel, size, skip_t, out_t, skip_r, out_r,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """D(x_t,t) - D(x_r,r) of the elements e of a sample; the biases are the sample's."""
    at = base + e
    inside = e < size
    # A target that is given as an image has skip_r = 0, and neither its x_r nor a bias is read.
    noisy = e < tl.where(skip_r != 0, size, 0)
    f_t = tl.load(output + at, mask=inside, other=0).to(tl.float32)
    f_r = tl.load(target + at, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        f_t += tl.load(bias + channel, mask=inside, other=0)
        f_r += tl.load(target_bias + channel, mask=noisy, other=0)
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


@triton.jit
def _channel(e, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Of the elements e of a sample; CHANNELS 0 is where nobody asks."""
    if CHANNELS_LAST and CHANNELS > 0:
        return e % CHANNELS
    return e // pixels


# One program per sample: an image is 3 to 48 KB, read once each way. `sums` [N,CHANNELS] of the differences
# over the pixels are what a bias's gradient needs.
@triton.jit
def _consistency_loss_fwd_kernel(
    output, x_t, t, target, x_r, r, weight, is_clean, bias, target_bias, loss, coefficient, sums,
    size, pixels, bias_stride, target_bias_stride, c, sigma_data,
    HAS_CLEAN: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    base = n.to(tl.int64) * size
    skip_t, out_t, skip_r, out_r = _levels(t, r, is_clean, n, sigma_data, HAS_CLEAN)
    squares = tl.zeros([BLOCK], tl.float32)
    columns = tl.arange(0, WIDTH)
    by_channel = tl.zeros([WIDTH], tl.float32)
    for first in range(0, size, BLOCK):
        e = first + tl.arange(0, BLOCK)
        channel = _channel(e, pixels, CHANNELS, CHANNELS_LAST)
        d = _difference(
            output, x_t, target, x_r, bias + n * bias_stride, target_bias + n * target_bias_stride,
            base, e, channel, size, skip_t, out_t, skip_r, out_r, CHANNELS > 0,
        )  # fmt: skip
        squares += d * d
        if CHANNELS > 0:
            own = channel[:, None] == columns[None, :]
            by_channel += tl.sum(tl.where(own, d[:, None], 0.0), 0)
    square = tl.sum(squares, 0)
    one = tl.full([], 1.0, tl.float32)
    root = tl.sqrt_rn(square + one * c * c)
    w = tl.load(weight + n)
    tl.store(loss + n, w * tl.div_rn(square, root + c))
    tl.store(coefficient + n, tl.div_rn(w * out_t, root))
    if CHANNELS > 0:
        tl.store(sums + n * CHANNELS + columns, by_channel, mask=columns < CHANNELS)


# grad_output = grad_loss · w · d / sqrt(|d|² + c²) · c_out(t), d recomputed; a bias's is its sum over the
# pixels.
@triton.jit
def _consistency_loss_bwd_kernel(
    grad_loss, output, x_t, t, target, x_r, r, is_clean, bias, target_bias, coefficient, sums,
    grad_output, grad_bias, size, pixels, bias_stride, target_bias_stride, sigma_data,
    HAS_CLEAN: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    base = n.to(tl.int64) * size
    skip_t, out_t, skip_r, out_r = _levels(t, r, is_clean, n, sigma_data, HAS_CLEAN)
    factor = tl.load(grad_loss + n) * tl.load(coefficient + n)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = _difference(
        output, x_t, target, x_r, bias + n * bias_stride, target_bias + n * target_bias_stride, base,
        e, _channel(e, pixels, CHANNELS, CHANNELS_LAST), size, skip_t, out_t, skip_r, out_r,
        CHANNELS > 0,
    )  # fmt: skip
    tl.store(grad_output + base + e, (factor * d).to(grad_output.dtype.element_ty), mask=e < size)
    if CHANNELS > 0:
        columns = tl.arange(0, WIDTH)
        is_own = columns < tl.where(tl.program_id(1) == 0, CHANNELS, 0)
        at = n * CHANNELS + columns
        tl.store(grad_bias + at, factor * tl.load(sums + at, mask=is_own, other=0), mask=is_own)


# -- launchers ------------------------------------------------------------------------------------

BLOCK = 1024  # four elements a thread: 16-byte accesses in fp32
WIDEST = 16  # channels whose biases the kernels add: their gradients take as many numbers for each element


def _same_layout(reference: torch.Tensor, *images: torch.Tensor) -> list[torch.Tensor]:
    """Dense images in one memory format, so that a position is one number in all of them."""
    is_channels_last = reference.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return [image.contiguous(memory_format=layout) for image in images]


def _biases(bias, target_bias, output):
    """The two biases' memory and the strides of their rows; of absent ones, what is not touched."""
    bias, target_bias = given(output, rows(bias), rows(target_bias))
    return (bias, target_bias), (bias.stride(0), target_bias.stride(0))


def _options(output, is_clean, bias):
    channels = 0 if bias is None else output.shape[1]
    return dict(
        HAS_CLEAN=is_clean is not None, CHANNELS=channels,
        CHANNELS_LAST=output.is_contiguous(memory_format=torch.channels_last),
        WIDTH=power_of_2(channels), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def _results(output, t, bias):
    """Memory for the losses, for what the gradient needs of each sample, and of each of its channels."""
    channels = 0 if bias is None else output.shape[1]
    shapes = (len(t),), (len(t),), (len(t), channels)
    return tuple(torch.empty(s, dtype=torch.float32, device=t.device) for s in shapes)


def _fwd(output, x_t, t, target, x_r, r, weight, is_clean, bias, target_bias, c, sigma_data):
    output, x_t, target, x_r = _same_layout(output, output, x_t, target, x_r)
    results = _results(output, t, bias)
    biases, strides = _biases(bias, target_bias, output)
    n, pixels = len(x_t), x_t.shape[2] * x_t.shape[3]
    launch(
        _consistency_loss_fwd_kernel, (n,), output, x_t, t, target, x_r, r, weight,
        *given(t, is_clean), *biases, *results, x_t[:1].numel(), pixels, *strides, c, sigma_data,
        **_options(output, is_clean, bias),
    )  # fmt: skip
    return results


def _gradients(output, bias):
    """Memory for the gradients at F and at its bias."""
    grad_output = torch.empty_like(_same_layout(output, output)[0])
    shape = (0,) if bias is None else bias.shape
    return grad_output, torch.empty(shape, dtype=torch.float32, device=output.device)


def _bwd(
    grad_loss, output, x_t, t, target, x_r, r, is_clean, bias, target_bias, coefficient, sums,
    sigma_data,
):  # fmt: skip
    output, x_t, target, x_r = _same_layout(output, output, x_t, target, x_r)
    grads = _gradients(output, bias)
    biases, strides = _biases(bias, target_bias, output)
    n, size, pixels = len(x_t), x_t[:1].numel(), x_t.shape[2] * x_t.shape[3]
    launch(
        _consistency_loss_bwd_kernel, (n, -(-size // BLOCK)), grad_loss.contiguous(), output, x_t, t,
        target, x_r, r, *given(t, is_clean), *biases, coefficient, sums, *grads, size, pixels,
        *strides, sigma_data, **_options(output, is_clean, bias),
    )  # fmt: skip
    return grads


def specialisations(capability: int) -> list[Variant]:
    """The forms in which CIFAR-10 (with the last convolution's bias) and ImageNet-64 use the kernels."""
    variants = []
    for site, size, channels in (("3x32x32", 3072, 3), ("3x64x64", 12288, 0)):
        for dtype in ("fp32", "fp16", "bf16"):
            images = {"output": f"*{dtype}", "x_t": "*fp32", "t": "*fp32"}
            images |= {"target": "*fp32", "x_r": "*fp32", "r": "*fp32"}
            biases = dict.fromkeys(("bias", "target_bias"), "*fp32" if channels else f"*{dtype}")
            sizes = dict.fromkeys(("size", "pixels", "bias_stride", "target_bias_stride"), "i32")
            flags = {"HAS_CLEAN": True, "CHANNELS": channels, "CHANNELS_LAST": True}
            flags |= {"WIDTH": power_of_2(channels), "BLOCK": BLOCK}
            fwd = images | {"weight": "*fp32", "is_clean": "*i1"} | biases
            fwd |= {"loss": "*fp32", "coefficient": "*fp32", "sums": "*fp32"} | sizes
            fwd |= {"c": "fp32", "sigma_data": "fp32"}
            bwd = {"grad_loss": "*fp32"} | images | {"is_clean": "*i1"} | biases
            bwd |= {"coefficient": "*fp32", "sums": "*fp32", "grad_output": f"*{dtype}"}
            bwd |= {"grad_bias": "*fp32"} | sizes | {"sigma_data": "fp32"}
            # A parameter that is expanded has rows 0 apart; without biases the strides are an image's.
            aligned = {"size", "pixels", "bias_stride"} | (
                set() if channels else {"target_bias_stride"}
            )
            for kernel, signature, programs in (
                (_consistency_loss_fwd_kernel, fwd, 128),
                (_consistency_loss_bwd_kernel, bwd, 128 * size // BLOCK),
            ):
                variants.append(
                    Variant(f"{site} {dtype}", kernel, signature, flags, num_warps=8,
                            aligned=frozenset(aligned), programs=programs)
                )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _difference_by_reference(
    output, x_t, t, target, x_r, r, is_clean, bias, target_bias, sigma_data
):
    """D(x_t,t) - D(x_r,r), and c_out(t) [N,1,1,1]."""
    d_r = denoise(_with_bias(target, target_bias, x_r.dtype), x_r, r, sigma_data)
    if is_clean is not None:
        d_r = torch.where(is_clean.reshape(-1, 1, 1, 1), target.to(d_r.dtype), d_r)
    d_t = denoise(_with_bias(output, bias, x_t.dtype), x_t, t, sigma_data)
    return d_t - d_r, preconditioning(t, sigma_data)[1]


def _fwd_by_reference(
    output, x_t, t, target, x_r, r, weight, is_clean, bias, target_bias, c, sigma_data
):
    d, c_out = _difference_by_reference(
        output, x_t, t, target, x_r, r, is_clean, bias, target_bias, sigma_data
    )
    square = d.square().sum((1, 2, 3))
    root = (square + c**2).sqrt()
    loss, coefficient, sums = _results(output, t, bias)
    loss.copy_(weight * square / (root + c))
    coefficient.copy_(weight * c_out.flatten() / root)
    if bias is not None:
        sums.copy_(d.sum((2, 3)))
    return loss, coefficient, sums


def _bwd_by_reference(
    grad_loss, output, x_t, t, target, x_r, r, is_clean, bias, target_bias, coefficient, sums,
    sigma_data,
):  # fmt: skip
    d, _ = _difference_by_reference(
        output, x_t, t, target, x_r, r, is_clean, bias, target_bias, sigma_data
    )
    factor = grad_loss * coefficient
    grad_output, grad_bias = _gradients(output, bias)
    grad_output.copy_(factor.reshape(-1, 1, 1, 1) * d)
    if bias is not None:
        grad_bias.copy_(factor[:, None] * sums)
    return grad_output, grad_bias


def _save(ctx, inputs, output):
    ctx.sigma_data = inputs[11]
    ctx.save_for_backward(*inputs[:6], *inputs[7:10], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    grad_output, grad_bias = torch.ops.tcm_fast.consistency_loss_bwd(
        grad_loss, *ctx.saved_tensors, ctx.sigma_data
    )
    grad_bias = grad_bias if ctx.needs_input_grad[8] else None
    return grad_output, *[None] * 7, grad_bias, *[None] * 3


IMAGES = "Tensor output, Tensor x_t, Tensor t, Tensor target, Tensor x_r, Tensor r"
OPTIONAL = "Tensor? is_clean, Tensor? bias, Tensor? target_bias"
register(
    f"consistency_loss_fwd({IMAGES}, Tensor weight, {OPTIONAL}, float c, float sigma_data) "
    "-> (Tensor, Tensor, Tensor)",
    _fwd, _fwd_by_reference,
    lambda output, x_t, t, target, x_r, r, weight, is_clean, bias, *_: _results(output, t, bias),
    save=_save, backward=_backward,
)  # fmt: skip
register(
    f"consistency_loss_bwd(Tensor grad_loss, {IMAGES}, {OPTIONAL}, Tensor coefficient, Tensor sums, "
    "float sigma_data) -> (Tensor, Tensor)",
    _bwd, _bwd_by_reference,
    lambda grad_loss, output, x_t, t, target, x_r, r, is_clean, bias, *_: _gradients(output, bias),
)  # fmt: skip


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
    output_bias: torch.Tensor | None = None,
    target_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """w(t,r) · (√(‖D(x_t,t) - sg D(x_r,r)‖² + c²) - c) for each sample, the norm over the whole image.

    Args:
        output: raw output F of the student at (x_t, t), [N,C,H,W]; only it and output_bias have gradients.
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
        output_bias, target_bias: [N,C], of the networks' last convolutions where F comes without them
            (`Precond.raw_and_bias`); of the targets those that `is_clean` flags get none.

    Returns:
        fp32 [N] (x_t's dtype). Source: Lee et al. 2025, eq. 8-10; Song & Dhariwal 2023, section 3.3.

    Raises:
        ValueError: shapes that differ, an unknown weighting, a c that is not positive, an x_t that
            asks for a gradient.
    """
    for name, image in (("output", output), ("target_output", target_output), ("x_r", x_r)):
        if image.shape != x_t.shape:
            raise ValueError(
                f"consistency_loss: {name} must be {list(x_t.shape)}, got {list(image.shape)}"
            )
    weights = weighting if isinstance(weighting, torch.Tensor) else None
    vectors = {"t": t, "r": r, "delta": delta, "is_clean": is_clean, "weighting": weights}
    for name, vector in (
        vectors | {"output_bias": output_bias, "target_bias": target_bias}
    ).items():
        shape = x_t.shape[:2] if name.endswith("bias") else x_t.shape[:1]
        if vector is not None and vector.shape != shape:
            raise ValueError(
                f"consistency_loss: {name} must be {list(shape)}, got {list(vector.shape)}"
            )
    if not c > 0:
        raise ValueError(f"consistency_loss: c must be positive, got {c}")
    if weights is None and weighting not in WEIGHTINGS:
        raise ValueError(
            f"consistency_loss: weighting must be one of {', '.join(WEIGHTINGS)} or a tensor, got "
            f"{weighting!r}"
        )
    if x_t.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "consistency_loss: only output and output_bias have a gradient, got x_t with requires_grad"
        )
    if x_t.dtype == torch.float64 or not runs_triton("consistency_loss", x_t.device.type):
        return consistency_loss_reference(
            output, x_t, t, target_output, x_r, r,
            delta=delta, c=c, weighting=weighting, sigma_data=sigma_data, is_clean=is_clean,
            output_bias=output_bias, target_bias=target_bias,
        )  # fmt: skip
    biases: list[torch.Tensor | None] = [None, None]
    if output_bias is not None or target_bias is not None:
        zeros = x_t.new_zeros(x_t.shape[:2], dtype=torch.float32)
        biases = [zeros if b is None else b.to(torch.float32) for b in (output_bias, target_bias)]
    if biases[0] is not None and x_t.shape[1] > WIDEST:
        if is_clean is not None:
            biases[1] = torch.where(is_clean[:, None], 0, biases[1])
        output, target_output = (
            _with_bias(f, b, torch.float32)
            for f, b in zip((output, target_output), biases, strict=True)
        )
        biases = [None, None]
    t, r, delta = t.to(torch.float32), r.to(torch.float32), delta.to(torch.float32)
    weight = _weight(weighting, t, r, delta, sigma_data).to(torch.float32)
    loss, *_ = torch.ops.tcm_fast.consistency_loss_fwd(
        output, x_t.to(torch.float32), t, target_output, x_r.to(torch.float32), r, weight, is_clean,
        *biases, c, sigma_data,
    )  # fmt: skip
    return loss
