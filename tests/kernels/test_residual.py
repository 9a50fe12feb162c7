"""Residual sums with bias and factor against the formula in float64."""

import importlib
import math
from functools import partial

import pytest
import torch

from tcm_fast.kernels.residual import residual, residual_reference

module = importlib.import_module("tcm_fast.kernels.residual")  # the package has the function
CL, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 24, 4, 3), (3, 7, 5, 3), (1, 256, 8, 8)]


def case(shape=(2, 24, 4, 3), biases=1):
    generator = torch.Generator().manual_seed(1)
    shapes = [shape, shape, shape[1:2], shape[1:2]][: 2 + biases]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def pair(scale, by_sample=False):
    def ours(function, x, skip, *biases):
        if by_sample:
            biases = [b.expand(x.shape[0], -1) for b in biases]
        return function(x, skip, scale, *biases)

    return (partial(ours, function) for function in (residual, residual_reference))


def test_the_reference_is_the_formula():
    x, skip, bias = case()
    expected = (x + 3 * bias[:, None, None] + skip) / math.sqrt(2)
    found = residual_reference(x, skip, math.sqrt(0.5), bias, 2 * bias)
    assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, math.sqrt(0.5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(compare, dtype, layout, biases, scale, shape):
    compare(*pair(scale), case(shape, biases), [shape], dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("biases", [1, 2])
@pytest.mark.parametrize("scale", [1.0, math.sqrt(0.5)])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 80, 8, 12), (1, 100, 1, 1)], ids=str)
def test_kernels_that_leave_the_biases_gradients_by_sample(
    compare, dtype, layout, biases, scale, shape
):
    compare(*pair(scale, by_sample=True), case(shape, biases), [shape], dtype, layout)


def test_gradients_by_sample(triton_device):
    x, skip, *biases = (v.float().to(triton_device) for v in case(biases=2))
    upstream = torch.randn_like(x)
    for scale in (0.5, 1.0):
        rows = [b.expand(2, -1).requires_grad_() for b in biases]
        residual(x, skip, scale, *rows).backward(upstream)
        for row in rows:
            torch.testing.assert_close(row.grad, scale * upstream.sum((2, 3)))


def test_programs_of_a_sample_cover_its_pixels_once():
    for shape in ((64, 256, 32, 32), (16, 192, 64, 64), (1024, 768, 8, 8), (5, 7, 5, 3)):
        constants, grid = module._constants_by_sample(shape, True)
        assert constants["PIXELS"] * constants["PIECE"] == shape[2] * shape[3]
        assert grid[0] == shape[0]
        assert grid[1] * constants["WIDTH"] >= shape[1]


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_of_two_biases_has_a_gradient(triton_device, wanted):
    x, skip, *biases = (v.float().to(triton_device) for v in case(biases=2))
    leaves = [b.requires_grad_(wants) for b, wants in zip(biases, wanted, strict=True)]
    out = residual(x, skip, 0.5, *leaves)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    for bias, wants in zip(leaves, wanted, strict=True):
        if wants:
            torch.testing.assert_close(bias.grad, 0.5 * upstream.sum((0, 2, 3)))
        else:
            assert bias.grad is None
    exact = residual_reference(*(v.double() for v in (x, skip)), 0.5, *(b.double() for b in leaves))
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)


def test_kernels_whose_sums_come_in_pieces(compare, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 4)
    shape = (3, 48, 32, 31)
    constants, grid = module._constants(shape, True, True)
    assert constants["PIECE"] > 1
    assert grid[0] > 1
    compare(*pair(0.5), case(shape), [shape], torch.float32)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_element_is_written(compare, poisoned, scale):
    compare(*pair(scale), case((3, 7, 5, 3)), [(3, 7, 5, 3)], torch.float32)


def test_layouts_that_differ_empty_batches_and_the_operators(triton_device):
    x, skip, bias = (v.float().to(triton_device) for v in case())
    mixed = residual(x, skip.contiguous(memory_format=CL), 0.5, bias)
    assert torch.equal(mixed, residual(x, skip, 0.5, bias))
    assert residual(x[:0], skip[:0], 0.5, bias).shape == (0, 24, 4, 3)
    bias.requires_grad_()
    for scale in (0.5, 1.0):
        for skip_bias in (None, torch.ones_like(bias, requires_grad=True)):
            arguments = x, skip, scale, bias, skip_bias
            torch.library.opcheck(torch.ops.tcm_fast.residual_fwd.default, arguments)


def test_compiles_to_one_graph():
    compiled = torch.compile(residual, fullgraph=True, backend="aot_eager")
    x, skip, bias = case()
    assert torch.allclose(compiled(x, skip, 0.5, bias), residual(x, skip, 0.5, bias))


def test_refuses():
    x, skip, bias = case()
    with pytest.raises(
        TypeError, match=r"one floating dtype, got torch\.float64 and torch\.float32"
    ):
        residual(x, skip.float())
    with pytest.raises(ValueError, match=r"residual: skip must be \[2, 24, 4, 3\] on cpu like x"):
        residual(x, skip[:1])
    with pytest.raises(
        ValueError, match=r"residual: bias must be \[24\] on cpu, or all .* got \[3\]"
    ):
        residual(x, skip, 1.0, bias[:3])
    with pytest.raises(ValueError, match=r"residual: skip_bias must be \[24\] on cpu, or all"):
        residual(x, skip, 1.0, bias, bias[:4])
    with pytest.raises(
        ValueError, match=r"or all biases expanded \(stride 0\) to \[2,24\], got \[2, 24\]"
    ):
        residual(x, skip, 1.0, bias, bias.expand(2, -1))
    with pytest.raises(
        ValueError, match=r"or all biases expanded \(stride 0\) to \[2,24\], got \[2, 24\]"
    ):
        residual(x, skip, 1.0, bias.repeat(2, 1))  # may differ between the samples
    with pytest.raises(ValueError, match=r"x must be \[N,C,H,W\], got \[24\]"):
        residual(bias, bias)


SLICES = [
    (2, 24, 4, 3, 8, 40),
    (3, 7, 5, 3, 6, 20),
    (1, 256, 8, 8, 0, 512),
    (2, 5, 1, 1, 0, 8),
    (1, 16, 1, 6, 16, 48),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, math.sqrt(0.5)])
@pytest.mark.parametrize("place", SLICES, ids=str)
def test_the_backward_kernel_reads_a_slice_of_channels(
    triton_device, poisoned, check_against_oracle, dtype, bias, scale, place
):
    """As it lies, with the same bits as from a dense copy."""
    n, c, h, w, first, channels = place
    whole = torch.randn(n, channels, h, w, generator=torch.Generator().manual_seed(2))
    whole = whole.to(triton_device, dtype).contiguous(memory_format=CL)
    part = whole[:, first : first + c]
    assert module._row(part) == channels
    grad_x, grad_bias = torch.ops.tcm_fast.residual_bwd(part, scale, bias)
    dense = torch.ops.tcm_fast.residual_bwd(part.contiguous(memory_format=CL), scale, bias)
    assert grad_x.is_contiguous(memory_format=CL)
    assert torch.equal(grad_x, dense[0])
    exact = part.double() * scale
    check_against_oracle(grad_x, (part.float() * scale).to(dtype), exact, f"grad {dtype}")
    if bias:
        assert torch.equal(grad_bias, dense[1])
        plain = (part.float() * scale).sum((0, 2, 3))
        check_against_oracle(grad_bias, plain, exact.sum((0, 2, 3)), f"grad_bias {dtype}")


def test_rows_of_what_is_no_slice_of_channels():
    x = torch.empty(2, 8, 4, 4).contiguous(memory_format=CL)
    assert module._row(x) == 8
    assert module._row(x[:, 2:5]) == 8
    for other in (
        x[:, ::2],
        x[:, :, ::2],
        x[..., 1:],
        x.contiguous(),
        x[:1, :1, :1, :1].expand(2, 8, 4, 4),
    ):
        assert module._row(other) == 0


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_the_gradient_of_a_concatenation_keeps_its_layout(triton_device, scale):
    """It is a slice of channels: neither contiguous nor channels_last by torch's words, but it lies so."""
    check_the_gradient_of_a_concatenation(triton_device, scale)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_the_references_gradient_of_a_concatenation_is_dense(scale, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    check_the_gradient_of_a_concatenation("cpu", scale)


def check_the_gradient_of_a_concatenation(device, scale):
    x, skip = torch.randn(2, 2, 8, 4, 4, device=device)
    x, skip = (v.contiguous(memory_format=torch.channels_last).requires_grad_() for v in (x, skip))
    bias = torch.zeros(8, device=device, requires_grad=True)
    seen = []
    x.register_hook(seen.append)
    both = torch.cat([residual(x, skip, scale, bias), skip], 1)
    upstream = torch.randn_like(both)
    both.backward(upstream)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.grad, upstream[:, :8] * scale)
    torch.testing.assert_close(bias.grad, x.grad.sum((0, 2, 3)))
