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


def case(shape=(2, 24, 4, 3), bias=True):
    generator = torch.Generator().manual_seed(1)
    shapes = [shape, shape, shape[1:2]][: 2 + bias]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def pair(scale):
    def ours(function, x, skip, bias=None):
        return function(x, skip, scale, bias)

    return (partial(ours, function) for function in (residual, residual_reference))


def test_the_reference_is_the_formula():
    x, skip, bias = case()
    expected = (x + bias[:, None, None] + skip) / math.sqrt(2)
    assert torch.allclose(residual_reference(x, skip, math.sqrt(0.5), bias), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, math.sqrt(0.5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(compare, dtype, layout, bias, scale, shape):
    compare(*pair(scale), case(shape, bias), [shape], dtype, layout)


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
        torch.library.opcheck(torch.ops.tcm_fast.residual_fwd.default, (x, skip, scale, bias))


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
    with pytest.raises(ValueError, match=r"residual: bias must be \[24\] on cpu, got \[3\]"):
        residual(x, skip, 1.0, bias[:3])
    with pytest.raises(ValueError, match=r"x must be \[N,C,H,W\], got \[24\]"):
        residual(bias, bias)


def test_the_gradient_of_a_concatenation_keeps_its_layout(triton_device):
    """It is a slice of channels: neither contiguous nor channels_last by torch's words, but it lies so."""
    x, skip = torch.randn(2, 2, 8, 4, 4, device=triton_device)
    x, skip = (v.contiguous(memory_format=torch.channels_last).requires_grad_() for v in (x, skip))
    seen = []
    x.register_hook(seen.append)
    both = torch.cat([residual(x, skip, 0.7), skip], 1)
    both.backward(torch.randn_like(both))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
