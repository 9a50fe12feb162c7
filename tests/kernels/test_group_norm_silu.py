import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcm_fast.kernels import _backend, _triton
from tcm_fast.kernels._common import sigmoid
from tcm_fast.kernels._group_norm_silu_cpu import fwd_cpu
from tcm_fast.kernels._group_norm_silu_plan import plan_slabs
from tcm_fast.kernels.dropout import PhiloxKey, dropout_mask
from tcm_fast.kernels.group_norm_silu import (
    _group_norm_silu_bwd_kernel,
    _group_norm_silu_fwd_kernel,
    _kernels,
    group_norm_silu,
    group_norm_silu_reference,
    specialisations,
)
from tcm_fast.kernels.residual import residual

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Relative to the largest element of the result: a few rounding steps of the output's dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def naive(x, num_groups, weight, bias, eps, silu=True, add=None, scale=None, shift=None):
    """The formula in float64, term by term."""
    n, c, height, width = x.shape
    x = x.double()
    if add is not None:
        x = x + add.double().reshape(n, c, 1, 1)
    groups = x.reshape(n, num_groups, c // num_groups * height * width)
    mean = groups.mean(-1, keepdim=True)
    variance = (groups - mean).square().mean(-1, keepdim=True)
    y = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape)
    y = y * weight.double().reshape(1, c, 1, 1) + bias.double().reshape(1, c, 1, 1)
    if scale is not None:
        y = y * (1 + scale.double().reshape(n, c, 1, 1))
    if shift is not None:
        y = y + shift.double().reshape(n, c, 1, 1)
    return y * torch.sigmoid(y) if silu else y


def case(n=3, c=12, height=5, width=7, dtype=torch.float32, layout=torch.channels_last, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = (3 * draw(n, c, height, width) + 1).to(dtype).contiguous(memory_format=layout)
    affine_dtype = torch.promote_types(dtype, torch.float32)
    affine = [draw(c).to(affine_dtype) for _ in range(2)]
    modulation = {name: draw(n, c).to(dtype) for name in ("add", "scale", "shift")}
    return x, affine, modulation


def key(n, seed=5):
    return PhiloxKey(seed=seed, step=2, layer=1, sample=torch.arange(n))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("modulated", [False, True])
def test_forward_is_the_formula(dtype, layout, modulated):
    x, (weight, bias), modulation = case(dtype=dtype, layout=layout)
    modulation = modulation if modulated else {}
    y = group_norm_silu(x, 3, weight, bias, 1e-6, silu=modulated, **modulation)
    expected = naive(x, 3, weight, bias, 1e-6, silu=modulated, **modulation)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCES[dtype]


@given(
    n=st.integers(0, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 5),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=40, deadline=None)
def test_any_size(n, groups, width, size, layout):
    x, (weight, bias), modulation = case(n, groups * width, *size, layout=layout)
    y = group_norm_silu(x, groups, weight, bias, **modulation)
    assert y.shape == x.shape
    expected = naive(x, groups, weight, bias, 1e-5, **modulation)
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_by_finite_differences(layout):
    x, affine, modulation = case(2, 4, 2, 3, dtype=torch.float64, layout=layout)
    tensors = [v.requires_grad_() for v in (x, *affine, *modulation.values())]

    def function(x, weight, bias, add, scale, shift):
        return group_norm_silu_reference(
            x, 2, weight, bias, add=add, scale=scale, shift=shift, dropout_p=0.3, dropout_key=key(2)
        )

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("asked", ["x", "weight", "bias", "affine"])
def test_any_subset_of_gradients_on_channels_last(asked):
    # On a CPU, torch 2.13's own backward pass kills the process for all but the first of these.
    x, (weight, bias), _ = case()
    chosen = {"x": [x], "weight": [weight], "bias": [bias], "affine": [weight, bias]}[asked]
    for tensor in chosen:
        tensor.requires_grad_()
    grads = torch.autograd.grad(group_norm_silu(x, 3, weight, bias).square().sum(), chosen)
    expected = torch.autograd.grad(naive(x, 3, weight, bias, 1e-5).square().sum(), chosen)
    for grad, reference in zip(grads, expected, strict=True):
        assert torch.allclose(grad, reference, rtol=1e-4, atol=1e-4)

    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    some = torch.autograd.grad(group_norm_silu(x, 3, weight, bias).square().sum(), chosen)
    for grad, reference in zip(some, expected, strict=True):
        assert torch.allclose(grad, reference, rtol=1e-4, atol=1e-4)


def test_layouts_agree_with_dropout_and_a_split_batch():
    x, (weight, bias), modulation = case()
    arguments = {"dropout_p": 0.4, "dropout_key": key(3)}
    whole = group_norm_silu(x, 3, weight, bias, **modulation, **arguments)
    assert torch.allclose(
        whole,
        group_norm_silu(x.contiguous(), 3, weight, bias, **modulation, **arguments),
        atol=1e-5,
    )
    rows = torch.tensor([2, 0])
    part = group_norm_silu(
        x[rows], 3, weight, bias, **{k: v[rows] for k, v in modulation.items()},
        dropout_p=0.4, dropout_key=key(3).select(rows),
    )  # fmt: skip
    assert torch.allclose(whole[rows], part, atol=1e-6)

    kept = dropout_mask(key(3), 0.4, tuple(x.shape), x.device)
    plain = group_norm_silu(x, 3, weight, bias, **modulation)
    assert torch.allclose(whole, plain * kept / (1 - round(0.4 * 65536) / 65536), atol=1e-5)


def test_non_contiguous_input():
    x, (weight, bias), _ = case(width=14)
    x.requires_grad_()
    y = group_norm_silu(x[..., ::2], 3, weight, bias)
    assert torch.allclose(y.double(), naive(x[..., ::2], 3, weight, bias, 1e-5), atol=1e-4)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    expected = naive(x[..., ::2], 3, weight, bias, 1e-5).square().sum()
    assert torch.allclose(grad, torch.autograd.grad(expected, x)[0], rtol=1e-3, atol=1e-4)


def test_autocast_keeps_the_dtype_of_the_input():
    x, (weight, bias), modulation = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_norm_silu(x, 3, weight, bias, add=modulation["add"].bfloat16())
    assert y.dtype == torch.float32
    expected = naive(x, 3, weight, bias, 1e-5, add=modulation["add"].bfloat16())
    assert torch.allclose(y.double(), expected, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_large_mean_leaves_the_variance_exact(layout, dtype):
    # E[x²] - E[x]² would lose it entirely.
    x, (weight, bias), _ = case(height=16, width=16, layout=layout)
    x = (x / 10 + 500).to(dtype)
    y = group_norm_silu(x, 3, weight, bias)
    assert (y.double() - naive(x, 3, weight, bias, 1e-5)).abs().max() < 3e-3


def test_compiles_to_one_graph():
    x, (weight, bias), modulation = case()
    x.requires_grad_()
    weight.requires_grad_()
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    outputs = [f(x, 3, weight, bias, **modulation) for f in (compiled, group_norm_silu)]
    assert torch.allclose(*outputs, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in outputs]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "num_groups must divide C=12, got 5"),
        ({"num_groups": 0}, "num_groups must divide C=12, got 0"),
        ({"weight": torch.ones(11)}, r"weight must be \[12\], or both .* got \[11\]"),
        ({"bias": torch.ones(12, 1)}, r"bias must be \[12\], or both .* got \[12, 1\]"),
        (
            {"bias": torch.ones(12).expand(3, 12)},
            r"or both expanded \(stride 0\) to \[3,12\], got \[3, 12\]",
        ),
        (
            {"weight": torch.ones(3, 12)},
            r"weight must be \[12\], or both expanded \(stride 0\) to \[3,12\]",
        ),
        ({"add": torch.ones(3, 12, 1, 1)}, r"add must be \[3,12\]"),
        ({"scale": torch.ones(12)}, r"scale must be \[3,12\], got \[12\]"),
        ({"x": torch.ones(3, 12)}, r"x must be \[N,C,H,W\], got \[3, 12\]"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0,1\), got 1.0"),
        ({"dropout_p": 0.5}, "dropout_key is required"),
    ],
)
def test_refuses(change, message):
    x, (weight, bias), _ = case()
    arguments = {"x": x, "num_groups": 3, "weight": weight, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments)


def test_refuses_half_precision_parameters_and_other_devices():
    x, (weight, bias), modulation = case(dtype=torch.float16)
    with pytest.raises(TypeError, match=r"weight must be fp32, got torch\.float16"):
        group_norm_silu(x, 3, weight.half(), bias)
    with pytest.raises(TypeError, match=r"bias must be fp32, got torch\.bfloat16"):
        group_norm_silu(x, 3, weight, bias.bfloat16())
    with pytest.raises(ValueError, match=r"bias must be on cpu, got meta"):
        group_norm_silu(x, 3, weight, bias.to("meta"))
    with pytest.raises(ValueError, match=r"scale must be on cpu, got meta"):
        group_norm_silu(x, 3, weight, bias, scale=modulation["scale"].to("meta"))


def test_refuses_integers():
    with pytest.raises(TypeError, match=r"x must be floating, got torch\.uint8"):
        group_norm_silu(torch.ones(1, 4, 2, 2, dtype=torch.uint8), 1, torch.ones(4), torch.ones(4))


def test_silu_of_torch_is_the_one_meant():
    x, (weight, bias), _ = case(dtype=torch.float64)
    plain = group_norm_silu(x, 3, weight, bias, silu=False)
    assert torch.allclose(group_norm_silu(x, 3, weight, bias), F.silu(plain))


# ---- the extension on a CPU ---------------------------------------------------------------------


@pytest.fixture
def extension(monkeypatch):
    if _backend.extension() is None:
        pytest.skip(f"needs tcm_fast._C: {_backend._load()[1]}")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")


def by_extension(x, *operands):
    kernels = _kernels(x, *operands)
    return kernels is not None and kernels[0] is fwd_cpu


# n, c, height, width, groups: the digits' and CIFAR-10's, more than one run of pixels, runs that begin
# within a block of Philox, channels that fill no vector, one group, one pixel, one channel.
CPU_SITES = [
    (2, 64, 8, 8, 16), (3, 32, 4, 4, 8), (2, 96, 16, 16, 24), (1, 130, 6, 7, 13), (2, 9, 20, 21, 1),
    (3, 24, 1, 1, 3), (2, 1, 3, 5, 1), (1, 2100, 2, 1, 3),
]  # fmt: skip


@pytest.mark.parametrize("site", CPU_SITES, ids=str)
@pytest.mark.parametrize("given", ["", "add", "add scale shift"])
@pytest.mark.parametrize("dropout_p", [0, 0.3])
@pytest.mark.parametrize("silu", [True, False])
def test_extension(
    site, given, dropout_p, silu, extension, check_against_oracle, monkeypatch
):  # fmt: skip
    *shape, groups = site
    x, affine, modulation = case(*shape)
    modulation = {name: modulation[name] for name in given.split()}
    assert by_extension(x, *affine, *modulation.values())
    # What is not written is NaN.
    torch.use_deterministic_algorithms(True)
    try:
        compare(
            x, groups, affine, modulation, check_against_oracle, monkeypatch, silu=silu,
            dropout_p=dropout_p, dropout_key=key(len(x)) if dropout_p else None,
            with_x=not given,
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)


def test_extension_does_not_depend_on_threads_or_the_rest_of_the_batch(extension):
    x, affine, modulation = case(9, 32, 16, 16)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()

    def outcome(rows, threads):
        torch.set_num_threads(threads)
        tensors = [v[rows].requires_grad_() for v in (x, *modulation.values())]
        options = dict(zip(modulation, tensors[1:], strict=True))
        y = group_norm_silu(
            tensors[0], 8, *affine, **options, dropout_p=0.3, dropout_key=key(9).select(rows)
        )
        return [y, *torch.autograd.grad(y, tensors, grad[rows])]

    try:
        whole = outcome(slice(None), 1)
        for rows, threads in ((slice(None), 3), (slice(2, 5), 1)):
            for a, b in zip(whole, outcome(rows, threads), strict=True):
                assert torch.equal(a[rows], b)
    finally:
        torch.set_num_threads(before)


def test_extension_on_an_empty_batch_and_with_gradients_of_another_layout(extension, monkeypatch):
    x, (weight, bias), _ = case(4, 12, 5, 7)
    tensors = [v.requires_grad_() for v in (x, weight, bias)]
    grad = torch.randn(4, 24, 5, 7)[:, 6:18]  # as from a concatenation
    y = group_norm_silu(x, 3, weight, bias)
    expected = torch.autograd.grad(naive(x, 3, weight, bias, 1e-5), tensors, grad)
    for a, b in zip(torch.autograd.grad(y, tensors, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    monkeypatch.setenv("TCM_FAST_BACKEND", "")
    empty = group_norm_silu(x[:0], 3, weight, bias)
    assert empty.shape == (0, 12, 5, 7)
    assert not torch.autograd.grad(empty.sum(), weight)[0].any()


@pytest.mark.parametrize("mean", [500.0, -3e4])
def test_extension_keeps_the_variance_beside_a_large_mean(mean, extension):
    x, (weight, bias), _ = case(2, 24, 32, 32)
    x = x / 10 + mean
    y = group_norm_silu(x, 3, weight, bias, silu=False)
    error = (y.double() - naive(x, 3, weight, bias, 1e-5, silu=False)).abs().max()
    # The mean's rounding to fp32 shifts x by half a unit in its last place, over std 0.3.
    assert error < 2 * weight.abs().max() * abs(mean) * 2**-24 / 0.3 + 1e-5


def test_extension_far_from_zero(extension):
    z = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    x = torch.zeros(len(z), 1, 1, 1, requires_grad=True)
    shift = z[:, None].clone().requires_grad_()
    y = group_norm_silu(x, 1, torch.ones(1), torch.zeros(1), shift=shift)
    (grad,) = torch.autograd.grad(y.sum(), shift)
    wide = z.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(wide).sum(), wide)
    # Rounding of the exponential, a polynomial within 1.1e-7, and of four operations.
    rounding = 1.1e-7 + 5 * 2**-24
    beyond = 1.7e-28 * (1 + wide.abs())  # e^-64 stands for all that is smaller
    error = (y.flatten().double() - F.silu(wide)).abs()
    assert (error <= rounding * F.silu(wide).abs() + beyond).all()
    # s + z s (1 - s): each summand with the error of s, and 1 - s with that of 1 besides.
    sigmoid = wide.sigmoid()
    terms = sigmoid + 2 * wide.abs() * sigmoid
    assert ((grad.flatten().double() - slope).abs() <= 2 * rounding * terms + beyond).all()


def test_extension_hands_on_what_is_not_finite(extension):
    x, (weight, bias), modulation = case(3, 12, 4, 4)
    x[1, 2, 3, 1] = math.nan
    y = group_norm_silu(x, 3, weight, bias)
    assert y[1, :4].isnan().all()
    assert y[1, 4:].isfinite().all()
    assert y[[0, 2]].isfinite().all()
    modulation["shift"][0, 5] = math.inf
    assert group_norm_silu(x, 3, weight, bias, shift=modulation["shift"])[0, 5].isinf().all()


def test_where_the_extension_serves(extension, monkeypatch):
    x, (weight, bias), modulation = case()
    monkeypatch.setenv("TCM_FAST_BACKEND", "")
    assert by_extension(x, weight, bias)
    assert not by_extension(x.contiguous(), weight, bias)
    assert not by_extension(x.bfloat16(), weight, bias)
    assert not by_extension(x, weight, bias, modulation["add"].bfloat16())
    assert not by_extension(x.double(), weight, bias)
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    assert not by_extension(x, weight, bias)


def test_extension_refuses_a_second_derivative(extension):
    x, (weight, bias), _ = case()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(
        group_norm_silu(x, 3, weight, bias).square().sum(), x, create_graph=True
    )
    expected = torch.autograd.grad(naive(x, 3, weight, bias, 1e-5).square().sum(), x)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)


def test_the_extension_refuses_what_would_reach_beyond_memory(extension):
    ext, x = _backend.extension(), torch.zeros(2, 12, 3, 3)
    place = x.data_ptr()

    def call(groups=3, channels=12, threshold=0, threads=1, y=place):
        ext.group_norm_silu_fwd_cpu(
            y, place, place, place, 0, 0, 0, place, place, 2, channels, 9, groups, 1e-5, True, 0, 0,
            0, 0, threshold, threads,
        )  # fmt: skip

    for change, message in (
        ({"groups": 5}, "groups must divide the channels, got 5 and 12"),
        ({"groups": 0}, "groups must divide the channels"),
        ({"threads": 0}, "threads must be positive"),
        ({"threshold": 65536}, "threshold must be below 65536"),
        ({"threshold": 5}, "addresses must not be null"),
        ({"y": 0}, "addresses must not be null"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)


# ---- the Triton kernels -------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# On the emulator each form of a kernel compiles for seconds, and the two of 16 bits are one code.
EACH_DTYPE = [
    pytest.param(dtype, marks=[pytest.mark.slow_emulated] * (dtype == torch.float16))
    for dtype in DTYPES
]
# n, c, height, width, groups: the networks' channels a group (4, 8, 16; 6, 12, 18, 30, 42), sizes that
# fill no tile, one group of all, slabs that do not divide the groups, one pixel.
SITES = [
    (1, 128, 8, 8, 32),
    pytest.param((2, 64, 16, 16, 8), marks=pytest.mark.slow_emulated),
    (2, 32, 8, 8, 2),
    pytest.param((1, 48, 16, 16, 8), marks=pytest.mark.slow_emulated),
    (1, 48, 8, 8, 4),
    (1, 72, 5, 7, 4),
    (1, 120, 4, 4, 4),
    (1, 84, 7, 3, 2),
    (3, 24, 1, 1, 3),
    (2, 130, 3, 3, 13),
    (1, 9, 12, 11, 1),
    (2, 40, 1, 17, 5),
]


def run(x, groups, affine, modulation, grad, monkeypatch, backend="kernel", dtype=None, **options):
    """Output and gradients of all inputs, by kernel or reference, in dtype if given. `with_x`: x goes on
    past the normalisation."""
    monkeypatch.setenv("TCM_FAST_BACKEND", backend)
    tensors = [x, *affine, *modulation.values()]
    tensors = [v.detach().to(dtype or v.dtype).requires_grad_() for v in tensors]
    y = group_norm_silu(
        tensors[0], groups, *tensors[1:3], 1e-6,
        **dict(zip(modulation, tensors[3:], strict=True)), **options,
    )  # fmt: skip
    grad = grad.to(x.device, dtype or x.dtype)
    if options.get("with_x"):
        y, past = y
        assert past.data_ptr() == tensors[0].data_ptr()
        return [y, *torch.autograd.grad([y, past], tensors, [grad, grad.flip(0, 1) + grad])]
    return [y, *torch.autograd.grad(y, tensors, grad)]


def compare(x, groups, affine, modulation, check, monkeypatch, **options):
    """The kernel against float64, allowed twice the error of the reference."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(x.shape, generator=generator).to(x)
    arguments = (x, groups, affine, modulation, grad, monkeypatch)
    ours = run(*arguments, **options)
    plain = run(*arguments, backend="reference", **options)
    oracle = run(*arguments, backend="reference", dtype=torch.float64, **options)
    names = ("y", "x", "weight", "bias", *modulation)
    over_pixels = grad.double().abs().sum((2, 3)).max().item()  # the other factors are about 1
    for name, *results in zip(names, ours, plain, oracle, strict=True):
        check(*results, name, terms=0.0 if name in ("y", "x") else over_pixels)
    assert ours[0].stride() == ours[1].stride() == x.stride()


def on(device, n, c, height, width, dtype, layout):
    x, affine, modulation = case(n, c, height, width, dtype, layout)
    move = lambda v: v.to(device)  # noqa: E731
    return move(x), [move(v) for v in affine], {k: move(v) for k, v in modulation.items()}


def key_on(device, n):
    sample = torch.arange(n, device=device) * 7 + 2**32 - 40
    return PhiloxKey(seed=2**32 - 5, step=2**33 + 1, layer=2**31 + 3, sample=sample)


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
def test_kernel_adds_the_gradient_that_goes_past(
    size, layout, dtype, triton_device, check_against_oracle, monkeypatch
):
    x, affine, modulation = on(triton_device, 2 if size == 4 else 1, 24, size, size, dtype, layout)
    compare(x, 3, affine, modulation, check_against_oracle, monkeypatch, with_x=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize(
    "site",
    [
        (2, 24, 8, 5, 3, 4),  # groups of one and the other
        (1, 13, 7, 3, 5, 5),  # a group of both
        (2, 1, 5, 1, 1, 2),
        (1, 256, 128, 4, 4, 32),
        # Read twice. In NCHW it compiles to an instruction that the emulator lacks.
        pytest.param((1, 20, 12, 64, 64, 8), marks=pytest.mark.slow_emulated),
    ],
    ids=str,
)
def test_kernel_joins_two(site, dtype, layout, triton_device, check_against_oracle, monkeypatch):
    """With the joined tensor's gradient beside that of the normalised one."""
    n, first, second, height, width, groups = site
    x, affine, modulation = on(triton_device, n, first + second, height, width, dtype, layout)
    upstream = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    upstream = [v.to(x).contiguous(memory_format=layout) for v in upstream]

    def results(backend, dtype=dtype):
        monkeypatch.setenv("TCM_FAST_BACKEND", backend)
        parts = [v.to(dtype).contiguous(memory_format=layout) for v in x.split([first, second], 1)]
        wide = torch.promote_types(dtype, torch.float32)
        tensors = [*parts, *(v.to(wide) for v in affine), modulation["add"].to(dtype)]
        tensors = [v.detach().requires_grad_() for v in tensors]
        a, b, weight, bias, add = tensors
        options = dict(add=add, with_x=True, second=b)
        y, *past = group_norm_silu(a, groups, weight, bias, 1e-6, **options)
        assert all(torch.equal(u, v) for u, v in zip(past, (a, b), strict=True))
        assert y.is_contiguous(memory_format=layout)
        # Slices of one tensor, and tensors of their own.
        of_past = upstream[1].to(dtype).split([first, second], 1)
        upstreams = [upstream[0].to(dtype), *of_past]
        grads = torch.autograd.grad([y, *past], tensors, upstreams, retain_graph=True)
        upstreams = [upstreams[0], *(g.contiguous(memory_format=layout) for g in of_past)]
        apart = torch.autograd.grad([y, *past], tensors, upstreams)
        assert all(torch.equal(u, v) for u, v in zip(grads, apart, strict=True))
        return [y, *grads]

    ours, again = results("kernel"), results("kernel")
    assert all(torch.equal(p, q) for p, q in zip(ours, again, strict=True))
    plain, oracle = results("reference"), results("reference", torch.float64)
    over_pixels = upstream[0].double().abs().sum((2, 3)).max().item()
    names = ("y", "x", "second", "weight", "bias", "add")
    for name, *found in zip(names, ours, plain, oracle, strict=True):
        check_against_oracle(*found, name, terms=0.0 if name in names[:3] else over_pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_joined_images_start_anywhere(layout, dtype, triton_device, monkeypatch):
    """Images that start one number past a multiple of 16 bytes: on a GPU or emulated an access of 16 bytes
    would be an error."""
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    n, first, second, size, groups = 2, 16, 24, 4, 4
    x, affine, _ = on(triton_device, n, first + second, size, size, dtype, layout)
    images = [v.contiguous(memory_format=layout) for v in x.split([first, second], 1)]

    def moved(v):
        room = v.new_empty(v.numel() + 1)[1:]
        v = room.as_strided(v.shape, v.stride(), room.storage_offset()).copy_(v)
        assert v.data_ptr() % 16 == v.itemsize
        return v

    def results(a, b, sums):
        tensors = [v.detach().requires_grad_() for v in (a, b, *affine)]
        a, b, weight, bias = tensors
        skip = {"skip": images[0].flip(0)} if sums else {}
        y = group_norm_silu(a, groups, weight, bias, second=b, **skip)
        return [y, *torch.autograd.grad(y, tensors, y.detach().cos())]

    for sums in (False, True):
        expected = results(*images, sums)
        for which in ((0, 1), (0,), (1,)):
            parts = [moved(v) if i in which else v for i, v in enumerate(images)]
            for u, v in zip(expected, results(*parts, sums), strict=True):
                assert torch.equal(u, v)


# n, channels, of `second`, height, width, groups; factor, biases, whether the sum goes past twice.
SUM_SITES = [
    (2, 24, 0, 5, 3, 4, 0.7, 2, True),
    (1, 13, 7, 3, 5, 5, 1.0, 2, False),  # a group of both
    (2, 1, 0, 5, 1, 1, 0.7, 1, True),
    (1, 48, 0, 8, 8, 4, 0.7, 0, False),
    (1, 256, 128, 4, 4, 32, 0.7, 2, True),
    pytest.param((1, 128, 0, 8, 8, 32, 0.7, 1, True), marks=pytest.mark.slow_emulated),
    pytest.param(
        (1, 40, 0, 25, 31, 1, 0.7, 1, True), marks=pytest.mark.slow_emulated
    ),  # read twice
    pytest.param((1, 24, 16, 28, 25, 1, 1.0, 2, False), marks=pytest.mark.slow_emulated),
    pytest.param((1, 384, 0, 8, 8, 32, 1.0, 2, True), marks=pytest.mark.slow),
    pytest.param((1, 256, 256, 16, 16, 32, 0.7, 2, False), marks=pytest.mark.slow),
]


class Summed:
    """A residual sum, joined to another tensor, on its way into a normalisation."""

    def __init__(self, site, dtype, layout, device, mean=0.0):
        self.n, first, second, height, width, self.groups, self.factor, count, self.twice = site
        x, affine, modulation = case(self.n, first + second, height, width, torch.float64, layout)
        parts = [x[:, :first] + mean, x[:, :first].flip(0, 3) / 2, x[:, first:]]
        parts = [v.to(dtype).contiguous(memory_format=layout) for v in parts[: 2 + (second > 0)]]
        biases = [affine[i][:first].float() for i in range(count)]
        self.names = ["x", "skip", "second"][: len(parts)]
        self.names += [*["x_bias", "skip_bias"][:count], "weight", "bias"]
        self.names += [name for name in modulation if count == 1 or name == "add"]
        leaves = [*parts, *biases, *(v.float() for v in affine)]
        leaves += [modulation[name].to(dtype) for name in self.names if name in modulation]
        self.leaves = [v.to(device) for v in leaves]
        self.maps = 2 if self.twice else 1
        generator = torch.Generator().manual_seed(1)
        widths = [first + second, *[first] * self.maps, *[second] * (second > 0)]
        self.upstream = [
            torch.randn((self.n, c, height, width), generator=generator).to(device, dtype)
            for c in widths
        ]
        self.key = key_on(device, self.n)

    def results(self, dtype=None, *, by_sample=False, apart=False, before=None, without=()):
        """Outputs and gradients by name; `apart`: `residual` first, then the normalisation; `before`: the
        sum, which was carried out."""
        leaves = [
            v.detach()
            .to(torch.promote_types(dtype, v.dtype) if dtype else v.dtype)
            .requires_grad_()
            for v in self.leaves
        ]
        given = dict(zip(self.names, leaves, strict=True))
        if by_sample:
            rows = ("x_bias", "skip_bias", "weight", "bias")
            given |= {k: v.expand(self.n, -1) for k, v in given.items() if k in rows}
        given["sum_scale"] = self.factor
        if apart:
            terms = [given.pop(k, None) for k in ("skip", "sum_scale", "x_bias", "skip_bias")]
            given["x"] = residual(given["x"], *terms)
        if before is not None:
            given["x"] = leaves[0] = before.detach().clone().requires_grad_()
            given["summed"] = given.pop("skip") is not None
        drop = dict(dropout_p=0.3, dropout_key=self.key) if self.factor == 1 else {}
        outputs = group_norm_silu(
            num_groups=self.groups, eps=1e-6, with_x=True, twice=self.twice, **given, **drop
        )
        used = [
            (out, g.to(out.dtype))
            for i, (out, g) in enumerate(zip(outputs, self.upstream, strict=True))
            if i not in without
        ]
        outs, upstream = zip(*used, strict=True)
        grads = torch.autograd.grad(outs, leaves, upstream, allow_unused=True)
        found = {"y": outputs[0], "sum": outputs[1]}
        return found | {f"grad_{k}": v for k, v in zip(self.names, grads, strict=True)}


def is_interpreted():
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    return isinstance(_group_norm_silu_fwd_kernel, interpreter.InterpretedFunction)


def over_pixels(name, upstream):
    if name in ("y", "sum", "grad_x", "grad_skip", "grad_second"):
        return 0.0
    total, *past = (g.double().abs().sum((2, 3)) for g in upstream)
    for g in past:  # of the sum, or of `second` behind it
        begin = 0 if g.shape[1] == past[0].shape[1] else total.shape[1] - g.shape[1]
        total[:, begin : begin + g.shape[1]] += g
    return total.max().item()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize("site", SUM_SITES, ids=str)
def test_kernel_sums(site, dtype, layout, triton_device, check_against_oracle, monkeypatch):
    """Under random gradients of the normalised sum and of the sum itself."""
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    summed = Summed(site, dtype, layout, triton_device)
    before = _triton.LAUNCHES["_residual_fwd_kernel"]
    ours, again = summed.results(), summed.results()
    assert _triton.LAUNCHES["_residual_fwd_kernel"] == before
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert ours["sum"].is_contiguous(memory_format=layout)
    assert ours["grad_x"].is_contiguous(memory_format=layout)
    apart = summed.results(apart=True)
    assert torch.equal(ours["sum"], apart["sum"])
    if is_interpreted():  # a compiler may contract the sum with what follows
        assert torch.equal(ours["y"], apart["y"])
    rows = summed.results(by_sample=True)
    before = summed.results(before=ours["sum"])
    if is_interpreted():
        assert all(torch.equal(before[name], ours[name]) for name in set(ours) - {"grad_skip"})
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    plain, oracle = summed.results(), summed.results(torch.float64)
    for name in ours:
        terms = over_pixels(name, summed.upstream)
        for found in (ours, rows, before)[: 2 + (name != "grad_skip")]:
            check_against_oracle(found[name], plain[name], oracle[name], name, terms=terms)


@pytest.mark.parametrize(("channels", "pixels"), [(40, 25 * 31), (40, 28 * 25)])
def test_some_sums_are_read_twice(channels, pixels):
    for itemsize in (2, 4):
        for is_last in (False, True):
            for backward in (False, True):
                plan = plan_slabs(channels, pixels, 1, itemsize, 8, is_last, backward)
                assert not plan.holds


@pytest.mark.parametrize("size", [8, 48])
def test_kernel_sums_to_a_large_mean(size, triton_device):
    # Against the normalisation alone, which is held to float64 beside a large mean: 1e3 times the spread.
    site = (1, 16, 0, size, size, 2, 0.7, 2, False)  # 48 x 48 x 16 is read twice
    summed = Summed(site, torch.float32, LAYOUTS[1], triton_device, mean=3000.0)
    ours, apart = summed.results(), summed.results(apart=True)
    for name in ("y", "sum", "grad_x", "grad_weight"):
        if is_interpreted():
            assert torch.equal(ours[name], apart[name]), name
        torch.testing.assert_close(ours[name], apart[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("without", [(0,), (1,), (2,), (1, 2), (0, 1)], ids=str)
def test_gradients_of_a_sum_may_be_absent(
    without, triton_device, check_against_oracle, monkeypatch
):
    summed = Summed(SUM_SITES[0], torch.float32, LAYOUTS[1], triton_device)
    ours = summed.results(without=without)
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    plain, oracle = (summed.results(dtype, without=without) for dtype in (None, torch.float64))
    for name in ours:
        if oracle[name] is None:
            assert ours[name] is None or not ours[name].any()
        else:
            terms = over_pixels(name, summed.upstream)
            check_against_oracle(ours[name], plain[name], oracle[name], name, terms=terms)


def test_kernel_sums_write_every_element(triton_device, monkeypatch):
    def poisoned(make):
        return lambda *args, **options: make(*args, **options).fill_(math.nan)

    summed = Summed(SUM_SITES[1], torch.float32, LAYOUTS[1], triton_device)
    first = summed.results()
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    second = summed.results()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_second_gradient_may_be_a_slice_of_channels(layout, triton_device):
    x, (weight, bias), _ = on(triton_device, 2, 24, 4, 3, torch.float32, layout)
    wide = torch.randn(2, 40, 4, 3, device=triton_device).contiguous(memory_format=layout)
    twins, found = (wide[:, 8:32], wide[:, 8:32].contiguous(memory_format=layout)), []
    for twin in twins:
        leaf = x.clone().requires_grad_()
        outputs = group_norm_silu(leaf, 3, weight, bias, twice=True)
        found += torch.autograd.grad(outputs, leaf, [torch.ones_like(x), x, twin])
    leaf = x.clone().requires_grad_()
    outputs = group_norm_silu(leaf, 3, weight, bias, with_x=True)
    found += torch.autograd.grad(outputs, leaf, [torch.ones_like(x), x + twins[1]])
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_sums_of_any_kind_and_refusals(triton_device):
    x, (weight, bias), _ = on(triton_device, 2, 12, 3, 4, torch.float32, LAYOUTS[1])
    skip, b = x.flip(0), torch.randn(12, device=triton_device, requires_grad=True)
    expected = group_norm_silu(residual(x, skip, 0.7, b), 3, weight, bias)
    options = dict(sum_scale=0.7, x_bias=b)
    for others in (skip, skip.contiguous(), skip.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(group_norm_silu(x, 3, weight, bias, skip=others, **options), expected)
    other_bias = torch.zeros_like(b)  # of which one alone wants a gradient
    options |= dict(skip=skip, skip_bias=other_bias)
    y = group_norm_silu(x, 3, weight, bias, **options)
    (grad,) = torch.autograd.grad(y.square().sum(), b)
    (plain,) = torch.autograd.grad(expected.square().sum(), b)
    torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-4)
    for rows in (x[:0], x[:0].contiguous()):
        y, past, twin = group_norm_silu(rows, 3, weight, bias, skip=rows, x_bias=b, twice=True)
        assert y.shape == past.shape == twin.shape == (0, 12, 3, 4)
        assert not torch.autograd.grad(y.sum(), b)[0].any()
    wide = group_norm_silu(x.double(), 3, weight, bias, **(options | {"skip": skip.double()}))
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-5)
    x.requires_grad_()
    for second in (None, skip[:, :6]):
        affine = [v.repeat(2)[: 12 if second is None else 18] for v in (weight, bias)]
        arguments = x, *affine, *[None] * 6, 3, 1e-6, True, 0, 0, second, skip, 0.7, b, None
        torch.library.opcheck(torch.ops.tcm_fast.group_norm_silu_merged_fwd.default, arguments)
    for change, message in (
        ({"skip": skip[:1]}, r"group_norm_silu: skip must be \[2, 12, 3, 4\] on cpu like x"),
        ({"x_bias": b[:3]}, r"group_norm_silu: x_bias must be \[12\] on cpu, or all"),
        (
            {"skip_bias": b.expand(2, -1)},
            r"group_norm_silu: skip_bias must be \[12\] on cpu, or all",
        ),
        ({"skip": None}, r"x_bias, skip_bias, sum_scale are of a sum, got no skip"),
        ({"summed": True}, r"group_norm_silu: summed must be False with skip, got both"),
        (
            {"summed": True, "skip": None, "x_bias": b[:3]},
            r"group_norm_silu: x_bias must be \[12\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm_silu(x, 3, weight, bias, **(options | change))
    with pytest.raises(
        TypeError, match=r"one floating dtype, got torch\.float32 and torch\.float64"
    ):
        group_norm_silu(x, 3, weight, bias, skip=skip.double())


def test_sums_compile_to_one_graph_under_autocast(triton_device):
    x, (weight, bias), _ = on(triton_device, 2, 12, 3, 5, torch.bfloat16, LAYOUTS[1])
    x.requires_grad_()

    def block(x):
        options = dict(skip=x.flip(0), sum_scale=0.7, x_bias=bias, second=x[:, :6])
        affine = (torch.cat([v, v[:6]]) for v in (weight, bias))
        y, past, twin, other = group_norm_silu(x, 3, *affine, twice=True, **options)
        return y + torch.cat([past * twin, other], 1)

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        with torch.autocast(triton_device, dtype=torch.bfloat16):
            y = function(x)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sums_on_a_cpu(layout):
    x, (weight, bias), _ = case(2, 12, 4, 3, layout=layout)
    skip = x.flip(0)
    x.requires_grad_()
    expected = residual(x, skip, 0.7, bias)
    y, *past = group_norm_silu(
        x, 3, weight, bias, skip=skip, sum_scale=0.7, x_bias=bias, twice=True
    )
    assert all(torch.equal(v, expected) for v in past)
    assert torch.equal(y, group_norm_silu(expected, 3, weight, bias))
    grads = [
        torch.autograd.grad(outputs, x, [g * skip for g in (1, 2, 3)], retain_graph=True)[0]
        for outputs in ([y, *past], [y, expected, expected])
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_joining_on_a_cpu(n, layout):
    x, (weight, bias), _ = case(n, 12, 4, 3)
    a, b = (v.contiguous(memory_format=layout) for v in x.split([8, 4], 1))
    expected = group_norm_silu(x, 3, weight, bias)
    y, *past = group_norm_silu(a, 3, weight, bias, second=b, with_x=True)
    torch.testing.assert_close(y, expected)
    assert all(torch.equal(u, v) for u, v in zip(past, (a, b), strict=True))


def test_joining_without_a_kernel_and_refusals(triton_device):
    x, (weight, bias), _ = on(triton_device, 2, 12, 3, 3, torch.float32, LAYOUTS[1])
    a, b = (v.contiguous(memory_format=LAYOUTS[1]) for v in x.split([8, 4], 1))
    expected = group_norm_silu(x, 3, weight, bias)
    assert torch.equal(group_norm_silu(a, 3, weight, bias, second=b), expected)
    mixed, *past = group_norm_silu(a, 3, weight, bias, second=b.contiguous(), with_x=True)
    assert torch.equal(mixed, expected)
    assert torch.equal(torch.cat(past, 1), x)
    y, *past = group_norm_silu(a[:0], 3, weight, bias, second=b[:0], with_x=True)
    assert y.shape == torch.cat(past, 1).shape == (0, 12, 3, 3)
    y, *past = group_norm_silu(x, 3, weight, bias, second=x[:, :0], with_x=True)
    assert torch.equal(y, expected)
    assert torch.equal(torch.cat(past, 1), x)
    arguments = a, weight, bias, *[None] * 6, 3, 1e-6, True, 0, 0, b, None, 1.0, None, None
    torch.library.opcheck(torch.ops.tcm_fast.group_norm_silu_merged_fwd.default, arguments)
    for wrong in (b[:1], b[:, :, :2], b.double(), b.to("meta"), b[0]):
        with pytest.raises(ValueError, match=r"second must be \[2,C2,3,3\] of torch\.float32 on"):
            group_norm_silu(a, 3, weight, bias, second=wrong)
    with pytest.raises(ValueError, match=r"num_groups must divide C=12, got 5"):
        group_norm_silu(a, 5, weight, bias, second=b)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("asked", ["both", "weight", "bias"])
def test_gradients_of_the_affine_parameters_by_sample(asked, backend, request, monkeypatch):
    """They add up to those that are summed, in which the order alone may differ."""
    monkeypatch.setenv("TCM_FAST_BACKEND", backend)
    device = request.getfixturevalue("triton_device") if backend == "kernel" else "cpu"
    x, affine, _ = on(device, 3, 24, 5, 3, torch.float32, LAYOUTS[1])
    names = ("weight", "bias")
    leaves = [
        v.requires_grad_(asked in ("both", name)) for v, name in zip(affine, names, strict=True)
    ]
    wanted = [v for v in leaves if v.requires_grad]
    upstream = torch.randn_like(x)
    plain = group_norm_silu(x, 3, *leaves)
    expanded = group_norm_silu(x, 3, *(v.expand(3, -1) for v in leaves))
    assert torch.equal(plain, expanded)
    grads = [torch.autograd.grad(y, wanted, upstream) for y in (plain, expanded)]
    for summed, added in zip(*grads, strict=True):
        torch.testing.assert_close(summed, added)
    if backend == "kernel":
        rows = [v.detach().expand(3, -1).requires_grad_() for v in leaves]
        group_norm_silu(x, 3, *rows).backward(upstream)
        one = [v.detach().requires_grad_() for v in leaves]
        group_norm_silu(x[1:2], 3, *one).backward(upstream[1:2])
        for row, single in zip(rows, one, strict=True):
            assert torch.equal(row.grad[1], single.grad)


def test_either_gradient_may_be_absent(triton_device, monkeypatch):
    x, (weight, bias), _ = on(triton_device, 2, 8, 3, 3, torch.float32, LAYOUTS[1])
    x.requires_grad_()
    weight.requires_grad_()
    y, past = group_norm_silu(x, 2, weight, bias, with_x=True)
    plain = group_norm_silu(x, 2, weight, bias)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), (x, weight), retain_graph=True),
        torch.autograd.grad(plain.square().sum(), (x, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)
    grad, none = torch.autograd.grad(past.sum(), (x, weight), allow_unused=True)
    assert torch.equal(grad, torch.ones_like(x))
    assert none is None
    with torch.no_grad():
        y, past = group_norm_silu(x, 2, weight, bias, with_x=True)
    assert torch.equal(past, x)
    assert torch.equal(y, plain)


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
def test_kernel_against_float64(
    site, layout, dtype, triton_device, check_against_oracle, monkeypatch
):
    n, c, height, width, groups = site
    x, affine, modulation = on(triton_device, n, c, height, width, dtype, layout)
    options = dict(dropout_p=0.3, dropout_key=key_on(triton_device, n))
    compare(x, groups, affine, modulation, check_against_oracle, monkeypatch, **options)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("given_parts", [(), ("add",), ("scale",), ("shift",), ("scale", "shift")])
def test_kernel_with_any_part_left_out(
    given_parts, silu, triton_device, check_against_oracle, monkeypatch
):
    for layout in LAYOUTS:
        x, affine, modulation = on(triton_device, 2, 24, 6, 5, torch.float32, layout)
        modulation = {name: modulation[name] for name in given_parts}
        compare(x, 6, affine, modulation, check_against_oracle, monkeypatch, silu=silu)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_reads_a_big_image_twice(
    layout, dtype, triton_device, check_against_oracle, monkeypatch
):
    # 65 x 65 pixels: the last tile of the loop is not full.
    is_last = layout == torch.channels_last
    assert not plan_slabs(24, 4225, 2, dtype.itemsize, 8, is_last, False).holds
    assert not plan_slabs(24, 4225, 2, dtype.itemsize, 8, is_last, True).holds
    x, affine, modulation = on(triton_device, 1, 24, 65, 65, dtype, layout)
    options = dict(dropout_p=0.3, dropout_key=key_on(triton_device, 1))
    compare(x, 2, affine, modulation, check_against_oracle, monkeypatch, **options)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
@pytest.mark.parametrize(
    "site",
    [(128, 32), (256, 32), (384, 32), (512, 32), (512, 16), (192, 64), (576, 64), (960, 32)],
    ids=str,
)
def test_kernel_at_the_networks_sites(
    site, layout, dtype, triton_device, check_against_oracle, monkeypatch
):
    c, size = site
    x, affine, modulation = on(triton_device, 1, c, size, size, dtype, layout)
    options = dict(dropout_p=0.13, dropout_key=key_on(triton_device, 1))
    compare(x, 32, affine, modulation, check_against_oracle, monkeypatch, **options)


@pytest.mark.slow_emulated
@given(
    n=st.integers(1, 3),
    groups=st.integers(1, 9),
    per_group=st.integers(1, 18),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(LAYOUTS),
    p=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from(DTYPES),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_kernel_on_any_size(
    n, groups, per_group, size, layout, p, dtype, triton_device, check_against_oracle, monkeypatch
):
    x, affine, modulation = on(triton_device, n, groups * per_group, *size, dtype, layout)
    # A group of one value has no gradient but rounding; nothing to compare there.
    if per_group * math.prod(size) < 8:
        x = x.requires_grad_()
        assert group_norm_silu(x, groups, *affine, **modulation).isfinite().all()
        return
    options = dict(dropout_p=p, dropout_key=key_on(triton_device, n))
    compare(x, groups, affine, modulation, check_against_oracle, monkeypatch, **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [16, 48])
def test_kernel_with_a_large_mean(layout, size, triton_device, check_against_oracle, monkeypatch):
    # |mean| / std = 1e3: E[x²] - E[x]² would have no digit left. 48 x 48 x 16 is read twice.
    x, affine, _ = on(triton_device, 1, 16, size, size, torch.float32, layout)
    x = x / 3 + torch.linspace(-1000, 1000, 2, device=x.device).repeat_interleave(8)[:, None, None]
    x = x.contiguous(memory_format=layout)
    compare(x, 2, affine, {}, check_against_oracle, monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kernel_with_constant_groups(layout, triton_device):
    _, (weight, bias), _ = on(triton_device, 2, 12, 5, 7, torch.float32, layout)
    x = torch.full((2, 12, 5, 7), 777.7, device=triton_device).contiguous(memory_format=layout)
    x.requires_grad_()
    y = group_norm_silu(x, 3, weight, bias, 1e-6, silu=False)
    # One unit in the last place of 777.7 is 6e-5, and 1/sqrt(eps) is 1e3.
    assert (y - bias[:, None, None]).abs().max() < 0.2
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.slow_emulated
@pytest.mark.parametrize("silu", [False, True])
def test_kernel_drops_what_dropout_drops(silu, triton_device):
    n, key, p = 4, key_on(triton_device, 4), 0.4
    for c, height, width, groups in ((48, 5, 7, 8), (12, 5, 7, 3), (10, 3, 5, 5)):
        kept = dropout_mask(key, p, (n, c, height, width))
        for layout in LAYOUTS:
            for dtype in DTYPES:
                x, affine, _ = on(triton_device, n, c, height, width, dtype, layout)
                for rows in (slice(0, n), slice(1, 2)):
                    part = x[rows].contiguous(memory_format=layout).requires_grad_()
                    options = dict(silu=silu, dropout_p=p, dropout_key=key.select(rows))
                    y = group_norm_silu(part, groups, *affine, **options)
                    # Some output is zero by itself: a value that 16 bits cannot tell from zero.
                    own = group_norm_silu(part, groups, *affine, silu=silu) == 0
                    assert torch.equal((y != 0) | own, kept[rows] | own)
    # Backward, the same mask: where nothing is kept, the bias has no gradient.
    x, (weight, bias), _ = on(triton_device, n, 48, 1, 1, torch.float32, LAYOUTS[0])
    shift = torch.zeros(n, 48, device=triton_device, requires_grad=True)
    y = group_norm_silu(x, 8, weight, bias, shift=shift, silu=False, dropout_p=p, dropout_key=key)
    kept = dropout_mask(key, p, (n, 48, 1, 1))[:, :, 0, 0]
    (grad,) = torch.autograd.grad(y.sum(), shift)
    assert torch.equal(grad, kept / (1 - round(p * 65536) / 65536))


@pytest.mark.parametrize("dtype", EACH_DTYPE, ids=str)
def test_kernel_gives_equal_bits_and_writes_every_element(dtype, triton_device, monkeypatch):
    def poisoned(make):
        return lambda *args, **options: make(*args, **options).fill_(math.nan)

    for layout in LAYOUTS:
        for n, c, height, width, groups in ((2, 24, 5, 7, 4), (1, 6, 65, 66, 1)):
            x, affine, modulation = on(triton_device, n, c, height, width, dtype, layout)
            options = dict(dropout_p=0.3, dropout_key=key_on(triton_device, n))
            grad = torch.randn_like(x)
            arguments = (x, groups, affine, modulation, grad, monkeypatch)
            first = run(*arguments, **options)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", poisoned(torch.empty))
                patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
                second = run(*arguments, **options)
            for a, b in zip(first, second, strict=True):
                assert torch.equal(a, b)
                assert a.isfinite().all()


def test_kernel_serves_any_tensor_and_any_subset_of_gradients(triton_device, monkeypatch):
    x, (weight, bias), _ = on(triton_device, 2, 12, 6, 8, torch.float32, LAYOUTS[1])
    both = torch.randn(2, 24, device=x.device, requires_grad=True)
    results = []
    for backend in ("kernel", "reference"):
        monkeypatch.setenv("TCM_FAST_BACKEND", backend)
        # Rows that lie apart, columns that do, an expanded gradient.
        scale, shift = both.chunk(2, 1)
        parts = dict(scale=scale, shift=shift, add=both.T[:12].T)
        leaf = x.clone().requires_grad_()
        outputs = [
            group_norm_silu(leaf[..., ::2], 3, weight, bias, **parts),
            group_norm_silu(leaf.transpose(2, 3), 3, weight, bias, **parts),
            group_norm_silu(leaf[:, :, 1:], 3, weight, bias, add=both[:, ::2]),
        ]
        grads = torch.autograd.grad(sum(y.sum() for y in outputs), (leaf, both))
        results.append([*outputs, *grads])
        for chosen in ([weight], [bias], [weight, bias]):
            for tensor in (weight, bias):
                tensor.requires_grad_(any(tensor is c for c in chosen))
            y = group_norm_silu(x, 3, weight, bias)
            results[-1] += torch.autograd.grad(y.square().sum(), chosen)
        weight.requires_grad_(False), bias.requires_grad_(False)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_kernel_on_an_empty_batch(layout, triton_device):
    x, (weight, bias), modulation = on(triton_device, 0, 12, 5, 7, torch.float32, layout)
    tensors = [v.requires_grad_() for v in (x, weight, bias, modulation["add"])]
    y = group_norm_silu(x, 3, weight, bias, add=tensors[3])
    grads = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == x.shape
    assert [g.shape for g in grads] == [v.shape for v in tensors]
    assert not grads[1].any()
    empty = torch.zeros(2, 12, 0, 7, device=triton_device)
    assert group_norm_silu(empty, 3, weight, bias).shape == empty.shape
    group_norm_silu(torch.zeros(1, 12, 1, 1, device=triton_device), 3, weight, bias)  # launches


def test_kernel_refuses_a_second_derivative_and_too_large_a_sample(triton_device):
    x, (weight, bias), _ = on(triton_device, 1, 12, 2, 2, torch.float32, LAYOUTS[0])
    x.requires_grad_()
    y = group_norm_silu(x, 3, weight, bias)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)
    large = x.detach()[:, :1, :1, :1].expand(1, 12, 2**14, 2**14)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements, got 3221225472"):
        group_norm_silu(large, 3, weight, bias)


def test_kernel_passes_opcheck(triton_device):
    x, (weight, bias), modulation = on(triton_device, 2, 12, 3, 5, torch.float32, LAYOUTS[1])
    tensors = [v.requires_grad_() for v in (x, weight, bias, *modulation.values())]
    key = (
        torch.arange(2, device=x.device),
        *(torch.full((), v, dtype=torch.int64, device=x.device) for v in (3, 2)),
    )
    for layer_threshold, drop in (((1, 20000), key), ((0, 0), (None, None, None))):
        arguments = (*tensors, *drop, 3, 1e-6, True, *layer_threshold)
        torch.library.opcheck(torch.ops.tcm_fast.group_norm_silu_fwd.default, arguments)
    _, mean, rstd = torch.ops.tcm_fast.group_norm_silu_fwd(*arguments)
    plain = [v.detach() for v in (torch.ones_like(x), x, mean, rstd, *tensors[1:])]
    for past in (None, plain[0]):
        arguments = (plain[0], past, *plain[1:], None, None, None, 3, True, 0, 0, True)
        torch.library.opcheck(torch.ops.tcm_fast.group_norm_silu_bwd.default, arguments)


def test_kernel_compiles_to_one_graph_under_autocast(triton_device):
    x, (weight, bias), modulation = on(triton_device, 2, 12, 3, 5, torch.bfloat16, LAYOUTS[1])
    x.requires_grad_()
    options = dict(modulation, dropout_p=0.3, dropout_key=key_on(triton_device, 2))

    def block(*args, **options):
        y, past = group_norm_silu(*args, with_x=True, **options)
        return group_norm_silu(y, 3, *args[2:], **options) + past

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        with torch.autocast(triton_device, dtype=torch.bfloat16):
            y = function(x, 3, weight, bias, **options)
        assert y.dtype == torch.bfloat16
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_kernel_in_a_network(triton_device, monkeypatch):
    from tcm_fast import build_network

    torch.manual_seed(0)
    net = build_network(
        "ddpmpp", img_resolution=4, img_channels=3, model_channels=16, channel_mult=[1],
        num_blocks=1, attn_resolutions=[], dropout=0.2,
    ).to(triton_device).train()  # fmt: skip
    x = torch.randn(2, 3, 4, 4, device=triton_device)
    t = torch.tensor([0.5, 20.0], device=triton_device)
    key = key_on(triton_device, 2)
    parameters = dict(net.named_parameters())
    monkeypatch.delenv("TCM_FAST_BACKEND")  # the attention of these widths is another test's
    before = _triton.LAUNCHES["_group_norm_silu_fwd_kernel"]
    ours = net(x, t, dropout_key=key)
    assert _triton.LAUNCHES["_group_norm_silu_fwd_kernel"] > before
    ours.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert torch.equal(copy.deepcopy(net)(x, t, dropout_key=key), ours)
    assert torch.equal(
        torch.func.functional_call(net, parameters, (x, t), {"dropout_key": key}), ours
    )
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    torch.testing.assert_close(net(x, t, dropout_key=key), ours, rtol=1e-4, atol=1e-4)


@pytest.fixture
def traffic(monkeypatch):
    """Elements that interpreted kernels load and store. To be asked for before triton_device, which fails
    where nothing was launched."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not is_interpreted():
        pytest.skip("counted in the interpreter")
    interpreter_builder = interpreter.interpreter_builder

    count = {"load": 0, "store": 0}
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def counted_load(pointers, mask, *rest):
        count["load"] += int(mask.data.sum())
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        count["store"] += int(mask.data.sum())
        return store(pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", counted_load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", counted_store)
    return count


@pytest.mark.parametrize(
    ("c", "size", "dtype"),
    [
        (128, 32, torch.bfloat16),
        (128, 32, torch.float32),
        (256, 16, torch.float16),
        (256, 16, torch.float32),
        (256, 8, torch.bfloat16),
    ],
    ids=str,
)
def test_traffic_of_slabs_that_are_held(c, size, dtype, traffic, triton_device):
    # The [N,C] operands cost 3 to 7 of each channel's size² elements.
    few = 8 / size**2
    x, (weight, bias), modulation = on(triton_device, 1, c, size, size, dtype, LAYOUTS[1])
    x.requires_grad_()
    y = group_norm_silu(
        x, 32, weight, bias, add=modulation["add"], dropout_p=0.13,
        dropout_key=key_on(triton_device, 1),
    )  # fmt: skip
    elements = x.numel()
    assert traffic["store"] < (1 + few) * elements
    assert sum(traffic.values()) < (2 + few) * elements
    traffic.update(load=0, store=0)
    torch.autograd.grad(y.sum(), x)
    assert traffic["store"] < (1 + few) * elements
    assert sum(traffic.values()) < (3 + few) * elements


@pytest.mark.parametrize(("second", "twice"), [(0, True), (128, False)])
def test_traffic_of_sums(second, twice, traffic, triton_device):
    site = (1, 128, second, 16, 16, 32, 0.7, 2, twice)
    summed = Summed(site, torch.bfloat16, LAYOUTS[1], triton_device)
    one, both = 128 * 16**2, (128 + second) * 16**2
    before = torch.autograd.grad
    count = {}

    def grad(*args, **options):
        count["forward"] = sum(traffic.values())
        return before(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        summed.results()
    few = 0.1 * both
    # h, skip and `second` in, the sum (joined) and y out; four or five in and out backward.
    assert count["forward"] < one + both + 2 * both + few
    assert sum(traffic.values()) - count["forward"] < (5 if twice else 4) * both + few


def test_traffic_of_slabs_that_are_not(traffic, triton_device):
    x, (weight, bias), _ = on(triton_device, 1, 48, 64, 64, torch.bfloat16, LAYOUTS[1])
    x.requires_grad_()
    y = group_norm_silu(x, 8, weight, bias)
    assert sum(traffic.values()) < 3.1 * x.numel()
    traffic.update(load=0, store=0)
    torch.autograd.grad(y.sum(), x)
    assert sum(traffic.values()) < 5.1 * x.numel()


def test_plans_hold_what_they_say():
    for pixels in (1, 9, 64, 100, 256, 1024, 4096):
        for c, groups in (
            (128, 32),
            (256, 32),
            (192, 32),
            (576, 32),
            (1344, 32),
            (130, 13),
            (7, 1),
        ):
            for itemsize in (2, 4):
                for is_last in (False, True):
                    for backward in (False, True):
                        plan = plan_slabs(c, pixels, groups, itemsize, 8, is_last, backward)
                        assert 1 <= plan.groups <= groups
                        assert plan.groups * (c // groups) <= plan.slab
                        for power in (plan.slab, plan.pixels, plan.warps):
                            assert power & (power - 1) == 0
                        if plan.holds:
                            assert pixels * plan.slab * itemsize <= 65536


def test_specialisations_fit_the_kernels():
    variants = specialisations(90)
    kernels = {_group_norm_silu_fwd_kernel, _group_norm_silu_bwd_kernel}
    assert {v.kernel for v in variants} == kernels
    assert len({(v.site, v.kernel) for v in variants}) == len(variants)
    for v in variants:
        names = [*v.signature, *v.constants]
        assert sorted(names) == sorted(v.kernel.arg_names)


@pytest.mark.gpu
def test_the_assembler_sigmoid_is_the_portable_one(triton_device):
    tl, triton = _triton.tl, _triton.triton

    @triton.jit
    def kernel(x, y, ASM: tl.constexpr):
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        tl.store(y + at, sigmoid(tl.load(x + at), ASM))

    x = torch.linspace(-120, 120, 2**20, device=triton_device)
    ys = [torch.empty_like(x) for _ in range(2)]
    for asm, y in zip((True, False), ys, strict=True):
        _triton.launch(kernel, (2**10,), x, y, ASM=asm)
    oracle = x.double().sigmoid()
    # Below the smallest normal number the one flushes to zero.
    for y in ys:
        assert ((y - oracle).abs() / oracle.clamp(min=2**-126)).max() < 1e-5
    torch.testing.assert_close(*ys, rtol=1e-5, atol=2**-126)


COMPILE = """
import json, sys
from tcm_fast.benchmarks.static_report import compile_variant
from tcm_fast.kernels.group_norm_silu import specialisations

rows = []
for arch in (80, 90):
    for i, variant in enumerate(specialisations(arch)):
        if variant.site.startswith(sys.argv[1]):
            rows.append(compile_variant(arch, "group_norm_silu", i))
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_nothing_spills_at_sites_of_ddpmpp():
    """A few of those that the recorded report holds, with the compiler that is here."""
    # In a process of its own: this one interprets.
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, "ddpmpp 16x16x256"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 48
    for row in rows:
        assert "error" not in row, row
        assert row["spill_bytes"] == 0, row
        assert row["wide_share"] >= 0.8, row
        assert row["resident"] >= 1, row
